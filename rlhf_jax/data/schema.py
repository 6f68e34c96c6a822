"""The records people write and their JSON-lines form, checked strictly: a bad row is an error, never a guess.

One JSON object a line, UTF-8. Fields marked ? may be left out; a field that is not listed is an error.

| record | fields |
|---|---|
| `Demonstration` | `prompt, response, id?, source?, use_case?, labeler?` |
| `Ranking` | `prompt, responses` (K strings), `ranks` (K integers from 1 = best, equal = tie, null = not ranked), |
|           | `id?, source?, use_case?, labeler?, labeler_group?, policies?` (K strings), `temperatures?` (K numbers) |
| `Prompt` | `prompt, id?, source?, use_case?` |
| `PlainText` | `text, id?, source?` |

In Python ranks start at 0 and -1 means not ranked, as in `rlhf_jax.types.RankingBatch`; this file is the only place
that converts.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import gzip
import itertools
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

ABSENT = -1
"""The rank of a response that was not ranked."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


Conversation = str | tuple[Message, ...]
"""What a response answers: a text, or the turns before it."""


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A prompt and the answer a labeler wrote for it (supervised fine-tuning)."""

    prompt: Conversation
    response: str
    id: str | None = None
    source: str | None = None
    use_case: str | None = None
    labeler: str | None = None


@dataclasses.dataclass(frozen=True)
class Ranking:
    """K responses to one prompt, ranked by one labeler; `ranks` is 0 for the best, equal for ties, -1 when absent."""

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


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt without an answer (PPO, evaluation)."""

    prompt: Conversation
    id: str | None = None
    source: str | None = None
    use_case: str | None = None


@dataclasses.dataclass(frozen=True)
class PlainText:
    """One document of running text (pretraining mix)."""

    text: str
    id: str | None = None
    source: str | None = None


Record = TypeVar("Record", Demonstration, Ranking, Prompt, PlainText)


class RowError(ValueError):
    """A row that breaks a rule. `reason` is the short name it is counted under."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What became of the rows of a source.

    Attributes:
      source: where the rows came from.
      rows: rows read.
      kept: records returned; ``kept + sum(dropped.values()) == rows``.
      dropped: rows left out, by reason.
      noted: rows kept that deserve a look, by reason (for example rankings in which all responses tie).
      examples: the first error message of each reason.
    """

    source: str
    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    noted: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)

    def __add__(self, other: DataReport) -> DataReport:
        return DataReport(
            source=", ".join(dict.fromkeys([self.source, other.source])),
            rows=self.rows + other.rows,
            kept=self.kept + other.kept,
            dropped=_add_counts(self.dropped, other.dropped),
            noted=_add_counts(self.noted, other.noted),
            examples={**other.examples, **self.examples},
        )

    def summary(self) -> str:
        """The report as a few lines of text.

        >>> print(DataReport("pairs.jsonl", rows=3, kept=2, dropped={"identical responses": 1}).summary())
        pairs.jsonl: 3 rows, 2 kept, 1 dropped
          dropped: identical responses 1
        """
        lines = [f"{self.source}: {self.rows} rows, {self.kept} kept, {sum(self.dropped.values())} dropped"]
        for name, counts in (("dropped", self.dropped), ("noted", self.noted)):
            lines += [f"  {name}: {reason} {n}" for reason, n in sorted(counts.items())]
        return "\n".join(lines + [f"  {example}" for example in self.examples.values()])


def strict_pairs(ranks: Sequence[int]) -> int:
    r"""Number of comparisons a ranking holds: pairs of ranked responses that do not tie.

    $\binom{K}{2}$ minus the tied pairs; responses of rank -1 take part in none.

    >>> strict_pairs([0, 1, 1, -1])
    2

    Source: Ouyang et al. 2022, section 3.5 (all pairs of a prompt are one batch element).
    """
    return sum(a != b and a != ABSENT and b != ABSENT for a, b in itertools.combinations(ranks, 2))


def read_jsonl(
    path: str | os.PathLike[str],
    kind: type[Record],
    *,
    max_bad_fraction: float = 0.0,
    allow_empty_responses: bool = False,
) -> tuple[list[Record], DataReport]:
    """Read records of one kind from a JSON-lines file (gzip when the name ends in .gz).

    Args:
      path: the file.
      kind: `Demonstration`, `Ranking`, `Prompt` or `PlainText`.
      max_bad_fraction: share of the rows that may break a rule; these are left out and counted. 0 tolerates none.
      allow_empty_responses: accept "" as a response: a sampled answer may stop at once. A prompt is never empty.

    Returns:
      The records in file order, and the counts.

    Raises:
      ValueError: the file is missing, damaged or empty, or more rows are bad than allowed; the message names
        file:line, the field and the fix for the first of them.
    """
    if not 0 <= max_bad_fraction < 1:
        raise ValueError(f"max_bad_fraction={max_bad_fraction} must be at least 0 and below 1")
    parse = _PARSERS[kind]
    records, report = read_rows(path, lambda row: parse(row, allow_empty_responses), unique_ids=True)
    bad = report.rows - report.kept
    if bad > max_bad_fraction * report.rows:
        raise ValueError(
            f"{bad} of {report.rows} rows of {path} are bad (max_bad_fraction={max_bad_fraction}):\n  "
            + "\n  ".join(report.examples.values())
        )
    if not records:
        raise ValueError(f"{path} holds no {kind.__name__}: write one JSON object a line")
    return records, report


def read_rows(
    path: str | os.PathLike[str], parse: Callable[[dict[str, Any]], Any], *, unique_ids: bool = False
) -> tuple[list[Any], DataReport]:
    r"""Apply `parse` to each JSON object of a file; a `RowError` drops the row and counts it by its reason.

    Blank lines are skipped. Lines end at "\n" only: U+2028 and U+0085 are ordinary characters inside JSON strings.
    """
    records, dropped, examples, noted, seen = [], collections.Counter(), {}, collections.Counter(), {}
    rows = 0
    for line, data in _lines(path):
        rows += 1
        try:
            record = parse(_json_object(data))
            if unique_ids:
                _check_id(record, line, seen)
        except RowError as error:
            dropped[error.reason] += 1
            examples.setdefault(error.reason, f"{path}:{line}: {error}")
            continue
        records.append(record)
        if isinstance(record, Ranking) and strict_pairs(record.ranks) == 0:
            noted["all responses tie"] += 1
    report = DataReport(str(path), rows, len(records), dict(dropped), dict(noted), examples)
    return records, report


def write_jsonl(path: str | os.PathLike[str], records: Iterable[Any]) -> None:
    """Write records one JSON object a line, atomically: a reader sees the whole file or the old one.

    Ranks are written from 1, null where not ranked; fields that are None are left out. Gzip when the name ends in .gz.
    """
    path = Path(path)
    text = "".join(json.dumps(_to_json(r), ensure_ascii=False, allow_nan=False) + "\n" for r in records)
    data = text.encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            # mtime=0: equal records give equal bytes.
            file.write(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes the file private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The whole file, unpacked when its name ends in .gz.

    Raises:
      ValueError: it is missing or damaged.
    """
    try:
        data = Path(path).read_bytes()
        return gzip.decompress(data) if str(path).endswith(".gz") else data
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: check the path") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): copy or download it again") from error


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    data = read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        row = json.loads(data.decode("utf-8"), parse_constant=_reject_constant, object_pairs_hook=_reject_duplicates)
    except RowError:
        raise
    except UnicodeDecodeError as error:
        raise RowError("not UTF-8", f"byte {error.start} is not UTF-8: save the file as UTF-8") from None
    except RecursionError:
        raise RowError("malformed JSON", "the JSON is nested too deep: write one flat object a line") from None
    except ValueError as error:
        raise RowError("malformed JSON", f"malformed JSON ({error}): write one JSON object a line") from None
    if not isinstance(row, dict):
        raise RowError("malformed JSON", f"expected a JSON object, got {type(row).__name__}: write {{...}}")
    return row


def _reject_constant(name: str) -> Any:
    raise RowError("not a number", f"{name} is not JSON: use a finite number or null")


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(k for k, n in collections.Counter(k for k, _ in pairs).items() if n > 1)
        raise RowError("duplicate key", f"field {twice!r} is given twice: keep one")
    return row


def _check_id(record: Any, line: int, seen: dict[str, int]) -> None:
    if record.id is None:
        return
    if record.id in seen:
        raise RowError("duplicate id", f"field 'id' = {record.id!r} is also in line {seen[record.id]}: make ids unique")
    seen[record.id] = line


def _check_fields(row: dict[str, Any], kind: type) -> None:
    fields = [f.name for f in dataclasses.fields(kind)]
    for name in row:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"remove it; the fields are {', '.join(fields)}"
            raise RowError("unknown field", f"unknown field {name!r}: {hint}")


def check_text(value: Any, field: str, *, allow_empty: bool = False) -> str:
    """`value` when it is a usable text, else a `RowError` that names `field`."""
    if not isinstance(value, str):
        got = "nothing" if value is None else type(value).__name__
        raise RowError(f"bad {field}", f"field {field!r} must be a string, got {got}: write the text in quotes")
    if not allow_empty and not value.strip():
        raise RowError(f"empty {field}", f"field {field!r} is empty: fill it in or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            "lone surrogate", f"field {field!r} has a lone surrogate at character {error.start}: remove it"
        ) from None
    return value


def _labels(row: dict[str, Any], *names: str) -> dict[str, str | None]:
    return {n: None if row.get(n) is None else check_text(row[n], n) for n in names}


def _parse_demonstration(row: dict[str, Any], allow_empty: bool) -> Demonstration:
    _check_fields(row, Demonstration)
    return Demonstration(
        prompt=check_text(row.get("prompt"), "prompt"),
        response=check_text(row.get("response"), "response", allow_empty=allow_empty),
        **_labels(row, "id", "source", "use_case", "labeler"),
    )


def _parse_prompt(row: dict[str, Any], allow_empty: bool) -> Prompt:
    del allow_empty  # there is no response here
    _check_fields(row, Prompt)
    return Prompt(prompt=check_text(row.get("prompt"), "prompt"), **_labels(row, "id", "source", "use_case"))


def _parse_plain_text(row: dict[str, Any], allow_empty: bool) -> PlainText:
    del allow_empty
    _check_fields(row, PlainText)
    return PlainText(text=check_text(row.get("text"), "text"), **_labels(row, "id", "source"))


def _parse_ranking(row: dict[str, Any], allow_empty: bool) -> Ranking:
    _check_fields(row, Ranking)
    prompt = check_text(row.get("prompt"), "prompt")
    responses = _list(row, "responses")
    responses = tuple(check_text(r, f"responses[{k}]", allow_empty=allow_empty) for k, r in enumerate(responses))
    if len(responses) < 2:
        raise RowError("fewer than two responses", "field 'responses' needs at least 2 texts to compare: add one")
    ranks = tuple(_rank(r, k, len(responses)) for k, r in enumerate(_list(row, "ranks", len(responses))))
    if sum(r != ABSENT for r in ranks) < 2:
        raise RowError("fewer than two ranks", "field 'ranks' needs at least 2 integers that are not null: rank more")
    policies, temperatures = (
        _list(row, name, len(responses)) if row.get(name) is not None else None for name in ("policies", "temperatures")
    )
    return Ranking(
        prompt=prompt,
        responses=responses,
        ranks=ranks,
        **_labels(row, "id", "source", "use_case", "labeler", "labeler_group"),
        policies=None if policies is None else tuple(check_text(p, f"policies[{k}]") for k, p in enumerate(policies)),
        temperatures=None if temperatures is None else tuple(map(_temperature, temperatures)),
    )


def _list(row: dict[str, Any], field: str, length: int | None = None) -> list[Any]:
    value = row.get(field)
    if not isinstance(value, list):
        got = "nothing" if value is None else type(value).__name__
        raise RowError(f"bad {field}", f"field {field!r} must be a list, got {got}: write [...], one entry a response")
    if length is not None and len(value) != length:
        raise RowError(
            f"bad {field}", f"field {field!r} has {len(value)} entries for {length} responses: give one each (or null)"
        )
    return value


def _rank(value: Any, k: int, responses: int) -> int:
    if value is None:
        return ABSENT
    # A rank above K is usually a score (larger is better) in the wrong column. (bool is an int to isinstance.)
    if type(value) is not int or not 1 <= value <= responses:
        raise RowError("bad ranks", f"field 'ranks[{k}]' = {value!r} must be 1 (best) to {responses}, or null")
    return value - 1


def _temperature(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1e6:
        raise RowError("bad temperatures", f"field 'temperatures' holds {value!r}: use numbers from 0 to 1e6")
    return float(value)


_PARSERS: dict[type, Callable[[dict[str, Any], bool], Any]] = {
    Demonstration: _parse_demonstration,
    Ranking: _parse_ranking,
    Prompt: _parse_prompt,
    PlainText: _parse_plain_text,
}


def _to_json(record: Any) -> dict[str, Any]:
    row = {k: v for k, v in dataclasses.asdict(record).items() if v is not None}
    if isinstance(record, Ranking):
        row["ranks"] = [None if r == ABSENT else r + 1 for r in record.ranks]
    return row


def _add_counts(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {k: a.get(k, 0) + b.get(k, 0) for k in {**a, **b}}
