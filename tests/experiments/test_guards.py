"""What is left out of training is counted and named; a run goes on with what it was begun with, and stops when told."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import ppo, reward_model, sft
from rlhf_jax import sharding
from rlhf_jax.data import parsed
from rlhf_jax.data.loader import Batches
from rlhf_jax.data.schema import Demonstration, PlainText, read_jsonl, write_jsonl
from rlhf_jax.data.storyland import tokenizer as storyland_assets
from rlhf_jax.data.text import load_tokenizer
from rlhf_jax.run import checkpoint, devices, guards, networks, signals
from rlhf_jax.run import records as run_records
from rlhf_jax.run.config import load_config
from rlhf_jax.run.loop import Loop, Settings
from rlhf_jax.run.ppo import watch as ppo_watch
from rlhf_jax.run.ppo.setup import Setup
from rlhf_jax.run.workdir import allow_change
from rlhf_jax.steps import minibatch_order
from rlhf_jax.types import Mean
from tests.reliability import kill

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    kill.make_inputs(folder)
    return folder


def config_of(stage: str, inputs: Path, **overrides: object) -> ConfigDict:
    flags = [
        f.removeprefix("--config.").partition("=")
        for f in kill.command(stage, inputs, Path(), **overrides)[4:]
    ]
    return load_config(
        f"{ROOT}/configs/{stage}/storyland.py:smoke", {key: value for key, _, value in flags}
    )


# ------------------------------------------------------------------------------------------- counting and naming


def test_a_packed_row_names_each_record_in_it():
    records = guards.RowRecords(
        "d.jsonl", ["a", "b", None, "d"], [3, 5, 2, 6], capacity=8, places=[0, 1, 5, 7]
    )
    assert records.of([0]) == [(7, "d"), (5, None)]  # best_fit([3, 5, 2, 6]) is [[3, 2], [1, 0]]
    assert records.of([1, 2]) == [(1, "b"), (0, "a")]  # row 2 is of another file that was mixed in
    assert guards.named(records.of([0]), "d.jsonl") == "records 7 (d), 5 of d.jsonl (from 0)"
    assert guards.RowRecords("p.jsonl", ["x", "y"]).of([1]) == [(1, "y")]


def bad_at(*steps: int):
    """A step function that counts its calls and reports the given ones (from 1) as skipped."""

    def step(state, batch, key):
        number = state["calls"] + 1
        skipped = jnp.isin(number, jnp.array(steps)).astype(jnp.float32)
        one = jnp.float32(1)
        told = {
            "loss": Mean(number * one, one),
            "skipped": Mean(skipped, one),
            "spiked": Mean(0 * one, one),
        }
        return {"calls": number}, told

    return step


def train(
    folder: Path,
    step_fn,
    *,
    steps: int = 8,
    limit: int = 3,
    save_every: int = 2,
    stop_at: int = 0,
    **options,
):
    """The real loop over twelve records in batches of two."""
    batches = Batches({"x": np.arange(12)}, batch_size=2, seed=0)
    mesh = sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1])
    records = guards.RowRecords("toy.jsonl", [f"id{i}" for i in range(12)])
    with pytest.MonkeyPatch.context() as patch:
        if stop_at:
            patch.setattr(
                signals,
                "stop_requests",
                lambda: contextlib.nullcontext(lambda step: step == stop_at),
            )
        settings = Settings(folder, "toy", steps, save_every, max_skipped=limit)
        with Loop(settings, {"calls": jnp.int32(0)}, data=records.path, **options) as loop:
            for step, state in loop:
                state, metrics = step_fn(state, sharding.place_batch(batches.at(step), mesh), None)
                loop.log(metrics, rows=functools.partial(records.of_step, batches, step))
                loop.done(state)
    return batches


def skipped_lines(folder: Path) -> list[dict]:
    file = folder / guards.FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_skipped_step_is_printed_and_logged_with_its_records_and_the_run_goes_on(
    tmp_path, capsys
):
    batches = train(tmp_path, bad_at(2, 3, 6))
    lines, printed = skipped_lines(tmp_path), capsys.readouterr().err
    assert [line["step"] for line in lines] == [2, 3, 6]
    for line in lines:
        rows = batches.indices(line["step"] - 1).tolist()
        assert line["rows"] == line["records"] == rows
        assert line["ids"] == [f"id{row}" for row in rows]
        assert (
            f"toy {line['step']}: the step was left out, its loss or gradient is not finite; "
            in printed
        )
        assert (
            f"records {rows[0]} (id{rows[0]}), {rows[1]} (id{rows[1]}) of toy.jsonl (from 0)"
            in printed
        )
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 9))
    assert [line["skipped"] for line in log] == [0, 1, 1, 0, 0, 1, 0, 0]


def test_too_many_in_a_row_stop_the_run_name_the_records_and_leave_the_last_checkpoint(tmp_path):
    batches = Batches({"x": np.arange(12)}, batch_size=2, seed=0)
    with pytest.raises(
        FloatingPointError, match="3 steps in a row were left out, its loss or gradient is not"
    ) as told:
        train(tmp_path, bad_at(3, 4, 5, 6, 7))
    for step in (2, 3, 4):
        assert all(f"{row} (id{row})" in str(told.value) for row in batches.indices(step))
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as saved:
        assert saved.newest_good() == 4


def test_the_count_in_a_row_goes_on_over_a_restart(tmp_path):
    """Stopped after two of three bad steps: the third, in the next process, ends the run."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, bad_at(4, 5, 6), stop_at=5)
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        train(tmp_path, bad_at(4, 5, 6))
    assert [line["step"] for line in skipped_lines(tmp_path)] == [4, 5, 6]


def test_a_run_all_of_whose_steps_are_bad_stops_although_it_is_short(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"each of the 2 steps was left out.* records .*id\d"
    ):
        train(tmp_path, bad_at(1, 2), steps=2, limit=5)


def test_what_a_checkpoint_says_was_written_is_there(tmp_path):
    """A kill between `on_save` and the checkpoint repeats `on_save`; the other order would lose it."""
    seen = []

    def on_save(step, state, log):
        with checkpoint.Checkpoints(tmp_path / "checkpoints") as saved:
            seen.append((step, step in saved.steps()))
        log(step, {"validation": step})

    train(tmp_path, bad_at(), steps=4, on_save=on_save)
    assert seen == [(2, False), (4, False)]
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("validation")) for line in log] == [
        (1, None),
        (2, 2),
        (3, None),
        (4, 4),
    ]


# ------------------------------------------------------------------------------------------------- the same run


def test_another_data_file_model_or_rate_is_refused_by_name_unless_allowed(
    inputs, tmp_path, capsys
):
    for name in ("model", "demonstrations.jsonl", "validation.jsonl"):
        (shutil.copytree if name == "model" else shutil.copy)(inputs / name, tmp_path / name)
    paths = {"model": tmp_path / "model"}
    paths |= {key: tmp_path / f"{key}.jsonl" for key in ("demonstrations", "validation")}
    config = config_of("sft", inputs, **paths)
    network = SimpleNamespace(
        tokenizer=networks.load_network(str(inputs / "model"), devices.start((-1, 1, 1))).tokenizer
    )
    begun = json.loads(json.dumps(sft.origin(config, network)))
    assert begun["data"]["demonstrations"]["lines"] == 64
    assert begun["config"]["learning_rate"] == config.learning_rate
    guards.check_origin(begun, sft.origin(config, network))

    moved = config_of("sft", inputs)  # the same files elsewhere
    guards.check_origin(begun, sft.origin(moved, network))

    records, _ = read_jsonl(tmp_path / "demonstrations.jsonl", Demonstration)
    write_jsonl(tmp_path / "demonstrations.jsonl", records[:-1])
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    config.learning_rate = 0.5
    config.keep = 9
    now = sft.origin(config, network)
    with pytest.raises(
        ValueError, match=r"learning_rate: .* -> 0.5; demonstrations: the content of "
    ) as told:
        guards.check_origin(begun, now)
    assert f"model: the content of {tmp_path / 'model'} has changed (model.safetensors)" in str(
        told.value
    )
    assert "keep" not in str(told.value)
    with allow_change():
        guards.check_origin(begun, now)
    assert "learning_rate" in capsys.readouterr().out


@pytest.fixture
def plain_origin(tmp_path):
    """`guards.origin` of a stage with one data file and one model, as it comes back from a checkpoint."""
    file = tmp_path / "asked.jsonl"
    file.write_text('{"prompt": "Who?", "response": "Me."}\n')
    model = storyland_assets.assets() / "base_small"
    tokenizer = load_tokenizer(storyland_assets.assets())
    config = load_config(f"{ROOT}/configs/sft/storyland.py:smoke", {"demonstrations": str(file)})

    def origin() -> dict:
        made = guards.origin(
            config,
            files={"demonstrations": str(file)},
            models={"model": model},
            tokenizer=tokenizer,
        )
        return json.loads(json.dumps(made))

    return origin


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("jax_default_prng_impl", "rbg"),
        ("jax_enable_x64", True),
        ("jax_default_matmul_precision", "highest"),
    ],
)
def test_another_generator_type_or_precision_is_refused_by_the_name_of_its_flag(
    plain_origin, flag, value, capsys
):
    begun, was = plain_origin(), jax.config.values[flag]
    guards.check_origin(begun, plain_origin())
    jax.config.update(flag, value)
    try:
        now = plain_origin()
    finally:
        jax.config.update(flag, was)
    with pytest.raises(
        ValueError,
        match=rf"begun with something else \({flag}: .* -> {value}\).*allow_config_change",
    ):
        guards.check_origin(begun, now)
    with allow_change():
        guards.check_origin(begun, now)
    assert f"{flag}: " in capsys.readouterr().out


def test_other_devices_and_processes_and_an_older_checkpoint_are_said_and_go_on(
    plain_origin, capsys
):
    begun, now = plain_origin(), plain_origin()
    assert begun["rounding"]["number of processes"] == 1
    now["rounding"] |= {"number of processes": 2, "device kind": "another"}
    guards.check_origin(begun, now)
    said = capsys.readouterr().out
    assert "number of processes: 1 -> 2" in said
    assert "device kind: cpu -> another" in said
    del begun["numerics"], begun["rounding"]  # written before they were taken down
    guards.check_origin(begun, now)
    assert "its checkpoint is of an older version" in capsys.readouterr().out


def test_the_fingerprint_is_of_the_bytes_that_were_parsed(inputs, tmp_path, monkeypatch):
    """A line appended while the run starts: the run is the one on the shorter file, and its resume is refused."""
    file = tmp_path / "demonstrations.jsonl"
    shutil.copy(inputs / "demonstrations.jsonl", file)
    before, config = file.read_bytes(), config_of("sft", inputs, demonstrations=file)
    load = networks.load_network
    network = load(config.model, devices.start(config.mesh))
    sft.read_demonstrations(network.tokenizer, str(file), config)
    file.write_bytes(
        before + before.splitlines(keepends=True)[0].replace(b'"id": "', b'"id": "again-')
    )
    begun = sft.origin(config, network)
    assert begun["data"]["demonstrations"]["sha256"] == hashlib.sha256(before).hexdigest()
    devices.start(config.mesh)  # the next process
    sft.read_demonstrations(network.tokenizer, str(file), config)
    with pytest.raises(ValueError, match=r"demonstrations: the content of .* has changed"):
        guards.check_origin(begun, sft.origin(config, network))
    file.write_bytes(before)
    sft.read_demonstrations(network.tokenizer, str(file), config)
    with pytest.raises(ValueError, match=r"demonstrations: .* changed while this run read it"):
        sft.origin(config, network)


def test_a_file_read_after_training_is_the_one_of_the_fingerprint(tmp_path):
    file = tmp_path / "late.jsonl"
    file.write_text('{"text": "a"}\n')
    parsed.begin()
    made_of = {"data": {"demonstrations": {"path": str(file), **parsed.of(file)._asdict()}}}
    file.write_text('{"text": "b"}\n')
    read_jsonl(file, PlainText)
    with pytest.raises(
        ValueError, match=r"demonstrations: .*late\.jsonl changed while this run trained"
    ):
        guards.check_read(made_of)


def test_a_model_that_changes_while_it_is_loaded_is_refused(inputs, tmp_path):
    shutil.copytree(inputs / "model", tmp_path / "model")
    config = config_of("sft", inputs, model=tmp_path / "model")
    network = networks.load_network(config.model, devices.start(config.mesh))
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    os.utime(weights, ns=(1, 1))
    with pytest.raises(
        ValueError, match=r"model: model\.safetensors of .* changed while this run loaded it"
    ):
        sft.origin(config, network)


def made_of(rate: float) -> dict:
    empty = {
        "data": {},
        "models": {},
        "tokenizer": "t",
        "versions": {},
        "numerics": {},
        "rounding": {},
    }
    return {"config": {"learning_rate": rate}, **empty}


def test_a_change_that_is_allowed_is_recorded_with_its_step_and_needs_a_step_to_go_on_with(
    tmp_path,
):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, bad_at(), stop_at=4, origin=made_of(1.0))
    with pytest.raises(ValueError, match=r"learning_rate: 1\.0 -> 2\.0"):
        train(tmp_path, bad_at(), origin=made_of(2.0))
    with allow_change():
        train(tmp_path, bad_at(), origin=made_of(2.0))
    told = [{"from_step": 4, "changes": ["learning_rate: 1.0 -> 2.0"]}]
    assert (
        json.loads((tmp_path / "checkpoints" / "manifests" / "8.json").read_text())["extra"][
            "config_changes"
        ]
        == told
    )
    train(tmp_path, bad_at(), origin=made_of(2.0))  # all done: nothing to refuse
    with (
        allow_change(),
        pytest.raises(ValueError, match="all 8 steps were done with something else"),
    ):
        train(tmp_path, bad_at(), origin=made_of(3.0))
    with allow_change():
        train(tmp_path, bad_at(), steps=10, origin=made_of(3.0))
    extra = json.loads((tmp_path / "checkpoints" / "manifests" / "10.json").read_text())["extra"]
    assert extra["config_changes"] == [
        *told,
        {"from_step": 8, "changes": ["learning_rate: 2.0 -> 3.0"]},
    ]
    assert run_records.config_changes(tmp_path) == extra["config_changes"]


# --------------------------------------------------------------------------------------------------------- PPO


def seen(**changes: float) -> dict[str, float]:
    names = (
        "rollout/kl_nats_per_sequence",
        "rollout/surprisal_nats_per_token",
        "rollout/score_square",
    )
    return dict(zip(names, (1.0, 1.0, 4.0), strict=True)) | {"value/value_error": 1.0} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollout/kl_nats_per_sequence": 61.0},
            "KL to the reference is 61 nats .* above kl_ceiling=60.0",
        ),
        ({"rollout/kl_nats_per_sequence": float("nan")}, "KL to the reference is nan"),
        (
            {"rollout/surprisal_nats_per_token": 0.1},
            "entropy is 0.1 nats a token, below entropy_floor=0.2",
        ),
        (
            {"value/value_error": 41.0},
            "is 10.2 times the squared score, above value_error_ceiling=10.0",
        ),
    ],
)
def test_an_alarm_stops_ppo_and_says_what_to_do(changes, message):
    config = ConfigDict({"kl_ceiling": 60.0, "entropy_floor": 0.2, "value_error_ceiling": 10.0})
    ppo_watch.alarm(seen(), 4, config)
    with pytest.raises(
        FloatingPointError, match=f"iteration 5: .*{message}.*what was saved before is intact"
    ):
        ppo_watch.alarm(seen(**changes), 4, config)


REWARD = """
calls = 0

def reward(prompt_id, response):
    "NaN for the third response of iteration 2 and for all of iteration 3."
    global calls
    calls += 1
    iteration, place = (calls - 1) // 8 + 1, (calls - 1) % 8
    return float("nan") if bad and (iteration == 3 or iteration == 2 and place == 2) else len(response) / 10.0
"""


def test_a_reward_that_is_not_finite_drops_its_row_and_when_all_are_stops_the_run(
    inputs, tmp_path, monkeypatch
):
    (tmp_path / "nan_reward.py").write_text("bad = True\n" + REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    config = config_of(
        "ppo", inputs, text_reward="nan_reward:reward", iterations=3, save_every=1, schedule="constant",
        warmup_iterations=0,
    )  # fmt: skip
    prepare, setups = ppo.prepare, []
    monkeypatch.setattr(ppo, "prepare", lambda *a: setups.append(prepare(*a)) or setups[-1])
    with pytest.raises(
        FloatingPointError, match="every score of the iteration was left out, it is not finite"
    ) as told:
        ppo.run(config, str(tmp_path / "run"))
    order = Batches({"x": np.arange(16)}, batch_size=8, seed=config.seed)
    assert all(f"{row} (p{row})" in str(told.value) for row in order.indices(2))
    lines = skipped_lines(tmp_path / "run")
    assert [(line["step"], line["what"]) for line in lines] == [(2, "score"), (3, "score")]
    assert lines[0]["ids"] == [f"p{order.indices(1)[2]}"]
    log = kill.history(tmp_path / "run")
    assert [line["rollout/dropped"] for line in log] == [0, 1 / 8, 1]
    assert log[1]["skipped"] == 0
    with checkpoint.Checkpoints(tmp_path / "run" / "checkpoints") as saved:
        assert saved.newest_good() == 2

    sys.modules[
        "nan_reward"
    ].bad = False  # repaired: the same command goes on, here with the programs of before
    monkeypatch.setattr(
        ppo,
        "prepare",
        lambda *a: prepare(*a)._replace(pieces=setups[0].pieces, paired=setups[0].paired),
    )
    ppo.run(config, str(tmp_path / "run"))
    assert [line["step"] for line in kill.history(tmp_path / "run")] == [1, 2, 3]
    assert [line["step"] for line in skipped_lines(tmp_path / "run")] == [2]


def test_skipped_minibatches_are_named_and_counted_over_iterations(inputs, tmp_path):
    """Two minibatches of the first iteration and one of the second make three in a row."""
    config = config_of("ppo", inputs)
    config.guard.max_skipped = 3
    nothing = Setup._make([None] * len(Setup._fields))
    setup = nothing._replace(
        prompts=Batches({"x": np.arange(16)}, batch_size=8, seed=0),
        prompt_ids=[f"p{i}" for i in range(16)],
    )
    skips = guards.Skips(tmp_path, "ppo", config.prompts, limit=3)

    def told(*flags: int) -> dict:
        mean = Mean(jnp.float32(sum(flags)), jnp.float32(4))
        return seen() | {
            "rollout/dropped": 0.0, "skipped": mean, "spiked": Mean(jnp.float32(0), jnp.float32(4)),
            "skipped_steps": SimpleNamespace(value=jnp.array(flags)),
        }  # fmt: skip

    def watch(metrics: dict, iteration: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ppo_watch, "to_host", lambda m: {k: float(getattr(v, "value", v)) for k, v in m.items()
                                                     if k != "skipped_steps"})  # fmt: skip
            ppo_watch.watch(setup, skips, metrics, iteration, config)

    watch(told(0, 0, 1, 1), 0)
    with pytest.raises(FloatingPointError, match="3 steps in a row were left out"):
        watch(told(1, 0, 0, 0), 1)
    lines = skipped_lines(tmp_path)
    assert [(line["step"], line["what"]) for line in lines] == [
        (1, "minibatch 3 of 4"), (1, "minibatch 4 of 4"), (2, "minibatch 1 of 4")
    ]  # fmt: skip
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 0), 1)
    order = minibatch_order(key, 8, epochs=2, minibatches=2)
    assert lines[0]["rows"] == setup.prompts.indices(0)[np.asarray(order[2])].tolist()
    skips = guards.Skips(tmp_path, "ppo", config.prompts, limit=5)
    with pytest.raises(FloatingPointError, match="every minibatch of iteration 1 was left out"):
        watch(told(1, 1, 1, 1), 0)


# ---------------------------------------------------------------------------------------- stop anywhere, kill anywhere


@pytest.mark.parametrize(("stage", "module"), [("sft", sft), ("reward_model", reward_model)])
def test_a_stage_stopped_at_every_step_boundary_ends_bit_for_bit_like_a_whole_one(
    stage, module, inputs, tmp_path, monkeypatch
):
    config, run = config_of(stage, inputs, epochs=2, batch_size=32), module.run
    # Five starts of one config: the later ones use the network and the step of the first.
    once: dict[str, object] = {}
    for place, name in ((networks, "load_network"), (module, "compile_frozen_step")):
        make = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, name=name, make=make, **kw: once.get(name) or once.setdefault(
            name, make(*a, **kw)))  # fmt: skip
    run(config, str(tmp_path / "whole"))
    steps, starts = len(kill.history(tmp_path / "whole")), 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "stop_requests", lambda: contextlib.nullcontext(lambda step: True))
        for _ in range(steps):
            with pytest.raises(KeyboardInterrupt, match=f"at step {starts} of {steps}"):
                run(config, str(tmp_path / "cut"))
            starts += 1
        result = run(config, str(tmp_path / "cut"))
    assert steps == starts - 1 == 4
    assert kill.differences(tmp_path / "whole", tmp_path / "cut") == []
    assert result.keys() == json.loads((tmp_path / "whole" / f"{stage}.json").read_text()).keys()


def test_ppo_killed_while_saving_and_between_two_saves_ends_bit_for_bit_like_a_whole_one(tmp_path):
    """The real command; ten kills of each stage are in tests/reliability/kill.py."""
    kill.make_inputs(tmp_path / "inputs")
    result = kill.compare("ppo", tmp_path, kills=2, seed=0, iterations=12, save_every=1)
    assert result == kill.Outcome(tried=2, survived=2, lost=0, while_saving=1, differences=[])


def test_a_chat_template_in_a_folder_of_a_model_is_a_part_of_the_fingerprint(tmp_path):
    """Tokenizers keep several templates in a folder of their own; a changed one changes the prompts."""
    (tmp_path / "config.json").write_text("{}")
    templates = tmp_path / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    before = guards._model_print("model", tmp_path)["sha256"]
    assert sorted(before) == ["additional_chat_templates/tool_use.jinja", "config.json"]
    (templates / "tool_use.jinja").write_text("{{ messages[0] }}")
    assert guards._model_print("model", tmp_path)["sha256"] != before
