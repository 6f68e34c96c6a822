"""Run by hand on a GPU or TPU: what its kernels compute is what the plain ones do, within bfloat16.

    python tests/accelerator/check_kernels.py

The test suite runs on CPUs alone; this is its counterpart. Prints a line a check and ends with status 1 if one fails.
"""

from __future__ import annotations

import dataclasses
import os
import sys

# Trying every tiling of float32 products at full precision takes longer than all checks; numbers are the same.
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import scoring
from rlhf_jax.backends import PLAIN, View, backend_for, nvidia
from rlhf_jax.data import text
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.decoder import visible
from rlhf_jax.models.heads import language_model
from rlhf_jax.sampling.generate import Sampling, generate
from rlhf_jax.sampling.refill import Rows, generate_many

ROWS, SLOTS = 4, 512
CONFIG = DecoderConfig(
    1024,
    SLOTS,
    layers=4,
    width=256,
    heads=4,
    kv_heads=2,
    head_dim=64,
    mlp_width=512,
    dtype="bfloat16",
)


def rows() -> tuple[jax.Array, jax.Array]:
    """Segments of a prompt, two responses to it and another text, then padding; and their parents."""
    segments = (
        np.searchsorted([150, 260, 333, 470], np.arange(SLOTS), side="right").astype(np.int32) + 1
    )
    segments[470:] = 0
    parents = np.where(np.isin(segments, (2, 3)), 1, 0)
    return tuple(jnp.asarray(np.broadcast_to(x, (ROWS, SLOTS))) for x in (segments, parents))


def kernel(one_text: bool) -> tuple[float, float]:
    """Largest difference of mixed values, and of gradients over the largest gradient, between auto and plain."""
    segments, parents = rows()
    places = jnp.broadcast_to(jnp.arange(SLOTS), (ROWS, SLOTS))
    lengths = jnp.array([SLOTS, 300, 130, 1])
    if one_text:
        segments = (places < lengths[:, None]).astype(jnp.int32)
        parents = jnp.zeros_like(segments)
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(ROWS, SLOTS, heads, 64) for heads in (4, 2, 2)]
    qkv = [jax.random.normal(k, s).astype(jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]
    seen = visible(segments, parents, places, segments)
    view = View(jnp.where(seen, 0.0, -1e30)[:, None], None, None)
    if one_text:
        view = view._replace(segments=segments, lengths=lengths)
    best = backend_for(dtype="bfloat16", head_dim=64).attend
    where = f"{best.__module__}.{best.__qualname__}"
    print(f"attention over rows of {SLOTS} in bfloat16 on {jax.devices()[0].device_kind}: {where}")

    def run(attend, dtype: str):
        def loss(*qkv):
            mixed = attend(*qkv, view, 64).astype(jnp.float32)
            mixed = jnp.where((segments > 0)[:, :, None, None], mixed, 0)
            return jnp.sum(jnp.sin(mixed)), mixed

        wide = [x.astype(dtype) for x in qkv]
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*wide)

    (_, mixed), grads = run(best, "bfloat16")
    with jax.default_matmul_precision("highest"):
        (_, true), true_grads = run(PLAIN.attend, "float32")
    worst = max(
        float(jnp.abs(g.astype(jnp.float32) - t).max() / jnp.abs(t).max())
        for g, t in zip(grads, true_grads, strict=True)
    )
    return float(jnp.abs(mixed - true).max()), worst


def decode_step() -> tuple[float, float]:
    """Largest and mean difference of hidden states between `nvidia_decode`'s kernels and the ordinary blocks."""
    places, tokens = (
        jnp.broadcast_to(jnp.arange(200), (8, 200)),
        jax.random.randint(jax.random.key(5), (8, 201), 1, 1024),
    )
    live = jnp.ones((8, 1), jnp.int32)
    ours = CONFIG.backend.decode_blocks is not PLAIN.decode_blocks
    print(f"kernels for a decode step of 8 rows: {'ours' if ours else 'none'}")

    def hidden(name: str) -> jax.Array:
        model = language_model(dataclasses.replace(CONFIG, attention=name))
        params = model.init(jax.random.key(1))

        def run(params):
            ones = jnp.ones((8, 200), jnp.int32)
            cache = model.init_cache(8, 256)
            cache = model.apply(
                params, tokens[:, :200], segments=ones, positions=places, cache=cache
            ).cache
            step = {"segments": live, "positions": 200 * live, "cache": cache}
            return model.apply(model.for_decoding(params), tokens[:, 200:], **step).hidden

        return jax.jit(run)(params).astype(jnp.float32)

    difference = jnp.abs(hidden("auto") - hidden("cudnn" if nvidia.is_here() else "plain"))
    return float(difference.max()), float(difference.mean())


def picked() -> float:
    """Largest difference between hidden states of some slots, computed alone in the last block, and of all."""
    segments, parents = rows()
    model = language_model(CONFIG)
    params = model.init(jax.random.key(1))
    how = {
        "segments": segments,
        "parents": parents,
        "positions": jnp.broadcast_to(jnp.arange(SLOTS), (ROWS, SLOTS)),
    }
    tokens, at = (
        jax.random.randint(jax.random.key(5), (ROWS, SLOTS), 1, 1024),
        jnp.tile(jnp.arange(0, 460, 3), (ROWS, 1)),
    )
    whole = jax.jit(lambda p: model.apply(p, tokens, **how).hidden)(params)[:, at[0]]
    alone = jax.jit(lambda p: model.apply_at(p, tokens, at, **how).hidden)(params)
    return float(jnp.abs(whole.astype(jnp.float32) - alone.astype(jnp.float32)).max())


def sampler_and_trainer(dtype: str) -> float:
    """Largest difference between the sampler's log-probs and those of a forward pass over the whole rows."""
    model = language_model(dataclasses.replace(CONFIG, dtype=dtype))
    params = model.init(jax.random.key(1))
    prompts = text.prompt_batch(
        np.random.default_rng(0).integers(1, 1024, (8, 200)).tolist(), length=200
    )
    samples = generate(model, params, prompts, jax.random.key(2), Sampling(max_new_tokens=200))
    mask = scoring.response_mask(samples.prompt_lengths, samples.lengths, samples.tokens.shape[1])
    score = jax.jit(scoring.sequence_log_probs, static_argnums=0)
    logp = score(model, params, samples.tokens, samples.lengths, mask)
    return float(jnp.abs(logp - samples.logp).max())


def refill() -> bool:
    """Whether refilled rows draw the tokens of one batch, in float32."""
    model = language_model(dataclasses.replace(CONFIG, dtype="float32"))
    params = model.init(jax.random.key(1))
    prompts = text.prompt_batch(
        np.random.default_rng(1).integers(1, 1024, (24, 40)).tolist(), length=40
    )
    settings = {"max_new_tokens": 60, "stop_ids": tuple(range(60))}
    with jax.default_matmul_precision("highest"):
        together = generate(model, params, prompts, jax.random.key(3), Sampling(**settings))
        refilled = generate_many(
            model, params, prompts, jax.random.key(3), Sampling(**settings), rows=Rows(count=6)
        )
    return bool(np.array_equal(together.tokens, refilled.tokens))


def exact() -> float:
    """`sampler_and_trainer` in float32, with products at full precision."""
    with jax.default_matmul_precision("highest"):
        return sampler_and_trainer("float32")


def main() -> int:
    """Runs every check."""
    checks = [
        (
            "attention against plain float32, shared prefixes, values and gradients",
            lambda: kernel(False),
            (2e-2, 3e-2),
        ),
        (
            "attention against plain float32, one text per row, values and gradients",
            lambda: kernel(True),
            (2e-2, 3e-2),
        ),
        (
            "a decode step's kernels against the ordinary blocks, largest and mean",
            decode_step,
            (0.1, 0.01),
        ),
        ("slots picked from the last block", lambda: (picked(),), (0.1,)),
        (
            "log-probs of sampler and trainer, bfloat16",
            lambda: (sampler_and_trainer("bfloat16"),),
            (2e-2,),
        ),
        ("refilled rows draw other tokens", lambda: (float(not refill()),), (0.5,)),
        ("log-probs of sampler and trainer, float32", lambda: (exact(),), (1e-4,)),
    ]
    failed = 0
    for name, check, limits in checks:
        found = check()
        good = all(value <= limit for value, limit in zip(found, limits, strict=True))
        failed += not good
        shown = ", ".join(
            f"{value:.2e} (at most {limit:g})" for value, limit in zip(found, limits, strict=True)
        )
        print(f"{'ok  ' if good else 'FAIL'} {name}: {shown}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
