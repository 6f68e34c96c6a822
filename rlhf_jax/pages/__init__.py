"""HTML pages from jinja2 templates: one frame, one set of styles, one set of charts.

A page is a template that extends ``pages/page.html.jinja`` and fills its blocks `title`, `styles`
and `main`. A template is named by its path inside the package, and the text of a page is in its
template; Python computes numbers and charts. Every value that a template writes is escaped, because
prompts, responses and configs come from other people: only `charts` and the macros of templates
return markup. A page loads nothing, runs no script, and follows the reader's light or dark setting,
window width and zoom.
"""

from __future__ import annotations

import functools
from typing import Any

import jinja2

FRAME = "pages/page.html.jinja"
"""The template that every page extends."""


# Cached, so that a template is parsed once in a process.
@functools.cache
def _environment() -> jinja2.Environment:
    """Jinja environment that escapes every value and raises an error for a missing one."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("rlhf_jax", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """The page rendered from `template` with `values`.

    Args:
      template: path inside the package, such as ``evaluation/report/report.html.jinja``.
      **values: what the template reads, by name. Text is escaped where it is written.

    Raises:
      jinja2.UndefinedError: the template reads a value that is missing.
    """
    return _environment().get_template(template).render(**values)


def macro(template: str, name: str, **values: Any) -> str:
    """What one macro of a template returns: markup, which other templates write as it is."""
    # The module of a template has its macros as attributes.
    return getattr(_environment().get_template(template).module, name)(**values)
