"""Counts, in linear time, the artefacts of a data set that a model would learn by mistake."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rlhf_jax.data import near_duplicates, templated
from rlhf_jax.data.curation import KINDS, normalise
from rlhf_jax.data.schema import ABSENT, Demonstration, PlainText, Prompt, Ranking

TOKEN_SAMPLE = 1_000
"""Most rankings (evenly spaced) whose answers are tokenised, at some milliseconds for each."""


SHORT = 3
"""Most characters of an answer that counts as very short."""


REPEATED = 12
"""Characters from which a prompt counts as repeated by an answer that contains it; many answers
contain "Hi" by chance."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """Minimum, median, 90th percentile and maximum of some numbers; all 0 where there are none."""

    least: int = 0
    median: int = 0
    high: int = 0
    most: int = 0

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Spread:
        """The spread of `numbers`; each of the four is one of them."""
        order = sorted(numbers)
        if not order:
            return cls()
        # The nearest rank and no interpolation, so that each value is one that occurs.
        at = lambda share: order[min(int(share * len(order)), len(order) - 1)]
        return cls(order[0], at(0.5), at(0.9), order[-1])

    def __str__(self) -> str:
        return " / ".join(_short_number(n) for n in (self.least, self.median, self.high, self.most))


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Statistics of the prompts of records.

    Attributes:
      rows: number of prompts.
      different: number of distinct prompts, ignoring case and spaces.
      near: of the distinct ones, those that nearly repeat an earlier one (`near_duplicates`).
      characters: lengths in characters, all turns together.
      turns: numbers of turns, system messages aside; a text is one turn.
      system: number of prompts with a system message.
    """

    rows: int
    different: int
    near: int
    characters: Spread
    turns: Spread
    system: int


@dataclasses.dataclass(frozen=True)
class AnswerNumbers:
    """Statistics of the answers of demonstrations, or of the ranked answers of rankings.

    Attributes:
      count: number of answers.
      empty: answers that are empty or only spaces.
      short: answers of 1 to `SHORT` characters.
      characters: lengths in characters.
      begin: answers that begin with the whole prompt, where it has at least `REPEATED` characters.
      contain: answers that contain the whole prompt anywhere, likewise.
      echo: answers that contain the user's last turn, where the prompt is a conversation.
      leading: answers that begin with a space or a line break.
      trailing: answers that end with one.
      commonest: frequency of the most frequent answer, and that answer.
    """

    count: int
    empty: int
    short: int
    characters: Spread
    begin: int
    contain: int
    echo: int
    leading: int
    trailing: int
    commonest: tuple[int, str]


@dataclasses.dataclass(frozen=True)
class PairNumbers:
    """Statistics of the pairs of ranked answers.

    Attributes:
      strict: pairs with one preferred answer.
      tied: pairs of equal rank.
      longer: strict pairs in which the preferred answer has more characters.
      shorter: strict pairs in which the preferred answer has fewer characters.
      counted: strict pairs of which the answers were tokenised.
      longer_tokens: of these, pairs in which the preferred answer has more tokens.
      equal: strict pairs of the same text, which no model can tell apart.
      rankings_with_equal: rankings that have the same answer twice.
      repeated: strict pairs that an earlier row has too, with the same prompt and preference.
      contradicted: strict pairs that an earlier row has with the opposite preference.
      trailing: numbers of preferred and of other answers in strict pairs that end with a space or a
        line break.
      leading: numbers of those that begin with one.
    """

    strict: int
    tied: int
    longer: int
    shorter: int
    counted: int
    longer_tokens: int
    equal: int
    rankings_with_equal: int
    repeated: int
    contradicted: int
    trailing: tuple[int, int]
    leading: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Look:
    """The statistics of the records of one kind; None for what the kind does not have."""

    kind: str
    rows: int
    templated: int
    prompts: Prompts | None = None
    answers: AnswerNumbers | None = None
    pairs: PairNumbers | None = None


def look(
    records: Iterable[Any], *, tokens: Callable[[str], int] | None = None, tokenizer: Any = None
) -> dict[str, Look]:
    """The statistics of records of any kinds, by the name of the kind (`curation.KINDS`).

    Args:
      records: of `rlhf_jax.data.schema`.
      tokens: length of a text in tokens; None counts characters alone.
      tokenizer: its special tokens count as templated text too (see `templated`).
    """
    by_kind: dict[type, list[Any]] = {kind: [] for kind in KINDS}
    for record in records:
        by_kind[type(record)].append(record)
    return {
        KINDS[kind]: _look(kind, rows, tokens, tokenizer) for kind, rows in by_kind.items() if rows
    }


def _look(kind: type, rows: list[Any], tokens: Callable[[str], int] | None, tokenizer: Any) -> Look:
    known: dict[str, str] = {}  # three passes need the normalised texts, each computed once
    numbers: dict[str, Any] = {
        "prompts": None if kind is PlainText else prompt_numbers(rows, known=known),
        "answers": answer_numbers(rows, known=known) if kind in (Demonstration, Ranking) else None,
        "pairs": pair_numbers(rows, tokens, known=known) if kind is Ranking else None,
    }
    return Look(KINDS[kind], len(rows), len(templated.templated_rows(rows, tokenizer)), **numbers)


def _plain(text: str, known: dict[str, str] | None) -> str:
    """`normalise`, cached in `known`."""
    if known is None:
        return normalise(text)
    if text not in known:
        known[text] = normalise(text)
    return known[text]


def prompt_numbers(
    records: Sequence[Demonstration | Ranking | Prompt], *, known: dict[str, str] | None = None
) -> Prompts:
    """Statistics of the prompts of records; `known` caches normalised texts between calls."""
    # Without repeats first: equal prompts would all be near-duplicates of each other.
    different = list(dict.fromkeys(_key(record.prompt, known) for record in records))
    return Prompts(
        rows=len(records),
        different=len(different),
        near=sum(near_duplicates.repeats(different)),
        characters=Spread.of(sum(map(len, _turns(record.prompt))) for record in records),
        turns=Spread.of(
            len(_turns(record.prompt)) - _has_system(record.prompt) for record in records
        ),
        system=sum(_has_system(record.prompt) for record in records),
    )


def answer_numbers(
    records: Sequence[Demonstration | Ranking], *, known: dict[str, str] | None = None
) -> AnswerNumbers:
    """Statistics of the answers of records; answers that were not ranked do not count.

    Args:
      records: demonstrations or rankings.
      known: as for `prompt_numbers`.
    """
    count: collections.Counter[str] = collections.Counter()
    lengths: list[int] = []
    said: collections.Counter[str] = collections.Counter()
    for record in records:
        turns = _turns(record.prompt)
        whole = " ".join(_plain(turn, known) for turn in turns)
        # In a text the last turn is the whole prompt, which `begin` and `contain` count.
        last = _plain(turns[-1], known) if len(turns) > 1 else ""
        for answer in _answers(record):
            text = _plain(answer, known)
            said[text] += 1
            lengths.append(len(answer))
            count["empty"] += not text
            count["short"] += 0 < len(text) <= SHORT
            count["begin"] += len(whole) >= REPEATED and text.startswith(whole)
            count["contain"] += len(whole) >= REPEATED and whole in text
            count["echo"] += len(last) >= REPEATED and last in text
            count["leading"] += answer[:1].isspace()
            count["trailing"] += answer[-1:].isspace()
    text, times = said.most_common(1)[0] if said else ("", 0)
    kept = {
        name: count[name]
        for name in ("empty", "short", "begin", "contain", "echo", "leading", "trailing")
    }
    return AnswerNumbers(
        len(lengths), characters=Spread.of(lengths), commonest=(times, text), **kept
    )


def pair_numbers(
    records: Sequence[Ranking],
    tokens: Callable[[str], int] | None = None,
    *,
    known: dict[str, str] | None = None,
) -> PairNumbers:
    """Statistics of the pairs of ranked answers.

    Args:
      records: rankings.
      tokens: length of a text in tokens, for at most `TOKEN_SAMPLE` of the records; None counts
        characters alone.
      known: as above.
    """
    count: collections.Counter[str] = collections.Counter()
    seen: set[int] = set()
    # Evenly spaced over the file and the same on each run, unlike a random sample.
    every = math.ceil(len(records) / TOKEN_SAMPLE) or 1
    for place, record in enumerate(records):
        # Hashes instead of texts keep `seen` small: K responses make K(K - 1)/2 pairs.
        prompt = hash(_key(record.prompt, known))
        texts = [_plain(text, known) for text in record.responses]
        in_tokens = tokens is not None and place % every == 0
        sizes = (
            [tokens(text) for text in record.responses] if tokens is not None and in_tokens else []
        )
        # Responses without a rank are in no pair.
        ranked = [k for k, rank in enumerate(record.ranks) if rank != ABSENT]
        count["rankings_with_equal"] += len({texts[k] for k in ranked}) < len(ranked)
        for a, b in itertools.combinations(ranked, 2):
            if record.ranks[a] == record.ranks[b]:
                count["tied"] += 1
                continue
            # Rank 0 is the best, so the smaller rank is preferred.
            best, other = (a, b) if record.ranks[a] < record.ranks[b] else (b, a)
            _count_pair(count, record.responses[best], record.responses[other])
            count["equal"] += texts[best] == texts[other]
            if in_tokens:
                count["counted"] += 1
                count["longer_tokens"] += sizes[best] > sizes[other]
            key, reverse = (
                hash((prompt, texts[i], texts[j])) for i, j in ((best, other), (other, best))
            )
            count["repeated"] += key in seen
            # Two equal texts are their own reverse, and counted as `equal` above.
            count["contradicted"] += reverse in seen and key != reverse
            seen.add(key)
    ends: dict[str, Any] = {
        name: (count[f"{name} best"], count[f"{name} other"]) for name in ("trailing", "leading")
    }
    names = [field.name for field in dataclasses.fields(PairNumbers) if field.name not in ends]
    return PairNumbers(**{name: count[name] for name in names}, **ends)


def _count_pair(count: collections.Counter[str], best: str, other: str) -> None:
    count["strict"] += 1
    count["longer"] += len(best) > len(other)
    count["shorter"] += len(best) < len(other)
    for name, text in (("best", best), ("other", other)):
        count[f"trailing {name}"] += text[-1:].isspace()
        count[f"leading {name}"] += text[:1].isspace()


def _turns(prompt: Any) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]


def _has_system(prompt: Any) -> bool:
    return not isinstance(prompt, str) and prompt[0].role == "system"


def _key(prompt: Any, known: dict[str, str] | None) -> str:
    """A prompt without differences of case and spaces, its turns in order."""
    return "\n".join(_plain(turn, known) for turn in _turns(prompt))


def _answers(record: Demonstration | Ranking) -> list[str]:
    if isinstance(record, Demonstration):
        return [record.response]
    return [
        text for text, rank in zip(record.responses, record.ranks, strict=True) if rank != ABSENT
    ]


def _short_number(n: int) -> str:
    """A number of at most five characters."""
    if n < 10_000:
        return f"{n}"
    return f"{n / 1e3:.0f}k" if n < 1_000_000 else f"{n / 1e6:.1f}M"
