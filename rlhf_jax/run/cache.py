"""The user's cache folder: compiled programs and fetched models, kept over runs. A run goes on
where there is none.
"""

from __future__ import annotations

import os
from pathlib import Path

from rlhf_jax.run.files import make_folder


def folder(*names: str) -> Path | None:
    """``~/.cache/rlhf_jax/NAMES`` (or below ``XDG_CACHE_HOME``), made where it is missing.

    Returns:
      The folder, or None: there is no home, or it cannot be written there (a container, a read-only
      disk).

    Source: XDG Base Directory Specification; a relative ``XDG_CACHE_HOME`` is to be ignored.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:  # no HOME, and a user that the system does not know
        return None
    if not base.is_absolute():
        return None
    place = base.joinpath("rlhf_jax", *names)
    try:
        make_folder(place)
    except OSError:
        return None
    return place if os.access(place, os.W_OK | os.X_OK) else None
