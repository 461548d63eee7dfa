"""Run jobs in forked subprocesses with a time and memory limit. A crash affects only its own job.

A fork inherits what the parent has imported and computed. The parent must not have started CUDA, which does not work
in a fork.
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

POLL_INTERVAL = 0.05  # seconds
PR_SET_PDEATHSIG = 1  # linux/prctl.h

SendPartial = Callable[[Any], None]  # sends a partial result to the parent
Job = Callable[[SendPartial], Any]


@dataclass(frozen=True)
class Limits:
    """Limits of one job: wall-clock seconds, and bytes of resident memory beyond the inherited ones."""

    seconds: float
    memory: float


@dataclass(frozen=True)
class JobResult:
    """Result of a job.

    Attributes:
        value: the return value; None if the job did not return.
        partial: the last partial result that the job sent.
        refusal: the message of a `UsageError` that it raised.
        failure: the cause of its end if it neither returned nor raised a `UsageError`.
        output: its standard output.
        cpu_seconds: its CPU time at the last measurement.
    """

    value: Any = None
    partial: Any = None
    refusal: str | None = None
    failure: str | None = None
    output: str = ""
    cpu_seconds: float = 0.0


@dataclass
class _Subprocess:
    process: Any
    connection: Connection
    output: IO[bytes]
    errors: IO[bytes]
    started: float
    partial: Any = None
    cpu_seconds: float = 0.0
    inherited: float | None = None  # resident bytes at the first measurement, most of them the parent's


def run_isolated(jobs: Mapping[str, Job], limits: Limits, at_once: int) -> Iterator[tuple[str, JobResult]]:
    """Run each job in its own subprocess and yield (name, result) in the order in which they end.

    Raises:
        UsageError: this system cannot fork.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise UsageError("this system cannot fork; use likelihood_lab.check from Python instead")
    waiting, running = dict(jobs), dict[str, _Subprocess]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = next(iter(waiting))
                running[name] = _start(waiting.pop(name))
            wait([child.connection for child in running.values()], POLL_INTERVAL)
            for name, child in list(running.items()):
                if (result := _poll(child, limits)) is not None:
                    del running[name]
                    yield name, result
    finally:
        for child in running.values():
            _kill(child)


def _start(job: Job) -> _Subprocess:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    output, errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  (closed by _kill)
    sys.stdout.flush()
    sys.stderr.flush()
    process = multiprocessing.get_context("fork").Process(target=_run, args=(job, sender, output, errors), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; torch's are idle
        process.start()
    sender.close()
    return _Subprocess(process, receiver, output, errors, time.monotonic())


def _run(job: Job, connection: Connection, output: IO[bytes], errors: IO[bytes]) -> None:
    """Run the job in the subprocess: own session, own output, one result, no clean-up of the parent's objects."""
    os.setsid()
    if sys.platform == "linux":  # the kernel kills the subprocess when its parent ends
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.disable()  # it would write to the parent's terminal
    os.dup2(output.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    try:
        result = "value", job(lambda partial: connection.send(("partial", partial)))
    except UsageError as error:
        result = "refusal", str(error)
    except BaseException as error:  # SystemExit included: a loss must not end the audit
        result = "failure", f"{type(error).__name__}: {first_line(error)}"
    with suppress(Exception):  # a loss may have closed them
        sys.stdout.flush()
        sys.stderr.flush()
    connection.send(result)
    os._exit(0)


def _poll(child: _Subprocess, limits: Limits) -> JobResult | None:
    """Return the result of a subprocess that has ended or exceeds a limit; None while it works."""
    with suppress(EOFError, OSError):
        while child.connection.poll():
            kind, content = child.connection.recv()
            if kind != "partial":
                return _close(child, **{kind: content})
            child.partial = content
    if not child.process.is_alive():
        return _close(child, failure=_describe_exit(child.process.exitcode, _read(child.errors)))
    if time.monotonic() - child.started > limits.seconds:
        return _close(child, failure=f"took more than {limits.seconds:g} s")
    memory = _measure(child)
    child.inherited = memory if child.inherited is None else child.inherited
    if memory - child.inherited > limits.memory:
        return _close(child, failure=f"took more than {limits.memory / 2**30:.3g} GiB of memory")
    return None


def _measure(child: _Subprocess) -> float:
    """Update the CPU seconds and return the resident bytes."""
    with suppress(psutil.Error):
        process = psutil.Process(child.process.pid)
        times = process.cpu_times()
        child.cpu_seconds = times.user + times.system
        return float(process.memory_info().rss)
    return 0.0


def _close(child: _Subprocess, **result: Any) -> JobResult:
    _measure(child)
    output = _read(child.output)
    _kill(child)
    return JobResult(**result, partial=child.partial, output=output, cpu_seconds=child.cpu_seconds)


def _kill(child: _Subprocess) -> None:
    """Kill the subprocess and its own children, and wait for it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        child.process.kill()
    child.process.join()
    for resource in (child.connection, child.output, child.errors):
        resource.close()


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(10_000).decode(errors="replace")


def _describe_exit(code: int | None, errors: str) -> str:
    """Return the exit code or signal of a process and its last line on stderr."""
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "")
    name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    return f"ended by {name}" + (f": {last.strip()[:200]}" if last else "")
