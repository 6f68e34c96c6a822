r"""Pretrains a storyland base model on the corpus, as the models of the package were.

Run:

    python experiments/pretrain.py --config=configs/pretrain/storyland.py:large \
        --workdir=runs/pretrain_large
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rlhf_jax import optim, sharding
from rlhf_jax.data import text
from rlhf_jax.data.loader import Batches
from rlhf_jax.data.storyland import documents
from rlhf_jax.data.storyland import tokenizer as storyland_assets
from rlhf_jax.evaluation.alignment_tax import lm_loss
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.heads import language_model
from rlhf_jax.run import (
    cli,
    compiling,
    contexts,
    datasets,
    devices,
    inputs,
    memory,
    networks,
    results,
)
from rlhf_jax.run.console import Progress
from rlhf_jax.run.loop import Loop, Settings
from rlhf_jax.run.metrics import StageLog, read
from rlhf_jax.steps import compile_step, make_sft_step, train_state
from rlhf_jax.types import LMBatch, Model, StepFn, TrainState

HELD_OUT_SEED = 1
"""Seed of the corpus stream that no model is trained on."""


class Setup(NamedTuple):
    """What is constant while the stage runs, and its initial state."""

    mesh: jax.sharding.Mesh
    tokenizer: Any
    rows: LMBatch
    batches: Batches[LMBatch]
    held_out: list[LMBatch]
    model: Model
    step: StepFn
    state: TrainState


def prepare(config: ConfigDict) -> Setup:
    """Writes the corpus as rows; builds the model, the step and the state."""
    mesh = devices.start(config.mesh)
    tokenizer = text.load_tokenizer(storyland_assets.assets())
    eos = tokenizer.get_vocab()[storyland_assets.EOS]
    encode = lambda d: text.encode_document(tokenizer, d, eos_id=eos)
    with Progress("writing documents", config.documents, unit="documents") as progress:
        written = []
        for done, document in enumerate(documents(0, config.documents), start=1):
            written.append(encode(document))
            progress(done)
    rows = text.lm_rows(written, length=config.row_length)
    # Another seed gives another stream, so no held-out document is trained on.
    held_out = text.lm_rows(
        [encode(d) for d in documents(0, config.held_out_documents, seed=HELD_OUT_SEED)],
        length=config.row_length,
    )
    context = contexts.Context(config.model.context_length, "config.model")
    for each in (rows, held_out):  # a longer row would have positions that the model lacks
        contexts.check_rows(context, each, f"a document in rows of row_length={config.row_length}")
    batches = datasets.batches(rows, mesh, batch_size=config.batch_size, seed=config.seed)
    model = language_model(DecoderConfig(vocab_size=len(tokenizer), **config.model))
    rate = optim.cosine_to(config.learning_rate, batches.steps(config.epochs))
    tx = optim.adam(rate, weight_decay=config.weight_decay, clip_norm=config.clip_norm)
    held = datasets.held_out_batches(
        held_out, mesh, batch_size=config.batch_size, seed=0, most=config.held_out_batches
    )  # fmt: skip
    state = sharding.place_state(train_state(model.init(jax.random.key(config.seed)), tx), mesh)
    return Setup(
        mesh, tokenizer, rows, batches, held, model, compile_step(make_sft_step(model, tx)), state
    )


def check(config: ConfigDict) -> None:
    """Refuses settings with which no run is possible."""
    inputs.check_settings(config)


def dry_run(config: ConfigDict) -> dict[str, memory.Needs]:
    """Compiles the step for the real rows and prints its memory."""
    setup = prepare(config)
    return memory.dry_run(programs(setup), setup.mesh, state=memory.held(setup.state))


def programs(setup: Setup) -> memory.Programs:
    """The step, compiled for the shapes of the first batch."""
    batch = sharding.place_batch(setup.batches.at(0), setup.mesh)
    yield "train", compiling.lower(setup.step, setup.state, batch, None).compile()


def run(config: ConfigDict, workdir: str) -> dict:
    """Writes ``model/`` (bfloat16) and ``pretrain.json``; returns the contents of the latter."""
    check(config)
    with memory.phase("set-up", lower=("config.documents", "config.row_length")):
        setup = prepare(config)
    model, rows, tokenizer = setup.model, setup.rows, setup.tokenizer
    steps = setup.batches.steps(config.epochs)
    folder = Path(workdir)

    # Evaluated and saved together, so that the model on the disk has its loss in the log.
    def on_save(step: int, state: Any, log: StageLog) -> None:
        log(step, {"held_out_loss": lm_loss(model, state.params, setup.held_out)})
        # bfloat16 halves the file, and `load_hf` reads it back as float32.
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
        networks.save_network(folder / "model", networks.Network(model, half, tokenizer))

    begin = time.monotonic()
    settings = Settings(
        workdir, "pretrain", steps, config.evaluate_every, show=("sft/loss", "held_out_loss")
    )
    with (
        memory.phase(
            "train", lower=("config.batch_size", "config.row_length", "config.mesh (more devices)"),
            programs=partial(programs, setup), rows=config.batch_size, slots=config.row_length,
            parameters=networks.size(setup.state.params),
        ),
        Loop(settings, setup.state, on_save=on_save) as loop,
    ):  # fmt: skip
        for step, state in loop:
            state, metrics = setup.step(
                state, sharding.place_batch(setup.batches.at(step), setup.mesh), None
            )
            loop.log(metrics)
            loop.done(state)

    # Read from the log, because a finished run that is started again evaluates nothing.
    def held_out_loss() -> float:
        rows = read(folder / "metrics.jsonl", "pretrain")
        return [row["held_out_loss"] for row in rows if "held_out_loss" in row][-1]

    return results.write_result(folder / "pretrain.json", lambda: {
        "held_out_loss": held_out_loss(),
        "seconds": round(time.monotonic() - begin),
        "steps": steps,
        "tokens": int((rows.segments > 0).sum()),
        "padding_share": text.padding_share(rows),
        "command": "python experiments/pretrain.py "
            f"--config=configs/pretrain/storyland.py:{config.name}",
        "parameters": networks.size(loop.state.params),
        "seed": config.seed,
        "corpus_sha256": storyland_assets.corpus_fingerprint(),
        "tokenizer_sha256": text.tokenizer_fingerprint(tokenizer),
    })  # fmt: skip


if __name__ == "__main__":
    cli.main(
        run, config="configs/pretrain/storyland.py:large", workdir="runs/pretrain", dry_run=dry_run,
        check=check,
    )  # fmt: skip
