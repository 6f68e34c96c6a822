"""Config files: Python files with ``get_config(arg)``, whose mistakes are reported in one line.

A config is a program of its author, so it may fail in any way a program can. Whatever it raises
becomes a ValueError with its file and line. Errors that this package raised for it already name
the field and are left as they are.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FORMS = (
    "a config is a Python file with get_config(arg), as in configs/, or the config.json of a run",
    "an argument follows the file after a colon: FILE.py:ARG",
)


def check(path: Path) -> Path:
    """Returns `path` if it can be a config: a regular file with a name that ends in .py or .json.

    Raises:
      ValueError: it is missing, a folder, a pipe, or of another kind; the message suggests files
        that may have been meant.
    """
    if path.is_dir():
        stored = path / "config.json"
        found = [str(stored)] if stored.is_file() else sorted(str(p) for p in path.glob("*.py"))[:8]
        there = f": pass a file, such as {', '.join(found)}" if found else f": {FORMS[0]}"
        raise ValueError(f"config {path} is a folder{there}")
    if not path.exists():
        raise ValueError(
            f"no config file {path}{_near(path) or f': pass --config=FILE[:ARG]; {FORMS[0]}'}"
        )
    if not path.is_file():
        raise ValueError(
            f"config {path} is not a regular file but a pipe or a device: save it to a file first"
        )
    if path.suffix not in (".py", ".json"):
        raise ValueError(f"config {path} is neither .py nor .json: {FORMS[0]}")
    return path


def _near(path: Path) -> str:
    """A hint at the file that was probably meant.

    It covers the dotted name of a module, a name without ``.py``, and a typing mistake.
    """
    for meant in (path.with_name(f"{path.name}.py"), Path(f"{str(path).replace('.', '/')}.py")):
        if meant.is_file():
            return f"; did you mean {str(meant)!r}?"
    found = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
    close = difflib.get_close_matches(str(path), found, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(found)}" if found else ""


def load(path: Path) -> Callable[..., Any]:
    """Imports a Python file and returns its ``get_config``, callable with or without an argument.

    Raises:
      ValueError: the file is not a config, or it raised an error. The returned function raises a
        ValueError too if ``get_config`` fails.
    """
    # A config in a folder named configs can then import its neighbours: `from configs import ..`.
    roots = [parent.parent for parent in path.resolve().parents if parent.name == "configs"]
    for root in map(str, roots[:1]):
        if root not in sys.path:
            sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location(f"config_file_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with told(path):
        spec.loader.exec_module(module)
    function = getattr(module, "get_config", None)
    if not callable(function):
        what = (
            "has no function get_config(arg)"
            if function is None
            else "gives the name get_config to no function"
        )
        raise ValueError(f"{path} {what}: {FORMS[0]}")

    def get_config(*arg: str) -> Any:
        with told(path):
            return function(*_arguments(function, arg, path))

    return get_config


def _arguments(function: Callable[..., Any], arg: tuple[str, ...], path: Path) -> tuple[str, ...]:
    """The arguments to call ``get_config`` with.

    A required parameter gets "" when the command line has no argument.
    """
    places = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if arg and not places:
        raise ValueError(
            f"get_config of {path} takes no argument and got {arg[0]!r}: "
            "leave out what follows the colon"
        )
    required = [p for p in places if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    return arg or ("",) * min(1, len(required))


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Converts any error of the config at `path` to a one-line ValueError with file and line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        # SystemExit is included: a config that calls `exit()` must not end the program silently.
        known = library_mistake(error)
        if known:
            raise ValueError(f"{_place(error, path)}: {known}") from error
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = Path(raised_in).is_relative_to(Path(__file__).resolve().parents[1])
        if isinstance(error, ValueError) and ours:
            raise  # a check of this package, whose message names the field and the fix
        raise ValueError(f"{_place(error, path)}: {_said(error)}") from error


def _place(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    # The innermost frame inside the config, not the library function where the error was raised.
    own = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if f.filename in (str(path), str(path.resolve()))
    ]
    return f"{path}:{own[-1].lineno}" if own else str(path)


def _said(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        text = (error.text or "").strip()
        return f"{error.msg}{f' in {text!r}' if text else ''}"
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, ModuleNotFoundError):
        text += ": run from the folder that holds it, or add that to PYTHONPATH"
    return text


def library_mistake(error: BaseException) -> str:
    """Describes a config library's error about a missing or misspelt key or a wrong type.

    Returns:
      One line, or "" for any other error.
    """
    if not isinstance(error, AttributeError | KeyError | TypeError):
        return ""
    # ml_collections raises the errors that any Python code raises, so its messages are matched.
    # Its AttributeErrors carry the KeyError that caused them as their argument.
    cause = error.args[0] if error.args else error
    text = str(cause.args[0] if isinstance(cause, KeyError) and cause.args else cause)
    typo = re.search(r'Did you mean "(.+?)" instead of "(.+?)"', text)
    unknown = re.search(r'Key "(.+?)" does not exist', text)
    if typo:
        return f"no key {typo[2]!r}; did you mean {typo[1]!r}?"
    if unknown:
        return f"no key {unknown[1]!r}"
    if "Could not override field" in text:
        return text
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or "ml_collections" not in frames[-1].filename or isinstance(error, TypeError):
        return ""
    name = text.splitlines()[0].strip("'\"") if text else ""
    return f"no key {name!r}"
