"""What is done to prompts and labels before a stage reads them, and the tables that describe a data set.

Pure functions on the records of `rlhf_jax.data.schema`: near-duplicates out, a cap per user, splits in which no user
is twice, a check that nothing leaked between them, a hook for personal data, languages, few-shot instructions made
into examples. A record may say who typed its prompt (fields `user`, `organization`); one that does not is grouped by
its conversation, that is, by its first human turn. Functions that leave records out return a `DataReport` beside them.

Source: Ouyang et al. 2022, arXiv 2203.02155, sections 3.2 and 3.3 and appendix A.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import math
import random
import re
import statistics
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from msgspec import structs

from rlhf_jax.data.schema import (
    ABSENT,
    Conversation,
    DataReport,
    Demonstration,
    PlainText,
    Prompt,
    Ranking,
    strict_pairs,
)

Item = TypeVar("Item")
"""A record of `rlhf_jax.data.schema`, or a bare prompt (a text or a tuple of messages)."""

Key = str | Callable[[Any], str | None]
"""What groups records: a field ("user", "organization"), "conversation", or a function of a record."""

WIDTH = 120
"""Columns of a table at most."""

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


# ------------------------------------------------------------------------------------------------- texts of records


def prompt_text(item: Any) -> str:
    r"""The prompt of a record as one text; the turns of a conversation follow each other with their roles.

    >>> prompt_text(Prompt("Write a poem."))
    'Write a poem.'
    >>> from rlhf_jax.data.schema import Message
    >>> prompt_text((Message("user", "Hi"), Message("assistant", "Hello.")))
    'user: Hi\n\nassistant: Hello.'
    """
    prompt = _prompt(item)
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{m.role}: {m.content}" for m in prompt)


def first_turn(item: Any) -> str:
    r"""The first thing a person says in the prompt of a record; the whole prompt where it is no conversation.

    >>> first_turn(Prompt("Human: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"))
    'Hi'
    """
    prompt = _prompt(item)
    if not isinstance(prompt, str):
        return next((m.content for m in prompt if m.role == "user"), prompt_text(prompt))
    parts = ("\n\n" + prompt).split(_HUMAN)
    return parts[1].split(_ASSISTANT)[0].strip() if len(parts) > 1 else prompt


def normalise(text: str) -> str:
    r"""A text without the differences that make no difference: case, spaces, ways to write a character.

    >>> normalise("  Write  a\nPOEM ")
    'write a poem'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _prompt(item: Any) -> Conversation:
    if isinstance(item, PlainText):
        return item.text
    return item if isinstance(item, str | tuple) else item.prompt


def _digest(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode()).digest()


def _group(item: Any, key: Key) -> str | None:
    """The user, organization or whatever `key` means of a record; None when it does not say."""
    if callable(key):
        return key(item)
    return normalise(first_turn(item)) if key == "conversation" else getattr(item, key, None)


# -------------------------------------------------------------------------------------- leaving out, caps, splits


def drop_long_common_prefix(prompts: Iterable[Item], *, prefix_length: int) -> tuple[list[Item], DataReport]:
    """Leaves out prompts that begin as an earlier one does: variations of one template, typed again and again.

    Case and spaces do not count. Prompts shorter than the prefix are compared whole, so plain repeats go too. One pass
    over a set of hashes: a million prompts take some seconds.

    Args:
      prompts: records or bare prompts.
      prefix_length: characters that two prompts may not share from the start. The paper gives no number.

    Returns:
      The first prompt of each prefix in the order they came, and the counts.

    Source: Ouyang et al. 2022, section 3.2 (a heuristic on long common prefixes).

    >>> drop_long_common_prefix(["Write a poem on rain", "write a poem on snow", "Why?"], prefix_length=12)[0]
    ['Write a poem on rain', 'Why?']
    """
    if prefix_length < 1:
        raise ValueError(f"prefix_length={prefix_length} must be 1 or more characters")
    seen: dict[bytes, tuple[int, bytes]] = {}
    kept, dropped, examples, rows = [], collections.Counter(), {}, 0
    for place, item in enumerate(prompts):
        rows += 1
        text = normalise(prompt_text(item))
        prefix, whole = _digest(text[:prefix_length]), _digest(text)
        if prefix not in seen:
            seen[prefix] = (place, whole)
            kept.append(item)
            continue
        first, other = seen[prefix]
        reason = "same prompt" if other == whole else "long common prefix"
        dropped[reason] += 1
        # Places and no texts: the report is kept, and a prompt may hold personal data.
        examples.setdefault(reason, f"{reason}: the first is prompt {place}, which begins as prompt {first} does")
    return kept, DataReport("de-duplication", rows, len(kept), dict(dropped), examples=examples)


def cap_per_user(records: Iterable[Item], limit: int = 200, *, key: Key = "user") -> tuple[list[Item], DataReport]:
    """At most `limit` records of each user: the first ones. Records that name none are all kept, and counted.

    Source: Ouyang et al. 2022, section 3.2 (about 200 prompts a user; appendix A.2 says organization).
    """
    if limit < 1:
        raise ValueError(f"limit={limit} must be 1 or more")
    counts: collections.Counter[str] = collections.Counter()
    kept, rows, unnamed = [], 0, 0
    for record in records:
        rows += 1
        group = _group(record, key)
        unnamed += group is None
        if group is not None:
            counts[group] += 1
        if group is None or counts[group] <= limit:
            kept.append(record)
    name = key if isinstance(key, str) else "group"
    dropped = {f"more than {limit} of one {name}": rows - len(kept)} if rows > len(kept) else {}
    return kept, DataReport("cap", rows, len(kept), dropped, {f"names no {name}": unnamed} if unnamed else {})


def split_by(
    records: Iterable[Item], *, key: Key = "user", fractions: Mapping[str, float], seed: int = 0
) -> dict[str, list[Item]]:
    """Splits records so that a user (organization, conversation, ...) is in exactly one part.

    Each group lies at a place in [0, 1) that its hash with the seed decides, and the fractions cut that line in their
    order. So a new record of a known user joins the others, whatever else is added, and no state is kept. A record
    that names no user goes by its conversation. The parts' sizes follow the fractions only roughly: users differ.

    Args:
      records: of any kinds.
      key: "user", "organization", "conversation" or a function that gives a record's group (None: by conversation).
      fractions: share of the groups for each part; they add up to 1.
      seed: of the hash.

    Returns:
      The records of each part in the order they came.

    Source: Ouyang et al. 2022, section 3.2 (by user) and appendix A.2 (by organization).

    >>> parts = split_by(["a", "b", "A "], key="conversation", fractions={"train": 0.5, "test": 0.5})
    >>> {"a", "A "} in [set(part) - {"b"} for part in parts.values()]
    True
    """
    total = sum(fractions.values())
    if abs(total - 1) > 1e-6 or any(share < 0 for share in fractions.values()):
        raise ValueError(f"fractions={dict(fractions)} must be 0 or more and add up to 1, not {total:g}")
    parts: dict[str, list[Item]] = {name: [] for name in fractions}
    ends = list(itertools.accumulate(fractions.values()))
    for record in records:
        group = _group(record, key)
        named = ("conversation", str(_group(record, "conversation"))) if group is None else ("group", group)
        place = int.from_bytes(_digest(str(seed), *named)[:6], "big") / 2**48
        # Sums of floats may end a little below 1; the last part that has a share takes what is left.
        choices = [name for name, end in zip(fractions, ends, strict=True) if place < end and fractions[name]]
        parts[choices[0] if choices else [name for name in fractions if fractions[name]][-1]].append(record)
    return parts


# ---------------------------------------------------------------------------------------------------- between splits


@dataclasses.dataclass(frozen=True)
class Leak:
    """One prompt in two splits.

    Attributes:
      kind: "prompt" when the whole prompts are equal, "first human turn" when the conversations only begin the same.
      text: what they share, shortened.
      places: (split, position in it) of the two records.
      ids: of the two records, where they have any.
    """

    kind: str
    text: str
    places: tuple[tuple[str, int], tuple[str, int]]
    ids: tuple[str | None, str | None] = (None, None)

    def __str__(self) -> str:
        pairs = zip(self.places, self.ids, strict=True)
        names = [f"{split}[{place}]" + (f" (id {name})" if name else "") for (split, place), name in pairs]
        return f"the same {self.kind} is in {' and '.join(names)}: {self.text}"


def leakage(splits: Mapping[str, Sequence[Any]]) -> list[Leak]:
    """Prompts that are in two splits: whole, or as the first human turn of a conversation. Case and spaces aside.

    Args:
      splits: the records of each split, of any kinds.

    Returns:
      For each record the first earlier split that has its prompt or its first turn; empty when nothing leaked.
    """
    leaks: list[Leak] = []
    turns: dict[str, dict[bytes, int]] = {}
    prompts: dict[str, dict[bytes, int]] = {}
    for name, records in splits.items():
        here: tuple[dict[bytes, int], dict[bytes, int]] = ({}, {})
        for place, record in enumerate(records):
            whole, turn = (_digest(normalise(text)) for text in (prompt_text(record), first_turn(record)))
            here[0].setdefault(whole, place)
            here[1].setdefault(turn, place)
            for kind, value, earlier in (("prompt", whole, prompts), ("first human turn", turn, turns)):
                other = next((split for split, known in earlier.items() if value in known), None)
                if other is not None:
                    text = prompt_text(record) if kind == "prompt" else first_turn(record)
                    first = earlier[other][value]
                    ids = (getattr(splits[other][first], "id", None), getattr(record, "id", None))
                    leaks.append(Leak(kind, _short(text), ((other, first), (name, place)), ids))
                    break
        prompts[name], turns[name] = here
    return leaks


def check_leakage(splits: Mapping[str, Sequence[Any]]) -> None:
    """Raises a ValueError that names both places of the first leaks, where `leakage` finds any."""
    leaks = leakage(splits)
    if leaks:
        shown = "\n  ".join(map(str, leaks[:3]))
        raise ValueError(f"{len(leaks)} records share a prompt with another split:\n  {shown}")


def without_leaks(records: Iterable[Item], held_out: Iterable[Any]) -> tuple[list[Item], DataReport]:
    """The records whose prompt and first human turn are in none of `held_out`, and the counts: a leak mended."""
    texts = [(normalise(prompt_text(other)), normalise(first_turn(other))) for other in held_out]
    prompts, turns = (
        {_digest(text) for text in column} for column in (zip(*texts, strict=True) if texts else ((), ()))
    )
    kept, rows = [], 0
    for record in records:
        rows += 1
        if _digest(normalise(prompt_text(record))) in prompts or _digest(normalise(first_turn(record))) in turns:
            continue
        kept.append(record)
    dropped = {"also held out": rows - len(kept)} if rows > len(kept) else {}
    return kept, DataReport("leaks", rows, len(kept), dropped)


def _short(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= width else line[: width - 3] + "...")


# ---------------------------------------------------------------------------------------------------- personal data


Hook = Callable[[str], str | None]
"""Gives a text back without personal data, or None to leave the record out."""


def scrub(
    records: Iterable[Item], hook: Hook, *, on_row: Callable[[int, Any], None] = lambda place, record: None
) -> tuple[list[Item], DataReport]:
    """Applies a hook to every prompt, response and document of records; where it says None the record is left out.

    For the training split only: in the paper nothing is taken out of what is evaluated on. Names of users, labelers
    and sources are not touched, so give them pseudonyms before they come here.

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
    """The hook, with errors that name the record it failed on; its text may be personal and is not shown."""

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
            raise ValueError(f"the hook gave a {wrong} for field {name!r}: return a text, or None to drop a record")
        if any(old.strip() and not str(new).strip() for old, new in zip(texts, clean, strict=True)):
            return "nothing left of a text"
        if isinstance(value, str):
            changes[name] = clean[0]
        elif name == "prompt":
            changes[name] = tuple(structs.replace(m, content=c) for m, c in zip(value, clean, strict=True))
        else:
            changes[name] = tuple(clean)
    return structs.replace(record, **changes)


_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_IPV4 = re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}(?![\w:])")
_CARD = re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w]|-\d)")
_PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    # +49 170 1234567; nothing inside a group is tried twice, or forty digits could be cut in 46,000 ways
    r"\+\d{1,3}+\)?(?:[ .-]?+\(?+\d{1,5}+\)?){1,6}"
    r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}"  # (555) 123-4567
    r"|0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,5}"  # 0170 1234567
    r")(?![\w]|[.-]\d)"
)


def mask_identifiers(text: str) -> str:
    """Replaces e-mail addresses, phone, card and IP numbers by [EMAIL], [PHONE], [CARD] and [IP].

    A start, and not enough: names, addresses, dates of birth, account and passport numbers, anything spelt out in
    words and most foreign formats of phone numbers stay. For people's real prompts use a tool made for it as the hook.

    >>> mask_identifiers("Mail ann@example.org or call (555) 123-4567.")
    'Mail [EMAIL] or call [PHONE].'
    """
    text = _EMAIL.sub("[EMAIL]", text)
    text = _IPV6.sub("[IP]", _IPV4.sub("[IP]", text))
    text = _CARD.sub(lambda found: "[CARD]" if _luhn(found[0]) else found[0], text)
    return _PHONE.sub(lambda found: "[PHONE]" if sum(map(str.isdigit, found[0])) >= 8 else found[0], text)


def _luhn(number: str) -> bool:
    """Whether the digits pass the check sum of card numbers (every second one from the right counts double)."""
    digits = [int(d) for d in number if d.isdigit()][::-1]
    return (sum(digits[0::2]) + sum(sum(divmod(2 * d, 10)) for d in digits[1::2])) % 10 == 0


# -------------------------------------------------------------------------------------------------------- languages


def language_share(texts: Iterable[str], identify: Callable[[str], str] | None = None) -> dict[str, float]:
    """Share of the texts in each language, the most frequent first; equal ones by name.

    Args:
      texts: prompts, for example.
      identify: gives a text's language as a code; None = py3langid.

    Raises:
      ValueError: py3langid is wanted and not installed.

    Source: Ouyang et al. 2022, section 3.3 and appendix A.4 (langid.py says 96% English).

    >>> language_share(["a", "b", "c"], lambda text: "en" if text < "c" else "de")
    {'en': 0.6666666666666666, 'de': 0.3333333333333333}
    """
    identify = identify or default_identifier()
    counts = collections.Counter(map(identify, texts))
    return {name: n / counts.total() for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}


def default_identifier() -> Callable[[str], str]:
    """py3langid's language of a text.

    Raises:
      ValueError: it is not installed; the message names the extra.
    """
    try:
        import py3langid
    except ImportError:
        raise ValueError(
            "languages are told apart by py3langid, which is not installed: pip install 'rlhf_jax[languages]'"
        ) from None
    return lambda text: py3langid.classify(text)[0]


# --------------------------------------------------------------------------------------------------------- few-shot

FEW_SHOT = "{query}\n{response}"
"""How a query and its response are written below an instruction."""


def few_shot_examples(
    instruction: str, pairs: Sequence[tuple[str, str]], *, template: str = FEW_SHOT, **labels: str | None
) -> list[Demonstration]:
    r"""K query/response pairs of one instruction as K demonstrations, each with the other K - 1 pairs before it.

    Args:
      instruction: what the labeler asks for.
      pairs: the K queries and responses, at least one.
      template: how a pair is written; it ends in ``{response}``.
      **labels: further fields of the records (`source`, `use_case`, `labeler`, `user`, ...); with `id` the k-th record
        is named ``<id>/<k>``.

    Source: Ouyang et al. 2022, appendix A.1.

    >>> few_shot_examples("Say the opposite.", [("up", "down"), ("hot", "cold")])[1].prompt
    'Say the opposite.\n\nup\ndown\n\nhot'
    """
    order = range(len(pairs))
    chosen = [(target, [k for k in order if k != target]) for target in order]
    return _few_shot(instruction, pairs, chosen, template, labels)


def few_shot_subsets(
    instruction: str, pairs: Sequence[tuple[str, str]], *, count: int, shots: int, seed: int = 0,
    template: str = FEW_SHOT, **labels: str | None,
) -> list[Demonstration]:  # fmt: skip
    """`count` different demonstrations of one instruction: a query after a random subset of `shots` other pairs.

    Args:
      instruction: what the labeler asks for.
      pairs: the K queries and responses.
      count: how many; at most K times the number of subsets, so that none comes twice.
      shots: pairs in the context, 0 to K - 1, in the order of `pairs`.
      seed: of the choice.
      template: how a pair is written; it ends in ``{response}``.
      **labels: as in `few_shot_examples`.

    Source: Ouyang et al. 2022, appendix A.3 (further examples from different subsets; how many is not given).
    """
    k = len(pairs)
    possible = k * math.comb(k - 1, shots) if 0 <= shots < k else 0
    if not 0 <= count <= possible:
        raise ValueError(
            f"count={count} with shots={shots}: {k} pairs give {possible} different examples; lower count or shots"
        )
    noise, chosen = random.Random(seed), dict[tuple[int, ...], None]()
    if 2 * count > possible:  # few are left over: draw from the list of all
        every = [(t, *s) for t in range(k) for s in itertools.combinations([j for j in range(k) if j != t], shots)]
        chosen.update(dict.fromkeys(noise.sample(every, count)))
    while len(chosen) < count:
        target = noise.randrange(k)
        chosen[target, *sorted(noise.sample([j for j in range(k) if j != target], shots))] = None
    return _few_shot(instruction, pairs, [(target, list(rest)) for target, *rest in chosen], template, labels)


def _few_shot(
    instruction: str, pairs: Sequence[tuple[str, str]], chosen: Sequence[tuple[int, list[int]]], template: str,
    labels: Mapping[str, str | None],
) -> list[Demonstration]:  # fmt: skip
    head, marker, tail = template.partition("{response}")
    if not marker or tail.strip() or "{query}" not in head:
        raise ValueError(f"template={template!r} must hold {{query}} and end in {{response}}")
    if not pairs:
        raise ValueError("pairs is empty: give at least one query and its response")
    name = labels.get("id")
    examples = []
    for place, (target, context) in enumerate(chosen):
        shown = [head.replace("{query}", pairs[j][0]) + pairs[j][1] for j in context]
        asked = head.replace("{query}", pairs[target][0]).rstrip()
        fields = {**labels, "id": None if name is None else f"{name}/{place}"}
        examples.append(Demonstration("\n\n".join([instruction, *shown, asked]), pairs[target][1], **fields))
    return examples


# ----------------------------------------------------------------------------------------------------------- tables

KINDS = {Demonstration: "demonstrations", Ranking: "rankings", Prompt: "prompts", PlainText: "documents"}
MOST_ROWS = 14
"""Sources, use cases and languages in a table at most; the rest is summed up."""
LANGUAGE_SAMPLE = 2_000
"""Prompts whose language is looked at for a table (evenly spaced): py3langid takes a millisecond or two for each."""


def data_tables(
    splits: Mapping[str, Sequence[Any]],
    *,
    tokens: Callable[[str], int] | None = None,
    identify: Callable[[str], str] | None = None,
) -> str:
    """Tables that describe a data set as the paper's appendix A describes its own; no line is longer than 120.

    Sizes by kind, source and split (the paper's table 6), use cases (table 1), prompts a user (table 8), lengths of
    prompts by kind and split, use case and source (tables 9 and 10), lengths of demonstrations (table 11), how many
    responses are ranked, labelers, languages. What no record says is one line instead of a table.

    Args:
      splits: the records of each split, of any kinds.
      tokens: length of a text in tokens; None = counted in words.
      identify: language of a text, for `language_share`; None leaves that table out.

    Source: Ouyang et al. 2022, tables 1, 6 and 8 to 11.
    """
    unit = "words" if tokens is None else "tokens"
    count = functools.cache(tokens or (lambda text: len(text.split())))
    records = [record for part in splits.values() for record in part]
    prompted = [record for record in records if not isinstance(record, PlainText)]
    blocks = [
        _sizes(splits),
        _use_cases(prompted),
        *(_per_group(splits, key) for key in ("user", "organization")),
        _lengths(f"Prompts: {unit} by kind and split", _by_split(splits), lambda r: count(prompt_text(r))),
        *_lengths_by(prompted, f"Prompts: {unit}", lambda r: count(prompt_text(r))),
        *_lengths_by(_of_kind(records, Demonstration), f"Demonstrations: {unit}", lambda r: count(r.response)),
        _ranked(_of_kind(records, Ranking)),
        _labelers(prompted),
        _languages(prompted, identify),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _of_kind(records: Iterable[Any], kind: type) -> list[Any]:
    return [record for record in records if isinstance(record, kind)]


def _by(records: Iterable[Any], name: Callable[[Any], str]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for record in records:
        groups.setdefault(name(record), []).append(record)
    return groups


def _by_split(splits: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Records by kind and split, in the order of the kinds; documents have no prompts."""
    return {
        f"{word}, {name}": _of_kind(part, kind)
        for kind, word in KINDS.items()
        if kind is not PlainText
        for name, part in splits.items()
        if _of_kind(part, kind)
    }


def _most(groups: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The largest groups, largest first, and the others as one."""
    order = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    shown = dict(order[:MOST_ROWS])
    if len(order) > MOST_ROWS:
        rest = order[MOST_ROWS:]
        shown[f"({len(rest)} others)"] = [record for _, group in rest for record in group]
    return shown


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns as wide as their widest cell; the first is cut where the whole would be wider than `WIDTH`."""
    cells = [list(map(str, row)) for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    widths[0] = min(widths[0], max(8, WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = []
    for row in cells:
        first = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 2] + ".."
        numbers = "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append((first.ljust(widths[0]) + numbers)[:WIDTH].rstrip())
    return "\n".join([title[:WIDTH], *lines])


def _sizes(splits: Mapping[str, Sequence[Any]]) -> str:
    rows = []
    for kind, word in KINDS.items():
        of_kind = {name: _of_kind(part, kind) for name, part in splits.items()}
        everything = [record for part in of_kind.values() for record in part]
        if not everything:
            continue
        sources = _most(_by(everything, lambda r: r.source or "(no source)"))
        for source, group in sources.items() if len(sources) > 1 else ():
            members = {id(record) for record in group}
            counts = [sum(id(record) in members for record in part) for part in of_kind.values()]
            rows.append([f"{word}, {source}", *counts, len(group)])
        label = word if len(sources) > 1 else f"{word}, {next(iter(sources))}"
        rows.append([label, *map(len, of_kind.values()), len(everything)])
    return _table("Sizes: records by kind, source and split", ["", *splits, "all"], rows)


def _use_cases(records: Sequence[Any]) -> str:
    if not any(record.use_case for record in records):
        return "Use cases: no record names one"
    kinds = {word: _of_kind(records, kind) for kind, word in KINDS.items() if _of_kind(records, kind)}
    rows = []
    for use_case, group in _most(_by(records, lambda r: r.use_case or "(none)")).items():
        members = set(map(id, group))
        shares = [sum(id(r) in members for r in part) / len(part) for part in kinds.values()]
        rows.append([use_case, *(f"{share:.1%}" for share in shares), len(group)])
    return _table("Use cases: share of each kind", ["", *kinds, "records"], rows)


def _per_group(splits: Mapping[str, Sequence[Any]], key: str) -> str:
    rows = []
    for name, part in _by_split(splits).items():
        counts = collections.Counter(_group(record, key) for record in part)
        unnamed = counts.pop(None, 0)
        if counts:
            numbers = sorted(counts.values())
            mean = f"{statistics.mean(numbers):.2f}"
            rows.append([name, len(numbers), mean, f"{statistics.median(numbers):g}", numbers[-1], unnamed])
    if not rows:
        return f"Records per {key}: no record names one"
    return _table(f"Records per {key}", ["", f"{key}s", "mean", "median", "most", f"without {key}"], rows)


def _lengths(title: str, groups: Mapping[str, Sequence[Any]], length: Callable[[Any], int]) -> str:
    header = ["", "n", "mean", "std", "min", "25%", "50%", "75%", "max"]
    return _table(title, header, [[name, *_quantiles(list(map(length, g)))] for name, g in groups.items() if g])


def _lengths_by(records: Sequence[Any], what: str, length: Callable[[Any], int]) -> list[str]:
    """Two tables, by source and by use case; neither where there are no records, or nothing to tell them apart."""
    tables = []
    for field, word in (("source", "source"), ("use_case", "use case")):
        groups = _most(_by(records, lambda r, field=field: getattr(r, field) or f"(no {field.replace('_', ' ')})"))
        if len(groups) > 1 or (records and field == "source"):
            tables.append(_lengths(f"{what} by {word}", groups, length))
    return tables


def _quantiles(lengths: list[int]) -> list[Any]:
    """Number, mean, standard deviation of the sample, least, quartiles (linear between neighbours), most."""
    order = sorted(lengths)

    def at(share: float) -> float:
        low, part = divmod(share * (len(order) - 1), 1)
        high = min(int(low) + 1, len(order) - 1)
        return order[int(low)] + part * (order[high] - order[int(low)])

    spread = statistics.stdev(order) if len(order) > 1 else 0.0
    middle = [f"{at(share):.0f}" for share in (0.25, 0.5, 0.75)]
    return [len(order), f"{statistics.mean(order):.0f}", f"{spread:.0f}", order[0], *middle, order[-1]]


def _ranked(rankings: Sequence[Ranking]) -> str:
    if not rankings:
        return ""
    rows = []
    sizes = _by(rankings, lambda r: str(sum(rank != ABSENT for rank in r.ranks)))
    for k, group in sorted(sizes.items(), key=lambda item: int(item[0])):
        pairs = sum(strict_pairs(r.ranks) for r in group)
        tied = len(group) * math.comb(int(k), 2) - pairs
        rows.append([f"K = {k}", len(group), f"{len(group) / len(rankings):.1%}", pairs, tied])
    rows.append(["all", len(rankings), "100.0%", sum(row[3] for row in rows), sum(row[4] for row in rows)])
    return _table("Rankings: responses ranked, and their pairs", ["", "prompts", "share", "pairs", "tied"], rows)


def _labelers(records: Sequence[Any]) -> str:
    rows = []
    for kind in (Demonstration, Ranking):
        counts = collections.Counter(record.labeler for record in _of_kind(records, kind))
        unnamed = counts.pop(None, 0)
        if counts:
            numbers = sorted(counts.values())
            middle = f"{statistics.median(numbers):g}"
            rows.append([KINDS[kind], len(numbers), numbers[0], middle, numbers[-1], unnamed])
    if not rows:
        return "Labelers: no record names one" if any(hasattr(record, "labeler") for record in records) else ""
    return _table("Labelers, and records of each", ["", "labelers", "least", "median", "most", "unnamed"], rows)


def _languages(records: Sequence[Any], identify: Callable[[str], str] | None) -> str:
    if identify is None or not records:
        return ""
    chosen = records[:: math.ceil(len(records) / LANGUAGE_SAMPLE)]
    shares = language_share((prompt_text(record) for record in chosen), identify)
    shown = list(shares.items())[:MOST_ROWS]
    rows = [[name, f"{share:.1%}"] for name, share in shown]
    rest = len(shares) - len(shown)
    rows += [[f"({rest} others)", f"{sum(list(shares.values())[MOST_ROWS:]):.1%}"]] if rest else []
    return _table(f"Languages of {len(chosen)} of the {len(records)} prompts", ["", "share"], rows)
