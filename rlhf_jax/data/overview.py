"""One look at a data set before it is trained on: the numbers that show what a model would learn by mistake.

A reward model learns whatever tells the preferred answer from the other: often its length, sometimes a space at its
end. A fine-tuned model learns to repeat the question where the answers repeat it. `look` counts such things in linear
time, `summary` writes them as one table with a sentence for each number that is suspicious, and `headline` as one line.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlhf_jax.data import near_duplicates, templated
from rlhf_jax.data.curation import KINDS, normalise
from rlhf_jax.data.schema import ABSENT, Demonstration, PlainText, Prompt, Ranking

WIDTH = 100
"""Columns of the table at most."""
LINES = 24
"""Lines of the table at most, with the sentences below it."""

TOKEN_SAMPLE = 1_000
"""Rankings whose answers are counted in tokens (evenly spaced): a tokenizer takes some milliseconds for each."""
SHORT = 3
"""Characters of an answer that counts as very short, at most."""
REPEATED = 12
"""Characters that a prompt needs before an answer that holds it is said to repeat it; "Hi" is in many answers."""
FEW = 20
"""Fewer pairs or answers than this say nothing about the rest, and no sentence is written about their shares."""


# ------------------------------------------------------------------------------------------------------------ numbers


@dataclasses.dataclass(frozen=True)
class Spread:
    """Least, median, 90th percentile and largest of some numbers; all 0 where there are none."""

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
        at = lambda share: order[min(int(share * len(order)), len(order) - 1)]  # noqa: E731
        return cls(order[0], at(0.5), at(0.9), order[-1])

    def __str__(self) -> str:
        return " / ".join(_short_number(n) for n in (self.least, self.median, self.high, self.most))


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What the prompts of records are like.

    Attributes:
      rows: prompts.
      different: prompts that differ in more than case and spaces.
      near: of the different ones, those that nearly repeat an earlier one (`near_duplicates`).
      characters: their lengths, all turns together.
      turns: numbers of turns; a text is one.
      system: prompts with a system message.
    """

    rows: int
    different: int
    near: int
    characters: Spread
    turns: Spread
    system: int


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the answers of demonstrations, or the ranked answers of rankings, are like.

    Attributes:
      count: answers.
      empty: answers that are empty or only spaces.
      short: answers of 1 to `SHORT` characters.
      characters: their lengths.
      begin: answers that begin with the whole prompt, of those whose prompt has `REPEATED` characters.
      contain: answers that hold the whole prompt anywhere.
      echo: answers that hold the user's last turn, of prompts that are conversations.
      leading: answers that begin with a space or a line break.
      trailing: answers that end with one.
      commonest: how often the most frequent answer comes, and the answer.
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
class Pairs:
    """What the pairs of ranked answers are like.

    Attributes:
      strict: pairs of which one answer is preferred.
      tied: pairs of equal rank.
      longer: strict pairs whose preferred answer has more characters.
      shorter: strict pairs whose preferred answer has fewer.
      counted: strict pairs whose answers were counted in tokens.
      longer_tokens: of these, those whose preferred answer has more.
      equal: strict pairs of the same text: no model can tell them apart.
      rankings_with_equal: rankings that hold an answer twice.
      repeated: strict pairs that an earlier row has too, with the same prompt and preference.
      contradicted: strict pairs that an earlier row has the other way round.
      trailing: how many preferred and how many other answers of strict pairs end with a space or a line break.
      leading: how many of them begin with one.
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
    """The numbers of the records of one kind; what the kind does not have is None."""

    kind: str
    rows: int
    templated: int
    prompts: Prompts | None = None
    answers: Answers | None = None
    pairs: Pairs | None = None


def look(
    records: Iterable[Any], *, tokens: Callable[[str], int] | None = None, tokenizer: Any = None
) -> dict[str, Look]:
    """The numbers of records of any kinds, by kind ("demonstrations", "rankings", "prompts", "documents").

    Args:
      records: of `rlhf_jax.data.schema`.
      tokens: length of a text in tokens; None counts characters alone.
      tokenizer: whose special tokens count as templated text too (see `templated`).
    """
    by_kind: dict[type, list[Any]] = {kind: [] for kind in KINDS}
    for record in records:
        by_kind[type(record)].append(record)
    return {KINDS[kind]: _look(kind, rows, tokens, tokenizer) for kind, rows in by_kind.items() if rows}


def _look(kind: type, rows: list[Any], tokens: Callable[[str], int] | None, tokenizer: Any) -> Look:
    known: dict[str, str] = {}  # each text is normalised once
    numbers: dict[str, Any] = {
        "prompts": None if kind is PlainText else prompt_numbers(rows, known=known),
        "answers": answer_numbers(rows, known=known) if kind in (Demonstration, Ranking) else None,
        "pairs": pair_numbers(rows, tokens, known=known) if kind is Ranking else None,
    }
    return Look(KINDS[kind], len(rows), len(templated.templated_rows(rows, tokenizer)), **numbers)


def _plain(text: str, known: dict[str, str] | None) -> str:
    """`normalise`, remembered in `known`."""
    if known is None:
        return normalise(text)
    if text not in known:
        known[text] = normalise(text)
    return known[text]


def prompt_numbers(
    records: Sequence[Demonstration | Ranking | Prompt], *, known: dict[str, str] | None = None
) -> Prompts:
    """What the prompts of records are like; `known` keeps normalised texts between such calls."""
    different = list(dict.fromkeys(_key(record.prompt, known) for record in records))
    return Prompts(
        rows=len(records),
        different=len(different),
        near=sum(near_duplicates.repeats(different)),
        characters=Spread.of(sum(map(len, _turns(record.prompt))) for record in records),
        turns=Spread.of(len(_turns(record.prompt)) - _has_system(record.prompt) for record in records),
        system=sum(_has_system(record.prompt) for record in records),
    )


def answer_numbers(records: Sequence[Demonstration | Ranking], *, known: dict[str, str] | None = None) -> Answers:
    """What the answers of records are like; answers that nobody ranked do not count. `known` as above."""
    count: collections.Counter[str] = collections.Counter()
    lengths: list[int] = []
    said: collections.Counter[str] = collections.Counter()
    for record in records:
        turns = _turns(record.prompt)
        whole = " ".join(_plain(turn, known) for turn in turns)
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
    kept = {name: count[name] for name in ("empty", "short", "begin", "contain", "echo", "leading", "trailing")}
    return Answers(len(lengths), characters=Spread.of(lengths), commonest=(times, text), **kept)


def pair_numbers(
    records: Sequence[Ranking], tokens: Callable[[str], int] | None = None, *, known: dict[str, str] | None = None
) -> Pairs:
    """What the pairs of ranked answers are like.

    Args:
      records: rankings.
      tokens: length of a text in tokens, for at most `TOKEN_SAMPLE` of the records; None counts characters alone.
      known: as above.
    """
    count: collections.Counter[str] = collections.Counter()
    seen: set[int] = set()
    every = math.ceil(len(records) / TOKEN_SAMPLE) or 1
    for place, record in enumerate(records):
        prompt = hash(_key(record.prompt, known))
        texts = [_plain(text, known) for text in record.responses]
        in_tokens = tokens is not None and place % every == 0
        sizes = [tokens(text) for text in record.responses] if tokens is not None and in_tokens else []
        ranked = [k for k, rank in enumerate(record.ranks) if rank != ABSENT]
        count["rankings_with_equal"] += len({texts[k] for k in ranked}) < len(ranked)
        for a, b in itertools.combinations(ranked, 2):
            if record.ranks[a] == record.ranks[b]:
                count["tied"] += 1
                continue
            best, other = (a, b) if record.ranks[a] < record.ranks[b] else (b, a)
            _count_pair(count, record.responses[best], record.responses[other])
            count["equal"] += texts[best] == texts[other]
            if in_tokens:
                count["counted"] += 1
                count["longer_tokens"] += sizes[best] > sizes[other]
            key, reverse = (hash((prompt, texts[i], texts[j])) for i, j in ((best, other), (other, best)))
            count["repeated"] += key in seen
            count["contradicted"] += reverse in seen and key != reverse
            seen.add(key)
    ends: dict[str, Any] = {name: (count[f"{name} best"], count[f"{name} other"]) for name in ("trailing", "leading")}
    names = [field.name for field in dataclasses.fields(Pairs) if field.name not in ends]
    return Pairs(**{name: count[name] for name in names}, **ends)


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
    """A prompt without the differences of case and spaces; turns keep their order."""
    return "\n".join(_plain(turn, known) for turn in _turns(prompt))


def _answers(record: Demonstration | Ranking) -> list[str]:
    if isinstance(record, Demonstration):
        return [record.response]
    return [text for text, rank in zip(record.responses, record.ranks, strict=True) if rank != ABSENT]


# --------------------------------------------------------------------------------------------------------- judgements

# Names of columns that are usually part of what the model should read.
_OFTEN_NEEDED = {
    "system", "system_prompt", "instruction", "instructions", "input", "context", "history", "question", "query",
    "prompt", "messages", "conversation", "conversations", "tools", "functions", "images", "image", "audio",
    "reasoning", "reasoning_content", "thinking", "chosen", "rejected", "response", "output", "answer", "completion",
}  # fmt: skip


def judgements(looks: Mapping[str, Look], aside: Mapping[str, int] | None = None) -> list[str]:
    """A sentence for each number that is suspicious, the gravest first: what it is, what it does, what to do."""
    found: list[tuple[int, str]] = []
    for name, seen in looks.items():
        if seen.templated:
            found.append((0, f"{seen.templated:,} of {seen.rows:,} {name} hold control tokens of a chat template as "
                             "text: give messages, or strip them"))  # fmt: skip
        found += [(1, text) for text in (_about_pairs(seen.pairs) if seen.pairs else [])]
        found += [(2, text) for text in (_about_answers(name, seen.answers) if seen.answers else [])]
        found += [(3, text) for text in (_about_prompts(name, seen.prompts) if seen.prompts else [])]
    for column, rows in (aside or {}).items():
        if column.lower() in _OFTEN_NEEDED:
            found.append((1, f"column {column!r} of {rows:,} rows is left aside: if the model should read it, map it "
                             "with --columns"))  # fmt: skip
    return [text for _, text in sorted(found, key=lambda item: item[0])]


def _about_pairs(pairs: Pairs) -> list[str]:
    found = []
    differ = pairs.longer + pairs.shorter
    if differ >= FEW and pairs.longer >= 0.7 * differ:
        found.append(f"the preferred answer is the longer one in {_share(pairs.longer, differ)} of pairs: a reward "
                     "model will learn length; compare its accuracy with that share")  # fmt: skip
    if differ >= FEW and pairs.shorter >= 0.7 * differ:
        found.append(f"the preferred answer is the shorter one in {_share(pairs.shorter, differ)} of pairs: a reward "
                     "model will learn to like short answers")  # fmt: skip
    for name, where in (("trailing", "ends"), ("leading", "begins")):
        best, other = getattr(pairs, name)
        if pairs.strict >= FEW and abs(best - other) >= 0.1 * pairs.strict:
            shares = f"{_share(best, pairs.strict)} of pairs, the other in {_share(other, pairs.strict)}"
            found.append(f"the preferred answer {where} with a space in {shares}: a reward model will learn the "
                         "space; strip both")  # fmt: skip
    if pairs.equal >= max(1, 0.01 * pairs.strict):
        found.append(f"{pairs.equal:,} pairs prefer a text to itself: no model can learn them, and they lower the "
                     "accuracy that can be reached")  # fmt: skip
    if pairs.contradicted >= max(1, 0.01 * pairs.strict):
        found.append(f"{pairs.contradicted:,} pairs are preferred the other way round in another row")
    if pairs.strict and pairs.repeated >= max(FEW, 0.05 * pairs.strict):
        found.append(f"{pairs.repeated:,} pairs repeat those of another row: they count more than once")
    if pairs.tied >= FEW and pairs.tied > pairs.strict:
        found.append(f"{_share(pairs.tied, pairs.tied + pairs.strict)} of pairs tie: only the others teach anything")
    if not pairs.strict:
        found.append("no pair prefers one answer to another: a reward model cannot be trained on these rankings")
    return found


def _about_answers(name: str, answers: Answers) -> list[str]:
    found, count = [], answers.count
    if answers.empty:
        found.append(f"{answers.empty:,} answers of {name} are empty")
    if answers.begin >= max(2, 0.02 * count):
        found.append(f"{_share(answers.begin, count)} of the answers of {name} begin with their prompt: a model will "
                     "learn to repeat the question; cut it off")  # fmt: skip
    elif answers.contain >= max(2, 0.1 * count):
        found.append(f"{_share(answers.contain, count)} of the answers of {name} hold their whole prompt")
    if answers.echo >= max(2, 0.1 * count):
        found.append(f"{_share(answers.echo, count)} of the answers of {name} repeat the user's last turn")
    if count >= FEW and 0.05 * count <= answers.leading <= 0.95 * count:
        found.append(f"{_share(answers.leading, count)} of the answers of {name} begin with a space and the others do "
                     "not: the same word is two tokens; strip them")  # fmt: skip
    times, text = answers.commonest
    if count >= FEW and text and len(text) > SHORT and times >= max(5, 0.05 * count):
        found.append(f"one answer is {_share(times, count)} of those of {name}: {_quoted(text)}")
    return found


def _about_prompts(name: str, prompts: Prompts) -> list[str]:
    found = []
    # Rankings and demonstrations of one prompt by several labelers are what they should be.
    if name == "prompts" and prompts.different < 0.95 * prompts.rows:
        found.append(f"{prompts.rows - prompts.different:,} of {prompts.rows:,} prompts are repeats of another")
    if prompts.different >= FEW and prompts.near >= 0.1 * prompts.different:
        found.append(f"{_share(prompts.near, prompts.different)} of the different prompts of {name} nearly repeat "
                     "another: they may stand in training and test, and one template may rule the rest")  # fmt: skip
    return found


# -------------------------------------------------------------------------------------------------------------- table


def summary(
    records: Iterable[Any] | Mapping[str, Look],
    *,
    aside: Mapping[str, int] | None = None,
    tokens: Callable[[str], int] | None = None,
    tokenizer: Any = None,
) -> str:
    """The numbers as a table of at most `LINES` lines of `WIDTH` columns, a column for each kind of record.

    Args:
      records: of any kinds, or what `look` gave.
      aside: columns of the source that no record holds, and how many rows have them.
      tokens: as for `look`.
      tokenizer: as for `look`.
    """
    looks = dict(records) if isinstance(records, Mapping) else look(records, tokens=tokens, tokenizer=tokenizer)
    table = _table([["One look", *looks], *_rows(list(looks.values()))])
    if aside:
        names = [f"{name} ({rows:,})" for name, rows in sorted(aside.items(), key=lambda item: -item[1])]
        table.append(_cut("columns left aside: " + ", ".join(names)))
    lines = [line for text in judgements(looks, aside) for line in _wrapped(text)]
    if len(table) + 1 + len(lines) > LINES:  # the headline counts all of them
        lines = [*lines[: LINES - len(table) - 2], "  .."]
    return "\n".join([*table, *(["Look at:", *lines] if lines else ["Nothing suspicious."])])


def headline(
    records: Iterable[Any] | Mapping[str, Look],
    *,
    aside: Mapping[str, int] | None = None,
    where: str = "data_report.txt",
) -> str:
    """One line of at most `WIDTH` columns: how many records of each kind, and whether anything is suspicious.

    Args:
      records: of any kinds, or what `look` gave.
      aside: as for `summary`.
      where: the file that holds the whole.

    >>> headline([Prompt("Why is the sky blue?"), Prompt("Name a bird.")])
    '2 prompts; nothing suspicious (data_report.txt)'
    """
    looks = dict(records) if isinstance(records, Mapping) else look(records)
    sizes = ", ".join(f"{seen.rows:,} {name}" for name, seen in looks.items())
    found = judgements(looks, aside)
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    end = f"{more} ({where})"
    if not found:
        return _cut(f"{sizes or 'no records'}; nothing suspicious ({where})")
    first = f"{sizes}; look at: {found[0].partition(':')[0]}"
    return _cut(first, WIDTH - len(end)) + end


def _rows(looks: Sequence[Look]) -> list[list[str]]:
    """The rows of the table; one that no kind has is left out."""

    def row(label: str, part: str, cell: Callable[[Any], str]) -> list[str]:
        parts = [getattr(seen, part) for seen in looks]
        return [label, *("" if p is None else cell(p) for p in parts)]

    rows = [
        ["records", *(f"{seen.rows:,}" for seen in looks)],
        row("different prompts", "prompts", lambda p: f"{p.different:,}"),
        row("nearly repeat another", "prompts", lambda p: f"{p.near:,}"),
        row("characters of a prompt *", "prompts", lambda p: str(p.characters)),
        row("turns of a prompt *", "prompts", lambda p: str(p.turns)),
        row("with a system message", "prompts", lambda p: _share(p.system, p.rows)),
        row("characters of an answer *", "answers", lambda a: str(a.characters)),
        row(f"empty, up to {SHORT} characters", "answers", lambda a: f"{a.empty:,}, {a.short:,}"),
        row("begin with, hold the prompt", "answers", lambda a: f"{_share(a.begin, a.count)}, "
                                                                f"{_share(a.contain, a.count)}"),
        row("repeat the last turn", "answers", lambda a: _share(a.echo, a.count)),
        row("pairs, ties", "pairs", lambda p: f"{p.strict:,}, {_share(p.tied, p.strict + p.tied)}"),
        row("preferred is longer", "pairs", _longer),
        row("pairs of equal answers", "pairs", lambda p: f"{p.equal:,}"),
        row("rankings with equal answers", "pairs", lambda p: f"{p.rankings_with_equal:,}"),
        row("pairs repeated, contradicted", "pairs", lambda p: f"{p.repeated:,}, {p.contradicted:,}"),
        ["written by a chat template", *(f"{seen.templated:,}" for seen in looks)],
    ]  # fmt: skip
    rows = [cells for cells in rows if any(cells[1:])]
    return [*rows, ["* least / median / 90% / most"]]


def _longer(pairs: Pairs) -> str:
    said = _share(pairs.longer, pairs.strict)
    return f"{said} (tokens {_share(pairs.longer_tokens, pairs.counted)})" if pairs.counted else said


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    widths[0] = max(len(row[0]) for row in rows[:-1])
    lines = []
    for row in rows:
        cells = "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=False))
        lines.append(_cut((row[0].ljust(widths[0]) + cells).rstrip()))
    return lines


def _wrapped(text: str) -> list[str]:
    """A sentence as lines with a mark before it."""
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) + 5 > WIDTH:
            lines.append("")
        lines[-1] += f" {word}"
    return [("  -" if i == 0 else "   ") + line for i, line in enumerate(lines)]


def _cut(line: str, width: int = WIDTH) -> str:
    return line if len(line) <= width else line[: width - 2] + ".."


def _share(part: int, whole: int) -> str:
    """A share in per cent; what is not none never reads 0%, and what is not all never 100%."""
    if not whole or not part:
        return "0%"
    share = 100 * part / whole
    digits = 0 if 10 <= share <= 99 or part == whole else 1
    return f"{min(max(share, 0.1), 100 if part == whole else 99.9):.{digits}f}%"


def _short_number(n: int) -> str:
    """A number of at most five characters."""
    if n < 10_000:
        return f"{n}"
    return f"{n / 1e3:.0f}k" if n < 1_000_000 else f"{n / 1e6:.1f}M"


def _quoted(text: str) -> str:
    shown = text if len(text) <= 40 else text[:37] + "..."
    return repr(shown)
