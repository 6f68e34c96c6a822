"""The data files of storyland.

python experiments/prepare_data.py --config=configs/data/storyland.py --workdir=runs/data
"""

from ml_collections import ConfigDict

from configs import storyland
from rlhf_jax.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` is small, ``key=value`` overrides."""
    return apply_arg(storyland.data(), arg, smoke=storyland.smoke_data)
