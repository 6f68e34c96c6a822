"""Metrics: one fetch, one line a step through crashes and resumes, readable progress."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.run import metrics
from rlhf_jax.run.console import Console, Screen
from rlhf_jax.types import Max, Mean

SILENT = Screen(stream=io.StringIO())


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Advances by `tick` seconds at each reading."""

    def __init__(self, tick):
        self.now, self.tick = 0.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


def test_to_host_divides_totals_with_one_fetch(monkeypatch):
    fetches = []
    fetch = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetches.append(1) or fetch(x))
    measured = {
        "loss": Mean(jnp.float32(6), jnp.int32(4)),
        "empty": Mean(jnp.float32(0), jnp.float32(0)),
        "norm": Max(jnp.float32(3)),
        "lr": 0.25,
        "n": jnp.int32(7),
    }
    assert metrics.to_host(measured) == {
        "loss": 1.5,
        "empty": 0.0,
        "norm": 3.0,
        "lr": 0.25,
        "n": 7.0,
    }
    assert len(fetches) == 1


def log_steps(tmp_path, steps, *, writers=(), stage="sft", resume_step=0, total=10, **kw):
    with metrics.StageLog(
        tmp_path, stage, total=total, resume_step=resume_step, screen=SILENT, **kw
    ) as log:
        for writer in writers:
            log.add_writer(writer)
        for step in steps:
            log(step, {"loss": Mean(jnp.float32(step), jnp.float32(2))})


def test_one_line_a_step_with_step_stage_time_and_values(tmp_path):
    log_steps(tmp_path, [1, 2])
    lines = [json.loads(line) for line in (tmp_path / metrics.FILE).read_text().splitlines()]
    assert [(r["step"], r["stage"], r["loss"]) for r in lines] == [(1, "sft", 0.5), (2, "sft", 1.0)]
    assert all(r["time"] > 1.7e9 for r in lines)


def test_resume_drops_the_lines_after_the_checkpoint_so_each_step_appears_once(tmp_path):
    log_steps(tmp_path, [1, 2, 3], stage="sft")
    log_steps(tmp_path, [1, 2, 3, 4, 5], stage="ppo")
    with (tmp_path / metrics.FILE).open("a") as f:
        f.write('{"step": 6, "stage": "ppo", "lo')  # killed while it wrote
    log_steps(tmp_path, [4, 5, 6], stage="ppo", resume_step=3)
    records = metrics.read(tmp_path / metrics.FILE)
    assert [r["step"] for r in records if r["stage"] == "ppo"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in metrics.read(tmp_path / metrics.FILE, "sft")] == [1, 2, 3]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_line_that_lost_only_its_end_is_kept_and_closed(tmp_path):
    path = tmp_path / metrics.FILE
    path.write_text('{"step": 1, "stage": "sft"}')
    log_steps(tmp_path, [2], resume_step=1)
    assert [r["step"] for r in metrics.read(path)] == [1, 2]


def test_a_fresh_start_of_a_stage_drops_its_old_lines(tmp_path):
    log_steps(tmp_path, [1, 2, 3])
    log_steps(tmp_path, [1])
    assert [r["step"] for r in metrics.read(tmp_path / metrics.FILE)] == [1]


def test_non_finite_numbers_stay_valid_json(tmp_path):
    with metrics.StageLog(tmp_path, "ppo", total=1, screen=SILENT) as log:
        log(1, {"loss": float("nan"), "norm": jnp.float32(math.inf), "kl": 0.1})

    def refuse(constant):
        raise AssertionError(constant)

    record = json.loads((tmp_path / metrics.FILE).read_text(), parse_constant=refuse)
    assert (record["loss"], record["norm"], record["kl"]) == (None, None, 0.1)


def test_a_step_is_fetched_only_when_the_next_one_is_handed_in(tmp_path):
    log = metrics.StageLog(tmp_path, "sft", total=3, screen=SILENT)
    log(1, {"loss": 1.0})
    assert (tmp_path / metrics.FILE).read_text() == ""
    log(2, {"loss": 2.0})
    assert [r["step"] for r in metrics.read(tmp_path / metrics.FILE)] == [1]
    log.flush()
    assert [r["step"] for r in metrics.read(tmp_path / metrics.FILE)] == [1, 2]
    log.close()


def test_the_last_step_is_written_when_the_loop_is_interrupted(tmp_path):
    def interrupted():
        with metrics.StageLog(tmp_path, "sft", total=3, screen=SILENT) as log:
            log(1, {"loss": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [r["step"] for r in metrics.read(tmp_path / metrics.FILE)] == [1]


def test_plain_console_prints_now_and_then_and_at_the_end():
    out = io.StringIO()
    console = Console(
        "reward_model",
        100,
        show=("loss", "accuracy"),
        screen=Screen(every=10.0, stream=out, clock=Clock(2.0)),
    )
    for step in range(1, 101):
        console.update(step, {"loss": 0.5, "accuracy": 0.75, "hidden": 1.0})
    console.close()
    lines = out.getvalue().splitlines()
    assert 20 <= len(lines) <= 23
    assert lines[1] == "reward_model 6/100  2.0 s/step  ETA 3m08s  loss 0.5  accuracy 0.75"
    assert lines[-1].startswith("reward_model 100/100  2.0 s/step  took 3m20s  loss 0.5")
    assert "\r" not in out.getvalue()
    assert "hidden" not in out.getvalue()


def test_terminal_console_redraws_one_line():
    out = Terminal()
    console = Console("ppo", 4, show=("kl",), screen=Screen(stream=out, clock=Clock(0.25)))
    for step in range(1, 5):
        console.update(step, {"kl": 1.25})
    console.close()
    text = out.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    frames = text.split("\r")[1:]
    assert len(frames) == 4
    assert frames[1].startswith("ppo [##########..........] 2/4  4.0 steps/s  ETA 0s  kl 1.25")


def test_eta_after_a_resume_counts_only_the_steps_of_this_process():
    out = io.StringIO()
    console = Console("ppo", 1000, 900, screen=Screen(every=0.0, stream=out, clock=Clock(1.0)))
    for step in (901, 902, 903):
        console.update(step, {})
    assert out.getvalue().splitlines()[-1] == "ppo 903/1000  1.0 steps/s  ETA 1m37s"


def test_writers_get_floats(tmp_path):
    seen = []
    log_steps(tmp_path, [1], writers=[lambda *record: seen.append(record)])
    assert seen == [(1, "sft", {"loss": 0.5})]


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [
        (lambda: metrics.tensorboard_writer("logs"), "tensorboardX", "tensorboard"),
        (lambda: metrics.wandb_writer(project="p"), "wandb", "wandb"),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, make, module, extra):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(metrics.importlib, "import_module", absent)
    with pytest.raises(ValueError, match=rf'{module}: pip install "rlhf_jax\[{extra}\]"'):
        make()


def test_tensorboard_writer_names_scalars_by_stage(monkeypatch, tmp_path):
    scalars = []

    class SummaryWriter:
        def __init__(self, logdir):
            assert logdir == str(tmp_path)

        def add_scalar(self, *record):
            scalars.append(record)

        def flush(self):
            pass

    monkeypatch.setitem(
        sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter)
    )
    log_steps(tmp_path, [1], writers=[metrics.tensorboard_writer(tmp_path)])
    assert scalars == [("sft/loss", 0.5, 1)]


def test_two_records_of_a_step_are_one_line(tmp_path):
    """Training and validation of a step, so that the log holds each step once."""
    with metrics.StageLog(tmp_path, "sft", total=2, screen=SILENT) as log:
        log(1, {"loss": 2.0})
        log(2, {"loss": 1.0})
        log(2, {"validation_loss": 3.0})
    records = [
        {k: v for k, v in r.items() if k != "time"}
        for r in metrics.read(tmp_path / "metrics.jsonl")
    ]
    assert records == [
        {"step": 1, "stage": "sft", "loss": 2.0},
        {"step": 2, "stage": "sft", "loss": 1.0, "validation_loss": 3.0},
    ]


def test_bytes_of_no_encoding_at_the_end_of_the_log_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "stage": "sft"}\n{"step": 2, "st\xff\xfe\x00')
    with metrics.StageLog(tmp_path, "sft", total=2, resume_step=1, screen=SILENT) as log:
        log(2, {"loss": 1.0})
    assert [r["step"] for r in metrics.read(file)] == [1, 2]


DAMAGED = [
    b"\xff\xfe\x00rubbish", b'{"step": 4, "stage": "sft", "lo', b"[1, 2, 3]", b"7", b'"text"', b"null",
    b'{"step": "four", "stage": "sft"}', b'{"step": null, "stage": "sft"}', b'{"step": [4], "stage": "sft"}',
    b'{"step": true, "stage": "sft"}', b'{"step": 1e999, "stage": "sft"}',
    b'{"step": 4, "stage": "sft", "loss": 1e999}',
    b'{"step": ' + b"9" * 5000 + b"}", b'{"step": ' + b"9" * 400 + b"}", b"[" * 100_000, b'{"a": ' * 5000,
]  # fmt: skip


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: repr(line[:24]))
def test_a_damaged_line_of_the_log_is_left_out_and_told(tmp_path, capsys, line):
    path = tmp_path / metrics.FILE
    good = [metrics.to_line(step, "sft", 0.0, {"loss": step / 2}).encode() for step in (1, 2, 3)]
    path.write_bytes(good[0] + line + b"\n" + good[1] + good[2])
    assert [row["step"] for row in metrics.read(path, "sft")] == [1, 2, 3]
    assert metrics.drop_after(path, "sft", 2) == 2
    assert [row["loss"] for row in metrics.read(path)] == [0.5, 1.0]
    assert path.read_bytes() == good[0] + good[1]
    assert f"1 damaged lines of {path} are left out" in capsys.readouterr().err


def test_a_torn_last_line_is_what_a_crash_leaves_and_not_told(tmp_path, capsys):
    path = tmp_path / metrics.FILE
    path.write_text(metrics.to_line(1, "sft", 0.0, {"loss": 1.0}) + '{"step": 2, "st')
    assert metrics.drop_after(path, "sft", 5) == 1
    assert not capsys.readouterr().err


def test_a_log_that_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / metrics.FILE)
    with pytest.raises(ValueError, match=r"metrics.jsonl is no regular file: move it away"):
        metrics.StageLog(tmp_path, "sft", total=3)
