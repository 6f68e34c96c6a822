from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlhf_jax import scoring, steps
from rlhf_jax.data import text
from rlhf_jax.losses.ranking import ranking_loss
from rlhf_jax.models.config import gpt2
from rlhf_jax.models.heads import language_model, scalar_model
from rlhf_jax.ops import previous_index
from rlhf_jax.types import LMBatch, RankingBatch, Samples

EOT = "<|endoftext|>"
STORY = "The fox said hello. The dog said nothing, and they walked home together in the rain.\n\n"


def train_tokenizer(corpus: str = STORY, size: int = 300) -> transformers.PreTrainedTokenizerFast:
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([corpus] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOT, pad_token=EOT)


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return train_tokenizer()


EOS = 0  # the first special token of the tokenizer above, and its padding too


# ---------------------------------------------------------------------------------------------------- tokenizer


def test_prompt_and_response_are_tokenised_separately_everywhere(
    tokenizer: transformers.PreTrainedTokenizerFast,
):
    """PITFALLS 33: ids(prompt) + ids(response) is what SFT, reward model and PPO see."""
    prompt = text.encode_prompt(tokenizer, "The fox said")
    response = text.encode_response(tokenizer, " hello.", eos_id=EOS)
    ids = [*prompt, *response]
    sft = text.sft_rows([(prompt, response)], length=40)
    rm = text.ranking_rows([(prompt, [response, response], [0, 1])], length=80, max_k=2)
    ppo = text.prompt_batch([prompt], length=20)
    end = int(rm.ends[0, 0, 0])
    assert np.asarray(sft.tokens)[0, : len(ids)].tolist() == ids
    assert np.asarray(rm.tokens)[0, : end + 1].tolist() == ids
    assert np.asarray(ppo.tokens)[0, : int(ppo.lengths[0])].tolist() == prompt


@pytest.mark.parametrize("user", [EOT, f"a {EOT} b", f"{EOT}\n\n{EOT}"])
def test_special_tokens_in_user_text_stay_text(
    tokenizer: transformers.PreTrainedTokenizerFast, user: str
):
    assert tokenizer.encode(user).count(EOS) > 0  # what happens without care
    assert EOS not in text.encode_prompt(tokenizer, user)
    response = text.encode_response(tokenizer, user, eos_id=EOS)
    assert response.count(EOS) == 1
    assert response[-1] == EOS
    assert text.decode_response(tokenizer, response, eos_id=EOS) == user


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(st.characters(codec="utf-8")))
def test_a_response_survives_encoding_and_decoding(said: str):
    tokenizer = _CACHED
    assert (
        text.decode_response(
            tokenizer, text.encode_response(tokenizer, said, eos_id=EOS), eos_id=EOS
        )
        == said
    )


_CACHED = train_tokenizer()


def test_decoding_stops_at_the_first_eos(tokenizer: transformers.PreTrainedTokenizerFast):
    ids = text.encode_response(tokenizer, "hello", eos_id=EOS)
    assert text.decode_response(tokenizer, [*ids, 7, 8, EOS], eos_id=EOS) == "hello"
    assert (
        text.decode_response(tokenizer, np.array(ids[:-1], np.int32).tolist(), eos_id=EOS)
        == "hello"
    )


def test_the_template(tokenizer: transformers.PreTrainedTokenizerFast):
    assert tokenizer.decode(text.encode_prompt(tokenizer, "Say hello.")) == "Say hello.\n\n"
    assert text.encode_prompt(tokenizer, "x", bos_id=9)[0] == 9
    assert text.encode_document(tokenizer, "x", eos_id=5)[-1] == 5


def test_tokenizer_loads_from_a_folder_and_never_runs_its_code(
    tokenizer: transformers.PreTrainedTokenizerFast, tmp_path: Path
):
    tokenizer.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\n"
    )
    loaded = text.load_tokenizer(tmp_path)
    assert text.encode_prompt(loaded, STORY) == text.encode_prompt(tokenizer, STORY)
    assert text.tokenizer_fingerprint(loaded) == text.tokenizer_fingerprint(tokenizer)
    assert not (tmp_path / "ran").exists()


def test_a_bad_tokenizer_folder_is_named(
    tokenizer: transformers.PreTrainedTokenizerFast, tmp_path: Path
):
    with pytest.raises(ValueError, match=r"no tokenizer\.json in .*: pass the folder"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        text.load_tokenizer(tmp_path)
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    plain.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="no EOS token"):
        text.load_tokenizer(tmp_path)


def test_different_tokenizers_of_policy_and_reward_model_are_refused(
    tokenizer: transformers.PreTrainedTokenizerFast,
):
    """PITFALLS 35."""
    other = train_tokenizer(
        corpus="quite another corpus, of other words and other merges", size=300
    )
    text.check_same_tokenizer(policy=tokenizer, reward_model=train_tokenizer())
    with pytest.raises(ValueError, match=r"policy .* reward_model .* differ"):
        text.check_same_tokenizer(policy=tokenizer, reward_model=other)
    before = text.tokenizer_fingerprint(tokenizer)
    tokenizer("a long text", truncation=True, max_length=2)  # leaves truncation set in the backend
    assert text.tokenizer_fingerprint(tokenizer) == before


# ------------------------------------------------------------------------------------------------------ packing


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(st.integers(1, 12), max_size=40), st.integers(12, 30), st.none() | st.integers(1, 3)
)
def test_best_fit_places_every_item_once_within_capacity(
    sizes: list[int], capacity: int, max_items: int | None
):
    rows = text.best_fit(sizes, capacity=capacity, max_items=max_items)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= capacity for row in rows)
    assert all(0 < len(row) <= (max_items or len(sizes)) for row in rows)
    if max_items is None and len(rows) > 1:  # two half-empty rows would have been one
        fills = sorted(sum(sizes[i] for i in row) for row in rows)
        assert fills[0] + fills[1] > capacity


documents_of = st.lists(
    st.lists(st.integers(0, 50), min_size=1, max_size=30), min_size=1, max_size=12
)


@settings(deadline=None)  # a busy machine is no failure
@given(documents_of, st.integers(4, 16))
def test_packing_keeps_every_token_once(documents: list[list[int]], length: int):
    """PITFALLS 43: each piece is a segment with positions from 0, and no token is lost or doubled."""
    batch = text.lm_rows(documents, length=length)
    expected = [tuple(d[i : i + length]) for d in documents for i in range(0, len(d), length)]
    found = []
    for tokens, segments, positions, mask in zip(
        batch.tokens, batch.segments, batch.positions, batch.mask, strict=True
    ):
        count = int(np.max(segments))
        used = int(np.sum(segments > 0))
        assert np.all(segments[:used] > 0)  # contiguous from the left
        assert np.all(np.diff(segments[:used]) >= 0)
        assert not np.any(mask[used:])
        for segment in range(1, count + 1):
            here = segments == segment
            found.append(tuple(tokens[here].tolist()))
            assert positions[here].tolist() == list(range(np.sum(here)))
            assert mask[here].tolist() == [False] + [True] * (int(np.sum(here)) - 1)
    assert sorted(found) == sorted(expected)


def test_long_documents_are_split_not_cut():
    batch = text.lm_rows([list(range(10, 21))], length=4)
    assert sorted(np.asarray(batch.tokens)[np.asarray(batch.segments) > 0].tolist()) == list(
        range(10, 21)
    )


# ---------------------------------------------------------------------------------------------------------- SFT


def test_each_response_has_exactly_one_trained_eos_when_pad_is_eos():
    """PITFALLS 10, 11: masks come from lengths, so neither pad == EOS nor an EOS inside the prompt changes them."""
    pairs = [([7, EOS, 8], [5, EOS]), ([9], [EOS]), ([EOS, EOS], [5, 6, EOS])]
    batch = text.sft_rows(pairs, length=16)
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    assert np.sum(mask & (tokens == EOS)) == len(pairs)
    assert np.sum(mask) == sum(len(response) for _, response in pairs)
    assert np.sum(np.asarray(batch.segments) > 0) == sum(len(p) + len(r) for p, r in pairs)


def test_one_demonstration_a_row_when_asked():
    """So that a batch of 32 rows is one of 32 demonstrations, as the paper counts."""
    pairs = [([1], [2, EOS]), ([3, 4], [EOS]), ([5], [EOS])]
    assert len(text.sft_rows(pairs, length=16).tokens) == 1
    batch = text.sft_rows(pairs, length=16, max_pieces=1)
    assert len(batch.tokens) == len(pairs)
    assert np.max(np.asarray(batch.segments)) == 1
    assert np.sum(np.asarray(batch.mask)) == sum(len(response) for _, response in pairs)


def test_mask_ends_with_the_row_for_eos_in_the_middle_at_the_end_and_missing():
    """PITFALLS 12: padding is never a target, with EOS in mid-row, at the row's end, or missing."""
    for response, length in (([5, EOS], 8), ([5, EOS], 3), ([5, 6], 8)):
        batch = text.sft_rows([([4], response)], length=length)
        assert np.asarray(batch.mask)[0].tolist() == [False, True, True] + [False] * (length - 3)


def test_prompt_tokens_are_no_targets_and_the_first_response_token_is():
    """PITFALLS 44."""
    pairs = [([1, 2, 3], [4, 5, EOS]), ([6], [7, EOS])]
    batch = text.sft_rows(pairs, length=10)
    assert np.asarray(batch.tokens)[0].tolist() == [1, 2, 3, 4, 5, EOS, 6, 7, EOS, 0]
    assert np.asarray(batch.mask)[0].astype(int).tolist() == [0, 0, 0, 1, 1, 1, 0, 1, 1, 0]
    assert np.asarray(batch.segments)[0].tolist() == [1] * 6 + [2] * 3 + [0]
    assert np.asarray(batch.positions)[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0]
    unmasked = text.sft_rows(pairs, length=10, mask_prompt=False)
    assert np.asarray(unmasked.mask)[0].astype(int).tolist() == [0, 1, 1, 1, 1, 1, 0, 1, 1, 0]


def test_over_long_samples_are_errors_or_counted_drops_never_cut():
    """PITFALLS 32: EOS is never truncated away in silence."""
    pairs = [([1, 2], [3, EOS]), ([1, 2, 3], [4, 5, EOS])]
    with pytest.raises(ValueError, match="item 1 has 6 tokens but length=5: raise length"):
        text.sft_rows(pairs, length=5)
    kept, dropped = text.drop_too_long(pairs, length=5)
    assert (kept, dropped) == (pairs[:1], 1)
    rankings = [([1], [[2, EOS], [3, 4, EOS]], [0, 1]), ([1], [[2, EOS], [3, 4, EOS]], [0, -1])]
    with pytest.raises(ValueError, match="item 0 has 6 tokens"):
        text.ranking_rows(rankings, length=5, max_k=2)
    assert text.drop_too_long(rankings, length=5) == (rankings[1:], 1)
    prompts = [[1, 2], [1, 2, 3]]
    with pytest.raises(ValueError, match="prompt 1 has 3 tokens but length=2"):
        text.prompt_batch(prompts, length=2)
    assert text.drop_too_long(prompts, length=2) == ([[1, 2]], 1)
    with pytest.raises(ValueError, match="pair 0 has 0 prompt"):
        text.sft_rows([([], [EOS])], length=4)


def test_prompt_batch_is_right_padded_with_places():
    batch = text.prompt_batch([[5, 6, 7], [8]], length=4, ids=[30, 31])
    assert np.asarray(batch.tokens).tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert np.asarray(batch.lengths).tolist() == [3, 1]
    assert np.asarray(batch.ids).tolist() == [30, 31]
    with pytest.raises(ValueError, match="ids has 1 entries for 2 prompts"):
        text.prompt_batch([[1], [2]], length=4, ids=[0])


# ----------------------------------------------------------------------------------------------------- rankings


def test_ranking_row_by_hand():
    """One prompt with three responses, the middle one not ranked; then a second prompt in the same row."""
    rankings = [
        ([1, 2], [[3, EOS], [9, 9], [4, 5, EOS]], [1, -1, 0]),
        ([6], [[7, EOS], [EOS]], [0, 0]),
    ]
    batch = text.ranking_rows(rankings, length=12, max_k=3)
    assert np.asarray(batch.tokens)[0].tolist() == [1, 2, 3, EOS, 4, 5, EOS, 6, 7, EOS, EOS, 0]
    assert np.asarray(batch.segments)[0].tolist() == [1, 1, 2, 2, 3, 3, 3, 4, 5, 5, 6, 0]
    assert np.asarray(batch.parents)[0].tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 4, 4, 4, 0]
    assert np.asarray(batch.positions)[0].tolist() == [0, 1, 2, 3, 2, 3, 4, 0, 1, 2, 1, 0]
    assert np.asarray(batch.ends).tolist() == [[[3, 0, 6], [9, 10, 0]]]
    assert np.asarray(batch.ranks).tolist() == [[[1, -1, 0], [0, 0, -1]]]
    assert text.padding_share(batch) == pytest.approx(1 / 12)


def test_rows_agree_with_the_one_index_rule():
    """Every target has a predecessor; a response's first token is predicted from its own prompt's last token."""
    batch = text.sft_rows([([1, 2], [3, EOS]), ([4], [5, 6, EOS])], length=9)
    previous = np.asarray(previous_index(jnp.asarray(batch.segments)))
    for slot in np.flatnonzero(batch.mask[0]):
        assert previous[0, slot] == slot - 1
        assert batch.segments[0, slot] == batch.segments[0, slot - 1]
    ranked = text.ranking_rows(
        [([1, 2], [[3, EOS], [4, EOS]], [0, 1]), ([5], [[6], [7]], [1, 0])], length=9, max_k=2
    )
    previous = np.asarray(previous_index(jnp.asarray(ranked.segments), jnp.asarray(ranked.parents)))
    assert np.asarray(ranked.tokens)[0].tolist() == [1, 2, 3, EOS, 4, EOS, 5, 6, 7]
    assert previous[0, [2, 3, 4, 5, 7, 8]].tolist() == [1, 2, 1, 4, 6, 6]


id_lists = st.lists(st.integers(0, 30), min_size=1, max_size=5)


@st.composite
def ranked_ids(draw: st.DrawFn) -> tuple[list[int], list[list[int]], list[int]]:
    k = draw(st.integers(2, 4))
    ranks = draw(st.lists(st.integers(-1, k - 1), min_size=k, max_size=k))
    return draw(id_lists), draw(st.lists(id_lists, min_size=k, max_size=k)), ranks


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(ranked_ids(), min_size=1, max_size=8), st.none() | st.integers(1, 3))
def test_all_responses_of_a_prompt_share_one_row_and_one_prefix(rankings: list, max_n: int | None):
    """PITFALLS 45, 34: a prompt group never splits, costs prompt + sum of responses once, and its ids are unchanged."""
    batch = text.ranking_rows(rankings, length=30, max_k=4, max_n=max_n)
    found, slots = [], 0
    for b in range(len(batch.tokens)):
        for ends, ranks in zip(np.asarray(batch.ends[b]), np.asarray(batch.ranks[b]), strict=True):
            group = []
            for end, rank in zip(ends, ranks, strict=True):
                if rank >= 0:
                    own = np.asarray(batch.segments[b]) == batch.segments[b, end]
                    parent = np.asarray(batch.segments[b]) == batch.parents[b, end]
                    assert np.flatnonzero(own)[-1] == end
                    first = int(np.sum(parent))
                    assert np.asarray(batch.positions[b])[own].tolist() == list(
                        range(first, first + int(own.sum()))
                    )
                    group.append(
                        (batch.tokens[b][parent].tolist(), batch.tokens[b][own].tolist(), int(rank))
                    )
            found += [group] if group else []
        slots += int(np.sum(batch.segments[b] > 0))
    expected = [
        [(p, r, rank) for r, rank in zip(responses, ranks, strict=True) if rank >= 0]
        for p, responses, ranks in rankings
    ]
    assert sorted(found) == sorted(group for group in expected if group)
    assert slots == sum(
        len(p) + sum(len(r) for r, rank in zip(rs, ranks, strict=True) if rank >= 0)
        for p, rs, ranks in rankings
    )


@pytest.mark.parametrize(
    ("ranking", "message"),
    [
        (([1], [[2], [3]], [0]), "2 responses and 1 ranks"),
        (([1], [[2], [3], [4]], [0, 1, 2]), "3 responses but max_k=2"),
        (([], [[2], [3]], [0, 1]), "empty prompt or response"),
        (([1], [[2], []], [0, 1]), "empty prompt or response"),
    ],
)
def test_bad_rankings_are_named(ranking: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        text.ranking_rows([ranking], length=10, max_k=2)


def samples(*rows: tuple[list[int], list[int]], length: int = 9) -> Samples:
    tokens = np.full((len(rows), length), 77, np.int32)  # 77: a poison, no padding may be read
    for b, (prompt, response) in enumerate(rows):
        tokens[b, : len(prompt) + len(response)] = [*prompt, *response]
    return Samples(
        tokens=tokens,
        prompt_lengths=np.array([len(p) for p, _ in rows], np.int32),
        lengths=np.array([len(p) + len(r) for p, r in rows], np.int32),
        logp=np.zeros(tokens.shape, np.float32),
        finished=np.ones(len(rows), bool),
    )


def test_sampled_ids_reach_reward_training_unchanged():
    """PITFALLS 34: Samples -> RankingBatch without a tokenizer; row b is prompt b, K samples are columns."""
    sampled = samples(([1, 2], [3, EOS]), ([1, 2], [4, 5, EOS]), ([6], [7, EOS]), ([6], [EOS]))
    batch = text.ranking_batch(sampled, np.array([[1, 0], [0, 0]], np.int32))
    direct = text.ranking_rows(
        [([1, 2], [[3, EOS], [4, 5, EOS]], [1, 0]), ([6], [[7, EOS], [EOS]], [0, 0])],
        length=7,
        max_k=2,
        max_n=1,
    )
    for name in ("tokens", "segments", "parents", "positions", "ends", "ranks"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(direct, name))
    assert batch.ends.shape == (2, 1, 2)
    assert text.ranking_batch(
        sampled, np.array([[1, 0], [0, -1]], np.int32), length=12
    ).tokens.shape == (2, 12)


def test_ranking_batch_refuses_what_does_not_match():
    sampled = samples(([1, 2], [3, EOS]), ([1, 4], [4, 5, EOS]))
    with pytest.raises(ValueError, match="different prompts"):
        text.ranking_batch(sampled, np.array([[1, 0]]))
    with pytest.raises(ValueError, match=r"samples has 2 rows but ranks has shape \(1, 3\)"):
        text.ranking_batch(sampled, np.array([[1, 0, 2]]))
    same = samples(([1, 2], [3, EOS]), ([1, 2], [4, 5, EOS]))
    with pytest.raises(ValueError, match="need 7 tokens but length=6"):
        text.ranking_batch(same, np.array([[1, 0]]), length=6)


def test_rows_are_numpy_of_the_types_dtypes():
    batch = text.sft_rows([([1], [2, EOS])], length=4)
    assert all(
        isinstance(x, np.ndarray)
        for x in (batch.tokens, batch.segments, batch.positions, batch.mask)
    )
    assert (batch.tokens.dtype, batch.mask.dtype) == (np.int32, np.bool_)


# --------------------------------------------------------------------------------- packed loss is unpacked loss

TINY = gpt2(40, 64, 1, 16, 2)  # learned places: rotary ones would not notice a shift
ROWS = 14
SGD = optax.sgd(1.0)  # parameters before minus parameters after are the gradient
SFT_STEP = jax.jit(steps.make_sft_step(language_model(TINY), SGD))
REWARD_STEP = jax.jit(steps.make_reward_step(scalar_model(TINY), SGD))


def in_rows(batch: LMBatch | RankingBatch) -> LMBatch | RankingBatch:
    """With empty rows (and empty places for prompts) up to one shape, so that one program serves all: they add 0."""
    spare = ROWS - len(batch.tokens)
    grown = {}
    for field in dataclasses.fields(batch):
        x = np.asarray(getattr(batch, field.name))
        more = [(0, spare), *[(0, 0)] * (x.ndim - 1)]
        if field.name in ("ends", "ranks"):
            more[1] = (0, 4 - x.shape[1])
        grown[field.name] = jnp.asarray(
            np.pad(x, more, constant_values=-1 if field.name == "ranks" else 0)
        )
    return dataclasses.replace(batch, **grown)


def scorer() -> dict:
    """A fresh score head is 0 and gives no gradient to what lies below: this one is not."""
    params = scalar_model(TINY).init(jax.random.key(0))
    noise = jax.random.normal(jax.random.key(1), params["score"]["weight"].shape)
    return {**params, "score": {**params["score"], "weight": 0.3 * noise}}


def loss_and_gradient(batch: LMBatch | RankingBatch) -> tuple[float, jax.Array]:
    """Of a training step as the stages make it; the gradients of all parameters in one vector."""
    if isinstance(batch, LMBatch):
        step, name, params = SFT_STEP, "sft/loss", language_model(TINY).init(jax.random.key(0))
    else:
        step, name, params = REWARD_STEP, "reward/loss", scorer()
    with jax.default_matmul_precision("highest"):
        state, metrics = step(steps.train_state(params, SGD), in_rows(batch), None)
    gradient = jax.tree.map(lambda before, after: before - after, params, state.params)
    return float(metrics[name].value), jax.flatten_util.ravel_pytree(gradient)[0]


def assert_same_step(packed: LMBatch | RankingBatch, unpacked: LMBatch | RankingBatch) -> None:
    assert len(packed.tokens) < len(unpacked.tokens)
    assert text.padding_share(packed) < text.padding_share(unpacked)
    (loss, gradient), (expected, expected_gradient) = (
        loss_and_gradient(packed),
        loss_and_gradient(unpacked),
    )
    assert expected > 0.1
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert float(jnp.linalg.norm(expected_gradient)) > 0.01
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


def drawn(seed: int, low: int, high: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, TINY.vocab_size, rng.integers(low, high)).tolist()


def test_packed_sft_loss_is_the_loss_of_one_demonstration_a_row():
    pairs = [(drawn(i, 2, 12), [*drawn(i + 100, 1, 14), EOS]) for i in range(13)]
    rows = [text.sft_rows(pairs, length=48, max_pieces=most) for most in (None, 1)]
    assert_same_step(*rows)


def test_packed_loss_of_conversations_is_the_loss_of_one_a_row():
    """Targets in the middle of a piece, as the turns of a conversation have them."""
    random = np.random.default_rng(0)
    ids = [drawn(i, 6, 24) for i in range(13)]
    pieces = [
        (piece, [False, *(random.random(len(piece) - 2) < 0.5).tolist(), True]) for piece in ids
    ]
    assert text.drop_too_long(pieces, length=23) == (pieces, 0)
    rows = [text.masked_rows(pieces, length=48, max_pieces=most) for most in (None, 1)]
    assert (
        int(rows[0].mask.sum())
        == int(rows[1].mask.sum())
        == sum(map(sum, (mask for _, mask in pieces)))
    )
    assert_same_step(*rows)


def test_packed_pretraining_loss_is_the_loss_of_one_document_a_row():
    """A document longer than a row is cut into the same pieces either way."""
    documents = [[*drawn(i, 3, 30), EOS] for i in range(12)] + [[*drawn(50, 60, 61), EOS]]
    alone = [text.lm_rows([d], length=48) for d in documents]
    unpacked = jax.tree.map(lambda *rows: np.concatenate(rows), *alone)
    assert_same_step(text.lm_rows(documents, length=48), unpacked)


def rankings() -> list[tuple[list[int], list[list[int]], list[int]]]:
    """Two to four responses, with ties and a response that nobody ranked."""
    ranks = [[0, 1], [1, 0, 2], [0, 0, 1, 2], [1, -1, 0], [0, 1], [2, 1, 0]]
    return [
        (drawn(i, 2, 6), [[*drawn(10 * i + j + 100, 1, 7), EOS] for j in range(len(r))], r)
        for i, r in enumerate(ranks)
    ]


def test_packed_ranking_loss_is_the_loss_of_one_prompt_a_row():
    """Several prompts to a row: ``ends, ranks`` are B N K with N above 1."""
    packed, unpacked = (
        text.ranking_rows(rankings(), length=60, max_k=4, max_n=most) for most in (None, 1)
    )
    assert packed.ends.shape[1] > 1 == unpacked.ends.shape[1]
    assert_same_step(packed, unpacked)


def test_shared_prefix_loss_is_the_loss_of_each_response_in_a_row_of_its_own():
    """The prompt written out before each response, no parents: what a reward model without packing computes."""
    asked = rankings()
    alone = text.prompt_batch([[*p, *r] for p, responses, _ in asked for r in responses], length=16)
    with jax.default_matmul_precision("highest"):
        scored = jax.jit(functools.partial(scoring.sequence_values, scalar_model(TINY)))(
            scorer(), jnp.asarray(alone.tokens), jnp.asarray(alone.lengths)
        )[1]
    remaining = iter(scored.tolist())
    scores = [[next(remaining) for _ in r] + [0.0] * (4 - len(r)) for _, _, r in asked]
    ranks = [r + [-1] * (4 - len(r)) for _, _, r in asked]
    expected = float(ranking_loss(jnp.asarray(scores), jnp.asarray(ranks))[0].value)
    loss, _ = loss_and_gradient(text.ranking_rows(asked, length=60, max_k=4))
    assert expected > 0.1
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
