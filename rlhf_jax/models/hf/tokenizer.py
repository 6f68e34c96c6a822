"""The tokenizer in a model folder, and the ids of its special tokens for config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_jax.data.special_ids import follow_folder
from rlhf_jax.data.text import end_of_turn_id, exported_end_ids, open_tokenizer
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.vocabulary import check_ids
from rlhf_jax.run.untrusted import check_tokenizer


def model_tokenizer(folder: Path, config: DecoderConfig) -> Any:
    """The tokenizer in a model folder; None if there is none.

    Raises:
      ValueError: it cannot be read, or could give ids for which the model has no embedding.
    """
    if not (folder / "tokenizer.json").exists():
        return None
    tokenizer = open_tokenizer(folder, check_tokenizer(folder))
    follow_folder(tokenizer, folder, vocab_size=config.vocab_size)
    check_ids(tokenizer, config.vocab_size, folder)
    return tokenizer


def save_tokenizer(path: Path, tokenizer: Any) -> None:
    """Write a tokenizer with its chat templates into a model folder.

    Raises:
      OSError: the disk is full or the folder cannot be written.
    """
    # The tokenizer's own writer does not delete the templates of an earlier save, and loading would
    # use them.
    for old in (*path.glob("chat_template.jinja"), *path.glob("additional_chat_templates/*.jinja")):
        old.unlink()
    try:
        tokenizer.save_pretrained(path)
    except Exception as error:
        # The Rust writer raises a bare Exception if the disk is full.
        if type(error) is not Exception:
            raise
        raise OSError(f"the tokenizer could not be written to {path}: {error}") from error


def template_names(tokenizer: Any) -> list[Any]:
    """Names of a tokenizer's chat templates if it has several; each is saved under its name."""
    templates = getattr(tokenizer, "chat_template", None)
    return list(templates) if isinstance(templates, dict) else []


def special_ids(tokenizer: Any, rows: int) -> dict[str, int | list[int]]:
    """Ids of BOS, of padding and of all that end a response, for config.json.

    Padding never gets the id of EOS or of the end of a turn, even if the tokenizer has it so, nor
    an id beyond the embedding, which a padding token that was added later may have.

    Args:
      tokenizer: of transformers.
      rows: of the embedding.

    Returns:
      ``bos_token_id``, ``eos_token_id`` (a list if there are several) and ``pad_token_id``.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ends = [] if eos is None else list(exported_end_ids(tokenizer))
    last = {eos, end_of_turn_id(tokenizer)}
    # A classifier of transformers finds the end of a row by the padding id. `last` has at most two
    # ids, so one of 0, 1 and 2 is free.
    choices = (tokenizer.pad_token_id, bos, 0, 1, 2)
    pad = next(i for i in choices if i is not None and i not in last and i < rows)
    ids: dict[str, int | list[int]] = {} if bos is None else {"bos_token_id": int(bos)}
    if ends:
        ids["eos_token_id"] = [int(i) for i in ends] if len(ends) > 1 else int(ends[0])
    return ids | {"pad_token_id": int(pad)}
