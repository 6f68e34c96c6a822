"""Human preference data: HH-RLHF pairs, OpenAssistant rankings, English text.

Without ``data_dir`` they are downloaded from the Hugging Face hub.

    python experiments/prepare_data.py --source=hh_rlhf --data_dir=DIR --out=runs/hh_data
"""

from ml_collections import ConfigDict

from configs import hh_rlhf
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` is small, ``key=value`` overrides."""
    config = hh_rlhf.data()
    # Rows as the model sees them: "terminal", or a page such as rows.html; "" = none.
    config.preview = ""
    return apply_arg(config, arg, smoke=hh_rlhf.smoke_data)
