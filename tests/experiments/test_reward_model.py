"""Measuring a reward model on rankings: what is scored, and how it is compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import reward_model
from rlhf_jax import scoring, sharding
from rlhf_jax.data import text
from rlhf_jax.data.schema import Ranking
from rlhf_jax.data.storyland import tokenizer as storyland_assets
from rlhf_jax.data.text import load_tokenizer
from rlhf_jax.evaluation import held_out_rankings
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.heads import scalar_model
from rlhf_jax.run import networks
from rlhf_jax.run import rankings as ranked
from rlhf_jax.run import responses as responses_lib

FIRST = Ranking("Say a word.", ("a", "a dog ran", "the cat", "a"), (2, 0, 1, 2), labeler="one")
SECOND = Ranking("Say a word.", ("a", "a dog ran", "the cat", "a"), (0, 2, 1, 0), labeler="two")
OTHER_PROMPT = Ranking("Another prompt, longer than the first.", ("a", "the cat sat."), (0, 1))


@pytest.fixture(scope="module")
def network():
    tokenizer = load_tokenizer(storyland_assets.assets())
    model = scalar_model(DecoderConfig(len(tokenizer), 128, 2, 16, 2))
    return networks.Network(model, model.init(jax.random.key(0)), tokenizer)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1])


@pytest.fixture
def scores(network, mesh):
    """Scores of the responses to rankings, with options of the config."""

    def score(rankings, **options):
        config = ConfigDict({"row_length": 64, "max_k": 4, "batch_size": 2} | options)
        return ranked.scores(network, rankings, config, mesh)

    return score


@pytest.mark.parametrize(
    "options", [{}, {"row_length": 4}, {"max_k": 1}, {"row_length": 24, "batch_size": 1}]
)
def test_scores_in_shared_rows_are_those_of_one_text_a_row(network, mesh, scores, options):
    found = scores([FIRST, SECOND, OTHER_PROMPT], **options)
    prompts, responses = zip(*found, strict=True)
    alone = responses_lib.score_responses(network, prompts, responses, mesh, batch_size=8)
    np.testing.assert_allclose(list(found.values()), alone, atol=1e-5)
    assert np.std(alone) > 1e-2


def test_each_response_is_scored_once_however_many_labelers_ranked_it(network, scores):
    asked = set(scores([FIRST, SECOND, OTHER_PROMPT]))
    wanted = {(r.prompt, response) for r in (FIRST, OTHER_PROMPT) for response in r.responses}
    assert asked == wanted
    names, items = ranked.distinct_responses(
        network.tokenizer, [FIRST, SECOND, OTHER_PROMPT], ConfigDict({"row_length": 64, "max_k": 4})
    )
    assert (
        [len(group) for group in names] == [len(responses) for _, responses, _ in items] == [3, 2]
    )


def test_scores_meet_their_own_prompt_and_absent_places_have_no_rank(scores):
    found = scores([FIRST, OTHER_PROMPT])
    grid, ranks, lengths = held_out_rankings.pad_ranked([FIRST, OTHER_PROMPT], found)
    assert grid[0, 0] == grid[0, 3] == found["Say a word.", "a"] != grid[1, 0]
    assert ranks.tolist() == [[2, 0, 1, 2], [0, 1, -1, -1]]
    assert lengths.tolist() == [[1, 3, 2, 1], [1, 3, 0, 0]]


def judged(ranking, values):
    return held_out_rankings.evaluate(
        [ranking], {(ranking.prompt, r): v for r, v in zip(ranking.responses, values, strict=True)}
    )


def test_two_labelers_who_disagree_give_opposite_accuracies():
    assert judged(FIRST, [0.0, 2.0, 1.0, 0.0])["accuracy"]["value"] == 1.0
    assert judged(SECOND, [0.0, 2.0, 1.0, 0.0])["accuracy"]["value"] == 0.0


def test_accuracy_is_told_by_margin_and_by_length_difference():
    """FIRST holds five strict pairs, each with its longer response better; here "a dog ran" is scored too low."""
    told = judged(FIRST, [1.0, 0.0, 3.0, 1.0])
    assert told["accuracy"]["value"] == told["length_only"]["value"] * 2 / 5 == 0.4
    by_length = told["accuracy_by_length_difference"]
    assert [n for n in by_length["count"] if n] == [5]
    assert by_length["accuracy"][by_length["count"].index(5)] == 0.4
    assert sum(told["accuracy_by_margin"]["count"]) == 5
    assert told["accuracy_by_margin"]["accuracy"][-1] == 2 / 3


def test_tokens_of_shared_rows_and_of_separate_ones():
    encoded = [([1] * 10, [[2], [2, 3], [2, 3, 4]], (0, 1, 2)), ([1] * 4, [[2], [3]], (0, 1))]
    assert ranked.tokens(encoded) == {
        "tokens": 10 + 6 + 4 + 2,
        "tokens_in_separate_rows": 30 + 6 + 8 + 2,
    }


@pytest.mark.parametrize("train", ["lora", "head"])
def test_only_what_train_names_is_trained(network, train):
    config = ConfigDict(
        {"seed": 0, "train": train, "lora": dict(rank=2, alpha=4.0, targets="mlp", layers=1)}
    )
    trained = networks.trainable(network.params, config)
    assert ("blocks" in trained.params) == (train == "lora")
    assert trained.frozen["embed"] is network.params["embed"]
    merged = trained.merged(trained.params)
    np.testing.assert_array_equal(
        merged["embed"]["embedding"], network.params["embed"]["embedding"]
    )
    np.testing.assert_array_equal(
        merged["score"]["weight"], (train == "lora") * network.params["score"]["weight"]
    )


def test_a_head_on_states_read_once_scores_like_the_whole_network(network, mesh):
    """And so its gradient is that of the head over the whole network."""
    config = ConfigDict({"batch_size": 2, "row_length": 64, "max_k": 4})
    _, items = ranked.distinct_responses(network.tokenizer, [FIRST, OTHER_PROMPT], config)
    rows = text.ranking_rows(items, length=64, max_k=4)
    read, seen = reward_model.read_trunk(network.model, network.params, rows, config, mesh)
    whole = scoring.ranking_scores(network.model, network.params, jax.tree.map(jnp.asarray, rows))
    head = {"score": network.params["score"]}
    np.testing.assert_allclose(
        scoring.ranking_scores(read, head, jax.tree.map(jnp.asarray, seen)), whole, atol=1e-5
    )
    assert np.std(whole) > 1e-2


def test_a_word_that_train_does_not_know_is_refused(network):
    config = functools.partial(
        ConfigDict, {"seed": 0, "lora": dict(rank=2, alpha=4.0, targets="mlp", layers=1)}
    )
    for train, params, message in (
        ("trunk", network.params, "train='trunk'"),
        ("head", {"embed": {}}, "train='head': needs a reward model"),
    ):
        asked = config()
        asked.train = train
        with pytest.raises(ValueError, match=message):
            networks.trainable(params, asked)


def test_texts_longer_than_the_models_context_are_refused_or_dropped():
    """They would read positions that the model does not have; the scores were NaN."""
    short, long = ([1] * 4, [[2], [3]], (0, 1)), ([1] * 100, [[2] * 40, [3]], (0, 1))
    config = ConfigDict({"too_long": "drop", "row_length": 256})
    assert ranked.fitting([short, long], config, 128) == ([short], [0])
    assert ranked.fitting([short, long], config, 256) == ([short, long], [0, 1])
    config.too_long = "error"
    with pytest.raises(ValueError, match="1 of 2 rankings do not fit"):
        ranked.fitting([short, long], config, 128)
