"""Config: names to functions, overrides, validation, secrets, run folders and the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from rlhf_jax.run import checks, cli
from rlhf_jax.run import config as config_lib
from rlhf_jax.run.secrets import REDACTED
from rlhf_jax.run.workdir import allow_change, change_allowed, claim_workdir, prepare_workdir

ROOT = Path(__file__).parents[1]


def loss(logp, advantages, *, clip_ratio=0.2, clip_value=None, betas=(0.9, 0.95)):
    return logp, advantages, clip_ratio, clip_value, betas


def needs(logp, *, coef):
    return logp * coef


def wants_more(logp, reward_model_embedding, *, clip_ratio=0.2):
    return logp


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A researcher's own module, importable as my_lab_losses."""
    (tmp_path / "my_lab_losses.py").write_text(
        "def dual_clip(logp, old_logp, advantages, *, clip_ratio=0.2, dual=3.0):\n    return logp\n"
        "def wrong(logp, rewrads, *, a=1):\n    return logp\n"
        "def plain(logp, *, a=1, b=0.5, f=len):\n    return (logp, a, b)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_lab_losses"
    sys.modules.pop("my_lab_losses", None)


CONFIG = """
from ml_collections import ConfigDict

from rlhf_jax.run.config import apply_arg, fn_spec

def get_config(arg=""):
    config = ConfigDict()
    config.seed = 0
    config.lr = 1e-5
    config.betas = (0.9, 0.95)
    config.clip_value = 0.2
    config.name = "run"
    config.nothing = None
    config.ptx = True
    config.policy_loss = fn_spec("my_lab_losses:plain")
    config.ppo = ConfigDict({"minibatches": 8})
    def typo(c): c.ppo.minibatchs = 3
    def wrong_type(c): c.ppo.minibatches = "many"
    return apply_arg(config, arg, smoke=lambda c: c.ppo.update(minibatches=2), typo=typo, wrong_type=wrong_type)
"""


@pytest.fixture
def config_file(tmp_path, lab):
    path = tmp_path / "x.py"
    path.write_text(CONFIG)
    return str(path)


def test_fn_spec_fields_are_the_keyword_only_defaults(lab):
    spec = config_lib.fn_spec(f"{lab}:plain", a=7)
    assert spec.to_dict() == {"fn": f"{lab}:plain", "a": 7, "b": 0.5}  # f=len is not data
    assert config_lib.resolve(spec)(1) == (1, 7, 0.5)


def test_fn_spec_refuses_unknown_and_missing_arguments(lab):
    with pytest.raises(ValueError, match="did you mean 'dual'"):
        config_lib.fn_spec(f"{lab}:dual_clip", duall=1)
    (Path(sys.path[0]) / "needy_losses.py").write_text(
        "def needs(logp, *, coef):\n    return logp * coef\n"
    )
    with pytest.raises(ValueError, match="needs a value for coef"):
        config_lib.fn_spec("needy_losses:needs")
    assert config_lib.resolve(config_lib.fn_spec("needy_losses:needs", coef=3))(2) == 6
    with pytest.raises(ValueError, match="needs a value for coef"):
        config_lib.resolve("needy_losses:needs")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_lab_losses", "not of the form"),
        ("my_lab_losses:", "not of the form"),
        ("my lab:x; import os", "not of the form"),
        ("my_lab_losess:dual_clip", "no module 'my_lab_losess'.*PYTHONPATH"),
        ("my_lab_losses:dual_clop", "did you mean 'dual_clip'"),
    ],
)
def test_a_function_name_that_leads_nowhere_says_which_half_is_wrong(lab, name, message):
    with pytest.raises(ValueError, match=message):
        config_lib.fn_spec(name)


def test_an_import_error_inside_the_users_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "breaks.py").write_text("import not_installed_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        config_lib.import_fn("breaks:f")


def test_resolve_checks_arguments_against_what_is_available(lab):
    available = ("logp", "old_logp", "advantages", "rewards")
    assert config_lib.resolve(config_lib.fn_spec(f"{lab}:dual_clip"), available)(1, 2, 3) == 1
    with pytest.raises(
        ValueError, match=r"'rewrads'.*did you mean 'rewards'.*Available: logp, old_logp"
    ):
        config_lib.resolve(f"{lab}:wrong", available)
    with pytest.raises(ValueError, match="no keyword-only argument 'clip'"):
        config_lib.resolve(ConfigDict({"fn": f"{lab}:dual_clip", "clip": 1.0}), available)


def test_overrides_take_the_type_of_the_key(config_file):
    config = config_lib.load_config(
        config_file,
        {
            "lr": "3", "seed": "7", "betas": "(0.8, 0.9)", "clip_value": "None", "name": "12", "nothing": "0.5",
            "ptx": "false", "ppo.minibatches": "4", "policy_loss.b": "0.1",
        },
    )  # fmt: skip
    assert (config.lr, config.seed, config.betas, config.clip_value) == (3.0, 7, (0.8, 0.9), None)
    assert isinstance(config.lr, float)
    assert (config.name, config.nothing, config.ptx, config.ppo.minibatches) == (
        "12",
        0.5,
        False,
        4,
    )
    assert config_lib.resolve(config.policy_loss)(0) == (0, 1, 0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"ppo.minibatchs": "4"},
            r"config.ppo has no key 'minibatchs'; did you mean 'minibatches'",
        ),
        ({"ppp.minibatches": "4"}, r"config has no key 'ppp'; did you mean 'ppo'"),
        ({"seed.x": "4"}, r"config.seed is a value, not a group"),
        ({"seed": "0.5"}, r"config.seed=0.5 must be a int"),
        ({"ptx": "1"}, r"config.ptx=1 must be a bool"),
        ({"lr": "fast"}, r"config.lr=fast must be a float"),
        ({"ppo": "4"}, r"config.ppo is a group: set one of config.ppo.minibatches"),
        ({"policy_loss": "my_lab_losses:dual_clop"}, "did you mean 'dual_clip'"),
        ({"policy_loss.clip": "1"}, "has no key 'clip'"),
    ],
)
def test_a_wrong_override_is_refused_with_the_nearest_name(config_file, overrides, message):
    with pytest.raises(ValueError, match=message):
        config_lib.load_config(config_file, overrides)


def test_variants_and_swaps_in_the_argument_of_a_config_file(config_file):
    assert config_lib.load_config(config_file).ppo.minibatches == 8
    config = config_lib.load_config(
        f"{config_file}:smoke,seed=3,policy_loss=my_lab_losses:dual_clip",
        {"policy_loss.dual": "2.5"},
    )
    assert (config.ppo.minibatches, config.seed) == (2, 3)
    assert config.policy_loss.to_dict() == {
        "fn": "my_lab_losses:dual_clip",
        "clip_ratio": 0.2,
        "dual": 2.5,
    }
    with pytest.raises(ValueError, match="did you mean 'smoke'"):
        config_lib.load_config(f"{config_file}:smok")


@pytest.mark.parametrize(
    ("arg", "message"), [("typo", "did you mean 'minibatches'"), ("wrong_type", "minibatches")]
)
def test_a_misspelt_key_set_in_python_is_a_users_error(config_file, arg, message):
    with pytest.raises(ValueError, match=message):
        config_lib.load_config(f"{config_file}:{arg}")


def test_the_loaded_config_is_locked_in_every_group(config_file):
    config = config_lib.load_config(config_file, {"policy_loss": "my_lab_losses:dual_clip"})
    for group in (config, config.ppo, config.policy_loss):
        with pytest.raises(AttributeError):
            group.new_key = 1


def test_a_missing_config_file_names_the_nearest(config_file):
    with pytest.raises(ValueError, match=r"no config file .*y\.py"):
        config_lib.load_config(config_file.replace("x.py", "y.py"))


def test_every_file_that_is_no_config_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="no function get_config"):
        config_lib.load_config(str(tmp_path / "empty.py"))


def test_validation_names_field_value_and_fix():
    with pytest.raises(
        ValueError,
        match=r"^minibatches=6 must divide the rollout batch of 16: choose 1, 2, 4, 8 or 16$",
    ):
        checks.require_divides("minibatches", 6, 16, "the rollout batch")
    with pytest.raises(ValueError, match="choose"):
        checks.require_divides("minibatches", 0, 16, "the rollout batch")
    with pytest.raises(ValueError, match=r"choose 7, 8, 9, 10, 12 or 14$"):
        checks.require_divides("minibatches", 11, 5040, "the rollout batch")
    with pytest.raises(
        ValueError, match=r"dtype='bf16' must be one of float32, bfloat16; did you mean 'bfloat16'"
    ):
        checks.require_one_of("dtype", "bf16", ("float32", "bfloat16"))
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"gamma=.* must be >= 0.0 and <= 1.0"):
            checks.require_range("gamma", bad, low=0.0, high=1.0)
    checks.require_range("gamma", 1.0, low=0.0, high=1.0)
    with pytest.raises(ValueError, match="k=3: K must be even"):
        checks.require(False, "k", 3, "K must be even")


def test_json_round_trip_keeps_everything_but_secrets():
    config = ConfigDict(
        {
            "a": {"lr": 0.1 + 0.2, "betas": (0.9, (1, 2)), "n": None},
            "flag": True,
            "eos_token": "<|eos|>",
        }
    )
    assert config_lib.from_json(config_lib.to_json(config)) == config
    secret = "canary-4711"
    for key in (
        "hf_token", "token", "API_KEY", "wandb-api-key", "client_secret", "db_password", "auth_token", "apiKey",
        "hubToken", "authorization", "credentials", "aws_secret_access_key", "private_key", "passphrase", "HF_TOKEN",
    ):  # fmt: skip
        assert secret not in config_lib.to_json(ConfigDict({"nested": {key: secret}})), key
        assert secret not in config_lib.to_json(
            ConfigDict({key: {"inner": (1, ("a", (secret,)))}})
        ), key
    for key in (
        "tokenizer",
        "max_new_tokens",
        "tokens",
        "stop_token",
        "monkey",
        "keyboard",
        "author",
        "tokens_per_row",
    ):
        assert secret in config_lib.to_json(ConfigDict({key: secret})), key
    for url in (f"https://user:{secret}@example.org/x", f"s3://{secret}@b/x", f"https://x.org/a?b=1&token={secret}",
                f"https://user:p@{secret}@example.org/x"):  # fmt: skip
        assert secret not in config_lib.to_json(ConfigDict({"url": url, "more": ((url,),)})), url
    plain = "https://example.org/x@y?mail=a@b.org"
    assert json.loads(config_lib.to_json(ConfigDict({"url": plain}))) == {"url": plain}
    assert json.loads(config_lib.to_json(ConfigDict({"password": 1234, "token_id": 5}))) == {
        "password": REDACTED,
        "token_id": 5,
    }


def test_json_refuses_what_it_cannot_store():
    with pytest.raises(ValueError, match=r"config.fn holds a builtin_function"):
        config_lib.to_json(ConfigDict({"fn": len}))


def test_record_reads_sees_each_way_of_reading_and_not_the_storing():
    source = ConfigDict(
        {
            "a": 1,
            "b": {"c": 2, "d": {"e": 3}},
            "f": 4,
            "g": 5,
            "spec": config_lib.fn_spec("rlhf_jax.run.checks:require_range"),
        }
    )
    config, reads = config_lib.record_reads(source)
    config_lib.to_json(config)
    assert not reads
    assert config_lib.leaf_keys(config) == {
        "a",
        "b.c",
        "b.d.e",
        "f",
        "g",
        "spec.fn",
        "spec.low",
        "spec.high",
    }
    assert config.a == 1
    assert config.b["c"] == 2
    assert config.get("f") == 4
    assert reads == {"a", "b.c", "f"}
    assert {**config.b.d} == {"e": 3}
    config_lib.resolve(config.spec)
    assert config_lib.leaf_keys(config) - reads == {"g"}


def test_a_run_folder_is_made_resumed_and_set_aside(tmp_path):
    run, config = tmp_path / "run", ConfigDict({"lr": 1.0})
    assert prepare_workdir(run, config)
    (run / "metrics.jsonl").write_text("precious")
    assert not prepare_workdir(run, config)
    changed = ConfigDict({"lr": 2.0})
    with pytest.raises(ValueError, match=r"lr: 1\.0 -> 2\.0"):
        prepare_workdir(run, changed)
    assert json.loads((run / "config.json").read_text()) == {"lr": 1.0}
    assert not prepare_workdir(run, changed, allow_config_change=True)
    assert json.loads((run / "config.json").read_text()) == {"lr": 2.0}
    assert prepare_workdir(run, config, overwrite=True)
    (aside,) = tmp_path.glob("run.old-*")
    assert (aside / "metrics.jsonl").read_text() == "precious"


def test_keys_that_change_no_number_may_change_and_are_printed(tmp_path, capsys):
    run = tmp_path / "run"
    config = ConfigDict(
        {"ppo": {"lr": 1.0, "save_every": 5, "kl_ceiling": 9.0}, "guard": {"max_skipped": 5}}
    )
    prepare_workdir(run, config)
    config.ppo.update(save_every=7, kl_ceiling=8.0)
    config.guard.max_skipped = 6
    assert not prepare_workdir(run, config)
    told = "guard.max_skipped: 5 -> 6; ppo.kl_ceiling: 9.0 -> 8.0; ppo.save_every: 5 -> 7"
    assert told in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["ppo"]["save_every"] == 7
    config.ppo.update(save_every=9, lr=2.0)
    with pytest.raises(ValueError, match=r"another config \(ppo.lr: 1.0 -> 2.0\)"):
        prepare_workdir(run, config)
    assert not prepare_workdir(run, config, allow_config_change=True)
    assert "ppo.lr: 1.0 -> 2.0; ppo.save_every: 7 -> 9" in capsys.readouterr().out


def test_another_config_goes_on_from_a_checkpoint_only(tmp_path, config_file, capsys):
    """A program that has none would write its outputs over, one part of a run after the other with its own config."""
    flags = [
        f"--config={config_file}",
        f"--workdir={tmp_path / 'run'}",
        "--config.name=other",
        "--allow_config_change",
    ]
    prepare_workdir(tmp_path / "run", config_lib.load_config(str(config_file)))
    ran: list[str] = []
    with pytest.raises(SystemExit) as ended:
        cli.main(lambda config, workdir: ran.append(config.name), argv=flags)
    assert ended.value.code == 2
    assert (
        "no checkpoint to go on from: choose another workdir, or --overwrite"
        in capsys.readouterr().err
    )
    assert not ran
    assert json.loads((tmp_path / "run" / "config.json").read_text())["name"] != "other"
    (tmp_path / "run" / "checkpoints" / "manifests").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "manifests" / "30.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        cli.main(lambda config, workdir: ran.append(config.name), argv=flags)
    assert ended.value.code == 0
    assert ran == ["other"]


def test_a_pipeline_answers_a_changed_config_itself(tmp_path, config_file, capsys):
    """With `plan` a changed config is not refused, and a dry run is handed the folder and leaves nothing behind."""
    flags = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}", "--config.name=other"]
    seen: list[tuple] = []
    plan = lambda config, workdir, *, overwrite: seen.append((config.name, workdir, overwrite))
    with pytest.raises(SystemExit):
        cli.main(lambda *a: None, argv=[*flags, "--dry_run", "--overwrite"], plan=plan)
    assert seen == [("other", str(tmp_path / "run"), True)]
    assert not (tmp_path / "run").exists()
    prepare_workdir(tmp_path / "run", config_lib.load_config(str(config_file)))
    stored = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(SystemExit) as ended:
        cli.main(lambda *a: None, argv=flags, plan=plan)
    assert ended.value.code == 0
    assert (
        tmp_path / "run" / "config.json"
    ).read_text() == stored  # the pipeline writes it when it accepts it
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(SystemExit) as ended:
        cli.main(
            lambda *a: None,
            argv=[flags[0], f"--workdir={tmp_path / 'thesis'}", "--dry_run"],
            plan=plan,
        )
    assert ended.value.code == 2


def test_a_kill_before_the_config_is_stored_leaves_a_folder_that_can_be_used(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.tmp").write_text('{"lr":')
    assert prepare_workdir(tmp_path / "run", ConfigDict({"lr": 1.0}))


def test_what_the_command_line_allows_holds_for_the_run_alone():
    assert not change_allowed()
    with allow_change():
        assert change_allowed()
    assert not change_allowed()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_a_run_is_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="not a run of this program"):
        prepare_workdir(tmp_path, ConfigDict(), overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_model_folder_has_a_config_and_is_no_run(tmp_path, overwrite):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for claim in (
        claim_workdir,
        lambda path, overwrite: prepare_workdir(path, ConfigDict(), overwrite=overwrite),
    ):
        with pytest.raises(ValueError, match="not a run of this program"):
            claim(tmp_path, overwrite=overwrite)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'
    assert len(list(tmp_path.parent.glob(f"{tmp_path.name}*"))) == 1


def test_links_in_the_place_of_a_run_or_out_of_it_are_refused(tmp_path):
    prepare_workdir(tmp_path / "run", ConfigDict())
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("link", "dangling"):
        with pytest.raises(ValueError, match="is a symbolic link: pass the folder it leads to"):
            claim_workdir(tmp_path / name)
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl is a symbolic link out of the run folder"
    ):
        claim_workdir(tmp_path / "run")
    assert not (tmp_path / "nowhere").exists()
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_run_in_use_is_refused_with_the_process_and_a_kill_frees_it(tmp_path):
    code = f"""
        import time
        from rlhf_jax.run.workdir import claim_workdir
        lock = claim_workdir({str(tmp_path / "run")!r})
        print("locked", flush=True)
        time.sleep(600)
    """
    argv, env = (
        [sys.executable, "-c", textwrap.dedent(code)],
        {**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            holder.stdout.readline()
            for overwrite in (False, True):
                with pytest.raises(ValueError, match=f"is in use by process {holder.pid} on "):
                    claim_workdir(tmp_path / "run", overwrite=overwrite)
        finally:
            holder.kill()
    with claim_workdir(tmp_path / "run"):
        assert f"process {os.getpid()} on" in (tmp_path / "run" / "run.lock").read_text()
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
            claim_workdir(tmp_path / "run")
    claim_workdir(tmp_path / "run").close()


PROGRAM = """
import hashlib, os, signal, sys, time
from rlhf_jax.run.checks import require_divides
from rlhf_jax.run.cli import main

def run(config, workdir):
    require_divides("ppo.minibatches", config.ppo.minibatches, 16, "the rollout batch")
    if config.name == "interrupt": raise KeyboardInterrupt("step 7")
    if config.name == "disk": raise OSError(28, "No space left on device")
    if config.name == "bug": raise ZeroDivisionError("a bug")
    if config.name == "waits":
        print("waiting", flush=True)
        time.sleep(300)
    if config.name == "destructs":
        class Slow:
            def __del__(self):
                print("waiting", flush=True)
                time.sleep(120)
        Slow()
        time.sleep(300)
    if config.name == "compiles":  # one call into C that lets no Python handler run, as XLA's compiler is
        print("waiting", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 400_000_000)
    print("ran", config.ppo.minibatches, config.policy_loss.fn, workdir)

if __name__ == "__main__":
    main(run)
"""


@pytest.fixture
def command(tmp_path, config_file):
    (tmp_path / "program.py").write_text(PROGRAM)

    def call(*flags: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "program.py", "--config=x.py", "--workdir=out/run", *flags]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            argv, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
        )

    return call


def test_the_command_line_runs_and_takes_overrides(command, tmp_path):
    done = command("--config.ppo.minibatches=4", "--config.policy_loss", "my_lab_losses:dual_clip")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ran", "4", "my_lab_losses:dual_clip", "out/run"]
    assert json.loads((tmp_path / "out/run/config.json").read_text())["ppo"]["minibatches"] == 4


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--config.ppo.minibatchs=4"], 2, "did you mean 'minibatches'"),
        (
            ["--config.ppo.minibatches=6"],
            2,
            "ppo.minibatches=6 must divide the rollout batch of 16",
        ),
        (["--wrokdir=x"], 2, "did you mean '--workdir'"),
        (["--config=y.py"], 2, "no config file y.py"),
        (["--config.name=disk"], 1, "No space left on device"),
        (["--config.name=interrupt"], 130, "Stopped (step 7). The same command goes on"),
    ],
)
def test_a_users_mistake_is_one_line_without_a_traceback(command, tmp_path, flags, status, message):
    done = command(*flags)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    if status == 2:
        assert not (tmp_path / "out/run").exists(), "a refused config must leave no run folder"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("name", ["waits", "compiles", "destructs"])
def test_a_signal_ends_a_run_with_the_documented_status(command, tmp_path, number, status, name):
    """Where no stage saves one is enough; in a call that does not return the second one ends it."""
    del command  # it wrote the program
    argv = [
        sys.executable,
        "program.py",
        "--config=x.py",
        "--workdir=out/run",
        f"--config.name={name}",
    ]
    environ, pipe = {**os.environ, "PYTHONPATH": str(ROOT)}, subprocess.PIPE
    with subprocess.Popen(
        argv, cwd=tmp_path, env=environ, stdout=pipe, stderr=pipe, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(1.0)  # into the call
        process.send_signal(number)
        if name == "compiles":
            time.sleep(1.2)
            assert process.poll() is None
            process.send_signal(number)
        sent = time.monotonic()
        _, err = process.communicate(timeout=110)
    assert process.returncode == status
    assert (
        time.monotonic() - sent < 100
    )  # far less than the calls above take, far more than a slow machine needs
    assert "Stopped" in err
    assert "The same command goes on" in err
    assert "Traceback" not in err


def test_a_bug_keeps_its_traceback(command):
    done = command("--config.name=bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
