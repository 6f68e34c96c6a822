r"""InstructGPT 6B: policy, reward and value model of 6B parameters.

Paper: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155 (section 3.5, table 6, appendices C.1 to
C.4).

    python experiments/instructgpt.py --config=configs/instructgpt/instructgpt_6b.py \
        --workdir=runs/instructgpt_6b \
        --config.base=models/gpt-6b --config.reward_model.model=models/gpt-6b

Only the learning rate of the init model differs from 1.3B. It departs from the paper where
``instructgpt_1_3b.py`` does.
"""

from ml_collections import ConfigDict

from configs import common, storyland
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` keeps its rates and rules at a tiny size, ``key=value`` overrides."""
    config = common.instructgpt(common.GPT3_6B)
    config.ppo_init.learning_rate = 1.04e-5
    return apply_arg(config, arg, smoke=storyland.shrink)
