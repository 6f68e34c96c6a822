"""Kernels of a decode step, interpreted: what they compute is what `models.layers.Block` does, within bfloat16."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import scoring
from rlhf_jax.backends import nvidia
from rlhf_jax.backends import nvidia_decode as fused
from rlhf_jax.data import text
from rlhf_jax.models import DecoderConfig, language_model
from rlhf_jax.models.decoder import apply_decoder, init_decoder
from rlhf_jax.models.decoding import decoding_params, init_cache
from rlhf_jax.sampling.generate import Sampling, generate
from rlhf_jax.types import Cache

ROWS, SLOTS = 5, 150  # more slots than are looked at together, and no multiple of them
CONFIG = DecoderConfig(
    50, SLOTS, 2, 192, 3, kv_heads=1, head_dim=64, mlp_width=320, dtype="bfloat16"
)
LENGTHS = jnp.array([0, 9, 64, 149, 30])


def _normal(key: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(key), shape)


def _params(config: DecoderConfig) -> dict:
    """Large weights, so that a wrong place or mask shows; norm scales that differ."""
    params = init_decoder(config, jax.random.key(3))
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)
    for name in ("attention_norm", "mlp_norm"):
        params["blocks"][name]["scale"] = 1 + 0.3 * _normal(
            4, *params["blocks"][name]["scale"].shape
        )
    params["norm"]["scale"] = 1 + 0.3 * _normal(5, config.width)
    return decoding_params(config, params)


def _cache(config: DecoderConfig) -> Cache:
    cache = init_cache(config, ROWS, SLOTS)
    filled = [
        jax.tree.map(lambda x, i=i: _normal(i, *x.shape).astype(x.dtype), x)
        for i, x in enumerate((cache.keys, cache.values))
    ]
    segments = (jnp.arange(SLOTS)[None] < LENGTHS[:, None]).astype(jnp.int32)
    return Cache(*filled, segments=segments, lengths=LENGTHS)


def _step(config: DecoderConfig, params: dict, cache: Cache):
    tokens, live = jnp.arange(1, ROWS + 1)[:, None], jnp.array([1, 1, 1, 1, 0])[:, None]
    return apply_decoder(
        config, params, tokens, segments=live, positions=cache.lengths[:, None], cache=cache
    )


def _slots_first(cache: Cache) -> Cache:
    return dataclasses.replace(
        cache,
        keys=tuple(jnp.moveaxis(k, 3, 1) for k in cache.keys),
        values=tuple(v.swapaxes(1, 2) for v in cache.values),
    )


@pytest.fixture
def on_nvidia(monkeypatch):
    """What would run on an NVIDIA GPU, here: its kernels interpreted, XLA's attention for cuDNN's."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(nvidia, "is_here", lambda: True)
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, implementation, **how: plain(*args, **how)
    )


@pytest.mark.parametrize("window", [0, 20])
def test_a_decode_step_is_that_of_the_plain_blocks(window, on_nvidia, monkeypatch):
    config = dataclasses.replace(CONFIG, window=window, window_every=2)
    params, cache = _params(config), _cache(dataclasses.replace(config, attention="plain"))
    plain = jax.jit(partial(_step, dataclasses.replace(config, attention="plain")))(params, cache)
    calls = []
    monkeypatch.setattr(fused, "attend", lambda *a, f=fused.attend: calls.append(1) or f(*a))
    quick = jax.jit(partial(_step, config))(params, _slots_first(cache))
    assert len(calls) == config.layers
    live = slice(0, 4)
    error = jnp.abs(quick.hidden[live].astype(jnp.float32) - plain.hidden[live].astype(jnp.float32))
    assert float(error.max()) < 0.06
    assert float(error.mean()) < 0.01
    assert float(jnp.abs(plain.hidden).max()) > 2
    expected = _slots_first(plain.cache)
    for name in ("keys", "values"):
        for ours, theirs in zip(getattr(quick.cache, name), getattr(expected, name), strict=True):
            np.testing.assert_allclose(
                ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=0.07
            )
    # The dead row and the slots before the new ones are as they were, to the bit.
    for ours, before in zip(quick.cache.keys, _slots_first(cache).keys, strict=True):
        assert jnp.array_equal(ours[4], before[4])
        assert jnp.array_equal(ours[3, :149], before[3, :149])
    assert jnp.isfinite(quick.hidden).all()


@pytest.mark.parametrize("rows", [1, 16, 33, 128])
def test_products_of_any_number_of_rows(rows):
    x, weights = (
        _normal(0, rows, 512).astype(jnp.bfloat16),
        (_normal(1, 512, 128) / 8).astype(jnp.bfloat16),
    )
    parts = fused.product(x, weights)
    assert parts.shape == (8, rows, 128)
    expected = x.astype(jnp.float32) @ weights.astype(jnp.float32)
    np.testing.assert_allclose(parts.sum(0), expected, atol=1e-4)
    gate, up = expected[:, :64], expected[:, 64:]
    np.testing.assert_allclose(
        fused.gated_product(x, weights).astype(jnp.float32),
        jax.nn.silu(gate) * up,
        rtol=0.02,
        atol=0.02,
    )


def test_a_width_that_is_no_power_of_two_is_normed_over_what_it_has():
    x, parts = _normal(0, 3, 192), _normal(1, 2, 3, 192)
    total, normed = fused.add_and_norm(parts, x, jnp.full(192, 2.0), 1e-5)
    np.testing.assert_allclose(total, x + parts.sum(0), rtol=1e-6)
    np.testing.assert_allclose(
        normed, 2 * total / jnp.sqrt((total**2).mean(-1, keepdims=True) + 1e-5), rtol=1e-5
    )


def test_the_sampler_gives_the_log_probs_of_the_trainer(on_nvidia, monkeypatch):
    steps = []
    monkeypatch.setattr(fused, "blocks", lambda *a, f=fused.blocks: steps.append(1) or f(*a))
    config = dataclasses.replace(CONFIG, context_length=24)
    model = language_model(config)
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, model.init(jax.random.key(1)))
    prompts = text.prompt_batch([[3, 4, 5, 6], [7], [8, 9]], length=4)
    samples = generate(
        model,
        params,
        prompts,
        jax.random.key(2),
        Sampling(max_new_tokens=12, stop_ids=(2,)),
        samples_per_prompt=2,
    )
    assert len(steps) == 1, "the loop was compiled with other blocks"
    mask = scoring.response_mask(samples.prompt_lengths, samples.lengths, samples.tokens.shape[1])
    logp = scoring.sequence_log_probs(model, params, samples.tokens, samples.lengths, mask)
    assert float(jnp.abs(logp - samples.logp).max()) < 0.05
    assert float(samples.logp.min()) < -2


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"}, {"bias": "qkv"}, {"qk_norm": True}, {"post_norm": True}, {"activation": "geglu"},
        {"norm": "rmsnorm_plus_one"}, {"query_scalar": 32}, {"head_dim": 32}, {"mlp_width": 100},
    ],
    ids=str,
)  # fmt: skip
def test_other_decoders_take_the_ordinary_blocks(change):
    assert fused.fits(CONFIG, 8)
    assert not fused.fits(dataclasses.replace(CONFIG, **change), 8)
    assert not fused.fits(CONFIG, fused.ROWS + 1)


def test_without_the_backend_or_the_room_the_ordinary_blocks_are_taken(monkeypatch):
    chips = {"H100": "9.0", "L4": "8.9", "RTX 5090": "12.0"}
    for name, capability in chips.items():
        chip = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda chip=chip: [chip])
        assert fused.fits(CONFIG, 8) == (name == "H100")
    monkeypatch.undo()
    monkeypatch.setattr(fused, "triton", None)
    assert not fused.fits(CONFIG, 8)


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the kernels are compiled there, not only lowered"
)
def test_every_kernel_is_lowered_for_a_gpu(monkeypatch):
    """What is interpreted above is also a program of the Triton backend: masks, indices and loops that it knows."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    head = jnp.bfloat16
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    cached = shape(head, 3, SLOTS, 2, 64)
    angles = (shape(jnp.float32, 3, 1, 1, 32),) * 2
    slots = shape(jnp.int32, 3)
    programs = [
        (fused.product, (shape(head, 3, 256), shape(head, 256, 128))),
        (fused.gated_product, (shape(head, 3, 256), shape(head, 256, 128))),
        (
            partial(fused.add_and_norm, epsilon=1e-5),
            (shape(jnp.float32, 2, 3, 192), shape(head, 3, 192), shape(head, 192)),
        ),
        (
            fused.attend,
            (
                shape(jnp.float32, 2, 3, 8 * 64),
                cached,
                cached,
                shape(jnp.float32, 3, SLOTS),
                slots,
                angles,
            ),
        ),
    ]
    for kernel, arguments in programs:
        try:
            lowered = (
                jax.jit(lambda *a, kernel=kernel: kernel(*a))
                .trace(*arguments)
                .lower(lowering_platforms=("cuda",))
            )
        except RuntimeError as error:
            if "No supported GPU devices" not in str(error):
                raise
            pytest.skip("this jax lowers for a GPU only where there is one")
        assert "triton" in lowered.as_text()
