"""The exception for wrong requests, and helpers for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """Wrong configuration, arguments, data or environment.

    The message is one line: what is wrong and what to do. Commands print it and exit with code 2.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its type."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the nearest known word; empty if none is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that memory ran out, in Python, on a GPU, or in torch on a CPU."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
