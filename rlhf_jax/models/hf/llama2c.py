"""Checkpoints and tokenizers of llama2.c, version 0."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.heads import language_model
from rlhf_jax.models.hf.config_json import check_number
from rlhf_jax.models.hf.families import GGUF
from rlhf_jax.models.hf.parameters import assemble
from rlhf_jax.models.hf.stored import unpermuted
from rlhf_jax.types import Model, Params


def load_llama2c(
    path: str | Path, tokenizer_path: str | Path | None = None
) -> tuple[Model, Params, Any]:
    """Load a llama2.c checkpoint (.bin, version 0, float32) and its tokenizer (.bin).

    The header is seven int32: width, mlp_width, layers, heads, kv_heads, vocabulary (negative:
    untied head), context.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the file's size does not fit its header.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: pass a llama2.c .bin checkpoint")
    content = path.read_bytes()
    # Seven int32.
    if len(content) < 28:
        raise ValueError(
            f"{path} is corrupt ({len(content)} bytes is less than a header): copy it again"
        )
    # The magic number 0x616b3432 of versions 1 and 2, in little-endian order; version 0 has none.
    if content[:4] == b"24ka":
        raise ValueError(
            f"{path} is of version {struct.unpack('<i', content[4:8])[0]} of llama2.c, and only "
            "version 0 is read: export it again with --version 0"
        )
    width, mlp_width, layers, heads, kv_heads, vocabulary, context = struct.unpack(
        "<7i", content[:28]
    )
    sizes = {
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": abs(vocabulary),  # a negative size marks an unembedding of its own
        "max_position_embeddings": context,
    }
    for name, value in sizes.items():
        check_number(name, value, str(path))
    config = DecoderConfig(
        vocab_size=abs(vocabulary),
        context_length=context,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        mlp_width=mlp_width,
        tied=vocabulary > 0,
    )
    if len(content) % 4:
        raise ValueError(
            f"{path} is corrupt ({len(content)} bytes are no whole number of float32): copy it "
            "again"
        )
    tensors = _tensors(config, np.frombuffer(content, "<f4", offset=28), path)
    _check_rotary_tables(config, tensors.pop("rotary tables.weight"), path)
    model = language_model(config)
    read = unpermuted(tensors.__getitem__, config)
    params = assemble(model, GGUF, read, jnp.float32, None, transposed=True)
    return (
        model,
        params,
        None if tokenizer_path is None else _tokenizer(Path(tokenizer_path), config),
    )


def _tensors(config: DecoderConfig, values: np.ndarray, path: Path) -> dict[str, np.ndarray]:
    """The file's tensors under their GGUF names.

    The file has them in this order, layer by layer.
    """
    d, m, v = config.width, config.mlp_width, config.vocab_size
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    blocks = {
        "attn_norm": (d,),
        "attn_q": (q, d),
        "attn_k": (kv, d),
        "attn_v": (kv, d),
        "attn_output": (d, q),
    }
    blocks |= {"ffn_norm": (d,), "ffn_gate": (m, d), "ffn_down": (d, m), "ffn_up": (m, d)}
    order = {"token_embd": (v, d)} | {f"blk.{{}}.{name}": shape for name, shape in blocks.items()}
    # A table of cosines and one of sines, each ``[context, head_dim / 2]``, are read as one tensor.
    order |= {"output_norm": (d,), "rotary tables": (config.context_length, config.head_dim)}
    if not config.tied:
        order["output"] = (v, d)
    tensors, offset = {}, 0
    for name, shape in order.items():
        for layer in range(config.layers if "{}" in name else 1):
            size = math.prod(shape)
            if offset + size > values.size:
                raise ValueError(f"{path} is corrupt (it ends in {name!r}): copy it again")
            tensors[f"{name.format(layer)}.weight"] = values[offset : offset + size].reshape(shape)
            offset += size
    if offset != values.size:
        raise ValueError(
            f"{path} is corrupt ({values.size - offset} values too many): copy it again"
        )
    return tensors


def _check_rotary_tables(config: DecoderConfig, tables: np.ndarray, path: Path) -> None:
    """Check that the file's tables of cosines and sines are those of the assumed rotary base.

    The file has no field for the base. Tables of zeros are not checked.
    """
    frequencies = config.rotary_base ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    angles = np.arange(config.context_length)[:, None] * frequencies
    wanted = np.concatenate([np.cos(angles).ravel(), np.sin(angles).ravel()])
    # 0.01, because the tables were computed in float32 by another program; another base differs by
    # more.
    if tables.any() and np.abs(tables.ravel() - wanted).max() > 0.01:
        raise ValueError(
            f"{path} holds rotary tables of shape {list(tables.shape)} that are not those of the "
            f"base {config.rotary_base:g}: pass the model as a Hugging Face folder, whose "
            "config.json has rope_theta"
        )


def _tokenizer(path: Path, config: DecoderConfig) -> Any:
    import tokenizers
    import transformers  # slow to import, and needed only here
    from tokenizers import decoders, models, normalizers, processors

    scores = _pieces(path, config.vocab_size)
    vocabulary = {piece: i for i, piece in enumerate(scores)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(scores), unk_token="<unk>", byte_fallback=True)
    )
    # llama2.c puts a space before every text, as SentencePiece does; the decoder strips it.
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _pieces(path: Path, vocab_size: int) -> dict[str, float]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: pass the llama2.c tokenizer .bin")
    # The first four bytes are the length of the longest piece, which is not needed here.
    content, offset, scores = path.read_bytes(), 4, {}
    try:
        for i in range(vocab_size):
            score, length = struct.unpack_from("<fI", content, offset)
            piece = content[offset + 8 : offset + 8 + length].decode("utf-8")
            offset += 8 + length
            # llama2.c wraps the control tokens in line breaks.
            name = {0: "<unk>", 1: "<s>", 2: "</s>"}.get(i, piece)
            if name in scores:
                raise ValueError(
                    f"{path} is corrupt (the piece {name!r} stands in it twice): copy it again"
                )
            scores[name] = score
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is corrupt ({error}): copy it again") from error
    if offset != len(content):
        raise ValueError(
            f"{path} holds more pieces than the model's {vocab_size}: it is the tokenizer of "
            "another model"
        )
    return scores


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every merge of two pieces into a third, the best score first.

    llama2.c applies merges greedily in this order.
    """
    # The first 259 pieces are three control tokens and the 256 bytes, which no merge makes.
    joined = sorted(
        (piece for piece in list(scores)[259:] if len(piece) > 1), key=lambda piece: -scores[piece]
    )
    return [
        (piece[:cut], piece[cut:])
        for piece in joined
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
