r"""Detects and reports texts that a chat template has already been applied to.

Many published data sets store a conversation as one finished text,
``<|im_start|>user\nHi<|im_end|>\n..``. Text of the data is always encoded as ordinary text, so that
a user cannot write a control token into a prompt. A model trained on such rows learns to spell the
markers letter by letter, and at generation it never meets the tokens it was trained on. The rows
are valid as data and wrong for training, so they are kept, counted and reported.

The search is for the special tokens of the tokenizer in use and for the markers of well-known chat
templates, because data are often written for another model than the one that is trained on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_jax.data import chat
from rlhf_jax.data.schema import DataReport, record_texts

if TYPE_CHECKING:
    import transformers

REASON = "special token in text"
"""The reason that such rows are counted under in a `DataReport`."""

MARKERS = (
    # ChatML, Llama 3, Phi, Zephyr, OpenAssistant, Command R, Granite, Harmony, EOS of GPT-2
    r"<\|[^\s<>|]{1,40}\|>",
    r"<[|\uff5c][^<>|\uff5c]{1,40}\uff5c>",  # DeepSeek, whose bars are full-width
    r"<\|turn>|<turn\|>",  # Gemma 4
    r"<(?:start|end)_of_turn>",  # Gemma
    r"\[/?INST\]|<</?SYS>>",  # Llama 2, Mistral
    r"\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|TOOL_CONTENT)\]",  # Mistral
    r"\[[gs]?MASK\]<sop>",  # ChatGLM
    r"</?im_(?:start|end)>|<end_of_utterance>|<eo[ah]>",  # variants of ChatML, Idefics, InternLM
    r"<extra_id_[01]>(?:System|User|Assistant)|<SPECIAL_1[0-2]>",  # Nemotron
    # Command R, Baichuan, MiniCPM
    r"<(?:BOS|EOS)_TOKEN>|<reserved_10[67]>|<\uff5c?\u7528\u6237\uff5c?>",
    r"<bos>(?<![\s\S]<bos>)|<eos>\s*\Z",  # Gemma, as the frame of a whole text
    # Llama 2 and Vicuna. In the middle of a text <s>..</s> is HTML for struck-out words.
    r"<s>(?<![\s\S]<s>)|</s>(?=\s*(?:\Z|<s>|USER:|Human:|###|\[INST\]))",
)
"""Regular expressions of control tokens that chat templates write. Each alternative begins with a
literal character, which lets the search skip through ordinary text. Plain words such as ``Human:``
or ``### Instruction:`` are left out: they are text in every tokenizer, and a prompt format of their
own."""

_SHOWN = 4
"""Most markers and most row numbers that a note names."""


def pattern(tokenizer: transformers.PreTrainedTokenizerFast | None = None) -> re.Pattern[str]:
    """A pattern of the control tokens of chat templates: `MARKERS` and the tokenizer's own.

    A special token that is a bare word, a letter or a space may be ordinary text and is left out.
    """
    names = set() if tokenizer is None else set(_special_names(tokenizer))
    # Longer names first, as the first alternative that matches wins.
    own = [re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name))]
    return re.compile("|".join([*own, *MARKERS]))


def _special_names(tokenizer: transformers.PreTrainedTokenizerFast) -> Iterator[str]:
    # Both lists, as an added token may be special without one of the roles that the other names.
    added = [
        str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special
    ]
    for name in [*added, *map(str, tokenizer.all_special_tokens)]:
        name = name.strip()
        if len(name) > 2 and not name.isalnum():
            yield name


def templated_rows(
    records: Iterable[Any], tokenizer: transformers.PreTrainedTokenizerFast | None = None
) -> list[int]:
    """Indices of the records that have a control token of a chat template in a text.

    >>> from rlhf_jax.data.schema import Prompt
    >>> templated_rows([Prompt("[INST] Hi [/INST]"), Prompt("Is a < b, or b <| a?"), Prompt("Hi<|im_end|>")])
    [0, 2]
    """  # noqa: E501
    search = pattern(tokenizer).search
    return [i for i, record in enumerate(records) if any(map(search, record_texts(record)))]


def markers_in(records: Iterable[Any], search: re.Pattern[str]) -> list[str]:
    """The first few different markers in the records' texts, in order of appearance."""
    found: dict[str, None] = {}
    for record in records:
        for text in record_texts(record):
            for match in search.finditer(text):
                found[match[0].strip()] = None
        # Enough for the note; the rows themselves were counted before.
        if len(found) >= _SHOWN:
            break
    return list(found)[:_SHOWN]


def note(
    records: Sequence[Any],
    report: DataReport,
    tokenizer: transformers.PreTrainedTokenizerFast | None = None,
) -> str | None:
    """A one-line warning about rows that a chat template has been applied to; None without such.

    Args:
      records: returned by ``read_jsonl(.., special_tokens=pattern(tokenizer))``.
      report: returned by the same call.
      tokenizer: the same as there.
    """
    count = report.noted.get(REASON, 0)
    if not count:
        return None
    names = markers_in(records, pattern(tokenizer))
    lines = [place.rpartition(":")[2] for place in report.places.get(REASON, [])]
    lines += [".."] * (count > len(lines))
    return (
        f"WARNING: {count:,} of {report.kept:,} rows hold names of special tokens, as if a chat "
        f"template had written their text before ({' '.join(names)} in "
        f"{report.source}:{', '.join(lines)}). {_meaning(names, tokenizer)} Give such "
        "conversations as messages, which the template writes again, or strip the markers."
    )


def _meaning(names: Sequence[str], tokenizer: transformers.PreTrainedTokenizerFast | None) -> str:
    """What the tokenizer makes of the markers, as a sentence.

    They become ordinary text, or the token itself where the tokenizer does not mark it special.
    """
    if tokenizer is None:
        return "In a text they are ordinary letters to the model."
    single = [name for name in names if len(chat.encode_text(tokenizer, name)) == 1]
    if len(single) == len(names):
        return "This tokenizer reads them as tokens, but the prompt's own ending follows them."
    return "In a text they are ordinary letters to the model: it would learn to spell them."
