"""The suites of ``tools/benchmark.py``: a step of each part of the recipe, and its FLOPs."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
from rlhf_jax.run import compiling, networks, responses
from rlhf_jax.sampling.generate import Sampling, generate, lower_generate
from rlhf_jax.sampling.refill import Rows, generate_many
from rlhf_jax.steps import compile_step, make_ppo_step, make_reward_step, make_sft_step, train_state
from rlhf_jax.types import KLState, LMBatch, Model, PPOState, PromptBatch, Samples
from tools.rates import bandwidth, in_turn, matrix_rate, timed


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
    # The projections of queries and outputs have one size, those of keys and values another.
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
    # All ones: a single segment fills each row.
    whole = np.ones((a.batch, length), np.int32)
    # The first token of a row has no predecessor, so it is no target.
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
    # As many rows as hold the tokens of `--batch` texts on average.
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
    # Two batches in turn suffice, since the time does not depend on the ids.
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
    # A response sees the whole prompt and its own tokens so far, but no other response.
    own = a.new_tokens * (a.new_tokens + 1) / 2
    return a.prompt_len * (a.prompt_len + 1) / 2 + a.k * (a.new_tokens * a.prompt_len + own)


def _trained(
    a: argparse.Namespace, model: Model, make_step: Any, batch: Callable[[int], Any]
) -> Callable[[int], Any]:
    """A training step that carries its state from call to call."""
    tx = optim.adam(1e-5, weight_decay=0.01, clip_norm=1.0)
    step_fn = compile_step(make_step(model, tx))
    # In a list, so that the step can replace the state that it has used up.
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
        # The prefill gives the first token, so one decode step less is needed.
        return prefill / matrix_rate(a.dtype) + (a.new_tokens - 1) * decode_floor(a, params, config)

    run = partial(generate, model, params, sampling=Sampling(max_new_tokens=a.new_tokens))
    return Work(
        lambda i: run(prompts_of(a, i), jax.random.key(i)), a.batch * a.new_tokens, flops, floor
    )


def decode_floor(a: argparse.Namespace, params: Any, config: DecoderConfig) -> float:
    """The least seconds of a decode step: the longer of memory traffic and matrix products.

    Memory traffic is one read of the weights and the cache; products run at the matrix rate.
    """
    # Averaged over the decode steps, half of the response is in the cache.
    middle = a.prompt_len + a.new_tokens / 2
    # Twice, for keys and values.
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
            name: statistics.median(timed(lambda i, f=f: f(), range(a.steps)))
            for name, f in parts.items()
        }

    return Work(step, a.batch * length, _ppo_flops(a, config), pieces=pieces)


def _ppo_flops(a: argparse.Namespace, config: DecoderConfig) -> float:
    lengths = [a.prompt_len + a.new_tokens] * a.batch
    language = forward_flops(config, lengths, targets=a.batch * a.new_tokens)
    scalar = forward_flops(config, lengths, targets=0)
    # Sampling and reference, value and reward; then three passes for each training step of both.
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
        found = {name: statistics.median(times) for name, times in in_turn(runs, a.steps).items()}
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
