r"""Trains the reward model on rankings, all pairs of a prompt in one batch element, for one epoch.

Run:

    python experiments/reward_model.py --config=configs/reward_model/storyland.py \
        --workdir=runs/reward_model --config.model=runs/sft/epoch-3 \
        --config.rankings=runs/samples/rankings.jsonl \
        --config.demonstrations=runs/data/demonstrations.jsonl

Afterwards its bias is set so that demonstrations score 0 on average.

Source: Ouyang et al. 2022, section 3.5 (eq. 1) and appendix C.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax import scoring, sharding
from rlhf_jax.data import schema, text
from rlhf_jax.data.loader import Batches
from rlhf_jax.evaluation import reward_model as quality
from rlhf_jax.evaluation.held_out_rankings import evaluate
from rlhf_jax.models.heads import scalar_from_language_model, scalar_model
from rlhf_jax.ppo import RANKING_ARGUMENTS
from rlhf_jax.run import (
    checks,
    cli,
    compiling,
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
from rlhf_jax.run import config as config_lib
from rlhf_jax.run import rankings as ranked
from rlhf_jax.run import responses as responses_lib
from rlhf_jax.run.loop import Loop, Settings
from rlhf_jax.steps import compile_frozen_step, make_reward_step, train_state
from rlhf_jax.types import Model, Output, Params, RankingBatch, StepFn, TrainState

LOWER = (
    "config.microbatches (more, smaller pieces)", "config.decoder.remat=block", "config.batch_size",
    "config.mesh",
)  # fmt: skip


class Setup(NamedTuple):
    """The stage before its first step."""

    base: networks.Network
    model: Model
    trained: networks.TrainableParams
    rankings: list[schema.Ranking]
    encoded: list[text.RankedIds]
    places: Sequence[int]
    rows: RankingBatch
    batches: Batches
    mesh: jax.sharding.Mesh
    step: StepFn
    state: TrainState


def run(config: ConfigDict, workdir: str) -> dict:
    """Writes ``model/`` (a sequence classifier of one label) and ``reward_model.json``."""
    check(config)
    with memory.phase("set-up", lower=LOWER[1:], rows=config.batch_size, slots=config.row_length):
        setup = prepare(config)
    base, model, trained, mesh = setup.base, setup.model, setup.trained, setup.mesh
    rankings, encoded, rows = setup.rankings, setup.encoded, setup.rows
    steps = setup.batches.steps(config.epochs)
    made_of = origin(config, base)
    records = where(config, rankings, encoded, setup.places)
    settings = Settings(
        workdir, "reward_model", steps, config.save_every, keep=config.keep,
        max_skipped=config.guard.max_skipped, show=("reward/loss", "reward/accuracy"),
    )  # fmt: skip
    with (
        memory.phase(
            "train", lower=LOWER, programs=partial(programs, setup), rows=config.batch_size,
            slots=config.row_length, microbatches=config.microbatches,
            parameters=networks.size(base.params),
        ),
        Loop(settings, setup.state, origin=made_of, data=config.rankings) as loop,
    ):  # fmt: skip
        for step, state in loop:
            state, metrics = setup.step(
                state, sharding.place_batch(setup.batches.at(step), mesh), None
            )
            loop.log(metrics, rows=partial(records.of_step, setup.batches, step))
            loop.done(state)
    # The loss only sees differences of scores, so their common offset is free; see `center`.
    network = center(
        networks.Network(model, trained.merged(loop.state.params), base.tokenizer), config, mesh
    )
    guards.check_read(made_of)  # the input files must not have changed during training
    networks.save_network(Path(workdir) / "model", network)
    result: dict[str, Any] = {
        "model": str(Path(workdir) / "model"), "steps": steps, "prompts": len(encoded),
    }  # fmt: skip
    result |= {"padding_share": text.padding_share(rows), **ranked.tokens(encoded)}
    result["left_out_too_long"] = len(rankings) - len(encoded)
    result["responses"] = sum(len(responses) for _, responses, _ in encoded)
    result["pairs"] = sum(schema.strict_pairs(ranks) for _, _, ranks in encoded)
    # After the model is saved, so that an error in an evaluation file loses no training.
    sets = {
        name: ranked.held_out(base, path, config)
        for name, path in config.evaluation.items()
        if path
    }
    # The scores of all sets are computed together, as rankings of several sets share responses.
    scores = ranked.scores(
        network, [r for rankings, _ in sets.values() for r in rankings], config, mesh
    )
    for name, (rankings, too_long) in sets.items():
        result[name] = {**evaluate(rankings, scores), "left_out_too_long": too_long}
    return results.write_result(Path(workdir) / "reward_model.json", lambda: result)


def check(config: ConfigDict) -> None:
    """Refuses settings, files and models with which no run is possible, before any are loaded."""
    inputs.check_settings(config)
    inputs.check_model("model", config.model)
    inputs.check_file("rankings", config.rankings)
    inputs.check_file("demonstrations", config.demonstrations)
    for name, path in config.evaluation.items():
        inputs.check_file(f"evaluation.{name}", path, required=False)
    config_lib.resolve(config.loss, available=RANKING_ARGUMENTS)


def origin(config: ConfigDict, base: networks.Network) -> dict[str, Any]:
    """Fingerprints of the stage's inputs for its checkpoints."""
    files = {key: config[key] for key in ("rankings", "demonstrations")}
    files |= {f"evaluation.{name}": path for name, path in config.evaluation.items()}
    models = {"model": networks.model_folder(config.model)}
    return guards.origin(config, files=files, models=models, tokenizer=base.tokenizer)


def where(
    config: ConfigDict, rankings: Sequence[schema.Ranking], encoded: Sequence[text.RankedIds],
    places: Sequence[int],
) -> guards.RowRecords:  # fmt: skip
    """Which rankings are in which row, so that a skipped step can name its records."""
    # The same sizes and limits as in `ranking_rows`, so that `Records` repeats its packing.
    sizes = [ranked.tokens([ranking])["tokens"] for ranking in encoded]
    return guards.RowRecords(
        config.rankings, [rankings[i].id for i in places], sizes, capacity=config.row_length,
        max_items=config.prompts_per_row, places=places,
    )  # fmt: skip


def dry_run(config: ConfigDict) -> dict[str, memory.Needs]:
    """Compiles the step for the real rows and prints its memory."""
    check(config)
    setup = prepare(config)
    staying = memory.held(setup.state, setup.trained.frozen, setup.base.params)
    return memory.dry_run(programs(setup), setup.mesh, state=staying)


def programs(setup: Setup) -> memory.Programs:
    """The step, compiled for the shapes of the first batch."""
    batch = sharding.place_batch(setup.batches.at(0), setup.mesh)
    yield "train", compiling.lower(setup.step, setup.state, batch, None).compile()


def prepare(config: ConfigDict) -> Setup:
    """Loads the model, encodes the rankings, builds the step and the state."""
    mesh = devices.start(config.mesh)
    # Several processes train one model, so all of them must read the same files.
    devices.agree_on_inputs(
        config.model, config.rankings, config.demonstrations, *dict(config.evaluation).values()
    )
    rules = sharding.rules_from_data(config.sharding)
    base = networks.load_network(config.model, mesh, config.decoder, rules=rules)
    rankings = ranked.read_rankings(config.rankings, base.tokenizer)
    encoded = [ranked.encode_ranking(base.tokenizer, r) for r in rankings]
    encoded, places = ranked.fitting(encoded, config, base.model.config.context_length)
    ranked.check_evaluation(base, config)
    rows = text.ranking_rows(
        encoded, length=config.row_length, max_k=config.max_k, max_n=config.prompts_per_row
    )  # fmt: skip
    model = scalar_model(base.model.config)
    # The trunk is that of the language model, and the score head is new.
    trained = networks.trainable(
        scalar_from_language_model(base.params, jax.random.key(config.seed)), config
    )
    # With a frozen trunk the step reads stored hidden states instead of tokens.
    read, seen = (
        (model, rows)
        if config.train != "head"
        else read_trunk(model, trained.frozen, rows, config, mesh)
    )
    batches = datasets.batches(seen, mesh, batch_size=config.batch_size, seed=config.seed)
    rate = optimizers.schedule(config.schedule, config.learning_rate, batches.steps(config.epochs))
    tx = optimizers.optimizer(config, rate, clip_norm=config.clip_norm)
    loss = config_lib.resolve(config.loss, available=RANKING_ARGUMENTS)

    def make_step(frozen: Params) -> StepFn:
        return make_reward_step(
            trained.model(read, frozen), tx, loss=loss, microbatches=config.microbatches,
            spike_std=config.guard.spike_std,
        )  # fmt: skip

    make = partial(train_state, tx=tx, guard=True)
    state, where_placed = sharding.build_state(make, trained.params, mesh=mesh, rules=rules)
    # Frozen parameters are arguments of the compiled step: as constants they would be a second
    # copy.
    step = compile_frozen_step(make_step, trained.frozen, state_sharding=where_placed)
    return Setup(base, model, trained, rankings, encoded, places, rows, batches, mesh, step, state)


def read_trunk(
    model: Model, trunk: Params, rows: RankingBatch, config: ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[Model, RankingBatch]:
    """Computes a frozen trunk once: its hidden states where a score is read, and the head alone.

    The states take the place of the tokens, and the index of each state that of its response's end.
    An epoch of the head then costs next to nothing, so the head can take many.
    """
    hidden = responses_lib.in_batches(
        partial(_ranking_hidden, model, trunk), rows, config.batch_size, mesh, "frozen trunk"
    )
    places: Any = np.broadcast_to(
        np.arange(hidden.shape[1]).reshape(1, *rows.ends.shape[1:]), rows.ends.shape
    )
    # The stand-in for the model reads hidden states and needs no segments, parents or positions.
    empty: Any = np.zeros(hidden.shape[:2], np.int32)
    seen = RankingBatch(hidden, empty, empty, empty, places.astype(np.int32), rows.ranks)
    return model._replace(apply=lambda params, states, **_: Output(states, None)), seen


# At module level, so that all calls share the compiled programs.
_ranking_hidden = jax.jit(scoring.ranking_hidden, static_argnums=0)


def center(
    network: networks.Network, config: ConfigDict, mesh: jax.sharding.Mesh
) -> networks.Network:
    """The reward model with its bias set so that the labelers' demonstrations score 0 on average.

    Source: Ouyang et al. 2022, section 3.5.
    """
    records = datasets.read_records(config.demonstrations, schema.Demonstration, network.tokenizer)
    context = network.model.config.context_length

    def fits(record: schema.Demonstration) -> bool:
        one = schema.Ranking(record.prompt, (record.response,), ())
        return ranked.tokens([ranked.encode_ranking(network.tokenizer, one)])["tokens"] <= context

    fitting_records = [r for r in records if fits(r)]
    if len(fitting_records) < len(records) and processes.index() == 0:
        print(
            f"bias: {len(records) - len(fitting_records)} of {len(records)} demonstrations are "
            f"left out, they are longer than the context of {context} tokens",
            flush=True,
        )
    # Cut after filtering, so that the average has as many demonstrations as the config asks for.
    records = fitting_records[: config.bias_demonstrations]
    checks.require(
        bool(records), "demonstrations", config.demonstrations,
        f"none fits the model's context of {context} tokens: give shorter ones, or a model of a "
        "longer context",
    )  # fmt: skip
    scores = responses_lib.score_responses(
        network, [r.prompt for r in records], [r.response for r in records], mesh,
        batch_size=config.score_batch_size,
    )  # fmt: skip
    head = network.params["score"]
    bias = head["bias"] + quality.demonstration_bias(scores)
    return network._replace(params={**network.params, "score": {**head, "bias": bias}})


if __name__ == "__main__":
    cli.main(
        run, config="configs/reward_model/storyland.py", workdir="runs/reward_model",
        dry_run=dry_run, check=check,
    )  # fmt: skip
