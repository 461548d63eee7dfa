"""Looks at growing data: how many there have been, and what each may spend of alpha.

Every verdict over another set of seeds, or by other margins or another reference, is a look, and every look is another
chance of a false claim. Looks that were declared share alpha equally (Bonferroni). One more than declared gets half of
what the last one had, the next a quarter: however many follow, false claims stay below twice alpha. The record is an
file in the trial's folder that only grows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.cells import write_whole
from pipeline.errors import UsageError

FILE = "looks.jsonl"


@dataclass(frozen=True)
class Look:
    """The number of a look, from 1, the alpha that it is judged at, and what both follow from."""

    number: int
    level: float
    alpha: float = 0.05
    declared: int = 1


def level_of(alpha: float, declared: int, number: int) -> float:
    """alpha / declared, and half as much with every look beyond the declared ones.

    Raises:
        ValueError: declared or number is below 1.
    """
    if declared < 1 or number < 1:
        raise ValueError(f"looks are counted from 1, got declared={declared}, number={number}")
    return float(alpha / declared / 2.0 ** max(0, number - declared))


def look_at(folder: Path, seeds: Sequence[int], question: str, alpha: float, declared: int) -> Look:
    """The look that a verdict over these seeds is: one that was taken before, or the next.

    Args:
        question: what else makes it another chance of a false claim: reference, margins, primary metrics.

    Alpha and the number of declared looks are those of the first look on record.
    """
    taken = _taken(folder)
    if taken:
        alpha, declared = taken[0]["alpha"], taken[0]["declared"]
    asked = {"seeds": sorted(seeds), "question": question}
    number = next((i for i, entry in enumerate(taken, 1) if asked.items() <= entry.items()), len(taken) + 1)
    return Look(number, level_of(alpha, declared, number), alpha, declared)


def record(folder: Path, look: Look, seeds: Sequence[int], question: str, words: Mapping[str, str]) -> None:
    """Append a look that is not on record yet; one at which nothing was tested (all identical) is none."""
    tested = any(word not in ("identical", "not_run") for word in words.values())
    taken = _taken(folder)
    if not tested or look.number <= len(taken):
        return
    entry = asdict(look) | {"question": question, "seeds": sorted(seeds), "words": dict(words)}
    earlier = (folder / FILE).read_bytes() if taken else b""
    write_whole(folder / FILE, earlier + json.dumps(entry).encode() + b"\n")


def _taken(folder: Path) -> list[dict[str, Any]]:
    """The looks on record, in order."""
    try:
        lines = (folder / FILE).read_text().splitlines()
    except FileNotFoundError:
        return []
    try:
        entries = [json.loads(line) for line in lines]
        return [
            entry for entry in entries if entry["seeds"] and entry["question"] and entry["alpha"] and entry["declared"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        line = f"{folder / FILE} is damaged; it counts the looks at the data: restore it, or start a new folder"
        raise UsageError(line) from error
