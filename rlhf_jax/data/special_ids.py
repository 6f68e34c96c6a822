"""Ids that do not come from text: what precedes a text, and which tokens end a response.

Both are properties of the model's folder. The ids before a text are read off the tokenizer itself,
because base models of Llama, Mistral and Gemma were trained with BOS there and others were not. A
response ends with the tokenizer's EOS or any other id that ``generation_config.json`` names: Llama
3 Instruct names three ids, Qwen and Gemma name two.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_jax.run.untrusted import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

_ENDS = "response_end_ids"
"""The attribute of a tokenizer with its folder's `eos_token_id`, in the order of the file."""

_PROBES = ("x", "a", "the", "0", ".")
"""Short texts; a tokenizer has ids for at least one of them."""


# ------------------------------------------------------------------------------- what begins a text


def begin_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that the tokenizer's own post-processor puts before a text: BOS, or nothing.

    What it puts after a text (EOS, or the ``[SEP]`` of BERT) is ignored: this package writes the
    EOS of responses and documents itself.

    Args:
      tokenizer: from `text.load_tokenizer` or `load_hf`; its post-processor may be changed between
        two calls.
    """
    processor = tokenizer.backend_tokenizer.post_processor
    return _begin_ids(tokenizer, b"" if processor is None else bytes(processor.__getstate__()))


@functools.lru_cache(maxsize=64)
def _begin_ids(tokenizer: Tokenizer, state: bytes) -> tuple[int, ...]:
    del state  # part of the cache key alone, as the post-processor of a tokenizer may change
    for probe in _PROBES:
        encoded = tokenizer(probe, add_special_tokens=True, return_special_tokens_mask=True)
        ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
        # Only ids up to the first one that comes from the text itself are put before it.
        if 0 in added:
            return tuple(ids[: added.index(0)])
    # The vocabulary has none of the probes. Around an empty text BOS and EOS cannot be told apart
    # by position, so only an id that is BOS counts.
    around = tokenizer.encode("", add_special_tokens=True)
    return tuple(around[:1]) if around and around[0] == tokenizer.bos_token_id else ()


# ----------------------------------------------------------------------------- what ends a response


def require_eos_id(tokenizer: Tokenizer) -> int:
    """The id of the tokenizer's EOS, which ends every response to a text in training.

    Raises:
      ValueError: the tokenizer names none.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError("the tokenizer names no EOS token: set eos_token in tokenizer_config.json")
    return tokenizer.eos_token_id


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a response in generation.

    The tokenizer's EOS comes first, then the others of generation_config.json.
    """
    return tuple(dict.fromkeys([require_eos_id(tokenizer), *folder_end_ids(tokenizer)]))


def folder_end_ids(tokenizer: Any) -> tuple[int, ...]:
    """``eos_token_id`` of the folder that the tokenizer was loaded from, in that order.

    It is () where the folder names none.
    """
    return tuple(getattr(tokenizer, "__dict__", {}).get(_ENDS, ()))


def set_folder_end_ids(tokenizer: Any, ids: tuple[int, ...]) -> None:
    """Stores in `tokenizer` the ids that end a response besides its EOS."""
    vars(tokenizer)[_ENDS] = tuple(ids)


# --------------------------------------------------------------------------- settings of the folder


def follow_folder(
    tokenizer: Tokenizer, folder: str | os.PathLike[str], *, vocab_size: int | None = None
) -> None:
    """Applies the settings of the folder's other files to a tokenizer.

    ``add_bos_token`` of ``tokenizer_config.json``, where it is given, decides whether BOS comes
    before a text, whatever the post-processor of ``tokenizer.json`` does; transformers 5 reads
    neither value. ``eos_token_id`` of ``generation_config.json``, or of ``config.json`` where the
    former names none, ends responses besides the tokenizer's EOS.

    Args:
      tokenizer: as read from `folder`; it is changed in place.
      folder: of the model.
      vocab_size: number of ids of the model; None takes it from config.json, or else from the
        tokenizer.

    Raises:
      ValueError: an invalid value; the message names the file, the field and the fix.
    """
    folder = Path(folder)
    _follow_add_bos(tokenizer, folder / "tokenizer_config.json")
    description = _object(folder / "config.json")
    if vocab_size is None:
        size = description.get("vocab_size")
        vocab_size = size if isinstance(size, int) and not isinstance(size, bool) else 0
    # The larger of both: a model may pad its vocabulary, and a tokenizer may have added tokens.
    ends = _ends_of(folder, description, max(vocab_size, len(tokenizer)))
    if ends:
        set_folder_end_ids(tokenizer, ends)


def _follow_add_bos(tokenizer: Tokenizer, file: Path) -> None:
    wanted = _object(file).get("add_bos_token")
    if wanted is None:
        return
    if not isinstance(wanted, bool):
        raise ValueError(
            f"{file}: add_bos_token is {wanted!r}: write true or false, or leave it out"
        )
    bos = tokenizer.bos_token_id
    if wanted and bos is None:
        raise ValueError(
            f"{file}: add_bos_token is true and no bos_token is named: name it, or write false"
        )
    begins = begin_ids(tokenizer)
    # Without a BOS token the ids before a text cannot be BOS, so any of them is unwanted.
    if wanted == (bool(begins) if bos is None else bos in begins):
        return
    from tokenizers import processors  # only a tokenizer that is loaded anyway needs it

    special = [(str(tokenizer.bos_token), bos)] if wanted and isinstance(bos, int) else []
    single = f"{tokenizer.bos_token} $A" if wanted else "$A"
    # This also drops an EOS after the text, which the package writes itself where it belongs.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=special
    )


def _ends_of(folder: Path, description: dict[str, Any], size: int) -> tuple[int, ...]:
    file = folder / "generation_config.json"
    value = _object(file).get("eos_token_id")
    if value is None:
        # Models without a generation_config.json name their ends here.
        file, value = folder / "config.json", description.get("eos_token_id")
        # A single id beyond the vocabulary is a default of transformers' config class, such as the
        # 50256 of GPT-2, and was never set for this model.
        if isinstance(value, int) and value >= size:
            return ()
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < size:
            raise ValueError(
                f"{file}: eos_token_id={str(value)[:80]} holds {str(i)[:20]!r}, which is no id of "
                f"this model (0 to {size - 1}): write the id, or the list of ids, that ends a "
                "response"
            )
    return tuple(dict.fromkeys(ids))


def _object(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no object: copy it again")
    return content
