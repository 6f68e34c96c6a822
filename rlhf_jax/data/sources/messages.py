"""Reads lists of messages of any source, and OpenAI's formats of fine-tuning files.

A turn is ``{role, content}`` or ShareGPT's ``{from, value}``. Any other field is left aside by name
or refused by name: dropping a tool call, for example, would leave an answer that makes no sense.
"""

from __future__ import annotations

from typing import Any

from rlhf_jax.data.schema import ROLES, Demonstration, Prompt, Ranking, RowError, check_text
from rlhf_jax.data.sources.row import (
    Draft,
    Row,
    as_label,
    asked,
    checked,
    is_empty_json,
    listed,
    note_beginnings,
    tidy_answer,
    tidy_prompt,
)
from rlhf_jax.data.sources.transcripts import ASSISTANT, HUMAN, turns_of

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}
_TOOL_ROLES = (
    "tool",
    "function",
    "function_call",
    "function_response",
    "tool_call",
    "tool_response",
    "observation",
    "ipython",
)
_TOOL_FIELDS = (
    "tool_calls",
    "function_call",
    "tool_call_id",
    "tools",
    "functions",
    "tool_call",
    "tool_responses",
)
_REASONING = ("reasoning_content", "reasoning", "thinking", "thoughts", "reasoning_details")
_OTHER_MEDIA = (
    "images",
    "image",
    "audio",
    "audios",
    "videos",
    "video",
    "files",
    "file",
    "refusal",
    "image_url",
)
_WEIGHTS = ("weight", "train", "training")
_ABOUT = (
    "id", "message_id", "uuid", "index", "idx", "turn", "turn_id", "turn_identifier", "timestamp",
    "time", "created_at", "create_time", "language", "lang", "model", "model_name", "toxicity",
    "openai_moderation", "detoxify_moderation", "redacted", "toxic", "state", "header", "country",
    "hashed_ip", "tokens", "num_tokens", "score", "rating", "source", "category", "markdown",
    "parent_id", "annotations", "prefix",
)  # fmt: skip
"""Metadata of a turn, which is left aside."""


def turn(row: Row, value: Any, where: str) -> Any:
    """A turn as ``{role, content}`` with one text as its content.

    Args:
      row: the row of the turn, which notes what was joined or left aside.
      value: the turn in the file.
      where: its name in errors, as in ``messages[2]``.

    Raises:
      RowError: it has something that a role and a text cannot represent, or no text.
    """
    if not isinstance(value, dict):
        return value  # `schema` refuses it with the right message
    # Tables fill a field that a turn lacks with null, as all rows have the same columns.
    given = {name: inner for name, inner in value.items() if inner is not None}
    role, content = _either(given, "role", "from", where), _either(given, "content", "value", where)
    if isinstance(role, str) and role.lower() in _TOOL_ROLES:
        raise RowError(
            "tool call",
            f"'{where}' has the role {role!r}: it must be one of {', '.join(ROLES)}, so leave "
            "conversations with tool calls out",
        )
    for name, inner in given.items():
        if name not in ("role", "from", "content", "value"):
            _refuse_or_leave(row, name, inner, where, _ROLES.get(str(role).strip().lower(), ""))
    found: dict[str, Any] = {}
    if role is not None:
        # An unknown role is passed on, for `schema` to refuse with its own message.
        found["role"] = _ROLES.get(role.strip().lower(), role) if isinstance(role, str) else role
    if content is not None:
        found["content"] = content_text(row, content, where)
    return found


def _either(given: dict[str, Any], name: str, other: str, where: str) -> Any:
    if name in given and other in given and given[name] != given[other]:
        raise RowError(
            "unknown turn field",
            f"'{where}' has both {name!r} and {other!r}, and they differ: keep one",
        )
    return given.get(name, given.get(other))


def _refuse_or_leave(row: Row, name: str, value: Any, where: str, role: str) -> None:
    if is_empty_json(value):
        return
    for reason, names in (
        ("tool call", _TOOL_FIELDS),
        ("reasoning content", _REASONING),
        ("not text", _OTHER_MEDIA),
    ):
        if name in names:
            raise RowError(
                reason,
                f"'{where}' has {name!r}, which cannot be kept: leave such conversations out",
            )
    if name == "name":
        raise RowError(
            "speaker name",
            f"'{where}' has a 'name', {str(value)[:30]!r}: write it into the text or remove it",
        )
    if name in _WEIGHTS:
        # The user's turns are never trained on, so a weight of 0 is right for them.
        if value not in ((1, True) if role == "assistant" else (0, False, 1, True)):
            raise RowError(
                "turn weight",
                f"'{where}' has {name}={value!r}: every answer of a conversation counts the same "
                "here, so leave such conversations out, or cut them after the turn that counts "
                "and train with --config.assistant_turns=last",
            )
        return
    if name not in _ABOUT or isinstance(value, dict | list):
        raise RowError(
            "unknown turn field", f"'{where}' has {name!r}, which is not known: rename or remove it"
        )
    # Under one name for all turns: an index would make each turn a column of its own.
    row.leave_aside(f"{where.partition('[')[0]}[].{name}")


def content_text(row: Row, content: Any, where: str) -> Any:
    """A content as one text: a text as it is, or a list of text parts joined.

    Raises:
      RowError: a part is not a text.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for k, part in enumerate(content):
        given = (
            {name: inner for name, inner in part.items() if inner is not None}
            if isinstance(part, dict)
            else {}
        )
        if set(given) != {"type", "text"} or given["type"] not in (
            "text",
            "input_text",
            "output_text",
        ):
            kind = given.get("type", type(part).__name__)
            raise RowError(
                "not text",
                f"'{where}.content[{k}]' is no text but {str(kind)[:30]!r}: leave such "
                "conversations out",
            )
        texts.append(check_text(given["text"], f"{where}.content[{k}].text", allow_empty=True))
    if len(texts) > 1:
        row.note("text parts joined")
    return "".join(texts)


def turns(row: Row, name: str, value: Any) -> str | list[Any]:
    """The value of a column: a text, or a list of turns.

    Raises:
      RowError: it is neither.
    """
    value = listed(row, name, value)
    if isinstance(value, dict):
        # A single object is as good as a list with one turn.
        value = [value]  # ShareGPT's preference form: one turn
    if not isinstance(value, str | list):
        raise RowError(
            "wrong type",
            f"field {name!r} must be a text or a list of messages, got {type(value).__name__}",
        )
    return (
        value
        if isinstance(value, str)
        else [turn(row, item, f"{name}[{k}]") for k, item in enumerate(value)]
    )


def with_system(row: Row, prompt: Any) -> tuple[Any, bool]:
    """The prompt with the system column's text as its first turn, and whether it was added.

    Raises:
      RowError: the prompt has a system turn that differs from the column.
    """
    system = row.system_text()
    if not system:
        return prompt, False
    if isinstance(prompt, str):
        prompt = as_turns(prompt)
    first = prompt[0] if prompt and isinstance(prompt[0], dict) else {}
    if first.get("role") == "system":
        if str(first.get("content")).strip() != system.strip():
            raise RowError(
                "systems differ", "the system column and the system turn differ: keep one"
            )
        return prompt, False
    row.note("system made a turn")
    return [{"role": "system", "content": system}, *prompt], True


def as_turns(prompt: str) -> list[dict[str, str]]:
    """A text prompt as turns: those of a transcript, or one user's turn for any other text."""
    if ("\n\n" + prompt).startswith(HUMAN) and prompt.endswith(ASSISTANT):
        return turns_of(prompt)
    return [{"role": "user", "content": prompt}]


def last_text(prompt: Any) -> str:
    """The text that an answer might repeat: a text prompt, or the last turn of a list.

    It is "" for anything else.
    """
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        prompt = prompt[-1].get("content", prompt[-1].get("value"))
    return prompt if isinstance(prompt, str) else ""


def answer_to(row: Row, prompt: str | list[Any] | None, said: str | list[Any]) -> tuple[Any, str]:
    """The prompt and the text that answers it.

    `said` is the column with the answer: a text, one turn, or the whole conversation.

    Raises:
      RowError: there is no prompt, the last turn is not the assistant's, or several turns answer
        the prompt.
    """
    if isinstance(said, str):
        if prompt is None:
            raise RowError(
                "missing field",
                "field 'prompt' is missing: a text alone does not say what it answers; name the "
                f"prompt's column of {', '.join(sorted(row.columns()))} with --columns prompt=NAME",
            )  # fmt: skip
        return prompt, said
    before, last = said[:-1], said[-1] if said else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise RowError(
            "no Assistant turn",
            "the last message is not the assistant's: remove what follows its turn",
        )
    # The answer may repeat the conversation from the prompt or from before it; then its own turns
    # before the last are the prompt.
    given = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    # The last turns before the answer are compared with those of the prompt column.
    if prompt is None or (before and _same(before[-len(given) :], given)):
        prompt = before
    elif before:
        raise RowError(
            "more than one turn",
            f"{len(said)} messages answer the prompt: only the last may; if they are the whole "
            "conversation, leave the prompt's column aside with --columns prompt= (in Python "
            "columns={'prompt': ''})",
        )
    return prompt, check_text(last.get("content"), "content", allow_empty=True)


def _same(turns: list[Any], others: list[Any]) -> bool:
    """Whether two conversations are equal, ignoring spaces around contents."""

    def plain(turn: Any) -> Any:
        return (
            {k: v.strip() if isinstance(v, str) else v for k, v in turn.items()}
            if isinstance(turn, dict)
            else turn
        )

    return [plain(turn) for turn in turns] == [plain(turn) for turn in others]


def pair_of(row: Row, prompt: Any, chosen: str, rejected: str) -> Draft:
    """A ranking of two, once prompt and answers are known.

    Raises:
      RowError: the answers are the same, or the systems differ.
    """
    # Compared after tidying: answers that differ in outer spaces alone prefer nothing.
    chosen, rejected = tidy_answer(row, chosen), tidy_answer(row, rejected)
    if chosen == rejected:
        raise RowError("identical responses", "chosen and rejected are the same")
    prompt = tidy_prompt(row, prompt) if isinstance(prompt, str) else prompt
    prompt, has_system = with_system(row, prompt)
    note_beginnings(row, [chosen, rejected])
    fields = {
        **row.labels(Ranking),
        **asked(prompt),
        "responses": [chosen, rejected],
        "ranks": [1, 2],
    }
    return Draft(Ranking, fields, has_system)


def demonstration_of(row: Row, prompt: Any, answer: str, **labels: str) -> Draft:
    """A demonstration, once prompt and answer are known.

    Raises:
      RowError: the systems differ.
    """
    prompt = tidy_prompt(row, prompt) if isinstance(prompt, str) else prompt
    prompt, has_system = with_system(row, prompt)
    answer = tidy_answer(row, checked(answer, "response"))
    repeated = last_text(prompt).strip()
    if repeated and answer.startswith(repeated):
        row.note("answer begins with the prompt")
    fields = {**row.labels(Demonstration), **labels, **asked(prompt), "response": answer}
    return Draft(Demonstration, fields, has_system)


def prompt_of(row: Row, prompt: Any) -> Draft:
    """A prompt without an answer.

    Raises:
      RowError: the systems differ.
    """
    prompt = tidy_prompt(row, prompt) if isinstance(prompt, str) else prompt
    prompt, has_system = with_system(row, prompt)
    return Draft(Prompt, {**row.labels(Prompt), **asked(prompt)}, has_system)


# ----------------------------------------------------------------------------------- OpenAI's files


def conversation(row: Row, name: str = "messages") -> Draft:
    """A row ``{messages}``: the last turn is the response.

    With ``rejected_response`` it is a ranking of two.

    Raises:
      RowError: the last turn is not the assistant's, or a turn has more than a role and a text.
    """
    row.refuse_more_than_text()
    said = turns(row, name, row.needed(name))
    if isinstance(said, str):
        raise RowError("wrong type", f"field {name!r} must be a list of messages, got str")
    if row.has("rejected_response"):
        prompt, chosen = answer_to(row, None, said)
        return pair_of(row, prompt, chosen, row.text("rejected_response"))
    prompt, answer = answer_to(row, None, said)
    return demonstration_of(row, prompt, answer)


def preference(row: Row) -> Draft:
    """A row ``{input: {messages}, preferred_output: [turn], non_preferred_output: [turn]}``.

    Raises:
      RowError: the input has tools, or an output is not one turn of the assistant's.
    """
    row.refuse_more_than_text()
    given = row.needed("input")
    if not isinstance(given, dict):
        raise RowError(
            "wrong type",
            f"field 'input' must be an object with 'messages', got {type(given).__name__}",
        )
    for name in given:
        if name in ("tools", "functions") and not is_empty_json(given[name]):
            raise RowError("tool call", f"'input.{name}' cannot be kept: leave such rows out")
        if name != "messages" and not is_empty_json(given[name]):
            row.leave_aside(f"input.{name}")
    prompt = turns(row, "input.messages", given.get("messages"))
    answers = [
        turns(row, name, row.needed(name)) for name in ("preferred_output", "non_preferred_output")
    ]
    (first, chosen), (second, rejected) = (answer_to(row, prompt, answer) for answer in answers)
    if first != second:
        raise RowError("prompts differ", "the two conversations differ before the last turn")
    return pair_of(row, first, chosen, rejected)


def label_of(value: Any) -> str | None:
    """The name of a person in an export: a text, a number, or an object with e-mail, name or id."""
    if isinstance(value, dict):
        value = next(
            (value[key] for key in ("email", "username", "id") if value.get(key) is not None), None
        )
    return as_label(value)
