"""TRL's forms: ``prompt, chosen, rejected``, ``prompt, completion`` and ``prompt``.

Each column may have texts or messages.

A prompt is never guessed. It is the column `prompt`, or the text before the last "Assistant:" of
two transcripts, or the turns that two lists of messages share. `survey` goes over all rows of a
table once: whether the answers repeat their prompt is a property of the table, which one short row
does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from rlhf_jax.data.schema import RowError
from rlhf_jax.data.sources.messages import (
    answer_to,
    as_turns,
    demonstration_of,
    last_text,
    pair_of,
    prompt_of,
    turns,
)
from rlhf_jax.data.sources.row import Draft, Row, as_number
from rlhf_jax.data.sources.transcripts import ASSISTANT, HUMAN, cut_transcripts, turns_of

Repeats = Literal["never", "maybe", "likely", "surely", "one"]
LIKELY_WORDS = 3
"""Words from which a prompt at the start of every answer is no coincidence; "Hello" before "Hello
there" is one."""
LIKELY_CHARACTERS = 16
"""The same for languages without spaces."""

QUESTIONS = (
    "question",
    "instruction",
    "query",
    "input",
    "problem",
    "context",
    "user",
    "human",
    "text",
)
"""Columns that the error about a missing prompt proposes; the user has to choose one."""


def proposed(row: Row) -> str:
    """The column that the error about a missing prompt proposes, or "NAME" where none fits."""
    found = {name.strip().lower(): name for name in row.columns()}
    return next((found[name] for name in ("prompt", *QUESTIONS) if name in found), "NAME")


def is_transcript(text: str) -> bool:
    """Whether a text has an assistant's turn with the mark of HH-RLHF, with any line ends."""
    return ASSISTANT in "\n\n" + _plain(text).lstrip("\n")


def pairs(rows: Sequence[Row]) -> Callable[[Row], Draft]:
    """The parser of a table of pairs."""
    # Over the whole table, since one short row does not show whether answers repeat the prompt.
    found = survey(rows, ("chosen", "rejected"))
    return lambda row: pair(row, found)


def completions(rows: Sequence[Row]) -> Callable[[Row], Draft]:
    """The parser of a table of prompts with one answer each."""
    found = survey(rows, ("completion",))
    return lambda row: completion(row, found)


def survey(rows: Sequence[Row], names: Sequence[str]) -> set[str]:
    """How the answers of a table begin: which of `Repeats` its rows show."""
    found: set[str] = set()
    for row in rows:
        prompt, answers = (
            last_text(row.values.get("prompt")),
            [row.values.get(name) for name in names],
        )
        if prompt and all(isinstance(answer, str) for answer in answers):
            found.add(repeats(prompt, [str(answer) for answer in answers]))
    return found


def repeats(prompt: str, answers: Sequence[str]) -> Repeats:
    r"""Whether answers are whole texts that begin with their prompt.

    "surely" and "one" (of two) are for a prompt that is a transcript, which no answer repeats by
    chance.

    >>> repeats("Human: Hi\n\nAssistant:", ["Human: Hi\n\nAssistant: Hello."])
    'surely'
    >>> repeats("Name a bird.", ["Name a bird. A wren.", "Name a bird. A hat."])
    'likely'
    >>> repeats("Hello", ["Hello there!", "Hello you!"]), repeats("Hello", ["Hello!", "Hello."])
    ('maybe', 'never')
    """
    prompt = _plain(prompt).strip()
    # What follows the prompt shows whether the answer repeats it or only begins alike.
    rests = [_plain(answer).lstrip().removeprefix(prompt) for answer in answers]
    begin = [_plain(answer).lstrip().startswith(prompt) for answer in answers]
    if not prompt or not any(begin):
        return "never"
    if prompt.endswith(ASSISTANT.strip()):
        return "surely" if all(begin) else "one"
    # "Hello" continues in "Hello!", but "Name a bird." is complete.
    ends_whole = not prompt[-1].isalnum() or all(rest[:1].isspace() or not rest for rest in rests)
    if not all(begin) or not ends_whole:
        return "never"
    return (
        "likely"
        if len(prompt.split()) >= LIKELY_WORDS or len(prompt) >= LIKELY_CHARACTERS
        else "maybe"
    )


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff")


def pair(row: Row, found: set[str] | None = None) -> Draft:
    """A ranking of two; `found` is the result of `survey`, or None for a row by itself.

    Raises:
      RowError: a column is missing, there is no prompt, or the answers are the same.
    """
    row.refuse_more_than_text()
    prompt = turns(row, "prompt", row.take("prompt")) if row.has("prompt") else None
    if prompt is None:
        # An empty column counts as read.
        row.take("prompt")
    chosen, rejected = (turns(row, name, row.needed(name)) for name in ("chosen", "rejected"))
    _note_scores(row)
    if prompt is not None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, (chosen, rejected) = _without_prompt(row, prompt, [chosen, rejected], found)
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _cut(row, chosen, rejected)
        return pair_of(row, prompt, chosen, rejected)
    (first, chosen), (second, rejected) = (
        answer_to(row, prompt, said) for said in (chosen, rejected)
    )
    # One answer may be a text and the other a conversation.
    if isinstance(first, list) != isinstance(second, list):
        first, second = (as_turns(one) if isinstance(one, str) else one for one in (first, second))
    if first != second:
        raise RowError("prompts differ", "the two conversations differ before the last turn")
    return pair_of(row, first, chosen, rejected)


def completion(row: Row, found: set[str] | None = None) -> Draft:
    """A demonstration: ``{prompt, completion}``, or ``{messages}`` whose last turn is the response.

    Raises:
      RowError: a column is missing, the row is labelled as good or bad, or the last turn is not the
        assistant's.
    """
    row.refuse_more_than_text()
    if not row.has("completion") and row.has("messages"):
        prompt, answer = answer_to(row, None, turns(row, "messages", row.take("messages")))
        return demonstration_of(row, prompt, answer)
    if row.values.get("label") is not None and row.has("completion"):
        raise RowError(
            "unpaired",
            "field 'label' says whether one answer is good (TRL's unpaired preference): that is no "
            "ranking, so use pairs or scores; good answers alone (filter them first) are "
            "demonstrations with --columns label=",
        )  # fmt: skip
    prompt = turns(row, "prompt", row.take("prompt")) if row.has("prompt") else None
    said = turns(row, "completion", row.needed("completion"))
    if prompt is not None and isinstance(said, str):
        prompt, (said,) = _without_prompt(row, prompt, [said], found)
    prompt, answer = answer_to(row, prompt, said)
    return demonstration_of(row, prompt, answer)


def prompt_only(row: Row) -> Draft:
    """A prompt, as a text or a list of messages.

    Raises:
      RowError: it is missing, or neither.
    """
    row.refuse_more_than_text()
    return prompt_of(row, turns(row, "prompt", row.needed("prompt")))


def _cut(row: Row, chosen: str, rejected: str) -> tuple[str, str, str]:
    """The prompt of two transcripts, and their answers."""
    marked = [is_transcript(text) for text in (chosen, rejected)]
    if all(marked):
        return cut_transcripts(chosen, rejected)
    if any(marked):
        raise RowError(
            "prompts differ",
            'one of the two texts is a transcript with "Assistant:", the other is not',
        )
    if row.values.get("prompt") == "":
        raise RowError("empty prompt", "field 'prompt' is empty: fill it in or remove the row")
    raise RowError(
        "no prompt",
        f"no column 'prompt' and no transcript: the row has {', '.join(sorted(row.columns()))}; "
        f"name the column that holds the prompt with --columns prompt={proposed(row)} (in Python "
        f"columns={{'prompt': {proposed(row)!r}}})",
    )


def _without_prompt(
    row: Row, given: str | list[Any], answers: list[str], found: set[str] | None
) -> tuple[str | list[Any], list[str]]:
    """The prompt and the answers, without a prompt at their beginning."""
    prompt = last_text(given)
    # A prompt that ends with the assistant's mark is the beginning of the answers, not one turn.
    opens = _plain(prompt).rstrip().endswith(ASSISTANT.strip())
    if isinstance(given, str) and all(map(_is_whole, answers)) and not opens:
        return _from_transcripts(row, prompt, answers)
    return given, _cut_prompt(row, prompt, answers, found)


def _is_whole(text: str) -> bool:
    """Whether a text is a transcript from its first turn on."""
    return ("\n\n" + text.lstrip("\n")).startswith(HUMAN) and is_transcript(text)


def _from_transcripts(row: Row, prompt: str, answers: list[str]) -> tuple[str, list[str]]:
    """The prompt of whole transcripts beside a column that repeats one of their human turns.

    Raises:
      RowError: no human turn is the prompt beside them, or the transcripts differ.
    """
    context, first, last = cut_transcripts(answers[0], answers[-1])
    humans = [turn["content"] for turn in turns_of(context) if turn["role"] == "user"]
    if prompt.strip() not in (*humans, context.removesuffix(ASSISTANT).strip()):
        raise RowError(
            "transcript of another prompt",
            "the answers are whole transcripts, and none of their human turns is the prompt "
            f"{prompt[:30]!r}: leave its column aside with --columns prompt= (in Python "
            "columns={'prompt': ''}), or write the answers alone",
        )
    row.note("prompt cut from whole text")
    return context, [first, last][: len(answers)]


def _cut_prompt(row: Row, prompt: str, answers: list[str], found: set[str] | None) -> list[str]:
    """The answers without the prompt at their beginning, where it is certainly a repetition."""
    kind = repeats(prompt, answers)
    found = {kind} if found is None else found
    if kind == "one" and len(answers) > 1:
        raise RowError(
            "prompt in one text",
            "the prompt begins one of the two texts only: write the answers alone in both columns",
        )
    # "maybe" is what short prompts show anywhere, so it says nothing about the table.
    elsewhere = found - {"maybe"}
    if kind == "maybe" and not elsewhere and len(answers) > 1:
        raise RowError(
            "prompt before both",
            f"both answers begin with the prompt {prompt[:30]!r}, and no other row tells whether "
            "it is repeated there: remove it from the answers, or add rows",
        )
    # A single answer may well begin by repeating the question, but if all answers of a table do,
    # they are whole texts.
    table_repeats = bool(found) and found <= {"surely", "likely", "maybe"}
    if (
        kind == "surely"
        or (kind == "likely" and (len(answers) > 1 or table_repeats))
        or (kind == "maybe" and elsewhere and table_repeats)
    ):
        row.note("prompt cut from whole text")
        return [answer.lstrip()[len(prompt.strip()) :] for answer in answers]
    if kind in ("maybe", "likely") or any(
        answer.lstrip().startswith(prompt.strip()) for answer in answers
    ):
        row.note("answer begins with the prompt")
    return answers


def _note_scores(row: Row) -> None:
    """Note a pair whose scores contradict its columns; the scores are left aside in any case."""
    scores = [row.values.get(name) for name in ("score_chosen", "score_rejected")]
    try:
        # Tables may store numbers as texts, and these are only compared.
        chosen, rejected = (as_number(score, "score", texts=True) for score in scores)
    except RowError:
        return
    if chosen is not None and rejected is not None and chosen <= rejected:
        row.note("scores are equal" if chosen == rejected else "scores say otherwise")
