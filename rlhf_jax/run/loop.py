"""The training loop of a stage: it resumes, saves, stops when it is asked to, logs, and counts the
steps left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.run import checkpoint, guards, signals
from rlhf_jax.run.metrics import StageLog, Values

OnSave = Callable[[int, Any, StageLog], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long a stage trains and what it keeps.

    Attributes:
      workdir: folder of the stage: ``checkpoints/`` and ``metrics.jsonl``.
      stage: its name in the log.
      steps: how many.
      save_every: steps between checkpoints (an epoch, say).
      keep: newest checkpoints that stay.
      max_skipped: steps in a row that the guard of the step may skip.
      show: metrics for the console.
      unit: what a step is, in the plural: ``iterations``.
    """

    workdir: str | os.PathLike[str]
    stage: str
    steps: int
    save_every: int
    keep: int = 2
    max_skipped: int = 5
    show: Sequence[str] = ("loss",)
    unit: str = "steps"


class Loop:
    """The steps that a stage has left, in a ``with`` block: the first is the one after its newest
    checkpoint.

    Each step hands in its metrics (`log`) and then the new state (`done`), where the loop saves and
    where it stops::

        with Loop(settings, state) as loop:
            for step, state in loop:
                state, metrics = train(state, batch_of(step))
                loop.log(metrics)
                loop.done(state)
        return loop.state

    Args:
      settings: how long it trains and what it keeps.
      state: the state at step 0, placed; a checkpoint is restored with its shardings.
      origin: `guards.origin` of the stage, stored in each checkpoint and compared on resume.
      data: path of the data file that is named when steps are skipped.
      on_save: called with (steps done, state, log) at each multiple of `save_every` and at the end,
        before the checkpoint that says it was called: a kill in between repeats it.
    """

    def __init__(
        self,
        settings: Settings,
        state: Any,
        *,
        origin: Mapping[str, Any] | None = None,
        data: str = "the data",
        on_save: OnSave = lambda step, state, log: None,
    ):
        self.settings, self.state, self.step = settings, state, 0
        self._origin, self._data, self._on_save = dict(origin or {}), data, on_save

    def __enter__(self) -> Loop:
        settings, folder = self.settings, Path(self.settings.workdir)
        with contextlib.ExitStack() as entered:
            self._saved = entered.enter_context(
                checkpoint.Checkpoints(folder / "checkpoints", keep=settings.keep)
            )
            self._asked_to_stop = entered.enter_context(signals.stop_requests())
            counts = self._resume()
            self.skips = guards.Skips(
                folder,
                settings.stage,
                self._data,
                limit=settings.max_skipped,
                resume_step=self.step,
                counts=counts,
            )
            self._log = entered.enter_context(
                StageLog(
                    folder, settings.stage, total=settings.steps, resume_step=self.step, show=settings.show,
                    unit=settings.unit,
                )
            )  # fmt: skip
            self._entered = entered.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.__exit__(*error)

    def _resume(self) -> Mapping[str, int] | None:
        """Restores the newest checkpoint, if there is one of this very run; returns its counts of
        skipped steps.
        """
        self.step = self._saved.newest_good() or 0
        if not self.step:
            return None
        self.state, stored = self._saved.restore(self.step, self.state)
        changes = guards.check_origin(stored, self._origin)
        self._origin |= guards.changed_config(
            stored, changes, step=self.step, steps=self.settings.steps
        )
        return stored.get("skips")

    @property
    def is_over(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.settings.steps

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        while not self.is_over:
            before = self.step
            yield self.step, self.state
            assert self.step == before + 1, "each step hands its state to `done` once"

    def log(
        self, metrics: Values, *, rows: Callable[[], tuple[list[int], list]] | None = None
    ) -> None:
        """Takes the metrics of the step that is under way.

        Args:
          metrics: of this step.
          rows: tells the rows and records of the step, called only if its guard skipped it. A stage
            that counts its own (PPO, by minibatches) leaves it out and uses `skips`.

        Raises:
          FloatingPointError: too many steps in a row were skipped; their records are named.
        """
        self._log(self.step + 1, metrics)
        if rows is not None:
            self.skips.watch(self.step + 1, metrics, rows)

    def done(self, state: Any) -> None:
        """Takes the state after the step; saves where it is time to, and stops where somebody asked
        for it.

        Raises:
          FloatingPointError: the state is not finite, or all steps were skipped.
          KeyboardInterrupt: Ctrl-C, SIGTERM or a preemption came; the step is saved.
        """
        self.state, self.step = state, self.step + 1
        last, stopping = self.is_over, self._asked_to_stop(self.step)
        at_end = last or self.step % self.settings.save_every == 0
        if at_end or stopping:
            self.skips.flush(last=last)
            if at_end:  # before the checkpoint: once that stands, this is never done again
                checkpoint.refuse_non_finite(state, f"the state of step {self.step}")
                self._on_save(self.step, state, self._log)
            self._log.flush()
            extra = {"position": self.step, "skips": self.skips.counts}
            self._saved.save(self.step, state, extra=self._origin | extra)
        if stopping:
            self._saved.wait()
            unit = self.settings.unit.removesuffix("s")
            raise KeyboardInterrupt(
                f"{self.settings.stage} at {unit} {self.step} of {self.settings.steps}"
            )
