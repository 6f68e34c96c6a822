"""`report.html` of a run: what was learnt, how it was measured, where it departs from the paper.

`page` collects the values for the template ``report.html.jinja``: `claims` judges the claims of the
paper, `figures` draws the charts, `results` reads the nested numbers. ``docs/results_schema.md``
describes every key that is read.
"""

from rlhf_jax.evaluation.report.page import render_report, write_report
from rlhf_jax.evaluation.report.results import check_results

__all__ = ["check_results", "render_report", "write_report"]
