"""What a process tells its caller, and one wrapper that makes every entry point tell it the same way."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from enum import IntEnum

from pipeline.errors import UsageError


class ExitCode(IntEnum):
    """Exit codes of every entry point."""

    HOLDS = 0  # what was expected holds, or nothing was expected
    REFUTED = 1  # an expectation is refuted or undecided
    USAGE = 2  # the request is wrong
    BUG = 3  # our bug, or a lost run
    INTERRUPTED = 130


# From mild to grave: the code of a sweep is the gravest of its jobs.
GRAVITY = (ExitCode.HOLDS, ExitCode.REFUTED, ExitCode.USAGE, ExitCode.BUG, ExitCode.INTERRUPTED)
_noted: list[ExitCode] = []


def note(code: int) -> None:
    """Remember the exit code of one job of this process; `run` returns the gravest."""
    _noted.append(ExitCode(code))


def gravest() -> ExitCode:
    """The gravest code noted so far, `HOLDS` where none was."""
    return max(_noted, key=GRAVITY.index, default=ExitCode.HOLDS)


def guarded(action: Callable[[], int]) -> ExitCode:
    """Run an action; a wrong request is one line on stderr, any other error a traceback, and both are a code."""
    try:
        return ExitCode(action())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USAGE
    except Exception:
        traceback.print_exc()
        return ExitCode.BUG


def run_entry_point(main: Callable[[], object]) -> None:
    """Call a Hydra entry point and leave with the gravest exit code of its jobs.

    Hydra turns every error into exit code 1 unless it is asked for the full error; here a configuration that does
    not compose is a wrong request.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.exit(_code_of(main))


def _code_of(main: Callable[[], object]) -> ExitCode:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    def call() -> int:
        try:
            main()
        except (HydraException, OmegaConfBaseException) as error:
            raise UsageError(" ".join(str(error).split())) from error
        return gravest()

    try:
        return guarded(call)
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
        return ExitCode.INTERRUPTED
