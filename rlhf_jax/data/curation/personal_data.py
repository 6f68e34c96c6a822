"""A hook that takes personal data out of records, and a simple one to begin with."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable
from typing import Any

from msgspec import structs

from rlhf_jax.data.curation.texts import Item
from rlhf_jax.data.schema import DataReport

Hook = Callable[[str], str | None]
"""Gives a text back without personal data, or None to leave the record out."""


def scrub(
    records: Iterable[Item],
    hook: Hook,
    *,
    on_row: Callable[[int, Any], None] = lambda place, record: None,
) -> tuple[list[Item], DataReport]:
    """Applies a hook to every prompt, response and document of records.

    Where the hook gives None the record is left out.

    For the training split only: in the paper nothing is taken out of what is evaluated on. Names of
    users, labelers and sources are not touched, so give them pseudonyms before they come here.

    Args:
      records: of any kinds.
      hook: called with each text.
      on_row: called with each record and its place before the hook is, to say where a slow hook is.

    Raises:
      ValueError: the hook fails, or gives something that is no text; the message names the record.

    Source: Ouyang et al. 2022, section 3.2 (training split only; the method is not given).
    """
    kept, dropped, changed, rows = [], collections.Counter(), 0, 0
    for record in records:
        on_row(rows, record)
        clean = _scrubbed(record, _on_record(hook, rows, record))
        rows += 1
        if isinstance(clean, str):
            dropped[clean] += 1
            continue
        changed += clean != record
        kept.append(clean)
    noted = {"changed by the hook": changed} if changed else {}
    return kept, DataReport("personal data", rows, len(kept), dict(dropped), noted)


def _on_record(hook: Hook, place: int, record: Any) -> Hook:
    """The hook, with errors that name the record it failed on.

    Its text may be personal and is not shown.
    """

    def call(text: str) -> Any:  # what is no text is refused by the caller
        try:
            return hook(text)
        except Exception as error:  # a user's function may raise anything
            name = f" (id {record.id})" if getattr(record, "id", None) else ""
            raise ValueError(
                f"the hook fails on record {place}{name}, on a text of {len(text):,} characters: "
                f"{type(error).__name__}: {error}"
            ) from error

    return call


def _scrubbed(record: Any, hook: Hook) -> Any:
    """The record with its texts replaced, or the reason why it is left out."""
    changes: dict[str, Any] = {}
    for name in ("prompt", "response", "responses", "text"):
        value = getattr(record, name, None)
        if value is None:
            continue
        texts = [value] if isinstance(value, str) else [getattr(v, "content", v) for v in value]
        clean = [hook(text) for text in texts]
        if None in clean:
            return "left out by the hook"
        wrong = next((type(new).__name__ for new in clean if not isinstance(new, str)), "")
        if wrong:
            raise ValueError(
                f"the hook gave a {wrong} for field {name!r}: return a text, or None to drop a "
                "record"
            )
        if any(old.strip() and not str(new).strip() for old, new in zip(texts, clean, strict=True)):
            return "nothing left of a text"
        if isinstance(value, str):
            changes[name] = clean[0]
        elif name == "prompt":
            changes[name] = tuple(
                structs.replace(m, content=c) for m, c in zip(value, clean, strict=True)
            )
        else:
            changes[name] = tuple(clean)
    return structs.replace(record, **changes)


_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+")


_IPV4 = re.compile(
    r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w]|\.\d)"
)


_IPV6 = re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}(?![\w:])")


_CARD = re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w]|-\d)")


_PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    # +49 170 1234567; nothing inside a group is tried twice, or forty digits could be cut in 46,000
    # ways
    r"\+\d{1,3}+\)?(?:[ .-]?+\(?+\d{1,5}+\)?){1,6}"
    r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}"  # (555) 123-4567
    r"|0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,5}"  # 0170 1234567
    r")(?![\w]|[.-]\d)"
)


def mask_identifiers(text: str) -> str:
    """Replaces e-mail addresses, phone, card and IP numbers by [EMAIL], [PHONE], [CARD] and [IP].

    A start, and not enough: names, addresses, dates of birth, account and passport numbers,
    anything spelt out in words and most foreign formats of phone numbers stay. For people's real
    prompts use a tool made for it as the hook.

    >>> mask_identifiers("Mail ann@example.org or call (555) 123-4567.")
    'Mail [EMAIL] or call [PHONE].'
    """
    text = _EMAIL.sub("[EMAIL]", text)
    text = _IPV6.sub("[IP]", _IPV4.sub("[IP]", text))
    text = _CARD.sub(lambda found: "[CARD]" if _luhn(found[0]) else found[0], text)
    return _PHONE.sub(
        lambda found: "[PHONE]" if sum(map(str.isdigit, found[0])) >= 8 else found[0], text
    )


def _luhn(number: str) -> bool:
    """Whether the digits pass the check sum of card numbers.

    Every second digit from the right counts double.
    """
    digits = [int(d) for d in number if d.isdigit()][::-1]
    return (sum(digits[0::2]) + sum(sum(divmod(2 * d, 10)) for d in digits[1::2])) % 10 == 0
