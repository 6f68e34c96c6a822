"""The devices of a stage, and the inputs that all processes must agree on before using them."""

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
    """Prepares this process and returns the device mesh of a stage.

    Compiled programs are kept in the user's cache folder, so that a second run starts at once;
    where it cannot be written, programs are compiled in each run.

    Args:
      mesh_shape: for example ``(-1, 1, 1)``, data parallel over all devices.

    Raises:
      ValueError: the mesh does not fit the devices, or the platform that JAX was configured to use
        has none.
    """
    cpu_process.settle()
    keep_compiled()
    Compiling.listen()
    parsed.begin()
    try:
        return sharding.make_mesh(tuple(mesh_shape))
    except RuntimeError as error:
        # JAX has no error class of its own for a backend that cannot start.
        if "nable to initialize backend" not in str(error):
            raise
        platforms = jax.config.values["jax_platforms"]
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"JAX_PLATFORMS={platforms}: {reason}; unset it to use what this machine has"
        ) from error


def agree_on_inputs(*paths: str) -> None:
    """Stops all processes unless the data files and models have the same content for each of them.

    Args:
      *paths: files, and models as `model_folder` takes them; empty strings are ignored.

    Raises:
      ValueError: contents differ; the message names path, processes and hosts.
    """
    for path in paths:
        files.local_path("the input", path)
    if processes.count() > 1:
        processes.agree(
            "inputs",
            {f"what is in {path}": files.digest(model_folder(path)) for path in paths if path},
        )
