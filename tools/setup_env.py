"""Makes `.venv` ready for this checkout; run by `make`, needs nothing but Python 3.11 or newer and
a package index.

It installs when `pyproject.toml`, the accelerator or the wanted extras changed since the last time
(a stamp in the environment tells) and is done in a moment otherwise. ``ACCELERATOR=cpu|cuda|tpu``
overrides what it finds. In Colab it installs into the runtime's own Python and leaves the runtime's
jax as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
ACCELERATORS = ("cpu", "cuda", "tpu")
RUNTIME = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda12-pjrt",
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
    "numpy",
)
GOOGLE_PCI = "0x1ae0"
ALWAYS = {"gguf"}
"""Extras that a command of the README needs (``prepare_data.py --model=smollm2`` reads GGUF);
``dev`` has them too."""


def main() -> None:
    """Reads the wanted extras from the command line and sets up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--extras", default="", help="comma separated extras of pyproject.toml, such as dev"
    )
    extras = {name for name in parser.parse_args().extras.split(",") if name}
    extras |= ALWAYS - (ALWAYS if "dev" in extras else set())
    accelerator, why = choose_accelerator()
    if in_colab():
        say(f"Colab: using the runtime's Python and its jax {version('jax')}, never upgraded here")
        python, stamp, constraints = (
            Path(sys.executable),
            ROOT / "build" / "setup.json",
            runtime_versions(),
        )
    else:
        python, stamp, constraints = venv_python(), VENV / "setup.json", []
        extras |= {accelerator} - {"cpu"}
    say(f"accelerator: {accelerator} ({why})")
    if is_current(stamp, extras):
        return
    install(python, sorted(extras), constraints)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps({"pyproject": pyproject_hash(), "extras": sorted(extras)}))


def choose_accelerator() -> tuple[str, str]:
    """The accelerator to install for, and why."""
    wanted = os.environ.get("ACCELERATOR", "").lower()
    if wanted:
        if wanted not in ACCELERATORS:
            fail(f"ACCELERATOR={wanted} must be one of {', '.join(ACCELERATORS)}")
        return wanted, "ACCELERATOR says so"
    if Path("/dev/nvidia0").exists() or succeeds("nvidia-smi", "-L"):
        return "cuda", "an NVIDIA device was found"
    if has_tpu():
        return "tpu", "a TPU was found"
    return "cpu", "no NVIDIA or TPU device was found"


def has_tpu() -> bool:
    """Whether this host has TPU chips: their device files, Google's PCI vendor, or the names a TPU
    VM is given.
    """
    if any(Path("/dev").glob("accel*")):
        return True
    if any(
        os.environ.get(name) for name in ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "COLAB_TPU_ADDR")
    ):
        return True
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return Path("/dev/vfio").is_dir() and any(read(path) == GOOGLE_PCI for path in vendors)


def in_colab() -> bool:
    """Whether this is a Colab runtime."""
    if os.environ.get("COLAB_RELEASE_TAG"):
        return True
    try:
        return importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:
        return False


def venv_python() -> Path:
    """The Python of `.venv`, made when it is missing or no longer starts."""
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if python.exists() and succeeds(
        python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"
    ):
        return python
    say(f"making {VENV.name} with Python {sys.version.split()[0]}")
    try:
        venv.create(VENV, with_pip=True, clear=VENV.exists())
    except subprocess.CalledProcessError:
        fail(
            "this Python cannot make a virtual environment: install its venv module (Debian: apt "
            "install python3-venv)"
        )
    return python


def install(python: Path, extras: list[str], constraints: list[str]) -> None:
    """Installs the checkout (editable) with its extras; `constraints` are versions to leave as they
    are.
    """
    target = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    say(f"installing rlhf_jax{[*extras] if extras else ''} (minutes the first time)")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints))
        file.flush()
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--constraint", file.name] if constraints else []
        if subprocess.run(
            [str(part) for part in [*pip, "--editable", target]], cwd=ROOT, check=False
        ).returncode:
            fail(
                "the installation failed (see above): is a package index reachable, is the disk "
                "full?"
            )


def runtime_versions() -> list[str]:
    """Pins for what the runtime brings along."""
    return [f"{name}=={version(name)}" for name in RUNTIME if version(name)]


def is_current(stamp: Path, extras: set[str]) -> bool:
    """Whether the last installation was of this pyproject.toml and had these extras; an accelerator
    may be swapped.
    """
    try:
        done = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return False
    have = set(done["extras"]) | (ALWAYS if "dev" in done["extras"] else set())
    return done["pyproject"] == pyproject_hash() and extras <= have


def pyproject_hash() -> str:
    """What the environment depends on."""
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()


def version(name: str) -> str:
    """The installed version in this Python, empty when it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def succeeds(*command: object) -> bool:
    """Whether a command is there and exits with 0."""
    argv = [str(part) for part in command]
    return (
        bool(shutil.which(argv[0]))
        and subprocess.run(argv, capture_output=True, check=False).returncode == 0
    )


def read(path: Path) -> str:
    """The text of a small file, empty when it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def say(text: str) -> None:
    """One line of progress."""
    print(f"set-up: {text}", flush=True)


def fail(text: str) -> None:
    """Stops with one line."""
    sys.exit(f"set-up: {text}")


if __name__ == "__main__":
    main()
