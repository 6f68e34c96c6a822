"""Where numbers go: JSON lines always, a live line on the console, TensorBoard and Weights & Biases
as extras.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.run import files, processes
from rlhf_jax.run.console import Console, Screen, patiently
from rlhf_jax.types import Each, Max, Mean

Values = Mapping[str, Any]
"""Metrics by name: `Mean`, `Max`, arrays or numbers. A name may hold slashes, as in
``policy/clip_fraction``."""

Writer = Callable[[int, str, dict[str, float]], None]
"""Takes ``(step, stage, floats)``."""

FILE = "metrics.jsonl"


def to_host(metrics: Values) -> dict[str, float]:
    """Metrics as Python floats, fetched from the device together; a `Mean` is divided, on the host
    in float64.

    An `Each` is left out: it is no number.

    >>> import jax.numpy as jnp
    >>> to_host({"loss": Mean(jnp.float32(6), jnp.float32(4)), "norm": Max(jnp.float32(2)), "lr": 0.5})
    {'loss': 1.5, 'norm': 2.0, 'lr': 0.5}
    """
    fetched = jax.device_get(
        {name: value for name, value in metrics.items() if not isinstance(value, Each)}
    )
    return {
        name: _number(fetched[name]) for name in metrics if name in fetched
    }  # in the caller's order, not JAX's


def _number(value: Any) -> float:
    if isinstance(value, Mean):
        total, count = float(value.total), float(value.count)
        return total / count if count else 0.0
    return float(value.value if isinstance(value, Max) else value)


class StageLog:
    """Records one stage of a run: ``log(step, metrics)`` once a step, in a ``with`` block.

    A step's numbers are fetched when the next step has been handed in, so the device never waits
    for the console.

    Args:
      workdir: the run folder; lines are appended to ``metrics.jsonl`` in it.
      stage: the name of the stage, ``"sft"``.
      total: how many steps the stage has.
      resume_step: the step training goes on from (0: a fresh start). Lines of this stage with a
        later step are dropped first, so that each step appears once although its checkpoint was
        older.
      show: the metrics for the console, in order; those that a step lacks are left out.
      unit: what a step is, in the plural: ``iterations``, ``responses``.
      screen: where lines appear, and how often.
      waited: whether a step is over when it is handed in, as where a host loop waits for it; a
        training step is still being computed then, and is timed when its numbers have arrived.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        stage: str,
        *,
        total: int,
        resume_step: int = 0,
        show: Sequence[str] = ("loss",),
        unit: str = "steps",
        screen: Screen = Screen(),
        waited: bool = False,
    ):
        # Process 0 alone writes; the others fetch the numbers too, so that none runs ahead.
        folder = files.local_path("workdir", workdir)
        self._path = folder / FILE if processes.index() == 0 else Path(os.devnull)
        if processes.index() > 0:
            screen = screen._replace(stream=io.StringIO())
        if processes.index() == 0:
            drop_after(self._path, stage, resume_step)
        self._file = files.appending(self._path)
        self._stage, self._writers = stage, []
        self._console = Console(stage, total, resume_step, show=show, unit=unit, screen=screen)
        self._pending: tuple[int, float, Values] | None = None
        self._clock, self._handed_in = screen.clock if waited else None, 0.0
        # Until the first step is handed in nothing else would be said, and it may compile for
        # minutes.
        self._first = contextlib.ExitStack()
        self._first.enter_context(
            patiently(
                f"{stage}: the first {unit.removesuffix('s')} of {total}, which compiles",
                stream=screen.stream,
            )
        )

    def add_writer(self, writer: Writer) -> None:
        """Hands every record to `writer` too, such as `tensorboard_writer`; from process 0
        alone.
        """
        if processes.index() == 0:
            self._writers.append(writer)

    def __call__(self, step: int, metrics: Values) -> None:
        """Hands in the metrics of `step` (counted from 1: the number of steps done); two of a step
        become one line.
        """
        self._first.close()
        previous, self._pending = self._pending, (step, time.time(), metrics)
        if previous and previous[0] == step:
            self._pending = (step, previous[1], {**previous[2], **metrics})
        elif previous:
            self._write(*previous)
        self._handed_in = self._clock() if self._clock else 0.0

    def flush(self) -> None:
        """Writes what is pending to the disk, waiting for the device: before a checkpoint, and at
        the end.
        """
        pending, self._pending = self._pending, None
        if pending:
            self._write(*pending)
        if self._path != Path(os.devnull):
            files.flush(self._file)  # a power cut must not take lines that a checkpoint counts on

    def close(self) -> None:
        """Flushes, ends the console line and closes the file."""
        self._first.close()
        try:
            self.flush()
        finally:
            self._console.close()
            self._file.close()

    @property
    def seconds_left(self) -> float | None:
        """How long the stage will still take, as its console shows it; None while that is not
        known.
        """
        return self._console.seconds_left

    def __enter__(self) -> StageLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, step: int, when: float, metrics: Values) -> None:
        numbers = to_host(metrics)
        self._file.write(to_line(step, self._stage, when, numbers))
        self._file.flush()
        self._console.update(step, numbers, at=self._handed_in if self._clock else None)
        for writer in self._writers:
            writer(step, self._stage, numbers)


def to_line(step: int, stage: str, when: float, numbers: Mapping[str, float]) -> str:
    """One record as a line of JSON; a number that is not finite becomes null, which every JSON
    reader accepts.

    >>> to_line(3, "sft", 0.0, {"loss": 1.5, "norm": float("inf")}).strip()
    '{"step": 3, "stage": "sft", "time": 0.0, "loss": 1.5, "norm": null}'
    """
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return (
        json.dumps(
            {"step": step, "stage": stage, "time": round(when, 3), **finite}, allow_nan=False
        )
        + "\n"
    )


def read(path: str | os.PathLike[str], stage: str | None = None) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl`` (of one stage); a line cut off by a crash is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        record = _record(line)
        if record and stage in (None, record.get("stage")):
            records.append(record)
    return records


def drop_after(path: str | os.PathLike[str], stage: str, step: int) -> int:
    """Rewrites the file without the lines of `stage` after `step` and without a cut-off line; all
    or nothing.

    Returns:
      How many lines were dropped.
    """
    path = Path(path)
    if not path.exists():
        return 0
    if not path.is_file():
        raise ValueError(f"{path} is no regular file: move it away, the run writes its log there")
    lines = path.read_text(
        encoding="utf-8", errors="replace"
    ).splitlines()  # a crash may leave bytes of no encoding
    kept = [line for line in lines if _keeps(_record(line), stage, step)]
    damaged = sum(_record(line) is None for line in lines[:-1] if line.strip())
    if damaged:
        # The last line may be torn by a crash; one before it was changed by somebody else.
        print(
            f"Warning: {damaged} damaged lines of {path} are left out", file=sys.stderr, flush=True
        )
    if len(kept) < len(lines) or (lines and not path.read_bytes().endswith(b"\n")):
        with files.written(path) as file:
            file.writelines(line + "\n" for line in kept)
    return len(lines) - len(kept)


def _keeps(record: dict[str, Any] | None, stage: str, step: int) -> bool:
    return record is not None and (record.get("stage") != stage or record.get("step", 0) <= step)


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _is_sound(record) else None


def _is_sound(record: Mapping[str, Any]) -> bool:
    """Whether a line can be one of ours: its step is a number, and no number is infinite or
    endless.
    """
    numbers = [value for value in record.values() if isinstance(value, int | float)]
    step = record.get("step", 0)
    return (
        isinstance(step, int | float)
        and not isinstance(step, bool)
        and all(abs(v) < 1e300 for v in numbers)
    )


# ------------------------------------------------------------------------------------------- extras


def tensorboard_writer(logdir: str | os.PathLike[str]) -> Writer:
    """A writer of TensorBoard event files (the extra ``tensorboard``); scalars are named
    ``stage/metric``.
    """
    board = _extra("tensorboardX", "tensorboard").SummaryWriter(str(logdir))

    def write(step: int, stage: str, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            board.add_scalar(f"{stage}/{name}", value, step)
        board.flush()

    return write


def wandb_writer(
    *, project: str, name: str | None = None, run_id: str | None = None, mode: str = "online"
) -> Writer:
    """A writer to Weights & Biases (the extra ``wandb``); the key comes from the environment only.

    Args:
      project: the project of the run.
      name: a name for people.
      run_id: resumes that run when it exists.
      mode: "online", "offline" or "disabled".
    """
    wandb = _extra("wandb", "wandb")
    run = wandb.init(project=project, name=name, id=run_id, mode=mode, resume="allow")

    def write(step: int, stage: str, numbers: dict[str, float]) -> None:
        run.define_metric(
            f"{stage}/*", step_metric=f"{stage}/step"
        )  # each stage counts its own steps
        run.log(
            {f"{stage}/{key}": value for key, value in numbers.items()} | {f"{stage}/step": step}
        )

    return write


def _extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ValueError(
            f'the {extra} writer needs the package {module}: pip install "rlhf_jax[{extra}]", or '
            "switch it off"
        ) from None
