"""PPO-ptx on storyland.

    python experiments/ppo.py --config=configs/ppo/storyland.py --workdir=runs/ppo

``:overoptimised`` shows PPO with hardly any KL penalty: the reward model's score rises while the
gold score falls.
"""

from ml_collections import ConfigDict

from configs import storyland
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` is small, ``:overoptimised`` a warning, ``key=value`` overrides."""
    return apply_arg(
        storyland.ppo(), arg, smoke=storyland.smoke_ppo, overoptimised=storyland.overoptimise
    )
