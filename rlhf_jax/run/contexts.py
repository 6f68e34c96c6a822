"""The context length of a model, and the refusal of rows that exceed it before any computation.

Learned positions (GPT-2) end with their table: beyond it hidden states are NaN. Rotary positions
can be computed for any index, but beyond those that the model was trained on its outputs are
meaningless. Both are refused alike. What counts is the largest position that a row uses: positions
restart at 0 in each piece of a packed row, and padding uses none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import chat, schema, text
from rlhf_jax.models.hf import config_from_hf
from rlhf_jax.run import untrusted

_FIELDS = ("max_position_embeddings", "n_positions", "sliding_window")
"""Fields of a config.json that may determine the context length."""

ADVICE = "leave it out, shorten it, or use a model with a longer context"


class Context(NamedTuple):
    """The context length of a model and its source.

    Attributes:
      length: the number of positions, or None where it is not known.
      model: the model's name or folder; may be empty.
      field: the field of config.json that gives the length, with its value; may be empty.
    """

    length: int | None
    model: str = ""
    field: str = ""

    def __str__(self) -> str:
        """Words for a message.

        ``the context of runs/sft/epoch-1 is 1024 tokens (n_positions=1024 in its config.json)``.
        """
        of = f" of {self.model}" if self.model else " of the model"
        source = f" ({self.field} in its config.json)" if self.field else ""
        return f"the context{of} is {self.length} tokens{source}"


def of_folder(folder: Path) -> Context:
    """The context of a model on disk, read from its config.json before any weights are loaded.

    Where there is no config.json (a GGUF file, a wrong path) the length is None; loading the model
    reports an error if there is one.

    Raises:
      ValueError: config.json is damaged or of an unknown kind.
    """
    file = folder / "config.json"
    if not file.is_file():
        return Context(None, str(folder))
    description = untrusted.read_json(file)
    if not isinstance(description, dict):
        return Context(None, str(folder))  # loading the model reports the damage
    length = config_from_hf(description).context_length
    # A config may have several such fields; the one with this very value is quoted.
    named = (name for name in _FIELDS if description.get(name) == length)
    field = next(named, "")
    return Context(length, str(folder), f"{field}={length}" if field else "")


def before_loading(folder: Path) -> tuple[Context, Any] | None:
    """The context and the tokenizer of a model folder, to measure prompts before it is loaded.

    None where one of them is not known; loading the model reports an error if there is one.

    Raises:
      ValueError: as `of_folder`, or the tokenizer is damaged.
    """
    context = of_folder(folder)
    if context.length is None or not (folder / "tokenizer.json").exists():
        return None
    return context, text.load_tokenizer(folder)


def of_network(network: Any, folder: Path | None = None) -> Context:
    """The context of a loaded model, with its name and field where its `folder` is given."""
    length = getattr(getattr(network.model, "config", None), "context_length", None)
    if folder is None:
        return Context(length)
    found = of_folder(folder)
    # The loaded model decides; its config.json is quoted only where the two agree.
    return found if found.length == length else Context(length, str(folder))


def check(
    context: Context, sizes: Sequence[int], where: Callable[[int], str], *, new: int = 0
) -> None:
    """Refuses rows that need more positions than the model has.

    Args:
      context: of the model.
      sizes: the number of tokens of each text.
      where: names text i for the message.
      new: the number of tokens that are generated after each text.

    Raises:
      ValueError: a text is too long; the message names the longest, its tokens and the context.
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
            f"together {sizes[longest] + new}, but {context}{others}: lower max_new_tokens, "
            f"or {ADVICE}"
        )
    raise ValueError(
        f"{where(longest)} has {sizes[longest]} tokens and {context}{others}: {ADVICE}"
    )


def check_slots(context: Context, slots: int, what: str) -> None:
    """Refuses a config whose rows may need more positions than the model has.

    Args:
      context: of the model.
      slots: the most positions that a row may need.
      what: the config keys that determine `slots`, with their values, for the message.

    Raises:
      ValueError: `slots` exceeds the context.
    """
    if context.length is not None and slots > context.length:
        raise ValueError(
            f"{what} takes {slots} positions and {context}: lower it to at most {context.length}, "
            "or use a model with a longer context"
        )


def check_rows(context: Context, rows: Any, what: str) -> None:
    """Refuses packed rows in which a piece is longer than the context.

    Args:
      context: of the model.
      rows: packed rows with `positions`.
      what: the config key of their length, for the message.

    Raises:
      ValueError: a piece is too long.
    """
    if len(rows.positions):
        # Positions count from 0, so the largest one is one less than the context that it needs.
        check_slots(context, int(np.max(rows.positions)) + 1, what)


def record_of(path: Any, count: int) -> Callable[[int], str]:
    """A function that names record i of the `count` records of a JSONL file for a message.

    It gives the line number if each line that is not empty is one record, and otherwise i itself.
    The file is read only when the function is called, which is when there is an error to report.
    """

    def name(i: int) -> str:
        try:
            lines = schema.read_bytes(path).split(b"\n")
        except ValueError:
            lines = []
        # Where records were left out, record i is not on the i-th filled line.
        filled = [number for number, line in enumerate(lines, start=1) if line.strip()]
        return (
            f"{path}:{filled[i]}" if len(filled) == count else f"{path}: record {i + 1} of {count}"
        )

    return name


def prompt_of(path: Any, prompts: Sequence[schema.Conversation]) -> Callable[[int], str]:
    """A function that names prompt i by its first 60 characters, for a message."""
    return lambda i: f"{path}: the prompt {chat.readable(prompts[i])[:60]!r}.."
