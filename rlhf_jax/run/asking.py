"""How a model is asked a prompt: the instruction alone, or after a few worked examples."""

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
"""Prompts to token ids, and the slots of a prompt row."""


def bare_prompts(network: Network, prompts: Sequence[schema.Prompt]) -> tuple[list[list[int]], int]:
    """The instruction itself, as the policy sees it in training."""
    ids = [text.encode_prompt(network.tokenizer, p.prompt) for p in prompts]
    return ids, -(-max(map(len, ids)) // 16) * 16  # few lengths, few compiled programs


def few_shot_asks(config: ConfigDict) -> list[Ask]:
    """Prefixes of worked examples drawn from the demonstrations, `few_shot.candidates` of them."""
    shots = config.few_shot
    records = datasets.read_records(shots.demonstrations, schema.Demonstration)
    rng = np.random.default_rng(config.seed)
    asks: list[Ask] = []
    for _ in range(shots.candidates):
        chosen = [records[i] for i in rng.choice(len(records), shots.examples, replace=False)]
        asks.append(
            _with_prefix([(chat.readable(r.prompt), r.response) for r in chosen], shots.template)
        )
    return asks


def in_slots(ask: Ask, slots: int) -> Ask:
    """`ask` with rows of so many slots."""
    return lambda network, prompts: (ask(network, prompts)[0], slots)


def _with_prefix(examples: Sequence[tuple[str, str]], template: str) -> Ask:
    def ask(network: Network, prompts: Sequence[schema.Prompt]) -> tuple[list[list[int]], int]:
        shown = "\n\n".join(template.format(prompt=p, response=r) for p, r in examples) + "\n\n"
        texts = [
            shown + template.format(prompt=chat.readable(p.prompt), response="").rstrip()
            for p in prompts
        ]
        ids = [text.encode_opening(network.tokenizer, t) for t in texts]
        return ids, -(-max(map(len, ids)) // 16) * 16

    return ask


@functools.cache
def tokens_that_start(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Tokens whose text begins with `text`: where the prompted base model has said its answer and
    goes on.
    """
    return tuple(i for i in range(len(tokenizer)) if tokenizer.decode([i]).startswith(text))
