"""Which rows of an embedding have a text: what a tokenizer and a model must agree on.

A model may have more rows than its tokenizer has tokens: Qwen's table is padded to a multiple of
128. Such an id has no text, so it must never be sampled. A tokenizer may also have more tokens than
there are rows, as Gemma 3's does for images; that is safe only if no text can contain one of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.models.heads import without_ids
from rlhf_jax.types import Model

Ranges = tuple[tuple[int, int], ...]
"""Ids as ranges: the first one of each, and the one after its last."""


def unused_ids(tokenizer: Any, vocab_size: int) -> Ranges:
    """The ids below `vocab_size` that no token of the tokenizer has.

    They are the padding at the end of the table, and any gaps.

    Args:
      tokenizer: anything with the `get_vocab` of transformers; without one nothing is known, and no
        id counts as unused.
      vocab_size: rows of the embedding.
    """
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    if not vocabulary:
        return ()
    ids = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
    used = np.zeros(vocab_size, bool)
    used[ids[(ids >= 0) & (ids < vocab_size)]] = True
    # With a used id assumed at both ends, the changes come in pairs: the first id of a run of
    # unused ones, and the id after its last.
    changes = np.flatnonzero(np.diff(np.concatenate([[True], used, [True]]).astype(np.int8)))
    return tuple((int(start), int(stop)) for start, stop in changes.reshape(-1, 2))


def with_texts_only(model: Model, tokenizer: Any) -> Model:
    """The language model with probability 0 for ids that have no text.

    It is `model` itself if there are no such ids.

    Args:
      model: a language model.
      tokenizer: its tokenizer.
    """
    size = getattr(model.config, "vocab_size", None)
    unused = () if size is None else unused_ids(tokenizer, size)
    return without_ids(model, unused) if unused else model


def check_ids(tokenizer: Any, vocab_size: int, where: Path) -> None:
    """Refuse a tokenizer that could give the model an id for which it has no embedding.

    Special tokens beyond the table are accepted as long as nothing inserts them: the name of a
    special token inside a text is encoded as ordinary text.

    Args:
      tokenizer: of transformers.
      vocab_size: rows of the embedding.
      where: its folder or file, for the message.

    Raises:
      ValueError: an ordinary token, or a special one that is inserted, has an id of `vocab_size` or
        more.
    """
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= vocab_size}
    if not beyond:
        return
    # Texts are encoded without recognising special tokens, so a special one comes from a text only
    # if the merges produce it. Other added tokens are found in any text.
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    ordinary = [
        t for t in beyond if t not in added or not added[t].special or _from_text(tokenizer, t)
    ]
    if ordinary:
        raise ValueError(
            f"the tokenizer in {where} has {len(tokenizer)} tokens, more than the model's "
            f"vocab_size={vocab_size}: its last ids have no embedding ({ordinary[0]!r} has the id "
            f"{beyond[ordinary[0]]}); use the tokenizer it was trained with"
        )
    for token, i in beyond.items():
        writer = next(_writers(tokenizer, token, i), None)
        if writer is not None:
            raise ValueError(
                f"the tokenizer in {where} gives {token!r} the id {i}, which has no embedding in a "
                f"model of vocab_size={vocab_size}, and {writer} writes it: use the tokenizer it "
                "was trained with, or enlarge the embedding and train it"
            )


def _from_text(tokenizer: Any, token: str) -> bool:
    """Whether the tokenizer's merges can produce this token from ordinary text."""
    if token not in tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False):
        return False
    # The merges have no accessor; the serialised tokenizer has them.
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    # Only BPE that follows its merges can have entries that no text produces; single characters
    # need no merge.
    if model["type"] != "BPE" or model.get("ignore_merges") or len(token) == 1:
        return True
    merged = (
        # Files list a merge as a pair, or in the older form as one string with a space.
        "".join(merge) if isinstance(merge, list) else merge.replace(" ", "")
        for merge in model["merges"]
    )
    return token in merged


def _writers(tokenizer: Any, token: str, i: int) -> Iterator[str]:
    """What inserts a special token into ids, although no text contains it."""
    for role in ("bos_token", "eos_token", "unk_token"):
        if getattr(tokenizer, role, None) == token:
            yield f"its {role}"
    if i in _ids_in(json.loads(tokenizer.backend_tokenizer.to_str()).get("post_processor")):
        yield "its post-processor"
    templates = getattr(tokenizer, "chat_template", None) or ""
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if token in template:
            yield "its chat template"


def _ids_in(processor: Any) -> set[int]:
    """The ids that a post-processor adds.

    ``"ids": [1]`` of a template, ``["[SEP]", 102]`` of the older kinds.
    """
    if isinstance(processor, dict):
        return set().union(*map(_ids_in, processor.values()))
    if not isinstance(processor, list):
        return set()
    return {part for part in processor if type(part) is int}.union(*map(_ids_in, processor))
