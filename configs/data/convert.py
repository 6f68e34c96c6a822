"""A file in another tool's form: recognised or named, read, split by conversation, written as the
stages read it.

The forms are those of docs/data_sources.md: alpaca, dolly, sharegpt, openai, trl, hh, oasst, rated,
argilla, label_studio, jsonl. Without ``--source`` the form is recognised by the columns, and said.

python experiments/prepare_data.py --source=alpaca --data=FILE --out=runs/my_data python
experiments/prepare_data.py --data=FILE --columns prompt=question,system=system --out=runs/my_data
"""

from ml_collections import ConfigDict

from configs import own_data
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` holds out more, for a file of a few rows; ``key=value`` overrides."""
    config = ConfigDict(
        {
            "source": "convert",
            "form": "",  # "" recognises it by the columns
            "data": "",  # a file, or a folder of shards
            "columns": "",  # wanted=name,..: the table's own names; wanted= leaves a column aside
            "split": "",  # of a folder that has several
            "language": "en",  # of OpenAssistant's messages
            **own_data.cleaning(),
            # Nothing is taken away that was not asked for.
            "prefix_length": 0,
            "per_user": 0,
            "key": "conversation",
            "leaks": "drop",
            "pii_hook": "",
            "least_conversations": 20,  # of fewer nothing is held out
        }
    )
    return apply_arg(config, arg, smoke=_smoke)


def _smoke(config: ConfigDict) -> None:
    config.fractions.update(train=0.6, validation=0.2, test=0.2)
    config.least_conversations = 4
