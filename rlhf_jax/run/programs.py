"""The programs and configs that ship with the package, and the command ``rlhf-jax``.

``rlhf-jax ppo --config=ppo/storyland`` runs ``python experiments/ppo.py
--config=configs/ppo/storyland.py`` from any working directory. In a checkout both folders are next
to the package; an installed package contains the same files.
"""

from __future__ import annotations

import difflib
import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parents[1]


def root() -> Path:
    """The folder that contains ``experiments/`` and ``configs/``."""
    # Only an installed package has this folder; in a checkout the programs are next to the package.
    inside = PACKAGE / "programs"
    return inside if inside.is_dir() else PACKAGE.parent


def names() -> list[str]:
    """The names of the programs.

    >>> "ppo" in names()
    True
    """
    found = (root() / "experiments").glob("*.py")
    return sorted(path.stem for path in found if not path.stem.startswith("_"))


def program(name: str) -> ModuleType:
    """A program as a module, for a notebook: ``program("sft").run(config, workdir)``.

    >>> program("ppo").__name__
    'experiments.ppo'

    Raises:
      ValueError: there is no program of this name.
    """
    _check(name)
    _on_path()
    return importlib.import_module(f"experiments.{name}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``rlhf-jax PROGRAM FLAGS``, which runs ``experiments/PROGRAM.py FLAGS``.

    Args:
      argv: the arguments; None reads the command line.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0].startswith("-"):
        print(
            "usage: rlhf-jax PROGRAM --config=NAME --workdir=DIR; the programs: "
            f"{', '.join(names())}"
        )
        sys.exit(0 if arguments[:1] in (["--help"], ["-h"]) else 2)
    try:
        _check(arguments[0])
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    _on_path()
    file = root() / "experiments" / f"{arguments[0]}.py"
    # The program parses `sys.argv` as a script does, and names itself by its first entry.
    sys.argv = [str(file), *arguments[1:]]
    # As ``__main__``, so that the program parses the flags and reports errors as a script does.
    runpy.run_path(str(file), run_name="__main__")


def _check(name: str) -> None:
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names())}"
        raise ValueError(f"no program {name!r}; {hint}")


def _on_path() -> None:
    """Makes ``experiments`` and ``configs`` importable under the names they have in a checkout."""
    if str(root()) not in sys.path:
        sys.path.insert(0, str(root()))


def shipped_config(path: str) -> str:
    """The file of a config that ships with the package: ``ppo/storyland``, or a checkout's path.

    Args:
      path: the user's value; it is returned unchanged if it is an existing file or matches no
        shipped config.
    """
    if Path(path).exists() or Path(path).is_absolute():
        return path
    for name in (path, f"configs/{path}.py"):
        beside = root() / name
        if name.startswith("configs/") and beside.is_file():
            return str(beside)
    return path
