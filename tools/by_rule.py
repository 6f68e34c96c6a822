"""Memory of each device and time of a PPO iteration by rule: shapes, shardings and formulas.

Nothing is compiled. ``tools/plan.py`` prints it, beside what the compiler says; docs/scaling.md has
the formulas and how far they were off where we could measure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from experiments import ppo
from rlhf_jax import sharding
from rlhf_jax.backends import ACCELERATOR
from rlhf_jax.models.config import DecoderConfig, gpt2
from rlhf_jax.models.heads import language_model, scalar_model
from rlhf_jax.models.hf import config_from_hf
from rlhf_jax.run import checks, memory, results
from rlhf_jax.run import networks as networks_lib
from rlhf_jax.run.ppo import settings as ppo_settings
from rlhf_jax.run.ppo import setup as setup_lib
from rlhf_jax.steps import train_state
from rlhf_jax.types import KLState, Model, Params, PPOState


class Chip(NamedTuple):
    """Published figures of a chip: dense bfloat16 FLOP/s, bytes of memory, bytes/s of bandwidth."""

    peak: float
    memory: float
    bandwidth: float


CHIPS = {
    # NVIDIA A100 Tensor Core GPU datasheet, SXM 80 GB.
    "A100-80": Chip(312e12, 80e9, 2.039e12),
    # NVIDIA H100 Tensor Core GPU datasheet, SXM; half of the figure with sparsity.
    "H100": Chip(989.5e12, 80e9, 3.35e12),
    # NVIDIA H200 Tensor Core GPU datasheet, SXM; half of the figure with sparsity.
    "H200": Chip(989.5e12, 141e9, 4.8e12),
    # NVIDIA DGX B200 datasheet, an eighth of the system (1,440 GB, 64 TB/s); half of the figure
    # with sparsity.
    "B200": Chip(2250e12, 180e9, 8.0e12),
    # Google Cloud documentation, "TPU v4": 275 TFLOP/s, 32 GiB, 1,200 GB/s.
    "TPUv4": Chip(275e12, 32 * 2**30, 1.2e12),
    # Google Cloud documentation, "TPU v5e": 197 TFLOP/s, 16 GB, 819 GB/s.
    "TPUv5e": Chip(197e12, 16e9, 0.819e12),
    # Google Cloud documentation, "TPU v5p": 459 TFLOP/s, 95 GB, 2,765 GB/s.
    "TPUv5p": Chip(459e12, 95e9, 2.765e12),
    # Google Cloud documentation, "TPU v6e": 918 TFLOP/s, 32 GB, 1,640 GB/s.
    "TPUv6e": Chip(918e12, 32e9, 1.64e12),
}

USABLE = 0.92
"""Share of a chip's memory available to programs; the runtime, collectives and fragmentation take
the rest (our choice)."""

GIB = 2**30


class NetworkBytes(NamedTuple):
    """Bytes per device of one of the four networks, by rule."""

    parameters: float = 0
    optimizer: float = 0
    average: float = 0
    gradients: float = 0
    activations: float = 0
    cache: float = 0


class Plan(NamedTuple):
    """The result of `plan_by_rule`: bytes on each device, FLOPs of all devices together."""

    networks: dict[str, NetworkBytes]
    counts: dict[str, int]
    batch: float
    decoding: float
    phases: dict[str, float]
    flops: dict[str, float]
    decode_bytes: float
    gathered: float

    @property
    def stays(self) -> float:
        """Weights, optimizer states and average: what is in memory during the whole run."""
        return sum(n.parameters + n.optimizer + n.average for n in self.networks.values())

    @property
    def peak(self) -> float:
        """The bytes of the largest phase."""
        return max(self.phases.values())


# ------------------------------------------------------------------------------------- the networks


def models(config: ConfigDict, mesh: Mesh | None = None) -> tuple[Model, Model]:
    """Policy and value network from `config.shapes`, else from the models' folders.

    The reward model has the architecture of the value network.
    """
    shapes = config.get("shapes") or {}

    def decoder_of(role: str, folder: str) -> DecoderConfig:
        if shapes.get(role):
            return gpt2(**shapes[role], **config.decoder, mesh=mesh)
        checks.require(
            bool(folder), role, folder, "the config has no shapes: pass the folder of a model"
        )
        found = config_from_hf(results.read_json(networks_lib.model_folder(folder) / "config.json"))
        return dataclasses.replace(found, **config.decoder, mesh=mesh)

    policy = decoder_of("policy", config.model)
    value = decoder_of("reward_model", config.reward_model or config.model)
    return language_model(policy), scalar_model(value)


def abstract_setup(config: ConfigDict, mesh: Any, policy: Model, value: Model) -> setup_lib.Setup:
    """The result of `ppo.prepare` with shapes and shardings instead of arrays, and without text."""
    rules = setup_lib.sharding_rules(config)

    def placed(make: Any, *arguments: Any, role: str) -> Any:
        tree = jax.eval_shape(make, *arguments)
        return memory.abstract(tree, sharding.tree_shardings(tree, mesh, rules[role]))

    key = jax.eval_shape(lambda: jax.random.key(0))
    reference = placed(policy.init, key, role="reference")
    reward = placed(value.init, key, role="reward_model")

    def trained(params: Params, role: str) -> networks_lib.TrainableParams:
        alpha = config.lora.alpha
        if config.train == "all":
            return networks_lib.TrainableParams(params, {}, alpha)
        own = placed(lambda p: networks_lib.trainable(p, config).params, params, role=role)
        return networks_lib.TrainableParams(
            own, {name: part for name, part in params.items() if name != "score"}, alpha
        )

    parts = trained(reference, "policy"), trained(reward, "value")
    policy_tx, value_tx = setup_lib.optimizers(config)
    whole = sharding.replicated(mesh)
    coefficient: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    iteration: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    state = PPOState(
        placed(
            partial(train_state, tx=policy_tx, ema=True, guard=True), parts[0].params, role="policy"
        ),
        placed(partial(train_state, tx=value_tx, guard=True), parts[1].params, role="value"),
        KLState(coefficient),
        iteration,
    )
    networks = (
        networks_lib.Network(policy, reference, None),
        networks_lib.Network(value, reward, None),
    )
    judged = None if config.text_reward else networks[1]
    pieces: Any = None
    # An abstract mesh has no devices to compile for.
    if isinstance(mesh, Mesh):
        where = jax.tree.map(lambda leaf: leaf.sharding, state)
        pieces = ppo.compiled_pieces(config, mesh, networks[0], networks[1], judged, parts, where)
    none: Any = None  # a plan has no prompts and no controller
    return setup_lib.Setup(
        networks[0], judged, value, *parts, [], [], none, None, [], none, pieces, None, state, None,
        None,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ by rule


def plan_by_rule(config: ConfigDict, mesh: Any) -> Plan:
    """Memory of each device and FLOPs of an iteration, without compiling anything.

    Args:
      config: of PPO, with `shapes`.
      mesh: ``(data, fsdp, tensor)``; an `AbstractMesh` will do.

    Returns:
      The plan. Arrays are counted exactly; activations are an estimate (docs/scaling.md has the
      formulas and how far they were off where we could measure).

    Raises:
      ValueError: the mesh does not divide the batch or an array.
    """
    ppo_settings.validate(config)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    check_rows(config, rows)
    policy, value = models(config)
    setup = abstract_setup(config, mesh, policy, value)
    tensor = mesh.shape["tensor"]
    slots, episodes = config.prompt_length + config.max_new_tokens, config.episodes
    ptx_rows = round(config.ptx_rows_per_episode * episodes) if config.ptx_coef else 0
    per_step = config.epochs * config.minibatches
    micro, ptx_micro = config.microbatches, config.ptx_microbatches or config.microbatches
    dtype = jnp.dtype(config.decoder.dtype).itemsize
    train = partial(activations, tensor=tensor, row_shards=rows, backward=True)
    forward = partial(activations, tensor=tensor, row_shards=rows, backward=False)
    step_rows, scored = episodes / config.minibatches / micro, episodes / config.score_microbatches
    policy_work = max(
        train(policy, step_rows, slots, head=True),
        train(policy, ptx_rows / per_step / ptx_micro, config.ptx_row_length, head=True)
        if ptx_rows
        else 0,
    )
    held, state = memory.held, setup.state
    # Gradients have the sizes and the shardings of the parameters.
    grads = [held(memory.abstract(s.params)) for s in (state.policy, state.value)]
    # The gradients of PPO and of the pretraining text exist side by side before they are added.
    copies = 1 + bool(ptx_rows), 1
    # Accumulation over micro-batches needs one more buffer of gradients.
    accumulated = max(grads) * (micro > 1 or ptx_micro > 1)
    shape = policy.config
    cache = (
        episodes
        / rows
        * slots
        * shape.layers
        * 2
        * shape.kv_heads
        * shape.head_dim
        / tensor
        * dtype
    )
    networks = {
        "policy": NetworkBytes(
            held(state.policy.params), held(state.policy.opt_state), held(state.policy.ema),
            grads[0] * copies[0], policy_work, cache,
        ),
        "value": NetworkBytes(
            held(state.value.params), held(state.value.opt_state), 0, grads[1],
            train(value, step_rows, slots, head=False),
        ),
        "reference": NetworkBytes(
            held(setup.policy.params), activations=forward(policy, scored, slots, head=True)
        ),
        "reward_model": NetworkBytes(
            held(setup.reward.params) if setup.reward else 0,
            activations=forward(value, scored, slots, head=False),
        ),
    }  # fmt: skip
    # Seven arrays of 4 bytes and a mask for each slot of a rollout, and some numbers for each
    # episode; three arrays and a mask for each slot of pretraining text.
    batch = (
        episodes * slots * (4 * 7 + 1) + episodes * 20 + ptx_rows * config.ptx_row_length * 13
    ) / rows
    # Decoding uses a copy of the blocks in the compute dtype; stored weights are 4 bytes each.
    decoding = held(setup.policy.params["blocks"]) * dtype / 4
    stays = sum(n.parameters + n.optimizer + n.average for n in networks.values())
    prefill = forward(policy, episodes, config.prompt_length, head=False, keys=slots)
    phases = {
        "rollout": stays + decoding + cache + prefill + batch,
        "score": stays + max(networks[n].activations for n in ("reference", "reward_model"))
        + batch,
        "update": stays + batch + networks["policy"].gradients + networks["value"].gradients
        + accumulated + max(networks[n].activations for n in ("policy", "value")),
    }  # fmt: skip
    # A decode step reads all weights and, averaged over the response, a cache that is half filled
    # beyond the prompt.
    weights = sum(x.size for x in jax.tree.leaves(setup.policy.params)) * dtype / tensor
    average_cache = cache * (config.prompt_length + config.max_new_tokens / 2) / slots
    # A decode step gathers the parts of the weights that other devices of the fsdp axis hold.
    fsdp = mesh.shape["fsdp"]
    return Plan(
        networks, {"policy": networks_lib.size(setup.policy.params), "value": _count(value)}, batch,
        decoding, phases, flops(config, policy, value, ptx_rows), weights + average_cache,
        weights * (1 - 1 / fsdp),
    )  # fmt: skip


def _count(model: Model) -> int:
    return networks_lib.size(jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0))))


def check_rows(config: ConfigDict, shards: int) -> None:
    """Refuses a mesh that leaves some device of the data and fsdp axes without a row of a batch.

    Raises:
      ValueError: with the key to change.
    """
    steps = config.epochs * config.minibatches
    pieces = {"episodes": config.episodes, "minibatches": config.episodes // config.minibatches}
    pieces["score_microbatches"] = config.episodes // config.score_microbatches
    pieces["microbatches"] = pieces["minibatches"] // config.microbatches
    if config.ptx_coef:
        ptx = round(config.ptx_rows_per_episode * config.episodes) // steps
        pieces["ptx_rows_per_episode"] = ptx
        pieces["ptx_microbatches"] = ptx // (config.ptx_microbatches or config.microbatches)
    for key, count in pieces.items():
        checks.require(
            count % shards == 0 and count > 0, key, config[key],
            f"leaves {count} rows for data x fsdp = {shards} devices: choose a mesh or a {key} "
            "that divides",
        )  # fmt: skip


def activations(
    model: Model, rows: float, slots: int, *, head: bool, tensor: int, row_shards: int,
    backward: bool, keys: int = 0,
) -> float:  # fmt: skip
    """Estimates the bytes on a device while `rows` rows pass through a network.

    Forward: the inputs of a block, its widest intermediate arrays and the attention scores of one
    layer. Backward: additionally what every layer keeps (its input alone under
    ``remat="block"``) and the gradients of those arrays. Both: weights of two layers gathered
    over the fsdp axis and, for a language model, two or three copies of a chunk of logits.
    """
    shape: DecoderConfig = model.config
    own = rows / row_shards
    size = jnp.dtype(shape.dtype).itemsize
    tokens = own * slots
    # Queries and outputs of all heads, keys and values of the key heads.
    heads = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads) / tensor
    # The gate, the other projection and their product; or one array before and one after.
    gates = 3 if shape.activation in ("swiglu", "geglu") else 2
    block = tokens * size * (4 * shape.width + heads + gates * shape.mlp_width / tensor)
    # Attention scores are counted as float32, 4 bytes each.
    scores = own * shape.heads / tensor * slots * (keys or slots) * 4
    layer = (
        shape.width
        * (heads * tensor + (gates if gates == 3 else 2) * shape.mlp_width)
        * size
        / tensor
    )
    gathered = 2 * layer if row_shards > 1 else 0
    logits = 0.0
    if head:
        # A chunk of logits has at least one slot of every row.
        logits = (
            max(ACCELERATOR.logits_per_chunk, rows * shape.vocab_size)
            / row_shards
            * 4
            * (3 if backward else 2)
        )
    if not backward:
        logits = min(logits, 2 * 4 * tokens * shape.vocab_size)  # no more than all logits
        return block + scores * (1 + size / 4) + gathered + logits
    kept = tokens * shape.width * size if shape.remat == "block" else block + 2 * scores
    return shape.layers * kept + 2 * block + 4 * scores + gathered + logits


def flops(config: ConfigDict, policy: Model, value: Model, ptx_rows: int) -> dict[str, float]:
    """FLOPs of an iteration over all devices.

    A forward pass is 2 per weight and token; with the backward pass it is three times that. A block
    that is recomputed (``remat="block"``) costs a fourth pass. Attention is counted over every slot
    of the row, 4 x layers x slots x query width per token; kernels that skip later keys do about
    half of that.
    """
    slots, tokens = (
        config.prompt_length + config.max_new_tokens,
        config.episodes * (config.prompt_length + config.max_new_tokens),
    )

    def forward(model: Model, length: int, head: bool) -> float:
        shape: DecoderConfig = model.config
        params = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
        weights = networks_lib.size(params["blocks"]) + head * shape.width * shape.vocab_size
        return 2.0 * weights + 4.0 * shape.layers * length * shape.heads * shape.head_dim

    passes = 4 if config.decoder.remat == "block" else 3
    update = (
        config.epochs
        * tokens
        * passes
        * (forward(policy, slots, True) + forward(value, slots, False))
    )
    update += (
        ptx_rows * config.ptx_row_length * passes * forward(policy, config.ptx_row_length, True)
    )
    # The value network, and the reward model where no function of the text gives the reward.
    score = tokens * (
        forward(policy, slots, True)
        + forward(value, slots, False) * (1 if config.text_reward else 2)
    )
    rows = config.episodes
    return {
        "prefill": rows * config.prompt_length * forward(policy, slots, False),
        "decode": rows * config.max_new_tokens * forward(policy, slots, True),
        "score": score,
        "update": update,
    }


def seconds(
    plan: Plan, config: ConfigDict, devices: int, chip: Chip, utilization: float
) -> dict[str, float]:
    """Seconds of each phase of an iteration: FLOPs at a share of the peak, or memory traffic.

    A decode step reads every weight (each device its tensor slice) and the cache once. Responses
    are at full length, so decoding is a lower bound for it. Communication is left out.
    """
    rate = devices * chip.peak * utilization
    decode = max(
        config.max_new_tokens * plan.decode_bytes / chip.bandwidth, plan.flops["decode"] / rate
    )
    found = {"generate": plan.flops["prefill"] / rate + decode, "score": plan.flops["score"] / rate}
    return found | {"update": plan.flops["update"] / rate}


def abstract_mesh(shape: Sequence[int]) -> AbstractMesh:
    """A mesh without devices, for shapes and shardings."""
    return AbstractMesh(tuple(shape), sharding.AXES)
