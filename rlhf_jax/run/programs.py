"""The programs and configs that come with the package, and the command ``rlhf-jax``.

``rlhf-jax ppo --config=ppo/storyland`` is
``python experiments/ppo.py --config=configs/ppo/storyland.py``, wherever it is given. In a checkout
both folders are beside the package; an installed package holds the same files inside it.
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
    """The folder that holds ``experiments/`` and ``configs/``."""
    inside = PACKAGE / "programs"
    return inside if inside.is_dir() else PACKAGE.parent


def names() -> list[str]:
    """The programs.

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
      ValueError: there is none of this name.
    """
    _check(name)
    _on_path()
    return importlib.import_module(f"experiments.{name}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``rlhf-jax PROGRAM FLAGS``: runs a program as
    ``python experiments/PROGRAM.py FLAGS`` does.

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
    sys.argv = [str(file), *arguments[1:]]
    runpy.run_path(str(file), run_name="__main__")


def _check(name: str) -> None:
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names())}"
        raise ValueError(f"no program {name!r}; {hint}")


def _on_path() -> None:
    """Lets a program import another one, and a config its neighbours, by the names they have in a
    checkout.
    """
    if str(root()) not in sys.path:
        sys.path.insert(0, str(root()))


def shipped_config(path: str) -> str:
    """The file of a config that comes with the package: ``ppo/storyland``, or its path in a
    checkout.

    Args:
      path: what a user gave; a file that is there is taken as it is, and so is what names no config
        of ours.
    """
    if Path(path).exists() or Path(path).is_absolute():
        return path
    for name in (path, f"configs/{path}.py"):
        beside = root() / name
        if name.startswith("configs/") and beside.is_file():
            return str(beside)
    return path
