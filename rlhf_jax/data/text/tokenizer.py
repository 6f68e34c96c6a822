"""Loads the tokenizers of model folders, and checks that two of them give the same ids."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_jax.data.special_ids import begin_ids, follow_folder
from rlhf_jax.run.untrusted import check_tokenizer

if TYPE_CHECKING:
    import transformers


def load_tokenizer(path: str | os.PathLike[str]) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer in a local folder (tokenizer.json, tokenizer_config.json).

    Code in the folder is never run. The folder's other settings are applied as well:
    ``add_bos_token``, and the ids that end a response (`special_ids.follow_folder`).

    Raises:
      ValueError: there is no tokenizer, it cannot be read, it names no EOS token, or the folder's
        settings of special ids are invalid.
    """
    try:
        file = check_tokenizer(path)
    except FileNotFoundError:
        raise ValueError(
            f"no tokenizer.json in {path}: pass the folder that holds the model's tokenizer"
        ) from None
    # Opened only after the check, which bounds the size of everything that is parsed here.
    tokenizer = open_tokenizer(path, file)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {path} names no EOS token: set eos_token in tokenizer_config.json"
        )
    follow_folder(tokenizer, path)
    return tokenizer


def open_tokenizer(
    folder: str | os.PathLike[str], file: Path
) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer as transformers reads it; `load_tokenizer` also applies the folder's settings.

    Args:
      folder: the folder of the tokenizer.
      file: its tokenizer.json, checked (`rlhf_jax.run.untrusted.check_tokenizer`).

    Raises:
      ValueError: it cannot be read.
    """
    import transformers  # slow to import, and needed by this function alone

    try:  # the file is given, so that tokenizer_config.json cannot name another
        return transformers.PreTrainedTokenizerFast.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, tokenizer_file=str(file)
        )
    except Exception as error:  # the Rust parser raises bare Exception
        raise ValueError(
            f"the tokenizer in {folder} cannot be read ({error}): copy or save it again"
        ) from error


def tokenizer_fingerprint(tokenizer: transformers.PreTrainedTokenizerFast) -> str:
    """sha256 of everything that determines the ids of a text and those before it, and of EOS."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # These are set by the arguments of the last call and do not belong to the vocabulary.
    for call_state in ("truncation", "padding"):
        state.pop(call_state, None)
    # EOS ends every response but is named in tokenizer_config.json, outside this state.
    state["eos_token_id"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def check_same_tokenizer(**tokenizers: transformers.PreTrainedTokenizerFast) -> None:
    """Raise unless all tokenizers give the same ids.

    Called as ``check_same_tokenizer(policy=a, reward_model=b)``.

    Raises:
      ValueError: two differ; the message names them.
    """
    (first, reference), *others = tokenizers.items()
    for name, other in others:
        begins, others_begin = begin_ids(reference), begin_ids(other)
        # Compared apart from the fingerprint, as the message can then name the likely cause.
        if begins != others_begin:
            raise ValueError(
                f"the tokenizers of {first} and {name} differ: {first} begins each text with the "
                f"ids {list(begins)} and {name} with {list(others_begin)} (BOS); token ids pass "
                "between the models unchanged, so start both from the same base model, or write "
                "the same add_bos_token into their tokenizer_config.json"
            )
        if tokenizer_fingerprint(reference) != tokenizer_fingerprint(other):
            raise ValueError(
                f"the tokenizers of {first} ({len(reference)} tokens) and {name} ({len(other)} "
                "tokens) differ: token ids pass between the models unchanged, so start both from "
                "the same base model"
            )
