"""Output streams that survive the loss of their reader.

The reader of a run's output may disappear (``| head``, a lost terminal, ``>&-``, a full disk behind
``> log``). Console output only repeats what the run's files contain, so losing it must neither end
hours of work nor raise a traceback. From then on the output is discarded, and one warning is
printed on the other stream if that is still open.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any


class _Lasting(io.FileIO):
    """A file descriptor that discards everything after its first failed write."""

    def __init__(self, handle: int, name: str):
        # `closefd=False`, so that collecting this object does not close the standard stream.
        super().__init__(handle, "w", closefd=False)
        self._told = name

    def write(self, data) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().write(data)
        except OSError as error:
            # The descriptor itself is redirected, for the C libraries that print to it.
            _to_nowhere(self.fileno())
            other = sys.stderr if self._told == "standard output" else None
            if other is not None:
                note = (
                    f"Warning: {self._told} cannot be written any more ({error.strerror}): "
                    "the run goes on without it"
                )
                print(note, file=other, flush=True)
            # A short count would make the buffered writer around this object try again.
            return len(data)


def outlive_readers() -> None:
    """Lets standard output and error outlive their readers, or being closed from the start."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # Otherwise the next file to be opened gets this number and receives all that libraries
            # print.
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
        # A test or a notebook has replaced the stream.
        return stream
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
