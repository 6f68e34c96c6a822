"""Answers of one model to the prompts of an evaluation, judged by gold and by the reward model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.data import schema, text
from rlhf_jax.evaluation.answers import Answers
from rlhf_jax.rewards import functions
from rlhf_jax.run import contexts, networks, responses
from rlhf_jax.run.asking import Ask, bare_prompts, few_shot_asks, in_slots, tokens_that_start
from rlhf_jax.run.console import Progress
from rlhf_jax.run.networks import Network
from rlhf_jax.sampling.generate import Sampling


def few_shot_prompts(
    network: Network, reward: Network, judge: Any,
    prompts: Sequence[schema.Prompt], config: ConfigDict, mesh: jax.sharding.Mesh,
) -> Ask:  # fmt: skip
    """Prompts after a few worked examples: of several prefixes the one with the highest reward.

    Source: Ouyang et al. 2022, section 3.6 (GPT-3 with a few-shot prefix chosen by reward-model
    score).
    """
    asks = few_shot_asks(config)
    # One width for all candidates, so that they share a compiled program.
    slots = max(ask(network, prompts)[1] for ask in asks)
    asks = [in_slots(ask, slots) for ask in asks]

    trial = prompts[: config.few_shot.trial_prompts]

    def score(ask: Ask) -> float:
        return float(
            answer(
                network, reward, None, trial, ask, config.base_samples, config, mesh
            ).reward.mean()
        )

    # A single candidate needs no trial, which would sample and score for nothing.
    return max(asks, key=score) if len(asks) > 1 else asks[0]


def answer(
    network: Network, reward: Network, judge: Any,
    prompts: Sequence[schema.Prompt], ask: Ask, count: int, config: ConfigDict,
    mesh: jax.sharding.Mesh,
) -> Answers:  # fmt: skip
    """`count` samples of each prompt, with gold score, reward-model score and length.

    Raises:
      ValueError: a prompt leaves no room for `max_new_tokens` in the context of the model or of the
        reward model.
    """
    bare = [p.prompt for p in prompts]
    scored = [len(text.encode_prompt(reward.tokenizer, prompt)) for prompt in bare]
    where = contexts.prompt_of("scoring", bare)
    # Before anything is sampled: a response of the full length must fit the reward model too.
    contexts.check(contexts.of_network(reward), scored, where, new=config.max_new_tokens)
    ids, slots = ask(network, prompts)
    prompted = ask is not bare_prompts
    # After worked examples a model may begin another one; these tokens end its answer there.
    stop = tokens_that_start(network.tokenizer, config.few_shot.stop) if prompted else ()
    with Progress(f"{network.name}: sampling", count * len(prompts), unit="responses") as progress:
        texts, samples = responses.sample_responses(
            network,
            responses.EncodedPrompts(ids, slots, () if prompted else bare),
            mesh,
            Sampling(config.max_new_tokens, config.temperature, stop_ids=tuple(stop)),
            counts=count,
            seed=config.seed,
            batch_size=config.batch_size,
            progress=lambda done, _: progress(done),
        )
    # The space after the examples was left for the model to write and is no part of its answer.
    texts = [t.strip() if prompted else t for t in texts]
    asked = [p for p in prompts for _ in range(count)]
    # Encoded again by the reward model's tokenizer, a text may be longer than what was sampled.
    rows, cut = responses.fitting_scoring_rows(reward, [p.prompt for p in asked], texts)
    rewards = responses.score_rows(reward, rows, mesh, batch_size=config.batch_size)
    judged = [known(judge, p, t) for p, t in zip(asked, texts, strict=True)] if judge else []
    shape = (len(prompts), count)
    tokens = np.asarray(samples.lengths - samples.prompt_lengths)
    return Answers(
        [texts[i : i + count] for i in range(0, len(texts), count)],
        np.array([g.score for g in judged]).reshape(shape) if judge else None,
        [dict(g.parts) for g in judged], rewards.reshape(shape), tokens.reshape(shape), samples,
        cut,
    )  # fmt: skip


def known(judge: Any, prompt: schema.Prompt, response: str) -> functions.Judgement:
    """The gold scorer's judgement of a response.

    Raises:
      ValueError: the score is not finite; leaving the prompt out would give the means and win rates
        of each model a different set of prompts.
    """
    scorer = functions.judge(judge)
    judged = scorer.judged(str(prompt.id), response, prompt.prompt)
    if not math.isfinite(judged.score):
        raise ValueError(
            f"gold={scorer.name} gave {judged.score} for the prompt {str(prompt.id)!r}: an "
            "evaluation compares the answers to each prompt, return a number for every response or "
            "leave the prompt out of its file"
        )
    return judged


def best_epoch(
    epochs: Sequence[Mapping[str, Any]], reward: Network, judge: Any,
    prompts: Sequence[schema.Prompt], count: int, config: ConfigDict, mesh: jax.sharding.Mesh,
) -> dict[str, Any]:  # fmt: skip
    """The epoch of SFT with the best reward on `prompts`, and the scores of all of them.

    Ouyang et al. 2022, section 3.5, choose by reward-model score and not by validation loss.

    Args:
      epochs: of each epoch its number, ``path`` of its model and ``validation_loss``.
      reward: the reward model.
      judge: the gold scorer, or None.
      prompts: not those of the evaluation.
      count: samples of each prompt.
      config: settings of sampling.
      mesh: the devices.
    """
    rows = []
    for row in epochs:
        network = networks.load_network(row["path"], mesh, config.decoder)
        said = answer(network, reward, judge, prompts, bare_prompts, count, config, mesh)
        rows.append({**row, **said.means()})
        score = rows[-1]["reward_score"]
        print(f"baseline epoch {row['epoch']}: reward-model score {score:.3f}", flush=True)
    best = max(rows, key=lambda row: row["reward_score"])
    lowest = min(rows, key=lambda row: row["validation_loss"])
    return {
        "epochs": rows, "path": best["path"], "epoch": best["epoch"],
        "lowest_loss_epoch": lowest["epoch"],
    }  # fmt: skip
