"""Reports what a PPO iteration skipped, by record, and stops a run that has diverged."""

from __future__ import annotations

import jax
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.run import guards
from rlhf_jax.run.metrics import Values, to_host
from rlhf_jax.run.ppo.setup import Setup
from rlhf_jax.steps import minibatch_order


def iteration_keys(config: ConfigDict, iteration: int) -> tuple[jax.Array, jax.Array]:
    """The key of an iteration's samples, and the key that orders its minibatches."""
    key = jax.random.fold_in(jax.random.key(config.seed), iteration)
    return key, jax.random.fold_in(key, 1)


def watch(
    setup: Setup, skips: guards.Skips, metrics: Values, iteration: int, config: ConfigDict
) -> None:
    """Reports the scores and minibatches that were skipped, and stops a run that has diverged.

    Raises:
      FloatingPointError: no score is finite, every minibatch or too many in a row were skipped, or
        an alarm went off.
    """
    # The metrics are fetched in one transfer; this waits until the iteration is done.
    seen = to_host(metrics)
    where = setup.prompts.indices(iteration)
    records = guards.RowRecords(config.prompts, setup.prompt_ids)
    if seen["rollout/dropped"]:
        rows = where[guards.rows_on_host(metrics["dropped_rows"].value)].tolist()
        abstains = (
            f" (None from {setup.text_reward.name} counts as NaN)" if setup.text_reward else ""
        )
        why = f"it is not finite{abstains}"
        event = guards.Event(iteration + 1, "score", why, rows, records.of(rows))
        skips.tell(event)
        # The metric is a share: 1 means that no score of the iteration can be used.
        if seen["rollout/dropped"] >= 1:
            skips.stop("every score of the iteration was", [event])
    if seen["skipped"]:
        name_skipped(setup, skips, metrics, guards.reason(seen["spiked"] > 0), iteration, config)
    else:
        skips.add(False)
    alarm(seen, iteration, config)


def name_skipped(
    setup: Setup, skips: guards.Skips, metrics: Values, why: str, iteration: int, config: ConfigDict
) -> None:
    """Reports the skipped optimizer steps of an iteration, with the reason `why`.

    Raises:
      FloatingPointError: all steps were skipped, or too many in a row, counted across iterations.
    """
    skipped = guards.rows_on_host(metrics["skipped_steps"].value)
    steps = config.epochs * config.minibatches
    # The order is recomputed from the iteration's key, since the compiled step does not return it.
    order = minibatch_order(
        iteration_keys(config, iteration)[1],
        config.episodes,
        epochs=config.epochs,
        minibatches=config.minibatches,
    )
    where, records = (
        setup.prompts.indices(iteration),
        guards.RowRecords(config.prompts, setup.prompt_ids),
    )
    events = []
    for step in range(steps):
        if step not in skipped:
            skips.add(False)
            continue
        rows = where[np.asarray(order[step])].tolist()
        events.append(
            guards.Event(
                iteration + 1, f"minibatch {step + 1} of {steps}", why, rows, records.of(rows)
            )
        )
        skips.add(True, events[-1])
    if len(events) == steps:
        skips.stop(f"every minibatch of iteration {iteration + 1} was", events)


def alarm(seen: dict[str, float], iteration: int, config: ConfigDict) -> None:
    """Stops a run if the policy left the reference or collapsed, or the value network diverged.

    Args:
      seen: the metrics of an iteration.
      iteration: counted from 0.
      config: `kl_ceiling` in nats per sequence, `entropy_floor` in nats per token,
        `value_error_ceiling` in squared scores.

    Raises:
      FloatingPointError: an alarm went off; the message says what to do.
    """
    kl, entropy = seen["rollout/kl_nats_per_sequence"], seen["rollout/surprisal_nats_per_token"]
    # A custom value loss may not report its error; then there is nothing to watch.
    # The error is relative to the squared score, but not below 1: a ratio of two small numbers
    # would set off the alarm.
    error = seen.get("value/value_error", 0.0) / max(1.0, seen["rollout/score_square"])
    for fine, what in (
        (kl <= config.kl_ceiling,
         f"KL to the reference is {kl:.3g} nats a sequence, above kl_ceiling={config.kl_ceiling}: "
         "lower learning_rate or raise kl.coef"),
        (entropy >= config.entropy_floor,
         f"the policy's entropy is {entropy:.3g} nats a token, below "
         f"entropy_floor={config.entropy_floor}: it says almost always the same; lower "
         "learning_rate, raise kl.coef, or set entropy_floor=0 if that is as wanted"),
        (error <= config.value_error_ceiling,
         f"the squared error of the values is {error:.3g} times the squared score, above "
         "value_error_ceiling="
         f"{config.value_error_ceiling}: lower value_learning_rate or set value_clip_norm"),
    ):  # fmt: skip
        if not fine:  # Also for NaN, since every comparison with it is false.
            raise FloatingPointError(
                f"iteration {iteration + 1}: {what}; what was saved before is intact"
            )
