r"""Writes the JSONL files that the stages read: demonstrations, prompts, rankings, plain text.

Run:

    python experiments/prepare_data.py --config=configs/data/storyland.py --workdir=runs/data
    python experiments/prepare_data.py --source=hh_rlhf --data_dir=DIR --out=runs/hh_data
    python experiments/prepare_data.py --source=jsonl --out=runs/my_data \
        --config.demonstrations=FILE
    python experiments/prepare_data.py --source=alpaca --data=FILE --out=runs/my_data
    python experiments/prepare_data.py --data=FILE --columns prompt=question,system=system \
        --out=runs/my_data
    python experiments/prepare_data.py --model=smollm2
    python experiments/prepare_data.py --look=FILE.jsonl --model=runs/sft/epoch-3 \
        --preview=rows.html

``--source=NAME`` is short for ``--config=configs/data/NAME.py``, ``--out`` for ``--workdir``,
``--data_dir`` and ``--model`` for the keys of that name; ``--model`` alone fetches a model by name
and asks it one question. With ``--data`` a file of another tool is converted; ``--source`` then
names its format (docs/data_sources.md) and may be left out. ``--preview`` shows five rows as the
model sees them (``--preview=FILE.html`` writes a page). ``--look=FILE`` shows this and the report's
numbers for a file of records, and prepares nothing.
"""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.data import curation, schema, sources
from rlhf_jax.data.prepare import own, parts, preferences, tables
from rlhf_jax.data.prepare import storyland as world
from rlhf_jax.data.prepare.lengths import Lengths
from rlhf_jax.data.storyland import tokenizer as storyland_assets
from rlhf_jax.data.text import encode_prompt, load_tokenizer
from rlhf_jax.run import checks, cli, data_flags, look, networks, trial
from rlhf_jax.run import config as config_lib
from rlhf_jax.run.files import written
from rlhf_jax.run.signals import told_when_slow

_SHOW = contextvars.ContextVar("show the tables", default=True)


def run(config: ConfigDict, workdir: str, *, show: bool = True) -> dict:
    """Writes the files of `config.source` into `workdir`; returns the number of records in each.

    The tables go to ``data_report.txt`` and, with `show`, to the screen too.
    """
    checks.require_one_of("source", config.source, tuple(SOURCES))
    shown = _SHOW.set(show)
    try:
        return SOURCES[config.source](config, Path(workdir))
    finally:
        _SHOW.reset(shown)


# ---------------------------------------------------------------------------------------- storyland


def storyland(config: ConfigDict, folder: Path) -> dict:
    """Demonstrations by simulated labelers, prompts of all splits, and a text corpus."""
    files = world.files(config)
    counts = _write(folder, files)
    tokenizer = load_tokenizer(storyland_assets.assets())
    measured = tables.tables(files, lambda text: len(encode_prompt(tokenizer, text)))
    _report(folder, [*look.lines(files, config), measured])
    return counts


def _write(folder: Path, files: Mapping[str, Iterable[Any]]) -> dict[str, int]:
    counts = {}
    for name, records in files.items():
        records = list(records)
        schema.write_jsonl(folder / f"{name}.jsonl", records)
        counts[name] = len(records)
    return counts


# ----------------------------------------------------------------------------- people's preferences


def hh_rlhf(config: ConfigDict, folder: Path) -> dict:
    """HH-RLHF pairs and OpenAssistant rankings, split by conversation, and English text.

    Rankings, demonstrations and prompts never share a conversation. ``data_report.txt`` has what
    was read, what was left out and why. Where `config.data_dir` has HH-RLHF alone, the report names
    the files that are not written; without `config.subsets` only OpenAssistant is read.
    """
    shares = parts.Parts(config)
    where = config.data_dir or None
    everything: dict[str, Any] = {"split": "train", "test_fraction": 0.0}
    oasst, text_dir, skipped = preferences.beside_hh(where, config.subsets)
    reports, pairs = [], []
    if config.subsets:
        pairs, of_pairs = sources.read_hh(where, **everything, subsets=config.subsets)
        reports.append(of_pairs)
    groups: list[schema.Ranking] = []
    replies: list[schema.Demonstration] = []
    if oasst:
        groups, of_groups = sources.read_oasst(where, **everything)
        replies, of_replies = sources.read_oasst_demonstrations(where, **everything)
        reports += [of_groups, of_replies]
    lengths = Lengths(config, load_tokenizer(networks.model_folder(config.model)))
    files = preferences.preference_files(config, shares, lengths, parts.named([*groups, *pairs]),
                              parts.named([*replies, *sources.best_responses(pairs)]))  # fmt: skip
    if text_dir:
        documents, of_documents = sources.read_english(where)
        reports.append(of_documents)
        files["corpus"], files["corpus_held_out"] = preferences.text_files(documents, config)
    parts.require_records(files)
    counts = _write(folder, {name: records for name, records in files.items() if records})
    sizes = collections.Counter(len(r.responses) for r in files["rankings"])
    # `noted` names the splits of the source, not the parts that are made here, so it is left out.
    lines = [dataclasses.replace(report, noted={}).summary() for report in reports] + skipped
    lines += [f"left out: {reason}: {count}" for reason, count in sorted(lengths.left_out.items())]
    by_size = ", ".join(f"{k}: {n}" for k, n in sorted(sizes.items()))
    lines += [f"rankings by number of responses: {by_size}"]
    lines += [f"{name}.jsonl: {count}" for name, count in counts.items()]
    measured = tables.tables(files, lengths.count, tables.identifier())
    _report(folder, [*lines, "", *look.lines(files, config, reports), measured])
    return counts


def _report(folder: Path, lines: Sequence[str], *, before: Sequence[str] = ()) -> None:
    """Writes data_report.txt and prints it, without the lines `before`, printed already."""
    text = "\n".join(lines).rstrip("\n") + "\n"
    with written(folder / "data_report.txt") as file:
        file.write("".join(f"{line}\n" for line in before) + text)
    if _SHOW.get():
        print(text, end="", flush=True)
    else:
        print(f"The data are described in {folder / 'data_report.txt'}", flush=True)


# ---------------------------------------------------------------------------------------- own files


def own_files(config: ConfigDict, folder: Path) -> dict:
    """A user's own files, cleaned and split; ``data_report.txt`` has what was left out and why.

    In this order: rows are read strictly, near-duplicate prompts dropped, users capped, records
    split by user (or organization, or conversation), the splits checked for leaks, personal data
    masked in the training split, and records that are too long dropped.
    """
    _check_cleaning(config)
    checks.require(
        bool(config.demonstrations or config.rankings or config.prompts), "prompts", config.prompts,
        "name a file, or one of demonstrations or rankings: --config.prompts=FILE",
    )  # fmt: skip
    reports: list[schema.DataReport] = []
    sets = own.read_own(config, reports)
    fractions = {name: config.fractions[name] for name in own.SPLITS}
    files, lengths = _cleaned(config, sets, fractions, reports)
    parts.require_records(files)
    counts = _write(folder, {name: records for name, records in files.items() if records})
    _report(folder, _lines(config, reports, lengths, files, counts))
    return counts


def convert(config: ConfigDict, folder: Path) -> dict:
    """Converts a file of another tool into the files that the stages read.

    Prints first in which format the file was read. A file with few conversations is not split: it
    has no held-out part. Also writes ``data_report.txt``.
    """
    _check_cleaning(config)
    checks.require(bool(config.data), "data", config.data, "name the file to convert: --data=FILE")
    reading = sources.read_form(
        config.data, config.form, columns=own.columns(config.columns), split=config.split or None,
        max_bad_fraction=config.max_bad_fraction, language=config.language,
    )  # fmt: skip
    said = [f"{config.data}: {reading.said}"]
    print(said[0], flush=True)
    reports = [reading.report]
    sets = {name: parts.with_ids(name, records) for name, records in reading.records.items()}
    fractions = {name: config.fractions[name] for name in own.SPLITS}
    conversations = {
        sources.conversation_place(r.prompt)
        for s in sets.values()
        for r in s
        if hasattr(r, "prompt")
    }
    if len(conversations) < config.least_conversations and "corpus" not in sets:
        fractions = {"train": 1.0, "validation": 0.0, "test": 0.0}
        said.append(
            f"nothing is held out: {len(conversations)} conversations are fewer than "
            f"least_conversations={config.least_conversations}"
        )
    files, lengths = _cleaned(config, sets, fractions, reports)
    files = {name: records for name, records in files.items() if records}
    if not any(name in files for name in (*own.OWN_FILES, "prompts_ppo")):
        raise ValueError(
            f"no record of {config.data} is left to train on: {reading.report.summary()}"
        )
    counts = _write(folder, files)
    _report(folder, [*said[1:], *_lines(config, reports, lengths, files, counts)], before=said[:1])
    return counts


def _cleaned(
    config: ConfigDict, sets: dict[str, list[Any]], fractions: dict[str, float],
    reports: list[schema.DataReport],
) -> tuple[dict[str, Any], Lengths | None]:  # fmt: skip
    """The stages' records, cleaned and split by the config, and the counts of those too long."""
    sets = own.deduplicated(sets, config.prefix_length, reports)
    if config.per_user:
        for name, records in sets.items():
            sets[name], report = curation.cap_per_user(records, config.per_user, key=config.key)
            reports.append(dataclasses.replace(report, source=f"cap per {config.key}, {name}"))
    split = {
        name: curation.split_by(records, key=config.key, fractions=fractions, seed=config.seed)
        for name, records in sets.items()
    }
    own.without_leaks(split, config.leaks, reports)
    if config.pii_hook:
        hook = config_lib.resolve(config.pii_hook)
        for name, part in split.items():
            advice = (
                f"see what pii_hook={config.pii_hook} does with it, or stop with Ctrl-C and take "
                "the row out"
            )
            with told_when_slow(advice) as begin:
                on_row = lambda place, r, name=name: begin(
                    f"pii_hook: record {place} of {name} (id {r.id})"
                )
                part["train"], report = curation.scrub(part["train"], hook, on_row=on_row)
            reports.append(dataclasses.replace(report, source=f"personal data, training {name}"))
    lengths = (
        Lengths(config, load_tokenizer(networks.model_folder(config.model)))
        if config.model
        else None
    )
    if lengths is not None:
        split = {
            k: {name: lengths.fitting(r) for name, r in part.items()} for k, part in split.items()
        }
    return own.stage_files(split, config.ranking_share, config.seed), lengths


def _lines(
    config: ConfigDict, reports: Sequence[schema.DataReport], lengths: Lengths | None,
    files: Mapping[str, Any], counts: Mapping[str, int],
) -> list[str]:  # fmt: skip
    """The report of a user's own data."""
    lines = [report.summary() for report in reports if report.rows]
    lines += (
        [f"left out: {reason}: {n}" for reason, n in sorted(lengths.left_out.items())]
        if lengths
        else []
    )
    lines += [f"{name}.jsonl: {count}" for name, count in counts.items()]
    measured = tables.tables(dict(files), lengths.count if lengths else None, tables.identifier())
    return [*lines, "", *look.lines(files, config, reports), measured]


def _check_cleaning(config: ConfigDict) -> None:
    checks.require_one_of("key", config.key, ("user", "organization", "conversation"))
    checks.require_one_of("leaks", config.leaks, ("error", "drop"))
    checks.require_range("prefix_length", config.prefix_length, low=0)
    checks.require_range("per_user", config.per_user, low=0)
    checks.require_range("ranking_share", config.ranking_share, low=0.0, high=1.0)


SOURCES: dict[str, Callable[[ConfigDict, Path], dict]] = {
    "storyland": storyland, "hh_rlhf": hh_rlhf, "jsonl": own_files, "convert": convert,
    "pretrained": trial.pretrained, "look": lambda config, folder: {"records": look.look(config)},
}  # fmt: skip


def dry_run(config: ConfigDict) -> None:
    """Looks at a file (``--look``); no other source has a dry run."""
    checks.require(
        config.source == "look", "--dry_run", True,
        "only --look=FILE writes nothing: leave --dry_run out",
    )  # fmt: skip
    look.look(config)


def main(argv: Sequence[str]) -> None:
    """The command line; reports an unknown source in one line, as it does any other mistake."""
    try:
        full = data_flags.expand(argv)
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    cli.main(
        run, config="configs/data/storyland.py", workdir="runs/data", argv=full,
        one_process="Run it once; its files are then read by all processes.", dry_run=dry_run,
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
