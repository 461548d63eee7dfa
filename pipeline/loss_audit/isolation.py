"""Jobs in children of one warm process, with limits of time and memory: one that ends badly costs no other.

A child is a fork: what the parent has imported and computed is there already. The parent must not have started CUDA,
which does not survive a fork.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import IO, Any

import psutil

from likelihood_lab.errors import UsageError, first_line

POLL = 0.05  # seconds
PR_SET_PDEATHSIG = 1  # linux/prctl.h

Tell = Callable[[Any], None]
Job = Callable[[Tell], Any]


@dataclass(frozen=True)
class Limits:
    """What one job may use: seconds of wall-clock time, and bytes of resident memory beside what it inherits."""

    seconds: float
    memory: float


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Attributes:
        value: what it returned; None where it did not.
        told: the last that it told on the way.
        refused: the message of a `UsageError` that it raised.
        failed: how it ended, where it neither returned nor refused.
        printed: what it wrote to its standard output.
        seconds: of CPU time that it used, as far as it was seen.
    """

    value: Any = None
    told: Any = None
    refused: str | None = None
    failed: str | None = None
    printed: str = ""
    seconds: float = 0.0


@dataclass
class _Child:
    process: Any
    connection: Connection
    output: IO[bytes]
    errors: IO[bytes]
    started: float
    told: Any = None
    seconds: float = 0.0
    inherited: float | None = None  # bytes that were the parent's before it did anything


def run_isolated(jobs: Mapping[str, Job], limits: Limits, at_once: int) -> Iterator[tuple[str, JobResult]]:
    """Run each job in a child of its own and yield (name, outcome) as they end.

    Raises:
        UsageError: this system cannot fork.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise UsageError("this system cannot fork; use likelihood_lab.check from Python instead")
    waiting, running = dict(jobs), dict[str, _Child]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = next(iter(waiting))
                running[name] = _start(waiting.pop(name))
            wait([child.connection for child in running.values()], POLL)
            for name, child in list(running.items()):
                if (outcome := _heard(child, limits)) is not None:
                    del running[name]
                    yield name, outcome
    finally:
        for child in running.values():
            _end(child)


def _start(job: Job) -> _Child:
    here, there = multiprocessing.Pipe(duplex=False)
    output, errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  (closed by _end)
    sys.stdout.flush()
    sys.stderr.flush()
    process = multiprocessing.get_context("fork").Process(target=_work, args=(job, there, output, errors), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; torch's survive a fork idle
        process.start()
    there.close()
    return _Child(process, here, output, errors, time.monotonic())


def _work(job: Job, connection: Connection, output: IO[bytes], errors: IO[bytes]) -> None:
    """The child: its own session, its own output, one answer, and no clean-up of what is the parent's."""
    os.setsid()
    if sys.platform == "linux":  # a child must not outlive its parent, however that ends
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.disable()  # it would write to the parent's terminal
    os.dup2(output.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    try:
        answer = "value", job(lambda told: connection.send(("told", told)))
    except UsageError as error:
        answer = "refused", str(error)
    except BaseException as error:  # SystemExit, too: a loss must not end the audit
        answer = "failed", f"{type(error).__name__}: {first_line(error)}"
    with suppress(Exception):  # a loss may have closed them
        sys.stdout.flush()
        sys.stderr.flush()
    connection.send(answer)
    os._exit(0)


def _heard(child: _Child, limits: Limits) -> JobResult | None:
    """What a child has come to; None while it works."""
    with suppress(EOFError, OSError):
        while child.connection.poll():
            kind, content = child.connection.recv()
            if kind != "told":
                return _closed(child, **{kind: content})
            child.told = content
    if not child.process.is_alive():
        return _closed(child, failed=_how(child.process.exitcode, _text(child.errors)))
    if time.monotonic() - child.started > limits.seconds:
        return _closed(child, failed=f"took more than {limits.seconds:g} s")
    memory = _usage(child)
    child.inherited = memory if child.inherited is None else child.inherited
    if memory - child.inherited > limits.memory:
        return _closed(child, failed=f"took more than {limits.memory / 2**30:.3g} GiB of memory")
    return None


def _usage(child: _Child) -> float:
    """Resident bytes; CPU seconds are noted on the way."""
    with suppress(psutil.Error):
        process = psutil.Process(child.process.pid)
        times = process.cpu_times()
        child.seconds = times.user + times.system
        return float(process.memory_info().rss)
    return 0.0


def _closed(child: _Child, **found: Any) -> JobResult:
    _usage(child)
    printed = _text(child.output)
    _end(child)
    return JobResult(**found, told=child.told, printed=printed, seconds=child.seconds)


def _end(child: _Child) -> None:
    """Kill the child and whatever it has started, and wait for it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        child.process.kill()
    child.process.join()
    for held in (child.connection, child.output, child.errors):
        held.close()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(10_000).decode(errors="replace")


def _how(code: int | None, errors: str) -> str:
    """How a process ended, with the last line that it left."""
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "")
    name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    return f"ended by {name}" + (f": {last.strip()[:200]}" if last else "")
