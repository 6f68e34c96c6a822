"""Each attention kernel against the plain one: packed rows, shared prefixes, grouped heads, gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.backends import View, attention, backend_for, tpu
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.decoder import RowLayout, apply_decoder, init_decoder, visible

KERNELS = {
    "plain": attention.attend,
    "blocked": attention.attend_in_blocks,
    "splash": tpu.attend_on(None),
}

SLOTS = 300  # two whole blocks and a part of one


@pytest.fixture(scope="module", params=["packed", "shared prefix"])
def rows(request):
    """Segments and parents of two rows with padding at their ends."""
    place = np.arange(SLOTS)
    segments = np.stack(
        [np.searchsorted([90, 131, 270], place, side="right") + 1 for _ in range(2)]
    ).astype(np.int32)
    segments[0, 270:], segments[1, 200:] = 0, 0
    parents = (
        np.where(segments > 1, 1, 0)
        if request.param == "shared prefix"
        else np.zeros_like(segments)
    )
    return jnp.asarray(segments), jnp.asarray(parents)


def operands(rows, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    query = jax.random.normal(keys[0], (2, SLOTS, 4, 8))
    key, value = (jax.random.normal(k, (2, SLOTS, 2, 8)) for k in keys[1:])
    seen = visible(*rows, jnp.broadcast_to(jnp.arange(SLOTS), (2, SLOTS)), rows[0])
    return query, key, value, jnp.where(seen, 0.0, -1e30)[:, None]


@pytest.mark.parametrize("recompute_from", [SLOTS, SLOTS + 1])
def test_blocked_equals_plain_with_its_gradients(rows, recompute_from, monkeypatch):
    monkeypatch.setattr(attention, "RECOMPUTE_FROM", recompute_from)
    query, key, value, bias = operands(rows)
    weights = (
        jnp.where(rows[0] > 0, 1.0, 0.0)[:, :, None, None]
        * jnp.arange(1.0, 9.0)[None, None, None, :]
    )

    def total(kernel):
        def loss(*qkv):
            mixed = KERNELS[kernel](*qkv, View(bias, None, None), 8)
            return jnp.sum(jnp.sin(mixed) * weights), mixed

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)

    (_, plain), plain_grads = total("plain")
    (_, blocked), blocked_grads = total("blocked")
    np.testing.assert_allclose(blocked, plain, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(blocked_grads, plain_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_blocked_multiplies_no_key_after_a_block():
    """Half of a long row's products, counted by the compiler."""

    def cost(kernel, slots=1024):
        shapes = [jax.ShapeDtypeStruct((1, slots, 4, 64), jnp.float32)] * 3
        shapes.append(jax.ShapeDtypeStruct((1, 1, slots, slots), jnp.float32))
        lowered = jax.jit(lambda *x: KERNELS[kernel](*x[:3], View(x[3], None, None), 64)).lower(
            *shapes
        )
        return lowered.compile().cost_analysis()["flops"]

    assert cost("blocked") < 0.6 * cost("plain")


def test_a_decoder_gives_the_same_hidden_states_by_either(rows):
    config = DecoderConfig(
        50, SLOTS, layers=2, width=32, heads=4, kv_heads=2, mlp_width=48, attention="plain"
    )
    tokens = jax.random.randint(jax.random.key(1), (2, SLOTS), 0, 50)
    positions = jnp.broadcast_to(jnp.arange(SLOTS), (2, SLOTS))
    params = init_decoder(config, jax.random.key(0))

    def hidden(kernel):
        own = dataclasses.replace(config, attention=kernel)
        return apply_decoder(
            own, params, tokens, **RowLayout(rows[0], positions, rows[1])._asdict()
        ).hidden

    real = np.asarray(rows[0] > 0)
    np.testing.assert_allclose(hidden("auto")[real], hidden("plain")[real], rtol=1e-4, atol=2e-5)


def test_which_kernel_is_taken_where_there_is_no_accelerator():
    def taken(kernel="auto", slots=512, dtype="bfloat16"):
        backend = backend_for(kernel, dtype=dtype, head_dim=64)
        shapes = [jax.ShapeDtypeStruct((1, slots, 2, 64), dtype)] * 3
        bias = jax.ShapeDtypeStruct((1, 1, slots, slots), jnp.float32)
        program = jax.make_jaxpr(lambda *x: backend.attend(*x[:3], View(x[3], None, None), 64))(
            *shapes, bias
        )
        return "blocked" if "concatenate" in str(program) else "plain"

    assert taken() == "blocked"
    assert taken(slots=128) == "plain"
    assert taken("plain") == "plain"
    with pytest.raises(
        ValueError, match=r"attention='cudnn' needs an NVIDIA device .* choose 'auto'"
    ):
        taken("cudnn")


def test_splash_is_the_same_where_segments_alone_decide_and_compiles_for_a_tpu(monkeypatch):
    slots = 256
    segments = jnp.asarray(
        np.searchsorted([90, 131, 230], np.arange(slots), side="right")[None] + 1, jnp.int32
    )
    segments = jnp.where(jnp.arange(slots) >= 230, 0, segments[0])[None]
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = [
        jax.random.normal(k, (1, slots, heads, 16))
        for k, heads in zip(keys, (4, 2, 2), strict=True)
    ]
    places = jnp.arange(slots)[None]
    bias = jnp.where(visible(segments, jnp.zeros_like(segments), places, segments), 0.0, -1e30)[
        :, None
    ]

    def run(kernel):
        def loss(*qkv):
            mixed = KERNELS[kernel](*qkv, View(bias, None, None, segments), 16)
            mixed = jnp.where((segments > 0)[..., None, None], mixed, 0)
            return jnp.sum(jnp.sin(mixed))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))

    for ours, theirs in zip(
        *(jax.tree.leaves(run(kernel)(*qkv)) for kernel in ("splash", "plain")), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    lowered = run("splash").trace(*qkv).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 3


def test_splash_is_for_rows_without_parents_of_whole_blocks():
    splash = backend_for("splash").attend

    def run(slots, *, segments=True):
        x, bias = jnp.zeros((1, slots, 2, 64)), jnp.zeros((1, 1, slots, slots))
        return splash(
            x,
            x,
            x,
            View(bias, None, None, jnp.ones((1, slots), jnp.int32) if segments else None),
            64,
        )

    assert run(256).shape == (1, 256, 2, 64)
    for slots, segments in ((200, True), (256, False)):
        with pytest.raises(ValueError, match="attention='splash' needs rows of a multiple of 128"):
            run(slots, segments=segments)


def test_splash_over_eight_devices_is_the_decoder_on_one():
    """Under `shard_map` over rows and heads: the compiler has no way to partition the kernel."""
    plain = DecoderConfig(50, 256, layers=1, width=32, heads=4, kv_heads=2, mlp_width=16)
    mesh = sharding.make_mesh((2, 2, 2))
    spread = dataclasses.replace(plain, attention="splash", mesh=mesh)
    places = jnp.broadcast_to(jnp.arange(256), (4, 256))
    segments = jnp.where(places < jnp.array([[256], [250], [129], [0]]), 1 + places // 100, 0)
    rows = RowLayout(segments, places)
    tokens = jax.random.randint(jax.random.key(1), (4, 256), 0, 50)
    params = jax.tree.map(lambda x: 3 * x, init_decoder(plain, jax.random.key(0)))

    def gradient(config, params, tokens, rows):
        def total(params):
            hidden = apply_decoder(config, params, tokens, **rows._asdict()).hidden
            hidden = jnp.where((rows.segments > 0)[:, :, None], hidden, 0)
            return jnp.sum(jnp.sin(hidden)), hidden

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    placed = sharding.place_state(params, mesh)
    batch = sharding.place_batch(jax.tree.map(np.asarray, (tokens, rows)), mesh)
    ours, theirs = gradient(spread, placed, *batch), gradient(plain, params, tokens, rows)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)
