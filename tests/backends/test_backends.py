"""Every backend is held to `PLAIN`, operation by operation: values, gradients, padding, segments, parents, caches.

Kernels of a chip that is not here run interpreted; for cuDNN's stands XLA's attention with the same arguments.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import backends, sharding
from rlhf_jax.backends import PLAIN, View
from rlhf_jax.models.decoder import visible

ROWS, SLOTS, HEADS, GROUPS, WIDTH = 4, 256, 4, 2, 16
MESHES = {"one device": None, "data": (4, 2, 1), "data and tensor": (2, 1, 2)}


def mesh_of(shape):
    count = int(np.prod(shape))
    return sharding.make_mesh(shape, devices=jax.devices()[:count])


def make(platform: str, mesh: str = "one device", kernel: str = "auto", dtype: str = "float32"):
    shape = MESHES[mesh]
    on = None if shape is None else mesh_of(shape)
    return backends._assemble(platform, kernel, on, jnp.dtype(dtype), WIDTH, True)


BACKENDS = {
    "cpu": partial(make, "cpu"),
    "cpu, blocked": partial(make, "cpu", kernel="blocked"),
    "cpu on a mesh": partial(make, "cpu", "data"),
    "planned": partial(make, "planned"),
    "planned on a mesh": partial(make, "planned", "data and tensor"),
    "nvidia": partial(make, "nvidia", dtype="bfloat16"),
    "nvidia on a mesh": partial(make, "nvidia", "data", dtype="bfloat16"),
    "tpu": partial(make, "tpu"),
    "tpu on a mesh of rows": partial(make, "tpu", "data"),
    "tpu on a mesh of rows and heads": partial(make, "tpu", "data and tensor"),
    "another one": partial(make, "rocm"),
}


@pytest.fixture(params=BACKENDS.values(), ids=list(BACKENDS))
def backend(request, monkeypatch):
    """Each backend; where there is no cuDNN its arguments go to XLA's attention."""
    plain = jax.nn.dot_product_attention

    def without_cudnn(*operands, implementation, **how):
        assert implementation == "cudnn"
        return plain(*operands, **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
    return request.param()


def normal(seed: int, *shape: int, dtype="float32") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def close(a, b, dtype="float32") -> None:
    """Within the order of sums; in bfloat16 within a few units in the last place of the largest number."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    scale = np.abs(b).max(initial=1e-6)
    np.testing.assert_allclose(a, b, rtol=0, atol=scale * (2e-5 if dtype == "float32" else 4e-2))


def same_with_gradients(ours, plain, *arguments, real=True) -> None:
    """Values, and gradients of a nonlinear sum of them over what is real."""

    def run(function):
        def total(*arguments):
            y = jnp.where(real, function(*arguments), 0).astype(jnp.float32)
            return jnp.sum(jnp.sin(y)), y

        every = tuple(range(len(arguments)))
        return jax.jit(jax.value_and_grad(total, every, has_aux=True))(*arguments)

    dtype = str(jax.tree.leaves(arguments)[0].dtype)
    jax.tree.map(partial(close, dtype=dtype), run(ours), run(plain))


# ----------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("shape", [(6, 16), (3, 5, 16)], ids=["tokens", "rows of tokens"])
def test_linear(backend, shape):
    arguments = normal(0, *shape), normal(1, 16, 32), normal(2, 32)
    same_with_gradients(backend.linear, PLAIN.linear, *arguments)
    same_with_gradients(partial(backend.linear, bias=None), PLAIN.linear, *arguments[:2])


@pytest.mark.parametrize("outputs", [48, 20], ids=["tiles", "no tiles"])
def test_a_decode_layout_computes_the_same_products(backend, outputs):
    layer = {
        "attention": {
            name: {"kernel": normal(i, 16, 16)} for i, name in enumerate(("query", "key", "value"))
        },
        "mlp": {
            name: {"kernel": normal(7 + i, 16, outputs)} for i, name in enumerate(("gate", "up"))
        },
    }
    x, laid_out = normal(9, 3, 1, 16), backend.decode_layout(layer)
    for module, names in (("attention", ("query", "key", "value")), ("mlp", ("gate", "up"))):
        plain = [PLAIN.linear(x, layer[module][name]["kernel"]) for name in names]
        joined = "_".join(names)
        found = laid_out[module]
        ours = [found[name] for name in ([joined] if joined in found else names)]
        outcome = [backend.linear(x, projection["kernel"]) for projection in ours]
        close(jnp.concatenate(outcome, axis=-1), jnp.concatenate(plain, axis=-1))


@pytest.mark.parametrize("rows", [3, 100], ids=["decode", "training"])
@pytest.mark.parametrize("vocabulary", [64, 50])
def test_head_logits(backend, rows, vocabulary):
    arguments = normal(0, rows, 1, 16), normal(1, vocabulary, 16)
    same_with_gradients(backend.head_logits, PLAIN.head_logits, *arguments)
    narrow = [x.astype(jnp.bfloat16) for x in arguments]
    ours, plain = backend.head_logits(*narrow), PLAIN.head_logits(*narrow)
    assert ours.dtype == jnp.float32
    close(ours, plain)


def test_residual(backend):
    through = lambda f: lambda x, w: f(f(x + jnp.tanh(x @ w)) * 2)
    same_with_gradients(
        through(backend.residual), through(PLAIN.residual), normal(0, 2, 3, 4), normal(1, 4, 4)
    )


# ---------------------------------------------------------------------------------------- attention


def packed():
    """Rows of three segments and padding."""
    ends = np.array([[90, 131, 230], [128, 129, 256], [1, 2, 250], [256, 256, 256]])
    place = np.arange(SLOTS)
    segments = np.stack([np.searchsorted(e, place, side="right") + 1 for e in ends])
    return np.where(place < ends[:, -1:], segments, 0)


def view_of(kind: str) -> tuple[View, jax.Array]:
    """A view as the decoder makes it, and which slots are real."""
    places = jnp.broadcast_to(jnp.arange(SLOTS), (ROWS, SLOTS))
    lengths = jnp.array([SLOTS, 200, 1, 130])
    segments = jnp.asarray(packed(), jnp.int32)
    if kind == "one text":
        segments = (places < lengths[:, None]).astype(jnp.int32)
    parents = jnp.where(segments > 1, 1, 0) if kind == "parents" else jnp.zeros_like(segments)
    seen = visible(segments, parents, places, segments)
    bias = jnp.where(seen, 0.0, -1e30)[:, None]
    view = View(bias, None, None)
    if kind != "parents":
        view = view._replace(segments=segments)
    if kind == "one text":
        view = view._replace(lengths=lengths)
    return view, segments > 0


def operands(dtype):
    sizes = ((ROWS, SLOTS, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS))
    return [normal(i, *size, dtype=dtype) for i, size in enumerate(sizes)]


def dtype_of(backend) -> str:
    """What cuDNN's kernel takes; float32 elsewhere."""
    return "bfloat16" if "nvidia" in backend.attend.__module__ else "float32"


@pytest.mark.parametrize("kind", ["packed", "parents", "one text"])
def test_attention_over_rows(backend, kind):
    view, real = view_of(kind)
    run = lambda attend: lambda *qkv: attend(*qkv, view, WIDTH)
    qkv = operands(dtype_of(backend))
    same_with_gradients(run(backend.attend), run(PLAIN.attend), *qkv, real=real[:, :, None, None])


@pytest.mark.parametrize("kind", ["packed", "parents", "one text"])
def test_attention_of_some_slots(backend, kind):
    whole, real = view_of(kind)
    at = jnp.array([[3, 255, 7], [0, 100, 100], [1, 0, 249], [129, 2, 5]])
    view, real = whole.at(at), backends.take(real, at)
    query, key, value = operands(dtype_of(backend))
    arguments = backends.take(query, at), key, value
    run = lambda attend: lambda *qkv: attend(*qkv, view, WIDTH)
    same_with_gradients(
        run(backend.attend_at), run(PLAIN.attend_at), *arguments, real=real[:, :, None, None]
    )


def test_attention_over_a_cache(backend):
    """Two writes, of which padding stores nothing, and the queries of the second over both."""
    dtype, length = dtype_of(backend), 12
    key, value = (
        normal(0, ROWS, 8, GROUPS, WIDTH, dtype=dtype),
        normal(1, ROWS, 8, GROUPS, WIDTH, dtype=dtype),
    )
    query = normal(2, ROWS, 3, HEADS, WIDTH, dtype=dtype)
    slots = jnp.array([[0, 1, 2, 3, 4], [0, 1, 12, 12, 12], [12] * 5, [0, 1, 2, 12, 12]])
    more = jnp.array([[5, 6, 7], [2, 3, 4], [0, 1, 12], [3, 12, 12]])
    place = jnp.arange(length)[None, None, :]
    seen = (place <= more[:, :, None]) & (place < more.min(1)[:, None, None] + 3)
    view = View(jnp.where(seen, 0.0, -1e30)[:, None], None, None)

    def run(layout):
        cache = tuple(
            jnp.zeros(shape, dtype) for shape in layout.shapes(ROWS, length, GROUPS, WIDTH)
        )
        assert all(x.shape[layout.head_axis] == GROUPS for x in cache)
        cache = layout.write(cache, slots, key[:, :5], value[:, :5])
        cache = layout.write(cache, more, key[:, 5:], value[:, 5:])
        return layout.attend(query, cache, view, WIDTH)

    close(run(backend.cache), run(PLAIN.cache), dtype)


# ------------------------------------------------------------------------------------------- layers


def body(x, layer, own, positions=None):
    """A block that looks at a whole row and at its number."""
    mixed = jnp.cumsum(x @ own["w"], axis=1) + layer
    x, mixed = (
        (x, mixed) if positions is None else (backends.take(y, positions) for y in (x, mixed))
    )
    return x + jnp.tanh(mixed), None


@pytest.mark.parametrize("unroll", [None, 1])
@pytest.mark.parametrize("positions", [None, [[0, 5], [3, 3]]], ids=["all", "some"])
@pytest.mark.parametrize("layers", [1, 3])
def test_over_layers(backend, unroll, positions, layers):
    at = None if positions is None else jnp.array(positions)
    run = lambda b: lambda x, w: b.over_layers(body, x, {"w": w}, positions=at, unroll=unroll)
    same_with_gradients(run(backend), run(PLAIN), normal(0, 2, 6, 8), normal(1, layers, 8, 8))


def test_unstack(backend):
    def run(backend):
        def total(stacked):
            own = backend.unstack(stacked)
            return sum(
                jnp.sum(jnp.sin((i + 1) * layer["w"]) * layer["b"][0])
                for i, layer in enumerate(own)
            )

        stacked = {"w": normal(0, 3, 4, 4), "b": normal(1, 3, 2)}
        return backend.unstack(stacked), jax.jit(jax.grad(total))(stacked)

    jax.tree.map(np.testing.assert_array_equal, run(backend), run(PLAIN))


def test_last_block(backend):
    x, at = normal(0, 2, 6, 8), jnp.array([[0, 5], [3, 3]])
    block = lambda positions=None: (body(x, 0, {"w": jnp.eye(8)}, positions)[0], "cache")
    (ours, kept), (plain, _) = backend.last_block(block, at), PLAIN.last_block(block, at)
    assert kept == "cache"
    close(ours, plain)


# ------------------------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("sound", [True, False])
def test_step_where(backend, sound):
    old = {"w": normal(0, 3, 4), "count": jnp.int32(3), "narrow": normal(1, 2, dtype="bfloat16")}

    def step(state):
        return {
            "w": state["w"] * 2,
            "count": state["count"] + 1,
            "narrow": state["narrow"] * jnp.float32(3),
        }

    run = lambda b: jax.jit(lambda sound, old: b.step_where(sound, step, old))(sound, old)
    ours, plain = run(backend), run(PLAIN)
    assert jax.tree.map(lambda x: x.dtype, ours) == jax.tree.map(lambda x: x.dtype, plain)
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


# ------------------------------------------------------------------------------------ what is chosen


def test_this_machine_has_a_backend_that_equal_arguments_share():
    assert backends.backend_for() is backends.backend_for()
    assert backends.backend_for().residual is not PLAIN.residual
    mesh = mesh_of((4, 2, 1))
    assert backends.backend_for(mesh=mesh).residual is PLAIN.residual
    assert backends.backend_for(mesh=mesh_of((1, 1, 1))) is backends.backend_for()


def test_plans_take_the_forms_of_an_accelerator():
    with backends.planned_for_accelerators():
        planned = backends.backend_for()
    assert planned.step_where is PLAIN.step_where
    assert planned.logits_per_chunk == PLAIN.logits_per_chunk
    assert planned.residual is PLAIN.residual
    assert backends.backend_for().step_where is not PLAIN.step_where


def test_rows_that_splash_cannot_divide_or_compare_are_computed_in_blocks():
    attend = make("tpu", "data and tensor").attend
    for rows, kind in ((3, "packed"), (4, "parents")):
        view, _ = view_of(kind)
        cut = jax.tree.map(lambda x, rows=rows: x[:rows], (*operands("float32"), view))
        program = jax.make_jaxpr(lambda *a: attend(*a, WIDTH))(*cut)
        assert "pallas_call" not in str(program)
    view, _ = view_of("packed")
    assert "pallas_call" in str(
        jax.make_jaxpr(lambda *a: attend(*a, WIDTH))(*operands("float32"), view)
    )


def test_cudnn_gets_no_mask_where_causality_and_lengths_say_the_same(monkeypatch):
    given = {}
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, k, v, **how: given.update(how) or q
    )
    qkv, backend = operands("bfloat16"), make("nvidia", dtype="bfloat16")
    backend.attend(*qkv, view_of("one text")[0], WIDTH)
    assert given.pop("is_causal")
    assert set(given) == {"query_seq_lengths", "key_value_seq_lengths", "scale", "implementation"}
    backend.attend(*qkv, view_of("packed")[0], WIDTH)
    assert given["mask"].shape == (ROWS, 1, SLOTS, SLOTS)
