"""Configs: functions chosen by name, overrides from the command line, errors that name the field and the fix.

A config file is Python with ``get_config(arg: str = "") -> ConfigDict``. A loss is swapped without touching the
package: ``config.policy_loss = fn_spec("rlhf_jax.losses.policy:ppo_policy_loss")`` makes the keyword-only defaults of
that function fields, and `resolve` turns the fields back into a function whose arguments were checked at start-up.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import contextlib
import contextvars
import dataclasses
import difflib
import errno
import functools
import importlib
import inspect
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

try:
    import fcntl
except ImportError:  # Windows: folders are used without a lock
    fcntl = None

from ml_collections import ConfigDict, FieldReference

from rlhf_jax import __version__, processes
from rlhf_jax.run import config_file, files, numerics, output
from rlhf_jax.run.files import PLAIN_NAME, read_json
from rlhf_jax.run.secrets import REDACTED, is_secret, known_secrets, redact, secrets_in

Run = Callable[[ConfigDict, str], Any]

# ------------------------------------------------------------------------------------------- functions by name


T = TypeVar("T")


def fn_spec(fn: str, **overrides: Any) -> ConfigDict:
    """A function as data: its name ``"module:function"`` and its keyword-only defaults as fields to override.

    Args:
      fn: where the function lives, ``"package.module:function"``.
      **overrides: values for keyword-only arguments, required ones included.

    Returns:
      A ConfigDict with the field ``fn`` and one field for each keyword-only argument that is plain data.

    Raises:
      ValueError: the function does not exist, has no such keyword-only argument, or one without a default is missing.

    >>> fn_spec("rlhf_jax.config:require_range", low=0.0).to_dict()
    {'fn': 'rlhf_jax.config:require_range', 'high': None, 'low': 0.0}
    """
    keywords = _keyword_only(import_fn(fn))
    for name in overrides:
        if name not in keywords:
            raise ValueError(f"{fn} has no keyword-only argument {name!r}{_nearest(name, keywords)}")
    missing = [k for k, p in keywords.items() if p.default is p.empty and k not in overrides]
    if missing:
        raise ValueError(f"{fn} needs a value for {', '.join(missing)}: fn_spec({fn!r}, {missing[0]}=...)")
    defaults = {k: p.default for k, p in keywords.items() if _is_plain(p.default)}
    return ConfigDict({"fn": fn} | defaults | overrides)


def resolve(spec: Mapping[str, Any] | ConfigDict | str, available: Iterable[str] | None = None) -> Callable[..., Any]:
    """The function a `fn_spec` names, its keyword-only arguments bound.

    Args:
      spec: a `fn_spec`, or just ``"module:function"``.
      available: names the caller can pass; None skips the check.

    Returns:
      ``functools.partial(function, **fields)``.

    Raises:
      ValueError: no such function, an unknown field, or an argument that is not in `available` (which is listed).
    """
    fields = {"fn": spec} if isinstance(spec, str) else {key: spec[key] for key in spec}
    name = fields.pop("fn", None)
    if not isinstance(name, str):
        raise ValueError(f"a function is chosen with fn='module:function', got fn={name!r}")
    fn = import_fn(name)
    keywords = _keyword_only(fn)
    for key in fields:
        if key not in keywords:
            raise ValueError(f"{name} has no keyword-only argument {key!r}{_nearest(key, keywords)}")
    missing = [k for k, p in keywords.items() if p.default is p.empty and k not in fields]
    if missing:
        raise ValueError(f"{name} needs a value for {', '.join(missing)}")
    if available is not None:
        _check_arguments(name, fn, tuple(available))
    return functools.partial(fn, **fields)


def filled_from(kind: Callable[..., T], config: ConfigDict, **others: Any) -> T:
    """A frozen dataclass of settings (`steps.PPO`, `rollout.Shaping`) from the keys of a config that are its fields.

    Args:
      kind: the dataclass; it checks its own numbers.
      config: a group; keys that are no fields are left to others.
      **others: fields that have another name in the config, or none.

    Raises:
      ValueError: as `kind` does.
    """
    names = {field.name for field in dataclasses.fields(kind)} - {*others}  # pyright: ignore[reportArgumentType]
    return kind(**{name: config[name] for name in sorted(names & {*config})}, **others)


def import_fn(name: str) -> Callable[..., Any]:
    """The object ``"package.module:function"`` names; a ValueError says which half is wrong."""
    module_name, _, attribute = name.partition(":")
    if not attribute or not all(p.isidentifier() for p in [*module_name.split("."), attribute]):
        raise ValueError(f"{name!r} is not of the form 'package.module:function'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module is there; something it imports is not
        raise ValueError(
            f"no module {error.name!r} for {name!r}: run from the folder that holds it, or add that to PYTHONPATH"
        ) from None
    fn = getattr(module, attribute, None)
    if not callable(fn):
        public = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise ValueError(f"module {module_name} has no function {attribute!r}{_nearest(attribute, public)}")
    return fn


def _keyword_only(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {k: p for k, p in inspect.signature(fn).parameters.items() if p.kind is p.KEYWORD_ONLY}


def _check_arguments(name: str, fn: Callable[..., Any], available: tuple[str, ...]) -> None:
    for key, p in inspect.signature(fn).parameters.items():
        if p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        if key not in available and p.default is p.empty:
            raise ValueError(
                f"{name} wants the argument {key!r}, which is not available here{_nearest(key, available)}. "
                f"Available: {', '.join(available)}. A hyperparameter must be keyword-only (after *)."
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _nearest(name: str, choices: Iterable[str]) -> str:
    """A hint for an error: the likely spelling when one is near, otherwise everything there is."""
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(choices)}" if choices else ""


# ------------------------------------------------------------------------------------------------- reading configs


def load_config(path_and_arg: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """The locked config of a file, ``"configs/ppo/x.py"`` or ``"configs/ppo/x.py:arg"``, with `overrides` on top.

    Args:
      path_and_arg: path of a Python file with ``get_config(arg)``; what follows the colon is `arg`.
      overrides: dotted keys and values as text, as they stand on a command line.

    Raises:
      ValueError: no such file, no `get_config`, an unknown key (with the nearest name), a value of the wrong type.
    """
    if re.match(r"[\w+.-]+:/", path_and_arg):
        files.local_path("--config", path_and_arg)
    path, _, arg = path_and_arg.partition(":")
    file = config_file.check(Path(path))
    if file.suffix == ".json":
        config = apply_arg(_stored_run(file), arg)
    else:
        config = config_file.load(file)(*([arg] if arg else []))
    if not isinstance(config, ConfigDict):
        got = type(config).__name__
        forgotten = ": end it with `return config`" if config is None else ""
        raise ValueError(f"get_config of {path} must return a ConfigDict, got {got}{forgotten}")
    config = override(config, overrides or {})
    return _without_gaps(path, config).lock()


def _stored_run(path: Path) -> ConfigDict:
    """The config that a run stored, to run it again."""
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}, no config: {config_file.FORMS[0]}")
    if {"model_type", "architectures"} & set(stored):
        raise ValueError(f"{path} describes a model: pass its folder as the model; {config_file.FORMS[0]}")
    try:
        return ConfigDict(_tuples(stored))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no config that a run stored ({error}): {config_file.FORMS[0]}") from None


def _without_gaps(path: str, config: ConfigDict) -> ConfigDict:
    """`config`, unless a stored one holds the mark of a secret that was left out of it."""
    if path.endswith(".json"):
        plain = config.to_dict()
        gaps = [key for key in sorted(leaf_keys(config)) if REDACTED in str(_value_at(plain, key))]
        if gaps:
            raise ValueError(f"{path} was stored without the secret {gaps[0]}: pass --config.{gaps[0]}=VALUE")
    return config


def apply_arg(config: ConfigDict, arg: str, **variants: Callable[[ConfigDict], Any]) -> ConfigDict:
    """Applies the argument of a config file: variants by name, then ``key=value`` overrides, separated by commas.

    Args:
      config: the config to change, in place.
      arg: for example ``"smoke,policy_loss=my_lab.losses:dual_clip,seed=1"``.
      **variants: functions that change the config, by the name that asks for them.

    Returns:
      The same config, locked.

    >>> apply_arg(ConfigDict({"seed": 0, "steps": 90}), "smoke,seed=1", smoke=lambda c: c.update(steps=3)).to_dict()
    {'seed': 1, 'steps': 3}
    """
    config.lock()
    pieces = [piece.strip() for piece in arg.split(",") if piece.strip()]
    for piece in pieces:
        if "=" in piece:
            continue
        if piece not in variants:
            raise ValueError(f"no variant {piece!r}{_nearest(piece, variants)}, or write key=value")
        with _as_user_error(f"variant {piece!r}"):
            variants[piece](config)
    return override(config, dict(piece.split("=", 1) for piece in pieces if "=" in piece))


def override(config: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
    """Sets dotted keys to values given as text, each read as the type the key has; in place.

    A key that holds a `fn_spec` takes ``module:function`` and gets the defaults of that function.

    >>> override(ConfigDict({"ppo": {"lr": 1e-5, "betas": (0.9, 0.95)}}), {"ppo.lr": "3e-5"}).ppo.lr
    3e-05
    """
    for key, text in overrides.items():
        *groups, leaf = key.split(".")
        parent, seen = config, "config"
        for name in groups:
            _unfold(parent, name)
            parent, seen = _member(parent, name, seen), f"{seen}.{name}"
        value = _parse(f"config.{key}", text, _member(parent, leaf, seen))
        with parent.ignore_type():
            parent[leaf] = value.lock() if isinstance(value, ConfigDict) and config.is_locked else value
    return config


def _unfold(parent: Any, name: str) -> None:
    """Makes a function that is chosen by its name alone a group, so that its hyperparameters can be set."""
    chosen = parent.get(name) if isinstance(parent, ConfigDict) else None
    if name in ("text_reward", "gold") and isinstance(chosen, str) and chosen:
        spec = fn_spec(chosen)
        with parent.ignore_type():
            parent[name] = spec.lock() if parent.is_locked else spec


def _member(parent: Any, name: str, seen: str) -> Any:
    if not isinstance(parent, ConfigDict):
        raise ValueError(f"{seen} is a value, not a group: it has no key {name!r}")
    if name not in parent:
        raise ValueError(f"{seen} has no key {name!r}{_nearest(name, parent.keys())}")
    return parent[name]


def _parse(field: str, text: str, current: Any) -> Any:
    """`text` as a value of the type of `current`; "None" is allowed everywhere (a check elsewhere may refuse it)."""
    if isinstance(current, ConfigDict):
        if "fn" not in current:
            raise ValueError(f"{field} is a group: set one of {', '.join(f'{field}.{k}' for k in current)}")
        return fn_spec(text) if text else ""
    if text == "None":
        return None
    if isinstance(current, str):
        return text
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        if current is None or type(value) is type(current):
            return value
        if isinstance(current, float) and type(value) is int:
            return float(value)
        if isinstance(current, tuple) and isinstance(value, list):
            return tuple(value)
    if current is None:
        return text
    shown, example = (REDACTED, REDACTED) if is_secret(field) else (text, repr(current))
    raise ValueError(f"{field}={shown} must be a {type(current).__name__}, as in {field}={example}")


@contextlib.contextmanager
def _as_user_error(where: str) -> Iterator[None]:
    """A misspelt key or a wrong type set in Python reads like one set on the command line."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        known = config_file.library_mistake(error)
        if known:
            raise ValueError(f"{where}: {known}") from None
        raise


# ------------------------------------------------------------------------------------------------------- validation


def require(condition: bool, field: str, value: Any, fix: str) -> None:
    """Refuses a config value: ``ValueError("field=value: fix")`` unless `condition` holds."""
    if not condition:
        raise ValueError(f"{field}={value!r}: {fix}")


def require_divides(field: str, value: int, whole: int, what: str) -> None:
    """Refuses a part that does not divide its whole, and lists the parts that do.

    >>> require_divides("minibatches", 6, 16, "the rollout batch")
    Traceback (most recent call last):
    ValueError: minibatches=6 must divide the rollout batch of 16: choose 1, 2, 4, 8 or 16
    """
    if value >= 1 and whole % value == 0:
        return
    divisors = [str(n) for n in range(1, whole + 1) if whole % n == 0]
    choices = divisors if len(divisors) <= 8 else sorted(divisors, key=lambda n: abs(int(n) - value))[:6]
    *head, last = sorted(choices, key=int)
    listed = f"{', '.join(head)} or {last}" if head else last
    raise ValueError(f"{field}={value} must divide {what} of {whole}: choose {listed}")


def require_one_of(field: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuses a value that is not one of `choices` and names the nearest."""
    if value not in choices:
        names = [str(c) for c in choices]
        near = difflib.get_close_matches(str(value), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{field}={value!r} must be one of {', '.join(names)}{hint}")


def require_range(field: str, value: float, *, low: float | None = None, high: float | None = None) -> None:
    """Refuses a number outside ``low <= value <= high`` (None: no bound), NaN included."""
    if not ((low is None or value >= low) and (high is None or value <= high)) or value != value:
        bounds = [f">= {low}"] * (low is not None) + [f"<= {high}"] * (high is not None)
        raise ValueError(f"{field}={value!r} must be {' and '.join(bounds) or 'a number'}")


# ------------------------------------------------------------------------------------------------------ JSON, secrets


def to_json(config: ConfigDict) -> str:
    """The config as JSON to keep beside a run, without secrets (`is_secret`, `redact`).

    >>> print(to_json(ConfigDict({"seed": 1, "hf_token": "abc"})))
    {
      "hf_token": "<redacted>",
      "seed": 1
    }
    """
    return json.dumps(_plain(config), indent=2, sort_keys=True)


def from_json(text: str) -> ConfigDict:
    """The config `to_json` wrote; lists come back as the tuples they were."""
    return ConfigDict(_tuples(json.loads(text)))


def _plain(value: Any, key: str = "", secret: bool = False) -> Any:
    """Plain data; under a secret's key (`secret`) whatever it holds is hidden, groups and tuples included."""
    secret = secret or is_secret(key)
    if isinstance(value, FieldReference):
        value = value.get()
    if isinstance(value, ConfigDict):  # references kept: it goes around __getitem__, for storing a key is not using it
        return {k: _plain(v, k, secret) for k, v in value.items(preserve_field_references=True)}
    if isinstance(value, tuple | list):
        return [_plain(v, key, secret) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v, str(k), secret) for k, v in value.items()}
    if secret and value and (isinstance(value, str) or (type(value) is int and "token" not in key.lower())):
        return REDACTED  # a number under a key like token_id is an id
    if isinstance(value, str):
        return redact(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    raise ValueError(
        f"config.{key} holds a {type(value).__name__}: only numbers, text, tuples and groups can be stored"
    )


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def diff(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What changed between two configs (as dicts), one line a key.

    >>> diff({"ppo": {"lr": 1e-5, "seed": 0}}, {"ppo": {"lr": 2e-5, "seed": 0}})
    ['ppo.lr: 1e-05 -> 2e-05']
    """
    lines = []
    for key in sorted({*old, *new}):
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += diff(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


# ------------------------------------------------------------------------------------------------ who reads which key


def record_reads(config: ConfigDict) -> tuple[ConfigDict, set[str]]:
    """A copy of `config` that notes each key as it is read, so that a test can show that no key is without effect.

    >>> config, reads = record_reads(ConfigDict({"ppo": {"lr": 1e-5, "epochs": 1}}))
    >>> config.ppo.lr, sorted(reads), sorted(leaf_keys(config) - reads)
    (1e-05, ['ppo.lr'], ['ppo.epochs'])
    """
    reads: set[str] = set()
    return _Recording(config, "", reads).lock(), reads


def leaf_keys(config: ConfigDict, prefix: str = "") -> set[str]:
    """The dotted name of every value of the config, without reading it."""
    keys = set()
    for key, value in config.items(preserve_field_references=True):
        keys |= leaf_keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {f"{prefix}{key}"}
    return keys


class _Recording(ConfigDict):
    _prefix: str
    _reads: set[str]

    def __init__(self, source: ConfigDict, prefix: str, reads: set[str]):
        super().__init__()
        object.__setattr__(self, "_prefix", prefix)
        object.__setattr__(self, "_reads", reads)
        for key, value in source.items():
            self[key] = _Recording(value, f"{prefix}{key}.", reads) if isinstance(value, ConfigDict) else value

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if not isinstance(value, ConfigDict) and key in self:
            self._reads.add(f"{self._prefix}{key}")
        return value


# ------------------------------------------------------------------------------------------ run folders, command line

CONFIG_FILE = "config.json"
LOCK_FILE = "run.lock"
"""Marks a folder as a run of this program and is locked while a process works in it."""


def require_name(field: str, name: str) -> str:
    """`name` if it may become a part of a path.

    >>> require_name("config.name", "../ppo")
    Traceback (most recent call last):
    ValueError: config.name='../ppo': a name is 1 to 128 letters, digits, '.', '_' or '-', a letter or digit first
    """
    good = bool(PLAIN_NAME.fullmatch(name))
    require(good, field, name, "a name is 1 to 128 letters, digits, '.', '_' or '-', a letter or digit first")
    return name


def claim_workdir(workdir: str | os.PathLike[str], *, overwrite: bool = False) -> IO[str]:
    """Makes the run folder where it is missing and locks it for this process, whose end by any means unlocks it.

    Args:
      workdir: the folder of a run: new, empty, or made by this program.
      overwrite: rename an earlier run to ``<workdir>.old-<time>`` first.

    Returns:
      The open lock file; closing it gives the folder free.

    Raises:
      ValueError: the folder is not ours (a file, a link, a folder with other files), or a live process works in it.
    """
    path = files.local_path("workdir", workdir)
    _refuse_foreign(path)
    if overwrite and (path / CONFIG_FILE).is_file():
        with _lock(path):
            _move_aside(path)
    files.make_folder(path)
    lock = _lock(path)
    files.sync(path)  # the mark that the folder is ours is on the disk before anything else is written there
    files.remove_unfinished(path)  # the lock is ours, so nobody is at work on them
    return lock


def _refuse_foreign(path: Path) -> None:
    """A run folder holds our lock file, or nothing; no link in it, at any depth, leads to somewhere else."""
    name = f"workdir={str(path)!r}"
    if path.is_symlink():
        raise ValueError(f"{name} is a symbolic link: pass the folder it leads to, {os.path.realpath(path)}")
    if not path.exists():
        return
    half = {"config.tmp"}  # all that a kill at the very start left in earlier versions
    ours = path.is_dir() and ((path / LOCK_FILE).is_file() or {p.name for p in path.iterdir()} <= half)
    if not ours:
        older = f" (one of an earlier version: add an empty file {LOCK_FILE})" if (path / CONFIG_FILE).exists() else ""
        raise ValueError(f"{name} is not a run of this program{older}: choose another, it is left as it is")
    link = next(files.links_out_of(path), None)
    if link is not None:
        raise ValueError(
            f"{link} is a symbolic link out of the run folder, to {os.path.realpath(link)}: move what it leads to "
            "there instead, or remove the link"
        )


def _move_aside(path: Path) -> None:
    aside = path.with_name(f"{path.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
    if aside.exists():
        aside = aside.with_name(f"{aside.name}-{time.time_ns()}")
    files.rename(path, aside)
    print(f"The earlier run was moved to {aside}.", flush=True)


def _lock(path: Path) -> IO[str]:
    """Opens and locks the lock file; the kernel drops the lock with the process, so none is ever stale."""
    file = (path / LOCK_FILE).open("a+", encoding="utf-8")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(200).strip() or "another process"
        file.close()
        raise ValueError(
            f"workdir={str(path)!r} is in use by {holder}: wait for its end or stop it, or choose another workdir"
        ) from None
    except OSError as error:  # a file system without locks
        print(f"Warning: {path} cannot be locked ({error}): start only one process on it", file=sys.stderr, flush=True)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


PATHS = frozenset(
    ("base", "corpus", "data", "data_dir", "demonstrations", "evaluation", "held_out_text", "model", "models",
     "pretraining_text", "prompts", "rankings", "reference", "reward_model", "validation")
)  # fmt: skip
"""Keys, in any group, whose value names files or folders to read, or groups and tuples of such."""


def refuse_addresses(config: ConfigDict) -> None:
    """Refuses a config that names data or models by addresses such as ``gs://bucket/data``, before anything is read.

    >>> refuse_addresses(ConfigDict({"tracker": "https://example.org", "prompts": "data/prompts.jsonl"}))

    Raises:
      ValueError: a key of `PATHS` does; see `files.local_path`.
    """
    for key in sorted(leaf_keys(config)):
        if not PATHS.intersection(key.split(".")[-2:]):
            continue
        value = _value_at(config, key)
        for path in value if isinstance(value, tuple | list) else (value,):
            if isinstance(path, str):
                files.local_path(f"config.{key}", path)


HARMLESS = ("save_every", "evaluate_every", "keep", "max_skipped", "kl_ceiling", "entropy_floor", "value_error_ceiling")
"""Keys, in any group, that change when a run saves, measures or gives up, and no number of its training."""

_CHANGE_ALLOWED = contextvars.ContextVar("change_allowed", default=False)


def changing_numbers(changes: Sequence[str]) -> list[str]:
    """The lines of `diff` whose key is not `HARMLESS`.

    >>> changing_numbers(["ppo.save_every: 5 -> 9", "ppo.learning_rate: 1e-05 -> 2e-05"])
    ['ppo.learning_rate: 1e-05 -> 2e-05']
    """
    return [line for line in changes if line.partition(":")[0].rpartition(".")[2] not in HARMLESS]


@contextlib.contextmanager
def allow_change(allowed: bool = True) -> Iterator[None]:
    """What ``--allow_config_change`` does, for a notebook: in this block a run may go on although it has changed."""
    token = _CHANGE_ALLOWED.set(allowed)
    try:
        yield
    finally:
        _CHANGE_ALLOWED.reset(token)


def change_allowed() -> bool:
    """Whether a run may go on with another config, other data or models than it was begun with."""
    return _CHANGE_ALLOWED.get()


def prepare_workdir(
    workdir: str | os.PathLike[str], config: ConfigDict, *, overwrite: bool = False, allow_config_change: bool = False
) -> bool:
    """Makes the run folder and stores the config in it, or finds there the run that is to be resumed.

    Nothing is ever deleted: `overwrite` renames an earlier run to ``<workdir>.old-<time>``. Keys of `HARMLESS` may
    change; what changed is printed.

    Args:
      workdir: the folder of this run.
      config: what the run will do; stored as ``config.json``.
      overwrite: start afresh where a run is.
      allow_config_change: resume although the config differs from the stored one.

    Returns:
      True when the folder is new, False when a run in it goes on.

    Raises:
      ValueError: the folder holds something else, or a run with another config (the differences are listed).
    """
    path = files.local_path("workdir", workdir)
    stored = path / CONFIG_FILE
    _refuse_foreign(path)
    if stored.is_file() and overwrite:
        _move_aside(path)
    text = to_json(config)
    fresh = not stored.is_file()
    if not fresh:
        changes = diff(_stored_config(stored), json.loads(text))
        refused = changing_numbers(changes)
        if refused and not allow_config_change:
            raise ValueError(
                f"{path} holds a run with another config ({'; '.join(refused[:20])}): "
                "choose another workdir, or --overwrite (keeps the old run aside), or --allow_config_change to go on"
            )
        if changes:
            print(f"The run in {path} goes on with another config: {'; '.join(changes)}", flush=True)
    files.touch(path / LOCK_FILE)
    with files.written(stored) as file:
        file.write(text + "\n")
    return fresh


def _stored_config(path: Path) -> dict[str, Any]:
    try:
        stored = read_json(path)
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is damaged: restore it, or start afresh with --overwrite")
    return stored


def main(
    run: Run, *, config: str = "", workdir: str = "", argv: Sequence[str] | None = None, one_process: str = "",
    dry_run: Callable[[ConfigDict], Any] | None = None, check: Callable[[ConfigDict], Any] | None = None,
    plan: Callable[..., Any] | None = None,
) -> None:  # fmt: skip
    """The command line of an experiment: reads config and flags, calls ``run(config, workdir)``, exits.

    ``--config=FILE[:ARG]``, ``--config.KEY=VALUE`` for any key, ``--workdir=DIR``, ``--overwrite``,
    ``--allow_config_change``, ``--dry_run``, ``--distributed`` (several processes: they agree on config, versions and
    run folder first and end together, see `rlhf_jax.processes`). A user's mistake is one line on stderr and exit status
    2; a machine that refuses (disk, permission, memory, non-finite numbers) 1; Ctrl-C 130 and SIGTERM 143: at the next
    step boundary where a stage saves, elsewhere at once, and the second one at once everywhere; processes that stopped
    together 143. Other errors are bugs and show a traceback; ``RLHF_JAX_TRACEBACK=1`` shows one always. No text on
    stderr holds a secret (`redact`).

    Args:
      run: ``(config, workdir)``; it validates the config before it computes anything.
      config: the config file when ``--config`` is not given.
      workdir: the run folder when ``--workdir`` is not given.
      argv: the arguments; None reads the command line.
      one_process: for a program that cannot run as several processes: what to do instead of ``--distributed``.
      dry_run: called with the config, instead of `run`, when ``--dry_run`` is given; no run folder is made then.
      check: called with the config before the run folder is touched, so that what it refuses changes nothing there.
      plan: of a pipeline, which answers a changed config stage by stage, so that it is not refused here:
        ``(config, workdir, overwrite=...)``, called instead of `run` when ``--dry_run`` is given.
    """
    output.outlive_readers()
    arguments = sys.argv[1:] if argv is None else list(argv)
    secrets = known_secrets(arguments)
    sys.excepthook = functools.partial(_show_bug, secrets)
    several = any(a.startswith(("--distributed", "--coordinator_address", "--num_processes")) for a in arguments)
    with _signals(several=several):
        try:
            status = _main(run, config, workdir, arguments, secrets, one_process, dry_run, check, plan)
        except Exception as error:
            trace = redact(traceback.format_exc(), secrets)
            _end_together(redact(f"{type(error).__name__}: {error}", secrets), 1, trace)
            raise
    if status > 128 and threading.current_thread() is threading.main_thread():
        _answer_signals(lambda *_: os._exit(status))  # while threads are waited for
        atexit.register(_answer_signals, signal.SIG_IGN)  # the milliseconds in which Python takes itself down
    sys.exit(status)


def _answer_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _main(
    run: Run, config_default: str, workdir_default: str, argv: list[str], given: list[str] | None = None,
    one_process: str = "", dry_run: Callable[[ConfigDict], Any] | None = None,
    check: Callable[[ConfigDict], Any] | None = None,
    plan: Callable[..., Any] | None = None,
) -> int:  # fmt: skip
    fresh, path, lock, above = False, None, None, []
    secrets = [] if given is None else given
    try:
        if not argv:
            if config_default:
                _look_ahead(check, load_config(_shipped(run, config_default)), "")  # says what is missing
            return _say(_usage(run, config_default, workdir_default), 2)
        flags, overrides = _parse_flags(run, config_default, workdir_default, argv)
        _check_process_flags(flags, one_process)
        if os.getcwd() not in sys.path:  # a researcher's own module lies where the command is given
            sys.path.insert(0, os.getcwd())
        if flags.distributed:
            _start_processes(flags)
        config = load_config(_shipped(run, flags.config), overrides)
        refuse_addresses(config)
        secrets += secrets_in(config.to_dict())
        path = files.local_path("--workdir", flags.workdir)
        _agree_on_command(flags, config)
        if flags.dry_run:
            _run_dry(dry_run, config) if plan is None else _show_plan(plan, config, flags)
            return 0
        _look_ahead(check, config, flags.config)
        if processes.index() == 0:
            above = [parent for parent in path.parents if not parent.exists()]
            lock = claim_workdir(path, overwrite=flags.overwrite)
            fresh = _enter(path, config, flags, by_stages=plan is not None)
        _share_workdir(path, fresh)
        with allow_change(flags.allow_config_change), _another_programs_config(flags.config):
            run(config, str(path))
        processes.finish()
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        if fresh and path is not None:
            _remove_unused(path, above)
        if os.environ.get("RLHF_JAX_TRACEBACK"):
            raise
        text = redact(f"Error: {str(error) or 'out of memory'}{_where(error)}{_disk(error)}", secrets)
        return _say(text, getattr(error, "exit_status", 2 if isinstance(error, ValueError) else 1))
    except KeyboardInterrupt as stop:
        detail = f" ({stop})" if str(stop) else ""
        status = 128 + getattr(stop, "signal_number", signal.SIGINT)
        status = STOPPED_TOGETHER if processes.stopping_together() else status
        return _say(f"\nStopped{detail}. The same command goes on from the last checkpoint.", status)
    finally:
        if lock is not None:
            lock.close()
    return 0


def _usage(run: Run, config: str, workdir: str) -> str:
    """One line for somebody who gave no flag at all: nothing starts by accident, and nothing is written."""
    program = Path(inspect.getfile(inspect.unwrap(run))).name
    return (
        f"usage: {program} --config={config or 'FILE[:ARG]'} --workdir={workdir or 'DIR'} [--config.KEY=VALUE ..]; "
        "give one flag at least, the others are as shown here; --help lists all"
    )


def _shipped(run: Run, given: str) -> str:
    """A config of this project, for a program that was started in another folder: it is beside the program's own."""
    path, _, arg = given.partition(":")
    if not path.startswith("configs/") or Path(path).exists():
        return given
    beside = Path(inspect.getfile(inspect.unwrap(run))).resolve().parents[1] / path
    return f"{beside}{arg and ':'}{arg}" if beside.is_file() else given


def _look_ahead(check: Callable[[ConfigDict], Any] | None, config: ConfigDict, path: str) -> None:
    """Lets the program refuse its config before anything is made."""
    if check is not None:
        with _another_programs_config(path):
            check(config)


@contextlib.contextmanager
def _another_programs_config(path: str) -> Iterator[None]:
    """A key that the program reads and the config lacks: the config was written for another program."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        known = config_file.library_mistake(error)
        if not known:
            raise
        raise ValueError(
            f"config {path} has {known}: it is the config of another program, or of another version"
        ) from error


def _enter(path: Path, config: ConfigDict, flags: argparse.Namespace, *, by_stages: bool) -> bool:
    """Stores the config of a new run, or compares it with the stored one; a pipeline's stages compare their own."""
    if by_stages and (path / CONFIG_FILE).is_file():
        return False
    if flags.allow_config_change:
        _require_checkpoint(path, config)
    return prepare_workdir(path, config, allow_config_change=flags.allow_config_change)


def _show_plan(plan: Callable[..., Any], config: ConfigDict, flags: argparse.Namespace) -> None:
    _refuse_foreign(Path(flags.workdir))
    with allow_change(flags.allow_config_change), _another_programs_config(flags.config):
        plan(config, flags.workdir, overwrite=flags.overwrite)


def _require_checkpoint(path: Path, config: ConfigDict) -> None:
    """Refuses to go on with another config where there is no step to go on from: outputs would be written over."""
    if not (path / CONFIG_FILE).is_file() or next(path.glob("checkpoints/manifests/*.json"), None) is not None:
        return
    changes = changing_numbers(diff(_stored_config(path / CONFIG_FILE), json.loads(to_json(config))))
    if changes:
        raise ValueError(
            f"{path} holds a run with another config ({'; '.join(changes[:20])}) and no checkpoint to go on from: "
            "choose another workdir, or --overwrite (keeps the old run aside)"
        )


def _run_dry(dry_run: Callable[[ConfigDict], Any] | None, config: ConfigDict) -> None:
    require(dry_run is not None, "--dry_run", True, "this program has no dry run")
    assert dry_run is not None
    with _another_programs_config("this file"):
        dry_run(config)
    processes.finish()


def _show_bug(secrets: Sequence[str], kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Python's own report of an error nobody caught, without secrets."""
    _say(redact("".join(traceback.format_exception(kind, error, trace)), secrets).rstrip("\n"), 1)


def _disk(error: Exception) -> str:
    """What to do when a write fails that does not say so itself."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ". Free disk space and give the same command again: what was saved before is intact"
    return ""


@contextlib.contextmanager
def _signals(*, several: bool) -> Iterator[None]:
    """SIGTERM and Ctrl-C raise KeyboardInterrupt where no stage has its own way to stop; the second one ends at once.

    At once means also while XLA compiles, when Python's own handlers have to wait: the signals' numbers are read by a
    thread of its own. With several processes JAX answers SIGTERM for all of them together and nothing is done here.
    """
    if several or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _: object) -> None:
        stop = KeyboardInterrupt()
        stop.signal_number = number  # pyright: ignore[reportAttributeAccessIssue]
        raise stop

    def swallowed(unraisable: Any) -> None:
        """A destructor or a callback from C cannot raise: the interrupt that hit one there is sent anew."""
        number = getattr(unraisable.exc_value, "signal_number", None)
        if number is None:
            return told(unraisable)
        own.append(number)
        threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, number]).start()

    own: list[int] = []
    told, sys.unraisablehook = sys.unraisablehook, swallowed
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_at_the_second, args=(reader, own), name="signals", daemon=True).start()
    try:
        yield
    finally:
        sys.unraisablehook = told
        signal.set_wakeup_fd(wakeup)
        writer.close()
        for number, handler in before.items():
            signal.signal(number, handler)


_SAME = 1.0
"""Seconds within which a second SIGTERM is the first one sent twice, as srun and a container's init do."""


def _end_at_the_second(reader: socket.socket, own: list[int]) -> None:
    """Ends the process at the second signal that `reader` tells of; those in `own` this process sent itself."""
    first: tuple[int, float] | None = None
    while number := reader.recv(1)[:1]:
        if number[0] not in (signal.SIGINT, signal.SIGTERM):
            continue
        if own:
            own.pop()
            continue
        now = time.monotonic()
        if first is None:
            first = (number[0], now)
        elif number[0] == signal.SIGINT or first[0] == signal.SIGINT or now - first[1] > _SAME:
            time.sleep(0.2)  # the main thread may end in better order
            os.write(2, b"\nStopped at once. The same command goes on from the last checkpoint.\n")
            os._exit(128 + number[0])
    reader.close()


def _where(error: Exception) -> str:
    """Our own errors speak for themselves; one from inside a library may be a bug, so it says how to see more."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return " (RLHF_JAX_TRACEBACK=1 shows where)" if "site-packages" in frame.filename else ""


def _say(text: str, status: int) -> int:
    print(text, file=sys.stderr, flush=True)
    _end_together(text.strip(), status)
    return status


def _remove_unused(path: Path, above: Sequence[Path] = ()) -> None:
    """Takes back a run folder in which nothing but our config was written: a refused config leaves no trace.

    Args:
      path: the run folder.
      above: folders that were made for it, the innermost first; those that are empty go too.
    """
    if path.is_dir() and {p.name for p in path.iterdir()} == {CONFIG_FILE, LOCK_FILE}:
        for name in (CONFIG_FILE, LOCK_FILE):
            (path / name).unlink()
        path.rmdir()
        with contextlib.suppress(OSError):  # something else lies there by now
            for folder in above:
                folder.rmdir()


# ------------------------------------------------------------------------------------------------ several processes

STOPPED_TOGETHER = 143
"""Exit status of all processes when one of them got SIGTERM (or Ctrl-C) and all have saved the same step."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
"""What must have one version in all processes, beside this package."""


def _check_process_flags(flags: argparse.Namespace, one_process: str) -> None:
    address = (flags.coordinator_address, flags.num_processes, flags.process_id)
    flags.distributed = flags.distributed or any(flag is not None for flag in address)
    if flags.distributed and one_process:
        raise ValueError(f"--distributed: this program runs as one process, on all devices of its host. {one_process}")
    if flags.heartbeat_timeout < 1:
        raise ValueError(f"--heartbeat_timeout={flags.heartbeat_timeout} must be at least 1 second")


def _start_processes(flags: argparse.Namespace) -> None:
    processes.start(
        coordinator_address=flags.coordinator_address, num_processes=flags.num_processes, process_id=flags.process_id,
        heartbeat_timeout=flags.heartbeat_timeout,
    )  # fmt: skip


def _agree_on_command(flags: argparse.Namespace, config: ConfigDict) -> None:
    """Before any work and any device: all processes run one command with one set of versions and of flags."""
    plain = json.loads(to_json(config))
    facts: dict[str, Any] = {f"config.{key}": _value_at(plain, key) for key in sorted(leaf_keys(config))}
    facts |= {f"--{name}": getattr(flags, name) for name in ("overwrite", "allow_config_change")}
    facts |= {f"the version of {name}": metadata.version(name) for name in PACKAGES}
    facts |= numerics.meaning() | numerics.rounding()
    processes.agree("start", facts | {"the version of rlhf_jax": __version__})


def _value_at(plain: Any, key: str) -> Any:
    for name in key.split("."):
        plain = plain[name]
    return plain


def _share_workdir(path: Path, fresh: bool) -> None:
    """Refuses a run folder that is another one on another host: checkpoints are written by all processes together."""
    if processes.count() == 1:
        return
    if fresh:
        processes.when_another_fails(lambda: _remove_unused(path))
    token = path / ".shared"
    mark = processes.on_first("workdir", lambda: _put_mark(token))
    until = time.monotonic() + 10  # a network file system may show a new file late
    while not (seen := token.is_file() and token.read_text() == mark) and time.monotonic() < until:
        time.sleep(0.1)
    try:
        facts = "the folder of process 0" if seen else f"another folder ({path.absolute()})"
        processes.agree("workdir", {f"workdir={str(path)!r} (one folder that all hosts share)": facts})
    finally:
        if processes.index() == 0:
            token.unlink(missing_ok=True)


def _put_mark(token: Path) -> str:
    mark = os.urandom(16).hex()
    with files.written(token) as file:
        file.write(mark)
    return mark


def _end_together(why: str, status: int, trace: str = "") -> None:
    """With several processes: ends all of them with `status`, unless all are on their way out from one step."""
    if processes.count() == 1:
        return
    if status == STOPPED_TOGETHER:
        processes.finish()
        return
    print(trace, end="", file=sys.stderr, flush=True)
    processes.fail(why.removeprefix("Error: "), status)


class _Parser(argparse.ArgumentParser):
    """Its errors are said as all others are: in one line, without secrets."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parse_flags(run: Run, config: str, workdir: str, argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    doc = inspect.getdoc(inspect.getmodule(run)) or inspect.getdoc(run)
    parser = _Parser(
        description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any key of the config is a flag too: --config.KEY=VALUE",
    )  # fmt: skip
    parser.add_argument("--config", default=config or None, required=not config, metavar="FILE[:ARG]", help=config)
    parser.add_argument("--workdir", default=workdir or None, required=not workdir, metavar="DIR", help=workdir)
    parser.add_argument("--overwrite", action="store_true", help="start afresh; an earlier run is renamed, not deleted")
    parser.add_argument("--allow_config_change", action="store_true", help="resume although the config changed")
    parser.add_argument("--distributed", action="store_true", help="one process of several (SLURM, GKE, TPU pod, MPI)")
    parser.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0, where nothing else tells it")
    parser.add_argument("--num_processes", type=int, metavar="N", help="how many, with --coordinator_address")
    parser.add_argument("--process_id", type=int, metavar="I", help="0 to N - 1, with --coordinator_address")
    parser.add_argument(
        "--heartbeat_timeout", type=int, default=processes.HEARTBEAT_SECONDS, metavar="SECONDS",
        help="silence after which a process is taken for dead and the others end",
    )  # fmt: skip
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="compile every phase, print its memory, do nothing else; of a pipeline: print the plan of its stages",
    )
    flags, rest = parser.parse_known_args(argv)
    for name in ("config", "workdir"):
        if not getattr(flags, name):
            raise ValueError(f"--{name} is empty: give a {'file' if name == 'config' else 'folder'}, --{name}=PATH")
    overrides: dict[str, str] = {}
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("--config."):
            known = [a for action in parser._actions for a in action.option_strings]
            raise ValueError(f"unknown flag {flag!r}{_nearest(flag, known)}")
        if not equals and (not rest or rest[0].startswith("--")):
            raise ValueError(f"{flag} needs a value: {flag}=VALUE")
        overrides[flag.removeprefix("--config.")] = value if equals else rest.pop(0)
    return flags, overrides
