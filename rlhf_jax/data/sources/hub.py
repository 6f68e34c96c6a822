"""Finds folders of data, and downloads from the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub

from rlhf_jax.run.files import local_path


def folder(data_dir: str | os.PathLike[str], *names: str) -> Path:
    """The folder itself, or the first of its subfolders `names` that exists.

    Raises:
      ValueError: it is not a folder.
    """
    root = local_path("data_dir", data_dir)
    if not root.is_dir():
        raise ValueError(
            f"data_dir={root} is no folder: check the path, or leave it out to download"
        )
    return next((root / name for name in names if (root / name).is_dir()), root)


def download(repo: str, name: str) -> Path:
    """The local copy of a file of a data set on the hub.

    Raises:
      ValueError: the download fails; the message explains how to pass a folder instead.
    """
    try:
        return Path(huggingface_hub.hf_hub_download(repo, name, repo_type="dataset"))
    except OSError as error:  # the base class of all errors of the hub client
        raise ValueError(
            f"cannot download {name} of {repo} ({type(error).__name__}: {first_line(error)}): "
            "check the network, or put the file in a folder and pass data_dir (--data_dir=FOLDER)"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0]
