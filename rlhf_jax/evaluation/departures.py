"""Where a run departs from the paper (Ouyang et al. 2022): a table of the report."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple


class Departure(NamedTuple):
    """A value of the paper that differs in the run.

    Attributes:
      name: what the value is.
      paper: the paper's value.
      source: where the paper gives it.
      run: the value of the run.
      why: the reason for another value.
    """

    name: str
    paper: str
    source: str
    run: str
    why: str


def departures(config: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of the table, one for each value that differs from the paper's.

    Args:
      config: the configs of the stages, as recorded by them: ``base`` and the groups ``data``,
        ``sft``, ``sample``, ``reward_model`` and ``ppo`` (that of PPO-ptx).

    Returns:
      Rows ``{"name", "paper", "source", "run", "why"}``.
    """
    groups = ("data", "sft", "sample", "reward_model", "ppo")
    data, sft, sample, reward_model, ppo = [SimpleNamespace(**config[name]) for name in groups]
    rows = [
        *_supervised(str(config["base"]), data, sft),
        *_reward_model(data, sample, reward_model),
        *_sizes_of_ppo(ppo),
        *_rules_of_ppo(ppo),
        Departure("Win rate against", "175B SFT", "section 3.6", "SFT of the same size", ""),
    ]
    # Compared as text, so a run that uses the paper's value must write it as the paper does.
    return [row._asdict() for row in rows if row.paper != row.run]


SMALL = "two CPU cores and little time"


def _supervised(base: str, data: SimpleNamespace, sft: SimpleNamespace) -> list[Departure]:
    demonstrations = _amount(data, "demonstrations")
    chosen = "chosen among the epochs that fit, by reward-model score"
    return [
        Departure("Policy", "1.3B, 6B and 175B parameters", "appendix C", base, SMALL),
        Departure("Demonstrations", "12,725", "table 6", demonstrations, SMALL),
        Departure("SFT epochs", "16", "appendix C.1", str(sft.epochs), chosen),
        Departure(
            "SFT dropout", "0.2", "appendix C.1", str(sft.dropout),
            "a small model has little to spare",
        ),
    ]  # fmt: skip


def _reward_model(
    data: SimpleNamespace,
    sample: SimpleNamespace,
    reward_model: SimpleNamespace,
) -> list[Departure]:
    labelers = "the crowds of HH-RLHF and OpenAssistant"
    why = "rankings that anyone can have"
    if sample.labelers:
        labelers, why = "10 + 10 simulated", "the truth is known in storyland"
    prompts = _amount(data, "ranking_prompts")
    batch = f"{reward_model.batch_size} rows"
    return [
        Departure("Prompts with rankings", "33,207", "table 6", prompts, SMALL),
        Departure("Labelers", "about 40 people", "section 3.4", labelers, why),
        Departure(
            "Reward-model batch", "64 prompts", "appendix C.2", batch, "fewer prompts, enough steps"
        ),
        Departure(
            "Reward model size", "6B for every policy", "section 3.5", "the size of the policy",
            SMALL,
        ),
    ]  # fmt: skip


def _sizes_of_ppo(ppo: SimpleNamespace) -> list[Departure]:
    episodes = f"{ppo.iterations * ppo.episodes:,}"
    minibatch = str(ppo.episodes // ppo.minibatches)
    fewer = "fewer episodes in an iteration"
    return [
        Departure("Episodes", "256,000", "appendix C.4", episodes, SMALL),
        Departure("Episodes of an iteration", "512", "appendix C.4", str(ppo.episodes), SMALL),
        Departure("Minibatch", "64", "appendix C.4", minibatch, fewer),
        Departure("Inner epochs", "1", "appendix C.4", str(ppo.epochs), ""),
    ]


def _rules_of_ppo(ppo: SimpleNamespace) -> list[Departure]:
    coefficient, rows = str(ppo.ptx_coef), str(ppo.ptx_rows_per_episode)
    average, missing = str(ppo.ema_decay), f"score {ppo.missing_eos_score}"
    warmup = f"{ppo.warmup_iterations} of warm-up (value network {ppo.value_warmup_iterations})"
    schedule = f"{warmup}, then {ppo.schedule}"
    return [
        Departure(
            "KL coefficient", "0.02", "appendix C.4", str(ppo.kl["coef"]),
            "a small reward model is easier to fool",
        ),
        Departure(
            "Pretraining coefficient", "27.8", "appendix C.4", coefficient,
            "chosen by the two logged gradient norms",
        ),
        Departure(
            "Pretraining rows an episode", "8", "appendix C.4", rows,
            "rows of several documents; time",
        ),
        Departure(
            "Gradient clipping", "not stated", "appendix C", "each term at 1.0",
            "a large term must not shrink the other",
        ),
        Departure(
            "Missing end of text", "not stated", "", missing, "Ziegler et al. 2019 use -1"
        ),
        Departure(
            "Average of weights", "decay 0.992", "appendix C.4", average,
            "a shorter run needs a shorter memory",
        ),
        Departure(
            "Learning rate of PPO", "2.55e-6 to 2.55e-5 swept", "appendix C.4",
            str(ppo.learning_rate), "a small model",
        ),
        Departure(
            "Schedule of PPO", "10 iterations of warm-up, then constant", "appendix C.4", schedule,
            "few steps, which have to settle",
        ),
        Departure(
            "GAE lambda", "not stated", "0.95 in its parents", str(ppo.lam),
            "responses of 20 tokens",
        ),
    ]  # fmt: skip


def _amount(data: SimpleNamespace, name: str) -> str:
    """The number of records in the config, if it has one."""
    value = getattr(data, name, None)
    return f"{value:,}" if isinstance(value, int) else "those of one's own files"
