"""GGUF files of Llama models, quantised or not."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.heads import language_model
from rlhf_jax.models.hf.config_json import check_number
from rlhf_jax.models.hf.families import GGUF
from rlhf_jax.models.hf.gguf_tokenizer import gguf_tokenizer
from rlhf_jax.models.hf.parameters import Shardings, assemble
from rlhf_jax.models.hf.settings import check_gguf_fields, clipped
from rlhf_jax.models.hf.stored import Read, Stored, Window, unpermuted
from rlhf_jax.models.hf.tensors import refuse_unread
from rlhf_jax.models.hf.tokenizer import model_tokenizer
from rlhf_jax.models.vocabulary import check_ids, unused_ids
from rlhf_jax.run.untrusted import check_gguf
from rlhf_jax.types import Model, Params


def load_gguf(path: Path, dtype: Any, shardings: Shardings | None) -> tuple[Model, Params, Any]:
    """Load a Llama model from a GGUF file.

    Args:
      path: of the file; a tokenizer.json in its folder is preferred to the tokenizer in the file.
      dtype: of the parameters, to which quantised weights are expanded.
      shardings: where to put them; None = the default device.

    Returns:
      The model, its parameters, and its tokenizer (None if neither can be read).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the gguf package is missing, or the file is corrupt or of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: pass a .gguf file or the folder of a saved model")
    try:
        import gguf  # an extra: pip install rlhf_jax[gguf]
    except ImportError as error:
        raise ValueError("reading .gguf files needs the gguf package: pip install gguf") from error
    # Before the reader, which trusts the sizes in a header and would allocate what they ask for.
    check_gguf(path)
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # on corrupt bytes the reader raises errors of any type
        raise ValueError(f"{path} is corrupt ({error}): copy it again") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if len(tensors) < len(reader.tensors):
        raise ValueError(f"{path} holds a tensor twice: copy it again")
    found: set[str] = set()

    def read(name: str) -> Stored:
        if name not in tensors:
            raise ValueError(
                f"{path} holds no tensor {name!r}: only plain llama models are supported"
            )
        found.add(name)
        return _Quantised(tensors[name], gguf.quants.dequantize)

    def check() -> None:
        unread = {name: tensor for name, tensor in tensors.items() if name not in found}
        shapes = {name: _shape(tensor) for name, tensor in unread.items()}
        refuse_unread(path, shapes, config.layers)

    # GGUF has no field for a tied head: such a file lacks the output matrix.
    config = _config(reader, path, read, tied="output.weight" not in tensors)
    # Llama 3.1 and later store their stretched frequencies as a tensor.
    if "rope_freqs.weight" in tensors:
        raise ValueError(
            f"{path} scales its rotary frequencies: choose a model with plain rotary positions"
        )
    tokenizer = model_tokenizer(path.parent, config) or gguf_tokenizer(reader)
    if tokenizer is not None:
        check_ids(tokenizer, config.vocab_size, path)
        config = dataclasses.replace(config, unused_ids=unused_ids(tokenizer, config.vocab_size))
    model = language_model(config)
    half_split = unpermuted(read, config)
    params = assemble(model, GGUF, half_split, dtype, shardings, transposed=True, check=check)
    return model, params, tokenizer


def _shape(tensor: Any) -> list[int]:
    """The shape of a tensor in numpy's order; GGUF writes the axes in reverse."""
    return [int(size) for size in reversed(tensor.shape)]


class _Quantised:
    """A tensor of a GGUF file, dequantised by rows."""

    def __init__(self, tensor: Any, dequantise: Callable[..., np.ndarray]):
        self._tensor, self._dequantise = tensor, dequantise
        self.shape = tuple(_shape(tensor))

    def __getitem__(self, window: Window, /) -> np.ndarray:
        rows, *others = window
        # Quantised blocks run along a row, so whole rows are expanded before columns are cut.
        values = self._dequantise(self._tensor.data[rows], self._tensor.tensor_type)
        # A copy: tensors that are not quantised are views of the mapped file, which is let go next.
        block = np.array(values[(slice(None), *others)])
        _let_go(self._tensor.data)
        return block


def _let_go(mapped: Any) -> None:
    """Release the pages of a mapped file, which can be read again.

    Until then they count as memory of this process.
    """
    # The base of a view is another view or the memmap, whose base is the mapping itself.
    while mapped is not None and not isinstance(mapped, mmap.mmap):
        mapped = getattr(mapped, "base", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


_FIELDS = {
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
}
"""config.json's name of a number -> its name in a GGUF file."""


def _is_unread(name: str) -> bool:
    """Whether a field was not read although it may affect how the model computes."""
    return name not in _FIELDS.values() and not name.startswith(("GGUF.", "tokenizer."))


def _config(reader, path: Path, read: Read, *, tied: bool) -> DecoderConfig:
    def field(name: str, default: Any = None) -> Any:
        entry = reader.get_field(name)
        if entry is None and default is None:
            raise ValueError(f"{path} lacks the field {name!r}: only llama models are supported")
        return default if entry is None else entry.contents()

    kind = field("general.architecture")
    if kind != "llama":
        raise ValueError(
            f"general.architecture={clipped(kind)} is not supported: choose a llama GGUF file"
        )
    heads, width = field("llama.attention.head_count"), field("llama.embedding_length")
    for name, key in _FIELDS.items():
        # A missing field passes with 1; if it is required, it is refused by name when it is read.
        check_number(name, field(key, 1), str(path))
    head_dim = field("llama.attention.key_length", width // max(heads, 1))
    plain = {
        "llama.vocab_size": read("token_embd.weight").shape[0],
        "llama.rope.dimension_count": head_dim,
        "llama.attention.value_length": head_dim,
        # What the other fields imply: a file may repeat it, but must not contradict it.
        "llama.attention.scale": head_dim**-0.5,
    }
    unread = [entry for entry in reader.fields.values() if _is_unread(entry.name)]
    check_gguf_fields(path, {entry.name: entry.contents() for entry in unread}, plain)
    return DecoderConfig(
        vocab_size=read("token_embd.weight").shape[0],
        context_length=field("llama.context_length"),
        layers=field("llama.block_count"),
        width=width,
        heads=heads,
        kv_heads=field("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_width=field("llama.feed_forward_length"),
        norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rotary_base=field("llama.rope.freq_base", 10_000.0),
        tied=tied,
    )
