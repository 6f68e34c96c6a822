"""What a long program says while it works: how far it is, how fast, and how long it will take.

The time that is left is honest from the second step on. The first step compiles the program, later
ones may compile another form of it, and neither says how long the next step takes: intervals in
which the compiler ran are left out of the rate (`Rate`).
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
"""Most columns of a line where the console is no terminal."""

EVERY = 10.0
"""Seconds between two lines where the console is no terminal."""

PATIENCE = 5.0
"""Seconds that work may take without a word."""

SHORT = {"kl_nats_per_sequence": "kl", "response_tokens": "tokens", "held_out_loss": "held_out"}
"""Names that a line takes where the whole names do not fit it; the log has the whole ones."""


@runtime_checkable
class Stream(Protocol):
    """What the console needs of a text stream; `sys.stdout`, a file and a `StringIO` are such."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...


class Screen(NamedTuple):
    """Where lines of progress appear, and how often."""

    stream: Stream | None = None
    """None for standard output."""
    clock: Callable[[], float] = time.monotonic
    """Seconds, ever increasing."""
    every: float = EVERY
    """At most one line in so many seconds where the stream is no terminal."""


class Rate:
    """Seconds that a step takes, from the times at which steps were done.

    Left out are the time before the first step that is told (it compiles), and intervals in which
    the compiler ran. One single interval of more than `OUTLIER` times the median is left out too: a
    compilation that nobody counted, or a computer that slept. Two or more of them come again and
    again, as an evaluation between steps does, and count.

    >>> rate = Rate()
    >>> for step, now in ((1, 60.0), (2, 61.0), (3, 62.0), (4, 92.0), (5, 93.0)):
    ...     rate.add(step, now)
    >>> rate.seconds_per_step
    1.0
    """

    OUTLIER = 4.0
    WINDOW = 1024
    """Newest intervals that count: a pace that changes while the stage runs is followed."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None
        self._plain: deque[tuple[int, float]] = deque(maxlen=self.WINDOW)
        self._compiling: deque[tuple[int, float]] = deque(maxlen=self.WINDOW)

    def add(self, step: int, now: float, *, compiled: bool = False) -> None:
        """Takes down that `step` steps were done at the time `now`, and whether the compiler ran
        since the last.
        """
        last, self._last = self._last, (step, now)
        if last is None or step <= last[0]:
            self._last = last or (
                step,
                now,
            )  # a second word about a step is part of the next interval
            return
        intervals = self._compiling if compiled else self._plain
        intervals.append((step - last[0], now - last[1]))

    @property
    def seconds_per_step(self) -> float | None:
        """The mean over the intervals that count; None while there is none."""
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
    """Progress of one stage: a bar that is redrawn on a terminal, a plain line now and then
    elsewhere.

    Args:
      stage: its name.
      total: how many steps it has.
      resume_step: the step it goes on from.
      show: metrics to show, in order; those that a step lacks, or that do not fit the line, are
        left out.
      unit: what a step is, in the plural: ``iterations``, ``responses``.
      quiet: nothing is shown in the first seconds: work that is done by then needs no line.
      screen: where lines appear, and how often.
      compilations: how many programs this process has compiled; None counts JAX's.
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
        self._last_line = -math.inf
        self._open_line = ""

    def update(self, step: int, numbers: Mapping[str, float], *, at: float | None = None) -> None:
        """Shows `step`, which was done at the time `at` (now), when it is time to."""
        now, compiled = self._clock() if at is None else at, self._compilations()
        self._rate.add(step, now, compiled=compiled > self._compiled)
        self._compiled, self._step = compiled, step
        if now - self._started < self._quiet:
            return
        if self._live:
            self._open_line = self._line(
                now, numbers, shutil.get_terminal_size((WIDTH, 24)).columns - 1
            )
            self._stream.write(f"\r{self._open_line}\x1b[K")
        elif step >= self._total or (step > self._begun and now - self._last_line >= self._every):
            self._last_line = now
            self._stream.write(self._line(now, numbers, WIDTH) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the live line, so that what comes next starts on its own."""
        if self._open_line:
            self._stream.write("\n")
            self._stream.flush()
            self._open_line = ""

    @property
    def seconds_left(self) -> float | None:
        """How long the stage will still take; None while that is not known."""
        pace = self._rate.seconds_per_step
        return None if pace is None else max(0, self._total - self._step) * pace

    def _line(self, now: float, numbers: Mapping[str, float], width: int) -> str:
        begin = f"{self._stage} {self._progress()}{self._speed(now)}"
        chosen = [(name, numbers[name]) for name in self._show if name in numbers]
        whole = begin + "".join(f"  {name} {value:.4g}" for name, value in chosen)
        if len(whole) <= width:
            return whole
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
    """Progress of a loop that has no log: nothing at all where it is short, and process 0 alone
    speaks.

    >>> with Progress("scoring", 4, unit="rows") as done:
    ...     for row in range(1, 5):
    ...         done(row)

    Args:
      what: what is done, as in ``scoring``.
      total: how many steps it has.
      unit: what a step is, in the plural.
      quiet: seconds without a word.
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
        if processes.index():
            screen = screen._replace(stream=io.StringIO())
        self._console = Console(what, total, show=(), unit=unit, quiet=quiet, screen=screen)

    def __call__(self, done: int) -> None:
        """Takes down that so many steps are done."""
        self._console.update(done, {})

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._console.close()


@contextlib.contextmanager
def patiently(
    what: str, *, after: float = PATIENCE, every: float = EVERY, stream: Stream | None = None
) -> Iterator[None]:
    """Says that the block is still at work when it takes long, where its steps cannot be counted.

    Prints ``what: 5s so far`` after `after` seconds and again each `every` seconds, from process 0.
    """
    over, begun = threading.Event(), time.monotonic()

    def speak() -> None:
        wait = after
        while not over.wait(wait):
            out, wait = sys.stdout if stream is None else stream, every
            with contextlib.suppress(
                ValueError, OSError
            ):  # closed meanwhile: the work itself goes on
                out.write(f"{what}: {duration(time.monotonic() - begun)} so far\n")
                out.flush()

    if processes.index():
        yield
        return
    speaker = threading.Thread(target=speak, name="patiently", daemon=True)
    speaker.start()
    try:
        yield
    finally:
        over.set()
        speaker.join()


class Compilations:
    """Counts the programs that this process compiles, those that were found in the cache on disk
    included.
    """

    _count = 0
    _listening = False

    @classmethod
    def count(cls) -> int:
        """How many so far; it begins to count when it is first asked."""
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
    """Seconds as people say them.

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
