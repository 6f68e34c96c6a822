"""Optimizers and learning-rate schedules by the names that configs give them."""

from __future__ import annotations

import functools

import optax
from ml_collections import ConfigDict

from rlhf_jax import optim
from rlhf_jax.run import checks

OPTIMIZERS = ("adam", "tf_adam", "adam_bf16", "adafactor")
"""The values of `config.optimizer`."""


SCHEDULES = ("cosine", "linear", "constant")
"""The values of `config.schedule`."""


def optimizer(
    config: ConfigDict, learning_rate: optim.LearningRate, *, clip_norm: float | None = None
) -> optax.GradientTransformation:
    """The optimizer named by `config.optimizer`, with ``b1, b2, adam_eps`` for the forms of Adam.

    The choices are ``adam``, ``tf_adam`` (TensorFlow's form, used in 2019), ``adam_bf16`` (first
    moment in bfloat16) and ``adafactor``, which has a factored second moment and no first moment
    and ignores those three settings.
    """
    adams = {
        "adam": optim.adam,
        "tf_adam": optim.tf_adam,
        "adam_bf16": functools.partial(optim.adam, first_moment_dtype="bfloat16"),
    }
    checks.require_one_of("optimizer", config.optimizer, OPTIMIZERS)
    if config.optimizer == "adafactor":
        return optim.adafactor(learning_rate, clip_norm=clip_norm)
    make = adams[config.optimizer]
    return make(learning_rate, b1=config.b1, b2=config.b2, eps=config.adam_eps, clip_norm=clip_norm)


def schedule(name: str, peak: float, steps: int, *, warmup: int = 0) -> optax.Schedule:
    """The learning rate over `steps` optimizer steps.

    ``cosine`` decays to 10% of `peak`, ``linear`` to 0, and ``constant`` stays at `peak`, each
    after `warmup` steps of linear warmup.

    Raises:
      ValueError: an unknown name, or a warmup that takes all the steps.
    """
    checks.require_one_of("schedule", name, SCHEDULES)
    if name == "constant":
        return optim.warmup_then_constant(peak, warmup)
    checks.require(
        warmup < steps,
        "warmup",
        warmup,
        f"of {steps} steps leaves none for schedule={name}: lower it",
    )
    after = optim.cosine_to if name == "cosine" else optim.linear_to_zero
    # The decay begins after the warmup, so that it ends with the last step.
    return optim.with_warmup(after(peak, steps - warmup), warmup)
