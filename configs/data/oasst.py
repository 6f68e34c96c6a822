"""OpenAssistant data alone: rankings of 2 to 9 replies, with the best replies as demonstrations.

Without ``data_dir`` they are downloaded from the Hugging Face hub.

    python experiments/prepare_data.py --source=oasst --data_dir=DIR --out=runs/oasst_data
"""

from ml_collections import ConfigDict

from configs import hh_rlhf
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` is small, ``key=value`` overrides."""
    config = hh_rlhf.oasst_data()
    # Rows as the model sees them: "terminal", or a page such as rows.html; "" = none.
    config.preview = ""
    return apply_arg(config, arg, smoke=smoke)


def smoke(config: ConfigDict) -> None:
    """A few short records; because replies are long here, a large share of them must be read."""
    hh_rlhf.smoke_data(config)
    config.shares.update(validation=0.2, demonstrations=0.3, ranking=0.35)
