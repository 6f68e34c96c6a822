"""Rankings of a file: as token ids, which of them fit a row, and the scores of their responses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict

from rlhf_jax import scoring
from rlhf_jax.data import schema, text
from rlhf_jax.evaluation.held_out_rankings import Scores
from rlhf_jax.run import checks, contexts, datasets, inputs
from rlhf_jax.run import responses as responses_lib
from rlhf_jax.run.networks import Network, model_folder


def read_rankings(path: str, tokenizer: Any = None) -> list[schema.Ranking]:
    """Reads the rankings of a JSONL file.

    Raises:
      ValueError: the file contains none.
    """
    rankings = datasets.read_records(path, schema.Ranking, tokenizer, allow_empty_responses=True)
    if not rankings:
        raise ValueError(f"{path} holds no rankings: check how it was made")
    return rankings


def encode_ranking(
    tokenizer: Any, ranking: schema.Ranking
) -> tuple[list[int], list[list[int]], tuple[int, ...]]:
    """A ranking as token ids, each response with the token that ends it."""
    responses = [
        text.encode_answer(tokenizer, ranking.prompt, response) for response in ranking.responses
    ]
    return text.encode_prompt(tokenizer, ranking.prompt), responses, ranking.ranks


def fitting(
    encoded: Sequence[text.RankedIds], config: ConfigDict, context: int
) -> tuple[list[text.RankedIds], list[int]]:
    """The rankings that fit a row and the model's `context`, and their indices.

    The others raise an error or are dropped, depending on `config.too_long`.

    Raises:
      ValueError: one does not fit and `config.too_long` is "error", or none does.
    """
    checks.require_one_of("too_long", config.too_long, inputs.ONE_OF["too_long"])
    whole = [tokens([ranking])["tokens"] for ranking in encoded]
    text_lengths = [len(prompt) + max(map(len, responses)) for prompt, responses, _ in encoded]
    # A row contains all responses, while the context limits the prompt with a single one.
    pairs = enumerate(zip(whole, text_lengths, strict=True))
    places = [i for i, (size, longest) in pairs if size <= config.row_length and longest <= context]
    if (config.too_long == "error" and len(places) < len(encoded)) or not places:
        raise ValueError(
            f"{len(encoded) - len(places)} of {len(encoded)} rankings do not fit: the largest "
            f"takes {max(whole)} tokens and row_length={config.row_length}, the longest text "
            f"{max(text_lengths)} and the model's context is {context}: raise row_length, shorten "
            "the data, or leave them out with too_long=drop"
        )
    return [encoded[i] for i in places], places


def held_out(network: Network, path: str, config: ConfigDict) -> tuple[list[schema.Ranking], int]:
    """Rankings for evaluation, and how many were left out because they do not fit a row.

    None is left out unless ``too_long="drop"``.
    """
    rankings = read_rankings(path)
    if config.too_long == "error":
        return rankings, 0
    encoded = [encode_ranking(network.tokenizer, r) for r in rankings]
    _, places = fitting(encoded, config, network.model.config.context_length)
    return [rankings[i] for i in places], len(rankings) - len(places)


def check_evaluation(base: Network, config: ConfigDict) -> None:
    """Raises before training if an evaluation ranking exceeds the model's context.

    With ``too_long="drop"`` such rankings are dropped later instead.

    Raises:
      ValueError: a prompt with one of its responses is longer than the context.
    """
    if config.too_long != "error":
        return
    context = contexts.of_network(base, model_folder(config.model))
    for path in filter(None, dict(config.evaluation).values()):
        rankings = read_rankings(path)
        encoded = [encode_ranking(base.tokenizer, r) for r in rankings]
        sizes = [len(prompt) + max(map(len, responses)) for prompt, responses, _ in encoded]
        contexts.check(context, sizes, contexts.record_of(path, len(rankings)))


def tokens(encoded: Sequence[text.RankedIds]) -> dict[str, int]:
    """Tokens of one pass over rankings whose responses share a row with their prompt.

    The second entry is what one row per response would cost.
    """
    responses = sum(len(ids) for _, each, _ in encoded for ids in each)
    return {
        "tokens": responses + sum(len(prompt) for prompt, _, _ in encoded),
        "tokens_in_separate_rows": responses
        + sum(len(prompt) * len(each) for prompt, each, _ in encoded),
    }


def distinct_responses(
    tokenizer: Any, rankings: Sequence[schema.Ranking], config: ConfigDict
) -> tuple[list[list[tuple[schema.Conversation, str]]], list[text.RankedIds]]:
    """The distinct responses to each prompt, in groups that fit a row: texts and token ids."""
    asked: dict[schema.Conversation, dict[str, None]] = {}
    for ranking in rankings:
        asked.setdefault(ranking.prompt, {}).update(dict.fromkeys(ranking.responses))
    names: list[list[tuple[schema.Conversation, str]]] = []
    items: list[text.RankedIds] = []
    for prompt, responses in asked.items():
        prompt_ids, encoded, _ = encode_ranking(
            tokenizer, schema.Ranking(prompt, tuple(responses), ())
        )
        sizes = [len(ids) for ids in encoded]
        # A response that exceeds the row on its own still gets a group of its own.
        room = max([config.row_length - len(prompt_ids), *sizes])
        # Responses that share a row share the computation of its prompt.
        for group in text.best_fit(sizes, capacity=room, max_items=config.max_k):
            names.append([(prompt, list(responses)[i]) for i in group])
            # Placeholders: a rank of -1 would leave a response out, and scores depend on no other
            # rank.
            items.append((prompt_ids, [encoded[i] for i in group], [0] * len(group)))
    return names, items


def scores(
    network: Network, rankings: Sequence[schema.Ranking], config: ConfigDict,
    mesh: jax.sharding.Mesh,
) -> Scores:  # fmt: skip
    """The score of each distinct response, even if several labelers ranked it.

    The responses to a prompt share a row.
    """
    names, items = distinct_responses(network.tokenizer, rankings, config)
    if not items:
        return {}
    sizes = [len(prompt) + max(map(len, responses)) for prompt, responses, _ in items]
    asked = [group[0][0] for group in names]
    # The longest response of each row is checked before any batch runs.
    contexts.check(
        contexts.of_network(network), sizes, contexts.prompt_of("scoring, with a response", asked)
    )
    # Held-out rankings may be longer than the training rows; one width serves all of them.
    longest = max(sizes)
    length = max(config.row_length, longest)
    # `ranking_rows` packs in the same way, so this gives the place of each item in its rows.
    places = text.best_fit([len(p) + sum(map(len, each)) for p, each, _ in items], capacity=length)
    rows = text.ranking_rows(items, length=length, max_k=config.max_k)
    scored = responses_lib.in_batches(
        partial(_ranking_scores, network.model, network.params), rows, config.batch_size, mesh,
        "held-out",
    )  # fmt: skip
    return {
        name: float(scored[row, place, k])
        for row, inside in enumerate(places)
        for place, item in enumerate(inside)
        for k, name in enumerate(names[item])
    }


# At module level, so that all calls share the compiled programs.
_ranking_scores = jax.jit(scoring.ranking_scores, static_argnums=0)
