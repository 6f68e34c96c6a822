"""Times the parts of the recipe next to what the hardware can do and next to other libraries.

    python tools/benchmark.py sft                     # supervised step, every token a target
    python tools/benchmark.py reward --k=9            # K-way reward-model step, shared prefix
    python tools/benchmark.py decode                  # sampling with a cache
    python tools/benchmark.py ppo --epochs=4          # a PPO iteration and its three pieces
    python tools/benchmark.py slots                   # ragged responses: refilled rows or static
    python tools/benchmark.py sft_epoch --data=FILE   # an epoch over real ragged text, packed

``--peer=trl|transformers|tunix`` runs that library on the same work in a virtual environment of its
own, in turn (A B A B), and prints the ratios. ``--sweep=batch=1,2,4,8`` repeats a suite over a
size. ``--json`` makes the last line one JSON object. Weights and tokens are random; nothing is
downloaded but a peer's packages.

FLOPs are those of matrix products and causal attention, with the head at target positions only.
What the last block may skip because its output is not read still counts, so that figures compare.
The "matrix rate" is that of a plain matrix product measured in the same process.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import optim, sharding
from rlhf_jax.data import schema, text
from rlhf_jax.data.loader import Batches
from rlhf_jax.models.config import DecoderConfig, gpt2
from rlhf_jax.models.heads import language_model, scalar_model
from rlhf_jax.ppo import PPO, Optimizers
from rlhf_jax.rollout import Shaping, make_score_and_shape
from rlhf_jax.run import compiling, devices, memory, networks, responses
from rlhf_jax.run.files import write_lines
from rlhf_jax.sampling.generate import Sampling, generate, lower_generate
from rlhf_jax.sampling.refill import Rows, generate_many
from rlhf_jax.steps import compile_step, make_ppo_step, make_reward_step, make_sft_step, train_state
from rlhf_jax.types import KLState, LMBatch, Model, PPOState, PromptBatch, Samples

PEERS = {
    "trl": ("torch==2.13.0", "trl==1.12.0", "transformers", "accelerate", "datasets"),
    "transformers": ("torch==2.13.0", "transformers"),
    "tunix": ("google-tunix==0.1.7",),
}
"""The packages in each peer's virtual environment; `tools/peers` has the scripts."""


class Work(NamedTuple):
    """One suite at one size: a step to call repeatedly, and the work in a step."""

    step: Callable[[int], Any]
    """``(i) -> arrays to wait for``; step i has inputs of its own."""
    tokens: int
    flops: float
    floor_s: Callable[[], float] | None = None
    """The hardware's lower bound on a step's seconds, where it is not the matrix rate; measured
    after the steps."""
    pieces: Callable[[], dict[str, float]] | None = None
    """Seconds of the parts of a step, measured after the whole."""


# -------------------------------------------------------------------------------------------- sizes


def decoder(a: argparse.Namespace, context: int) -> DecoderConfig:
    """The architecture that the flags name: GPT-2's family or Llama's."""
    common_fields = {"dtype": a.dtype, "remat": a.remat, "unroll": a.unroll or None}
    if a.family == "gpt2":
        return gpt2(a.vocab, context, a.layers, a.width, a.heads, **common_fields)
    return DecoderConfig(
        a.vocab, context, a.layers, a.width, a.heads, kv_heads=a.kv_heads, mlp_width=a.mlp_width,
        **common_fields,
    )  # fmt: skip


def forward_flops(
    config: DecoderConfig,
    lengths: Sequence[int],
    *,
    targets: int,
    seen: float | None = None,
    read: int | None = None,
) -> float:
    """FLOPs of a forward pass: 2 per weight and token, 4 E per head and pair, 2 D V per target.

    A pair is a query with a visible key. `read` is the number of tokens whose hidden states are
    wanted, if not all: the last block computes keys and values of every token, but all else, and
    their share of the pairs, for those tokens alone.
    """
    tokens = sum(lengths)
    share = 1.0 if read is None else read / tokens
    query, key_value = 2 * config.heads * config.head_dim, 2 * config.kv_heads * config.head_dim
    mlp = (3 if config.activation in ("swiglu", "geglu") else 2) * config.mlp_width
    pairs = sum(t * (t + 1) / 2 for t in lengths) if seen is None else seen
    own = 2 * config.width * (query + mlp) * tokens + 4 * config.heads * config.head_dim * pairs
    blocks = (
        config.layers - 1 + share
    ) * own + config.layers * 2 * config.width * key_value * tokens
    return blocks + 2 * config.width * config.vocab_size * targets


def random_tokens(a: argparse.Namespace, i: int, *shape: int) -> np.ndarray:
    """Ids of step `i`, uniform over the vocabulary."""
    return np.random.default_rng([a.seed, i]).integers(1, a.vocab, size=shape, dtype=np.int32)


# ------------------------------------------------------------------------------------------- suites


def sft(a: argparse.Namespace) -> Work:
    """A supervised step on full rows: forward, backward, clipping, AdamW."""
    length = a.prompt_len + a.new_tokens
    model = language_model(decoder(a, length))
    whole = np.ones((a.batch, length), np.int32)
    targets = np.broadcast_to(np.arange(length) > 0, whole.shape)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), whole.shape)

    def batch(i: int) -> LMBatch:
        return LMBatch(
            *map(jnp.asarray, (random_tokens(a, i, *whole.shape), whole, places, targets))
        )

    tokens, flops = (
        whole.size,
        # The backward pass costs twice the forward pass.
        3 * forward_flops(model.config, [length] * a.batch, targets=int(targets.sum())),
    )
    return Work(_trained(a, model, make_sft_step, batch), tokens, flops)


def sft_epoch(a: argparse.Namespace) -> Work:
    """An epoch over the texts of ``--data``, packed.

    A step takes about as many tokens as ``--batch`` texts have.
    """
    documents = read_ids(a)
    sizes = [len(ids) for ids in documents]
    length = -(-max(sizes) // 64) * 64
    rows = text.lm_rows(documents, length=length)
    batches = Batches(
        rows, batch_size=max(1, round(a.batch * np.mean(sizes) / length)), seed=a.seed
    )
    model, steps = language_model(decoder(a, length)), batches.steps(1)
    flops = 3 * forward_flops(model.config, sizes, targets=int(rows.mask.sum()))
    step = _trained(a, model, make_sft_step, lambda i: jax.tree.map(jnp.asarray, batches.at(i)))
    print(
        f"{len(sizes):,} texts, {sum(sizes):,} tokens in {len(rows.tokens)} rows of {length}, "
        f"{steps} steps of {batches.batch_size} rows, {text.padding_share(rows):.1%} padding"
    )
    return Work(lambda i: [step(i * steps + j) for j in range(steps)][-1], sum(sizes), flops)


def read_ids(a: argparse.Namespace) -> list[list[int]]:
    """Token ids of the demonstrations in ``--data``, unless the file already contains ids."""
    with open(a.data, encoding="utf-8") as lines:
        first = json.loads(lines.readline())
        if "input_ids" in first:
            lines.seek(0)
            return [json.loads(line)["input_ids"] for line in lines]
    tokenizer = text.load_tokenizer(networks.model_folder(a.model))
    records, _ = schema.read_jsonl(a.data, schema.Demonstration)
    ids = [
        [
            *text.encode_prompt(tokenizer, r.prompt),
            *text.encode_answer(tokenizer, r.prompt, r.response),
        ]
        for r in records
    ]
    return [each for each in ids if len(each) <= a.longest]


def reward(a: argparse.Namespace) -> Work:
    """A reward-model step on ``--batch`` prompts, one row per prompt and its ``--k`` responses."""
    rows = [ranking_rows(a, i) for i in range(2)]
    length = rows[0].tokens.shape[1]
    model = scalar_model(decoder(a, a.prompt_len + a.new_tokens))
    seen = a.batch * _shared_pairs(a)
    flops = 3 * forward_flops(model.config, [length] * a.batch, targets=0, seen=seen)
    step = _trained(a, model, make_reward_step, lambda i: rows[i % len(rows)])
    return Work(step, a.batch * length, flops)


def ranking_rows(a: argparse.Namespace, i: int) -> Any:
    """`a.batch` rows: a prompt of `prompt_len` tokens and its `k` responses of `new_tokens`."""
    ids = random_tokens(a, i, a.batch, a.prompt_len + a.k * a.new_tokens).tolist()
    split = [
        (
            row[: a.prompt_len],
            np.reshape(row[a.prompt_len :], (a.k, -1)).tolist(),
            tuple(range(a.k)),
        )
        for row in ids
    ]
    length = a.prompt_len + a.k * a.new_tokens
    return jax.tree.map(jnp.asarray, text.ranking_rows(split, length=length, max_k=a.k))


def _shared_pairs(a: argparse.Namespace) -> float:
    own = a.new_tokens * (a.new_tokens + 1) / 2
    return a.prompt_len * (a.prompt_len + 1) / 2 + a.k * (a.new_tokens * a.prompt_len + own)


def _trained(
    a: argparse.Namespace, model: Model, make_step: Any, batch: Callable[[int], Any]
) -> Callable[[int], Any]:
    """A training step that carries its state from call to call."""
    tx = optim.adam(1e-5, weight_decay=0.01, clip_norm=1.0)
    step_fn = compile_step(make_step(model, tx))
    held = [train_state(jax.jit(model.init)(jax.random.key(a.seed)), tx)]

    def step(i: int) -> Any:
        held[0], metrics = step_fn(held[0], batch(i), None)
        return held[0], metrics

    return step


def decode(a: argparse.Namespace) -> Work:
    """Samples ``--new_tokens`` for ``--batch`` prompts at temperature 1, prefill included."""
    model, params = _language_model(a)
    config = model.config
    prefill = forward_flops(config, [a.prompt_len] * a.batch, targets=a.batch, read=a.batch)
    lengths = [a.prompt_len + a.new_tokens] * a.batch
    flops = forward_flops(config, lengths, targets=a.batch * a.new_tokens)

    def floor() -> float:
        return prefill / matrix_rate(a.dtype) + (a.new_tokens - 1) * decode_floor(a, params, config)

    run = partial(generate, model, params, sampling=Sampling(max_new_tokens=a.new_tokens))
    return Work(
        lambda i: run(prompts_of(a, i), jax.random.key(i)), a.batch * a.new_tokens, flops, floor
    )


def decode_floor(a: argparse.Namespace, params: Any, config: DecoderConfig) -> float:
    """The least seconds of a decode step: the longer of memory traffic and matrix products.

    Memory traffic is one read of the weights and the cache; products run at the matrix rate.
    """
    middle = a.prompt_len + a.new_tokens / 2
    cache = 2 * a.batch * config.layers * config.kv_heads * config.head_dim * middle
    size = jnp.dtype(a.dtype).itemsize
    read = (networks.size(params) + cache) * size / bandwidth()
    seen = forward_flops(config, [1] * a.batch, targets=a.batch, seen=a.batch * middle)
    return max(read, seen / matrix_rate(a.dtype))


def _language_model(a: argparse.Namespace) -> tuple[Model, Any]:
    model = language_model(decoder(a, a.prompt_len + a.new_tokens))
    params = jax.jit(model.init)(jax.random.key(a.seed))
    # Sampling reads all weights once per token, so they are stored in the dtype of the compute.
    if a.dtype != "float32":
        params = jax.tree.map(lambda x: x.astype(a.dtype), params)
    return model, params


def prompts_of(a: argparse.Namespace, i: int, count: int = 0) -> PromptBatch:
    """Prompts of exactly `prompt_len` tokens."""
    tokens = random_tokens(a, i, count or a.batch, a.prompt_len)
    return text.prompt_batch(tokens.tolist(), length=a.prompt_len)


def ppo(a: argparse.Namespace) -> Work:
    """A PPO iteration: sample, score by a reward model, reference and values, update both networks.

    Four networks of one size, without pretraining term or average of the weights, as in the peers.
    """
    length = a.prompt_len + a.new_tokens
    config = decoder(a, length)
    policy, scalar = language_model(config), scalar_model(config)
    tx = optim.adam(1e-5, weight_decay=0.01, clip_norm=1.0)
    shape = make_score_and_shape(policy, scalar, scalar, Shaping(max_new_tokens=a.new_tokens))
    settings = PPO(
        ptx_coef=0.0, epochs=a.epochs, minibatches=a.minibatches, max_new_tokens=a.new_tokens
    )
    step_fn = compile_step(make_ppo_step(policy, scalar, Optimizers(tx, tx), settings))
    reference, critic = (jax.jit(m.init)(jax.random.key(a.seed)) for m in (policy, scalar))
    held = [
        PPOState(
            train_state(reference, tx),
            train_state(critic, tx),
            KLState(jnp.float32(0.05)),
            jnp.int32(0),
        )
    ]

    def sample(i: int) -> Samples:
        return generate(
            policy,
            held[0].policy.params,
            prompts_of(a, i),
            jax.random.key(i),
            Sampling(max_new_tokens=a.new_tokens),
        )

    def to_score(samples: Samples) -> tuple[Any, ...]:
        return (
            reference, held[0].value.params, critic, samples, held[0].kl.coef, jnp.arange(a.batch),
        )  # fmt: skip

    def score(samples: Samples) -> Any:
        return shape(*to_score(samples))

    def update(rollout: Any, i: int) -> Any:
        held[0], metrics = step_fn(held[0], rollout, None, jax.random.key(i))
        return held[0], metrics

    def programs() -> Iterator[jax.stages.Lowered]:
        samples = jax.eval_shape(lambda: sample(0))
        rollout = jax.eval_shape(score, samples)[0]
        weights, key = held[0].policy.params, jax.random.key(0)
        yield compiling.lower(step_fn, held[0], rollout, None, key)
        yield lower_generate(
            policy, weights, prompts_of(a, 0), key, Sampling(max_new_tokens=a.new_tokens)
        )
        yield shape.lower(*to_score(samples))

    # Once, before the first step, as `experiments/ppo.py` does.
    compile_ahead = functools.cache(lambda: compiling.compile_together(programs()))

    def step(i: int) -> Any:
        compile_ahead()
        return update(score(sample(i))[0], i)

    def pieces() -> dict[str, float]:
        samples = sample(0)
        assert int(samples.lengths.min()) == length, "a response ended early: there is no stop id"
        rollout = score(samples)[0]
        parts = {
            "rollout_s": partial(sample, 1),
            "score_s": partial(score, samples),
            "update_s": partial(update, rollout, 2),
        }
        return {
            name: statistics.median(_timed(lambda i, f=f: f(), range(a.steps)))
            for name, f in parts.items()
        }

    return Work(step, a.batch * length, _ppo_flops(a, config), pieces=pieces)


def _ppo_flops(a: argparse.Namespace, config: DecoderConfig) -> float:
    lengths = [a.prompt_len + a.new_tokens] * a.batch
    language = forward_flops(config, lengths, targets=a.batch * a.new_tokens)
    scalar = forward_flops(config, lengths, targets=0)
    return 2 * language + 2 * scalar + 3 * a.epochs * (language + scalar)


def slots(a: argparse.Namespace) -> Work:
    """Ragged responses to ``--prompts`` prompts in ``--batch`` rows, refilled as responses end.

    The mean length is a quarter of the limit: each token ends its response with probability
    ``4 / new_tokens``. `pieces` is the same work in static batches, which wait for their longest
    response.
    """
    model, params = _language_model(a)
    stop = tuple(range(round(4 * a.vocab / a.new_tokens)))
    settings = {"max_new_tokens": a.new_tokens, "stop_ids": stop}
    prompts = prompts_of(a, 0, a.prompts)

    def refilled(i: int, streams: int = 1) -> Samples:
        key = jax.random.key(i)
        return generate_many(
            model,
            params,
            prompts,
            key,
            Sampling(**settings),
            rows=Rows(count=a.batch, streams=streams),
        )

    def static(i: int) -> list[Samples]:
        parts = [
            jax.tree.map(lambda x, s=s: x[s : s + a.batch], prompts)
            for s in range(0, a.prompts, a.batch)
        ]
        return [
            jax.device_get(generate(model, params, part, jax.random.key(i), Sampling(**settings)))
            for part in parts
        ]

    def pieces() -> dict[str, float]:
        one, many = refilled(0), static(0)
        same = np.array_equal(one.tokens, np.concatenate([part.tokens for part in many]))
        assert same or a.dtype != "float32", (
            "refilled rows and static batches drew different tokens"
        )
        streams = responses.sampling_streams(
            sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1])
        )
        refilled(0, streams)  # compiles it before the clock runs
        runs = {
            "static_s": static,
            "refilled_s": refilled,
            "refilled_streams_s": partial(refilled, streams=streams),
        }
        found = {name: statistics.median(times) for name, times in _in_turn(runs, a.steps).items()}
        lengths = one.lengths - one.prompt_lengths
        return found | {
            "static_over_refilled": found["static_s"] / found["refilled_s"],
            "static_over_refilled_streams": found["static_s"] / found["refilled_streams_s"],
            "mean_response_tokens": float(lengths.mean()),
        }

    lengths = refilled(0).lengths
    tokens = int(lengths.sum()) - a.prompts * a.prompt_len
    return Work(
        refilled,
        tokens,
        forward_flops(model.config, lengths.tolist(), targets=tokens),
        pieces=pieces,
    )


SUITES = {
    "sft": sft,
    "sft_epoch": sft_epoch,
    "reward": reward,
    "decode": decode,
    "ppo": ppo,
    "slots": slots,
}


# ---------------------------------------------------------------------------------------- measuring


def _timed(step: Callable[[int], Any], numbers: Sequence[int]) -> list[float]:
    seconds = []
    for i in numbers:
        begun = time.perf_counter()
        jax.block_until_ready(step(i))
        seconds.append(time.perf_counter() - begun)
    return seconds


def _in_turn(runs: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            times[name] += _timed(run, [i])
    return times


@functools.cache
def matrix_rate(dtype: str) -> float:
    """FLOP/s of a plain matrix product in this process."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    # Random numbers, because a matrix of ones would multiply faster than real data.
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / _seconds_each(lambda: product(x))


@functools.cache
def bandwidth() -> float:
    """Bytes/s at which weights can be read.

    The faster of two uses of a matrix larger than any cache: times a few rows, or doubled.
    """
    matrix = jax.random.normal(jax.random.key(0), (8192, 8192))
    rows = jnp.ones((8, 8192), jnp.float32)
    product, double = (
        jax.jit(lambda rows, matrix: rows @ matrix),
        jax.jit(lambda matrix: 2 * matrix),
    )
    read = matrix.nbytes / _seconds_each(lambda: product(rows, matrix))
    return max(read, 2 * matrix.nbytes / _seconds_each(lambda: double(matrix)))


def _seconds_each(run: Callable[[], Any], *, together: int = 5) -> float:
    """Seconds per call in the fastest of several rounds.

    Calls of a round are enqueued together, so that waiting for the device hardly counts.
    """

    def round_of_calls(_: int) -> Any:
        return [run() for _ in range(together)]

    return min(_timed(round_of_calls, range(6))) / together


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Runs one suite at one size; returns the seconds of its steps and derived figures."""
    work = SUITES[a.suite](a)
    first = _timed(work.step, [0])[0]  # includes compilation
    _timed(work.step, range(1, a.warmup))
    seconds = _timed(work.step, range(a.warmup, a.warmup + a.steps))
    middle = statistics.median(seconds)
    peak = memory.peak_memory_mb()  # before the probes below, which allocate large matrices
    rate = matrix_rate(a.dtype)
    found = {
        "library": "rlhf_jax", "suite": a.suite, "s_per_step_median": middle,
        "s_per_step_min": min(seconds), "s_per_step_max": max(seconds),
        "tokens_per_s": work.tokens / middle, "tokens_per_step": work.tokens,
        "compile_s": max(0.0, first - middle), "peak_rss_mb": peak, "flops_per_step": work.flops,
        "flops_per_s": work.flops / middle, "matrix_flops_per_s": rate,
        "share_of_matrix_rate": work.flops / middle / rate,
    }  # fmt: skip
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        found["peak_device_mb"] = stats["peak_bytes_in_use"] / 2**20
    if work.floor_s is not None:
        found["floor_s"] = work.floor_s()
        found["times_the_floor"] = middle / found["floor_s"]
    if work.pieces is not None:
        found |= work.pieces()
    found["device"], found["jax"] = jax.devices()[0].device_kind, jax.__version__
    return found | {name: getattr(a, name) for name in SIZES}


def show(found: dict[str, Any]) -> str:
    """The figures of one run as a small table."""
    rows = [
        ("step, median", f"{found['s_per_step_median'] * 1e3:.1f} ms"),
        (
            "step, fastest and slowest",
            " and ".join(f"{found[f's_per_step_{x}'] * 1e3:.1f}" for x in ("min", "max")) + " ms",
        ),
        ("tokens/s", f"{found['tokens_per_s']:,.0f}"),
        ("model GFLOP/s", f"{found['flops_per_s'] / 1e9:,.1f}"),
        ("matrix products, same process", f"{found['matrix_flops_per_s'] / 1e9:,.1f} GFLOP/s"),
        ("share of the matrix rate", f"{found['share_of_matrix_rate']:.1%}"),
        (
            "times the floor",
            f"{found['times_the_floor']:.2f}" if "times_the_floor" in found else None,
        ),
        *((name, f"{found[name] * 1e3:.1f} ms") for name in PIECES if name in found),
        *((name, f"{found[name]:.2f}") for name in RATIOS if name in found),
        ("compiling, first step", f"{found['compile_s']:.1f} s"),
        ("peak memory", f"{found.get('peak_device_mb', found['peak_rss_mb']):,.0f} MB"),
    ]
    shown = [(name, value) for name, value in rows if value]
    width = max(len(name) for name, _ in shown)
    return "\n".join(
        [f"{found['suite']} on {found['device']}", *(f"  {n:<{width}}  {v}" for n, v in shown)]
    )


PIECES = ("rollout_s", "score_s", "update_s", "static_s", "refilled_s", "refilled_streams_s")
RATIOS = ("static_over_refilled", "static_over_refilled_streams", "mean_response_tokens")


# ----------------------------------------------------------------------------- sweeps, peers, flags


def sweep(a: argparse.Namespace) -> list[dict[str, Any]]:
    """The suite at each value of one flag, in separate processes; prints relative costs."""
    name, _, values = a.sweep.partition("=")
    runs = [run_script(a, [f"--{name}={value}"]) for value in values.split(",")]
    first = runs[0]["s_per_step_median"]
    print(
        f"\n{a.suite} by {name}\n{name:>12}  ms/step  of the first  tokens/s  of matrix rate  peak "
        "MB"
    )
    for value, run in zip(values.split(","), runs, strict=True):
        step = run["s_per_step_median"]
        print(f"{value:>12}  {step * 1e3:7.1f}  {step / first:12.2f}  {run['tokens_per_s']:8,.0f}  "
              f"{run['share_of_matrix_rate']:14.1%}  {run['peak_rss_mb']:7,.0f}")  # fmt: skip
    return runs


def run_script(
    a: argparse.Namespace, extra: Sequence[str], command: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs a suite, ours or a peer's, in a process of its own and returns its JSON."""
    command = list(command or [sys.executable, "-m", "tools.benchmark"])
    names = (*SHARED, *OWN) if "tools.benchmark" in command else SHARED
    flags = [f"--{name}={getattr(a, name)}" for name in names if getattr(a, name) not in ("", None)]
    done = subprocess.run(
        [*command, a.suite, *flags, *extra, *(["--json"] if "tools.benchmark" in command else [])],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} {a.suite} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(a: argparse.Namespace) -> dict[str, Any]:
    """Runs ours and a peer's in turn on the same work; returns how many times as fast ours is."""
    python, script = peer_python(a), Path(__file__).parent / "peers" / f"with_{a.peer}.py"
    with tempfile.TemporaryDirectory() as folder:
        own = [f"--cache={folder}"]
        if a.suite == "sft_epoch":
            a.data = write_ids(read_ids(a), Path(folder) / "ids.jsonl")
        rounds = []
        for number in range(a.rounds):
            ours, theirs = (
                run_script(a, own),
                run_script(a, a.peer_flags.split(), [python, str(script)]),
            )
            rounds.append((ours, theirs))
            print(f"round {number + 1}: rlhf_jax {ours['s_per_step_median']:.4f} s, {a.peer} "
                  f"{theirs['s_per_step_median']:.4f} s, peak {ours['peak_rss_mb']:,.0f} and "
                  f"{theirs['peak_rss_mb']:,.0f} MB", flush=True)  # fmt: skip
    found = ratios(rounds) | {
        "peer": a.peer,
        "suite": a.suite,
        "compile_cold_s": rounds[0][0]["compile_s"],
    }
    found |= {"compile_warm_s": rounds[-1][0]["compile_s"]} if a.rounds > 1 else {}
    print(f"\n{a.suite}: {found['ratio_median']:.2f} times {a.peer} by medians "
        f"({found['ratio_min']:.2f} by fastest "
          f"steps); rounds {', '.join(f'{x:.2f}' for x in found['ratio_of_each_round'])}; peak "
          "memory "
          f"{found['memory_ratio']:.2f} of the peer's")  # fmt: skip
    return found | {"ours": rounds[-1][0], "theirs": rounds[-1][1]}


def ratios(rounds: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """A peer's time over ours: by medians over rounds, by fastest steps, and for each round."""

    def over(name: str, pick: Callable[[list[float]], float]) -> float:
        return pick([b[name] for _, b in rounds]) / pick([a[name] for a, _ in rounds])

    return {
        "ratio_median": over("s_per_step_median", statistics.median),
        "ratio_min": over("s_per_step_min", min),
        "ratio_of_each_round": [b["s_per_step_median"] / a["s_per_step_median"] for a, b in rounds],
        "memory_ratio": 1 / over("peak_rss_mb", max),
    }


def write_ids(documents: Sequence[Sequence[int]], path: Path) -> str:
    """Writes the same token ids for both sides."""
    write_lines(path, ({"input_ids": list(ids)} for ids in documents))
    return str(path)


def peer_python(a: argparse.Namespace) -> str:
    """The Python of the peer's environment, which is made in the user's cache folder when needed.

    ``--peer_python`` names another one.
    """
    if a.peer_python:
        return a.peer_python
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        / "rlhf_jax"
        / "peers"
        / a.peer
    )
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"Installing {', '.join(PEERS[a.peer])} in {folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEERS[a.peer]], check=True)
        (folder / "ready").touch()
    return str(python)


SIZES = {
    "layers": 4, "width": 256, "heads": 4, "vocab": 8192, "batch": 8, "prompt_len": 64,
    "new_tokens": 64, "k": 4, "epochs": 1, "minibatches": 1, "steps": 5, "warmup": 3,
    "dtype": "float32", "family": "gpt2", "kv_heads": 0, "mlp_width": 0, "seed": 0,
}  # fmt: skip
SHARED = (*SIZES, "data")
"""Flags that a peer's script also takes."""
OWN = ("remat", "unroll", "prompts", "model", "longest")
"""Flags of ours that a peer's script does not know."""

OWN_SIZES = {"reward": {"prompt_len": 96, "new_tokens": 32}}
"""Defaults of single suites that differ from `SIZES`."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags; a suite's own defaults fill in what is not given."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("suite", choices=SUITES)
    for name, value in SIZES.items():
        p.add_argument(f"--{name}", type=type(value), default=None, help=f"default {value}")
    p.add_argument("--remat", default="none", choices=("none", "block"))
    p.add_argument(
        "--unroll", type=int, default=0, help="blocks an iteration of the layer scan, 0 = all"
    )
    p.add_argument("--prompts", type=int, default=64, help="slots: how many prompts")
    p.add_argument("--data", default="", help="sft_epoch: demonstrations as JSON lines")
    p.add_argument("--model", default="smollm2", help="sft_epoch: whose tokenizer")
    p.add_argument("--longest", type=int, default=512, help="sft_epoch: longer texts are left out")
    p.add_argument(
        "--cache",
        default="",
        help="folder of compiled programs; empty: a new one, so that all is compiled",
    )
    p.add_argument(
        "--sweep", default="", metavar="FLAG=A,B,..", help="repeat over the values of a size"
    )
    p.add_argument("--peer", default="", choices=("", *PEERS))
    p.add_argument(
        "--peer_python",
        default="",
        help="Python of the peer's environment; empty: made when first needed",
    )
    p.add_argument(
        "--peer_flags", default="", help="more flags for the peer's script, in one string"
    )
    p.add_argument("--rounds", type=int, default=2, help="of ours and the peer's in turn")
    p.add_argument("--json", action="store_true", help="the last line is one JSON object")
    a = p.parse_args(argv)
    for name, value in (SIZES | OWN_SIZES.get(a.suite, {})).items():
        if getattr(a, name) is None:
            setattr(a, name, value)
    check(p, a)
    return a


def check(p: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    """Refuses flags that do not fit together, before anything runs."""
    if a.suite == "sft_epoch" and not Path(a.data).is_file():
        p.error(
            f"--data={a.data!r} is no file: pass demonstrations as JSON lines "
            "(experiments/prepare_data.py)"
        )
    if a.sweep and a.sweep.partition("=")[0] not in SIZES:
        p.error(
            f"--sweep={a.sweep!r} names no size: choose one of {', '.join(SIZES)}, as in "
            "--sweep=batch=1,2,4"
        )
    for name in (
        "layers", "width", "heads", "vocab", "batch", "prompt_len", "new_tokens", "k", "steps",
        "warmup",
    ):  # fmt: skip
        if getattr(a, name) < 1:
            p.error(f"--{name}={getattr(a, name)} must be at least 1")
    if a.width % a.heads:
        p.error(f"--heads={a.heads} must divide --width={a.width}")
    if a.batch % a.minibatches:
        p.error(f"--minibatches={a.minibatches} must divide --batch={a.batch}")
    if a.dtype not in ("float32", "bfloat16"):
        p.error(f"--dtype={a.dtype} is unknown: choose float32 or bfloat16")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the flags ask for."""
    a = parse(argv)
    if a.peer:
        found: Any = compare(a)
    elif a.sweep:
        found = sweep(a)
    else:
        with tempfile.TemporaryDirectory() as folder:
            jax.config.update("jax_compilation_cache_dir", a.cache or folder)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            devices.start((-1, 1, 1))
            found = measure(a)
        print(show(found), flush=True)
    if a.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
