r"""Time of one sharded SFT step over 1 and 2 CPU devices, the same batch on both: run by hand, prints a table.

    python -m tests.reliability.scaling

Each number of devices has a process of its own with as many cores as devices. The row of two devices with half the
time of one would be perfect scaling; fake CPU devices share memory and its bandwidth.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time


def measure(shape: tuple[int, int, int]) -> dict:
    """Median seconds of a step in this process."""
    import statistics
    from functools import partial

    import jax
    import numpy as np

    from rlhf_jax import optim, sharding, steps
    from rlhf_jax.models import gpt2, language_model
    from rlhf_jax.types import LMBatch

    mesh = sharding.make_mesh(shape)
    model, tx = language_model(gpt2(1024, 128, 2, 128, 4, mesh=mesh)), optim.adam(1e-4)
    params = sharding.place_state(jax.device_get(jax.jit(model.init)(jax.random.key(0))), mesh)
    state, where = sharding.build_state(partial(steps.train_state, tx=tx), params, mesh=mesh)
    rows = (16, 128)
    tokens = np.random.default_rng(0).integers(0, 1024, rows).astype(np.int32)
    places = np.broadcast_to(np.arange(128, dtype=np.int32), rows)
    batch = sharding.place_batch(LMBatch(tokens, np.ones(rows, np.int32), places, places > 0), mesh)
    step, seconds = steps.compile_step(steps.make_sft_step(model, tx), state_sharding=where), []
    for _ in range(13):
        begun = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch, None))
        seconds.append(time.perf_counter() - begun)
    return {
        "mesh": shape,
        "seconds": statistics.median(seconds[3:]),
        "loss": float(metrics["sft/loss"].value),
    }


def main() -> None:
    """Runs each mesh and prints the table."""
    cores = sorted(os.sched_getaffinity(0))
    print(f"{'mesh':<12}{'devices':>8}{'seconds':>10}{'speed-up':>10}{'loss':>12}")
    alone = None
    for shape in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)):
        devices = shape[0] * shape[1] * shape[2]
        flags = f"--xla_force_host_platform_device_count={devices}"
        done = subprocess.run(
            ["taskset", "-c", ",".join(map(str, cores[:devices])), sys.executable, "-m", "tests.reliability.scaling",
             json.dumps(shape)],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        alone = alone or found["seconds"]
        gain = alone / found["seconds"]
        print(
            f"{shape!s:<12}{devices:>8}{found['seconds']:>10.3f}{gain:>10.2f}{found['loss']:>12.6f}",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(tuple(json.loads(sys.argv[1])))))
    else:
        main()
