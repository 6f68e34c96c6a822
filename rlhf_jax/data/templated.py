r"""Texts that a chat template wrote before: noticed, and told.

Many published data sets hold conversations as one finished text,
``<|im_start|>user\nHi<|im_end|>\n..``. Text of the data is always encoded as ordinary text, so that
nobody can write a control token into a prompt. A model trained on such rows learns to spell the
markers letter by letter, and at generation it never meets the tokens it was trained on. The rows
are right as data and wrong as training data, so they are kept, counted and named.

Looked for are the special tokens of the tokenizer in use, and the markers of well-known chat
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
"""What such rows are counted under in a `DataReport`."""

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
    # Llama 2 and Vicuna. Elsewhere in a text <s>..</s> is HTML for struck-out words.
    r"<s>(?<![\s\S]<s>)|</s>(?=\s*(?:\Z|<s>|USER:|Human:|###|\[INST\]))",
)
"""Regular expressions of control tokens that chat templates write. Each alternative begins with one
letter, by which the search skips through ordinary text. Plain words such as ``Human:`` or
``### Instruction:`` are none: they are text in every tokenizer, and a form of prompt of their
own."""

_SHOWN = 4
"""Names of markers and numbers of rows in a note at most."""


def pattern(tokenizer: transformers.PreTrainedTokenizerFast | None = None) -> re.Pattern[str]:
    """Finds control tokens of chat templates in a text.

    Those are `MARKERS` and the special tokens of `tokenizer`.

    A special token that is a bare word, a letter or a space could be anybody's text and is not
    looked for.
    """
    names = set() if tokenizer is None else set(_special_names(tokenizer))
    own = [re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name))]
    return re.compile("|".join([*own, *MARKERS]))


def _special_names(tokenizer: transformers.PreTrainedTokenizerFast) -> Iterator[str]:
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
    """Indices of the records of which a text holds a control token of a chat template.

    >>> from rlhf_jax.data.schema import Prompt
    >>> templated_rows([Prompt("[INST] Hi [/INST]"), Prompt("Is a < b, or b <| a?"), Prompt("Hi<|im_end|>")])
    [0, 2]
    """  # noqa: E501
    search = pattern(tokenizer).search
    return [i for i, record in enumerate(records) if any(map(search, record_texts(record)))]


def markers_in(records: Iterable[Any], search: re.Pattern[str]) -> list[str]:
    """The first few different markers that the records' texts hold, in the order they come."""
    found: dict[str, None] = {}
    for record in records:
        for text in record_texts(record):
            for match in search.finditer(text):
                found[match[0].strip()] = None
        if len(found) >= _SHOWN:
            break
    return list(found)[:_SHOWN]


def note(
    records: Sequence[Any],
    report: DataReport,
    tokenizer: transformers.PreTrainedTokenizerFast | None = None,
) -> str | None:
    """One line that tells of the rows a chat template wrote before; None where there is none.

    Args:
      records: what ``read_jsonl(.., special_tokens=pattern(tokenizer))`` returned.
      report: the report it returned beside them.
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
    """What becomes of the markers.

    They become ordinary text, or the token itself where the tokenizer does not call it special.
    """
    if tokenizer is None:
        return "In a text they are ordinary letters to the model."
    single = [name for name in names if len(chat.encode_text(tokenizer, name)) == 1]
    if len(single) == len(names):
        return "This tokenizer reads them as tokens, but the prompt's own ending follows them."
    return "In a text they are ordinary letters to the model: it would learn to spell them."
