"""The texts of records that curation compares, and the groups of records by author."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable
from typing import Any, TypeVar

from rlhf_jax.data.schema import Conversation, PlainText

Item = TypeVar("Item")
"""A record of `rlhf_jax.data.schema`, or a bare prompt (a text or a tuple of messages)."""


Key = str | Callable[[Any], str | None]
"""How to group records: a field ("user", "organization"), "conversation", or a function."""


_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def prompt_text(item: Any) -> str:
    r"""The prompt of a record as one text; turns of a conversation are joined with their roles.

    >>> from rlhf_jax.data.schema import Prompt
    >>> prompt_text(Prompt("Write a poem."))
    'Write a poem.'
    >>> from rlhf_jax.data.schema import Message
    >>> prompt_text((Message("user", "Hi"), Message("assistant", "Hello.")))
    'user: Hi\n\nassistant: Hello.'
    """
    prompt = conversation_of(item)
    return (
        prompt if isinstance(prompt, str) else "\n\n".join(f"{m.role}: {m.content}" for m in prompt)
    )


def first_turn(item: Any) -> str:
    r"""The first human turn in the prompt of a record; the whole prompt if it is not a dialogue.

    >>> from rlhf_jax.data.schema import Prompt
    >>> first_turn(Prompt("Human: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"))
    'Hi'
    """
    prompt = conversation_of(item)
    if not isinstance(prompt, str):
        return next((m.content for m in prompt if m.role == "user"), prompt_text(prompt))
    # The blank line before it lets the first turn match like the others.
    parts = ("\n\n" + prompt).split(_HUMAN)
    return parts[1].split(_ASSISTANT)[0].strip() if len(parts) > 1 else prompt


def normalise(text: str) -> str:
    r"""A text without differences of case, spaces and Unicode form, for comparisons.

    >>> normalise("  Write  a\nPOEM ")
    'write a poem'
    """
    # NFKC makes full-width letters and ligatures equal to the ordinary ones.
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def conversation_of(item: Any) -> Conversation:
    """The prompt of a record, the text of a document, or a bare prompt itself."""
    if isinstance(item, PlainText):
        return item.text
    return item if isinstance(item, str | tuple) else item.prompt


def digest(*parts: str) -> bytes:
    """sha256 of texts in order."""
    # A null byte between the parts, so that ("ab", "c") and ("a", "bc") differ.
    return hashlib.sha256("\0".join(parts).encode()).digest()


def group_of(item: Any, key: Key) -> str | None:
    """The group of a record; None when the record does not name one.

    Args:
      item: a record or a bare prompt.
      key: how to group records.
    """
    if callable(key):
        return key(item)
    return normalise(first_turn(item)) if key == "conversation" else getattr(item, key, None)
