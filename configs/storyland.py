"""Storyland's settings for each stage: a million parameters, short rows, two CPU cores."""

from ml_collections import ConfigDict

from configs import common

BASE = "storyland:base_large"
SMALL_BASE = "storyland:base_small"
GOLD = common.STORYLAND_GOLD
PROMPT_LENGTH = 48
MAX_NEW_TOKENS = 48


def data() -> ConfigDict:
    """Amounts of each kind of data."""
    config = common.data()
    config.update(
        labelers=10, demonstrations=2_400, ranking_prompts=3_200, ppo_prompts=6_000,
        validation_prompts=256, test_prompts=700, documents=6_000, held_out_documents=1_000,
    )  # fmt: skip
    return config


def sft() -> ConfigDict:
    """The SFT baseline."""
    config = common.sft()
    config.update(
        model=BASE,
        row_length=128,
        epochs=3,
        batch_size=16,
        learning_rate=1e-3,
        dropout=0.2,
        clip_norm=1.0,
    )
    return config


def ppo_init() -> ConfigDict:
    """The init of PPO."""
    config = common.ppo_init()
    config.update(
        model=BASE, row_length=128, batch_size=16, learning_rate=1e-3, dropout=0.1, clip_norm=1.0
    )
    return config


def sample() -> ConfigDict:
    """Responses for the labelers to rank."""
    config = common.sample()
    config.update(
        prompt_length=PROMPT_LENGTH, max_new_tokens=MAX_NEW_TOKENS, batch_size=512, labelers=10
    )
    return config


def reward_model() -> ConfigDict:
    """The reward model."""
    config = common.reward_model()
    config.update(row_length=480, batch_size=4, learning_rate=4e-4, clip_norm=1.0)
    return config


def ppo() -> ConfigDict:
    """PPO-ptx; plain PPO is the same with ``ptx_coef=0``."""
    config = common.ppo()
    config.update(
        prompt_length=PROMPT_LENGTH, max_new_tokens=MAX_NEW_TOKENS, iterations=26, episodes=128,
        minibatches=4, learning_rate=4e-4, value_learning_rate=1e-3, schedule="cosine",
        warmup_iterations=4, value_warmup_iterations=0, ppo_clip_norm=1.0, ptx_clip_norm=1.0,
        value_clip_norm=1.0, lam=0.9, missing_eos_score=-3.0, kl_ceiling=60.0, ema_decay=0.96,
        ptx_coef=0.15, ptx_rows_per_episode=0.125, ptx_row_length=128, gold=GOLD,
    )  # fmt: skip
    config.kl.coef = 0.4
    return config


def overoptimise(config: ConfigDict) -> None:
    """PPO with hardly any KL penalty and too many iterations: a demonstration of overoptimisation.

    The policy learns to exploit the reward model, and the gold score falls.
    """
    config.update(
        name="ppo_overoptimised", iterations=60, ptx_coef=0.0, schedule="constant", kl_ceiling=1e4
    )
    config.kl.coef = 0.01


def evaluate() -> ConfigDict:
    """Evaluation by gold scorer and reward model."""
    config = common.evaluate()
    config.update(
        max_new_tokens=MAX_NEW_TOKENS, gold=GOLD, held_out_row_length=128, held_out_batches=2,
        samples=2, baseline_samples=6, batch_size=256,
    )  # fmt: skip
    config.few_shot.candidates = 2
    return config


# --------------------------------------------- smoke sizes: each stage in seconds, to see it runs


def smoke_data(config: ConfigDict) -> None:
    """A few records of each kind."""
    config.update(
        demonstrations=64, ranking_prompts=32, ppo_prompts=64, validation_prompts=32,
        test_prompts=32, documents=400, held_out_documents=100,
    )  # fmt: skip


def smoke_sft(config: ConfigDict) -> None:
    """Two epochs."""
    config.epochs = 2
    if config.model:  # empty in a pipeline, which fills it in from `base`
        config.model = SMALL_BASE


def smoke_sample(config: ConfigDict) -> None:
    """Small batches."""
    config.update(batch_size=64)


def smoke_reward_model(config: ConfigDict) -> None:
    """Small batches."""
    config.update(batch_size=8, score_batch_size=64, save_every=2)


def smoke_ppo(config: ConfigDict) -> None:
    """Two iterations."""
    config.update(
        iterations=2,
        episodes=16,
        minibatches=2,
        warmup_iterations=0,
        held_out_rows=8,
        evaluate_every=1,
        save_every=1,
    )


def smoke_evaluate(config: ConfigDict) -> None:
    """Few prompts."""
    config.update(samples=1, batch_size=64, held_out_batches=1)
    config.few_shot.update(candidates=1, trial_prompts=8)


def smoke(config: ConfigDict) -> None:
    """A whole pipeline in under two minutes."""
    for stage in common.STAGES:
        # The init of PPO has the settings of SFT, and so its smoke size.
        globals()[f"smoke_{'sft' if stage == 'ppo_init' else stage}"](config[stage])
    config.base, config.smoke = SMALL_BASE, True


def ppo_alone(config: ConfigDict) -> ConfigDict:
    """The PPO stage of a whole pipeline, with the sizes of its models beside it."""
    return ConfigDict(config.ppo.to_dict() | {"shapes": config.shapes.to_dict()})


def shrink(config: ConfigDict) -> None:
    """A paper's preset at smoke size.

    Its rates and rules are kept; models, row lengths and amounts of data become storyland's.
    """
    # An empty shape accepts a model of any size.
    with config.shapes.unlocked():
        config.shapes.policy, config.shapes.reward_model = ConfigDict(), ConfigDict()
    # Back to the defaults of a CPU, which the presets of billions of parameters change.
    for stage in common.STAGES[1:]:
        config[stage].mesh = (-1, 1, 1)
        config[stage].decoder.update(dtype="float32", remat="none", unroll=None)
    config.sft.row_length = config.ppo_init.row_length = config.ppo.ptx_row_length = 128
    config.reward_model.row_length = 512
    config.evaluate.held_out_row_length = 128
    for stage in (config.sample, config.ppo):
        stage.prompt_length = PROMPT_LENGTH
    for stage in (config.sample, config.ppo, config.evaluate):
        stage.max_new_tokens = MAX_NEW_TOKENS
    minibatches = min(config.ppo.minibatches, 2)  # read before `smoke` overwrites it
    smoke(config)
    config.ppo.update(
        minibatches=minibatches, ptx_rows_per_episode=1.0,
        warmup_iterations=min(config.ppo.warmup_iterations, 1),
        value_warmup_iterations=min(config.ppo.value_warmup_iterations, 1),
    )  # fmt: skip
