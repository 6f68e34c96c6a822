r"""The reward model of storyland.

Run:

    python experiments/reward_model.py --config=configs/reward_model/storyland.py \
        --workdir=runs/reward_model
"""

from ml_collections import ConfigDict

from configs import storyland
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` is small, ``key=value`` overrides."""
    return apply_arg(storyland.reward_model(), arg, smoke=storyland.smoke_reward_model)
