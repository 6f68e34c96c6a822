"""Progress of a long program on the console: steps done, speed and remaining time.

The estimate of the remaining time is realistic from the second step on. The first step compiles
the program and later steps may compile variants of it, and neither predicts the duration of the
next step: intervals in which the compiler ran are left out of the rate (`Rate`).
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax

from rlhf_jax.run import processes

WIDTH = 100
"""The maximal width of a line where the output is not a terminal."""

EVERY = 10.0
"""The minimal seconds between two lines where the output is not a terminal."""

PATIENCE = 5.0
"""Seconds that work may take before any progress is printed."""

SHORT = {"kl_nats_per_sequence": "kl", "response_tokens": "tokens", "held_out_loss": "held_out"}
"""Shorter metric names for lines that the full names do not fit; the log has the full names."""


@runtime_checkable
class Stream(Protocol):
    """The methods needed of a text stream; `sys.stdout`, files and `StringIO` have them."""

    def write(self, text: str, /) -> int: ...  # noqa: D102
    def flush(self) -> None: ...  # noqa: D102
    def isatty(self) -> bool: ...  # noqa: D102


class Screen(NamedTuple):
    """Where lines of progress appear, and how often."""

    stream: Stream | None = None
    """The output; None is standard output."""
    clock: Callable[[], float] = time.monotonic
    """The current time in seconds, which never decreases."""
    every: float = EVERY
    """The minimal seconds between two lines where the stream is not a terminal."""


class Rate:
    """Seconds per step, estimated from the times at which steps were done.

    The time before the first reported step (which compiles) and intervals in which the compiler ran
    are left out. A single interval longer than `OUTLIER` times the median is left out too: it is
    most likely a compilation that was not counted, or a computer that slept. Two or more of them
    probably recur, as an evaluation between steps does, and count.

    >>> rate = Rate()
    >>> for step, now in ((1, 60.0), (2, 61.0), (3, 62.0), (4, 92.0), (5, 93.0)):
    ...     rate.add(step, now)
    >>> rate.seconds_per_step
    1.0
    """

    OUTLIER = 4.0
    WINDOW = 1024
    """How many of the newest intervals count, so that the rate follows a change of pace."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None
        self._plain: deque[tuple[int, float]] = deque(maxlen=self.WINDOW)
        self._compiling: deque[tuple[int, float]] = deque(maxlen=self.WINDOW)

    def add(self, step: int, now: float, *, compiled: bool = False) -> None:
        """Records that `step` steps were done at time `now`.

        Args:
          step: steps done.
          now: the time in seconds.
          compiled: whether the compiler ran since the previous call.
        """
        last, self._last = self._last, (step, now)
        if last is None or step <= last[0]:
            # A second report of the same step does not begin a new interval.
            self._last = last or (step, now)
            return
        intervals = self._compiling if compiled else self._plain
        intervals.append((step - last[0], now - last[1]))

    @property
    def seconds_per_step(self) -> float | None:
        """The mean over the intervals that count; None while there are none."""
        # A stage that compiles in every interval gets a pessimistic estimate rather than none.
        kept = list(self._plain or self._compiling)
        if not kept:
            return None
        paces = [seconds / steps for steps, seconds in kept]
        limit = self.OUTLIER * statistics.median(paces)
        outliers = [place for place, pace in enumerate(paces) if pace > limit]
        if len(outliers) == 1:
            kept = [interval for place, interval in enumerate(kept) if place != outliers[0]]
        return sum(seconds for _, seconds in kept) / sum(steps for steps, _ in kept)


class Console:
    """Progress of one stage: a bar that is redrawn on a terminal, occasional plain lines elsewhere.

    Args:
      stage: its name.
      total: how many steps it has.
      resume_step: the step from which it resumes.
      show: metrics to show, in order; those that a step lacks, or that do not fit the line, are
        left out.
      unit: what a step is, in the plural: ``iterations``, ``responses``.
      quiet: the seconds before anything is shown: work that is done by then needs no line.
      screen: where lines appear, and how often.
      compilations: returns how many programs this process has compiled; None counts JAX's.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        resume_step: int = 0,
        *,
        show: Sequence[str] = ("loss",),
        unit: str = "steps",
        quiet: float = 0.0,
        screen: Screen = Screen(),
        compilations: Callable[[], int] | None = None,
    ):
        self._stage, self._total, self._show = stage, total, tuple(show)
        self._stream = sys.stdout if screen.stream is None else screen.stream
        # A dumb terminal does not understand the escape sequence that clears a line.
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._clock, self._every = screen.clock, screen.every
        self._unit, self._quiet = unit, quiet
        self._compilations = compilations or Compilations.count
        self._compiled = self._compilations()
        self._step, self._begun, self._started, self._rate = (
            resume_step,
            resume_step,
            screen.clock(),
            Rate(),
        )
        # So that the first line is always due.
        self._last_line = -math.inf
        self._open_line = ""

    def update(self, step: int, numbers: Mapping[str, float], *, at: float | None = None) -> None:
        """Records that `step` was done at time `at` (None: now); shows it when a line is due."""
        now, compiled = self._clock() if at is None else at, self._compilations()
        self._rate.add(step, now, compiled=compiled > self._compiled)
        self._compiled, self._step = compiled, step
        if now - self._started < self._quiet:
            return
        if self._live:
            # One column is left free, as some terminals wrap a line that fills them all.
            self._open_line = self._line(
                now, numbers, shutil.get_terminal_size((WIDTH, 24)).columns - 1
            )
            # The escape sequence clears what is left of a longer line before.
            self._stream.write(f"\r{self._open_line}\x1b[K")
        elif step >= self._total or (step > self._begun and now - self._last_line >= self._every):
            self._last_line = now
            self._stream.write(self._line(now, numbers, WIDTH) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the live line, so that later output starts on a new one."""
        if self._open_line:
            self._stream.write("\n")
            self._stream.flush()
            self._open_line = ""

    @property
    def seconds_left(self) -> float | None:
        """The remaining seconds of the stage; None while they are not known."""
        pace = self._rate.seconds_per_step
        return None if pace is None else max(0, self._total - self._step) * pace

    def _line(self, now: float, numbers: Mapping[str, float], width: int) -> str:
        begin = f"{self._stage} {self._progress()}{self._speed(now)}"
        chosen = [(name, numbers[name]) for name in self._show if name in numbers]
        whole = begin + "".join(f"  {name} {value:.4g}" for name, value in chosen)
        if len(whole) <= width:
            return whole
        # The line is too long: names are shortened, then the last metrics are left out.
        for name, value in chosen:
            last = name.rpartition("/")[2]
            more = f"  {SHORT.get(last, last)} {value:.4g}"
            if len(begin) + len(more) > width:
                break
            begin += more
        return begin[:width]

    def _progress(self) -> str:
        count = f"{self._step}/{self._total}"
        if not self._live:
            return count
        full = round(20 * min(1.0, self._step / max(1, self._total)))
        return f"[{'#' * full}{'.' * (20 - full)}] {count}"

    def _speed(self, now: float) -> str:
        pace, left = self._rate.seconds_per_step, self.seconds_left
        shown = ""
        if pace:
            shown = (
                f"  {1 / pace:.1f} {self._unit}/s"
                if pace <= 1
                else f"  {pace:.1f} s/{self._unit.removesuffix('s')}"
            )
        if self._step >= self._total:
            return f"{shown}  took {duration(now - self._started)}"
        return f"{shown}  ETA {duration(left)}" if pace and left is not None else ""


class Progress:
    """Progress of a loop that has no log; a short loop prints nothing, and only process 0 prints.

    >>> with Progress("scoring", 4, unit="rows") as done:
    ...     for row in range(1, 5):
    ...         done(row)

    Args:
      what: the name of the work, such as ``scoring``.
      total: how many steps it has.
      unit: what a step is, in the plural.
      quiet: the seconds before anything is shown.
      screen: where lines appear, and how often.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        unit: str,
        quiet: float = PATIENCE,
        screen: Screen = Screen(),
    ) -> None:
        # The other processes write to a buffer that is never read.
        if processes.index():
            screen = screen._replace(stream=io.StringIO())
        self._console = Console(what, total, show=(), unit=unit, quiet=quiet, screen=screen)

    def __call__(self, done: int) -> None:
        """Records that `done` steps are done."""
        self._console.update(done, {})

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._console.close()


@contextlib.contextmanager
def patiently(
    what: str, *, after: float = PATIENCE, every: float = EVERY, stream: Stream | None = None
) -> Iterator[None]:
    """Prints a sign of life while a block runs whose steps cannot be counted.

    Process 0 prints ``what: 5s so far`` after `after` seconds and then every `every` seconds.
    """
    over, begun = threading.Event(), time.monotonic()

    def speak() -> None:
        wait = after
        while not over.wait(wait):
            out, wait = sys.stdout if stream is None else stream, every
            # A stream that was closed meanwhile must not stop the work.
            with contextlib.suppress(ValueError, OSError):
                out.write(f"{what}: {duration(time.monotonic() - begun)} so far\n")
                out.flush()

    if processes.index():
        yield
        return
    # A daemon thread cannot keep the interpreter alive when the block is interrupted.
    speaker = threading.Thread(target=speak, name="patiently", daemon=True)
    speaker.start()
    try:
        yield
    finally:
        # Joined, so that no line appears after the block has ended.
        over.set()
        speaker.join()


class Compilations:
    """Counts the programs that this process compiles or loads from the cache on disk."""

    _count = 0
    _listening = False

    @classmethod
    def count(cls) -> int:
        """The count so far; counting begins with the first call."""
        if not cls._listening:
            jax.monitoring.register_event_duration_secs_listener(cls._add)
            cls._listening = True
        return cls._count

    @classmethod
    def _add(cls, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == "/jax/core/compile/backend_compile_duration":
            cls._count += 1


def duration(seconds: float) -> str:
    """Seconds in a form for people.

    >>> duration(7.4), duration(95), duration(7325)
    ('7s', '1m35s', '2h02m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return (
        f"{whole // 60}m{whole % 60:02d}s"
        if whole < 3600
        else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    )
