"""Prompts, responses and documents as ids, and ids as text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rlhf_jax.data import chat
from rlhf_jax.data.schema import Conversation, Message
from rlhf_jax.data.special_ids import begin_ids, end_ids, folder_end_ids, require_eos_id

if TYPE_CHECKING:
    import transformers


PROMPT_END = "\n\n"
"""What follows the text of every prompt."""


Ids = Sequence[int]


MaskedIds = tuple[Ids, Sequence[bool]]
"""Ids, and True for those that are trained on."""


def encode_prompt(
    tokenizer: transformers.PreTrainedTokenizerFast,
    prompt: Conversation,
    *,
    bos_id: int | None = None,
) -> list[int]:
    """Token ids of a prompt, up to where the response begins.

    The name of a special token inside a text or a message stays ordinary text: a user cannot write
    a control token.

    Args:
      tokenizer: its chat template writes messages; where it has none, `chat.PLAIN_TEMPLATE` does.
      prompt: a text, which the template's ending follows, or messages of which the last is not the
        assistant's.
      bos_id: comes first instead of what the tokenizer puts before a text (`begin_ids`); None for
        messages, whose template writes its own.

    Raises:
      ValueError: messages that the template cannot write (see `chat.encode_messages`), or `bos_id`
        with messages.
    """
    if isinstance(prompt, str):
        ids = chat.encode_text(tokenizer, prompt + PROMPT_END)
        return [*(begin_ids(tokenizer) if bos_id is None else [bos_id]), *ids]
    if bos_id is not None:
        raise ValueError(
            f"bos_id={bos_id} does not go with messages: a chat template writes BOS itself; leave "
            "it out"
        )
    return chat.encode_messages(tokenizer, prompt)[0]


def encode_opening(tokenizer: transformers.PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a text that a model goes on with as it stands.

    Such a text is a few-shot prompt, or a question without a template.
    """
    return [*begin_ids(tokenizer), *chat.encode_text(tokenizer, text)]


def encode_response(
    tokenizer: transformers.PreTrainedTokenizerFast, text: str, *, eos_id: int
) -> list[int]:
    """Token ids of a whole response to a text, EOS last."""
    return [*chat.encode_text(tokenizer, text), eos_id]


def encode_answer(
    tokenizer: transformers.PreTrainedTokenizerFast, prompt: Conversation, response: str
) -> list[int]:
    """Token ids of a whole response to `prompt`.

    EOS is the last one after a text, the template's end of turn after messages.
    """
    if isinstance(prompt, str):
        return encode_response(tokenizer, response, eos_id=require_eos_id(tokenizer))
    return chat.encode_reply(tokenizer, prompt, response)


def encode_demonstration(
    tokenizer: transformers.PreTrainedTokenizerFast,
    prompt: Conversation,
    response: str,
    *,
    assistant_turns: str = "all",
) -> MaskedIds:
    """Ids of a prompt with its response, and True for those that supervised fine-tuning trains on.

    Args:
      tokenizer: as in `encode_prompt`.
      prompt: a text, or the turns before the response.
      response: what the assistant answers.
      assistant_turns: of messages, "all" trains on the assistant's earlier turns too, "last" on the
        response alone. A text has one.
    """
    if not isinstance(prompt, str):
        return chat.encode_conversation(
            tokenizer, [*prompt, Message("assistant", response)], turns=assistant_turns
        )
    asked, said = encode_prompt(tokenizer, prompt), encode_answer(tokenizer, prompt, response)
    return [*asked, *said], [False] * len(asked) + [True] * len(said)


def encode_document(
    tokenizer: transformers.PreTrainedTokenizerFast, text: str, *, eos_id: int
) -> list[int]:
    """Token ids of a document of the pretraining mix.

    They are what the tokenizer puts before a text, the text, and EOS.
    """
    return [*encode_opening(tokenizer, text), eos_id]


def stop_ids(
    tokenizer: transformers.PreTrainedTokenizerFast, prompts: Iterable[Conversation]
) -> tuple[int, ...]:
    """The ids that end a response to any of `prompts`.

    They are EOS, the other ids that the model's generation_config.json names, and what the chat
    template ends the assistant's turn with.
    """
    roles = {tuple(m.role for m in p): p for p in prompts if not isinstance(p, str)}
    ends = (chat.next_turn(tokenizer, messages).end_id for messages in roles.values())
    return tuple(dict.fromkeys([*end_ids(tokenizer), *ends]))


def exported_end_ids(tokenizer: transformers.PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The ids to write as ``eos_token_id`` of an exported model.

    With them other programs stop where this one does.

    Those of the folder that the tokenizer came from, in that order; the tokenizer's EOS; and the
    end of turn of its chat template.
    """
    ends = [*folder_end_ids(tokenizer), require_eos_id(tokenizer), end_of_turn_id(tokenizer)]
    return tuple(dict.fromkeys(i for i in ends if i is not None))


def end_of_turn_id(tokenizer: transformers.PreTrainedTokenizerFast) -> int | None:
    """What the tokenizer's own chat template ends the assistant's turn with.

    None where the tokenizer has no template, or one that no conversation can be encoded with: then
    none was.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    asked = Message("user", "x")
    for messages in (
        (asked,),
        (Message("system", "x"), asked),
    ):  # some templates want a system turn first
        with contextlib.suppress(ValueError):
            return chat.next_turn(tokenizer, messages).end_id
    return None


def decode_response(
    tokenizer: transformers.PreTrainedTokenizerFast, ids: Ids, *, eos_id: int | Sequence[int]
) -> str:
    """The text before the first of the `eos_id` (all of it when there is none).

    For people and scorers; never encode it again.
    """
    ends = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    ids = [int(i) for i in ids]
    end = next((place for place, i in enumerate(ids) if i in ends), len(ids))
    return str(
        tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def decode_answer(
    tokenizer: transformers.PreTrainedTokenizerFast,
    prompt: Conversation,
    ids: Ids,
    *,
    stop_ids: Sequence[int],
) -> str:
    """The text of a response to `prompt`, without the spaces that a chat template adds."""
    said = decode_response(tokenizer, ids, eos_id=stop_ids)
    if isinstance(prompt, str):
        return said
    turn = chat.next_turn(tokenizer, prompt)
    return said.removeprefix(turn.lead).removesuffix(turn.tail.removesuffix(turn.end))
