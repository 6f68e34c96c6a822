"""`preview` as a page: one file without a script that loads nothing, for light and dark, phone and desk."""

from __future__ import annotations

import html
from collections.abc import Sequence

from rlhf_jax.data import preview
from rlhf_jax.data.preview import Part, Piece, Row

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title><style>{style}</style></head><body><main>
<h1>{title}</h1>
<p class="lead">{lead}</p>
{legend}{body}{report}
</main></body></html>
"""

STYLE = """
:root{--bg:#fcfcfa;--card:#fff;--text:#22252a;--soft:#666c74;--faint:#dfe0dd;--trained:#d3efe2;--trained-edge:#00795a;
  --special:#5b2c9d;--special-bg:#eee6fa;--mark:#9aa0a8;--bad:#b3400a}
@media(prefers-color-scheme:dark){
  :root{--bg:#15171a;--card:#1c1f23;--text:#e4e5e3;--soft:#9aa1a9;--faint:#33383e;--trained:#12402f;
    --trained-edge:#3fbf96;--special:#cdb2ff;--special-bg:#352a4d;--mark:#747b84;--bad:#f08a55}
}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--text);font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,
  "Helvetica Neue",sans-serif}
main{max-width:1000px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:clamp(22px,3.6vw,30px);line-height:1.25;font-weight:650;margin:0 0 10px;overflow-wrap:anywhere}
.lead{color:var(--soft);max-width:70ch;margin:0 0 18px}
.legend{display:flex;flex-wrap:wrap;gap:6px 22px;list-style:none;padding:0;margin:0 0 28px;font-size:14px;
  color:var(--soft)}
article{background:var(--card);border:1px solid var(--faint);border-radius:8px;padding:16px 18px 18px;margin:0 0 18px}
h2{font-size:16px;font-weight:620;margin:0;overflow-wrap:anywhere}
h3{font-size:13.5px;font-weight:600;margin:14px 0 4px}
h3 small{font-size:13.5px;font-weight:400;color:var(--soft);margin-left:8px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font:13.5px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,
  "DejaVu Sans Mono",monospace;direction:ltr}
pre span,.legend span{unicode-bidi:isolate}
.t{background:var(--trained);border-bottom:2px solid var(--trained-edge)}
.tok{box-shadow:inset 1px 0 0 var(--faint)}
.t.tok{box-shadow:inset 1px 0 0 color-mix(in srgb,var(--trained-edge) 35%,transparent)}
.s{color:var(--special);background:var(--special-bg);border-radius:4px;padding:0 3px;font-weight:600}
.s.t{border-radius:4px 4px 0 0}
.m{color:var(--mark)}
.h{color:var(--bad);font-size:12px}
.n{color:var(--soft);font-style:italic;border:1px dashed var(--mark);border-radius:4px;padding:0 5px;margin:0 2px}
.problem{color:var(--bad);margin:10px 0 0;overflow-wrap:anywhere}
.report{overflow-x:auto;margin-top:32px}
.report pre{white-space:pre;overflow-wrap:normal;line-height:1.45;font-size:13px}
"""

LEGEND = (
    '<ul class="legend"><li><span class="t">trained on</span></li><li><span>only read</span></li>'
    '{special}<li><span class="m">\u23ce</span> line break</li>'
    '<li><span class="h">\\u202e</span> hidden character</li><li>hover: token ids</li></ul>'
)


def page(shown: Sequence[Row], *, title: str, tokens: bool, report: str = "") -> str:
    """The rows as a page of HTML.

    Args:
      shown: from `preview.rows`.
      title: names the data.
      tokens: whether they were encoded; otherwise the page says how to see tokens.
      report: a table to stand below the rows, as it is.
    """
    lead = f"{len(shown)} records as the model sees them, encoded by the functions that training calls."
    articles = "".join(_article(row) for row in shown)
    table = f'<section class="report"><pre>{html.escape(report)}</pre></section>' if report else ""
    return PAGE.format(
        title=html.escape(preview.visible(title)), style=STYLE, lead=html.escape(lead if tokens else preview.NO_MODEL),
        legend=LEGEND.format(special=_special(shown)) if tokens else "", body=articles, report=table,
    )  # fmt: skip


def _special(shown: Sequence[Row]) -> str:
    """The special tokens of the rows, each with its id."""
    return "".join(f"<li>{_piece(p)} {p.ids[0]}</li>" for p in preview.special_pieces(shown))


def _article(row: Row) -> str:
    problem = f'<p class="problem">Cannot be encoded: {_safe(row.problem)}</p>' if row.problem else ""
    return f"<article><h2>{_safe(row.title)}</h2>{problem}{''.join(map(_part, row.parts))}</article>\n"


def _part(part: Part) -> str:
    body = "".join(map(_piece, part.pieces))
    return f"<h3>{_safe(part.name)}<small>{_safe(part.facts)}</small></h3>" + (f"<pre>{body}</pre>" if body else "")


def _piece(piece: Piece) -> str:
    if piece.role == "note":
        arrow = "\u25c2 " if piece.text == "score" else ""
        return f'<span class="n">{arrow}{_safe(piece.text)}</span>'
    names = [name for name, on in (("t", "trained" in piece.role), ("s", "special" in piece.role)) if on]
    names += ["tok"] if piece.ids else []
    ids = f' title="{" ".join(map(str, piece.ids))}"' if piece.ids else ""
    return f'<span class="{" ".join(names)}"{ids}>{_shown(piece.text)}</span>'


def _shown(text: str) -> str:
    """Escaped text: hidden characters stand out, and after the mark of a line break the line breaks."""
    said = ""
    for c in text:
        if c == "\n":
            said += '<span class="m">\u23ce</span>\n'
        elif preview.visible(c) != c:
            said += f'<span class="h">{html.escape(preview.visible(c))}</span>'
        else:
            said += html.escape(c)
    return said


def _safe(text: str) -> str:
    return html.escape(preview.visible(text))
