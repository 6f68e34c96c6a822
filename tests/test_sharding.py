"""Meshes, rules and batch placement, with errors that name the leaf, the axis and the fix."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rlhf_jax import optim, sharding, steps
from rlhf_jax.models.config import DecoderConfig, gpt2
from rlhf_jax.models.heads import language_model, scalar_model
from rlhf_jax.models.lora import init_lora
from tests import tiny

LLAMA = DecoderConfig(50, 16, 2, 16, 4, tied=False, bias="qkv")
GPT2 = gpt2(51, 16, 2, 16, 4)  # an odd vocabulary, as the real one


def test_axes_are_automatic():
    """PITFALL J8: explicit axes would refuse look-ups in a sharded embedding."""
    mesh = sharding.make_mesh((2, 2, 2))
    assert mesh.axis_types == (AxisType.Auto,) * 3
    table = jax.device_put(jnp.ones((8, 4)), jax.sharding.NamedSharding(mesh, P("fsdp", "tensor")))
    assert jax.jit(lambda table: table[jnp.array([1, 2])])(table).shape == (2, 4)


def test_one_size_may_be_left_open():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(sharding.make_mesh((2, -1, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize("shape", [(4, 1, 1), (16, 1, 1), (3, -1, 1)])
def test_a_mesh_that_does_not_fit_names_both_numbers(shape):
    with pytest.raises(ValueError, match=r"mesh shape .* devices and there are 8"):
        sharding.make_mesh(shape)


@pytest.mark.parametrize("shape", [(8, 1), (-1, -1, 1), (0, 8, 1)])
def test_a_mesh_needs_three_sizes(shape):
    with pytest.raises(ValueError, match="three sizes"):
        sharding.make_mesh(shape)


@pytest.mark.parametrize("model", [language_model(LLAMA), language_model(GPT2), scalar_model(GPT2)])
def test_decoder_rules_shard_every_matrix_with_its_moments_and_average(model):
    mesh, tx = sharding.make_mesh((2, 2, 2)), optim.adam(1e-3)
    state = jax.eval_shape(lambda: steps.train_state(model.init(jax.random.key(0)), tx, ema=True))
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.shape, sharded.spec)
        for (path, leaf), (_, sharded) in zip(
            jax.tree_util.tree_leaves_with_path(state),
            jax.tree_util.tree_leaves_with_path(sharding.tree_shardings(state, mesh)),
            strict=True,
        )
    }
    matrices = [name for name in specs if name.endswith(("kernel", "embedding"))]
    assert len(matrices) >= 4 * 7  # weights, two moments, average
    for name in matrices:
        assert any(axis is not None for axis in specs[name][1]), name
    for name, (_, spec) in specs.items():
        if re.search("norm|count|step|score|learning_rate", name):
            assert spec == P(), name


def test_adapters_lie_as_the_kernels_they_are_added_to():
    """Inputs and outputs of an adapter go over the axes of the kernel's; moments follow."""
    base = jax.eval_shape(language_model(LLAMA).init, jax.random.key(0))
    state = jax.eval_shape(
        lambda base: steps.train_state(
            init_lora(base, jax.random.key(0), rank=4), optim.adam(1e-3)
        ),
        base,
    )
    placed = jax.tree_util.tree_leaves_with_path(
        sharding.tree_shardings(state, sharding.make_mesh((2, 2, 2)))
    )
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): where.spec for path, where in placed
    }
    assert specs["params/blocks/mlp/up/lora_a"] == P(None, "fsdp")
    assert specs["params/blocks/mlp/up/lora_b"] == P(None, None, "tensor")
    assert specs["params/blocks/mlp/down/lora_a"] == P(None, "tensor")
    assert specs["params/blocks/mlp/down/lora_b"] == P(None, None, "fsdp")
    adapters = {name: spec for name, spec in specs.items() if "lora_" in name}
    assert len(adapters) == 3 * 2 * 7
    assert P() not in adapters.values()


def test_rules_are_data_and_come_back_from_it():
    assert (
        sharding.rules_from_data(sharding.rules_as_data(sharding.DECODER_RULES))
        == sharding.DECODER_RULES
    )
    assert sharding.rules_from_data([["kernel", [None, ["fsdp", "tensor"]]]]) == (
        ("kernel", P(None, ("fsdp", "tensor"))),
    )
    assert sharding.rules_from_data(()) == ()


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("kernel", "is not a pair"),
        (("kernel", "fsdp"), "is not a pair"),
        (
            ("kernel", (None, "model")),
            "names the mesh axis 'model': the axes are data, fsdp, tensor",
        ),
        (("kernel(", ("fsdp",)), "is not a regular expression"),
    ],
)
def test_a_rule_that_is_none_is_refused_by_the_name_of_its_field(rule, said):
    with pytest.raises(ValueError, match=f"sharding.policy: .*{said}"):
        sharding.rules_from_data((rule,), field="sharding.policy")


def test_a_state_is_built_in_its_place_from_arrays_that_stay():
    mesh, tx = sharding.make_mesh((2, 2, 2)), optim.adam(1e-3)
    params = sharding.place_state(language_model(LLAMA).init(jax.random.key(0)), mesh)
    make = lambda params: steps.train_state(params, tx, ema=True)
    state, where = sharding.build_state(make, params, mesh=mesh)
    assert jax.tree.map(lambda x: x.sharding, state) == where
    tiny.assert_bit_equal(state, make(params))
    shared = {
        shard.data.unsafe_buffer_pointer()
        for x in jax.tree.leaves(params)
        for shard in x.addressable_shards
    }
    for leaf in jax.tree.leaves(state):
        pointers = {shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards}
        assert not pointers & shared  # a step that donates the state leaves `params` alone
        shared |= pointers
    whole, _ = sharding.build_state(make, params, mesh=mesh, rules=())
    assert whole.params["blocks"]["mlp"]["up"]["kernel"].sharding.is_fully_replicated


def test_the_first_rule_that_matches_decides_and_no_rule_replicates():
    mesh = sharding.make_mesh((2, 2, 2))
    tree = {"a": {"kernel": jnp.ones((4, 4))}, "b": jnp.ones(3)}
    rules = (("a/kernel", P("tensor")), ("kernel", P("fsdp")))
    found = sharding.tree_shardings(tree, mesh, rules)
    assert found["a"]["kernel"].spec == P("tensor")
    assert found["b"].spec == P()


def test_rules_that_do_not_fit_name_the_leaf_and_the_fix():
    mesh = sharding.make_mesh((2, 2, 2))
    tree = {"embed": {"embedding": jnp.ones((5, 4))}}
    with pytest.raises(
        ValueError, match=r"embed/embedding of shape \(5, 4\) .* cut dimension 0 into 2"
    ):
        sharding.tree_shardings(tree, mesh, (("embed", P("fsdp")),))
    with pytest.raises(ValueError, match="more axes than embed/embedding"):
        sharding.tree_shardings(tree, mesh, (("embed", P(None, None, "fsdp")),))
    with pytest.raises(ValueError, match="mesh axis 'model'"):
        sharding.tree_shardings(tree, mesh, (("embed", P("model")),))


def test_rows_of_a_batch_go_over_data_and_fsdp():
    mesh = sharding.make_mesh((2, 2, 2))
    batch = jax.tree.map(np.asarray, tiny.lm_batch(8))
    placed = sharding.place_batch(batch, mesh)
    tiny.assert_bit_equal(placed, batch)
    assert {shard.data.shape for shard in placed.tokens.addressable_shards} == {(2, tiny.SLOTS)}


def test_a_batch_that_does_not_divide_names_rows_and_fix():
    with pytest.raises(
        ValueError, match=r"batch of 6 rows \(tokens\) .* data=2 x fsdp=2: choose a multiple of 4"
    ):
        sharding.place_batch(
            jax.tree.map(np.asarray, tiny.lm_batch(6)), sharding.make_mesh((2, 2, 2))
        )


def test_a_placed_state_keeps_its_numbers():
    params = language_model(LLAMA).init(jax.random.key(0))
    placed = sharding.place_state(params, sharding.make_mesh((1, 4, 2)))
    tiny.assert_bit_equal(placed, params)
    kernel = placed["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
