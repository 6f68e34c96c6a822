r"""Inspects a file of records: patterns a model would learn by mistake, and rows as it sees them.

Run:

    python experiments/prepare_data.py --look=FILE.jsonl --model=storyland:base_large \
        --preview=rows.html
"""

from ml_collections import ConfigDict

from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``key=value`` overrides."""
    config = ConfigDict(
        {
            "source": "look",
            "data": "",  # the file, JSON lines as docs/data.md describes them
            # Share of the rows that may be invalid; they are left out and counted.
            "max_bad_fraction": 0.0,
            # The model to be trained, with whose tokenizer and template rows are shown as tokens;
            # "" = shown as text.
            "model": "",
            "preview": "",  # a page to write, such as rows.html; "" = on the screen
            "rows": 5,
            "assistant_turns": "all",  # SFT trains on "all" turns of the assistant, or the "last"
        }
    )
    return apply_arg(config, arg, smoke=lambda c: c.update(rows=2))
