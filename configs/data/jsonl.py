r"""Your own files, cleaned and split.

Rows are read strictly, near-duplicates dropped, users capped, records split by user, and personal
data masked in the training split. The files are JSON lines as docs/data_curation.md describes them;
name those you have, at least one of them with prompts.

    python experiments/prepare_data.py --source=jsonl --out=runs/my_data \
        --config.prompts=prompts.jsonl
"""

from ml_collections import ConfigDict

from configs import own_data
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` holds out more, for a file of a few rows; ``key=value`` overrides."""
    config = ConfigDict(
        {
            "source": "jsonl",
            # Paths; "" = no such file.
            "demonstrations": "",
            "rankings": "",
            "prompts": "",
            "corpus": "",
            **own_data.cleaning(),
        }
    )
    return apply_arg(config, arg, smoke=_smoke)


def _smoke(config: ConfigDict) -> None:
    config.fractions.update(train=0.6, validation=0.2, test=0.2)
