"""Checkpoints: exact resume, every kind of damage, full disks, signals, other meshes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.run.checkpoint import Checkpoints, refuse_non_finite
from rlhf_jax.run.signals import stop_requests
from rlhf_jax.types import KLState, PPOState, TrainState

ROOT = Path(__file__).parents[1]


def digest(tree) -> str:
    leaves = jax.tree.leaves_with_path(jax.device_get(tree))
    return hashlib.sha256(
        b"".join(str(p).encode() + bytes(str(x.dtype), "ascii") + x.tobytes() for p, x in leaves)
    ).hexdigest()


def small(value=0.0):
    return {"w": jnp.arange(12.0).reshape(3, 4) + value, "n": jnp.int32(7)}


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert digest(a) == digest(b)


# --------------------------------------------------------------------------------------------------- exact resume

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, 40)))


def fresh_state() -> PPOState:
    def network(key, width):
        params = {
            "block.0": {
                "w": jax.random.normal(key, (4, width)),
                "b": jnp.zeros(width, jnp.bfloat16),
            }
        }
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=TX.init(params),
            ema=jax.tree.map(jnp.copy, params),
        )

    policy, value = network(jax.random.key(0), 5), network(jax.random.key(1), 1)
    return PPOState(
        policy=policy, value=value, kl=KLState(coef=jnp.float32(0.1)), iteration=jnp.int32(0)
    )


@jax.jit
def step_of_everything(state: PPOState) -> PPOState:
    """A step whose batch and noise are functions of (seed, iteration), as in the package."""
    key = jax.random.fold_in(jax.random.key(7), state.iteration)

    def train(s, key):
        x = jax.random.normal(key, (8, 4))
        grads = jax.grad(
            lambda p: jnp.square(
                x @ p["block.0"]["w"] + p["block.0"]["b"].astype(jnp.float32)[None] - 1
            ).mean()
        )(s.params)
        updates, opt_state = TX.update(grads, s.opt_state, s.params)
        params = optax.apply_updates(s.params, updates)
        ema = jax.tree.map(lambda e, p: (0.9 * e + 0.1 * p).astype(e.dtype), s.ema, params)
        return TrainState(step=s.step + 1, params=params, opt_state=opt_state, ema=ema)

    kl = KLState(coef=state.kl.coef * (1 + 0.1 * jax.random.normal(key)))
    return PPOState(train(state.policy, key), train(state.value, key), kl, state.iteration + 1)


def test_resume_restores_all_state_bit_for_bit(tmp_path):
    """2n steps equal n, save, restore into a fresh process's state, n: weights, moments, EMA, KL, counters."""
    straight = state = fresh_state()
    for _ in range(10):
        straight = step_of_everything(straight)
    for _ in range(5):
        state = step_of_everything(state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(
            5, state, extra={"config": {"lr": 0.1 + 0.2}, "position": 5, "by_rank": {10: 1, 9: 2}}
        )
    del state
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest_good() == 5
        resumed, extra = checkpoints.restore(5, jax.eval_shape(fresh_state))
    assert extra == {"config": {"lr": 0.1 + 0.2}, "position": 5, "by_rank": {"10": 1, "9": 2}}
    for _ in range(5):
        resumed = step_of_everything(resumed)
    assert_equal(resumed, straight)


def test_the_state_may_be_donated_while_it_is_saved(tmp_path):
    clobber = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(3):
            state = {"w": jnp.full((256, 256), float(step))}
            checkpoints.save(step, state)
            clobber(state)
        for step in range(3):
            assert (checkpoints.restore(step, {"w": jnp.zeros((256, 256))})[0]["w"] == step).all()


def test_restore_onto_another_mesh_gives_equal_values(tmp_path):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, columns = (
        NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("fsdp",), (None, "data"))
    )
    w = jnp.arange(64.0).reshape(8, 8)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jax.device_put(w, rows)})
        for target in (rows, columns, jax.sharding.SingleDeviceSharding(jax.devices()[3])):
            restored, _ = checkpoints.restore(
                1, {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=target)}
            )
            assert restored["w"].sharding == target
            np.testing.assert_array_equal(restored["w"], w)


def test_odd_trees_come_back_as_they_were(tmp_path):
    tree = {
        "none": None,
        "a/b": (jnp.ones(2, jnp.int8), [jnp.zeros((0, 3))]),
        "h": jnp.ones((), jnp.bfloat16),
        "ok": jnp.array([True]),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, tree)
        restored, extra = checkpoints.restore(0, tree)
    assert extra == {}
    assert_equal(restored, tree)


# --------------------------------------------------------------------------------------------- keeping and refusing


def test_the_newest_are_kept_and_what_is_not_ours_is_never_deleted(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "mine.txt").write_text("mine")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, small(step))
        checkpoints.wait()
        assert checkpoints.steps() == [3, 4]
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / "0" / "mine.txt").exists()
    with Checkpoints(tmp_path / "all", keep=None) as checkpoints:
        for step in range(5):
            checkpoints.save(step, small(step))
    assert checkpoints.steps() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_state_is_never_saved(tmp_path, bad):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small())
        with pytest.raises(FloatingPointError, match=r"step 2 is not finite \(inner\.v\)"):
            checkpoints.save(
                2, {"inner": {"v": jnp.array([0.0, bad], jnp.bfloat16)}, "n": jnp.int32(1)}
            )
        assert checkpoints.newest_good() == 1
    refuse_non_finite(small(), "the state")


def test_steps_go_up_and_leaves_are_arrays(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, small())
        for step in (1, 2):
            with pytest.raises(ValueError, match=f"step={step} must be larger than the newest"):
                checkpoints.save(step, small())
        with pytest.raises(ValueError, match="lr is a float"):
            checkpoints.save(3, {"lr": 0.5})
        with pytest.raises(ValueError, match="n is int64, which JAX would narrow"):
            checkpoints.save(3, {"n": np.int64([1])})
        with pytest.raises(ValueError, match="no checkpoint of step 9"):
            checkpoints.restore(9, small())


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            {"w": jnp.zeros((4, 4)), "n": jnp.int32(0)},
            r"w: stored float32\(3, 4\), config makes float32\(4, 4\)",
        ),
        (
            {"w": jnp.zeros((3, 4), jnp.bfloat16), "n": jnp.int32(0)},
            r"w: stored float32.*config makes bfloat16",
        ),
        ({"w": jnp.zeros((3, 4))}, r"n: stored int32\(\), config makes absent"),
        ({"w": jnp.zeros((3, 4)), "n": jnp.int32(0), "lora": jnp.zeros(1)}, r"lora: stored absent"),
    ],
)
def test_a_mismatch_is_a_config_error_and_quarantines_nothing(tmp_path, wanted, message):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small())
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(1, wanted)
        assert checkpoints.newest_good() == 1
        assert_equal(checkpoints.restore(1, small())[0], small())
    assert not (tmp_path / "quarantine").exists()


# -------------------------------------------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "flip": flip,
    "truncate": lambda p: os.truncate(p, p.stat().st_size // 2),
    "empty": lambda p: os.truncate(p, 0),
    "delete": lambda p: p.unlink(),
}


def saved(root: Path, steps=(10, 20, 30)) -> None:
    with Checkpoints(root) as checkpoints:
        for step in steps:
            checkpoints.save(step, small(step))


@pytest.mark.parametrize("kind", DAMAGE)
def test_any_damaged_file_falls_back_to_the_step_before_and_the_next_save_works(tmp_path, kind):
    saved(tmp_path / "template")
    template = tmp_path / "template"
    files = [
        p.relative_to(template)
        for p in (template / "30").rglob("*")
        if p.is_file() and p.stat().st_size
    ]
    files.append(Path("manifests/30.json"))
    assert len(files) > 5
    for i, name in enumerate(files):
        root = tmp_path / str(i)
        subprocess.run(["cp", "-r", template, root], check=True)
        DAMAGE[kind](root / name)
        with Checkpoints(root) as checkpoints:
            assert checkpoints.newest_good() == 20, name
            assert_equal(checkpoints.restore(20, small())[0], small(20))
            checkpoints.save(25, small(25))
            checkpoints.wait()
            assert checkpoints.newest_good() == 25
        assert list((root / "quarantine").glob("30-*")), name


def test_one_flipped_byte_of_a_weight_is_seen_when_a_step_is_asked_for_by_number(tmp_path):
    saved(tmp_path)
    flip(max((tmp_path / "10").rglob("d/*"), key=lambda p: p.stat().st_size))
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(OSError, match=r"step 10 .* is damaged: .* is not what was written"),
    ):
        checkpoints.restore(10, small())


def test_an_empty_or_foreign_integer_folder_is_no_checkpoint(tmp_path, capsys):
    saved(tmp_path)
    (tmp_path / "40").mkdir()
    (tmp_path / "50.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest_good() == 30
    assert "step 40 is not used, it was never finished" in capsys.readouterr().err
    assert not (tmp_path / "50.orbax-checkpoint-tmp").exists()


def test_when_all_are_damaged_training_never_restarts_silently(tmp_path):
    saved(tmp_path)
    for step in (10, 20, 30):
        DAMAGE["delete"](max((tmp_path / str(step)).rglob("d/*"), key=lambda p: p.stat().st_size))
    for _ in range(2):  # the second start finds only the quarantine
        with (
            Checkpoints(tmp_path) as checkpoints,
            pytest.raises(ValueError, match=r"every checkpoint .* is damaged"),
        ):
            checkpoints.newest_good()
    assert len([p for p in (tmp_path / "quarantine").iterdir() if p.is_dir()]) == 3


def test_nothing_saved_yet_is_a_fresh_start_also_after_a_kill_in_the_first_save(tmp_path):
    assert Checkpoints(tmp_path / "none").newest_good() is None
    (tmp_path / "5" / "state").mkdir(parents=True)  # renamed into place, not yet sealed
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest_good() is None
        checkpoints.save(5, small())
    assert Checkpoints(tmp_path).newest_good() == 5


def test_many_kills_in_the_first_save_are_still_a_fresh_start(tmp_path):
    for _ in range(3):
        (tmp_path / "5" / "state").mkdir(parents=True)
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.newest_good() is None


def test_a_lost_seal_of_the_only_checkpoint_is_damage_and_no_fresh_start(tmp_path):
    saved(tmp_path, (5,))
    (tmp_path / "manifests" / "5.json").unlink()
    for _ in range(2):
        with (
            Checkpoints(tmp_path) as checkpoints,
            pytest.raises(ValueError, match=r"every checkpoint .* is damaged"),
        ):
            checkpoints.newest_good()


# ----------------------------------------------------------------------------------- a machine that refuses, signals


def child(code: str, *args: object, **kw) -> subprocess.Popen:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    argv = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(
        argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw
    )


def test_a_full_disk_is_said_clearly_and_harms_nothing(tmp_path):
    """The file-size limit of the process stands for a full disk: writes fail for real, in Orbax's own threads."""
    process = child(
        """
        import resource, signal, sys
        import jax, jax.numpy as jnp
        from rlhf_jax.run.checkpoint import Checkpoints
        w = jax.random.normal(jax.random.key(0), (512, 512))
        with Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(1, {"w": w})
            checkpoints.wait()
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            try:
                checkpoints.save(2, {"w": w + 1})
                checkpoints.wait()
            except OSError as error:
                print("said:", error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            checkpoints.save(2, {"w": w + 2})
        """,
        tmp_path,
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "said: the checkpoint of step 2 could not be written" in out
    assert "the checkpoint of step 1 is intact. Free disk space" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "manifests"]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest_good() == 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with (
        Checkpoints(tmp_path / "file" / "run") as checkpoints,
        pytest.raises(OSError, match=r"could not be written to .*file/run"),
    ):
        checkpoints.save(1, small())
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_file_in_the_place_of_the_checkpoints_is_no_fresh_start(tmp_path):
    (tmp_path / "checkpoints").write_text("not a folder")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("checkpoints", "link"):
        with pytest.raises(
            OSError, match=f"{name} is no folder: checkpoints could not be written there"
        ):
            Checkpoints(tmp_path / name).newest_good()
    assert (tmp_path / "checkpoints").read_text() == "not a folder"


def test_kill_9_at_any_moment_leaves_a_good_newest_step(tmp_path):
    code = """
        import sys, jax, jax.numpy as jnp
        from rlhf_jax.run.checkpoint import Checkpoints
        with Checkpoints(sys.argv[1]) as checkpoints:
            start = checkpoints.newest_good() or 0
            for step in range(start + 1, start + 10_000):
                checkpoints.save(step, {"w": jnp.full((512, 512), float(step))}, extra={"step": step})
                print(step)
        """
    newest = 0
    for delay in (0.02, 0.15, 0.4):
        process = child(code, tmp_path)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.communicate()
        with Checkpoints(tmp_path) as checkpoints:
            step = checkpoints.newest_good() or 0
            assert step >= newest
            if step:
                state, extra = checkpoints.restore(step, {"w": jnp.zeros((512, 512))})
                assert extra == {"step": step}
                assert (state["w"] == step).all()
        newest = step
    assert newest > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_step_boundary_and_the_run_goes_on_from_there(tmp_path, number):
    code = """
        import os, sys, jax.numpy as jnp
        from rlhf_jax.run.checkpoint import Checkpoints
        from rlhf_jax.run.signals import stop_requests
        with Checkpoints(sys.argv[1]) as checkpoints, stop_requests() as stop:
            for step in range(1, 1000):
                if step == 7: os.kill(os.getpid(), int(sys.argv[2]))
                if stop(step):
                    checkpoints.save(step, {"step": jnp.int32(step)})
                    break
        """
    process = child(code, tmp_path, int(number))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stopping after this step" in err
    assert Checkpoints(tmp_path).newest_good() == 7


def test_a_second_ctrl_c_interrupts_at_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with stop_requests() as stop:
        assert not stop(1)
        signal.raise_signal(signal.SIGINT)
        assert stop(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_after_the_last_question_is_handed_on_and_one_that_was_heard_is_not():
    """SIGTERM in the last step of a stage must stop the pipeline around it, not be forgotten."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with stop_requests() as stop:
            assert not stop(1)
            signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # at once: the same one, sent twice
            assert stop(1)
        assert heard == [signal.SIGTERM]

        def stage() -> None:
            with stop_requests() as stop:
                signal.raise_signal(signal.SIGTERM)
                assert stop(1)
                raise KeyboardInterrupt("at step 1")

        with pytest.raises(KeyboardInterrupt) as stopped:
            stage()
        assert stopped.value.signal_number == signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_seal_lists_every_file_and_leaf(tmp_path):
    saved(tmp_path, (1,))
    seal = json.loads((tmp_path / "manifests/1.json").read_text())
    assert seal["leaves"] == {"n": [[], "int32"], "w": [[3, 4], "float32"]}
    assert set(seal["files"]) == {
        str(p.relative_to(tmp_path / "1")) for p in (tmp_path / "1").rglob("*") if p.is_file()
    }


def test_arrays_that_answer_after_a_failed_save_show_no_traceback(monkeypatch, tmp_path):
    """The other writes of a save that failed find Orbax's event loop closed; all else is told."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    with Checkpoints(tmp_path / "a"), Checkpoints(tmp_path / "b"):
        pass
    late, other = (
        SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "other")
    )
    for unraisable in (late, other):
        thread = threading.Thread(target=sys.unraisablehook, args=(unraisable,))
        thread.start()
        thread.join()
    sys.unraisablehook(late)
    assert told == [other, late]
