"""Call a loss with the arguments that its signature names, out of those that a step has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

from rlhf_jax.types import Mean, Metrics

Loss = Callable[..., Any]
"""A function of arrays that returns ``(Mean, dict of Mean or Max)``, or a bare `Mean`."""


class BoundLoss(NamedTuple):
    """A loss, and the names of the arguments that it takes from a step."""

    loss: Loss
    names: tuple[str, ...]

    def arguments(self, **arrays: Array) -> dict[str, Array]:
        """Those of `arrays` that the loss names."""
        return {name: arrays[name] for name in self.names}


def with_metrics(result: Any) -> tuple[Mean, Metrics]:
    """What a loss returned; a bare `Mean` gets empty metrics."""
    return (result, {}) if isinstance(result, Mean) else result


def bind_arguments(loss: Loss, available: tuple[str, ...], *, name: str) -> BoundLoss:
    """Find which of `available` the loss names.

    Keyword-only arguments with a default are hyperparameters and keep their defaults, as do other
    arguments with a default that are not in `available`.

    Args:
      loss: a function of arrays, or a `functools.partial` of one.
      available: names of the arguments that the step can pass.
      name: of the loss argument, for the error message.

    Returns:
      The loss, to be called with at least its `names`.

    Raises:
      ValueError: if the loss requires an argument that is not available; the message lists those
        that are.

    >>> available = ("logp", "mask", "tokens")
    >>> bind_arguments(lambda logp, mask, *, beta=1.0: None, available, name="loss").names
    ('logp', 'mask')
    """
    names = []
    for argument in inspect.signature(loss).parameters.values():
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            continue
        required = argument.default is argument.empty
        # A hyperparameter may share its name with a field: keyword-only with a default means that
        # the field is not wanted.
        if argument.name in available and (required or argument.kind is not argument.KEYWORD_ONLY):
            names.append(argument.name)
        elif required:
            function = getattr(loss, "__name__", repr(loss))
            raise ValueError(
                f"{name}={function} asks for {argument.name!r}, which this step does not have: "
                f"name any of {', '.join(available)}, or give it a default"
            )
    return BoundLoss(loss, tuple(names))
