"""Looks at growing data: how many there have been, and what each may spend of alpha.

Every verdict over another set of seeds is a look, and every look is another chance of a false claim. Looks that were
declared share alpha equally (Bonferroni). One more than declared gets half of what the last one had, the next a
quarter: however many follow, false claims stay below twice alpha. The record is an append-only file in the trial's
folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UsageError

FILE = "looks.jsonl"


@dataclass(frozen=True)
class Look:
    """The number of a look, from 1, and the alpha that it is judged at."""

    number: int
    level: float


def level_of(alpha: float, declared: int, number: int) -> float:
    """alpha / declared, and half as much with every look beyond the declared ones.

    Raises:
        ValueError: declared or number is below 1.
    """
    if declared < 1 or number < 1:
        raise ValueError(f"looks are counted from 1, got declared={declared}, number={number}")
    return float(alpha / declared / 2.0 ** max(0, number - declared))


def look_at(folder: Path, seeds: Sequence[int], reference: str, alpha: float, declared: int) -> Look:
    """The look that a verdict over these seeds is: one that was taken before, or the next."""
    taken = _taken(folder, reference)
    number = taken.index(sorted(seeds)) + 1 if sorted(seeds) in taken else len(taken) + 1
    return Look(number, level_of(alpha, declared, number))


def record(folder: Path, look: Look, seeds: Sequence[int], reference: str, words: Mapping[str, str]) -> None:
    """Append a look that is not on record yet; one at which nothing was tested (all identical) is none."""
    tested = any(word not in ("identical", "not_run") for word in words.values())
    if not tested or sorted(seeds) in _taken(folder, reference):
        return
    entry = {
        "look": look.number,
        "level": look.level,
        "reference": reference,
        "seeds": sorted(seeds),
        "words": dict(words),
    }
    try:
        with (folder / FILE).open("a") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise UsageError(
            f"cannot write to {folder / FILE}: {error.strerror}; free space or choose another folder"
        ) from error


def _taken(folder: Path, reference: str) -> list[list[int]]:
    """The sets of seeds that were looked at, in order."""
    try:
        lines = (folder / FILE).read_text().splitlines()
    except FileNotFoundError:
        return []
    try:
        entries = [json.loads(line) for line in lines]
        return [entry["seeds"] for entry in entries if entry["reference"] == reference]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder / FILE} is damaged; it counts the looks at the data: restore it, or start a new folder"
        ) from error
