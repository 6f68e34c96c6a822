"""Collect the values for the template of the report: results, metric rows and samples of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax import pages
from rlhf_jax.evaluation.report import figures
from rlhf_jax.evaluation.report.claims import claims
from rlhf_jax.evaluation.report.figures import MODELS, Rows
from rlhf_jax.evaluation.report.results import finite, interval, mapping, number
from rlhf_jax.pages.charts import percent_with_tenths
from rlhf_jax.run import files

TEMPLATE = "evaluation/report/report.html.jinja"

ANSWERS_SHOWN = 3
"""Number of prompts with visible answers; those of the others can be unfolded."""


def write_report(
    path: str | os.PathLike[str],
    results: Mapping[str, Any],
    history: Mapping[str, Rows] | Rows = (),
    samples: Sequence[Mapping[str, Any]] = (),
    departures: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the report as one HTML file, completely or not at all.

    Args:
      path: where to write, for example ``runs/instructgpt/report.html``.
      results: the numbers of `results.json`; the page lists those that are missing.
      history: metric rows by stage, ``{"ppo": [{"iteration": 0, "score": 0.1}, ...]}``, or one list
        of rows that each name their ``stage``.
      samples: ``{"prompt": str, "responses": {model: {"text": str, "gold_score": float}}}``, the
        best examples first.
      departures: ``{"name", "paper", "source", "run", "why"}``, one row for each departure from the
        paper.

    Returns:
      The path of the file.
    """
    page = render_report(results, history, samples, departures)
    path = Path(path)
    with files.written(path) as file:
        file.write(page)
    return path


def render_report(
    results: Mapping[str, Any],
    history: Mapping[str, Rows] | Rows = (),
    samples: Sequence[Mapping[str, Any]] = (),
    departures: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page of `write_report` as a string."""
    stages = _by_stage(history)
    return pages.render(
        TEMPLATE,
        headline=_headline(results),
        models=MODELS.values(),
        claims=claims(results),
        win_rates=figures.win_rates(results),
        answers=[_answers(sample) for sample in samples],
        answers_shown=ANSWERS_SHOWN,
        gold=figures.gold(results),
        training=figures.training(stages),
        policies=[MODELS[stage] for stage in figures.POLICIES if stages.get(stage)],
        tax=figures.tax(results),
        reward_model=figures.reward_model(results),
        best_of=_best_of(results),
        overoptimization=figures.overoptimization(results),
        other_stages=figures.other_stages(stages),
        departures=[_departure(row) for row in departures],
        cost=_cost(results),
        versions=list(_flat(mapping(results, "versions"))),
        config=list(_flat(mapping(results, "config"))),
    )


class _Headline(NamedTuple):
    """The win rate of the final model; `prompts` is 0 if their number is not known."""

    value: str
    low: str
    high: str
    prompts: int


def _headline(results: Mapping[str, Any]) -> _Headline | None:
    value, low, high = interval(results, "win_rate_vs_sft.ppo_ptx")
    if value is None or low is None or high is None:
        return None
    prompts = round(number(results, "win_rate_vs_sft.ppo_ptx.n") or 0)
    return _Headline(
        value=percent_with_tenths(value),
        low=percent_with_tenths(low),
        high=percent_with_tenths(high),
        prompts=prompts,
    )


class _Card(NamedTuple):
    """One model's answer to a prompt."""

    name: str
    color: str
    text: str
    score: str
    best: bool


class _Answers(NamedTuple):
    """A prompt and the answer of each model."""

    prompt: str
    cards: list[_Card]


def _answers(sample: Mapping[str, Any]) -> _Answers:
    responses = mapping(sample, "responses")
    scores = {key: number(responses, f"{key}.gold_score") for key in responses}
    # Several answers can share the best score; all of them are marked.
    best = max((score for score in scores.values() if score is not None), default=None)
    # The models of the report come first, in its order; other sampled models follow.
    ours = [key for key in MODELS if key in responses]
    others = [key for key in responses if key not in MODELS]
    cards = []
    for key in ours + others:
        score = scores[key]
        cards.append(
            _Card(
                name=MODELS[key].name if key in MODELS else str(key),
                color=MODELS[key].color if key in MODELS else "var(--soft)",
                text=str(mapping(responses, key).get("text", "")),
                score="" if score is None else f"{score:.2f}",
                best=score is not None and score == best,
            )
        )
    return _Answers(str(sample.get("prompt", "")), cards)


def _best_of(results: Mapping[str, Any]) -> str:
    """The values of n for which best-of-n was measured."""
    counts = mapping(results, "best_of_n").get("n") or ()
    return ", ".join(f"{n:g}" if finite(n) else str(n) for n in counts) or "not given"


def _departure(row: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(row.get(key, "")) for key in ("name", "paper", "run", "why", "source")}


class _Cost(NamedTuple):
    """Time and memory of a run; `compiling` and `memory` are empty if they were not measured."""

    total: str
    compiling: str
    memory: str
    charts: list[figures.Figure]


def _cost(results: Mapping[str, Any]) -> _Cost | None:
    seconds = {k: float(v) for k, v in mapping(results, "seconds").items() if finite(v)}
    # "total" and "compile" are over all stages and no stages themselves.
    stages = {k: v for k, v in seconds.items() if k not in ("total", "compile")}
    if not stages:
        return None
    memory = number(results, "peak_memory_mb")
    return _Cost(
        total=_duration(seconds.get("total", sum(stages.values()))),
        compiling=_duration(seconds["compile"]) if "compile" in seconds else "",
        memory="" if memory is None else f"{memory:,.0f}",
        charts=figures.time_of_stages(stages, _duration),
    )


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds % 60:02d} s"


def _by_stage(history: Mapping[str, Rows] | Rows) -> dict[str, Rows]:
    if isinstance(history, Mapping):
        return dict(history)
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for row in history:
        stages.setdefault(str(row.get("stage", "run")), []).append(row)
    return {**stages}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested mappings by dotted keys."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
