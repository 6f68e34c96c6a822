"""Measuring a reward model on rankings: what is scored, and how it is compared."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import common, reward_model
from rlhf_jax.data.schema import Ranking

FIRST = Ranking("p", ("a", "bbb", "cc", "a"), (2, 0, 1, 2), labeler="one")
SECOND = Ranking("p", ("a", "bbb", "cc", "a"), (0, 2, 1, 0), labeler="two")
OTHER_PROMPT = Ranking("q", ("a", "dd"), (0, 1))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was scored; a response scores its number of letters, 10 more after the prompt q."""
    pairs: list[tuple[str, str]] = []

    def score_responses(network, prompts, responses, mesh, *, batch_size):
        pairs.extend(zip(prompts, responses, strict=True))
        return np.array([len(r) + 10.0 * (p == "q") for p, r in zip(prompts, responses, strict=True)])

    monkeypatch.setattr(common, "score_responses", score_responses)
    return pairs


def scores(rankings):
    return reward_model.score_each(None, rankings, ConfigDict({"score_batch_size": 8}), None)  # pyright: ignore


def test_each_response_is_scored_once_however_many_labelers_ranked_it(asked):
    scores([FIRST, SECOND, OTHER_PROMPT])
    assert sorted(asked) == [("p", "a"), ("p", "bbb"), ("p", "cc"), ("q", "a"), ("q", "dd")]


def test_scores_meet_their_own_prompt_and_absent_places_have_no_rank(asked):
    grid, ranks, lengths = reward_model.pad_ranked([FIRST, OTHER_PROMPT], scores([FIRST, OTHER_PROMPT]))
    assert grid.tolist() == [[1, 3, 2, 1], [11, 12, 0, 0]]
    assert ranks.tolist() == [[2, 0, 1, 2], [0, 1, -1, -1]]
    assert lengths.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_two_labelers_who_disagree_give_opposite_accuracies(asked):
    found = scores([FIRST, SECOND])
    assert reward_model.evaluate([FIRST], found)["accuracy"]["value"] == 1.0
    assert reward_model.evaluate([SECOND], found)["accuracy"]["value"] == 0.0
