r"""Writes the JSONL files that the stages read: demonstrations, prompts, rankings, plain text; fetches models by name.

Run:

    python experiments/prepare_data.py --config=configs/data/storyland.py --workdir=runs/data
    python experiments/prepare_data.py --source=hh_rlhf --data_dir=DIR --out=runs/hh_data
    python experiments/prepare_data.py --source=jsonl --out=runs/my_data --config.demonstrations=FILE
    python experiments/prepare_data.py --source=alpaca --data=FILE --out=runs/my_data
    python experiments/prepare_data.py --data=FILE --columns prompt=question,system=system --out=runs/my_data
    python experiments/prepare_data.py --model=smollm2
    python experiments/prepare_data.py --look=FILE.jsonl --model=runs/sft/epoch-3 --preview=rows.html

``--source=NAME`` is short for ``--config=configs/data/NAME.py``, ``--out`` for ``--workdir``, ``--data_dir`` and
``--model`` for the keys of that name; ``--model`` alone fetches the model and asks it one question. With ``--data`` a
file of another tool is converted, and ``--source`` is the name of its form (docs/data_sources.md), or left out.
``--preview`` shows five rows as the model sees them (``--preview=FILE.html`` writes a page), ``--look=FILE`` does that
and the numbers of the report for a file of records, and prepares nothing.
"""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from msgspec import structs

from experiments import look
from rlhf_jax.data import curation, schema, sources, templated
from rlhf_jax.data.storyland import documents, labelers, task, task_id
from rlhf_jax.data.storyland import tokenizer as storyland_assets
from rlhf_jax.data.text import encode_opening, encode_prompt, encode_response, load_tokenizer, prompt_batch, stop_ids
from rlhf_jax.run import checks, cli, devices, networks
from rlhf_jax.run import config as config_lib
from rlhf_jax.run.files import write_json, written
from rlhf_jax.run.signals import told_when_slow
from rlhf_jax.sampling.generate import generate

FIRST_INDEX = {"demonstrations": 0, "ranking": 1_000_000, "ppo": 2_000_000}
"""Where each training set begins in the endless stream of training instructions, so that no two share a prompt."""
HELD_OUT_TEXT_SEED = 1
OASST_FILES = ("rankings.jsonl.gz", "demonstrations.jsonl.gz", "*tree*.jsonl.gz")
TEXT_FILES = ("*.txt", "*.txt.gz", "*.jsonl", "*.jsonl.gz")
PTX_FIRST_DOCUMENT = 1_000_000
"""The pretraining mix comes from a part of the corpus stream that the base models have not seen."""


_SHOW = contextvars.ContextVar("show the tables", default=True)


def run(config: ConfigDict, workdir: str, *, show: bool = True) -> dict:
    """Writes the files of `config.source` into `workdir` and returns how many records each holds.

    The tables go to ``data_report.txt``; with `show` to the screen too.
    """
    checks.require_one_of("source", config.source, tuple(SOURCES))
    shown = _SHOW.set(show)
    try:
        return SOURCES[config.source](config, Path(workdir))
    finally:
        _SHOW.reset(shown)


def entries(config: ConfigDict) -> list[Path]:
    """The files and folders of `config.data_dir` that `hh_rlhf` may read."""
    root, named = Path(config.data_dir), ("hh_rlhf", "hh-rlhf", "oasst*", *sources.TEXT_FOLDERS)
    patterns = (*named, *OASST_FILES, *TEXT_FILES, *(f"{subset}*" for subset in config.get("subsets", ())))
    return sorted({entry for pattern in patterns for entry in root.glob(pattern)})


# ------------------------------------------------------------------------------------------------------ storyland


def storyland(config: ConfigDict, folder: Path) -> dict:
    """Demonstrations by simulated labelers, prompts of all splits, and corpus text."""
    writers = labelers("train", config.labelers)
    seen: set[str] = set()
    files = {
        "prompts_test": _prompts("test", config.test_prompts, 0, set()),
        "prompts_validation": _prompts("validation", config.validation_prompts, 0, set()),
        "demonstrations": _demonstrations("train", config.demonstrations, writers, seen),
        "demonstrations_validation": _demonstrations("validation", config.validation_prompts, writers, set()),
        "prompts_ranking": _prompts("train", config.ranking_prompts, FIRST_INDEX["ranking"], seen),
        "prompts_ppo": _prompts("train", config.ppo_prompts, FIRST_INDEX["ppo"], seen),
        "corpus": _corpus(PTX_FIRST_DOCUMENT, config.documents, seed=0),
        "corpus_held_out": _corpus(0, config.held_out_documents, seed=HELD_OUT_TEXT_SEED),
    }
    files = {name: list(records) for name, records in files.items()}
    counts = _write(folder, files)
    tokenizer = load_tokenizer(storyland_assets.assets())
    _report(folder, [*look.lines(files, config), _tables(files, lambda text: len(encode_prompt(tokenizer, text)))])
    return counts


def _write(folder: Path, files: Mapping[str, Iterable[Any]]) -> dict[str, int]:
    counts = {}
    for name, records in files.items():
        records = list(records)
        schema.write_jsonl(folder / f"{name}.jsonl", records)
        counts[name] = len(records)
    return counts


def _prompts(split: str, count: int, first: int, seen: set[str]) -> Iterator[schema.Prompt]:
    index = first
    while count:
        asked = task(split, index)
        if asked.prompt not in seen:
            seen.add(asked.prompt)
            count -= 1
            yield schema.Prompt(asked.prompt, id=task_id(split, index), source="storyland", use_case=asked.use_case)
        index += 1


def _demonstrations(split: str, count: int, writers: list, seen: set[str]) -> Iterator[schema.Demonstration]:
    for place, prompt in enumerate(_prompts(split, count, FIRST_INDEX["demonstrations"], seen)):
        writer = writers[place % len(writers)]
        asked = task(split, int(str(prompt.id).split("/")[1]))
        yield schema.Demonstration(
            prompt.prompt, writer.demonstrate(asked, place=prompt.id),
            id=prompt.id, source="storyland", use_case=asked.use_case, labeler=writer.name,
        )  # fmt: skip


def _corpus(first: int, count: int, *, seed: int) -> Iterator[schema.PlainText]:
    for index, text in enumerate(documents(first, first + count, seed=seed), start=first):
        yield schema.PlainText(text, id=f"{seed}/{index}", source="storyland")


# ---------------------------------------------------------------------------------------------- people's preferences


class Lengths:
    """Which texts fit, in tokens of the model's tokenizer with the template's endings; what does not is counted."""

    def __init__(self, config: ConfigDict):
        self.config = config
        self.tokenizer: Any = load_tokenizer(networks.model_folder(config.model))
        self.left_out: collections.Counter[str] = collections.Counter()

    def _fits(self, what: str, tokens: int, limit: int) -> bool:
        if tokens > limit:
            self.left_out[f"{what} longer than {limit} tokens"] += 1
        return tokens <= limit

    def _prompt(self, prompt: schema.Conversation) -> int:
        return len(encode_prompt(self.tokenizer, prompt))

    def _response(self, response: str) -> int:
        return len(encode_response(self.tokenizer, response, eos_id=self.tokenizer.eos_token_id))

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return self._prompt(text)

    def fitting(self, records: Iterable[Any]) -> list[Any]:
        """The records that fit, rankings without the responses that do not; documents are cut elsewhere."""
        keep = {schema.Demonstration: self.demonstration, schema.Prompt: lambda r: self.prompt(r.prompt)}
        kept = []
        for record in records:
            if isinstance(record, schema.Ranking):
                kept += filter(None, [self.ranking(record)])
            elif type(record) not in keep or keep[type(record)](record):
                kept.append(record)
        return kept

    def prompt(self, prompt: schema.Conversation) -> bool:
        """Whether a prompt fits."""
        return self._fits("prompt", self._prompt(prompt), self.config.prompt_length)

    def demonstration(self, record: schema.Demonstration) -> bool:
        """Whether both texts fit."""
        response = self._response(record.response)
        return self._fits("demonstration", response, self.config.response_length) and self.prompt(record.prompt)

    def ranking(self, record: schema.Ranking) -> schema.Ranking | None:
        """The ranking without the responses that are too long, ranks counted anew; None when too little is left."""
        limit = self.config.ranked_response_length
        tokens = [self._response(response) for response in record.responses]
        kept = [k for k, count in enumerate(tokens) if self._fits("ranked response", count, limit)]
        ranks = [record.ranks[k] for k in kept]
        if len(set(ranks)) < 2:
            self.left_out["ranking without two responses left that differ in rank"] += 1
            return None
        row = self._prompt(record.prompt) + sum(tokens[k] for k in kept)
        if not (self.prompt(record.prompt) and self._fits("ranking", row, self.config.ranking_length)):
            return None
        # People's ranks may have gaps, where a reply was deleted or is left out here.
        order = sorted(set(ranks))
        return structs.replace(
            record, responses=tuple(record.responses[k] for k in kept), ranks=tuple(order.index(r) for r in ranks)
        )


def hh_rlhf(config: ConfigDict, folder: Path) -> dict:
    """HH-RLHF pairs and OpenAssistant rankings, cut into parts by conversation, and running English.

    Rankings, demonstrations and prompts never share a conversation. Writes ``data_report.txt`` too: what was read, what
    was left out and why. Where `config.data_dir` holds HH-RLHF alone, a line says which files are not written; without
    `config.subsets` there is OpenAssistant alone.
    """
    parts = _Parts(config)
    where = config.data_dir or None
    everything: dict[str, Any] = {"split": "train", "test_fraction": 0.0}
    oasst, text_dir, skipped = _beside_hh(where, config.subsets)
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
    lengths = Lengths(config)
    files = _preference_files(config, parts, lengths, _named([*groups, *pairs]),
                              _named([*replies, *sources.best_responses(pairs)]))  # fmt: skip
    if text_dir:
        documents, of_documents = sources.read_english(where)
        reports.append(of_documents)
        files["corpus"], files["corpus_held_out"] = _text(documents, config)
    _require_records(files)
    counts = _write(folder, {name: records for name, records in files.items() if records})
    sizes = collections.Counter(len(r.responses) for r in files["rankings"])
    # Readers name the split they were asked for; the parts here are others.
    lines = [dataclasses.replace(report, noted={}).summary() for report in reports] + skipped
    lines += [f"left out: {reason}: {count}" for reason, count in sorted(lengths.left_out.items())]
    lines += ["rankings by number of responses: " + ", ".join(f"{k}: {n}" for k, n in sorted(sizes.items()))]
    lines += [f"{name}.jsonl: {count}" for name, count in counts.items()]
    _report(folder, [*lines, "", *look.lines(files, config, reports), _tables(files, lengths.count, _identifier())])
    return counts


def _beside_hh(where: str | None, subsets: Sequence[str]) -> tuple[bool, bool, list[str]]:
    """Whether OpenAssistant and running text are to be had, and a line for each that is not.

    A download has both. A folder may hold HH-RLHF alone: nothing is fetched then that was not asked for.
    """
    if where is None:
        return True, True, []
    root = Path(where)
    oasst = any(next(root.glob(name), None) for name in ("oasst*", *OASST_FILES))
    # The rows of HH-RLHF and OpenAssistant are no text: where their files lie in the folder itself, text has its own.
    theirs = [f for name in (*OASST_FILES, *(f"{s}.*" for s in subsets)) for f in root.glob(name)]
    names = (*sources.TEXT_FOLDERS, *(() if theirs else TEXT_FILES))
    text = any(next(root.glob(name), None) for name in names)
    skipped = []
    if not oasst:
        skipped += [f"skipped: no folder oasst* in {root}: no OpenAssistant rankings, no rankings_held_out_oasst.jsonl"]
    if not text:
        folders = " or ".join(sources.TEXT_FOLDERS)
        skipped += [
            f"skipped: no folder {folders} in {root}: no corpus.jsonl and no corpus_held_out.jsonl, which the stages "
            "with a pretraining mix and the evaluation on text read"
        ]
    return oasst, text, skipped


def _preference_files(
    config: ConfigDict, parts: _Parts, lengths: Lengths, rankings: list[schema.Ranking],
    demonstrations: list[schema.Demonstration],
) -> dict[str, Any]:  # fmt: skip
    """The records of each file but the text."""
    prompts = _distinct(schema.Prompt(r.prompt, id=r.id, source=r.source) for r in rankings)

    def prompts_of(part: str, count: int) -> list[schema.Prompt]:
        return parts.take(prompts, (part,), count, lambda p: p if lengths.prompt(p.prompt) else None)

    def demonstrations_of(part: str, count: int) -> list[schema.Demonstration]:
        keep = lambda d: d if lengths.demonstration(d) else None  # noqa: E731
        return parts.take(_distinct(demonstrations), (part,), count, keep)

    files: dict[str, Any] = {
        "prompts_test": prompts_of("test", config.test_prompts),
        "prompts_validation": prompts_of("validation", config.validation_prompts),
        "demonstrations": demonstrations_of("demonstrations", config.demonstrations),
        "demonstrations_validation": demonstrations_of("validation", config.validation_prompts),
        "prompts_ppo": prompts_of("ppo", config.ppo_prompts),
        "rankings": parts.take(rankings, ("ranking",), config.ranking_prompts, lengths.ranking),
    }
    for name in ("hh_rlhf", "oasst"):
        these = [r for r in rankings if str(r.source).startswith(name)]
        held_out = parts.take(these, ("validation", "test"), config.held_out_rankings, lengths.ranking)
        files[f"rankings_held_out_{name}"] = held_out
    return files


class _Parts:
    """Conversations by part: each lies at a place in [0, 1) and the parts' shares cut that line."""

    def __init__(self, config: ConfigDict):
        self.seed, shares = config.seed, config.shares
        total = sum(shares.values())
        checks.require(abs(total - 1) < 1e-6, "shares", shares.to_dict(), f"add up to {total:g}: make it 1")
        self.ranges, start = {}, 0.0
        for name, share in shares.items():
            self.ranges[name] = (start, start + share)
            start += share

    def take(self, records: Iterable[Any], parts: Sequence[str], count: int, keep: Callable[[Any], Any]) -> list[Any]:
        """At most `count` of the records of `parts` that `keep` returns, in an order that the seed decides."""

        def here(record: Any) -> bool:
            place = sources.conversation_place(record.prompt)
            return any(low <= place < high for low, high in (self.ranges[part] for part in parts))

        # OpenAssistant's come first, because there are few of them and they compare more than two responses.
        order = sorted(
            (r for r in records if here(r)),
            key=lambda r: (not str(r.source).startswith("oasst"), _shuffled(self.seed, r.prompt, r.id)),
        )
        taken: list[Any] = []
        for record in order:
            if len(taken) == count:
                break
            kept = keep(record)
            taken += [] if kept is None else [kept]
        return taken


def _require_records(files: dict[str, Any]) -> None:
    """Refuses an empty file of those that a stage cannot do without; a source may have no held-out rankings."""
    for name, records in files.items():
        if not records and not name.startswith("rankings_held_out"):
            raise ValueError(
                f"no record is left for {name}.jsonl: raise prompt_length, response_length or ranked_response_length, "
                "or the part's share"
            )


def _shuffled(seed: int, *parts: str | None) -> bytes:
    return hashlib.sha256("\0".join([str(seed), *map(str, parts)]).encode()).digest()


def _named(records: Sequence[Any]) -> list[Any]:
    """The records with ids that are not given twice: the source and the place in it."""
    return [structs.replace(r, id=f"{r.source}-{place}") for place, r in enumerate(records)]


def _distinct(records: Iterable[Any]) -> list[Any]:
    """The first record of each prompt."""
    return list({r.prompt: r for r in reversed(list(records))}.values())[::-1]


def _unique_ids(records: Sequence[Any]) -> list[Any]:
    """The records; of those that came with one id from several files, all but the first get a number behind it."""
    seen: collections.Counter[str] = collections.Counter()
    result = []
    for record in records:
        seen[record.id] += 1
        count = seen[record.id]
        result.append(record if count == 1 else structs.replace(record, id=f"{record.id}/{count}"))
    return result


def _text(documents: Sequence[schema.PlainText], config: ConfigDict) -> tuple[list, list]:
    """Pieces of some paragraphs for the pretraining mix, and held-out ones from other documents.

    The last document by hash is held out; where there is only one, its last fifth.
    """
    order = sorted(documents, key=lambda d: _shuffled(config.seed, d.source))
    pieces = [_pieces(d, config.document_characters) for d in order]
    if len(pieces) == 1:
        cut = len(pieces[0]) - max(1, len(pieces[0]) // 5)
        pieces = [pieces[0][:cut], pieces[0][cut:]]
    mix = sorted((p for part in pieces[:-1] for p in part), key=lambda p: _shuffled(config.seed, p.text))
    return mix[: config.documents], pieces[-1][: config.held_out_documents]


def _pieces(document: schema.PlainText, size: int) -> list[schema.PlainText]:
    """A document cut between paragraphs into pieces of about `size` characters."""
    texts = [""]
    for paragraph in filter(None, map(str.strip, document.text.replace("\r\n", "\n").split("\n\n"))):
        if len(texts[-1]) >= size:
            texts.append("")
        texts[-1] += "\n\n" * bool(texts[-1]) + paragraph
    name = document.source
    return [schema.PlainText(text, id=f"{name}-{place}", source=name) for place, text in enumerate(texts)]


def _report(folder: Path, lines: Sequence[str], *, before: Sequence[str] = ()) -> None:
    """Writes data_report.txt and prints it; the lines `before` were printed already."""
    text = "\n".join(lines).rstrip("\n") + "\n"
    with written(folder / "data_report.txt") as file:
        file.write("".join(f"{line}\n" for line in before) + text)
    if _SHOW.get():
        print(text, end="", flush=True)
    else:
        print(f"The data are described in {folder / 'data_report.txt'}", flush=True)


def _tables(
    files: dict[str, Any], tokens: Callable[[str], int] | None, identify: Callable[[str], str] | None = None
) -> str:
    """The tables of the files, whose names say their split, and how many prompts are trained on and held out too."""
    splits: dict[str, list[Any]] = {"train": [], "validation": [], "test": [], "held out": []}
    for name, records in files.items():
        split = name.rpartition("_")[2] if name.endswith(("_validation", "_test")) else "train"
        splits["held out" if "held_out" in name else split] += records
    held_out = [record for split, records in splits.items() if split != "train" for record in records]
    leaks = len(curation.leakage({"train": splits["train"], "held out": held_out}))
    tables = curation.data_tables({k: v for k, v in splits.items() if v}, tokens=tokens, identify=identify)
    return f"Held-out records whose prompt or first human turn is in a training file: {leaks}\n\n{tables}"


def _identifier() -> Callable[[str], str] | None:
    try:
        return curation.default_identifier()
    except ValueError:  # the tables then say nothing of languages
        return None


# -------------------------------------------------------------------------------------------------------- own files

OWN_FILES: dict[str, type] = {
    "demonstrations": schema.Demonstration,
    "rankings": schema.Ranking,
    "prompts": schema.Prompt,
    "corpus": schema.PlainText,
}
SPLITS = ("train", "validation", "test")


def own_files(config: ConfigDict, folder: Path) -> dict:
    """A user's own files, cleaned and split. Writes ``data_report.txt``: bad rows, what was left out, the tables.

    In this order: rows are read strictly, near-duplicate prompts left out, users capped, records split by user (or
    organization, or conversation), the splits checked for leaks, personal data taken out of the training split, and
    what is too long left out.
    """
    _check_cleaning(config)
    checks.require(
        bool(config.demonstrations or config.rankings or config.prompts), "prompts", config.prompts,
        "name a file, or one of demonstrations or rankings: --config.prompts=FILE",
    )  # fmt: skip
    reports: list[schema.DataReport] = []
    sets = _read_own(config, reports)
    fractions = {name: config.fractions[name] for name in SPLITS}
    files, lengths = _cleaned(config, sets, fractions, reports)
    _require_records(files)
    counts = _write(folder, {name: records for name, records in files.items() if records})
    _report(folder, _lines(config, reports, lengths, files, counts))
    return counts


def convert(config: ConfigDict, folder: Path) -> dict:
    """A file in another tool's form as the files that the stages read. Writes ``data_report.txt`` too.

    What was read as what is said first. A file of a few conversations is not split: nothing is held out then.
    """
    _check_cleaning(config)
    checks.require(bool(config.data), "data", config.data, "name the file to convert: --data=FILE")
    reading = sources.read_form(
        config.data, config.form, columns=_columns(config.columns), split=config.split or None,
        max_bad_fraction=config.max_bad_fraction, language=config.language,
    )  # fmt: skip
    said = [f"{config.data}: {reading.said}"]
    print(said[0], flush=True)
    reports = [reading.report]
    sets = {name: _with_ids(name, records) for name, records in reading.records.items()}
    fractions = {name: config.fractions[name] for name in SPLITS}
    conversations = {sources.conversation_place(r.prompt) for s in sets.values() for r in s if hasattr(r, "prompt")}
    if len(conversations) < config.least_conversations and "corpus" not in sets:
        fractions = {"train": 1.0, "validation": 0.0, "test": 0.0}
        said.append(
            f"nothing is held out: {len(conversations)} conversations are fewer than "
            f"least_conversations={config.least_conversations}"
        )
    files, lengths = _cleaned(config, sets, fractions, reports)
    files = {name: records for name, records in files.items() if records}
    if not any(name in files for name in (*OWN_FILES, "prompts_ppo")):
        raise ValueError(f"no record of {config.data} is left to train on: {reading.report.summary()}")
    counts = _write(folder, files)
    _report(folder, [*said[1:], *_lines(config, reports, lengths, files, counts)], before=said[:1])
    return counts


def _columns(text: str) -> dict[str, str]:
    """The flag ``--columns wanted=name,..`` as a mapping.

    >>> _columns("prompt=question, tools=")
    {'prompt': 'question', 'tools': ''}
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    bad = next((wanted for wanted, equals, _ in pairs if not equals or not wanted.strip()), None)
    checks.require(bad is None, "columns", text, "write wanted=name,..: --columns prompt=question,system=system")
    return {wanted.strip(): have.strip() for wanted, _, have in pairs}


def _cleaned(
    config: ConfigDict, sets: dict[str, list[Any]], fractions: dict[str, float], reports: list[schema.DataReport]
) -> tuple[dict[str, Any], Lengths | None]:
    """The stages' files of records, cleaned and split as the config says, and what was too long."""
    sets = _deduplicated(sets, config.prefix_length, reports)
    if config.per_user:
        for name, records in sets.items():
            sets[name], report = curation.cap_per_user(records, config.per_user, key=config.key)
            reports.append(dataclasses.replace(report, source=f"cap per {config.key}, {name}"))
    parts = {
        name: curation.split_by(records, key=config.key, fractions=fractions, seed=config.seed)
        for name, records in sets.items()
    }
    _without_leaks(parts, config.leaks, reports)
    if config.pii_hook:
        hook = config_lib.resolve(config.pii_hook)
        for name, part in parts.items():
            advice = f"see what pii_hook={config.pii_hook} does with it, or stop with Ctrl-C and take the row out"
            with told_when_slow(advice) as begin:
                on_row = lambda place, r, name=name: begin(f"pii_hook: record {place} of {name} (id {r.id})")  # noqa: E731
                part["train"], report = curation.scrub(part["train"], hook, on_row=on_row)
            reports.append(dataclasses.replace(report, source=f"personal data, training {name}"))
    lengths = Lengths(config) if config.model else None
    if lengths is not None:
        parts = {k: {split: lengths.fitting(r) for split, r in part.items()} for k, part in parts.items()}
    return _stage_files(parts, config.ranking_share, config.seed), lengths


def _lines(
    config: ConfigDict, reports: Sequence[schema.DataReport], lengths: Lengths | None, files: Mapping[str, Any],
    counts: Mapping[str, int],
) -> list[str]:  # fmt: skip
    """The report of a user's own data."""
    lines = [report.summary() for report in reports if report.rows]
    lines += [f"left out: {reason}: {n}" for reason, n in sorted(lengths.left_out.items())] if lengths else []
    lines += [f"{name}.jsonl: {count}" for name, count in counts.items()]
    tables = _tables(dict(files), lengths.count if lengths else None, _identifier())
    return [*lines, "", *look.lines(files, config, reports), tables]


def _with_ids(name: str, records: Iterable[Any]) -> list[Any]:
    """The records, those without an id named by their place."""
    return [r if r.id else structs.replace(r, id=f"{name}-{place}") for place, r in enumerate(records)]


def _check_cleaning(config: ConfigDict) -> None:
    checks.require_one_of("key", config.key, ("user", "organization", "conversation"))
    checks.require_one_of("leaks", config.leaks, ("error", "drop"))
    checks.require_range("prefix_length", config.prefix_length, low=0)
    checks.require_range("per_user", config.per_user, low=0)
    checks.require_range("ranking_share", config.ranking_share, low=0.0, high=1.0)


def _read_own(config: ConfigDict, reports: list[schema.DataReport]) -> dict[str, list[Any]]:
    """The records of each file that is given; each record has an id afterwards."""
    sets: dict[str, list[Any]] = {}
    for name, kind in OWN_FILES.items():
        if not config[name]:
            continue
        records, report = schema.read_jsonl(
            config[name], kind, max_bad_fraction=config.max_bad_fraction, special_tokens=templated.pattern()
        )
        reports.append(report)
        sets[name] = _with_ids(name, records)
    named = {
        key: sum(bool(getattr(r, key, None)) for s in sets.values() for r in s) for key in ("user", "organization")
    }
    if config.key in named and not named[config.key]:
        other = next((key for key, count in named.items() if count), "")
        if other:
            raise ValueError(
                f"key={config.key!r}: no record names one, but {named[other]} name a field {other!r}: "
                f"split by it with --config.key={other}"
            )
        reports.append(schema.DataReport(f"no record has a field {config.key!r}: split by conversation", 1, 1))
    return sets


def _deduplicated(
    sets: dict[str, list[Any]], prefix_length: int, reports: list[schema.DataReport]
) -> dict[str, list[Any]]:
    """Only one of the prompts that begin alike, over all files. Further labels of that very prompt stay.

    A prompt without a label that comes twice in its file is left out, a document too.
    """
    if not prefix_length:
        return sets
    normal = lambda record: curation.normalise(curation.prompt_text(record))  # noqa: E731
    first: dict[str, Any] = {}
    for name, records in sets.items():
        for record in records if name != "corpus" else ():
            first.setdefault(normal(record), record)
    kept, report = curation.drop_long_common_prefix(first.values(), prefix_length=prefix_length)
    reports.append(dataclasses.replace(report, source="different prompts of all files"))
    texts = set(map(normal, kept))
    result = {}
    for name, records in sets.items():
        if name != "corpus":
            records = [record for record in records if normal(record) in texts]
        if name in ("prompts", "corpus"):  # compared whole
            records, report = curation.drop_long_common_prefix(records, prefix_length=sys.maxsize)
            reports.append(dataclasses.replace(report, source=f"repeats in {name}"))
        result[name] = records
    return result


def _without_leaks(parts: dict[str, dict[str, list[Any]]], leaks: str, reports: list[schema.DataReport]) -> None:
    """Refuses prompts that are in two splits, or takes them out of the split that is nearer to training; in place."""

    def of(split: str) -> list[Any]:
        return [record for part in parts.values() for record in part[split]]

    if leaks == "drop":
        for split, held_out in (("validation", of("test")), ("train", [*of("test"), *of("validation")])):
            for name, part in parts.items():
                part[split], report = curation.without_leaks(part[split], held_out)
                reports.append(dataclasses.replace(report, source=f"leaks from held-out splits, {split} {name}"))
    try:
        curation.check_leakage({split: of(split) for split in SPLITS})
    except ValueError as error:
        raise ValueError(
            f"{error}\nLeave such records out of training with --config.leaks=drop, or split by conversation with "
            "--config.key=conversation"
        ) from None


def _stage_files(parts: dict[str, dict[str, list[Any]]], ranking_share: float, seed: int) -> dict[str, Any]:
    """The files that the stages read, as far as there are records for them."""
    demonstrations, rankings, prompts, corpus = (parts.get(name) for name in OWN_FILES)

    def prompts_of(split: str, *of: dict[str, list[Any]] | None) -> list[schema.Prompt]:
        records = [record for part in of if part for record in part[split]]
        return _unique_ids(
            _distinct(schema.Prompt(**{name: getattr(r, name) for name in schema.Prompt.__struct_fields__})
            for r in records)
        )  # fmt: skip

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
    train = prompts_of("train", prompts) if prompts else prompts_of("train", rankings or demonstrations)
    if not rankings:
        order = sorted(train, key=lambda p: _shuffled(seed, curation.prompt_text(p)))
        cut = round(ranking_share * len(order))
        files["prompts_ranking"], train = order[:cut], order[cut:]
    files["prompts_ppo"] = train
    if corpus:
        files["corpus"], files["corpus_held_out"] = corpus["train"], [*corpus["validation"], *corpus["test"]]
    return files


# ------------------------------------------------------------------------------------------------ pretrained models


def pretrained(config: ConfigDict, folder: Path) -> dict:
    """Fetches and converts a model, and asks it one question: a wrong rotary base or a lost permutation shows here.

    Raises:
      ValueError: the model is not known, cannot be fetched, or its greedy answer does not hold `config.answer`.
    """
    path = networks.model_folder(config.model)
    network = networks.load_network(config.model, devices.start((1, -1, 1)), {"unroll": 1})
    ids = encode_opening(network.tokenizer, config.question)
    prompt = prompt_batch([ids], length=len(ids))
    said = generate(
        network.model, network.params, prompt, jax.random.key(0), max_new_tokens=config.max_new_tokens,
        temperature=0.0, stop_ids=stop_ids(network.tokenizer, [config.question]),
    )  # fmt: skip
    answer = network.tokenizer.decode(said.tokens[0, len(ids) : int(said.lengths[0])])
    if config.answer not in answer:
        raise ValueError(f"{path} continues {config.question!r} with {answer!r}: delete the folder and run again")
    result = {"model": config.model, "folder": str(path), "question": config.question, "answer": answer}
    write_json(folder / "model.json", result)
    print(f"{config.model} is in {path}\n{config.question}{answer}", flush=True)
    return result


SOURCES: dict[str, Callable[[ConfigDict, Path], dict]] = {
    "storyland": storyland,
    "hh_rlhf": hh_rlhf,
    "jsonl": own_files,
    "convert": convert,
    "pretrained": pretrained,
    "look": lambda config, folder: {"records": look.look(config)},
}


def dry_run(config: ConfigDict) -> None:
    """Looks at a file (``--look``); the other sources have no dry run."""
    checks.require(config.source == "look", "--dry_run", True, "only --look=FILE writes nothing: leave --dry_run out")
    look.look(config)


# --------------------------------------------------------------------------------------------------- command line


FORM_NAMES = {"hh_rlhf": "hh", "own": "jsonl", "ultrafeedback": "rated", "messages": "openai", "trl_pairs": "trl"}
"""Other names under which people know a form."""


def expand(argv: Sequence[str]) -> list[str]:
    """The short flags written out.

    >>> expand(["--source=hh_rlhf", "--data_dir", "d"])
    ['--config=configs/data/hh_rlhf.py', '--config.data_dir=d']
    >>> expand(["--model=smollm2"])
    ['--config=configs/data/pretrained.py', '--workdir=runs/smollm2', '--config.model=smollm2']
    >>> expand(["--source=alpaca", "--data=f.json", "--columns", "prompt=question"])[:2]
    ['--config=configs/data/convert.py', '--config.form=alpaca']
    >>> expand(["--look=rows.jsonl", "--preview"])
    ['--config=configs/data/look.py', '--dry_run', '--config.data=rows.jsonl', '--config.preview=terminal']

    Raises:
      ValueError: ``--source`` names none, or one that there is not.
    """
    short = {
        "--source": "--config",
        "--out": "--workdir",
        "--data_dir": "--config.data_dir",
        "--model": "--config.model",
        "--data": "--config.data",
        "--columns": "--config.columns",
        "--preview": "--config.preview",
        "--look": "--config.data",
    }
    converts = any(flag.partition("=")[0] == "--data" for flag in argv)
    full, rest = [], list(argv)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if flag == "--preview" and not equals:
            equals, value = "=", look.TERMINAL
        if flag == "--look":  # without a run folder, as a dry run is
            full += ["--config=configs/data/look.py", "--dry_run"]
            equals, value = "=", value if equals or not rest else rest.pop(0)
        if flag in short and not equals and rest:
            equals, value = "=", rest.pop(0)
        if flag == "--source":
            _check_source(value, converts)
        if flag == "--source" and _is_form(value, converts):
            full += ["--config=configs/data/convert.py", f"--config.form={FORM_NAMES.get(value, value)}"]
            continue
        value = f"configs/data/{value}.py" if flag == "--source" else value
        full.append(short.get(flag, flag) + equals + value)
    named = any(flag.startswith("--config=") or flag == "--config" for flag in full)
    model = next((flag.partition("=")[2] for flag in full if flag.startswith("--config.model=")), "")
    if converts and not named:
        full = ["--config=configs/data/convert.py", *full]
    elif model and not named:
        workdir = [] if any(flag.startswith("--workdir") for flag in full) else [f"--workdir=runs/{model}"]
        full = ["--config=configs/data/pretrained.py", *workdir, *full]
    return full


def main(argv: Sequence[str]) -> None:
    """The command line; a source that there is not is refused as any other mistake is."""
    try:
        full = expand(argv)
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    cli.main(
        run, config="configs/data/storyland.py", workdir="runs/data", argv=full,
        one_process="Run it once; its files are then read by all processes.", dry_run=dry_run,
    )  # fmt: skip


def _check_source(name: str, converts: bool) -> None:
    """Refuses a source that is neither a form nor a config of its own; an argument may follow it (``NAME:ARG``)."""
    own = Path(__file__).resolve().parents[1] / "configs" / "data"
    config = f"{name.partition(':')[0]}.py"
    if converts or name in sources.FORMS or Path("configs/data", config).is_file() or (own / config).is_file():
        return
    known = sorted({*sources.FORMS, *(path.stem for path in own.glob("[a-z]*.py"))} - {"convert", "look"})
    checks.require_one_of("--source", name, known)


def _is_form(name: str, converts: bool) -> bool:
    """Whether ``--source=NAME`` names a form of a file, and not a config of its own."""
    return converts or (name in sources.FORMS and not Path(f"configs/data/{name}.py").is_file())


if __name__ == "__main__":
    main(sys.argv[1:])
