"""Write the gains of a benchmark to a file, and compare later gains with them."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.steps import Row
from benchmarks.timing import Spread

KEY = ("case", "engine", "replicas", "losses")
LOST = 0.85  # share of a recorded gain; below it is a regression, because shared machines change ratios by about 15 %

Gains = Mapping[tuple[str, ...], Spread]


def key_of(row: Row) -> tuple[str, ...]:
    return row.case, row.engine, str(row.replicas), "with" if row.with_losses else "without"


def write(rows: Sequence[Row], path: Path) -> None:
    """Write a line for each stack: its key, and the median, lowest and highest gain."""
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*KEY, "gain", "lowest", "highest"])
        for row in rows:
            table.writerow([*key_of(row), *(f"{n:.4g}" for n in (row.gain.median, row.gain.lowest, row.gain.highest))])


def read(path: Path) -> dict[tuple[str, ...], Spread]:
    """Read a file of `write`."""
    with path.open(newline="") as file:
        return {
            tuple(line[name] for name in KEY): Spread(*(float(line[name]) for name in ("gain", "lowest", "highest")))
            for line in csv.DictReader(file)
        }


@dataclass(frozen=True)
class Line:
    """Measured and recorded gain of one stack."""

    key: tuple[str, ...]
    now: Spread | None
    before: Spread | None

    @property
    def regressed(self) -> bool:
        """True if the median is below 85 % of the record and every repetition below every recorded one.

        A recorded stack that is no longer measured has regressed too.
        """
        if self.now is None or self.before is None:
            return self.now is None
        return self.now.median < LOST * self.before.median and self.now.highest < self.before.lowest

    def __str__(self) -> str:
        word = "REGRESSED" if self.regressed else "new" if self.before is None else "holds"
        both = " beside ".join("nothing" if spread is None else f"{spread:.2f}" for spread in (self.now, self.before))
        case, engine, replicas, losses = self.key
        return f"{word:9}  {case}, {engine}, R = {replicas}, {losses} the losses: {both}"


def compare(before: Gains, rows: Sequence[Row]) -> Iterator[Line]:
    """Yield a line for every stack that is recorded or measured."""
    now = {key_of(row): row.gain for row in rows}
    return (Line(key, now.get(key), before.get(key)) for key in dict.fromkeys([*before, *now]))
