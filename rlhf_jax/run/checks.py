"""Refusals of a config's values: each error names the field, the value and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_jax.run.untrusted import PLAIN_NAME


def require(condition: bool, field: str, value: Any, fix: str) -> None:
    """Raises ``ValueError("field=value: fix")`` unless `condition` is true."""
    if not condition:
        raise ValueError(f"{field}={value!r}: {fix}")


def require_divides(field: str, value: int, whole: int, what: str) -> None:
    """Refuses a value that does not divide `whole`, and lists divisors to choose from.

    >>> require_divides("minibatches", 6, 16, "the rollout batch")
    Traceback (most recent call last):
    ValueError: minibatches=6 must divide the rollout batch of 16: choose 1, 2, 4, 8 or 16
    """
    if value >= 1 and whole % value == 0:
        return
    # A batch may have dozens of divisors; the six nearest to the refused value are enough.
    divisors = [str(n) for n in range(1, whole + 1) if whole % n == 0]
    choices = (
        divisors if len(divisors) <= 8 else sorted(divisors, key=lambda n: abs(int(n) - value))[:6]
    )
    *head, last = sorted(choices, key=int)
    listed = f"{', '.join(head)} or {last}" if head else last
    raise ValueError(f"{field}={value} must divide {what} of {whole}: choose {listed}")


def require_one_of(field: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuses a value that is not one of `choices`, and suggests the nearest one."""
    if value not in choices:
        names = [str(c) for c in choices]
        near = difflib.get_close_matches(str(value), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{field}={value!r} must be one of {', '.join(names)}{hint}")


def require_range(
    field: str, value: float, *, low: float | None = None, high: float | None = None
) -> None:
    """Refuses NaN and any number outside ``low <= value <= high`` (None: no bound)."""
    # Without bounds no comparison would reject NaN, hence `value != value`.
    if not ((low is None or value >= low) and (high is None or value <= high)) or value != value:
        bounds = [f">= {low}"] * (low is not None) + [f"<= {high}"] * (high is not None)
        raise ValueError(f"{field}={value!r} must be {' and '.join(bounds) or 'a number'}")


def require_name(field: str, name: str) -> str:
    """Returns `name` if it is safe as a component of a path.

    >>> require_name("config.name", "../ppo")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: config.name='../ppo': a name is 1 to 128 letters, digits, '.', '_' or '-', ...
    """
    good = bool(PLAIN_NAME.fullmatch(name))
    require(
        good,
        field,
        name,
        "a name is 1 to 128 letters, digits, '.', '_' or '-', a letter or digit first",
    )
    return name


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint for an error message: the likely spelling, or all choices where none is near."""
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(choices)}" if choices else ""
