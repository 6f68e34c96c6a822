"""Your own files: read strictly, near-duplicates out, a cap per user, split by user, personal data out of training.

The files are JSON lines as docs/data_curation.md describes them; give those you have, at least one with prompts.

python experiments/prepare_data.py --source=jsonl --out=runs/my_data --config.prompts=prompts.jsonl
"""

from ml_collections import ConfigDict

from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` holds out more, for a file of a few rows; ``key=value`` overrides."""
    config = ConfigDict(
        {
            "source": "jsonl",
            # The files; "" = there is none.
            "demonstrations": "",
            "rankings": "",
            "prompts": "",
            "corpus": "",
            "max_bad_fraction": 0.0,  # share of the rows that may be bad; they are left out and counted
            "prefix_length": 200,  # prompts that share this many characters from the start are one; 0 = keep all
            "per_user": 200,  # records of one user at most, in each file; 0 = no limit
            "key": "user",  # who is in one split only: user, organization or conversation
            "fractions": {"train": 0.9, "validation": 0.05, "test": 0.05},
            "seed": 0,
            "leaks": "error",  # a prompt in two splits: error, or drop it from the one that is trained on
            "pii_hook": "rlhf_jax.data.curation:mask_identifiers",  # text -> text or None, on training data only
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
