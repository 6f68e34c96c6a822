from __future__ import annotations

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
        Batches(lm_batch(10), batch_size=6, seed=2, process_index=i, process_count=3).at(4).tokens for i in (0, 1, 2)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ({"x": np.zeros(0)}, {}, "no rows"),
        ({"x": np.zeros(3), "y": np.zeros(2)}, {}, "one number of rows"),
        ({"x": np.zeros(3)}, {"batch_size": 0}, "batch_size=0"),
        ({"x": np.zeros(3)}, {"batch_size": 5, "process_count": 2}, "batch_size=5 .* choose 4"),
        ({"x": np.zeros(3)}, {"batch_size": 4, "process_count": 2, "process_index": 2}, "process_index=2"),
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
