"""The decoder: one attention rule under packing, shared prefixes, padding and caches."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlhf_jax import backends, sharding
from rlhf_jax.backends import plain
from rlhf_jax.models import (
    DecoderConfig,
    gpt2,
    language_model,
    lora,
    scalar_from_language_model,
    scalar_model,
)
from rlhf_jax.models import config as config_module
from rlhf_jax.models.decoding import decoding_params
from rlhf_jax.models.layers import Linear

LLAMA = DecoderConfig(50, 32, 2, 16, 4, kv_heads=2, mlp_width=24, tied=False)
GPT2 = gpt2(50, 32, 2, 16, 4)
FAMILIES = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])


def _tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 50, shape), jnp.int32)


def _params(config: DecoderConfig):
    """Weights large enough that attention is far from uniform, biases and norm scales not at their defaults."""
    model = language_model(config)
    noise = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree.map(
        lambda x: jnp.asarray(noise.normal(0, 0.5, x.shape), jnp.float32), shapes
    )


def _plain(model, params, tokens, **kwargs):
    """Whole rows of one segment."""
    ones = jnp.ones(tokens.shape, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return _apply(model, params, tokens, segments=ones, positions=positions, **kwargs).hidden


@partial(jax.jit, static_argnames="model")
def _apply(model, params, tokens, **kwargs):
    return model.apply(params, tokens, **kwargs)


def _close(a, b):
    np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4)


def _numpy_llama(config: DecoderConfig, params, tokens: np.ndarray) -> np.ndarray:
    """One row, token by token, in float64: nothing shared with the decoder."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean() + config.norm_eps) * scale

    def rotate(x, t):
        out, half = x.copy(), len(x) // 2
        for i in range(half):
            angle = t * config.rotary_base ** (-2 * i / len(x))
            out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
            out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
        return out

    xs = [p["embed"]["embedding"][t] for t in tokens]
    for layer in range(config.layers):
        b = jax.tree.map(lambda x: x[layer], p["blocks"])  # noqa: B023
        a, m, e = b["attention"], b["mlp"], config.head_dim
        normed = [norm(x, b["attention_norm"]["scale"]) for x in xs]
        q, k, v = (
            [(n @ a[name]["kernel"]).reshape(-1, e) for n in normed]
            for name in ("query", "key", "value")
        )
        for t in range(len(xs)):
            mixed = []
            for h in range(config.heads):
                g = h // (config.heads // config.kv_heads)
                s = np.array(
                    [rotate(q[t][h], t) @ rotate(k[j][g], j) for j in range(t + 1)]
                ) / np.sqrt(e)
                w = np.exp(s - s.max())
                mixed.append(sum(w[j] / w.sum() * v[j][g] for j in range(t + 1)))
            xs[t] = xs[t] + np.concatenate(mixed) @ a["out"]["kernel"]
        for t, x in enumerate(xs):
            n = norm(x, b["mlp_norm"]["scale"])
            gate = n @ m["gate"]["kernel"]
            xs[t] = x + (gate / (1 + np.exp(-gate)) * (n @ m["up"]["kernel"])) @ m["down"]["kernel"]
    return np.stack([norm(x, p["norm"]["scale"]) for x in xs])


def test_llama_equals_a_numpy_loop_by_definition():
    model, params = _params(LLAMA)
    tokens = _tokens(1, 7)
    _close(_plain(model, params, tokens)[0], _numpy_llama(LLAMA, params, np.asarray(tokens[0])))


@FAMILIES
def test_future_tokens_change_nothing(config):
    model, params = _params(config)
    tokens = _tokens(1, 9)
    changed = tokens.at[0, 5:].set((tokens[0, 5:] + 7) % 50)
    before, after = _plain(model, params, tokens), _plain(model, params, changed)
    _close(before[:, :5], after[:, :5])
    assert np.abs(before[:, 5:] - after[:, 5:]).max() > 0.1


@FAMILIES
def test_packed_documents_equal_separate_forwards(config):
    """PITFALLS 43."""
    model, params = _params(config)
    first, second = _tokens(1, 5), _tokens(1, 4, seed=1)
    packed = jnp.concatenate([first, second, _tokens(1, 3, seed=2)], axis=1)
    segments = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3])
    positions = jnp.asarray([[*range(5), *range(4), 0, 0, 0]])
    hidden = _apply(model, params, packed, segments=segments, positions=positions).hidden
    _close(hidden[:, :5], _plain(model, params, first))
    _close(hidden[:, 5:9], _plain(model, params, second))
    assert np.isfinite(hidden).all()


@FAMILIES
def test_shared_prefix_row_equals_separate_rows(config):
    """PITFALLS 45: a prompt and its responses once, each response with the prompt as its parent."""
    model, params = _params(config)
    prompt, one, two = _tokens(1, 4), _tokens(1, 3, seed=1), _tokens(1, 5, seed=2)
    row = jnp.concatenate([prompt, one, two], axis=1)
    segments = jnp.asarray([[1] * 4 + [2] * 3 + [3] * 5])
    parents = jnp.asarray([[0] * 4 + [1] * 8])
    positions = jnp.asarray([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8]])
    hidden = _apply(
        model, params, row, segments=segments, positions=positions, parents=parents
    ).hidden
    _close(hidden[:, :7], _plain(model, params, jnp.concatenate([prompt, one], axis=1)))
    _close(hidden[:, 7:], _plain(model, params, jnp.concatenate([prompt, two], axis=1))[:, 4:])


PICKED = jnp.asarray([[8, 0, 3], [5, 5, 140]])


@pytest.mark.parametrize(
    ("config", "slots"),
    [
        (LLAMA, 9), (GPT2, 9), (dataclasses.replace(LLAMA, layers=1), 9),
        (dataclasses.replace(LLAMA, unroll=1, remat="block", window=4), 141),  # more than a block of queries
    ],
    ids=["llama", "gpt2", "one layer", "loop, remat and windows"],
)  # fmt: skip
def test_picked_slots_are_those_of_all_and_so_are_their_gradients(config, slots):
    config = dataclasses.replace(config, context_length=256)
    model, params = _params(config)
    tokens, at = _tokens(2, slots), jnp.minimum(PICKED, slots - 1)

    def total(params, pick):
        hidden = _plain(model, params, tokens, at=at) if pick else _plain(model, params, tokens)
        hidden = hidden if pick else jnp.take_along_axis(hidden, at[:, :, None], axis=1)
        return jnp.sum(hidden**3), hidden

    run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    ((_, picked), grads), ((_, whole), whole_grads) = run(params, True), run(params, False)
    assert picked.shape == (2, 3, config.width)
    _close(picked, whole)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-3), grads, whole_grads
    )


def test_picked_slots_leave_out_the_last_block_of_the_others():
    """Queries, attention and MLP of the last block: of 1 in 32 tokens, so all but keys and values are left out."""
    config = dataclasses.replace(
        LLAMA, layers=2, width=64, heads=4, kv_heads=2, head_dim=0, mlp_width=256
    )
    model = language_model(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((4, 32), jnp.int32)

    def flops(at):
        run = jax.jit(lambda p, t: _plain(model, p, t, at=at))
        return run.lower(params, tokens).compile().cost_analysis()["flops"]

    block, keys_values = 2 * 128 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 256), 2 * 128 * 64 * 32 * 2
    left_out = flops(None) - flops(jnp.full((4, 1), 31))
    assert left_out > 0.95 * (block - keys_values)


def test_a_prefill_that_picks_stores_what_one_that_does_not_stores():
    model, params = _params(LLAMA)
    tokens, at = _tokens(2, 6), jnp.asarray([[5], [2]])
    cache = model.init_cache(2, 8)
    whole = (
        _plain(model, params, tokens, cache=cache),
        _apply_cached(model, params, tokens, cache, None),
    )
    picked = _apply_cached(model, params, tokens, cache, at)
    _close(picked.hidden, jnp.take_along_axis(whole[0], at[:, :, None], axis=1))
    jax.tree.map(_close, picked.cache, whole[1].cache)


def _apply_cached(model, params, tokens, cache, at):
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return _apply(
        model, params, tokens, segments=jnp.ones_like(tokens), positions=places, cache=cache, at=at
    )


@FAMILIES
@pytest.mark.parametrize("padding", [1, 6])
def test_padding_counts_and_ids_change_nothing(config, padding):
    """PITFALLS 8, 9, 11: whatever ids the padding has, EOS inside the row included."""
    model, params = _params(config)
    tokens = _tokens(2, 6)
    padded = jnp.concatenate([tokens, jnp.full((2, padding), tokens[0, 2])], axis=1)
    segments = jnp.asarray([[1] * 6 + [0] * padding] * 2)
    positions = jnp.broadcast_to(jnp.arange(6 + padding), padded.shape)
    hidden = _apply(model, params, padded, segments=segments, positions=positions).hidden
    _close(hidden[:, :6], _plain(model, params, tokens))


@pytest.mark.parametrize("remat", ["none", "block"])
def test_gradients_stay_finite_with_rows_of_padding(remat):
    """PITFALLS 17."""
    model, params = _params(dataclasses.replace(LLAMA, remat=remat))
    segments = jnp.asarray([[1, 1, 0, 0], [0, 0, 0, 0]])
    positions = jnp.asarray([[0, 1, 0, 0], [0, 0, 0, 0]])
    cache = model.init_cache(2, 4)

    def total(params, cache):
        tokens = _tokens(2, 4)
        hidden = _apply(
            model, params, tokens, segments=segments, positions=positions, cache=cache
        ).hidden
        return jnp.where((segments > 0)[..., None], hidden, 0).sum()

    full = dataclasses.replace(cache, lengths=jnp.asarray([0, 4]))
    for state in (None, cache, full):
        grads = jax.jit(jax.grad(total))(params, state)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@FAMILIES
@pytest.mark.parametrize("unroll", [None, 1])
def test_cached_decode_equals_full_forward(config, unroll):
    """A right-padded prefill, then one token at a time, against whole rows."""
    model, params = _params(dataclasses.replace(config, unroll=unroll))
    tokens, prompts = _tokens(2, 10), (3, 5)
    whole = _plain(model, params, tokens)
    places = jnp.broadcast_to(jnp.arange(5), (2, 5))
    segments = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    poisoned = jnp.where(segments > 0, tokens[:, :5], 49)
    step = partial(_apply, model)
    cache = model.init_cache(2, 10)
    out = step(params, poisoned, segments=segments, positions=places, cache=cache)
    np.testing.assert_array_equal(out.cache.lengths, prompts)
    for row, length in enumerate(prompts):
        _close(out.hidden[row, :length], whole[row, :length])
    for _ in range(5):
        lengths = out.cache.lengths
        fed = jnp.take_along_axis(tokens, lengths[:, None], axis=1)
        ones = jnp.ones((2, 1), jnp.int32)
        out = step(params, fed, segments=ones, positions=lengths[:, None], cache=out.cache)
        for row in range(2):
            _close(out.hidden[row, 0], whole[row, int(lengths[row])])


def test_cached_responses_see_their_parent_and_a_reset_row_starts_anew():
    model, params = _params(LLAMA)
    prompt, answer = _tokens(2, 4), _tokens(2, 3, seed=3)
    ones = jnp.ones((2, 4), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(7), (2, 7))
    cache = model.init_cache(2, 9)
    cache = _apply(model, params, prompt, segments=ones, positions=places[:, :4], cache=cache).cache
    two = jnp.full((2, 3), 2, jnp.int32)
    seen = _apply(
        model, params, answer, segments=two, positions=places[:, 4:], parents=two - 1, cache=cache
    ).hidden
    alone = _apply(model, params, answer, segments=two, positions=places[:, 4:], cache=cache).hidden
    _close(seen, _plain(model, params, jnp.concatenate([prompt, answer], axis=1))[:, 4:])
    assert np.abs(seen - alone).max() > 0.1

    fresh = cache.reset(jnp.asarray([True, False]))
    out = _apply(model, params, answer, segments=two // 2, positions=places[:, :3], cache=fresh)
    _close(out.hidden[0], _plain(model, params, answer)[0])
    np.testing.assert_array_equal(out.cache.lengths, [3, 7])


def test_no_dropout_without_a_key_and_two_forwards_are_bit_equal():
    """PITFALLS 2."""
    model, params = _params(dataclasses.replace(LLAMA, dropout=0.1))
    plain, _ = _params(LLAMA)
    tokens = _tokens(2, 6)
    np.testing.assert_array_equal(_plain(model, params, tokens), _plain(model, params, tokens))
    _close(_plain(model, params, tokens), _plain(plain, params, tokens))  # two programs
    one, two = (_plain(model, params, tokens, key=jax.random.key(s)) for s in (0, 1))
    assert np.abs(one - two).max() > 0.1
    np.testing.assert_array_equal(one, _plain(model, params, tokens, key=jax.random.key(0)))


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("at", [None, [[0, 5], [3, 3]]], ids=["all", "picked"])
def test_scan_unroll_and_remat_change_no_gradient(config, at):
    tokens, ones = _tokens(2, 6), jnp.ones((2, 6), jnp.int32)
    rows = {"segments": ones, "positions": jnp.broadcast_to(jnp.arange(6), (2, 6))}

    def gradient(**change):
        model, params = _params(dataclasses.replace(config, **change))
        apply = (
            model.apply
            if at is None
            else lambda p, x, **how: model.apply_at(p, x, jnp.array(at), **how)
        )
        total = lambda p: jnp.sum(jnp.sin(apply(p, tokens, **rows).hidden))
        return jax.jit(jax.value_and_grad(total))(params)

    expected = gradient()
    for change in ({"unroll": 1}, {"remat": "block"}, {"unroll": 1, "remat": "block"}):
        jax.tree.map(_close, gradient(**change), expected)


def without(monkeypatch, **plainer) -> None:
    """Has this machine's backend take other forms of some operations."""
    whole = backends.backend_for
    monkeypatch.setattr(
        config_module, "backend_for", lambda *a, **how: whole(*a, **how)._replace(**plainer)
    )


def test_the_same_kernels_read_every_layer_on_a_cpu(monkeypatch):
    """A place in a stack that the compiler knows makes kernels of each layer's own."""
    model, params = _params(GPT2)

    def known():
        rows = {
            "segments": jnp.ones((2, 6), jnp.int32),
            "positions": jnp.broadcast_to(jnp.arange(6), (2, 6)),
        }
        program = jax.jit(lambda p, tokens: model.apply(p, tokens, **rows).hidden).lower(
            params, _tokens(2, 6)
        )
        return program.compile().as_text().count("slice={[1:2]")

    assert known() == 0
    without(monkeypatch, unstack=plain.unstack, over_layers=plain.over_layers_to_positions)
    assert known() > 0


def test_the_gradient_of_the_residual_stream_is_kept_on_a_cpu_and_the_same(monkeypatch):
    """Kept behind a condition that the compiler cannot decide; else it is computed again for every product."""
    model, params = _params(GPT2)
    tokens, ones = _tokens(2, 8), jnp.ones((2, 8), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(8), (2, 8))

    def total(params, ones):
        hidden = model.apply(params, tokens, segments=ones, positions=places).hidden
        return jnp.sum(hidden**2)

    def gradient():
        compiled = jax.jit(jax.grad(total)).lower(params, ones).compile()
        return compiled.as_text().count(" conditional("), compiled(params, ones)

    kept, with_it = gradient()
    without(monkeypatch, residual=plain.residual)
    none, without_it = gradient()
    assert (kept, none) == (2 * GPT2.layers + 1, 1)  # the one is of `cpu.unstack`
    jax.tree.map(_close, with_it, without_it)


def test_bfloat16_compute_keeps_float32_parameters_and_heads():
    """PITFALLS 36."""
    model, params = _params(dataclasses.replace(LLAMA, dtype="bfloat16"))
    plain, _ = _params(LLAMA)
    assert {x.dtype for x in jax.tree.leaves(model.init(jax.random.key(0)))} == {
        jnp.dtype("float32")
    }
    hidden = _plain(model, params, _tokens(1, 6))
    assert hidden.dtype == jnp.bfloat16
    assert model.head(params, hidden).dtype == jnp.float32
    assert {x.dtype for x in model.init_cache(1, 4).keys} == {jnp.dtype("bfloat16")}
    exact = _plain(plain, params, _tokens(1, 6))
    assert np.abs(hidden.astype(jnp.float32) - exact).max() < 0.1 * np.abs(exact).max()


def test_scalar_head_by_hand_and_its_initial_spread():
    """PITFALLS 31: weight ~ N(0, 1/(D+1)) in variance, bias 0; the bias is added."""
    score = scalar_from_language_model(
        {"embed": {"embedding": jnp.zeros((1, 4096))}}, jax.random.key(0)
    )["score"]
    assert abs(float(score["weight"].std()) * np.sqrt(4097) - 1) < 0.05
    assert float(score["bias"]) == 0
    head = scalar_model(LLAMA).head
    params = {"score": {"weight": jnp.asarray([1.0, -2.0]), "bias": jnp.asarray(0.5)}}
    np.testing.assert_allclose(
        head(params, jnp.asarray([[[3.0, 1.0]], [[0.0, 0.0]]])), [[1.5], [0.5]]
    )


@FAMILIES
def test_reward_model_starts_from_the_language_model(config):
    """PITFALLS 31: the same decoder, the unembedding gone, the same tree as a fresh scalar model."""
    model, params = _params(config)
    reward = scalar_from_language_model(params, jax.random.key(3))
    fresh = scalar_model(config).init(jax.random.key(0))
    assert jax.tree.structure(reward) == jax.tree.structure(fresh)
    tokens = _tokens(1, 6)
    _close(_plain(scalar_model(config), reward, tokens), _plain(model, params, tokens))


def test_tied_head_reads_the_embedding():
    model, params = _params(GPT2)
    hidden = _plain(model, params, _tokens(1, 3))
    _close(
        model.head(params, hidden), np.asarray(hidden) @ np.asarray(params["embed"]["embedding"]).T
    )
    assert "unembed" not in params
    assert "unembed" in language_model(LLAMA).init(jax.random.key(0))


def test_equal_configs_give_the_same_model():
    assert language_model(LLAMA) is language_model(dataclasses.replace(LLAMA))
    assert language_model(LLAMA).config == LLAMA


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"heads": 4, "kv_heads": 3}, "kv_heads=3 must divide heads=4"),
        ({"positions": "alibi"}, "positions='alibi'"),
        ({"head_dim": 3}, "head_dim=3 must be even"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"layers": 0}, "layers=0"),
        ({"unroll": 9}, "unroll=9"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_a_bad_config_names_field_value_and_fix(change, named):
    with pytest.raises(ValueError, match=named.replace("[", r"\[")):
        dataclasses.replace(LLAMA, **({"unroll": None} | change))


def test_projections_of_one_input_are_joined_for_decoding_unless_their_outputs_are_spread_or_adapted():
    _, params = _params(LLAMA)
    layer = decoding_params(LLAMA, params)["blocks"][0]
    assert set(layer["attention"]) == {"query_key_value", "out"}
    assert set(layer["mlp"]) == {"gate_up", "down"}
    apart = {"query", "key", "value", "out"}
    spread = dataclasses.replace(
        LLAMA, mesh=sharding.make_mesh((1, 1, 2), devices=jax.devices()[:2])
    )
    assert set(decoding_params(spread, params)["blocks"][0]["attention"]) == apart
    adapted = lora.with_lora(params, lora.init_lora(params, jax.random.key(0), rank=2), alpha=2)
    assert set(decoding_params(LLAMA, adapted)["blocks"][0]["attention"]) == apart


def _rounding(a, b, dtype) -> None:
    """Equal up to the order of sums: 2e-6 in float32, 4 units in the last place of the largest number in bfloat16."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    limit = (
        2e-6 if dtype == "float32" else 4 * float(jnp.finfo(dtype).eps) * np.abs(b).max(initial=0)
    )
    np.testing.assert_allclose(a, b, rtol=0, atol=limit)


def _with_and_without_preparing(config):
    """Output and logits of two rows through a cache, with the parameters as they are and as decoding wants them."""
    model, params = _params(config)
    tokens = _tokens(2, 6)
    ones, places = jnp.ones((2, 6), jnp.int32), jnp.broadcast_to(jnp.arange(6), (2, 6))
    prepared = model.for_decoding(params)
    assert len(prepared["blocks"]) == config.layers
    found = [
        _apply(model, p, tokens, segments=ones, positions=places, cache=model.init_cache(2, 8))
        for p in (params, prepared)
    ]
    logits = [
        model.head(p, output.hidden) for p, output in zip((params, prepared), found, strict=True)
    ]
    return prepared["blocks"][1]["attention"], found, logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@FAMILIES
def test_parameters_for_decoding_change_no_number(config, dtype, monkeypatch):
    """Each weight is what it was, in the dtype that computes; only the layout of the arrays is another.

    What is computed from them is compared up to rounding: it is another program, and the processor's matrix library
    sums arrays of another layout in another order (by 6e-7 in float32 on one of them).
    """
    monkeypatch.setattr(plain, "JOINED", {})
    config = dataclasses.replace(config, dtype=dtype)
    attention, found, logits = _with_and_without_preparing(config)
    kernels = _params(config)[1]["blocks"]["attention"]
    for name in ("query", "key", "value", "out"):
        assert attention[name]["kernel"].dtype == dtype
        kernel, wanted = attention[name]["kernel"], kernels[name]["kernel"][1].astype(dtype)
        if kernel.ndim == 3:  # on a CPU its transpose lies in tiles
            kernel = kernel.reshape(-1, kernel.shape[-1]).T
        np.testing.assert_array_equal(kernel.astype(jnp.float32), wanted.astype(jnp.float32))
    jax.tree.map(partial(_rounding, dtype=dtype), *found)
    _rounding(*logits, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@FAMILIES
def test_joined_projections_are_the_same_function(config, dtype):
    attention, found, logits = _with_and_without_preparing(dataclasses.replace(config, dtype=dtype))
    kernel = attention["query_key_value"]["kernel"]
    assert kernel.dtype == dtype
    assert kernel.size == config.width * (config.heads + 2 * config.kv_heads) * config.head_dim
    jax.tree.map(partial(_rounding, dtype=dtype), *found)
    _rounding(*logits, dtype)


@pytest.mark.parametrize("cached", [False, True])
def test_picked_slots_over_several_devices_are_taken_from_all(cached):
    """The whole last block is computed there, and gives the same."""
    mesh = sharding.make_mesh((4, 2, 1))
    model, params = _params(LLAMA)
    spread = language_model(dataclasses.replace(LLAMA, mesh=mesh))
    tokens, at = _tokens(8, 6), jnp.tile(jnp.asarray([[5, 0]]), (8, 1))
    both = [
        _plain(m, params, tokens, at=at, cache=m.init_cache(8, 8) if cached else None)
        for m in (model, spread)
    ]
    _close(*both)


def kernel_gradient(config):
    """Of a projection over rows of tokens, by its kernel: compiled, and what it is called with."""
    layer = Linear(config, 16, 32, bias=True, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    x = jax.random.normal(jax.random.key(1), (4, 24, 16))

    def loss(state, x):
        return jnp.sum(jnp.sin(nnx.merge(graph, state)(x)))

    return jax.jit(jax.grad(loss, (0, 1))).lower(state, x).compile(), (state, x)


def test_a_projection_on_one_device_transposes_no_activations():
    """Over rows and slots XLA on a CPU would first write both transposed; the gradients are the same."""
    config = gpt2(11, 8, 1, 16, 2)
    flat, arguments = kernel_gradient(config)
    assert "[32,96]" not in (flat.as_text() or "[32,96]")
    rows, _ = kernel_gradient(dataclasses.replace(config, mesh=sharding.make_mesh((4, 2, 1))))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-5),
        flat(*arguments),
        rows(*arguments),
    )
