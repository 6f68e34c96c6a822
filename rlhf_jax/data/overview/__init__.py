"""An overview of a data set before training: what a model would learn by mistake.

A reward model learns whatever distinguishes the preferred answer from the other: often its length,
sometimes a space at its end. A fine-tuned model learns to repeat the question where the answers
repeat it. `look` counts such artefacts in linear time, `summary` formats them as one table with a
sentence for each suspicious number, and `headline` as one line.
"""

from rlhf_jax.data.overview.numbers import (
    AnswerNumbers,
    Look,
    PairNumbers,
    Prompts,
    Spread,
    answer_numbers,
    look,
    pair_numbers,
    prompt_numbers,
)
from rlhf_jax.data.overview.sentences import judgements
from rlhf_jax.data.overview.table import LINES, WIDTH, headline, summary

__all__ = [
    "LINES",
    "WIDTH",
    "AnswerNumbers",
    "Look",
    "PairNumbers",
    "Prompts",
    "Spread",
    "answer_numbers",
    "headline",
    "judgements",
    "look",
    "pair_numbers",
    "prompt_numbers",
    "summary",
]
