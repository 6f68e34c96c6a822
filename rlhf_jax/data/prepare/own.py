"""A user's own records as stage files: read strictly, without near-duplicates and leaks."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from msgspec import structs

from rlhf_jax.data import curation, schema, templated
from rlhf_jax.data.prepare.parts import distinct, shuffled, unique_ids, with_ids

OWN_FILES: dict[str, type] = {
    "demonstrations": schema.Demonstration,
    "rankings": schema.Ranking,
    "prompts": schema.Prompt,
    "corpus": schema.PlainText,
}
SPLITS = ("train", "validation", "test")


def columns(text: str) -> dict[str, str]:
    """The flag ``--columns wanted=name,..`` as a mapping.

    >>> columns("prompt=question, tools=")
    {'prompt': 'question', 'tools': ''}
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    bad = next((wanted for wanted, equals, _ in pairs if not equals or not wanted.strip()), None)
    if bad is not None:
        raise ValueError(
            f"columns={text!r}: write wanted=name,..: --columns prompt=question,system=system"
        )
    return {wanted.strip(): have.strip() for wanted, _, have in pairs}


def read_own(config: Any, reports: list[schema.DataReport]) -> dict[str, list[Any]]:
    """Reads the record files named in the config; every record has an id afterwards.

    Args:
      config: has a path for each name of `OWN_FILES` ("" for none), `max_bad_fraction` and `key`.
      reports: the report of each file is appended.

    Raises:
      ValueError: a bad row, or records that name the other of `user` and `organization` than
        `config.key`.
    """
    sets: dict[str, list[Any]] = {}
    for name, kind in OWN_FILES.items():
        if not config[name]:
            continue
        records, report = schema.read_jsonl(
            config[name],
            kind,
            max_bad_fraction=config.max_bad_fraction,
            special_tokens=templated.pattern(),
        )
        reports.append(report)
        sets[name] = with_ids(name, records)
    named = {
        key: sum(bool(getattr(r, key, None)) for s in sets.values() for r in s)
        for key in ("user", "organization")
    }
    if config.key in named and not named[config.key]:
        other = next((key for key, count in named.items() if count), "")
        if other:
            raise ValueError(
                f"key={config.key!r}: no record names one, but {named[other]} name a field "
                f"{other!r}: split by it with --config.key={other}"
            )
        reports.append(
            # Not an error: records without users still have conversations to split by.
            schema.DataReport(f"no record has a field {config.key!r}: split by conversation", 1, 1)
        )
    return sets


def deduplicated(
    sets: dict[str, list[Any]], prefix_length: int, reports: list[schema.DataReport]
) -> dict[str, list[Any]]:
    """Keeps one of the prompts that begin alike, over all files, with all labels of that prompt.

    Unlabelled prompts and documents that repeat an earlier one of their file are dropped too.
    """
    if not prefix_length:
        return sets
    normal = lambda record: curation.normalise(curation.prompt_text(record))
    # One record per prompt goes through the heuristic, which would take further labels of a prompt
    # for near-duplicates.
    first: dict[str, Any] = {}
    for name, records in sets.items():
        for record in records if name != "corpus" else ():
            first.setdefault(normal(record), record)
    kept, report = curation.drop_long_common_prefix(first.values(), prefix_length=prefix_length)
    reports.append(dataclasses.replace(report, source="different prompts of all files"))
    # Texts that differ in case or spaces only share the fate of the first one.
    texts = set(map(normal, kept))
    result = {}
    for name, records in sets.items():
        if name != "corpus":
            records = [record for record in records if normal(record) in texts]
        # These have no labels, so equal ones add nothing. An endless prefix compares whole texts.
        if name in ("prompts", "corpus"):
            records, report = curation.drop_long_common_prefix(records, prefix_length=sys.maxsize)
            reports.append(dataclasses.replace(report, source=f"repeats in {name}"))
        result[name] = records
    return result


def without_leaks(
    parts: dict[str, dict[str, list[Any]]], leaks: str, reports: list[schema.DataReport]
) -> None:
    """Refuses prompts that are in two splits, or drops them from the split nearer to training.

    `parts` is changed in place.
    """

    def of(split: str) -> list[Any]:
        return [record for part in parts.values() for record in part[split]]

    if leaks == "drop":
        # Validation gives way to test, and training to both, so that test is never changed.
        for split, held_out in (
            ("validation", of("test")),
            ("train", [*of("test"), *of("validation")]),
        ):
            for name, part in parts.items():
                part[split], report = curation.without_leaks(part[split], held_out)
                reports.append(
                    dataclasses.replace(
                        report, source=f"leaks from held-out splits, {split} {name}"
                    )
                )
    try:
        curation.check_leakage({split: of(split) for split in SPLITS})
    except ValueError as error:
        raise ValueError(
            f"{error}\nLeave such records out of training with --config.leaks=drop, or split by "
            "conversation with --config.key=conversation"
        ) from None


def stage_files(
    parts: dict[str, dict[str, list[Any]]], ranking_share: float, seed: int
) -> dict[str, Any]:
    """The files that the stages read, by name; a file without a source of records is left out.

    Args:
      parts: name of `OWN_FILES` -> split -> records.
      ranking_share: without rankings, the share of the training prompts that are set aside for
        labelling; PPO gets the others.
      seed: of the choice between those two.
    """
    demonstrations, rankings, prompts, corpus = (parts.get(name) for name in OWN_FILES)

    def prompts_of(split: str, *of: dict[str, list[Any]] | None) -> list[schema.Prompt]:
        # Prompts of other files are taken without their labels, as new records.
        records = [record for part in of if part for record in part[split]]
        return unique_ids(
            distinct(
                schema.Prompt(**{f.name: getattr(r, f.name) for f in structs.fields(schema.Prompt)})
                for r in records
            )
        )

    labelled = (rankings, demonstrations)
    files: dict[str, Any] = {
        "prompts_test": prompts_of("test", prompts, *labelled),
        "prompts_validation": prompts_of("validation", prompts, *labelled),
    }
    if demonstrations:
        files["demonstrations"] = demonstrations["train"]
        files["demonstrations_validation"] = demonstrations["validation"]
    if rankings:
        files["rankings"] = rankings["train"]
        files["rankings_held_out"] = [*rankings["validation"], *rankings["test"]]
    # Without prompts of their own, PPO trains on those of the labelled records.
    train = (
        prompts_of("train", prompts) if prompts else prompts_of("train", rankings or demonstrations)
    )
    if not rankings:
        # The hash decides which prompts are labelled, so that new records do not reshuffle the old.
        order = sorted(train, key=lambda p: shuffled(seed, curation.prompt_text(p)))
        cut = round(ranking_share * len(order))
        files["prompts_ranking"], train = order[:cut], order[cut:]
    files["prompts_ppo"] = train
    if corpus:
        files["corpus"], files["corpus_held_out"] = (
            corpus["train"],
            [*corpus["validation"], *corpus["test"]],
        )
    return files
