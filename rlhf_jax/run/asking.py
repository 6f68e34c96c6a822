"""Forms of a prompt: the instruction alone, or the instruction after a few worked examples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.data import chat, schema, text
from rlhf_jax.run import datasets
from rlhf_jax.run.networks import Network

Ask = Callable[[Network, Sequence[schema.Prompt]], tuple[list[list[int]], int]]
"""Maps prompts to their token ids and to the number of slots of a prompt row."""


def bare_prompts(network: Network, prompts: Sequence[schema.Prompt]) -> tuple[list[list[int]], int]:
    """The instruction itself, as the policy sees it in training."""
    ids = [text.encode_prompt(network.tokenizer, p.prompt) for p in prompts]
    # Rounded up to a multiple of 16: each row length is compiled as a program of its own.
    return ids, -(-max(map(len, ids)) // 16) * 16


def few_shot_asks(config: ConfigDict) -> list[Ask]:
    """Draws `few_shot.candidates` prefixes of worked examples from the demonstrations."""
    shots = config.few_shot
    records = datasets.read_records(shots.demonstrations, schema.Demonstration)
    rng = np.random.default_rng(config.seed)
    asks: list[Ask] = []
    for _ in range(shots.candidates):
        # Without replacement, so that a prefix never shows the same example twice.
        chosen = [records[i] for i in rng.choice(len(records), shots.examples, replace=False)]
        asks.append(
            _with_prefix([(chat.readable(r.prompt), r.response) for r in chosen], shots.template)
        )
    return asks


def in_slots(ask: Ask, slots: int) -> Ask:
    """`ask` with prompt rows of a fixed number of slots."""
    return lambda network, prompts: (ask(network, prompts)[0], slots)


def _with_prefix(examples: Sequence[tuple[str, str]], template: str) -> Ask:
    def ask(network: Network, prompts: Sequence[schema.Prompt]) -> tuple[list[list[int]], int]:
        shown = "\n\n".join(template.format(prompt=p, response=r) for p, r in examples) + "\n\n"
        # The trailing space is cut off, because tokenizers join it to the word that follows.
        texts = [
            shown + template.format(prompt=chat.readable(p.prompt), response="").rstrip()
            for p in prompts
        ]
        ids = [text.encode_opening(network.tokenizer, t) for t in texts]
        return ids, -(-max(map(len, ids)) // 16) * 16

    return ask


@functools.cache
def tokens_that_start(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Ids of the tokens whose text begins with `text`.

    Such a token marks where a prompted base model has finished its answer and begins something
    new. Cached, because the whole vocabulary is decoded.
    """
    return tuple(i for i in range(len(tokenizer)) if tokenizer.decode([i]).startswith(text))
