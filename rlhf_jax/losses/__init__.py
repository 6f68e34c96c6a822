"""Losses as functions of arrays that return ``(Mean(total, count), metrics)``.

To write your own, take arrays by the names of the `Rollout` fields (and ``logp``, ``values``,
``entropy``), put hyperparameters behind ``*``, and return the total and the count instead of their
ratio. A loss depends on no model, config or tokenizer.
"""

from rlhf_jax.losses.policy import ppo_policy_loss
from rlhf_jax.losses.preference import dpo_loss
from rlhf_jax.losses.ranking import best_of_loss, ranking_loss
from rlhf_jax.losses.supervised import sft_loss
from rlhf_jax.losses.value import ppo_value_loss

__all__ = [
    "best_of_loss",
    "dpo_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ranking_loss",
    "sft_loss",
]
