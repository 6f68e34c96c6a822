"""The pipeline's plan: which stages run again after which change, without computing anything.

A finished run folder is made up: small files under the names that the stages write. The table of what depends on which
key is written by hand, and what a stage reads is held against what it is handed.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from experiments import evaluate, instructgpt, ppo, prepare_data, reward_model, sample, sft
from rlhf_jax.run import answering, cli, datasets, networks, pretrained, records
from rlhf_jax.run import config as config_lib
from rlhf_jax.run import pipeline as reads
from rlhf_jax.run import rankings as ranked
from rlhf_jax.run.config import leaf_keys, load_config, record_reads
from rlhf_jax.run.stages import Stages
from rlhf_jax.run.workdir import HARMLESS, allow_change

ROOT = Path(__file__).parents[2]
CONFIG = f"{ROOT}/configs/instructgpt/storyland.py:smoke"
STAGES = instructgpt.STAGES
EPOCHS = 2

WRITES = {
    "data": [f"{name}.jsonl" for name in (
        "corpus", "corpus_held_out", "demonstrations", "demonstrations_validation", "prompts_ppo", "prompts_ranking",
        "prompts_test", "prompts_validation")],
    "sft": ["sft.json", "metrics.jsonl", "epoch-1/model.safetensors", "epoch-2/model.safetensors"],
    "ppo_init": ["sft.json", "metrics.jsonl", "epoch-1/model.safetensors", "epoch-2/model.safetensors"],
    "samples": ["rankings.jsonl", "validation_train/rankings.jsonl", "validation_heldout/rankings.jsonl"],
    "reward_model": ["model/model.safetensors", "reward_model.json", "metrics.jsonl"],
    "baseline": [],
    "ppo": ["ema/model.safetensors", "last/model.safetensors", "metrics.jsonl", "ppo.json"],
    "ppo_ptx": ["ema/model.safetensors", "last/model.safetensors", "metrics.jsonl", "ppo.json"],
    "evaluation": ["evaluation.json", "samples.jsonl"],
}  # fmt: skip


def load(**overrides: str) -> ConfigDict:
    return load_config(CONFIG, {key.replace("__", "."): value for key, value in overrides.items()})


class Invented(instructgpt.Pipeline):
    """The pipeline with stages that write small files instead of computing."""

    def __init__(self, config: ConfigDict, folder: Path):
        super().__init__(config, folder)
        self.ran: list[str] = []
        for name, stage in self.stages._stages.items():
            object.__setattr__(
                stage, "work", lambda folder, name=name: self.invent(name, Path(folder))
            )

    def invent(self, stage: str, folder: Path) -> dict:
        self.ran.append(stage)
        part = self.stages.parts(self.stages._stages[stage])
        text = json.dumps(
            {"config": part["config"], "inputs": [e["sha256"] for e in part["inputs"].values()]}
        )
        for name in WRITES[stage]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name + text)
        epochs = [
            {"epoch": epoch, "validation_loss": 1.0 / epoch} for epoch in range(1, EPOCHS + 1)
        ]
        last = str(folder / f"epoch-{EPOCHS}")
        return {
            "sft": {"epochs": epochs, "lowest_loss": last, "last": last},
            "ppo_init": {"epochs": epochs, "lowest_loss": last, "last": last},
            "reward_model": {"model": str(folder / "model")},
            "baseline": {"path": str(self.folder / "sft" / "epoch-1"), "epochs": epochs},
            "ppo": {"ema": str(folder / "ema")},
            "ppo_ptx": {"ema": str(folder / "ema")},
        }.get(stage, {})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    pipeline = Invented(load(), folder)
    pipeline.stages.run()
    assert pipeline.ran == list(STAGES)
    return folder


def again(config: ConfigDict, folder: Path) -> set[str]:
    """The stages that the plan does not keep."""
    return {step.stage for step in Invented(config, folder).stages.plan() if step.action != "keep"}


# -------------------------------------------------------------------------------------------- the table, by hand

NONE: set[str] = set()
END = {"evaluation"}
RL = {"ppo", "ppo_ptx"} | END
REWARD = {"reward_model", "baseline"} | RL
SFT = {"sft", "samples"} | REWARD
INIT = {"ppo_init"} | RL

RUNS_AGAIN: dict[str, set[str]] = {
    # The longest prefix of a key decides. Keys of `HARMLESS` run nothing, wherever they are.
    "seed": SFT | INIT,
    "base": SFT | INIT,
    "smoke": NONE,
    "shapes": NONE,
    "validation_samples": {"baseline"} | END,
    "data": set(STAGES),
    "sft": SFT,
    "ppo_init": INIT,
    "sample": {"samples"} | REWARD,
    "reward_model": REWARD,
    "ppo": RL,
    "evaluate": {"baseline"} | END,
    # What the pipeline fills in: the value in the config is read by nobody.
    **dict.fromkeys(("sft.seed", "sft.model", "sft.demonstrations", "sft.validation"), NONE),
    **dict.fromkeys(("ppo_init.seed", "ppo_init.model", "ppo_init.demonstrations", "ppo_init.validation"), NONE),
    **dict.fromkeys(("sample.seed", "sample.models", "sample.prompts"), NONE),
    **dict.fromkeys(("reward_model.seed", "reward_model.rankings", "reward_model.demonstrations"), NONE),
    **dict.fromkeys(("ppo.name", "ppo.seed", "ppo.model", "ppo.reward_model", "ppo.prompts"), NONE),
    **dict.fromkeys(("evaluate.models", "evaluate.reference", "evaluate.reward_model", "evaluate.prompts"), NONE),
    **dict.fromkeys(("sft.pretraining_text", "ppo_init.pretraining_text", "ppo.pretraining_text"), NONE),
    **dict.fromkeys(("ppo.held_out_text", "evaluate.held_out_text", "evaluate.few_shot.demonstrations"), NONE),
    "reward_model.evaluation": NONE,
    # The mesh of SFT is that of choosing the baseline too, which follows from SFT anyway.
    # Plain PPO has no pretraining text, so only PPO-ptx reads how much of it and how it is mixed in.
    **dict.fromkeys(("ppo.ptx_coef", "ppo.ptx_rows_per_episode", "ppo.ptx_microbatches", "ppo.ptx_clip_norm"),
                    {"ppo_ptx"} | END),
    # What only the evaluation reads.
    **dict.fromkeys(("evaluate.kl_of", "evaluate.limit", "evaluate.samples", "evaluate.baseline_samples",
                     "evaluate.base_samples", "evaluate.held_out_row_length", "evaluate.held_out_batches",
                     "evaluate.few_shot", "evaluate.mesh"), END),
}  # fmt: skip


def expected(key: str) -> set[str]:
    if key.rpartition(".")[2] in HARMLESS:
        return NONE
    parts = key.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next(RUNS_AGAIN[prefix] for prefix in prefixes if prefix in RUNS_AGAIN)


def changed(config: ConfigDict, key: str) -> ConfigDict:
    """The config with another value under `key`, of the same type where there is one."""
    parent, _, leaf = key.rpartition(".")
    config = ConfigDict(config.to_dict())
    group = config
    for name in parent.split(".") if parent else []:
        group = group[name]
    value = group[leaf]
    with group.ignore_type():
        if key == "base":
            group[leaf] = "storyland:base_large"
        elif isinstance(value, bool):
            group[leaf] = not value
        elif isinstance(value, int | float):
            group[leaf] = value + 1
        elif isinstance(value, tuple):
            group[leaf] = (*value, "more")
        elif isinstance(value, str):
            group[leaf] = f"{value}x"
        else:
            group[leaf] = 3
    return config


def test_every_key_of_the_config_runs_the_stages_of_the_table_again(finished):
    config = load()
    wrong = {}
    for key in sorted(leaf_keys(config)):
        if key == "reward_model.model":
            continue  # the folder of a model: see the test of it
        found = again(changed(config, key), finished)
        if found != expected(key):
            wrong[key] = sorted(found ^ expected(key))
    assert not wrong
    prefixes = {key for key in leaf_keys(config)} | {"shapes"}
    assert all(any((key + ".").startswith(entry + ".") for key in prefixes) for entry in RUNS_AGAIN)


def test_a_reward_model_that_starts_from_a_model_of_ones_own(finished, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text("{}")
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    config = load(**{"reward_model.model": str(own)})
    assert again(config, run) == REWARD
    Invented(config, run).stages.run()
    assert again(config, run) == NONE
    (own / "README.md").write_text("a word to people")
    assert again(config, run) == NONE
    (own / "config.json").write_text('{"a": 1}')
    assert again(config, run) == REWARD
    own.rename(tmp_path / "moved")  # the same content at another place
    (tmp_path / "moved" / "config.json").write_text("{}")
    assert again(load(**{"reward_model.model": str(tmp_path / "moved")}), run) == NONE


def test_the_plan_names_the_key_and_computes_and_writes_nothing(
    finished, tmp_path, capsys, monkeypatch
):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "config.json").write_text("{}")
    (run / "run.lock").touch()
    for module in (sft, ppo, sample, reward_model, prepare_data, evaluate):
        monkeypatch.setattr(module, "run", None)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(SystemExit) as ended:
        cli.main(
            instructgpt.run, plan=instructgpt.dry_run,
            argv=[f"--config={CONFIG}", f"--workdir={run}", "--dry_run", "--config.ppo.learning_rate=2e-4"],
        )  # fmt: skip
    assert ended.value.code == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in said[1:]] == [
        [str(number), stage, "runs:" if stage in RL else "kept"]
        for number, stage in enumerate(STAGES, start=1)
    ]
    assert "ppo           runs: config.ppo.learning_rate 0.0004 -> 0.0002" in said[7]
    assert "evaluation    runs: reads ppo; reads ppo_ptx" in said[9]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    with pytest.raises(SystemExit):
        cli.main(
            instructgpt.run, plan=instructgpt.dry_run,
            argv=[f"--config={CONFIG}", f"--workdir={tmp_path / 'fresh'}", "--dry_run"],
        )  # fmt: skip
    assert capsys.readouterr().out == f"9 stages in {tmp_path / 'fresh'}: {', '.join(STAGES)}\n"
    assert not (tmp_path / "fresh").exists()


FILLED_IN = (
    ("sft.seed", "5"), ("sft.model", "runs/mine"), ("sft.demonstrations", "mine.jsonl"),
    ("ppo_init.pretraining_text", "mine.txt"), ("sample.models", "('runs/mine',)"), ("sample.prompts", "mine.jsonl"),
    ("reward_model.rankings", "mine.jsonl"), ("reward_model.evaluation.validation_train", "mine.jsonl"),
    ("ppo.seed", "5"), ("ppo.reward_model", "runs/mine"), ("evaluate.models.sft", "runs/mine"),
    ("evaluate.reference", "runs/mine"), ("evaluate.few_shot.demonstrations", "mine.jsonl"),
)  # fmt: skip


@pytest.mark.parametrize(("key", "value"), FILLED_IN)
def test_a_value_that_the_pipeline_would_not_read_is_refused(key, value):
    with pytest.raises(
        ValueError, match=re.escape(key) + r".*would be ignored, the pipeline fills it in"
    ):
        instructgpt.check_shapes(load(**{key: value}))


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(ROOT.glob("configs/instructgpt/*.py")) if path.name != "__init__.py"],
    ids=lambda path: path.stem,
)
def test_no_config_of_the_project_sets_what_is_filled_in(path):
    for arg in ("", ":smoke"):
        assert (
            reads.set_in_vain(
                json.loads(config_lib.to_json(config_lib.load_config(f"{path}{arg}")))
            )
            == []
        )


def test_another_seed_for_the_whole_is_not_one_that_is_ignored():
    instructgpt.check_shapes(load(seed="3"))


def test_another_base_needs_no_second_key():
    assert not reads.set_in_vain(json.loads(config_lib.to_json(load(base="storyland:base_large"))))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("sft.optimizer", "adamx", "sft.optimizer='adamx'"),
        ("ppo_init.schedule", "cosin", "ppo_init.schedule='cosin'"),
        ("reward_model.train", "heads", "reward_model.train='heads'"),
        ("reward_model.too_long", "cut", "reward_model.too_long='cut'"),
        ("sft.assistant_turns", "first", "sft.assistant_turns='first'"),
        ("ppo.decoder.dtype", "float31", "ppo.decoder: dtype"),
        ("ppo.sharding.policy", "(('mlp', ('rows',)),)", "ppo.sharding.policy: .*'rows'"),
        ("sample.min_k", "12", "min_k"),
        ("ppo.kl.controller", "fix", "ppo.kl.controller='fix'"),
        ("ppo.minibatches", "3", "ppo.minibatches=3"),
        ("ppo.ptx_rows_per_episode", "0.3", "ppo.ptx_rows_per_episode=0.3"),
        ("ppo.policy_loss.fn", "rlhf_jax.losses.policy:none_such", "none_such"),
        ("reward_model.loss.fn", "rlhf_jax.losses.ranking:none_such", "none_such"),
        ("evaluate.gold", "no.module:gold_of", "no.module"),
    ],
)
def test_what_the_last_stage_would_refuse_is_refused_first(key, value, said):
    with pytest.raises(ValueError, match=said):
        instructgpt.check_shapes(load(**{key: value}))


# -------------------------------------------------------------------------------- what is handed, and what counts


def test_what_the_stages_are_handed_is_what_their_keys_count(finished, monkeypatch):
    """Each key of what a stage is handed is in the stage's key as it stands, or is filled in, or changes no number."""
    handed: dict[str, ConfigDict] = {}
    config = load()
    pipeline = instructgpt.Pipeline(config, finished)
    stage_of = {"ppo": "ppo", "ppo_ptx": "ppo_ptx"}
    monkeypatch.setattr(sft, "run", lambda c, folder: handed.setdefault(folder, c) and {})
    monkeypatch.setattr(ppo, "run", lambda c, folder: handed.setdefault(stage_of[c.name], c) and {})
    monkeypatch.setattr(reward_model, "run", lambda c, folder: handed.setdefault(folder, c) and {})
    monkeypatch.setattr(ranked, "read_rankings", lambda path: [])
    monkeypatch.setattr(instructgpt, "agreement", lambda rankings: 0.5)
    monkeypatch.setattr(evaluate, "run", lambda c, folder: handed.setdefault(folder, c) and {})
    for stage in ("sft", "ppo_init", "reward_model", "evaluation"):
        getattr(pipeline, stage)(stage)
    pipeline.ppo("ppo", ptx=False)
    pipeline.ppo("ppo_ptx", ptx=True)
    parts = reads.parts(json.loads(config_lib.to_json(config)))
    for stage, given in handed.items():
        plain = json.loads(config_lib.to_json(given))
        counted = parts[stage][reads.GROUPS[stage]]
        left = {k for k, v in plain.items() if counted.get(k, "absent") != v}
        assert left <= reads.FILLED[stage], stage
    assert set(handed) == {"sft", "ppo_init", "reward_model", "evaluation", "ppo", "ppo_ptx"}


def test_choosing_the_baseline_reads_nothing_that_its_key_does_not_count(finished, monkeypatch):
    """`Pipeline.baseline` with a config that notes what is read of it."""
    config, seen = record_reads(load())
    pipeline = instructgpt.Pipeline(config, finished)
    seen.clear()

    def answer(network, reward, judge, prompts, ask, count, settings, mesh):
        given.append(settings)
        return type("Said", (), {"means": lambda self: {"reward_score": 0.0}})()

    given: list[ConfigDict] = []
    monkeypatch.setattr(answering, "answer", answer)
    nothing = networks.Network(None, {}, None)
    monkeypatch.setattr(networks, "load_network", lambda *a, **kw: nothing)
    monkeypatch.setattr(datasets, "read_prompts", lambda path: [])
    pipeline.baseline("baseline")
    counted = reads.parts(json.loads(config_lib.to_json(load())))["baseline"]
    assert {key for key in seen if not key.startswith("evaluate.")} <= {
        "sft.mesh",
        "validation_samples",
    }
    assert json.loads(config_lib.to_json(given[0])) == counted["evaluate"]


def test_every_group_of_the_config_belongs_to_a_stage():
    config = load()
    groups = {key for key, value in config.items() if isinstance(value, ConfigDict)}
    assert groups - {"shapes"} == set(reads.GROUPS.values())
    assert (
        list(reads.needs(json.loads(config_lib.to_json(config))))
        == list(STAGES)
        == list(reads.GROUPS)
    )


# -------------------------------------------------------------------------------------------- damage, and moving


def test_each_output_of_each_stage_is_missed_by_the_plan(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for stage, names in WRITES.items():
        for name in names:
            path = run / stage / name
            before = path.read_bytes()
            for bad in (None, b"", before[:-1] + bytes([before[-1] ^ 1])):
                path.unlink() if bad is None else path.write_bytes(bad)
                steps = {step.stage: step for step in Invented(load(), run).stages.plan()}
                assert {s for s, step in steps.items() if step.action != "keep"} == {stage}
                assert steps[stage].action == "repair"
                assert f"{name} is not what was written" in steps[stage].why[0]
                path.write_bytes(before)
    assert again(load(), run) == NONE


def test_a_copy_works_on_its_own_files(finished, tmp_path, monkeypatch):
    original = Path(shutil.copytree(finished, tmp_path / "original"))
    copy = Path(shutil.copytree(original, tmp_path / "elsewhere" / "copy"))
    for path in original.rglob("*"):
        if path.is_file():
            path.write_text("not this")
    monkeypatch.chdir(tmp_path / "elsewhere")
    pipeline = instructgpt.Pipeline(load(), Path("copy"))
    assert again(load(), Path("copy")) == NONE
    for stage in STAGES:
        for path in pipeline.inputs(stage).values():
            assert Path(path).is_relative_to(copy) or "storyland" in path
    for record in copy.glob("*/done.json"):
        assert str(tmp_path) not in record.read_text()


def test_no_machine_is_named_in_the_records(finished):
    """A shipped model is recorded by its name, not by the folder of the installation."""
    record, _ = records.read(finished / "sft" / "done.json")
    assert record is not None
    assert record["inputs"]["base"]["path"] == "storyland:base_small"
    for path in finished.glob("*/done.json"):
        assert str(ROOT) not in path.read_text()


def test_half_done_and_changed_is_refused_before_anything_is_computed(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    record, _ = records.read(run / "reward_model" / "done.json")
    assert record is not None
    (run / "reward_model" / "done.json").unlink()
    records.write(
        run / "reward_model" / "begun.json",
        {k: record[k] for k in ("key", "config", "inputs", "functions", "version")},
    )
    (run / "reward_model" / "checkpoints" / "30").mkdir(parents=True)
    (run / "reward_model" / "checkpoints" / "manifests").mkdir()
    (run / "reward_model" / "checkpoints" / "manifests" / "30.json").write_text("{}")
    same = {step.stage: step.action for step in Invented(load(), run).stages.plan()}
    assert same["reward_model"] == "resume"
    for key, value in {
        "reward_model.learning_rate": "9e-4",
        "data.demonstrations": "65",
        "sft.epochs": "1",
    }.items():
        with pytest.raises(
            ValueError, match=r"stage reward_model is half done \(checkpoint of step 30\)"
        ):
            Invented(load(**{key: value}), run).stages.plan()
    with allow_change():
        allowed = {
            s.stage: s
            for s in Invented(load(**{"reward_model.learning_rate": "9e-4"}), run).stages.plan()
        }
    assert allowed["reward_model"].action == "resume"
    assert "config.reward_model.learning_rate 0.0004 -> 0.0009" in allowed["reward_model"].why[1]
    assert again(load(**{"reward_model.save_every": "7"}), run) == {
        "reward_model"
    }  # changes no number: goes on
    assert (
        again(load(**{"ppo.learning_rate": "7e-4"}), run) == {"reward_model"} | RL
    )  # of another stage


def test_every_pipeline_config_has_a_plan(tmp_path):
    """Of the presets too; whatever their data are made of."""
    for file in sorted((ROOT / "configs" / "instructgpt").glob("*.py")):
        config = load_config(f"{file}:smoke")
        assert config.smoke
        assert not load_config(str(file)).smoke
        steps = instructgpt.Pipeline(config, tmp_path / "run").stages.plan()
        assert [step.action for step in steps] == ["run"] * 9


def test_the_files_of_data_dir_count_by_what_is_in_them(tmp_path):
    """Those that the source reads, and no others that lie there; a fetched model counts by its name."""
    (tmp_path / "data" / "hh_rlhf").mkdir(parents=True)
    (tmp_path / "data" / "hh_rlhf" / "helpful-base.jsonl").write_text("{}\n")
    (tmp_path / "data" / "holiday.mov").write_text("large")
    config = load_config(
        f"{ROOT}/configs/instructgpt/hh_rlhf.py", {"data_dir": str(tmp_path / "data")}
    )
    pipeline = instructgpt.Pipeline(config, tmp_path / "run")
    assert pipeline.inputs("data") == {"data.data_dir/hh_rlhf": str(tmp_path / "data" / "hh_rlhf")}
    stage = pipeline.stages._stages["data"]
    assert "data_dir" not in stage.config["data"]
    assert config.base in pretrained.MODELS
    assert (
        stage.config["data"]["model"]
        == pipeline.stages._stages["sft"].config["base"]
        == config.base
    )
    assert isinstance(pipeline.stages, Stages)
