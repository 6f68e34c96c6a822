r"""Writes the JSONL files that the stages read: demonstrations, prompts, rankings, plain text; fetches models by name.

Run:

    python experiments/prepare_data.py --config=configs/data/storyland.py --workdir=runs/data
    python experiments/prepare_data.py --source=hh_rlhf --data_dir=DIR --out=runs/hh_data
    python experiments/prepare_data.py --model=smollm2

``--source=NAME`` is short for ``--config=configs/data/NAME.py``, ``--out`` for ``--workdir``, ``--data_dir`` and
``--model`` for the keys of that name; ``--model`` alone fetches the model and asks it one question.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments import common
from rlhf_jax import config as config_lib
from rlhf_jax.checkpoint import write_json
from rlhf_jax.data import schema, sources
from rlhf_jax.data.storyland import documents, labelers, task, task_id
from rlhf_jax.data.text import encode_prompt, encode_response, load_tokenizer, prompt_batch
from rlhf_jax.generate import generate

FIRST_INDEX = {"demonstrations": 0, "ranking": 1_000_000, "ppo": 2_000_000}
"""Where each training set begins in the endless stream of training instructions, so that no two share a prompt."""
HELD_OUT_TEXT_SEED = 1
OASST_FILES = ("rankings.jsonl.gz", "demonstrations.jsonl.gz", "*tree*.jsonl.gz")
TEXT_FILES = ("*.txt", "*.txt.gz", "*.jsonl", "*.jsonl.gz")
PTX_FIRST_DOCUMENT = 1_000_000
"""The pretraining mix comes from a part of the corpus stream that the base models have not seen."""


def run(config: ConfigDict, workdir: str) -> dict:
    """Writes the files of `config.source` into `workdir` and returns how many records each holds."""
    config_lib.require_one_of("source", config.source, tuple(SOURCES))
    return SOURCES[config.source](config, Path(workdir))


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
    return _write(folder, files)


def _write(folder: Path, files: dict[str, Iterable[Any]]) -> dict[str, int]:
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
        self.tokenizer: Any = load_tokenizer(common.model_folder(config.model))
        self.left_out: collections.Counter[str] = collections.Counter()

    def _fits(self, what: str, tokens: int, limit: int) -> bool:
        if tokens > limit:
            self.left_out[f"{what} longer than {limit} tokens"] += 1
        return tokens <= limit

    def _prompt(self, prompt: str) -> int:
        return len(encode_prompt(self.tokenizer, prompt))

    def _response(self, response: str) -> int:
        return len(encode_response(self.tokenizer, response, eos_id=self.tokenizer.eos_token_id))

    def prompt(self, prompt: str) -> bool:
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
        return dataclasses.replace(
            record, responses=tuple(record.responses[k] for k in kept), ranks=tuple(order.index(r) for r in ranks)
        )


def hh_rlhf(config: ConfigDict, folder: Path) -> dict:
    """HH-RLHF pairs and OpenAssistant rankings, cut into parts by conversation, and running English.

    Rankings, demonstrations and prompts never share a conversation. Writes ``data_report.txt`` too: what was read, what
    was left out and why. Where `config.data_dir` holds HH-RLHF alone, a line says which files are not written.
    """
    parts = _Parts(config)
    where = config.data_dir or None
    everything: dict[str, Any] = {"split": "train", "test_fraction": 0.0}
    pairs, of_pairs = sources.read_hh(where, **everything, subsets=config.subsets)
    oasst, text_dir, skipped = _beside_hh(where, config.subsets)
    reports = [of_pairs]
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
    _report(folder / "data_report.txt", reports, lengths.left_out, counts, files["rankings"], skipped)
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
        config_lib.require(abs(total - 1) < 1e-6, "shares", shares.to_dict(), f"add up to {total:g}: make it 1")
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
    return [dataclasses.replace(r, id=f"{r.source}-{place}") for place, r in enumerate(records)]


def _distinct(records: Iterable[Any]) -> list[Any]:
    """The first record of each prompt."""
    return list({r.prompt: r for r in reversed(list(records))}.values())[::-1]


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


def _report(
    path: Path, reports: Sequence[schema.DataReport], left_out: collections.Counter[str], counts: dict[str, int],
    rankings: Iterable[schema.Ranking], skipped: Sequence[str],
) -> None:  # fmt: skip
    sizes = collections.Counter(len(r.responses) for r in rankings)
    # Readers name the split they were asked for; the parts here are others.
    lines = [dataclasses.replace(report, noted={}).summary() for report in reports]
    lines += skipped
    lines += [f"left out: {reason}: {count}" for reason, count in sorted(left_out.items())]
    lines += ["rankings by number of responses: " + ", ".join(f"{k}: {n}" for k, n in sorted(sizes.items()))]
    lines += [f"{name}.jsonl: {count}" for name, count in counts.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(*lines, sep="\n", flush=True)


# ------------------------------------------------------------------------------------------------ pretrained models


def pretrained(config: ConfigDict, folder: Path) -> dict:
    """Fetches and converts a model, and asks it one question: a wrong rotary base or a lost permutation shows here.

    Raises:
      ValueError: the model is not known, cannot be fetched, or its greedy answer does not hold `config.answer`.
    """
    path = common.model_folder(config.model)
    network = common.load_network(config.model, common.start((1, -1, 1)), {"unroll": 1})
    ids = network.tokenizer.encode(config.question)
    prompt = prompt_batch([ids], length=len(ids))
    said = generate(
        network.model, network.params, prompt, jax.random.key(0), max_new_tokens=config.max_new_tokens,
        temperature=0.0, stop_ids=(network.tokenizer.eos_token_id,),
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
    "pretrained": pretrained,
}


# --------------------------------------------------------------------------------------------------- command line


def expand(argv: Sequence[str]) -> list[str]:
    """The short flags written out.

    >>> expand(["--source=hh_rlhf", "--data_dir", "d"])
    ['--config=configs/data/hh_rlhf.py', '--config.data_dir=d']
    >>> expand(["--model=smollm2"])
    ['--config=configs/data/pretrained.py', '--workdir=runs/smollm2', '--config.model=smollm2']
    """
    short = {
        "--source": "--config",
        "--out": "--workdir",
        "--data_dir": "--config.data_dir",
        "--model": "--config.model",
    }
    full, rest = [], list(argv)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if flag in short and not equals and rest:
            equals, value = "=", rest.pop(0)
        value = f"configs/data/{value}.py" if flag == "--source" else value
        full.append(short.get(flag, flag) + equals + value)
    model = next((flag.partition("=")[2] for flag in full if flag.startswith("--config.model=")), "")
    if model and not any(flag.startswith("--config=") or flag == "--config" for flag in full):
        workdir = [] if any(flag.startswith("--workdir") for flag in full) else [f"--workdir=runs/{model}"]
        full = ["--config=configs/data/pretrained.py", *workdir, *full]
    return full


if __name__ == "__main__":
    config_lib.main(run, config="configs/data/storyland.py", workdir="runs/data", argv=expand(sys.argv[1:]))
