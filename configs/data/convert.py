"""A file in another tool's form: recognised or named, read, split by conversation, written as the stages read it.

The forms are those of docs/data_sources.md: alpaca, dolly, sharegpt, openai, trl, hh, oasst, rated, argilla,
label_studio, jsonl. Without ``--source`` the form is recognised by the columns, and said.

python experiments/prepare_data.py --source=alpaca --data=FILE --out=runs/my_data
python experiments/prepare_data.py --data=FILE --columns prompt=question,system=system --out=runs/my_data
"""

from ml_collections import ConfigDict

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
            "max_bad_fraction": 0.0,  # share of the rows that may be bad; they are left out and counted
            # The rest is as in configs/data/jsonl.py, but nothing is taken away that was not asked for.
            "prefix_length": 0,  # prompts that share this many characters from the start are one; 0 = keep all
            "per_user": 0,  # records of one user at most, in each file; 0 = no limit
            "key": "conversation",  # who is in one split only: user, organization or conversation
            "fractions": {"train": 0.9, "validation": 0.05, "test": 0.05},
            "least_conversations": 20,  # of fewer nothing is held out
            "seed": 0,
            "leaks": "drop",  # a prompt in two splits: error, or drop it from the one that is trained on
            "pii_hook": "",  # text -> text or None, on training data only
            "ranking_share": 0.5,  # of the training prompts, to be answered and ranked, while there are no rankings
            # A model whose tokenizer counts the lengths below; "" = no length rule, and the tables count words.
            "model": "",
            "prompt_length": 1024,
            "response_length": 1024,
            "ranked_response_length": 1024,
            "ranking_length": 10_240,
            "preview": "",  # rows as the model sees them: "terminal", or a page such as rows.html; "" = none
        }
    )
    return apply_arg(config, arg, smoke=_smoke)


def _smoke(config: ConfigDict) -> None:
    config.fractions.update(train=0.6, validation=0.2, test=0.2)
    config.least_conversations = 4
