"""Invented numbers of a whole run: input of the report's tests, and of `python -m tests.evaluation.sample_run OUT`."""

from __future__ import annotations

import math
import sys
from typing import Any

from rlhf_jax.evaluation.report import write_report

EVALUATED = ("base", "prompted_base", "ppo", "ppo_ptx")


def results() -> dict[str, Any]:
    def rates(*values: float) -> dict[str, Any]:
        names = ("base", "prompted_base", "best_of_4", "ppo", "ppo_ptx")
        return {
            m: {"value": v, "low": v - 0.05, "high": v + 0.05, "n": 320}
            for m, v in zip(names, values, strict=True)
        }

    models = ("base", "prompted_base", "sft", "best_of_4", "ppo", "ppo_ptx")
    parts = {
        "instruction": 0.1,
        "constraint": 0.0,
        "facts": -0.05,
        "not_rude": 0.25,
        "fluent": 0.2,
        "length": 0.05,
    }
    gold = dict(zip(models, (0.17, 0.48, 0.66, 0.75, 0.77, 0.79), strict=True))
    kl = [math.log(n) - (n - 1) / n for n in (1, 2, 4, 8, 16, 32, 64)]
    return {
        "win_rate_vs_sft": rates(0.06, 0.27, 0.64, 0.68, 0.71),
        "win_rate_vs_sft_length_controlled": rates(0.07, 0.29, 0.62, 0.63, 0.67),
        "win_rate_vs_sft_by_reward_model": rates(0.04, 0.2, 0.8, 0.86, 0.83),
        "gold_score": gold,
        "gold_parts": {m: {p: min(1.0, g + d) for p, d in parts.items()} for m, g in gold.items()},
        "pretraining_loss": {"base": 0.93, "sft": 1.21, "ppo": 1.84, "ppo_ptx": 1.08},
        "rm_accuracy": {
            "train_labelers": {"value": 0.72, "low": 0.70, "high": 0.74},
            "heldout_labelers": {"value": 0.70, "low": 0.67, "high": 0.73},
        },
        "labeler_agreement": {"train": 0.76, "heldout": 0.78},
        "length_only_accuracy": 0.55,
        "calibration": {
            "predicted": [0.52, 0.56, 0.61, 0.67, 0.74, 0.82, 0.90, 0.96],
            "observed": [0.51, 0.57, 0.60, 0.65, 0.75, 0.78, 0.86, 0.91],
        },
        "best_of_n": {
            "n": [1, 2, 4, 8, 16, 32, 64],
            "kl": kl,
            "proxy": [0.0, 0.55, 1.0, 1.36, 1.66, 1.92, 2.14],
            "gold": [0.66, 0.715, 0.748, 0.762, 0.765, 0.760, 0.748],
        },
        "kl": {"ppo": 12.3, "ppo_ptx": 9.8},
        "response_tokens": {
            "base": 61.0,
            "prompted_base": 40.2,
            "sft": 31.4,
            "ppo": 38.8,
            "ppo_ptx": 36.1,
        },
        "seconds": {
            "sft": 74.2,
            "samples": 42.0,
            "reward_model": 88.9,
            "ppo": 131.0,
            "ppo_ptx": 188.0,
            "evaluation": 40.1,
        },
        "peak_memory_mb": 2210.0,
        "config": {"seed": 0, "ppo": {"kl_coef": 0.1, "clip_ratio": 0.2}, "sft": {"epochs": 6}},
        "versions": {
            "jax": "0.10.2",
            "flax": "0.12.8",
            "python": "3.11.9",
            "device": "cpu (2 cores)",
        },
    }


def history() -> dict[str, list[dict[str, float]]]:
    def rows(speed: float, forgetting: float) -> list[dict[str, float]]:
        out = []
        for i in range(41):
            t = 1 - math.exp(-i / 16)
            wobble = 0.02 * math.sin(2.1 * i + speed)
            row = {
                "iteration": i,
                "kl": 13 * speed * t + 0.3 * wobble * i,
                "score": 1.7 * speed * t + 2 * wobble,
            }
            row |= {
                "response_tokens": 31 + 7 * t + 20 * wobble,
                "pretraining_loss": 1.15 + forgetting * t,
            }
            if i % 5 == 0:
                row["gold_score"] = 0.66 + 0.14 * t - 0.03 * t * t + wobble / 2
            out.append(row)
        return out

    sft = [
        {
            "epoch": e,
            "validation_loss": 1.1 + 0.05 * (e - 2) ** 2,
            "score": 1 - 1 / e,
            "gold_score": 0.7 - 0.3 / e,
        }
        for e in range(1, 7)
    ]
    return {"ppo": rows(1.0, 0.7), "ppo_ptx": rows(0.8, -0.05), "sft": sft}


def samples() -> list[dict[str, Any]]:
    texts = {
        "base": (
            "Write a story about a goose.\nWrite a story about a mill.\nWrite a story about",
            0.08,
        ),
        "prompted_base": (
            "There was a goose. The goose was by the river and the goose was by the river.",
            0.41,
        ),
        "sft": ("One morning a goose found a lantern by the mill. She carried it home.", 0.70),
        "ppo": (
            "A small goose found a lantern at the old mill. She was glad. She carried it home and lit the yard.",
            0.86,
        ),
        "ppo_ptx": (
            "A goose found a lantern at the mill. It shone.\n\nShe carried it home, glad at last.",
            0.91,
        ),
    }
    prompts = (
        "Write a happy story about a goose in two sentences. Use the word lantern.",
        "Passage: Mira keeps bees on the hill.\nQuestion: What does Mira keep?",
        "List three things\n  - found in a kitchen\n  - that are blue",
        "Tell the baker politely that his bread is late.",
    )
    responses = {model: {"text": text, "gold_score": gold} for model, (text, gold) in texts.items()}
    return [{"prompt": prompt, "responses": responses} for prompt in prompts]


def departures() -> list[dict[str, str]]:
    return [
        {
            "name": "Episodes of PPO",
            "paper": "256,000",
            "source": "Ouyang et al. 2022, C.4",
            "run": "5,120",
            "why": "40 iterations of 128 fit ten minutes on two cores",
        },
        {
            "name": "Policy size",
            "paper": "1.3 to 175 billion parameters",
            "source": "Ouyang et al. 2022, C",
            "run": "0.9 million",
            "why": "the small world needs no more",
        },
        {
            "name": "KL coefficient",
            "paper": "0.02",
            "source": "Ouyang et al. 2022, C.4",
            "run": "0.1",
            "why": "the small reward model is easier to fool",
        },
    ]


if __name__ == "__main__":
    write_report(sys.argv[1], results(), history(), samples(), departures())
