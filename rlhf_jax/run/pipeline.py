"""What each stage of the InstructGPT pipeline reads: config keys, files, models, other stages.

The config is plain data here, so that planning needs no model and no device. The pipeline itself is
``experiments/instructgpt.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

Plain = Mapping[str, Any]

VERSIONS = {
    "data": 1,
    "sft": 1,
    "ppo_init": 1,
    "samples": 1,
    "reward_model": 1,
    "baseline": 1,
    "ppo": 1,
    "ppo_ptx": 1,
    "evaluation": 1,
}
"""The stages in order, with the version of each one's algorithm.

Raise a version by hand when the stage's numbers change for the same config and inputs: finished
runs then repeat that stage and the stages that depend on it.
"""

GROUPS = {
    "data": "data",
    "sft": "sft",
    "ppo_init": "ppo_init",
    "samples": "sample",
    "reward_model": "reward_model",
    "baseline": "evaluate",
    "ppo": "ppo",
    "ppo_ptx": "ppo",
    "evaluation": "evaluate",
}
"""The config group that each stage reads."""

_SFT = frozenset({"seed", "model", "demonstrations", "validation", "pretraining_text"})
_PPO = frozenset(
    {"name", "seed", "model", "reward_model", "prompts", "pretraining_text", "held_out_text"},
)
_WITHOUT_TEXT = frozenset({"ptx_coef", "ptx_rows_per_episode", "ptx_microbatches", "ptx_clip_norm"})
"""Keys that plain PPO ignores.

It does read ``ptx_row_length``: the held-out loss is measured on rows of that length.
"""

FILLED: Mapping[str, frozenset[str]] = {
    "data": frozenset(),
    "sft": _SFT,
    "ppo_init": _SFT,
    "samples": frozenset({"seed", "models", "prompts"}),
    "reward_model": frozenset({"seed", "model", "rankings", "demonstrations", "evaluation"}),
    "baseline": frozenset(),
    "ppo": _PPO | _WITHOUT_TEXT,
    "ppo_ptx": _PPO,
    "evaluation": frozenset(
        {"reference", "reward_model", "prompts", "held_out_text", "models", "few_shot"}
    ),
}
"""Keys of a stage's group that the pipeline fills in; their values in the config do not count.

Those that name files and models count by content, as inputs of the stage.
"""

_OWN = {"sft": frozenset({"pretraining_text"}), "reward_model": frozenset({"model"})}
"""Keys of `FILLED` that the pipeline nevertheless takes from the config."""

FILLED_FROM = {
    "seed": "it is --config.seed for every stage",
    "model": "it starts from --config.base, or from the model that an earlier stage wrote",
    "models": "the pipeline's own models have these names; give another model another name",
}
"""What to set instead of a key that is filled in; the data stage produces the others."""

DATA_PATHS = ("data", "data_dir", "demonstrations", "rankings", "prompts", "corpus", "model")
"""Keys of the data group that may name a file or folder; for storyland some are numbers."""


def own_data(
    data: Any, pinned: Collection[str], entries: Callable[[Any], list[Path]]
) -> dict[str, str]:
    """The user's files and folders that the data stage reads, by their keys in the data group.

    Args:
      data: the data group of the config.
      pinned: names of models whose content never changes.
      entries: returns the files and folders of `data_dir` that may be read, out of all that it
        contains.
    """
    found: dict[str, str] = {}
    for key in [key for key in DATA_PATHS if isinstance(data.get(key), str) and data[key]]:
        if key == "data_dir":
            found |= {f"{key}/{entry.name}": str(entry) for entry in entries(data)}
        elif data[key] not in pinned:
            found[key] = data[key]
    return found


COMPARED = ("base", "sft", "ppo", "ppo_ptx")
"""The models of the evaluation that the pipeline fills in; the config may name more."""

NOT_FOR_BASELINE = frozenset(
    {
        "models", "reference", "kl_of", "limit", "samples", "baseline_samples", "base_samples",
        "held_out_text", "held_out_row_length", "held_out_batches", "few_shot", "prompts",
        "reward_model", "mesh",
    }
)  # fmt: skip
"""Keys of the evaluation that are removed from the config for choosing the baseline."""


def parts(config: Plain, pinned: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """The part of the config that each stage reads, under the config's own names.

    Args:
      config: the config of the whole pipeline.
      pinned: names of models whose content never changes, so that the name identifies it.
    """
    seed = {"seed": config["seed"]}
    # Any other base model counts by the content of its files, as an input of the stage.
    base = {"base": config["base"]} if config["base"] in pinned else {}
    found: dict[str, dict[str, Any]] = {}
    for stage, group in GROUPS.items():
        found[stage] = {group: _left(config[group], FILLED[stage])}
    for stage in ("sft", "ppo_init", "samples", "reward_model", "ppo", "ppo_ptx"):
        found[stage] |= seed
    for stage in ("sft", "ppo_init", "evaluation"):
        found[stage] |= base
    if not config["sample"]["labelers"]:
        # The user brings rankings: nothing is sampled, so no other setting of the group matters.
        found["samples"] = {"sample": {"labelers": 0}}
    rewards = found["reward_model"]
    rewards["reward_model"]["evaluation"] = sorted(config["reward_model"]["evaluation"])
    if config["reward_model"]["model"] in pinned:
        rewards["reward_model"]["model"] = config["reward_model"]["model"]
    # The number of labelers decides whether rankings are the user's or are sampled.
    rewards["sample"] = {"labelers": config["sample"]["labelers"]}
    found["baseline"] = {
        "evaluate": _left(config["evaluate"], NOT_FOR_BASELINE),
        "sft": {"mesh": config["sft"]["mesh"]},
        "validation_samples": config["validation_samples"],
    }
    measured = found["evaluation"]["evaluate"]
    measured["few_shot"] = _left(config["evaluate"]["few_shot"], {"demonstrations"})
    measured["models"] = sorted({*config["evaluate"]["models"]} - {*COMPARED})
    return found


def set_in_vain(config: Plain) -> list[str]:
    """Keys set in the config that the pipeline overrides, each with its value and what to set.

    The defaults of the stand-alone programs (``""``, seed 0, the base model) count as not set.

    Args:
      config: the config of the whole pipeline.
    """
    found = []
    # Not `ppo`: it shares its group with `ppo_ptx`, which does read the keys of `_WITHOUT_TEXT`.
    for stage in ("sft", "ppo_init", "samples", "reward_model", "ppo_ptx", "evaluation"):
        group = GROUPS[stage]
        for key in sorted(FILLED[stage] - _OWN.get(stage, frozenset()) - {"name"}):
            for name, value in _set_values(f"{group}.{key}", config[group][key]):
                if value not in ("", 0, config["base"], config["seed"]):
                    fix = FILLED_FROM.get(
                        key, "it is a file or a model that an earlier stage writes"
                    )
                    found.append(
                        f"{name}={value!r} would be ignored, the pipeline fills it in: {fix}"
                    )
    return found


def _set_values(name: str, value: Any) -> list[tuple[str, Any]]:
    """A setting, or those of its entries that the pipeline fills in."""
    if name == "evaluate.models":
        # Models of the user's own are allowed; only the names of the pipeline's models are filled
        # in.
        return [(f"{name}.{model}", value.get(model, "")) for model in COMPARED]
    if name == "evaluate.few_shot":
        return [(f"{name}.demonstrations", value["demonstrations"])]
    if isinstance(value, Mapping):
        return [(f"{name}.{entry}", path) for entry, path in value.items()]
    if isinstance(value, tuple | list):
        return [(f"{name}[{place}]", path) for place, path in enumerate(value)]
    return [(name, value)]


def _left(group: Plain, names: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in names}


def needs(config: Plain) -> dict[str, tuple[str, ...]]:
    """The stages whose outputs each stage reads."""
    own = not config["sample"]["labelers"]
    rewards = ["data"]
    if not own:
        rewards.append("samples")
    # The reward model starts from the last SFT model unless the config names another one.
    if not config["reward_model"]["model"]:
        rewards.append("sft")
    return {
        "data": (),
        "sft": ("data",),
        "ppo_init": ("data",),
        "samples": ("data",) if own else ("data", "sft"),
        "reward_model": tuple(rewards),
        "baseline": ("data", "sft", "reward_model"),
        "ppo": ("data", "ppo_init", "reward_model"),
        "ppo_ptx": ("data", "ppo_init", "reward_model"),
        "evaluation": ("data", "sft", "ppo_init", "reward_model", "baseline", "ppo", "ppo_ptx"),
    }


# ------------------------------------------------------------------------------------ files, models


class Paths:
    """The paths by which stages read each other's outputs, in a run folder at any location.

    Args:
      folder: the run folder.
      config: the config of the whole pipeline.
      done: returns the result of a finished stage.
      own_data: the user's files that the data stage reads.
    """

    def __init__(
        self,
        folder: Path,
        config: Plain,
        done: Callable[[str], Any],
        own_data: Mapping[str, str] = MappingProxyType({}),
    ):
        self.folder, self._config, self._done, self._own_data = folder, config, done, own_data

    def data(self, name: str) -> str:
        """A file of the data stage."""
        return str(self.folder / "data" / f"{name}.jsonl")

    def demonstrations(self) -> dict[str, str]:
        """The demonstrations for training and for validation."""
        return {
            "demonstrations": self.data("demonstrations"),
            "validation": self.data("demonstrations_validation"),
        }

    def rankings(self) -> dict[str, str]:
        """The rankings for training (``training``) and evaluation: the user's, or those sampled."""
        own = {
            p.stem.removeprefix("rankings_"): str(p)
            for p in sorted(self.folder.glob("data/rankings*.jsonl"))
        }
        if own:
            return {"training": own.pop("rankings"), **own}
        folder = self.folder / "samples"
        groups = {
            group: folder / group / "rankings.jsonl"
            for group in ("validation_train", "validation_heldout")
        }
        return {"training": str(folder / "rankings.jsonl")} | {
            group: str(path) for group, path in groups.items()
        }

    def sampled(self) -> tuple[str, ...]:
        """The SFT models whose responses are ranked: the one with the lowest loss, and the last."""
        trained = self._done("sft")
        # Both may be the same epoch.
        return tuple(dict.fromkeys((trained["lowest_loss"], trained["last"])))

    def epoch(self, row: Mapping[str, Any]) -> str:
        """The model of an SFT epoch."""
        return str(self.folder / "sft" / f"epoch-{row['epoch']}")

    def reward_model(self) -> str:
        """The reward model."""
        return self._done("reward_model")["model"]

    def compared(self) -> dict[str, str]:
        """The models to evaluate: those named in the config, and the pipeline's own."""
        # Models without a path are the pipeline's own, which are filled in below.
        own = {name: path for name, path in self._config["evaluate"]["models"].items() if path}
        return own | {
            "base": self._config["base"],
            "sft": self._done("baseline")["path"],
            "ppo": self._done("ppo")["ema"],
            "ppo_ptx": self._done("ppo_ptx")["ema"],
        }

    def inputs(self, stage: str) -> dict[str, str]:
        """The files and models that a stage reads, by name.

        The stages that it `needs` must be done.
        """
        read = {
            "data": self._data_inputs,
            "sft": lambda: self._supervised("sft"),
            "ppo_init": lambda: self._supervised("ppo_init"),
            "samples": self._sample_inputs,
            "reward_model": self._ranking_inputs,
            "baseline": self._baseline_inputs,
            "ppo": self._ppo_inputs,
            "ppo_ptx": self._ppo_ptx_inputs,
            "evaluation": self._evaluation_inputs,
        }
        return read[stage]()

    def _data_inputs(self) -> dict[str, str]:
        return {f"data.{name}": path for name, path in self._own_data.items()}

    def _supervised(self, stage: str) -> dict[str, str]:
        group, found = self._config[stage], {"base": self._config["base"], **self.demonstrations()}
        if group["pretraining_fraction"]:
            own = self.data("corpus") if stage == "ppo_init" else group["pretraining_text"]
            found["pretraining_text"] = own
        return found

    def _sample_inputs(self) -> dict[str, str]:
        if not self._config["sample"]["labelers"]:
            return self.rankings()
        models = {f"model {Path(path).name}": path for path in self.sampled()}
        return {
            **models,
            **{name: self.data(name) for name in ("prompts_ranking", "prompts_validation")},
        }

    def _ranking_inputs(self) -> dict[str, str]:
        model = self._config["reward_model"]["model"] or self._done("sft")["last"]
        return {"model": model, "demonstrations": self.data("demonstrations"), **self.rankings()}

    def _baseline_inputs(self) -> dict[str, str]:
        found = {
            "prompts_validation": self.data("prompts_validation"),
            "reward_model": self.reward_model(),
        }
        found["losses"] = str(self.folder / "sft" / "sft.json")
        return found | {
            f"epoch-{row['epoch']}": self.epoch(row) for row in self._done("sft")["epochs"]
        }

    def _ppo_inputs(self) -> dict[str, str]:
        return {
            "model": self._done("ppo_init")["last"],
            "reward_model": self.reward_model(),
            "prompts": self.data("prompts_ppo"),
            "held_out_text": self.data("corpus_held_out"),
        }

    def _ppo_ptx_inputs(self) -> dict[str, str]:
        text = {"pretraining_text": self.data("corpus")} if self._config["ppo"]["ptx_coef"] else {}
        return self._ppo_inputs() | text

    def _evaluation_inputs(self) -> dict[str, str]:
        models = {f"models.{name}": path for name, path in self.compared().items()}
        return {
            **models,
            "reference": self._done("ppo_init")["last"],
            "reward_model": self.reward_model(),
            "prompts": self.data("prompts_test"),
            "held_out_text": self.data("corpus_held_out"),
            "demonstrations": self.data("demonstrations"),
        }


# ----------------------------------------------------------------------------------------- how much

_PACKED = 3
"""Rough number of demonstrations in a row that is packed as full as possible."""


def costs(config: Plain) -> dict[str, float | None]:
    """Thousands of tokens that each stage runs through a network; a training step counts threefold.

    Only the proportions matter: they divide up the remaining time. If the data are the user's
    files, whose sizes the config does not give, the costs are unknown. Making the data takes no
    network and little time.
    """
    try:
        tokens = _tokens(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return dict.fromkeys(VERSIONS)
    return {name: round(count / 1000, 3) for name, count in tokens.items()}


_FILLED = 0.45
"""Fraction of the slots of a sampled row that cost time: most rows are shorter than the longest.

Measured on storyland, where every stage then takes 40 to 55 ms per thousand tokens on two cores.
"""


def _tokens(config: Plain) -> dict[str, float]:
    data, ppo, evaluation, sample = (config[name] for name in ("data", "ppo", "evaluate", "sample"))
    demonstrations, rankings = int(data["demonstrations"]), int(data["ranking_prompts"])
    validation, test = int(data["validation_prompts"]), int(data["test_prompts"])
    models = len(config["evaluate"]["models"]) + 1
    slots = {
        name: config[name]["prompt_length"] + config[name]["max_new_tokens"]
        for name in ("sample", "ppo")
    }
    # The evaluation config has no prompt length; its prompts are like those that are sampled.
    slots["evaluate"] = slots["sample"] - sample["max_new_tokens"] + evaluation["max_new_tokens"]
    slots = {name: _FILLED * count for name, count in slots.items()}
    ranked = (sample["min_k"] + sample["max_k"]) / 2
    rollout = ppo["iterations"] * ppo["episodes"] * slots["ppo"]
    # Three times, since a backward pass costs about two forward passes.
    text = (
        ppo["iterations"]
        * ppo["episodes"]
        * ppo["ptx_rows_per_episode"]
        * ppo["ptx_row_length"]
        * 3
    )
    answers = test * (evaluation["baseline_samples"] + evaluation["samples"] * (models - 1))
    shots = evaluation["few_shot"]
    trials = shots["candidates"] * shots["trial_prompts"] if shots["candidates"] > 1 else 0
    # Prompts of the base model begin with examples, so its rows are several times as long.
    shown = evaluation["base_samples"] * (test + trials) * (shots["examples"] + 1)
    return {
        "data": 0.0,
        "sft": _supervised(config["sft"], demonstrations),
        "ppo_init": _supervised(config["ppo_init"], demonstrations),
        "samples": rankings * ranked * slots["sample"] if sample["labelers"] else 0.0,
        "reward_model": 3.0
        * config["reward_model"]["epochs"]
        * rankings
        * ranked
        * sample["max_new_tokens"]
        / 2,
        # Twice, because each response is sampled and scored.
        "baseline": 2.0
        * config["sft"]["epochs"]
        * validation
        * config["validation_samples"]
        * slots["evaluate"],
        # Sampling, reference, value and reward; then training steps of policy and value.
        "ppo": rollout * (4.0 + 6.0 * ppo["epochs"]),
        "ppo_ptx": rollout * (4.0 + 6.0 * ppo["epochs"]) + text * (ppo["ptx_coef"] != 0),
        "evaluation": 2.0 * (answers + shown) * slots["evaluate"],
    }


def _supervised(group: Plain, demonstrations: int) -> float:
    rows = demonstrations / (group["pieces_per_row"] or _PACKED)
    mixed = rows / (1.0 - group["pretraining_fraction"])
    # A backward pass costs about two forward passes.
    return 3.0 * group["epochs"] * mixed * group["row_length"]
