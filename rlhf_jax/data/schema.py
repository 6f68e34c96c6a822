"""The records people write and their JSON-lines form, checked strictly: a bad row is an error, never a guess.

One JSON object a line, UTF-8. Fields marked ? may be left out or null; a field that is not listed is an error.

| record | fields |
|---|---|
| `Demonstration` | `prompt` or `messages, response, id?, source?, use_case?, labeler?, user?, organization?, time?` |
| `Ranking` | `prompt` or `messages, responses` (K strings), |
|           | `ranks` (K integers from 1 = best, equal = tie, null = not ranked), |
|           | `id?, source?, use_case?, labeler?, labeler_group?, policies?` (K strings), |
|           | `temperatures?` (K numbers)`, user?, organization?, time?, revision?` (integer from 0) |
| `Prompt` | `prompt` or `messages, id?, source?, use_case?, user?, organization?, time?` |
| `PlainText` | `text, id?, source?` |

`messages` is a list of ``{"role": "system|user|assistant", "content": "..."}``: at most one system message, first, then
user and assistant in turn, the user last. A demonstration may leave `response` out and end with the assistant's turn.

In Python ranks start at 0 and -1 means not ranked, as in `rlhf_jax.types.RankingBatch`; this file is the only place
that converts. Only the order of ranks counts: 1, 3 says the same as 1, 2.

`RULES` is the one table of what happens to a bad row; docs/data.md prints it.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import datetime
import difflib
import functools
import gzip
import io
import itertools
import json
import math
import os
import re
import reprlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from rlhf_jax.data import parsed
from rlhf_jax.run.files import local_path, written

ABSENT = -1
"""The rank of a response that was not ranked."""

ROLES = ("system", "user", "assistant")
"""The roles of a `Message`."""

SCREEN = 24
"""Most lines of a data report."""

NESTING = 32
"""Most lists and objects in each other; a record needs three."""

LINE_LIMIT = 2**24
"""Most bytes of a line; a record of a hundred thousand words has a million."""

UNPACKED_LIMIT = 2**26
"""Bytes that any .gz file may unpack to; a larger one may grow `UNPACKED_RATIO` times."""

UNPACKED_RATIO = 200
"""Text packs 3 to 20 times smaller, one line repeated for ever 1,000 times: that is a file made to fill the memory."""

PLACES = 3
"""How many lines of a file a data report names for a reason."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


Conversation = str | tuple[Message, ...]
"""What a response answers: a text, or the turns before it."""


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A prompt and the answer a labeler wrote for it (supervised fine-tuning).

    `user` and `organization` submitted the prompt (splits are made by one of them); `time` is ISO 8601, as given.
    """

    prompt: Conversation
    response: str
    id: str | None = None
    source: str | None = None
    use_case: str | None = None
    labeler: str | None = None
    user: str | None = None
    organization: str | None = None
    time: str | None = None


@dataclasses.dataclass(frozen=True)
class Ranking:
    """K responses to one prompt, ranked by one labeler; `ranks` is 0 for the best, equal for ties, -1 when absent.

    `policies` and `temperatures` say which model wrote each response, and how it was sampled. Of two rankings of the
    same responses by the same labeler the higher `revision` holds.
    """

    prompt: Conversation
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    id: str | None = None
    source: str | None = None
    use_case: str | None = None
    labeler: str | None = None
    labeler_group: str | None = None
    policies: tuple[str, ...] | None = None
    temperatures: tuple[float, ...] | None = None
    user: str | None = None
    organization: str | None = None
    time: str | None = None
    revision: int | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt without an answer (PPO, evaluation)."""

    prompt: Conversation
    id: str | None = None
    source: str | None = None
    use_case: str | None = None
    user: str | None = None
    organization: str | None = None
    time: str | None = None


@dataclasses.dataclass(frozen=True)
class PlainText:
    """One document of running text (pretraining mix)."""

    text: str
    id: str | None = None
    source: str | None = None


Record = TypeVar("Record", Demonstration, Ranking, Prompt, PlainText)


# -------------------------------------------------------------------------------------------------------- rules


class Rule(NamedTuple):
    """What happens to a row, and what its owner can do about it.

    Attributes:
      outcome: "bad" rows are an error, or left out and counted up to `max_bad_fraction`; "dropped" rows are left out
        and counted; "kept" rows are records, counted as deserving a look.
      row: which rows.
      fix: what to do.
    """

    outcome: Literal["bad", "dropped", "kept"]
    row: str
    fix: str


RULES: Mapping[str, Rule] = {
    # any line
    "not UTF-8": Rule("bad", "bytes that are not UTF-8", "save the file as UTF-8; a byte order mark is fine"),
    "malformed JSON": Rule("bad", "a line that is not JSON", "write one JSON object a line"),
    "not an object": Rule("bad", "JSON, but a list, a text or a number", "write `{...}`"),
    "nested too deep": Rule("bad", f"over {NESTING} lists or objects in each other", "write one flat object a line"),
    "number too long": Rule("bad", "an integer of more than 4300 digits", "write it as a string, or remove it"),
    "not a number": Rule("bad", "`NaN`, `Infinity` or `-Infinity`", "use a finite number or null"),
    "duplicate key": Rule("bad", "a field given twice in one object", "keep one"),
    "unknown field": Rule("bad", "a field that the record or message does not have", "correct its name or remove it"),
    "missing field": Rule("bad", "a field that the record or message needs is absent or null", "fill it in"),
    "wrong type": Rule("bad", "a value of another JSON type than its field", "write the type that the error names"),
    "lone surrogate": Rule("bad", "half of a surrogate pair in a text: no character", "remove it"),
    "empty text": Rule("bad", "a `text` that is empty or only spaces", "remove the row"),
    "empty label": Rule("bad", "`id`, `source`, `labeler`, a policy or the like, empty", "fill it in or leave it out"),
    "bad time": Rule("bad", "a `time` that is not ISO 8601", "write it like `2022-01-27T09:30:00Z`"),
    "duplicate id": Rule("bad", "an `id` that an earlier row has", "make ids unique"),
    # prompts and responses
    "empty prompt": Rule("bad", "a `prompt` that is empty or only spaces, or no `messages`", "remove the row"),
    "empty response": Rule("bad", "a response that is empty or only spaces", "remove it, or `allow_empty_responses`"),
    "prompt and messages": Rule("bad", "both `prompt` and `messages` are given", "keep one"),
    "unknown role": Rule("bad", "a role that is not system, user or assistant", "rename it"),
    "empty message": Rule("bad", "a turn before the response, empty or only spaces", "fill it in or remove it"),
    "misplaced system message": Rule("bad", "a system message that is not the first message", "make one, the first"),
    "turns do not alternate": Rule("bad", "turns other than user, assistant, user, ..", "join or remove turns"),
    "last turn not the user's": Rule("bad", "a prompt whose last turn is not the user's", "remove what follows it"),
    # rankings
    "fewer than two responses": Rule("bad", "K < 2", "add a response to compare with, or remove the row"),
    "missing rank": Rule("bad", "fewer ranks than responses", "give each response a rank, or null"),
    "unknown rank": Rule(
        "bad", "a rank that is not an integer from 1 (best) to K or null, or that has no response", "rank from 1 to K"
    ),
    "fewer than two ranks": Rule("bad", "fewer than two ranks that are not null", "rank more, or remove the row"),
    "uneven list": Rule("bad", "`policies` or `temperatures` not of length K", "give one for each response"),
    "bad temperature": Rule("bad", "a temperature that is not a number from 0 to 1e6", "write the number used"),
    "bad revision": Rule("bad", "a `revision` that is not an integer from 0", "count revisions from 0"),
    "ranked twice": Rule(
        "bad", "the same labeler, prompt and responses as an earlier row, without differing revisions",
        "remove one, or number them with `revision`",
    ),
    "superseded by revision": Rule("dropped", "as above, of a lower `revision` than another row", "none needed"),
    # options
    "too long": Rule(
        "dropped", "longer than `limit`, when one is given; bad with `too_long=\"error\"`", "raise `limit`, or shorten"
    ),
    "response cut": Rule("kept", "longer than `limit` and cut to it by `too_long=\"truncate\"`", "raise `limit`"),
    "special token in text": Rule(
        "kept", "a text holds one of `special_tokens`; it will be encoded as ordinary text", "remove it if unwanted"
    ),
    "same response, different ranks": Rule(
        "kept", "equal responses, unequal ranks: the pair teaches nothing, the others do", "tie them, or remove one"
    ),
    "all responses tie": Rule("kept", "a ranking that prefers nothing: it holds no pair", "none needed"),
}  # fmt: skip
"""Every reason a row of a record file is counted under; nothing else happens to a row."""


class RowError(ValueError):
    """A row that breaks a rule. `reason` is the short name it is counted under."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


# ------------------------------------------------------------------------------------------------------- report


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What became of the rows of a source. ``dataclasses.asdict(report)`` is its JSON form.

    Attributes:
      source: where the rows came from.
      rows: rows read.
      kept: records returned; ``kept + sum(dropped.values()) == rows``.
      dropped: rows left out, by reason.
      noted: rows kept that deserve a look, by reason (for example rankings in which all responses tie).
      examples: the first error message of each reason, with its file:line.
      places: file:line of the first rows of each reason, at most `PLACES`.
      aside: columns of a table that no record has a field for, and in how many rows each held something.
    """

    source: str
    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    noted: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)
    places: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    aside: dict[str, int] = dataclasses.field(default_factory=dict)

    def __add__(self, other: DataReport) -> DataReport:
        reasons = {**self.places, **other.places}
        return DataReport(
            source=", ".join(dict.fromkeys([self.source, other.source])),
            rows=self.rows + other.rows,
            kept=self.kept + other.kept,
            dropped=_add_counts(self.dropped, other.dropped),
            noted=_add_counts(self.noted, other.noted),
            examples={**other.examples, **self.examples},
            places={r: [*self.places.get(r, []), *other.places.get(r, [])][:PLACES] for r in reasons},
            aside=_add_counts(self.aside, other.aside),
        )

    def summary(self) -> str:
        """The report as text of at most `SCREEN` lines: each reason with its count and first places.

        Below stand as many first error messages as the screen has room for; `examples` holds them all.

        >>> places = {"duplicate key": ["rows.jsonl:4", "rows.jsonl:9"]}
        >>> print(DataReport("rows.jsonl", rows=9, kept=7, dropped={"duplicate key": 2}, places=places).summary())
        rows.jsonl: 9 rows, 7 kept, 2 dropped
          dropped: duplicate key 2 (rows.jsonl:4, 9)
        """
        lines = [f"{self.source}: {self.rows} rows, {self.kept} kept, {sum(self.dropped.values())} dropped"]
        folders = {os.path.dirname(place) for places in self.places.values() for place in places}
        folder = os.path.join(folders.pop(), "") if len(folders) == 1 else ""  # the first line names it
        items = [
            f"{name}: {reason} {n}{_places([p.removeprefix(folder) for p in self.places.get(reason, [])], n)}"
            for name, counts in (("dropped", self.dropped), ("noted", self.noted))
            for reason, n in sorted(counts.items())
        ]
        if self.aside:
            items.append(f"columns left aside: {', '.join(f'{name} {n}' for name, n in sorted(self.aside.items()))}")
        in_a_line = -(-len(items) // (SCREEN - 1)) or 1
        lines += ["  " + "; ".join(items[i : i + in_a_line]) for i in range(0, len(items), in_a_line)]
        return "\n".join((lines + [f"  {example}" for example in self.examples.values()])[: max(SCREEN, len(lines))])


def _places(places: Sequence[str], count: int) -> str:
    """`` (a.jsonl:4, 9, b.jsonl:2, ..)``; the file is named where it changes."""
    named, before = [], None
    for file, _, line in (place.rpartition(":") for place in places):
        named.append(line if file == before else f"{file}:{line}")
        before = file
    return f" ({', '.join(named + ['..'] * (count > len(places)))})" if places else ""


def _add_counts(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {k: a.get(k, 0) + b.get(k, 0) for k in {**a, **b}}


class _Tally:
    """The report of one file while it is read."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = str(path)
        self.rows = 0
        self.dropped: dict[str, dict[int, str]] = {}  # reason -> line -> message
        self.noted: dict[str, list[int]] = {}

    def drop(self, line: int, error: RowError) -> None:
        self.dropped.setdefault(error.reason, {})[line] = str(error)

    def note(self, line: int, reason: str) -> None:
        self.noted.setdefault(reason, []).append(line)

    def report(self, kept: int) -> DataReport:
        # Sorted: a later revision drops an earlier line.
        lines = {r: sorted(found) for r, found in self.dropped.items()} | self.noted
        return DataReport(
            self.path,
            self.rows,
            kept,
            dropped={reason: len(found) for reason, found in self.dropped.items()},
            noted={reason: len(found) for reason, found in self.noted.items()},
            examples={r: f"{self.path}:{lines[r][0]}: {found[lines[r][0]]}" for r, found in self.dropped.items()},
            places={reason: [f"{self.path}:{n}" for n in found[:PLACES]] for reason, found in lines.items()},
        )


def strict_pairs(ranks: Sequence[int]) -> int:
    r"""Number of comparisons a ranking holds: pairs of ranked responses that do not tie.

    $\binom{K}{2}$ minus the tied pairs; responses of rank -1 take part in none.

    >>> strict_pairs([0, 1, 1, -1])
    2

    Source: Ouyang et al. 2022, section 3.5 (all pairs of a prompt are one batch element).
    """
    return sum(a != b and a != ABSENT and b != ABSENT for a, b in itertools.combinations(ranks, 2))


# ------------------------------------------------------------------------------------------------------ reading


def read_jsonl(
    path: str | os.PathLike[str],
    kind: type[Record],
    *,
    max_bad_fraction: float = 0.0,
    allow_empty_responses: bool = False,
    limit: int | None = None,
    length: Callable[[str], int] = len,
    too_long: Literal["drop", "error", "truncate"] = "drop",
    special_tokens: Sequence[str] | re.Pattern[str] = (),
) -> tuple[list[Record], DataReport]:
    """Read records of one kind from a JSON-lines file (gzip when the name ends in .gz).

    What happens to a row that breaks a rule is in `RULES`.

    Args:
      path: the file.
      kind: `Demonstration`, `Ranking`, `Prompt` or `PlainText`.
      max_bad_fraction: share of the rows that may be bad; these are left out and counted. 0 tolerates none.
      allow_empty_responses: accept "" as a response: a sampled answer may stop at once. A prompt is never empty.
      limit: the longest row: its prompt and its longest ranked response together, or its text. None = no limit.
      length: what `limit` counts in a text: characters, or tokens with ``lambda text: len(tokenizer.encode(text))``.
      too_long: what happens to a longer row. "drop" counts it and is no error. "error" makes it a bad row. "truncate"
        cuts responses and texts at their end, never prompts, and notes the row; where the prompt leaves
        no room, the row is dropped. A cut answer teaches a model to stop in mid-sentence, and no labeler saw it.
      special_tokens: rows whose texts hold one of these are noted, for example ``tokenizer.all_special_tokens``; or a
        pattern that finds them, such as `rlhf_jax.data.templated.pattern`.

    Returns:
      The records in file order, and the counts.

    Raises:
      ValueError: the file is missing, damaged or empty, or more rows are bad than allowed; the message names
        file:line, the field and the fix for the first row of each reason. For a file in another tool's form it is the
        command that converts it.
    """
    _check_options(max_bad_fraction, limit, too_long, special_tokens)
    _refuse_other_table(path)
    parse, tally, kept = _PARSERS[kind], _Tally(path), _Kept()
    _each_row(tally, lambda line, row: kept.add(line, parse(row, allow_empty_responses), tally))
    special = _special(special_tokens)
    records = []
    for line, record in kept.records.items():
        try:
            fitting = record if limit is None else _fit(record, limit, length, too_long)
        except RowError as error:
            tally.drop(line, error)
            continue
        records.append(fitting)
        for reason in _notes(fitting, special, cut=fitting is not record):
            tally.note(line, reason)
    report = tally.report(len(records))
    tolerated = {"superseded by revision"} if too_long == "error" else {"superseded by revision", "too long"}
    try:
        _refuse_bad(report, max_bad_fraction, tolerated)
    except ValueError:
        _refuse_foreign(path, kind)
        raise
    if not records:
        _refuse_foreign(path, kind)
        raise ValueError(f"{path} holds no {kind.__name__} to use: write one JSON object a line; {report.summary()}")
    return records, report


OTHER_TABLES = (".parquet", ".arrow", ".csv", ".tsv", ".feather")
"""Ends of the names of files that are no JSON."""


def _refuse_other_table(path: str | os.PathLike[str]) -> None:
    if str(path).removesuffix(".gz").lower().endswith(OTHER_TABLES) and Path(path).is_file():
        raise ValueError(
            f"{path} is no file of JSON lines: convert it with "
            f"python experiments/prepare_data.py --data={path} --out=DIR"
        )


def _refuse_foreign(path: str | os.PathLike[str], kind: type) -> None:
    """Raise the command that converts the file where it is in a form that another tool writes."""
    from rlhf_jax.data.sources import recognise  # it imports this module

    advice = recognise.advice(path, kind)
    if advice:
        raise ValueError(advice) from None


def json_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Each object of a file of JSON lines, or what is wrong with it, and the number of its line."""
    for line, data in _lines(path):
        try:
            yield line, _json_object(data)
        except RowError as error:
            yield line, error


def json_list(path: str | os.PathLike[str]) -> list[dict[str, Any] | RowError] | None:
    """The rows of a file that is one JSON list, or what is wrong with each; None where it is no list.

    Raises:
      ValueError: the list breaks off or is no JSON; the message names line and column.
    """
    data = read_bytes(path).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not data.startswith(b"["):
        return None
    try:
        rows = _ROW_BY_ROW.decode(data.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8") from None
    except RecursionError:
        raise ValueError(f"{path}: the JSON is nested too deep: write a flat object a row") from None
    except RowError as error:
        raise ValueError(f"{path}: {error}") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # lines that are lists
            return None
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path}: the JSON list is damaged at {where} ({error.msg}): export it again") from None
    return [_checked_row(row) for row in rows]


def json_value(path: str | os.PathLike[str]) -> Any:
    """The file as one JSON value.

    Raises:
      ValueError: it is none.
    """
    try:
        return _DECODER.decode(read_bytes(path).removeprefix(b"\xef\xbb\xbf").decode("utf-8").strip())
    except RecursionError:
        raise ValueError(f"{path}: the JSON is nested too deep") from None


def _checked_row(row: Any) -> dict[str, Any] | RowError:
    if not isinstance(row, dict):
        return RowError("not an object", f"expected a JSON object, got {type(row).__name__}: write {{...}}")
    try:
        _refuse_constants(row)
    except RowError as error:
        return error
    return _too_deep() if _is_deep(row) else row


def _refuse_constants(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError("not a number", f"{value} is not JSON: use a finite number or null")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_constants(inner)


def notes(record: Any) -> list[str]:
    """The reasons of `RULES` under which a record deserves a look, whatever file it came from."""
    return list(_notes(record, None, cut=False))


def first_rows(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file in order, to see what it is; it ends before the first line that is none."""
    try:
        for _, data in _lines(path):
            yield _json_object(data)
    except RowError:
        return


def read_rows(path: str | os.PathLike[str], parse: Callable[[dict[str, Any]], Any]) -> tuple[list[Any], DataReport]:
    r"""Apply `parse` to each JSON object of a file; a `RowError` drops the row and counts it by its reason.

    Blank lines are skipped. Lines end at "\n" only: U+2028 and U+0085 are ordinary characters inside JSON strings.
    """
    tally, records = _Tally(path), []
    _each_row(tally, lambda _, row: records.append(parse(row)))
    return records, tally.report(len(records))


def write_jsonl(path: str | os.PathLike[str], records: Iterable[Any]) -> None:
    """Write records one JSON object a line, whole or not at all; they survive a power cut when this returns.

    Ranks are written from 1, null where not ranked; a prompt of several turns is written as `messages`; fields that are
    None are left out. Gzip when the name ends in .gz.
    """
    path = local_path("the file to write", path)
    text = "".join(json.dumps(_to_json(r), ensure_ascii=False, allow_nan=False) + "\n" for r in records)
    data = text.encode("utf-8")
    with written(path, binary=True) as file:
        # mtime=0: equal records give equal bytes.
        file.write(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    parsed.forget(path)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The whole file, unpacked when its name ends in .gz.

    Raises:
      ValueError: it is missing or damaged, or no path but an address (``gs://..``).
    """
    local_path("the file to read", path)
    if not os.path.isfile(path) and os.path.exists(path):
        # A pipe can be read once only and may never end; a run reads its data again when it goes on.
        what = "a folder: pass one file" if os.path.isdir(path) else "no regular file: save it to a file first"
        raise ValueError(f"{path} is {what}")
    try:
        data = Path(path).read_bytes()
        parsed.seen(path, data)
        return _unpacked(data, path) if str(path).endswith(".gz") else data
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: check the path") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): copy or download it again") from error


def _unpacked(data: bytes, path: str | os.PathLike[str]) -> bytes:
    limit = max(UNPACKED_LIMIT, UNPACKED_RATIO * len(data))
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        found = file.read(limit + 1)
    if len(found) > limit:
        raise ValueError(
            f"{path} unpacks to more than {UNPACKED_RATIO} times its {len(data):,} bytes (limit {limit:,}): it is no "
            "ordinary text; unpack it yourself if you trust it"
        )
    return found


def _each_row(tally: _Tally, take: Callable[[int, dict[str, Any]], None]) -> None:
    for line, data in _lines(tally.path):
        tally.rows += 1
        try:
            take(line, _json_object(data))
        except RowError as error:
            tally.drop(line, error)


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    data = read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(data.split(b"\n"), start=1):
        if len(line) > LINE_LIMIT:
            raise ValueError(
                f"{path}:{number}: the line has {len(line):,} bytes, the limit is {LINE_LIMIT:,}: write a record a line"
            )
        if line.strip():
            yield number, line


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        row = _DECODER.decode(data.decode("utf-8"))
    except RowError:
        raise
    except UnicodeDecodeError as error:
        raise RowError("not UTF-8", f"byte {error.start} is not UTF-8: save the file as UTF-8") from None
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        what = f"malformed JSON (character {error.pos}: {error.msg})"
        raise RowError("malformed JSON", f"{what}: write one JSON object a line") from None
    except ValueError:  # Python's own limit on the digits of an integer
        what = "malformed JSON (an integer of more digits than Python reads)"
        raise RowError("number too long", f"{what}: write it as a string, or remove it") from None
    if data.count(b"[") + data.count(b"{") > NESTING and _is_deep(row):
        raise _too_deep()
    if not isinstance(row, dict):
        raise RowError("not an object", f"expected a JSON object, got {type(row).__name__}: write {{...}}")
    return row


def _too_deep() -> RowError:
    return RowError("nested too deep", "the JSON is nested too deep: write one flat object a line")


def _is_deep(value: Any) -> bool:
    """Whether more than `NESTING` lists and objects lie in each other, whatever the parser's own limit."""
    level = [value]
    for _ in range(NESTING):
        inner = (item for box in level for item in (box.values() if isinstance(box, dict) else box))
        level = [item for item in inner if isinstance(item, dict | list)]
    return bool(level)


def _reject_constant(name: str) -> Any:
    raise RowError("not a number", f"{name} is not JSON: use a finite number or null")


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(k for k, n in collections.Counter(k for k, _ in pairs).items() if n > 1)
        raise RowError("duplicate key", f"field {_show(twice)} is given twice: keep one")
    return row


_DECODER = json.JSONDecoder(parse_constant=_reject_constant, object_pairs_hook=_reject_duplicates)

_ROW_BY_ROW = json.JSONDecoder(object_pairs_hook=_reject_duplicates)
"""For a list of rows, each of which is then checked by itself."""


class _Kept:
    """The records so far by line, and what must not come twice."""

    def __init__(self):
        self.records: dict[int, Any] = {}
        self.ids: dict[str, tuple[int, Any]] = {}
        self.lines: dict[Any, int] = {}  # of each (labeler, prompt, responses)

    def add(self, line: int, record: Any, tally: _Tally) -> None:
        """Keep a record; raise when it may not stay, or drop the one it revises."""
        key = None
        if isinstance(record, Ranking) and record.labeler is not None:
            key = (record.labeler, record.prompt, tuple(sorted(record.responses)))
        self._check_id(record.id, key)
        if key is not None:
            if key in self.lines:
                self._revise(line, record, self.lines[key], tally)
            self.lines[key] = line
        self.records[line] = record
        if record.id is not None:
            self.ids.setdefault(record.id, (line, key))

    def _check_id(self, name: str | None, key: Any) -> None:
        if name is None or name not in self.ids:
            return
        first, first_key = self.ids[name]
        # The revisions of one ranking may share its id.
        if key is None or key != first_key:
            raise RowError("duplicate id", f"field 'id' = {_show(name)} is also in line {first}: make ids unique")

    def _revise(self, line: int, record: Ranking, before: int, tally: _Tally) -> None:
        new, old = record.revision, self.records[before].revision
        if new is None or old is None or new == old:
            raise RowError(
                "ranked twice",
                f"labeler {_show(record.labeler)} ranks the prompt and responses of line {before} again "
                f"(revisions {_show(old)} and {_show(new)}): remove one, or number them with 'revision'",
            )
        if new < old:
            raise RowError("superseded by revision", f"revision {_show(new)} < {_show(old)} of line {before}")
        tally.drop(before, RowError("superseded by revision", f"revision {_show(old)} < {_show(new)} of line {line}"))
        del self.records[before]


def _check_options(max_bad_fraction: float, limit: int | None, too_long: str, special_tokens: Any) -> None:
    if not 0 <= max_bad_fraction < 1:
        raise ValueError(f"max_bad_fraction={max_bad_fraction} must be at least 0 and below 1")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for no limit")
    if too_long not in ("drop", "error", "truncate"):
        raise ValueError(f'too_long={too_long!r} must be "drop", "error" or "truncate"')
    if limit is None and too_long != "drop":
        raise ValueError(f"too_long={too_long!r} needs a limit: give limit=")
    if isinstance(special_tokens, str) or not (isinstance(special_tokens, re.Pattern) or all(special_tokens)):
        raise ValueError(f'special_tokens={special_tokens!r} must be a list of texts, like ["<|endoftext|>"]')


def _special(special_tokens: Sequence[str] | re.Pattern[str]) -> re.Pattern[str] | None:
    if isinstance(special_tokens, re.Pattern):
        return special_tokens
    return re.compile("|".join(map(re.escape, special_tokens))) if special_tokens else None


def _refuse_bad(report: DataReport, max_bad_fraction: float, tolerated: set[str]) -> None:
    bad = {reason: n for reason, n in report.dropped.items() if reason not in tolerated}
    total = sum(bad.values())
    if total and total / report.rows > max_bad_fraction:
        more = {reason: f" (and {n - 1} more: {reason})" if n > 1 else "" for reason, n in bad.items()}
        raise ValueError(
            f"{total} of {report.rows} rows of {report.source} are bad (max_bad_fraction={max_bad_fraction}):\n  "
            + "\n  ".join(report.examples[reason] + more[reason] for reason in bad)
        )


# ------------------------------------------------------------------------------------------- lengths and notes


def record_texts(record: Any) -> list[str]:
    """All texts of a record that a model reads: prompt or turns, then what answers it; unranked responses left out."""
    before, after = _texts(record)
    return [*before, *after]


def _texts(record: Any) -> tuple[list[str], list[str]]:
    """The texts of the prompt, and those that answer it or stand alone; responses that nobody ranked are left out."""
    if isinstance(record, PlainText):
        return [], [record.text]
    before = [record.prompt] if isinstance(record.prompt, str) else [turn.content for turn in record.prompt]
    if isinstance(record, Ranking):
        return before, [text for text, rank in zip(record.responses, record.ranks, strict=True) if rank != ABSENT]
    return before, [record.response] if isinstance(record, Demonstration) else []


def _fit(record: Any, limit: int, length: Callable[[str], int], too_long: str) -> Any:
    """The record itself where it fits, or cut to fit."""
    before, answers = _texts(record)
    taken = sum(map(length, before))
    total = taken + max(map(length, answers), default=0)
    if total <= limit:
        return record
    if too_long == "truncate" and answers:
        return _cut(record, limit - taken, length)
    what = "prompt and longest response take" if before and answers else "the row takes"
    unit = " characters" if length is len else ""
    raise RowError("too long", f"{what} {total}{unit}, limit={limit}: shorten the row or raise limit")


def _cut(record: Any, room: int, length: Callable[[str], int]) -> Any:
    if isinstance(record, PlainText):
        return dataclasses.replace(record, text=_shorten(record.text, room, length))
    if isinstance(record, Demonstration):
        return dataclasses.replace(record, response=_shorten(record.response, room, length))
    pairs = zip(record.responses, record.ranks, strict=True)
    responses = tuple(text if rank == ABSENT else _shorten(text, room, length) for text, rank in pairs)
    return dataclasses.replace(record, responses=responses)


def _shorten(text: str, room: int, length: Callable[[str], int]) -> str:
    """The longest beginning of a text that takes at most `room`."""
    if length(text) <= room:
        return text
    end = max(bisect.bisect_right(range(len(text)), room, key=lambda n: length(text[:n])) - 1, 0)
    while end and length(text[:end]) > room:  # a token count may fall where the text grows
        end -= 1
    if not text[:end].strip():
        raise RowError("too long", "the prompt leaves no room for a response: shorten it or raise limit")
    return text[:end]


def _notes(record: Any, special: re.Pattern[str] | None, *, cut: bool) -> Iterator[str]:
    if cut:
        yield "response cut"
    if special and any(special.search(text) for texts in _texts(record) for text in texts):
        yield "special token in text"
    if isinstance(record, Ranking):
        if strict_pairs(record.ranks) == 0:
            yield "all responses tie"
        ranked = {(text, rank) for text, rank in zip(record.responses, record.ranks, strict=True) if rank != ABSENT}
        if len({text for text, _ in ranked}) < len(ranked):
            yield "same response, different ranks"


# ----------------------------------------------------------------------------------------------- fields of a row


def check_text(value: Any, field: str, *, allow_empty: bool = False, reason: str | None = None) -> str:
    """`value` when it is a usable text, else a `RowError` that names `field`.

    Args:
      value: what the row holds.
      field: its name, as in "responses[2]".
      allow_empty: accept "".
      reason: what an empty text is counted under; None = "empty " and the field.
    """
    if value is None:
        raise RowError("missing field", f"field {field!r} must be a string, got nothing: write the text in quotes")
    if not isinstance(value, str):
        raise _wrong_type(value, field, "a string", "write the text in quotes")
    if not allow_empty and not value.strip():
        raise RowError(reason or f"empty {field}", f"field {field!r} is empty: fill it in or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            "lone surrogate", f"field {field!r} has a lone surrogate at character {error.start}: remove it"
        ) from None
    return value


def _wrong_type(value: Any, field: str, wanted: str, fix: str) -> RowError:
    return RowError("wrong type", f"field {field!r} must be {wanted}, got {type(value).__name__}: {fix}")


_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 60


def _show(value: Any) -> str:
    """A value as an error may quote it: short, on one line."""
    return _SHOWN.repr(value)


def _check_names(row: dict[str, Any], names: Sequence[str], where: str = "") -> None:
    for name in row:
        if name not in names:
            near = difflib.get_close_matches(name[:40], names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"remove it; the fields are {', '.join(names)}"
            raise RowError("unknown field", f"unknown field {_show(name)}{where}: {hint}")


@functools.cache
def _names(kind: type) -> tuple[str, ...]:
    """The fields of a record as its JSON form has them."""
    names = [field.name for field in dataclasses.fields(kind)]
    return tuple(["prompt", "messages", *names[1:]] if names[0] == "prompt" else names)


_LABELS = ("id", "source", "use_case", "labeler", "labeler_group", "user", "organization")


def _labels(row: dict[str, Any], kind: type) -> dict[str, Any]:
    """The optional texts that are given, checked."""
    given = [name for name in _LABELS if row.get(name) is not None and name in _names(kind)]
    labels = {name: check_text(row[name], name, reason="empty label") for name in given}
    if row.get("time") is not None:
        labels["time"] = _time(row["time"])
    return labels


def _time(value: Any) -> str:
    text = check_text(value, "time", reason="empty label")
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        fix = "write it as ISO 8601, like 2022-01-27T09:30:00Z"
        raise RowError("bad time", f"field 'time' = {_show(text)} is no time: {fix}") from None
    return text


def _list(row: dict[str, Any], field: str) -> list[Any]:
    value = row.get(field)
    if value is None:
        raise RowError("missing field", f"field {field!r} must be a list, got nothing: write [...]")
    if not isinstance(value, list):
        raise _wrong_type(value, field, "a list", "write [...]")
    return value


# -------------------------------------------------------------------------------------------------- conversations


def _prompt(row: dict[str, Any]) -> Conversation:
    """The prompt of a row in either form."""
    if row.get("messages") is None:
        if isinstance(row.get("prompt"), list):
            raise _wrong_type(row["prompt"], "prompt", "a string", "name the field 'messages' when it holds turns")
        if row.get("prompt") is None:
            fix = "write the text in quotes, or its turns as 'messages'"
            raise RowError("missing field", f"field 'prompt' must be a string, got nothing: {fix}")
        return check_text(row["prompt"], "prompt", reason="empty prompt")
    if row.get("prompt") is not None:
        raise RowError("prompt and messages", "fields 'prompt' and 'messages' are both given: keep one")
    turns = tuple(_message(turn, k, reason="empty message") for k, turn in enumerate(_list(row, "messages")))
    if not turns:
        raise RowError("empty prompt", "field 'messages' holds no prompt: write at least the user's turn")
    _check_turns(turns)
    return turns


MORE_THAN_TEXT = (
    "tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "images", "image",
    "audio", "videos", "refusal", "weight", "train",
)  # fmt: skip
"""Fields of other libraries' messages that say something which a role and a text cannot hold."""


def _message(turn: Any, place: int, *, reason: str, allow_empty: bool = False) -> Message:
    field = f"messages[{place}]"
    if not isinstance(turn, dict):
        raise _wrong_type(turn, field, "an object", 'write {"role": "user", "content": "..."}')
    more = next((name for name in turn if name in MORE_THAN_TEXT and turn[name] is not None), None)
    if more is not None:
        fix = (
            "a model of this package neither reads nor writes it, so leave such conversations out "
            "(python experiments/prepare_data.py --data=FILE tells which they are)"
        )
        raise RowError("unknown field", f"unknown field {more!r} in {field}: {fix}")
    _check_names(turn, ("role", "content"), f" in {field}")
    role = check_text(turn.get("role"), f"{field}.role", reason="unknown role")
    if role not in ROLES:
        raise RowError("unknown role", f"field '{field}.role' = {_show(role)} must be one of {', '.join(ROLES)}")
    return Message(role, check_text(turn.get("content"), f"{field}.content", reason=reason, allow_empty=allow_empty))


def _check_turns(turns: Sequence[Message]) -> None:
    """Raise unless they are [system,] user, assistant, .., user."""
    first = turns[0].role == "system"
    for k, turn in enumerate(turns[first:], start=first):
        wanted = "assistant" if (k - first) % 2 else "user"
        if turn.role == "system":
            raise RowError(
                "misplaced system message", f"field 'messages[{k}].role' is system: keep one system message, the first"
            )
        if turn.role != wanted:
            raise RowError(
                "turns do not alternate",
                f"field 'messages[{k}].role' is {turn.role} where the {wanted}'s turn is due: join or remove turns",
            )
    if turns[-1].role != "user":
        raise RowError(
            "last turn not the user's",
            f"field 'messages[{len(turns) - 1}].role' is {turns[-1].role}, but a prompt ends with the user's turn: "
            "remove this one (or, in a demonstration, 'response')",
        )


# -------------------------------------------------------------------------------------------------------- records


def _parse_demonstration(row: dict[str, Any], allow_empty: bool) -> Demonstration:
    _check_names(row, _names(Demonstration))
    response, turns = row.get("response"), row.get("messages")
    if response is None and isinstance(turns, list) and turns:
        last = len(turns) - 1
        answer = _message(turns[last], last, reason="empty response", allow_empty=allow_empty)
        if answer.role != "assistant":
            fix = "add it, or end 'messages' with the assistant's turn"
            raise RowError("missing field", f"field 'response' must be a string, got nothing: {fix}")
        response, row = answer.content, {**row, "messages": turns[:last]}
    return Demonstration(
        prompt=_prompt(row),
        response=check_text(response, "response", allow_empty=allow_empty, reason="empty response"),
        **_labels(row, Demonstration),
    )


def _parse_prompt(row: dict[str, Any], allow_empty: bool) -> Prompt:
    del allow_empty  # there is no response here
    _check_names(row, _names(Prompt))
    return Prompt(prompt=_prompt(row), **_labels(row, Prompt))


def _parse_plain_text(row: dict[str, Any], allow_empty: bool) -> PlainText:
    del allow_empty
    _check_names(row, _names(PlainText))
    return PlainText(text=check_text(row.get("text"), "text", reason="empty text"), **_labels(row, PlainText))


def _parse_ranking(row: dict[str, Any], allow_empty: bool) -> Ranking:
    _check_names(row, _names(Ranking))
    prompt = _prompt(row)
    responses = tuple(
        check_text(text, f"responses[{k}]", allow_empty=allow_empty, reason="empty response")
        for k, text in enumerate(_list(row, "responses"))
    )
    if len(responses) < 2:
        raise RowError("fewer than two responses", "field 'responses' needs at least 2 texts to compare: add one")
    ranks = _ranks(row, len(responses))
    return Ranking(
        prompt=prompt,
        responses=responses,
        ranks=ranks,
        **_labels(row, Ranking),
        policies=_for_each(row, "policies", len(responses), _policy),
        temperatures=_for_each(row, "temperatures", len(responses), _temperature),
        revision=_revision(row.get("revision")),
    )


def _ranks(row: dict[str, Any], k: int) -> tuple[int, ...]:
    """K ranks from 0, `ABSENT` for null."""
    values = _list(row, "ranks")
    if len(values) != k:
        reason = "missing rank" if len(values) < k else "unknown rank"
        fix = "give one each (or null)"
        raise RowError(reason, f"field 'ranks' has {len(values)} entries for {k} responses: {fix}")
    for i, value in enumerate(values):
        # A rank above K is usually a score (larger is better) in the wrong column. (bool is an int to isinstance.)
        if value is not None and (type(value) is not int or not 1 <= value <= k):
            raise RowError("unknown rank", f"field 'ranks[{i}]' = {_show(value)} must be 1 (best) to {k}, or null")
    if sum(value is not None for value in values) < 2:
        raise RowError("fewer than two ranks", "field 'ranks' needs at least 2 integers that are not null: rank more")
    return tuple(ABSENT if value is None else value - 1 for value in values)


def _for_each(row: dict[str, Any], field: str, k: int, check: Callable[[Any, str], Any]) -> tuple[Any, ...] | None:
    if row.get(field) is None:
        return None
    values = _list(row, field)
    if len(values) != k:
        raise RowError("uneven list", f"field {field!r} has {len(values)} entries for {k} responses: give one each")
    return tuple(check(value, f"{field}[{i}]") for i, value in enumerate(values))


def _policy(value: Any, field: str) -> str:
    return check_text(value, field, reason="empty label")


def _temperature(value: Any, field: str) -> float:
    del field
    if type(value) not in (int, float) or not 0 <= value <= 1e6:
        raise RowError("bad temperature", f"field 'temperatures' holds {_show(value)}: use numbers from 0 to 1e6")
    return float(value)


def _revision(value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise RowError("bad revision", f"field 'revision' = {_show(value)} must be an integer from 0, such as 3")
    return value


_PARSERS: dict[type, Callable[[dict[str, Any], bool], Any]] = {
    Demonstration: _parse_demonstration,
    Ranking: _parse_ranking,
    Prompt: _parse_prompt,
    PlainText: _parse_plain_text,
}


def parse_row(row: dict[str, Any], kind: type[Record], *, allow_empty_responses: bool = False) -> Record:
    """One row, already JSON, as a record; for readers of other file formats.

    Raises:
      RowError: the row breaks a rule.
    """
    return _PARSERS[kind](row, allow_empty_responses)


def _to_json(record: Any) -> dict[str, Any]:
    row = {k: v for k, v in dataclasses.asdict(record).items() if v is not None}
    if isinstance(row.get("prompt"), tuple):
        row = {"messages" if k == "prompt" else k: v for k, v in row.items()}
    if isinstance(record, Ranking):
        row["ranks"] = [None if r == ABSENT else r + 1 for r in record.ranks]
    return row
