r"""InstructGPT 1.3B: the policy of 1.3B parameters with the reward and value model of 6B.

Paper: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155 (section 3.5, table 6, appendices C.1 to
C.4).

    python experiments/instructgpt.py --config=configs/instructgpt/instructgpt_1_3b.py \
        --workdir=runs/instructgpt_1_3b \
        --config.base=models/gpt-1.3b --config.reward_model.model=models/gpt-6b

Where it departs from the paper, for this preset and those of 6B and 175B:

- GPT-3 is not public. `base` is any model of the GPT-2 family of that size (`shapes` gives the
  sizes, which are checked); the reward model starts from any model of 6B, not from one tuned on
  public NLP tasks (C.2 found little difference).
- Prompts, demonstrations, labelers and the gold scorer are storyland's, in the numbers of table 6.
  To use human data, pass its files and set ``ppo.gold`` and ``evaluate.gold`` to "".
- All prompts are short, so the limit of 1,024 tokens filters nothing; there is one round of
  rankings, none from PPO policies.
- bfloat16 compute over float32 weights instead of fp16.
- Pretraining examples are rows of 2,048 tokens of several documents.
- The learning rate of PPO is in the range that the paper swept; the paper does not state which it
  chose (without the pretraining mix every run above 8.05e-6 diverged).
- Not in the paper, so our choice: lambda 0.95 of GAE, advantages whitened over the rollout, value
  clip 0.2, Adam's epsilon 1e-8, no gradient clipping, no weight decay, prompts masked in the SFT
  loss, no dropout in the init model, a prompt's loss divided by its number of untied pairs, scores
  read at the end-of-text token, gamma between token means, an average of weights updated at every
  optimizer step, sampling at temperature 1 for rankings, K uniform in 4..9, "256k" as 256,000.
"""

from ml_collections import ConfigDict

from configs import common, storyland
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` keeps its rates and rules at a tiny size, ``key=value`` overrides."""
    return apply_arg(common.instructgpt(common.GPT3_1_3B), arg, smoke=storyland.shrink)
