"""Real people's data: HH-RLHF pairs, OpenAssistant rankings, running text. From a folder, or downloaded from the hub.

A dialogue becomes one prompt in one form, whatever the source: "Human: ..", blank line, "Assistant: ..", and so on,
ending in "Assistant:". Train and test are split by a hash of the first human turn, so no conversation is in both.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import huggingface_hub

from rlhf_jax.data.schema import (
    DataReport,
    Demonstration,
    PlainText,
    Ranking,
    RowError,
    check_text,
    read_bytes,
    read_rows,
)

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
    root = Path(path)
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


def read_english(data_dir: str | os.PathLike[str] | None = None) -> tuple[list[PlainText], DataReport]:
    """Running English for the pretraining mix, one document a file: novels, or two parts of WikiText-2.

    Args:
      data_dir: folder with a folder english_text or wikitext2, or with text files itself; None = download WikiText-2.

    Source: Merity et al. 2016, arXiv 1609.07843 (WikiText-2).
    """
    if data_dir is not None:
        return read_text(_folder(data_dir, *TEXT_FOLDERS))
    archive = _download(TEXT_REPO, TEXT_ARCHIVE)
    try:
        with zipfile.ZipFile(archive) as packed:
            names = [name for name in packed.namelist() if name.endswith((".train.raw", ".test.raw"))]
            texts = [(name, packed.read(name).decode("utf-8")) for name in sorted(names)]
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{archive} is damaged ({error}): download it again") from None
    return [PlainText(text, source=name) for name, text in texts], DataReport(TEXT_REPO, len(texts), len(texts))


def dialogue(turns: Sequence[tuple[str, str]]) -> str:
    r"""A prompt out of (role, text) turns; role "assistant" is the assistant, any other the human.

    >>> dialogue([("prompter", "Hello"), ("assistant", "Hi."), ("prompter", "Who are you?")])
    'Human: Hello\n\nAssistant: Hi.\n\nHuman: Who are you?\n\nAssistant:'
    """
    names = ["Assistant" if role == "assistant" else "Human" for role, _ in turns]
    said = [f"{name}: {text.strip()}" for name, (_, text) in zip(names, turns, strict=True)]
    return "\n\n".join([*said, "Assistant:"])


def in_test_split(prompt: str, *, fraction: float) -> bool:
    """Whether a dialogue belongs to the test split: sha256 of its first human turn, spaces and case aside."""
    return conversation_place(prompt) < fraction


def conversation_place(prompt: str) -> float:
    """A number in [0, 1) that all prompts of one conversation share: the sha256 of its first human turn."""
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
    root = _folder(data_dir, *(p.name for p in sorted(Path(data_dir).glob("oasst*"))))
    files = [*sorted(root.glob(derived)), *sorted(root.glob(trees))]
    if not files:
        raise ValueError(f"no {derived} or {trees} in {root}: pass the folder that holds OpenAssistant's file")
    return files[0]


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
    root = Path(data_dir)
    if not root.is_dir():
        raise ValueError(f"data_dir={root} is no folder: check the path, or leave it out to download")
    return next((root / name for name in names if (root / name).is_dir()), root)


def _download(repo: str, name: str) -> Path:
    try:
        return Path(huggingface_hub.hf_hub_download(repo, name, repo_type="dataset"))
    except OSError as error:  # every error of the hub client is one
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"cannot download {name} of {repo} ({type(error).__name__}: {reason}): check the network, or put the "
            "file in a folder and pass data_dir"
        ) from error
