"""TensorFlow Datasets builders that need no TensorFlow, and the reader of what they build.

The data sets are array_record files.

    counts, report = build("hh_rlhf", "runs/tfds", data_dir="data")
    pairs = read("hh_rlhf", "runs/tfds", "train")       # pairs[7] is a schema.Ranking

The classes are ordinary `tfds.core.GeneratorBasedBuilder`s, and `tfds.data_source` reads their
files without this package too. Rows keep the order of the source. The builders are not registered
with tfds, where a second import of this module would be an error, so
`tfds.builder("hh_rlhf", data_dir=...)` opens a data set that was built and cannot build one.
"""

from __future__ import annotations

import abc
import dataclasses
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rlhf_jax.data import schema, sources
from rlhf_jax.data.schema import DataReport
from rlhf_jax.data.sources.hub import first_line

# Where TFDS is missing, the import of tfds_records names the extra to install.
from rlhf_jax.data.tfds_records import TfdsRecords, digest_of, digests_of, features, row_of, tfds

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def build(
    name: str,
    out_dir: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> tuple[dict[str, int], DataReport]:
    """Build a data set into ``out_dir/name/1.0.0`` and verify it by reading it back.

    A second call with the same source changes nothing.

    Args:
      name: one of `BUILDERS`.
      out_dir: root folder of the TFDS data sets.
      data_dir: folder with the original files; None = download, for public data sets.
      **options: of the builder, such as ``files``, ``test_fraction`` or ``subsets``.

    Returns:
      The number of records per split, and the report on the rows of the source.

    Raises:
      ValueError: unknown name, nothing to read, a bad row, no network, or other records in
        `out_dir` under this name.
    """
    builder = _class(name)(source=data_dir, data_dir=os.fspath(out_dir), **options)
    # Read before anything is built, so that a bad row leaves no half-built data set.
    splits, report = builder.read_source()
    # TFDS skips a folder that is already prepared, whatever it was prepared from.
    if builder.is_prepared() and dict(builder.info.metadata or {}).get("sha256") != digests_of(
        splits
    ):
        raise ValueError(
            f"{builder.data_path} was built from other records: remove that folder, or pass "
            f"another than {out_dir}"
        )
    # TFDS creates its download folder even though nothing is downloaded through it.
    with tempfile.TemporaryDirectory() as unused:
        builder.download_and_prepare(download_dir=unused)
    # Read back in full: a disk that ran full or a format change shows here and not in training.
    for split, wanted in digests_of(splits).items():
        if digest_of(read(name, out_dir, split)) != wanted:
            raise ValueError(
                f"{builder.data_path}: split {split} reads back differently: remove it and build "
                "again"
            )
    return {split: len(records) for split, records in splits.items()}, report


def read(name: str, out_dir: str | os.PathLike[str], split: str = "train") -> TfdsRecords:
    """The records of a split that `build` wrote, with random access.

    Args:
      name: one of `BUILDERS`.
      out_dir: as given to `build`.
      split: its name, or a slice in the notation of TFDS: ``"train[:90%]"``.

    Raises:
      ValueError: nothing was built there, or it has no such split.
    """
    kind, folder = _class(name).kind, Path(out_dir) / name / str(_class(name).VERSION)
    if not (folder / "dataset_info.json").is_file():
        raise ValueError(
            f"no {name} in {out_dir}: build it first, with build({name!r}, {os.fspath(out_dir)!r})"
        )
    try:
        builder: Any = tfds.builder_from_directory(folder)
        splits = list(builder.info.splits)
    except Exception as error:  # a damaged dataset_info.json may raise anything
        raise ValueError(f"{folder} is damaged ({error!r}): remove it and build again") from None
    if split.split("[")[0] not in splits:
        raise ValueError(f"split={split!r} of {folder}: choose one of {', '.join(splits)}")
    try:
        source = builder.as_data_source(split)
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"split={split!r} of {folder} cannot be opened ({why}): build it again"
        ) from None
    return TfdsRecords(source, kind)


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of all builders: records of one kind, in the order of the source.

    `source` is a folder with the files; None downloads them.
    """

    VERSION = tfds.core.Version("1.0.0")
    kind: ClassVar[type]
    about: ClassVar[dict[str, str]]
    # TFDS looks beside the code for checksums of what it downloads. There are none, and its search
    # needs a package that 4.9.10 does not install (tensorflow/datasets#11212).
    code_path: ClassVar[None] = None

    def __init__(
        self,
        *,
        source: str | os.PathLike[str] | None = None,
        file_format: str = "array_record",
        **kwargs: Any,
    ):
        self.source = source
        self._metadata = tfds.core.MetadataDict()
        self._splits: tuple[dict[str, list[Any]], DataReport] | None = None
        super().__init__(file_format=file_format, **kwargs)

    @abc.abstractmethod
    def _read_source(self) -> tuple[dict[str, list[Any]], DataReport]:
        """The records of each split."""

    def read_source(self) -> tuple[dict[str, list[Any]], DataReport]:
        """The records of each split that has any, and the report; the source is read once."""
        if self._splits is None:
            splits, report = self._read_source()
            self._splits = {name: records for name, records in splits.items() if records}, report
        return self._splits

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=features(self.kind),
            disable_shuffling=True,  # rows keep the order of the source
            metadata=self._metadata,
            description=self.about["description"],
            homepage=self.about["homepage"],
            license=self.about["license"],
            citation=self.about["citation"],
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # the hub's client has its own cache
        splits, report = self.read_source()
        counts = {
            "rows": report.rows,
            "kept": report.kept,
            "dropped": report.dropped,
            "noted": report.noted,
        }
        # Set while the splits are made, which is before TFDS writes the info of the data set.
        self._metadata.update(sha256=digests_of(splits), report=counts)
        return {name: self._generate_examples(records) for name, records in splits.items()}

    def _generate_examples(self, records: Sequence[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        for place, item in enumerate(records):
            yield place, row_of(item)


class _JsonLines(_Builder, skip_registration=True):
    """The user's own record files, in the form of `schema`.

    Args:
      source: a folder. ``BASE.jsonl`` is the train split, ``BASE_test.jsonl`` the test split, and
        so on for any name after BASE; without such files ``train.jsonl``, ``validation.jsonl`` and
        ``test.jsonl``. Each may end in ``.gz``.
      files: split -> file or files, instead of the names above; relative to `source` when that is
        given.
      max_bad_fraction: as in `schema.read_jsonl`.
      allow_empty_responses: as in `schema.read_jsonl`.
    """

    base: ClassVar[str]

    def __init__(
        self,
        *,
        files: Mapping[str, Paths] | None = None,
        max_bad_fraction: float = 0.0,
        allow_empty_responses: bool = False,
        **kwargs: Any,
    ):
        self.files = files
        self.reading = {
            "max_bad_fraction": max_bad_fraction,
            "allow_empty_responses": allow_empty_responses,
        }
        super().__init__(**kwargs)

    def _read_source(self) -> tuple[dict[str, list[Any]], DataReport]:
        splits, total = {}, None
        for split, paths in self._paths().items():
            splits[split] = []
            for path in paths:
                records, report = schema.read_jsonl(path, self.kind, **self.reading)
                splits[split] += records
                total = report if total is None else total + report
        assert total is not None  # _paths raises when it finds nothing
        return splits, total

    def _paths(self) -> dict[str, list[Path]]:
        if self.files is not None:
            return _given_paths(self.files, self.source)
        if self.source is None:
            raise ValueError(
                f"{self.name} is no public data set and cannot be downloaded: pass data_dir "
                f"(--data_dir=FOLDER) with {self.base}.jsonl and {self.base}_test.jsonl"
            )
        root = Path(self.source)
        if not root.is_dir():
            raise ValueError(f"data_dir={root} is no folder: check the path")
        found = _paths_by_split(root, self.base)
        if not found:
            raise ValueError(
                f"no {self.base}*.jsonl and no train.jsonl in {root}: name them so, or pass files="
            )
        return found


def _given_paths(
    files: Mapping[str, Paths], root: str | os.PathLike[str] | None
) -> dict[str, list[Path]]:
    if not files:
        raise ValueError('files is empty: name the files of each split, like {"train": "a.jsonl"}')
    listed = {
        split: [paths] if isinstance(paths, str | os.PathLike) else paths
        for split, paths in files.items()
    }
    return {split: [Path(root or "") / path for path in paths] for split, paths in listed.items()}


_SPLIT_NAMES = {
    "": "train",
    "ppo": "train",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


_PLAIN_NAMES = ("train", "validation", "valid", "val", "dev", "test")


def _paths_by_split(root: Path, base: str) -> dict[str, list[Path]]:
    r"""``BASE.jsonl`` -> train, ``BASE_NAME.jsonl`` -> NAME.

    Where no file has the base name, ``train.jsonl`` and so on.
    """
    names = {file: re.sub(r"\.jsonl(\.gz)?$", "", file.name) for file in sorted(root.iterdir())}
    tables = {file: name for file, name in names.items() if name != file.name}
    matches = {file: re.fullmatch(rf"{base}(?:[_.-](.+))?", name) for file, name in tables.items()}
    own = {file: match[1] or "" for file, match in matches.items() if match}
    plain = {file: name for file, name in tables.items() if name in _PLAIN_NAMES}
    found: dict[str, list[Path]] = {}
    # Plain names do not say what kind of record they hold, so they count only without a base name.
    for file, suffix in (own or plain).items():
        found.setdefault(_SPLIT_NAMES.get(suffix, re.sub(r"\W", "_", suffix)), []).append(file)
    twice = [files for files in found.values() if len(files) > 1]
    if twice:
        raise ValueError(
            f"{', '.join(map(str, twice[0]))} are all one split: keep one, or pass files="
        )
    return found


_OUYANG = {
    "homepage": "https://arxiv.org/abs/2203.02155",
    "citation": "Long Ouyang et al. Training language models to follow instructions with human "
    "feedback. 2022. arXiv:2203.02155",
}


_OWN = "The owner of the files decides; nothing is downloaded."


class InstructGptSft(_JsonLines, skip_registration=True):
    """Demonstrations by labelers: ``demonstrations*.jsonl``."""

    name = "instruct_gpt_sft"
    kind = schema.Demonstration
    base = "demonstrations"
    about: ClassVar = {
        "description": "Prompts with the answer a labeler wrote (supervised fine-tuning), from "
        "your own JSON lines.",
        "license": _OWN,
        **_OUYANG,
    }


class InstructGptRm(_JsonLines, skip_registration=True):
    """Rankings of K responses by labelers: ``rankings*.jsonl``."""

    name = "instruct_gpt_rm"
    kind = schema.Ranking
    base = "rankings"
    about: ClassVar = {
        "description": "K responses to a prompt with a labeler's ranks (reward model), from your "
        "own JSON lines. Rank 0 is the best, equal ranks tie, -1 is not ranked.",
        "license": _OWN,
        **_OUYANG,
    }


class InstructGptPpo(_JsonLines, skip_registration=True):
    """Prompts without answers: ``prompts*.jsonl``.

    ``prompts_ppo.jsonl`` is the train split as well.
    """

    name = "instruct_gpt_ppo"
    kind = schema.Prompt
    base = "prompts"
    about: ClassVar = {
        "description": "Prompts without answers (PPO), from your own JSON lines.",
        "license": _OWN,
        **_OUYANG,
    }


class _Conversations(_Builder, skip_registration=True):
    """Rankings, split into train and test by conversation.

    Args:
      source: a folder, None = download.
      test_fraction: share of the conversations in the test split.
    """

    kind = schema.Ranking

    def __init__(self, *, test_fraction: float = 0.1, **kwargs: Any):
        if not 0 <= test_fraction <= 1:
            raise ValueError(f"test_fraction={test_fraction} must be between 0 and 1")
        self.test_fraction = test_fraction
        super().__init__(**kwargs)

    @abc.abstractmethod
    def _rankings(self) -> tuple[list[schema.Ranking], DataReport]:
        """The rankings of all splits."""

    def _read_source(self) -> tuple[dict[str, list[Any]], DataReport]:
        records, report = self._rankings()
        splits: dict[str, list[Any]] = {"train": [], "test": []}
        for item in records:
            splits[
                "test"
                if sources.in_test_split(item.prompt, fraction=self.test_fraction)
                else "train"
            ].append(item)
        noted = {f"records in the {split} split": len(items) for split, items in splits.items()}
        return splits, dataclasses.replace(report, noted=noted)


class HhRlhf(_Conversations, skip_registration=True):
    """The pairs of `sources.read_hh`; `subsets` as there."""

    name = "hh_rlhf"
    about: ClassVar = {
        "description": "Pairs of assistant replies with a crowdworker's preference: helpfulness "
        "and harmlessness. Some of it is offensive on purpose.",
        "homepage": "https://github.com/anthropics/hh-rlhf",
        "license": "MIT, Copyright (c) 2022 Anthropic",
        "citation": "Yuntao Bai et al. Training a Helpful and Harmless Assistant with "
        "Reinforcement Learning from Human Feedback. 2022. arXiv:2204.05862",
    }

    def __init__(self, *, subsets: Sequence[str] = sources.HH_SUBSETS, **kwargs: Any):
        self.subsets = subsets
        super().__init__(**kwargs)

    def _rankings(self) -> tuple[list[schema.Ranking], DataReport]:
        # All rows as one split, which `_read_source` divides by its own fraction.
        return sources.read_hh(self.source, split="train", test_fraction=0.0, subsets=self.subsets)


class OasstRankings(_Conversations, skip_registration=True):
    """The rankings of `sources.read_oasst`; `language` as there."""

    name = "oasst_rankings"
    about: ClassVar = {
        "description": "Replies to one context with the ranks that volunteers gave them.",
        "homepage": "https://huggingface.co/datasets/OpenAssistant/oasst1",
        "license": "Apache-2.0",
        "citation": "Andreas Koepf et al. OpenAssistant Conversations: Democratizing Large "
        "Language Model Alignment. 2023. arXiv:2304.07327",
    }

    def __init__(self, *, language: str = "en", **kwargs: Any):
        self.language = language
        super().__init__(**kwargs)

    def _rankings(self) -> tuple[list[schema.Ranking], DataReport]:
        return sources.read_oasst(
            self.source, split="train", test_fraction=0.0, language=self.language
        )


class PlainText(_Builder, skip_registration=True):
    """Documents of running text for the pretraining mix, as `sources.read_text` reads them.

    There is one split, train.

    Args:
      source: a folder of text files (or with a folder english_text or wikitext2); None = download
        WikiText-2.
      files: split -> file or folder or several, instead; relative to `source` when that is given.
      separator: as in `sources.read_text`.
    """

    name = "plain_text"
    kind = schema.PlainText
    about: ClassVar = {
        "description": "Documents of running text.",
        "homepage": "https://arxiv.org/abs/1609.07843",
        "license": "WikiText-2 (the download): CC BY-SA 3.0. Of other files the owner decides.",
        "citation": "WikiText-2: Stephen Merity et al. Pointer Sentinel Mixture Models. 2016. "
        "arXiv:1609.07843",
    }

    def __init__(
        self,
        *,
        files: Mapping[str, Paths] | None = None,
        separator: str | None = None,
        **kwargs: Any,
    ):
        self.files = files
        self.separator = separator
        super().__init__(**kwargs)

    def _read_source(self) -> tuple[dict[str, list[Any]], DataReport]:
        if self.files is None:
            records, report = sources.read_english(self.source, separator=self.separator)
            return {"train": records}, report
        splits, total = {}, None
        for split, paths in _given_paths(self.files, self.source).items():
            splits[split] = []
            for path in paths:
                records, report = sources.read_text(path, separator=self.separator)
                splits[split] += records
                total = report if total is None else total + report
        assert total is not None  # files names at least one
        return splits, total


BUILDERS: Mapping[str, type[_Builder]] = {
    builder.name: builder
    for builder in (InstructGptSft, InstructGptRm, InstructGptPpo, HhRlhf, OasstRankings, PlainText)
}
"""The builders by name."""


def _class(name: str) -> type[_Builder]:
    if name not in BUILDERS:
        raise ValueError(f"{name!r} is no builder: choose one of {', '.join(BUILDERS)}")
    return BUILDERS[name]
