r"""Trains the reward model on rankings: all pairs of a prompt in one batch element, one epoch, demonstrations at 0.

Run:

    python experiments/reward_model.py --config=configs/reward_model/storyland.py --workdir=runs/reward_model \
        --config.model=runs/sft/epoch-3 --config.rankings=runs/samples/rankings.jsonl \
        --config.demonstrations=runs/data/demonstrations.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from rlhf_jax import config as config_lib
from rlhf_jax import sharding
from rlhf_jax.checkpoint import write_json
from rlhf_jax.data import schema, text
from rlhf_jax.data.loader import Batches
from rlhf_jax.evaluation import reward_model as quality
from rlhf_jax.models.heads import scalar_from_language_model, scalar_model
from rlhf_jax.steps import compile_step, make_reward_step, train_state


def run(config: ConfigDict, workdir: str) -> dict:
    """Writes ``model/`` (a sequence classifier of one label) and ``reward_model.json``."""
    mesh = common.start(config.mesh)
    base = common.load_network(config.model, mesh, config.decoder)
    rankings = read_rankings(config.rankings)
    rows = text.ranking_rows(
        [encode_ranking(base.tokenizer, r) for r in rankings],
        length=config.row_length, max_k=config.max_k, max_n=config.prompts_per_row,
    )  # fmt: skip
    batches = Batches(rows, batch_size=config.batch_size, seed=config.seed)
    steps = batches.steps(config.epochs)
    rate = common.schedule(config.schedule, config.learning_rate, steps)
    tx = common.optimizer(config, rate, clip_norm=config.clip_norm)
    model = scalar_model(base.model.config)
    params = scalar_from_language_model(base.params, jax.random.key(config.seed))
    loss = config_lib.resolve(config.loss, available=("rewards", "ranks"))
    state = common.train_resumable(
        compile_step(make_reward_step(model, tx, loss=loss, microbatches=config.microbatches)),
        sharding.place_state(train_state(params, tx), mesh),
        batches, mesh, workdir=workdir, stage="reward_model", steps=steps, save_every=config.save_every,
        seed=config.seed, show=("reward/loss", "reward/accuracy"),
    )  # fmt: skip
    network = center(common.Network(model, state.params, base.tokenizer), config, mesh)
    common.save_network(Path(workdir) / "model", network)
    result: dict[str, Any] = {"model": str(Path(workdir) / "model"), "steps": steps, "prompts": len(rankings)}
    result["padding_share"] = text.padding_share(rows)
    result["responses"] = sum(len(r.responses) for r in rankings)
    result["pairs"] = sum(schema.strict_pairs(r.ranks) for r in rankings)
    sets = {name: read_rankings(path) for name, path in config.evaluation.items() if path}
    scores = score_each(network, [r for rankings in sets.values() for r in rankings], config, mesh)
    result |= {name: evaluate(rankings, scores) for name, rankings in sets.items()}
    write_json(Path(workdir) / "reward_model.json", result)
    return result


def read_rankings(path: str) -> list[schema.Ranking]:
    """Rankings of a JSONL file.

    Raises:
      ValueError: there is none.
    """
    rankings, _ = schema.read_jsonl(path, schema.Ranking, allow_empty_responses=True)
    if not rankings:
        raise ValueError(f"{path} holds no rankings: check how it was made")
    return rankings


def encode_ranking(tokenizer: Any, ranking: schema.Ranking) -> tuple[list[int], list[list[int]], tuple[int, ...]]:
    """A ranking as token ids, each response with the token that ends it."""
    responses = [text.encode_answer(tokenizer, ranking.prompt, response) for response in ranking.responses]
    return text.encode_prompt(tokenizer, ranking.prompt), responses, ranking.ranks


def center(network: common.Network, config: ConfigDict, mesh: jax.sharding.Mesh) -> common.Network:
    """The reward model with its bias set so that the labelers' demonstrations score 0 on average.

    Source: Ouyang et al. 2022, section 3.5.
    """
    records, _ = schema.read_jsonl(config.demonstrations, schema.Demonstration)
    records = records[: config.bias_demonstrations]
    scores = common.score_responses(
        network, [r.prompt for r in records], [r.response for r in records], mesh, batch_size=config.score_batch_size
    )
    head = network.params["score"]
    bias = head["bias"] + quality.demonstration_bias(scores)
    return network._replace(params={**network.params, "score": {**head, "bias": bias}})


Scores = dict[tuple[schema.Conversation, str], float]
"""Score of each (prompt, response)."""


def score_each(
    network: common.Network, rankings: Sequence[schema.Ranking], config: ConfigDict, mesh: jax.sharding.Mesh
) -> Scores:
    """The score of each response, once, however many labelers ranked it."""
    pairs = list(dict.fromkeys((r.prompt, response) for r in rankings for response in r.responses))
    scores = common.score_responses(
        network, [p for p, _ in pairs], [r for _, r in pairs], mesh, batch_size=config.score_batch_size
    )
    return dict(zip(pairs, scores.tolist(), strict=True))


def evaluate(rankings: Sequence[schema.Ranking], scores: Scores) -> dict:
    """Accuracy on strict pairs with its interval, log-loss, calibration and the rule "longer is better" beside it."""
    grid, ranks, lengths = pad_ranked(rankings, scores)
    accuracy = quality.pairwise_accuracy(grid, ranks)
    calibration = quality.calibration(grid, ranks)
    return {
        "accuracy": accuracy._asdict(),
        "log_loss": quality.pairwise_log_loss(grid, ranks),
        "length_only_accuracy": quality.length_only_accuracy(lengths, ranks).value,
        "calibration": {k: np.asarray(v).tolist() for k, v in calibration._asdict().items()},
        "prompts": len(rankings),
    }


def pad_ranked(rankings: Sequence[schema.Ranking], scores: Scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, ranks and lengths (words) of each ranking as ``[N, K]`` with -1 for absent ranks."""
    k = max(len(r.responses) for r in rankings)
    grid, ranks, lengths = np.zeros((len(rankings), k)), np.full((len(rankings), k), -1), np.zeros((len(rankings), k))
    for row, ranking in enumerate(rankings):
        count = len(ranking.responses)
        grid[row, :count] = [scores[ranking.prompt, response] for response in ranking.responses]
        ranks[row, :count] = ranking.ranks
        lengths[row, :count] = [len(response.split()) for response in ranking.responses]
    return grid, ranks, lengths


if __name__ == "__main__":
    config_lib.main(run, config="configs/reward_model/storyland.py", workdir="runs/reward_model")
