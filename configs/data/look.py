"""One look at a file of records: what a model would learn from it by mistake, and some rows as the
model sees them.

python experiments/prepare_data.py --look=FILE.jsonl --model=storyland:base_large
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
            "max_bad_fraction": 0.0,  # share of the rows that may be bad; they are left out and counted
            # The model that will be trained: its tokenizer and template show the rows as tokens; ""
            # = as texts.
            "model": "",
            "preview": "",  # a page to write, such as rows.html; "" = on the screen
            "rows": 5,
            "assistant_turns": "all",  # of conversations SFT trains on all answers, or the last
        }
    )
    return apply_arg(config, arg, smoke=lambda c: c.update(rows=2))
