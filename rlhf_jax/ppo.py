"""The parts of an update: the numbers of PPO, its losses, its optimizers, what a loss may name."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import optax

from rlhf_jax.losses.binding import Loss
from rlhf_jax.losses.policy import ppo_policy_loss
from rlhf_jax.losses.supervised import sft_loss
from rlhf_jax.losses.value import ppo_value_loss
from rlhf_jax.types import LMBatch, Rollout

LM_ARGUMENTS = ("logp", *(field.name for field in dataclasses.fields(LMBatch)))
"""Arguments that the loss of `make_sft_step` and the `ptx_loss` may name."""

RANKING_ARGUMENTS = ("rewards", "ranks")
"""Arguments that the loss of `make_reward_step` may name, both ``[B, N, K]``."""

POLICY_ARGUMENTS = ("logp", "entropy", *(field.name for field in dataclasses.fields(Rollout)))
"""Arguments that a `policy_loss` may name; entropy is computed only for a loss that names it."""

VALUE_ARGUMENTS = ("values", *(field.name for field in dataclasses.fields(Rollout)))
"""Arguments that a `value_loss` may name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO:
    """How one rollout becomes optimizer steps: the settings of the update, checked on construction.

    Raises:
      ValueError: a number out of range; the message names the field.

    Source of the defaults: Ouyang et al. 2022, appendix C.4.
    """

    epochs: int = 1
    """Passes over the rollout, each in a new random order."""
    minibatches: int = 8
    """Optimizer steps per pass; must divide the rows of the rollout."""
    microbatches: int = 1
    """Pieces of a minibatch that go through the networks one after the other."""
    whiten_advantages: bool = True
    """Scale them to mean 0 and variance 1 once, over the response tokens of the whole rollout."""
    temperature: float | int = 1.0
    """The sampler's."""
    ppo_clip_norm: float | int | None = None
    """Largest norm of the PPO term's gradient alone; None for no clipping."""
    ptx_coef: float | int = 27.8
    """gamma of eq. 2; 0 is plain PPO, bit for bit."""
    ptx_microbatches: int | None = None
    """`microbatches` for the pretraining rows; None for the same number."""
    ptx_clip_norm: float | int | None = None
    """Largest norm of ``ptx_coef * grad L_ptx / n_ptx_tokens`` alone. One clip over the sum (in the
    policy's optimizer) would let a large pretraining term shrink the PPO term."""
    ema_decay: float | int = 0.992
    """Decay of the policy's weight average, updated every optimizer step if the state has one."""
    spike_limit: float | int | None = None
    """Skip a minibatch when the gradient norm of a network is above it; None for no fixed limit."""
    spike_std: float | int | None = None
    """As in `make_sft_step`, for both networks; for the value network also of the largest absolute
    reward of a minibatch."""
    max_new_tokens: int | None = None
    """The sampler's; with it, the last block of each network computes response tokens only. None
    where it is unknown. A row with a longer response gives a loss that is not finite."""

    def __post_init__(self):
        for name in ("epochs", "minibatches", "microbatches", "ptx_microbatches", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("ppo_clip_norm", "ptx_clip_norm", "spike_limit", "spike_std", "temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be more than 0")
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be between 0 and 1")


class Losses(NamedTuple):
    """The three losses of PPO-ptx, each called with the arguments that its signature names."""

    policy: Loss = ppo_policy_loss
    """Takes `POLICY_ARGUMENTS`; `advantages` are whitened if `PPO.whiten_advantages`."""
    value: Loss = ppo_value_loss
    """Takes `VALUE_ARGUMENTS`."""
    ptx: Loss = sft_loss
    """Takes `LM_ARGUMENTS`."""


class Optimizers(NamedTuple):
    """One optimizer per network; schedules count ``epochs * minibatches`` steps per rollout."""

    policy: optax.GradientTransformation
    value: optax.GradientTransformation
