"""The plan's memory against what this machine then holds: the phases of PPO run for real on one CPU device.

Prints a JSON line a phase: bytes that the plan says the program needs beside its arguments, and the peak of resident
memory over what there was before. `test_plan.py` reads them; a process of its own, because only then the peak is ours.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from rlhf_jax import sharding
from rlhf_jax.backends import cpu_process, planned_for_accelerators
from rlhf_jax.run import config as config_lib
from rlhf_jax.run import devices, memory
from rlhf_jax.run.ppo import programs as programs_lib
from tools import by_rule, plan

ROOT = Path(__file__).parents[1]
SIZES = {"layers": 4, "width": 256, "heads": 8, "vocab_size": 2_000, "context_length": 256}


def resident(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    return int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def arguments(compiled: jax.stages.Compiled):
    """Arrays for a compiled program; numbers do not matter to memory, so ones."""

    def make(info):
        if jax.dtypes.issubdtype(info.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.ones(info.shape, info.dtype)

    return jax.block_until_ready(jax.tree.map(make, compiled.args_info[0]))


def main() -> None:
    """Compiles and runs the three phases."""
    config = config_lib.load_config(f"{ROOT}/configs/ppo/storyland.py")
    config = config_lib.unlocked_copy(config)
    config.update(
        episodes=64, minibatches=2, prompt_length=64, max_new_tokens=64, ptx_row_length=128, ptx_rows_per_episode=1.0,
        shapes={"policy": SIZES, "reward_model": SIZES}, **json.loads(sys.argv[1]),
    )  # fmt: skip
    plan.as_accelerator()
    devices.start((1, 1, 1))
    cpu_process.keep_freed_memory(
        False
    )  # freed pieces leave, so that resident memory is what is in use
    mesh = sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1])
    policy, value = by_rule.models(config)
    ruled = by_rule.plan_by_rule(config, mesh)
    setup = by_rule.abstract_setup(config, mesh, policy, value)
    with planned_for_accelerators():
        programs = list(programs_lib.programs(setup, config, mesh))
    for name, compiled in programs:
        told = memory.needs(compiled)
        # Once unmeasured: what a first run brings in for good (the program's own code, stacks of the
        # threads that work on it) is no memory that the program needs beside its arguments.
        jax.block_until_ready(compiled(*arguments(compiled)))
        given = arguments(compiled)
        cpu_process.release_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        result = jax.block_until_ready(compiled(*given))
        peak = resident("VmHWM") - before
        estimate = ruled.phases[name] - ruled.stays - ruled.batch
        print(
            json.dumps(
                {"phase": name, "compiled": told.new, "by_rule": estimate, "measured": peak}
            ),
            flush=True,
        )
        del result, given


if __name__ == "__main__":
    main()
