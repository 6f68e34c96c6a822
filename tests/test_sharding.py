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
from rlhf_jax.models.decoder import DecoderConfig, gpt2
from rlhf_jax.models.heads import language_model, scalar_model
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
    with pytest.raises(ValueError, match=r"embed/embedding of shape \(5, 4\) .* cut dimension 0 into 2"):
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
    with pytest.raises(ValueError, match=r"batch of 6 rows \(tokens\) .* data=2 x fsdp=2: choose a multiple of 4"):
        sharding.place_batch(jax.tree.map(np.asarray, tiny.lm_batch(6)), sharding.make_mesh((2, 2, 2)))


def test_a_placed_state_keeps_its_numbers():
    params = language_model(LLAMA).init(jax.random.key(0))
    placed = sharding.place_state(params, sharding.make_mesh((1, 4, 2)))
    tiny.assert_bit_equal(placed, params)
    kernel = placed["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
