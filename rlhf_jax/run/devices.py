"""The devices of a stage and what each process must see alike before it uses them."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from rlhf_jax import sharding
from rlhf_jax.backends import cpu_process
from rlhf_jax.data import parsed
from rlhf_jax.run import files, processes
from rlhf_jax.run.compiling import Compiling, keep_compiled
from rlhf_jax.run.networks import model_folder


def start(mesh_shape: Sequence[int]) -> jax.sharding.Mesh:
    """The device mesh of a stage, ``(-1, 1, 1)`` for data parallel over all devices.

    Compiled programs are kept in a cache folder of the user, so that a second run starts at once;
    where none can be written they are compiled each time.

    Raises:
      ValueError: the mesh does not fit the devices, or there are none of the platform that JAX is
        told to use.
    """
    cpu_process.settle()
    keep_compiled()
    Compiling.listen()
    parsed.begin()
    try:
        return sharding.make_mesh(tuple(mesh_shape))
    except RuntimeError as error:
        if "nable to initialize backend" not in str(error):
            raise
        platforms = jax.config.values["jax_platforms"]
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"JAX_PLATFORMS={platforms}: {reason}; unset it to use what this machine has"
        ) from error


def agree_on_inputs(*paths: str) -> None:
    """Stops all processes unless each reads the same files: data and models, by what is in them.

    Args:
      *paths: files, and models as `model_folder` takes them; empty ones are left out.

    Raises:
      ValueError: they differ; the message names path, processes and hosts.
    """
    for path in paths:
        files.local_path("the input", path)
    if processes.count() > 1:
        processes.agree(
            "inputs",
            {f"what is in {path}": files.digest(model_folder(path)) for path in paths if path},
        )
