"""The short flags of ``prepare_data``: ``--source=NAME``, ``--data=FILE``, ``--look=FILE``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.data import sources
from rlhf_jax.run import checks, look, programs

FORM_NAMES = {
    "hh_rlhf": "hh",
    "own": "jsonl",
    "ultrafeedback": "rated",
    "messages": "openai",
    "trl_pairs": "trl",
}
"""Other names of a data format -> its name here."""


def expand(argv: Sequence[str]) -> list[str]:
    """Replaces the short flags by the flags they stand for.

    >>> expand(["--source=hh_rlhf", "--data_dir", "d"])
    ['--config=configs/data/hh_rlhf.py', '--config.data_dir=d']
    >>> expand(["--model=smollm2"])
    ['--config=configs/data/pretrained.py', '--workdir=runs/smollm2', '--config.model=smollm2']
    >>> expand(["--source=alpaca", "--data=f.json", "--columns", "prompt=question"])[:2]
    ['--config=configs/data/convert.py', '--config.form=alpaca']
    >>> expand(["--look=rows.jsonl", "--preview"])  # doctest: +NORMALIZE_WHITESPACE
    ['--config=configs/data/look.py', '--dry_run', '--config.data=rows.jsonl',
    '--config.preview=terminal']

    Raises:
      ValueError: ``--source`` is empty or unknown.
    """
    short = {
        "--source": "--config",
        "--out": "--workdir",
        "--data_dir": "--config.data_dir",
        "--model": "--config.model",
        "--data": "--config.data",
        "--columns": "--config.columns",
        "--preview": "--config.preview",
        "--look": "--config.data",
    }
    converts = any(flag.partition("=")[0] == "--data" for flag in argv)
    full, rest = [], list(argv)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        # Without a value it prints the rows; a value is joined by `=`, as the next word may be a
        # flag.
        if flag == "--preview" and not equals:
            equals, value = "=", look.TERMINAL
        if flag == "--look":
            # A dry run, because looking at data creates no run folder.
            full += ["--config=configs/data/look.py", "--dry_run"]
            equals, value = "=", value if equals or not rest else rest.pop(0)
        if flag in short and not equals and rest:
            equals, value = "=", rest.pop(0)
        if flag == "--source":
            _check_source(value, converts)
        # A source is either a format of the user's own file or a config of its own.
        if flag == "--source" and _is_form(value, converts):
            full += [
                "--config=configs/data/convert.py",
                f"--config.form={FORM_NAMES.get(value, value)}",
            ]
            continue
        value = f"configs/data/{value}.py" if flag == "--source" else value
        full.append(short.get(flag, flag) + equals + value)
    # Files or a model alone need no --source: their config follows from the flag, and a model's
    # run folder is named after it.
    named = any(flag.startswith("--config=") or flag == "--config" for flag in full)
    model = next(
        (flag.partition("=")[2] for flag in full if flag.startswith("--config.model=")), ""
    )
    if converts and not named:
        full = ["--config=configs/data/convert.py", *full]
    elif model and not named:
        workdir = (
            []
            if any(flag.startswith("--workdir") for flag in full)
            else [f"--workdir=runs/{model}"]
        )
        full = ["--config=configs/data/pretrained.py", *workdir, *full]
    return full


def _check_source(name: str, converts: bool) -> None:
    """Refuses a source (``NAME`` or ``NAME:ARG``) that is neither a format nor a config."""
    own = programs.root() / "configs" / "data"
    config = f"{name.partition(':')[0]}.py"
    if (
        converts
        or name in sources.FORMS
        or Path("configs/data", config).is_file()
        or (own / config).is_file()
    ):
        return
    known = sorted(
        {*sources.FORMS, *(path.stem for path in own.glob("[a-z]*.py"))} - {"convert", "look"}
    )
    checks.require_one_of("--source", name, known)


def _is_form(name: str, converts: bool) -> bool:
    """Whether ``--source=NAME`` names the format of a file rather than a config of its own."""
    own = programs.root() / "configs" / "data" / f"{name}.py"
    return converts or (
        name in sources.FORMS
        and not own.is_file()
        and not Path(f"configs/data/{name}.py").is_file()
    )
