"""User functions that score a text: arguments bound by name, results and errors checked.

``config.text_reward`` and ``config.gold`` name a function, ``package.module:function``. Like a
loss, it takes any of `ARGUMENTS` by name. Keyword-only arguments are hyperparameters
(`rlhf_jax.run.config.fn_spec`)::

    def score(prompt, response, *, longest=200):
        return float("because" in response) - len(response) / longest

A function of two arguments with other names gets ``(prompt id, response)``. It returns a number, or
an object with a number ``score`` (and, for an evaluation, ``parts``). Returning None abstains: the
score is NaN, which leaves the response out.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.run import config as config_lib

ARGUMENTS = ("prompt", "response", "prompt_id")
"""Arguments that a function may name: the prompt as it is in the data (text or messages), the
response, and the prompt's id."""


class FunctionFailed(ValueError):
    """A user function raised an error in the middle of a run."""

    exit_status = 1


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A function's result for a response: NaN if it abstained; `parts` if it returns them."""

    score: float
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Judge:
    """A user function behind one signature, ``(prompt_id, response, prompt)``.

    Attributes:
      name: ``module:function``, for messages.
      function: the user's function, hyperparameters bound.
      wants: per argument, in order, the keyword that it is passed by (None: positionally) and which
        of `ARGUMENTS` it is.
    """

    name: str
    function: Callable[..., Any]
    wants: tuple[tuple[str | None, str], ...]

    def __call__(self, prompt_id: str, response: str, prompt: Any = None) -> float:
        """The score alone.

        Raises:
          ValueError: as `judged`.
        """
        return self.judged(prompt_id, response, prompt).score

    def judged(self, prompt_id: str, response: str, prompt: Any = None) -> Judgement:
        """The score and its parts.

        Raises:
          FunctionFailed: the function raised an error; the message names the function, the prompt,
            the error and its line.
          ValueError: it did not return a number; the message names the prompt and the function.
        """
        known = {"prompt_id": prompt_id, "response": response, "prompt": prompt}
        in_place = [known[what] for key, what in self.wants if key is None]
        by_name = {key: known[what] for key, what in self.wants if key is not None}
        try:
            found = self.function(*in_place, **by_name)
        # Whatever a function of the user's raises; an interrupt is no `Exception` and passes
        # through.
        except Exception as error:
            raise FunctionFailed(
                f"{self.name} failed for the prompt {prompt_id!r}: {_where(error)}; what was saved "
                "before is intact, mend the function and give the same command again"
            ) from error
        try:
            return Judgement(
                number(getattr(found, "score", found)), getattr(found, "parts", None) or {}
            )
        except ValueError as error:
            raise ValueError(
                f"{self.name} returned {error} for the prompt {prompt_id!r}: {_MEND}"
            ) from None


_MEND = "return a number, an object with a number score, or None to leave the response out"


def judge(spec: Any) -> Judge:
    """The function that `spec` names, as a `Judge`.

    Args:
      spec: ``"module:function"``, a `rlhf_jax.run.config.fn_spec`, a function, or a `Judge`, which
        is returned.

    Raises:
      ValueError: there is no such function, a hyperparameter is missing, or it requires an argument
        that is not available.
    """
    if isinstance(spec, Judge):
        return spec
    if callable(spec):
        name = f"{getattr(spec, '__module__', '?')}:{getattr(spec, '__qualname__', repr(spec))}"
        return Judge(name, spec, bound(name, spec))
    fields = {"fn": spec} if isinstance(spec, str) else dict(spec.items())
    name = str(fields.get("fn"))
    function = config_lib.import_fn(name)
    # A keyword-only argument named as in ARGUMENTS is passed per response and needs no value in
    # the config; the empty string only satisfies `resolve`.
    given = {key: "" for key in _keyword_only(function) if key in ARGUMENTS and key not in fields}
    resolved = config_lib.resolve(fields | given)
    assert isinstance(resolved, functools.partial)
    hyperparameters = {key: value for key, value in resolved.keywords.items() if key not in given}
    return Judge(name, functools.partial(function, **hyperparameters), bound(name, function))


def bound(name: str, function: Callable[..., Any]) -> tuple[tuple[str | None, str], ...]:
    """How to pass `ARGUMENTS` to a function, as `Judge.wants`.

    >>> bound("x:f", lambda response, prompt: 0.0)
    (('response', 'response'), ('prompt', 'prompt'))
    >>> bound("x:f", lambda which, answer: 0.0)
    ((None, 'prompt_id'), (None, 'response'))

    Raises:
      ValueError: it requires an argument with another name; the message lists `ARGUMENTS`.
    """
    legacy = ((None, "prompt_id"), (None, "response"))
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return legacy  # a function written in C without a signature
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in places if p.default is p.empty]
    others = [p for p in required if p.name not in ARGUMENTS]
    if not places and any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return legacy
    if others:
        # ``f(name, response)``, the convention before names were bound, unless the name of an
        # argument shows that something else is expected there.
        swapped = required[0].name in ("prompt", "response") or required[-1].name in (
            "prompt",
            "prompt_id",
        )
        if len(required) == 2 and not swapped:
            return legacy
        raise ValueError(
            f"{name} wants the argument {others[0].name!r}, which is not available here. "
            f"Available: {', '.join(ARGUMENTS)}. A hyperparameter must be keyword-only (after *)."
        )
    wants: list[tuple[str | None, str]] = []
    for p in parameters:
        if p.name in ARGUMENTS and p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL:
            wants.append((None if p.kind is p.POSITIONAL_ONLY else p.name, p.name))
    # ``**others`` takes whatever the function does not name.
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        named = [what for _, what in wants]
        wants += [(what, what) for what in ARGUMENTS if what not in named]
    if not wants:
        raise ValueError(
            f"{name} takes none of {', '.join(ARGUMENTS)}: it would say the same of every "
            "response; name what it judges"
        )
    return tuple(wants)


def _keyword_only(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def number(value: Any) -> float:
    """A function's result as a float: a number of any library, or NaN for None; no texts or lists.

    >>> number(True), number(2), number(None)
    (1.0, 2.0, nan)

    Raises:
      ValueError: it is not a number; the message describes it.
    """
    if value is None:
        return math.nan
    if isinstance(value, str | bytes):
        raise ValueError(f"the text {str(value)[:60]!r}")
    if inspect.isawaitable(value):
        # A coroutine that is dropped unawaited prints a warning of its own.
        getattr(value, "close", lambda: None)()
        raise ValueError("a coroutine (it is an async function)")
    shape = getattr(value, "shape", ())
    if (
        # Complex numbers of numpy have `__float__`, which drops the imaginary part.
        not hasattr(value, "__float__")
        or isinstance(value, complex)
        or getattr(getattr(value, "dtype", None), "kind", "") == "c"
        or (shape is not None and tuple(shape) != ())
    ):
        shown = f" of shape {tuple(shape)}" if shape else ""
        raise ValueError(f"a {type(value).__name__}{shown}, {' '.join(repr(value).split())[:60]}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"a {type(value).__name__} that is no number ({error})") from None


def _where(error: Exception) -> str:
    """The error and its last line in the user's own files: ``my_lab.py:12: KeyError: 'a'``."""
    # The first frame is the call in `judged`.
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [
        f for f in frames if "site-packages" not in f.filename and "/lib/python" not in f.filename
    ]
    # The innermost frame of the user's own code says more than where a library noticed the error.
    last = (own or frames)[-1:]
    place = f"{last[0].filename}:{last[0].lineno}: " if last else ""
    return f"{place}{type(error).__name__}: {' '.join(str(error).split())[:300]}"
