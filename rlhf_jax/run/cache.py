"""The user's cache folder, which keeps compiled programs and fetched models across runs.

A run continues where no such folder can be written.
"""

from __future__ import annotations

import os
from pathlib import Path

from rlhf_jax.run.files import make_folder


def folder(*names: str) -> Path | None:
    """Creates ``~/.cache/rlhf_jax/NAMES`` (or its equivalent below ``XDG_CACHE_HOME``).

    Returns:
      The folder, or None where the user has no home directory or cannot write there (a container,
      a read-only disk).

    Source: XDG Base Directory Specification; a relative ``XDG_CACHE_HOME`` is to be ignored.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:  # HOME is unset and the user has no entry in the password database
        return None
    # `Path.home` follows HOME, which may be a relative path.
    if not base.is_absolute():
        return None
    place = base.joinpath("rlhf_jax", *names)
    try:
        make_folder(place)
    except OSError:
        return None
    return place if os.access(place, os.W_OK | os.X_OK) else None
