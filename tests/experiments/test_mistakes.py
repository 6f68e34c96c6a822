"""A user's mistakes, program by program: one line that names what was found and what mends it, before anything starts.

Each program is called as on the command line, but its stage is not run: what reaches it would have begun to load.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from experiments import evaluate, instructgpt, ppo, pretrain, reward_model, sample, sft
from rlhf_jax.data.schema import Message, Prompt, read_jsonl, write_jsonl
from rlhf_jax.data.storyland import task
from rlhf_jax.run import cli, inputs
from rlhf_jax.run.secrets import REDACTED
from rlhf_jax.run.workdir import prepare_workdir
from tests.reliability import kill

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    m.__name__.partition(".")[2]: m
    for m in (sft, sample, reward_model, ppo, evaluate, pretrain, instructgpt)
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    kill.make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def bad(tmp_path_factory, data) -> Path:
    """A folder of what is no data, no config, no model."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.jsonl").write_text("")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(folder / "socket"))
    (folder / "folder").mkdir()
    shutil.copy(data / "prompts.jsonl", folder / "folder" / "prompts.jsonl")
    write_jsonl(folder / "mine.jsonl", [Prompt("What is new?", id="news-1"), Prompt("And now?")])
    sources = {
        "syntax": "def get_config(arg=''):\n    return {'a': 1\n",
        "names": "from ml_collections import ConfigDict\n\ndef get_config(arg=''):\n    return ConfigDct()\n",
        "imports": "import no_such_module_anywhere\n",
        "attribute": "from ml_collections import ConfigDict\ndef get_config(arg=''):\n    return ConfigDict().ppo\n",
        "raises": "def get_config(arg=''):\n    raise RuntimeError('first\\nsecond')\n",
        "exits": "raise SystemExit(3)\n",
        "dict": "def get_config(arg=''):\n    return {'seed': 1}\n",
        "forgot": "def get_config(arg=''):\n    config = 1\n",
        "value": "def get_config(arg=''):\n    return int('many')\n",
        "number": "get_config = 3\n",
        "nothing": "x = 1\n",
        "noarg": "def get_config():\n    return 1\n",
    }
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    (folder / "null.py").write_bytes(b"a\0b")
    (folder / "latin.py").write_bytes("x = 'caf\xe9'\n".encode("latin-1"))
    (folder / "list.json").write_text("[1, 2]")
    (folder / "torn.json").write_text('{"seed": ')
    (folder / "few.json").write_text('{"seed": 1, "demonstrations": "x"}')
    (folder / "x.yaml").write_text("seed: 1\n")
    for name, change in (("damaged", b"\x89rubbish"), ("emptied", b""), ("other", b'{"seed": 1}')):
        shutil.copytree(data / "model", folder / name)
        (folder / name / "config.json").write_bytes(change)
    shutil.copytree(data / "reward", folder / "dumb")
    (folder / "dumb" / "tokenizer.json").unlink()
    return folder


def flags_of(name: str, data: Path, run: Path) -> list[str]:
    """A command line without mistakes."""
    if name in ("sft", "reward_model", "ppo"):
        return kill.command(name, data, run)[2:]
    own = {
        "sample": [
            f"--config.models=('{data}/model',)", "--config.labelers=0", f"--config.prompts={data}/prompts.jsonl",
        ],
        "evaluate": [
            f"--config.models.sft={data}/model", f"--config.reward_model={data}/reward", "--config.gold=",
            f"--config.prompts={data}/prompts.jsonl",
        ],
    }.get(name, [])  # fmt: skip
    variant = ":small" if name == "pretrain" else ":smoke"
    return [f"--config={ROOT}/configs/{name}/storyland.py{variant}", f"--workdir={run}", *own]


@pytest.fixture
def call(data, tmp_path, monkeypatch, capfd):
    """Calls a program with flags after those that are right; gives exit status and stderr."""
    monkeypatch.chdir(tmp_path)

    def called(name: str, *flags: str) -> tuple[int, str]:
        module = PROGRAMS[name]
        reached = []

        @functools.wraps(module.run)
        def run(config, workdir):
            reached.append(workdir)

        argv = [*flags_of(name, data, tmp_path / "run"), *flags]
        with pytest.raises(SystemExit) as ended:
            cli.main(
                run, argv=argv, check=module.check_shapes if name == "instructgpt" else module.check
            )
        said = capfd.readouterr().err
        status = int(ended.value.code or 0)
        assert bool(reached) == (status == 0), said
        assert (tmp_path / "run").exists() == (status == 0), (
            "a refused command leaves no run folder"
        )
        return status, said

    return called


def refused(call, name: str, *flags: str, status: int = 2) -> str:
    found, said = call(name, *flags)
    assert found == status, said
    assert said.startswith("Error: "), said
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_command_without_mistakes_reaches_its_stage(call, name):
    assert call(name) == (0, "")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("syntax.py", r"syntax.py:2: '{' was never closed in "),
        ("names.py", r"names.py:4: NameError: name 'ConfigDct' is not defined"),
        (
            "imports.py",
            r"imports.py:1: ModuleNotFoundError: No module named 'no_such_module_anywhere': run from",
        ),
        ("attribute.py", r"attribute.py:3: no key 'ppo'"),
        ("raises.py", r"raises.py:2: RuntimeError: first second"),
        ("exits.py", r"exits.py:1: SystemExit: 3"),
        ("dict.py", r"get_config of \S*dict.py must return a ConfigDict, got dict"),
        ("forgot.py", r"got NoneType: end it with `return config`"),
        ("value.py", r"value.py:2: ValueError: invalid literal for int\(\) with base 10: 'many'"),
        ("number.py", r"number.py gives the name get_config to no function"),
        ("nothing.py", r"nothing.py has no function get_config\(arg\)"),
        ("noarg.py:smoke", r"get_config of \S*noarg.py takes no argument and got 'smoke'"),
        ("null.py", r"null.py: source code string cannot contain null bytes"),
        ("latin.py", r"latin.py:1: .*can't decode byte 0xe9"),
        (
            "list.json",
            r"list.json holds a list, no config: a config is a Python file .* or the config.json of a run",
        ),
        ("torn.json", r"torn.json is corrupt"),
        ("few.json", r"config has no key 'model'"),
        ("x.yaml", r"x.yaml is neither .py nor .json: a config is a Python file"),
        ("folder", r"folder is a folder"),
        ("pipe", r"pipe is not a regular file but a pipe or a device: save it to a file first"),
        ("syntx.py", r"no config file \S*syntx.py; did you mean '\S*syntax.py'"),
        ("syntax", r"no config file \S*syntax; did you mean '\S*syntax.py'"),
        ("other/config.json", r"has no key|config has no key"),
    ],
)
def test_what_is_no_config_is_told_with_file_and_line(call, bad, config, told):
    said = refused(call, "sft", f"--config={bad}/{config}")
    assert re.search(told, said), said
    assert len(said.splitlines()) == 1


def test_the_name_of_a_module_is_no_file_but_near_one(call, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "did you mean 'configs/sft/storyland.py'" in refused(
        call, "sft", "--config=configs.sft.storyland"
    )
    assert "such as configs/sft/storyland.py" in refused(call, "sft", "--config=configs/sft")


def test_the_description_of_a_model_is_no_config(call, data):
    said = refused(call, "sft", f"--config={data}/model/config.json")
    assert "describes a model: pass its folder as the model" in said


def test_the_stored_config_of_a_run_is_a_config(call, tmp_path):
    assert call("sft")[0] == 0
    stored = tmp_path / "stored.json"
    shutil.copy(tmp_path / "run" / "config.json", stored)
    written = json.loads(stored.read_text())
    shutil.rmtree(tmp_path / "run")
    assert call("sft", f"--config={stored}") == (0, "")
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == written
    shutil.rmtree(tmp_path / "run")
    stored.write_text(json.dumps(written | {"hub_token": REDACTED}))
    said = refused(call, "sft", f"--config={stored}")
    assert "was stored without the secret hub_token: pass --config.hub_token=VALUE" in said
    assert call("sft", f"--config={stored}", "--config.hub_token=mine")[0] == 0


def test_the_config_of_another_program_lacks_a_key(call):
    said = refused(
        call, "evaluate", f"--config={ROOT}/configs/data/storyland.py", "--config.seed=1"
    )
    assert "config.models" in said or "no key" in said


FILES = [
    ("sft", "demonstrations"), ("sft", "validation"), ("reward_model", "rankings"), ("reward_model", "demonstrations"),
    ("ppo", "prompts"), ("ppo", "pretraining_text"), ("sample", "prompts"), ("evaluate", "prompts"),
]  # fmt: skip
OPTIONAL_FILES = [
    ("ppo", "held_out_text"), ("evaluate", "held_out_text"), ("evaluate", "few_shot.demonstrations"),
    ("reward_model", "evaluation.validation_train"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key"), FILES)
def test_a_forgotten_file_is_named_with_its_flag(call, name, key):
    said = refused(call, name, f"--config.{key}=")
    assert said == f"Error: {key} is empty: pass the file with --config.{key}=FILE\n"


@pytest.mark.parametrize(("name", "key"), FILES + OPTIONAL_FILES)
def test_each_data_file_of_a_program_is_looked_at_first(call, bad, name, key):
    said = refused(call, name, f"--config.{key}={bad}/pipe")
    assert (
        said
        == f"Error: {key}={bad}/pipe is a pipe or a device: save it to a file first and pass that\n"
    )


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("zzz.txt", "does not exist: check the path"),
        ("empt.jsonl", "does not exist: did you mean '"),
        ("no/such/folder/x.jsonl", "there is no folder"),
        ("empty.jsonl", "is empty, it has no byte"),
        ("folder", "is a folder: pass one file, such as "),
        ("pipe", "is a pipe or a device: save it to a file first"),
        ("socket", "is a pipe or a device: save it to a file first"),
    ],
)
def test_what_is_no_data_file_is_named(bad, file, told):
    with pytest.raises(
        ValueError, match=f"^prompts={bad}/{file} {told}" if "there" not in told else told
    ):
        inputs.check_file("prompts", f"{bad}/{file}")
    if file in ("pipe", "socket", "folder"):
        with pytest.raises(
            ValueError, match=f"{bad}/{file} is (no regular file: save it|a folder: pass one file)"
        ):
            read_jsonl(f"{bad}/{file}", Prompt)


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero", "/dev/stdin"])
def test_a_device_is_no_data(call, device):
    assert "save it to a file first" in refused(call, "sft", f"--config.validation={device}")


LANGUAGE_MODELS = [("sft", "model"), ("reward_model", "model"), ("ppo", "model"), ("evaluate", "models.sft"),
                   ("evaluate", "reference")]  # fmt: skip
REWARD_MODELS = [("ppo", "reward_model"), ("evaluate", "reward_model")]


@pytest.mark.parametrize(("name", "key"), LANGUAGE_MODELS)
def test_a_reward_model_in_the_place_of_a_language_model_is_found(call, data, name, key):
    said = refused(call, name, f"--config.{key}={data}/reward")
    assert (
        f"{key}={data}/reward is a reward model and a language model is needed here: pass" in said
    )


@pytest.mark.parametrize(("name", "key"), REWARD_MODELS)
def test_a_language_model_in_the_place_of_a_reward_model_is_found(call, data, name, key):
    said = refused(call, name, f"--config.{key}={data}/model")
    assert (
        f"{key}={data}/model is a language model and a reward model is needed here: pass the model/ folder"
        in said
    )
    assert "is a language model" in refused(call, name, f"--config.{key}=storyland:base_small")


@pytest.mark.parametrize(("name", "key"), LANGUAGE_MODELS + REWARD_MODELS)
def test_each_model_of_a_program_is_looked_at_first(call, bad, name, key):
    said = refused(call, name, f"--config.{key}={bad}/dumb")
    assert f"{bad}/dumb holds no tokenizer.json: copy the tokenizer of the model there" in said


@pytest.mark.parametrize("kind", [inputs.LANGUAGE, inputs.REWARD])
@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("nowhere", "does not exist"),
        ("folder", "holds no model"),
        ("mine.jsonl", "is no folder: pass "),
        ("pipe", "is no folder: pass"),
        ("damaged", "config.json is corrupt"),
        ("emptied", "config.json is corrupt"),
        ("other", "describes no model .no model_type."),
    ],
)
def test_what_is_no_model_is_told_before_it_is_loaded(bad, kind, model, told):
    with pytest.raises(ValueError, match=told):
        inputs.check_model("model", f"{bad}/{model}", kind)


def test_a_run_folder_in_the_place_of_a_model_names_the_models_in_it(call, data):
    said = refused(call, "sft", f"--config.model={data}")
    assert f"pass one of the models in it, {data}/model, {data}/reward" in said
    assert "choose one of storyland:base_" in refused(
        call, "sft", "--config.model=storyland:base_huge"
    )


@pytest.mark.parametrize("models", ["()", "('',)", "(3,)", "('nowhere',)"])
def test_sampling_says_how_models_are_given(call, models):
    assert "--config.models=\"('FOLDER',)\"" in refused(call, "sample", f"--config.models={models}")


# ----------------------------------------------------------------------------------------- prompts of another world


@pytest.mark.parametrize(
    ("name", "flag", "fix"),
    [
        ("sample", "--config.labelers=3", "--config.labelers=0 goes without it"),
        (
            "evaluate",
            f"--config.gold={inputs.GOLD_OF_STORYLAND}",
            "--config.gold= (empty) goes without it",
        ),
        (
            "ppo",
            f"--config.gold={inputs.GOLD_OF_STORYLAND}",
            "--config.gold= (empty) goes without it",
        ),
        (
            "ppo",
            f"--config.text_reward={inputs.GOLD_OF_STORYLAND}",
            "--config.text_reward= (empty)",
        ),
    ],
)
def test_prompts_that_storyland_does_not_know_are_named_before_anything_is_sampled(
    call, bad, name, flag, fix
):
    said = refused(call, name, flag, f"--config.prompts={bad}/mine.jsonl")
    assert f"record 0 (from 0) of {bad}/mine.jsonl has id='news-1'" in said
    assert fix in said


def test_a_known_id_with_another_text_is_not_known(call, tmp_path):
    known = [Prompt(task("test", i).prompt, id=f"test/{i}") for i in range(3)]
    asked = (Message("system", "Be brief."), Message("user", task("test", 3).prompt))
    write_jsonl(tmp_path / "p.jsonl", [*known, Prompt(asked, id="test/3")])
    assert call("sample", "--config.labelers=3", f"--config.prompts={tmp_path}/p.jsonl")[0] == 0
    shutil.rmtree(tmp_path / "run")
    for other in (
        Prompt("Where is my order?", id="test/4"),
        Prompt("Hello"),
        Prompt("Hello", id="train/x"),
    ):
        write_jsonl(tmp_path / "p.jsonl", [*known, other])
        said = refused(
            call, "sample", "--config.labelers=3", f"--config.prompts={tmp_path}/p.jsonl"
        )
        assert "record 3 (from 0)" in said


@pytest.mark.parametrize("key", ["gold", "text_reward"])
@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("words", "is not of the form 'package.module:function'"),
        ("no_such_lab:score", "no module 'no_such_lab'"),
        ("math:hypo", "did you mean 'hypot'"),
        (
            "math:sqrt",
            "wants the argument 'x', which is not available here. Available: prompt, response, prompt_id",
        ),
    ],
)
def test_a_function_of_texts_is_looked_at_before_anything_is_loaded(call, key, function, told):
    assert told in refused(call, "ppo", f"--config.{key}={function}")


# ---------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("name", "flag", "told"),
    [
        (
            "sft",
            "batch_size=0",
            "batch_size=0 must be a number of at least 1: --config.batch_size=NUMBER",
        ),
        ("sft", "epochs=-1", "epochs=-1 must be"),
        ("sft", "dropout=1.0", "dropout=1.0 must be a number of at least 0 and below 1"),
        ("sft", "pieces_per_row=many", "pieces_per_row='many' must be"),
        ("sft", "clip_norm=0", "clip_norm=0"),
        ("sft", "guard.max_skipped=None", "guard.max_skipped=None must be"),
        ("sft", "seed=None", "seed=None must be"),
        ("ppo", "minibatches=None", "minibatches=None must be"),
        ("ppo", "gamma=1.5", "gamma=1.5 must be a number of at least 0 and at most 1"),
        ("ppo", "episodes=0", "episodes=0 must be"),
        ("reward_model", "max_k=0", "max_k=0 must be"),
        ("sample", "min_k=None", "min_k=None must be"),
        ("evaluate", "samples=0", "samples=0 must be"),
        ("evaluate", "limit=0", "limit=0 must be"),
        ("pretrain", "row_length=0", "row_length=0 must be"),
        (
            "instructgpt",
            "sft.batch_size=0",
            "sft.batch_size=0 must be a number of at least 1: --config.sft.batch_size",
        ),
    ],
)
def test_a_number_that_no_run_can_have_is_refused(call, name, flag, told):
    assert told in refused(call, name, f"--config.{flag}")


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["sft"], "unknown flag 'sft'"),
        (["--config.seed"], "--config.seed needs a value: --config.seed=VALUE"),
        (["--config.seed", "--config.epochs=1"], "--config.seed needs a value"),
        (["--config.x=1"], "config has no key 'x'"),
        (["--config.=1"], "config has no key ''"),
        (["--workdir="], "--workdir is empty"),
        (["--config="], "--config is empty"),
        (["--workdir"], "expected one argument"),
        (["-q"], "unknown flag '-q'"),
        (["--confg.seed=1"], "did you mean '--config'"),
    ],
)
def test_a_flag_that_says_nothing_is_refused(call, flags, told):
    assert told in refused(call, "sft", *flags)


@pytest.mark.parametrize("place", ["mine.jsonl", "pipe", "folder"])
def test_a_place_that_is_no_run_folder_is_left_as_it_is(call, bad, place):
    assert "is not a run of this program" in refused(call, "sft", f"--workdir={bad}/{place}")


def test_a_folder_that_cannot_be_made_is_the_machines_refusal(call, bad):
    refused(call, "sft", f"--workdir={bad}/mine.jsonl/run", status=1)


def test_a_mistake_beside_overwrite_moves_nothing(call, tmp_path):
    assert call("sft")[0] == 0
    (tmp_path / "run" / "metrics.jsonl").write_text("precious")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(AssertionError, match="leaves no run folder"):
        call("sft", "--overwrite", "--config.validation=")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "precious"


@pytest.mark.parametrize(
    "content", [b"", b"\xff\x00rubbish", b'{"seed": ', b"[1, 2]", b"3", b"null"]
)
def test_a_damaged_config_of_a_run_is_told(call, tmp_path, content):
    assert call("sft")[0] == 0
    (tmp_path / "run" / "config.json").write_bytes(content)
    with pytest.raises(AssertionError, match="leaves no run folder"):
        call("sft")
    with pytest.raises(
        ValueError, match=r"config.json is damaged: restore it, or start afresh with --overwrite"
    ):
        prepare_workdir(tmp_path / "run", ConfigDict({"seed": 1}))


def test_each_program_has_a_check_before_its_run_folder_is_made():
    for module in PROGRAMS.values():
        assert "check=check" in inspect.getsource(module)


# --------------------------------------------------------------------------------------------- as on a command line


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("sft", "demonstrations is empty: pass the file with --config.demonstrations=FILE"),
        (
            "instructgpt",
            "usage: instructgpt.py --config=configs/instructgpt/storyland.py --workdir=runs/instructgpt",
        ),
        (
            "prepare_data",
            "usage: prepare_data.py --config=configs/data/storyland.py --workdir=runs/data",
        ),
    ],
)
def test_a_program_without_flags_says_what_is_missing(tmp_path, name, told):
    """From an empty folder and with an empty environment: no HOME, no PATH."""
    argv = [sys.executable, f"{ROOT}/experiments/{name}.py"]
    environ = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        argv, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sft", "sample", "reward_model", "ppo", "evaluate", "pretrain"])
def test_what_is_missing_is_said_when_nothing_is_given(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    module = PROGRAMS[name]
    with pytest.raises(SystemExit) as ended:
        cli.main(
            module.run,
            config=f"configs/{name}/storyland.py",
            workdir="runs/x",
            argv=[],
            check=module.check,
        )
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1
    assert (
        " is empty: " in said
        or "reward_model=''" in said
        or said.startswith("usage: pretrain.py --config=")
    )
    assert not list(tmp_path.iterdir())
