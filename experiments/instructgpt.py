r"""InstructGPT end to end: data, SFT, ranked samples, reward model, PPO and PPO-ptx, evaluation.

Run:

    python experiments/instructgpt.py --config=configs/instructgpt/storyland.py \
        --workdir=runs/instructgpt

Each stage reads files and writes files, so any of them can be replaced by files of your own. A
finished stage is not repeated as long as the files that it read and wrote are unchanged; after a
change of config the stages that depend on it run again, and ``--dry_run`` prints which and why.
Writes ``results.json``, ``report.html`` and ``metrics.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from experiments import evaluate, ppo, prepare_data, reward_model, sample, sft
from rlhf_jax.backends import cpu_process
from rlhf_jax.data import schema
from rlhf_jax.data.prepare.preferences import entries
from rlhf_jax.evaluation.departures import departures
from rlhf_jax.evaluation.report import write_report
from rlhf_jax.evaluation.summary import agreement, headline
from rlhf_jax.run import (
    answering,
    checks,
    cli,
    compiling,
    datasets,
    devices,
    files,
    memory,
    networks,
    pretrained,
    results,
    stage_checks,
)
from rlhf_jax.run import config as config_lib
from rlhf_jax.run import pipeline as reads
from rlhf_jax.run import rankings as ranked
from rlhf_jax.run.plans import Step, describe
from rlhf_jax.run.stages import Measure, Stage, Stages
from rlhf_jax.run.workdir import CONFIG_FILE, HARMLESS, change_allowed

STAGES = tuple(reads.VERSIONS)
SMOKE = "This is a smoke run: it shows that every stage runs, and its numbers mean nothing."


def run(config: ConfigDict, workdir: str) -> dict:
    """Runs the stages that are not done yet and returns the results."""
    compiling.Compiling.listen()
    pipeline = Pipeline(config, Path(workdir))
    steps = pipeline.plan()
    # Written only after the plan, which may refuse the config.
    with files.written(Path(workdir) / CONFIG_FILE) as file:
        file.write(config_lib.to_json(config) + "\n")
    if config.get("smoke", False):
        print(SMOKE, flush=True)
    pipeline.stages.run(steps)
    found = pipeline.results()
    print(headline(found), flush=True)
    print(f"The report is {pipeline.report(found)}", flush=True)
    return found


def dry_run(config: ConfigDict, workdir: str, *, overwrite: bool = False) -> None:
    """Prints which stages would run and why; computes nothing and writes nothing."""
    folder = Path(workdir)
    if overwrite and folder.exists():
        print(f"The earlier run in {workdir} would be moved aside first.", flush=True)
        folder = folder / "new"  # does not exist, so no stage counts as done
    print(describe(Pipeline(config, folder).plan(fetch=False), workdir), flush=True)


def check_shapes(config: ConfigDict) -> None:
    """Refuses settings that no stage can use, and models whose sizes differ from the config's.

    This happens before anything is computed, because the last stages start hours later.
    """
    stage_checks.check(config)
    checks.require_one_of("data.source", config.data.source, tuple(prepare_data.SOURCES))
    sample.draw_k(config.seed, 0, config.sample.min_k, config.sample.max_k)


class Pipeline:
    """The stages with their folders, and which file of one stage is the input of which other."""

    def __init__(self, config: ConfigDict, folder: Path):
        self.config, self.folder, self._shown = config, Path(folder).absolute(), Path(folder)
        for key in ("base", "seed", *reads.GROUPS.values()):
            config[key]  # raises KeyError for the config of another program
        plain = json.loads(config_lib.to_json(config), parse_constant=str)
        work = {
            "data": self.prepare, "sft": self.sft, "ppo_init": self.ppo_init,
            "samples": self.samples, "reward_model": self.reward_model, "baseline": self.baseline,
            "ppo": lambda folder: self.ppo(folder, ptx=False),
            "ppo_ptx": lambda folder: self.ppo(folder, ptx=True), "evaluation": self.evaluation,
        }  # fmt: skip
        parts, needs, costs = (
            reads.parts(plain, pretrained.MODELS), reads.needs(plain), reads.costs(plain),
        )  # fmt: skip
        own = reads.own_data(config.data, pretrained.MODELS, entries)
        self.paths = reads.Paths(self.folder, config.to_dict(), lambda stage: self.done(stage), own)
        # A user's file is identified by its content, so renaming it does not repeat the stage.
        for name in {key.partition("/")[0] for key in own}:
            del parts["data"]["data"][name]
        stages = [
            Stage(
                name, work[name], parts[name], needs[name], lambda name=name: self.inputs(name),
                dict.fromkeys(("base", "models.base"), plain["base"]), version, costs[name],
            )
            for name, version in reads.VERSIONS.items()
        ]  # fmt: skip
        self.stages = Stages(
            folder, stages, harmless=HARMLESS, allow_change=change_allowed(),
            measure=lambda: Measure(compiling.Compiling.seconds, memory.peak_memory_mb()),
            after=cpu_process.release_freed_memory,
        )  # fmt: skip

    def stage(self, name: str, work: Callable[[str], dict] | None = None) -> dict:
        """Runs a stage unless it is done and returns its result.

        `work`, if given, runs instead of the stage's own function and must compute the same.
        """
        return self.stages.stage(name, work)

    def done(self, name: str) -> dict:
        """The result of a finished stage."""
        return self.stages.result(name)

    def plan(self, *, fetch: bool = True) -> list[Step]:
        """What to do with each stage; refuses models of other sizes than the config's.

        A finished run no longer needs its base model. Without `fetch`, a model that would have to
        be downloaded by name is not inspected.
        """
        done = all((self.folder / name / "done.json").is_file() for name in STAGES)
        checks = fetch or self.config.base not in pretrained.MODELS
        if checks and not done:
            check_shapes(self.config)
        steps = self.stages.plan()
        if checks and done and any(step.action != "keep" for step in steps):
            check_shapes(self.config)
        return steps

    def data(self, name: str) -> str:
        """A file of the data stage."""
        return self.paths.data(name)

    def inputs(self, stage: str) -> dict[str, str]:
        """The files and models that a stage reads, by path; models fetched by name are left out."""
        found = self.paths.inputs(stage).items()
        return {
            name: str(networks.model_folder(path))
            for name, path in found
            if path not in pretrained.MODELS
        }

    def _settings(self, stage: str, **filled: object) -> ConfigDict:
        """The config that a stage gets: its group, with the keys that the pipeline fills in."""
        unknown = {*filled} - reads.FILLED[stage]
        assert not unknown, (
            f"the key of stage {stage} counts {unknown}, which are filled in: add them to FILLED"
        )
        config = config_lib.unlocked_copy(self.config[reads.GROUPS[stage]])
        config.update(filled)
        return config

    def prepare(self, folder: str) -> dict:
        """Prepares the data; their tables go to ``data/data_report.txt``."""
        return prepare_data.run(self.config.data, folder, show=False)

    def sft(self, folder: str) -> dict:
        """Trains the SFT model and saves every epoch."""
        config = self._settings(
            "sft", model=self.config.base, seed=self.config.seed, **self.paths.demonstrations()
        )
        return sft.run(config, folder)

    def ppo_init(self, folder: str) -> dict:
        """Trains the init of PPO: fewer epochs, 10% pretraining text."""
        config = self._settings(
            "ppo_init", model=self.config.base, seed=self.config.seed, **self.paths.demonstrations()
        )
        config.pretraining_text = self.data("corpus") if config.pretraining_fraction else ""
        return sft.run(config, folder)

    def samples(self, folder: str) -> dict:
        """Ranked responses: for training by the training labelers, for validation by both groups.

        Where the data include human rankings, nothing is sampled.
        """
        if not self.config.sample.labelers:
            return self.paths.rankings()
        config = self._settings(
            "samples", models=self.paths.sampled(), prompts=self.data("prompts_ranking"),
            seed=self.config.seed,
        )  # fmt: skip
        counts = sample.run(config, folder)
        held = config_lib.unlocked_copy(config)
        # Two labelers rank each validation prompt, so that their agreement can be measured.
        held.update(prompts=self.data("prompts_validation"), labels_each=2)
        sample.run(held, str(Path(folder) / "validation_train"))
        records = sample.read_samples(Path(folder) / "validation_train" / "samples.jsonl")
        rankings = sample.rank(records, group="heldout", count=config.labelers, labels_each=2)
        schema.write_jsonl(Path(folder) / "validation_heldout" / "rankings.jsonl", rankings)
        return counts

    def reward_model(self, folder: str) -> dict:
        """The reward model, trained from `reward_model.model` or else the last SFT checkpoint."""
        rankings = self.paths.rankings()
        config = self._settings(
            "reward_model", model=self.config.reward_model.model or self.done("sft")["last"],
            seed=self.config.seed, rankings=rankings["training"],
            demonstrations=self.data("demonstrations"),
        )  # fmt: skip
        for name in config.evaluation:
            config.evaluation[name] = rankings.get(name, "")
        result = reward_model.run(config, folder)
        if self.config.sample.labelers:
            for group in ("train", "heldout"):
                ranked_twice = ranked.read_rankings(rankings[f"validation_{group}"])
                result[f"agreement_{group}"] = agreement(ranked_twice)
        return result

    def baseline(self, folder: str) -> dict:
        """Chooses the SFT baseline: the epoch with the best reward on validation prompts.

        Ouyang et al. 2022, section 3.5, choose by reward-model score and not by validation loss.
        """
        del folder
        mesh = devices.start(self.config.sft.mesh)
        config = self._settings("baseline")
        for name in reads.NOT_FOR_BASELINE & {*config}:
            del config[name]
        prompts = datasets.read_prompts(self.data("prompts_validation"))
        reward = networks.load_network(self.paths.reward_model(), mesh, config.decoder)
        judge = config_lib.resolve(config.gold) if config.gold else None
        epochs = [{**row, "path": self.paths.epoch(row)} for row in self.done("sft")["epochs"]]
        return answering.best_epoch(
            epochs, reward, judge, prompts, self.config.validation_samples, config, mesh
        )

    def ppo(self, folder: str, *, ptx: bool) -> dict:
        """PPO, with or without the pretraining mix."""
        own = (
            {"pretraining_text": self.data("corpus")}
            if ptx
            else {"pretraining_text": "", "ptx_coef": 0.0}
        )
        stage = "ppo_ptx" if ptx else "ppo"
        config = self._settings(
            stage, name=stage, model=self.done("ppo_init")["last"], seed=self.config.seed,
            reward_model=self.paths.reward_model(), prompts=self.data("prompts_ppo"),
            held_out_text=self.data("corpus_held_out"), **own,
        )  # fmt: skip
        return ppo.run(config, folder)

    def evaluation(self, folder: str) -> dict:
        """Evaluates all models on the test prompts."""
        config = self._settings(
            "evaluation", reward_model=self.paths.reward_model(), prompts=self.data("prompts_test"),
            held_out_text=self.data("corpus_held_out"), reference=self.done("ppo_init")["last"],
        )  # fmt: skip
        config.models.update(self.paths.compared())
        config.few_shot.demonstrations = self.data("demonstrations")
        return evaluate.run(config, folder)

    def results(self) -> dict:
        """Writes ``results.json`` (docs/results_schema.md) and ``metrics.jsonl`` of all stages."""
        gold = self.config.evaluate.gold
        demonstrations = self.data("demonstrations_validation") if gold else ""
        recorded = {name: self.stages.record(name) for name in STAGES}
        return results.write(self.folder, recorded, self.config, demonstrations, gold)

    def report(self, found: dict) -> Path:
        """Writes ``report.html``; it describes the config that each stage recorded when it ran."""
        config = results.recorded_config(found, reads.GROUPS, self.config.base)
        return write_report(
            self._shown / "report.html", found,
            results.history(self.folder, ("ppo", "ppo_ptx"), found["sft"]["epochs"]),
            results.samples(self.folder / "evaluation" / "samples.jsonl"), departures(config),
        )  # fmt: skip


if __name__ == "__main__":
    cli.main(
        run, config="configs/instructgpt/storyland.py", workdir="runs/instructgpt", plan=dry_run,
        check=check_shapes,
        one_process="For several processes run its stages: sft.py, reward_model.py and ppo.py take "
        "--distributed.",
    )  # fmt: skip
