"""Storyland's numbers for each stage: a model of a million parameters, rows of under a hundred tokens, two CPU cores."""

from ml_collections import ConfigDict

from configs import common

BASE = "storyland:base_large"
GOLD = "rlhf_jax.data.storyland.gold:gold_of"
PROMPT_LENGTH = 40
MAX_NEW_TOKENS = 48


def data() -> ConfigDict:
    """How much of each kind of data."""
    return ConfigDict(
        {
            "labelers": 10,
            "demonstrations": 1_600,
            "ranking_prompts": 1_600,
            "ppo_prompts": 4_000,
            "validation_prompts": 256,
            "test_prompts": 400,
            "documents": 6_000,
            "held_out_documents": 1_000,
        }
    )


def sft() -> ConfigDict:
    """The SFT baseline."""
    config = common.sft()
    config.update(model=BASE, row_length=128, epochs=4, batch_size=16, learning_rate=1e-3, dropout=0.1, clip_norm=1.0)
    return config


def ppo_init() -> ConfigDict:
    """The init of PPO."""
    config = common.ppo_init()
    config.update(model=BASE, row_length=128, batch_size=16, learning_rate=1e-3, clip_norm=1.0)
    return config


def sample() -> ConfigDict:
    """Samples to be ranked."""
    config = common.sample()
    config.update(prompt_length=PROMPT_LENGTH, max_new_tokens=MAX_NEW_TOKENS, labelers=10)
    return config


def reward_model() -> ConfigDict:
    """The reward model."""
    config = common.reward_model()
    config.update(row_length=512, batch_size=16, learning_rate=1e-3, clip_norm=1.0)
    return config


def ppo() -> ConfigDict:
    """PPO-ptx; plain PPO is the same with ``ptx_coef=0``."""
    config = common.ppo()
    config.update(
        prompt_length=PROMPT_LENGTH, max_new_tokens=MAX_NEW_TOKENS, iterations=40, episodes=128, learning_rate=2e-4,
        value_learning_rate=5e-4, warmup_iterations=4, ppo_clip_norm=1.0, ptx_clip_norm=1.0, value_clip_norm=1.0,
        missing_eos_score=-3.0, kl_ceiling=60.0, ema_decay=0.97, ptx_coef=1.0, ptx_rows_per_episode=0.5,
        ptx_row_length=128, gold=GOLD,
    )  # fmt: skip
    config.kl.coef = 0.05
    return config


def evaluate() -> ConfigDict:
    """Evaluation by gold scorer and reward model."""
    config = common.evaluate()
    config.update(
        max_new_tokens=MAX_NEW_TOKENS, gold=GOLD, held_out_row_length=128, samples=2, baseline_samples=8, batch_size=256
    )
    return config


# --- smoke sizes: each stage in seconds, to see that it runs -------------------------------------------------------


def smoke_data(config: ConfigDict) -> None:
    """A few of everything."""
    config.update(
        demonstrations=64, ranking_prompts=32, ppo_prompts=64, validation_prompts=32, test_prompts=32, documents=400,
        held_out_documents=100,
    )  # fmt: skip


def smoke_sft(config: ConfigDict) -> None:
    """Two epochs."""
    config.update(epochs=2, model="storyland:base_small")


def smoke_sample(config: ConfigDict) -> None:
    """Small batches."""
    config.update(batch_size=64)


def smoke_reward_model(config: ConfigDict) -> None:
    """Small batches."""
    config.update(batch_size=8, score_batch_size=64, save_every=2)


def smoke_ppo(config: ConfigDict) -> None:
    """Two iterations."""
    config.update(iterations=2, episodes=16, minibatches=2, held_out_rows=8, evaluate_every=1, save_every=1)


def smoke_evaluate(config: ConfigDict) -> None:
    """Few prompts."""
    config.update(samples=1, batch_size=64, held_out_batches=1)
    config.few_shot.update(candidates=1, trial_prompts=8)
