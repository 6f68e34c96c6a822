"""Evaluation on storyland's test prompts.

Run:

    python experiments/evaluate.py --config=configs/evaluate/storyland.py --workdir=runs/evaluate
"""

from ml_collections import ConfigDict

from configs import storyland
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` is small, ``key=value`` overrides."""
    return apply_arg(storyland.evaluate(), arg, smoke=storyland.smoke_evaluate)
