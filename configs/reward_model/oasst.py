r"""A reward model on rankings of up to 9 replies (OpenAssistant): LoRA on SmolLM2-135M-Instruct.

    python experiments/prepare_data.py --source=oasst --data_dir=DIR --out=runs/oasst_data
    python experiments/reward_model.py --config=configs/reward_model/oasst.py \
        --workdir=runs/oasst_reward --config.data=runs/oasst_data

The adapters are in the last ten blocks. A prompt and its K replies share a row;
``reward_model.json`` reports the number of tokens beside what one row per reply would need.
"""

from ml_collections import ConfigDict

from configs import hh_rlhf
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` is a few steps of storyland's small model, ``key=value`` overrides."""
    return apply_arg(hh_rlhf.reward_model("oasst"), arg, smoke=hh_rlhf.smoke_reward_model)
