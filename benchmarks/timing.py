"""Time several contenders in turns, so that other work on the machine affects all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Clock = Callable[[], float]


@dataclass(frozen=True)
class Contender:
    """Function that does `units` units of work in each call."""

    run: Callable[[], None]
    units: int


@dataclass(frozen=True)
class Spread:
    """Median and range of one number over repetitions."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __mul__(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.lowest * factor, self.highest * factor)

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} [{self.lowest:{spec}}..{self.highest:{spec}}]"


def clock(device: torch.device) -> Clock:
    """Return the process CPU time, which other processes disturb least; on a GPU, the wall time of finished work."""
    if device.type == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


def interleaved(contenders: Mapping[str, Contender], repetitions: int, now: Clock) -> dict[str, list[float]]:
    """Return seconds per unit for every contender and repetition. One call of each before is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.run()
    for _ in range(repetitions):
        for name, contender in contenders.items():
            begun = now()
            contender.run()
            seconds[name].append((now() - begun) / contender.units)
    return seconds


def gain(baseline: Sequence[float], ours: Sequence[float], factor: float = 1.0) -> Spread:
    """Return the ratio of the baseline's time to ours, repetition by repetition."""
    return Spread.of([factor * theirs / mine for theirs, mine in zip(baseline, ours, strict=True)])
