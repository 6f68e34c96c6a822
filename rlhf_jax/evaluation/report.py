"""One self-contained `report.html` for a run: what was learnt, how it was measured, where it departs from the paper.

The page loads nothing from elsewhere, runs no script, follows the reader's light or dark setting and fits a phone. What
a run did not measure is said in place of its chart. `docs/results_schema.md` describes every key that is read here.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.evaluation import charts
from rlhf_jax.evaluation.charts import Bar, Line, decimals, percent, percent_with_tenths
from rlhf_jax.evaluation.page import PAGE, STYLE
from rlhf_jax.run import files


class _Kind(NamedTuple):
    """How a model is named, coloured and explained; the colours are the same in every chart."""

    name: str
    meaning: str

    def color(self, key: str) -> str:
        return f"var(--{key.replace('_', '-')})"


MODELS: dict[str, _Kind] = {
    "base": _Kind("base", "the pretrained model, given the bare instruction"),
    "prompted_base": _Kind("prompted base", "the same model after a few worked examples"),
    "sft": _Kind("SFT", "fine-tuned on demonstrations"),
    "best_of_4": _Kind("best of 4", "SFT, the reward model picks one of four answers"),
    "ppo": _Kind("PPO", "SFT, then reinforcement learning against the reward model"),
    "ppo_ptx": _Kind("PPO-ptx", "PPO with pretraining text mixed into every update"),
}

WIN_RATES = {
    "win_rate_vs_sft": "by the gold scorer",
    "win_rate_vs_sft_length_controlled": "by the gold scorer, at equal length",
    "win_rate_vs_sft_by_reward_model": "by the reward model",
}

CURVES = {
    "score": ("Reward-model score", "score"),
    "gold_score": ("Gold score", "gold score"),
    "kl": ("KL to the reference", "nats per sequence"),
    "response_tokens": ("Length of answers", "tokens"),
    "pretraining_loss": ("Held-out pretraining loss", "nats per token"),
    "loss": ("Training loss", "loss"),
    "validation_loss": ("Validation loss", "nats per token"),
    "accuracy": ("Accuracy", "share of pairs"),
}

SMOOTH = 2
"""Iterations on either side over which a curve of PPO is averaged: each has other prompts, and the points scatter."""

REQUIRED = (
    *(
        f"{rate}.{m}.{x}"
        for rate in WIN_RATES
        for m in ("base", "prompted_base", "ppo", "ppo_ptx")
        for x in ("value", "low", "high")
    ),
    *(f"gold_score.{m}" for m in ("base", "prompted_base", "sft", "ppo", "ppo_ptx")),
    *(f"response_tokens.{m}" for m in ("base", "prompted_base", "sft", "ppo", "ppo_ptx")),
    *(f"pretraining_loss.{m}" for m in ("base", "sft", "ppo", "ppo_ptx")),
    *(f"rm_accuracy.{g}.{x}" for g in ("train_labelers", "heldout_labelers") for x in ("value", "low", "high")),
    "labeler_agreement.train",
    "labeler_agreement.heldout",
    "kl.ppo",
    "kl.ppo_ptx",
    "peak_memory_mb",
)
"""Dotted keys of `results.json` that hold one finite number each."""

REQUIRED_MAPPINGS = ("gold_parts", "seconds", "config", "versions")


def check_results(results: Mapping[str, Any]) -> list[str]:
    """Names what `results` lacks: dotted keys that are absent, or not a finite number where one is due.

    Args:
      results: as written to `results.json` (docs/results_schema.md).

    Returns:
      Dotted keys in the order of the schema; empty when the results are complete.

    >>> check_results({})[0]
    'win_rate_vs_sft.base.value'
    """
    missing = [key for key in REQUIRED if _number(results, key) is None]
    return missing + [key for key in REQUIRED_MAPPINGS if not _mapping(results, key)]


def write_report(
    path: str | os.PathLike[str],
    results: Mapping[str, Any],
    history: Mapping[str, Sequence[Mapping[str, Any]]] | Sequence[Mapping[str, Any]] = (),
    samples: Sequence[Mapping[str, Any]] = (),
    departures: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes the report as one HTML file, whole or not at all.

    Args:
      path: where to write, for example ``runs/instructgpt/report.html``.
      results: the numbers of `results.json`; whatever is missing is said on the page.
      history: metric rows by stage, ``{"ppo": [{"iteration": 0, "score": 0.1, "kl": 0.0}, ...]}``, or one list of rows
        that each name their ``stage``.
      samples: ``{"prompt": str, "responses": {model: {"text": str, "gold_score": float}}}``, the best examples first.
      departures: ``{"name", "paper", "source", "run", "why"}``, one row for each departure from the paper.

    Returns:
      The path written.
    """
    page = render_report(results, history, samples, departures)
    path = Path(path)
    with files.written(path) as file:
        file.write(page)
    return path


def render_report(
    results: Mapping[str, Any],
    history: Mapping[str, Sequence[Mapping[str, Any]]] | Sequence[Mapping[str, Any]] = (),
    samples: Sequence[Mapping[str, Any]] = (),
    departures: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page of `write_report` as a string."""
    stages = _by_stage(history)
    sections = [
        ("verdicts", "What came out", _verdicts(results)),
        ("win-rates", "Which model is preferred", _win_rates(results)),
        ("answers", "The same prompts, answered by every model", _answers(samples)),
        ("gold", "What got better", _gold(results)),
        ("training", "Reinforcement learning, step by step", _training(stages)),
        ("tax", "The alignment tax", _tax(results)),
        ("reward-model", "Can the reward model be trusted?", _reward_model(results)),
        ("over-optimisation", "Over-optimisation", _overoptimization(results)),
        ("stages", "Supervised fine-tuning and the reward model", _other_stages(stages)),
        ("departures", "Where this run departs from the paper", _departures(departures)),
        ("cost", "What it cost", _cost(results)),
        ("setup", "Versions and configuration", _setup(results)),
    ]
    nav = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{inner}</section>' for name, title, inner in sections)
    return PAGE.format(style=STYLE, summary=_summary(results), models=_model_list(), nav=nav, body=body)


# The parts of the page, in reading order.


def _summary(results: Mapping[str, Any]) -> str:
    rate = [_number(results, f"win_rate_vs_sft.ppo_ptx.{x}") for x in ("value", "low", "high")]
    if any(x is None for x in rate):
        return "This run has no win rate for PPO-ptx yet: it was stopped early, or its evaluation is still to come."
    value, low, high = (percent_with_tenths(x or 0.0) for x in rate)
    count = _number(results, "win_rate_vs_sft.ppo_ptx.n")
    prompts = f"{count:.0f} test prompts" if count else "the test prompts"
    return (
        f"On {prompts} the final model, PPO-ptx, is preferred to supervised fine-tuning <strong>{value}</strong> of "
        f"the time (95% interval {low} to {high}; 50% would mean no difference)."
    )


def _model_list() -> str:
    rows = (f'<dt style="--c:{k.color(key)}">{k.name}</dt><dd>{k.meaning}</dd>' for key, k in MODELS.items())
    return f'<dl class="models">{"".join(rows)}</dl>'


def _verdicts(results: Mapping[str, Any]) -> str:
    rows = []
    for claim, seen, detail in _claims(results):
        word, mark = ("open", "?") if seen is None else ("yes", "✓") if seen else ("no", "✗")
        rows.append(
            f'<li class="{word}"><b aria-hidden="true">{mark}</b><div><span>{claim}</span>'
            f"<small>{_VERDICT_WORDS[word]}. {detail}</small></div></li>"
        )
    return (
        "<p>The claims of the paper that a run of this size can check, judged by the numbers below. A claim "
        f'counts as seen only when the numbers of this one run say so.</p><ul class="verdicts">{"".join(rows)}</ul>'
    )


_VERDICT_WORDS = {"yes": "Seen", "no": "Not seen", "open": "Not measured"}


def _claims(results: Mapping[str, Any]) -> Iterator[tuple[str, bool | None, str]]:
    """Claim, whether it was seen (None: not measured), and the numbers that say so."""

    def judge(claim: str, keys: Sequence[str], test: Any, detail: str) -> tuple[str, bool | None, str]:
        numbers = [_number(results, key) for key in keys]
        if any(x is None for x in numbers):
            return claim, None, "Its numbers are missing from this run."
        return claim, bool(test(*numbers)), detail.format(*numbers)

    win, equal, loss, rm = "win_rate_vs_sft", "win_rate_vs_sft_length_controlled", "pretraining_loss", "rm_accuracy"
    yield judge(
        "Preference rises from base to prompted base to SFT to PPO-ptx.",
        [f"{win}.base.value", f"{win}.prompted_base.value", f"{win}.ppo_ptx.value"],
        lambda base, prompted, ptx: base < prompted < 0.5 < ptx,
        "Win rates against SFT: base {0:.1%}, prompted base {1:.1%}, PPO-ptx {2:.1%}.",
    )
    yield judge(
        "PPO-ptx beats SFT beyond chance, and not by length alone.",
        [f"{win}.ppo_ptx.low", f"{equal}.ppo_ptx.low"],
        lambda plain, controlled: min(plain, controlled) > 0.5,
        "Lower ends of the 95% intervals: {0:.1%}, and {1:.1%} at equal length.",
    )
    yield judge(
        "PPO forgets pretraining text; mixing it in (PPO-ptx) prevents part of that.",
        [f"{loss}.ppo", f"{loss}.ppo_ptx"],
        lambda ppo, ptx: ppo > ptx,
        "Held-out loss: PPO {0:.3f}, PPO-ptx {1:.3f} nats per token.",
    )
    yield judge(
        "The reward model agrees with labelers it never learnt from.",
        [f"{rm}.train_labelers.value", f"{rm}.heldout_labelers.value"],
        lambda train, heldout: train - heldout <= 0.05 and min(train, heldout) > 0.6,
        "Accuracy {0:.1%} on training labelers, {1:.1%} on held-out ones.",
    )
    yield judge(
        "The policy stays near the model that it started from.",
        ["kl.ppo", "kl.ppo_ptx"],
        lambda ppo, ptx: max(ppo, ptx) < 30,
        "KL: PPO {0:.1f}, PPO-ptx {1:.1f} nats per sequence; the limit set for this check is 30.",
    )


def _win_rates(results: Mapping[str, Any]) -> str:
    figures = []
    for rate, title in WIN_RATES.items():
        bars = _interval_bars(_mapping(results, rate))
        if bars:
            svg = charts.bar_chart(
                bars,
                title=f"Win rate against SFT {title}",
                maximum=1.0,
                reference=0.5,
                reference_label="SFT",
                text=percent_with_tenths,
            )
            figures.append(_figure(svg, title[0].upper() + title[1:]))
    return _grid(
        figures,
        "How often each model's answer is preferred to SFT's answer to the same test prompt, ties counted half. At the "
        "dashed line a model is as good as SFT. Thin lines are 95% intervals over prompts. The gold scorer is the "
        "yardstick: no model was trained on it. The reward model is what PPO was trained to please, so its opinion "
        "flatters PPO. The middle chart asks what would be left of the win if answers were equally long.",
    )


def _interval_bars(rates: Mapping[str, Any]) -> list[Bar]:
    bars = []
    for key, kind in MODELS.items():
        value, low, high = (_number(rates, f"{key}.{x}") for x in ("value", "low", "high"))
        if value is not None:
            bars.append(Bar(kind.name, value, kind.color(key), low, high))
    return bars


def _answers(samples: Sequence[Mapping[str, Any]], shown: int = 3) -> str:
    if not samples:
        return _missing("No answers were kept in this run.")
    items = [_answer(sample) for sample in samples]
    more = "".join(items[shown:])
    rest = f"<details><summary>More prompts ({len(items) - shown})</summary>{more}</details>" if more else ""
    lead = (
        "Test prompts that no model was trained on, and what each model wrote. The number is the answer's gold score; "
        "the highest of a prompt is in bold."
    )
    return f"<p>{lead}</p>{''.join(items[:shown])}{rest}"


def _answer(sample: Mapping[str, Any]) -> str:
    responses = _mapping(sample, "responses")
    scores = {key: _number(responses, f"{key}.gold_score") for key in responses}
    best = max((s for s in scores.values() if s is not None), default=None)
    cards = []
    for key in [k for k in MODELS if k in responses] + [k for k in responses if k not in MODELS]:
        kind = MODELS.get(key, _Kind(str(key), ""))
        score = scores[key]
        chip = (
            ""
            if score is None
            else f"<{'b' if score == best else 'span'}>{score:.2f}</{'b' if score == best else 'span'}>"
        )
        text = html.escape(str(_mapping(responses, key).get("text", "")))
        color = kind.color(key) if key in MODELS else "var(--soft)"
        body = f"<pre>{text}</pre>" if text.strip() else '<pre class="empty">(nothing)</pre>'
        cards.append(
            f'<div class="card" style="--c:{color}"><header>{html.escape(kind.name)}{chip}</header>{body}</div>'
        )
    prompt = html.escape(str(sample.get("prompt", "")))
    return f'<article><pre class="prompt">{prompt}</pre><div class="cards">{"".join(cards)}</div></article>'


def _gold(results: Mapping[str, Any]) -> str:
    figures = []
    total = _bars(_mapping(results, "gold_score"))
    if total:
        svg = charts.bar_chart(total, title="Gold score", maximum=_unit(total), text=decimals(2))
        figures.append(_figure(svg, "Gold score, all parts together"))
    parts = _mapping(results, "gold_parts")
    for part in dict.fromkeys(p for model in parts.values() if isinstance(model, Mapping) for p in model):
        bars = _bars({model: _number(parts, f"{model}.{part}") for model in parts})
        if bars:
            name = str(part).replace("_", " ")
            svg = charts.bar_chart(bars, title=f"Gold score, {name}", maximum=_unit(bars), text=decimals(2))
            figures.append(_figure(svg, html.escape(name[0:1].upper() + name[1:])))
    lengths = _bars(_mapping(results, "response_tokens"))
    if lengths:
        svg = charts.bar_chart(lengths, title="Length of answers", text=decimals(0))
        figures.append(_figure(svg, "For comparison: length of answers, tokens"))
    return _grid(
        figures,
        "The gold score and the readable parts that it is made of, averaged over the test prompts; longer bars are "
        "better. A model that gains in several parts follows instructions better; one that gains in a single part may "
        "have found a trick.",
    )


def _training(stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    rows = {key: stages[key] for key in ("ppo", "ppo_ptx") if stages.get(key)}
    figures = []
    for key in ("score", "gold_score"):
        lines = [_line(stage, rows[stage], "kl", key, smooth=SMOOTH) for stage in rows]
        if any(line.points for line in lines):
            title = f"{CURVES[key][0]} against KL"
            svg = charts.line_chart(
                lines, title=title, x_label="KL to the reference, nats per sequence", y_label=CURVES[key][1]
            )
            figures.append(_figure(svg, title))
    figures += _curve_figures(rows, ("score", "gold_score", "kl", "response_tokens", "pretraining_loss"), smooth=SMOOTH)
    names = charts.legend([(MODELS[key].name, MODELS[key].color(key)) for key in rows])
    return _grid(
        figures,
        "The first charts show what was bought (score) for what was paid (distance from the starting policy, KL): up "
        "and to the left is cheap progress. Where the reward model's score still rises while the gold score falls, the "
        "policy is fooling the reward model. The others follow the same run over its iterations. A point is one "
        "iteration with prompts of its own; the line is the mean over five of them.",
        names,
    )


def _tax(results: Mapping[str, Any]) -> str:
    bars = _bars(_mapping(results, "pretraining_loss"))
    figures = []
    if bars:
        svg = charts.bar_chart(bars, title="Held-out pretraining loss", text=decimals(3))
        figures.append(_figure(svg, "Held-out pretraining loss, nats per token"))
    return _grid(
        figures,
        "How well each model still predicts the kind of text it was pretrained on; shorter is better. What a model "
        "loses against base is the price of its alignment. PPO-ptx trains on pretraining text beside the reward, to "
        "keep that price low.",
    )


def _reward_model(results: Mapping[str, Any]) -> str:
    bars = []
    known = {"train_labelers": "RM, training", "heldout_labelers": "RM, held-out"}
    for group in dict.fromkeys([*known, *_mapping(results, "rm_accuracy")]):
        value, low, high = (_number(results, f"rm_accuracy.{group}.{x}") for x in ("value", "low", "high"))
        agreement = _number(results, f"labeler_agreement.{group.removesuffix('_labelers')}")
        if value is not None:
            label = known.get(group, f"RM, {group.removeprefix('held_out_')}")
            bars.append(Bar(label, value, "var(--reward-model)", low, high))
        if agreement is not None:
            bars.append(Bar("agreement", agreement, "var(--base)"))
    length = _number(results, "length_only_accuracy")
    bars += [] if length is None else [Bar("longer wins", length, "var(--faint)")]
    figures = []
    if bars:
        svg = charts.bar_chart(
            bars, title="Reward-model accuracy", maximum=1.0, reference=0.5, reference_label="chance", text=percent
        )
        figures.append(_figure(svg, "Share of pairs ordered as the labeler did"))
    figures += _calibration(_mapping(results, "calibration"))
    return _grid(
        figures,
        "Accuracy on pairs that the reward model never saw, ranked by the labelers it learnt from (training) and by "
        "others (held-out). The grey bar below each is how often two such labelers agree with each other: a reward "
        "model cannot be expected to do better. “Longer wins” is the rule that prefers the longer answer. Calibration: "
        "points on the dashed line mean that a pair it calls 80% sure is ordered right 80% of the time; points below "
        "it mean overconfidence.",
    )


def _calibration(calibration: Mapping[str, Any]) -> list[str]:
    predicted, observed = calibration.get("predicted"), calibration.get("observed")
    if not predicted or not observed:
        return []
    points = sorted((float(p), float(o)) for p, o in zip(predicted, observed, strict=True) if _finite(p) and _finite(o))
    low = min([0.5, *(o for _, o in points)])
    lines = [
        Line("perfect", "", [(0.5, 0.5), (1.0, 1.0)], dashed=True),
        Line("reward model", "var(--reward-model)", points),
    ]
    svg = charts.line_chart(
        lines,
        title="Calibration",
        x_label="predicted",
        y_label="observed",
        x_range=(0.5, 1.0),
        y_range=(low, 1.0),
        text=percent,
    )
    return [_figure(svg, "Calibration of the reward model")]


def _overoptimization(results: Mapping[str, Any]) -> str:
    curve = _mapping(results, "best_of_n")
    kl = curve.get("kl") or ()
    figures = []
    for key, title, color in (
        ("proxy", "Reward model's opinion", "--reward-model"),
        ("gold", "Gold score", "--best-of-4"),
    ):
        points = [
            (float(x), float(y)) for x, y in zip(kl, curve.get(key) or (), strict=False) if _finite(x) and _finite(y)
        ]
        if len(points) > 1:
            svg = charts.line_chart(
                [Line(title, f"var({color})", points)], title=title, x_label="KL of best-of-n, nats", y_label="score"
            )
            figures.append(_figure(svg, f"{title} of the best of n"))
    n = html.escape(", ".join(f"{x:g}" if _finite(x) else str(x) for x in curve.get("n") or ())) or "not given"
    return _grid(
        figures,
        f"The SFT model answers n times and the reward model keeps the answer it likes best (n = {n}, left to right). "
        "Its own opinion of the winner always rises. If the gold score flattens or falls, choosing harder no longer "
        "finds better answers but mistakes of the reward model.",
    )


def _other_stages(stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    figures = []
    for stage, rows in stages.items():
        if stage not in ("ppo", "ppo_ptx") and rows:
            figures += _curve_figures({stage: rows}, tuple(CURVES), prefix=f"{_stage_name(stage)}: ")
    return _grid(
        figures,
        "The stages before reinforcement learning. The SFT model that everything is compared with is the checkpoint "
        "whose answers to validation prompts the reward model likes best: validation loss often turns up after an "
        "epoch or two while the answers still improve.",
    )


def _departures(departures: Sequence[Mapping[str, Any]]) -> str:
    if not departures:
        return _missing("This run did not list its departures.")
    names = {"name": "What", "paper": "Paper", "run": "This run", "why": "Why", "source": "Source"}
    head = "".join(f"<th>{label}</th>" for label in names.values())
    rows = "".join(
        "<tr>"
        + "".join(f'<td data-label="{label}">{html.escape(str(row.get(k, "")))}</td>' for k, label in names.items())
        + "</tr>"
        for row in departures
    )
    return (
        "<p>The method is the paper's; the sizes are those of a small machine. Every number that differs:</p>"
        f'<table class="stack"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    )


def _cost(results: Mapping[str, Any]) -> str:
    seconds = {k: float(v) for k, v in _mapping(results, "seconds").items() if _finite(v)}
    stages = {k: v for k, v in seconds.items() if k not in ("total", "compile")}
    if not stages:
        return _missing("No times were kept in this run.")
    total = seconds.get("total", sum(stages.values()))
    bars = [Bar(_stage_name(k), v, "var(--base)") for k, v in stages.items()]
    memory = _number(results, "peak_memory_mb")
    lead = f"{_duration(total)} in all"
    lead += f", of which {_duration(seconds['compile'])} compiling" if "compile" in seconds else ""
    lead += f"; at most {memory:,.0f} MB of memory" if memory is not None else ""
    svg = charts.bar_chart(bars, title="Time per stage", text=_duration)
    return f'<p>{lead}.</p><div class="grid">{_figure(svg, "Time per stage")}</div>'


def _setup(results: Mapping[str, Any]) -> str:
    parts = []
    for key, title in (("versions", "Versions"), ("config", "Configuration")):
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in _flat(_mapping(results, key))
        )
        if rows:
            parts.append(f'<details><summary>{title}</summary><table class="keys">{rows}</table></details>')
    return "".join(parts) or _missing("This run recorded neither versions nor configuration.")


# Small pieces of HTML and careful readers of nested results.


def _figure(svg: str, caption: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def _grid(figures: Sequence[str], lead: str, legend: str = "") -> str:
    if not figures:
        return _missing("This run has no numbers for this part: it was stopped before, or the part was switched off.")
    return f'<p>{lead}</p>{legend}<div class="grid">{"".join(figures)}</div>'


def _missing(text: str) -> str:
    return f'<p class="missing">{text}</p>'


def _bars(values: Mapping[str, Any]) -> list[Bar]:
    return [Bar(k.name, float(values[key]), k.color(key)) for key, k in MODELS.items() if _finite(values.get(key))]


def _unit(bars: Sequence[Bar]) -> float | None:
    """Scores within 0..1 share the axis 0..1, so that charts can be compared."""
    return 1.0 if all(b.value <= 1 for b in bars) else None


def _curve_figures(
    stages: Mapping[str, Sequence[Mapping[str, Any]]], keys: Iterable[str], prefix: str = "", smooth: int = 0
) -> list[str]:
    figures = []
    for key in keys:
        step = next((s for s in ("iteration", "epoch", "step") for rows in stages.values() if s in rows[0]), "step")
        lines = [_line(stage, rows, step, key, smooth=smooth) for stage, rows in stages.items()]
        if any(len(line.points) > 1 for line in lines):
            title = prefix + CURVES[key][0]
            svg = charts.line_chart(lines, title=title, x_label=step, y_label=CURVES[key][1])
            figures.append(_figure(svg, html.escape(title[0].upper() + title[1:])))
    return figures


def _stage_name(stage: str) -> str:
    return MODELS[stage].name if stage in MODELS else stage.replace("_", " ")


def _line(stage: str, rows: Sequence[Mapping[str, Any]], x: str, y: str, *, smooth: int = 0) -> Line:
    """A curve, smoothed where there are points enough: held-out loss is measured every few iterations only."""
    points = [(float(row[x]), float(row[y])) for row in rows if _finite(row.get(x)) and _finite(row.get(y))]
    kind = MODELS.get(stage)
    return Line(
        kind.name if kind else stage,
        kind.color(stage) if kind else "var(--sft)",
        points,
        smooth=smooth if len(points) > 10 else 0,
    )


def _by_stage(
    history: Mapping[str, Sequence[Mapping[str, Any]]] | Sequence[Mapping[str, Any]],
) -> dict[str, Sequence[Mapping[str, Any]]]:
    if isinstance(history, Mapping):
        return dict(history)
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for row in history:
        stages.setdefault(str(row.get("stage", "run")), []).append(row)
    return {**stages}


def _finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _number(results: Mapping[str, Any], key: str) -> float | None:
    """The finite number at a dotted key, or None."""
    value: Any = results
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if _finite(value) else None


def _mapping(results: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = results.get(key)
    return value if isinstance(value, Mapping) else {}


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds % 60:02d} s"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
