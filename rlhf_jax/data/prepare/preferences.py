"""The files of human preferences: HH-RLHF pairs, OpenAssistant rankings, and running text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data import schema, sources
from rlhf_jax.data.prepare.lengths import Lengths
from rlhf_jax.data.prepare.parts import Parts, distinct, shuffled

OASST_FILES = ("rankings.jsonl.gz", "demonstrations.jsonl.gz", "*tree*.jsonl.gz")
TEXT_FILES = ("*.txt", "*.txt.gz", "*.jsonl", "*.jsonl.gz")


def entries(config: Any) -> list[Path]:
    """The files and folders of `config.data_dir` that the source `hh_rlhf` may read."""
    root, named = Path(config.data_dir), ("hh_rlhf", "hh-rlhf", "oasst*", *sources.TEXT_FOLDERS)
    patterns = (
        *named,
        *OASST_FILES,
        *TEXT_FILES,
        *(f"{subset}*" for subset in config.get("subsets", ())),
    )
    return sorted({entry for pattern in patterns for entry in root.glob(pattern)})


def beside_hh(where: str | None, subsets: Sequence[str]) -> tuple[bool, bool, list[str]]:
    """Whether OpenAssistant and running text are available, and a line for each that is not.

    A download has both. A folder may contain HH-RLHF alone; what it lacks is then skipped and not
    downloaded.
    """
    if where is None:
        return True, True, []
    root = Path(where)
    oasst = any(next(root.glob(name), None) for name in ("oasst*", *OASST_FILES))
    # Rows of HH-RLHF and OpenAssistant are not running text. Where their files are at the top of
    # the folder, text is looked for in its own subfolders only.
    theirs = [f for name in (*OASST_FILES, *(f"{s}.*" for s in subsets)) for f in root.glob(name)]
    names = (*sources.TEXT_FOLDERS, *(() if theirs else TEXT_FILES))
    text = any(next(root.glob(name), None) for name in names)
    skipped = []
    if not oasst:
        skipped += [
            f"skipped: no folder oasst* in {root}: no OpenAssistant rankings, no "
            "rankings_held_out_oasst.jsonl"
        ]
    if not text:
        folders = " or ".join(sources.TEXT_FOLDERS)
        skipped += [
            f"skipped: no folder {folders} in {root}: no corpus.jsonl and no "
            "corpus_held_out.jsonl, which the stages with a pretraining mix and the evaluation on "
            "text read"
        ]
    return oasst, text, skipped


def preference_files(
    config: Any, parts: Parts, lengths: Lengths, rankings: list[schema.Ranking],
    demonstrations: list[schema.Demonstration],
) -> dict[str, Any]:  # fmt: skip
    """The records of each file, running text aside."""
    # Several rankings may share a prompt, which is asked once.
    prompts = distinct(schema.Prompt(r.prompt, id=r.id, source=r.source) for r in rankings)

    def prompts_of(part: str, count: int) -> list[schema.Prompt]:
        return parts.take(
            prompts, (part,), count, lambda p: p if lengths.prompt(p.prompt) else None
        )

    def demonstrations_of(part: str, count: int) -> list[schema.Demonstration]:
        keep = lambda d: d if lengths.demonstration(d) else None
        return parts.take(distinct(demonstrations), (part,), count, keep)

    files: dict[str, Any] = {
        "prompts_test": prompts_of("test", config.test_prompts),
        "prompts_validation": prompts_of("validation", config.validation_prompts),
        "demonstrations": demonstrations_of("demonstrations", config.demonstrations),
        "demonstrations_validation": demonstrations_of("validation", config.validation_prompts),
        "prompts_ppo": prompts_of("ppo", config.ppo_prompts),
        "rankings": parts.take(rankings, ("ranking",), config.ranking_prompts, lengths.ranking),
    }
    # One file per source, so that the accuracy on each is reported apart.
    for name in ("hh_rlhf", "oasst"):
        these = [r for r in rankings if str(r.source).startswith(name)]
        held_out = parts.take(
            these, ("validation", "test"), config.held_out_rankings, lengths.ranking
        )
        files[f"rankings_held_out_{name}"] = held_out
    return files


def text_files(documents: Sequence[schema.PlainText], config: Any) -> tuple[list, list]:
    """Pieces of a few paragraphs for the pretraining mix, and held-out pieces of other documents.

    The document with the largest hash is held out; of a single document, its last fifth.
    """
    order = sorted(documents, key=lambda d: shuffled(config.seed, d.source))
    pieces = [_pieces(d, config.document_characters) for d in order]
    # The only document cannot be held out as a whole.
    if len(pieces) == 1:
        cut = len(pieces[0]) - max(1, len(pieces[0]) // 5)
        pieces = [pieces[0][:cut], pieces[0][cut:]]
    # Pieces of all documents are mixed, so that a limit takes some of each.
    mix = sorted(
        (p for part in pieces[:-1] for p in part), key=lambda p: shuffled(config.seed, p.text)
    )
    return mix[: config.documents], pieces[-1][: config.held_out_documents]


def _pieces(document: schema.PlainText, size: int) -> list[schema.PlainText]:
    """A document cut between paragraphs into pieces of about `size` characters."""
    texts = [""]
    for paragraph in filter(
        None, map(str.strip, document.text.replace("\r\n", "\n").split("\n\n"))
    ):
        # Cut between paragraphs only, so a piece may be longer than `size`.
        if len(texts[-1]) >= size:
            texts.append("")
        texts[-1] += "\n\n" * bool(texts[-1]) + paragraph
    name = document.source
    return [
        schema.PlainText(text, id=f"{name}-{place}", source=name)
        for place, text in enumerate(texts)
    ]
