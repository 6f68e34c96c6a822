"""The alignment tax: what alignment costs a model on the text it was pretrained on."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import jax

from rlhf_jax.log_probs import token_log_probs
from rlhf_jax.ops import previous_index
from rlhf_jax.types import LMBatch, Mean, Model, Params


def lm_loss(model: Model, params: Params, batches: Iterable[LMBatch]) -> float:
    """Held-out language-model loss: ``-sum log p(token) / number of targets``, nats per token.

    Totals and counts are summed over batches before they are divided, so that ragged batches are
    weighted by their tokens. A model is compiled once per batch shape, however many parameter sets
    (base, SFT, PPO, ...) it is measured with.

    Args:
      model: a language model.
      params: its parameters; no dropout is applied.
      batches: held-out rows, the same for every model that is compared.

    Returns:
      Mean negative log-likelihood of the target tokens in nats.

    Raises:
      ValueError: the batches contain no target token.

    Source: Ouyang et al. 2022, section 4.2 and appendix E.6 (regressions on public NLP sets and on
    pretraining loss).
    """
    sums = None
    for batch in batches:
        loss = batch_loss(model, params, batch)
        sums = loss if sums is None else sums + loss
    if sums is None or float(sums.count) == 0:
        raise ValueError(
            "batches hold no target token: give held-out rows whose mask is true somewhere"
        )
    return float(sums.value)


@partial(jax.jit, static_argnames="model")
def batch_loss(model: Model, params: Params, batch: LMBatch) -> Mean:
    """Summed negative log-likelihood of the target tokens of one batch, and their number."""
    layout = {"segments": batch.segments, "positions": batch.positions}
    hidden = model.apply(params, batch.tokens, **layout).hidden
    previous = previous_index(batch.segments)
    head = partial(model.head, params)
    logp = token_log_probs(hidden, head, batch.tokens, batch.mask, previous=previous)
    # A segment's first token has no predecessor and cannot be a target, whatever the mask says.
    targets = batch.mask & (previous >= 0)
    return Mean(-(logp * targets).sum(), targets.sum().astype(logp.dtype))
