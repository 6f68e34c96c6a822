r"""Low-rank adaptation: a few trained arrays beside frozen weights, as functions on dicts.

A projection ``y = x W`` with ``lora_a`` and ``lora_b`` in its dict computes ``y = x W + x A B``
(see `layers.Linear`); the model itself is the same. What is trained (`init_lora`) is a small dict
of its own::

    trained = init_lora(base, key, rank=16)  # blocks/attention/query/{lora_a, lora_b}, ...
    step = compile_frozen_step(
        lambda base: make_sft_step(lora_model(model, base, alpha=16), tx), base
    )
    logits = model.apply(with_lora(base, trained, alpha=16), ...)  # shares the arrays of base
    save_hf(folder, model, merge_lora(base, trained, alpha=16), tokenizer)

So a policy and its KL reference share one copy of the base weights, and so do a reward model and
the value network that starts from it. The trained dict may also contain whole leaves, such as a
fresh ``score`` head: they replace those of the base.

Source: Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array

from rlhf_jax.types import Model, Output, Params

TARGETS = r"attention/|mlp/"
"""All projections of the blocks."""


def init_lora(
    base: Params, key: Array, *, rank: int, targets: str = TARGETS, layers: int | None = None
) -> Params:
    """Fresh adapters: ``A ~ N(0, 1 / inputs)`` (variance) and ``B = 0``, which change nothing.

    Args:
      base: parameters of a model; only shapes are read.
      key: of the initial A.
      rank: r, columns of A and rows of B.
      targets: regex searched in the paths of kernels, such as ``blocks/attention/query/kernel``.
      layers: adapt only this many of the last blocks; None = all. The backward pass stops there.

    Returns:
      ``lora_a [n, inputs, r]`` and ``lora_b [n, r, outputs]``, float32, beside where each kernel
      is, n = `layers`.

    Raises:
      ValueError: rank below 1, more layers than there are, or `targets` finds no kernel of the
        blocks.
    """
    flat: dict[Any, Any] = traverse_util.flatten_dict(base["blocks"])
    kernels = {path: leaf for path, leaf in flat.items() if path[-1] == "kernel"}
    depth: int = next(iter(kernels.values())).shape[0]
    count = depth if layers is None else layers
    if rank < 1 or not 1 <= count <= depth:
        raise ValueError(
            f"rank={rank} must be at least 1 and layers={layers} 1 to {depth}, the blocks of the "
            "model"
        )
    chosen = [path for path in kernels if re.search(targets, "/".join(("blocks", *path)))]
    if not chosen:
        names = sorted("/".join(("blocks", *path)) for path in kernels)
        raise ValueError(
            f"targets={targets!r} finds no kernel: write a regex that is found in one of {names}"
        )
    adapters = {}
    for place, path in enumerate(chosen):
        _, inputs, outputs = kernels[path].shape
        # Only B is 0: with A = 0 as well, neither would ever get a gradient.
        a = jax.random.normal(jax.random.fold_in(key, place), (count, inputs, rank)) * inputs**-0.5
        adapters[(*path[:-1], "lora_a")] = a
        adapters[(*path[:-1], "lora_b")] = jnp.zeros((count, rank, outputs))
    return {"blocks": traverse_util.unflatten_dict(adapters)}


def with_lora(base: Params, trained: Params, *, alpha: float | int) -> Params:
    """Parameters for `Model.apply` and `Model.head` that share the arrays of `base`.

    Args:
      base: frozen parameters; ``{}`` if `trained` has all parameters.
      trained: adapters, and whole leaves that replace those of `base`.
      alpha: adapters act with the weight ``alpha / rank``.

    Returns:
      One dict; ``lora_b`` is already scaled.
    """
    merged: dict[Any, Any] = {**traverse_util.flatten_dict(base)}
    own: dict[Any, Any] = traverse_util.flatten_dict(trained)
    for path, leaf in own.items():
        # ``lora_b`` is ``[n, r, outputs]``, so the second last axis is the rank.
        merged[path] = leaf * (alpha / leaf.shape[-2]) if path[-1] == "lora_b" else leaf
    return traverse_util.unflatten_dict(merged)


def merge_lora(base: Params, trained: Params, *, alpha: float | int) -> Params:
    """Plain parameters, ``W + alpha / rank * A B`` in each adapted kernel: to sample or export.

    Kernels without an adapter are those of `base`, not copies. The sum is float32 and keeps the
    dtype of W.
    """
    flat: dict[Any, Any] = traverse_util.flatten_dict(with_lora(base, trained, alpha=alpha))
    plain = {path: leaf for path, leaf in flat.items() if path[-1] not in ("lora_a", "lora_b")}
    for path, a in flat.items():
        if path[-1] == "lora_a":
            kernel = (*path[:-1], "kernel")
            plain[kernel] = _merged(plain[kernel], a, flat[(*path[:-1], "lora_b")])
    return traverse_util.unflatten_dict(plain)


@jax.jit
def _merged(kernel: Array, a: Array, b: Array) -> Array:
    # At the highest precision, because the merged weights are what is exported, and accelerators
    # multiply float32 in a coarser precision by default.
    change = jnp.einsum("lir,lro->lio", a, b, precision=jax.lax.Precision.HIGHEST)
    # Adapters of fewer layers than the kernel belong to its last ones.
    below = kernel.shape[0] - a.shape[0]
    return kernel.at[below:].set((kernel[below:].astype(jnp.float32) + change).astype(kernel.dtype))


def lora_model(model: Model, base: Params, *, alpha: float | int) -> Model:
    """The model as a function of its trained parameters; `base` is frozen.

    Build it inside the compiled function that gets `base` as an argument, as
    `steps.compile_frozen_step` does: constants of the program would be a second copy of the
    weights.

    Args:
      model: a language or scalar model.
      base: its frozen parameters.
      alpha: as in `with_lora`.

    Returns:
      A `Model` whose parameters are the `trained` of `with_lora`; ``init`` and ``init_cache`` are
      the model's.
    """

    def apply(trained: Params, tokens: Array, **others: Any) -> Output:
        return model.apply(with_lora(base, trained, alpha=alpha), tokens, **others)

    def head(trained: Params, hidden: Array) -> Array:
        return model.head(with_lora(base, trained, alpha=alpha), hidden)

    # `for_decoding` gets the trained leaves alone, which are no whole blocks to lay out.
    return model._replace(apply=apply, head=head, for_decoding=lambda trained: trained)
