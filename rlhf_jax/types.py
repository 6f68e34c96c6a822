"""The structs of the package: every array that passes between files is a field named here.

Index convention (docs/conventions.md): every per-token array is ``[B, T]`` and entry ``t`` belongs
to ``tokens[:, t]``. ``logp[:, t] = log p(tokens[t] | tokens[:t])`` and
``values[:, t] = V(tokens[:t])``.

Shape legend: B rows, T slots of a row, P slots of a prompt, N prompts of a row, K responses of a
prompt, D width, V vocabulary, S slots of a KV cache, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, dataclass_transform, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Params = dict[str, Any]
"""A nested dict of arrays: what `Model.init` returns and what optimizers update."""

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def struct(cls: type[T]) -> type[T]:
    """A frozen dataclass that is a pytree; change a field with `dataclasses.replace`.

    Tests check shapes at every function, but not in the constructor of a struct: JAX rebuilds
    structs with specs, shardings, names or None instead of arrays, and data loaders fill them with
    numpy arrays.
    """
    return no_type_check(flax.struct.dataclass(cls))


@struct
class Mean:
    """A mean before its division, so that micro-batches, packed rows and hosts add up exactly.

    >>> m = Mean(jnp.float32(6.0), jnp.float32(3.0)) + Mean(jnp.float32(2.0), jnp.float32(1.0))
    >>> float(m.value)
    2.0
    """

    total: jax.Array
    count: jax.Array

    @property
    def value(self) -> jax.Array:
        """``total / count``; 0 where nothing was counted (an empty mask is not an error)."""
        empty = self.count == 0
        # Both sides of a `where` are computed, and a division by 0 in the one that is not chosen
        # would make the gradient NaN.
        return jnp.where(empty, 0.0, self.total / jnp.where(empty, 1, self.count))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)


@struct
class Max:
    """A running maximum, for guards such as the largest log-ratio or gradient norm."""

    value: jax.Array

    def __add__(self, other: Max) -> Max:
        return Max(jnp.maximum(self.value, other.value))


@struct
class Each:
    """One number per optimizer step, or per row, of an iteration: for the loop, never logged."""

    value: jax.Array


Metrics = dict[str, Mean | Max | Each]


@struct
class Cache:
    """Key-value cache of a decoder; new tokens take the slots ``lengths + 0, 1, ..`` of their row.

    ``lengths`` advances by the number of tokens with ``segment > 0``, so a right-padded prefill
    leaves no gap. There is one array per layer, so that a decode step updates it in place. Keys and
    values have the layout in which a single query reads them: scores are sums over D for each S,
    mixed values are sums over S for each D. (For cuDNN's kernel both are ``B S H D``.)
    """

    keys: tuple[Float[Array, "B H D S"], ...]
    values: tuple[Float[Array, "B H S D"], ...]
    segments: Int[Array, "B S"]
    lengths: Int[Array, " B"]

    def repeat(self, k: int) -> Cache:
        """Each row `k` times: row ``b`` becomes ``b*k .. b*k + k-1``, for K samples per prefill."""
        return jax.tree.map(lambda x: jnp.repeat(x, k, axis=0), self)

    def reset(self, rows: Bool[Array, " B"]) -> Cache:
        """Empty the rows where `rows` is true, so that other prompts can use them."""
        # Old keys and values may stay: no token sees a slot of segment 0, and new ones overwrite
        # it.
        segments = jnp.where(rows[:, None], 0, self.segments)
        lengths = jnp.where(rows, 0, self.lengths)
        return dataclasses.replace(self, segments=segments, lengths=lengths)


class Output(NamedTuple):
    """What `Model.apply` returns: the last hidden states and the new cache, if one was given."""

    hidden: Float[Array, "B T D"]
    cache: Cache | None


class Model(NamedTuple):
    """A network as pure functions over a nested dict, much as an optax optimizer is a pair of them.

    Attributes:
      init: ``(key) -> params``.
      apply:
        ``(params, tokens, *, segments, positions, parents=None, cache=None, key=None) -> Output``;
        `key` turns dropout on.
      head: ``(params, hidden) -> logits [..., V]`` for a language model, ``scalars [...]`` for
        reward and value models; float32.
      init_cache: ``(batch, length) -> Cache`` with all rows empty.
      config: what the functions were built from (a frozen dataclass), so that a saved model can be
        described.
      for_decoding: ``(params) -> params`` in the layout that `apply` with a cache and `head` read
        fastest; the sampler calls it once per rollout.
      picks: whether `apply` also takes ``at [B, N]``, slots of each row: `Output.hidden` then has
        only those, ``[B, N, D]``, and the last block computes no others. Also whether it takes
        ``lengths [B]``, the number of tokens of each row if rows have one text each.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., Output]
    head: Callable[[Params, jax.Array], jax.Array]
    init_cache: Callable[[int, int], Cache]
    config: Any = None
    for_decoding: Callable[[Params], Params] = lambda params: params
    picks: bool = False

    def apply_at(
        self, params: Params, tokens: Any, at: Int[Array, "B N"] | None, **rows: Any
    ) -> Output:
        """`apply`, returning only the hidden states of the slots `at`, ``[B, N, D]``; None: all."""
        if at is None:
            return self.apply(params, tokens, **rows)
        if self.picks:
            return self.apply(params, tokens, at=at, **rows)
        output = self.apply(params, tokens, **rows)
        chosen = jnp.take_along_axis(output.hidden, at[:, :, None], axis=1, mode="clip")
        return output._replace(hidden=chosen)


@struct
class LMBatch:
    """Rows for language modelling: `mask` is true where ``tokens[t]`` is a target."""

    tokens: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    mask: Bool[Array, "B T"]


@struct
class RankingBatch:
    """Ranked responses in shared-prefix rows: a prompt, then K responses with it as their parent.

    ``ends[b, n, k]`` is the slot of the last token of response k of prompt n, where the response is
    scored; ``ranks`` is 0 for the best, equal for ties, -1 for an absent response.
    """

    tokens: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    parents: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    ends: Int[Array, "B N K"]
    ranks: Int[Array, "B N K"]


@struct
class PromptBatch:
    """Prompts, contiguous from the left; `ids` are their indices in the stream of prompts."""

    tokens: Int[Array, "B P"]
    lengths: Int[Array, " B"]
    ids: Int[Array, " B"]


@struct
class Samples:
    """Sampled rows: prompt, response with EOS, padding; row ``b*K + k`` is sample k of prompt b.

    ``lengths`` counts prompt and response with EOS; ``logp`` is under the sampling distribution and
    0 on the prompt; ``finished`` is false where the length limit cut the response.
    """

    tokens: Int[Array, "B T"]
    prompt_lengths: Int[Array, " B"]
    lengths: Int[Array, " B"]
    logp: Float[Array, "B T"]
    finished: Bool[Array, " B"]


@struct
class Rollout:
    """Everything that a PPO update needs; per-token fields are zero outside of the response."""

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    old_logp: Float[Array, "B T"]
    ref_logp: Float[Array, "B T"]
    old_values: Float[Array, "B T"]
    rewards: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]
    score: Float[Array, " B"]
    prompt_lengths: Int[Array, " B"]
    lengths: Int[Array, " B"]
    finished: Bool[Array, " B"]
    ids: Int[Array, " B"]


@struct
class GuardState:
    """Loss, gradient norm and largest reward of the last W sound steps, to detect spikes.

    The numbers of the n-th sound step are in row ``n % W``; `count` sound steps have been seen.
    """

    window: Float[Array, "W 3"]
    count: Int[Array, ""]


@struct
class TrainState:
    """A network in training, without functions and keys, so that it can be checkpointed as it is.

    `ema` is None when no average is kept, `guard` when spikes are not detected.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema: Params | None = None
    guard: GuardState | None = None


@struct
class KLState:
    """The KL coefficient beta of the reward ``score - beta * (logp - ref_logp)``."""

    coef: Float[Array, ""]


@struct
class PPOState:
    """Everything that PPO carries from one iteration to the next."""

    policy: TrainState
    value: TrainState
    kl: KLState
    iteration: Int[Array, ""]


StepFn = Callable[..., tuple[Any, Metrics]]
"""A pure training step ``(state, batch, key) -> (state, metrics)``.

For PPO it is ``(state, rollout, lm_batch, key) -> (state, metrics)``.
"""
