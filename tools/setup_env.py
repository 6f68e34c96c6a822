"""Sets up `.venv` for this checkout; run by `make`.

It needs nothing but Python 3.11 or newer and a package index. It installs when `pyproject.toml`,
the accelerator or the requested extras changed since the last time, which a stamp in the
environment records; otherwise it returns at once. ``ACCELERATOR=cpu|cuda|tpu`` overrides the
detected one. In Colab it installs into the runtime's own Python and leaves the runtime's jax as it
is.
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
``dev`` includes them."""


def main() -> None:
    """Reads the requested extras from the command line and sets up the environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--extras", default="", help="comma separated extras of pyproject.toml, such as dev"
    )
    extras = {name for name in parser.parse_args().extras.split(",") if name}
    # `dev` includes the extras in ALWAYS; naming them again would only change the stamp.
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
    # Written after the installation, so that one that failed is repeated.
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
    """Whether this host has TPU chips.

    Checks their device files, Google's PCI vendor id, and the environment variables of a TPU VM.
    """
    if any(Path("/dev").glob("accel*")):
        return True
    if any(
        os.environ.get(name) for name in ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "COLAB_TPU_ADDR")
    ):
        return True
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    # Other devices use VFIO too, so the vendor decides.
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
    """The Python of `.venv`, which is created if it is missing or no longer starts."""
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
    """Installs the checkout (editable) with its extras; `constraints` pins versions to keep."""
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
    """Pins for the packages that the Colab runtime provides."""
    return [f"{name}=={version(name)}" for name in RUNTIME if version(name)]


def is_current(stamp: Path, extras: set[str]) -> bool:
    """Whether the last installation had this pyproject.toml and at least these extras."""
    try:
        done = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return False
    have = set(done["extras"]) | (ALWAYS if "dev" in done["extras"] else set())
    return done["pyproject"] == pyproject_hash() and extras <= have


def pyproject_hash() -> str:
    """The hash of pyproject.toml, on which the environment depends."""
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()


def version(name: str) -> str:
    """The version installed in this Python; empty if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def succeeds(*command: object) -> bool:
    """Whether a command exists and exits with 0."""
    argv = [str(part) for part in command]
    return (
        bool(shutil.which(argv[0]))
        and subprocess.run(argv, capture_output=True, check=False).returncode == 0
    )


def read(path: Path) -> str:
    """The text of a small file; empty if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def say(text: str) -> None:
    """Prints one line of progress."""
    print(f"set-up: {text}", flush=True)


def fail(text: str) -> None:
    """Ends the script with one line."""
    sys.exit(f"set-up: {text}")


if __name__ == "__main__":
    main()
