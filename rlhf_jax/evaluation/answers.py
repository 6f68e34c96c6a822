"""Compare the answers of several models to the same prompts: win rates, scores, best of n."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.evaluation.overoptimization import best_of_n, kl_bon
from rlhf_jax.evaluation.win_rate import length_controlled_win_rate, win_rate
from rlhf_jax.types import Samples

BASELINE = "sft"


BEST_OF = "best_of_4"


class Answers(NamedTuple):
    """Responses of one model to N prompts, S samples each, with scores and lengths ``[N, S]``.

    `tokens` are lengths in tokens. `gold` is None where there is no gold scorer.
    """

    texts: list[list[str]]
    gold: np.ndarray | None
    parts: list[dict[str, float]]
    reward: np.ndarray
    tokens: np.ndarray
    samples: Samples
    scored_in_part: int = 0
    """Number of responses longer than the reward model's context, which scored only what fits."""

    def means(self) -> dict[str, float]:
        """Mean scores and length."""
        gold = {} if self.gold is None else {"gold_score": float(self.gold.mean())}
        return gold | {
            "reward_score": float(self.reward.mean()),
            "tokens": float(self.tokens.mean()),
        }


def compare(answers: dict[str, Answers], asked: Sequence[str] | None = None) -> dict[str, Any]:
    """Win rates against SFT (by gold, length-controlled, by reward model), scores and best-of-n.

    Without gold scores, the keys that need them are left out.

    Args:
      answers: of each model to the same prompts.
      asked: the text of each prompt; rows with the same prompt count as one in the win rates. None
        means that all prompts differ.

    Returns:
      Win rates, mean scores, parts and lengths by model, and the best-of-n curve, for JSON.
    """
    # Comparisons use the settled scores; means and the best-of-n curve those that were measured.
    raw, answers = answers, same_score_for_same_text(answers)
    # None where all prompts differ, since every row is then a prompt of its own.
    groups = (
        np.unique(np.array(asked), return_inverse=True)[1]
        if asked and len(set(asked)) < len(asked)
        else None
    )
    baseline = answers[BASELINE]
    others = {name: said for name, said in answers.items() if name != BASELINE}
    # Best of 4 is compared with the samples that it was not chosen from.
    best = _best_of(baseline, 4) if baseline.reward.shape[1] > 4 else None
    results: dict[str, Any] = {}
    has_gold = baseline.gold is not None
    fields = {"win_rate_vs_sft": "gold"} if has_gold else {}
    for key, field in (fields | {"win_rate_vs_sft_by_reward_model": "reward"}).items():
        rates = {
            m: win_rate(getattr(a, field), getattr(baseline, field), groups=groups)._asdict()
            for m, a in others.items()
        }
        if best is not None:
            rates[BEST_OF] = win_rate(
                best[field], getattr(baseline, field)[:, 4:], groups=groups
            )._asdict()
        results[key] = rates
    for key, field in fields.items():
        results[f"{key}_length_controlled"] = {
            m: length_controlled_win_rate(
                getattr(a, field),
                getattr(baseline, field),
                a.tokens,
                baseline.tokens,
                groups=groups,
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
    """The answers, with equal reward-model scores for equal responses to a prompt.

    A response that two models gave was scored in two batches, and the two scores may differ by
    rounding (in bfloat16 by 1%). That must not decide a comparison, so the first score is used.
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
    """The sample with the highest reward-model score among the first n of each prompt."""
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
