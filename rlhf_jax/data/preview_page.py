"""Writes a `preview` as an HTML page, in the frame of `rlhf_jax.pages`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

from rlhf_jax import pages
from rlhf_jax.data import preview
from rlhf_jax.data.preview import Piece, PreviewRow

TEMPLATE = "data/preview_page.html.jinja"


def page(shown: Sequence[PreviewRow], *, title: str, tokens: bool, report: str = "") -> str:
    """The rows as a page of HTML.

    Args:
      shown: from `preview.rows`.
      title: names the data.
      tokens: whether they were encoded; otherwise the page explains how to see tokens.
      report: a preformatted table to show below the rows.
    """
    return pages.render(
        TEMPLATE,
        rows=shown,
        special=preview.special_pieces(shown),
        title=title,
        tokens=tokens,
        no_model=preview.NO_MODEL,
        report=report,
        visible=preview.visible,
        runs=_runs,
        classes=_classes,
    )


def _classes(piece: Piece) -> str:
    """The CSS classes of a token or a text."""
    names = {
        "t": "trained" in piece.role,
        "s": "special" in piece.role,
        "tok": bool(piece.ids),
    }
    return " ".join(name for name, on in names.items() if on)


Kind = Literal["break", "hidden", "plain"]


def _runs(text: str) -> list[tuple[Kind, str]]:
    """Splits a text into line breaks, hidden characters (as escapes) and plain text."""
    runs: list[tuple[Kind, str]] = []
    for kind, characters in itertools.groupby(text, key=_kind):
        if kind == "plain":
            runs.append((kind, "".join(characters)))
            continue
        for character in characters:
            runs.append((kind, character if kind == "break" else preview.visible(character)))
    return runs


def _kind(character: str) -> Kind:
    if character == "\n":
        return "break"
    return "plain" if preview.visible(character) == character else "hidden"
