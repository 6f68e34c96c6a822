"""How many positions a model has, and the refusal of rows that need more, before anything is
computed.

Learned positions (GPT-2) end where their table ends: beyond it a hidden state is NaN. Rotary
positions can be computed for any place, and beyond those that the model was trained on what comes
out means nothing. Both are refused alike. What counts is the largest position that a row uses: the
pieces of a packed row begin at 0 each, and padding uses none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import chat, schema
from rlhf_jax.models.hf import config_from_hf
from rlhf_jax.run import files

_FIELDS = ("max_position_embeddings", "n_positions", "sliding_window")
"""Fields of a config.json that may limit the context."""

ADVICE = "leave it out, shorten it, or use a model with a longer context"


class Context(NamedTuple):
    """How many positions a model has.

    Attributes:
      length: positions, or None where the model does not say.
      model: its name or folder; may be empty.
      field: the field of config.json that says so, with its value; may be empty.
    """

    length: int | None
    model: str = ""
    field: str = ""

    def __str__(self) -> str:
        """For a message: ``the context of runs/sft/epoch-1 is 1024 tokens (n_positions=1024 in its
        config.json)``.
        """
        of = f" of {self.model}" if self.model else " of the model"
        source = f" ({self.field} in its config.json)" if self.field else ""
        return f"the context{of} is {self.length} tokens{source}"


def of_folder(folder: Path) -> Context:
    """The context of a model on disk, from its config.json alone, so that a refusal comes before
    loading weights.

    Where there is no config.json (a GGUF file, a wrong path) the length is None: whoever loads the
    model tells.

    Raises:
      ValueError: config.json is damaged or of an unknown kind.
    """
    file = folder / "config.json"
    if not file.is_file():
        return Context(None, str(folder))
    description = files.read_json(file)
    if not isinstance(description, dict):
        return Context(None, str(folder))  # told where the model is loaded
    length = config_from_hf(description).context_length
    named = (name for name in _FIELDS if description.get(name) == length)
    field = next(named, "")
    return Context(length, str(folder), f"{field}={length}" if field else "")


def of_network(network: Any, folder: Path | None = None) -> Context:
    """The context of a loaded model; `folder`, where it is known, names it and the field."""
    length = getattr(getattr(network.model, "config", None), "context_length", None)
    if folder is None:
        return Context(length)
    found = of_folder(folder)
    return found if found.length == length else Context(length, str(folder))


def check(
    context: Context, sizes: Sequence[int], where: Callable[[int], str], *, new: int = 0
) -> None:
    """Refuses rows that need more positions than the model has.

    Args:
      context: of the model.
      sizes: tokens of each text.
      where: names text i for the message.
      new: tokens that are generated after each.

    Raises:
      ValueError: naming the longest, its tokens and the context.
    """
    if context.length is None or not len(sizes):
        return
    longest = int(np.argmax(sizes))
    if sizes[longest] + new <= context.length:
        return
    more = sum(size + new > context.length for size in sizes) - 1
    others = f" (and {more} more are too long)" if more else ""
    if new:
        raise ValueError(
            f"{where(longest)} has {sizes[longest]} tokens and max_new_tokens={new} come after it, "
            "together "
            f"{sizes[longest] + new}, but {context}{others}: lower max_new_tokens, or {ADVICE}"
        )
    raise ValueError(
        f"{where(longest)} has {sizes[longest]} tokens and {context}{others}: {ADVICE}"
    )


def check_slots(context: Context, slots: int, what: str) -> None:
    """Refuses a config whose rows may need more positions than the model has; `what` names the keys
    and their values.

    Raises:
      ValueError: they may.
    """
    if context.length is not None and slots > context.length:
        raise ValueError(
            f"{what} takes {slots} positions and {context}: lower it to at most {context.length}, "
            "or use a model "
            "with a longer context"
        )


def check_rows(context: Context, rows: Any, what: str) -> None:
    """Refuses packed rows in which a piece is longer than the context; `what` names the key of
    their length.

    Raises:
      ValueError: one is.
    """
    if len(rows.positions):
        check_slots(context, int(np.max(rows.positions)) + 1, what)


def record_of(path: Any, count: int) -> Callable[[int], str]:
    """Names record i of the `count` records of a JSONL file: by its line, where each line that is
    not empty is one.
    """

    def name(i: int) -> str:
        try:
            lines = schema.read_bytes(path).split(b"\n")
        except ValueError:
            lines = []
        filled = [number for number, line in enumerate(lines, start=1) if line.strip()]
        return (
            f"{path}:{filled[i]}" if len(filled) == count else f"{path}: record {i + 1} of {count}"
        )

    return name


def prompt_of(path: Any, prompts: Sequence[schema.Conversation]) -> Callable[[int], str]:
    """Names prompt i by its beginning."""
    return lambda i: f"{path}: the prompt {chat.readable(prompts[i])[:60]!r}.."
