"""Every compiled program of the recipe on one mesh after the other, in a process of its own (`test_mesh.py`).

Prints one JSON line a mesh: losses and gradient norms, sampled tokens, compilations, what each device holds. The
process is one of its own because the cache of compiled programs must be off (a cached program warns of nothing), and
because it wants a compiler that hurries.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from rlhf_jax import optim, scoring, sharding, steps
from rlhf_jax import ppo as ppo_lib
from rlhf_jax.models import language_model, scalar_model
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.sampling.generate import Sampling, generate
from rlhf_jax.sampling.refill import Rows, generate_many
from rlhf_jax.types import KLState, PPOState, PromptBatch, RankingBatch
from tests import margins, tiny

MESHES = ((1, 1, 1), (8, 1, 1), (2, 2, 2))
if os.environ.get("RLHF_JAX_SLOW_TESTS"):
    MESHES = (*MESHES, (1, 8, 1), (2, 4, 1))
CONFIG = DecoderConfig(
    tiny.VOCABULARY + 1, 16, 1, 16, 4, kv_heads=2, mlp_width=16, positions="learned", unroll=1
)
KEY, TX = jax.random.key(0), optim.adam(1e-3)
ROWS = 16


def ranking_batch() -> RankingBatch:
    """Three ranked responses of two tokens to a prompt of two; no two of a prompt are equal, which would tie them."""
    random = np.random.default_rng(0)
    segments = np.tile([1, 1, 2, 2, 3, 3, 4, 4], (ROWS, 1)).astype(np.int32)
    positions = np.tile([0, 1, 2, 3, 2, 3, 2, 3], (ROWS, 1)).astype(np.int32)
    ends = np.tile([[3, 5, 7]], (ROWS, 1, 1)).astype(np.int32)
    ranks = np.stack([random.permutation(3) for _ in range(ROWS)])[:, None].astype(np.int32)
    tokens = random.integers(0, tiny.VOCABULARY, segments.shape).astype(np.int32)
    tokens[:, 2::2] = np.stack([random.permutation(tiny.VOCABULARY)[:3] for _ in range(ROWS)])
    return RankingBatch(tokens, segments, (segments > 1).astype(np.int32), positions, ends, ranks)


def prompts() -> PromptBatch:
    """Prompts of different lengths."""
    random = np.random.default_rng(1)
    lengths = random.integers(1, 5, ROWS).astype(np.int32)
    return PromptBatch(
        random.integers(0, 7, (ROWS, 4)).astype(np.int32), lengths, np.arange(ROWS, dtype=np.int32)
    )


def pieces(tree) -> dict[str, float]:
    """Bytes of one device over bytes of the whole, of the matrices of a tree."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {
        jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in named if x.ndim > 1
    }
    return {name: x.addressable_shards[0].data.size / x.size for name, x in leaves.items()}


def twice(step, state, *batches) -> tuple[dict[str, float], dict[str, float], int]:
    """Metrics of two steps, where the state then lies, and how often the step was compiled."""
    found = {}
    for i in range(2):
        state, metrics = step(state, *batches)
        found |= {
            f"{name}/{i}": float(metric.value)
            for name, metric in metrics.items()
            if metric.value.ndim == 0
        }
    jitted = step.func if isinstance(step, partial) else step
    return found, pieces(state), jitted._cache_size()


def on_mesh(shape: tuple[int, int, int]) -> dict:
    """All programs on one mesh."""
    mesh = sharding.make_mesh(shape, devices=jax.devices()[: int(np.prod(shape))])
    config = dataclasses.replace(CONFIG, mesh=mesh)
    policy, value = language_model(config), scalar_model(config)
    place = lambda tree: sharding.place_batch(jax.tree.map(np.asarray, tree), mesh)
    weights = [
        jax.device_get(model.init(KEY)) for model in (language_model(CONFIG), scalar_model(CONFIG))
    ]
    params = [sharding.place_state(w, mesh) for w in weights]
    train_state = partial(steps.train_state, tx=TX)

    state, where = sharding.build_state(train_state, params[0], mesh=mesh)
    sft = twice(
        steps.compile_step(steps.make_sft_step(policy, TX, microbatches=2), state_sharding=where),
        state, place(tiny.lm_batch(ROWS)), None,
    )  # fmt: skip
    state, where = sharding.build_state(train_state, params[1], mesh=mesh)
    reward_step = steps.compile_step(steps.make_reward_step(value, TX), state_sharding=where)
    reward = twice(reward_step, state, place(ranking_batch()), None)
    ppo = ppo_steps(mesh, policy, value, params, place)

    settings = {"max_new_tokens": 6, "temperature": 1.5, "stop_ids": (2,)}
    if (
        shape == MESHES[0]
    ):  # what is discrete may be compared between meshes, because no two numbers nearly tie

        def accuracies(p):
            built, _ = sharding.build_state(train_state, p, mesh=mesh)
            seen, _, _ = twice(reward_step, built, place(ranking_batch()), None)
            return [seen[f"reward/accuracy/{i}"] for i in range(2)]

        margins.assert_no_near_tie(accuracies, params[1])
        margins.assert_no_near_tie(
            lambda p: generate(policy, p, place(prompts()), KEY, Sampling(**settings)).tokens,
            params[0],
        )
    samples = generate(policy, params[0], place(prompts()), KEY, Sampling(**settings))
    many = generate_many(
        policy,
        params[0],
        prompts(),
        KEY,
        Sampling(**settings),
        rows=Rows(count=8, refill=3, sharding=sharding.batch_sharding(mesh)),
    )
    cache = policy.init_cache(8, 10)
    result = {
        "mesh": shape,
        "tokens": np.asarray(samples.tokens).tolist(),
        "refilled": many.tokens.tolist(),
    }
    result |= {
        "finished": int(np.sum(samples.finished)),
        "cache": pieces(cache),
        "batch": pieces(place(prompts())),
    }
    result |= {"samples": pieces(samples)}
    done = {"sft": sft, "reward": reward, "ppo": ppo}
    for name, (metrics, held, compiled) in done.items():
        result[name] = {"metrics": metrics, "pieces": held, "compiled": compiled}
    return result


def ppo_steps(mesh, policy, value, params, place):
    """Two PPO steps with the pretraining mix; the value network is replicated, the policy is not."""
    _, where = sharding.build_state(
        partial(steps.train_state, tx=TX, ema=True), params[0], mesh=mesh
    )
    _, small_where = sharding.build_state(
        partial(steps.train_state, tx=TX), params[1], mesh=mesh, rules=()
    )
    whole = jax.tree.map(
        lambda _: sharding.replicated(mesh), (KLState(jnp.float32(0.02)), jnp.zeros((), jnp.int32))
    )
    where = PPOState(where, small_where, *whole)
    rollout = tiny.rollout(ROWS, tiny.LANGUAGE.init(KEY))
    old = jax.jit(partial(scoring.sequence_log_probs, language_model(CONFIG)))(
        language_model(CONFIG).init(KEY), rollout.tokens, rollout.lengths, rollout.mask
    )
    step = steps.compile_step(
        steps.make_ppo_step(
            policy,
            value,
            ppo_lib.Optimizers(TX, TX),
            ppo_lib.PPO(minibatches=2, ptx_coef=1.0),
            batch_sharding=sharding.batch_sharding(mesh),
        ),
        state_sharding=where,
    )
    batches = place(dataclasses.replace(rollout, old_logp=old)), place(tiny.lm_batch(2 * ROWS)), KEY

    def ran(value_params):
        made, _ = sharding.build_state(
            partial(steps.train_state, tx=TX, ema=True), params[0], mesh=mesh
        )
        small, _ = sharding.build_state(
            partial(steps.train_state, tx=TX), value_params, mesh=mesh, rules=()
        )
        rest = jax.device_put((KLState(jnp.float32(0.02)), jnp.zeros((), jnp.int32)), whole)
        return twice(step, PPOState(made, small, *rest), *batches)

    if mesh.size == 1:  # see `on_mesh`; no ratio of the policy comes near its clip either
        margins.assert_no_near_tie(
            lambda p: [v for k, v in ran(p)[0].items() if "clip_fraction" in k], params[1]
        )
    found = ran(params[1])
    assert max(found[0][f"policy/log_ratio_max/{i}"] for i in range(2)) < 0.1
    return found


def rematerialised() -> None:
    """A program that XLA is known to warn of, so that the test which finds no warning could have found one."""
    mesh = sharding.make_mesh((2, 4, 1))
    rows = jax.device_put(
        jnp.ones((8, 6, 16)), jax.sharding.NamedSharding(mesh, P(("data", "fsdp")))
    )
    width = jax.sharding.NamedSharding(mesh, P(None, None, "fsdp"))
    jax.jit(lambda x: jax.lax.with_sharding_constraint(x * 2, width) + 1)(rows).block_until_ready()


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    for mesh_shape in MESHES:
        print(json.dumps(on_mesh(mesh_shape)), flush=True)
    sys.stderr.flush()
    print("== a program that is known to be warned of", file=sys.stderr, flush=True)
    rematerialised()
