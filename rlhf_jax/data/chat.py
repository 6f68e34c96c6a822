r"""Encodes conversations with the tokenizer's chat template, or a plain one where it has none.

A template is a Jinja program that writes a conversation as one text, in which the template's
``<|im_end|>`` looks the same as one that a user typed. So the template is rendered once per
sequence of roles, with marks in place of the contents, and split at the marks. The pieces between
them are the template's own text, and in these alone the names of special tokens become control
tokens. For each conversation, pieces and contents together are checked to be exactly what the
template writes.

Ids are made in spans. An answer (the content of an assistant's turn and the token that ends the
turn) is tokenised by itself, so that it has the same ids everywhere; everything between two answers
is tokenised together.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rlhf_jax.data.schema import Conversation, Message
from rlhf_jax.data.special_ids import begin_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{% if message.role == 'system' %}{{ message.content | trim }}"
    "{% elif message.role == 'user' %}{{ 'Human: ' + message.content | trim }}"
    "{% else %}{{ 'Assistant: ' + message.content | trim + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
"""The template for tokenizers without one: the system's text bare, "Human: " and "Assistant: "
before the turns, a blank line between them, EOS after each answer; a prompt ends in
"Assistant:"."""

DATE = "26 Jul 2024"
"""The date that templates receive as today's, so that ids do not change from day to day."""

# A space that no template writes; if it is missing around a mark, the template strips contents.
_WIDE = "\u2003"


class Turn(NamedTuple):
    """What a template writes around the assistant's next turn.

    Attributes:
      head: text after the generation prompt other than spaces; it belongs to the prompt and is
        never trained on.
      lead: the spaces before the content; tokenised with it, as tokenizers join a space to the word
        after it.
      tail: the text from the end of the content up to and including the token that ends the turn.
      end: name of that token.
      end_id: its id.
    """

    head: str
    lead: str
    tail: str
    end: str
    end_id: int


class _Layout(NamedTuple):
    """The template's texts before, between and after the contents, and how it strips each content.

    `strips` has (left, right) per content.
    """

    pieces: tuple[str, ...]
    strips: tuple[tuple[bool, bool], ...]


class _Part(NamedTuple):
    """A text of the template or of a content.

    `hidden` are the names of added tokens that must remain text in a content; None marks a text of
    the template.
    """

    text: str
    hidden: tuple[str, ...] | None = None


class _Control(NamedTuple):
    """An added token: its id, whether it is special, and on which sides it absorbs spaces.

    `encode_text` encodes the names of special tokens as text.
    """

    id: int
    special: bool
    lstrip: bool
    rstrip: bool


class _Span(NamedTuple):
    parts: tuple[_Part, ...]
    answer: bool


# ----------------------------------------------------------------------------------------- encoding


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of ordinary text, in which the name of a special token is encoded as text."""
    # Both flags matter: no BOS is added, and the name of a special token stays ordinary text.
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_messages(
    tokenizer: Tokenizer, messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Ids of a prompt of several turns, up to where the assistant's next answer begins.

    Args:
      tokenizer: with a `chat_template`, or without one for `PLAIN_TEMPLATE`.
      messages: the turns so far; the last one is not the assistant's.

    Returns:
      The ids, and True for those of earlier answers, including the token that ends each.

    Raises:
      ValueError: roles in an invalid order, or a template that refuses them, leaves out, repeats or
        changes a content.
    """
    # A chat template writes BOS itself where the model needs it; the plain template never does.
    ids = [] if tokenizer.chat_template else list(begin_ids(tokenizer))
    mask = [False] * len(ids)
    for span in _prompt_spans(tokenizer, tuple(messages)):
        found = _ids(tokenizer, span.parts)
        ids += found
        mask += [span.answer] * len(found)
    return ids, mask


def encode_reply(tokenizer: Tokenizer, messages: Sequence[Message], response: str) -> list[int]:
    """Ids of the assistant's answer to `messages`, with the token that ends its turn.

    The template is not applied to `response`, so nothing of it is stripped or left out.
    """
    turn = next_turn(tokenizer, messages)
    return _ids(tokenizer, _answer(tokenizer, turn.lead, response, turn.tail, turn.end))


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], *, turns: str = "all"
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation that ends with the assistant, and which of them are trained on.

    Args:
      tokenizer: as in `encode_messages`.
      messages: the turns; the last one is the assistant's.
      turns: "all" trains on every answer, "last" on the last one alone.

    Returns:
      The ids, and True for the content and the end of each answer that is trained on. Texts of the
      user, the system and the template are never trained on.

    Raises:
      ValueError: as `encode_messages`, or the last turn is not the assistant's.
    """
    if turns not in ("all", "last"):
        raise ValueError(f'turns={turns!r} must be "all" or "last"')
    if not messages or messages[-1].role != "assistant":
        raise ValueError(
            'the last message of a conversation to learn from must have the role "assistant": add '
            "one"
        )
    # The last answer is encoded by itself, so that it has the ids that the reward model scores.
    ids, mask = encode_messages(tokenizer, messages[:-1])
    reply = encode_reply(tokenizer, messages[:-1], messages[-1].content)
    return [*ids, *reply], [*(m and turns == "all" for m in mask), *[True] * len(reply)]


def next_turn(tokenizer: Tokenizer, messages: Sequence[Message]) -> Turn:
    """What the template writes around the assistant's answer to `messages`.

    Generation stops at its `end_id`.

    Raises:
      ValueError: the template ends the turn with no token of its own, or as `encode_messages`.
    """
    _check_turns(messages)
    return _next_turn(tokenizer, _template(tokenizer), tuple(m.role for m in messages))


def readable(prompt: Conversation) -> str:
    r"""A prompt as text for people and judges: a text as it is, or turns after their names.

    >>> readable((Message("system", "Be brief."), Message("user", "Hello")))
    'Be brief.\n\nHuman: Hello\n\nAssistant:'
    """
    if isinstance(prompt, str):
        return prompt
    names = {"system": "", "user": "Human: ", "assistant": "Assistant: "}
    said = [names.get(m.role, f"{m.role}: ") + m.content.strip() for m in prompt]
    return "\n\n".join([*said, "Assistant:"])


def check_same_template(**tokenizers: Tokenizer) -> None:
    """Raise unless all tokenizers format conversations alike.

    Called as ``check_same_template(policy=a, reward_model=b)``.

    Raises:
      ValueError: two differ; the message names them.
    """
    (first, reference), *others = tokenizers.items()
    for name, other in others:
        if _template(reference) != _template(other):
            raise ValueError(
                f"the chat templates of {first} and {name} differ and prompts hold messages: the "
                f"{name} would read conversations in a form it was not trained on; start both from "
                "the same base model"
            )


# ---------------------------------------------------------------------------------------- rendering


def _template(tokenizer: Tokenizer) -> str:
    if not tokenizer.chat_template:
        return PLAIN_TEMPLATE
    template = tokenizer.get_chat_template()
    # Templates that take a date from `date_string` get the fixed `DATE`.
    if "strftime_now" in template and "date_string" not in template:
        raise ValueError(
            "the chat template writes today's date, so ids would change overnight: write a fixed "
            "date in chat_template.jinja instead of strftime_now(..)"
        )
    return template


def _render(
    tokenizer: Tokenizer, template: str, messages: Sequence[Message], generation: bool
) -> str:
    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        return str(
            tokenizer.apply_chat_template(
                turns,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generation,
                date_string=DATE,
            )
        )
    except Exception as error:  # a template is a program and may raise anything
        roles = ", ".join(m.role for m in messages)
        raise ValueError(
            f"the chat template refuses a conversation of the roles {roles} ({error}): leave such "
            "conversations out or change chat_template"
        ) from error


@functools.lru_cache(maxsize=1024)
def _layout(
    tokenizer: Tokenizer, template: str, roles: tuple[str, ...], generation: bool
) -> _Layout:
    """Renders the template with marks in place of the contents, and splits it at the marks.

    The text has no user's content, so a mark cannot occur by chance or on purpose.
    """
    # A fixed width, so that no mark is the beginning of another one.
    marks = [f"xqz{i:04d}zqx" for i in range(len(roles))]
    marked = [Message(role, _WIDE + mark + _WIDE) for role, mark in zip(roles, marks, strict=True)]
    rest = rendered = _render(tokenizer, template, marked, generation)
    pieces, strips = [], []
    for i, mark in enumerate(marks):
        before, found, rest = rest.partition(mark)
        # Found once at the expected place and nowhere else; otherwise contents would be lost or
        # doubled.
        if not found or rendered.count(mark) != 1:
            what = "repeats" if found else "leaves out, changes or moves"
            raise ValueError(
                f"the chat template {what} the content of message {i + 1} of {len(roles)} "
                f"({roles[i]}): conversations with such a message cannot be encoded; change "
                "chat_template or leave that message out"
            )
        # The wide space is missing where the template strips the content on that side.
        strips.append((not before.endswith(_WIDE), not rest.startswith(_WIDE)))
        pieces.append(before.removesuffix(_WIDE))
        rest = rest.removeprefix(_WIDE)
    return _Layout((*pieces, rest), tuple(strips))


@functools.lru_cache(maxsize=1024)
def _next_turn(tokenizer: Tokenizer, template: str, roles: tuple[str, ...]) -> Turn:
    # A finished turn may have more text before its content than the generation prompt, such as an
    # empty thinking block, so both are rendered and compared.
    last = len(roles)
    whole = _layout(tokenizer, template, (*roles, "assistant"), False).pieces
    between = _after_prompt(_layout(tokenizer, template, roles, True).pieces, whole)
    # Spaces belong to the answer, as tokenizers join them to its first word; other text is the
    # prompt's.
    head, lead = ("", between) if not between.strip() else (between, "")
    tail, end = _tail(tokenizer, whole[last + 1])
    return Turn(head, lead, tail, end, _controls(tokenizer)[end].id)


def _after_prompt(prompt: tuple[str, ...], whole: tuple[str, ...]) -> str:
    """The text of `whole` between the end of `prompt` and the answer.

    It is empty where `whole` does not begin with `prompt`.
    """
    last = len(prompt) - 1
    # Compared piece by piece, since the texts between earlier turns must be equal too.
    goes_on = whole[:last] == prompt[:last] and whole[last].startswith(prompt[last])
    return whole[last][len(prompt[last]) :] if goes_on else ""


def _tail(tokenizer: Tokenizer, after: str) -> tuple[str, str]:
    """The text after an answer, up to and including the first control token, and its name."""
    found = _control_pattern(tokenizer).search(after)
    if found is None:
        raise ValueError(
            "the chat template writes no special token after an assistant's turn (but "
            f"{after[:40]!r}): generation would not know where to stop; add eos_token there in "
            "chat_template"
        )
    return after[: found.end()], found.group()


def _check_turns(messages: Sequence[Message]) -> None:
    roles = [m.role for m in messages]
    for i, role in enumerate(roles):
        if role not in ("system", "user", "assistant"):
            raise ValueError(
                f"message {i + 1} has the role {role!r}: use system, user or assistant"
            )
        if role == "assistant" and (i == 0 or roles[i - 1] != "user"):
            raise ValueError(
                f"message {i + 1} is the assistant's and answers nothing: put a user's message "
                "before it"
            )
    if not roles or roles[-1] != "user":
        raise ValueError(
            f"a prompt of messages must end with a user's turn, its roles are {roles}: add or "
            "remove one"
        )


def _prompt_spans(tokenizer: Tokenizer, messages: tuple[Message, ...]) -> Iterator[_Span]:
    _check_turns(messages)
    template, roles = _template(tokenizer), tuple(m.role for m in messages)
    layout = _layout(tokenizer, template, roles, True)
    contents = _contents(tokenizer, template, messages, layout)
    written = _written(tokenizer, template)
    # `context` collects what lies between two answers, which is tokenised in one go.
    context, piece = [], layout.pieces[0]
    for i, (role, content) in enumerate(zip(roles, contents, strict=True)):
        after = layout.pieces[i + 1]
        if role != "assistant":
            context += [_Part(piece), _Part(content, written)]
            piece = after
            continue
        # The template's own text before this answer, found as if the conversation ended there.
        lead = _after_prompt(_layout(tokenizer, template, roles[:i], True).pieces, layout.pieces)
        lead = "" if lead.strip() else lead
        tail, end = _tail(tokenizer, after)
        # The lead moves from the context to the answer, as in sampling, where it is generated.
        yield _Span((*context, _Part(piece.removesuffix(lead))), False)
        yield _Span(_answer(tokenizer, lead, content, tail, end), True)
        context, piece = [], after.removeprefix(tail)
    yield _Span((*context, _Part(piece + _next_turn(tokenizer, template, roles).head)), False)


def _answer(
    tokenizer: Tokenizer, lead: str, content: str, tail: str, end: str
) -> tuple[_Part, ...]:
    # A tokenizer that begins each text with a space already adds the template's space.
    lead = lead[1:] if lead.startswith(" ") and _adds_space(tokenizer) else lead
    # `encode_text` leaves special names as text, but not those of ordinary added tokens.
    hidden = () if _controls(tokenizer)[end].special else (end,)
    return _Part(lead), _Part(content, hidden), _Part(tail)


def _contents(
    tokenizer: Tokenizer, template: str, messages: tuple[Message, ...], layout: _Layout
) -> list[str]:
    """The contents as the template writes them: stripped where it strips, otherwise unchanged."""
    contents = []
    for message, (left, right) in zip(messages, layout.strips, strict=True):
        content = message.content.lstrip() if left else message.content
        contents.append(content.rstrip() if right else content)
    joined = layout.pieces[0] + "".join(
        c + p for c, p in zip(contents, layout.pieces[1:], strict=True)
    )
    # The final check: the pieces with their contents are exactly what the template writes.
    if joined != _render(tokenizer, template, messages, True):
        raise ValueError(
            "the chat template changes a content by what is in it "
            f"({readable(messages)[:60]!r}..): leave such conversations out or change chat_template"
        )
    return contents


# --------------------------------------------------------------------------------------- tokenising


@functools.lru_cache(maxsize=64)
def _controls(tokenizer: Tokenizer) -> dict[str, _Control]:
    """The added tokens by name, without ordinary ones that consist of spaces."""
    return {
        str(token.content): _Control(i, bool(token.special), bool(token.lstrip), bool(token.rstrip))
        for i, token in tokenizer.added_tokens_decoder.items()
        # Added tokens of spaces only are part of ordinary text, as in a vocabulary for code.
        if token.special or token.content.strip()
    }


@functools.lru_cache(maxsize=64)
def _control_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    # The longest name first, as one name may begin another. ((?!)) matches nothing.
    names = sorted(_controls(tokenizer), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, names)) + ")" if names else "((?!))")


@functools.lru_cache(maxsize=64)
def _written(tokenizer: Tokenizer, template: str) -> tuple[str, ...]:
    """Added tokens that the template writes and that are not special, such as <tool_call>.

    `encode_text` would encode their names in a content as tokens.
    """
    return tuple(
        name
        for name, token in _controls(tokenizer).items()
        if not token.special and name in template
    )


@functools.lru_cache(maxsize=64)
def _adds_space(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer begins each text with a space of its own, as SentencePiece may."""
    # U+2581 marks a space in SentencePiece, U+0120 in byte-level BPE.
    return tokenizer.tokenize("x")[0].startswith(("\u2581", "\u0120"))


def _atoms(tokenizer: Tokenizer, parts: Sequence[_Part]) -> Iterator[tuple[str, bool]]:
    """Splits parts into atoms, each with whether it ends the text before it.

    An atom is (text, False), which is joined to its neighbours, (name of a control token, True), or
    ("", True), which only splits the text.
    """
    for part in parts:
        if part.hidden is None:
            for i, atom in enumerate(_control_pattern(tokenizer).split(part.text)):
                # `split` with one group puts the names of control tokens at the odd places.
                yield atom, i % 2 == 1
            continue
        # A name that is split after its first character is no longer found as an added token.
        cuts = [
            f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})"
            for name in part.hidden
            if len(name) > 1
        ]
        for i, atom in enumerate(re.split("|".join(cuts), part.text) if cuts else [part.text]):
            if i:
                yield "", True
            yield atom, False


def _ids(tokenizer: Tokenizer, parts: Sequence[_Part]) -> list[int]:
    """Ids of a span: control tokens where the template writes their names, text between them."""
    ids: list[int] = []
    text, strips = "", False
    # The empty atom at the end flushes the text that is left.
    for atom, cuts in [*_atoms(tokenizer, parts), ("", True)]:
        if not cuts:
            text += atom
            continue
        # Spaces beside a control token are dropped as the tokenizer itself would (lstrip, rstrip).
        token = _controls(tokenizer).get(atom)
        text = text.lstrip() if strips else text
        text = text.rstrip() if token and token.lstrip else text
        ids += encode_text(tokenizer, text) if text else []
        ids += [token.id] if token else []
        text, strips = "", bool(token and token.rstrip)
    return ids
