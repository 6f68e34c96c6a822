r"""Compares models on test prompts: win rates against SFT, gold scores, alignment tax, samples.

Run:

    python experiments/evaluate.py --config=configs/evaluate/storyland.py --workdir=runs/evaluate \
        --config.models.sft=runs/sft/epoch-3 --config.models.ppo=runs/ppo/ema \
        --config.reward_model=runs/reward_model/model

Writes ``evaluation.json`` and ``samples.jsonl``. Without a gold scorer (`config.gold` empty) the
reward model judges.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax import scoring
from rlhf_jax.data import chat, schema, text
from rlhf_jax.evaluation.alignment_tax import lm_loss
from rlhf_jax.evaluation.answers import BASELINE, Answers, compare
from rlhf_jax.rewards import functions
from rlhf_jax.run import answering, cli, contexts, datasets, devices, inputs, networks, responses
from rlhf_jax.run.asking import Ask, bare_prompts, few_shot_asks
from rlhf_jax.run.console import patiently
from rlhf_jax.run.files import write_json
from rlhf_jax.run.metrics import StageLog
from rlhf_jax.types import LMBatch, Model, Params, Samples


@dataclasses.dataclass(frozen=True)
class SampleLine:
    """One line of ``samples.jsonl``."""

    id: str | None
    model: str
    prompt: str
    response: str
    gold_score: float | None
    reward_score: float


def run(config: ConfigDict, workdir: str) -> dict:
    """Samples from every model and judges; returns the contents of ``evaluation.json``."""
    check(config)
    mesh = devices.start(config.mesh)
    prompts = datasets.read_prompts(
        config.prompts, config.limit, tokenizer=networks.tokenizer_of(config.reward_model)
    )
    check_contexts(prompts, config)
    reward = networks.load_network(config.reward_model, mesh, config.decoder)
    judge = functions.judge(config.gold) if config.gold else None
    paths = {name: path for name, path in config.models.items() if path}
    results: dict[str, Any] = {
        "prompts": len(prompts), "temperature": config.temperature, "sample_seed": config.seed,
    }  # fmt: skip
    answers: dict[str, Answers] = {}
    held_out: dict[str, list[LMBatch]] = {}
    # The baseline and the base models may be sampled more often than the models compared with them.
    counts = {
        BASELINE: config.baseline_samples,
        "base": config.base_samples,
        "prompted_base": config.base_samples,
    }
    # The base model is sampled a second time, with worked examples before each prompt.
    jobs = list(paths) + (
        ["prompted_base"] if "base" in paths and config.few_shot.demonstrations else []
    )
    shown = ("gold_score", "reward_score", "tokens")
    with StageLog(
        workdir, "evaluate", total=len(jobs), show=shown, unit="models", waited=True
    ) as log:
        # One model after the other, so that memory holds only one beside the reward model.
        for done, name in enumerate(jobs, start=1):
            prompted = name == "prompted_base"
            network = networks.load_network(
                paths["base" if prompted else name], mesh, config.decoder
            )
            count = counts.get(name, config.samples)
            ask = (
                answering.few_shot_prompts(network, reward, judge, prompts, config, mesh)
                if prompted
                else bare_prompts
            )
            network = network._replace(name=name)
            answers[name] = answering.answer(
                network, reward, judge, prompts, ask, count, config, mesh
            )
            if config.held_out_text and not prompted:
                kind = text.tokenizer_fingerprint(network.tokenizer)
                context = contexts.of_network(network, networks.model_folder(paths[name]))
                # Tokenized once per tokenizer: most of the compared models share one.
                held_out[kind] = held_out.get(kind) or held_out_batches(
                    network.tokenizer, config, mesh, context=context
                )  # fmt: skip
                with patiently(f"{name}: loss on held-out text"):
                    loss = lm_loss(network.model, network.params, held_out[kind])
                results.setdefault("pretraining_loss", {})[name] = loss
            if name in config.kl_of and config.reference:
                with patiently(f"{name}: KL to the reference"):
                    results.setdefault("kl", {})[name] = kl_to_reference(
                        network, answers[name], config, mesh
                    )
                # Greedy samples are compared at temperature 1, which the results say.
                if not config.temperature:
                    results["kl_temperature"] = kl_temperature(config)
            if answers[name].scored_in_part:
                results.setdefault("scored_in_part", {})[name] = answers[name].scored_in_part
            log(done, answers[name].means())
            log.flush()  # reported when this model is done, not together with the next one
    results |= compare(answers, [str(p.prompt) for p in prompts])
    write_json(Path(workdir) / "evaluation.json", results)
    write_samples(Path(workdir) / "samples.jsonl", prompts, answers)
    return results


def check_contexts(prompts: Sequence[schema.Prompt], config: ConfigDict) -> None:
    """Refuses prompts and rows longer than the context of any model, before the first is loaded.

    Raises:
      ValueError: a prompt followed by `max_new_tokens` exceeds the context of a model that answers,
        of the reward model or of the KL reference; so does a few-shot prompt; or
        `held_out_row_length` does.
    """
    paths = {name: path for name, path in config.models.items() if path}
    asks: dict[str, list[Ask]] = {
        path: [bare_prompts] for path in (*paths.values(), config.reward_model)
    }
    if config.reference:
        asks.setdefault(config.reference, [bare_prompts])
    if "base" in paths and config.few_shot.demonstrations:
        asks[paths["base"]] = [bare_prompts, *few_shot_asks(config)]
    for path, each in asks.items():
        known = contexts.before_loading(networks.model_folder(path))
        if known is None:
            continue
        context, tokenizer = known
        # Only its tokenizer is read; the model is not loaded yet.
        unloaded = networks.Network(None, {}, tokenizer)  # pyright: ignore[reportArgumentType]
        for ask in each:
            what = (
                config.prompts
                if ask is bare_prompts
                else f"{config.prompts} after few_shot.examples"
            )
            name = contexts.prompt_of(what, [p.prompt for p in prompts])
            contexts.check(
                context, [len(ids) for ids in ask(unloaded, prompts)[0]], name,
                new=config.max_new_tokens,
            )  # fmt: skip
        # A row no longer than the context cannot hold a piece that exceeds it.
        if (
            config.held_out_text
            and path in paths.values()
            and config.held_out_row_length > context.length
        ):
            read_held_out(tokenizer, config, context=context)


def check(config: ConfigDict) -> None:
    """Refuses what cannot be compared or judged, before anything is loaded, sampled or written."""
    inputs.check_settings(config)
    if not config.models.get(BASELINE):
        raise ValueError(
            f"models.{BASELINE} is empty: win rates are against it, "
            f"pass its folder with --config.models.{BASELINE}=FOLDER"
        )
    for name, path in config.models.items():
        if path:
            inputs.check_model(f"models.{name}", path)
    inputs.check_model("reward_model", config.reward_model, inputs.REWARD)
    if config.reference:
        inputs.check_model("reference", config.reference)
    inputs.check_file("prompts", config.prompts)
    inputs.check_file("held_out_text", config.held_out_text, required=False)
    inputs.check_file("few_shot.demonstrations", config.few_shot.demonstrations, required=False)
    if config.gold:
        functions.judge(config.gold)
        prompts = datasets.read_prompts(config.prompts, config.limit)
        inputs.check_gold("gold", config.gold, prompts, config.prompts)


# ---------------------------------------------------------------------------------------- measuring


def held_out_batches(
    tokenizer: Any, config: ConfigDict, mesh: jax.sharding.Mesh, *,
    context: contexts.Context | None = None,
) -> list[LMBatch]:  # fmt: skip
    """Held-out pretraining text: the rise of its loss, in nats per token, is the alignment tax."""
    rows = read_held_out(tokenizer, config, context=context)
    return datasets.held_out_batches(
        rows, mesh, batch_size=config.batch_size, seed=0, most=config.held_out_batches
    )


def read_held_out(
    tokenizer: Any, config: ConfigDict, *, context: contexts.Context | None
) -> LMBatch:
    """Packed rows of the held-out text, each document within the model's context."""
    length = config.held_out_row_length
    return datasets.lm_rows(
        tokenizer, config.held_out_text, length=length, context=context, key="held_out_row_length"
    )


def kl_to_reference(
    network: networks.Network, said: Answers, config: ConfigDict, mesh: jax.sharding.Mesh
) -> float:
    """``E[log pi(y|x) - log pi_ref(y|x)]`` over the model's own samples, nats per sequence.

    Both are the distributions at `kl_temperature`. Greedy samples are not drawn from a
    distribution: for them the number is the mean log-ratio of the most likely response, not an
    estimate of a KL divergence.
    """
    reference = networks.load_network(config.reference, mesh, config.decoder)
    # Both networks read the same ids, which must stand for the same tokens.
    text.check_same_tokenizer(policy=network.tokenizer, reference=reference.tokenizer)
    gaps = np.zeros(len(said.samples.lengths))
    most = contexts.of_network(reference).length
    # Rows of similar length share a batch, so that little padding is computed.
    for index, slots in responses.by_length(said.samples.lengths, config.batch_size, most=most):
        samples = jax.tree.map(lambda x, index=index: x[index], said.samples)
        # Rows of the batch are no longer than `slots`, so only padding is cut off.
        samples = dataclasses.replace(samples, tokens=samples.tokens[:, :slots])
        temperature = kl_temperature(config)
        own, other = (
            _log_probs(one.model, one.params, samples, temperature) for one in (network, reference)
        )
        # The last batch repeats a row, whose value is then written twice.
        gaps[index] = own - other
    return float(gaps.mean())


def kl_temperature(config: ConfigDict) -> float:
    """The temperature of the compared distributions: the sampler's, or 1 for greedy samples."""
    return float(config.temperature or 1.0)


# Compiled once per model and number of slots, as `temperature` is a traced number.
@functools.partial(jax.jit, static_argnames="model")
def _log_probs(model: Model, params: Params, samples: Samples, temperature: float) -> jax.Array:
    """Log-probability of each response, in nats."""
    mask = scoring.response_mask(samples.prompt_lengths, samples.lengths, samples.tokens.shape[1])
    return scoring.sequence_log_probs(
        model, params, samples.tokens, samples.lengths, mask, temperature=temperature
    ).sum(axis=1)


def write_samples(
    path: Path, prompts: Sequence[schema.Prompt], answers: dict[str, Answers]
) -> None:
    """Writes the first sample of each model for each prompt, with its scores."""
    lines = []
    for i, p in enumerate(prompts):
        for name, said in answers.items():
            gold = None if said.gold is None else float(said.gold[i, 0])
            lines.append(
                SampleLine(
                    p.id, name, chat.readable(p.prompt), said.texts[i][0], gold,
                    float(said.reward[i, 0]),
                )
            )  # fmt: skip
    schema.write_jsonl(path, lines)


if __name__ == "__main__":
    cli.main(
        run, config="configs/evaluate/storyland.py", workdir="runs/evaluate",
        one_process="It reads the model folders that sft.py and ppo.py wrote: run it on one host.",
        check=check,
    )  # fmt: skip
