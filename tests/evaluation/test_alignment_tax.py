import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.evaluation.alignment_tax import batch_loss, lm_loss
from rlhf_jax.types import LMBatch, Model, Output

VOCABULARY = 7


def _bigram() -> Model:
    """A model whose logits at a token are that token's row of a table."""

    def apply(params, tokens, **_):
        return Output(jax.nn.one_hot(tokens, VOCABULARY) @ params["table"], None)

    def init(key):
        return {"table": jax.random.normal(key, (VOCABULARY, VOCABULARY))}

    return Model(init, apply, lambda params, hidden: hidden, lambda batch, length: None)  # pyright: ignore


def _batch(rng, rows=3, slots=10):
    segments = np.zeros((rows, slots), np.int32)
    segments[:, :4], segments[:, 4:8] = 1, 2
    segments[0, 6:] = 0
    positions = np.tile(np.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 0], np.int32), (rows, 1))
    return LMBatch(
        *map(
            jnp.asarray,
            (
                rng.integers(VOCABULARY, size=(rows, slots), dtype=np.int32),
                segments,
                positions,
                segments > 0,
            ),
        )
    )


def _loop(params, batches):
    table = np.asarray(params["table"], np.float64)
    logp = table - np.log(np.exp(table).sum(1, keepdims=True))
    losses = []
    for batch in batches:
        tokens, segments = np.asarray(batch.tokens), np.asarray(batch.segments)
        for b, t in np.ndindex(*tokens.shape):
            if t > 0 and segments[b, t] > 0 and segments[b, t] == segments[b, t - 1]:
                losses.append(-logp[tokens[b, t - 1], tokens[b, t]])
    return np.mean(losses)


def test_loss_of_packed_rows_equals_a_loop_over_documents():
    """Packing lets no document be predicted from its neighbour, and ragged batches weigh by their tokens."""
    model, rng = _bigram(), np.random.default_rng(0)
    params = model.init(jax.random.key(0))
    batches = [_batch(rng), _batch(rng, rows=1)]
    assert lm_loss(model, params, batches) == pytest.approx(_loop(params, batches), rel=1e-5)


def test_padding_is_never_read():
    model, batch = _bigram(), _batch(np.random.default_rng(1))
    params = model.init(jax.random.key(1))
    poisoned = LMBatch(
        jnp.where(batch.mask, batch.tokens, 3), batch.segments, batch.positions, batch.mask
    )
    assert lm_loss(model, params, [poisoned]) == lm_loss(model, params, [batch])


def test_one_compile_for_all_parameter_sets():
    model, batch = _bigram(), _batch(np.random.default_rng(2))
    before = batch_loss._cache_size()
    losses = [lm_loss(model, model.init(jax.random.key(i)), [batch, batch]) for i in range(3)]
    assert batch_loss._cache_size() == before + 1
    assert len(set(losses)) == 3


def test_no_target_is_an_error_not_a_loss_of_zero():
    model, batch = _bigram(), _batch(np.random.default_rng(3))
    params = model.init(jax.random.key(0))
    empty = LMBatch(batch.tokens, batch.segments, batch.positions, jnp.zeros_like(batch.mask))
    for batches in ([], [empty]):
        with pytest.raises(ValueError, match="no target token"):
            lm_loss(model, params, batches)
