r"""A file in another tool's format, converted into the files that the stages read.

The formats are those of docs/data_sources.md: alpaca, dolly, sharegpt, openai, trl, hh, oasst,
rated, argilla, label_studio, jsonl. Without ``--source`` the format is recognised by the columns
and printed. Records are split by conversation.

    python experiments/prepare_data.py --source=alpaca --data=FILE --out=runs/my_data
    python experiments/prepare_data.py --data=FILE --out=runs/my_data \
        --columns prompt=question,system=system
"""

from ml_collections import ConfigDict

from configs import own_data
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` holds out more, for a file of a few rows; ``key=value`` overrides."""
    config = ConfigDict(
        {
            "source": "convert",
            "form": "",  # "" = recognised by the columns
            "data": "",  # a file, or a folder of shards
            "columns": "",  # wanted=name,..: renames columns of the table; wanted= ignores one
            "split": "",  # which split of a folder that has several
            "language": "en",  # language of OpenAssistant's messages to keep
            **own_data.cleaning(),
            # A conversion drops nothing by default, so the cleaning rules are off.
            "prefix_length": 0,
            "per_user": 0,
            "key": "conversation",
            "leaks": "drop",
            "pii_hook": "",
            "least_conversations": 20,  # with fewer, nothing is held out
        }
    )
    return apply_arg(config, arg, smoke=_smoke)


def _smoke(config: ConfigDict) -> None:
    config.fractions.update(train=0.6, validation=0.2, test=0.2)
    config.least_conversations = 4
