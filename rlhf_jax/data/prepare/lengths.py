"""Keeps the records that fit the stages' lengths, in tokens of a model."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

from msgspec import structs

from rlhf_jax.data import schema
from rlhf_jax.data.text import encode_prompt, encode_response


class Lengths:
    """Filters records by their length in tokens, template endings included.

    `left_out` counts what does not fit, by reason.
    """

    def __init__(self, config: Any, tokenizer: Any):
        self.config, self.tokenizer = config, tokenizer
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
        """The number of tokens of a text as a prompt."""
        return self._prompt(text)

    def fitting(self, records: Iterable[Any]) -> list[Any]:
        """The records that fit.

        Rankings lose the responses that do not fit. Documents are kept: they are cut elsewhere.
        """
        keep = {
            schema.Demonstration: self.demonstration,
            schema.Prompt: lambda r: self.prompt(r.prompt),
        }
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
        """Whether prompt and response fit."""
        response = self._response(record.response)
        # `and` stops at the first text that does not fit, so a record is counted once.
        return self._fits("demonstration", response, self.config.response_length) and self.prompt(
            record.prompt
        )

    def ranking(self, record: schema.Ranking) -> schema.Ranking | None:
        """The ranking without its too long responses, ranked anew.

        It is None when fewer than two different ranks are left, or the rest is still too long.
        """
        limit = self.config.ranked_response_length
        tokens = [self._response(response) for response in record.responses]
        # Each response that is too long is counted, whether or not its ranking is kept.
        kept = [k for k, count in enumerate(tokens) if self._fits("ranked response", count, limit)]
        ranks = [record.ranks[k] for k in kept]
        # Equal ranks alone hold no pair to learn from.
        if len(set(ranks)) < 2:
            self.left_out["ranking without two responses left that differ in rank"] += 1
            return None
        # All responses of a ranking share one row with their prompt (`text.ranking_rows`).
        row = self._prompt(record.prompt) + sum(tokens[k] for k in kept)
        if not (
            self.prompt(record.prompt) and self._fits("ranking", row, self.config.ranking_length)
        ):
            return None
        # The ranks may have gaps, where a reply was deleted in the source or dropped above.
        order = sorted(set(ranks))
        return structs.replace(
            record,
            responses=tuple(record.responses[k] for k in kept),
            ranks=tuple(order.index(r) for r in ranks),
        )
