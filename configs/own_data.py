"""How users' own files are cleaned and split; used by `configs/data/jsonl.py` and `convert.py`."""

from typing import Any


def cleaning() -> dict[str, Any]:
    """The settings of `experiments/prepare_data.py` for cleaning and splitting records."""
    return {
        # Share of the rows that may be invalid; they are left out and counted.
        "max_bad_fraction": 0.0,
        # Prompts with the same first characters, this many, are duplicates; 0 = keep all.
        "prefix_length": 200,
        # Maximum number of records per user in each file; 0 = no limit.
        "per_user": 200,
        # What is never divided between splits: user, organization or conversation.
        "key": "user",
        "fractions": {"train": 0.9, "validation": 0.05, "test": 0.05},
        "seed": 0,
        # What to do about a prompt in two splits: error, or drop it from the training split.
        "leaks": "error",
        # ``text -> text``, or None to drop the record; applied to training data only.
        "pii_hook": "rlhf_jax.data.curation:mask_identifiers",
        # Share of the training prompts that are sampled and ranked where no rankings exist.
        "ranking_share": 0.5,
        # The model whose tokenizer measures the lengths below; "" = no length limit, and the
        # tables count words.
        "model": "",
        "prompt_length": 1024,
        "response_length": 1024,
        "ranked_response_length": 1024,
        "ranking_length": 10_240,
        # Rows as the model sees them: "terminal", or a page such as rows.html; "" = none.
        "preview": "",
    }
