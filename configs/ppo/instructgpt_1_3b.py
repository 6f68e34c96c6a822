r"""PPO-ptx of InstructGPT 1.3B as a stage of its own, on a mesh that fits 16 x H100 of 80 GB.

Paper: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155 (appendix C.4).

    python tools/plan.py --config=configs/ppo/instructgpt_1_3b.py --chip=H100
    python experiments/ppo.py --config=configs/ppo/instructgpt_1_3b.py \
        --workdir=runs/ppo_1_3b --config.model=DIR ...

The settings are those of ``configs/instructgpt/instructgpt_1_3b.py``; only the microbatches differ,
to fit memory. The mesh comes from a plan: it has not been run at this size.
"""

from ml_collections import ConfigDict

from configs import storyland
from configs.instructgpt import instructgpt_1_3b as pipeline
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` keeps its rates and rules at a tiny size, ``key=value`` overrides."""
    config = storyland.ppo_alone(pipeline.get_config())
    config.update(mesh=(1, 8, 1), microbatches=4, ptx_microbatches=32, score_microbatches=4)
    return apply_arg(config, arg, smoke=_smoke)


def _smoke(config: ConfigDict) -> None:
    # The smoke sizes of the pipeline replace the mesh and the micro-batches above too.
    config.update(storyland.ppo_alone(pipeline.get_config("smoke")))
