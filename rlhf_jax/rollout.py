"""Samples to a `Rollout`: reference log-probs, values, shaped rewards and advantages in one jit.

The samples come from `generate`. `Rollout.old_logp` are the sampler's own log-probs, and the token
ids are not encoded again. A reward that is a function of texts runs on the host after sampling and
is passed in as `scores`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real

from rlhf_jax import ops, scoring
from rlhf_jax.advantages import gae
from rlhf_jax.backends import backend_for
from rlhf_jax.kl_control import kl_nats_per_sequence
from rlhf_jax.types import Each, Max, Mean, Metrics, Model, Params, Rollout, Samples

ScoreAndShape = Callable[..., tuple[Rollout, Metrics]]
"""``(ref_params, value_params, reward_params, samples, kl_coef, ids, scores=None) -> (Rollout,
metrics)``."""


def score_samples(model: Model, params: Params, samples: Samples) -> Float[Array, " B"]:
    """Raw reward-model score of each row, read at its last token (index ``lengths - 1``).

    Args:
      model: a scalar model.
      params: its parameters, with the bias that sets the mean score of demonstrations to 0.
      samples: rows, EOS included; only `tokens` and `lengths` are read.

    Returns:
      Scores before scaling and before the rule for missing EOS.

    Source: Ouyang et al. 2022, section 3.5.
    """
    return scoring.sequence_scores(model, params, samples.tokens, samples.lengths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaping:
    """How scores become rewards and advantages; checked when it is constructed.

    Raises:
      ValueError: an unknown `truncation`, or a number out of range; the message names the field.
    """

    gamma: float | int = 1.0
    """Discount per token; InstructGPT uses 1."""
    lam: float | int = 0.95
    """Lambda of GAE. The paper does not give it; the code of Ziegler et al. 2019 uses 0.95."""
    temperature: float | int = 1.0
    """The sampler's; applied to the reference too, so that KL is 0 while the policies are equal."""
    missing_eos_score: float | int | None = None
    """Replaces the score of a response cut by the length limit; None keeps the model's score."""
    truncation: str = "terminal"
    """``"terminal"`` treats a cut response as ended (value 0 after it, as in the code of Ziegler et
    al. 2019); ``"bootstrap"`` continues it with ``V(tokens[:lengths])``."""
    score_scale: float | int = 1.0
    """Fixed gain, for a reward model normalised as in Ziegler et al. 2019."""
    score_shift: float | int = 0.0
    """Fixed shift."""
    whiten_rewards: bool = False
    """Before the advantages, scale the shaped rewards to variance 1 over the rollout's response
    tokens, keeping their mean. Off in InstructGPT's preset (the paper does not mention it), on in
    Ziegler et al. 2019."""
    microbatches: int = 1
    """Number of pieces of the rollout that go through the three networks one after the other; 1 is
    fastest where memory allows it."""
    max_new_tokens: int | None = None
    """The sampler's; with it, the last block of each network computes response tokens only. None
    where it is unknown."""

    def __post_init__(self):
        if self.truncation not in ("terminal", "bootstrap"):
            raise ValueError(
                f"truncation={self.truncation!r} is unknown: choose 'terminal' or 'bootstrap'"
            )
        if self.microbatches < 1:
            raise ValueError(f"microbatches={self.microbatches} must be at least 1")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1")


def make_score_and_shape(
    policy: Model, value: Model, reward: Model | None = None, shaping: Shaping = Shaping()
) -> ScoreAndShape:
    """The compiled function between sampling and the update.

    ``score = score_scale * raw + score_shift``, then `missing_eos_score` where the response never
    ended; then ``reward_t = -kl_coef * (old_logp_t - ref_logp_t) + score * [t is last]``, and GAE.

    A row with a score that is not finite is masked out as a whole and counted (``rollout/dropped``,
    and the `Each` ``dropped_rows``).

    Args:
      policy: the policy's architecture, with which the reference is run.
      value: the value network's.
      reward: the reward model's; None when scores come from the host.
      shaping: from scores to advantages.

    Returns:
      ``(ref_params, value_params, reward_params, samples, kl_coef, ids, scores=None) -> (Rollout,
      metrics)``, compiled. `kl_coef` is an array (`KLState.coef`), so a new value does not compile
      again; `ids` are the prompts' indices in the stream, one per row; `scores` are raw scores from
      the host, with which `reward_params` may be None.

    Raises:
      ValueError: when called, if there is neither a reward model nor scores, or if `microbatches`
        does not divide the rows.

    Source: Ouyang et al. 2022, section 3.5, eq. 2; Ziegler et al. 2019, released code (missing EOS,
    scale).
    """

    @jax.jit
    def score_and_shape(
        ref_params: Params,
        value_params: Params,
        reward_params: Params | None,
        samples: Samples,
        kl_coef: Float[Array, ""],
        ids: Int[Array, " B"],
        scores: Float[Array, " B"] | None = None,
    ) -> tuple[Rollout, Metrics]:
        params = ref_params, value_params, reward_params
        read = partial(_read_networks, (policy, value, reward), params, shaping)
        raw, ref_logp, values, last_value = _in_pieces(read, shaping.microbatches, samples, scores)
        used = used_score(
            raw, samples.finished, scale=shaping.score_scale, shift=shaping.score_shift,
            missing_eos_score=shaping.missing_eos_score,
        )  # fmt: skip
        score, mask = _without_bad_rows(raw, used, samples)
        # `mask` leaves out the dropped rows too, which can have non-finite numbers in every field.
        old_logp, ref_logp, values = (
            jnp.where(mask, x, 0) for x in (samples.logp, ref_logp, values)
        )
        rewards = ops.shaped_rewards(score, old_logp, ref_logp, mask, kl_coef=kl_coef)
        if shaping.whiten_rewards:
            rewards = ops.whiten(rewards, mask, shift_mean=False)
        # After a response that ended with EOS the value is 0; only a cut one is bootstrapped.
        bootstrap = (
            None if shaping.truncation == "terminal" else jnp.where(samples.finished, 0, last_value)
        )
        advantages, returns = gae(
            rewards, values, mask, gamma=shaping.gamma, lam=shaping.lam, bootstrap=bootstrap
        )
        rollout = Rollout(
            tokens=samples.tokens,
            mask=mask,
            old_logp=old_logp,
            ref_logp=ref_logp,
            old_values=values,
            rewards=rewards,
            advantages=advantages,
            returns=returns,
            score=score,
            prompt_lengths=samples.prompt_lengths,
            lengths=samples.lengths,
            finished=samples.finished,
            ids=ids,
        )
        return rollout, rollout_metrics(rollout, raw, kl_coef=kl_coef)

    return score_and_shape


def _read_networks(
    models: tuple[Model, Model, Model | None],
    params: tuple[Params, Params, Params | None],
    shaping: Shaping,
    samples: Samples,
    scores: Float[Array, " B"] | None,
) -> tuple[Float[Array, " B"], Float[Array, "B T"], Float[Array, "B T"], Float[Array, " B"]]:
    """Raw scores, reference log-probs, values before each token, and the value after the last."""
    mask = scoring.response_mask(samples.prompt_lengths, samples.lengths, samples.tokens.shape[1])
    rows = (samples.tokens, samples.lengths, mask)
    policy, value, reward = models
    targets = shaping.max_new_tokens
    ref_logp = scoring.sequence_log_probs(
        policy, params[0], *rows, temperature=shaping.temperature, targets=targets
    )
    values, last_value = scoring.sequence_values(value, params[1], *rows, targets=targets)
    return _raw_scores(reward, params[2], samples, scores), ref_logp, values, last_value


def _in_pieces(read: Callable[..., Any], pieces: int, *rows: Any) -> Any:
    """``read(*rows)`` over `pieces` parts of the rows, one after the other."""
    if pieces == 1:
        return read(*rows)
    split = ops.split_rows(rows, pieces, "score_microbatches", "rollout")
    # One piece after the other, so that only the activations of one are in memory.
    return ops.join_rows(jax.lax.map(lambda piece: read(*piece), split))


def _raw_scores(
    reward: Model | None,
    reward_params: Params | None,
    samples: Samples,
    scores: Float[Array, " B"] | None,
) -> Float[Array, " B"]:
    if scores is not None:
        return scores.astype(jnp.float32)
    if reward is None or reward_params is None:
        raise ValueError(
            "scores=None and there is no reward model: give reward and reward_params, or scores"
        )
    return score_samples(reward, reward_params, samples)


def _without_bad_rows(
    raw: Float[Array, " B"], score: Float[Array, " B"], samples: Samples
) -> tuple[Float[Array, " B"], Bool[Array, "B T"]]:
    """The score, 0 where it or the raw one is not finite, and the response mask without those rows.

    The raw score is checked too, because `missing_eos_score` could replace the NaN of a judge that
    failed and so hide the failure.
    """
    valid = jnp.isfinite(raw) & jnp.isfinite(score)
    whole = scoring.response_mask(samples.prompt_lengths, samples.lengths, samples.tokens.shape[1])
    return jnp.where(valid, score, 0), whole & valid[:, None]


def used_score(
    raw: Float[Array, " B"],
    finished: Bool[Array, " B"],
    *,
    scale: float | int = 1.0,
    shift: float | int = 0.0,
    missing_eos_score: float | int | None = None,
) -> Float[Array, " B"]:
    """The score that enters the reward: ``scale * raw + shift``, replaced where EOS is missing.

    Args:
      raw: from the reward model.
      finished: false where the length limit cut the response, whatever the stop id is.
      scale: fixed gain.
      shift: fixed shift.
      missing_eos_score: for unfinished rows, on the scale after `shift`; None leaves them as they
        are.

    Returns:
      Scores.

    Source: Ziegler et al. 2019, released code; Stiennon et al. 2020.

    >>> raw, finished = jnp.array([0.75, 9.0]), jnp.array([True, False])
    >>> used_score(raw, finished, scale=2.0, missing_eos_score=-1.0).tolist()
    [1.5, -1.0]
    """
    score = scale * raw + shift
    return score if missing_eos_score is None else jnp.where(finished, score, missing_eos_score)


def rollout_metrics(
    rollout: Rollout, raw: Float[Array, " B"], *, kl_coef: Float[Array, ""]
) -> Metrics:
    """Metrics of a rollout; names give what a mean is over, such as ``per_sequence``.

    Args:
      rollout: of one iteration.
      raw: scores of all rows as the reward model gave them.
      kl_coef: beta of this rollout.

    Returns:
      ``rollout/kl_nats_per_sequence`` is the input of the adaptive KL controller.
      ``surprisal_nats_per_token`` is ``-old_logp``, an unbiased estimate of the policy's entropy.
      Dropped rows count in ``dropped`` only.
    """
    mask = rollout.mask
    valid = jnp.any(mask, axis=1)
    rows, tokens = (jnp.sum(x, dtype=jnp.float32) for x in (valid, mask))
    k3 = ops.kl_estimate(rollout.old_logp, rollout.ref_logp, kind="k3")

    def over_rows(x: Array) -> Mean:
        # Not a product with `valid`: the raw score of a dropped row may be NaN or infinite.
        return Mean(jnp.sum(jnp.where(valid, x, 0), dtype=jnp.float32), rows)

    return {
        "rollout/kl_nats_per_sequence": kl_nats_per_sequence(
            rollout.old_logp, rollout.ref_logp, mask
        ),
        "rollout/kl_k3_nats_per_sequence": Mean(jnp.sum(jnp.where(mask, k3, 0)), rows),
        "rollout/kl_coef": Mean(jnp.asarray(kl_coef, jnp.float32), jnp.float32(1)),
        "rollout/score": over_rows(raw),
        "rollout/score_square": over_rows(jnp.square(raw)),
        "rollout/score_used": over_rows(rollout.score),
        "rollout/reward_per_sequence": over_rows(jnp.sum(rollout.rewards, axis=1)),
        "rollout/response_tokens": Mean(tokens, rows),
        "rollout/response_tokens_max": Max(jnp.max(jnp.sum(mask, axis=1, dtype=jnp.float32))),
        "rollout/missing_eos": over_rows(~rollout.finished),
        "rollout/surprisal_nats_per_token": Mean(-jnp.sum(rollout.old_logp), tokens),
        "rollout/value": Mean(jnp.sum(rollout.old_values), tokens),
        "rollout/dropped": Mean(mask.shape[0] - rows, jnp.float32(mask.shape[0])),
        "dropped_rows": Each(~valid),
    }


def log_prob_limit(model: Model) -> float:
    """Tolerance between two programs' log-probs of a token, in nats: 1e-4 in float32, else 2e-2.

    TPUs and NVIDIA GPUs multiply float32 matrices in a coarser precision unless
    `jax_default_matmul_precision` is set.
    """
    precision = jax.config.values["jax_default_matmul_precision"]
    exact_products = backend_for().exact_products or precision in ("highest", "float32")
    dtype = getattr(model.config, "dtype", "float32")
    return 1e-4 if exact_products and jnp.dtype(dtype) == jnp.float32 else 2e-2


class InitialParams(NamedTuple):
    """The parameters of the four networks before the first update."""

    policy: Params
    reference: Params
    """Frozen."""
    value: Params
    reward: Params | None = None
    """With the bias that sets demonstrations to 0 on average; None for scores from the host."""


def step_zero_checks(
    policy: Model,
    value: Model,
    reward: Model | None,
    params: InitialParams,
    samples: Samples,
    *,
    temperature: Real[ArrayLike, ""] = 1.0,
    clip_ratio: float | int = 0.2,
    limit: float | None = None,
) -> dict[str, float]:
    """Check the invariants of PPO before its first update.

    Policy and reference agree exactly, run by one compiled program; the sampler's log-probs and
    those of a program with a backward pass agree with it within `limit`, so no ratio is clipped;
    the value network started as the reward model.

    Args:
      policy: a language model.
      value: a scalar model.
      reward: a scalar model; None skips the check of the value network (scores from the host).
      params: of all four networks.
      samples: some rows sampled from the initial policy; a micro-batch is enough.
      temperature: the sampler's.
      clip_ratio: of the policy loss.
      limit: nats (and score units, for the value); None for `log_prob_limit`.

    Returns:
      The measured values by the name of the check.

    Raises:
      ValueError: if a check fails; the message gives the measured value, its limit and the likely
        cause.

    Source: Huang et al. 2023, "The N implementation details of RLHF with PPO" (first-step
    invariants).
    """
    limit = log_prob_limit(policy) if limit is None else limit
    mask = scoring.response_mask(samples.prompt_lengths, samples.lengths, samples.tokens.shape[1])
    score = partial(scoring.sequence_log_probs, policy, temperature=temperature)
    rows = (samples.tokens, samples.lengths, mask)

    # The rows are an argument: a compiled function cannot close over arrays that span several
    # processes.
    def with_backward_pass(params: Params, *rows: Array) -> Array:
        def loss(params: Params) -> tuple[Array, Array]:
            logp = score(params, *rows)
            return jnp.sum(logp), logp

        grads, logp = jax.grad(loss, has_aux=True)(params)
        # The gradient is added with weight 0, so that the compiler cannot drop the backward pass.
        return logp + 0 * sum(jnp.nan_to_num(g).ravel()[0] for g in jax.tree.leaves(grads))

    # One program for policy and reference, so that equal weights give equal bits and the limit of
    # their gap can be 0.
    scoring_program = jax.jit(score)
    logp = scoring_program(params.policy, *rows)
    update_logp = jax.jit(with_backward_pass)(params.policy, *rows)
    # The sampler's log-probs are the `old_logp` of the update, so this is the ratio that its first
    # minibatch sees.
    ratio = jnp.exp(jnp.where(mask, update_logp - samples.logp, 0))
    clipped = ops.masked_mean((jnp.abs(ratio - 1) > clip_ratio).astype(jnp.float32), mask)
    measured = {
        "reference_gap": _largest(logp - scoring_program(params.reference, *rows), mask),
        "sampler_gap": _largest(logp - samples.logp, mask),
        "update_gap": _largest(logp - update_logp, mask),
        "clip_fraction": float(clipped),
    }
    limits = {"reference_gap": 0.0, "sampler_gap": limit, "update_gap": limit, "clip_fraction": 0.0}
    if reward is not None and params.reward is not None:
        started = jax.jit(partial(score_samples, value))(params.value, samples)
        target = jax.jit(partial(score_samples, reward))(params.reward, samples)
        measured["value_gap"] = _largest(started - target, jnp.ones(target.shape, bool))
        limits["value_gap"] = limit
    _require_within(measured, limits)
    return measured


_CAUSES = {
    "reference_gap": (
        "the KL to the reference is not 0: policy and reference must start from the same weights"
    ),
    "sampler_gap": (
        "the sampler draws from another distribution: look at temperature, top_k, top_p and dropout"
    ),
    "update_gap": (
        "the update computes other log-probs than the scoring program: look at dropout and the "
        "compute dtype"
    ),
    "clip_fraction": (
        "ratios differ from 1 before any update: look at temperature, top_k, top_p and dropout"
    ),
    "value_gap": "the value network must start from the reward model, head and bias included",
}


def _require_within(measured: dict[str, float], limits: dict[str, float]) -> None:
    for name, found in measured.items():
        # `not <=`, because a NaN must fail and compares false either way.
        if not found <= limits[name]:
            raise ValueError(
                f"step 0: {name}={found:.3g} is above its limit {limits[name]:g}: {_CAUSES[name]}"
            )


def _largest(difference: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> float:
    return float(jnp.max(jnp.where(mask, jnp.abs(difference), 0)))
