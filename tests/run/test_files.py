"""The one writer: whole files or old ones, synced in the right order, nothing left beside them."""

from __future__ import annotations

import ast
import collections
import os
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from configs import common as common_config
from experiments import sft
from rlhf_jax.data import schema, sources
from rlhf_jax.evaluation.report import write_report
from rlhf_jax.models.config import gpt2
from rlhf_jax.models.heads import language_model
from rlhf_jax.models.hf import load_hf, save_hf
from rlhf_jax.run import cli, devices, files, guards, networks, results, untrusted
from rlhf_jax.run import config as config_lib
from rlhf_jax.run.checkpoint import Checkpoints
from rlhf_jax.run.metrics import StageLog
from rlhf_jax.run.workdir import claim_workdir, prepare_workdir


def test_an_error_in_the_block_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    target = tmp_path / "a.json"
    files.write_json(target, {"old": 1})

    def fail_half_way() -> None:
        with files.written(target) as file:
            file.write("half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_half_way()
    assert untrusted.read_json(target) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        order.append(("sync", os.path.isdir(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def replaced(source: str, target: Path) -> None:
        order.append(("rename", False))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    files.write_json(tmp_path / "a.json", [1])
    assert order == [("sync", False), ("rename", False), ("sync", True)]


def test_a_number_that_is_not_finite_leaves_the_old_file(tmp_path):
    files.write_json(tmp_path / "a.json", [1])
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", [float("nan")])
    assert untrusted.read_json(tmp_path / "a.json") == [1]


def test_a_folder_takes_the_place_of_another_and_a_crash_in_between_is_mended(tmp_path):
    model = tmp_path / "model"
    for text in ("one", "two"):
        (tmp_path / "model.tmp").mkdir()
        (tmp_path / "model.tmp" / "x").write_text(text)
        files.put_folder(tmp_path / "model.tmp", model)
    assert (model / "x").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    model.rename(tmp_path / "model.old")  # as a crash between the two renames leaves it
    (tmp_path / "model.tmp").mkdir()
    files.settle_folder(model)
    assert (model / "x").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_contents_tell_a_flipped_bit_an_emptied_and_a_missing_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_bytes(b"abc")
    (tmp_path / "y").write_bytes(b"d")
    before = files.contents(tmp_path)
    assert list(before) == ["sub/x", "y"]
    (tmp_path / "sub" / "x").write_bytes(b"abb")
    assert files.contents(tmp_path)["sub/x"] != before["sub/x"]
    (tmp_path / "sub" / "x").unlink()
    assert list(files.contents(tmp_path)) == ["y"]
    (tmp_path / "z").symlink_to(tmp_path / "y")
    with pytest.raises(OSError, match="symbolic link"):
        files.contents(tmp_path)


def test_appended_lines_are_kept_in_order(tmp_path):
    for n in range(3):
        files.append_line(tmp_path / "new" / "log.jsonl", {"n": n})
    assert (tmp_path / "new" / "log.jsonl").read_text().split() == [
        '{"n":',
        "0}",
        '{"n":',
        "1}",
        '{"n":',
        "2}",
    ]


# ------------------------------------------------------------------------------------------------- addresses, links

ADDRESSES = (
    "gs://bucket/run",
    "s3://bucket/a/b",
    "hdfs://node:9000/run",
    "file:///tmp/run",
    "https://example.org/run",
)


@pytest.mark.parametrize(
    "address", [*ADDRESSES, "GS://bucket/run", "abfss://box@account/run", "gcs+cache://b/run"]
)
def test_an_address_is_no_path_also_after_pathlib_took_a_slash_away(address):
    for given in (address, Path(address), f" {address}"):
        with pytest.raises(
            ValueError, match=r"^workdir='.*' is an address \(.*://\), and only paths on local"
        ) as refused:
            files.local_path("workdir", given)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "path", ["runs/sft", "/tmp/x:y/z", "C:/runs", "C:\\runs", "a:b", "12:30/run", ""]
)
def test_paths_with_colons_are_paths(path):
    assert files.local_path("workdir", path) == Path(path)


def test_a_refused_address_shows_no_password():
    with pytest.raises(ValueError, match="'s3://bucket/run'") as refused:
        files.local_path("workdir", "s3://me:hunter2@bucket/run?token=hunter3#hunter4")
    assert "hunter" not in str(refused.value)


def _writers() -> dict[str, Callable[[str], object]]:
    config = ConfigDict({"seed": 0})
    model = language_model(gpt2(8, 8, 1, 4, 1))
    params = model.init(jax.random.key(0))
    return {
        "claim_workdir": claim_workdir,
        "claim_workdir, afresh": lambda path: claim_workdir(path, overwrite=True),
        "prepare_workdir": lambda path: prepare_workdir(path, config),
        "StageLog": lambda path: StageLog(path, "sft", total=1),
        "Checkpoints": Checkpoints,
        "Skips": lambda path: guards.Skips(path, "sft", "x", limit=1).tell(
            guards.Event(1, "step", "", [], [])
        ),
        "save_network": lambda path: networks.save_network(
            path, networks.Network(model, params, None)
        ),
        "save_hf": lambda path: save_hf(path, model, params),
        "write_result": lambda path: results.write_result(f"{path}/sft.json", dict),
        "write_jsonl": lambda path: schema.write_jsonl(f"{path}/x.jsonl.gz", [schema.Prompt("x")]),
        "write_report": lambda path: write_report(f"{path}/report.html", {}),
        "append_line": lambda path: files.append_line(f"{path}/x", 1),
        "make_folder": files.make_folder,
    }


READERS: dict[str, Callable[[str], object]] = {
    "read_jsonl": lambda path: schema.read_jsonl(path, schema.Prompt),
    "read_bytes": schema.read_bytes,
    "read_pairs": sources.read_pairs,
    "read_text": sources.read_text,
    "read_hh": lambda path: sources.read_hh(path, split="train"),
    "read_oasst": lambda path: sources.read_oasst(path, split="train"),
    "load_hf": load_hf,
    "model_folder": networks.model_folder,
    "agree_on_inputs": lambda path: devices.agree_on_inputs("", path),
    "load_config": config_lib.load_config,
}


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3:/bucket/run"])
def test_nothing_is_written_to_or_read_from_an_address(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, function in (_writers() | READERS).items():
        with pytest.raises(ValueError, match=r"is an address \((gs|s3)://\)"):
            function(address)
        assert not list(tmp_path.iterdir()), name


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        (sft.run, ["--workdir=gs://bucket/run"]),
        (sft.run, ["--workdir", "hdfs:/bucket/run"]),
        (sft.run, ["--workdir=run", "--config.model=gs://bucket/model"]),
        (
            sft.run,
            ["--workdir=run", "--config.validation=s3://me:secret-7@bucket/validation.jsonl"],
        ),
        (sft.run, ["--workdir=run", "--config=gs://bucket/config.py:smoke"]),
    ],
)
def test_a_program_refuses_an_address_at_its_start(program, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parents[2] / "configs" / "sft" / "storyland.py"
    with pytest.raises(SystemExit) as ended:
        cli.main(program, config=str(config), argv=flags)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(
        (
            "Error: --workdir=",
            "Error: --config=",
            "Error: config.model=",
            "Error: config.validation=",
        )
    )
    assert len(said.splitlines()) == 1
    assert "is an address" in said
    assert "secret-7" not in said
    assert not list(tmp_path.iterdir())


def test_every_path_key_of_a_config_is_looked_at():
    for group in (
        common_config.sft(),
        common_config.reward_model(),
        common_config.ppo(),
        common_config.evaluate(),
    ):
        for key in config_lib.leaf_keys(group):
            if group_value(group, key) != "" or key.endswith(("gold", "text_reward")):
                continue
            with pytest.raises(ValueError, match=rf"^config\.{key}='gs://bucket/x' is an address"):
                config_lib.refuse_addresses(
                    config_lib.override(ConfigDict(group.to_dict()), {key: "gs://bucket/x"})
                )
    sampled = config_lib.override(
        ConfigDict(common_config.sample()), {"models": "('a', 'gs://bucket/x')"}
    )
    with pytest.raises(ValueError, match=r"^config\.models='gs://bucket/x' is an address"):
        config_lib.refuse_addresses(sampled)


def group_value(config: ConfigDict, key: str) -> object:
    for name in key.split("."):
        config = config[name]
    return config


def test_links_out_of_a_folder_are_found_at_every_depth(tmp_path):
    run, deep = tmp_path / "run", tmp_path / "run" / "checkpoints" / "7" / "d"
    deep.mkdir(parents=True)
    (run / "epoch-1").mkdir()
    (tmp_path / "run2").mkdir()  # a neighbour whose name begins with that of the run
    (tmp_path / "run2" / "x").write_text("x")
    (run / "log").write_text("log")
    (deep / "inside").symlink_to(run / "log")
    (run / "folder inside").symlink_to(deep)
    (run / "round").symlink_to("round")
    (run / "itself").symlink_to(run)
    (run / "not there yet").symlink_to("checkpoints/8")
    assert list(files.links_out_of(run)) == []
    out = {
        deep / "file": tmp_path / "run2" / "x",
        run / "epoch-1" / "folder": tmp_path / "run2",
        run / "quarantine": Path("..") / "run2",
        run / "epoch-1" / "nowhere": tmp_path / "nowhere",
        deep / "system": Path("/dev/null"),
    }
    for link, target in out.items():
        link.symlink_to(target)
        assert list(files.links_out_of(run)) == [link]
        link.unlink()


@pytest.mark.parametrize(
    "name", ["checkpoints/7/d/file", "quarantine/7-1/x", "epoch-1/model.safetensors", "a/b/c/d/e"]
)
def test_a_run_with_a_deep_link_out_of_it_is_refused_before_anything_is_written(name, tmp_path):
    run, precious = tmp_path / "run", tmp_path / "precious"
    prepare_workdir(run, ConfigDict({"seed": 1}))
    precious.write_text("precious")
    (run / name).parent.mkdir(parents=True)
    (run / name).symlink_to(precious)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    for overwrite in (False, True):
        for claim in (claim_workdir, _prepare):
            with pytest.raises(
                ValueError, match=rf"{name} is a symbolic link out of the run folder, to .*precious"
            ):
                claim(run, overwrite=overwrite)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    assert precious.read_text() == "precious"
    (run / name).unlink()
    claim_workdir(run).close()


def _prepare(path: Path, *, overwrite: bool) -> bool:
    return prepare_workdir(path, ConfigDict({"seed": 1}), overwrite=overwrite)


def test_what_a_kill_left_of_an_unfinished_file_goes_at_the_next_start(tmp_path):
    prepare_workdir(tmp_path, ConfigDict())
    for name in (".sft.json.ab_12xyz.tmp", ".notes.tmp", "results.tmp"):
        (tmp_path / name).write_text("half")
    claim_workdir(tmp_path).close()
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json",
        "run.lock",
        ".notes.tmp",
        "results.tmp",
    }


# ---------------------------------------------------------------------------------------------------- the one writer

ROOT = Path(__file__).parents[2]
BY_HAND = ("write_text", "write_bytes", "replace", "rename", "renames", "touch", "mkstemp", "NamedTemporaryFile",
           "fsync", "fdatasync", "file_digest", "save_file", "to_csv", "to_parquet", "symlink_to",
           "copyfile", "copytree", "copy2", "move", "mkdir", "makedirs")  # fmt: skip
"""Calls that write, rename or hash a file or make a folder (whose own entry must be synced too), by hand."""
ALLOWED = {
    # The lock must be opened without emptying it: another process may hold it and have its name in it.
    ("rlhf_jax/run/workdir.py", "open"): 1,
    # The stream that stands in for a console that is closed.
    ("rlhf_jax/run/output.py", "open"): 1,
    # A sign to another process that is being measured, in a temporary folder.
    ("tools/benchmark.py", "touch"): 1,
}
"""What is written elsewhere, and how often, with the reason above it."""


def _writes_by_hand(source: str) -> list[str]:
    """The name of each call that writes a file; `str.replace` and the like have arguments that are no paths."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if name in ("open", "fdopen") and _opens_to_write(node):
            found.append(name)
        elif owner in ("files", "dataclasses", "jnp", "np", "time", "re", "copy"):
            continue
        elif name in ("replace", "rename", "move") and owner not in ("os", "shutil"):
            if (
                len(node.args) == 1 and not node.keywords
            ):  # a text's has two arguments, a record's has keywords
                found.append(name)
        elif name in BY_HAND:
            found.append(name)
    return found


def _opens_to_write(call: ast.Call) -> bool:
    method = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) not in (
        "os",
        "gzip",
        "io",
    )
    place = 0 if method else 1
    given = [
        *call.args[place : place + 1],
        *(k.value for k in call.keywords if k.arg in ("mode", "flags")),
    ]
    modes = [
        mode.value
        for mode in given
        if isinstance(mode, ast.Constant) and isinstance(mode.value, str)
    ]
    return any(set(mode) & set("wax+") for mode in modes) or any(
        "O_W" in ast.unparse(mode) for mode in given
    )


@pytest.mark.parametrize("room", ["rlhf_jax", "experiments"])
def test_no_file_is_written_by_hand_but_in_one_place(room):
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    for path in sorted((ROOT / room).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if (
            name != "rlhf_jax/run/files.py" and "/peers/" not in name
        ):  # those run in environments without this package
            found.update((name, call) for call in _writes_by_hand(path.read_text()))
    expected = {key: count for key, count in ALLOWED.items() if key[0].startswith(room)}
    assert found == expected, "write it with rlhf_jax.run.files, which says when it is on the disk"


@pytest.mark.parametrize(
    "line",
    [
        "path.write_text('x')", "open(p, 'w')", "path.open('wb')", "open(p, mode='a')", "os.open(p, os.O_WRONLY)",
        "os.replace(a, b)", "a.replace(b)", "a.rename(b)", "os.rename(a, b)", "os.fdopen(h, 'wb')", "os.fsync(3)",
        "hashlib.file_digest(f, 'sha256')", "gzip.open(p, 'wt')", "shutil.copytree(a, b)", "shutil.move(a, b)",
        "tempfile.mkstemp()", "folder.mkdir(parents=True)", "os.makedirs(p)",
    ],
)  # fmt: skip
def test_writing_by_hand_is_seen(line):
    assert _writes_by_hand(line)


@pytest.mark.parametrize(
    "line",
    ["text.replace('a', 'b')", "open(p)", "path.open('rb')", "record._replace(x=1)", "files.rename(a, b)",
     "dataclasses.replace(record)", "archive.open(name)", "zipfile.ZipFile(p)", "jnp.copy(x)"],
)  # fmt: skip
def test_what_writes_no_file_is_left_alone(line):
    assert not _writes_by_hand(line)
