r"""Supervised fine-tuning on demonstrations: the SFT baseline, or the init of PPO.

Run:

    python experiments/sft.py --config=configs/sft/storyland.py --workdir=runs/sft \
        --config.demonstrations=runs/data/demonstrations.jsonl \
        --config.validation=runs/data/demonstrations_validation.jsonl

The init of PPO mixes in pretraining text (`pretraining_fraction` > 0).
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax import sharding
from rlhf_jax.data import schema, text
from rlhf_jax.data.loader import Batches
from rlhf_jax.evaluation.alignment_tax import lm_loss
from rlhf_jax.run import (
    checks,
    cli,
    compiling,
    contexts,
    datasets,
    devices,
    guards,
    inputs,
    memory,
    networks,
    optimizers,
    processes,
    results,
)
from rlhf_jax.run.loop import Loop, Settings
from rlhf_jax.run.metrics import StageLog, read
from rlhf_jax.steps import compile_frozen_step, make_sft_step, train_state
from rlhf_jax.types import LMBatch, Params, StepFn, TrainState

LOWER = (
    "config.microbatches (more, smaller pieces)",
    "config.decoder.remat=block",
    "config.batch_size",
    "config.mesh",
)


class Setup(NamedTuple):
    """The stage before its first step."""

    network: networks.Network
    trained: networks.TrainableParams
    records: guards.RowRecords
    rows: LMBatch
    batches: Batches
    held: list[LMBatch]
    mesh: jax.sharding.Mesh
    step: StepFn
    state: TrainState


def run(config: ConfigDict, workdir: str) -> dict:
    """Writes ``epoch-1/ .. epoch-n/`` and ``sft.json``.

    The result has each epoch's losses, the epoch with the lowest loss, and the last epoch.
    """
    check(config)
    with memory.phase("set-up", lower=LOWER[1:], rows=config.batch_size, slots=config.row_length):
        setup = prepare(config)
    network, trained, held = setup.network, setup.trained, setup.held
    epoch_steps, folder = setup.batches.steps(1), Path(workdir)

    def on_save(step: int, state: Any, log: StageLog) -> None:
        epoch = math.ceil(step / epoch_steps)
        networks.save_network(
            folder / f"epoch-{epoch}", network._replace(params=trained.merged(state.params))
        )
        loss = lm_loss(network.model, trained.whole(state.params), held)
        log(step, {"epoch": epoch, "validation_loss": loss})

    settings = Settings(
        workdir, "sft", steps=epoch_steps * config.epochs, save_every=epoch_steps, keep=config.keep,
        max_skipped=config.guard.max_skipped, show=("sft/loss", "validation_loss"),
    )  # fmt: skip
    with (
        memory.phase(
            "train", lower=LOWER, programs=partial(programs, setup, config), rows=config.batch_size,
            slots=config.row_length, microbatches=config.microbatches,
            parameters=networks.size(network.params),
        ),
        Loop(
            settings, setup.state, origin=origin(config, network), data=setup.records.path,
            on_save=on_save,
        ) as loop,
    ):  # fmt: skip
        for step, state in loop:
            batch = sharding.place_batch(setup.batches.at(step), setup.mesh)
            # Without dropout a step draws nothing and takes no key.
            key = (
                jax.random.fold_in(jax.random.key(config.seed), step)
                if config.dropout > 0
                else None
            )
            state, metrics = setup.step(state, batch, key)
            loop.log(metrics, rows=partial(setup.records.of_step, setup.batches, step))
            loop.done(state)
    last = folder / f"epoch-{config.epochs}"
    # If the folder was lost after training, the last checkpoint restores it; saving is collective,
    # so all processes must agree on whether it is needed.
    if processes.on_first("last epoch", lambda: not last.exists()):
        networks.save_network(last, network._replace(params=trained.merged(loop.state.params)))
    return results.write_result(folder / "sft.json", lambda: summary(folder, setup.rows, config))


def check(config: ConfigDict) -> None:
    """Refuses settings, files and models with which no run is possible, before any are loaded."""
    inputs.check_settings(config)
    inputs.check_model("model", config.model)
    inputs.check_file("demonstrations", config.demonstrations)
    inputs.check_file("validation", config.validation)
    inputs.check_file(
        "pretraining_text", config.pretraining_text, required=config.pretraining_fraction > 0
    )


def summary(folder: Path, rows: LMBatch, config: ConfigDict) -> dict:
    """The epochs' losses, read from the log, and the folders of the best and the last epoch."""
    epochs = [
        row
        for row in read(folder / "metrics.jsonl", "sft")
        if {"validation_loss", "epoch"} <= set(row)
    ]
    checks.require(
        bool(epochs), "metrics.jsonl", str(folder / "metrics.jsonl"),
        "holds no validation loss of this run, somebody changed it: start afresh with --overwrite",
    )  # fmt: skip
    # A loss that was not finite is null in the log and counts as the worst.
    losses = [x if isinstance(x := row["validation_loss"], float) else math.inf for row in epochs]
    lowest = epochs[losses.index(min(losses))]["epoch"]
    return {
        "epochs": [
            {"epoch": int(row["epoch"]), "validation_loss": row["validation_loss"]}
            for row in epochs
        ],
        "lowest_loss": str(folder / f"epoch-{int(lowest)}"),
        "last": str(folder / f"epoch-{config.epochs}"),
        "padding_share": text.padding_share(rows),
    }


def origin(config: ConfigDict, network: networks.Network) -> dict[str, Any]:
    """Fingerprints of the stage's inputs for its checkpoints."""
    files = {key: config[key] for key in ("demonstrations", "validation")}
    if config.pretraining_fraction:
        files["pretraining_text"] = config.pretraining_text
    models = {"model": networks.model_folder(config.model)}
    return guards.origin(config, files=files, models=models, tokenizer=network.tokenizer)


def dry_run(config: ConfigDict) -> dict[str, memory.Needs]:
    """Compiles the step for the real rows and prints its memory."""
    check(config)
    setup = prepare(config)
    staying = memory.held(setup.state, setup.trained.frozen, setup.network.params)
    return memory.dry_run(programs(setup, config), setup.mesh, state=staying)


def programs(setup: Setup, config: ConfigDict) -> memory.Programs:
    """The step, compiled for the shapes of the first batch."""
    key = jax.random.key(config.seed) if config.dropout > 0 else None
    batch = sharding.place_batch(setup.batches.at(0), setup.mesh)
    yield "train", compiling.lower(setup.step, setup.state, batch, key).compile()


def prepare(config: ConfigDict) -> Setup:
    """Loads the model, encodes the demonstrations, builds the step and the state."""
    mesh = devices.start(config.mesh)
    # Several processes train one model, so all of them must read the same files.
    devices.agree_on_inputs(
        config.model, config.demonstrations, config.validation, config.pretraining_text
    )
    rules = sharding.rules_from_data(config.sharding)
    network = networks.load_network(
        config.model, mesh, config.decoder, dropout=config.dropout, rules=rules
    )
    context = contexts.of_network(network, networks.model_folder(config.model))
    records, rows = read_demonstrations(
        network.tokenizer, config.demonstrations, config, context=context
    )
    _, held_out = read_demonstrations(network.tokenizer, config.validation, config, context=context)
    if config.pretraining_fraction:
        rows = mix_in(rows, network.tokenizer, config, context=context)
    batches = datasets.batches(rows, mesh, batch_size=config.batch_size, seed=config.seed)
    held = datasets.held_out_batches(held_out, mesh, batch_size=config.batch_size, seed=config.seed)
    rate = optimizers.schedule(
        config.schedule, config.learning_rate, batches.steps(1) * config.epochs
    )
    tx = optimizers.optimizer(config, rate, clip_norm=config.clip_norm)
    trained = networks.trainable(network.params, config)

    def make_step(frozen: Params) -> StepFn:
        return make_sft_step(
            trained.model(network.model, frozen), tx, microbatches=config.microbatches,
            spike_std=config.guard.spike_std,
        )  # fmt: skip

    make = partial(train_state, tx=tx, guard=True)
    state, where = sharding.build_state(make, trained.params, mesh=mesh, rules=rules)
    # Frozen parameters are arguments of the compiled step: as constants they would be a second
    # copy.
    step = compile_frozen_step(make_step, trained.frozen, state_sharding=where)
    return Setup(network, trained, records, rows, batches, held, mesh, step, state)


def demonstration_rows(tokenizer: Any, path: str, config: ConfigDict) -> LMBatch:
    """Only the rows of `read_demonstrations`."""
    return read_demonstrations(tokenizer, path, config)[1]


def read_demonstrations(
    tokenizer: Any, path: str, config: ConfigDict, *, context: contexts.Context | None = None
) -> tuple[guards.RowRecords, LMBatch]:
    """Rows of a file of demonstrations, and which demonstrations are in which row.

    Each row has `config.pieces_per_row` demonstrations (None: as many as fit). In a conversation
    the targets are the assistant's turns: all of them or the last (`config.assistant_turns`).

    Raises:
      ValueError: the file is empty, or a demonstration is longer than a row or than the model's
        `context`.
    """
    records = datasets.read_records(path, schema.Demonstration, tokenizer)
    if not records:
        raise ValueError(f"{path} holds no demonstrations: check how it was made")
    choices = inputs.ONE_OF["assistant_turns"]
    checks.require_one_of("assistant_turns", config.assistant_turns, choices)
    pieces = [
        text.encode_demonstration(
            tokenizer, r.prompt, r.response, assistant_turns=config.assistant_turns
        )
        for r in records
    ]
    sizes, limits = [len(ids) for ids, _ in pieces], (config.row_length, config.pieces_per_row)
    if context is not None:
        contexts.check(context, sizes, contexts.record_of(path, len(records)))
    where = guards.RowRecords(
        path, [r.id for r in records], sizes, capacity=limits[0], max_items=limits[1]
    )
    return where, text.masked_rows(pieces, length=limits[0], max_pieces=limits[1])


def mix_in(
    rows: LMBatch, tokenizer: Any, config: ConfigDict, *, context: contexts.Context | None = None
) -> LMBatch:
    """Adds pretraining rows, so that they make up `config.pretraining_fraction` of all rows.

    Source: Ouyang et al. 2022, appendix C.3 (10% pretraining data in the init of PPO).
    """
    fraction = config.pretraining_fraction
    # Of n + w rows a fraction f is pretraining text where w = n f / (1 - f).
    wanted = round(len(rows.tokens) * fraction / (1 - fraction))
    pool = datasets.lm_rows(
        tokenizer, config.pretraining_text, length=config.row_length, context=context
    )
    if len(pool.tokens) < wanted:
        raise ValueError(
            f"pretraining_text={config.pretraining_text} gives {len(pool.tokens)} rows and "
            f"pretraining_fraction={fraction} needs {wanted}: give more text or lower the fraction"
        )
    chosen = np.random.default_rng(config.seed).permutation(len(pool.tokens))[:wanted]
    return jax.tree.map(lambda own, other: np.concatenate([own, other[chosen]]), rows, pool)


if __name__ == "__main__":
    cli.main(
        run, config="configs/sft/storyland.py", workdir="runs/sft", dry_run=dry_run, check=check
    )
