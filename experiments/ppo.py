r"""PPO against a reward model with a per-token KL penalty; with `ptx_coef` > 0 pretraining text is mixed in (PPO-ptx).

Run:

    python experiments/ppo.py --config=configs/ppo/storyland.py --workdir=runs/ppo \
        --config.model=runs/ppo_init/epoch-2 --config.reward_model=runs/reward_model/model \
        --config.prompts=runs/data/prompts_ppo.jsonl --config.pretraining_text=runs/data/corpus.jsonl

One iteration: prompts -> generate -> score and shape -> update over epochs x minibatches. The model it starts from is
also the KL reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import common, contexts, guards, inputs, memory
from rlhf_jax import config as config_lib
from rlhf_jax import kl_control, processes, scoring, sharding
from rlhf_jax.checkpoint import Checkpoints, stop_requests
from rlhf_jax.data import chat, schema, text
from rlhf_jax.data.loader import Batches
from rlhf_jax.evaluation.alignment_tax import lm_loss
from rlhf_jax.metrics import StageLog, to_host
from rlhf_jax.models.heads import scalar_from_language_model, scalar_model
from rlhf_jax.rewards import functions
from rlhf_jax.rollout import make_score_and_shape, step_zero_checks
from rlhf_jax.sampling.generate import generate, lower_generate
from rlhf_jax.steps import (
    POLICY_ARGUMENTS,
    VALUE_ARGUMENTS,
    compile_frozen_step,
    make_ppo_step,
    minibatch_order,
    train_state,
)
from rlhf_jax.types import LMBatch, Metrics, Model, Params, PPOState, PromptBatch, Rollout, Samples, StepFn

SHOW = ("rollout/score", "gold_score", "rollout/kl_nats_per_sequence", "rollout/response_tokens", "held_out_loss")


class Pieces(NamedTuple):
    """The compiled pieces of an iteration after sampling."""

    score_and_shape: Callable[..., tuple[Rollout, Metrics]]
    step: Callable[..., tuple[PPOState, Metrics]]


class Setup(NamedTuple):
    """Everything that stays the same while PPO runs: networks, streams, compiled pieces."""

    policy: common.Network
    reward: common.Network | None
    value: Model
    trained_policy: common.Trained
    trained_value: common.Trained
    asked: list[schema.Conversation]
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


def run(config: ConfigDict, workdir: str) -> dict:
    """Writes ``ema/`` and ``last/`` (models), checkpoints, metrics and ``ppo.json``."""
    check(config)
    mesh = common.start(config.mesh)
    common.agree_on_inputs(
        config.model, config.reward_model, config.prompts, config.pretraining_text, config.held_out_text
    )
    with memory.phase(
        "set-up", lower=("config.mesh (more devices)", "config.train=lora", "config.optimizer=adam_bf16")
    ):
        setup = prepare(config, mesh)
    folder = Path(workdir)
    made_of, kept = origin(config, setup), {}
    with Checkpoints(folder / "checkpoints", keep=config.keep) as saved, stop_requests() as stop:
        state, done = setup.state, saved.newest_good() or 0
        if done:
            state, kept = saved.restore(done, state)
            changes = guards.check_origin(kept, made_of)
            made_of |= guards.changed_config(kept, changes, step=done, steps=config.iterations)
        skips = guards.Skips(
            folder, config.name, config.prompts, limit=config.guard.max_skipped, resume_step=done,
            counts=kept.get("skips"),
        )  # fmt: skip
        with StageLog(
            folder, config.name, total=config.iterations, resume_step=done, show=SHOW, unit="iterations"
        ) as log:
            if done < config.iterations:
                compile_ahead(setup, config, mesh)
            for iteration in range(done, config.iterations):
                state, metrics = iterate(setup, state, iteration, config, mesh)
                log(iteration + 1, metrics)
                watch(setup, skips, metrics, iteration, config)
                last, stopping = iteration + 1 == config.iterations, stop(iteration + 1)
                if last or (iteration + 1) % config.save_every == 0 or stopping:
                    log.flush()
                    extra = {"position": iteration + 1, "skips": skips.counts}
                    saved.save(iteration + 1, state, extra=made_of | extra)
                if stopping:
                    saved.wait()
                    raise KeyboardInterrupt(f"{config.name} at iteration {iteration + 1} of {config.iterations}")
    assert state.policy.ema is not None  # prepare asks for it
    for name, params in (("last", state.policy.params), ("ema", state.policy.ema)):
        common.save_network(folder / name, setup.policy._replace(params=setup.trained_policy.merged(params)))
    result = {
        "ema": str(folder / "ema"),
        "last": str(folder / "last"),
        "episodes": config.iterations * config.episodes,
        "optimizer_steps": int(state.policy.step),
        "kl_coef": float(state.kl.coef),
    }
    return common.write_result(folder / "ppo.json", lambda: result)


def check(config: ConfigDict) -> None:
    """Refuses numbers, functions, files and models that do not fit together, before anything is loaded or written."""
    inputs.check_settings(config)
    validate(config)
    require_reward(config)
    inputs.check_model("model", config.model)
    if config.reward_model:
        inputs.check_model("reward_model", config.reward_model, inputs.REWARD)
    inputs.check_file("prompts", config.prompts)
    inputs.check_file("pretraining_text", config.pretraining_text, required=config.ptx_coef > 0)
    inputs.check_file("held_out_text", config.held_out_text, required=False)
    prompts = common.read_prompts(config.prompts)
    for field in ("gold", "text_reward"):
        judge(config[field])
        inputs.check_gold(field, config[field], prompts, config.prompts)


def require_reward(config: ConfigDict) -> None:
    """Refuses a config in which nothing rewards."""
    config_lib.require(
        bool(config.reward_model) or bool(config.text_reward), "reward_model", config.reward_model,
        "pass the folder of a reward model, or text_reward=module:function",
    )  # fmt: skip


def validate(config: ConfigDict) -> None:
    """Refuses numbers that do not fit together and losses that are none, before anything is loaded."""
    config_lib.resolve(config.policy_loss, available=POLICY_ARGUMENTS)
    config_lib.resolve(config.value_loss, available=VALUE_ARGUMENTS)
    config_lib.require_divides("minibatches", config.minibatches, config.episodes, "the rollout batch")
    config_lib.require_divides("score_microbatches", config.score_microbatches, config.episodes, "the rollout batch")
    if config.ptx_coef:
        check_ptx_rows(config)
    config_lib.require_one_of("kl.controller", config.kl.controller, ("fixed", "adaptive"))
    config_lib.require_range("kl.coef", config.kl.coef, low=0.0)
    config_lib.require_range("temperature", config.temperature, low=1e-3)
    config_lib.require_range("ema_decay", config.ema_decay, low=0.0, high=1.0)
    config_lib.require_range("iterations", config.iterations, low=1)
    config_lib.require_range("entropy_floor", config.entropy_floor, low=0.0)
    config_lib.require_range("value_error_ceiling", config.value_error_ceiling, low=0.0)
    for name in ("warmup_iterations", "value_warmup_iterations"):
        config_lib.require(
            config.schedule == "constant" or config[name] < config.iterations, name, config[name],
            f"leaves none of iterations={config.iterations} for schedule={config.schedule}: lower it",
        )  # fmt: skip


def dry_run(config: ConfigDict) -> dict[str, memory.Needs]:
    """Compiles the three phases of an iteration for its real shapes and prints their memory."""
    check(config)
    mesh = common.start(config.mesh)
    setup = prepare(config, mesh)
    return memory.dry_run(programs(setup, config, mesh), mesh, state=staying(setup))


def staying(setup: Setup) -> int:
    """Bytes on each device that stay from start to end."""
    frozen = setup.trained_policy.frozen, setup.trained_value.frozen, setup.reward.params if setup.reward else {}
    return memory.held(setup.state, setup.policy.params, *frozen)


PHASES = ("rollout", "score", "update")


def programs(
    setup: Setup, config: ConfigDict, mesh: jax.sharding.Mesh, names: Sequence[str] = PHASES
) -> memory.Programs:
    """The phases of an iteration, compiled for the config's sizes; a `setup` of shapes serves as well as of arrays."""
    for name, program in lowered(setup, config, mesh, names):
        yield name, program.compile()


def lowered(
    setup: Setup, config: ConfigDict, mesh: jax.sharding.Mesh, names: Sequence[str] = PHASES
) -> Iterator[tuple[str, jax.stages.Lowered]]:
    """The phases named, in this order, as `programs` compiles them."""
    batch, slots = config.episodes, config.prompt_length + config.max_new_tokens
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    state, reference = memory.abstract(setup.state), memory.abstract(setup.policy.params)

    def shape(*sizes: int, dtype: Any = jnp.int32, where: Any = rows) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    def network(trained: common.Trained, own: Params, name: str, form: str) -> Params:
        made = jax.eval_shape(lambda f, o: getattr(trained._replace(frozen=f), form)(o), trained.frozen, own)
        return memory.abstract(made, sharding.tree_shardings(made, mesh, sharding_rules(config)[name]))

    key, ints, floats = jax.eval_shape(lambda: jax.random.key(0)), shape(batch), shape(batch, slots, dtype=jnp.float32)
    tokens, flags, scores = shape(batch, slots), shape(batch, dtype=jnp.bool_), shape(batch, dtype=jnp.float32)
    samples = Samples(tokens, ints, ints, floats, flags)

    def rollout() -> jax.stages.Lowered:
        weights = network(setup.trained_policy, state.policy.params, "policy", "merged")
        prompts = PromptBatch(shape(batch, config.prompt_length), ints, ints)
        return lower_generate(
            setup.policy.model, weights, prompts, key, max_new_tokens=config.max_new_tokens,
            temperature=config.temperature, stop_ids=stop_ids(setup),
        )  # fmt: skip

    def score() -> jax.stages.Lowered:
        value = network(setup.trained_value, state.value.params, "value", "full")
        reward = memory.abstract(setup.reward.params) if setup.reward else None
        coefficient, judged = shape(dtype=jnp.float32, where=whole), scores if setup.text_reward else None
        function: Any = setup.pieces.score_and_shape
        return function.lower(reference, value, reward, samples, coefficient, ints, judged)

    def update() -> jax.stages.Lowered:
        text_rows = None
        if config.ptx_coef:
            sizes = round(config.ptx_rows_per_episode * batch), config.ptx_row_length
            each = shape(*sizes)
            text_rows = LMBatch(each, each, each, shape(*sizes, dtype=jnp.bool_))
        mask = shape(batch, slots, dtype=jnp.bool_)
        rows = Rollout(
            tokens, mask, floats, floats, floats, floats, floats, floats, scores, ints, ints, flags, ints
        )  # fmt: skip
        return common.lower(setup.pieces.step, state, rows, text_rows, key)

    for name in names:
        yield name, {"rollout": rollout, "score": score, "update": update}[name]()


def compile_ahead(setup: Setup, config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Compiles the phases side by side before the first iteration; of the score and the update, the likelier form."""
    likely = setup._replace(pieces=setup.paired or setup.pieces)
    common.compile_together(p for _, p in lowered(likely, config, mesh, ("update", "rollout", "score")))


def stop_ids(setup: Setup) -> tuple[int, ...]:
    """The tokens that end a response; where there is no tokenizer (a plan) any one."""
    return (0,) if setup.policy.tokenizer is None else tuple(text.stop_ids(setup.policy.tokenizer, setup.asked))


def prepare(config: ConfigDict, mesh: jax.sharding.Mesh) -> Setup:
    """Loads the networks, encodes the prompts and the pretraining text, builds the compiled pieces."""
    check_contexts(config)
    rules = sharding_rules(config)
    policy = common.load_network(config.model, mesh, config.decoder, rules=rules["reference"])
    reward, value = reward_and_value(policy, config, mesh)
    records = common.read_prompts(config.prompts, tokenizer=policy.tokenizer)
    asked = [r.prompt for r in records]
    if reward and not all(isinstance(prompt, str) for prompt in asked):
        chat.check_same_template(policy=policy.tokenizer, reward_model=reward.tokenizer)
    ids = common.encode_prompts(policy.tokenizer, asked, length=config.prompt_length, where=config.prompts)
    rows = text.prompt_batch(ids, length=config.prompt_length)
    prompts = common.batches(rows, mesh, batch_size=config.episodes, seed=config.seed)
    controller = kl_controller(config)
    context = contexts.of_network(policy, common.model_folder(config.model))
    trained = common.trained(policy.params, config), common.trained(value.params, config)
    state, where = initial_state(config, mesh, trained[0].params, trained[1].params)
    return Setup(
        policy, reward, value.model, *trained, asked, [r.id for r in records], prompts,
        pretraining_stream(policy.tokenizer, config, mesh, context=context),
        held_out_rows(policy.tokenizer, config, mesh, context=context), controller,
        compiled_pieces(config, mesh, policy, value, reward, trained, where),
        compiled_pieces(config, mesh, policy, value, reward, trained, where, rollout_model=scoring.pair_rows)
        if mesh.size == config.microbatches == config.score_microbatches == 1
        else None,
        state, judge(config.gold), judge(config.text_reward),
    )  # fmt: skip


def check_contexts(config: ConfigDict) -> None:
    """Refuses rows longer than the context of the policy or of the reward and value model, before either is loaded.

    Raises:
      ValueError: naming the model, its context and the keys.
    """
    slots = config.prompt_length + config.max_new_tokens
    what = f"prompt_length={config.prompt_length} with max_new_tokens={config.max_new_tokens}"
    for key in ("model", "reward_model"):
        if config[key]:
            contexts.check_slots(contexts.of_folder(common.model_folder(config[key])), slots, what)


def sharding_rules(config: ConfigDict) -> dict[str, sharding.Rules]:
    """How each of the four networks lies on the mesh: a large policy may be spread out and a small reward model not."""
    return {
        name: sharding.rules_from_data(config.sharding[name], field=f"sharding.{name}")
        for name in ("policy", "reference", "value", "reward_model")
    }


def initial_state(config: ConfigDict, mesh: jax.sharding.Mesh, policy: Params, value: Params) -> tuple[PPOState, Any]:
    """PPO before its first iteration, built where it belongs, and its shardings."""
    rules, (policy_tx, value_tx) = sharding_rules(config), optimizers(config)
    made, where = sharding.build_state(
        partial(train_state, tx=policy_tx, ema=True, guard=True), policy, mesh=mesh, rules=rules["policy"]
    )
    other, other_where = sharding.build_state(
        partial(train_state, tx=value_tx, guard=True), value, mesh=mesh, rules=rules["value"]
    )  # fmt: skip
    rest = kl_controller(config).init(), jnp.zeros((), jnp.int32)
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), rest)
    return PPOState(made, other, *sharding.place_state(rest, mesh, ())), PPOState(where, other_where, *whole)


def compiled_pieces(
    config: ConfigDict, mesh: jax.sharding.Mesh, policy: common.Network, value: common.Network,
    reward: common.Network | None, trained: tuple[common.Trained, common.Trained], where: PPOState,
    rollout_model: Callable[[Model], Model] = lambda model: model,
) -> Pieces:  # fmt: skip
    """The two compiled pieces after sampling, compiled when first called; the state stays `where` it is."""
    policy_tx, value_tx = optimizers(config)
    make_step = partial(
        make_ppo_step, policy_tx=policy_tx, value_tx=value_tx,
        policy_loss=config_lib.resolve(config.policy_loss, available=POLICY_ARGUMENTS),
        value_loss=config_lib.resolve(config.value_loss, available=VALUE_ARGUMENTS),
        ptx_coef=config.ptx_coef, whiten_advantages=config.whiten_advantages, ema_decay=config.ema_decay,
        epochs=config.epochs, minibatches=config.minibatches, microbatches=config.microbatches,
        ptx_microbatches=config.ptx_microbatches, temperature=config.temperature, ppo_clip_norm=config.ppo_clip_norm,
        ptx_clip_norm=config.ptx_clip_norm, spike_std=config.guard.spike_std,
        batch_sharding=sharding.batch_sharding(mesh), rollout_model=rollout_model,
        max_new_tokens=config.max_new_tokens,
    )  # fmt: skip

    def step(frozen: tuple[Params, Params]) -> StepFn:
        networks = trained[0].model(policy.model, frozen[0]), trained[1].model(value.model, frozen[1])
        return make_step(*networks)

    score_and_shape = make_score_and_shape(
        rollout_model(policy.model), rollout_model(value.model), reward and rollout_model(reward.model),
        gamma=config.gamma, lam=config.lam, temperature=config.temperature,
        missing_eos_score=config.missing_eos_score, truncation=config.truncation, whiten_rewards=config.whiten_rewards,
        microbatches=config.score_microbatches, max_new_tokens=config.max_new_tokens,
    )  # fmt: skip
    frozen = trained[0].frozen, trained[1].frozen
    return Pieces(score_and_shape, compile_frozen_step(step, frozen, state_sharding=where))


def reward_and_value(
    policy: common.Network, config: ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[common.Network | None, common.Network]:
    """The reward model (None when a function of texts rewards) and the network that the value function starts from."""
    require_reward(config)
    if not config.reward_model:
        params = scalar_from_language_model(policy.params, jax.random.key(config.seed))
        return None, common.Network(scalar_model(policy.model.config), params, policy.tokenizer)
    rules = sharding_rules(config)["reward_model"]
    network = common.load_network(config.reward_model, mesh, config.decoder, rules=rules)
    text.check_same_tokenizer(policy=policy.tokenizer, reward_model=network.tokenizer)
    return (None if config.text_reward else network), network


def optimizers(config: ConfigDict) -> tuple[Any, Any]:
    """Adam for the policy and for the value network; the schedule counts epochs x minibatches steps an iteration."""
    per_iteration = config.epochs * config.minibatches
    policy, value = (
        common.schedule(config.schedule, peak, config.iterations * per_iteration, warmup=warmup * per_iteration)
        for peak, warmup in (
            (config.learning_rate, config.warmup_iterations),
            (config.value_learning_rate, config.value_warmup_iterations),
        )
    )
    return common.optimizer(config, policy), common.optimizer(config, value, clip_norm=config.value_clip_norm)


def kl_controller(config: ConfigDict) -> kl_control.KLController:
    """The controller of the KL coefficient that the config asks for."""
    if config.kl.controller == "fixed":
        return kl_control.fixed_kl(coef=config.kl.coef)
    return kl_control.adaptive_kl(
        coef=config.kl.coef, target=config.kl.target, horizon=config.kl.horizon, n_steps=config.episodes
    )


def pretraining_stream(
    tokenizer: Any, config: ConfigDict, mesh: jax.sharding.Mesh, *, context: contexts.Context | None = None
) -> Batches | None:
    """Packed pretraining rows, `ptx_rows_per_episode` for each episode; None for plain PPO."""
    if not config.ptx_coef:
        return None
    rows = ptx_rows(tokenizer, config.pretraining_text, config, context)
    return common.batches(rows, mesh, batch_size=check_ptx_rows(config), seed=config.seed)


def check_ptx_rows(config: ConfigDict) -> int:
    """Rows of pretraining text per iteration; refused unless every optimizer step gets the same number."""
    count = round(config.ptx_rows_per_episode * config.episodes)
    steps = config.epochs * config.minibatches
    config_lib.require(
        count > 0 and count % steps == 0, "ptx_rows_per_episode", config.ptx_rows_per_episode,
        f"gives {count} rows an iteration, which must be a multiple of epochs x minibatches = {steps}",
    )  # fmt: skip
    return count


def held_out_rows(
    tokenizer: Any, config: ConfigDict, mesh: jax.sharding.Mesh, *, context: contexts.Context | None = None
) -> list[LMBatch]:
    """Held-out pretraining rows on the devices, to watch the alignment tax."""
    if not config.held_out_text:
        return []
    rows = ptx_rows(tokenizer, config.held_out_text, config, context)
    return common.held_out_batches(rows, mesh, batch_size=config.held_out_rows, seed=0, most=1)


def ptx_rows(tokenizer: Any, path: str, config: ConfigDict, context: contexts.Context | None) -> LMBatch:
    """Packed rows of a file of plain text, within the policy's context."""
    return common.lm_rows(tokenizer, path, length=config.ptx_row_length, context=context, key="ptx_row_length")


def judge(name: Any) -> functions.Judge | None:
    """The function that ``text_reward`` or ``gold`` names, called as ``(prompt id, response, prompt)``; None for ""."""
    return functions.judge(name) if name else None


def iteration_keys(config: ConfigDict, iteration: int) -> tuple[jax.Array, jax.Array]:
    """The key of an iteration, for its samples, and the one that orders its minibatches."""
    key = jax.random.fold_in(jax.random.key(config.seed), iteration)
    return key, jax.random.fold_in(key, 1)


def iterate(
    setup: Setup, state: PPOState, iteration: int, config: ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[PPOState, Metrics]:
    """One PPO iteration: sample, score, shape, update. Everything random is a function of (seed, iteration)."""
    key, order_key = iteration_keys(config, iteration)
    places = np.arange(iteration * config.episodes, (iteration + 1) * config.episodes, dtype=np.int32)
    own = dataclasses.replace(setup.prompts.at(iteration), ids=sharding.own_rows(places, mesh))
    prompts = sharding.place_batch(own, mesh)
    with phase("rollout", setup, config, mesh):
        samples = jax.block_until_ready(sample(setup, state, prompts, key, config))
    if iteration == 0:
        check_step_zero(setup, state, samples, config)
    texts = []
    if setup.gold or setup.text_reward:
        asked = [setup.asked[i] for i in setup.prompts.indices(iteration)]
        texts = common.response_texts(setup.policy.tokenizer, samples, asked)
    scores = None
    if setup.text_reward is not None:
        judged = np.asarray(judge_all(setup, setup.text_reward, texts, iteration), np.float32)
        scores = sharding.place_batch(sharding.own_rows(judged, mesh), mesh)
    pieces = pieces_for(setup, samples, order_key, config)
    with phase("score", setup, config, mesh):
        rollout, metrics = jax.block_until_ready(
            pieces.score_and_shape(
                setup.policy.params, setup.trained_value.full(state.value.params),
                setup.reward.params if setup.reward else None, samples, state.kl.coef, prompts.ids, scores,
            )
        )  # fmt: skip
    text_rows = None if setup.pretraining is None else sharding.place_batch(setup.pretraining.at(iteration), mesh)
    with phase("update", setup, config, mesh):
        state, update = jax.block_until_ready(pieces.step(state, rollout, text_rows, order_key))
    kl = metrics["rollout/kl_nats_per_sequence"]
    new_kl = setup.controller.update(state.kl, kl.value)
    # Back to where the compiled step expects it: another placement would compile the step again.
    state = dataclasses.replace(state, kl=jax.device_put(new_kl, setup.state.kl.coef.sharding))
    return state, metrics | update | observe(setup, state, texts, iteration, config)


LOWER = {
    "rollout": ("config.episodes", "config.max_new_tokens", "config.prompt_length", "config.mesh (more devices)"),
    "score": (
        "config.score_microbatches (more, smaller pieces)", "config.episodes", "config.max_new_tokens",
        "config.prompt_length", "config.mesh (more devices)",
    ),
    "update": (
        "config.microbatches (more, smaller pieces)", "config.minibatches (more, smaller ones)",
        "config.decoder.remat=block", "config.ptx_rows_per_episode", "config.train=lora", "config.mesh (more devices)",
    ),
}  # fmt: skip
"""What helps when a phase runs out of memory, the best first."""


def phase(name: str, setup: Setup, config: ConfigDict, mesh: jax.sharding.Mesh) -> Any:
    """A block that is called by its name when memory runs out in it."""
    return memory.phase(
        name, lower=LOWER[name], programs=partial(programs, setup, config, mesh, (name,)), rows=config.episodes,
        slots=config.prompt_length + config.max_new_tokens, minibatches=config.minibatches,
        microbatches=config.microbatches, parameters=common.size(setup.policy.params),
    )  # fmt: skip


def pieces_for(setup: Setup, samples: Samples, key: jax.Array, config: ConfigDict) -> Pieces:
    """The pieces that compute two samples to a row, where they fit in the whole rollout and in each minibatch."""
    if setup.paired is None:
        return setup.pieces
    lengths, slots = np.asarray(samples.lengths), samples.tokens.shape[1]
    order = minibatch_order(key, len(lengths), epochs=config.epochs, minibatches=config.minibatches)
    fit = scoring.pairs_fit(lengths, slots) and scoring.pairs_fit(lengths[np.asarray(order)], slots)
    return setup.paired if fit else setup.pieces


def sample(setup: Setup, state: PPOState, prompts: Any, key: jax.Array, config: ConfigDict) -> Samples:
    """Responses of the current policy, under exactly the distribution that is trained: no top-k, no top-p."""
    return generate(
        setup.policy.model, setup.trained_policy.merged(state.policy.params), prompts, jax.random.fold_in(key, 0),
        max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        stop_ids=stop_ids(setup),
    )  # fmt: skip


def check_step_zero(setup: Setup, state: PPOState, samples: Samples, config: ConfigDict) -> None:
    """Stops the run unless policy, reference, sampler and value network agree before the first update."""
    reward = setup.reward
    step_zero_checks(
        setup.policy.model, setup.value, reward.model if reward else None,
        setup.trained_policy.full(state.policy.params), setup.policy.params,
        setup.trained_value.full(state.value.params), reward.params if reward else None, samples,
        temperature=config.temperature,
    )  # fmt: skip


def judge_all(setup: Setup, score: functions.Judge, texts: list[str], iteration: int) -> list[float]:
    """`score` of each response of an iteration; each process judges its part, and all get the same numbers."""
    asked = [*zip(setup.prompts.indices(iteration), texts, strict=True)]
    part = asked[processes.index() :: processes.count()]
    judged = processes.exchange("scores", [score(str(setup.prompt_ids[i]), t, setup.asked[i]) for i, t in part])
    return [judged[place % len(judged)][place // len(judged)] for place in range(len(asked))]


def origin(config: ConfigDict, setup: Setup) -> dict[str, Any]:
    """What the run is made of, for its checkpoints: the reference and the reward model are in it by their sha256."""
    files = {key: config[key] for key in ("prompts", "held_out_text")}
    if config.ptx_coef:
        files["pretraining_text"] = config.pretraining_text
    models = {key: common.model_folder(config[key]) for key in ("model", "reward_model") if config[key]}
    return guards.origin(config, files=files, models=models, tokenizer=setup.policy.tokenizer)


def watch(setup: Setup, skips: guards.Skips, metrics: Metrics, iteration: int, config: ConfigDict) -> None:
    """Names the scores and minibatches that were left out of the update, and stops a run that has diverged.

    Raises:
      FloatingPointError: no score is finite, every minibatch or too many in a row were skipped, or an alarm went off.
    """
    seen = to_host(metrics)
    where = setup.prompts.indices(iteration)
    records = guards.Records(config.prompts, setup.prompt_ids)
    if seen["rollout/dropped"]:
        rows = where[guards.rows_on_host(metrics["dropped_rows"].value)].tolist()
        abstains = f" (None from {setup.text_reward.name} counts as NaN)" if setup.text_reward else ""
        why = f"it is not finite{abstains}"
        event = guards.Event(iteration + 1, "score", why, rows, records.of(rows))
        skips.tell(event)
        if seen["rollout/dropped"] >= 1:
            skips.stop("every score of the iteration was", [event])
    if seen["skipped"]:
        name_skipped(setup, skips, metrics, guards.reason(seen["spiked"] > 0), iteration, config)
    else:
        skips.add(False)
    alarm(seen, iteration, config)


def name_skipped(
    setup: Setup, skips: guards.Skips, metrics: Metrics, why: str, iteration: int, config: ConfigDict
) -> None:
    """Goes through the optimizer steps of an iteration of which some were skipped, and says `why`.

    Raises:
      FloatingPointError: all were, or too many in a row, counted over iterations.
    """
    skipped = guards.rows_on_host(metrics["skipped_steps"].value)
    steps = config.epochs * config.minibatches
    order = minibatch_order(
        iteration_keys(config, iteration)[1], config.episodes, epochs=config.epochs, minibatches=config.minibatches
    )
    where, records = setup.prompts.indices(iteration), guards.Records(config.prompts, setup.prompt_ids)
    events = []
    for step in range(steps):
        if step not in skipped:
            skips.add(False)
            continue
        rows = where[np.asarray(order[step])].tolist()
        events.append(guards.Event(iteration + 1, f"minibatch {step + 1} of {steps}", why, rows, records.of(rows)))
        skips.add(True, events[-1])
    if len(events) == steps:
        skips.stop(f"every minibatch of iteration {iteration + 1} was", events)


def alarm(seen: dict[str, float], iteration: int, config: ConfigDict) -> None:
    """Stops a run whose policy has left the reference or has collapsed, or whose value network is lost.

    Args:
      seen: metrics of an iteration.
      iteration: counted from 0.
      config: `kl_ceiling` in nats a sequence, `entropy_floor` in nats a token, `value_error_ceiling` in squared scores.

    Raises:
      FloatingPointError: an alarm went off; the message says what to do.
    """
    kl, entropy = seen["rollout/kl_nats_per_sequence"], seen["rollout/surprisal_nats_per_token"]
    # A loss of one's own need not tell its error; then there is nothing to watch.
    error = seen.get("value/value_error", 0.0) / max(1.0, seen["rollout/score_square"])
    for fine, what in (
        (kl <= config.kl_ceiling,
         f"KL to the reference is {kl:.3g} nats a sequence, above kl_ceiling={config.kl_ceiling}: lower learning_rate "
         "or raise kl.coef"),
        (entropy >= config.entropy_floor,
         f"the policy's entropy is {entropy:.3g} nats a token, below entropy_floor={config.entropy_floor}: it says "
         "almost always the same; lower learning_rate, raise kl.coef, or set entropy_floor=0 if that is as wanted"),
        (error <= config.value_error_ceiling,
         f"the squared error of the values is {error:.3g} times the squared score, above value_error_ceiling="
         f"{config.value_error_ceiling}: lower value_learning_rate or set value_clip_norm"),
    ):  # fmt: skip
        if not fine:  # NaN is not fine
            raise FloatingPointError(f"iteration {iteration + 1}: {what}; what was saved before is intact")


def observe(setup: Setup, state: PPOState, texts: list[str], iteration: int, config: ConfigDict) -> dict[str, Any]:
    """What is watched and never trained on: gold score of the rollout's texts, held-out pretraining loss."""
    seen: dict[str, Any] = {}
    if setup.gold is not None:
        judged = np.asarray(judge_all(setup, setup.gold, texts, iteration))
        told = judged[np.isfinite(judged)]  # it may abstain
        seen["gold_score"] = float(told.mean()) if len(told) else float("nan")
    if setup.held_out and (iteration % config.evaluate_every == 0 or iteration + 1 == config.iterations):
        policy = setup.trained_policy.full(state.policy.params)
        seen["held_out_loss"] = lm_loss(setup.policy.model, policy, setup.held_out)
    return seen


if __name__ == "__main__":
    config_lib.main(run, config="configs/ppo/storyland.py", workdir="runs/ppo", dry_run=dry_run, check=check)
