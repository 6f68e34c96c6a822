# pyright: reportMissingImports=false
"""Times the training steps of TRL's trainers on random weights and tokens.

Run in an environment with torch, trl 1.12.0 (the last with a PPO trainer), transformers, accelerate
and datasets:

    python tools/peers/with_trl.py sft --batch 8 --prompt_len 64 --new_tokens 64

Claim: the seconds of one optimizer step (sft, reward), one epoch (sft_epoch) or one PPO iteration
(ppo). Work, with length = prompt_len + new_tokens:

* sft: ``SFTTrainer``, batch rows of length tokens, each a target.
* sft_epoch: ``SFTTrainer`` over the ragged rows of ``--data``, batch rows per step, in TRL's random
  order, padded by TRL's collator to a step's longest row, every real token a target. --steps and
  --warmup count epochs.
* reward: ``RewardTrainer``, batch prompts with k responses each. TRL only knows pairs, so a prompt
  becomes its k(k-1)/2 pairs of two rows each: batch k (k-1) rows are computed although only batch k
  differ. All are in one step.
* ppo: ``PPOTrainer``, four models of one size (policy, value, reward, reference). An iteration
  samples new_tokens for batch prompts, scores the rows, and takes epochs x minibatches optimizer
  steps. Temperature 1, no end token.

Settings: TRL's defaults (AdamW, fused; the loss in chunks; PPO's clipped losses, KL penalty and
GAE), except that nothing is logged or saved, gradients are not recomputed (TRL's default is that
they are), and PPO's two calls of ``gc.collect()`` per iteration are left out unless ``--gc``: each
of these makes TRL faster. The trainers' metrics of each step are still computed. SFTTrainer and
RewardTrainer clip gradients at norm 1; PPOTrainer, in this version, does not clip them. bfloat16
means autocast over float32 weights. The clock is read when the device is idle.
Source: https://github.com/huggingface/trl at v1.12.0, its public API and, for the parts of an
iteration, its loop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
import types
from typing import Any

# Offline and silent: a look-up would delay a run, and notices would mix with its report.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import timing

timing.require("torch", "trl", "transformers", "accelerate", "datasets")

import accelerate
import tokenizers
import torch
import transformers
import trl
import with_transformers as peer
from datasets import Dataset
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl.experimental.ppo import ppo_trainer as ppo_loop


def scalar_model(flags: argparse.Namespace, context: int) -> transformers.PreTrainedModel:
    """A model with one number per row, as reward or value model."""
    config = peer.model_config(flags, context, num_labels=1)
    model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    # The model reads a row's last token before the padding. An id outside the vocabulary occurs in
    # no row; it has no embedding, so it is set only after the model is built.
    model.config.pad_token_id = flags.vocab
    return model


def tokenizer(flags: argparse.Namespace, pad: int) -> transformers.PreTrainedTokenizerFast:
    """Words t0, t1, ..; the trainers only ask the tokenizer for the padding and end ids."""
    words = tokenizers.models.WordLevel(
        {f"t{i}": i for i in range(flags.vocab + 1)}, unk_token="t0"
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words),
        pad_token=f"t{pad}",
        eos_token="t0",
        padding_side="left",
    )


def settings(flags: argparse.Namespace, out: str, rows: int, **more: object) -> dict[str, object]:
    """Arguments of each trainer's config, for ``rows`` rows per step; only training is timed."""
    return {
        "output_dir": out, "seed": flags.seed, "per_device_train_batch_size": rows,
        "gradient_checkpointing": False, "bf16": flags.dtype == "bfloat16",
        "use_cpu": flags.device == "cpu", "logging_strategy": "no", "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": flags.device == "cuda",
        **more,
    }  # fmt: skip


def clock(
    flags: argparse.Namespace, event: str
) -> tuple[list[float], transformers.TrainerCallback]:
    """Time stamps of the training start and of each ``event``, and the callback that adds them."""
    stamps: list[float] = []

    def stamp(*_: object, **__: object) -> None:
        stamps.append(peer.now(flags))

    return stamps, type(
        "Clock", (transformers.TrainerCallback,), {"on_train_begin": stamp, event: stamp}
    )()


def optimizer_steps(trainer: Any) -> int:
    """The steps that AdamW counted: those really taken, whatever the trainer reports."""
    adam = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return int(max(state["step"] for state in adam.state.values()))


def train(trainer: transformers.Trainer, steps: int) -> None:
    """Trains; checks that AdamW took ``steps`` steps, clipping at 1 where the trainer clips."""
    timing.check(
        trainer.args.max_grad_norm == 1.0, f"gradients clipped at {trainer.args.max_grad_norm}"
    )
    trainer.train()
    taken = optimizer_steps(trainer)
    timing.check(taken == steps, f"{taken} optimizer steps instead of {steps}")


def report(
    flags: argparse.Namespace,
    seconds: list[float],
    tokens: tuple[int, str],
    model: torch.nn.Module,
    **more: Any,
) -> None:
    """Prints the report with the versions of TRL and its dependencies."""
    named = {"trl": trl, "torch": torch, "transformers": transformers, "accelerate": accelerate}
    versions = {name: module.__version__ for name, module in named.items()}
    more.update(peer.device_peak(flags))
    timing.report(
        flags, "trl", seconds, tokens, params=peer.count(model), versions=versions, **more
    )


def sft(flags: argparse.Namespace) -> None:
    """Optimizer steps on rows of one length."""
    total, length = flags.warmup + flags.steps, flags.prompt_len + flags.new_tokens
    rows = Dataset.from_dict(
        {"input_ids": peer.random_ids(flags, flags.batch * total, length).tolist()}
    )
    stamps, callback = clock(flags, "on_step_end")
    model = peer.causal_lm(flags, length)
    with tempfile.TemporaryDirectory() as out:
        config = trl.SFTConfig(
            **settings(flags, out, flags.batch, max_steps=total, max_length=length)
        )
        trainer = trl.SFTTrainer(
            model,
            config,
            train_dataset=rows,
            processing_class=tokenizer(flags, 0),
            callbacks=[callback],
        )
        shape = tuple(next(iter(trainer.get_train_dataloader()))["labels"].shape)
        timing.check(shape == (flags.batch, length), f"a batch of shape {shape}")
        train(trainer, total)
    tokens = (flags.batch * length, "trained: batch x (prompt_len + new_tokens)")
    report(flags, timing.laps(stamps, flags.warmup), tokens, model, loss_type=config.loss_type)


def sft_epoch(flags: argparse.Namespace) -> None:
    """Epochs over the rows of ``--data``."""
    with open(flags.data, encoding="utf-8") as file:
        rows = [json.loads(line)["input_ids"] for line in file if line.strip()]
    longest, real, total = max(map(len, rows)), sum(map(len, rows)), flags.warmup + flags.steps
    timing.check(
        max(map(max, rows)) < flags.vocab, f"{flags.data} has ids beyond --vocab {flags.vocab}"
    )
    stamps, callback = clock(flags, "on_epoch_end")
    model, padded = peer.causal_lm(flags, longest), []
    with tempfile.TemporaryDirectory() as out:
        config = trl.SFTConfig(
            **settings(
                flags, out, flags.batch, num_train_epochs=total, max_length=longest, packing=False
            )
        )
        trainer = trl.SFTTrainer(
            # The collator masks padding by the rows' lengths, so any id with an embedding will do
            # as the padding id.
            model, config, train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer(flags, 0), callbacks=[callback],
        )  # fmt: skip
        for batch in trainer.get_train_dataloader():
            padded.append((batch["labels"].numel(), int((batch["labels"] >= 0).sum())))
        targets = sum(kept for _, kept in padded)
        timing.check(
            targets == real, f"{targets} targets in an epoch, {real} tokens in {flags.data}"
        )
        train(trainer, total * math.ceil(len(rows) / flags.batch))
    report(
        flags, timing.laps(stamps, flags.warmup),
        (real, "real tokens of the epoch, padding left out"), model,
        rows=len(rows), longest_row=longest, optimizer_steps_per_epoch=len(padded),
        padded_tokens_of_one_epoch=sum(size for size, _ in padded), loss_type=config.loss_type,
    )  # fmt: skip


def pairs(flags: argparse.Namespace, prompts: int) -> Dataset:
    """Every pair of the k responses to each of ``prompts`` prompts, one prompt's pairs together."""
    chosen, rejected = [], []
    for _ in range(prompts):
        prompt = peer.random_ids(flags, 1, flags.prompt_len).expand(flags.k, -1)
        responses = torch.cat(
            [prompt, peer.random_ids(flags, flags.k, flags.new_tokens)], dim=1
        ).tolist()
        for better, worse in itertools.combinations(responses, 2):
            chosen.append(better)
            rejected.append(worse)
    return Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected})


def reward(flags: argparse.Namespace) -> None:
    """Optimizer steps on all pairs of the responses to batch prompts."""
    total, length = flags.warmup + flags.steps, flags.prompt_len + flags.new_tokens
    count, responses = flags.batch * math.comb(flags.k, 2), flags.batch * flags.k
    stamps, callback = clock(flags, "on_step_end")
    model = scalar_model(flags, length)
    with tempfile.TemporaryDirectory() as out:
        # Sequential, because random order would mix pairs of different prompts in a step.
        order = {"max_steps": total, "max_length": length, "train_sampling_strategy": "sequential"}
        trainer = trl.RewardTrainer(
            model, trl.RewardConfig(**settings(flags, out, count, **order)), callbacks=[callback],
            train_dataset=pairs(flags, flags.batch * total),
            processing_class=tokenizer(flags, flags.vocab),
        )  # fmt: skip
        ids = next(iter(trainer.get_train_dataloader()))["input_ids"]
        timing.check(
            tuple(ids.shape) == (2 * count, length), f"a batch of shape {tuple(ids.shape)}"
        )
        distinct = len(ids.unique(dim=0))
        timing.check(
            distinct == responses,
            f"{distinct} different rows in a step instead of batch x k = {responses}",
        )
        train(trainer, total)
    seconds = timing.laps(stamps, flags.warmup)
    report(
        flags, seconds,
        (responses * length, "different rows: batch x k x (prompt_len + new_tokens)"), model,
        pairs_per_step=count, computed_tokens_per_step=2 * count * length,
        computed_tokens_per_s=round(2 * count * length / statistics.median(seconds), 1),
    )  # fmt: skip


def watch(flags: argparse.Namespace) -> tuple[dict[str, list[float]], list[torch.Tensor]]:
    """Stamps the parts of an iteration in the two functions of TRL's loop that bound them.

    It also keeps the sampled rows.
    """
    stamps: dict[str, list[float]] = {"rollout": [], "rolled_out": [], "update": []}
    kept: list[torch.Tensor] = []
    sample, forward = ppo_loop.batch_generation, ppo_loop.forward

    def sampled(*args: object, **named: object) -> tuple[torch.Tensor, torch.Tensor]:
        stamps["rollout"].append(peer.now(flags))
        rows, logits = sample(*args, **named)
        stamps["rolled_out"].append(peer.now(flags))
        kept.append(rows)
        return rows, logits

    def forwarded(*args: object, **named: object) -> object:
        # The reference model's call has no gradients; the first call that has them starts the
        # optimizer's part.
        if torch.is_grad_enabled() and len(stamps["update"]) < len(stamps["rolled_out"]):
            stamps["update"].append(peer.now(flags))
        return forward(*args, **named)

    ppo_loop.batch_generation, ppo_loop.forward = sampled, forwarded
    if not flags.gc:
        ppo_loop.gc = types.SimpleNamespace(collect=lambda: 0)
    return stamps, kept


def ppo_trainer(
    flags: argparse.Namespace, out: str, total: int, callback: transformers.TrainerCallback
) -> PPOTrainer:
    """TRL's trainer over four models of one size, the reference a copy of the policy."""
    length = flags.prompt_len + flags.new_tokens
    policy, reference = peer.causal_lm(flags, length), peer.causal_lm(flags, length)
    reference.load_state_dict(policy.state_dict())
    prompts = Dataset.from_dict(
        {"input_ids": peer.random_ids(flags, flags.batch * total, flags.prompt_len).tolist()}
    )
    # The "batch per device" is the whole rollout: if TRL divided it, it would accumulate gradients
    # over the parts, whatever the number of minibatches.
    config = PPOConfig(
        **settings(
            flags, out, flags.batch, total_episodes=flags.batch * total,
            num_ppo_epochs=flags.epochs,
        ),
        num_mini_batches=flags.minibatches, local_rollout_forward_batch_size=flags.batch,
        temperature=1.0, response_length=flags.new_tokens, stop_token=None,
        missing_eos_penalty=None, num_sample_generations=0,
    )  # fmt: skip
    trainer = PPOTrainer(
        config, tokenizer(flags, flags.vocab), policy, reference,
        reward_model=scalar_model(flags, length), value_model=scalar_model(flags, length),
        train_dataset=prompts, eval_dataset=prompts.select(range(flags.batch)),
        callbacks=[callback],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def ppo(flags: argparse.Namespace) -> None:
    """PPO iterations, and the means of their parts."""
    if flags.dtype == "bfloat16":
        # The trainer creates an Accelerator that ignores bf16=True; without this variable it would
        # train in float32.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    total, length = flags.warmup + flags.steps, flags.prompt_len + flags.new_tokens
    (parts, rollouts), (ends, callback) = watch(flags), clock(flags, "on_step_end")
    with tempfile.TemporaryDirectory() as out:
        trainer = ppo_trainer(flags, out, total, callback)
        train(trainer, total * flags.epochs * flags.minibatches)
    check_ppo(flags, trainer, rollouts)
    report(
        flags, timing.laps(ends, flags.warmup),
        (flags.batch * length, "batch x (prompt_len + new_tokens)"),
        trainer.policy_model, **means(flags, parts, ends), first_ratio=first_ratio(trainer),
        optimizer_steps_per_iteration=flags.epochs * flags.minibatches,
        mixed_precision=trainer.accelerator.mixed_precision,
    )  # fmt: skip


def first_ratio(trainer: PPOTrainer) -> float:
    """The first iteration's mean probability ratio; near 1 if updates and sampler agree."""
    return round(trainer.state.log_history[0]["val/ratio"], 6)


def check_ppo(flags: argparse.Namespace, trainer: PPOTrainer, rollouts: list[torch.Tensor]) -> None:
    """Checks rows of full length, the precision, and updates that agree with the sampler."""
    whole = (flags.batch, flags.prompt_len + flags.new_tokens)
    timing.check(len(rollouts) == flags.warmup + flags.steps, f"{len(rollouts)} rollouts")
    for rows in rollouts:
        full = tuple(rows.shape) == whole and int(rows.max()) < flags.vocab
        timing.check(
            full, f"rows of shape {tuple(rows.shape)} instead of {whole}, or padding among them"
        )
    precision = trainer.accelerator.mixed_precision
    timing.check(
        precision == {"float32": "no", "bfloat16": "bf16"}[flags.dtype],
        f"mixed precision is {precision}",
    )
    near = abs(first_ratio(trainer) - 1) < 0.05
    timing.check(
        near, f"the first iteration's mean probability ratio is {first_ratio(trainer)}, not near 1"
    )


def means(
    flags: argparse.Namespace, parts: dict[str, list[float]], ends: list[float]
) -> dict[str, float]:
    """Mean seconds of sampling, of scoring, and of the updates with TRL's metrics.

    Scoring ends at the first update.
    """
    bounds = zip(parts["rollout"], parts["rolled_out"], parts["update"], ends[1:], strict=True)
    iterations = [timing.laps(stamps) for stamps in bounds][flags.warmup :]
    rollout, score, update = (
        round(statistics.fmean(part), 6) for part in zip(*iterations, strict=True)
    )
    return {"rollout_s": rollout, "score_s": score, "update_s": update}


def main() -> None:
    """Reads the flags and runs the suite."""
    suites = {"sft": sft, "sft_epoch": sft_epoch, "reward": reward, "ppo": ppo}
    parser = timing.parser(__doc__ or "", tuple(suites))
    parser.add_argument(
        "--gc", action="store_true", help="keep the two gc.collect() calls of TRL's PPO iteration"
    )
    flags = timing.parse(parser)
    if flags.suite == "sft_epoch" and not flags.data:
        parser.error("sft_epoch needs --data")
    if flags.suite == "reward" and flags.k < 2:
        parser.error("reward needs --k of 2 or more")
    peer.start(flags)
    suites[flags.suite](flags)


if __name__ == "__main__":
    main()
