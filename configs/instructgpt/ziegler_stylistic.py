r"""Book excerpts continued in a given style, GPT-2 124M: the recipe of Ziegler et al. 2019.

Paper: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593 (sections 2 and 3.1); values are those
of the experiments of one million episodes in its released code.

    python experiments/instructgpt.py --config=configs/instructgpt/ziegler_stylistic.py \
        --workdir=runs/ziegler --config.base=models/gpt2

Where it departs from the paper and its code ("the original"):

- The value network is separate, initialised from the reward model, with its own optimizer; the
  original has a zero-initialised value head on the policy's trunk, and its loss times 0.1.
- The reward model's scores are centred on demonstrations after training; the original scales them
  to mean 0 and variance 1 over 256 samples of the reference policy, before and after training.
- The reward model starts from the SFT model with a fresh head; the original's from GPT-2.
- The policy is fine-tuned first, so that it learns to end its texts (the learning rates of that are
  our choice); the original starts from GPT-2 itself.
- A response ends at the end-of-text token. The original samples 24 tokens, cuts at the first full
  stop from the 16th token on, and scores -1 where there is none; here a response that did not end
  within 24 tokens scores -1.
- Rewards are whitened over the rollout, which with one minibatch per epoch equals the original.
- The learning rate falls at every optimizer step; the original's at every iteration.
- Labels are collected in one batch, from the first policy; the paper's main runs keep collecting.
  Data and labelers are storyland's until files of human data replace them.
- The pipeline runs PPO twice; since there is no pretraining mix, the second run repeats the first.
- Adam's betas are TensorFlow's defaults.
"""

from ml_collections import ConfigDict

from configs import common, storyland
from rlhf_jax.run.config import apply_arg, fn_spec

QUERY, RESPONSE = 64, 24
LABELS = 4_992


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` keeps its rates and rules at a tiny size, ``key=value`` overrides."""
    config = common.instructgpt((12, 768, 12))
    # GPT-2 has 1,024 positions.
    config.shapes.policy.context_length = 1024
    config.shapes.reward_model = config.shapes.policy.copy_and_resolve_references()
    # A model of 124M parameters fits on each device, so the devices only share the batch.
    common.for_accelerators(config, mesh=(-1, 1, 1))
    config.data.update(demonstrations=LABELS, ranking_prompts=LABELS)
    for stage in (config.sft, config.ppo_init, config.reward_model, config.ppo):
        stage.update(optimizer="tf_adam", b1=0.9, b2=0.999, adam_eps=1e-5, schedule="linear")
    for stage in (config.sft, config.ppo_init):
        stage.update(
            epochs=1, batch_size=32, learning_rate=5e-5, dropout=0.0, row_length=QUERY + RESPONSE,
            pretraining_fraction=0.0,
        )  # fmt: skip
    config.sample.update(
        min_k=4, max_k=4, temperature=0.7, prompt_length=QUERY, max_new_tokens=RESPONSE
    )
    config.reward_model.update(
        max_k=4,
        row_length=QUERY + 4 * RESPONSE,
        batch_size=32,
        learning_rate=5e-5,
        bias_demonstrations=256,
    )
    config.reward_model.loss = fn_spec("rlhf_jax.losses.ranking:best_of_loss")
    # 1,954 iterations of 512 episodes make a million.
    config.ppo.update(
        prompt_length=QUERY, max_new_tokens=RESPONSE, temperature=0.7, episodes=512,
        iterations=1954, epochs=4, minibatches=1, learning_rate=1e-5, value_learning_rate=1e-5,
        warmup_iterations=0, value_warmup_iterations=0, whiten_rewards=True, missing_eos_score=-1.0,
        ema_decay=0.0, ptx_coef=0.0,
    )  # fmt: skip
    config.ppo.kl.update(controller="adaptive", coef=0.15, target=6.0, horizon=10_000)
    config.evaluate.update(max_new_tokens=RESPONSE, temperature=0.7)
    return apply_arg(config, arg, smoke=storyland.shrink)
