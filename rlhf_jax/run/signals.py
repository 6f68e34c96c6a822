"""Signals, all of them: Ctrl-C and SIGTERM where no stage runs, a stop between two steps where one
does, a timer.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_jax.run import processes

# ----------------------------------------------------------------------------------- whole programs


@contextlib.contextmanager
def interrupting(*, several: bool) -> Iterator[None]:
    """SIGTERM and Ctrl-C raise KeyboardInterrupt where no stage has its own way to stop; the second
    one ends at once.

    At once means also while XLA compiles, when Python's own handlers have to wait: the signals'
    numbers are read by a thread of its own. With several processes JAX answers SIGTERM for all of
    them together and nothing is done here.
    """
    if several or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _: object) -> None:
        stop = KeyboardInterrupt()
        stop.signal_number = number  # pyright: ignore[reportAttributeAccessIssue]
        raise stop

    def swallowed(unraisable: Any) -> None:
        """A destructor or a callback from C cannot raise: the interrupt that hit one there is sent
        anew.
        """
        number = getattr(unraisable.exc_value, "signal_number", None)
        if number is None:
            return told(unraisable)
        own.append(number)
        threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, number]).start()

    own: list[int] = []
    told, sys.unraisablehook = sys.unraisablehook, swallowed
    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)
    }
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(
        target=_end_at_the_second, args=(reader, own), name="signals", daemon=True
    ).start()
    try:
        yield
    finally:
        sys.unraisablehook = told
        signal.set_wakeup_fd(wakeup)
        writer.close()
        for number, handler in before.items():
            signal.signal(number, handler)


_SAME = 1.0
"""Seconds within which a second SIGTERM is the first one sent twice, as srun and a container's init
do."""


def _end_at_the_second(reader: socket.socket, own: list[int]) -> None:
    """Ends the process at the second signal that `reader` tells of; those in `own` this process
    sent itself.
    """
    first: tuple[int, float] | None = None
    while number := reader.recv(1)[:1]:
        if number[0] not in (signal.SIGINT, signal.SIGTERM):
            continue
        if own:
            own.pop()
            continue
        now = time.monotonic()
        if first is None:
            first = (number[0], now)
        elif number[0] == signal.SIGINT or first[0] == signal.SIGINT or now - first[1] > _SAME:
            time.sleep(0.2)  # the main thread may end in better order
            os.write(2, b"\nStopped at once. The same command goes on from the last checkpoint.\n")
            os._exit(128 + number[0])
    reader.close()


def end_quietly(status: int) -> None:
    """Has a program that was stopped end with `status` whatever signal still comes while it takes
    itself down.
    """
    if threading.current_thread() is threading.main_thread():
        _answer_signals(lambda *_: os._exit(status))  # while threads are waited for
        atexit.register(
            _answer_signals, signal.SIG_IGN
        )  # the milliseconds in which Python takes itself down


def _answer_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


# -------------------------------------------------------------------------------- between two steps


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Turns Ctrl-C, SIGTERM and a cluster's preemption notice into a question asked between two
    steps.

    In the block ``stop(step)`` is true once somebody asked: save and leave. A second signal
    interrupts at once. A KeyboardInterrupt that leaves the block carries the signal's number as
    `signal_number`, for the exit status. A signal that came after the last question is handed on
    when the block ends, so none is lost. With several processes all get the same answer at the same
    step, from JAX's own handler (ours would replace it).

    >>> with stop_requests() as stop:
    ...     stop(0)
    False
    """
    if processes.count() > 1:
        with _ctrl_c_as_preemption():
            yield processes.stop_point
        return
    asked: list[tuple[int, float]] = []
    heard = threading.Event()

    def ask(number: int, _: object) -> None:
        again, now = bool(asked), time.monotonic()
        # A SIGTERM within a second of another is the same one, sent twice.
        if again and number == asked[0][0] == signal.SIGTERM and now - asked[0][1] < 1:
            return
        asked.append((number, now))
        if again:
            raise KeyboardInterrupt
        _note("stopping after this step (Ctrl-C again: at once)")

    def stop(step: int) -> bool:
        if asked:
            heard.set()
        return bool(asked)

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # only the main thread may handle signals
        yield lambda step: False
        return
    before: dict[int, Any] = {
        number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    except KeyboardInterrupt as interrupt:
        interrupt.signal_number = asked[-1][0] if asked else signal.SIGINT  # pyright: ignore[reportAttributeAccessIssue]
        heard.set()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked and not heard.is_set():
        number = signal.Signals(asked[0][0])
        handler = before[number]
        if callable(handler):  # called, not raised anew: it would count as a second signal
            handler(number, None)
        else:
            signal.raise_signal(number)


@contextlib.contextmanager
def _ctrl_c_as_preemption() -> Iterator[None]:
    """The first Ctrl-C becomes a SIGTERM to this process, which all processes then hear of; the
    second interrupts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupt = signal.getsignal(signal.SIGINT)

    def ask(number: int, _: object) -> None:
        signal.signal(signal.SIGINT, interrupt)
        _note("all processes stop after a step (Ctrl-C again: at once)")
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt)


def _note(text: str) -> None:
    print(f"Warning: {text}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------- slow items

Begin = Callable[[str], None]
"""Called with the name of each item as its work begins."""


@contextlib.contextmanager
def told_when_slow(advice: str, *, seconds: float = 30.0) -> Iterator[Begin]:
    """A function to call as each item begins; an item that takes longer than `seconds` is named on
    stderr.

    The timer of the process (SIGALRM) is used and given back. Where there is none (Windows, a
    thread that is not the main one) nothing is said.

    Args:
      advice: what to do about it; ends the line.
      seconds: how long an item may take in silence; after each further span of this length it is
        named again.
    """
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield lambda name: None
        return
    at = {"name": "the first item", "spans": 0}

    def begin(name: str) -> None:
        at.update(name=name, spans=0)
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)

    def tell(number: int, frame: object) -> None:
        del number, frame
        at["spans"] = int(at["spans"]) + 1
        taken = int(at["spans"]) * seconds
        print(
            f"{at['name']} has taken {taken:g} s and is not done: {advice}",
            file=sys.stderr,
            flush=True,
        )

    before = signal.signal(signal.SIGALRM, tell)
    try:
        yield begin
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
