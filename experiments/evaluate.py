r"""Compares models on test prompts: win rates against SFT, gold scores by part, alignment tax, samples side by side.

Run:

    python experiments/evaluate.py --config=configs/evaluate/storyland.py --workdir=runs/evaluate \
        --config.models.sft=runs/sft/epoch-3 --config.models.ppo=runs/ppo/ema \
        --config.reward_model=runs/reward_model/model

Writes ``evaluation.json`` and ``samples.jsonl``. Without a gold scorer (`config.gold` empty) the reward model judges.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax import scoring
from rlhf_jax.data import chat, schema, text
from rlhf_jax.evaluation.alignment_tax import lm_loss
from rlhf_jax.evaluation.overoptimization import best_of_n, kl_bon
from rlhf_jax.evaluation.win_rate import length_controlled_win_rate, win_rate
from rlhf_jax.rewards import functions
from rlhf_jax.run import cli, contexts, datasets, devices, inputs, networks, responses
from rlhf_jax.run.console import Progress, patiently
from rlhf_jax.run.files import write_json
from rlhf_jax.run.metrics import StageLog
from rlhf_jax.types import LMBatch, Model, Params, Samples

BASELINE = "sft"
BEST_OF = "best_of_4"


class Answers(NamedTuple):
    """What one model said to N prompts, S samples each: texts, judgements and lengths in tokens, all ``[N, S]``.

    `gold` is None where nobody knows the truth.
    """

    texts: list[list[str]]
    gold: np.ndarray | None
    parts: list[dict[str, float]]
    reward: np.ndarray
    tokens: np.ndarray
    samples: Samples
    scored_in_part: int = 0
    """Responses whose text takes more tokens than the reward model's context leaves: scored as far as they fit."""

    def means(self) -> dict[str, float]:
        """Mean scores and length."""
        gold = {} if self.gold is None else {"gold_score": float(self.gold.mean())}
        return gold | {"reward_score": float(self.reward.mean()), "tokens": float(self.tokens.mean())}


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of ``samples.jsonl``."""

    id: str | None
    model: str
    prompt: str
    response: str
    gold_score: float | None
    reward_score: float


def run(config: ConfigDict, workdir: str) -> dict:
    """Samples from every model, judges, writes; returns what ``evaluation.json`` holds."""
    check(config)
    mesh = devices.start(config.mesh)
    prompts = datasets.read_prompts(config.prompts, config.limit, tokenizer=networks.tokenizer_of(config.reward_model))
    check_contexts(prompts, config)
    reward = networks.load_network(config.reward_model, mesh, config.decoder)
    judge = functions.judge(config.gold) if config.gold else None
    paths = {name: path for name, path in config.models.items() if path}
    results: dict[str, Any] = {"prompts": len(prompts), "temperature": config.temperature, "sample_seed": config.seed}
    answers: dict[str, Answers] = {}
    held_out: dict[str, list[LMBatch]] = {}
    counts = {BASELINE: config.baseline_samples, "base": config.base_samples, "prompted_base": config.base_samples}
    jobs = list(paths) + (["prompted_base"] if "base" in paths and config.few_shot.demonstrations else [])
    shown = ("gold_score", "reward_score", "tokens")
    with StageLog(workdir, "evaluate", total=len(jobs), show=shown, unit="models", waited=True) as log:
        for done, name in enumerate(jobs, start=1):
            prompted = name == "prompted_base"
            network = networks.load_network(paths["base" if prompted else name], mesh, config.decoder)
            count = counts.get(name, config.samples)
            ask = few_shot_prompts(network, reward, judge, prompts, config, mesh) if prompted else bare_prompts
            answers[name] = answer(network, reward, judge, prompts, ask, count, config, mesh, name=name)
            if config.held_out_text and not prompted:
                kind = text.tokenizer_fingerprint(network.tokenizer)
                context = contexts.of_network(network, networks.model_folder(paths[name]))
                held_out[kind] = held_out.get(kind) or held_out_batches(
                    network.tokenizer, config, mesh, context=context
                )  # fmt: skip
                with patiently(f"{name}: loss on held-out text"):
                    loss = lm_loss(network.model, network.params, held_out[kind])
                results.setdefault("pretraining_loss", {})[name] = loss
            if name in config.kl_of and config.reference:
                with patiently(f"{name}: KL to the reference"):
                    results.setdefault("kl", {})[name] = kl_to_reference(network, answers[name], config, mesh)
                if not config.temperature:
                    results["kl_temperature"] = kl_temperature(config)
            if answers[name].scored_in_part:
                results.setdefault("scored_in_part", {})[name] = answers[name].scored_in_part
            log(done, answers[name].means())
            log.flush()  # said when the model is done, and not with the next one
    results |= compare(answers, [str(p.prompt) for p in prompts])
    write_json(Path(workdir) / "evaluation.json", results)
    write_samples(Path(workdir) / "samples.jsonl", prompts, answers)
    return results


def check_contexts(prompts: Sequence[schema.Prompt], config: ConfigDict) -> None:
    """Refuses prompts and row lengths beyond the context of any model, before the first is loaded.

    Raises:
      ValueError: a prompt with `max_new_tokens` after it is longer than the context of a model that answers, of the
        reward model or of the KL reference; a few-shot prompt is; or `held_out_row_length` is.
    """
    paths = {name: path for name, path in config.models.items() if path}
    asks: dict[str, list[Ask]] = {path: [bare_prompts] for path in (*paths.values(), config.reward_model)}
    if config.reference:
        asks.setdefault(config.reference, [bare_prompts])
    if "base" in paths and config.few_shot.demonstrations:
        asks[paths["base"]] = [bare_prompts, *few_shot_asks(config)]
    for path, each in asks.items():
        folder = networks.model_folder(path)
        context = contexts.of_folder(folder)
        if context.length is None or not (folder / "tokenizer.json").exists():
            continue  # told where the model is loaded
        known: Any = networks.Network(None, {}, text.load_tokenizer(folder))  # pyright: ignore[reportArgumentType]
        for ask in each:
            what = config.prompts if ask is bare_prompts else f"{config.prompts} after few_shot.examples"
            name = contexts.prompt_of(what, [p.prompt for p in prompts])
            contexts.check(context, [len(ids) for ids in ask(known, prompts)[0]], name, new=config.max_new_tokens)
        if config.held_out_text and path in paths.values() and config.held_out_row_length > context.length:
            read_held_out(known.tokenizer, config, context=context)


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


# ------------------------------------------------------------------------------------------------------- asking

Ask = Callable[[networks.Network, Sequence[schema.Prompt]], tuple[list[list[int]], int]]
"""Prompts to token ids, and the slots of a prompt row."""


def bare_prompts(network: networks.Network, prompts: Sequence[schema.Prompt]) -> tuple[list[list[int]], int]:
    """The instruction itself, as the policy sees it in training."""
    ids = [text.encode_prompt(network.tokenizer, p.prompt) for p in prompts]
    return ids, -(-max(map(len, ids)) // 16) * 16  # few lengths, few compiled programs


def few_shot_prompts(
    network: networks.Network, reward: networks.Network, judge: Any, prompts: Sequence[schema.Prompt],
    config: ConfigDict, mesh: jax.sharding.Mesh,
) -> Ask:  # fmt: skip
    """Instructions after a few worked examples, the prefix with the highest reward-model score of several.

    Source: Ouyang et al. 2022, section 3.6 (GPT-3 with a few-shot prefix chosen by reward-model score).
    """
    asks = few_shot_asks(config)
    slots = max(ask(network, prompts)[1] for ask in asks)  # the same for all, so that they share a compiled program
    asks = [_in_slots(ask, slots) for ask in asks]

    trial = prompts[: config.few_shot.trial_prompts]

    def score(ask: Ask) -> float:
        return float(answer(network, reward, None, trial, ask, config.base_samples, config, mesh).reward.mean())

    return max(asks, key=score) if len(asks) > 1 else asks[0]


def few_shot_asks(config: ConfigDict) -> list[Ask]:
    """Prefixes of worked examples drawn from the demonstrations, `few_shot.candidates` of them."""
    shots = config.few_shot
    records = datasets.read_records(shots.demonstrations, schema.Demonstration)
    rng = np.random.default_rng(config.seed)
    asks: list[Ask] = []
    for _ in range(shots.candidates):
        chosen = [records[i] for i in rng.choice(len(records), shots.examples, replace=False)]
        asks.append(_with_prefix([(chat.readable(r.prompt), r.response) for r in chosen], shots.template))
    return asks


def _in_slots(ask: Ask, slots: int) -> Ask:
    return lambda network, prompts: (ask(network, prompts)[0], slots)


def _with_prefix(examples: Sequence[tuple[str, str]], template: str) -> Ask:
    def ask(network: networks.Network, prompts: Sequence[schema.Prompt]) -> tuple[list[list[int]], int]:
        shown = "\n\n".join(template.format(prompt=p, response=r) for p, r in examples) + "\n\n"
        texts = [shown + template.format(prompt=chat.readable(p.prompt), response="").rstrip() for p in prompts]
        ids = [text.encode_opening(network.tokenizer, t) for t in texts]
        return ids, -(-max(map(len, ids)) // 16) * 16

    return ask


def answer(
    network: networks.Network, reward: networks.Network, judge: Any, prompts: Sequence[schema.Prompt], ask: Ask,
    count: int, config: ConfigDict, mesh: jax.sharding.Mesh, *, name: str = "samples",
) -> Answers:  # fmt: skip
    """`count` samples of each prompt, with gold score, reward-model score and length; `name` is for the console.

    Raises:
      ValueError: a prompt leaves no room for `max_new_tokens` in the context of the model or of the reward model.
    """
    bare = [p.prompt for p in prompts]
    scored = [len(text.encode_prompt(reward.tokenizer, prompt)) for prompt in bare]
    where = contexts.prompt_of("scoring", bare)
    contexts.check(contexts.of_network(reward), scored, where, new=config.max_new_tokens)
    ids, slots = ask(network, prompts)
    prompted = ask is not bare_prompts
    stop = tokens_that_start(network.tokenizer, config.few_shot.stop) if prompted else ()
    with Progress(f"{name}: sampling", count * len(prompts), unit="responses") as progress:
        texts, samples = responses.sample_responses(
            network, ids, mesh, asked=() if prompted else [p.prompt for p in prompts], counts=count,
            prompt_length=slots, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            seed=config.seed, batch_size=config.batch_size, stop_ids=stop, progress=lambda done, _: progress(done),
        )  # fmt: skip
    texts = [t.strip() if prompted else t for t in texts]
    asked = [p for p in prompts for _ in range(count)]
    rows, cut = responses.fitting_scoring_rows(reward, [p.prompt for p in asked], texts)
    rewards = responses.score_rows(reward, rows, mesh, batch_size=config.batch_size)
    judged = [known(judge, p, t) for p, t in zip(asked, texts, strict=True)] if judge else []
    shape = (len(prompts), count)
    tokens = np.asarray(samples.lengths - samples.prompt_lengths)
    return Answers(
        [texts[i : i + count] for i in range(0, len(texts), count)],
        np.array([g.score for g in judged]).reshape(shape) if judge else None,
        [dict(g.parts) for g in judged],
        rewards.reshape(shape),
        tokens.reshape(shape),
        samples,
        cut,
    )


def known(judge: Any, prompt: schema.Prompt, response: str) -> functions.Judgement:
    """What the gold scorer says of a response.

    Raises:
      ValueError: it says nothing: win rates and means would leave out other prompts for each model.
    """
    scorer = functions.judge(judge)
    judged = scorer.judged(str(prompt.id), response, prompt.prompt)
    if not math.isfinite(judged.score):
        raise ValueError(
            f"gold={scorer.name} gave {judged.score} for the prompt {str(prompt.id)!r}: an evaluation compares the "
            "answers to each prompt, return a number for every response or leave the prompt out of its file"
        )
    return judged


@functools.cache
def tokens_that_start(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Tokens whose text begins with `text`: where the prompted base model has said its answer and goes on."""
    return tuple(i for i in range(len(tokenizer)) if tokenizer.decode([i]).startswith(text))


# ----------------------------------------------------------------------------------------------------- measuring


def held_out_batches(
    tokenizer: Any, config: ConfigDict, mesh: jax.sharding.Mesh, *, context: contexts.Context | None = None
) -> list[LMBatch]:
    """Held-out pretraining text: by what its loss rises, in nats per token, is the alignment tax."""
    rows = read_held_out(tokenizer, config, context=context)
    return datasets.held_out_batches(rows, mesh, batch_size=config.batch_size, seed=0, most=config.held_out_batches)


def read_held_out(tokenizer: Any, config: ConfigDict, *, context: contexts.Context | None) -> LMBatch:
    """Packed rows of the held-out text, no piece of it longer than the model's context."""
    length = config.held_out_row_length
    return datasets.lm_rows(tokenizer, config.held_out_text, length=length, context=context, key="held_out_row_length")


def kl_to_reference(network: networks.Network, said: Answers, config: ConfigDict, mesh: jax.sharding.Mesh) -> float:
    """``E[log pi(y|x) - log pi_ref(y|x)]`` over the model's own samples, nats per sequence.

    Both are the distributions at `kl_temperature`. Greedy samples are not drawn from any: there the number is the mean
    log-ratio of the most likely response, and no estimate of a KL divergence.
    """
    reference = networks.load_network(config.reference, mesh, config.decoder)
    text.check_same_tokenizer(policy=network.tokenizer, reference=reference.tokenizer)
    gaps = np.zeros(len(said.samples.lengths))
    most = contexts.of_network(reference).length
    for index, slots in responses.by_length(said.samples.lengths, config.batch_size, most=most):
        samples = jax.tree.map(lambda x, index=index: x[index], said.samples)
        samples = dataclasses.replace(samples, tokens=samples.tokens[:, :slots])
        temperature = kl_temperature(config)
        own, other = (_log_probs(one.model, one.params, samples, temperature) for one in (network, reference))
        gaps[index] = own - other
    return float(gaps.mean())


def kl_temperature(config: ConfigDict) -> float:
    """The temperature of the distributions that are compared: the sampler's, and 1 for greedy samples."""
    return float(config.temperature or 1.0)


@functools.partial(jax.jit, static_argnames="model")
def _log_probs(model: Model, params: Params, samples: Samples, temperature: float) -> jax.Array:
    """Log-probability of each response, in nats."""
    mask = scoring.response_mask(samples.prompt_lengths, samples.lengths, samples.tokens.shape[1])
    return scoring.sequence_log_probs(
        model, params, samples.tokens, samples.lengths, mask, temperature=temperature
    ).sum(axis=1)


def compare(answers: dict[str, Answers], asked: Sequence[str] | None = None) -> dict[str, Any]:
    """Win rates against SFT (by gold, length-controlled, by reward model), scores, parts, lengths, best-of-n.

    Without gold scores the keys that speak of them are left out.

    Args:
      answers: of each model to the same prompts.
      asked: the text of each prompt: rows of one prompt count as one. None says that each is another.
    """
    raw, answers = answers, same_score_for_same_text(answers)
    groups = np.unique(np.array(asked), return_inverse=True)[1] if asked and len(set(asked)) < len(asked) else None
    baseline = answers[BASELINE]
    others = {name: said for name, said in answers.items() if name != BASELINE}
    # Best of 4 meets the samples it was not chosen from.
    best = _best_of(baseline, 4) if baseline.reward.shape[1] > 4 else None
    results: dict[str, Any] = {}
    has_gold = baseline.gold is not None
    fields = {"win_rate_vs_sft": "gold"} if has_gold else {}
    for key, field in (fields | {"win_rate_vs_sft_by_reward_model": "reward"}).items():
        rates = {
            m: win_rate(getattr(a, field), getattr(baseline, field), groups=groups)._asdict() for m, a in others.items()
        }
        if best is not None:
            rates[BEST_OF] = win_rate(best[field], getattr(baseline, field)[:, 4:], groups=groups)._asdict()
        results[key] = rates
    for key, field in fields.items():
        results[f"{key}_length_controlled"] = {
            m: length_controlled_win_rate(
                getattr(a, field), getattr(baseline, field), a.tokens, baseline.tokens, groups=groups
            )._asdict()
            for m, a in others.items()
        }
        results["gold_score"] = {m: float(getattr(a, field).mean()) for m, a in answers.items()}
    results["reward_score"] = {m: float(a.reward.mean()) for m, a in raw.items()}
    results["response_tokens"] = {m: float(a.tokens.mean()) for m, a in answers.items()}
    if best is not None:
        if has_gold:
            results["gold_score"][BEST_OF] = float(best["gold"].mean())
        results["response_tokens"][BEST_OF] = float(best["tokens"].mean())
    if has_gold:
        results["gold_parts"] = {m: mean_parts(a.parts) for m, a in answers.items()}
    results["best_of_n"] = best_of_n_curve(raw[BASELINE])
    return results


def same_score_for_same_text(answers: dict[str, Answers]) -> dict[str, Answers]:
    """The answers, with one reward-model score wherever the same was answered to a prompt.

    A text that two models gave was scored in two batches, and its two scores may differ by rounding (in bfloat16 by
    one in a hundred). Neither of them is better.
    """
    first: dict[tuple[int, str], float] = {}
    settled = {}
    for name, said in answers.items():
        reward = said.reward.copy()
        for row, texts in enumerate(said.texts):
            for column, answered in enumerate(texts):
                reward[row, column] = first.setdefault((row, answered), reward[row, column])
        settled[name] = said._replace(reward=reward)
    return settled


def _best_of(said: Answers, n: int) -> dict[str, np.ndarray]:
    """The sample that the reward model likes best among the first n of each prompt."""
    pick = said.reward[:, :n].argmax(axis=1)[:, None]
    fields = ("reward", "tokens") if said.gold is None else ("gold", "reward", "tokens")
    return {f: np.take_along_axis(getattr(said, f), pick, axis=1)[:, 0] for f in fields}


def best_of_n_curve(said: Answers) -> dict[str, list[float]]:
    """Gold and proxy of best-of-n by the reward model, and the gold of best-of-n by gold itself."""
    ns = [2**i for i in range(said.reward.shape[1].bit_length()) if 2**i <= said.reward.shape[1]]
    curve = {
        "n": [float(n) for n in ns],
        "kl": [kl_bon(n) for n in ns],
        "proxy": [best_of_n(said.reward, said.reward, n=n) for n in ns],
    }
    if said.gold is not None:
        curve["gold"] = [best_of_n(said.reward, said.gold, n=n) for n in ns]
        curve["gold_by_gold"] = [best_of_n(said.gold, said.gold, n=n) for n in ns]
    return curve


def mean_parts(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each part over the answers that have it."""
    names = sorted({name for one in parts for name in one})
    return {name: float(np.mean([one[name] for one in parts if name in one])) for name in names}


def write_samples(path: Path, prompts: Sequence[schema.Prompt], answers: dict[str, Answers]) -> None:
    """The first sample of each model to each prompt, with its judgements."""
    lines = []
    for i, p in enumerate(prompts):
        for name, said in answers.items():
            gold = None if said.gold is None else float(said.gold[i, 0])
            lines.append(Line(p.id, name, chat.readable(p.prompt), said.texts[i][0], gold, float(said.reward[i, 0])))
    schema.write_jsonl(path, lines)


if __name__ == "__main__":
    cli.main(
        run, config="configs/evaluate/storyland.py", workdir="runs/evaluate",
        one_process="It reads the model folders that sft.py and ppo.py wrote: run it on one host.", check=check,
    )  # fmt: skip
