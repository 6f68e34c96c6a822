"""Controllers of beta, the KL coefficient of the reward: fixed, or adaptive (Ziegler et al. 2019).

A controller is a pair of pure functions over `KLState`, so that beta is part of the checkpoint. It
is updated once per rollout, never per minibatch, with the KL of the rollout in nats per sequence:
the mean over responses of the sum over their tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.types import KLState, Mean


class KLController(NamedTuple):
    """Sets beta over the course of a run.

    Attributes:
      init: ``() -> KLState``.
      update: ``(state, kl_nats_per_sequence) -> KLState``; called once per rollout.
    """

    init: Callable[[], KLState]
    update: Callable[[KLState, Float[Array, ""]], KLState]


def fixed_kl(*, coef: float | int) -> KLController:
    """The same beta for the whole run.

    Args:
      coef: beta, score units per nat; InstructGPT uses 0.02.

    Returns:
      A controller whose update changes nothing.

    Raises:
      ValueError: if `coef` is negative, which would pay for leaving the reference.

    Source: Ouyang et al. 2022, appendix C.4.

    >>> control = fixed_kl(coef=0.02)
    >>> round(float(control.update(control.init(), jnp.float32(30.0)).coef), 4)
    0.02
    """
    _check_not_negative("coef", coef)
    return KLController(
        # An array from the start: it is saved with the state and passed to compiled functions.
        init=lambda: KLState(jnp.float32(coef)),
        update=lambda state, kl_nats_per_sequence: state,
    )


def adaptive_kl(
    *,
    coef: float | int,
    target: float | int,
    horizon: float | int,
    n_steps: int,
    clip: float | int = 0.2,
) -> KLController:
    """Proportional control in log space that drives the KL of a rollout to `target`.

    ``e = clip(KL / target - 1, -clip, clip)``, ``beta <- beta * (1 + e * n_steps / horizon)``

    Args:
      coef: beta to start with, score units per nat.
      target: wanted KL, nats per sequence.
      horizon: episodes after which a constant error of 1 would double beta.
      n_steps: episodes (responses) of one rollout.
      clip: bound of the relative error in one update.

    Returns:
      A controller.

    Raises:
      ValueError: if a number is out of range; the message names it.

    Source: Ziegler et al. 2019, section 2.2 and released code.

    >>> control = adaptive_kl(coef=0.15, target=6.0, horizon=10_000, n_steps=500)
    >>> state = control.update(control.init(), jnp.float32(12.0))
    >>> round(float(state.coef), 6)  # the error is clipped to 0.2: 0.15 * 1.01
    0.1515
    """
    _check_not_negative("coef", coef)
    positive = {"target": target, "horizon": horizon, "n_steps": n_steps, "clip": clip}
    for name, value in positive.items():
        if value <= 0:
            raise ValueError(f"{name}={value} must be above 0")
    # An update multiplies beta by ``1 + e * n_steps / horizon`` with ``e >= -clip``, so this keeps
    # the factor above 0 whatever the KL is.
    if clip * n_steps >= horizon:
        raise ValueError(
            f"horizon={horizon} lets one update take beta to 0: raise it above {clip * n_steps} "
            "episodes"
        )

    def update(state: KLState, kl_nats_per_sequence: Float[Array, ""]) -> KLState:
        error = jnp.clip(kl_nats_per_sequence / target - 1, -clip, clip)
        # A factor and not a summand: beta stays positive, and a given error changes a small and a
        # large beta by the same share.
        return KLState(state.coef * (1 + error * (n_steps / horizon)))

    return KLController(init=lambda: KLState(jnp.float32(coef)), update=update)


def kl_nats_per_sequence(
    logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Mean:
    """KL to the reference, the input of the controllers: ``mean_b sum_t (logp - ref_logp)``.

    Args:
      logp: sampled tokens under the policy, in nats.
      ref_logp: the same tokens under the reference.
      mask: true on response tokens.

    Returns:
      Total over tokens, count of rows with a response.

    >>> mask = jnp.array([[False, True, True], [False, False, False]])
    >>> float(kl_nats_per_sequence(jnp.full((2, 3), -1.0), jnp.full((2, 3), -1.5), mask).value)
    1.0
    """
    difference = jnp.where(mask, logp, 0) - jnp.where(mask, ref_logp, 0)
    return Mean(jnp.sum(difference), jnp.sum(jnp.any(mask, axis=1), dtype=jnp.float32))


def _check_not_negative(name: str, value: float | int) -> None:
    if value < 0:
        raise ValueError(
            f"{name}={value} must not be negative: the penalty would reward leaving the reference"
        )
