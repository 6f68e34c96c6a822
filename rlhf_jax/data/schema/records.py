"""The records that people write: one definition of each, for files and for programs.

They are immutable and compare by their fields; `msgspec.structs.replace` makes a changed copy.
`parse` converts them from and to rows of JSON, and `json_schema` publishes that form. `rules` has
the constraints that a type cannot express.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

ABSENT = -1
"""The rank of a response that was not ranked."""


ROLES = ("system", "user", "assistant")
"""The roles of a `Message`."""


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all records: immutable, and an unknown field is an error."""


class Message(_Record, frozen=True):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: Annotated[str, Meta(extra_json_schema={"enum": list(ROLES)})]
    content: str


Conversation = str | tuple[Message, ...]
"""The prompt of a response: a text, or the turns before it."""


class Demonstration(_Record, frozen=True):
    """A prompt and the answer a labeler wrote for it (supervised fine-tuning).

    `user` and `organization` submitted the prompt; splits are made by one of them. `time` is ISO
    8601, as given.
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


class Ranking(_Record, frozen=True):
    """K responses to one prompt, ranked by one labeler.

    In Python `ranks` starts at 0 for the best response, is equal for ties and -1 (`ABSENT`) for a
    response that was not ranked; in a file it starts at 1, with null. `policies` and `temperatures`
    say which model wrote each response and how it was sampled. Of two rankings of the same
    responses by the same labeler the one with the higher `revision` is kept.
    """

    prompt: Conversation
    responses: Annotated[tuple[str, ...], Meta(min_length=2)]
    ranks: tuple[int, ...]
    id: str | None = None
    source: str | None = None
    use_case: str | None = None
    labeler: str | None = None
    labeler_group: str | None = None
    policies: tuple[str, ...] | None = None
    temperatures: tuple[Annotated[float, Meta(ge=0, le=1e6)], ...] | None = None
    user: str | None = None
    organization: str | None = None
    time: str | None = None
    revision: Annotated[int, Meta(ge=0)] | None = None


class Prompt(_Record, frozen=True):
    """A prompt without an answer (PPO, evaluation)."""

    prompt: Conversation
    id: str | None = None
    source: str | None = None
    use_case: str | None = None
    user: str | None = None
    organization: str | None = None
    time: str | None = None


class PlainText(_Record, frozen=True):
    """One document of running text (pretraining mix)."""

    text: str
    id: str | None = None
    source: str | None = None


Record = TypeVar("Record", Demonstration, Ranking, Prompt, PlainText)


@functools.cache
def field_names(kind: type) -> tuple[str, ...]:
    """The names of a record's fields in its JSON form.

    >>> field_names(Prompt)[:3]
    ('prompt', 'messages', 'id')
    """
    # In JSON a prompt of several turns has a name of its own, so that each field has one type.
    first, *others = kind.__struct_fields__
    return ("prompt", "messages", *others) if first == "prompt" else (first, *others)


def strict_pairs(ranks: Sequence[int]) -> int:
    r"""Number of comparisons in a ranking: pairs of ranked responses that do not tie.

    $\binom{K}{2}$ minus the tied pairs; responses of rank -1 are in no pair.

    >>> strict_pairs([0, 1, 1, -1])
    2

    Source: Ouyang et al. 2022, section 3.5 (all pairs of a prompt are one batch element).
    """
    return sum(a != b and a != ABSENT and b != ABSENT for a, b in itertools.combinations(ranks, 2))


def record_texts(record: Any) -> list[str]:
    """All texts of a record that a model reads: the prompt or its turns, then the responses.

    Responses that were not ranked are left out.
    """
    before, answers = split_texts(record)
    return [*before, *answers]


def split_texts(record: Any) -> tuple[list[str], list[str]]:
    """The texts of a prompt, and its ranked responses (or the text of a document)."""
    if isinstance(record, PlainText):
        return [], [record.text]
    prompt = record.prompt
    before = [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]
    if isinstance(record, Ranking):
        pairs = zip(record.responses, record.ranks, strict=True)
        return before, [text for text, rank in pairs if rank != ABSENT]
    return before, [record.response] if isinstance(record, Demonstration) else []
