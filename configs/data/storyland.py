"""The data files of storyland.

Run:

    python experiments/prepare_data.py --config=configs/data/storyland.py --workdir=runs/data
"""

from ml_collections import ConfigDict

from configs import storyland
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` is small, ``key=value`` overrides."""
    config = storyland.data()
    # Rows as the model sees them: "terminal", or a page such as rows.html; "" = none.
    config.preview = ""
    return apply_arg(config, arg, smoke=storyland.smoke_data)
