"""What every entry point needs: exit codes, one error wrapper, and cheap imports. Standard library only."""

from __future__ import annotations

import errno
import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

from likelihood_lab.errors import UsageError, first_line


class ExitCode(IntEnum):
    """Exit codes of every entry point."""

    HOLDS = 0  # what was expected holds, or nothing was expected
    REFUTED = 1  # an expectation is refuted or undecided
    USAGE = 2  # the request is wrong
    BUG = 3  # our bug, or a lost run
    INTERRUPTED = 130


# From mild to grave: the code of a sweep is the gravest of its jobs.
GRAVITY = (ExitCode.HOLDS, ExitCode.REFUTED, ExitCode.USAGE, ExitCode.BUG, ExitCode.INTERRUPTED)
noted: list[ExitCode] = []

# What the operating system says where a disk is full or broken, or a path cannot be used.
DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG, errno.ENOTDIR,
    errno.ELOOP,
)  # fmt: skip


def record_exit_code(code: int) -> None:
    """Remember the exit code of one job of this process; `run` returns the gravest."""
    noted.append(ExitCode(code))


def worst_exit_code() -> ExitCode:
    """The gravest code noted so far, `HOLDS` where none was."""
    return max(noted, key=GRAVITY.index, default=ExitCode.HOLDS)


@dataclass(frozen=True)
class Outcome:
    """How an action ended; `error` is what to tell the user in one line, where it ended badly."""

    code: ExitCode
    error: str | None = None


def run_action(action: Callable[[], int]) -> Outcome:
    """Run an action; what it raises becomes an exit code, with a traceback unless the request is wrong."""
    try:
        return Outcome(ExitCode(action()))
    except UsageError as error:
        return Outcome(ExitCode.USAGE, str(error))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            where = error.filename or "the disk"
            line = f"cannot read or write {where}: {error.strerror}; free space or choose another folder"
            return Outcome(ExitCode.USAGE, line)
        traceback.print_exc()
        return Outcome(ExitCode.BUG, f"{type(error).__name__}: {first_line(error)}")


def run_and_report(action: Callable[[], int]) -> ExitCode:
    """`run_action`, with a wrong request told in one line on stderr."""
    outcome = run_action(action)
    if outcome.code is ExitCode.USAGE and outcome.error is not None:
        print(f"error: {outcome.error}", file=sys.stderr)
    return outcome.code


@contextmanager
def gc_paused_import(module: str) -> Iterator[None]:
    """While `module` is imported, and ever after, the garbage collector leaves alone what imports make.

    Torch, Lightning and MLflow make more than a million objects that live as long as the process. The collector would
    go through them again and again while they grow, and once more at the end: two of six seconds.
    """
    if module in sys.modules or not gc.isenabled():
        yield
        return
    gc.collect()  # what is garbage now would stay for ever
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
