"""The files of the embedded world: prompts of each split, demonstrations and corpus text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_jax.data import schema
from rlhf_jax.data.storyland import documents, labelers, task, task_id

FIRST_INDEX = {"demonstrations": 0, "ranking": 1_000_000, "ppo": 2_000_000}
"""Where each training set begins in the endless stream of training instructions, so that no two
share a prompt."""
HELD_OUT_TEXT_SEED = 1
PTX_FIRST_DOCUMENT = 1_000_000
"""The pretraining mix comes from a part of the corpus stream that the base models have not seen."""


def files(config: Any) -> dict[str, list[Any]]:
    """The records of each file, as many as the config asks for (`configs.storyland.data`)."""
    writers = labelers("train", config.labelers)
    # Shared by the training sets, so that no prompt is in two of them. The generators of `made` run
    # one after the other, when `list` consumes them.
    seen: set[str] = set()
    made = {
        "prompts_test": _prompts("test", config.test_prompts, 0, set()),
        "prompts_validation": _prompts("validation", config.validation_prompts, 0, set()),
        "demonstrations": _demonstrations("train", config.demonstrations, writers, seen),
        "demonstrations_validation": _demonstrations(
            "validation", config.validation_prompts, writers, set()
        ),
        "prompts_ranking": _prompts("train", config.ranking_prompts, FIRST_INDEX["ranking"], seen),
        "prompts_ppo": _prompts("train", config.ppo_prompts, FIRST_INDEX["ppo"], seen),
        # Seed 0 is the stream of the base models' own corpus, continued beyond their last document.
        "corpus": _corpus(PTX_FIRST_DOCUMENT, config.documents, seed=0),
        "corpus_held_out": _corpus(0, config.held_out_documents, seed=HELD_OUT_TEXT_SEED),
    }
    return {name: list(records) for name, records in made.items()}


def _prompts(split: str, count: int, first: int, seen: set[str]) -> Iterator[schema.Prompt]:
    index = first
    while count:
        asked = task(split, index)
        if asked.prompt not in seen:
            seen.add(asked.prompt)
            count -= 1
            yield schema.Prompt(
                asked.prompt, id=task_id(split, index), source="storyland", use_case=asked.use_case
            )
        index += 1


def _demonstrations(
    split: str, count: int, writers: list, seen: set[str]
) -> Iterator[schema.Demonstration]:
    # Skipped repeats leave gaps in the indices, so the task is found by the prompt's id.
    for place, prompt in enumerate(_prompts(split, count, FIRST_INDEX["demonstrations"], seen)):
        # In turn, so that each labeler writes equally many.
        writer = writers[place % len(writers)]
        asked = task(split, int(str(prompt.id).split("/")[1]))
        yield schema.Demonstration(
            prompt.prompt, writer.demonstrate(asked, place=prompt.id),
            id=prompt.id, source="storyland", use_case=asked.use_case, labeler=writer.name,
        )  # fmt: skip


def _corpus(first: int, count: int, *, seed: int) -> Iterator[schema.PlainText]:
    for index, text in enumerate(documents(first, first + count, seed=seed), start=first):
        yield schema.PlainText(text, id=f"{seed}/{index}", source="storyland")
