"""Several processes that train one model: they start, agree, exchange data and stop together.

In a program with one process each function does the obvious thing, so callers need no special case.
Messages travel over the coordination service of `jax.distributed`, not over devices: it works
before devices are initialized, and no process waits for one that is gone. A process that fails
publishes its reason and the others exit with it; one that is killed is missed within
`HEARTBEAT_SECONDS`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import jax
import numpy as np

# JAX has no public interface to its coordination service; Orbax uses the same import.
from jax._src import distributed
from jax.experimental import multihost_utils
from jaxtyping import PyTree

HEARTBEAT_SECONDS = 10
"""Seconds of silence after which the others consider a process dead and exit."""

_FAILED = "rlhf_jax/failed"
_POLL_SECONDS = 0.5


def index() -> int:
    """The index of this process, 0 in a program with one process.

    Unlike `jax.process_index` this does not initialize the devices.
    """
    return distributed.global_state.process_id


def count() -> int:
    """The number of processes of this program."""
    return distributed.global_state.num_processes


def connect(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout: int = HEARTBEAT_SECONDS,
    start_timeout: int = 300,
) -> None:
    """Joins the other processes; call it before anything that initializes the devices.

    Without an address JAX detects it from the environment: SLURM, Open MPI, a Cloud TPU pod, GKE.
    Calling this again after joining does nothing.

    Args:
      coordinator_address: ``HOST:PORT`` of process 0, reachable from all processes.
      num_processes: number of processes.
      process_id: index of this process, 0 to ``num_processes - 1``.
      heartbeat_timeout: seconds of silence after which a process is considered dead.
      start_timeout: seconds to wait for the others.

    Raises:
      ValueError: only some of the first three are given, they do not fit, or the environment gives
        no address.
      OSError: the other processes could not be reached.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    _check_address(given)
    # JAX refuses a second initialization, and a launcher or a notebook may have joined already.
    if not jax.distributed.is_initialized():
        _join(given, heartbeat_timeout, start_timeout)
    if count() > 1:
        _Watch.begin()


def _join(given: Mapping[str, Any], heartbeat_timeout: int, start_timeout: int) -> None:
    coordinator_address = given["coordinator_address"]
    explicit = coordinator_address is not None
    # Printed only if the other processes are late.
    note = threading.Timer(15.0, _still_waiting, (coordinator_address, start_timeout))
    note.daemon = True
    note.start()
    try:
        jax.distributed.initialize(
            **given,
            # With an explicit address each process uses all devices of its host.
            cluster_detection_method="deactivate" if explicit else None,
            heartbeat_timeout_seconds=heartbeat_timeout,
            initialization_timeout=start_timeout,
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed found no SLURM, Open MPI, TPU pod or GKE job around it ({error}): give "
            "each process --coordinator_address=HOST:PORT --num_processes=N --process_id=I, or "
            "leave --distributed out"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        where, detail = coordinator_address or "process 0", str(error).splitlines()[0][:200]
        raise OSError(
            f"the {given['num_processes'] or 'other'} processes did not meet at {where} within "
            f"{start_timeout} s ({detail}): start all of them with one num_processes and an "
            "address that each host reaches"
        ) from None
    finally:
        note.cancel()


def _still_waiting(address: str | None, seconds: int) -> None:
    """Printed while `jax.distributed.initialize` waits.

    At its timeout JAX aborts the process (status 134), so no later message would be seen.
    """
    where = address or "process 0"
    print(
        f"Waiting for the other processes at {where}, {seconds} s at most",
        file=sys.stderr,
        flush=True,
    )


def _check_address(given: Mapping[str, Any]) -> None:
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if missing:
        raise ValueError(
            f"--{missing[0]} is missing: --{', --'.join(given)} are given together, or none of them"
        )
    # Split at the last colon, because an IPv6 address contains colons.
    host, _, port = str(given["coordinator_address"]).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f"--coordinator_address={given['coordinator_address']} must be HOST:PORT, as in "
            "node0:12345"
        )
    total, own = given["num_processes"], given["process_id"]
    if total < 1 or not 0 <= own < total:
        raise ValueError(
            f"--process_id={own} must be 0 to num_processes - 1 and --num_processes={total} at "
            "least 1"
        )


# -------------------------------------------------------------------------------------------- words


# Each process counts the rounds of a name by itself. They make the same calls in the same order, so
# the counts agree and give the keys of a round without a message.
_rounds: Counter[str] = Counter()


def on_first(name: str, function: Callable[[], Any]) -> Any:
    """Runs `function` on process 0 only and returns its result on every process.

    Args:
      name: name of this exchange; all processes reach each name in the same order.
      function: returns JSON data (tuples come back as lists).

    >>> on_first("doctest", lambda: {"step": 3})
    {'step': 3}
    """
    if count() == 1:
        return function()
    key = _next(name)
    # If `function` raises here, the others wait in `_read` until `fail` ends them too.
    if index() == 0:
        _client().key_value_set(f"{key}/all", json.dumps(function()))
    return json.loads(_read(f"{key}/all"))


def exchange(name: str, value: Any) -> list[Any]:
    """The `value` of every process, in process order, on every process.

    Args:
      name: name of this exchange, as in `on_first`.
      value: JSON data.

    >>> exchange("doctest", 3)
    [3]
    """
    return _reduced(name, value, list)


def barrier(name: str) -> None:
    """Returns when all processes have reached it."""
    _reduced(name, None, lambda values: None)


def agree(name: str, facts: Mapping[str, Any]) -> None:
    """Raises the same error on all processes unless their facts are equal.

    Args:
      name: name of this exchange, as in `on_first`.
      facts: JSON data by name.

    Raises:
      ValueError: they differ; the message lists each difference with its processes and hosts.

    >>> agree("doctest", {"seed": 0})
    """
    own = {"host": socket.gethostname(), "facts": dict(facts)}
    lines = _reduced(name, own, _differences)
    if lines:
        raise ValueError(
            f"the {count()} processes do not agree, so none of them starts: {'; '.join(lines)}. "
            "Start all with one command, one environment and the same files"
        )


def _differences(said: Sequence[Mapping[str, Any]]) -> list[str]:
    """The differences between the facts of the processes, one line per fact.

    >>> _differences([{"host": "a", "facts": {"jax": "1"}}, {"host": "b", "facts": {"jax": "2"}}])
    ["jax is '1' on process 0 (a), '2' on process 1 (b)"]
    """
    lines = []
    for name in dict.fromkeys(name for each in said for name in each["facts"]):
        who: dict[str, list[int]] = {}
        for process, each in enumerate(said):
            who.setdefault(repr(each["facts"].get(name, "absent")), []).append(process)
        if len(who) > 1:
            shown = [
                f"{value} on {_processes(said, processes)}"
                for value, processes in [*who.items()][:4]
            ]
            lines.append(f"{name} is {', '.join(shown)}")
    return lines[:8] + ([f"and {len(lines) - 8} more"] if len(lines) > 8 else [])


def _processes(said: Sequence[Mapping[str, Any]], processes: Sequence[int]) -> str:
    names = ", ".join(f"{i} ({said[i]['host']})" for i in processes[:3])
    more = f" and {len(processes) - 3} more" if len(processes) > 3 else ""
    return f"process{'es' if len(processes) > 1 else ''} {names}{more}"


def _reduced(name: str, value: Any, reduce: Callable[[list[Any]], Any]) -> Any:
    """Applies `reduce` to the values of all processes, on process 0.

    Each process then sends one message and reads one, not one per process.
    """
    if count() == 1:
        return reduce([value])
    key, client = _next(name), _client()
    client.key_value_set(f"{key}/{index()}", json.dumps(value))
    if index() == 0:
        words = [_read(f"{key}/{i}") for i in range(count())]
        client.key_value_set(f"{key}/all", json.dumps(reduce([json.loads(word) for word in words])))
    return json.loads(_read(f"{key}/all"))


def _next(name: str) -> str:
    """The key of this round of `name`; the key of round n - 2 is deleted.

    Reaching round n proves that every process has read round n - 2.
    """
    _rounds[name] += 1
    if index() == 0 and _rounds[name] > 2:
        # The key of a round is a folder of messages, which is deleted with all of them.
        _client().key_value_delete(f"rlhf_jax/{name}/{_rounds[name] - 2}/")
    return f"rlhf_jax/{name}/{_rounds[name]}"


def _read(key: str) -> str:
    """Waits for a message without a time limit.

    JAX notices a process that died, and `_Watch` one that failed.
    """
    while True:
        try:
            # A finite timeout, so that Python can handle Ctrl-C between two calls.
            return _client().blocking_key_value_get(key, 5_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise OSError(
                    f"the other processes cannot be reached ({str(error).splitlines()[0]})"
                ) from None


def _client() -> Any:
    return distributed.global_state.client


# ------------------------------------------------------------------------------------------- arrays


def gather(tree: PyTree) -> PyTree:
    """Gathers sharded arrays into host memory; all processes call it together.

    Args:
      tree: arrays with any shardings.

    Returns:
      The same tree of numpy arrays.
    """
    return jax.tree.map(_gather, tree)


def _gather(x: Any) -> np.ndarray:
    # A replicated array has a complete copy on this host, so no collective is needed.
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    # JAX gathers an array that spans processes only with `tiled`, which keeps its global shape.
    return multihost_utils.process_allgather(x, tiled=True)


# ---------------------------------------------------------------------------------- ending together


def fail(why: str, status: int) -> NoReturn:
    """Exits this process and all others with the same status; the others print this one and `why`.

    A regular exit would wait minutes for processes that wait for this one.

    Args:
      why: the reason, in one line.
      status: the exit status of all processes.
    """
    # Otherwise the watch of this process would hear the failure that is published below.
    _Watch.end()
    said = {"process": index(), "host": socket.gethostname(), "why": why, "status": status}
    # It raises if another process failed first, or if process 0 is gone.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(_FAILED, json.dumps(said))
    _mark("heard")
    # A collective that waits for this process would fail when it exits and hide the reason.
    _wait_for_marks("heard", count())
    _exit(status)


def _mark(what: str) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{_FAILED}_{what}/{index()}", "")


def _wait_for_marks(what: str, wanted: int) -> None:
    """Waits for the marks of `wanted` processes, for a bounded time: a killed process sets none."""
    # A live process hears of a failure within one poll and exits about two polls later.
    until = time.monotonic() + 8 * _POLL_SECONDS
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        while (
            len(_client().key_value_dir_get(f"{_FAILED}_{what}/")) < wanted
            and time.monotonic() < until
        ):
            time.sleep(_POLL_SECONDS / 5)


def when_another_fails(function: Callable[[], None]) -> None:
    """Registers a clean-up function for when this process exits because another one failed."""
    _Watch.before_exit.append(function)


def stop_point(step: int) -> bool:
    """Whether all processes save and stop after `step`, because one of them was asked to stop.

    All processes must call this at each step. JAX handles SIGTERM and any other preemption notice
    of a cluster, and makes the processes agree on a step that none of them has passed. A Python
    handler of SIGTERM would replace that handler.
    """
    global _stopping
    reached = multihost_utils.reached_preemption_sync_point(step)
    _stopping = _stopping or reached
    return reached


_stopping = False


def stopping_together() -> bool:
    """Whether `stop_point` was reached: every process stops then, and none has to be notified."""
    return _stopping


def finish() -> None:
    """Waits for the other processes at the end of a run, however long they still write."""
    if count() > 1:
        barrier("finish")
        _Watch.end()


class _Watch:
    """A thread that polls for the failure of another process, and then exits this one."""

    _over = threading.Event()
    _thread: threading.Thread | None = None
    before_exit: ClassVar[list[Callable[[], None]]] = []

    @classmethod
    def begin(cls) -> None:
        cls._over.clear()
        cls._thread = threading.Thread(target=cls._look, name="watch-processes", daemon=True)
        cls._thread.start()

    @classmethod
    def end(cls) -> None:
        """Joins the thread before the client is destroyed.

        A thread that is inside the client while Python exits would abort the process.
        """
        cls._over.set()
        if cls._thread is not None:
            cls._thread.join()

    @classmethod
    def _look(cls) -> None:
        while not cls._over.wait(_POLL_SECONDS):
            try:
                said = json.loads(_client().key_value_try_get(_FAILED))
            except jax.errors.JaxRuntimeError:
                # As a rule NOT_FOUND: no process has failed so far.
                continue
            _mark("heard")
            # This process may be about to fail with the same error itself.
            if not cls._over.wait(2 * _POLL_SECONDS):
                why = (
                    f"process {said['process']} on {said['host']} stopped, and this one with it: "
                    f"{said['why']}"
                )
                print(why, file=sys.stderr, flush=True)
                for function in cls.before_exit:
                    function()
                _exit(said["status"])
            return


def _exit(status: int) -> NoReturn:
    # `os._exit` below does not flush what is buffered.
    sys.stdout.flush()
    sys.stderr.flush()
    if index() > 0:
        _mark("gone")
    else:
        # Process 0 exits last, because JAX aborts a process that loses process 0.
        _wait_for_marks("gone", count() - 1)
        # A process that has set its mark still takes a moment to exit.
        time.sleep(_POLL_SECONDS)
    # Not `sys.exit`: its exit handlers would wait for the other processes.
    os._exit(status)
