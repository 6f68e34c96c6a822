"""From samples to a rollout by hand numbers, and the checks at step 0.

PITFALLS 1, 3-7, 9, 13, 15-17, 28, 31, 32, 34, 36, 40-42, J1, J3.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import ppo as ppo_lib
from rlhf_jax import rollout as rollouts
from rlhf_jax import scoring, steps
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.heads import language_model, scalar_model
from rlhf_jax.rollout import InitialParams, Shaping
from rlhf_jax.sampling.generate import Sampling, generate
from rlhf_jax.types import KLState, Model, Output, PPOState, PromptBatch, Samples
from tests import tiny

KEY = jax.random.key(0)
LM_PARAMS, SCALAR_PARAMS = (
    tiny.LANGUAGE.init(jax.random.key(1)),
    tiny.SCALAR.init(jax.random.key(2)),
)


def _no_cache(batch, length):
    raise NotImplementedError


def _nothing(key):
    return {}


# A network whose scalar is the position id: it shows where values are read.
POSITION = Model(
    _nothing,
    lambda params, tokens, *, segments, positions, **_: Output(
        positions[..., None].astype(jnp.float32), None
    ),
    lambda params, hidden: hidden[..., 0],
    _no_cache,
)
# A language model that is a table: row i holds the logits of what follows token i.
BIGRAM = Model(
    _nothing,
    lambda params, tokens, *, segments, positions, **_: Output(
        jax.nn.one_hot(tokens, params["table"].shape[0]), None
    ),
    lambda params, hidden: hidden @ params["table"],
    _no_cache,
)


def samples(logp_noise: float = 0.0) -> Samples:
    """Three ragged rows: finished, cut by the limit, finished with one token."""
    prompt_lengths, lengths = jnp.array([2, 3, 1]), jnp.array([5, 10, 2])
    tokens = jax.random.randint(jax.random.key(3), (3, tiny.SLOTS), 0, tiny.VOCABULARY)
    mask = scoring.response_mask(prompt_lengths, lengths, tiny.SLOTS)
    logp = tiny.log_probs(LM_PARAMS, tokens, lengths, mask)
    noise = logp_noise * jax.random.normal(jax.random.key(4), logp.shape)
    return Samples(
        tokens,
        prompt_lengths,
        lengths,
        jnp.where(mask, logp + noise, 0),
        jnp.array([True, False, True]),
    )


@lru_cache  # tests with the same settings share one compiled program
def score_and_shape(**options):
    return rollouts.make_score_and_shape(
        tiny.LANGUAGE, tiny.SCALAR, tiny.SCALAR, Shaping(**options)
    )


def shape(rows: Samples, *, scores=None, kl_coef=0.0, **options):
    fn = score_and_shape(**options)
    ids = jnp.arange(rows.lengths.shape[0], dtype=jnp.int32)
    return fn(LM_PARAMS, SCALAR_PARAMS, SCALAR_PARAMS, rows, jnp.float32(kl_coef), ids, scores)


def test_fractional_negative_scores_reach_the_last_token_unchanged():
    """PITFALLS J1, 13: kl off, so the reward is the score, at the last response token of each row and nowhere else."""
    rollout, _ = shape(samples(0.3), scores=jnp.array([-1.6, 0.75, 2.25]))
    expected = np.zeros((3, tiny.SLOTS), np.float32)
    expected[[0, 1, 2], [4, 9, 1]] = [-1.6, 0.75, 2.25]
    np.testing.assert_array_equal(rollout.rewards, expected)
    assert rollout.rewards.dtype == jnp.float32


def test_log_probs_are_the_table_entries():
    table = jax.random.normal(KEY, (4, 4))
    tokens, lengths = jnp.array([[1, 3, 0, 2]]), jnp.array([4])
    mask = scoring.response_mask(jnp.array([1]), lengths, 4)
    logp = scoring.sequence_log_probs(BIGRAM, {"table": table}, tokens, lengths, mask)
    expected = np.asarray(jax.nn.log_softmax(table))
    np.testing.assert_allclose(
        logp[0], [0, expected[1, 3], expected[3, 0], expected[0, 2]], rtol=1e-6
    )


def test_sampled_ids_reach_the_rollout_unchanged():
    """PITFALL 34: whatever the ids are, those of padding included."""
    random = np.random.default_rng(0)
    for _ in range(3):
        tokens = jnp.asarray(random.integers(0, tiny.VOCABULARY, (3, tiny.SLOTS)), jnp.int32)
        np.testing.assert_array_equal(
            shape(dataclasses.replace(samples(), tokens=tokens))[0].tokens, tokens
        )


def test_scores_and_values_do_not_depend_on_the_amount_of_padding():
    """PITFALLS 9, 32: more padding, of any id, moves no score and no value."""
    rows = samples()
    read = jax.jit(partial(scoring.sequence_values, tiny.SCALAR))
    values, score = read(SCALAR_PARAMS, rows.tokens, rows.lengths)
    for extra, token in ((1, 0), (4, 6)):
        wide = jnp.pad(rows.tokens, ((0, 0), (0, extra)), constant_values=token)
        wide_values, wide_score = read(SCALAR_PARAMS, wide, rows.lengths)
        np.testing.assert_allclose(wide_score, score, rtol=1e-6)
        mask = scoring.response_mask(rows.prompt_lengths, rows.lengths, tiny.SLOTS)
        np.testing.assert_allclose(wide_values[:, : tiny.SLOTS][mask], values[mask], rtol=1e-6)


DECODER = DecoderConfig(11, 32, 2, 16, 4, kv_heads=2, mlp_width=24)


@pytest.mark.parametrize("lengths", [(12, 2, 7, 5), (12, 2, 2, 12), (6, 6, 6, 6), (1, 12)])
def test_two_to_a_row_gives_the_same_log_probs_values_and_gradients(lengths):
    """The pair of the longest and the shortest shares a row, neither sees the other, and rows keep their places."""
    slots, lengths = 12, jnp.asarray(lengths)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (len(lengths), slots)), jnp.int32)
    mask = scoring.response_mask(jnp.ones_like(lengths), lengths, slots)
    assert scoring.pairs_fit(lengths, slots)
    language, scalar = language_model(DECODER), scalar_model(DECODER)

    def log_probs(params, model):
        logp = scoring.sequence_log_probs(model, params, tokens, lengths, mask)
        return jnp.sum(jnp.sin(jnp.arange(logp.size).reshape(logp.shape)) * logp), logp

    params = language.init(KEY)
    (alone, paired) = (
        jax.jit(jax.grad(partial(log_probs, model=model), has_aux=True))(params)
        for model in (language, scoring.pair_rows(language))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), alone, paired)
    params = scalar.init(KEY)
    (values, last), (paired_values, paired_last) = (
        scoring.sequence_values(model, params, tokens, lengths)
        for model in (scalar, scoring.pair_rows(scalar))
    )
    np.testing.assert_allclose(paired_last, last, atol=1e-5)
    np.testing.assert_allclose(
        jnp.where(mask, paired_values, 0), jnp.where(mask, values, 0), atol=1e-5
    )


RAGGED = (jnp.asarray([1, 4, 2, 3]), jnp.asarray([7, 6, 3, 9]))
"""Prompt lengths, and lengths with responses of 6, 2, 1 and 6 tokens."""


@pytest.mark.parametrize("shape", [lambda model: model, scoring.pair_rows], ids=["rows", "pairs"])
def test_the_last_block_computes_responses_alone_and_nothing_changes(shape):
    """PITFALL 4 once more: log-probs, entropies, values and scores are those of whole rows, gradients too."""
    slots, (prompts, lengths) = 12, RAGGED
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, slots)), jnp.int32)
    mask = scoring.response_mask(prompts, lengths, slots)
    language, scalar = shape(language_model(DECODER)), shape(scalar_model(DECODER))

    def read(params, targets):
        where = (tokens, lengths, mask)
        logp = scoring.sequence_log_probs(
            language, params[0], *where, temperature=0.7, targets=targets
        )
        both = scoring.sequence_log_probs_and_entropy(
            language, params[0], *where, temperature=0.7, targets=targets
        )
        values, last = scoring.sequence_values(scalar, params[1], *where, targets=targets)
        alone = scoring.response_values(scalar, params[1], *where, targets=targets)
        out = (logp, *both, jnp.where(mask, values, 0), jnp.where(mask, alone, 0), last)
        return sum(jnp.sum(jnp.sin(1 + jnp.arange(x.size).reshape(x.shape)) * x) for x in out), out

    params = language.init(KEY), scalar.init(KEY)
    run = jax.jit(jax.grad(read, has_aux=True), static_argnums=1)
    whole, picked = run(params, None), run(params, 6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), picked, whole)
    scores = scoring.sequence_scores(scalar, params[1], tokens, lengths)
    np.testing.assert_allclose(scores, whole[1][-1], atol=1e-5)


def test_a_response_longer_than_was_said_gives_no_number():
    """Its last tokens would be left out of the loss without a word: the row is NaN, and the guard skips the step."""
    slots, (prompts, lengths) = 12, RAGGED
    tokens, mask = jnp.zeros((4, slots), jnp.int32), scoring.response_mask(prompts, lengths, slots)
    language, scalar = language_model(DECODER), scalar_model(DECODER)
    logp = scoring.sequence_log_probs(
        language, language.init(KEY), tokens, lengths, mask, targets=5
    )
    values, _ = scoring.sequence_values(scalar, scalar.init(KEY), tokens, lengths, mask, targets=5)
    alone = scoring.response_values(scalar, scalar.init(KEY), tokens, lengths, mask, targets=5)
    for found in (logp, values, alone):
        np.testing.assert_array_equal(jnp.isnan(found).all(axis=1), [True, False, False, True])
        np.testing.assert_array_equal(jnp.isnan(found).any(axis=1), [True, False, False, True])


def test_pairs_that_do_not_fit_are_told_and_give_no_number():
    """A pair longer than a row would be cut without a word: it gives NaN, which the guard of every step catches."""
    lengths = jnp.asarray([12, 9, 8, 12])
    assert not scoring.pairs_fit(lengths, 12)
    model = scoring.pair_rows(language_model(DECODER))
    segments, positions = scoring.row_layout(lengths, 12)
    hidden = model.apply(
        model.init(KEY), jnp.zeros((4, 12), jnp.int32), segments=segments, positions=positions
    ).hidden
    assert bool(jnp.isnan(hidden).all())


def test_values_are_read_one_token_before_and_scores_at_the_last_one():
    """PITFALL 4: values of response token t is the scalar at position prompt_len - 1 + t."""
    values, last = scoring.sequence_values(
        POSITION, {}, jnp.zeros((2, 6), jnp.int32), jnp.array([6, 3])
    )
    np.testing.assert_array_equal(values[0], [0, 0, 1, 2, 3, 4])
    np.testing.assert_array_equal(last, [5, 2])


def test_kl_to_an_equal_reference_is_zero_at_any_temperature():
    """PITFALL J3, with samples drawn at T = 0.7; PITFALL 5: the sampler's log-probs are the recomputed ones."""
    model = language_model(DecoderConfig(11, 16, 1, 8, 2))
    params = jax.tree.map(lambda x: 4 * x, model.init(KEY))
    prompts = PromptBatch(jnp.ones((3, 4), jnp.int32), jnp.array([2, 3, 4]), jnp.arange(3))
    drawn = generate(
        model, params, prompts, KEY, Sampling(max_new_tokens=6, temperature=0.7, stop_ids=(0,))
    )
    scalar = scalar_model(model.config)
    scalar_params = scalar.init(KEY)
    fn = rollouts.make_score_and_shape(model, scalar, scalar, Shaping(temperature=0.7))
    _, metrics = fn(params, scalar_params, scalar_params, drawn, jnp.float32(1.0), prompts.ids)
    assert abs(float(metrics["rollout/kl_nats_per_sequence"].value)) < 1e-4
    wrong = rollouts.make_score_and_shape(model, scalar, scalar, Shaping(temperature=1.0))
    _, metrics = wrong(params, scalar_params, scalar_params, drawn, jnp.float32(1.0), prompts.ids)
    assert abs(float(metrics["rollout/kl_nats_per_sequence"].value)) > 1e-3


def test_shaped_rewards_and_metrics_equal_hand_sums_on_ragged_rows():
    """PITFALL 42: nothing is averaged over padding, and the KL in the log is the KL in the reward."""
    rows, scores, beta = samples(0.3), jnp.array([1.0, -2.0, 0.5]), 0.1
    rollout, metrics = shape(rows, scores=scores, kl_coef=beta, missing_eos_score=-1.0)
    mask = np.asarray(rollout.mask)
    assert mask.sum(axis=1).tolist() == [3, 7, 1]
    difference = [
        (np.asarray(rollout.old_logp) - np.asarray(rollout.ref_logp))[b][mask[b]] for b in range(3)
    ]
    kl = np.mean([d.sum() for d in difference])
    k3 = np.mean([np.sum(np.exp(-d) - 1 + d) for d in difference])
    used = np.array([1.0, -1.0, 0.5])
    expected = {
        "kl_nats_per_sequence": kl,
        "kl_k3_nats_per_sequence": k3,
        "kl_coef": beta,
        "score": -0.5 / 3,
        "score_square": 5.25 / 3,
        "score_used": used.mean(),
        "reward_per_sequence": np.mean(used - [beta * d.sum() for d in difference]),
        "response_tokens": 11 / 3,
        "response_tokens_max": 7,
        "missing_eos": 1 / 3,
        "surprisal_nats_per_token": -np.asarray(rows.logp)[mask].mean(),
        "value": np.asarray(rollout.old_values)[mask].mean(),
        "dropped": 0,
    }
    assert not metrics.pop("dropped_rows").value.any()
    assert {name.removeprefix("rollout/") for name in metrics} == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(
            metrics[f"rollout/{name}"].value, value, rtol=1e-4, atol=1e-5, err_msg=name
        )
    np.testing.assert_allclose(
        rollout.rewards[0, 2:5], -beta * difference[0] + np.array([0, 0, 1.0]), rtol=1e-4, atol=1e-6
    )


def test_padding_and_prompt_can_hold_anything():
    """PITFALLS 16, 17: poisoned log-probs and tokens outside the response change no field and no metric."""
    rows = samples(0.3)
    mask = scoring.response_mask(rows.prompt_lengths, rows.lengths, tiny.SLOTS)
    clean = shape(rows, kl_coef=0.1)
    place = jnp.arange(tiny.SLOTS)[None, :]
    tokens = jnp.where(place < rows.lengths[:, None], rows.tokens, 6)
    for poison in (1e6, jnp.nan):
        poisoned = dataclasses.replace(rows, logp=jnp.where(mask, rows.logp, poison), tokens=tokens)
        rollout, metrics = shape(poisoned, kl_coef=0.1)
        tiny.assert_bit_equal(dataclasses.replace(rollout, tokens=clean[0].tokens), clean[0])
        tiny.assert_bit_equal(metrics, clean[1])


def test_rewards_are_whitened_over_response_tokens_with_their_mean_kept():
    rows, scores = samples(0.3), jnp.array([1.0, -2.0, 0.5])
    plain = shape(rows, scores=scores, kl_coef=0.1)[0]
    rollout = shape(rows, scores=scores, kl_coef=0.1, whiten_rewards=True)[0]
    mask = np.asarray(plain.mask)
    raw, white = np.asarray(plain.rewards)[mask], np.asarray(rollout.rewards)[mask]
    np.testing.assert_allclose(
        white, (raw - raw.mean()) / raw.std() + raw.mean(), rtol=1e-4, atol=1e-5
    )
    assert not np.any(np.asarray(rollout.rewards)[~mask])


def test_missing_eos_rule_looks_at_finished_and_not_at_ids():
    """PITFALL 40: rows that hold no EOS id are finished when another stop id ended them."""
    rows = dataclasses.replace(samples(), tokens=jnp.full((3, tiny.SLOTS), 3))
    raw = jnp.array([5.0, 6.0, 7.0])
    assert shape(rows, scores=raw, missing_eos_score=-1.0)[0].score.tolist() == [5, -1, 7]
    assert shape(rows, scores=raw)[0].score.tolist() == [5, 6, 7]
    scaled = shape(rows, scores=raw, missing_eos_score=-1.0, score_scale=2.0, score_shift=0.5)[
        0
    ].score
    assert scaled.tolist() == [10.5, -1, 14.5]


def test_an_outlier_in_a_suppressed_row_changes_nothing_else():
    """PITFALL 41: scale and shift are fixed numbers, not statistics of the batch."""
    options = {"missing_eos_score": -1.0, "score_scale": 2.0, "score_shift": 0.5}
    plain = shape(samples(), scores=jnp.array([1.0, 2.0, 3.0]), **options)[0]
    tiny.assert_bit_equal(shape(samples(), scores=jnp.array([1.0, 1e9, 3.0]), **options)[0], plain)


def test_a_cut_response_is_an_end_or_is_bootstrapped_as_asked():
    """PITFALL 15: at lambda 1 the return of the first token is the reward to go, plus V(tokens[:lengths]) if cut."""
    fn = {
        t: rollouts.make_score_and_shape(
            tiny.LANGUAGE, POSITION, shaping=Shaping(lam=1.0, truncation=t)
        )
        for t in ("terminal", "bootstrap")
    }
    rows, scores = samples(), jnp.array([1.0, 1.0, 1.0])
    arguments = (LM_PARAMS, {}, None, rows, jnp.float32(0.0), jnp.arange(3), scores)
    terminal, bootstrap = (fn[t](*arguments)[0].returns for t in ("terminal", "bootstrap"))
    first = (jnp.arange(3), rows.prompt_lengths)
    np.testing.assert_allclose(terminal[first], [1, 1, 1], rtol=1e-5)
    np.testing.assert_allclose(bootstrap[first], [1, 1 + 9, 1], rtol=1e-5)  # row 1: last position 9
    with pytest.raises(ValueError, match="truncation='never' is unknown"):
        rollouts.make_score_and_shape(tiny.LANGUAGE, POSITION, shaping=Shaping(truncation="never"))


def test_rows_with_a_non_finite_score_are_masked_out_and_counted():
    rollout, metrics = shape(samples(), scores=jnp.array([1.0, 2.0, jnp.nan]))
    assert rollout.mask.sum(axis=1).tolist() == [3, 7, 0]
    assert float(metrics["rollout/dropped"].total) == 1
    assert float(metrics["rollout/score"].value) == 1.5
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(rollout))


def test_pieces_of_the_rollout_give_the_rows_of_the_whole_in_their_order():
    ragged = samples(logp_noise=0.1)
    for scores in (None, jnp.array([0.5, jnp.nan, -1.0])):
        (whole, metrics), (pieces, piece_metrics) = (
            shape(ragged, scores=scores, kl_coef=0.3, microbatches=n) for n in (1, 3)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, pieces)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), metrics, piece_metrics
        )
    with pytest.raises(
        ValueError, match="score_microbatches=2 must divide the rollout of 3: choose 1 or 3"
    ):
        shape(ragged, microbatches=2)


def test_scores_come_from_the_reward_model_or_from_the_host():
    rows = samples()
    model_scores = rollouts.score_samples(tiny.SCALAR, SCALAR_PARAMS, rows)
    # Two compiled programs: equal up to rounding.
    np.testing.assert_allclose(shape(rows)[0].score, model_scores, rtol=1e-5)
    np.testing.assert_array_equal(
        shape(rows, scores=jnp.array([1.0, 2.0, 3.0]))[0].score, [1, 2, 3]
    )
    fn = rollouts.make_score_and_shape(tiny.LANGUAGE, tiny.SCALAR)
    with pytest.raises(ValueError, match="there is no reward model"):
        fn(LM_PARAMS, SCALAR_PARAMS, None, rows, jnp.float32(0.1), jnp.arange(3))


def test_a_new_kl_coefficient_does_not_compile_again():
    fn = rollouts.make_score_and_shape(tiny.LANGUAGE, tiny.SCALAR, tiny.SCALAR)
    for coef in (0.1, 0.2):
        fn(LM_PARAMS, SCALAR_PARAMS, SCALAR_PARAMS, samples(), jnp.float32(coef), jnp.arange(3))
    assert fn._cache_size() == 1


def test_the_kl_penalty_lowers_the_exact_kl():
    """PITFALL 28: score 0, beta 1, from a perturbed policy; the KL is enumerated over all sequences."""
    random = np.random.default_rng(0)
    reference = random.normal(size=(3, 3)).astype(np.float32)
    policy = {"table": jnp.asarray(reference + 0.7 * random.normal(size=(3, 3)).astype(np.float32))}

    def prob(table):
        weights = np.exp(np.asarray(table, np.float64))
        return weights / weights.sum(axis=1, keepdims=True)

    def exact_kl(table):
        p, q = prob(table), prob(reference)
        total = 0.0
        for path in itertools.product(range(3), repeat=3):
            steps_ = list(zip((0, *path), path, strict=False))
            weight = np.prod([p[s] for s in steps_])
            total += weight * sum(np.log(p[s] / q[s]) for s in steps_)
        return total

    tokens = np.zeros((512, 4), np.int32)
    for b, t in itertools.product(range(512), range(1, 4)):
        tokens[b, t] = random.choice(3, p=prob(policy["table"])[tokens[b, t - 1]])
    rows, lengths = jnp.asarray(tokens), jnp.full(512, 4)
    mask = scoring.response_mask(jnp.ones(512, jnp.int32), lengths, 4)
    logp = scoring.sequence_log_probs(BIGRAM, policy, rows, lengths, mask)
    drawn = Samples(rows, jnp.ones(512, jnp.int32), lengths, logp, jnp.ones(512, bool))
    zero = POSITION._replace(head=lambda params, hidden: 0.0 * hidden[..., 0] * params["w"])
    fn = rollouts.make_score_and_shape(BIGRAM, zero)
    arguments = (
        {"table": jnp.asarray(reference)},
        {"w": jnp.ones(())},
        None,
        drawn,
        jnp.float32(1.0),
    )
    rollout, metrics = fn(*arguments, jnp.arange(512), jnp.zeros(512))
    before = exact_kl(policy["table"])
    assert float(metrics["rollout/kl_nats_per_sequence"].value) == pytest.approx(before, rel=0.2)
    tx = optax.sgd(0.3)
    state = PPOState(
        policy=steps.train_state(policy, tx),
        value=steps.train_state({"w": jnp.ones(())}, tx),
        kl=KLState(jnp.float32(1.0)),
        iteration=jnp.zeros((), jnp.int32),
    )
    state, _ = jax.jit(
        steps.make_ppo_step(BIGRAM, zero, ppo_lib.Optimizers(tx, tx), ppo_lib.PPO(minibatches=1))
    )(state, rollout, None, KEY)
    assert exact_kl(state.policy.params["table"]) < 0.95 * before


# ------------------------------------------------------------------------------------------- step 0


def check(
    rows=None,
    *,
    policy=LM_PARAMS,
    ref=LM_PARAMS,
    value=SCALAR_PARAMS,
    reward=SCALAR_PARAMS,
    **options,
):
    rows = samples() if rows is None else rows
    return rollouts.step_zero_checks(
        tiny.LANGUAGE,
        tiny.SCALAR,
        tiny.SCALAR,
        InitialParams(policy, ref, value, reward),
        rows,
        **options,
    )


def nudged(params, size):
    return jax.tree.map(lambda x: x + size, params)


def test_step_zero_checks_pass_on_a_fresh_start():
    measured = check()
    assert measured["reference_gap"] == 0
    assert measured["clip_fraction"] == 0
    assert max(measured["sampler_gap"], measured["update_gap"], measured["value_gap"]) < 1e-4


def test_step_zero_refuses_another_reference():
    with pytest.raises(ValueError, match=r"reference_gap=.* is above its limit 0: .* same weights"):
        check(ref=nudged(LM_PARAMS, 1e-5))


def test_step_zero_refuses_log_probs_of_another_sampler():
    with pytest.raises(
        ValueError, match=r"sampler_gap=.* is above its limit 0.0001: .*temperature"
    ):
        check(temperature=0.9)
    with pytest.raises(ValueError, match="sampler_gap=nan"):
        check(dataclasses.replace(samples(), logp=jnp.full((3, tiny.SLOTS), jnp.nan)))


def _generated(model, params, **settings):
    prompts = PromptBatch(jnp.ones((8, 4), jnp.int32), jnp.array([2, 3, 4, 1] * 2), jnp.arange(8))
    return generate(
        model, params, prompts, KEY, Sampling(max_new_tokens=6, stop_ids=(0,), **settings)
    )


def test_step_zero_refuses_samples_of_a_truncated_distribution():
    """PITFALL 7: top-k samples have log-probs under what is left, and the update has those of the full softmax."""
    model = language_model(DecoderConfig(11, 16, 1, 8, 2))
    params = model.init(KEY)
    start = InitialParams(params, params, {})
    with pytest.raises(ValueError, match=r"sampler_gap=.*top_k, top_p"):
        rollouts.step_zero_checks(model, POSITION, None, start, _generated(model, params, top_k=3))


def test_step_zero_checks_pass_in_bfloat16_and_equal_models_have_kl_zero():
    """PITFALLS 1, 36: sampler, scorer and update agree to 2e-2 nats; two equal models through one program exactly."""
    model = language_model(DecoderConfig(11, 16, 1, 8, 2, dtype="bfloat16"))
    params = jax.tree.map(lambda x: 4 * x, model.init(KEY))
    other = jax.tree.map(jnp.copy, params)
    measured = rollouts.step_zero_checks(
        model,
        POSITION,
        None,
        InitialParams(params, other, {}),
        _generated(model, params, temperature=0.7),
        temperature=0.7,
    )
    assert measured["reference_gap"] == measured["clip_fraction"] == 0
    assert max(measured["sampler_gap"], measured["update_gap"]) < 2e-2


def test_step_zero_refuses_clipped_ratios_even_under_a_loose_limit():
    with pytest.raises(ValueError, match=r"clip_fraction=.* is above its limit 0"):
        check(samples(1.0), limit=100.0)


def test_step_zero_refuses_a_value_network_that_lost_the_bias():
    """PITFALL 31: V(whole sequence) is the raw score, bias included."""
    reward = SCALAR_PARAMS | {"head": SCALAR_PARAMS["head"] | {"bias": jnp.float32(0.5)}}
    with pytest.raises(
        ValueError, match=r"value_gap=0.5 is above its limit 0.0001: .*bias included"
    ):
        check(reward=reward)
    assert "value_gap" in check(value=reward, reward=reward)


def test_step_zero_limit_follows_the_compute_dtype():
    config = DecoderConfig(11, 16, 1, 8, 2)
    assert rollouts.log_prob_limit(language_model(config)) == 1e-4
    assert (
        rollouts.log_prob_limit(language_model(dataclasses.replace(config, dtype="bfloat16")))
        == 2e-2
    )


@pytest.mark.parametrize(
    ("field", "value"), [("gamma", 1.1), ("lam", -0.1), ("microbatches", 0), ("lam", float("nan"))]
)
def test_numbers_that_no_rollout_can_have_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}={value} must be"):
        Shaping(**{field: value})
