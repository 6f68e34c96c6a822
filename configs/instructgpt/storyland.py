r"""The whole of InstructGPT on storyland in ten minutes on two CPU cores: what `make run` runs.

    python experiments/instructgpt.py --config=configs/instructgpt/storyland.py \
        --workdir=runs/instructgpt

``:smoke`` only shows that every stage runs. The report lists where it departs from the paper,
beside the paper's values.
"""

from ml_collections import ConfigDict

from configs import common, storyland
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` is small, ``key=value`` overrides."""
    config = common.pipeline(**{stage: getattr(storyland, stage)() for stage in common.STAGES})
    config.base = storyland.BASE
    config.validation_samples = 4
    return apply_arg(config, arg, smoke=storyland.smoke)
