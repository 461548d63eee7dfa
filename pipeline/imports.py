"""Imports of large libraries at half their price."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting(module: str) -> Iterator[None]:
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
