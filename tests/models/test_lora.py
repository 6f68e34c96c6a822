"""LoRA: equal to the base at first, to its merged weights always; the base is neither copied nor changed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import optim, steps
from rlhf_jax.models import init_lora, lora_model, merge_lora, with_lora
from rlhf_jax.models.config import DecoderConfig, gpt2
from rlhf_jax.models.heads import language_model, scalar_from_language_model, scalar_model
from rlhf_jax.sampling.generate import Sampling, generate
from rlhf_jax.types import LMBatch, PromptBatch
from tests import margins

LLAMA = DecoderConfig(48, 64, 3, 32, 4, kv_heads=2, mlp_width=64)
GPT2 = gpt2(48, 64, 3, 32, 4)


def rows(seed: int = 0) -> LMBatch:
    tokens = np.random.default_rng(seed).integers(1, 48, (4, 12)).astype(np.int32)
    place = np.broadcast_to(np.arange(12, dtype=np.int32), (4, 12))
    segments = (place < np.array([[12], [7], [9], [12]])).astype(np.int32)
    batch = LMBatch(
        tokens=tokens, segments=segments, positions=place.copy(), mask=(segments > 0) & (place > 0)
    )
    return jax.tree.map(jnp.asarray, batch)


def hidden(model, params, batch):
    return model.apply(
        params, batch.tokens, segments=batch.segments, positions=batch.positions
    ).hidden


def trained_adapters(base, **kinds):
    """Adapters whose B is not 0 any more."""
    adapters = init_lora(base, jax.random.key(1), **({"rank": 4} | kinds))
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapters_are_the_base(config, layers, dtype):
    """Merged, to the bit: 0 is added to each weight. As a program of more sums, up to rounding."""
    model = language_model(DecoderConfig(**{**vars(config), "dtype": dtype, "unroll": 1}))
    base = model.init(jax.random.key(0))
    params = with_lora(base, init_lora(base, jax.random.key(1), rank=4, layers=layers), alpha=16)
    found, wanted = (np.asarray(hidden(model, p, rows()), np.float32) for p in (params, base))
    np.testing.assert_allclose(
        found, wanted, atol=16 * float(jnp.finfo(dtype).eps) * np.abs(wanted).max()
    )
    merged = merge_lora(base, init_lora(base, jax.random.key(1), rank=4, layers=layers), alpha=16)
    jax.tree.map(np.testing.assert_array_equal, merged, base)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize(
    "kinds", [{}, {"layers": 1}, {"targets": "query|value"}, {"layers": 2, "targets": "mlp/down"}]
)
def test_adapted_layer_by_layer_equals_merged(config, kinds):
    model = language_model(config)
    base = model.init(jax.random.key(0))
    adapters = trained_adapters(base, **kinds)
    by_layer = hidden(model, with_lora(base, adapters, alpha=8), rows())
    merged = hidden(model, merge_lora(base, adapters, alpha=8), rows())
    np.testing.assert_allclose(by_layer, merged, atol=2e-5)
    assert np.abs(by_layer - hidden(model, base, rows())).max() > 1e-2
    prompt = PromptBatch(tokens=rows().tokens[:, :4], lengths=jnp.full(4, 4), ids=jnp.arange(4))

    def decoded(params):
        greedy = {"max_new_tokens": 6, "temperature": 0.0, "stop_ids": (0,)}
        return generate(model, params, prompt, jax.random.key(0), Sampling(**greedy)).tokens

    margins.assert_no_near_tie(decoded, merge_lora(base, adapters, alpha=8))
    np.testing.assert_array_equal(
        decoded(with_lora(base, adapters, alpha=8)), decoded(merge_lora(base, adapters, alpha=8))
    )


def test_the_gradient_is_that_of_the_merged_weights():
    model = language_model(LLAMA)
    base = model.init(jax.random.key(0))
    adapters = trained_adapters(base)

    def loss(apply, adapters):
        out = apply(adapters)
        return jnp.sum(jnp.sin(out) * jnp.arange(out.size).reshape(out.shape) / out.size)

    bound = lora_model(model, base, alpha=8)
    by_layer = jax.grad(functools.partial(loss, lambda a: hidden(bound, a, rows())))(adapters)
    merged = jax.grad(
        functools.partial(loss, lambda a: hidden(model, merge_lora(base, a, alpha=8), rows()))
    )(adapters)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), by_layer, merged
    )  # entries reach 60
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(by_layer))


@pytest.mark.parametrize("remat", ["none", "block"])
def test_a_step_trains_the_adapters_and_leaves_the_base(remat):
    model = language_model(DecoderConfig(**{**vars(LLAMA), "remat": remat}))
    base = model.init(jax.random.key(0))
    before = jax.tree.map(np.array, base)
    tx = optim.adam(1e-2)
    step = steps.compile_frozen_step(
        lambda b: steps.make_sft_step(lora_model(model, b, alpha=8), tx), base
    )
    state = steps.train_state(init_lora(base, jax.random.key(1), rank=4), tx)
    losses = []
    for _ in range(40):
        state, metrics = step(state, rows(), None)
        losses.append(float(metrics["sft/loss"].value))
    assert losses[-1] < losses[0] - 0.5
    jax.tree.map(np.testing.assert_array_equal, before, base)  # donated or changed, this would fail
    trained = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert trained < sum(leaf.size for leaf in jax.tree.leaves(base))


def test_the_base_is_an_argument_of_the_program_and_not_a_constant():
    model = language_model(LLAMA)
    base = model.init(jax.random.key(0))
    tx = optim.adam(1e-2)
    step = steps.compile_frozen_step(
        lambda b: steps.make_sft_step(lora_model(model, b, alpha=8), tx), base
    )
    state = steps.train_state(init_lora(base, jax.random.key(1), rank=4), tx)
    program = step.func.lower(base, state, rows(), None).as_text()
    largest = max(
        (len(line) for line in program.splitlines() if "stablehlo.constant" in line), default=0
    )
    assert largest < 2_000
    # Gradients of frozen kernels are never formed: no product puts out the shape of a stacked kernel.
    assert "tensor<3x32x64xf32>" not in "".join(
        line for line in program.splitlines() if "dot_general" in line
    )


def test_blocks_below_the_adapters_are_not_differentiated():
    model = language_model(LLAMA)
    base = model.init(jax.random.key(0))

    def flops(layers):
        bound = lora_model(model, base, alpha=8)
        adapters = init_lora(base, jax.random.key(1), rank=1, layers=layers)
        grad = jax.jit(jax.grad(lambda a: jnp.sum(hidden(bound, a, rows()))))
        analysis = grad.lower(adapters).compile().cost_analysis()
        return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]

    assert flops(1) < 0.75 * flops(3)


def test_a_fresh_score_head_takes_the_place_of_the_bases():
    model = scalar_model(LLAMA)
    base = scalar_from_language_model(
        language_model(LLAMA).init(jax.random.key(0)), jax.random.key(3)
    )
    trained = {"score": {"weight": jnp.ones(32), "bias": jnp.float32(0.5)}}
    bound = lora_model(model, base, alpha=1)
    states = hidden(bound, trained, rows())
    np.testing.assert_allclose(bound.head(trained, states), states.sum(-1) + 0.5, atol=1e-4)
    grads = jax.grad(lambda t: jnp.sum(bound.head(t, hidden(bound, t, rows()))))(trained)
    assert jax.tree.structure(grads) == jax.tree.structure(trained)


def test_with_lora_shares_the_arrays_of_the_base():
    base = language_model(LLAMA).init(jax.random.key(0))
    params = with_lora(base, init_lora(base, jax.random.key(1), rank=2, targets="query"), alpha=1)
    assert params["blocks"]["mlp"]["up"]["kernel"] is base["blocks"]["mlp"]["up"]["kernel"]
    merged = merge_lora(base, init_lora(base, jax.random.key(1), rank=2, targets="query"), alpha=1)
    assert merged["blocks"]["mlp"]["up"]["kernel"] is base["blocks"]["mlp"]["up"]["kernel"]
    assert jax.tree.structure(merged) == jax.tree.structure(base)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 2, "layers": 4}, "layers=4"),
        ({"rank": 2, "targets": "qery"}, "targets='qery'"),
    ],
)
def test_errors_name_the_argument(kinds, message):
    base = language_model(LLAMA).init(jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        init_lora(base, jax.random.key(0), **kinds)
