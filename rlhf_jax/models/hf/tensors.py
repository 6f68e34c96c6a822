"""The tensors of a model folder: which files contain them, and an error for those not read.

Everything here reads headers only. The one exception is a tied head that a file contains a second
time, which is compared with the embedding (`same_values`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.models.hf.safetensors_file import FLOATS, InFile, tensors_of
from rlhf_jax.models.hf.settings import clipped
from rlhf_jax.models.hf.stored import Stored
from rlhf_jax.run.untrusted import PLAIN_NAME, read_json

INDEX = "model.safetensors.index.json"

_OTHER_COPIES = re.compile(r"consolidated([.-].*)?\.safetensors")
"""Files of the same weights in the layouts of Mistral and Meta, next to those of Hugging Face."""
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_PICKLED_PARTS = (
    "adapter_model.bin",
    "value_head.bin",
    "v_head.bin",
    "non_lora_trainables.bin",
    "lm_head.bin",
    "score.bin",
)
"""Pickles that can be a part of the model; ``pytorch_model.bin`` is a copy of the whole model."""


class FolderTensors:
    """The tensors of a model folder by their full names, and which of them have been read.

    Calling it returns a tensor and marks it as read; `peek` returns it without marking it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.read: set[str] = set()
        self._tensors: dict[str, InFile] = {}
        for file in weight_files(path):
            for tensor in tensors_of(file):
                name = full_name(tensor.name)
                if name in self._tensors:
                    twice = f"{self._tensors[name].file.name} and {file.name} in {path}"
                    raise ValueError(
                        f"tensor {name!r} is in both {twice}: delete the file of the other model"
                    )
                self._tensors[name] = tensor
        self._check_index()

    def _check_index(self) -> None:
        """Compare the folder with its index, which is used only to find out what is missing."""
        if not (self.path / INDEX).exists():
            return
        index = read_json(self.path / INDEX)
        try:
            weight_map = index["weight_map"]
            missing = {
                str(shard): name
                for name, shard in weight_map.items()
                if full_name(name) not in self
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path / INDEX} is corrupt ({error!r}): copy it again"
            ) from error
        if missing:
            # The first in order, so that the message does not depend on the order of the index.
            shard, name = min(missing.items())
            raise ValueError(
                f"a shard is missing: tensor {name!r} should be in {shard!r} in {self.path}: copy "
                "that file again"
            )
        for shard in weight_map.values():
            if not isinstance(shard, str) or not PLAIN_NAME.fullmatch(shard):
                raise ValueError(
                    f"{self.path / INDEX} names the shard {clipped(shard)}, which is no file of "
                    "this folder: an index holds plain file names; copy the model again from a "
                    "source you trust"
                )
        check_index(self.path, weight_map, self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __call__(self, name: str) -> Stored:
        """The tensor, marked as read."""
        tensor = self.peek(name)
        self.read.add(name)
        return tensor

    def peek(self, name: str) -> InFile:
        """The tensor, without marking it as read.

        Raises:
          ValueError: the folder has no tensor of that name, or it is quantised.
        """
        if name not in self._tensors:
            raise ValueError(
                f"{self.path} holds no tensor {name!r}: a shard is missing, or config.json is "
                f"another's{self._hint(name)}"
            )
        tensor = self._tensors[name]
        if tensor.kind not in FLOATS:
            raise ValueError(
                f"tensor {tensor.name!r} of {tensor.file} is of the type {tensor.kind}: choose "
                "weights that are not quantised"
            )
        return tensor

    def _hint(self, name: str) -> str:
        if name == "lm_head.weight":
            return "; if the unembedding is the embedding, write tie_word_embeddings=true there"
        unread = [other for other in self._tensors if other not in self.read]
        if not unread:
            return ""
        return (
            f"; among what it holds beside is {unread[0]!r} {list(self._tensors[unread[0]].shape)}"
        )

    @property
    def unread(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that have not been read."""
        return {
            name: tensor.shape for name, tensor in self._tensors.items() if name not in self.read
        }


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model in a folder.

    Raises:
      FileNotFoundError: there are none.
      ValueError: a part of the model is a pickle, which is never read.
    """
    for name in _PICKLED_PARTS:
        if (folder / name).exists():
            raise ValueError(
                f"{folder / name} is a part of the model in a pickle, which is never read: save it "
                "as safetensors and merge it into the model, or move the file away if the model "
                "is meant without it"
            )
    found = [file for file in sorted(folder.glob("*.safetensors")) if file.name != ADAPTER]
    files = [file for file in found if not _OTHER_COPIES.fullmatch(file.name)]
    if found and not files:
        raise FileNotFoundError(
            f"{folder} holds {found[0].name} alone, the weights under other names: get "
            "model.safetensors, or the model-00001-of-... shards, of the same model"
        )
    if not files:
        raise FileNotFoundError(
            f"no *.safetensors in {folder}: convert the weights to safetensors first"
        )
    return files


def check_index(folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, InFile]) -> None:
    """Check that index and files describe the same model.

    Every tensor must be in the file that the index gives, and every file must be in the index.

    Args:
      folder: of the model.
      weight_map: of the index, name -> file.
      tensors: those found in the folder, by full name.

    Raises:
      ValueError: they differ.
    """
    for name, shard in weight_map.items():
        found = tensors[full_name(name)].file.name
        if found != shard:
            raise ValueError(
                f"{folder / INDEX} says that tensor {name!r} is in {shard!r}, and it is in "
                f"{found!r}: index and shards are of different models or versions; copy the whole "
                "folder again"
            )
    named = set(weight_map.values())
    for name, tensor in tensors.items():
        if tensor.file.name not in named:
            raise ValueError(
                f"{tensor.file.name} in {folder} is not in {INDEX} (it holds {name!r} "
                f"{list(tensor.shape)}): move the file away if it is another model's, or copy the "
                "index again"
            )


_WRAPPERS = re.compile(r"^((_orig_mod|module|_fsdp_wrapped_module|base_model\.model)\.)+")
"""Prefixes that torch.compile, data parallelism and PEFT put before every name."""
_BARE = {"wte": "transformer", "wpe": "transformer", "h": "transformer", "ln_f": "transformer",
         "embed_tokens": "model", "layers": "model", "norm": "model"}  # fmt: skip
"""First part of a name in a model that was saved without its head -> the prefix that is missing."""


def full_name(name: str) -> str:
    """A tensor's name in the complete language model.

    >>> full_name("_orig_mod.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    name = _WRAPPERS.sub("", name)
    before = _BARE.get(name.split(".")[0])
    return name if before is None else f"{before}.{name}"


_BUFFERS = re.compile(
    r"transformer\.h\.(?P<gpt2>\d+)\.attn\.(bias|masked_bias)"
    r"|model\.(layers\.(?P<layer>\d+)\.self_attn\.)?rotary_emb"
    r"\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
)


def is_buffer(name: str, layers: int) -> bool:
    """Whether a tensor is a buffer that the modelling code computes itself.

    These are causal masks and rotary frequencies.

    >>> is_buffer("transformer.h.0.attn.bias", 2), is_buffer("transformer.h.2.attn.bias", 2)
    (True, False)
    """
    found = _BUFFERS.fullmatch(name)
    # A buffer of a layer that the model does not have hints at another config.json.
    return found is not None and int(found["gpt2"] or found["layer"] or 0) < layers


_KINDS = (
    (r"lora_|\.base_layer\.|modules_to_save",
     "a LoRA adapter that was not merged: merge it (merge_and_unload) and save the result"),
    (r"^(pretrained_model\.|v_head|value_head|.*\.v_head|.*value_head|summary)",
     "a value head, as TRL's models have: pass the model that it was put on, saved without it"),
    (r"^(score|classifier|regression_head|reward_head|multiple_choice_head|qa_outputs|rank_head"
     r"|critic)\b",
     "a head for another task: a reward model has score.weight of one row"),
    (r"^lm_head\.",
     "an unembedding beside what config.json asks for: take it out, or pass the language model"),
    (r"qweight|qzeros|\.scales$|g_idx|weight_scale|input_scale|absmax|quant_map|quant_state|\.SCB$"
     r"|weight_format|weight_packed|_zero_point|nested_",
     "of quantised weights: choose the model's weights that are not quantised"),
    (r"(^|\.)(mtp|nextn|eagle|medusa)|\.(eh_proj|enorm|hnorm|shared_head)\b",
     "of layers that predict several tokens, which this decoder has not: choose a model without "
     "them"),
    (r"visual|vision|image|multi_modal|multimodal|mm_projector|audio|speech",
     "of a model that reads images or sound: pass its text model alone"),
    (r"experts|\.router|block_sparse_moe|\.mlp\.gate\.weight|shared_expert",
     "of a mixture of experts, which this decoder is not: choose a dense model"),
    (r"\.[qk]_norm\.",
     "a norm of queries or keys, which config.json does not announce: model_type qwen3 has them"),
    (r"_proj\.bias$|\.bias$",
     "a bias that config.json does not announce (attention_bias, mlp_bias, model_type)"),
)  # fmt: skip
"""A pattern in the name of a tensor that was not read -> what it is, and what to do about it."""


def refuse_unread(where: Path, unread: Mapping[str, Sequence[int]], layers: int) -> None:
    """Raise an error that names tensors which were not read, if there are any.

    Args:
      where: folder or file.
      unread: name -> shape.
      layers: blocks of the decoder.

    Raises:
      ValueError: `unread` is not empty.
    """
    if not unread:
        return
    name = next(iter(unread))
    more = (
        f" and {len(unread) - 1} more such as {list(unread)[-1][:100]!r}" if len(unread) > 1 else ""
    )
    raise ValueError(
        f"{where} holds tensor {name[:100]!r} of shape {list(unread[name])}{more}, which would be "
        f"left out: it is {_kind(name, layers)}"
    )


def _kind(name: str, layers: int) -> str:
    place = re.search(r"\b(?:layers|h|blk)\.(\d+)\.", name)
    if place and int(place[1]) >= layers:
        return (
            f"of layer {place[1]}, and config.json says {layers} layers: it is another model's "
            "config.json"
        )
    for pattern, meaning in _KINDS:
        if re.search(pattern, name):
            return meaning
    return (
        "no part of the decoder that config.json describes: pass the folder of the plain model, or "
        "take it out"
    )


def same_values(one: Any, other: Any, blocks: Iterator[slice]) -> bool:
    """Whether two tensors of a file have the same values in the coarser of their types.

    Args:
      one: a tensor `[V, D]` that is read by windows.
      other: another one of that shape.
      blocks: the rows, some at a time.
    """
    columns = slice(0, one.shape[1])
    for rows in blocks:
        first, second = one[rows, columns], other[rows, columns]
        # One of the two may have been converted when the model was saved.
        coarser = min(first.dtype, second.dtype, key=lambda kind: kind.itemsize)
        if not np.array_equal(first.astype(coarser), second.astype(coarser)):
            return False
    return True
