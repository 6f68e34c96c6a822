"""The settings of PPO, validated before anything is loaded or written."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.ppo import POLICY_ARGUMENTS, PPO, VALUE_ARGUMENTS, Losses
from rlhf_jax.rewards import functions
from rlhf_jax.run import checks, contexts, datasets, inputs
from rlhf_jax.run import config as config_lib
from rlhf_jax.run.networks import model_folder


def check(config: ConfigDict) -> None:
    """Raises on numbers, functions, files or models that do not fit together.

    Nothing is loaded or written before.
    """
    inputs.check_settings(config)
    validate(config)
    require_reward(config)
    inputs.check_model("model", config.model)
    if config.reward_model:
        inputs.check_model("reward_model", config.reward_model, inputs.REWARD)
    inputs.check_file("prompts", config.prompts)
    inputs.check_file("pretraining_text", config.pretraining_text, required=config.ptx_coef > 0)
    inputs.check_file("held_out_text", config.held_out_text, required=False)
    prompts = datasets.read_prompts(config.prompts)
    for field in ("gold", "text_reward"):
        judge(config[field])
        inputs.check_gold(field, config[field], prompts, config.prompts)


def require_reward(config: ConfigDict) -> None:
    """Raises if the config names neither a reward model nor a reward function."""
    checks.require(
        bool(config.reward_model) or bool(config.text_reward), "reward_model", config.reward_model,
        "pass the folder of a reward model, or text_reward=module:function",
    )  # fmt: skip


def validate(config: ConfigDict) -> None:
    """Raises on numbers that do not fit together and on losses that cannot be resolved."""
    losses(config)
    update_settings(config)
    checks.require_divides("minibatches", config.minibatches, config.episodes, "the rollout batch")
    checks.require_divides(
        "score_microbatches", config.score_microbatches, config.episodes, "the rollout batch"
    )
    if config.ptx_coef:
        check_ptx_rows(config)
    checks.require_one_of("kl.controller", config.kl.controller, ("fixed", "adaptive"))
    checks.require_range("kl.coef", config.kl.coef, low=0.0)
    checks.require_range("temperature", config.temperature, low=1e-3)
    checks.require_range("ema_decay", config.ema_decay, low=0.0, high=1.0)
    checks.require_range("iterations", config.iterations, low=1)
    checks.require_range("entropy_floor", config.entropy_floor, low=0.0)
    checks.require_range("value_error_ceiling", config.value_error_ceiling, low=0.0)
    for name in ("warmup_iterations", "value_warmup_iterations"):
        checks.require(
            config.schedule == "constant" or config[name] < config.iterations, name, config[name],
            f"leaves none of iterations={config.iterations} for schedule={config.schedule}: lower "
            "it",
        )  # fmt: skip


def update_settings(config: ConfigDict) -> PPO:
    """The hyperparameters of the update."""
    return config_lib.filled_from(PPO, config, spike_std=config.guard.spike_std)


def losses(config: ConfigDict) -> Losses:
    """The losses that the config names."""
    policy = config_lib.resolve(config.policy_loss, available=POLICY_ARGUMENTS)
    return Losses(policy, config_lib.resolve(config.value_loss, available=VALUE_ARGUMENTS))


def check_ptx_rows(config: ConfigDict) -> int:
    """Rows of pretraining text per iteration; every optimizer step must get the same number."""
    count = round(config.ptx_rows_per_episode * config.episodes)
    steps = config.epochs * config.minibatches
    checks.require(
        count > 0 and count % steps == 0, "ptx_rows_per_episode", config.ptx_rows_per_episode,
        f"gives {count} rows an iteration, which must be a multiple of epochs x minibatches = "
        f"{steps}",
    )  # fmt: skip
    return count


def check_contexts(config: ConfigDict) -> None:
    """Raises if rows exceed the context of the policy or of the reward model; loads neither.

    Raises:
      ValueError: the message names the model, its context and the config keys.
    """
    slots = config.prompt_length + config.max_new_tokens
    what = f"prompt_length={config.prompt_length} with max_new_tokens={config.max_new_tokens}"
    for key in ("model", "reward_model"):
        if config[key]:
            contexts.check_slots(contexts.of_folder(model_folder(config[key])), slots, what)


def judge(name: Any) -> functions.Judge | None:
    """The function named by ``text_reward`` or ``gold``; None for "".

    It is called as ``(prompt id, response, prompt)``.
    """
    return functions.judge(name) if name else None
