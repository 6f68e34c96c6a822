"""The charts of each section of the report, from the results and the metric rows of the stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.evaluation.report.results import WIN_RATES, finite, interval, mapping, number, pairs
from rlhf_jax.pages import charts
from rlhf_jax.pages.charts import Bar, Line, decimals, percent, percent_with_tenths

Rows = Sequence[Mapping[str, Any]]
"""Metric rows of one stage."""


class ShownModel(NamedTuple):
    """Name, explanation and colour of a model; the colours are the same in every chart."""

    name: str
    meaning: str
    color: str


MODELS = {
    "base": ShownModel(
        "base", "the pretrained model, given the bare instruction", "var(--base)"
    ),
    "prompted_base": ShownModel(
        "prompted base", "the same model after a few worked examples", "var(--prompted-base)"
    ),
    "sft": ShownModel(
        "SFT", "fine-tuned on demonstrations", "var(--sft)"
    ),
    "best_of_4": ShownModel(
        "best of 4", "SFT, the reward model picks one of four answers", "var(--best-of-4)"
    ),
    "ppo": ShownModel(
        "PPO", "SFT, then reinforcement learning against the reward model", "var(--ppo)"
    ),
    "ppo_ptx": ShownModel(
        "PPO-ptx", "PPO with pretraining text mixed into every update", "var(--ppo-ptx)"
    ),
}  # fmt: skip

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
"""Metrics that are plotted: the title of the chart and the unit of its axis."""

POLICIES = ("ppo", "ppo_ptx")

SMOOTH = 2
"""Neighbours on either side over which a curve of PPO is averaged.

Each iteration has its own prompts, so the points scatter.
"""


class Figure(NamedTuple):
    """A chart (markup) with its caption (text)."""

    caption: str
    svg: str


def win_rates(results: Mapping[str, Any]) -> list[Figure]:
    """Win rates against SFT, one chart for each judge."""
    figures = []
    for rate, title in WIN_RATES.items():
        bars = []
        for key, model in MODELS.items():
            value, low, high = interval(mapping(results, rate), key)
            if value is not None:
                bars.append(Bar(model.name, value, model.color, low, high))
        if bars:
            svg = charts.bar_chart(
                bars,
                title=f"Win rate against SFT {title}",
                maximum=1.0,
                reference=0.5,
                reference_label="SFT",
                text=percent_with_tenths,
            )
            figures.append(Figure(_capital(title), svg))
    return figures


def gold(results: Mapping[str, Any]) -> list[Figure]:
    """The gold score, each of its parts, and the length of the answers."""
    total = mapping(results, "gold_score")
    figures = _scores("Gold score", total, "Gold score, all parts together")
    parts = mapping(results, "gold_parts")
    # Every part that some model has, in the order in which the models first name them.
    names: dict[str, None] = {}
    for by_model in parts.values():
        if isinstance(by_model, Mapping):
            names |= dict.fromkeys(by_model)
    for part in names:
        values = {model: number(parts, f"{model}.{part}") for model in parts}
        name = str(part).replace("_", " ")
        figures += _scores(f"Gold score, {name}", values, _capital(name))
    lengths = _bars(mapping(results, "response_tokens"))
    if lengths:
        svg = charts.bar_chart(lengths, title="Length of answers", text=decimals(0))
        figures.append(Figure("For comparison: length of answers, tokens", svg))
    return figures


def training(stages: Mapping[str, Rows]) -> list[Figure]:
    """Reinforcement learning: scores against KL, then every curve over iterations."""
    policies = {stage: stages[stage] for stage in POLICIES if stages.get(stage)}
    figures = []
    for key in ("score", "gold_score"):
        name, unit = CURVES[key]
        lines = [_line(stage, rows, "kl", key, smooth=SMOOTH) for stage, rows in policies.items()]
        if any(line.points for line in lines):
            title = f"{name} against KL"
            x_label = "KL to the reference, nats per sequence"
            svg = charts.line_chart(lines, title=title, x_label=x_label, y_label=unit)
            figures.append(Figure(title, svg))
    keys = ("score", "gold_score", "kl", "response_tokens", "pretraining_loss")
    return figures + _curves(policies, keys, smooth=SMOOTH)


def tax(results: Mapping[str, Any]) -> list[Figure]:
    """Held-out pretraining loss of every model."""
    bars = _bars(mapping(results, "pretraining_loss"))
    if not bars:
        return []
    svg = charts.bar_chart(bars, title="Held-out pretraining loss", text=decimals(3))
    return [Figure("Held-out pretraining loss, nats per token", svg)]


def reward_model(results: Mapping[str, Any]) -> list[Figure]:
    """Accuracy of the reward model compared with the labelers' agreement, and its calibration."""
    bars = []
    known = {"train_labelers": "RM, training", "heldout_labelers": "RM, held-out"}
    for group in dict.fromkeys([*known, *mapping(results, "rm_accuracy")]):
        value, low, high = interval(results, f"rm_accuracy.{group}")
        agreement = number(results, f"labeler_agreement.{group.removesuffix('_labelers')}")
        if value is not None:
            label = known.get(group, f"RM, {group.removeprefix('held_out_')}")
            bars.append(Bar(label, value, "var(--reward-model)", low, high))
        if agreement is not None:
            bars.append(Bar("agreement", agreement, "var(--base)"))
    length = number(results, "length_only_accuracy")
    if length is not None:
        bars.append(Bar("longer wins", length, "var(--faint)"))
    figures = []
    if bars:
        svg = charts.bar_chart(
            bars,
            title="Reward-model accuracy",
            maximum=1.0,
            reference=0.5,
            reference_label="chance",
            text=percent,
        )
        figures.append(Figure("Share of pairs ordered as the labeler did", svg))
    return figures + _calibration(mapping(results, "calibration"))


def _calibration(calibration: Mapping[str, Any]) -> list[Figure]:
    points = sorted(pairs(calibration.get("predicted"), calibration.get("observed")))
    if not points:
        return []
    lowest = min([0.5, *(observed for _, observed in points)])
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
        y_range=(lowest, 1.0),
        text=percent,
    )
    return [Figure("Calibration of the reward model", svg)]


def overoptimization(results: Mapping[str, Any]) -> list[Figure]:
    """Best of n: the proxy score and the gold score of the chosen answer, against its KL."""
    curve = mapping(results, "best_of_n")
    figures = []
    for key, title, color in (
        ("proxy", "Reward-model score", "var(--reward-model)"),
        ("gold", "Gold score", "var(--best-of-4)"),
    ):
        points = pairs(curve.get("kl"), curve.get(key))
        if len(points) > 1:
            line = Line(title, color, points)
            svg = charts.line_chart(
                [line],
                title=title,
                x_label="KL of best-of-n, nats",
                y_label="score",
            )
            figures.append(Figure(f"{title} of the best of n", svg))
    return figures


def other_stages(stages: Mapping[str, Rows]) -> list[Figure]:
    """The curves of every stage before reinforcement learning."""
    figures = []
    for stage, rows in stages.items():
        if stage not in POLICIES and rows:
            figures += _curves({stage: rows}, tuple(CURVES), prefix=f"{stage_name(stage)}: ")
    return figures


def time_of_stages(seconds: Mapping[str, float], text: charts.Format) -> list[Figure]:
    """Wall time of every stage."""
    bars = [Bar(stage_name(stage), value, "var(--base)") for stage, value in seconds.items()]
    return [Figure("Time per stage", charts.bar_chart(bars, title="Time per stage", text=text))]


def stage_name(stage: str) -> str:
    """The name of a stage on the page."""
    return MODELS[stage].name if stage in MODELS else stage.replace("_", " ")


def _capital(text: str) -> str:
    """The text with a capital letter at its beginning."""
    return text[:1].upper() + text[1:]


def _bars(values: Mapping[str, Any]) -> list[Bar]:
    shown = {key: model for key, model in MODELS.items() if finite(values.get(key))}
    return [Bar(model.name, float(values[key]), model.color) for key, model in shown.items()]


def _scores(title: str, values: Mapping[str, Any], caption: str) -> list[Figure]:
    """One chart of scores; scores within 0..1 get that axis, so that charts can be compared."""
    bars = _bars(values)
    if not bars:
        return []
    maximum = 1.0 if all(bar.value <= 1 for bar in bars) else None
    svg = charts.bar_chart(bars, title=title, maximum=maximum, text=decimals(2))
    return [Figure(caption, svg)]


def _curves(
    stages: Mapping[str, Rows],
    keys: Iterable[str],
    *,
    prefix: str = "",
    smooth: int = 0,
) -> list[Figure]:
    """A chart for each metric of `keys` that has at least two points."""
    figures = []
    step = _step_name(stages)
    for key in keys:
        lines = [_line(stage, rows, step, key, smooth=smooth) for stage, rows in stages.items()]
        if any(len(line.points) > 1 for line in lines):
            name, unit = CURVES[key]
            svg = charts.line_chart(lines, title=prefix + name, x_label=step, y_label=unit)
            figures.append(Figure(_capital(prefix + name), svg))
    return figures


def _step_name(stages: Mapping[str, Rows]) -> str:
    """The column that counts the steps of these stages."""
    for name in ("iteration", "epoch", "step"):
        if any(name in rows[0] for rows in stages.values()):
            return name
    return "step"


def _line(stage: str, rows: Rows, x: str, y: str, *, smooth: int = 0) -> Line:
    """A curve of one stage.

    It is smoothed if it has more than ten points; the held-out loss, measured only every few
    iterations, has fewer.
    """
    points = pairs([row.get(x) for row in rows], [row.get(y) for row in rows])
    model = MODELS.get(stage)
    smooth = smooth if len(points) > 10 else 0
    if model is None:
        return Line(stage, "var(--sft)", points, smooth=smooth)
    return Line(model.name, model.color, points, smooth=smooth)
