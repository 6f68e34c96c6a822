"""Real people's data: HH-RLHF, OpenAssistant, running text, and the tables of HF `datasets` in TRL's forms.

`read_hh`, `read_oasst` and `read_english` read a folder or download from the hub. `read_pairs`, `read_completions`,
`read_prompts` and `read_rated` read what is on disk: JSON lines, parquet, arrow, and folders of them. The forms are in
docs/data_sources.md.

A dialogue of the first kind becomes one prompt in one form, whatever the source: "Human: ..", blank line,
"Assistant: ..", and so on, ending in "Assistant:". Train and test are split by a hash of the first human turn, so no
conversation is in both. Tables keep their own splits, and messages stay messages.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import huggingface_hub

from rlhf_jax.data import schema
from rlhf_jax.data.schema import (
    PLACES,
    Conversation,
    DataReport,
    Demonstration,
    PlainText,
    Prompt,
    Ranking,
    Record,
    RowError,
    check_text,
    read_bytes,
    read_rows,
)
from rlhf_jax.run.files import local_path, read_json

Split = Literal["train", "test"]
HH_SUBSETS = ("helpful-base", "helpful-rejection-sampled", "helpful-online", "harmless-base")
HH_REPO = "Anthropic/hh-rlhf"
OASST_REPO = "OpenAssistant/oasst1"
OASST_TREES = "2023-04-12_oasst_ready.trees.jsonl.gz"
TEXT_REPO = "ggml-org/ci"
TEXT_ARCHIVE = "wikitext-2-raw-v1.zip"
TEXT_FOLDERS = ("english_text", "wikitext2")

_EXPECTED_DROPS = ("identical responses", "prompts differ", "empty response", "no Assistant turn")
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def read_hh(
    data_dir: str | os.PathLike[str] | None = None,
    *,
    split: Split,
    test_fraction: float = 0.1,
    subsets: Sequence[str] = HH_SUBSETS,
) -> tuple[list[Ranking], DataReport]:
    """Pairs of HH-RLHF as rankings of K = 2.

    A dialogue is cut at its last Assistant turn. Pairs whose two responses are identical, whose prompts differ, or with
    an empty response are dropped and counted.

    Args:
      data_dir: folder with ``<subset>*.jsonl.gz`` or ``<subset>/*.jsonl.gz`` (or with such a folder named hh_rlhf);
        None = download.
      split: "train" or "test", by a hash of the first human turn; the published file names do not decide.
      test_fraction: share of the conversations in the test split.
      subsets: which parts to read; a part that the folder lacks is skipped.

    Returns:
      Rankings whose `source` is ``hh_rlhf/<subset>``, and the counts.

    Source: Bai et al. 2022, arXiv 2204.05862.
    """
    records, report = [], None
    for path, subset in _hh_files(data_dir, subsets):
        parse = functools.partial(_parse_hh, source=f"hh_rlhf/{subset}")
        kept, counts = read_rows(path, parse)
        records += kept
        report = counts if report is None else report + counts
    assert report is not None  # _hh_files raises when it finds nothing
    return _take_split(records, report, split, test_fraction)


def read_oasst(
    data_dir: str | os.PathLike[str] | None = None, *, split: Split, test_fraction: float = 0.1, language: str = "en"
) -> tuple[list[Ranking], DataReport]:
    """Rankings of 2 to 9 replies to the same context, by the volunteers of OpenAssistant.

    Args:
      data_dir: folder with ``rankings.jsonl.gz`` (rows ``{prompt: [{role, text}], responses, ranks}``, ranks from 0)
        or else a file of message trees (``*tree*.jsonl.gz``), or with such a folder named oasst*; None = download.
      split: "train" or "test", by a hash of the first human turn.
      test_fraction: share of the conversations in the test split.
      language: of the trees' messages, as a two-letter code.

    Source: Koepf et al. 2023, arXiv 2304.07327.
    """
    path = _oasst_file(data_dir, "*tree*.jsonl.gz", "rankings.jsonl.gz")
    parse = _parse_oasst if path.name == "rankings.jsonl.gz" else functools.partial(_tree_rankings, language=language)
    groups, report = read_rows(path, parse)
    return _take_split([r for group in groups for r in group], report, split, test_fraction)


def read_oasst_demonstrations(
    data_dir: str | os.PathLike[str] | None = None, *, split: Split, test_fraction: float = 0.1, language: str = "en"
) -> tuple[list[Demonstration], DataReport]:
    """The best-ranked (or only) human reply to each context of OpenAssistant. Arguments as in `read_oasst`.

    The file may also be ``demonstrations.jsonl.gz`` (rows ``{prompt: [{role, text}], response}``).
    """
    path = _oasst_file(data_dir, "*tree*.jsonl.gz", "demonstrations.jsonl.gz")
    of_tree = functools.partial(_tree_demonstrations, language=language)
    parse = _parse_oasst_demonstration if path.name == "demonstrations.jsonl.gz" else of_tree
    groups, report = read_rows(path, parse)
    return _take_split([d for group in groups for d in group], report, split, test_fraction)


def best_responses(rankings: Iterable[Ranking]) -> list[Demonstration]:
    """The best-ranked response of each ranking as a demonstration; of a tie, the first."""
    return [
        Demonstration(r.prompt, r.responses[r.ranks.index(min(k for k in r.ranks if k >= 0))], r.id, r.source)
        for r in rankings
    ]


def read_text(path: str | os.PathLike[str], *, separator: str | None = None) -> tuple[list[PlainText], DataReport]:
    """Documents of running text: a file, or all such files of a folder in the order of their names.

    Args:
      path: ``.txt`` (one document, or several between `separator`) or ``.jsonl`` (``{text}`` a line, other fields
        left aside), plain or with ``.gz``.
      separator: for example "<|endoftext|>"; None = a text file is one document.

    Raises:
      ValueError: nothing to read, not UTF-8, or a bad row (the message names file and line).
    """
    root = local_path("the text", path)
    names = ("*.txt", "*.txt.gz", "*.jsonl", "*.jsonl.gz")
    files = sorted(f for name in names for f in root.glob(name)) if root.is_dir() else [root]
    documents, rows = [], 0
    for file in files:
        found, count = _jsonl_texts(file) if ".jsonl" in file.suffixes else _txt_documents(file, separator)
        documents += found
        rows += count
    if not documents:
        raise ValueError(f"{path} holds no text: pass a .txt, .txt.gz, .jsonl or .jsonl.gz file or a folder of them")
    dropped = {"empty document": rows - len(documents)} if rows > len(documents) else {}
    return documents, DataReport(str(path), rows, len(documents), dropped)


def read_english(
    data_dir: str | os.PathLike[str] | None = None, *, separator: str | None = None
) -> tuple[list[PlainText], DataReport]:
    """Running English for the pretraining mix, one document a file: novels, or two parts of WikiText-2.

    Args:
      data_dir: folder with a folder english_text or wikitext2, or with text files itself; None = download WikiText-2.
      separator: between the documents of a file in that folder, as in `read_text`; the download has none.

    Source: Merity et al. 2016, arXiv 1609.07843 (WikiText-2).
    """
    if data_dir is not None:
        return read_text(_folder(data_dir, *TEXT_FOLDERS), separator=separator)
    archive = _download(TEXT_REPO, TEXT_ARCHIVE)
    try:
        with zipfile.ZipFile(archive) as packed:
            names = [name for name in packed.namelist() if name.endswith((".train.raw", ".test.raw"))]
            texts = [(name, packed.read(name).decode("utf-8")) for name in sorted(names)]
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{archive} is damaged ({error}): download it again") from None
    return [PlainText(text, source=name) for name, text in texts], DataReport(TEXT_REPO, len(texts), len(texts))


def read_pairs(
    path: str | os.PathLike[str], *, split: str | None = None, source: str | None = None, max_bad_fraction: float = 0.0
) -> tuple[list[Ranking], DataReport]:
    """Rows ``{prompt, chosen, rejected}`` (TRL's preference form) as rankings of K = 2.

    Each of the three is a text or a list of ``{role, content}``. Without `prompt` the two hold the whole conversation:
    lists share all turns but the last; texts are cut at the last "Assistant:" turn, or else at the last space
    of what they share. Pairs whose responses are identical or empty, or that share no prompt, are dropped and counted.

    Args:
      path: a ``.jsonl``, ``.jsonl.gz``, ``.parquet`` or ``.arrow`` file, a folder of `Dataset.save_to_disk` or
        `DatasetDict.save_to_disk`, or a folder of shards such as a snapshot from the hub.
      split: which split, where there are several; None = the only one.
      source: the records' `source` where a row has none.
      max_bad_fraction: share of the rows that may be bad (the dropped ones above aside). 0 tolerates none.

    Returns:
      The rankings in file order, and the counts. Other columns that `Ranking` has as texts, such as `id`, come along.

    Raises:
      ValueError: there is nothing to read, a file is damaged or a shard is missing, a bad row (named file:row, rows
        counted from 1), or pyarrow is missing for a parquet or arrow file.
    """
    return _read_table(path, Ranking, _pair, split, source, max_bad_fraction)


def read_completions(
    path: str | os.PathLike[str], *, split: str | None = None, source: str | None = None, max_bad_fraction: float = 0.0
) -> tuple[list[Demonstration], DataReport]:
    """Rows ``{prompt, completion}`` or ``{messages}`` (TRL) as demonstrations. Arguments as in `read_pairs`.

    Of `messages` the last turn is the response, and must be the assistant's.
    """
    return _read_table(path, Demonstration, _completion, split, source, max_bad_fraction)


def read_prompts(
    path: str | os.PathLike[str], *, split: str | None = None, source: str | None = None, max_bad_fraction: float = 0.0
) -> tuple[list[Prompt], DataReport]:
    """Rows ``{prompt}``, a text or a list of messages (TRL's prompt-only form). Arguments as in `read_pairs`."""
    return _read_table(path, Prompt, _prompt_only, split, source, max_bad_fraction)


def read_rated(
    path: str | os.PathLike[str], *, split: str | None = None, source: str | None = None, max_bad_fraction: float = 0.0
) -> tuple[list[Ranking], DataReport]:
    """Responses with a number each, larger = better, as rankings: equal numbers tie. Arguments as in `read_pairs`.

    The row is ``{prompt, responses: [text], scores: [number]}``, or as in UltraFeedback ``{instruction, completions:
    [{response, overall_score, model}]}`` (also `score`). A response whose number is missing is not ranked.

    Source: Cui et al. 2023, arXiv 2310.01377 (UltraFeedback).
    """
    return _read_table(path, Ranking, _rated, split, source, max_bad_fraction)


def dialogue(turns: Sequence[tuple[str, str]]) -> str:
    r"""A prompt out of (role, text) turns; role "assistant" is the assistant, any other the human.

    >>> dialogue([("prompter", "Hello"), ("assistant", "Hi."), ("prompter", "Who are you?")])
    'Human: Hello\n\nAssistant: Hi.\n\nHuman: Who are you?\n\nAssistant:'
    """
    names = ["Assistant" if role == "assistant" else "Human" for role, _ in turns]
    said = [f"{name}: {text.strip()}" for name, (_, text) in zip(names, turns, strict=True)]
    return "\n\n".join([*said, "Assistant:"])


def in_test_split(prompt: Conversation, *, fraction: float) -> bool:
    """Whether a dialogue belongs to the test split: sha256 of its first human turn, spaces and case aside."""
    return conversation_place(prompt) < fraction


def conversation_place(prompt: Conversation) -> float:
    """A number in [0, 1) that all prompts of one conversation share, as text or as messages.

    It is the sha256 of the first human turn.

    >>> from rlhf_jax.data.schema import Message
    >>> conversation_place("Human: Hello") == conversation_place((Message("user", "hello"),))
    True
    """
    if not isinstance(prompt, str):
        prompt = next((turn.content for turn in prompt if turn.role == "user"), prompt[0].content)
    turn = ("\n\n" + prompt).split(_HUMAN)[1] if _HUMAN in "\n\n" + prompt else prompt
    key = " ".join(turn.split(_ASSISTANT)[0].lower().split())
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


# ------------------------------------------------------------------------------------------------------ HH-RLHF


def _parse_hh(row: dict[str, Any], *, source: str) -> Ranking:
    texts = [check_text(row.get(name), name) for name in ("chosen", "rejected")]
    if any(_ASSISTANT not in text for text in texts):
        raise RowError("no Assistant turn", 'a dialogue has no "Assistant:" turn: remove the pair')
    (prompt, chosen), (other, rejected) = (text.rsplit(_ASSISTANT, 1) for text in texts)
    if prompt != other:
        raise RowError("prompts differ", "the two dialogues differ before the last Assistant turn")
    if chosen.strip() == rejected.strip():
        raise RowError("identical responses", "chosen and rejected are the same")
    if not chosen.strip() or not rejected.strip():
        raise RowError("empty response", "a response is empty")
    return Ranking((prompt + _ASSISTANT).lstrip("\n"), (chosen.strip(), rejected.strip()), (0, 1), source=source)


def _hh_files(data_dir: str | os.PathLike[str] | None, subsets: Sequence[str]) -> list[tuple[Path, str]]:
    if data_dir is None:
        names = [(f"{subset}/{part}.jsonl.gz", subset) for subset in subsets for part in ("train", "test")]
        return [(_download(HH_REPO, name), subset) for name, subset in names]
    root = _folder(data_dir, "hh_rlhf", "hh-rlhf")
    patterns = ("{}.jsonl*", "{}.*.jsonl*", "{}/*.jsonl*")
    files = [(f, s) for s in subsets for p in patterns for f in sorted(root.glob(p.format(s)))]
    if not files:
        raise ValueError(f"no {' or '.join(subsets)} .jsonl.gz in {root}: pass the folder that holds HH-RLHF")
    return list(dict.fromkeys(files))


# ------------------------------------------------------------------------------------------------ OpenAssistant


def _parse_oasst(row: dict[str, Any]) -> list[Ranking]:
    responses, ranks = row.get("responses"), row.get("ranks")
    if not isinstance(responses, list) or not isinstance(ranks, list) or len(responses) != len(ranks):
        raise RowError("bad ranks", "fields 'responses' and 'ranks' must be lists of the same length")
    if len(responses) < 2 or any(type(rank) is not int or rank < 0 for rank in ranks):
        raise RowError("bad ranks", "a ranking needs at least 2 responses and integer ranks from 0")
    texts = tuple(check_text(text, "responses").strip() for text in responses)
    return [Ranking(dialogue(_turns(row)), texts, tuple(ranks), source="oasst")]


def _parse_oasst_demonstration(row: dict[str, Any]) -> list[Demonstration]:
    response = check_text(row.get("response"), "response").strip()
    return [Demonstration(dialogue(_turns(row)), response, source="oasst")]


def _turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    turns = row.get("prompt")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("bad prompt", "field 'prompt' must be a list of {role, text}")
    return [(check_text(t.get("role"), "role"), check_text(t.get("text"), "text")) for t in turns]


def _tree_rankings(row: dict[str, Any], *, language: str) -> list[Ranking]:
    found = []
    for node, turns in _contexts(row, language):
        replies = sorted(
            (r for r in _replies(node, language) if type(r.get("rank")) is int), key=lambda reply: reply["rank"]
        )
        if len(replies) < 2:
            continue
        texts = tuple(check_text(r.get("text"), "text").strip() for r in replies)
        ranks = tuple(r["rank"] - replies[0]["rank"] for r in replies)
        found.append(Ranking(dialogue(turns), texts, ranks, node.get("message_id"), "oasst"))
    return found


def _tree_demonstrations(row: dict[str, Any], *, language: str) -> list[Demonstration]:
    found = []
    for node, turns in _contexts(row, language):
        human = [r for r in _replies(node, language) if not r.get("synthetic")]
        ranked = sorted((r for r in human if type(r.get("rank")) is int), key=lambda reply: reply["rank"])
        # Without ranks a reply is taken only where it is alone: nobody said which of several is good.
        best = ranked[0] if ranked else human[0] if len(human) == 1 else None
        if best is not None:
            text = check_text(best.get("text"), "text").strip()
            found.append(Demonstration(dialogue(turns), text, node.get("message_id"), "oasst"))
    return found


def _contexts(row: dict[str, Any], language: str) -> Iterator[tuple[dict[str, Any], list[tuple[str, str]]]]:
    """Every human message of a tree with the turns up to and with it."""
    root = row.get("prompt")
    if not isinstance(root, dict):
        raise RowError("bad prompt", "field 'prompt' must be the first message of the tree")
    stack = [(root, [])] if root.get("lang") == language and not root.get("deleted") else []
    while stack:
        node, before = stack.pop()
        turns = [*before, (check_text(node.get("role"), "role"), check_text(node.get("text"), "text"))]
        if node["role"] == "prompter":
            yield node, turns
        stack += [(reply, turns) for reply in reversed(_replies(node, language))]


def _replies(node: dict[str, Any], language: str) -> list[dict[str, Any]]:
    return [r for r in node.get("replies") or [] if r.get("lang") == language and not r.get("deleted")]


def _oasst_file(data_dir: str | os.PathLike[str] | None, trees: str, derived: str) -> Path:
    if data_dir is None:
        return _download(OASST_REPO, OASST_TREES)
    root = _folder(data_dir, *(p.name for p in sorted(local_path("data_dir", data_dir).glob("oasst*"))))
    files = [*sorted(root.glob(derived)), *sorted(root.glob(trees))]
    if not files:
        raise ValueError(f"no {derived} or {trees} in {root}: pass the folder that holds OpenAssistant's file")
    return files[0]


# ------------------------------------------------------------------------------------------------- rows of a table


def _read_table(
    path: str | os.PathLike[str],
    kind: type[Record],
    form: Callable[[dict[str, Any]], dict[str, Any]],
    split: str | None,
    source: str | None,
    max_bad_fraction: float,
) -> tuple[list[Record], DataReport]:
    """Rows of all files of a table as records; `form` gives the row as `schema` wants it."""
    if not 0 <= max_bad_fraction < 1:
        raise ValueError(f"max_bad_fraction={max_bad_fraction} must be at least 0 and below 1")
    labels = _optional_texts(kind)
    given = {"source": source} if source else {}
    ids: set[str] = set()

    def parse(row: dict[str, Any]) -> Record:
        # Other tables have other columns: what a record does not know stays behind.
        carried = {name: row[name] for name in labels if isinstance(row.get(name), str) and row[name].strip()}
        record = schema.parse_row(given | carried | form(row), kind)
        if record.id is not None and record.id in ids:
            raise RowError("duplicate id", f"field 'id' = {record.id[:60]!r} is also in an earlier row")
        ids.add(record.id or "")
        return record

    records, report = [], None
    for file in _table_files(local_path("the data", path), split):
        kept, counts = (_arrow_rows if file.suffix in _ARROW else read_rows)(file, parse)
        records += kept
        report = counts if report is None else report + counts
    assert report is not None  # _table_files raises when it finds nothing
    _refuse_damaged(report, max_bad_fraction)
    if not records:
        raise ValueError(f"{path} holds no {kind.__name__} to use: {report.summary()}")
    return records, report


def _optional_texts(kind: type) -> list[str]:
    """The fields of a record that are a text or None."""
    return [field.name for field in dataclasses.fields(kind) if field.type == "str | None"]


def _refuse_damaged(report: DataReport, max_bad_fraction: float) -> None:
    bad = {reason: n for reason, n in report.dropped.items() if reason not in _EXPECTED_DROPS}
    if sum(bad.values()) > max_bad_fraction * report.rows:
        raise ValueError(
            f"{sum(bad.values())} of {report.rows} rows of {report.source} are bad "
            f"(max_bad_fraction={max_bad_fraction}):\n  " + "\n  ".join(report.examples[reason] for reason in bad)
        )


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected = _said(row, "chosen"), _said(row, "rejected")
    if row.get("prompt") is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _cut_texts(chosen, rejected)
        other = prompt
    else:
        (prompt, chosen), (other, rejected) = (_answer(row, said) for said in (chosen, rejected))
    if prompt != other:
        raise RowError("prompts differ", "the two conversations differ before the last turn")
    if chosen.strip() == rejected.strip():
        raise RowError("identical responses", "chosen and rejected are the same")
    return {**_asked(prompt), "responses": [chosen.strip(), rejected.strip()], "ranks": [1, 2]}


def _completion(row: dict[str, Any]) -> dict[str, Any]:
    if row.get("completion") is None and row.get("messages") is not None:
        prompt, response = _answer({}, _said(row, "messages"))
    else:
        prompt, response = _answer(row, _said(row, "completion"))
    return {**_asked(prompt), "response": response.strip()}


def _prompt_only(row: dict[str, Any]) -> dict[str, Any]:
    return _asked(_said(row, "prompt"))


def _rated(row: dict[str, Any]) -> dict[str, Any]:
    prompt = _said(row, "prompt" if row.get("prompt") is not None else "instruction")
    answers = row.get("responses") if row.get("responses") is not None else row.get("completions")
    if not isinstance(answers, list):
        raise RowError("missing field", "the row needs a list 'responses' (with 'scores') or 'completions'")
    scores, policies = row.get("scores"), None
    if answers and all(isinstance(answer, dict) for answer in answers):
        scores = [answer.get("overall_score", answer.get("score")) for answer in answers]
        policies = [answer.get("model") for answer in answers]
        answers = [answer.get("response") for answer in answers]
    if not isinstance(scores, list) or len(scores) != len(answers):
        raise RowError("missing rank", "field 'scores' must be a list with a number for each response")
    responses = [check_text(answer, f"responses[{k}]").strip() for k, answer in enumerate(answers)]
    named = {"policies": policies} if policies and all(isinstance(name, str) for name in policies) else {}
    return {**_asked(prompt), "responses": responses, "ranks": _ranks_of(scores), **named}


def _ranks_of(scores: Sequence[Any]) -> list[int | None]:
    """Ranks from 1 for the largest number, equal for equal ones, None where there is none."""
    for k, score in enumerate(scores):
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise RowError("wrong type", f"field 'scores[{k}]' must be a number or null, got {type(score).__name__}")
    numbers = [None if score is None or math.isnan(score) else score for score in scores]
    order = sorted({number for number in numbers if number is not None}, reverse=True)
    return [None if number is None else order.index(number) + 1 for number in numbers]


def _said(row: dict[str, Any], name: str) -> str | list[Any]:
    value = row.get(name)
    if value is None:
        raise RowError("missing field", f"field {name!r} is missing: the row has {', '.join(sorted(row)) or 'nothing'}")
    if not isinstance(value, str | list):
        got = type(value).__name__
        raise RowError("wrong type", f"field {name!r} must be a text or a list of messages, got {got}")
    return value if isinstance(value, str) else [_without_nulls(turn) for turn in value]


def _without_nulls(turn: Any) -> Any:
    # A column of messages has every field in every message; where it is unused it is null.
    return {name: value for name, value in turn.items() if value is not None} if isinstance(turn, dict) else turn


def _asked(prompt: Any) -> dict[str, Any]:
    return {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}


def _answer(row: dict[str, Any], said: str | list[Any]) -> tuple[Any, str]:
    """The prompt and the text that answers it. `said` is that text, the turn, or the whole conversation."""
    prompt = None if row.get("prompt") is None else _said(row, "prompt")
    if isinstance(said, str):
        if prompt is None:
            raise RowError("missing field", "field 'prompt' is missing: a text alone does not say what it answers")
        return prompt, said
    before, last = said[:-1], said[-1] if said else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise RowError("no Assistant turn", "the last message is not the assistant's: remove what follows its turn")
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if prompt is None or (before and before[-len(asked) :] == asked):
        prompt = before
    elif before:
        raise RowError("more than one turn", f"{len(said)} messages answer the prompt: only the last may")
    return prompt, check_text(last.get("content"), "content", allow_empty=True)


def _cut_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """What two texts share, and their rests."""
    if _ASSISTANT in chosen and _ASSISTANT in rejected:
        (prompt, chosen), (other, rejected) = (text.rsplit(_ASSISTANT, 1) for text in (chosen, rejected))
        if prompt != other:
            raise RowError("prompts differ", "the two dialogues differ before the last Assistant turn")
        return (prompt + _ASSISTANT).lstrip("\n"), chosen, rejected
    if chosen == rejected:
        raise RowError("identical responses", "chosen and rejected are the same")
    # At a space: words that begin alike are not cut.
    differ = (k for k, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    shared = chosen[: next(differ, min(len(chosen), len(rejected)))]
    shared = shared if shared[-1:].isspace() else shared.removesuffix((shared.split() or [""])[-1])
    if not shared.strip():
        raise RowError("prompts differ", "the two texts share no beginning: add a field 'prompt'")
    return shared.rstrip(), chosen[len(shared) :], rejected[len(shared) :]


# ------------------------------------------------------------------------------------------------ files of a table

_ARROW = (".parquet", ".arrow")
_TABLES = ("*.parquet", "*.arrow", "*.jsonl", "*.jsonl.gz")
_SHARD = re.compile(r"(?P<table>.+?)(?:-(?P<place>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]{16})?)?")
"""train, train-00000-of-00002, NAME-train-00000-of-00002, train-00000-of-00002-0123456789abcdef; without the suffix."""
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def _table_files(path: Path, split: str | None) -> list[Path]:
    if path.is_file():
        if not any(path.match(pattern) for pattern in _TABLES):
            raise ValueError(f"{path} is none of {', '.join(_TABLES)}: convert it to one of these")
        if split is not None:
            raise ValueError(f"{path} is one file: leave split={split!r} out, or pass its folder")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: check the path")
    if (path / "dataset_dict.json").is_file():
        names = sorted(f.parent.name for f in path.glob("*/state.json"))
        return _saved_files(path / _choose(path, names, split))
    if (path / "state.json").is_file():
        if split is not None:
            raise ValueError(f"{path} holds one data set without splits: leave split={split!r} out")
        return _saved_files(path)
    return _shards(path, split)


def _choose(path: Path, names: Sequence[str], split: str | None) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split is None or split not in names:
        raise ValueError(f"split={split!r} of {path}: choose one of {', '.join(names) or '(none found)'}")
    return split


def _saved_files(folder: Path) -> list[Path]:
    """The arrow files of `Dataset.save_to_disk`, in the order of its state.json."""
    try:
        state = read_json(folder / "state.json")
        names = [str(file["filename"]) for file in state["_data_files"]]
        moved = bool(state.get("_indices_data_files"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'state.json'} is not as save_to_disk writes it ({error!r}): save again") from None
    if moved:
        raise ValueError(f"{folder} was saved with an index file: save it again after flatten_indices()")
    # A name is looked up in the folder, never joined to it: it could point anywhere.
    files = {file.name: file for file in folder.iterdir()}
    missing = [name for name in names if name not in files]
    if missing or not names:
        raise ValueError(f"{folder} lacks {missing or 'data files'}, which its state.json names: copy the folder again")
    return [files[name] for name in names]


def _shards(root: Path, split: str | None) -> list[Path]:
    groups: dict[str, list[tuple[Path, re.Match[str]]]] = {}
    for file in sorted(f for pattern in _TABLES for f in root.rglob(pattern)):
        match = _SHARD.fullmatch(re.sub(r"\.(parquet|arrow|jsonl|jsonl\.gz)$", "", file.name))
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if match is None or hidden or match["table"].startswith(("cache-", "tmp")):
            continue  # what `datasets` and the hub client leave behind
        name = match["table"].rsplit("-", 1)[-1]
        name = file.parent.name if name.isdigit() else name  # train/0000.parquet
        groups.setdefault(name, []).append((file, match))
    if not groups:
        raise ValueError(f"{root} holds no {' or '.join(_TABLES)}: pass the file or the folder that does")
    chosen = groups[_choose(root, sorted(groups), split)]
    folders = sorted({str(file.parent) for file, _ in chosen})
    if len(folders) > 1:
        raise ValueError(f"{root} holds several data sets: pass one of {', '.join(folders)}")
    _check_shards(chosen)
    return [file for file, _ in chosen]


def _check_shards(chosen: Sequence[tuple[Path, re.Match[str]]]) -> None:
    """Raise unless each place of ``-00000-of-00002`` is there once."""
    places = [(int(match["place"]), int(match["count"])) for _, match in chosen if match["count"]]
    if not places and len({match["table"] for _, match in chosen}) == len(chosen):
        return
    counts = {count for _, count in places}
    if len(counts) != 1 or len(places) != len(chosen) or sorted(p for p, _ in places) != list(range(max(counts))):
        names = ", ".join(file.name for file, _ in chosen[:4])
        raise ValueError(f"{chosen[0][0].parent}: {names} .. are not the shards of one table: copy the missing ones")


def _arrow_rows(path: Path, parse: Callable[[dict[str, Any]], Any]) -> tuple[list[Any], DataReport]:
    """`read_rows` for a parquet or arrow file; rows count from 1."""
    records, rows, messages = [], 0, {}
    for batch in _batches(path):
        for row in batch:
            rows += 1
            try:
                records.append(parse(row))
            except RowError as error:
                messages.setdefault(error.reason, {})[f"{path}:{rows}"] = str(error)
    return records, DataReport(
        str(path),
        rows,
        len(records),
        dropped={reason: len(found) for reason, found in messages.items()},
        examples={reason: ": ".join(next(iter(found.items()))) for reason, found in messages.items()},
        places={reason: list(found)[:PLACES] for reason, found in messages.items()},
    )


def _batches(path: Path) -> Iterator[list[dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError(f'reading {path} needs pyarrow: pip install "rlhf_jax[data]"') from None
    try:
        if path.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as table:
                for batch in table.iter_batches(batch_size=1024):
                    yield batch.to_pylist()
            return
        with pyarrow.memory_map(str(path)) as file:
            for batch in _record_batches(file, pyarrow):
                yield batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read ({_first_line(error)}): copy or download it again") from None


def _record_batches(file: Any, pyarrow: Any) -> Iterator[Any]:
    """Batches of arrow's stream format, which `datasets` writes, or of its file format."""
    if file.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(file)
        yield from (reader.get_batch(k) for k in range(reader.num_record_batches))
        return
    # A stream that is cut between two batches would read as a shorter table.
    file.seek(max(file.size() - len(_END_OF_STREAM), 0))
    if file.read() != _END_OF_STREAM:
        raise OSError("it has no end mark, so it is cut off")
    file.seek(0)
    yield from pyarrow.ipc.open_stream(file)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


# ------------------------------------------------------------------------------------------------------- common


def _take_split(
    records: list[Any], report: DataReport, split: Split, test_fraction: float
) -> tuple[list[Any], DataReport]:
    if split not in ("train", "test") or not 0 <= test_fraction <= 1:
        raise ValueError(f'split={split!r} must be "train" or "test", test_fraction={test_fraction} between 0 and 1')
    damaged = [message for reason, message in report.examples.items() if reason not in _EXPECTED_DROPS]
    if damaged:
        raise ValueError(f"bad rows in {report.source}: {'; '.join(damaged)}")
    kept = [r for r in records if in_test_split(r.prompt, fraction=test_fraction) == (split == "test")]
    if not kept:
        raise ValueError(
            f"the {split} split of {report.source} is empty: choose another test_fraction than {test_fraction}"
        )
    return kept, dataclasses.replace(report, noted={**report.noted, f"records in the {split} split": len(kept)})


def _jsonl_texts(file: Path) -> tuple[list[PlainText], int]:
    documents, report = read_rows(file, lambda row: PlainText(check_text(row.get("text"), "text"), source=file.name))
    if report.dropped:
        raise ValueError(f"{report.rows - report.kept} bad rows: {'; '.join(report.examples.values())}")
    return documents, report.rows


def _txt_documents(file: Path, separator: str | None) -> tuple[list[PlainText], int]:
    try:
        text = read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is not UTF-8: save the file as UTF-8") from error
    parts = [text] if separator is None else text.split(separator)
    return [PlainText(part.strip(), source=file.name) for part in parts if part.strip()], len(parts)


def _folder(data_dir: str | os.PathLike[str], *names: str) -> Path:
    root = local_path("data_dir", data_dir)
    if not root.is_dir():
        raise ValueError(f"data_dir={root} is no folder: check the path, or leave it out to download")
    return next((root / name for name in names if (root / name).is_dir()), root)


def _download(repo: str, name: str) -> Path:
    try:
        return Path(huggingface_hub.hf_hub_download(repo, name, repo_type="dataset"))
    except OSError as error:  # every error of the hub client is one
        raise ValueError(
            f"cannot download {name} of {repo} ({type(error).__name__}: {_first_line(error)}): check the network, or "
            "put the file in a folder and pass data_dir (--data_dir=FOLDER)"
        ) from error
