"""InstructGPT, whole: demonstrations -> SFT -> ranked samples -> reward model -> PPO and PPO-ptx -> evaluation.

Run:

    python experiments/instructgpt.py --config=configs/instructgpt/storyland.py --workdir=runs/instructgpt

Each stage reads files and writes files, so any of them can be replaced by files of your own; a stage that is done is
not done again. Writes ``results.json``, ``report.html`` and ``metrics.jsonl``.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import common, evaluate, inputs, ppo, prepare_data, reward_model, sample, sft
from rlhf_jax import config as config_lib
from rlhf_jax import metrics
from rlhf_jax.checkpoint import write_json
from rlhf_jax.data import schema
from rlhf_jax.evaluation import reward_model as quality
from rlhf_jax.evaluation.report import check_results, write_report

DONE = "done.json"
STAGES = ("data", "sft", "ppo_init", "samples", "reward_model", "baseline", "ppo", "ppo_ptx", "evaluation")


def run(config: ConfigDict, workdir: str) -> dict:
    """Runs what is not done yet and returns the results."""
    common.Compiling.listen()
    check_shapes(config)
    pipeline = Pipeline(config, Path(workdir))
    pipeline.stage("data", lambda folder: prepare_data.run(config.data, folder))
    pipeline.stage("sft", pipeline.sft)
    pipeline.stage("ppo_init", pipeline.ppo_init)
    pipeline.stage("samples", pipeline.samples)
    pipeline.stage("reward_model", pipeline.reward_model)
    pipeline.stage("baseline", pipeline.baseline)
    pipeline.stage("ppo", lambda folder: pipeline.ppo(folder, ptx=False))
    pipeline.stage("ppo_ptx", lambda folder: pipeline.ppo(folder, ptx=True))
    pipeline.stage("evaluation", pipeline.evaluation)
    results = pipeline.results()
    report = pipeline.report(results)
    print(headline(results), flush=True)
    print(f"The report is {report}", flush=True)
    return results


def check_shapes(config: ConfigDict) -> None:
    """Refuses models of other sizes than the config is for, before anything is computed."""
    inputs.check_numbers(config)
    inputs.check_model("base", config.base)
    common.check_shape("base", config.base, config.shapes.policy)
    if config.reward_model.model:
        common.check_shape("reward_model.model", config.reward_model.model, config.shapes.reward_model)


class Pipeline:
    """The stages with their folders: which file of one stage is the input of which other."""

    def __init__(self, config: ConfigDict, folder: Path):
        self.config, self.folder = config, folder

    def stage(self, name: str, work: Callable[[str], dict]) -> dict:
        """Runs `work` in the stage's folder unless it is done; keeps what it returned and what it cost."""
        folder = self.folder / name
        if (folder / DONE).is_file():
            return self.done(name)
        print(f"== {name}", flush=True)
        begin, compiled = time.monotonic(), common.Compiling.seconds
        folder.mkdir(parents=True, exist_ok=True)
        result = work(str(folder))
        record = {
            "result": json.loads(json.dumps(result, default=float)),
            "seconds": round(time.monotonic() - begin, 2),
            "compile_seconds": round(common.Compiling.seconds - compiled, 2),
            "peak_memory_mb": round(common.peak_memory_mb()),
        }
        write_json(folder / DONE, record)
        common.release_freed_memory()
        return record["result"]

    def done(self, name: str) -> dict:
        """What a finished stage returned."""
        return common.read_json(self.folder / name / DONE)["result"]

    def data(self, name: str) -> str:
        """A file of the data stage."""
        return str(self.folder / "data" / f"{name}.jsonl")

    # ------------------------------------------------------------------------------------------------- the stages

    def sft(self, folder: str) -> dict:
        """The SFT model, every epoch of it."""
        config = common.config_dict(self.config.sft)
        config.update(model=self.config.base, seed=self.config.seed, **self._demonstrations())
        return sft.run(config, folder)

    def ppo_init(self, folder: str) -> dict:
        """The init of PPO: fewer epochs, 10% pretraining text."""
        config = common.config_dict(self.config.ppo_init)
        config.update(model=self.config.base, seed=self.config.seed, **self._demonstrations())
        config.pretraining_text = self.data("corpus")
        return sft.run(config, folder)

    def _demonstrations(self) -> dict[str, str]:
        return {"demonstrations": self.data("demonstrations"), "validation": self.data("demonstrations_validation")}

    def rankings(self) -> dict[str, str]:
        """The rankings to train on (``training``) and to measure on: people's own, or those of the samples stage."""
        own = {p.stem.removeprefix("rankings_"): str(p) for p in self.folder.glob("data/rankings*.jsonl")}
        if own:
            return {"training": own.pop("rankings"), **own}
        folder = self.folder / "samples"
        groups = {group: folder / group / "rankings.jsonl" for group in ("validation_train", "validation_heldout")}
        return {"training": str(folder / "rankings.jsonl")} | {group: str(path) for group, path in groups.items()}

    def samples(self, folder: str) -> dict:
        """Ranked responses: for training by the training labelers, for validation by both groups.

        Nothing is sampled where the data hold rankings by people.
        """
        if not self.config.sample.labelers:
            return self.rankings()
        trained = self.done("sft")
        models = tuple(dict.fromkeys((trained["lowest_loss"], trained["last"])))
        config = common.config_dict(self.config.sample)
        config.update(models=models, prompts=self.data("prompts_ranking"), seed=self.config.seed)
        counts = sample.run(config, folder)
        held = common.config_dict(config)
        held.update(prompts=self.data("prompts_validation"), labels_each=2)
        sample.run(held, str(Path(folder) / "validation_train"))
        records = sample.read_samples(Path(folder) / "validation_train" / "samples.jsonl")
        rankings = sample.rank(records, group="heldout", count=config.labelers, labels_each=2)
        (Path(folder) / "validation_heldout").mkdir(exist_ok=True)
        schema.write_jsonl(Path(folder) / "validation_heldout" / "rankings.jsonl", rankings)
        return counts

    def reward_model(self, folder: str) -> dict:
        """The reward model, from `reward_model.model` or, where that is empty, the last SFT checkpoint."""
        config, rankings = common.config_dict(self.config.reward_model), self.rankings()
        config.update(
            model=config.model or self.done("sft")["last"], seed=self.config.seed, rankings=rankings["training"],
            demonstrations=self.data("demonstrations"),
        )  # fmt: skip
        for name in config.evaluation:
            config.evaluation[name] = rankings.get(name, "")
        result = reward_model.run(config, folder)
        if self.config.sample.labelers:
            for group in ("train", "heldout"):
                ranked_twice = reward_model.read_rankings(rankings[f"validation_{group}"])
                result[f"agreement_{group}"] = agreement(ranked_twice)
        return result

    def baseline(self, folder: str) -> dict:
        """The SFT baseline: the epoch with the best reward-model score on validation prompts, not the lowest loss."""
        del folder
        mesh = common.start(self.config.sft.mesh)
        config = self.config.evaluate
        prompts = common.read_prompts(self.data("prompts_validation"))
        reward = common.load_network(self.done("reward_model")["model"], mesh, config.decoder)
        judge = config_lib.resolve(config.gold) if config.gold else None
        epochs = []
        for row in self.done("sft")["epochs"]:
            path = self.folder / "sft" / f"epoch-{row['epoch']}"
            network = common.load_network(str(path), mesh, config.decoder)
            count = self.config.validation_samples
            said = evaluate.answer(network, reward, judge, prompts, evaluate.bare_prompts, count, config, mesh)
            epochs.append({**row, "path": str(path), **said.means()})
        best = max(epochs, key=lambda row: row["reward_score"])
        lowest = min(epochs, key=lambda row: row["validation_loss"])
        return {"epochs": epochs, "path": best["path"], "epoch": best["epoch"], "lowest_loss_epoch": lowest["epoch"]}

    def ppo(self, folder: str, *, ptx: bool) -> dict:
        """PPO, with or without the pretraining mix."""
        config = common.config_dict(self.config.ppo)
        config.update(
            name="ppo_ptx" if ptx else "ppo", model=self.done("ppo_init")["last"], seed=self.config.seed,
            reward_model=self.done("reward_model")["model"], prompts=self.data("prompts_ppo"),
            pretraining_text=self.data("corpus"), held_out_text=self.data("corpus_held_out"),
        )  # fmt: skip
        if not ptx:
            config.ptx_coef = 0.0
        return ppo.run(config, folder)

    def evaluation(self, folder: str) -> dict:
        """All models on the test prompts."""
        config = common.config_dict(self.config.evaluate)
        config.update(
            reward_model=self.done("reward_model")["model"], prompts=self.data("prompts_test"),
            held_out_text=self.data("corpus_held_out"), reference=self.done("ppo_init")["last"],
        )  # fmt: skip
        config.models.update(
            base=self.config.base, sft=self.done("baseline")["path"],
            ppo=self.done("ppo")["ema"], ppo_ptx=self.done("ppo_ptx")["ema"],
        )  # fmt: skip
        config.few_shot.demonstrations = self.data("demonstrations")
        return evaluate.run(config, folder)

    # ------------------------------------------------------------------------------------------------ the results

    def results(self) -> dict:
        """Writes ``results.json`` (docs/results_schema.md) and ``metrics.jsonl`` of all stages."""
        measured, rewards = self.done("evaluation"), self.done("reward_model")
        records = {name: common.read_json(self.folder / name / DONE) for name in STAGES}
        seconds = {name: record["seconds"] for name, record in records.items()}
        seconds["compile"] = round(sum(record["compile_seconds"] for record in records.values()), 2)
        seconds["total"] = round(sum(record["seconds"] for record in records.values()), 2)
        results = {
            **measured,
            **self._gold_results(),
            **reward_model_results(rewards),
            "reward_model": {k: rewards[k] for k in ("prompts", "responses", "pairs", "steps", "padding_share")},
            "sft": self.done("baseline"),
            "seconds": seconds,
            "peak_memory_mb": max(record["peak_memory_mb"] for record in records.values()),
            "config": json.loads(config_lib.to_json(self.config)),
            "versions": versions(),
        }
        write_json(self.folder / "results.json", results)
        lines = [line for name in records for line in self._metric_lines(name)]
        (self.folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
        missing = check_results(results)
        if missing and self.config.evaluate.gold:  # half of the keys speak of a truth that people's data do not hold
            print(f"Note: results.json lacks {', '.join(missing)}", flush=True)
        return results

    def _gold_results(self) -> dict[str, float]:
        """The gold score of the labelers' own answers, where there is a gold scorer."""
        if not self.config.evaluate.gold:
            return {}
        judge = config_lib.resolve(self.config.evaluate.gold)
        records, _ = schema.read_jsonl(self.data("demonstrations_validation"), schema.Demonstration)
        return {"demonstration_gold_score": float(np.mean([judge(str(r.id), r.response).score for r in records]))}

    def _metric_lines(self, stage: str) -> list[str]:
        file = self.folder / stage / metrics.FILE
        if not file.is_file():
            return []
        rows = metrics.read(file)
        return [json.dumps({**row, "stage": stage}) + "\n" for row in rows]

    def report(self, results: dict) -> Path:
        """Writes ``report.html``."""
        return write_report(
            self.folder / "report.html", results, self._history(), self._samples(), departures(self.config)
        )

    def _history(self) -> dict[str, list[dict]]:
        names = {
            "rollout/score": "score",
            "rollout/kl_nats_per_sequence": "kl",
            "rollout/response_tokens": "response_tokens",
            "gold_score": "gold_score",
            "held_out_loss": "pretraining_loss",
        }
        history: dict[str, list[dict]] = {}
        for stage in ("ppo", "ppo_ptx"):
            rows = metrics.read(self.folder / stage / metrics.FILE)
            history[stage] = [
                {"iteration": row["step"]} | {short: row[long] for long, short in names.items() if long in row}
                for row in rows
            ]
        keep = {
            "epoch": "epoch",
            "validation_loss": "validation_loss",
            "reward_score": "score",
            "gold_score": "gold_score",
        }
        history["sft"] = [
            {short: row[long] for long, short in keep.items() if long in row} for row in self.done("baseline")["epochs"]
        ]
        return history

    def _samples(self, count: int = 12) -> list[dict]:
        by_prompt: dict[str, dict] = {}
        for line in (self.folder / "evaluation" / "samples.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            entry = by_prompt.setdefault(row["prompt"], {"prompt": row["prompt"], "responses": {}})
            entry["responses"][row["model"]] = {"text": row["response"], "gold_score": row.get("gold_score")}
        return list(by_prompt.values())[:count]


def agreement(rankings: Sequence[schema.Ranking]) -> float:
    """How often two labelers of the group order a pair the same way, from prompts that two of them ranked."""
    pairs: dict[str, list[tuple[int, ...]]] = {}
    for ranking in rankings:
        pairs.setdefault(str(ranking.id).rsplit("/", 1)[0], []).append(ranking.ranks)
    both = [ranks for ranks in pairs.values() if len(ranks) == 2]
    k = max(len(a) for a, _ in both)
    fill = lambda ranks: list(ranks) + [-1] * (k - len(ranks))  # noqa: E731
    first, second = (np.array([fill(ranks[i]) for ranks in both]) for i in (0, 1))
    return quality.labeler_agreement(first, second).value


MEASURED_ON = {"validation_train": "train_labelers", "validation_heldout": "heldout_labelers"}
"""Sets of held-out rankings under the names of the results schema; people's own keep theirs (held_out_hh_rlhf)."""


def reward_model_results(rewards: dict) -> dict:
    """What the results say of the reward model: accuracy on each held-out set, the rest on the largest of them."""
    sets = {name: found for name, found in rewards.items() if isinstance(found, dict) and "accuracy" in found}
    # Of storyland's two, equally large, the held-out labelers' counts: it is the later one.
    main = max(reversed(list(sets.values())), key=lambda found: found["prompts"])
    agreed = {g: rewards[f"agreement_{g}"] for g in ("train", "heldout") if f"agreement_{g}" in rewards}
    return {
        "rm_accuracy": {MEASURED_ON.get(name, name): found["accuracy"] for name, found in sets.items()},
        **({"labeler_agreement": agreed} if agreed else {}),
        "calibration": calibration_points(main["calibration"]),
        "length_only_accuracy": main["length_only_accuracy"],
    }


def calibration_points(calibration: dict[str, list[float]]) -> dict[str, list[float]]:
    """The calibration curve under the names of the results schema."""
    return {key: calibration[key] for key in ("predicted", "observed", "count")}


def versions() -> dict[str, str]:
    """What ran: Python, libraries, device."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "rlhf_jax")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"python": platform.python_version(), **found, "device": device, "machine": platform.machine()}


def departures(config: ConfigDict) -> list[dict[str, str]]:
    """Where this run departs from the paper, beside the paper's value."""
    p, s, r = config.ppo, config.sft, config.reward_model
    small = "two CPU cores and little time"
    simulated = ("10 + 10 simulated", "the truth is known in storyland")
    people = ("the crowds of HH-RLHF and OpenAssistant", "rankings that anyone can have")
    labelers = simulated if config.sample.labelers else people
    rows = [
        ("Policy", "1.3B, 6B and 175B parameters", "appendix C", f"{p.iterations and config.base}", small),
        ("Demonstrations", "12,725", "table 6", f"{config.data.demonstrations:,}", small),
        ("SFT epochs", "16", "appendix C.1", str(s.epochs), "chosen among the epochs that fit, by reward-model score"),
        ("SFT dropout", "0.2", "appendix C.1", str(s.dropout), "a small model has little to spare"),
        ("Prompts with rankings", "33,207", "table 6", f"{config.data.ranking_prompts:,}", small),
        ("Labelers", "about 40 people", "section 3.4", *labelers),
        ("Reward-model batch", "64 prompts", "appendix C.2", f"{r.batch_size} rows", "fewer prompts, enough steps"),
        ("Reward model size", "6B for every policy", "section 3.5", "the size of the policy", small),
        ("Episodes", "256,000", "appendix C.4", f"{p.iterations * p.episodes:,}", small),
        ("Episodes of an iteration", "512", "appendix C.4", str(p.episodes), small),
        ("Minibatch", "64", "appendix C.4", str(p.episodes // p.minibatches), "fewer episodes in an iteration"),
        ("Inner epochs", "1", "appendix C.4", str(p.epochs), ""),
        ("KL coefficient", "0.02", "appendix C.4", str(p.kl.coef), "a small reward model is easier to fool"),
        ("Pretraining coefficient", "27.8", "appendix C.4", str(p.ptx_coef), "chosen by the two logged gradient norms"),
        (
            "Pretraining rows an episode", "8", "appendix C.4", str(p.ptx_rows_per_episode),
            "rows of several documents; time",
        ),
        ("Gradient clipping", "not stated", "appendix C", "each term at 1.0", "a large term must not shrink the other"),
        ("Missing end of text", "not stated", "", f"score {p.missing_eos_score}", "Ziegler et al. 2019 use -1"),
        ("Average of weights", "decay 0.992", "appendix C.4", str(p.ema_decay), "a shorter run needs a shorter memory"),
        ("Learning rate of PPO", "2.55e-6 to 2.55e-5 swept", "appendix C.4", str(p.learning_rate), "a small model"),
        (
            "Schedule of PPO", "10 iterations of warm-up, then constant", "appendix C.4",
            f"{p.warmup_iterations} of warm-up (value network {p.value_warmup_iterations}), then {p.schedule}",
            "few steps, which have to settle",
        ),
        ("GAE lambda", "not stated", "0.95 in its parents", str(p.lam), "responses of 20 tokens"),
        ("Win rate against", "175B SFT", "section 3.6", "SFT of the same size", ""),
    ]  # fmt: skip
    keys = ("name", "paper", "source", "run", "why")
    return [dict(zip(keys, row, strict=True)) for row in rows if row[1] != row[3]]


def headline(results: dict) -> str:
    """The result in a few lines."""
    judge = "the gold scorer" if "win_rate_vs_sft" in results else "the reward model"
    lines = ["", f"Win rate against SFT by {judge} (95% interval):"]
    for model, rate in results.get("win_rate_vs_sft", results["win_rate_vs_sft_by_reward_model"]).items():
        lines.append(f"  {model:14} {rate['value']:.3f}  ({rate['low']:.3f} to {rate['high']:.3f})")
    return "\n".join(lines)


if __name__ == "__main__":
    config_lib.main(
        run, config="configs/instructgpt/storyland.py", workdir="runs/instructgpt", check=check_shapes,
        one_process="For several processes run its stages: sft.py, reward_model.py and ppo.py take --distributed.",
    )  # fmt: skip
