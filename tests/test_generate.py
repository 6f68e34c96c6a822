"""Sampling: layout, log-probs, keys and stops."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import log_probs, sharding
from rlhf_jax.models import DecoderConfig, language_model
from rlhf_jax.sampling.generate import Sampling, _generate, draws, generate, sample_token, truncate
from rlhf_jax.sampling.refill import Rows, _refill_and_decode, generate_many
from rlhf_jax.types import PromptBatch
from tests import margins

CONFIG = DecoderConfig(20, 40, 2, 16, 4, kv_heads=2, mlp_width=24)
MODEL = language_model(CONFIG)
# Large weights: a sharp distribution, in which a wrong position or mask shows.
PARAMS = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, MODEL.init(jax.random.key(7)))


def _prompts(lengths=(3, 6, 1, 4), ids=None, width=None) -> PromptBatch:
    width = width or max(lengths)
    tokens = np.random.default_rng(0).integers(0, 20, (len(lengths), max(lengths)))
    tokens = np.pad(tokens, ((0, 0), (0, width - max(lengths))), constant_values=13)
    return PromptBatch(
        tokens=jnp.asarray(tokens, jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        ids=jnp.arange(len(lengths)) if ids is None else jnp.asarray(ids),
    )


def _sample(prompts=None, key=0, params=PARAMS, *, samples_per_prompt=1, **changes):
    sampling = Sampling(**{"max_new_tokens": 8, "stop_ids": (2,)} | changes)
    prompts = prompts or _prompts()
    return generate(
        MODEL, params, prompts, jax.random.key(key), sampling, samples_per_prompt=samples_per_prompt
    )


def _surely(prompts=None, **kwargs):
    """`_sample` whose tokens are the same for nudged weights: another program, or machine, must draw them too."""
    draw = lambda params: _sample(prompts, params=params, **kwargs).tokens
    margins.assert_no_near_tie(draw, PARAMS)
    return _sample(prompts, **kwargs)


def _responses(samples) -> list[list[int]]:
    rows = zip(samples.tokens, samples.prompt_lengths, samples.lengths, strict=True)
    return [np.asarray(t[int(p) : int(n)]).tolist() for t, p, n in rows]


def _hidden(tokens, lengths):
    segments = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return MODEL.apply(PARAMS, tokens, segments=segments, positions=positions).hidden


def _mask(samples):
    slots = jnp.arange(samples.tokens.shape[1])[None]
    return (slots >= samples.prompt_lengths[:, None]) & (slots < samples.lengths[:, None])


def test_rows_are_prompt_response_padding_without_a_gap():
    prompts, k = _prompts(), 3
    samples = _sample(prompts, samples_per_prompt=k)
    assert samples.tokens.shape == (12, 6 + 8)
    for row in range(12):
        length, end = int(prompts.lengths[row // k]), int(samples.lengths[row])
        assert int(samples.prompt_lengths[row]) == length
        np.testing.assert_array_equal(
            samples.tokens[row, :length], prompts.tokens[row // k, :length]
        )
        assert (samples.tokens[row, end:] == 0).all()
        assert length < end <= length + 8
        assert (samples.logp[row, :length] == 0).all()
        assert (samples.logp[row, end:] == 0).all()
        assert (samples.logp[row, length:end] < 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_logp_equals_the_recomputed_one(temperature):
    """PITFALLS 5, 1: what the sampler says is what training recomputes from the whole row."""
    samples = _sample(temperature=temperature, samples_per_prompt=2)
    mask = _mask(samples)
    hidden = _hidden(samples.tokens, samples.lengths)
    head = partial(MODEL.head, PARAMS)
    logp = log_probs.token_log_probs(hidden, head, samples.tokens, mask, temperature=temperature)
    np.testing.assert_allclose(jnp.where(mask, logp, 0), samples.logp, atol=1e-4)


def test_greedy_equals_whole_forwards_of_single_unpadded_rows():
    """PITFALLS 8: padding and other rows change no token; greedy log-probs are 0 by definition."""
    prompts = _prompts()
    samples = _surely(prompts, temperature=0.0, stop_ids=())
    assert (samples.logp == 0).all()
    for row, response in enumerate(_responses(samples)):
        prompt = prompts.tokens[row, : int(prompts.lengths[row])].tolist()
        tokens = jnp.asarray([prompt + response])
        predicted = MODEL.head(PARAMS, _hidden(tokens, jnp.asarray([tokens.shape[1]]))).argmax(-1)[
            0
        ]
        assert predicted[len(prompt) - 1 : -1].tolist() == response


def test_same_key_same_bits_and_other_keys_differ():
    """PITFALLS J2: two rollouts of the same prompts differ; the same seed and step reproduce bit for bit."""
    one, again, other = _sample(key=1), _sample(key=1), _sample(key=2)
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert _responses(one) != _responses(other)


def test_equal_prompts_and_samples_of_one_prompt_differ():
    """PITFALLS 50."""
    same = PromptBatch(
        tokens=jnp.full((3, 2), 5), lengths=jnp.full((3,), 2), ids=jnp.asarray([0, 1, 2])
    )
    responses = _responses(_sample(same, samples_per_prompt=2, temperature=2.0))
    assert len({tuple(r) for r in responses}) == 6


def test_batching_and_padding_change_no_token():
    """PITFALLS 50: tokens depend on (key, id, k, place), not on the batch around them or the width of the row."""
    prompts = _prompts(ids=[5, 9, 11, 12])
    whole = _responses(_surely(prompts, samples_per_prompt=2))
    order = [2, 0]
    part = PromptBatch(
        prompts.tokens[jnp.asarray(order)],
        prompts.lengths[jnp.asarray(order)],
        jnp.asarray([11, 5]),
    )
    assert _responses(_sample(part, samples_per_prompt=2)) == whole[4:6] + whole[0:2]
    wide = _prompts(ids=[5, 9, 11, 12], width=9)
    assert _responses(_sample(wide, samples_per_prompt=2)) == whole
    assert _responses(_sample(prompts)) == whole[::2]


def test_a_shorter_limit_gives_the_same_beginning():
    long, short = (
        _responses(_surely(stop_ids=())),
        _responses(_sample(stop_ids=(), max_new_tokens=3)),
    )
    assert short == [r[:3] for r in long]


@pytest.mark.parametrize("stop_ids", [(2,), (3, 7), (0,), ()])
def test_stop_ids_end_the_response_and_belong_to_it(stop_ids):
    """PITFALLS 12, 40, J4: a stop id need not be EOS and may be that of padding, 0; stops in the prompt do not count;
    a cut row is not `finished`.
    """
    prompts = _prompts()
    prompts = dataclasses.replace(prompts, tokens=prompts.tokens.at[:, 0].set(3))
    free = _responses(_surely(prompts, stop_ids=(), samples_per_prompt=8, temperature=2.0))
    samples = _sample(prompts, stop_ids=stop_ids, samples_per_prompt=8, temperature=2.0)
    expected = [next((r[: i + 1] for i, t in enumerate(r) if t in stop_ids), r) for r in free]
    assert _responses(samples) == expected
    np.testing.assert_array_equal(samples.finished, [r[-1] in stop_ids for r in expected])
    if stop_ids:
        assert bool(samples.finished.any())
        assert not bool(samples.finished.all())


def test_a_stop_at_the_last_place_counts_as_finished():
    prompts = _prompts()
    first = _responses(_surely(prompts, max_new_tokens=1))[0][0]
    samples = _sample(prompts, max_new_tokens=1, stop_ids=(first,))
    assert bool(samples.finished[0])
    assert int(samples.lengths[0]) == int(prompts.lengths[0]) + 1


def test_token_zero_may_be_sampled_and_counts():
    """PITFALLS 4, 11: padding has id 0, and so may a real token; only lengths tell them apart."""
    favour = jax.tree.map(jnp.zeros_like, PARAMS)
    samples = generate(
        MODEL,
        favour,
        _prompts(),
        jax.random.key(0),
        Sampling(max_new_tokens=5, temperature=0.0, stop_ids=()),
    )
    assert _responses(samples) == [[0] * 5] * 4


def test_truncation_keeps_the_right_tokens_and_renormalises():
    """PITFALLS 7: log-probs are under the truncated distribution."""
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.7, 0.1]]))
    kept = lambda **kw: np.isfinite(truncate(logits, **({"top_k": 0, "top_p": 1.0} | kw))).tolist()
    assert kept(top_k=1) == [[True, False, False, False], [False, False, True, False]]
    assert kept(top_k=2)[0] == [True, True, False, False]
    assert kept(top_p=0.6) == [[True, True, False, False], [False, False, True, False]]
    assert kept(top_p=1e-6)[0] == [True, False, False, False]
    assert kept(top_k=9) == [[True] * 4] * 2
    keys = jax.random.split(jax.random.key(0), 2)
    seen, uniform = {}, draws(keys, 40)
    for place in range(40):
        tokens, logp = sample_token(logits, uniform[:, place], temperature=1.0, top_k=2, top_p=1.0)
        seen[int(tokens[0])] = float(np.exp(logp[0]))
    assert seen == pytest.approx({0: 4 / 7, 1: 3 / 7}, abs=1e-6)


def test_of_equal_tokens_no_more_stay_than_are_needed():
    """The nucleus is the fewest tokens that reach p, and the k likeliest are k, however many logits are equal."""
    flat = jnp.zeros((1, 8))
    wave = jnp.log(jnp.asarray([[0.1, 0.3, 0.1, 0.3, 0.1, 0.1]]))
    for logits, how, wanted in (
        (flat, {"top_p": 0.3}, [0, 1, 2]),
        (flat, {"top_k": 2}, [0, 1]),
        (wave, {"top_p": 0.25}, [1]),
        (wave, {"top_p": 0.55}, [1, 3]),
        (wave, {"top_p": 0.65}, [0, 1, 3]),
        (wave, {"top_k": 3}, [0, 1, 3]),
        (wave, {"top_k": 4, "top_p": 0.8}, [0, 1, 3]),
    ):
        kept = truncate(logits, **({"top_k": 0, "top_p": 1.0} | how))[0]
        assert np.flatnonzero(np.isfinite(kept)).tolist() == wanted, how
        np.testing.assert_array_equal(kept[np.asarray(wanted)], logits[0, np.asarray(wanted)])


def test_sampled_frequencies_match_the_softmax_at_the_temperature():
    probabilities = np.asarray([0.5, 0.25, 0.2, 0.05])
    keys = jax.random.split(jax.random.key(0), 20_000)
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities)), (20_000, 4))
    tokens, _ = sample_token(logits, draws(keys, 4)[:, 3], temperature=0.5, top_k=0, top_p=1.0)
    expected = probabilities**2 / (probabilities**2).sum()
    # Four standard errors of a share of 20,000 draws.
    np.testing.assert_allclose(
        np.bincount(np.asarray(tokens), minlength=4) / 20_000, expected, atol=0.015
    )


def test_every_token_of_a_vocabulary_that_is_no_square_can_be_drawn():
    """Blocks of the vocabulary leave a rest: the last one is padded, and its padding is never drawn."""
    for size in (1, 2, 7, 1152):
        keys = jax.random.split(jax.random.key(0), 20 * size)
        logits = jnp.zeros((20 * size, size))
        tokens, logp = sample_token(
            logits, draws(keys, 1)[:, 0], temperature=1.0, top_k=0, top_p=1.0
        )
        assert set(np.asarray(tokens).tolist()) <= set(range(size))
        # With 20 draws a token, one is missed with probability exp(-20).
        assert len(set(np.asarray(tokens).tolist())) == size
        np.testing.assert_allclose(logp, -np.log(size), atol=1e-5)


def test_a_masked_token_is_never_drawn_even_at_the_ends():
    logits = jnp.where(jnp.arange(10) % 3 == 1, 0.0, -jnp.inf)[None].repeat(4000, 0)
    keys = jax.random.split(jax.random.key(1), 4000)
    tokens, _ = sample_token(logits, draws(keys, 1)[:, 0], temperature=1.0, top_k=0, top_p=1.0)
    assert set(np.asarray(tokens).tolist()) == {1, 4, 7}


@pytest.mark.parametrize(
    ("rows", "refill", "streams"),
    [(1, None, 1), (3, 1, 1), (4, 4, 1), (64, None, 1), (6, 1, 2), (64, None, 3), (2, 1, 99)],
)
def test_slot_refill_changes_no_token(rows, refill, streams):
    """PITFALLS 50: the tokens of a sample depend on (key, id, k, place), not on which rows were refilled when."""
    prompts = _prompts(lengths=(3, 6, 1, 4, 2, 5, 6), ids=[5, 9, 11, 12, 3, 4, 8])
    whole = _surely(prompts, samples_per_prompt=3, temperature=1.5)
    many = generate_many(
        MODEL,
        PARAMS,
        prompts,
        jax.random.key(0),
        Sampling(max_new_tokens=8, stop_ids=(2,), temperature=1.5),
        counts=3,
        rows=Rows(count=rows, refill=refill, streams=streams),
    )
    assert bool(whole.finished.any())
    assert not bool(whole.finished.all())
    for name in ("tokens", "prompt_lengths", "lengths", "finished"):
        np.testing.assert_array_equal(getattr(many, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(many.logp, whole.logp, atol=1e-5)


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_prompts_may_want_different_numbers_of_samples(streams):
    prompts = _prompts(lengths=(3, 6, 1, 4))
    whole, counts, seen = _responses(_surely(prompts, samples_per_prompt=4)), [2, 0, 4, 1], []
    many = generate_many(
        MODEL,
        PARAMS,
        prompts,
        jax.random.key(0),
        Sampling(max_new_tokens=8, stop_ids=(2,)),
        counts=counts,
        progress=lambda done, total: seen.append((done, total)),
        rows=Rows(count=3, streams=streams),
    )
    assert _responses(many) == [
        whole[4 * p + k] for p, count in enumerate(counts) for k in range(count)
    ]
    assert seen == sorted(seen)
    assert seen[-1] == (7, 7)
    with pytest.raises(ValueError, match="counts=-1"):
        generate_many(
            MODEL,
            PARAMS,
            prompts,
            jax.random.key(0),
            Sampling(max_new_tokens=2),
            counts=[1, 1, -1, 1],
        )


def test_prompts_without_samples_between_others_are_passed_over():
    """One refill then takes responses of prompts that are not neighbours."""
    prompts, counts = _prompts(lengths=(3, 6, 1, 4, 2)), [1, 0, 0, 0, 1]
    whole = _responses(_surely(prompts, samples_per_prompt=1))
    many = generate_many(
        MODEL,
        PARAMS,
        prompts,
        jax.random.key(0),
        Sampling(max_new_tokens=8, stop_ids=(2,)),
        counts=counts,
        rows=Rows(count=2, refill=2, streams=1),
    )
    assert _responses(many) == [whole[0], whole[4]]


def test_one_program_is_compiled_for_all_streams():
    prompts = _prompts(lengths=(3, 6, 1, 4, 2, 5))
    run = lambda streams: generate_many(
        MODEL,
        PARAMS,
        prompts,
        jax.random.key(0),
        Sampling(max_new_tokens=7),
        counts=2,
        rows=Rows(count=4 * streams, streams=streams),
    )
    run(1)
    before = _refill_and_decode._cache_size()
    run(2)
    assert _refill_and_decode._cache_size() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failing_stream_stops_the_others_and_its_error_is_raised(error):
    seen = []

    def progress(done, total):
        seen.append(done)
        if len(seen) == 2:
            raise error("stop here")

    prompts = _prompts(lengths=(3, 6, 1, 4))
    with pytest.raises(error, match="stop here"):
        generate_many(
            MODEL,
            PARAMS,
            prompts,
            jax.random.key(0),
            Sampling(max_new_tokens=8),
            counts=9,
            progress=progress,
            rows=Rows(count=2, refill=1, streams=2),
        )
    assert len(seen) <= 4  # at most the refill that the other stream had begun, and one more


def test_streams_over_several_devices_are_refused():
    where = sharding.batch_sharding(sharding.make_mesh((4, 2, 1)))
    with pytest.raises(ValueError, match="streams=2"):
        generate_many(
            MODEL,
            PARAMS,
            _prompts(lengths=(3, 6)),
            jax.random.key(0),
            Sampling(max_new_tokens=2),
            rows=Rows(count=8, streams=2, sharding=where),
        )


def test_one_compile_for_new_prompts_and_keys():
    _sample(key=0)
    before = _generate._cache_size()
    _sample(_prompts(lengths=(6, 2, 3, 1), ids=[7, 8, 9, 10]), key=5, stop_ids=[2])
    assert _generate._cache_size() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"samples_per_prompt": 0}, "samples_per_prompt=0"),
        ({"max_new_tokens": 35}, "choose at most 34"),
    ],
)
def test_a_bad_setting_names_field_value_and_fix(change, named):
    with pytest.raises(ValueError, match=named):
        _sample(**change)


def test_the_decode_loop_moves_no_weights():
    sampling = Sampling(max_new_tokens=8, stop_ids=(2,))
    program = jax.make_jaxpr(
        lambda p: _generate(MODEL, p, _prompts(), jax.random.key(0), sampling=sampling, copies=1)
    )
    kernels = {leaf.shape[1:] for leaf in jax.tree.leaves(PARAMS["blocks"]) if leaf.ndim == 3}
    bodies = [
        e.params["body_jaxpr"].jaxpr
        for e in _equations(program(PARAMS).jaxpr)
        if e.primitive.name == "while"
    ]
    loop = max(bodies, key=lambda body: len(body.eqns))
    made = {out.aval.shape for equation in _equations(loop) for out in equation.outvars}
    assert (4, 1, 24) in made, "the MLP is in the loop"
    assert not kernels & made, "a weight is sliced or converted in each step"


def _equations(jaxpr):
    """All equations of a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
