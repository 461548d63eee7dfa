"""The dithered rank test: a question for kernel swaps in float32, where rounding itself is the only measure left.

The gradient that leaves the loss is rounded at random to BITS significant bits, in the candidate and in K copies of the
reference, each with draws of its own. If the candidate is the reference, the K + 1 arms of a seed are exchangeable, and
the rank of the candidate's distance from the mean of all is uniform on 1 ... K + 1. Arrays in, a finding out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BITS = 16
STEPS = (1, 10)


@dataclass(frozen=True)
class RankFinding:
    """What the ranks showed.

    Attributes:
        p: two-sided, the smaller of the steps' times their number (Bonferroni).
        mean_rank: step -> the candidate's mean rank as a fraction, .5 expected; 1: always the farthest.
    """

    p: float
    mean_rank: Mapping[int, float]

    def rejects(self, alpha: float = 0.05) -> bool:
        """Whether the candidate is told apart from the reference."""
        return self.p <= alpha


def rank_test(arms: Mapping[int, Floats], rng: np.random.Generator) -> RankFinding:
    """Judge a candidate by its ranks.

    Args:
        arms: step -> weights or their sketches [S, K + 1, width], the candidate first.
        rng: breaks ties, so that equal distances have equal chances.

    Raises:
        ValueError: fewer than two copies of the reference, or no seed.
    """
    p_values, means = [], {}
    for step, values in arms.items():
        seeds, count = values.shape[:2]
        if seeds < 1 or count < 3:
            raise ValueError(f"the rank test needs a seed and two copies of the reference, got {values.shape[:2]}")
        distances = np.linalg.norm(values - values.mean(1, keepdims=True), axis=-1)
        ranks = 1 + (distances[:, :1] > distances[:, 1:]).sum(1) + _among_ties(distances, rng)
        p_values.append(two_sided(int(ranks.sum()), seeds, count))
        means[step] = float((ranks.mean() - 1) / (count - 1))
    return RankFinding(min(1.0, len(p_values) * min(p_values)), means)


def _among_ties(distances: Floats, rng: np.random.Generator) -> NDArray[np.int64]:
    """How many of the arms at the candidate's own distance come before it, at random."""
    ties = (distances[:, :1] == distances[:, 1:]).sum(1)
    return np.asarray(rng.integers(0, ties + 1))


def two_sided(total: int, seeds: int, count: int) -> float:
    """Twice the smaller tail of a sum of S ranks, each uniform on 1 ... count: the exact null distribution."""
    frequencies = _sums(seeds, count)
    place = total - seeds
    lower, upper = frequencies[: place + 1].sum(), frequencies[place:].sum()
    return float(min(1.0, 2 * min(lower, upper)))


@lru_cache(maxsize=64)
def _sums(seeds: int, count: int) -> Floats:
    """P(sum of S ranks = S + i), i = 0 ... S (count - 1)."""
    one = np.full(count, 1 / count)
    total = np.ones(1)
    for _ in range(seeds):
        total = np.convolve(total, one)
    return total
