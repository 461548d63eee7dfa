"""The one exception that means "the request is wrong": configuration, arguments, data or environment."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """One line: what is wrong and what to do about it. Entry points print it and exit with code 2."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, as one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest of the known words, to be put behind the unknown one; empty where none is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had: Python's, a GPU's, or torch's on a CPU."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
