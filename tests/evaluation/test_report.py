import copy
import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from rlhf_jax.evaluation.report import check_results, render_report, write_report
from rlhf_jax.pages import charts
from tests.evaluation import sample_run
from tests.html_page import Page


def _full(**changes) -> str:
    parts = {
        "results": sample_run.results(),
        "history": sample_run.history(),
        "samples": sample_run.samples(),
        "departures": sample_run.departures(),
    }
    return render_report(**(parts | changes))


def test_whole_report_is_one_self_contained_file(tmp_path: Path):
    parts = (
        sample_run.results(),
        sample_run.history(),
        sample_run.samples(),
        sample_run.departures(),
    )
    path = write_report(tmp_path / "run" / "report.html", *parts)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    page = Page(path.read_text(encoding="utf-8"))
    assert not {"script", "iframe", "img", "object", "embed", "form"} & set(page.tags)
    sources = [
        v for k, v in page.attributes if k in ("src", "href", "xlink:href", "action", "data")
    ]
    assert all(v.startswith("#") or v == "data:," for v in sources)
    assert "url(" not in path.read_text()
    assert "@import" not in path.read_text()
    assert {v[1:] for v in sources if v.startswith("#")} <= set(page.ids)
    assert not any(
        "This run has no" in text or "Not measured" in text for text in page.text.values()
    )
    assert page.tags.count("svg") >= 20


def test_headline_states_the_win_rate_and_its_interval():
    page = Page(_full())
    assert "320 test prompts" in page.text[""]
    assert "71.0% of the time (95% interval 66.0% to 76.0%" in page.text[""]


def test_verdicts_follow_the_numbers():
    assert Page(_full()).text["verdicts"].count("Seen.") == 5
    changes = (
        ("win_rate_vs_sft", "prompted_base", "value", 0.6),
        ("win_rate_vs_sft_length_controlled", "ppo_ptx", "low", 0.45),
        ("pretraining_loss", "ppo", None, 1.0),
        ("rm_accuracy", "heldout_labelers", "value", 0.61),
        ("kl", "ppo", None, 31.0),
    )
    for i, (table, key, inner, value) in enumerate(changes):
        results = sample_run.results()
        target = results[table] if inner is None else results[table][key]
        target[inner or key] = value
        text = Page(_full(results=results)).text["verdicts"]
        assert text.count("Not seen.") == 1, changes[i]


def test_script_in_any_text_is_escaped():
    evil = '<script>alert("1")</script><img src=x onerror=alert(1)>\'"&'
    results = sample_run.results()
    results["gold_parts"] = {"sft": {evil: 0.5}, "ppo": {evil: 0.6}}
    results["config"], results["versions"], results["seconds"] = (
        {evil: {evil: evil}},
        {evil: evil},
        {evil: 2.0},
    )
    results["best_of_n"]["n"] = [evil]
    samples = [
        {
            "prompt": evil,
            "responses": {"sft": {"text": evil, "gold_score": 0.1}, evil: {"text": evil}},
        }
    ]
    departures = [{k: evil for k in ("name", "paper", "source", "run", "why")}]
    history = {evil: [{"step": i, "loss": 1.0 / (i + 1)} for i in range(3)]}
    markup = render_report(results, history, samples, departures)
    page = Page(markup)
    assert "<script" not in markup
    assert "<img" not in markup
    assert not {"script", "img"} & set(page.tags)
    assert not page.handlers
    for section in (
        "answers",
        "gold",
        "departures",
        "cost",
        "setup",
        "stages",
        "over-optimisation",
    ):
        assert evil in page.text[section], section


def test_whitespace_of_answers_is_kept():
    samples = [
        {
            "prompt": "a\n  b\tc",
            "responses": {"sft": {"text": "x\n\n   y", "gold_score": 1.0}, "ppo": {"text": " \n"}},
        }
    ]
    markup = _full(samples=samples)
    assert ">a\n  b\tc</pre>" in markup
    assert ">x\n\n   y</pre>" in markup
    assert "(nothing)" in markup


@pytest.mark.parametrize("key", sorted(sample_run.results()))
def test_a_run_that_lacks_one_part_still_reports_the_rest(key):
    results = sample_run.results()
    del results[key]
    Page(_full(results=results))


def test_empty_run_says_so_in_every_section():
    page = Page(render_report({}))
    assert "no win rate for PPO-ptx yet" in page.text[""]
    assert page.text["verdicts"].count("Not measured.") == 5
    said = ("This run", "No answers", "No times", "Not measured")
    assert all(any(s in page.text[section] for s in said) for section in page.ids)
    assert "svg" not in page.tags


def test_not_finite_numbers_are_left_out_not_drawn():
    results, history = sample_run.results(), sample_run.history()
    results["gold_score"]["ppo"] = math.nan
    results["win_rate_vs_sft"]["ppo"] = {"value": None, "low": math.inf, "high": "x"}
    results["calibration"]["observed"][0] = math.nan
    results["best_of_n"]["gold"][2] = math.inf
    history["ppo"][3] |= {"kl": math.nan, "score": None}
    markup = _full(results=results, history=history)
    Page(markup)
    assert "nan" not in markup.lower().replace("finance", "")
    assert ">inf" not in markup


def test_history_as_one_list_equals_history_by_stage():
    by_stage = sample_run.history()
    rows = [row | {"stage": stage} for stage, rows in by_stage.items() for row in rows]
    assert _full(history=rows) == _full(history=by_stage)


def test_a_failing_write_leaves_the_old_report(tmp_path: Path, monkeypatch):
    path = write_report(tmp_path / "report.html", sample_run.results())
    old = path.read_text()

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, {})
    assert path.read_text() == old
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_check_results_names_each_missing_key():
    assert check_results(sample_run.results()) == []
    assert check_results(json.loads(json.dumps(sample_run.results()))) == []
    results = copy.deepcopy(sample_run.results())
    del results["win_rate_vs_sft"]["ppo"]["low"], results["seconds"]
    results["kl"]["ppo_ptx"], results["gold_score"]["sft"] = math.nan, "0.7"
    assert check_results(results) == [
        "win_rate_vs_sft.ppo.low",
        "gold_score.sft",
        "kl.ppo_ptx",
        "seconds",
    ]


def test_schema_document_names_every_required_key():
    text = (Path(__file__).parents[2] / "docs" / "results_schema.md").read_text()
    for key in check_results({}):
        assert f"`{key.split('.')[0]}" in text, key


def test_bars_are_drawn_to_scale_with_whiskers_inside():
    svg = charts.bar_chart(
        [charts.Bar("a", 0.5, "red", 0.4, 0.7), charts.Bar("b", 1.0, "red")], title="t", maximum=1.0
    )
    root = ElementTree.fromstring(svg)
    full = charts.WIDTH - charts.LABEL_WIDTH - charts.VALUE_WIDTH
    widths = [float(r.attrib["width"]) for r in root.iter("rect")]
    assert widths == pytest.approx([full / 2, full], abs=0.1)
    whisker = next(p.attrib["d"] for p in root.iter("path") if p.attrib["class"] == "whisker")
    start = float(whisker[1:].split()[0])
    end = float(whisker.split("H")[1].split("M")[0])
    assert [start, end] == pytest.approx(
        [charts.LABEL_WIDTH + 0.4 * full, charts.LABEL_WIDTH + 0.7 * full], abs=0.1
    )


def test_lines_stay_inside_their_frame():
    line = charts.Line("a", "red", [(float(i), (-1.0) ** i * 1000 * i) for i in range(30)])
    root = ElementTree.fromstring(charts.line_chart([line], title="t", x_label="x", y_label="y"))
    spots = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter("circle")]
    assert len(spots) == 30
    assert all(46 <= x <= 344 and 30 <= y <= 190 for x, y in spots)


def test_a_smooth_line_starts_and_ends_at_its_points_and_averages_between_them():
    points = [(0.0, 0.0), (1.0, 6.0), (2.0, 0.0), (3.0, 6.0), (4.0, 3.0)]
    assert charts.Line("a", "red", points).trend == points
    trend = charts.Line("a", "red", points, smooth=2).trend
    assert trend == [(0.0, 0.0), (1.0, 2.0), (2.0, 3.0), (3.0, 3.0), (4.0, 3.0)]
    svg = charts.line_chart(
        [charts.Line("a", "red", points, smooth=2)], title="t", x_label="kl", y_label="y"
    )
    assert svg.count("<circle") == len(points)


@pytest.mark.parametrize(
    ("last", "ticks"), [(3.0, ["1", "2", "3"]), (2.5, ["1", "1.5", "2", "2.5"])]
)
def test_an_axis_of_whole_numbers_has_no_fractions(last, ticks):
    svg = charts.line_chart(
        [charts.Line("a", "red", [(1.0, 0.0), (last, 1.0)])],
        title="t",
        x_label="epoch",
        y_label="y",
    )
    assert re.findall(r'y="208"[^>]*>([^<]*)<', svg) == ticks


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-3.0, 17.0), (1e-5, 3e-5), (0.0, 1e6), (0.93, 0.94)]
)
def test_ticks_are_few_and_inside(low, high):
    ticks = charts.nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert low - 1e-9 <= ticks[0]
    assert ticks[-1] <= high * (1 + 1e-9)


def test_long_values_and_labels_get_room():
    bars = [charts.Bar("a stage with a long name", 188.0, "red"), charts.Bar("b", 30.0, "red")]
    root = ElementTree.fromstring(
        charts.bar_chart(bars, title="t", maximum=188.0, text=lambda _: "3 min 08 s")
    )
    bar = next(root.iter("rect"))
    assert float(bar.attrib["x"]) + float(bar.attrib["width"]) < charts.WIDTH - 7 * len(
        "3 min 08 s"
    )
    label = next(t for t in root.iter("text") if t.attrib["class"] == "label")
    assert label.text == "a stage with a …"
    assert "a stage with a long name" in "".join(t.text or "" for t in root.iter("title"))
