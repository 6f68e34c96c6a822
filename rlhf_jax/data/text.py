r"""Texts to token rows: templates, tokenising, masks and packing.

This is the one place that says how text becomes ids, for every stage, scorer and export. A prompt is a text or the
turns of a conversation. The template of a text: the prompt is its text and ``"\n\n"``; the response is its text and
EOS. Conversations are written by `chat`. A prompt, a document and any other beginning of a row starts with what the
tokenizer's own post-processor puts there (`begin_ids`: BOS, or nothing), once; a response never does. Prompt and
response are tokenised separately and their ids concatenated, for SFT, reward model and PPO alike, so that a response
has the same ids wherever it is seen.
Rows are contiguous from the left and padded on the right; masks come from lengths and roles, never from ids.

Row functions never cut or drop anything: what does not fit is an error, and `drop_too_long` is the counted way out.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Int

from rlhf_jax.data import chat
from rlhf_jax.data.schema import Conversation, Message
from rlhf_jax.data.special_ids import begin_ids, end_ids, folder_end_ids, follow_folder, require_eos_id
from rlhf_jax.run.files import check_tokenizer
from rlhf_jax.types import LMBatch, PromptBatch, RankingBatch, Samples

if TYPE_CHECKING:
    import transformers

PROMPT_END = "\n\n"
"""What follows the text of every prompt."""

Ids = Sequence[int]
RankedIds = tuple[Ids, Sequence[Ids], Sequence[int]]
"""Ids of a prompt, of its K responses (with EOS), and K ranks: 0 best, ties equal, -1 absent."""
MaskedIds = tuple[Ids, Sequence[bool]]
"""Ids, and True for those that are trained on."""
Item = TypeVar("Item")


# ---------------------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(path: str | os.PathLike[str]) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer in a local folder (tokenizer.json, tokenizer_config.json). Code in the folder is never run.

    It also knows what the folder says beside the tokenizer: ``add_bos_token``, and the ids that end a response
    (`special_ids.follow_folder`).

    Raises:
      ValueError: there is no tokenizer, it cannot be read, or it names no EOS token; or the folder says of its special
        ids what cannot be.
    """
    try:
        file = check_tokenizer(path)
    except FileNotFoundError:
        raise ValueError(f"no tokenizer.json in {path}: pass the folder that holds the model's tokenizer") from None
    tokenizer = open_tokenizer(path, file)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {path} names no EOS token: set eos_token in tokenizer_config.json")
    follow_folder(tokenizer, path)
    return tokenizer


def open_tokenizer(folder: str | os.PathLike[str], file: Path) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer as transformers reads it; `load_tokenizer` also obeys the folder's other files.

    Args:
      folder: that holds it.
      file: its tokenizer.json, checked (`rlhf_jax.run.files.check_tokenizer`).

    Raises:
      ValueError: it cannot be read.
    """
    import transformers  # slow to import, and only this needs it

    try:  # The file is named, so that tokenizer_config.json cannot name another.
        return transformers.PreTrainedTokenizerFast.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, tokenizer_file=str(file)
        )
    except Exception as error:  # The Rust parser raises bare Exception.
        raise ValueError(f"the tokenizer in {folder} cannot be read ({error}): copy or save it again") from error


def tokenizer_fingerprint(tokenizer: transformers.PreTrainedTokenizerFast) -> str:
    """sha256 of everything that decides the ids of a text, what comes before it included, and of the EOS id."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Set by the last call's arguments, not part of the vocabulary.
    for call_state in ("truncation", "padding"):
        state.pop(call_state, None)
    state["eos_token_id"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def check_same_tokenizer(**tokenizers: transformers.PreTrainedTokenizerFast) -> None:
    """Raise unless all tokenizers give the same ids: ``check_same_tokenizer(policy=a, reward_model=b)``.

    Raises:
      ValueError: naming two that differ.
    """
    (first, reference), *others = tokenizers.items()
    for name, other in others:
        begins, others_begin = begin_ids(reference), begin_ids(other)
        if begins != others_begin:
            raise ValueError(
                f"the tokenizers of {first} and {name} differ: {first} begins each text with the ids {list(begins)} "
                f"and {name} with {list(others_begin)} (BOS); token ids pass between the models unchanged, so start "
                "both from the same base model, or write the same add_bos_token into their tokenizer_config.json"
            )
        if tokenizer_fingerprint(reference) != tokenizer_fingerprint(other):
            raise ValueError(
                f"the tokenizers of {first} ({len(reference)} tokens) and {name} ({len(other)} tokens) differ: "
                "token ids pass between the models unchanged, so start both from the same base model"
            )


def encode_prompt(
    tokenizer: transformers.PreTrainedTokenizerFast, prompt: Conversation, *, bos_id: int | None = None
) -> list[int]:
    """Token ids of a prompt, up to where the response begins.

    The name of a special token inside a text or a message stays ordinary text: a user cannot write a control token.

    Args:
      tokenizer: its chat template writes messages; where it has none, `chat.PLAIN_TEMPLATE` does.
      prompt: a text, which the template's ending follows, or messages of which the last is not the assistant's.
      bos_id: comes first instead of what the tokenizer puts before a text (`begin_ids`); None for messages, whose
        template writes its own.

    Raises:
      ValueError: messages that the template cannot write (see `chat.encode_messages`), or `bos_id` with messages.
    """
    if isinstance(prompt, str):
        ids = chat.encode_text(tokenizer, prompt + PROMPT_END)
        return [*(begin_ids(tokenizer) if bos_id is None else [bos_id]), *ids]
    if bos_id is not None:
        raise ValueError(f"bos_id={bos_id} does not go with messages: a chat template writes BOS itself; leave it out")
    return chat.encode_messages(tokenizer, prompt)[0]


def encode_opening(tokenizer: transformers.PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a text that a model goes on with as it stands: a few-shot prompt, a question without a template."""
    return [*begin_ids(tokenizer), *chat.encode_text(tokenizer, text)]


def encode_response(tokenizer: transformers.PreTrainedTokenizerFast, text: str, *, eos_id: int) -> list[int]:
    """Token ids of a whole response to a text, EOS last."""
    return [*chat.encode_text(tokenizer, text), eos_id]


def encode_answer(tokenizer: transformers.PreTrainedTokenizerFast, prompt: Conversation, response: str) -> list[int]:
    """Token ids of a whole response to `prompt`: EOS last after a text, the template's end of turn after messages."""
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
      assistant_turns: of messages, "all" trains on the assistant's earlier turns too, "last" on the response alone. A
        text has one.
    """
    if not isinstance(prompt, str):
        return chat.encode_conversation(tokenizer, [*prompt, Message("assistant", response)], turns=assistant_turns)
    asked, said = encode_prompt(tokenizer, prompt), encode_answer(tokenizer, prompt, response)
    return [*asked, *said], [False] * len(asked) + [True] * len(said)


def encode_document(tokenizer: transformers.PreTrainedTokenizerFast, text: str, *, eos_id: int) -> list[int]:
    """Token ids of a document of the pretraining mix: what the tokenizer puts before a text, the text, EOS."""
    return [*encode_opening(tokenizer, text), eos_id]


def stop_ids(tokenizer: transformers.PreTrainedTokenizerFast, prompts: Iterable[Conversation]) -> tuple[int, ...]:
    """The ids that end a response to any of `prompts`.

    They are EOS, the other ids that the model's generation_config.json names, and what the chat template ends the
    assistant's turn with.
    """
    roles = {tuple(m.role for m in p): p for p in prompts if not isinstance(p, str)}
    ends = (chat.next_turn(tokenizer, messages).end_id for messages in roles.values())
    return tuple(dict.fromkeys([*end_ids(tokenizer), *ends]))


def exported_end_ids(tokenizer: transformers.PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The ids to write as ``eos_token_id`` of an exported model, so that other programs stop where this one does.

    Those of the folder that the tokenizer came from, in that order; the tokenizer's EOS; and the end of turn of its
    chat template.
    """
    ends = [*folder_end_ids(tokenizer), require_eos_id(tokenizer), end_of_turn_id(tokenizer)]
    return tuple(dict.fromkeys(i for i in ends if i is not None))


def end_of_turn_id(tokenizer: transformers.PreTrainedTokenizerFast) -> int | None:
    """What the tokenizer's own chat template ends the assistant's turn with.

    None where the tokenizer has no template, or one that no conversation can be encoded with: then none was.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    asked = Message("user", "x")
    for messages in ((asked,), (Message("system", "x"), asked)):  # some templates want a system turn first
        with contextlib.suppress(ValueError):
            return chat.next_turn(tokenizer, messages).end_id
    return None


def decode_response(tokenizer: transformers.PreTrainedTokenizerFast, ids: Ids, *, eos_id: int | Sequence[int]) -> str:
    """The text before the first of the `eos_id` (all of it when there is none).

    For people and scorers; never encode it again.
    """
    ends = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    ids = [int(i) for i in ids]
    end = next((place for place, i in enumerate(ids) if i in ends), len(ids))
    return str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def decode_answer(
    tokenizer: transformers.PreTrainedTokenizerFast, prompt: Conversation, ids: Ids, *, stop_ids: Sequence[int]
) -> str:
    """The text of a response to `prompt`, without the spaces that a chat template puts around an answer."""
    said = decode_response(tokenizer, ids, eos_id=stop_ids)
    if isinstance(prompt, str):
        return said
    turn = chat.next_turn(tokenizer, prompt)
    return said.removeprefix(turn.lead).removesuffix(turn.tail.removesuffix(turn.end))


# ------------------------------------------------------------------------------------------------------ packing


def best_fit(sizes: Sequence[int], *, capacity: int, max_items: int | None = None) -> list[list[int]]:
    """Indices of items, grouped into rows: largest item first, each into the fullest row that still has room.

    Args:
      sizes: tokens of each item.
      capacity: tokens of a row.
      max_items: most items of a row; None = no limit.

    >>> best_fit([3, 5, 2, 6], capacity=8)
    [[3, 2], [1, 0]]
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted: bisect finds the tightest fit
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if sizes[item] > capacity:
            raise ValueError(
                f"item {item} has {sizes[item]} tokens but length={capacity}: raise length, or leave such items out "
                "with drop_too_long, which counts them"
            )
        place = bisect.bisect_left(room, (sizes[item], -1))
        free, row = room.pop(place) if place < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        if max_items is None or len(rows[row]) < max_items:
            bisect.insort(room, (free - sizes[item], row))
    return rows


def drop_too_long(items: Sequence[Item], *, length: int) -> tuple[list[Item], int]:
    """The items that fit in a row of `length` tokens, and how many do not. An item is whatever a row function takes.

    >>> drop_too_long([([1, 2], [3]), ([1, 2, 3], [4, 5])], length=4)
    ([([1, 2], [3])], 1)
    """
    kept = [item for item in items if _tokens(item) <= length]
    return kept, len(items) - len(kept)


def padding_share(batch: LMBatch | RankingBatch) -> float:
    """Share of the slots that hold padding: compute spent on nothing."""
    return float(np.mean(np.asarray(batch.segments) == 0))


def _tokens(item: Any) -> int:
    """Slots that a document, a pair, a masked piece or a ranking takes; responses of rank -1 take none."""
    if not len(item) or np.ndim(item[0]) == 0:
        return len(item)
    if len(item) == 2 and isinstance(item[1][0] if len(item[1]) else 0, bool):
        return len(item[0])
    if len(item) == 2:
        return sum(len(ids) for ids in item)
    prompt, responses, ranks = item
    return len(prompt) + sum(len(r) for r, rank in zip(responses, ranks, strict=True) if rank >= 0)


# --------------------------------------------------------------------------------------------------------- rows


def prompt_batch(prompts: Sequence[Ids], *, length: int, ids: Sequence[int] | None = None) -> PromptBatch:
    """Prompts as right-padded rows.

    Args:
      prompts: token ids of each prompt, as `encode_prompt` gives them.
      length: slots of a row, in tokens.
      ids: each prompt's place in the stream; None = 0, 1, ..

    Raises:
      ValueError: a prompt is empty or longer than `length`, or `ids` has another length.
    """
    ids = range(len(prompts)) if ids is None else ids
    if len(ids) != len(prompts):
        raise ValueError(f"ids has {len(ids)} entries for {len(prompts)} prompts: give one each")
    (tokens,), (lengths,) = _zeros(1, len(prompts), length), _zeros(1, len(prompts))
    for b, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= length:
            raise ValueError(
                f"prompt {b} has {len(prompt)} tokens but length={length}: use 1 to {length} tokens, raise length, "
                "or leave such prompts out with drop_too_long, which counts them"
            )
        tokens[b, : len(prompt)], lengths[b] = prompt, len(prompt)
    places: Any = np.array(ids, np.int32)
    return PromptBatch(tokens=tokens, lengths=lengths, ids=places)


def sft_rows(
    pairs: Sequence[tuple[Ids, Ids]], *, length: int, mask_prompt: bool = True, max_pieces: int | None = None
) -> LMBatch:
    """Demonstrations, several to a row (best fit), each a segment of its own with positions from 0.

    Args:
      pairs: (prompt ids, response ids with EOS).
      length: slots of a row, in tokens.
      mask_prompt: targets are the response tokens and EOS; False adds the prompt's tokens but its first. The paper
        does not say which it used.
      max_pieces: most demonstrations of a row; 1 makes a batch of 32 rows one of 32 demonstrations, at the price of
        padding. None = as many as fit.

    Raises:
      ValueError: a prompt or response is empty, or a pair is longer than `length`.

    Source: Ouyang et al. 2022, appendix C.1; Ziegler et al. 2019 for the separate tokenising.
    """
    for i, (prompt, response) in enumerate(pairs):
        if not len(prompt) or not len(response):
            raise ValueError(f"pair {i} has {len(prompt)} prompt and {len(response)} response tokens: both need one")
    context = [len(prompt) if mask_prompt else 1 for prompt, _ in pairs]
    pieces = [[*prompt, *response] for prompt, response in pairs]
    return masked_rows(
        [(p, _after(c, len(p))) for p, c in zip(pieces, context, strict=True)], length=length, max_pieces=max_pieces
    )


def masked_rows(pieces: Sequence[MaskedIds], *, length: int, max_pieces: int | None = None) -> LMBatch:
    """Pieces with targets of their own, several to a row (best fit), each a segment with positions from 0.

    Args:
      pieces: (ids, mask), as `encode_demonstration` gives them; the mask is True where an id is a target.
      length: slots of a row, in tokens.
      max_pieces: most pieces of a row; None = as many as fit.

    Raises:
      ValueError: a piece is longer than `length`, a mask has another length than its ids, its first id is a target
        (nothing predicts it), or it has no target.
    """
    for i, (ids, mask) in enumerate(pieces):
        if len(ids) != len(mask):
            raise ValueError(f"piece {i} has {len(ids)} ids and a mask of {len(mask)}: give one entry each")
        if not any(mask) or mask[0]:
            raise ValueError(f"piece {i} needs a target, and not at its first id, which nothing predicts")
    return _lm_rows(pieces, length, max_pieces)


def lm_rows(documents: Sequence[Ids], *, length: int) -> LMBatch:
    """Documents with their EOS (see `encode_document`), several to a row (best fit), each a segment of its own.

    A document longer than a row is split into pieces of `length` tokens, each its own segment. Every token is a target
    but the first of a piece, which has no predecessor.
    """
    pieces = [list(d[i : i + length]) for d in documents for i in range(0, len(d), length)]
    return _lm_rows([(piece, _after(1, len(piece))) for piece in pieces], length)


def ranking_rows(
    rankings: Sequence[RankedIds],
    *,
    length: int,
    max_k: int,
    max_n: int | None = None,
) -> RankingBatch:
    """Ranked responses as shared-prefix rows, several prompts to a row where they fit (best fit).

    A prompt is one segment without parent; each response is a segment whose parent is the prompt and whose positions
    go on from the prompt's length. A ranking costs prompt + sum of responses tokens, once, and never leaves its row.

    Args:
      rankings: prompt, responses and ranks. A response of rank -1 takes no tokens; its end is 0.
      length: slots of a row, in tokens.
      max_k: K of the batch; a ranking with fewer responses is filled up with rank -1.
      max_n: N of the batch, the most prompts of a row; None = as many as the fullest row holds.

    Returns:
      ``ends, ranks: "B N K"``; places without a prompt have rank -1 and end 0.

    Raises:
      ValueError: a ranking is longer than `length`, has more than `max_k` responses, an empty prompt or an empty
        response, or ranks that do not match.

    Source: Ouyang et al. 2022, section 3.5: all comparisons of a prompt are one batch element.
    """
    for i, ranking in enumerate(rankings):
        _check_ranking(i, ranking, max_k)
    rows = best_fit([_tokens(r) for r in rankings], capacity=length, max_items=max_n)
    n = max([len(row) for row in rows], default=0) if max_n is None else max_n
    return _ranking_batch([[rankings[i] for i in row] for row in rows], length, n, max_k)


def ranking_batch(samples: Samples, ranks: Int[np.ndarray, "B K"], *, length: int | None = None) -> RankingBatch:
    """Sampled and ranked responses as shared-prefix rows, one prompt a row: from sampling to reward training.

    Args:
      samples: rows ``b*K + k`` hold sample k of prompt b; token ids go on unchanged.
      ranks: 0 best, ties equal, -1 not ranked (such a sample takes no tokens).
      length: slots of a row, in tokens; None = what the longest row needs.

    Returns:
      Row b is prompt b, so ``ends, ranks: "B 1 K"``.

    Raises:
      ValueError: the samples are not K rows a prompt, or a row does not fit.
    """
    prompts, k = ranks.shape
    tokens, starts, ends = (np.asarray(x) for x in (samples.tokens, samples.prompt_lengths, samples.lengths))
    if len(tokens) != prompts * k:
        raise ValueError(f"samples has {len(tokens)} rows but ranks has shape {ranks.shape}: K samples a prompt")
    rankings = []
    for b in range(prompts):
        rows = range(b * k, b * k + k)
        prompt = tokens[b * k, : starts[b * k]].tolist()
        if any(tokens[i, : starts[i]].tolist() != prompt for i in rows):
            raise ValueError(f"samples rows {b * k} to {b * k + k - 1} have different prompts: row b*K + k is sample k")
        responses = [tokens[i, starts[i] : ends[i]].tolist() for i in rows]
        rankings.append((prompt, responses, ranks[b].tolist()))
        _check_ranking(b, rankings[-1], k)
    needed = max([_tokens(r) for r in rankings], default=0)
    if length is not None and needed > length:
        raise ValueError(f"a prompt and its {k} samples need {needed} tokens but length={length}: raise length")
    return _ranking_batch([[r] for r in rankings], needed if length is None else length, 1, k)


def _zeros(count: int, *shape: int) -> list[Any]:
    """Arrays for the fields of a struct; Any, because the structs' types are those on the device."""
    return [np.zeros(shape, np.int32) for _ in range(count)]


def _check_ranking(i: int, ranking: RankedIds, max_k: int) -> None:
    prompt, responses, ranks = ranking
    if len(responses) != len(ranks):
        raise ValueError(f"ranking {i} has {len(responses)} responses and {len(ranks)} ranks: give one rank each")
    if len(responses) > max_k:
        raise ValueError(f"ranking {i} has {len(responses)} responses but max_k={max_k}: raise max_k")
    if not len(prompt) or any(not len(r) for r, rank in zip(responses, ranks, strict=True) if rank >= 0):
        raise ValueError(f"ranking {i} has an empty prompt or response: a response holds at least its EOS")


def _after(context: int, count: int) -> list[bool]:
    """The mask of `count` tokens of which all but the first `context` are targets."""
    return [place >= context for place in range(count)]


def _lm_rows(pieces: Sequence[MaskedIds], length: int, max_pieces: int | None = None) -> LMBatch:
    rows = best_fit([len(ids) for ids, _ in pieces], capacity=length, max_items=max_pieces)
    tokens, segments, positions = _zeros(3, len(rows), length)
    mask: Any = np.zeros((len(rows), length), bool)
    for b, row in enumerate(rows):
        start = 0
        for segment, item in enumerate(row, start=1):
            ids, targets = pieces[item]
            end = start + len(ids)
            tokens[b, start:end] = ids
            segments[b, start:end] = segment
            positions[b, start:end] = np.arange(len(ids))
            mask[b, start:end] = targets
            start = end
    return LMBatch(tokens=tokens, segments=segments, positions=positions, mask=mask)


def _ranking_batch(rows: Sequence[Sequence[RankedIds]], t: int, n: int, k: int) -> RankingBatch:
    tokens, segments, parents, positions = _zeros(4, len(rows), t)
    ends, ranks = _zeros(2, len(rows), n, k)
    ranks -= 1

    def write(b: int, start: int, ids: Ids, segment: int, parent: int, position: int) -> int:
        piece = (b, slice(start, start + len(ids)))
        tokens[piece], segments[piece], parents[piece] = ids, segment, parent
        positions[piece] = position + np.arange(len(ids))
        return start + len(ids)

    for b, row in enumerate(rows):
        start = segment = 0
        for place, (prompt, responses, prompt_ranks) in enumerate(row):
            segment += 1
            parent = segment
            start = write(b, start, prompt, parent, 0, 0)
            for j, (response, rank) in enumerate(zip(responses, prompt_ranks, strict=True)):
                if rank < 0:
                    continue
                segment += 1
                start = write(b, start, response, segment, parent, len(prompt))
                ends[b, place, j], ranks[b, place, j] = start - 1, rank
    return RankingBatch(tokens, segments, parents, positions, ends, ranks)
