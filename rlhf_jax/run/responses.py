"""Sampling responses to prompts in batches, and scoring them with a reward model."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from rlhf_jax import backends, scoring, sharding
from rlhf_jax.data import chat, schema, text
from rlhf_jax.models.vocabulary import with_texts_only
from rlhf_jax.run import contexts, processes
from rlhf_jax.run.console import Progress
from rlhf_jax.run.networks import Network
from rlhf_jax.sampling.generate import Sampling
from rlhf_jax.sampling.refill import Rows, generate_many
from rlhf_jax.types import Model, Params, PromptBatch, Samples


class EncodedPrompts(NamedTuple):
    """Prompts as token ids, in rows of `length` slots."""

    ids: Sequence[Sequence[int]]
    length: int
    """Fewer slots are used where the model's context leaves no more beside a response."""
    prompts: Sequence[schema.Conversation] = ()
    """What the ids stand for: after messages a response ends as the chat template ends a turn. Left
    out, EOS ends every response."""


def sample_responses(
    network: Network,
    encoded: EncodedPrompts,
    mesh: jax.sharding.Mesh,
    sampling: Sampling,
    *,
    counts: int | Sequence[int] = 1,
    seed: int,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[str], Samples]:
    """Samples responses to each prompt; returns them as text and as arrays, grouped by prompt.

    Args:
      network: a language model.
      encoded: the prompts.
      mesh: the mesh to sample on.
      sampling: how; its `stop_ids` end a response besides those of the prompts.
      counts: responses per prompt, one number for all or one each.
      seed: with each prompt's index and the number of the response the only source of randomness.
      batch_size: rows sampled together.
      progress: called with (responses done, responses).

    Raises:
      ValueError: a prompt with a whole response after it is longer than the model's context.
    """
    ids, length, prompts = encoded
    context = contexts.of_network(network)
    name = contexts.prompt_of("prompts", prompts) if prompts else lambda i: f"prompt {i + 1}"
    contexts.check(context, [len(each) for each in ids], name, new=sampling.max_new_tokens)
    # Callers round the length up; slots of padding need no positions of the model.
    if context.length is not None:
        length = min(length, context.length - sampling.max_new_tokens)
    ends = text.stop_ids(network.tokenizer, prompts)
    # Rows are split over both of these axes, so their product must divide the number of rows.
    data = mesh.shape["data"] * mesh.shape["fsdp"]
    samples = generate_many(
        with_texts_only(network.model, network.tokenizer),
        network.params,
        text.prompt_batch(ids, length=length),
        jax.random.key(seed),
        dataclasses.replace(sampling, stop_ids=(*ends, *sampling.stop_ids)),
        counts=counts,
        progress=progress,
        rows=Rows(
            # Rounded up, since rows are divided evenly over the devices.
            count=-(-batch_size // data) * data,
            streams=sampling_streams(mesh),
            sharding=sharding.batch_sharding(mesh),
        ),
    )
    repeats = np.broadcast_to(counts, len(prompts))
    answered = [p for p, count in zip(prompts, repeats, strict=True) for _ in range(count)]
    return response_texts(network.tokenizer, samples, answered), samples


def sampling_streams(mesh: jax.sharding.Mesh) -> int:
    """The number of sampling streams: two on a CPU with several cores, else one.

    A single stream does not keep two cores busy; accelerators use one.
    """
    alone = mesh.size == 1 and backends.platform_of(mesh) == "cpu"
    # Those that this process may use: a container often has fewer cores than the machine.
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return 2 if alone and cores > 1 else 1


def response_texts(
    tokenizer: Any, samples: Samples, asked: Sequence[schema.Conversation] = ()
) -> list[str]:
    """Decodes the responses as text, for people and judges; updates use the token ids directly.

    Args:
      tokenizer: the tokenizer of the model that sampled them.
      samples: N responses.
      asked: the N prompts of the responses; without it they end at EOS.
    """
    fetched = processes.gather(samples)
    rows = [
        row[start:end].tolist()
        for row, start, end in zip(
            fetched.tokens, fetched.prompt_lengths, fetched.lengths, strict=True
        )
    ]
    ends = text.stop_ids(tokenizer, asked)
    prompts = asked or [""] * len(rows)
    return [
        text.decode_answer(tokenizer, p, ids, stop_ids=ends)
        for p, ids in zip(prompts, rows, strict=True)
    ]


def score_responses(
    network: Network,
    prompts: Sequence[schema.Conversation],
    responses: Sequence[str],
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
) -> np.ndarray:
    """Raw reward-model score of each response to its prompt, one number per response.

    Raises:
      ValueError: a prompt with its response exceeds the model's context; nothing is computed then.
    """
    return score_rows(
        network, scoring_rows(network, prompts, responses), mesh, batch_size=batch_size
    )


def scoring_rows(
    network: Network, prompts: Sequence[schema.Conversation], responses: Sequence[str]
) -> list[list[int]]:
    """Token ids of each prompt with its whole response, encoded as in reward-model training.

    Raises:
      ValueError: one is longer than the model's context.
    """
    rows = [
        [*text.encode_prompt(network.tokenizer, p), *text.encode_answer(network.tokenizer, p, r)]
        for p, r in zip(prompts, responses, strict=True)
    ]

    def name(i: int) -> str:
        return (
            f"scoring: the response {responses[i][:40]!r}.. with its prompt "
            f"{chat.readable(prompts[i])[:40]!r}.."
        )

    contexts.check(contexts.of_network(network), [len(row) for row in rows], name)
    return rows


def fitting_scoring_rows(
    network: Network, prompts: Sequence[schema.Conversation], responses: Sequence[str]
) -> tuple[list[list[int]], int]:
    """`scoring_rows` for sampled responses, and how many of them had to be truncated.

    Encoding a text again may give more tokens than were sampled: with another tokenizer, or for
    bytes that are not valid text. The ids beyond the context are then dropped, just as PPO scores a
    response that `max_new_tokens` cut off.

    Raises:
      ValueError: a prompt alone fills the model's context.
    """
    most = contexts.of_network(network).length
    rows, cut = [], 0
    for prompt, response in zip(prompts, responses, strict=True):
        asked = text.encode_prompt(network.tokenizer, prompt)
        # Only the response may be cut: scores compare responses after the same whole prompt.
        said = text.encode_answer(network.tokenizer, prompt, response)
        room = len(said) if most is None else most - len(asked)
        if room < 1:
            raise ValueError(
                f"scoring: the prompt {chat.readable(prompt)[:60]!r}.. has {len(asked)} tokens and "
                f"{contexts.of_network(network)}, which leaves nothing for a response: "
                f"{contexts.ADVICE}"
            )
        cut += len(said) > room
        rows.append([*asked, *said[:room]])
    return rows, cut


def score_rows(
    network: Network, rows: Sequence[Sequence[int]], mesh: jax.sharding.Mesh, *, batch_size: int
) -> np.ndarray:
    """Raw reward-model score of each row of ids, read at its last token."""
    scores, most = np.zeros(len(rows)), contexts.of_network(network).length
    parts = [*by_length([len(row) for row in rows], batch_size, most=most)]
    # Progress counts slots: rows are sorted by length, so the last batches take longest.
    work = np.cumsum([len(index) * slots for index, slots in parts], dtype=int)
    with Progress("scoring", int(work[-1]) if parts else 0, unit="slots") as progress:
        for (index, slots), done in zip(parts, work, strict=True):
            batch = text.prompt_batch([rows[i] for i in index], length=slots)
            placed = sharding.place_batch(sharding.own_rows(batch, mesh), mesh)
            scores[index] = processes.gather(_scores(network.model, network.params, placed))
            progress(int(done))
    return scores


def in_batches(
    function: Callable[[Any], jax.Array], rows: Any, size: int, mesh: jax.sharding.Mesh, name: str
) -> Any:
    """A function of rows, applied to `size` rows at a time, with progress shown under `name`.

    The last batch is padded with the last row, so that one compiled program serves all batches.
    """
    count, found = len(rows.tokens), []
    with Progress(name, count, unit="rows") as progress:
        for start in range(0, count, size):
            index = np.minimum(np.arange(start, start + size), count - 1)
            batch = jax.tree.map(lambda x, index=index: x[index], rows)
            batch = sharding.place_batch(sharding.own_rows(batch, mesh), mesh)
            found.append(processes.gather(function(batch)))
            progress(min(start + size, count))
    return np.concatenate(found)[:count]


def by_length(
    lengths: ArrayLike, batch_size: int, *, most: int | None = None
) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of rows of similar length, to reduce padding: their indices and numbers of slots.

    The last batch is filled up by repeating its longest row. Slots are multiples of 32, so that few
    programs are compiled, but never more than `most`: a model has no positions beyond its context,
    not even for padding.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        index = order[np.minimum(np.arange(start, start + batch_size), len(order) - 1)]
        # The batch is sorted by length, so its last row is the longest.
        slots = -(-int(lengths[index[-1]]) // 32) * 32
        yield index, slots if most is None else min(slots, most)


# At module level, so that all calls share the compiled programs.
@functools.partial(jax.jit, static_argnames="model")
def _scores(model: Model, params: Params, rows: PromptBatch) -> jax.Array:
    return scoring.sequence_scores(model, params, rows.tokens, rows.lengths)
