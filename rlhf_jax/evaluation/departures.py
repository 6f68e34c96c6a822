"""Where a run departs from the paper (Ouyang et al. 2022), beside the paper's value: a table of the report."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any


def departures(config: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of the table, one for each value that is not the paper's.

    Args:
      config: what the stages were run with, as they recorded it: ``base`` and the groups ``data, sft, sample,
        reward_model, ppo`` (of PPO-ptx).

    Returns:
      Rows ``{"name", "paper", "source", "run", "why"}``.
    """
    p, s, r, data = (SimpleNamespace(**config[group]) for group in ("ppo", "sft", "reward_model", "data"))
    small = "two CPU cores and little time"
    simulated = ("10 + 10 simulated", "the truth is known in storyland")
    people = ("the crowds of HH-RLHF and OpenAssistant", "rankings that anyone can have")
    labelers = simulated if config["sample"]["labelers"] else people
    rows = [
        ("Policy", "1.3B, 6B and 175B parameters", "appendix C", str(config["base"]), small),
        ("Demonstrations", "12,725", "table 6", _amount(data, "demonstrations"), small),
        ("SFT epochs", "16", "appendix C.1", str(s.epochs), "chosen among the epochs that fit, by reward-model score"),
        ("SFT dropout", "0.2", "appendix C.1", str(s.dropout), "a small model has little to spare"),
        ("Prompts with rankings", "33,207", "table 6", _amount(data, "ranking_prompts"), small),
        ("Labelers", "about 40 people", "section 3.4", *labelers),
        ("Reward-model batch", "64 prompts", "appendix C.2", f"{r.batch_size} rows", "fewer prompts, enough steps"),
        ("Reward model size", "6B for every policy", "section 3.5", "the size of the policy", small),
        ("Episodes", "256,000", "appendix C.4", f"{p.iterations * p.episodes:,}", small),
        ("Episodes of an iteration", "512", "appendix C.4", str(p.episodes), small),
        ("Minibatch", "64", "appendix C.4", str(p.episodes // p.minibatches), "fewer episodes in an iteration"),
        ("Inner epochs", "1", "appendix C.4", str(p.epochs), ""),
        ("KL coefficient", "0.02", "appendix C.4", str(p.kl["coef"]), "a small reward model is easier to fool"),
        ("Pretraining coefficient", "27.8", "appendix C.4", str(p.ptx_coef), "chosen by the two logged gradient norms"),
        (
            "Pretraining rows an episode", "8", "appendix C.4", str(p.ptx_rows_per_episode),
            "rows of several documents; time",
        ),
        ("Gradient clipping", "not stated", "appendix C", "each term at 1.0", "a large term must not shrink the other"),
        ("Missing end of text", "not stated", "", f"score {p.missing_eos_score}", "Ziegler et al. 2019 use -1"),
        ("Average of weights", "decay 0.992", "appendix C.4", str(p.ema_decay), "a shorter run needs a shorter memory"),
        ("Learning rate of PPO", "2.55e-6 to 2.55e-5 swept", "appendix C.4", str(p.learning_rate), "a small model"),
        (
            "Schedule of PPO", "10 iterations of warm-up, then constant", "appendix C.4",
            f"{p.warmup_iterations} of warm-up (value network {p.value_warmup_iterations}), then {p.schedule}",
            "few steps, which have to settle",
        ),
        ("GAE lambda", "not stated", "0.95 in its parents", str(p.lam), "responses of 20 tokens"),
        ("Win rate against", "175B SFT", "section 3.6", "SFT of the same size", ""),
    ]  # fmt: skip
    keys = ("name", "paper", "source", "run", "why")
    return [dict(zip(keys, row, strict=True)) for row in rows if row[1] != row[3]]


def _amount(data: SimpleNamespace, name: str) -> str:
    """How many records the config asks for; people's own files have as many as they have."""
    value = getattr(data, name, None)
    return f"{value:,}" if isinstance(value, int) else "those of one's own files"
