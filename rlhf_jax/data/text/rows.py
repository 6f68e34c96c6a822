"""Builds the rows of a batch from ids: tokens, segments, positions and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from rlhf_jax.data.text.encoding import Ids, MaskedIds
from rlhf_jax.data.text.packing import best_fit, slots_of
from rlhf_jax.types import LMBatch, PromptBatch, RankingBatch, Samples

RankedIds = tuple[Ids, Sequence[Ids], Sequence[int]]
"""Ids of a prompt, of its K responses (with EOS), and K ranks: 0 best, ties equal, -1 absent."""


def prompt_batch(
    prompts: Sequence[Ids], *, length: int, ids: Sequence[int] | None = None
) -> PromptBatch:
    """Prompts as right-padded rows.

    Args:
      prompts: token ids of each prompt, from `encode_prompt`.
      length: slots of a row, in tokens.
      ids: index of each prompt in the stream; None = 0, 1, ..

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
                f"prompt {b} has {len(prompt)} tokens but length={length}: use 1 to {length} "
                "tokens, raise length, or leave such prompts out with drop_too_long, which counts "
                "them"
            )
        tokens[b, : len(prompt)], lengths[b] = prompt, len(prompt)
    places: Any = np.array(ids, np.int32)
    return PromptBatch(tokens=tokens, lengths=lengths, ids=places)


def sft_rows(
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    length: int,
    mask_prompt: bool = True,
    max_pieces: int | None = None,
) -> LMBatch:
    """Packs demonstrations into rows (best fit), each as a segment with positions from 0.

    Args:
      pairs: (prompt ids, response ids with EOS).
      length: slots of a row, in tokens.
      mask_prompt: True trains on the response tokens and EOS; False also on the prompt's tokens
        but the first. The paper does not state which it used.
      max_pieces: most demonstrations per row; with 1 a batch of 32 rows has 32 demonstrations, at
        the price of padding. None = as many as fit.

    Raises:
      ValueError: a prompt or response is empty, or a pair is longer than `length`.

    Source: Ouyang et al. 2022, appendix C.1; Ziegler et al. 2019 for the separate tokenising.
    """
    for i, (prompt, response) in enumerate(pairs):
        if not len(prompt) or not len(response):
            raise ValueError(
                f"pair {i} has {len(prompt)} prompt and {len(response)} response tokens: both need "
                "one"
            )
    # The mask begins after the prompt, or after the first token, which nothing predicts.
    context = [len(prompt) if mask_prompt else 1 for prompt, _ in pairs]
    pieces = [[*prompt, *response] for prompt, response in pairs]
    return masked_rows(
        [(p, _after(c, len(p))) for p, c in zip(pieces, context, strict=True)],
        length=length,
        max_pieces=max_pieces,
    )


def masked_rows(
    pieces: Sequence[MaskedIds], *, length: int, max_pieces: int | None = None
) -> LMBatch:
    """Packs pieces with masks into rows (best fit), each as a segment with positions from 0.

    Args:
      pieces: (ids, mask), from `encode_demonstration`; the mask is True where an id is a target.
      length: slots of a row, in tokens.
      max_pieces: most pieces per row; None = as many as fit.

    Raises:
      ValueError: a piece is longer than `length`, a mask has another length than its ids, its first
        id is a target (nothing predicts it), or it has no target.
    """
    for i, (ids, mask) in enumerate(pieces):
        if len(ids) != len(mask):
            raise ValueError(
                f"piece {i} has {len(ids)} ids and a mask of {len(mask)}: give one entry each"
            )
        if not any(mask) or mask[0]:
            raise ValueError(
                f"piece {i} needs a target, and not at its first id, which nothing predicts"
            )
    return _lm_rows(pieces, length, max_pieces)


def lm_rows(documents: Sequence[Ids], *, length: int) -> LMBatch:
    """Packs documents into rows (best fit), each as a segment with positions from 0.

    A document ends with its EOS (`encode_document`). One that is longer than a row is split into
    pieces of `length` tokens, each its own segment. Every token is a target but the first of a
    piece, which has no predecessor.
    """
    # A piece starts at position 0 like a document of its own, and its first token is no target.
    pieces = [list(d[i : i + length]) for d in documents for i in range(0, len(d), length)]
    return _lm_rows([(piece, _after(1, len(piece))) for piece in pieces], length)


def ranking_rows(
    rankings: Sequence[RankedIds],
    *,
    length: int,
    max_k: int,
    max_n: int | None = None,
) -> RankingBatch:
    """Packs rankings into shared-prefix rows (best fit), several prompts per row where they fit.

    A prompt is one segment without a parent. Each response is a segment with the prompt as its
    parent and positions that continue from the prompt's length. So a ranking takes prompt + sum of
    responses tokens, all of them in one row.

    Args:
      rankings: prompt, responses and ranks. A response of rank -1 takes no tokens; its end is 0.
      length: slots of a row, in tokens.
      max_k: K of the batch; a ranking with fewer responses is padded with rank -1.
      max_n: N of the batch, the most prompts per row; None = as many as the fullest row has.

    Returns:
      ``ends, ranks: "B N K"``; entries without a prompt have rank -1 and end 0.

    Raises:
      ValueError: a ranking is longer than `length`, has more than `max_k` responses, an empty
        prompt or an empty response, or ranks that do not match.

    Source: Ouyang et al. 2022, section 3.5: all comparisons of a prompt are one batch element.
    """
    for i, ranking in enumerate(rankings):
        _check_ranking(i, ranking, max_k)
    # The order of packing depends on sizes alone, so other code can repeat it to find an item.
    rows = best_fit([slots_of(r) for r in rankings], capacity=length, max_items=max_n)
    n = max([len(row) for row in rows], default=0) if max_n is None else max_n
    return _ranking_batch([[rankings[i] for i in row] for row in rows], length, n, max_k)


def ranking_batch(
    samples: Samples, ranks: Int[np.ndarray, "B K"], *, length: int | None = None
) -> RankingBatch:
    """Sampled and ranked responses as shared-prefix rows, one prompt per row.

    This connects sampling to the training of the reward model.

    Args:
      samples: row ``b*K + k`` is sample k of prompt b; its token ids are used unchanged.
      ranks: 0 best, ties equal, -1 not ranked (such a sample takes no tokens).
      length: slots of a row, in tokens; None = the length of the longest row.

    Returns:
      Row b is prompt b, so ``ends, ranks: "B 1 K"``.

    Raises:
      ValueError: the samples are not K rows per prompt, or a row does not fit.
    """
    prompts, k = ranks.shape
    tokens, starts, ends = (
        np.asarray(x) for x in (samples.tokens, samples.prompt_lengths, samples.lengths)
    )
    if len(tokens) != prompts * k:
        raise ValueError(
            f"samples has {len(tokens)} rows but ranks has shape {ranks.shape}: K samples a prompt"
        )
    rankings = []
    for b in range(prompts):
        rows = range(b * k, b * k + k)
        # The ids are taken from the samples and never re-encoded, which could change them.
        prompt = tokens[b * k, : starts[b * k]].tolist()
        if any(tokens[i, : starts[i]].tolist() != prompt for i in rows):
            raise ValueError(
                f"samples rows {b * k} to {b * k + k - 1} have different prompts: row b*K + k is "
                "sample k"
            )
        responses = [tokens[i, starts[i] : ends[i]].tolist() for i in rows]
        rankings.append((prompt, responses, ranks[b].tolist()))
        _check_ranking(b, rankings[-1], k)
    needed = max([slots_of(r) for r in rankings], default=0)
    if length is not None and needed > length:
        raise ValueError(
            f"a prompt and its {k} samples need {needed} tokens but length={length}: raise length"
        )
    return _ranking_batch([[r] for r in rankings], needed if length is None else length, 1, k)


def _zeros(count: int, *shape: int) -> list[Any]:
    """Arrays for the fields of a struct, typed Any as the fields are annotated as jax arrays."""
    return [np.zeros(shape, np.int32) for _ in range(count)]


def _check_ranking(i: int, ranking: RankedIds, max_k: int) -> None:
    prompt, responses, ranks = ranking
    if len(responses) != len(ranks):
        raise ValueError(
            f"ranking {i} has {len(responses)} responses and {len(ranks)} ranks: give one rank each"
        )
    if len(responses) > max_k:
        raise ValueError(
            f"ranking {i} has {len(responses)} responses but max_k={max_k}: raise max_k"
        )
    if not len(prompt) or any(
        not len(r) for r, rank in zip(responses, ranks, strict=True) if rank >= 0
    ):
        raise ValueError(
            f"ranking {i} has an empty prompt or response: a response holds at least its EOS"
        )


def _after(context: int, count: int) -> list[bool]:
    """The mask of `count` tokens of which all but the first `context` are targets."""
    return [place >= context for place in range(count)]


def _lm_rows(pieces: Sequence[MaskedIds], length: int, max_pieces: int | None = None) -> LMBatch:
    rows = best_fit([len(ids) for ids, _ in pieces], capacity=length, max_items=max_pieces)
    tokens, segments, positions = _zeros(3, len(rows), length)
    mask: Any = np.zeros((len(rows), length), bool)
    for b, row in enumerate(rows):
        start = 0
        for segment, item in enumerate(row, start=1):  # segment 0 is padding
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
    ranks -= 1  # -1 marks absent responses, and so all entries that are not written below

    # Positions continue from `position`: 0 for a prompt, the prompt's length for a response.
    def write(b: int, start: int, ids: Ids, segment: int, parent: int, position: int) -> int:
        piece = (b, slice(start, start + len(ids)))
        tokens[piece], segments[piece], parents[piece] = ids, segment, parent
        positions[piece] = position + np.arange(len(ids))
        return start + len(ids)

    for b, row in enumerate(rows):
        start = segment = 0
        for place, (prompt, responses, prompt_ranks) in enumerate(row):
            # Segments count from 1 within a row, as 0 marks padding; a prompt is the parent of the
            # segments of its responses.
            segment += 1
            parent = segment
            start = write(b, start, prompt, parent, 0, 0)
            for j, (response, rank) in enumerate(zip(responses, prompt_ranks, strict=True)):
                if rank < 0:
                    continue
                # Every response continues the prompt, wherever it is stored in the row.
                segment += 1
                start = write(b, start, response, segment, parent, len(prompt))
                # The end is the index of the last token, where the score is read, and so one less
                # than `start`.
                ends[b, place, j], ranks[b, place, j] = start - 1, rank
    return RankingBatch(tokens, segments, parents, positions, ends, ranks)
