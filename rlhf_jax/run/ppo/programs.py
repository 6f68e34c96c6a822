"""The phases of a PPO iteration, compiled ahead of time for the sizes of a config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rlhf_jax import sharding
from rlhf_jax.run import compiling, memory
from rlhf_jax.run.networks import TrainableParams, size
from rlhf_jax.run.ppo.setup import Setup, sharding_rules, stop_ids
from rlhf_jax.sampling.generate import Sampling, lower_generate
from rlhf_jax.types import LMBatch, Params, PromptBatch, Rollout, Samples

PHASES = ("rollout", "score", "update")


def programs(
    setup: Setup, config: ConfigDict, mesh: jax.sharding.Mesh, names: Sequence[str] = PHASES
) -> memory.Programs:
    """Compiles the phases of an iteration; a `setup` of shapes works as well as one of arrays."""
    for name, program in lowered(setup, config, mesh, names):
        yield name, program.compile()


def lowered(
    setup: Setup, config: ConfigDict, mesh: jax.sharding.Mesh, names: Sequence[str] = PHASES
) -> Iterator[tuple[str, jax.stages.Lowered]]:
    """Lowers the named phases, in the given order, as `programs` compiles them."""
    batch, slots = config.episodes, config.prompt_length + config.max_new_tokens
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    state, reference = memory.abstract(setup.state), memory.abstract(setup.policy.params)

    def shape(*sizes: int, dtype: Any = jnp.int32, where: Any = rows) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    def network(trained: TrainableParams, own: Params, name: str, form: str) -> Params:
        # Traced for its shapes only, so that no adapter is actually merged.
        made = jax.eval_shape(
            lambda f, o: getattr(trained._replace(frozen=f), form)(o), trained.frozen, own
        )
        return memory.abstract(
            made, sharding.tree_shardings(made, mesh, sharding_rules(config)[name])
        )

    # A key is traced for its shape too, as its dtype depends on the generator that is configured.
    key = jax.eval_shape(lambda: jax.random.key(0))
    ints, floats = shape(batch), shape(batch, slots, dtype=jnp.float32)
    tokens, flags = shape(batch, slots), shape(batch, dtype=jnp.bool_)
    scores = shape(batch, dtype=jnp.float32)
    samples = Samples(tokens, ints, ints, floats, flags)

    def rollout() -> jax.stages.Lowered:
        # Sampling uses plain parameters into which the adapters are merged.
        weights = network(setup.trained_policy, state.policy.params, "policy", "merged")
        prompts = PromptBatch(shape(batch, config.prompt_length), ints, ints)
        sampling = Sampling(config.max_new_tokens, config.temperature, stop_ids=stop_ids(setup))
        return lower_generate(setup.policy.model, weights, prompts, key, sampling)

    def score() -> jax.stages.Lowered:
        value = network(setup.trained_value, state.value.params, "value", "whole")
        reward = memory.abstract(setup.reward.params) if setup.reward else None
        coefficient = shape(dtype=jnp.float32, where=whole)
        judged = scores if setup.text_reward else None
        function: Any = setup.pieces.score_and_shape
        return function.lower(reference, value, reward, samples, coefficient, ints, judged)

    def update() -> jax.stages.Lowered:
        text_rows = None
        if config.ptx_coef:
            sizes = round(config.ptx_rows_per_episode * batch), config.ptx_row_length
            each = shape(*sizes)
            text_rows = LMBatch(each, each, each, shape(*sizes, dtype=jnp.bool_))
        mask = shape(batch, slots, dtype=jnp.bool_)
        rows = Rollout(
            tokens, mask, floats, floats, floats, floats, floats, floats,
            scores, ints, ints, flags, ints,
        )  # fmt: skip
        return compiling.lower(setup.pieces.step, state, rows, text_rows, key)

    # Lazily: a caller that asks for one phase lowers only that one.
    for name in names:
        yield name, {"rollout": rollout, "score": score, "update": update}[name]()


def compile_ahead(setup: Setup, config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Compiles the phases concurrently before the first iteration.

    Of the score and the update it compiles the likelier form.
    """
    likely = setup._replace(pieces=setup.paired or setup.pieces)
    compiling.compile_together(
        p for _, p in lowered(likely, config, mesh, ("update", "rollout", "score"))
    )


def staying(setup: Setup) -> int:
    """Bytes per device that stay allocated throughout training."""
    frozen = (
        setup.trained_policy.frozen,
        setup.trained_value.frozen,
        setup.reward.params if setup.reward else {},
    )
    return memory.held(setup.state, setup.policy.params, *frozen)


LOWER = {
    "rollout": (
        "config.episodes",
        "config.max_new_tokens",
        "config.prompt_length",
        "config.mesh (more devices)",
    ),
    "score": (
        "config.score_microbatches (more, smaller pieces)",
        "config.episodes",
        "config.max_new_tokens",
        "config.prompt_length",
        "config.mesh (more devices)",
    ),
    "update": (
        "config.microbatches (more, smaller pieces)",
        "config.minibatches (more, smaller ones)",
        "config.decoder.remat=block",
        "config.ptx_rows_per_episode",
        "config.train=lora",
        "config.mesh (more devices)",
    ),
}
"""The config keys that help when a phase runs out of memory, most effective first."""


def phase_of_iteration(name: str, setup: Setup, config: ConfigDict, mesh: jax.sharding.Mesh) -> Any:
    """A context manager in which running out of memory names this phase and its sizes."""
    return memory.phase(
        name,
        lower=LOWER[name],
        programs=partial(programs, setup, config, mesh, (name,)),
        rows=config.episodes,
        slots=config.prompt_length + config.max_new_tokens,
        minibatches=config.minibatches,
        microbatches=config.microbatches,
        parameters=size(setup.policy.params),
    )
