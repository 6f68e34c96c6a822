"""The console may go away; the run does not.

Whoever starts a run may close its output (``| head``, a lost terminal, ``>&-``, a full disk behind
``> log``). What a run writes there is a copy of what its files hold, so losing the reader must not
lose hours of work, nor end in a
traceback: from then on its output goes nowhere, and that is said once on the other stream, where
  one is left.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any


class _Lasting(io.FileIO):
    """A file descriptor whose first failed write turns it into one that takes everything and keeps
    nothing.
    """

    def __init__(self, handle: int, name: str):
        super().__init__(handle, "w", closefd=False)
        self._told = name

    def write(self, data) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().write(data)
        except OSError as error:
            _to_nowhere(self.fileno())
            other = sys.stderr if self._told == "standard output" else None
            if other is not None:
                note = f"Warning: {self._told} cannot be written any more ({error.strerror}): the run goes on without it"
                print(note, file=other, flush=True)
            return len(data)


def outlive_readers() -> None:
    """Makes standard output and standard error last when nobody reads them, or when they were
    closed at the start.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # Otherwise the next file that is opened gets this number, and prints of libraries go
            # into it.
            _to_nowhere(number)
    sys.stdout = _lasting(sys.stdout, 1, "standard output")
    sys.stderr = _lasting(sys.stderr, 2, "standard error")


def _lasting(stream: Any, number: int, name: str) -> Any:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if isinstance(getattr(getattr(stream, "buffer", None), "raw", None), _Lasting):
        return stream
    try:
        real = stream.fileno() == number
    except (OSError, ValueError, AttributeError):
        real = False
    if not real or not isinstance(stream, io.TextIOWrapper):
        return stream  # a test or a notebook has put its own there
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Lasting(number, name)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=number == 2,
    )


def _to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
