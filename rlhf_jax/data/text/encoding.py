"""Encodes prompts, responses and documents as ids, and decodes ids to text."""

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

    The name of a special token inside a text or a message is encoded as ordinary text, so that a
    user cannot write a control token.

    Args:
      tokenizer: its chat template formats messages, or `chat.PLAIN_TEMPLATE` where it has none.
      prompt: a text, to which `PROMPT_END` is added, or messages, the last of which is not the
        assistant's.
      bos_id: replaces what the tokenizer puts before a text (`begin_ids`); must be None for
        messages, as a chat template writes BOS itself.

    Raises:
      ValueError: messages that the template refuses (see `chat.encode_messages`), or `bos_id` with
        messages.
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
    """Token ids of a text that a model continues as it is, without a template.

    An example is a few-shot prompt.
    """
    return [*begin_ids(tokenizer), *chat.encode_text(tokenizer, text)]


def encode_response(
    tokenizer: transformers.PreTrainedTokenizerFast, text: str, *, eos_id: int
) -> list[int]:
    """Token ids of a whole response to a text, ending with EOS."""
    # EOS is added as an id: in a text its name would be encoded as letters.
    return [*chat.encode_text(tokenizer, text), eos_id]


def encode_answer(
    tokenizer: transformers.PreTrainedTokenizerFast, prompt: Conversation, response: str
) -> list[int]:
    """Token ids of a whole response to `prompt`.

    They end with EOS if the prompt is a text, and with the template's end of turn if it is
    messages.
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
      response: the assistant's answer.
      assistant_turns: for messages, "all" trains on the assistant's earlier turns too, "last" on
        the response alone. A text has no earlier turns.
    """
    if not isinstance(prompt, str):
        return chat.encode_conversation(
            tokenizer, [*prompt, Message("assistant", response)], turns=assistant_turns
        )
    # Tokenised apart, so that the response has the ids that PPO samples and the reward model reads.
    asked, said = encode_prompt(tokenizer, prompt), encode_answer(tokenizer, prompt, response)
    return [*asked, *said], [False] * len(asked) + [True] * len(said)


def encode_document(
    tokenizer: transformers.PreTrainedTokenizerFast, text: str, *, eos_id: int
) -> list[int]:
    """Token ids of a document of the pretraining mix: `begin_ids`, the text, and EOS."""
    return [*encode_opening(tokenizer, text), eos_id]


def stop_ids(
    tokenizer: transformers.PreTrainedTokenizerFast, prompts: Iterable[Conversation]
) -> tuple[int, ...]:
    """The ids that end a response to any of `prompts`.

    They are EOS, the other ids that the model's generation_config.json names, and the token with
    which the chat template ends the assistant's turn.
    """
    # The end of turn depends on the roles alone, so one prompt per sequence of roles is enough.
    roles = {tuple(m.role for m in p): p for p in prompts if not isinstance(p, str)}
    ends = (chat.next_turn(tokenizer, messages).end_id for messages in roles.values())
    return tuple(dict.fromkeys([*end_ids(tokenizer), *ends]))


def exported_end_ids(tokenizer: transformers.PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The ids to write as ``eos_token_id`` of an exported model, for other programs to stop at.

    They are those of the folder that the tokenizer was loaded from, in that order, then the
    tokenizer's EOS, then the end of turn of its chat template.
    """
    ends = [*folder_end_ids(tokenizer), require_eos_id(tokenizer), end_of_turn_id(tokenizer)]
    return tuple(dict.fromkeys(i for i in ends if i is not None))


def end_of_turn_id(tokenizer: transformers.PreTrainedTokenizerFast) -> int | None:
    """The id with which the tokenizer's own chat template ends the assistant's turn.

    None where the tokenizer has no template, or one that cannot encode any conversation, so that no
    conversation was trained on either.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    asked = Message("user", "x")
    # Some templates require a system turn.
    for messages in ((asked,), (Message("system", "x"), asked)):
        with contextlib.suppress(ValueError):
            return chat.next_turn(tokenizer, messages).end_id
    return None


def decode_response(
    tokenizer: transformers.PreTrainedTokenizerFast, ids: Ids, *, eos_id: int | Sequence[int]
) -> str:
    """The text before the first of the `eos_id`, or all of it when there is none.

    It is for people and scorers and must not be encoded again, as that may give other ids.
    """
    ends = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    ids = [int(i) for i in ids]
    # Without such an id the response was cut off, and all of it is text. A special token inside it
    # stays visible to people and scorers.
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
