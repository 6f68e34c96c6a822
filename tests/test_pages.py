"""Pages share one frame, templates escape every value, and no HTML is written in Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import jinja2
import pytest

from rlhf_jax import pages
from rlhf_jax.pages import charts
from tests.html_page import Page

PACKAGE = Path(__file__).parents[1] / "rlhf_jax"
TEMPLATES = sorted(PACKAGE.rglob("*.jinja"))
PAGES = [path for path in TEMPLATES if path.parent.name != "pages"]
HOSTILE = "</title></style></pre><script>alert(1)</script><img src=x onerror=x()>'\"&{{ 7 * 7 }}"


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_no_html_is_written_in_python():
    element = re.compile(r"</?(?:html|div|span|pre|svg|g|path|t[rdh]|section|style|script)\b[^>]*>")
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not element.search(node.value), f"{name_of(path)}:{node.lineno}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_page_extends_the_frame(path: Path):
    assert f'{{% extends "{pages.FRAME}" %}}' in path.read_text()


@pytest.mark.parametrize("path", TEMPLATES, ids=name_of)
def test_no_template_turns_escaping_off_or_runs_a_script(path: Path):
    text = path.read_text()
    assert not re.search(r"\|\s*safe\b|autoescape|<script|javascript:|\son\w+=", text)


def test_the_frame_forbids_whatever_is_not_in_the_file():
    frame = (PACKAGE / pages.FRAME).read_text()
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in frame
    for style in PACKAGE.rglob("*.css"):
        text = style.read_text()
        assert not re.search(r"url\(|@import|expression\(|</", text), name_of(style)
        assert "{{" not in text
        assert "{%" not in text


def test_charts_escape_every_text():
    bars = [charts.Bar(HOSTILE, 1.0, "var(--sft)"), charts.Bar("b", 1.0, HOSTILE)]
    line = charts.Line(HOSTILE, HOSTILE, [(0.0, 0.0), (1.0, 2.0)])
    for svg in (
        charts.bar_chart(
            bars,
            title=HOSTILE,
            reference=0.5,
            reference_label=HOSTILE,
            text=lambda _: HOSTILE,
        ),
        charts.line_chart(
            [line],
            title=HOSTILE,
            x_label=HOSTILE,
            y_label=HOSTILE,
            text=lambda _: HOSTILE,
        ),
    ):
        document = Page(svg)
        assert not {"script", "img"} & set(document.tags)
        assert not document.handlers
        assert HOSTILE in document.whole_text
        assert dict(document.attributes[:4])["aria-label"] == HOSTILE


def test_legend_and_grid_escape_names_and_keep_charts():
    svg = charts.bar_chart([charts.Bar("a", 1.0, "var(--sft)")], title="t")
    grid = pages.macro("pages/parts.html.jinja", "grid", figures=[{"caption": HOSTILE, "svg": svg}])
    entries = [{"name": HOSTILE, "color": HOSTILE}]
    legend = pages.macro("pages/parts.html.jinja", "legend", entries=entries)
    assert Page(grid).tags.count("svg") == 1
    for markup in (grid, legend):
        assert "script" not in Page(markup).tags
        assert HOSTILE in Page(markup).whole_text


def test_a_page_refuses_to_be_drawn_without_its_values():
    with pytest.raises(jinja2.UndefinedError, match="headline"):
        pages.render("evaluation/report/report.html.jinja")
