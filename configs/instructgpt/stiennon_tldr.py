r"""Summaries of Reddit posts, 1.3B: the recipe of Stiennon et al. 2020 on this pipeline.

Paper: Stiennon et al. 2020, https://arxiv.org/abs/2009.01325 (sections 3.2 to 3.4, appendices B.1
and B.2); lengths of prompts and summaries are from its released code.

    python experiments/instructgpt.py --config=configs/instructgpt/stiennon_tldr.py \
        --workdir=runs/stiennon_tldr --config.base=models/gpt-1.3b

The paper's 6.7B models differ in ``sft.learning_rate`` and ``ppo_init.learning_rate`` 2.83e-5,
``reward_model.learning_rate`` 5e-6, ``ppo.learning_rate`` and ``ppo.value_learning_rate`` 7e-6,
``ppo.episodes`` 256 and ``ppo.iterations`` 3907.

Where it departs from the paper:

- The data are storyland's, as many as the paper had posts and comparisons, until files of posts and
  human comparisons replace them. Pairs come from the SFT model alone, not from several policies and
  the reference summaries.
- The pipeline trains the init of PPO once more, with the settings of the SFT model; the paper uses
  the SFT model itself. It also runs PPO twice; since there is no pretraining mix, the second run
  repeats the first.
- The reward model is a single seed, not the best of 3 to 10.
- Responses are padded on the right; the paper pads prompts on the left and cuts long posts at a
  paragraph.
- bfloat16 compute over float32 weights; the paper has fp16 activations over float32 weights.
- Not in the paper, so our choice: temperature 1 for samples and rollouts, one minibatch per epoch,
  clips of 0.2, whitened advantages, no average of weights, cosines that end at 10%, Adam's betas
  and epsilon, the learning rate of the value network (that of the policy), no dropout, no rule for
  a missing end-of-text token.
"""

from ml_collections import ConfigDict

from configs import common, storyland
from rlhf_jax.run.config import apply_arg

POST, SUMMARY = 512, 48


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` keeps its rates and rules at a tiny size, ``key=value`` overrides."""
    config = common.instructgpt(common.GPT3_1_3B)
    config.shapes.reward_model = common.gpt3(*common.GPT3_1_3B)
    config.data.update(
        demonstrations=117_011,
        ppo_prompts=117_011,
        validation_prompts=6_158,
        ranking_prompts=64_832,
        test_prompts=6_158,
    )
    config.sft.update(
        epochs=1, batch_size=128, learning_rate=6.35e-5, dropout=0.0, row_length=POST + SUMMARY
    )
    config.ppo_init.update(
        epochs=1,
        batch_size=128,
        learning_rate=6.35e-5,
        row_length=POST + SUMMARY,
        pretraining_fraction=0.0,
    )
    config.sample.update(min_k=2, max_k=2, prompt_length=POST, max_new_tokens=SUMMARY)
    config.reward_model.update(
        max_k=2, row_length=POST + 2 * SUMMARY, learning_rate=1.5e-5, bias_demonstrations=117_011
    )
    # 1,954 iterations of 512 episodes make a million.
    config.ppo.update(
        prompt_length=POST, max_new_tokens=SUMMARY, episodes=512, iterations=1954, epochs=4,
        minibatches=1, learning_rate=1.5e-5, value_learning_rate=1.5e-5, schedule="linear",
        warmup_iterations=0, value_warmup_iterations=0, ema_decay=0.0, ptx_coef=0.0,
    )  # fmt: skip
    config.ppo.kl.coef = 0.05
    # At temperature 0 all samples of a prompt are equal, and the KL of samples has no meaning.
    config.evaluate.update(
        max_new_tokens=SUMMARY, temperature=0.0, samples=1, baseline_samples=1, kl_of=()
    )
    return apply_arg(config, arg, smoke=storyland.shrink)
