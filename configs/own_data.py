"""How people's own files are cleaned and split; `configs/data/jsonl.py` and `convert.py` build on
it.
"""

from typing import Any


def cleaning() -> dict[str, Any]:
    """The settings of `experiments/prepare_data.py` from the rows of a file to the files of the
    stages.
    """
    return {
        # Share of the rows that may be bad; they are left out and counted.
        "max_bad_fraction": 0.0,
        # Prompts that share this many characters from the start are one; 0 = keep all.
        "prefix_length": 200,
        # Records of one user at most, in each file; 0 = no limit.
        "per_user": 200,
        # Who is in one split only: user, organization or conversation.
        "key": "user",
        "fractions": {"train": 0.9, "validation": 0.05, "test": 0.05},
        "seed": 0,
        # A prompt in two splits: error, or drop it from the one that is trained on.
        "leaks": "error",
        # Text -> text or None, on training data only.
        "pii_hook": "rlhf_jax.data.curation:mask_identifiers",
        # Of the training prompts, to be answered and ranked, while there are no rankings.
        "ranking_share": 0.5,
        # A model whose tokenizer counts the lengths below; "" = no length rule, and the tables
        # count words.
        "model": "",
        "prompt_length": 1024,
        "response_length": 1024,
        "ranked_response_length": 1024,
        "ranking_length": 10_240,
        # Rows as the model sees them: "terminal", or a page such as rows.html; "" = none.
        "preview": "",
    }
