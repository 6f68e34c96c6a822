"""A decode step's blocks in seven kernels per layer, for NVIDIA GPUs.

With one token per row, a GPU spends its time on launches: a layer's products read their weights in
5 to 16 microseconds each, and the compiler puts a dozen small kernels of 2 to 3 microseconds
between them.
Here a layer of the Llama family is

    query, key, value product | rotate, store, attend | product | add, norm | gated product |
    product | add, norm

over the arrays of `models.decoding.decoding_params`. A product's depth is cut into pieces that run
in parallel; the kernel that follows adds them up. Everything is computed as in
`models.layers.Block` and rounded at the same points, up to the order of sums.

The kernels use Pallas' Triton backend, which jax 0.10 to 0.12 have and a later version will drop:
where it is missing, `fits` is False and the blocks run as on other devices. On a CPU the kernels
are interpreted, for tests.

Shape legend: B rows, D width, H query heads, G key-value heads, E head width, F MLP width, S cache
slots, P pieces.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from rlhf_jax.backends.attention import View
from rlhf_jax.types import Cache, Params

try:
    from jax.experimental.pallas import triton
except ImportError:  # pragma: no cover - a jax without this backend
    triton: Any = None

ROWS = 128
"""The most rows: with more, the products are no longer memory-bound and the compiler's are as fast.
"""

CAPABILITIES = ("8.0", "9.0")
"""NVIDIA's A100, H100 and H200: their multiprocessors have shared memory for the 144 KiB that the
products prefetch; other chips have less, or were not tried."""

KEYS = 64
"""Cached slots per block of attention."""


class Tiles(NamedTuple):
    """How a product is cut: blocks of columns and depth, and pieces that run in parallel.

    `stages` blocks of depth are prefetched from memory at a time.
    """

    columns: int
    depth: int
    pieces: int
    stages: int


def fits(config: Any, rows: int) -> bool:
    """Whether the kernels exist here and compute this decoder's blocks for that many rows."""
    family = (config.norm, config.activation, config.positions) == ("rmsnorm", "swiglu", "rotary")
    extras = config.qk_norm or config.post_norm or config.query_scalar
    plain = config.bias == "none" and not extras
    projections = (config.heads * config.head_dim, config.kv_heads * config.head_dim)
    sizes = (config.width, *projections, config.mlp_width)
    # Columns and depth are cut into whole blocks of 64; only rows are masked.
    whole = all(size % 64 == 0 for size in sizes) and config.head_dim in (64, 128)
    # A CPU has no capability; there the kernels are interpreted.
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    there = triton is not None and capability in CAPABILITIES
    return family and plain and whole and config.dtype == "bfloat16" and rows <= ROWS and there


def fits_step(
    config: Any, layers: Any, x: Float[Array, "B T D"], slots: Array, shared: Any, at: Any
) -> bool:
    """Whether this step is one that `step` computes: one token per row, parameters for decoding."""
    del slots
    one_token = at is None and shared.key is None and x.shape[1] == 1
    if not one_token or not isinstance(layers, tuple):
        return False
    return fits(config, len(x)) and "query_key_value" in layers[0]["attention"]


def step(
    config: Any,
    params: Params,
    x: Float[Array, "B 1 D"],
    cache: Cache,
    slots: Int[Array, "B 1"],
    shared: Any,
    at: None = None,
) -> tuple[Float[Array, "B 1 D"], Cache]:
    """`models.decoding.blocks_over_cache` for a step that `fits_step`; arguments as there."""
    del at
    view = functools.partial(shared.view, config)
    layers, scale = params["blocks"], params["norm"]["scale"]
    of_rows = (x[:, 0], cache.keys, cache.values, slots[:, 0])
    hidden, keys, values = blocks(config, layers, scale, *of_rows, view)
    return hidden[:, None], dataclasses.replace(cache, keys=keys, values=values)


def blocks(
    config: Any,
    layers: Sequence[Params],
    last_scale: Float[Array, " D"],
    x: Float[Array, "B D"],
    keys: Sequence[Float[Array, "B S G E"]],
    values: Sequence[Float[Array, "B S G E"]],
    slots: Int[Array, " B"],
    view: Callable[[int], View],
) -> tuple[Float[Array, "B D"], tuple[Array, ...], tuple[Array, ...]]:
    """All blocks and the norm after them.

    Args:
      config: a decoder that `fits`.
      layers: each layer's parameters, as from `decoding_params`.
      last_scale: of the norm after the last block.
      x: the embedded token of each row.
      keys: each layer's cached keys.
      values: as `keys`.
      slots: where each row's token is stored; S or more: not stored.
      view: which cached keys a layer's queries see, and their rotary angles.

    Returns:
      Hidden states after the last norm, and the caches with the tokens in them (the same memory,
      inside `jax.jit`).
    """
    keys, values = list(keys), list(values)
    # The kernel after a block's MLP already computes the next block's first norm, or the last one.
    scales = [layer["attention_norm"]["scale"] for layer in layers] + [last_scale]
    y = add_and_norm(None, x, scales[0], config.norm_eps)[1]
    for i, layer in enumerate(layers):
        of_attention, mlp, (bias, angles, *_) = layer["attention"], layer["mlp"], view(i)
        assert angles is not None
        parts = product(y, of_attention["query_key_value"]["kernel"])
        mixed, keys[i], values[i] = attend(parts, keys[i], values[i], bias[:, 0, 0], slots, angles)
        parts = product(mixed, of_attention["out"]["kernel"])
        x, y = add_and_norm(parts, x, layer["mlp_norm"]["scale"], config.norm_eps)
        parts = product(gated_product(y, mlp["gate_up"]["kernel"]), mlp["down"]["kernel"])
        x, y = add_and_norm(parts, x, scales[i + 1], config.norm_eps)
    return y, tuple(keys), tuple(values)


def _call(
    kernel: Callable[..., None], name: str, *, warps: int, stages: int = 1, **how: Any
) -> Callable[..., Any]:
    params = triton.CompilerParams(num_warps=warps, num_stages=stages)
    run = pl.pallas_call(
        kernel, name=name, compiler_params=params, interpret=jax.default_backend() == "cpu", **how
    )  # fmt: skip

    def quiet(*args: Array) -> Any:
        with warnings.catch_warnings():  # the module docstring covers the deprecation
            warnings.filterwarnings(
                "ignore", "The Pallas Triton backend is deprecated", DeprecationWarning
            )
            return run(*args)

    return quiet


# ---------------------------------------------------------------------------------------- products


def tiles_for(depth: int, columns: int) -> Tiles:
    """A tiling that was fastest, or nearly, at 64 rows of four shapes on an H200.

    Its 132 multiprocessors need 80 programs or more. Many blocks must be prefetched at a time, and
    wide ones, because each reads all of `x`.
    """
    pieces = 1
    # Divisible by 128, so that each half of a piece is still whole blocks of 64.
    while columns // 64 * pieces < 80 and pieces < 8 and depth % (128 * pieces) == 0:
        pieces *= 2
    return Tiles(64, 64, pieces, 8)


def product(
    x: Float[Array, "B K"], weights: Float[Array, "K N"], cut: Tiles | None = None
) -> Float[Array, "P B N"]:
    """``x @ weights`` in float32, with a separate sum per piece of the depth."""
    (rows, depth), columns = x.shape, weights.shape[1]
    cut = cut or tiles_for(depth, columns)
    piece = depth // cut.pieces

    def kernel(x_ref: Any, weights_ref: Any, out_ref: Any) -> None:
        mine, here = _rows(rows, axis=2)
        at, part = pl.ds(pl.program_id(0) * cut.columns, cut.columns), pl.program_id(1)

        def add(i: Array, total: Array) -> Array:
            deep = pl.ds(part * piece + i * cut.depth, cut.depth)
            return total + triton.dot(
                triton.load(x_ref.at[mine, deep], mask=here, other=0.0), weights_ref[deep, at]
            )

        total = jnp.zeros((here.shape[0], cut.columns), jnp.float32)
        total = jax.lax.fori_loop(0, piece // cut.depth, add, total)
        triton.store(out_ref.at[part, mine, at], total, mask=here)

    shape = jax.ShapeDtypeStruct((cut.pieces, rows, columns), jnp.float32)
    grid = (columns // cut.columns, cut.pieces, pl.cdiv(rows, _row_block(rows)))
    return _call(kernel, "product", warps=4, stages=cut.stages, grid=grid, out_shape=shape)(
        x, weights
    )


def gated_product(
    x: Float[Array, "B D"], weights: Float[Array, "D F2"], cut: Tiles | None = None
) -> Float[Array, "B F"]:
    """``silu(x W) * (x V)`` with W and V side by side in `weights`."""
    cut = cut or Tiles(64, 64, 1, 6)
    (rows, depth), columns = x.shape, weights.shape[1] // 2

    def kernel(x_ref: Any, weights_ref: Any, out_ref: Any) -> None:
        mine, here = _rows(rows, axis=1)
        begin = pl.program_id(0) * cut.columns
        at, beside = pl.ds(begin, cut.columns), pl.ds(columns + begin, cut.columns)

        def add(i: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
            deep = pl.ds(i * cut.depth, cut.depth)
            some = triton.load(x_ref.at[mine, deep], mask=here, other=0.0)
            return total[0] + triton.dot(some, weights_ref[deep, at]), total[1] + triton.dot(
                some, weights_ref[deep, beside]
            )

        zero = jnp.zeros((here.shape[0], cut.columns), jnp.float32)
        total = jax.lax.fori_loop(0, depth // cut.depth, add, (zero, zero))
        # Rounded where `layers.MLP` rounds: after each projection, and after the activation.
        gate, up = (t.astype(out_ref.dtype).astype(jnp.float32) for t in total)
        gate = (gate / (1 + jnp.exp(-gate))).astype(out_ref.dtype).astype(jnp.float32)
        triton.store(out_ref.at[mine, at], (gate * up).astype(out_ref.dtype), mask=here)

    shape = jax.ShapeDtypeStruct((rows, columns), x.dtype)
    grid = (columns // cut.columns, pl.cdiv(rows, _row_block(rows)))
    return _call(kernel, "gated_product", warps=4, stages=cut.stages, grid=grid, out_shape=shape)(
        x, weights
    )


def _row_block(rows: int) -> int:
    # A product of Triton has at least 16 rows.
    return next(size for size in (16, 32, 64) if rows <= size or size == 64)


def _rows(rows: int, axis: int) -> tuple[Any, Array]:
    """This program's rows, by its index on the grid's `axis`, and a mask of those that exist."""
    size = _row_block(rows)
    begin = pl.program_id(axis) * size
    return pl.ds(begin, size), (begin + jnp.arange(size) < rows)[:, None]


# ---------------------------------------------------------------------------- between the products


def add_and_norm(
    parts: Float[Array, "P B D"] | None,
    x: Float[Array, "B D"],
    scale: Float[Array, " D"],
    epsilon: float,
) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    """``x`` plus the parts of a product, and its RMSNorm; without parts the norm of `x`."""
    parts = jnp.zeros((0, *x.shape), jnp.float32) if parts is None else parts
    width = x.shape[1]
    # Triton's blocks are powers of two; lanes beyond the width are masked.
    size = pl.next_power_of_2(width)

    def kernel(*refs: Any) -> None:
        *parts_ref, x_ref, scale_ref, sum_ref, out_ref = refs
        row, lanes = pl.program_id(0), jnp.arange(size)

        def load(ref: Any, *at: Array) -> Array:
            return triton.load(ref.at[(*at, pl.ds(0, size))], mask=lanes < width, other=0.0)

        total = load(x_ref, row)
        if parts_ref:
            # Summed in float32 and rounded once, as a projection's output is.
            added = functools.reduce(
                jnp.add, (load(parts_ref[0], jnp.int32(i), row) for i in range(parts.shape[0]))
            )
            total = total + added.astype(total.dtype)
        wide = total.astype(jnp.float32)
        normed = (
            wide
            * jax.lax.rsqrt(jnp.sum(wide * wide) / width + epsilon)
            * load(scale_ref).astype(jnp.float32)
        )
        for ref, value in ((sum_ref, total), (out_ref, normed.astype(out_ref.dtype))):
            triton.store(ref.at[row, pl.ds(0, size)], value, mask=lanes < width)

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    args = (x, scale) if not parts.shape[0] else (parts, x, scale)
    return _call(kernel, "add_and_norm", warps=16, grid=x.shape[:1], out_shape=(shape, shape))(
        *args
    )


def attend(
    parts: Float[Array, "P B H2GE"],
    keys: Float[Array, "B S G E"],
    values: Float[Array, "B S G E"],
    bias: Float[Array, "B S"],
    slots: Int[Array, " B"],
    angles: tuple[Float[Array, "B 1 1 E2"], Float[Array, "B 1 1 E2"]],
) -> tuple[Float[Array, "B HE"], Float[Array, "B S G E"], Float[Array, "B S G E"]]:
    """Rotate queries and keys, store keys and values, and attend over the cache.

    A program computes the query heads of one key-value head of a row. They see their own new key
    and the cached keys for which `bias` is 0.

    Args:
      parts: sums over pieces of the projections, query heads first, then keys, then values.
      keys: of one layer.
      values: as `keys`.
      bias: 0 where the row's query sees a slot, very negative elsewhere.
      slots: where the new keys and values are stored, after all that is seen; S or more: not
        stored.
      angles: cosines and sines of each row's position.
    """
    (pieces, rows, _), (_, length, groups, width), dtype = parts.shape, keys.shape, keys.dtype
    parts = parts.reshape(pieces, rows, -1, width)
    heads = parts.shape[2] - 2 * groups
    cos, sin = (angle[:, 0, 0] for angle in angles)
    # For ``x * cos + turned(x) * sin`` over the whole head: the first half takes its partner with a
    # minus sign.
    cos, sin = jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)
    kernel = _attention_kernel(_Sizes(pieces, heads, heads // groups, width, length, dtype))
    shapes = ((rows, heads, width), keys.shape, values.shape)
    # Arguments 5 and 6 become results 1 and 2, so that the cache is updated in place.
    mixed, keys, values = _call(
        kernel, "attend", warps=4, stages=3, grid=(rows, groups), input_output_aliases={5: 1, 6: 2},
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape in shapes],
    )(parts, bias, slots, cos, sin, keys, values)  # fmt: skip
    return mixed.reshape(rows, -1), keys, values


class _Sizes(NamedTuple):
    """Sizes of `attend`: pieces, query heads, those of one key head, width, slots, dtype."""

    pieces: int
    heads: int
    share: int
    width: int
    length: int
    dtype: Any


def _attention_kernel(sizes: _Sizes) -> Callable[..., None]:
    pieces, heads, share, width, length, dtype = sizes
    groups = heads // share
    # The query heads of a key head are the rows of a product, at least 16; the rest is masked.
    tile = max(16, pl.next_power_of_2(share))

    def kernel(*refs: Any) -> None:
        parts_ref, bias_ref, slots_ref, cos_ref, sin_ref = refs[:5]
        keys_ref, values_ref, mixed_ref, *stored_refs = refs[5:]
        row, group = pl.program_id(0), pl.program_id(1)
        slot, lanes = slots_ref[row], jnp.arange(width)
        turned = (lanes + width // 2) % width  # coordinate i is rotated with coordinate i + E/2

        def projected(head: Array, lanes: Array, **some: Any) -> Array:
            index = [jnp.int32(i) for i in range(pieces)]
            found = [triton.load(parts_ref.at[i, row, head, lanes], **some) for i in index]
            return functools.reduce(jnp.add, found).astype(dtype).astype(jnp.float32)

        def rotated(head: Array, lane_axis: Callable[[Array], Array], **some: Any) -> Array:
            straight = projected(head, lane_axis(lanes), **some) * lane_axis(cos_ref[row, :])
            across = projected(head, lane_axis(turned), **some) * lane_axis(sin_ref[row, :])
            return (straight + across).astype(dtype)

        own, mine = (jnp.arange(tile) < share)[:, None], group * share + jnp.arange(tile)[:, None]
        query = rotated(mine, lambda a: a[None, :], mask=own, other=0.0)
        key = rotated(heads + group, lambda a: a)
        value = projected(heads + groups + group, lanes).astype(dtype)
        # A slot past the end belongs to an idle row, for which nothing is stored.
        stored, at = jnp.full((width,), slot < length), jnp.minimum(slot, length - 1)
        for ref, new in zip(stored_refs, (key, value), strict=True):
            triton.store(ref.at[row, at, group, :], new, mask=stored)
        # Cached slots before the new one: its own key is at hand and is not read back. An idle row
        # sees no cached slot.
        seen = jnp.where(slot < length, slot, 0)

        def cached(begin: Array) -> tuple[Array, Array, Array]:
            at, places = pl.ds(begin, KEYS), begin + jnp.arange(KEYS)
            there = {"mask": (places < length)[:, None], "other": 0.0}
            bias = triton.load(bias_ref.at[row, at], mask=places < seen, other=-1e30)
            keys = triton.load(keys_ref.at[row, at, group, :], **there)
            return keys, triton.load(values_ref.at[row, at, group, :], **there), bias

        mixed = _softmax_mix(query, key, value, cached, (seen + KEYS - 1) // KEYS).astype(dtype)
        triton.store(mixed_ref.at[row, pl.ds(group * share, tile), :], mixed, mask=own)

    return kernel


def _softmax_mix(
    query: Float[Array, "R E"], key: Float[Array, " E"], value: Float[Array, " E"],
    cached: Callable[[Array], tuple[Array, Array, Array]], blocks: Array,
) -> Float[Array, "R E"]:  # fmt: skip
    """Over a new key and the blocks of the cache, with a running maximum."""
    scale = query.shape[1] ** -0.5

    def look(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, weight, mixed = carry
        keys, values, bias = cached(i * KEYS)
        scores = triton.dot(query, keys, trans_b=True) * scale + bias[None, :]
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        shrink, weights = jnp.exp(top - new_top), jnp.exp(scores - new_top[:, None])
        mixed = mixed * shrink[:, None] + triton.dot(weights.astype(values.dtype), values)
        return new_top, weight * shrink + jnp.sum(weights, axis=1), mixed

    wide = query.astype(jnp.float32), key.astype(jnp.float32), value.astype(jnp.float32)
    first = jnp.sum(wide[0] * wide[1][None, :], axis=1) * scale
    # The running softmax starts from the row's own key, with weight 1. So there is always a key,
    # and no maximum of -inf.
    begin = (first, jnp.ones_like(first), jnp.broadcast_to(wide[2][None, :], query.shape))
    _, weight, mixed = jax.lax.fori_loop(0, blocks, look, begin)
    return mixed / weight[:, None]
