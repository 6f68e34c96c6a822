"""Writers of metrics: JSON lines, the console, and optionally TensorBoard or Weights & Biases."""

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
"""Metrics by name: `Mean`, `Max`, arrays or numbers.

A name may contain slashes, as in ``policy/clip_fraction``.
"""

Writer = Callable[[int, str, dict[str, float]], None]
"""Takes ``(step, stage, floats)``."""

FILE = "metrics.jsonl"


def to_host(metrics: Values) -> dict[str, float]:
    """Fetches metrics from the device in one transfer, as Python floats.

    A `Mean` is divided on the host in float64. An `Each` is omitted: it is not a single number.

    >>> import jax.numpy as jnp
    >>> loss, norm = Mean(jnp.float32(6), jnp.float32(4)), Max(jnp.float32(2))
    >>> to_host({"loss": loss, "norm": norm, "lr": 0.5})
    {'loss': 1.5, 'norm': 2.0, 'lr': 0.5}
    """
    fetched = jax.device_get(
        {name: value for name, value in metrics.items() if not isinstance(value, Each)}
    )
    # In the caller's order: JAX sorts the keys of a dictionary.
    return {name: _number(fetched[name]) for name in metrics if name in fetched}


def _number(value: Any) -> float:
    if isinstance(value, Mean):
        total, count = float(value.total), float(value.count)
        return total / count if count else 0.0
    return float(value.value if isinstance(value, Max) else value)


class StageLog:
    """Records one stage of a run: ``log(step, metrics)`` once per step, in a ``with`` block.

    The metrics of a step are fetched when those of the next step arrive, so the device never waits
    for the console.

    Args:
      workdir: the run folder; lines are appended to ``metrics.jsonl`` in it.
      stage: the name of the stage, ``"sft"``.
      total: number of steps of the stage.
      resume_step: the step from which training resumes (0: a fresh start). Lines of this stage with
        a later step are dropped first, so that each step appears once even if the checkpoint was
        older than the log.
      show: the metrics for the console, in order; metrics that a step lacks are omitted.
      unit: the plural noun for a step: ``iterations``, ``responses``.
      screen: where lines appear, and how often.
      waited: whether a step has finished when it is logged, as when a host loop waits for it;
        otherwise a training step is still being computed then, and is timed when its metrics
        arrive.
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
        # Only process 0 writes; the others fetch the numbers too, so that none runs ahead.
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
        # Nothing is printed until the first step is logged, and compiling it may take minutes.
        self._first = contextlib.ExitStack()
        self._first.enter_context(
            patiently(
                f"{stage}: the first {unit.removesuffix('s')} of {total}, which compiles",
                stream=screen.stream,
            )
        )

    def add_writer(self, writer: Writer) -> None:
        """Passes every record to `writer` too, such as `tensorboard_writer`; only on process 0."""
        if processes.index() == 0:
            self._writers.append(writer)

    def __call__(self, step: int, metrics: Values) -> None:
        """Logs the metrics of `step`, the number of steps done; merges calls for the same step."""
        # The first step is done, so the sign of life of its compilation ends.
        self._first.close()
        previous, self._pending = self._pending, (step, time.time(), metrics)
        # A stage may log an evaluation after the step itself; both belong in one line.
        if previous and previous[0] == step:
            self._pending = (step, previous[1], {**previous[2], **metrics})
        elif previous:
            self._write(*previous)
        # After `_write`, which needs the time at which the previous step was handed in.
        self._handed_in = self._clock() if self._clock else 0.0

    def flush(self) -> None:
        """Writes pending metrics to disk, waiting for the device.

        Call it before a checkpoint and at the end.
        """
        pending, self._pending = self._pending, None
        if pending:
            self._write(*pending)
        if self._path != Path(os.devnull):
            # A power cut must not lose lines that precede a durable checkpoint.
            files.flush(self._file)

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
        """Estimated seconds left, as shown on the console; None while unknown."""
        return self._console.seconds_left

    def __enter__(self) -> StageLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, step: int, when: float, metrics: Values) -> None:
        # This waits for the device, one step behind the step that is being computed.
        numbers = to_host(metrics)
        self._file.write(to_line(step, self._stage, when, numbers))
        self._file.flush()
        self._console.update(step, numbers, at=self._handed_in if self._clock else None)
        for writer in self._writers:
            writer(step, self._stage, numbers)


def to_line(step: int, stage: str, when: float, numbers: Mapping[str, float]) -> str:
    """Formats a record as a line of JSON; a non-finite number becomes null, which is valid JSON.

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
    """Reads the records of a ``metrics.jsonl``, optionally of one stage; skips a truncated line."""
    records = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        record = _record(line)
        if record and stage in (None, record.get("stage")):
            records.append(record)
    return records


def drop_after(path: str | os.PathLike[str], stage: str, step: int) -> int:
    """Atomically drops the lines of `stage` after `step`, and a truncated last line.

    Returns:
      How many lines were dropped.
    """
    path = Path(path)
    if not path.exists():
        return 0
    if not path.is_file():
        raise ValueError(f"{path} is no regular file: move it away, the run writes its log there")
    # A crash may leave bytes that are not valid UTF-8.
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _keeps(_record(line), stage, step)]
    damaged = sum(_record(line) is None for line in lines[:-1] if line.strip())
    if damaged:
        # A crash can truncate only the last line; damage before it has another cause.
        print(
            f"Warning: {damaged} damaged lines of {path} are left out", file=sys.stderr, flush=True
        )
    # A last line without its end would be continued by the next one that is appended.
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
    """Whether a line can be one of ours: its step is a number, and every number is finite."""
    numbers = [value for value in record.values() if isinstance(value, int | float)]
    step = record.get("step", 0)
    # Python's parser accepts NaN and Infinity; both fail the comparison, as does an integer that is
    # too large for a float.
    return (
        isinstance(step, int | float)
        and not isinstance(step, bool)
        and all(abs(v) < 1e300 for v in numbers)
    )


# ------------------------------------------------------------------------------------------- extras


def tensorboard_writer(logdir: str | os.PathLike[str]) -> Writer:
    """A writer of TensorBoard event files; scalars are named ``stage/metric``.

    It needs the extra ``tensorboard``.
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
    """A writer to Weights & Biases; the API key is read from the environment only.

    It needs the extra ``wandb``.

    Args:
      project: the project of the run.
      name: display name of the run.
      run_id: resumes that run when it exists.
      mode: "online", "offline" or "disabled".
    """
    wandb = _extra("wandb", "wandb")
    run = wandb.init(project=project, name=name, id=run_id, mode=mode, resume="allow")

    def write(step: int, stage: str, numbers: dict[str, float]) -> None:
        # Each stage counts its own steps.
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
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
