r"""InstructGPT 175B: the policy of 175B parameters with the reward and value model of 6B.

Paper: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155 (section 3.5, table 6, appendices C.1 to
C.4).

    python experiments/instructgpt.py --config=configs/instructgpt/instructgpt_175b.py \
        --workdir=runs/instructgpt_175b --distributed \
        --config.base=models/gpt-175b --config.reward_model.model=models/gpt-6b

Weights, moments, average and reference of such a policy take over 4 TB: several hosts, 8-way fsdp
(the SFT batch has 8 rows) and the tensor axis over the remaining devices. It departs from the paper
where ``instructgpt_1_3b.py`` does. In addition: the paper swept two PPO learning rates at this
size, 2.55e-6 and 3.74e-6, and does not state which it chose; this preset takes the lower.
"""

from ml_collections import ConfigDict

from configs import common, storyland
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` keeps its rates and rules at a tiny size, ``key=value`` overrides."""
    config = common.instructgpt(common.GPT3_175B)
    common.for_accelerators(config, mesh=(1, 8, -1))
    config.sft.update(learning_rate=5.03e-6, batch_size=8)
    config.ppo_init.update(learning_rate=2.45e-6, batch_size=8)
    config.ppo.update(learning_rate=2.55e-6, value_learning_rate=5e-6, microbatches=8)
    return apply_arg(config, arg, smoke=_smoke)


def _smoke(config: ConfigDict) -> None:
    storyland.shrink(config)
    # A smoke minibatch has too few rows for eight micro-batches on several devices.
    config.ppo.microbatches = 1
