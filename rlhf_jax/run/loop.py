"""The training loop of a stage: resuming, saving, stopping on request, logging, skipped steps."""

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
      steps: total number of steps.
      save_every: steps between checkpoints (an epoch, say).
      keep: number of newest checkpoints to keep.
      max_skipped: limit on consecutive steps that the guard of the step may skip.
      show: metrics shown on the console.
      unit: the plural noun for a step: ``iterations``.
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
    """The remaining steps of a stage, as a context manager that resumes from its newest checkpoint.

    Each step passes its metrics to `log` and then the new state to `done`, which saves the state
    and stops the loop when it should::

        with Loop(settings, state) as loop:
            for step, state in loop:
                state, metrics = train(state, batch_of(step))
                loop.log(metrics)
                loop.done(state)
        return loop.state

    Args:
      settings: how long the stage trains and what it keeps.
      state: the state at step 0, already sharded; a checkpoint is restored with its shardings.
      origin: `guards.origin` of the stage, stored in each checkpoint and compared on resume.
      data: path of the data file to name when steps are skipped.
      on_save: called with (steps done, state, log) at each multiple of `save_every` and at the end,
        before the checkpoint is written: if the process is killed in between, the call is repeated.
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
            # Entered first and so left last: the log is closed and signals are restored before the
            # block waits for the pending save.
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
                    folder,
                    settings.stage,
                    total=settings.steps,
                    resume_step=self.step,
                    show=settings.show,
                    unit=settings.unit,
                )
            )
            # If anything above raises, the stack closes what was opened; from here `__exit__` does.
            self._entered = entered.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.__exit__(*error)

    def _resume(self) -> Mapping[str, int] | None:
        """Restores this run's newest checkpoint, if any; returns its counts of skipped steps."""
        # A step of 0 is never saved: the initial state comes from the config alone.
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
            # The body of the loop must call `done`, which counts the step.
            assert self.step == before + 1, "each step hands its state to `done` once"

    def log(
        self, metrics: Values, *, rows: Callable[[], tuple[list[int], list]] | None = None
    ) -> None:
        """Records the metrics of the current step.

        Args:
          metrics: the metrics of this step.
          rows: returns the row indices and records of the step; called only if its guard skipped
            it. A stage that counts skipped updates itself (PPO, by minibatch) omits it and uses
            `skips`.

        Raises:
          FloatingPointError: too many steps in a row were skipped; their records are named.
        """
        # One more than the steps done, as the step being logged is not counted before `done`.
        self._log(self.step + 1, metrics)
        if rows is not None:
            self.skips.watch(self.step + 1, metrics, rows)

    def done(self, state: Any) -> None:
        """Takes the state after the step, saves it when due, and stops if that was requested.

        Raises:
          FloatingPointError: the state is not finite, or all steps were skipped.
          KeyboardInterrupt: Ctrl-C, SIGTERM or a preemption notice arrived; the step is saved.
        """
        self.state, self.step = state, self.step + 1
        last, stopping = self.is_over, self._asked_to_stop(self.step)
        at_end = last or self.step % self.settings.save_every == 0
        if at_end or stopping:
            # The pending step is examined first, so that the counts in the checkpoint include it.
            self.skips.flush(last=last)
            if at_end:
                # Before the checkpoint: a run that resumes from it does not repeat this step.
                checkpoint.refuse_non_finite(state, f"the state of step {self.step}")
                self._on_save(self.step, state, self._log)
            # The log is on the disk before the checkpoint: a resumed run drops lines that are too
            # new, but could not restore lines that are missing.
            self._log.flush()
            extra = {"position": self.step, "skips": self.skips.counts}
            self._saved.save(self.step, state, extra=self._origin | extra)
        if stopping:
            # Checkpoints are written in the background; the process is about to exit.
            self._saved.wait()
            unit = self.settings.unit.removesuffix("s")
            raise KeyboardInterrupt(
                f"{self.settings.stage} at {unit} {self.step} of {self.settings.steps}"
            )
