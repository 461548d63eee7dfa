"""Shared by every entry point: exit codes, one error wrapper, one-line parser errors, cheap imports.

Standard library only, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import NoReturn

from likelihood_lab.errors import UsageError, first_line


class ExitCode(IntEnum):
    """Exit codes of every entry point."""

    HOLDS = 0  # every expectation holds, or there is none
    REFUTED = 1  # an expectation is refuted or undecided
    USAGE = 2  # the request is wrong
    BUG = 3  # our bug, or a lost run
    INTERRUPTED = 130


# From mild to grave: a sweep returns the worst code of its jobs.
GRAVITY = (ExitCode.HOLDS, ExitCode.REFUTED, ExitCode.USAGE, ExitCode.BUG, ExitCode.INTERRUPTED)
noted: list[ExitCode] = []

# Error numbers of a full or broken disk and of an unusable path.
DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG, errno.ENOTDIR,
    errno.ELOOP,
)  # fmt: skip


def record_exit_code(code: int) -> None:
    """Store the exit code of one job of this process; `worst_exit_code` returns the worst."""
    noted.append(ExitCode(code))


def worst_exit_code() -> ExitCode:
    """Return the worst code stored so far, `HOLDS` if there is none."""
    return max(noted, key=GRAVITY.index, default=ExitCode.HOLDS)


@dataclass(frozen=True)
class Outcome:
    """Exit code of an action; after an error also one line for the user."""

    code: ExitCode
    error: str | None = None


def run_action(action: Callable[[], int]) -> Outcome:
    """Run an action and turn its exceptions into exit codes; print a traceback unless the request is wrong."""
    try:
        return Outcome(ExitCode(action()))
    except UsageError as error:
        return Outcome(ExitCode.USAGE, str(error))
    except BrokenPipeError:  # the reader of the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the flush at the end of the process fails no more
        return Outcome(ExitCode.INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            where = error.filename or "the disk"
            line = f"cannot read or write {where}: {error.strerror}; free space or choose another folder"
            return Outcome(ExitCode.USAGE, line)
        traceback.print_exc()
        return Outcome(ExitCode.BUG, f"{type(error).__name__}: {first_line(error)}")


def run_and_report(action: Callable[[], int]) -> ExitCode:
    """Call `run_action` and print the error of a wrong request as one line on stderr."""
    outcome = run_action(action)
    if outcome.code is ExitCode.USAGE and outcome.error is not None:
        print(f"error: {outcome.error}", file=sys.stderr)
    return outcome.code


class OneLineParser(argparse.ArgumentParser):
    """Argument parser that raises `UsageError` with one line where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


@contextmanager
def gc_paused_import(module: str) -> Iterator[None]:
    """Pause the garbage collector while `module` is imported, then exempt the new objects from later collections.

    Torch, Lightning and MLflow create more than a million objects that live as long as the process. Collections of
    these objects would take two of six seconds.
    """
    if module in sys.modules or not gc.isenabled():
        yield
        return
    gc.collect()  # otherwise `gc.freeze` would keep present garbage for ever
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
