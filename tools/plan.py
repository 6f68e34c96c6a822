"""Predicts memory and time of a PPO run on a mesh of chips, without chips or model files.

    python tools/plan.py --config=configs/ppo/instructgpt_175b.py --mesh=1,32,8 --chip=H100

Prints the bytes per device of policy, value network, reference and reward model, FLOPs and time of
an iteration, and whether it fits; if not, what to change. With ``--json`` the last line is all of
it as JSON.

The output names its two sources. *By rule*: bytes of every array from `jax.eval_shape` and the
sharding rules (exact), activations and caches from the formulas of `tools.by_rule`. *Compiled*: the
real programs as an accelerator runs them (`backends.planned_for_accelerators`), compiled for as
many fake CPU devices, with the memory that XLA's CPU compiler counts. That compiler computes in
float32 where the config has bfloat16 and schedules differently from a GPU or TPU, so it gives an
upper bound for those. ``--no_compile`` leaves it out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import sharding
from rlhf_jax.backends import cpu_process, planned_for_accelerators
from rlhf_jax.models.heads import language_model
from rlhf_jax.run import checks, memory
from rlhf_jax.run import config as config_lib
from rlhf_jax.run.ppo import programs
from rlhf_jax.types import Model
from tools.by_rule import (
    CHIPS,
    GIB,
    USABLE,
    NetworkBytes,
    Plan,
    abstract_mesh,
    abstract_setup,
    models,
    plan_by_rule,
    seconds,
)


def ppo_config(config: ConfigDict) -> ConfigDict:
    """The PPO group of a pipeline's config together with its shapes; a PPO config unchanged."""
    if "ppo" not in config:
        return config
    stage = config_lib.unlocked_copy(config.ppo)
    stage.shapes = ConfigDict(config.shapes.to_dict())
    return stage


# ----------------------------------------------------------------------------------------- compiled

SHORT = (2, 4)
"""Numbers of layers with which the rollout is compiled: its layers are unrolled, so its memory is
linear in them."""


def compiled_needs(config: ConfigDict, mesh: Mesh) -> dict[str, memory.Needs]:
    """Memory of the three programs at the config's real sizes, as the compiler counts it.

    Score and update are compiled whole. The rollout is compiled with 2 and 4 layers and
    extrapolated linearly to all layers.
    """
    found = {}
    policy, value = models(config, mesh)
    for name, compiled in _programs(config, mesh, policy, value, ("score", "update")):
        told = memory.needs(compiled)
        if told is not None:
            found[name] = told
    layers = policy.config.layers
    short = []
    for count in SHORT:
        small = language_model(
            # A model of fewer layers is compiled as it is, and nothing is extrapolated.
            dataclasses.replace(policy.config, layers=min(count, layers), unroll=None)
        )
        [(_, compiled)] = _programs(config, mesh, small, value, ("rollout",))
        short.append(memory.needs(compiled))
    if None not in short:
        line = [
            b + (b - a) / (SHORT[1] - SHORT[0]) * (layers - SHORT[1])
            for a, b in zip(*short, strict=True)
        ]
        found = {
            "rollout": memory.Needs(*map(round, line)) if layers > SHORT[1] else short[1]
        } | found
    return found


def _programs(
    config: ConfigDict, mesh: Mesh, policy: Model, value: Model, names: Sequence[str]
) -> Sequence[tuple[str, jax.stages.Compiled]]:
    """The programs as they are on a GPU or TPU, although they are compiled for CPUs."""
    with planned_for_accelerators():
        return list(
            programs.programs(abstract_setup(config, mesh, policy, value), config, mesh, names)
        )


def as_accelerator() -> None:
    """Makes XLA compile for CPUs as it does for a GPU or TPU, as far as its flags allow.

    Call it before devices are found, which is when XLA reads its flags.
    """
    # Operations that XLA hands to its CPU library take memory per thread, which the compiler does
    # not count and an accelerator does not need.
    cpu_process.ask_xla("xla_cpu_experimental_ynn_fusion_type", "")


# ----------------------------------------------------------------------------------------- the plan


def run(
    config: ConfigDict,
    shape: Sequence[int],
    *,
    chip: str,
    utilization: float = 0.4,
    compile_too: bool = True,
) -> dict[str, Any]:
    """Prints the plan and returns it.

    Args:
      config: of PPO with `shapes`, or of a whole pipeline.
      shape: of the mesh.
      chip: a name of `CHIPS`.
      utilization: share of the peak that matrix products reach.
      compile_too: compile the programs and show what the compiler says.

    Raises:
      ValueError: an unknown chip, or a mesh that does not divide.
    """
    checks.require_one_of("chip", chip, tuple(CHIPS))
    checks.require_range("utilization", utilization, low=0.01, high=1.0)
    config, devices = ppo_config(config), math.prod(shape)
    plan = plan_by_rule(config, abstract_mesh(shape))
    room = CHIPS[chip].memory * USABLE
    times = seconds(plan, config, devices, CHIPS[chip], utilization)
    result: dict[str, Any] = {
        "mesh": list(shape), "chip": chip, "devices": devices, "room": room, "peak": plan.peak,
        "fits": plan.peak <= room, "stays": plan.stays, "batch": plan.batch,
        "parameters": plan.counts,
        "networks": {name: network._asdict() for name, network in plan.networks.items()},
        "phases": plan.phases, "flops": plan.flops, "seconds": times,
        "gathered_per_token": plan.gathered,
    }  # fmt: skip
    show(plan, result, config, utilization)
    if compile_too:
        mesh = sharding.make_mesh(shape, devices=jax.devices()[:devices])
        needed = compiled_needs(config, mesh)
        result["compiled"] = {name: told._asdict() for name, told in needed.items()}
        show_compiled(plan, needed)
    if not result["fits"]:
        result["advice"] = advice(plan, config, shape, room)
        print("\n".join(f"  - {line}" for line in result["advice"]))
    return result


def show(plan: Plan, result: dict[str, Any], config: ConfigDict, utilization: float) -> None:
    """Prints the tables by rule."""
    names = ", ".join(f"{name}={n}" for name, n in zip(sharding.AXES, result["mesh"], strict=True))
    counts = ", ".join(f"{name} {n / 1e9:.2f}B" for name, n in result["parameters"].items())
    print(
        f"{config.name} on {result['devices']} x {result['chip']}, mesh ({names}); parameters: "
        f"{counts}"
    )
    print(
        "\nMemory of each device in GiB, by rule (eval_shape and sharding rules; "
        f"{config.decoder.dtype} compute)"
    )
    columns = NetworkBytes._fields
    print(f"  {'':<13}" + "".join(f"{c:>12}" for c in columns))
    for name, network in plan.networks.items():
        print(f"  {name:<13}" + "".join(f"{x / GIB:>12.2f}" for x in network))
    print(f"  batches {plan.batch / GIB:.2f}, weights for decoding {plan.decoding / GIB:.2f}")
    print(f"\n  {'phase':<10}{'peak GiB':>10}{'PFLOP':>10}{'seconds':>10}")
    flops_of = {"rollout": plan.flops["prefill"] + plan.flops["decode"], **plan.flops}
    for phase, key in (("rollout", "generate"), ("score", "score"), ("update", "update")):
        print(
            f"  {phase:<10}{plan.phases[phase] / GIB:>10.2f}{flops_of[phase] / 1e15:>10.1f}"
            f"{result['seconds'][key]:>10.1f}"
        )
    total = sum(result["seconds"].values())
    hours = total * config.iterations / 3600
    print(
        f"  an iteration of {config.episodes} episodes: {total:.3g} s; {config.iterations} of "
        f"them: {hours:.3g} h"
    )
    print(
        f"  Time: products at {utilization:.0%} of the public bfloat16 peak; decoding at the floor "
        "of memory bandwidth;"
    )
    print("  all responses at full length; no communication (each decode step also gathers")
    print(
        f"  {plan.gathered / GIB:.2f} GiB of weights over the fsdp axis: prefer tensor to fsdp "
        "where that is much)."
    )
    verdict = "fits" if result["fits"] else "DOES NOT FIT"
    room = f"{result['room'] / GIB:.1f} GiB, {USABLE:.0%} of the {result['chip']}"
    print(f"\n{verdict}: {plan.peak / GIB:.1f} GiB of {room}", flush=True)


def show_compiled(plan: Plan, needed: dict[str, memory.Needs]) -> None:
    """Prints the compiler's figures next to those by rule."""
    print(
        "\nMemory of each device in GiB, compiled (XLA's CPU compiler: float32 inside, so from "
        "above for bfloat16)"
    )
    print(
        "  "
        f"{'phase':<10}{'arguments':>12}{'new outputs':>13}{'temporary':>12}{'with what stays':>17}"
    )
    for name, told in needed.items():
        new = told.outputs - told.reused
        print(
            "  "
            f"{name:<10}{told.arguments / GIB:>12.2f}{new / GIB:>13.2f}"
            f"{told.temporary / GIB:>12.2f}"
            f"{(plan.stays + plan.batch + told.new) / GIB:>17.2f}"
        )
    print(
        f"  The rollout is compiled with {SHORT[0]} and {SHORT[1]} layers and extended to all in a "
        "line."
    )


def advice(plan: Plan, config: ConfigDict, shape: Sequence[int], room: float) -> list[str]:
    """What to change so that the run fits, after the phases that do not."""
    lines = [
        f"{name} needs {size / GIB:.1f} GiB" for name, size in plan.phases.items() if size > room
    ]
    if plan.phases["update"] > room and config.decoder.remat == "none":
        lines.append("set config.decoder.remat=block: blocks are computed again on the way back")
    rows = shape[0] * shape[1]
    # With that many micro-batches, each device computes one row at a time.
    most = config.episodes // config.minibatches // rows
    if plan.phases["update"] > room and config.microbatches < most:
        lines.append(f"raise config.microbatches to {most}: one row a device at a time")
    if config.ptx_coef and plan.phases["update"] > room:
        most = (
            round(config.ptx_rows_per_episode * config.episodes)
            // (config.epochs * config.minibatches)
            // rows
        )
        if (config.ptx_microbatches or config.microbatches) < most:
            lines.append(f"raise config.ptx_microbatches to {most}")
    if plan.phases["score"] > room and config.score_microbatches < config.episodes // rows:
        lines.append(
            f"raise config.score_microbatches to {config.episodes // rows}: one row a device at a "
            "time"
        )
    if plan.phases["rollout"] > room:
        lines.append(
            "the cache is config.episodes x (prompt_length + max_new_tokens) slots: lower one, or "
            "more devices"
        )
    if config.train == "all":
        lines.append("config.train=lora keeps moments, average and gradients of adapters alone")
    mesh = smallest_mesh(config, room, at_least=math.prod(shape))
    if mesh:
        found, micro = mesh
        settings = ", ".join(f"{k}={v}" for k, v in micro.items())
        lines.append(
            f"fits on {math.prod(found)} devices: --mesh={','.join(map(str, found))} with "
            f"{settings}"
        )
    return lines


def smallest_mesh(
    config: ConfigDict, room: float, *, at_least: int = 1
) -> tuple[tuple[int, ...], dict[str, int]] | None:
    """The first mesh, by powers of two, on which the run fits, and its micro-batches.

    Each device then computes one row at a time.
    """
    steps = config.epochs * config.minibatches
    # From the least power of two that is not below `at_least`, up to 4,096 devices.
    for power in range(max(0, at_least - 1).bit_length(), 13):
        for tensor in (1, 2, 4, 8):
            shape = (1, 2**power // tensor, tensor)
            rows = config.episodes // config.minibatches
            if shape[1] < 1 or rows % shape[1]:
                continue
            ptx = (
                round(config.ptx_rows_per_episode * config.episodes) // steps
                if config.ptx_coef
                else 0
            )
            micro = {
                "microbatches": rows // shape[1], "ptx_microbatches": max(1, ptx // shape[1]),
                "score_microbatches": config.episodes // shape[1],
            }  # fmt: skip
            tried = config_lib.unlocked_copy(config)
            tried.update(micro)
            try:
                if plan_by_rule(tried, abstract_mesh(shape)).peak <= room:
                    return shape, micro
            # The mesh does not divide a batch or an array.
            except ValueError:
                continue
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARG]",
        help="a PPO config with shapes, or a pipeline",
    )
    parser.add_argument(
        "--mesh",
        default="",
        metavar="DATA,FSDP,TENSOR",
        help="default: the config's, where it is fixed",
    )
    parser.add_argument("--chip", default="H100", help=", ".join(CHIPS))
    parser.add_argument(
        "--utilization",
        type=float,
        default=0.4,
        help="share of the peak that matrix products reach",
    )
    parser.add_argument("--no_compile", action="store_true", help="by rule only, in a second")
    parser.add_argument("--json", action="store_true", help="the last line is the plan as JSON")
    flags, rest = parser.parse_known_args(argv)
    try:
        # What the parser does not know are overrides of the config.
        overrides = dict(
            flag.removeprefix("--config.").split("=", 1) for flag in rest if "=" in flag
        )
        unknown = [flag for flag in rest if not (flag.startswith("--config.") and "=" in flag)]
        checks.require(
            not unknown,
            "flag",
            " ".join(unknown),
            "is unknown; keys of the config: --config.KEY=VALUE",
        )
        config = config_lib.load_config(flags.config, overrides)
        shape = mesh_shape(flags.mesh, ppo_config(config))
        if not flags.no_compile:
            # Both are read when JAX initializes its devices, so they are set before that.
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", math.prod(shape))
            as_accelerator()
        result = run(
            config, shape, chip=flags.chip, utilization=flags.utilization,
            compile_too=not flags.no_compile,
        )  # fmt: skip
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    if flags.json:
        print(json.dumps(result))
    return 0


def mesh_shape(text: str, config: ConfigDict) -> tuple[int, ...]:
    """``1,32,8`` as three numbers; without a text, the mesh of the config.

    Raises:
      ValueError: not three positive numbers.
    """
    parts = text.strip("() ").split(",") if text else [str(n) for n in config.mesh]
    try:
        shape = tuple(int(part) for part in parts)
    except ValueError:
        shape = ()
    checks.require(
        len(shape) == 3 and min(shape, default=0) >= 1, "mesh", text or tuple(config.mesh),
        "give three numbers of devices, --mesh=DATA,FSDP,TENSOR",
    )  # fmt: skip
    return shape


if __name__ == "__main__":
    sys.exit(main())
