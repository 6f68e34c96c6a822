"""Configs: functions chosen by name, command-line overrides, errors that name field and fix.

A config file is Python with ``get_config(arg: str = "") -> ConfigDict``. A loss is swapped without
changing the package: ``config.policy_loss = fn_spec("rlhf_jax.losses.policy:ppo_policy_loss")``
turns the keyword-only defaults of that function into fields; at start-up `resolve` checks its
arguments and turns the fields back into a function.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict, FieldReference

from rlhf_jax.run import checks, config_file, files, programs
from rlhf_jax.run.secrets import REDACTED, is_secret, redact
from rlhf_jax.run.untrusted import read_json

# -------------------------------------------------------------------------------- functions by name


T = TypeVar("T")


def fn_spec(fn: str, **overrides: Any) -> ConfigDict:
    """A function as data: its name ``"module:function"`` and its keyword-only defaults as fields.

    Args:
      fn: the function's name, ``"package.module:function"``.
      **overrides: values for keyword-only arguments, required ones included.

    Returns:
      A ConfigDict with the field ``fn`` and one field for each keyword-only argument that is plain
      data.

    Raises:
      ValueError: the function does not exist, has no such keyword-only argument, or one without a
        default is missing.

    >>> fn_spec("rlhf_jax.run.checks:require_range", low=0.0).to_dict()
    {'fn': 'rlhf_jax.run.checks:require_range', 'high': None, 'low': 0.0}
    """
    keywords = _keyword_only(import_fn(fn))
    for name in overrides:
        if name not in keywords:
            raise ValueError(
                f"{fn} has no keyword-only argument {name!r}{checks.nearest(name, keywords)}"
            )
    missing = [k for k, p in keywords.items() if p.default is p.empty and k not in overrides]
    if missing:
        raise ValueError(
            f"{fn} needs a value for {', '.join(missing)}: fn_spec({fn!r}, {missing[0]}=...)"
        )
    defaults = {k: p.default for k, p in keywords.items() if _is_plain(p.default)}
    return ConfigDict({"fn": fn} | defaults | overrides)


def resolve(
    spec: Mapping[str, Any] | ConfigDict | str, available: Iterable[str] | None = None
) -> Callable[..., Any]:
    """The function that a `fn_spec` names, with its keyword-only arguments bound.

    Args:
      spec: a `fn_spec`, or just ``"module:function"``.
      available: names of the arguments that the caller can pass; None skips the check.

    Returns:
      ``functools.partial(function, **fields)``.

    Raises:
      ValueError: no such function, an unknown field, or an argument that is not in `available`
        (which is listed).
    """
    fields = {"fn": spec} if isinstance(spec, str) else {key: spec[key] for key in spec}
    name = fields.pop("fn", None)
    if not isinstance(name, str):
        raise ValueError(f"a function is chosen with fn='module:function', got fn={name!r}")
    fn = import_fn(name)
    keywords = _keyword_only(fn)
    for key in fields:
        if key not in keywords:
            raise ValueError(
                f"{name} has no keyword-only argument {key!r}{checks.nearest(key, keywords)}"
            )
    missing = [k for k, p in keywords.items() if p.default is p.empty and k not in fields]
    if missing:
        raise ValueError(f"{name} needs a value for {', '.join(missing)}")
    if available is not None:
        _check_arguments(name, fn, tuple(available))
    return functools.partial(fn, **fields)


def filled_from(kind: Callable[..., T], config: ConfigDict, **others: Any) -> T:
    """Fills a frozen dataclass of settings (`steps.PPO`, `rollout.Shaping`) from a config group.

    Args:
      kind: the dataclass, which validates its own numbers.
      config: a group; keys that are not fields of `kind` are ignored.
      **others: fields that are not in the config, or have another name there.

    Raises:
      ValueError: as `kind` does.
    """
    names = {field.name for field in dataclasses.fields(kind)} - {*others}  # pyright: ignore[reportArgumentType]
    return kind(**{name: config[name] for name in sorted(names & {*config})}, **others)


def import_fn(name: str) -> Callable[..., Any]:
    """Imports ``"package.module:function"``; a ValueError names the half that is wrong."""
    module_name, _, attribute = name.partition(":")
    if not attribute or not all(p.isidentifier() for p in [*module_name.split("."), attribute]):
        raise ValueError(f"{name!r} is not of the form 'package.module:function'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module exists, and a module that it imports does not
        raise ValueError(
            f"no module {error.name!r} for {name!r}: run from the folder that holds it, "
            "or add that to PYTHONPATH"
        ) from None
    fn = getattr(module, attribute, None)
    if not callable(fn):
        public = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise ValueError(
            f"module {module_name} has no function {attribute!r}{checks.nearest(attribute, public)}"
        )
    return fn


def _keyword_only(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {k: p for k, p in inspect.signature(fn).parameters.items() if p.kind is p.KEYWORD_ONLY}


def _check_arguments(name: str, fn: Callable[..., Any], available: tuple[str, ...]) -> None:
    for key, p in inspect.signature(fn).parameters.items():
        if p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        if key not in available and p.default is p.empty:
            raise ValueError(
                f"{name} wants the argument {key!r}, which is not available here"
                f"{checks.nearest(key, available)}. Available: {', '.join(available)}. "
                "A hyperparameter must be keyword-only (after *)."
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


# ---------------------------------------------------------------------------------- reading configs


def load_config(path_and_arg: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """Loads the config of ``"configs/ppo/x.py"`` or ``"configs/ppo/x.py:arg"`` and locks it.

    Args:
      path_and_arg: path of a Python file with ``get_config(arg)``; what follows the colon is `arg`.
        A config that comes with the package also has a short name: ``"ppo/storyland"``. The stored
        config.json of a run works too.
      overrides: dotted keys and values as text, as given on a command line; they are applied last.

    Raises:
      ValueError: the file or its `get_config` is missing, a key is unknown (the message names the
        nearest), or a value has the wrong type.
    """
    # Before the text is split: the colon of an address does not start an argument.
    if re.match(r"[\w+.-]+:/", path_and_arg):
        files.local_path("--config", path_and_arg)
    path, _, arg = path_and_arg.partition(":")
    path = programs.shipped_config(path)
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
    """Reads the config.json that a run stored, to run it again."""
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise ValueError(
            f"{path} holds a {type(stored).__name__}, no config: {config_file.FORMS[0]}"
        )
    if {"model_type", "architectures"} & set(stored):
        raise ValueError(
            f"{path} describes a model: pass its folder as the model; {config_file.FORMS[0]}"
        )
    try:
        return ConfigDict(_tuples(stored))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no config that a run stored ({error}): {config_file.FORMS[0]}"
        ) from None


def _without_gaps(path: str, config: ConfigDict) -> ConfigDict:
    """Returns `config`; refuses a stored one from which a secret was redacted."""
    if path.endswith(".json"):
        plain = config.to_dict()
        gaps = [key for key in sorted(leaf_keys(config)) if REDACTED in str(value_at(plain, key))]
        if gaps:
            raise ValueError(
                f"{path} was stored without the secret {gaps[0]}: pass --config.{gaps[0]}=VALUE"
            )
    return config


def apply_arg(config: ConfigDict, arg: str, **variants: Callable[[ConfigDict], Any]) -> ConfigDict:
    """Applies the argument of a config file: comma-separated variants and ``key=value`` overrides.

    Variants are applied first, wherever they are in `arg`.

    Args:
      config: the config to change, in place.
      arg: for example ``"smoke,policy_loss=my_lab.losses:dual_clip,seed=1"``.
      **variants: functions that change the config in place, by the names used in `arg`.

    Returns:
      The same config, locked.

    >>> config = ConfigDict({"seed": 0, "steps": 90})
    >>> apply_arg(config, "smoke,seed=1", smoke=lambda c: c.update(steps=3)).to_dict()
    {'seed': 1, 'steps': 3}
    """
    config.lock()
    pieces = [piece.strip() for piece in arg.split(",") if piece.strip()]
    for piece in pieces:
        if "=" in piece:
            continue
        if piece not in variants:
            raise ValueError(
                f"no variant {piece!r}{checks.nearest(piece, variants)}, or write key=value"
            )
        with _as_user_error(f"variant {piece!r}"):
            variants[piece](config)
    return override(config, dict(piece.split("=", 1) for piece in pieces if "=" in piece))


def override(config: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
    """Sets dotted keys in place to values given as text, parsed as the type of the current value.

    For a key with a `fn_spec` the text is ``module:function``, whose defaults replace the old ones.

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
        # `_parse` has checked the type; an empty function ("" for a group) would be refused here.
        with parent.ignore_type():
            parent[leaf] = (
                value.lock() if isinstance(value, ConfigDict) and config.is_locked else value
            )
    return config


def _unfold(parent: Any, name: str) -> None:
    """Turns a function given by its name alone into a group whose hyperparameters can be set."""
    chosen = parent.get(name) if isinstance(parent, ConfigDict) else None
    if name in ("text_reward", "gold") and isinstance(chosen, str) and chosen:
        spec = fn_spec(chosen)
        with parent.ignore_type():
            parent[name] = spec.lock() if parent.is_locked else spec


def _member(parent: Any, name: str, seen: str) -> Any:
    if not isinstance(parent, ConfigDict):
        raise ValueError(f"{seen} is a value, not a group: it has no key {name!r}")
    if name not in parent:
        raise ValueError(f"{seen} has no key {name!r}{checks.nearest(name, parent.keys())}")
    return parent[name]


def _parse(field: str, text: str, current: Any) -> Any:
    """Parses `text` as a value of the type of `current`.

    "None" is always accepted here; later checks refuse it where a value is needed.
    """
    if isinstance(current, ConfigDict):
        if "fn" not in current:
            raise ValueError(
                f"{field} is a group: set one of {', '.join(f'{field}.{k}' for k in current)}"
            )
        return fn_spec(text) if text else ""
    if text == "None":
        return None
    if isinstance(current, str):
        return text
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        if current is None or type(value) is type(current):
            return value
        # `type(..) is` rather than isinstance: a bool is not a number here.
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
    """Reports a misspelt key or a wrong type set in Python as one set on the command line."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        known = config_file.library_mistake(error)
        if known:
            raise ValueError(f"{where}: {known}") from None
        raise


# ------------------------------------------------------------------------------------ JSON, secrets


def to_json(config: ConfigDict) -> str:
    """The config as JSON to store in a run folder, without secrets (`is_secret`, `redact`).

    >>> print(to_json(ConfigDict({"seed": 1, "hf_token": "abc"})))
    {
      "hf_token": "<redacted>",
      "seed": 1
    }
    """
    return json.dumps(_plain(config), indent=2, sort_keys=True)


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote; JSON lists become tuples again."""
    return ConfigDict(_tuples(json.loads(text)))


def _plain(value: Any, key: str = "", secret: bool = False) -> Any:
    """Converts a config to JSON data.

    Below the key of a secret (`secret`) everything is redacted, groups and tuples included.
    """
    secret = secret or is_secret(key)
    if isinstance(value, FieldReference):
        value = value.get()
    if isinstance(value, ConfigDict):
        # References are kept to avoid __getitem__, which `record_reads` would count as a read.
        return {k: _plain(v, k, secret) for k, v in value.items(preserve_field_references=True)}
    if isinstance(value, tuple | list):
        return [_plain(v, key, secret) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v, str(k), secret) for k, v in value.items()}
    if (
        secret
        and value
        and (isinstance(value, str) or (type(value) is int and "token" not in key.lower()))
    ):
        return REDACTED  # but a number with a key like token_id is an id, not a secret
    if isinstance(value, str):
        return redact(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    raise ValueError(
        f"config.{key} holds a {type(value).__name__}: only numbers, text, tuples and groups can "
        "be stored"
    )


def unlocked_copy(config: ConfigDict) -> ConfigDict:
    """An unlocked copy, in which a pipeline sets the paths of its stages."""
    return ConfigDict(config.to_dict()).unlock()


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def diff(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The differences between two configs (as dicts), one line per key.

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


# ------------------------------------------------------------------------------ who reads which key


def record_reads(config: ConfigDict) -> tuple[ConfigDict, set[str]]:
    """A copy of `config` that records which keys are read.

    A test uses it to show that every key of a config has an effect.

    >>> config, reads = record_reads(ConfigDict({"ppo": {"lr": 1e-5, "epochs": 1}}))
    >>> config.ppo.lr, sorted(reads), sorted(leaf_keys(config) - reads)
    (1e-05, ['ppo.lr'], ['ppo.epochs'])
    """
    reads: set[str] = set()
    return _Recording(config, "", reads).lock(), reads


def leaf_keys(config: ConfigDict, prefix: str = "") -> set[str]:
    """The dotted names of all values of the config, without reading any of them."""
    keys = set()
    for key, value in config.items(preserve_field_references=True):
        keys |= (
            leaf_keys(value, f"{prefix}{key}.")
            if isinstance(value, ConfigDict)
            else {f"{prefix}{key}"}
        )
    return keys


def value_at(plain: Any, key: str) -> Any:
    """The value at a dotted key of nested groups."""
    for name in key.split("."):
        plain = plain[name]
    return plain


class _Recording(ConfigDict):
    _prefix: str
    _reads: set[str]

    def __init__(self, source: ConfigDict, prefix: str, reads: set[str]):
        super().__init__()
        object.__setattr__(self, "_prefix", prefix)
        object.__setattr__(self, "_reads", reads)
        for key, value in source.items():
            self[key] = (
                _Recording(value, f"{prefix}{key}.", reads)
                if isinstance(value, ConfigDict)
                else value
            )

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if not isinstance(value, ConfigDict) and key in self:
            self._reads.add(f"{self._prefix}{key}")
        return value


PATHS = frozenset(
    ("base", "corpus", "data", "data_dir", "demonstrations", "evaluation", "held_out_text",
     "model", "models", "pretraining_text", "prompts", "rankings", "reference", "reward_model",
     "validation")
)  # fmt: skip
"""Keys, in any group, that name files or folders to read, alone or in groups and tuples."""


def refuse_addresses(config: ConfigDict) -> None:
    """Refuses a config that names data or models by an address such as ``gs://bucket/data``.

    >>> config = ConfigDict({"tracker": "https://example.org", "prompts": "data/prompts.jsonl"})
    >>> refuse_addresses(config)

    Raises:
      ValueError: the value of a key in `PATHS` is an address; see `files.local_path`.
    """
    for key in sorted(leaf_keys(config)):
        # The group counts too: `config.data.demonstrations` is a path because of `data`.
        if not PATHS.intersection(key.split(".")[-2:]):
            continue
        value = value_at(config, key)
        for path in value if isinstance(value, tuple | list) else (value,):
            if isinstance(path, str):
                files.local_path(f"config.{key}", path)
