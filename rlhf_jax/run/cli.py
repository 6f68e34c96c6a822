"""The command line of an experiment: flags, exit status, agreement between processes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from rlhf_jax import __version__
from rlhf_jax.run import checks, config_file, files, numerics, output, processes, signals
from rlhf_jax.run import workdir as workdir_lib
from rlhf_jax.run.config import leaf_keys, load_config, refuse_addresses, to_json, value_at
from rlhf_jax.run.secrets import known_secrets, redact, secrets_in

Run = Callable[[ConfigDict, str], Any]


def main(
    run: Run,
    *,
    config: str = "",
    workdir: str = "",
    argv: Sequence[str] | None = None,
    one_process: str = "",
    dry_run: Callable[[ConfigDict], Any] | None = None,
    check: Callable[[ConfigDict], Any] | None = None,
    plan: Callable[..., Any] | None = None,
) -> None:
    """Reads config and flags, calls ``run(config, workdir)`` and exits.

    Flags: ``--config=FILE[:ARG]``, ``--config.KEY=VALUE`` for any key, ``--workdir=DIR``,
    ``--overwrite``, ``--allow_config_change``, ``--dry_run``, ``--distributed`` (several processes:
    they first agree on config, versions and run folder, and they end together, see
    `rlhf_jax.run.processes`).

    Exit status: 2 for a user's mistake, reported in one line on stderr; 1 for a failure of the
    machine (disk, permission, memory) or non-finite numbers; 130 for Ctrl-C and 143 for SIGTERM;
    143 for processes that stopped together. A stage that saves stops at the next step boundary,
    everything else at once; a second signal always stops at once. Any other error is a bug and
    shows a traceback; ``RLHF_JAX_TRACEBACK=1`` always shows one. No text on stderr contains a
    secret (`redact`).

    Args:
      run: ``(config, workdir)``; it validates the config before it computes anything.
      config: the config file when ``--config`` is not given.
      workdir: the run folder when ``--workdir`` is not given.
      argv: the arguments; None reads the command line.
      one_process: for a program that cannot run as several processes: what to do instead of
        ``--distributed``.
      dry_run: called with the config, instead of `run`, when ``--dry_run`` is given; no run folder
        is created then.
      check: called with the config before the run folder is touched, so that a refusal changes
        nothing there.
      plan: given by a pipeline: ``(config, workdir, overwrite=...)``, called instead of `run` when
        ``--dry_run`` is given. A pipeline compares a changed config stage by stage, so it is not
        refused here.
    """
    program = _Program(run, config, workdir, one_process, dry_run, check, plan)
    # Before anything is printed, since a closed stream would raise at the first line.
    output.outlive_readers()
    arguments = sys.argv[1:] if argv is None else list(argv)
    secrets = known_secrets(arguments)
    sys.excepthook = functools.partial(_show_bug, secrets)
    # Signals are handled before the flags are parsed, so this is read from the raw arguments.
    several = any(
        a.startswith(("--distributed", "--coordinator_address", "--num_processes"))
        for a in arguments
    )
    with signals.interrupting(several=several):
        try:
            status = _main(program, arguments, secrets)
        except KeyboardInterrupt as stop:
            # A second signal, which came while the first one was answered.
            signals.keep(stop)
            status = 128 + getattr(stop, "signal_number", signal.SIGINT)
        except Exception as error:
            # A bug. With several processes the trace is printed here and all of them exit; with
            # one, the hook that was set above shows it.
            trace = redact(traceback.format_exc(), secrets)
            _end_together(redact(f"{type(error).__name__}: {error}", secrets), 1, trace)
            raise
        # 128 + N means that signal N ended the program. Inside the block: at no moment is a further
        # signal answered by Python's own handler.
        if status > 128:
            signals.end_quietly(status)
    sys.exit(status)


@dataclasses.dataclass(frozen=True)
class _Program:
    """The parameters of `main` other than the command line."""

    run: Run
    config: str
    workdir: str
    one_process: str
    dry_run: Callable[[ConfigDict], Any] | None
    check: Callable[[ConfigDict], Any] | None
    plan: Callable[..., Any] | None


def _main(program: _Program, argv: list[str], secrets: list[str]) -> int:
    """Runs a program and returns its exit status.

    The secrets of its config are appended to `secrets` as soon as the config is loaded.
    """
    fresh, path, lock, above = False, None, None, []
    try:
        if not argv:
            if program.config:
                # The check names the missing keys, which helps more than the usage line.
                _look_ahead(program.check, load_config(program.config), "")
            return _say(_usage(program.run, program.config, program.workdir), 2)
        flags, overrides = _parse_flags(program.run, program.config, program.workdir, argv)
        _check_process_flags(flags, program.one_process)
        # A config may name functions of the user's own modules in the current folder.
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        # Before the config is loaded, whose Python code may initialize the devices.
        if flags.distributed:
            _start_processes(flags)
        config = load_config(flags.config, overrides)
        refuse_addresses(config)
        secrets += secrets_in(config.to_dict())
        path = files.local_path("--workdir", flags.workdir)
        # Before the run folder is touched, so that processes that differ leave nothing behind.
        _agree_on_command(flags, config)
        if flags.dry_run:
            _run_dry(program.dry_run, config) if program.plan is None else _show_plan(
                program.plan, config, flags
            )
            return 0
        _look_ahead(program.check, config, flags.config)
        # Process 0 prepares the folder for all; `share_workdir` checks that the others see it too.
        if processes.index() == 0:
            above = [parent for parent in path.parents if not parent.exists()]
            lock = workdir_lib.claim_workdir(path, overwrite=flags.overwrite)
            fresh = _enter(path, config, flags, by_stages=program.plan is not None)
        workdir_lib.share_workdir(path, fresh)
        with (
            workdir_lib.allow_change(flags.allow_config_change),
            _another_programs_config(flags.config),
        ):
            program.run(config, str(path))
        processes.finish()
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        # A run that failed before it wrote anything leaves no new folder behind.
        if fresh and path is not None:
            workdir_lib.remove_unused(path, above)
        if os.environ.get("RLHF_JAX_TRACEBACK"):
            raise
        text = redact(
            f"Error: {str(error) or 'out of memory'}{_where(error)}{_disk(error)}", secrets
        )
        # A failure of the user's reward function is a ValueError with a status of its own.
        return _say(text, getattr(error, "exit_status", 2 if isinstance(error, ValueError) else 1))
    except KeyboardInterrupt as stop:
        signals.keep(stop)
        detail = f" ({stop})" if str(stop) else ""
        status = 128 + getattr(stop, "signal_number", signal.SIGINT)
        status = STOPPED_TOGETHER if processes.stopping_together() else status
        return _say(
            f"\nStopped{detail}. The same command goes on from the last checkpoint.", status
        )
    finally:
        if lock is not None:
            lock.close()
    return 0


def _usage(run: Run, config: str, workdir: str) -> str:
    """One line of usage, printed instead of a run when no flag was given."""
    program = Path(inspect.getfile(inspect.unwrap(run))).name
    return (
        f"usage: {program} --config={config or 'FILE[:ARG]'} --workdir={workdir or 'DIR'} "
        "[--config.KEY=VALUE ..]; give one flag at least, the others are as shown here; "
        "--help lists all"
    )


def _look_ahead(check: Callable[[ConfigDict], Any] | None, config: ConfigDict, path: str) -> None:
    """Lets the program refuse its config before anything is written."""
    if check is not None:
        with _another_programs_config(path):
            check(config)


@contextlib.contextmanager
def _another_programs_config(path: str) -> Iterator[None]:
    """Turns a missing config key into a ValueError that the config is for another program."""
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
    """Stores the config of a new run, or compares it with the stored one.

    The stages of a pipeline (`by_stages`) compare their own configs.

    Returns:
      Whether the run is new.
    """
    if by_stages and (path / workdir_lib.CONFIG_FILE).is_file():
        return False
    # Without a checkpoint there is nothing to resume: another config would overwrite the outputs.
    if flags.allow_config_change:
        workdir_lib.require_checkpoint(path, config)
    return workdir_lib.prepare_workdir(path, config, allow_config_change=flags.allow_config_change)


def _show_plan(plan: Callable[..., Any], config: ConfigDict, flags: argparse.Namespace) -> None:
    workdir_lib.refuse_foreign(Path(flags.workdir))
    with (
        workdir_lib.allow_change(flags.allow_config_change),
        _another_programs_config(flags.config),
    ):
        plan(config, flags.workdir, overwrite=flags.overwrite)


def _run_dry(dry_run: Callable[[ConfigDict], Any] | None, config: ConfigDict) -> None:
    checks.require(dry_run is not None, "--dry_run", True, "this program has no dry run")
    assert dry_run is not None
    with _another_programs_config("this file"):
        dry_run(config)
    processes.finish()


def _show_bug(
    secrets: Sequence[str], kind: type[BaseException], error: BaseException, trace: Any
) -> None:
    """An exception hook: Python's report of an uncaught error, without secrets."""
    _say(redact("".join(traceback.format_exception(kind, error, trace)), secrets).rstrip("\n"), 1)


def _disk(error: Exception) -> str:
    """Advice to append to an error that means a full disk."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ". Free disk space and give the same command again: what was saved before is intact"
    return ""


def _where(error: Exception) -> str:
    """A hint how to see the traceback of an error that was raised inside another library.

    Such an error may be a bug; errors of this package name the field and the fix.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return " (RLHF_JAX_TRACEBACK=1 shows where)" if "site-packages" in frame.filename else ""


def _say(text: str, status: int) -> int:
    print(text, file=sys.stderr, flush=True)
    _end_together(text.strip(), status)
    return status


# -------------------------------------------------------------------------------- several processes

STOPPED_TOGETHER = 143
"""Exit status of all processes when one received SIGTERM or Ctrl-C and all saved the same step."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
"""Packages that must have the same version in all processes, as this package must."""


def _check_process_flags(flags: argparse.Namespace, one_process: str) -> None:
    address = (flags.coordinator_address, flags.num_processes, flags.process_id)
    flags.distributed = flags.distributed or any(flag is not None for flag in address)
    if flags.distributed and one_process:
        raise ValueError(
            "--distributed: this program runs as one process, on all devices of its host. "
            f"{one_process}"
        )
    if flags.heartbeat_timeout < 1:
        raise ValueError(f"--heartbeat_timeout={flags.heartbeat_timeout} must be at least 1 second")


def _start_processes(flags: argparse.Namespace) -> None:
    processes.connect(
        coordinator_address=flags.coordinator_address,
        num_processes=flags.num_processes,
        process_id=flags.process_id,
        heartbeat_timeout=flags.heartbeat_timeout,
    )


def _agree_on_command(flags: argparse.Namespace, config: ConfigDict) -> None:
    """Checks that all processes have the same config, flags and package versions.

    Called before any work, and before any device is used.
    """
    # As JSON, which has no secrets in it: the values that differ are printed.
    plain = json.loads(to_json(config))
    facts: dict[str, Any] = {
        f"config.{key}": value_at(plain, key) for key in sorted(leaf_keys(config))
    }
    facts |= {f"--{name}": getattr(flags, name) for name in ("overwrite", "allow_config_change")}
    facts |= {f"the version of {name}": metadata.version(name) for name in PACKAGES}
    facts |= numerics.meaning() | numerics.rounding()
    processes.agree("start", facts | {"the version of rlhf_jax": __version__})


def _end_together(why: str, status: int, trace: str = "") -> None:
    """Ends all processes with `status`, unless all of them are stopping after the same step."""
    if processes.count() == 1:
        return
    if status == STOPPED_TOGETHER:
        processes.finish()
        return
    print(trace, end="", file=sys.stderr, flush=True)
    processes.fail(why.removeprefix("Error: "), status)


# -------------------------------------------------------------------------------------------- flags


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are reported as all others are: in one line, without secrets."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _flag_parser(run: Run, config: str, workdir: str) -> _Parser:
    """The parser of a program's flags; keys of the config are left over for `_parse_flags`."""
    doc = inspect.getdoc(inspect.getmodule(run)) or inspect.getdoc(run)
    parser = _Parser(
        # An abbreviated flag would hide a misspelt one.
        description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any key of the config is a flag too: --config.KEY=VALUE",
    )  # fmt: skip
    parser.add_argument(
        "--config", default=config or None, required=not config, metavar="FILE[:ARG]", help=config
    )
    parser.add_argument(
        "--workdir", default=workdir or None, required=not workdir, metavar="DIR", help=workdir
    )
    parser.add_argument(
        "--overwrite", action="store_true",
        help="start afresh; an earlier run is renamed, not deleted",
    )  # fmt: skip
    parser.add_argument(
        "--allow_config_change", action="store_true", help="resume although the config changed"
    )
    parser.add_argument("--distributed", action="store_true",
                        help="one process of several (SLURM, GKE, TPU pod, MPI)")  # fmt: skip
    parser.add_argument("--coordinator_address", metavar="HOST:PORT",
                        help="of process 0, where nothing else tells it")  # fmt: skip
    parser.add_argument(
        "--num_processes", type=int, metavar="N", help="how many, with --coordinator_address"
    )
    parser.add_argument(
        "--process_id", type=int, metavar="I", help="0 to N - 1, with --coordinator_address"
    )
    parser.add_argument(
        "--heartbeat_timeout", type=int, default=processes.HEARTBEAT_SECONDS, metavar="SECONDS",
        help="silence after which a process is taken for dead and the others end",
    )  # fmt: skip
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="compile every phase, print its memory, do nothing else; "
        "of a pipeline: print the plan of its stages",
    )
    return parser


def _parse_flags(
    run: Run, config: str, workdir: str, argv: list[str]
) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags, and the overrides of the config by key."""
    parser = _flag_parser(run, config, workdir)
    # What is left over are config overrides, whose names the parser cannot know.
    flags, rest = parser.parse_known_args(argv)
    for name in ("config", "workdir"):
        if not getattr(flags, name):
            raise ValueError(
                f"--{name} is empty: give a {'file' if name == 'config' else 'folder'}, "
                f"--{name}=PATH"
            )
    overrides: dict[str, str] = {}
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("--config."):
            known = [a for action in parser._actions for a in action.option_strings]
            raise ValueError(f"unknown flag {flag!r}{checks.nearest(flag, known)}")
        if not equals and (not rest or rest[0].startswith("--")):
            raise ValueError(f"{flag} needs a value: {flag}=VALUE")
        overrides[flag.removeprefix("--config.")] = value if equals else rest.pop(0)
    return flags, overrides
