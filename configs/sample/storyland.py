"""K responses to each storyland prompt, ranked by simulated labelers.

Run:

    python experiments/sample.py --config=configs/sample/storyland.py --workdir=runs/sample
"""

from ml_collections import ConfigDict

from configs import storyland
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` is small, ``key=value`` overrides."""
    return apply_arg(storyland.sample(), arg, smoke=storyland.smoke_sample)
