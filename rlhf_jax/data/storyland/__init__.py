"""Storyland, the embedded world: a small subset of English in which the truth is known.

`task` gives instructions, `document` the pretraining corpus, `labelers` simulated people, and
`gold` the score that represents true human preferences. Everything is a pure function of seeds and
indices.
"""

from rlhf_jax.data.storyland.answers import answer, flawed_answer
from rlhf_jax.data.storyland.corpus import document, documents
from rlhf_jax.data.storyland.gold import PARTS, Gold, gold
from rlhf_jax.data.storyland.labelers import Labeler, labelers
from rlhf_jax.data.storyland.tasks import (
    SPLITS,
    Task,
    split_of,
    task,
    task_id,
    task_of,
)

__all__ = [
    "PARTS",
    "SPLITS",
    "Gold",
    "Labeler",
    "Task",
    "answer",
    "document",
    "documents",
    "flawed_answer",
    "gold",
    "labelers",
    "split_of",
    "task",
    "task_id",
    "task_of",
]
