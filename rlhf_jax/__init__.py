"""InstructGPT in JAX: pure array functions, one struct vocabulary, flat readable experiments.

The names exported here are the public ones. The structs that they share are in `rlhf_jax.types`;
the index convention is in docs/conventions.md.
"""

__version__ = "0.1.0"

from rlhf_jax.advantages import gae, group_relative, leave_one_out, reward_to_go
from rlhf_jax.kl_control import adaptive_kl, fixed_kl
from rlhf_jax.log_probs import token_log_probs
from rlhf_jax.losses import (
    best_of_loss,
    dpo_loss,
    ppo_policy_loss,
    ppo_value_loss,
    ranking_loss,
    sft_loss,
)
from rlhf_jax.models import (
    DecoderConfig,
    gpt2,
    language_model,
    load_hf,
    save_hf,
    scalar_from_language_model,
    scalar_model,
)
from rlhf_jax.ops import (
    align,
    kl_estimate,
    log_probs_from_logits,
    masked_mean,
    previous_index,
    shaped_rewards,
    whiten,
)
from rlhf_jax.ppo import PPO, Losses, Optimizers
from rlhf_jax.rollout import InitialParams, Shaping, make_score_and_shape, step_zero_checks
from rlhf_jax.run.config import fn_spec, load_config, resolve
from rlhf_jax.sampling.generate import Sampling, generate
from rlhf_jax.sampling.refill import Rows, generate_many
from rlhf_jax.steps import compile_step, make_ppo_step, make_reward_step, make_sft_step, train_state
from rlhf_jax.types import (
    Cache,
    KLState,
    LMBatch,
    Max,
    Mean,
    Metrics,
    Model,
    Output,
    Params,
    PPOState,
    PromptBatch,
    RankingBatch,
    Rollout,
    Samples,
    StepFn,
    TrainState,
)
from rlhf_jax.update import accumulate_grads

__all__ = [
    "PPO",
    "Cache",
    "DecoderConfig",
    "InitialParams",
    "KLState",
    "LMBatch",
    "Losses",
    "Max",
    "Mean",
    "Metrics",
    "Model",
    "Optimizers",
    "Output",
    "PPOState",
    "Params",
    "PromptBatch",
    "RankingBatch",
    "Rollout",
    "Rows",
    "Samples",
    "Sampling",
    "Shaping",
    "StepFn",
    "TrainState",
    "accumulate_grads",
    "adaptive_kl",
    "align",
    "best_of_loss",
    "compile_step",
    "dpo_loss",
    "fixed_kl",
    "fn_spec",
    "gae",
    "generate",
    "generate_many",
    "gpt2",
    "group_relative",
    "kl_estimate",
    "language_model",
    "leave_one_out",
    "load_config",
    "load_hf",
    "log_probs_from_logits",
    "make_ppo_step",
    "make_reward_step",
    "make_score_and_shape",
    "make_sft_step",
    "masked_mean",
    "ppo_policy_loss",
    "ppo_value_loss",
    "previous_index",
    "ranking_loss",
    "resolve",
    "reward_to_go",
    "save_hf",
    "scalar_from_language_model",
    "scalar_model",
    "sft_loss",
    "shaped_rewards",
    "step_zero_checks",
    "token_log_probs",
    "train_state",
    "whiten",
]
