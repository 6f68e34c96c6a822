"""Set-up of PPO: optimizers, the KL controller, the initial state and its shardings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax import kl_control, scoring, sharding
from rlhf_jax.data import text
from rlhf_jax.data.loader import Batches
from rlhf_jax.data.schema import Conversation
from rlhf_jax.models.heads import scalar_from_language_model, scalar_model
from rlhf_jax.ppo import Optimizers
from rlhf_jax.rewards import functions
from rlhf_jax.rollout import InitialParams, step_zero_checks
from rlhf_jax.run import contexts, datasets, guards, networks
from rlhf_jax.run import optimizers as optimizer_lib
from rlhf_jax.run.networks import Network, TrainableParams, load_network
from rlhf_jax.run.ppo.settings import require_reward
from rlhf_jax.steps import minibatch_order, train_state
from rlhf_jax.types import LMBatch, Metrics, Model, Params, PPOState, Rollout, Samples


class Pieces(NamedTuple):
    """The compiled functions of an iteration after sampling."""

    score_and_shape: Callable[..., tuple[Rollout, Metrics]]
    step: Callable[..., tuple[PPOState, Metrics]]


class Setup(NamedTuple):
    """Everything that stays constant while PPO runs: networks, data streams, compiled functions."""

    policy: Network
    reward: Network | None
    value: Model
    trained_policy: TrainableParams
    trained_value: TrainableParams
    asked: list[Conversation]
    prompt_ids: list[str | None]
    prompts: Batches
    pretraining: Batches | None
    held_out: list[LMBatch]
    controller: kl_control.KLController
    pieces: Pieces
    paired: Pieces | None
    state: PPOState
    gold: functions.Judge | None
    text_reward: functions.Judge | None


def sharding_rules(config: ConfigDict) -> dict[str, sharding.Rules]:
    """The sharding rules of the four networks, each with its own.

    A large policy may be sharded while a small reward model is replicated.
    """
    return {
        name: sharding.rules_from_data(config.sharding[name], field=f"sharding.{name}")
        for name in ("policy", "reference", "value", "reward_model")
    }


def optimizers(config: ConfigDict) -> Optimizers:
    """The optimizers of policy and value network.

    Their schedules count ``epochs * minibatches`` steps per iteration.
    """
    per_iteration = config.epochs * config.minibatches
    steps = config.iterations * per_iteration
    policy = optimizer_lib.schedule(
        config.schedule,
        config.learning_rate,
        steps,
        warmup=config.warmup_iterations * per_iteration,
    )
    value = optimizer_lib.schedule(
        config.schedule,
        config.value_learning_rate,
        steps,
        warmup=config.value_warmup_iterations * per_iteration,
    )
    # The policy's gradients of PPO and of the pretraining text have limits of their own and are
    # clipped in the step, so its optimizer does not clip.
    return Optimizers(
        optimizer_lib.optimizer(config, policy),
        optimizer_lib.optimizer(config, value, clip_norm=config.value_clip_norm),
    )


def kl_controller(config: ConfigDict) -> kl_control.KLController:
    """The controller of the KL coefficient named by the config."""
    if config.kl.controller == "fixed":
        return kl_control.fixed_kl(coef=config.kl.coef)
    return kl_control.adaptive_kl(
        coef=config.kl.coef,
        target=config.kl.target,
        horizon=config.kl.horizon,
        n_steps=config.episodes,
    )


def initial_state(
    config: ConfigDict, mesh: jax.sharding.Mesh, policy: Params, value: Params
) -> tuple[PPOState, Any]:
    """The initial state of PPO, built directly on its devices, and its shardings."""
    rules, (policy_tx, value_tx) = sharding_rules(config), optimizers(config)
    made, where = sharding.build_state(
        partial(train_state, tx=policy_tx, ema=True, guard=True),
        policy,
        mesh=mesh,
        rules=rules["policy"],
    )
    other, other_where = sharding.build_state(
        partial(train_state, tx=value_tx, guard=True), value, mesh=mesh, rules=rules["value"]
    )  # fmt: skip
    # The state of the KL controller and the number of iterations, the last fields of `PPOState`.
    rest = kl_controller(config).init(), jnp.zeros((), jnp.int32)
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), rest)
    return PPOState(made, other, *sharding.place_state(rest, mesh, ())), PPOState(
        where, other_where, *whole
    )


def stop_ids(setup: Setup) -> tuple[int, ...]:
    """The tokens that end a response; an arbitrary one if there is no tokenizer (a dry run)."""
    return (
        (0,)
        if setup.policy.tokenizer is None
        else tuple(text.stop_ids(setup.policy.tokenizer, setup.asked))
    )


def reward_and_value(
    policy: Network, config: ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[Network | None, Network]:
    """The reward model and the network from which the value function is initialized.

    The reward model is None if a function of the text gives the rewards.
    """
    require_reward(config)
    if not config.reward_model:
        # Without a reward model the value network is the policy's trunk with a new head.
        params = scalar_from_language_model(policy.params, jax.random.key(config.seed))
        return None, Network(scalar_model(policy.model.config), params, policy.tokenizer)
    rules = sharding_rules(config)["reward_model"]
    network = load_network(config.reward_model, mesh, config.decoder, rules=rules)
    # Both networks read the same token ids.
    text.check_same_tokenizer(policy=policy.tokenizer, reward_model=network.tokenizer)
    # With a text reward, the reward model only initializes the value network.
    return (None if config.text_reward else network), network


def text_rows(tokenizer: Any, path: str, config: ConfigDict, context: contexts.Context) -> LMBatch:
    """Packed rows of a plain-text file, each document within the policy's context."""
    return datasets.lm_rows(
        tokenizer, path, length=config.ptx_row_length, context=context, key="ptx_row_length"
    )


def origin(config: ConfigDict, setup: Setup) -> dict[str, Any]:
    """Fingerprints of the inputs for the checkpoints; models are identified by their sha256."""
    files = {key: config[key] for key in ("prompts", "held_out_text")}
    if config.ptx_coef:
        files["pretraining_text"] = config.pretraining_text
    models = {
        key: networks.model_folder(config[key]) for key in ("model", "reward_model") if config[key]
    }
    return guards.origin(config, files=files, models=models, tokenizer=setup.policy.tokenizer)


def pieces_for(setup: Setup, samples: Samples, key: jax.Array, config: ConfigDict) -> Pieces:
    """The functions that put two samples into a row, where this fits; else one per row.

    The pairs must fit both in the whole rollout, which is scored, and in each minibatch.
    """
    if setup.paired is None:
        return setup.pieces
    lengths, slots = np.asarray(samples.lengths), samples.tokens.shape[1]
    # The same key gives the same order in the update, so the rows of each minibatch are known here.
    order = minibatch_order(key, len(lengths), epochs=config.epochs, minibatches=config.minibatches)
    fit = scoring.pairs_fit(lengths, slots) and scoring.pairs_fit(lengths[np.asarray(order)], slots)
    return setup.paired if fit else setup.pieces


def check_step_zero(setup: Setup, state: PPOState, samples: Samples, config: ConfigDict) -> None:
    """Stops the run unless policy, reference, sampler and value network agree before any update."""
    reward = setup.reward
    step_zero_checks(
        setup.policy.model, setup.value, reward.model if reward else None,
        InitialParams(
            policy=setup.trained_policy.whole(state.policy.params), reference=setup.policy.params,
            value=setup.trained_value.whole(state.value.params),
            reward=reward.params if reward else None,
        ),
        samples, temperature=config.temperature,
    )  # fmt: skip
