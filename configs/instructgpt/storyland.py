"""The whole of InstructGPT on storyland in ten minutes on two CPU cores: what `make run` runs.

    python experiments/instructgpt.py --config=configs/instructgpt/storyland.py --workdir=runs/instructgpt

``:smoke`` only shows that every stage runs. Where it departs from the paper is in the report, beside the paper's values.
"""

from ml_collections import ConfigDict

from configs import storyland
from rlhf_jax.config import apply_arg

STAGES = ("data", "sft", "ppo_init", "sample", "reward_model", "ppo", "evaluate")


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` is small, ``key=value`` overrides."""
    config = ConfigDict({"seed": 0, "base": storyland.BASE} | {stage: getattr(storyland, stage)() for stage in STAGES})
    config.ppo.gold = config.evaluate.gold = storyland.GOLD
    return apply_arg(config, arg, smoke=_smoke)


def _smoke(config: ConfigDict) -> None:
    for stage in STAGES:
        getattr(storyland, f"smoke_{'sft' if stage == 'ppo_init' else stage}")(config[stage])
    config.base = "storyland:base_small"
