"""HH-RLHF: dialogues as one text with the marks "Human:" and "Assistant:".

Other readers use these functions for texts in that format.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_jax.data.schema import (
    Conversation,
    DataReport,
    Demonstration,
    Ranking,
    RowError,
    check_text,
    read_rows,
)
from rlhf_jax.data.sources.hub import download, folder
from rlhf_jax.data.sources.rules import EXPECTED_DROPS

Split = Literal["train", "test"]
HH_SUBSETS = ("helpful-base", "helpful-rejection-sampled", "helpful-online", "harmless-base")
HH_REPO = "Anthropic/hh-rlhf"
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def read_hh(
    data_dir: str | os.PathLike[str] | None = None,
    *,
    split: Split,
    test_fraction: float = 0.1,
    subsets: Sequence[str] = HH_SUBSETS,
) -> tuple[list[Ranking], DataReport]:
    """Pairs of HH-RLHF as rankings of K = 2.

    A dialogue is cut at its last Assistant turn. Pairs whose two responses are identical, whose
    prompts differ, or with an empty response are dropped and counted.

    Args:
      data_dir: folder with ``<subset>*.jsonl.gz`` or ``<subset>/*.jsonl.gz`` (or with such a folder
        named hh_rlhf); None = download.
      split: "train" or "test", by a hash of the first human turn; the published file names do not
        decide.
      test_fraction: share of the conversations in the test split.
      subsets: which subsets to read; one that the folder lacks is skipped.

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
    return take_split(records, report, split, test_fraction)


def best_responses(rankings: Iterable[Ranking]) -> list[Demonstration]:
    """The best-ranked response of each ranking as a demonstration; of a tie, the first."""
    return [
        Demonstration(
            r.prompt, r.responses[r.ranks.index(min(k for k in r.ranks if k >= 0))], r.id, r.source
        )
        for r in rankings
    ]


def dialogue(turns: Sequence[tuple[str, str]]) -> str:
    r"""A prompt from (role, text) turns; role "assistant" is the assistant, any other the human.

    >>> dialogue([("prompter", "Hello"), ("assistant", "Hi."), ("prompter", "Who are you?")])
    'Human: Hello\n\nAssistant: Hi.\n\nHuman: Who are you?\n\nAssistant:'
    """
    names = ["Assistant" if role == "assistant" else "Human" for role, _ in turns]
    said = [f"{name}: {text.strip()}" for name, (_, text) in zip(names, turns, strict=True)]
    return "\n\n".join([*said, "Assistant:"])


def turns_of(transcript: str) -> list[dict[str, str]]:
    r"""The turns of a text with the marks of `dialogue`.

    The open last turn of the assistant is left out.

    >>> turns_of("Human: Hello\n\nAssistant: Hi.\n\nHuman: Who?\n\nAssistant:")[1:]
    [{'role': 'assistant', 'content': 'Hi.'}, {'role': 'user', 'content': 'Who?'}]
    """
    # The blank line lets the first mark match. With a group, `split` keeps the marks.
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + transcript.lstrip("\n"))
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[m], "content": t.strip()}
        for m, t in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return turns[:-1] if turns and not turns[-1]["content"] else turns


def cut_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The shared text of two transcripts up to their last "Assistant:", and the two answers.

    Raises:
      RowError: they differ before it.
    """
    # The last mark: earlier ones belong to the conversation that both share.
    (prompt, chosen), (other, rejected) = (text.rsplit(ASSISTANT, 1) for text in (chosen, rejected))
    if prompt != other:
        raise RowError("prompts differ", "the two dialogues differ before the last Assistant turn")
    return (prompt + ASSISTANT).lstrip("\n"), chosen, rejected


def in_test_split(prompt: Conversation, *, fraction: float) -> bool:
    """Whether a dialogue belongs to the test split.

    The sha256 of its first human turn decides; differences in spaces and case are ignored.
    """
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
    # The text after the first human mark, or the whole text where there is no mark.
    turn = ("\n\n" + prompt).split(HUMAN)[1] if HUMAN in "\n\n" + prompt else prompt
    key = " ".join(turn.split(ASSISTANT)[0].lower().split())
    # 48 bits, which a float represents exactly.
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def take_split(
    records: list[Any], report: DataReport, split: Split, test_fraction: float
) -> tuple[list[Any], DataReport]:
    """The records of one split, by the hash of their first human turn.

    Raises:
      ValueError: a row is damaged, or the split is empty.
    """
    if split not in ("train", "test") or not 0 <= test_fraction <= 1:
        raise ValueError(
            f'split={split!r} must be "train" or "test", test_fraction={test_fraction} between 0 '
            "and 1"
        )
    # Public data sets have rows of `EXPECTED_DROPS`; any other bad row means a damaged file.
    damaged = [
        message for reason, message in report.examples.items() if reason not in EXPECTED_DROPS
    ]
    if damaged:
        raise ValueError(f"bad rows in {report.source}: {'; '.join(damaged)}")
    kept = [
        r for r in records if in_test_split(r.prompt, fraction=test_fraction) == (split == "test")
    ]
    if not kept:
        raise ValueError(
            f"the {split} split of {report.source} is empty: choose another test_fraction than "
            f"{test_fraction}"
        )
    return kept, dataclasses.replace(
        report, noted={**report.noted, f"records in the {split} split": len(kept)}
    )


def _parse_hh(row: dict[str, Any], *, source: str) -> Ranking:
    texts = [check_text(row.get(name), name) for name in ("chosen", "rejected")]
    if any(ASSISTANT not in text for text in texts):
        raise RowError("no Assistant turn", 'a dialogue has no "Assistant:" turn: remove the pair')
    prompt, chosen, rejected = cut_transcripts(*texts)
    if chosen.strip() == rejected.strip():
        raise RowError("identical responses", "chosen and rejected are the same")
    if not chosen.strip() or not rejected.strip():
        raise RowError("empty response", "a response is empty")
    return Ranking(prompt, (chosen.strip(), rejected.strip()), (0, 1), source=source)


def _hh_files(
    data_dir: str | os.PathLike[str] | None, subsets: Sequence[str]
) -> list[tuple[Path, str]]:
    if data_dir is None:
        names = [
            (f"{subset}/{part}.jsonl.gz", subset)
            for subset in subsets
            for part in ("train", "test")
        ]
        return [(download(HH_REPO, name), subset) for name, subset in names]
    root = folder(data_dir, "hh_rlhf", "hh-rlhf")
    patterns = ("{}.jsonl*", "{}.*.jsonl*", "{}/*.jsonl*")
    files = [(f, s) for s in subsets for p in patterns for f in sorted(root.glob(p.format(s)))]
    if not files:
        raise ValueError(
            f"no {' or '.join(subsets)} .jsonl.gz in {root}: pass the folder that holds HH-RLHF"
        )
    # A file may match two of the patterns and is read once.
    return list(dict.fromkeys(files))
