"""What a long program says: the time that is left is true after a few steps, lines are short, units are right."""

from __future__ import annotations

import io
import os
import re
import time

import pytest

from rlhf_jax.run import console as C
from rlhf_jax.run import metrics
from rlhf_jax.run.console import Screen


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def seconds(eta: str) -> int:
    """``1h02m``, ``3m08s`` or ``7s`` as seconds."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", eta))


def stage(
    durations, *, total, recompiles=(), resume=0, show=(), values=None, stream=None, **options
):
    """The lines of a stage whose steps take so long; `recompiles` are steps in which the compiler ran."""
    clock, out, count = Clock(), stream or io.StringIO(), [0]
    console = C.Console(
        "ppo",
        total,
        resume,
        show=show,
        compilations=lambda: count[0],
        screen=Screen(every=0.0, stream=out, clock=clock),
        **options,
    )
    for step, took in enumerate(durations, start=resume + 1):
        clock.now += took
        count[0] += step in recompiles
        console.update(step, values or {})
    return console, out.getvalue().splitlines()


def test_the_first_steps_compilation_is_not_in_the_time_left():
    """Compiling takes 40 s and 100 steps take 4 s each: seven minutes, and not the 66 that step 1 looks like."""
    _, lines = stage([44.0, 4.0, 4.0, 4.0], total=100, recompiles=(1,))
    assert "ETA" not in lines[0]
    for line, done in zip(lines[1:], (2, 3, 4), strict=True):
        assert seconds(line.partition("ETA ")[2]) == 4 * (100 - done)


@pytest.mark.parametrize("counted", [True, False])
def test_a_second_compilation_later_is_not_in_it_either(counted):
    """PPO compiles another form of its update when responses first fit two to a row."""
    steps = [60.0, 5.0, 5.0, 90.0, 5.0, 5.0, 5.0]
    _, lines = stage(steps, total=50, recompiles=(1, 4) if counted else (1,))
    assert seconds(lines[-1].partition("ETA ")[2]) == pytest.approx(5 * 43, rel=0.2)
    assert seconds(lines[3].partition("ETA ")[2]) == pytest.approx(5 * 46, rel=0.2)


def test_what_comes_again_and_again_counts():
    """An evaluation of 20 s after each tenth step of 1 s: three seconds a step."""
    steps = [30.0] + [21.0 if step % 10 == 0 else 1.0 for step in range(2, 62)]
    console, _ = stage(steps, total=1000, recompiles=(1,))
    assert console.seconds_left == pytest.approx(3 * (1000 - 61), rel=0.2)


def test_a_program_that_compiles_at_each_step_still_has_a_rate():
    console, _ = stage([9.0, 3.0, 3.0], total=5, recompiles=(1, 2, 3))
    assert console.seconds_left == 6.0


def test_after_a_resume_only_the_steps_of_this_process_count():
    _, lines = stage([50.0, 2.0, 2.0], total=1000, resume=900, recompiles=(901,))
    assert lines[-1] == "ppo 903/1000  2.0 s/step  ETA 3m14s"


def test_responses_come_in_bursts_and_the_time_left_is_true():
    """A sampler tells its count after each refill: 3 or 20 at once, 4 responses a second all the same."""
    clock, out = Clock(), io.StringIO()
    console = C.Console(
        "sample", 1000, unit="responses", show=(), screen=Screen(every=0.0, stream=out, clock=clock)
    )
    done = 0
    for burst in (16, 3, 20, 8, 12, 5):
        clock.now += 40 if not done else burst / 4
        done += burst
        console.update(done, {})
    line = out.getvalue().splitlines()[-1]
    assert line == f"sample {done}/1000  4.0 responses/s  ETA {C.duration((1000 - done) / 4)}"


@pytest.mark.parametrize(
    ("unit", "took", "said"),
    [
        ("iterations", 3.0, "3.0 s/iteration"),
        ("responses", 0.1, "10.0 responses/s"),
        ("models", 90.0, "90.0 s/model"),
        ("steps", 0.25, "4.0 steps/s"),
    ],
)
def test_units_are_those_of_the_work(unit, took, said):
    _, lines = stage([took] * 4, total=9, unit=unit)
    assert f"  {said}  ETA" in lines[-1]


LONG = {
    "rollout/score": 0.123456, "gold_score": -0.98765, "rollout/kl_nats_per_sequence": 12.3456789,
    "rollout/response_tokens": 20.51234, "held_out_loss": 2.3456789,
}  # fmt: skip


def test_no_line_is_longer_than_a_hundred_columns():
    _, lines = stage([3.0] * 12, total=12_000, show=tuple(LONG), values=LONG, unit="iterations")
    assert all(len(line) <= 100 for line in lines)
    assert "  score 0.1235  gold_score -0.9877  kl 12.35" in lines[-1]
    assert not lines[-1].endswith("held_out")  # a number is shown whole or not at all
    _, (line, *_) = stage([3.0], total=12, show=("rollout/score",), values=LONG)
    assert line == "ppo 1/12  rollout/score 0.1235"  # whole names where they fit


@pytest.mark.parametrize("columns", [60, 200])
def test_a_terminal_has_its_own_width(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    stage([3.0] * 3, total=12_000, show=tuple(LONG), values=LONG, stream=out)
    last = out.getvalue().rpartition("\r")[2].replace("\x1b[K", "").strip()
    assert len(last) < columns
    assert (len(last) > 100) == (columns == 200)


def test_short_work_says_nothing_and_long_work_speaks_every_ten_seconds():
    for seconds_of_a_row, most in ((0.01, 0), (1.0, 12)):
        clock, out = Clock(), io.StringIO()
        with C.Progress(
            "scoring", 100, unit="rows", screen=Screen(stream=out, clock=clock)
        ) as done:
            for row in range(1, 101):
                clock.now += seconds_of_a_row
                done(row)
        lines = out.getvalue().splitlines()
        assert len(lines) <= most
        assert bool(lines) == bool(most)
    assert lines[0] == "scoring 5/100  1.0 rows/s  ETA 1m35s"
    assert lines[-1] == "scoring 100/100  1.0 rows/s  took 1m40s"
    assert len(lines) >= 9


def test_work_without_steps_says_that_it_goes_on():
    out = io.StringIO()
    with C.patiently("reading", after=0.05, every=0.05, stream=out):
        until = time.monotonic() + 20
        while out.getvalue().count("\n") < 2 and time.monotonic() < until:
            time.sleep(0.01)
    assert re.fullmatch(r"(reading: \d+s so far\n){2,}", out.getvalue())
    out = io.StringIO()
    with C.patiently("reading", after=100, stream=out):
        pass
    assert out.getvalue() == ""


def test_a_stage_that_compiles_long_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(
        metrics, "patiently", lambda what, stream: C.patiently(what, after=0.05, stream=stream)
    )
    out = io.StringIO()
    with metrics.StageLog(tmp_path, "sft", total=2, screen=Screen(stream=out)) as log:
        until = time.monotonic() + 20
        while not out.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
        log(1, {"loss": 1.0})
        log(2, {"loss": 1.0})
    assert out.getvalue().startswith("sft: the first step of 2, which compiles: ")


def test_the_log_tells_the_time_left_to_whoever_asks(tmp_path):
    clock = Clock()
    with metrics.StageLog(
        tmp_path,
        "ppo",
        total=10,
        unit="iterations",
        screen=Screen(stream=io.StringIO(), clock=clock),
    ) as log:
        assert log.seconds_left is None
        for step in range(1, 5):
            clock.now += 7.0
            log(step, {"loss": 1.0})
        assert log.seconds_left == 7.0 * (10 - 3)  # the fourth waits for the fifth
    assert "iteration" not in (tmp_path / metrics.FILE).read_text()


def test_a_step_that_was_waited_for_is_timed_when_it_is_handed_in(tmp_path):
    """Its line is written with the next one, or at the end: that moment says nothing of its time."""
    clock, out = Clock(), io.StringIO()
    with metrics.StageLog(
        tmp_path,
        "sample",
        total=30,
        unit="responses",
        show=(),
        waited=True,
        screen=Screen(stream=out, clock=clock, every=0.0),
    ) as log:
        for done in (10, 20, 30):
            clock.now += 5.0
            log(done, {"responses": done})
    assert out.getvalue().splitlines()[-1] == "sample 30/30  2.0 responses/s  took 15s"


def test_programs_that_jax_compiles_are_counted():
    import jax

    before = C.Compilations.count()
    number = float(os.getpid())
    jax.jit(lambda x: x * number)(1.0)
    assert C.Compilations.count() > before


def test_a_count_of_nothing_is_no_line_and_the_time_still_counts_from_it():
    """Sampling says 0 of 212 when it begins, which tells nobody anything."""
    clock, out = Clock(), io.StringIO()
    console = C.Console(
        "sample", 212, show=(), unit="responses", screen=Screen(every=0.0, stream=out, clock=clock)
    )
    for done, took in ((0, 1.0), (106, 2.0), (212, 2.0)):
        clock.now += took
        console.update(done, {})
    assert [line.split()[:2] for line in out.getvalue().splitlines()] == [
        ["sample", "106/212"],
        ["sample", "212/212"],
    ]
    assert "53.0 responses/s" in out.getvalue()
