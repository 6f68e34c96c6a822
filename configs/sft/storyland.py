"""SFT on storyland's demonstrations.

Run:

    python experiments/sft.py --config=configs/sft/storyland.py --workdir=runs/sft
"""

from ml_collections import ConfigDict

from configs import storyland
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` is small, ``key=value`` overrides."""
    return apply_arg(storyland.sft(), arg, smoke=storyland.smoke_sft)
