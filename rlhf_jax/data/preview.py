"""Shows a few rows as the model will see them: tokens, loss mask, and where a response is scored.

The rows are encoded by the functions that the stages call (`rlhf_jax.data.text`), so the preview is
what is trained on: the template's control tokens, BOS and EOS, the boundary between prompt and
response, the loss mask. Without a tokenizer the texts are shown with their boundaries. `as_text` is
for a terminal, `rlhf_jax.data.preview_page` writes a page.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlhf_jax.data import text as text_lib
from rlhf_jax.data.schema import ABSENT, Demonstration, PlainText, Prompt, Ranking

if TYPE_CHECKING:
    import transformers

ROWS = 5
"""Rows of a preview."""
HEAD, TAIL = 240, 160
"""Tokens shown of the beginning and the end of a longer part."""
LETTERS = 6
"""Characters per token that are assumed without a tokenizer, to shorten long texts."""

Role = Literal["read", "trained", "special", "special trained", "note"]
"""How the model uses a token: read only or trained on, text or special. A note is not a token."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A token, several tokens that form one character, or a text where there is no tokenizer.

    Attributes:
      text: the decoded text; the name of a special token.
      role: how the model uses it.
      ids: its token ids.
    """

    text: str
    role: Role
    ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """A section of a row with its own heading, such as the prompt or one of the responses.

    Attributes:
      name: the heading.
      facts: the details beside it: numbers of tokens, rank, where it is scored.
      pieces: what the model reads.
    """

    name: str
    facts: str
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class PreviewRow:
    """One record as the model sees it; `problem` is the error where it cannot be encoded."""

    title: str
    parts: tuple[Part, ...] = ()
    problem: str = ""


def rows(
    records: Sequence[Any],
    tokenizer: transformers.PreTrainedTokenizerFast | None = None,
    *,
    count: int = ROWS,
    assistant_turns: str = "all",
) -> list[PreviewRow]:
    """Some of the records, evenly spaced and of every kind, as the stages encode them.

    Args:
      records: of any kinds.
      tokenizer: of the model to train; None shows texts and turns with their boundaries instead of
        tokens.
      count: number of rows.
      assistant_turns: as for `text.encode_demonstration`.
    """
    chosen = _chosen(records, count)
    show = _Texts(assistant_turns) if tokenizer is None else _Tokens(tokenizer, assistant_turns)
    return [_row(show, place, records[place], len(records)) for place in chosen]


def _chosen(records: Sequence[Any], count: int) -> list[int]:
    """Indices of at most `count` records: each kind in turn, evenly spaced within the kind."""
    kinds: dict[type, list[int]] = {}
    for place, record in enumerate(records):
        kinds.setdefault(type(record), []).append(place)
    shares = dict.fromkeys(kinds, 0)
    while sum(shares.values()) < min(count, len(records)):
        open_kinds = [kind for kind, places in kinds.items() if shares[kind] < len(places)]
        # One more row for the kind with the fewest so far, so that small kinds are shown too.
        shares[min(open_kinds, key=lambda kind: shares[kind])] += 1
    # Evenly spaced within a kind, its first record included.
    return sorted(
        kinds[kind][i * len(kinds[kind]) // share]
        for kind, share in shares.items()
        for i in range(share)
    )


def _row(show: _Texts | _Tokens, place: int, record: Any, total: int) -> PreviewRow:
    kind = type(record).__name__.lower().replace("plaintext", "document")
    name = f", id {visible(record.id)[:60]}" if record.id else ""
    title = f"{kind}: record {place + 1:,} of {total:,}{name}"
    try:
        return PreviewRow(title, tuple(show(record)))
    except ValueError as error:
        # As in training, a template may refuse a conversation. The other rows are still shown.
        return PreviewRow(title, problem=str(error))


# --------------------------------------------------------------------------------- with a tokenizer


class _Tokens:
    """Turns records into parts with the encoders of the stages."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast, assistant_turns: str):
        self.tokenizer, self.assistant_turns = tokenizer, assistant_turns
        added = tokenizer.added_tokens_decoder
        self.special = {
            i: str(t.content) for i, t in added.items() if t.special or t.content.strip()
        }
        # Some special tokens are named by the tokenizer but are not among the added ones.
        self.special |= dict(
            zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=False)
        )

    def __call__(self, record: Any) -> list[Part]:
        if isinstance(record, Demonstration):
            return [self._demonstration(record)]
        if isinstance(record, Ranking):
            return self._ranking(record)
        return [self._prompt(record) if isinstance(record, Prompt) else self._document(record)]

    def _demonstration(self, record: Demonstration) -> Part:
        ids, mask = text_lib.encode_demonstration(
            self.tokenizer, record.prompt, record.response, assistant_turns=self.assistant_turns
        )
        facts = f"{_tokens(len(ids))}, {sum(mask):,} trained on"
        return Part("prompt and response", facts, self._pieces(ids, mask))

    def _ranking(self, record: Ranking) -> list[Part]:
        ids = text_lib.encode_prompt(self.tokenizer, record.prompt)
        parts = [
            Part("prompt", f"{_tokens(len(ids))}, read once for all responses", self._pieces(ids))
        ]
        # Ranked responses first, best first; ties and unranked ones stay in the order of the file.
        order = sorted(
            range(len(record.ranks)), key=lambda k: (record.ranks[k] == ABSENT, record.ranks[k], k)
        )
        for k in order:
            if record.ranks[k] == ABSENT:
                parts.append(Part(f"response {k + 1}", "not ranked: the model does not see it", ()))
                continue
            said = text_lib.encode_answer(self.tokenizer, record.prompt, record.responses[k])
            facts = f"rank {record.ranks[k] + 1}, {_tokens(len(said))}, scored at the last one"
            parts.append(
                Part(f"response {k + 1}", facts, (*self._pieces(said), Piece("score", "note")))
            )
        return parts

    def _prompt(self, record: Prompt) -> Part:
        ids = text_lib.encode_prompt(self.tokenizer, record.prompt)
        ends = [self._name(i) for i in text_lib.stop_ids(self.tokenizer, [record.prompt])]
        facts = f"{_tokens(len(ids))}; a response ends with {' or '.join(ends)}"
        return Part("prompt", facts, (*self._pieces(ids), Piece("response", "note")))

    def _document(self, record: PlainText) -> Part:
        eos: Any = self.tokenizer.eos_token_id
        ids = text_lib.encode_document(self.tokenizer, record.text, eos_id=eos)
        facts = f"{_tokens(len(ids))}; all but the first are trained on"
        return Part("document", facts, self._pieces(ids, [place > 0 for place in range(len(ids))]))

    def _name(self, i: int) -> str:
        return visible(str(self.tokenizer.convert_ids_to_tokens(i)))

    def _pieces(self, ids: Sequence[int], mask: Sequence[bool] | None = None) -> tuple[Piece, ...]:
        ids, mask = [int(i) for i in ids], [False] * len(ids) if mask is None else list(mask)
        # A few tokens more are shown in full, as the note about what is left out takes a line as
        # well.
        if len(ids) <= HEAD + TAIL + 20:
            return tuple(self._between(ids, mask, 0, len(ids)))
        left_out = len(ids) - HEAD - TAIL
        return (
            *self._between(ids, mask, 0, HEAD),
            Piece(f"{left_out:,} tokens, {sum(mask[HEAD:-TAIL]):,} trained on", "note"),
            *self._between(ids, mask, len(ids) - TAIL, len(ids)),
        )

    def _between(
        self, ids: Sequence[int], mask: Sequence[bool], start: int, end: int
    ) -> list[Piece]:
        """The pieces of ``ids[start:end]``.

        Tokens that are parts of one character (byte-level BPE) are joined into one piece.
        """
        pieces: list[Piece] = []
        while start < end:
            if ids[start] in self.special:
                role = "special trained" if mask[start] else "special"
                pieces.append(Piece(self.special[ids[start]], role, (ids[start],)))
                start += 1
                continue
            stop = start + 1
            said = self._said(ids, start, stop)
            # U+FFFD in the text means an incomplete character. A text may contain U+FFFD itself, so
            # a piece stops growing at 8 tokens.
            while (
                "\ufffd" in said
                and stop < min(end, start + 8)
                and self._goes_on(ids, mask, start, stop)
            ):
                stop += 1
                said = self._said(ids, start, stop)
            role = "trained" if mask[start] else "read"
            pieces.append(Piece(said, role, tuple(ids[start:stop])))
            start = stop
        return pieces

    def _goes_on(self, ids: Sequence[int], mask: Sequence[bool], start: int, stop: int) -> bool:
        return mask[stop] == mask[start] and ids[stop] not in self.special

    def _said(self, ids: Sequence[int], start: int, stop: int) -> str:
        """The text of ``ids[start:stop]`` with its leading space.

        Some decoders drop a space at the beginning of a text, so the ids are decoded after the id
        before them, whose text is then removed.
        """
        before = [ids[start - 1]] if start and ids[start - 1] not in self.special else []
        first, both = (self._decoded([*before, *more]) for more in ([], ids[start:stop]))
        return (
            both[len(first) :]
            if before and both.startswith(first)
            else self._decoded(ids[start:stop])
        )

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def _tokens(count: int) -> str:
    return f"{count:,} token" + "s" * (count != 1)


# ------------------------------------------------------------------------------ without a tokenizer


class _Texts:
    """Turns records into parts by their texts alone, when there is no tokenizer."""

    def __init__(self, assistant_turns: str = "all"):
        self.assistant_turns = assistant_turns

    def __call__(self, record: Any) -> list[Part]:
        if isinstance(record, PlainText):
            return [
                Part("document", _characters(record.text), self._pieces(record.text, "trained"))
            ]
        trained = (
            "assistant"
            if isinstance(record, Demonstration) and self.assistant_turns == "all"
            else ""
        )
        parts = self._turns(record.prompt, trained)
        if isinstance(record, Demonstration):
            facts = f"{_characters(record.response)}, trained on"
            parts.append(Part("response", facts, self._pieces(record.response, "trained")))
        if isinstance(record, Ranking):
            order = sorted(
                range(len(record.ranks)),
                key=lambda k: (record.ranks[k] == ABSENT, record.ranks[k], k),
            )
            for k in order:
                rank = "not ranked" if record.ranks[k] == ABSENT else f"rank {record.ranks[k] + 1}"
                facts = f"{rank}, {_characters(record.responses[k])}"
                parts.append(
                    Part(f"response {k + 1}", facts, self._pieces(record.responses[k], "read"))
                )
        return parts

    def _turns(self, prompt: Any, trained: str) -> list[Part]:
        """The turns before the answer; those of the role `trained` are trained on too."""
        if isinstance(prompt, str):
            return [
                Part("prompt", f"{_characters(prompt)}, as a text", self._pieces(prompt, "read"))
            ]
        parts = []
        for turn in prompt:
            role: Role = "trained" if turn.role == trained else "read"
            facts = _characters(turn.content) + ", trained on" * (role == "trained")
            parts.append(Part(turn.role, facts, self._pieces(turn.content, role)))
        return parts

    def _pieces(self, text: str, role: Role) -> tuple[Piece, ...]:
        head, tail = HEAD * LETTERS, TAIL * LETTERS
        if len(text) <= head + tail + 100:
            return (Piece(text, role),)
        left_out = Piece(f"{len(text) - head - tail:,} characters", "note")
        return Piece(text[:head], role), left_out, Piece(text[-tail:], role)


def _characters(text: str) -> str:
    return f"{len(text):,} character" + "s" * (len(text) != 1)


# --------------------------------------------------------------------------------------------- text


def visible(text: str) -> str:
    r"""Escapes the characters of a text that are invisible or control how it is displayed.

    These are control characters, direction marks, zero-width characters, soft hyphens, unpaired
    surrogates, private and unassigned characters. Line breaks are escaped too.

    >>> visible("a\tb\u202ec\n")
    'a\\tb\\u202ec\\n'
    """
    return "".join(_escaped(c) if _is_hidden(c) else c for c in text)


def _is_hidden(c: str) -> bool:
    # The letters below are fillers of Hangul: letters by category, but displayed as nothing.
    return (
        unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        or c in "\u115f\u1160\u3164\uffa0"
    )


def _escaped(c: str) -> str:
    return {"\t": "\\t", "\n": "\\n", "\r": "\\r"}.get(c) or (
        f"\\u{ord(c):04x}" if ord(c) < 2**16 else f"\\U{ord(c):08x}"
    )


_COLOURS: dict[str, str] = {
    "read": "", "trained": "4;32", "special": "1;35", "special trained": "1;4;35", "note": "2",
}  # fmt: skip
NO_MODEL = (
    "Texts only: --model=FOLDER shows the tokens, with the template, the ends and the loss mask."
)


def colours(stream: Any) -> bool:
    """Whether `stream` is a terminal with colours, and NO_COLOR is unset (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def as_text(
    shown: Sequence[PreviewRow], *, tokens: bool, colour: bool = False, ascii_only: bool = False
) -> str:
    """The rows as text for a terminal or a file.

    Without colours, brackets mark what is trained on.

    Args:
      shown: from `rows`.
      tokens: whether they were encoded; otherwise the last line explains how to see tokens.
      colour: use ANSI colours.
      ascii_only: for a stream that can write ASCII alone.
    """
    names = ("newline", "open", "close", "special", "special end", "note", "score")
    marks: dict[str, str] = dict(
        zip(names, ("\\n", "[[", "]]", "{", "}", "..", "<- score"), strict=True)
    )
    if not ascii_only:
        letters = ("\u23ce", "\u27e6", "\u27e7", "\u2039", "\u203a", "\u2026", "\u25c2 score")
        marks = dict(zip(names, letters, strict=True))
    paint = _painted if colour else _bracketed
    lines: list[str] = []
    if tokens:
        trained = paint([Piece("like this", "trained")], marks)
        special = [f"{paint([piece], marks)} {piece.ids[0]}" for piece in special_pieces(shown)]
        lines = [
            f"Trained on: {trained}. Line breaks: {marks['newline']}. Special tokens, and their "
            f"ids: {', '.join(special) or 'none'}."
        ]
    for row in shown:
        lines += ["", _strong(row.title, colour)]
        lines += [f"  cannot be encoded: {visible(row.problem)}"] if row.problem else []
        for part in row.parts:
            lines.append(_faint(f"  {part.name} ({part.facts})", colour))
            body = paint(part.pieces, marks)
            lines += [f"    {line}" for line in body.split("\n")] if part.pieces else []
    lines += [] if tokens else ["", NO_MODEL]
    said = "\n".join(lines).lstrip("\n") + "\n"
    # Texts may hold any letters, which are escaped after the marks were chosen.
    return said.encode("ascii", "backslashreplace").decode() if ascii_only else said


def special_pieces(shown: Sequence[PreviewRow]) -> list[Piece]:
    """The distinct special tokens of the rows, as pieces that are not trained on."""
    pieces = (piece for row in shown for part in row.parts for piece in part.pieces)
    return list(
        {p.ids: Piece(p.text, "special", p.ids) for p in pieces if "special" in p.role}.values()
    )


def _written(piece: Piece, marks: dict[str, str]) -> str:
    """The text of a piece with invisible characters escaped; a line break is marked and kept."""
    if piece.role == "note":
        return (
            f" {marks['score']}"
            if piece.text == "score"
            else f" {marks['note']} {piece.text} {marks['note']} "
        )
    # The mark is added to each line but the last one, which no line break follows.
    return "\n".join(visible(line) + marks["newline"] * (i < piece.text.count("\n"))
                     for i, line in enumerate(piece.text.split("\n")))  # fmt: skip


def _painted(pieces: Sequence[Piece], marks: dict[str, str]) -> str:
    said = ""
    for role, group in itertools.groupby(pieces, key=lambda piece: piece.role):
        code = _COLOURS[role]
        lines = "".join(_written(piece, marks) for piece in group).split("\n")
        said += "\n".join(f"\x1b[{code}m{line}\x1b[0m" if code and line else line for line in lines)
    return said


def _bracketed(pieces: Sequence[Piece], marks: dict[str, str]) -> str:
    said, inside = "", False
    for piece in pieces:
        trained = piece.role in ("trained", "special trained")
        # Notes lie outside of the text and neither open nor close a bracket.
        if trained != inside and piece.role != "note":
            said += marks["open"] if trained else marks["close"]
            inside = trained
        special = "special" in piece.role
        said += marks["special"] * special + _written(piece, marks) + marks["special end"] * special
    return said + marks["close"] * inside


def _strong(text: str, colour: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if colour else text


def _faint(text: str, colour: bool) -> str:
    return f"\x1b[2m{text}\x1b[0m" if colour else text
