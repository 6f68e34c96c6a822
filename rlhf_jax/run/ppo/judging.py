"""Functions of texts in PPO: a reward, or a gold scorer that is only watched."""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.evaluation.alignment_tax import lm_loss
from rlhf_jax.rewards import functions
from rlhf_jax.run import processes, responses
from rlhf_jax.run.ppo.setup import Setup
from rlhf_jax.types import PPOState, Samples


def response_texts(setup: Setup, samples: Samples, iteration: int) -> list[str]:
    """The responses as text where a function of texts judges them; otherwise an empty list."""
    if not (setup.gold or setup.text_reward):
        return []
    asked = [setup.asked[i] for i in setup.prompts.indices(iteration)]
    return responses.response_texts(setup.policy.tokenizer, samples, asked)


def judge_all(
    setup: Setup, score: functions.Judge, texts: list[str], iteration: int
) -> list[float]:
    """`score` of each response of an iteration, on every process.

    The processes share the work: process i of n judges the responses i, i + n, i + 2n and so on.
    """
    asked = [*zip(setup.prompts.indices(iteration), texts, strict=True)]
    # The texts are the same on every process, so each judges every n-th one.
    part = asked[processes.index() :: processes.count()]
    judged = processes.exchange(
        "scores", [score(str(setup.prompt_ids[i]), t, setup.asked[i]) for i, t in part]
    )
    # Undo the sharing: response i is number i // n of process i % n.
    return [judged[place % len(judged)][place // len(judged)] for place in range(len(asked))]


def observe(
    setup: Setup, state: PPOState, texts: list[str], iteration: int, config: ConfigDict
) -> dict[str, Any]:
    """Metrics that nothing is trained on: mean gold score of the texts, loss on held-out text."""
    seen: dict[str, Any] = {}
    if setup.gold is not None:
        judged = np.asarray(judge_all(setup, setup.gold, texts, iteration))
        told = judged[np.isfinite(judged)]  # NaN: the scorer abstained
        seen["gold_score"] = float(told.mean()) if len(told) else float("nan")
    if setup.held_out and (
        iteration % config.evaluate_every == 0 or iteration + 1 == config.iterations
    ):
        policy = setup.trained_policy.whole(state.policy.params)
        seen["held_out_loss"] = lm_loss(setup.policy.model, policy, setup.held_out)
    return seen
