"""Signal handling: Ctrl-C and SIGTERM, stop requests between two steps, and a timer."""

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
from typing import Any, NoReturn

from rlhf_jax.run import processes

# ----------------------------------------------------------------------------------- whole programs


@contextlib.contextmanager
def interrupting(*, several: bool) -> Iterator[None]:
    """Makes SIGTERM and Ctrl-C raise KeyboardInterrupt; a second signal exits immediately.

    This applies wherever no stage handles them with `stop_requests`. The immediate exit works even
    while XLA compiles, when Python's own handlers have to wait: a separate thread reads the signal
    numbers. With several processes JAX handles SIGTERM for all of them together, and nothing is
    done here.
    """
    if several or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _: object) -> None:
        stop = KeyboardInterrupt()
        stop.signal_number = number  # pyright: ignore[reportAttributeAccessIssue]
        raise stop

    def swallowed(unraisable: Any) -> None:
        """Sends the signal again if its interrupt was raised where it cannot propagate.

        That is the case in a destructor and in a callback from C.
        """
        number = getattr(unraisable.exc_value, "signal_number", None)
        if number is None:
            return told(unraisable)
        # The repeated signal is announced first: `_end_at_the_second` must not count it as the
        # user's.
        own.append(number)
        # Later and to the main thread, which by then has left the destructor or callback.
        threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, number]).start()

    own: list[int] = []
    told, sys.unraisablehook = sys.unraisablehook, swallowed
    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)
    }
    # The C handler of Python writes the number of each signal here at once, even while the
    # interpreter runs no bytecode.
    reader, writer = socket.socketpair()
    # Required by `set_wakeup_fd`.
    writer.setblocking(False)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(
        target=_end_at_the_second, args=(reader, own), name="signals", daemon=True
    ).start()
    try:
        yield
    finally:
        # A hook that was put around this one in the meantime stays: it has its own reason.
        if sys.unraisablehook is swallowed:
            sys.unraisablehook = told
        # The old descriptor is restored before the new one closes: a signal in between would
        # otherwise be written to a closed socket.
        signal.set_wakeup_fd(wakeup)
        writer.close()
        for number, handler in before.items():
            # `end_quietly` may have replaced them for the rest of the process.
            if signal.getsignal(number) is interrupt:
                signal.signal(number, handler)


_SAME = 1.0
"""Seconds within which a second SIGTERM counts as a duplicate, as sent by srun or an init."""


def _end_at_the_second(reader: socket.socket, own: list[int]) -> None:
    """Exits at the second signal from `reader`, ignoring those in `own`, sent by this process."""
    first: tuple[int, float] | None = None
    # The loop ends when `interrupting` closes the other end of the socket.
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
            # Gives the main thread a chance to end in good order.
            time.sleep(0.2)
            # Written to the descriptor itself, as the main thread may hold the lock of
            # `sys.stderr`.
            os.write(2, b"\nStopped at once. The same command goes on from the last checkpoint.\n")
            os._exit(128 + number[0])
    reader.close()


def end_quietly(status: int) -> None:
    """Makes a stopped program exit with `status`, whatever signals arrive during its shutdown."""
    if threading.current_thread() is threading.main_thread():
        # While Python joins its threads, which may take long, a signal exits immediately.
        _answer_signals(lambda *_: os._exit(status))
        atexit.register(_leave, status)


_kept: KeyboardInterrupt | None = None


def keep(interrupt: KeyboardInterrupt) -> None:
    """Keeps what the frames of an interrupt hold until the process exits.

    An interrupt in the middle of a call of a compiled function may leave it running, and freeing
    its program or its arrays then ends in a segmentation fault.
    """
    global _kept
    _kept = interrupt


def _leave(status: int) -> NoReturn:
    """Exits without the destructors of libraries, for the reason that `keep` gives."""
    # The rest of the shutdown takes milliseconds, so signals are ignored.
    _answer_signals(signal.SIG_IGN)
    atexit.unregister(_leave)
    # What else is registered, such as the end of worker processes, runs first.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _answer_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


# -------------------------------------------------------------------------------- between two steps


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Turns Ctrl-C, SIGTERM and preemption notices into a check between two steps.

    In the block ``stop(step)`` is true once a stop was requested: save and leave. A second signal
    interrupts immediately. A KeyboardInterrupt that leaves the block has the signal's number as
    `signal_number`, for the exit status. A signal that arrives after the last check is passed on
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
        # A SIGTERM within a second of another one is a duplicate.
        if again and number == asked[0][0] == signal.SIGTERM and now - asked[0][1] < _SAME:
            return
        asked.append((number, now))
        if again:
            raise KeyboardInterrupt
        _note("stopping after this step (Ctrl-C again: at once)")

    def stop(step: int) -> bool:
        if asked:
            heard.set()
        return bool(asked)

    # Python lets only the main thread set signal handlers.
    if threading.current_thread() is not threading.main_thread():
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
        # Called directly: a signal sent again would count as the second one.
        if callable(handler):
            handler(number, None)
        else:
            signal.raise_signal(number)


@contextlib.contextmanager
def _ctrl_c_as_preemption() -> Iterator[None]:
    """Turns the first Ctrl-C into a SIGTERM to this process; the second one interrupts.

    JAX forwards the SIGTERM to all processes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupt = signal.getsignal(signal.SIGINT)

    def ask(number: int, _: object) -> None:
        # The handler of before comes back at once, so that a second Ctrl-C interrupts.
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
    """Yields a function to call as each item begins; an item that takes long is named on stderr.

    The process timer (SIGALRM) is used and restored. Where there is none (on Windows, or outside
    the main thread) nothing is printed.

    Args:
      advice: what to do about it; appended to the line.
      seconds: time after which an item is named, and named again after each further period.
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
