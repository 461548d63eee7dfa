"""Text for readers: format numbers, sizes and lists, and remove passwords. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MINUS = "\N{MINUS SIGN}"
SHOWN = 6  # items of a long list that are printed
MARKS = {None: "", True: " holds", False: " does not hold"}


def in_words(size: int) -> str:
    """Return a number of bytes with a unit: 45 MB, 1.2 GB."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, max(0, (len(str(size)) - 1) // 3))
    return f"{size / 1000**power:.3g} {units[power]}"


def prose(value: Any) -> str:
    """Return a JSON value as plain text; a dash for null."""
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
    """Join names as in `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def plural(count: int, noun: str, nouns: str = "") -> str:
    """`1 seed`, `2 seeds`; `nouns` where the plural is not formed by an s."""
    return f"{count} {noun if count == 1 else nouns or noun + 's'}"


def shortened(words: Sequence[object]) -> str:
    """Join the first words and count the others."""
    more = len(words) - SHOWN
    return ", ".join(map(str, words[:SHOWN])) + (f" and {more} more" if more > 0 else "")


def without_password(text: str) -> str:
    """Remove user and password from every address in the text, so that none is printed or stored."""
    return re.sub(r"\b(ssl)?password=[^&\s]*&?", "", re.sub(r"//[^:/@\s]*:\S*@", "//", text))
