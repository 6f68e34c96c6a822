# pyright: reportMissingImports=false
"""Times tunix, Google's library for post-training in JAX: training steps and the sampler.

Run in an environment with google-tunix 0.1.7, which needs Python 3.11 or later:

    python tools/peers/with_tunix.py sft --batch 8 --prompt_len 64 --new_tokens 64

Claim: the seconds of one optimizer step (sft), one call of the sampler (decode) or one PPO
iteration (ppo), on random weights. **The architecture differs for --family gpt2**: tunix has no
GPT-2. Its Llama module is used instead, of the same width, depth, heads and vocabulary, with a
SwiGLU of 2/3 of the MLP's width, rounded to a multiple of 64: three matrices of that width do the
work of GPT-2's two. With --family llama the model is the one that the flags name. Work, with
length = prompt_len + new_tokens:

* sft: ``PeftTrainer``, full weights, batch rows of length tokens, each a target, gradients clipped
  at norm 1, AdamW. The loss is tunix's own, with one-hot targets; ``--sparse_loss`` replaces it by
  one without them.
* decode: ``Sampler``, batch prompts, new_tokens sampled at temperature 1 without top-k or top-p,
  prefill included.
* ppo: ``PPOLearner``, vanilla rollout: sampling, old and reference log-probabilities, values,
  rewards, then epochs optimizer steps on the whole batch for policy and value model each. The
  reward is a Python function of the text or, with ``--reward_model``, a fourth model. tunix samples
  again for each minibatch, so only one minibatch is the same work.

No end token exists, and each row's full length is checked. Prompts and responses are text in
tunix's interface; here the words are numbers, and parsing them is timed too. bfloat16 means
bfloat16 weights and optimizer states. The clock is read when the device is idle; compile_s is the
first step minus the median of the timed ones.
Source: https://github.com/google/tunix, its public API; its MLP's weights start at 0 and are drawn
anew here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
import time
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import timing

timing.require("jax", "flax", "optax", "tunix")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate import sampler as sampler_lib
from tunix.models.llama3 import model as llama_lib
from tunix.rl import rl_cluster
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout
from tunix.sft import peft_trainer
from tunix.sft import utils as sft_utils

NEVER = 10**9
"""An interval of steps that no run here reaches."""


class Scorer(nnx.Module):
    """A Llama trunk with one number per token, as tunix expects of value and reward models."""

    def __init__(self, trunk: llama_lib.Llama3, width: int, dtype: jnp.dtype) -> None:
        self.trunk = trunk
        self.head = nnx.Linear(width, 1, use_bias=False, param_dtype=dtype, rngs=nnx.Rngs(0))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: None,
        attention_mask: jax.Array,
        **_: Any,
    ) -> jax.Array:
        """Scores of shape (batch, length, 1)."""
        hidden = self.trunk.embedder.encode(tokens)
        for block in self.trunk.layers:
            _, hidden = block(hidden, positions, cache, attention_mask)
        return self.head(self.trunk.final_norm(hidden))


def start(flags: argparse.Namespace) -> None:
    """Sets device and threads; XLA counts the available cores when its first computation starts."""
    jax.config.update("jax_platforms", flags.device)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])
    if flags.family == "gpt2":
        flags.mlp_width = max(1, round(flags.mlp_width * 2 / 3 / 64)) * 64


def llama(flags: argparse.Namespace, seed: int) -> llama_lib.Llama3:
    """The Llama of tunix, tied head; matrices from N(0, 0.02), since its MLP starts at 0."""
    config = llama_lib.ModelConfig(
        num_layers=flags.layers, vocab_size=flags.vocab, embed_dim=flags.width,
        hidden_dim=flags.mlp_width, num_heads=flags.heads, num_kv_heads=flags.kv_heads,
        head_dim=flags.width // flags.heads, rope_theta=10_000, norm_eps=1e-6, weight_tying=True,
    )  # fmt: skip
    model, random = llama_lib.Llama3(config, rngs=nnx.Rngs(seed)), np.random.default_rng(seed)

    def draw(weight: jax.Array) -> jax.Array:
        return jnp.asarray(
            random.normal(0, 0.02, weight.shape) if weight.ndim > 1 else weight, flags.dtype
        )

    nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.Param)))
    return model


def scorer(flags: argparse.Namespace, seed: int) -> Scorer:
    """A value or reward model of the size that the flags give."""
    return Scorer(llama(flags, seed), flags.width, jnp.dtype(flags.dtype))


def tokenizer(flags: argparse.Namespace) -> types.SimpleNamespace:
    """Words are numbers; padding and end ids are outside the vocabulary, so no token has them."""
    return types.SimpleNamespace(
        encode=lambda text, **_: [int(word) for word in text.split()],
        decode=lambda ids, **_: " ".join(map(str, ids)),
        bos_id=lambda: None,
        eos_id=lambda: flags.vocab + 1,
        pad_id=lambda: flags.vocab,
    )


def prompts(flags: argparse.Namespace, seed: int) -> list[str]:
    """Batch prompts of random tokens as text."""
    ids = np.random.default_rng(seed).integers(flags.vocab, size=(flags.batch, flags.prompt_len))
    return [" ".join(map(str, row)) for row in ids]


def now(*models: nnx.Module) -> float:
    """The clock, read when the weights of ``models`` have been computed."""
    jax.block_until_ready([nnx.state(model) for model in models])
    return time.perf_counter()


def paced(batches: Iterable[Any], stamps: list[float], *models: nnx.Module) -> Iterator[Any]:
    """``batches``, with a time stamp when each is requested and one when there are no more."""
    for batch in batches:
        stamps.append(now(*models))
        yield batch
    stamps.append(now(*models))


def check_lengths(flags: argparse.Namespace, rows: list[np.ndarray]) -> None:
    """Checks that each response has its full length."""
    lengths = sorted({len(row) for row in rows})
    full = len(rows) == flags.batch and lengths == [flags.new_tokens]
    timing.check(
        full,
        f"{len(rows)} responses of lengths {lengths} instead of {flags.batch} of "
        f"{flags.new_tokens}",
    )


def report(
    flags: argparse.Namespace,
    seconds: list[float],
    tokens: tuple[int, str],
    model: nnx.Module,
    **more: Any,
) -> None:
    """Prints the report; ``seconds`` start with the first untimed step, which compiled."""
    timed = seconds[flags.warmup :]
    versions = {
        name: importlib.metadata.version(name)
        for name in ("google-tunix", "jax", "jaxlib", "flax", "optax")
    }
    params = sum(weight.size for weight in jax.tree.leaves(nnx.state(model, nnx.Param)))
    if flags.device == "cuda":
        more["peak_device_mb"] = round(
            jax.devices()[0].memory_stats()["peak_bytes_in_use"] / (1 << 20), 1
        )
    timing.report(
        flags, "tunix", timed, tokens, params=params, versions=versions,
        compile_s=seconds[0] - statistics.median(timed), architecture="llama, tied head, SwiGLU of "
            "mlp_width", **more,
    )  # fmt: skip


def model_input(batch: peft_trainer.TrainingInput) -> dict[str, jax.Array]:
    """The arguments of tunix's loss: tokens, targets, positions and a causal mask, unpadded."""
    present = jnp.ones(batch.input_tokens.shape, bool)
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": sft_utils.build_positions_from_mask(present),
        "attention_mask": sft_utils.make_causal_attn_mask(present),
    }


def sparse_loss(
    model: llama_lib.Llama3,
    input_tokens: jax.Array,
    input_mask: jax.Array,
    positions: jax.Array,
    attention_mask: jax.Array,
) -> jax.Array:
    """The loss of tunix with integer targets, without one-hot arrays of the logits' size."""
    logits, _ = model(input_tokens, positions, None, attention_mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1].astype(jnp.float32), input_tokens[:, 1:], where=input_mask[:, 1:] > 0
    )
    return losses.sum() / input_mask[:, 1:].sum()


def sft(flags: argparse.Namespace) -> None:
    """Optimizer steps on rows of one length."""
    total, length = flags.warmup + flags.steps, flags.prompt_len + flags.new_tokens
    model, stamps = llama(flags, flags.seed), []
    trainer = peft_trainer.PeftTrainer(
        model,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5)),
        peft_trainer.TrainingConfig(eval_every_n_steps=NEVER),
    ).with_gen_model_input_fn(model_input)
    if flags.sparse_loss:
        trainer.with_loss_fn(sparse_loss)
    ids = np.random.default_rng(flags.seed).integers(
        flags.vocab, size=(total, flags.batch, length), dtype=np.int32
    )
    batches = [
        peft_trainer.TrainingInput(input_tokens=rows, input_mask=np.ones_like(rows)) for rows in ids
    ]
    trainer.train(paced(batches, stamps, model))
    timing.check(
        trainer.train_steps == total, f"{trainer.train_steps} optimizer steps instead of {total}"
    )
    unit = "trained: batch x (prompt_len + new_tokens)"
    report(flags, timing.laps(stamps), (flags.batch * length, unit), model)


def decode(flags: argparse.Namespace) -> None:
    """Times the sampler call by call, new prompts for each."""
    model, seconds = llama(flags, flags.seed), []
    cache = sampler_lib.CacheConfig(
        cache_size=flags.prompt_len + flags.new_tokens, num_layers=flags.layers,
        num_kv_heads=flags.kv_heads, head_dim=flags.width // flags.heads,
    )  # fmt: skip
    sampler = sampler_lib.Sampler(model, tokenizer(flags), cache)
    for call in range(flags.warmup + flags.steps):
        texts, begun = prompts(flags, flags.seed + call), now(model)
        # Without top_p, tunix's sampler is greedy; top_p=1 samples from the whole distribution.
        rows = sampler(
            texts, max_generation_steps=flags.new_tokens, max_prompt_length=flags.prompt_len,
            temperature=1.0, top_p=1.0, seed=flags.seed + call,
        ).tokens  # fmt: skip
        seconds.append(now(model) - begun)
        check_lengths(flags, rows)
    report(flags, seconds, (flags.batch * flags.new_tokens, "sampled: batch x new_tokens"), model)


def cluster_config(
    flags: argparse.Namespace, roles: list[rl_cluster.Role], steps: int
) -> rl_cluster.ClusterConfig:
    """Places all models on one device and selects tunix's own sampler."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(1e-5), critic_optimizer=optax.adamw(1e-5),
        eval_every_n_steps=NEVER,
        # One more than will be taken, so that the learner requests another batch; the request
        # stamps the last iteration's end.
        max_steps=steps + 1,
    )  # fmt: skip
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=flags.new_tokens, max_prompt_length=flags.prompt_len,
        temperature=1.0, top_p=1.0, kv_cache_size=flags.prompt_len + flags.new_tokens,
    )  # fmt: skip
    return rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(roles, mesh), rollout_engine="vanilla", training_config=training,
        rollout_config=rollout,
    )  # fmt: skip


def ppo_cluster(flags: argparse.Namespace, steps: int) -> rl_cluster.RLCluster:
    """Policy, reference and value model, and a reward model if the flags ask for one."""
    role = rl_cluster.Role
    roles = [
        role.ACTOR,
        role.ROLLOUT,
        role.REFERENCE,
        role.CRITIC,
        *[role.REWARD] * flags.reward_model,
    ]
    return rl_cluster.RLCluster(
        actor=llama(flags, flags.seed), reference=llama(flags, flags.seed),
        critic=scorer(flags, flags.seed + 1),
        reward=scorer(flags, flags.seed + 2) if flags.reward_model else None,
        tokenizer=tokenizer(flags), cluster_config=cluster_config(flags, roles, steps),
    )  # fmt: skip


def sevens(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward that costs next to nothing: the number of sevens in a response."""
    return [float(text.count("7")) for text in completions]


def watched(generate: Callable, seconds: list[float], kept: list[list[np.ndarray]]) -> Callable:
    """``generate`` that records the seconds of each call and keeps the responses.

    It returns when the responses are on the host.
    """

    def call(*args: Any, **named: Any) -> base_rollout.RolloutOutput:
        begun = time.perf_counter()
        output = generate(*args, **named)
        seconds.append(time.perf_counter() - begun)
        kept.append(output.tokens)
        return output

    return call


def ppo(flags: argparse.Namespace) -> None:
    """PPO iterations, each from one batch of prompts to the next."""
    total, length = flags.warmup + flags.steps, flags.prompt_len + flags.new_tokens
    cluster, rollouts, kept = ppo_cluster(flags, total * flags.epochs), [], []
    cluster.generate = watched(cluster.generate, rollouts, kept)
    config = ppo_learner.PPOConfig(num_iterations=flags.epochs)
    learner = ppo_learner.PPOLearner(cluster, config, None if flags.reward_model else [sevens])
    batches = [{"prompts": np.array(prompts(flags, flags.seed + step))} for step in range(total)]
    trainers, stamps = (cluster.actor_trainer, cluster.critic_trainer), []
    learner.train(paced(batches, stamps, *(trainer.model for trainer in trainers)))
    for trainer in trainers:
        taken = trainer.train_steps
        timing.check(
            taken == total * flags.epochs,
            f"{taken} optimizer steps instead of {total * flags.epochs}",
        )
    timing.check(len(kept) == total, f"{len(kept)} rollouts instead of {total}")
    for rows in kept:
        check_lengths(flags, rows)
    report(
        flags, timing.laps(stamps), (flags.batch * length, "batch x (prompt_len + " "new_tokens)"),
        trainers[0].model, rollout_s=round(statistics.fmean(rollouts[flags.warmup :]), 6),
        optimizer_steps_per_iteration=flags.epochs,
    )  # fmt: skip


def main() -> None:
    """Reads the flags and runs the suite."""
    suites = {"sft": sft, "decode": decode, "ppo": ppo}
    parser = timing.parser(__doc__ or "", tuple(suites))
    parser.add_argument(
        "--sparse_loss", action="store_true", help="sft: integer targets instead of one-hot ones"
    )
    parser.add_argument(
        "--reward_model", action="store_true", help="ppo: a network scores, not a Python function"
    )
    flags = timing.parse(parser)
    if flags.minibatches > 1:
        parser.error(
            "tunix samples again for each minibatch: with --minibatches above 1 it is other work"
        )
    start(flags)
    suites[flags.suite](flags)


if __name__ == "__main__":
    main()
