"""Markdown tables and the line about the environment, for the studies of this folder."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence

import torch


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table with numbers in three digits and None as a dash."""
    lines = [list(columns), ["---"] * len(columns), *([shown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(cell: object) -> str:
    """Return a cell's text."""
    if cell is None:
        return "-"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell).replace("|", "\\|")


def environment() -> str:
    """Return the versions and the processor in one line."""
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return (
        f"CPU ({capability}), {threads} thread{'s' if threads > 1 else ''}, "
        f"torch {torch.__version__.partition('+')[0]}, Python {platform.python_version()}"
    )
