r"""PPO against a reward model with a per-token KL penalty; with `ptx_coef` > 0, PPO-ptx.

Run:

    python experiments/ppo.py --config=configs/ppo/storyland.py --workdir=runs/ppo \
        --config.model=runs/ppo_init/epoch-2 --config.reward_model=runs/reward_model/model \
        --config.prompts=runs/data/prompts_ppo.jsonl \
        --config.pretraining_text=runs/data/corpus.jsonl

One iteration (`iterate`):

1. Sample: the policy ``pi`` answers a batch of prompts.
2. Score and shape: the reward model scores each response, and the score becomes rewards of tokens,
   ``reward_t = score * [t is last] - kl_coef * (log pi(y_t) - log pi_ref(y_t))``, from which GAE
   computes advantages and returns.
3. Update: epochs x minibatches optimizer steps on the clipped policy loss and the value loss;
   PPO-ptx mixes in the language-model loss of pretraining text.

The reference ``pi_ref`` is the initial policy; the value network starts from the reward model or,
without one, from the policy with a new head.

Source: Ouyang et al. 2022, section 3.5 (eq. 2) and appendix C.4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax import scoring, sharding
from rlhf_jax.data import chat, text
from rlhf_jax.rollout import Shaping, make_score_and_shape
from rlhf_jax.run import (
    cli,
    contexts,
    datasets,
    devices,
    memory,
    networks,
    results,
)
from rlhf_jax.run.config import filled_from
from rlhf_jax.run.loop import Loop, Settings
from rlhf_jax.run.networks import Network, TrainableParams
from rlhf_jax.run.ppo import programs
from rlhf_jax.run.ppo.judging import judge_all, observe, response_texts
from rlhf_jax.run.ppo.settings import (
    check,
    check_contexts,
    check_ptx_rows,
    judge,
    losses,
    update_settings,
)
from rlhf_jax.run.ppo.setup import (
    Pieces,
    Setup,
    check_step_zero,
    initial_state,
    kl_controller,
    optimizers,
    origin,
    pieces_for,
    reward_and_value,
    sharding_rules,
    stop_ids,
    text_rows,
)
from rlhf_jax.run.ppo.watch import iteration_keys, watch
from rlhf_jax.sampling.generate import Sampling, generate
from rlhf_jax.steps import compile_frozen_step, make_ppo_step
from rlhf_jax.types import Metrics, Model, Params, PPOState, Samples, StepFn

SHOW = (
    "rollout/score", "gold_score", "rollout/kl_nats_per_sequence", "rollout/response_tokens",
    "held_out_loss",
)  # fmt: skip


def run(config: ConfigDict, workdir: str) -> dict:
    """Writes ``ema/`` and ``last/`` (models), checkpoints, metrics and ``ppo.json``."""
    check(config)
    mesh = devices.start(config.mesh)
    # Several processes train one model, so all of them must read the same files.
    devices.agree_on_inputs(
        config.model, config.reward_model, config.prompts, config.pretraining_text,
        config.held_out_text,
    )  # fmt: skip
    with memory.phase(
        "set-up",
        lower=("config.mesh (more devices)", "config.train=lora", "config.optimizer=adam_bf16"),
    ):
        setup = prepare(config, mesh)
    settings = Settings(
        workdir, config.name, steps=config.iterations, save_every=config.save_every,
        keep=config.keep, max_skipped=config.guard.max_skipped, show=SHOW, unit="iterations",
    )  # fmt: skip
    with Loop(settings, setup.state, origin=origin(config, setup), data=config.prompts) as loop:
        if not loop.is_over:  # a finished run that is started again has nothing to compile
            programs.compile_ahead(setup, config, mesh)
        for iteration, state in loop:
            state, metrics = iterate(setup, state, iteration, config, mesh)
            loop.log(metrics)
            # Before `done`, which saves: a run that has diverged stops here.
            watch(setup, loop.skips, metrics, iteration, config)
            loop.done(state)
    result = save(loop.state, setup, config, workdir)
    return results.write_result(Path(workdir) / "ppo.json", lambda: result)


def iterate(
    setup: Setup, state: PPOState, iteration: int, config: ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[PPOState, Metrics]:
    """One PPO iteration: sample, score, shape, update.

    All randomness is a function of (seed, iteration), so a resumed run repeats the original.
    """
    # Each phase waits for its arrays, so that running out of memory is reported by its name.
    phase = partial(programs.phase_of_iteration, setup=setup, config=config, mesh=mesh)
    key, order_key = iteration_keys(config, iteration)

    # 1. Sample one response to each prompt of the iteration.
    prompts = prompts_of(setup, iteration, config, mesh)
    with phase("rollout"):
        samples = jax.block_until_ready(sample(setup, state, prompts, key, config))
    if iteration == 0:
        check_step_zero(setup, state, samples, config)

    # 2. Score by the reward model, or on the host by a function of the texts (`scores`); then
    # compute rewards, advantages and returns.
    texts = response_texts(setup, samples, iteration)
    judged = judge_all(setup, setup.text_reward, texts, iteration) if setup.text_reward else None
    scores = None
    if judged is not None:
        scores = sharding.place_batch(sharding.own_rows(np.asarray(judged, np.float32), mesh), mesh)
    pieces = pieces_for(setup, samples, order_key, config)
    value = setup.trained_value.whole(state.value.params)
    reward = setup.reward.params if setup.reward else None
    with phase("score"):
        rollout, metrics = jax.block_until_ready(
            pieces.score_and_shape(
                setup.policy.params, value, reward, samples, state.kl.coef, prompts.ids, scores
            )
        )

    # 3. Update policy and value network in epochs x minibatches steps. PPO-ptx also trains on rows
    # of pretraining text.
    rows = None if setup.pretraining is None else sharding.place_batch(
        setup.pretraining.at(iteration), mesh
    )  # fmt: skip
    with phase("update"):
        state, update = jax.block_until_ready(pieces.step(state, rollout, rows, order_key))
    kl = setup.controller.update(state.kl, metrics["rollout/kl_nats_per_sequence"].value)
    # Placed as the compiled step expects it: another sharding would compile the step again.
    state = dataclasses.replace(state, kl=jax.device_put(kl, setup.state.kl.coef.sharding))
    return state, metrics | update | observe(setup, state, texts, iteration, config)


def save(state: PPOState, setup: Setup, config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Writes the averaged and the last policy as model folders; returns the result of the run."""
    assert state.policy.ema is not None  # `initial_state` requests it
    folder = Path(workdir)
    for name, params in (("last", state.policy.params), ("ema", state.policy.ema)):
        networks.save_network(
            folder / name, setup.policy._replace(params=setup.trained_policy.merged(params))
        )
    return {
        "ema": str(folder / "ema"), "last": str(folder / "last"),
        "episodes": config.iterations * config.episodes, "optimizer_steps": int(state.policy.step),
        "kl_coef": float(state.kl.coef),
    }  # fmt: skip


# ---------------------------------------------------------------------------------- before the loop


def prepare(config: ConfigDict, mesh: jax.sharding.Mesh) -> Setup:
    """Loads the networks, encodes prompts and pretraining text, builds the compiled functions."""
    check_contexts(config)
    # The loaded network is the reference; the trained policy is built from it below.
    policy = networks.load_network(
        config.model, mesh, config.decoder, rules=sharding_rules(config)["reference"]
    )
    reward, value = reward_and_value(policy, config, mesh)
    records = datasets.read_prompts(config.prompts, tokenizer=policy.tokenizer)
    asked = [r.prompt for r in records]
    # Each tokenizer renders conversations by its own chat template; these must agree.
    if reward and not all(isinstance(prompt, str) for prompt in asked):
        chat.check_same_template(policy=policy.tokenizer, reward_model=reward.tokenizer)
    ids = datasets.encode_prompts(
        policy.tokenizer, asked, length=config.prompt_length, where=config.prompts
    )
    rows = text.prompt_batch(ids, length=config.prompt_length)
    prompts = datasets.batches(rows, mesh, batch_size=config.episodes, seed=config.seed)
    context = contexts.of_network(policy, networks.model_folder(config.model))
    trained = networks.trainable(policy.params, config), networks.trainable(value.params, config)
    state, where = initial_state(config, mesh, trained[0].params, trained[1].params)
    pretraining = held_out = None
    if config.ptx_coef:
        rows = text_rows(policy.tokenizer, config.pretraining_text, config, context)
        pretraining = datasets.batches(
            rows, mesh, batch_size=check_ptx_rows(config), seed=config.seed
        )
    if config.held_out_text:
        rows = text_rows(policy.tokenizer, config.held_out_text, config, context)
        # A fixed seed: runs of every seed are evaluated on the same rows.
        held_out = datasets.held_out_batches(
            rows, mesh, batch_size=config.held_out_rows, seed=0, most=1
        )
    # Two samples in a row save work on one device; over several, exchanging rows costs more.
    one_device = mesh.size == config.microbatches == config.score_microbatches == 1
    pieces = partial(compiled_pieces, config, mesh, policy, value, reward, trained, where)
    return Setup(
        policy, reward, value.model, *trained, asked, [r.id for r in records], prompts, pretraining,
        held_out or [], kl_controller(config), pieces(),
        pieces(rollout_model=scoring.pair_rows) if one_device else None, state, judge(config.gold),
        judge(config.text_reward),
    )  # fmt: skip


def compiled_pieces(
    config: ConfigDict, mesh: jax.sharding.Mesh, policy: Network, value: Network,
    reward: Network | None, trained: tuple[TrainableParams, TrainableParams], where: PPOState,
    rollout_model: Callable[[Model], Model] = lambda model: model,
) -> Pieces:  # fmt: skip
    """The compiled functions after sampling; `where` are the shardings that the state keeps."""
    make_step = partial(
        make_ppo_step, optimizers=optimizers(config), ppo=update_settings(config),
        losses=losses(config), batch_sharding=sharding.batch_sharding(mesh),
        rollout_model=rollout_model,
    )  # fmt: skip

    # With LoRA the base weights are frozen: an argument of the compiled step, because as a constant
    # inside it they would be a second copy.
    def step(frozen: tuple[Params, Params]) -> StepFn:
        return make_step(
            trained[0].model(policy.model, frozen[0]), trained[1].model(value.model, frozen[1])
        )

    score_and_shape = make_score_and_shape(
        rollout_model(policy.model), rollout_model(value.model),
        reward and rollout_model(reward.model),
        filled_from(Shaping, config, microbatches=config.score_microbatches),
    )  # fmt: skip
    frozen = trained[0].frozen, trained[1].frozen
    return Pieces(score_and_shape, compile_frozen_step(step, frozen, state_sharding=where))


def dry_run(config: ConfigDict) -> dict[str, memory.Needs]:
    """Compiles the three phases of an iteration at their real shapes and prints their memory."""
    check(config)
    mesh = devices.start(config.mesh)
    setup = prepare(config, mesh)
    return memory.dry_run(
        programs.programs(setup, config, mesh), mesh, state=programs.staying(setup)
    )


# ---------------------------------------------------------------------------------- in an iteration


def prompts_of(setup: Setup, iteration: int, config: ConfigDict, mesh: jax.sharding.Mesh) -> Any:
    """The prompts of an iteration on the devices; ids count the prompts of the whole run."""
    ids = np.arange(iteration * config.episodes, (iteration + 1) * config.episodes, dtype=np.int32)
    return sharding.place_batch(
        dataclasses.replace(setup.prompts.at(iteration), ids=sharding.own_rows(ids, mesh)), mesh
    )


def sample(
    setup: Setup, state: PPOState, prompts: Any, key: jax.Array, config: ConfigDict
) -> Samples:
    """Responses of the current policy.

    Without top-k or top-p: the sampling distribution is exactly the one that the update trains.
    """
    return generate(
        setup.policy.model, setup.trained_policy.merged(state.policy.params), prompts,
        jax.random.fold_in(key, 0),
        Sampling(
            max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            stop_ids=stop_ids(setup),
        ),
    )  # fmt: skip


if __name__ == "__main__":
    cli.main(
        run, config="configs/ppo/storyland.py", workdir="runs/ppo", dry_run=dry_run, check=check
    )
