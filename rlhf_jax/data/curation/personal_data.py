"""Removes personal data from records with a hook, and a simple hook to begin with."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable
from typing import Any

from msgspec import structs

from rlhf_jax.data.curation.texts import Item
from rlhf_jax.data.schema import DataReport

Hook = Callable[[str], str | None]
"""Returns a text without personal data, or None to drop the record."""


def scrub(
    records: Iterable[Item],
    hook: Hook,
    *,
    on_row: Callable[[int, Any], None] = lambda place, record: None,
) -> tuple[list[Item], DataReport]:
    """Applies a hook to every prompt, response and document of records.

    Where the hook returns None, the record is dropped.

    Use it on the training split alone: in the paper nothing is removed from the evaluation data.
    Names of users, labelers and sources are not changed, so replace them by pseudonyms beforehand.

    Args:
      records: of any kinds.
      hook: called with each text.
      on_row: called with the index and the record before the hook is, to show the progress of a
        slow hook.

    Raises:
      ValueError: the hook fails, or returns something other than a text; the message names the
        record.

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

    They do not quote its text, which may be personal.
    """

    def call(text: str) -> Any:  # the caller refuses values that are not texts
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
    """The record with its texts replaced, or the reason why it is dropped."""
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
            # The value is not quoted: it may be what the hook was to remove.
            raise ValueError(
                f"the hook gave a {wrong} for field {name!r}: return a text, or None to drop a "
                "record"
            )
        # An empty text is no valid prompt or response, so the record would be refused when it is
        # read.
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


# 13 to 19 digits, the lengths of card numbers; `_luhn` then checks them.
_CARD = re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w]|-\d)")


_PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    # +49 170 1234567; possessive quantifiers, because backtracking could split forty digits in
    # 46,000 ways
    r"\+\d{1,3}+\)?(?:[ .-]?+\(?+\d{1,5}+\)?){1,6}"
    r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}"  # (555) 123-4567
    r"|0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,5}"  # 0170 1234567
    r")(?![\w]|[.-]\d)"
)


def mask_identifiers(text: str) -> str:
    """Replaces e-mail addresses, phone, card and IP numbers by [EMAIL], [PHONE], [CARD] and [IP].

    This is a start and not enough: it leaves names, addresses, dates of birth, account and passport
    numbers, anything spelt out in words and most foreign formats of phone numbers. For real users'
    prompts use a dedicated tool as the hook.

    >>> mask_identifiers("Mail ann@example.org or call (555) 123-4567.")
    'Mail [EMAIL] or call [PHONE].'
    """
    # E-mail addresses first, since their host may be an IP address.
    text = _EMAIL.sub("[EMAIL]", text)
    text = _IPV6.sub("[IP]", _IPV4.sub("[IP]", text))
    # Cards before phones, as a part of a card number may look like a phone number.
    text = _CARD.sub(lambda found: "[CARD]" if _luhn(found[0]) else found[0], text)
    # Fewer than 8 digits are as likely a date or a price.
    return _PHONE.sub(
        lambda found: "[PHONE]" if sum(map(str.isdigit, found[0])) >= 8 else found[0], text
    )


def _luhn(number: str) -> bool:
    """Whether the digits pass the Luhn check of card numbers.

    Every second digit from the right is doubled, and the sum of all digits is a multiple of ten.
    """
    digits = [int(d) for d in number if d.isdigit()][::-1]
    # Doubled digits above 9 count as the sum of their two digits, which is what `divmod` gives.
    return (sum(digits[0::2]) + sum(sum(divmod(2 * d, 10)) for d in digits[1::2])) % 10 == 0
