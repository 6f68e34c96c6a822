"""Says what a loop is at when one item takes suspiciously long, while that item is still being worked on.

A regular expression may need longer than the age of the universe for an unlucky text, and a program that stands still
without a word cannot be helped. The message comes from a timer's signal, because a regular expression keeps other
threads waiting but looks for signals as it goes.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

Begin = Callable[[str], None]
"""Called with the name of each item as its work begins."""


@contextlib.contextmanager
def told_when_slow(advice: str, *, seconds: float = 30.0) -> Iterator[Begin]:
    """A function to call as each item begins; an item that takes longer than `seconds` is named on stderr.

    The timer of the process (SIGALRM) is used and given back. Where there is none (Windows, a thread that is not the
    main one) nothing is said.

    Args:
      advice: what to do about it; ends the line.
      seconds: how long an item may take in silence; after each further span of this length it is named again.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
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
        print(f"{at['name']} has taken {taken:g} s and is not done: {advice}", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGALRM, tell)
    try:
        yield begin
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
