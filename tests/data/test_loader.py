from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.loader import Batches, fingerprint
from rlhf_jax.types import LMBatch


def lm_batch(rows: int) -> LMBatch:
    row = np.repeat(np.arange(rows, dtype=np.int32)[:, None], 3, axis=1)
    return LMBatch(tokens=row, segments=row + 1, positions=row, mask=row > 0)


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(1, 20), st.integers(1, 25), st.integers(0, 3))
def test_every_row_is_visited_once_per_epoch(rows: int, batch_size: int, seed: int):
    """PITFALLS 39: no ragged tail is dropped, whatever the sizes."""
    batches = Batches({"x": np.arange(rows)}, batch_size=batch_size, seed=seed)
    stream = np.concatenate([batches.at(step)["x"] for step in range(batches.steps(3))])
    assert len(stream) >= 3 * rows
    for epoch in range(3):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_permutations_differ_between_epochs_and_seeds():
    """PITFALLS 39."""
    a, b = (Batches({"x": np.arange(50)}, batch_size=50, seed=seed) for seed in (0, 1))
    orders = [tuple(batches.indices(step)) for batches in (a, b) for step in range(3)]
    assert len(set(orders)) == 6


def test_a_batch_depends_on_seed_and_step_alone():
    """Resuming needs one integer: any step, asked for first, last or again, gives the same rows."""
    walked = Batches(lm_batch(7), batch_size=3, seed=5)
    seen = [walked.at(step).tokens for step in range(20)]
    for step in (19, 0, 11):
        fresh = Batches(lm_batch(7), batch_size=3, seed=5)
        np.testing.assert_array_equal(fresh.at(step).tokens, seen[step])
        np.testing.assert_array_equal(walked.at(step).tokens, seen[step])


def test_all_fields_take_the_same_rows():
    batch = Batches(lm_batch(9), batch_size=4, seed=0).at(1)
    assert isinstance(batch, LMBatch)
    np.testing.assert_array_equal(batch.segments, np.asarray(batch.tokens) + 1)
    np.testing.assert_array_equal(batch.mask, np.asarray(batch.tokens) > 0)


def test_processes_share_a_batch_without_overlap():
    whole = Batches(lm_batch(10), batch_size=6, seed=2).at(4).tokens
    parts = [
        Batches(lm_batch(10), batch_size=6, seed=2, process_index=i, process_count=3).at(4).tokens
        for i in (0, 1, 2)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ({"x": np.zeros(0)}, {}, "no rows"),
        ({"x": np.zeros(3), "y": np.zeros(2)}, {}, "one number of rows"),
        ({"x": np.zeros(3)}, {"batch_size": 0}, "batch_size=0"),
        ({"x": np.zeros(3)}, {"batch_size": 5, "process_count": 2}, "batch_size=5 .* choose 4"),
        (
            {"x": np.zeros(3)},
            {"batch_size": 4, "process_count": 2, "process_index": 2},
            "process_index=2",
        ),
    ],
)
def test_bad_arguments_are_named(rows: dict, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Batches(rows, **{"batch_size": 2, "seed": 0, **arguments})


def test_fingerprint_sees_every_change():
    base = {"x": np.arange(6, dtype=np.int32), "y": np.zeros(6, bool)}
    changed = [
        {**base, "x": base["x"][::-1]},
        {**base, "x": base["x"].astype(np.int64)},
        {**base, "x": base["x"].reshape(6, 1)},
        {"y": base["y"], "z": base["x"]},
        {**base, "y": np.eye(6, dtype=bool)[0]},
    ]
    prints = [fingerprint(rows) for rows in [base, *changed]]
    assert len(set(prints)) == len(prints)
    assert fingerprint({k: v.copy() for k, v in base.items()}) == prints[0]
    assert fingerprint(lm_batch(3)) != fingerprint(lm_batch(4))


# --------------------------------------------------------------------------------------------- the order is for ever


def test_order_of_rows_is_that_of_recorded_runs():
    """Numbers written down once: another order would change every recorded result and break every resume."""
    batches = Batches({"x": np.arange(11)}, batch_size=4, seed=3)
    assert {step: batches.indices(step).tolist() for step in (0, 1, 2, 3, 5, 100)} == {
        0: [9, 7, 0, 2], 1: [1, 4, 6, 10], 2: [5, 3, 8, 7], 3: [4, 10, 1, 2], 5: [6, 3, 7, 0], 100: [4, 2, 9, 5],
    }  # fmt: skip
    batches = Batches({"x": np.arange(1000)}, batch_size=64, seed=7)
    order = np.concatenate([batches.indices(step) for step in range(200)]).astype("<i8")
    wanted = "750d0f85c22ed00ccc5e2b465ce79f3b597a481a3b8a07a33c4e3b40a87a5451"
    assert hashlib.sha256(order.tobytes()).hexdigest() == wanted


# ------------------------------------------------------------------------------------------------- records and streams


class Source:
    """A random-access source as `tfds.data_source` is one: rows by number, many at once."""

    def __init__(self, size: int):
        self.size, self.read = size, []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int) -> dict:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: list[int]) -> list[dict]:
        assert all(type(place) is int for place in places)
        self.read += places
        return [{"text": "x" * place} for place in places]


def tokenise(records: list[dict]) -> LMBatch:
    """A stand-in for tokenising and padding."""
    row = np.zeros((len(records), 12), np.int32)
    for i, record in enumerate(records):
        row[i, : len(record["text"])] = len(record["text"])
    return LMBatch(tokens=row, segments=row + 1, positions=row, mask=row > 0)


def hard(texts: list[str]) -> dict[str, np.ndarray]:
    """Fails, exits or is killed at the rows that say so."""
    if "kill" in texts:
        os.kill(os.getpid(), signal.SIGKILL)
    if "exit" in texts:
        sys.exit(0)
    if "error" in texts:
        raise ValueError("a bad row")
    return {"n": np.array([len(text) for text in texts])}


def same(a: LMBatch, b: LMBatch) -> None:
    assert type(a) is type(b)
    for name in ("tokens", "segments", "positions", "mask"):
        assert type(getattr(a, name)) is np.ndarray
        assert getattr(a, name).dtype == getattr(b, name).dtype
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_records_are_read_when_a_batch_needs_them():
    source = Source(10)
    batches = Batches(source, batch_size=3, seed=0, transform=tokenise)
    assert source.read == []
    batch = batches.at(7)
    assert source.read == batches.indices(7).tolist()
    np.testing.assert_array_equal(np.asarray(batch.tokens).max(1), batches.indices(7))
    assert Batches(list("abc"), batch_size=3, seed=0).at(0) == [
        list("abc")[i] for i in batches_order("abc")
    ]
    with pytest.raises(ValueError, match="no rows"):
        Batches([], batch_size=3, seed=0)


def batches_order(rows: str) -> list[int]:
    return Batches({"x": np.arange(len(rows))}, batch_size=len(rows), seed=0).indices(0).tolist()


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_a_stream_is_at_step_after_step(prefetch: int):
    batches = Batches(lm_batch(7), batch_size=3, seed=5)
    stream = batches.stream(4, prefetch=prefetch)
    for step, batch in zip(range(4, 24), stream, strict=False):
        same(batch, batches.at(step))
    stream.close()


def test_workers_change_nothing_and_a_stream_resumes_at_its_step():
    """No workers, one, two: the same batches; stopped after step 9 and gone on with at 10: the same again."""
    batches = Batches(Source(11), batch_size=4, seed=1, transform=tokenise)
    stream = batches.stream(3, workers=2, prefetch=1)
    for step in range(3, 10):
        same(next(stream), batches.at(step))
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    stream = batches.stream(10, workers=1)
    for step in range(10, 16):
        same(next(stream), batches.at(step))
    stream.close()
    assert not multiprocessing.active_children()


def test_two_processes_stream_the_halves_of_the_batch():
    whole = Batches(lm_batch(10), batch_size=6, seed=2).stream(1)
    halves = [
        Batches(lm_batch(10), batch_size=6, seed=2, process_index=i, process_count=2).stream(1)
        for i in (0, 1)
    ]
    for batch, first, second in itertools.islice(zip(whole, *halves, strict=False), 6):
        assert len(first.tokens) == len(second.tokens) == 3
        np.testing.assert_array_equal(np.concatenate([first.tokens, second.tokens]), batch.tokens)
    for stream in (whole, *halves):
        stream.close()


def test_a_stream_and_at_may_be_used_side_by_side():
    """The thread that makes batches ahead and the caller share the cache of permutations."""
    batches = Batches({"x": np.arange(5)}, batch_size=3, seed=0)
    stream = batches.stream(prefetch=4)
    for step, batch in zip(range(300), stream, strict=False):
        far = batches.at(1000 - step)["x"]
        np.testing.assert_array_equal(far, batches.indices(1000 - step))
        np.testing.assert_array_equal(batch["x"], batches.indices(step))
    stream.close()


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (
            "kill",
            OSError,
            r"a loader worker ended while it made .* step \d+ on .*exit code -9.* fewer workers",
        ),
        ("exit", RuntimeError, "transform exits"),
        ("error", ValueError, "a bad row"),
    ],
)
def test_a_worker_that_fails_or_dies_is_an_error_and_no_hang(row: str, error: type, message: str):
    begin = time.monotonic()
    stream = Batches(["a", "b", row, "c"], batch_size=1, seed=0, transform=hard).stream(
        workers=1, prefetch=1
    )
    with pytest.raises(error, match=message):
        list(itertools.islice(stream, 4))
    assert time.monotonic() - begin < 60
    assert not multiprocessing.active_children()


def test_workers_send_arrays_only():
    stream = Batches(["a", "b"], batch_size=1, seed=0).stream(workers=1)
    with pytest.raises(ValueError, match="with workers a batch must be a dict or struct of arrays"):
        next(stream)
    assert next(Batches(["a"], batch_size=1, seed=0).stream()) == ["a"]


@pytest.mark.parametrize(
    "arguments",
    [{"start_step": -1}, {"workers": -1}, {"prefetch": -1}, {"workers": 1, "prefetch": 0}],
)
def test_bad_arguments_of_a_stream_are_named_at_once(arguments: dict):
    with pytest.raises(
        ValueError, match=r"(start_step|workers|prefetch)=-?\d must be [01] or more"
    ):
        Batches({"x": np.arange(3)}, batch_size=1, seed=0).stream(**arguments)


SCRIPT = """
import multiprocessing, os, signal, sys
import numpy as np
from rlhf_jax.data.loader import Batches

def transform(texts):
    return {"n": np.array([[len(text)] * 5000 for text in texts])}

if __name__ == "__main__":
    batches = Batches(["a" * i for i in range(9)], batch_size=2, seed=0, transform=transform)
    stream = batches.stream(workers=2)
    for step in range(4):
        assert (next(stream)["n"] == batches.at(step)["n"]).all()
    workers = [process.pid for process in multiprocessing.active_children()]
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker, number)
    assert (next(stream)["n"] == batches.at(4)["n"]).all()
    print(*workers, flush=True)
    if sys.argv[1] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["leave", "die"])
def test_workers_of_a_script_end_with_it_and_leave_signals_to_it(tmp_path: Path, end: str):
    """No absl.app.run, no close(): a program that ends, or is killed, leaves no worker and says nothing."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", end],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    workers = [int(word) for word in done.stdout.split()]
    assert len(workers) == 2, done.stderr
    if end == "leave":
        assert (done.returncode, done.stderr) == (0, "")
    for _ in range(100):
        alive = [worker for worker in workers if is_alive(worker)]
        if not alive:
            return
        time.sleep(0.1)
    pytest.fail(f"workers {alive} outlive their program")


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")  # a zombie that nobody waits for has ended
    return not (state.is_file() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z")


@pytest.mark.parametrize(
    ("rows", "batch", "processes"), [(5, 4, 1), (5, 4, 2), (1, 8, 1), (8, 4, 1), (9, 2, 2)]
)
def test_each_row_counts_once_whatever_the_batch_and_the_processes(rows, batch, processes):
    counted = []
    for process in range(processes):
        batches = Batches(
            {"x": np.arange(rows)},
            batch_size=batch,
            seed=3,
            process_index=process,
            process_count=processes,
        )
        for found, counts in batches.each_once():
            assert len(found["x"]) == len(counts) == batch // processes
            counted += found["x"][counts].tolist()
    assert sorted(counted) == list(range(rows))
    first = [
        counts.sum()
        for _, counts in Batches({"x": np.arange(rows)}, batch_size=batch, seed=3).each_once(1)
    ]
    assert first == [min(rows, batch)]
