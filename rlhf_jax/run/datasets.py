"""Reads data files as rows of token ids, and as batches that are split between processes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax

from rlhf_jax import sharding
from rlhf_jax.data import chat, schema, templated, text
from rlhf_jax.data.loader import Batches
from rlhf_jax.run import contexts, processes
from rlhf_jax.types import LMBatch


def read_records(
    path: str | os.PathLike[str], kind: type[schema.Record], tokenizer: Any = None, **reading: Any
) -> list[schema.Record]:
    """Calls `schema.read_jsonl`, and prints a note where texts were rendered by a chat template.

    Args:
      path: the file.
      kind: the type of its records.
      tokenizer: its special tokens are searched for as well; None searches only for those of
        well-known models.
      **reading: further arguments of `schema.read_jsonl`.
    """
    records, report = schema.read_jsonl(
        path, kind, special_tokens=templated.pattern(tokenizer), **reading
    )
    note = report and templated.note(records, report, tokenizer)
    if note and processes.index() == 0:
        print(note, flush=True)
    return records


def read_prompts(
    path: str | os.PathLike[str], limit: int | None = None, *, tokenizer: Any = None
) -> list[schema.Prompt]:
    """The prompts of a JSONL file, at most `limit` of them.

    Raises:
      ValueError: the file contains no prompt.
    """
    prompts = read_records(path, schema.Prompt, tokenizer)
    if not prompts:
        raise ValueError(f"{path} holds no prompts: check how it was made")
    return prompts if limit is None else prompts[:limit]


def encode_prompts(
    tokenizer: Any, prompts: Sequence[schema.Conversation], *, length: int, where: str
) -> list[list[int]]:
    """The token ids of each prompt.

    Raises:
      ValueError: a prompt is longer than `length` tokens.
    """
    ids = [text.encode_prompt(tokenizer, prompt) for prompt in prompts]
    # The longest prompt alone is named: it gives the `prompt_length` that all prompts need.
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[longest]) > length:
        raise ValueError(
            f"{where}: a prompt has {len(ids[longest])} tokens and prompt_length is {length} "
            f"({chat.readable(prompts[longest])[:60]!r}...): "
            "raise prompt_length or leave the prompt out"
        )
    return ids


def lm_rows(
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    length: int,
    context: contexts.Context | None = None,
    key: str = "row_length",
) -> LMBatch:
    """Packed rows of a JSONL file of plain text.

    Args:
      tokenizer: of the model that reads the rows.
      path: the file.
      length: slots per row; a longer document is split.
      context: the context length of that model; None skips the check.
      key: the config key that sets `length`, for the message.

    Raises:
      ValueError: a piece of a document needs more positions than the model has.
    """
    documents = read_records(path, schema.PlainText, tokenizer)
    ids = [
        text.encode_document(tokenizer, d.text, eos_id=tokenizer.eos_token_id) for d in documents
    ]
    rows = text.lm_rows(ids, length=length)
    if context is not None:
        contexts.check_rows(
            context, rows, f"{path}: a piece of a document in rows of {key}={length}"
        )
    return rows


def batches(rows: Any, mesh: jax.sharding.Mesh, *, batch_size: int, seed: int) -> Batches[Any]:
    """The stream of batches of `rows`; this process reads only its share of each batch."""
    # Not one share per process: processes that share a tensor axis read the same rows.
    index, count = sharding.batch_share(mesh)
    return Batches(rows, batch_size=batch_size, seed=seed, process_index=index, process_count=count)


def held_out_batches(
    rows: LMBatch, mesh: jax.sharding.Mesh, *, batch_size: int, seed: int, most: int | None = None
) -> list[LMBatch]:
    """Batches of held-out text on the devices, in which each row counts once in a measured loss.

    Args:
      rows: all rows.
      mesh: the devices to place the batches on.
      batch_size: rows per batch.
      seed: of the order of the rows, which matters where only some batches are taken.
      most: the maximal number of batches; None takes all.
    """
    # Rows that fill up the last batch must not count a second time: masked, they are no targets.
    found = batches(rows, mesh, batch_size=batch_size, seed=seed).each_once(most)
    return [
        sharding.place_batch(dataclasses.replace(batch, mask=batch.mask & counts[:, None]), mesh)
        for batch, counts in found
    ]
