r"""A reward model on human pairs (HH-RLHF): a score head on SmolLM2-135M-Instruct's frozen trunk.

    python experiments/prepare_data.py --source=hh_rlhf --data_dir=DIR --out=runs/hh_data
    python experiments/reward_model.py --config=configs/reward_model/hh_rlhf.py \
        --workdir=runs/hh_reward --config.data=runs/hh_data

The same command serves two CPU cores (the three published test files, well under an hour) and a GPU
(all of HH-RLHF, which ``prepare_data.py`` downloads without ``--data_dir``).
``--config.train=lora`` also trains adapters in the last ten blocks, ``--config.train=all`` the
whole network; both need ``--config.epochs=1`` and a smaller learning rate. Pairs of more than
`row_length` tokens are left out and counted, in training and in evaluation.
"""

from ml_collections import ConfigDict

from configs import hh_rlhf
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` is a few steps of storyland's small model, ``key=value`` overrides."""
    return apply_arg(hh_rlhf.reward_model("hh_rlhf"), arg, smoke=hh_rlhf.smoke_reward_model)
