"""Values as a reader would write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MINUS = "\N{MINUS SIGN}"


def prose(value: Any) -> str:
    """A JSON value as a reader would write it; a dash for null."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", MINUS)
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {prose(item)}" for key, item in value.items()) or "—"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return (", " if all(isinstance(item, int) for item in value) else "; ").join(map(prose, value)) or "none"
    return str(value) if value is not None and value != "" else "—"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
