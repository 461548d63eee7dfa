"""Tests on the weights of the first steps: the envelope of the placebos, and the dithered rank test.

Envelope: D_X(s, t) = ||theta_X - theta_A|| / ||theta_A|| is the relative distance of run X from the reference A, under
seed s after t steps. A placebo is the reference with different rounding. A candidate that is the same function diverges
from the reference as fast as a placebo. A candidate that is another function diverges faster, from the first steps.

Rank test, for kernels that differ in float32 rounding alone: the gradient that leaves the loss is rounded at random to
BITS significant bits, in the candidate and in K copies of the reference, each with its own random numbers. If the
candidate is the reference, the K + 1 runs of a seed are exchangeable. The rank of the candidate's distance from their
mean is then uniform on 1 ... K + 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Distances = Mapping[int, Floats]  # step -> one distance a seed, [S]
Word = Literal["identical", "inside", "outside", "not_applicable"]

STEPS = (1, 3, 10)
CLOSE = 1e-3  # largest distance of placebos from the reference, relative to the distance between two seeds
AGREEMENT = 0.5  # decades within which two placebos of one seed agree
AGREEING = 0.8  # smallest share of the seeds in which they agree
FEWEST_SEEDS = 2
SMALLEST_CAUGHT = {"float32": 1e-5, "bf16_mixed": 1e-2}
"""Smallest label smoothing and temperature that 95 % of the studies of five seeds or more detected, in every recorded
regime of the precision (experiments/envelope)."""

BITS = 16
RANK_STEPS = (1, 10)


def limit(seeds: int) -> float:
    """Return the largest allowed excess of a candidate's median over the placebos', in decades.

    It is 0.2 + 0.6 / sqrt(S), where the second term is the sampling error of the median over S seeds. The constants
    come from experiments/envelope.
    """
    return 0.2 + 0.6 / math.sqrt(seeds)


@dataclass(frozen=True)
class Envelope:
    """Result of the envelope test for one candidate.

    Attributes
    ----------
    word : {"identical", "inside", "outside", "not_applicable"}
        `identical`: the distance is 0 at every step.
    excess : mapping of int to float
        Step -> decades by which the candidate's median lies above the placebos'. It has only steps that are usable.
    reason : str
        Reason why the test is not applicable, or the step that decided.
    smallest : float or None
        Smallest label smoothing that such studies detect. None if no such studies are recorded.
    """

    word: Word
    excess: Mapping[int, float] = field(default_factory=dict)
    reason: str = ""
    smallest: float | None = None


def usable_steps(placebos: Sequence[Distances], between_seeds: Distances) -> list[int]:
    """Select the steps at which the placebos are near the reference and have similar distances from it.

    Parameters
    ----------
    placebos : sequence of mapping of int to ndarray [S]
        Step -> distances of a placebo from the reference, for each placebo, in the same seeds.
    between_seeds : mapping of int to ndarray
        Step -> relative distances between the reference under two seeds, for pairs of seeds.

    Returns
    -------
    list of int
        A subset of STEPS.
    """
    steps = []
    for step in STEPS:
        if any(step not in placebo for placebo in placebos) or step not in between_seeds:
            continue
        values = np.array([placebo[step] for placebo in placebos])
        if not (np.isfinite(values).all() and (values > 0).all()):
            continue
        logs = np.log10(values)
        ratios = np.abs([a - b for a, b in combinations(logs, 2)])
        near = np.median(values) < CLOSE * np.median(between_seeds[step])
        if near and (ratios <= AGREEMENT).mean() >= AGREEING:
            steps.append(step)
    return steps


def envelope(candidate: Distances, placebos: Sequence[Distances], between_seeds: Distances) -> Envelope:
    """Compare a candidate's early distances with the placebos'.

    Parameters
    ----------
    candidate : mapping of int to ndarray [S]
        Step -> distances of the candidate from the reference. NaN: the run has diverged.
    placebos, between_seeds
        As in `usable_steps`. The test needs at least two placebos and two seeds.

    Returns
    -------
    Envelope
    """
    known = [values for step, values in candidate.items() if step in STEPS]
    if known and all((values == 0).all() for values in known):
        return Envelope("identical", reason=f"no distance in {len(known[0])} seeds")
    if len(placebos) < 2:
        return Envelope("not_applicable", reason="there are no two placebos to compare with")
    if min((len(values) for values in known), default=0) < FEWEST_SEEDS:
        return Envelope("not_applicable", reason="one seed shows no spread")
    steps = [step for step in usable_steps(placebos, between_seeds) if step in candidate]
    if not steps:
        return Envelope("not_applicable", reason="rounding and chaos cannot be told apart at any early step")
    excess = {step: _excess(candidate[step], [placebo[step] for placebo in placebos]) for step in steps}
    worst = max(excess, key=lambda step: excess[step])
    allowed = limit(len(candidate[worst]))
    if excess[worst] == math.inf:
        return Envelope("outside", excess, f"it diverges by step {worst} in most seeds")
    reason = f"{excess[worst]:+.2f} decades against the placebos at step {worst}, where {allowed:.2g} are allowed"
    return Envelope("inside" if excess[worst] <= allowed else "outside", excess, reason)


def _excess(candidate: Floats, placebos: Sequence[Floats]) -> float:
    """Median over seeds of log10 D_B minus the median over seeds and placebos of log10 D_placebo.

    The distance of a diverged run is infinite. A distance of 0 counts as a tenth of the nearest placebo's.
    """
    known = np.concatenate([*placebos])
    distances = np.where(np.isfinite(candidate), np.maximum(candidate, known.min() / 10), np.inf)
    return float(np.median(np.log10(distances)) - np.median(np.log10(known)))


@dataclass(frozen=True)
class RankFinding:
    """Result of the rank test.

    Attributes
    ----------
    p : float
        Two-sided p-value: the smallest of the steps' p-values times their number (Bonferroni), at most 1.
    mean_rank : mapping of int to float
        Step -> mean rank of the candidate as a fraction in [0, 1]. 0.5 is expected; 1: always the farthest.
    """

    p: float
    mean_rank: Mapping[int, float]

    def rejects(self, alpha: float = 0.05) -> bool:
        """Tell whether the candidate differs from the reference significantly."""
        return self.p <= alpha


def rank_test(arms: Mapping[int, Floats], rng: np.random.Generator) -> RankFinding:
    """Test whether the candidate is exchangeable with the copies of the reference.

    Parameters
    ----------
    arms : mapping of int to ndarray [S, K + 1, width]
        Step -> weights or their sketches, the candidate first.
    rng : numpy.random.Generator
        Generator that breaks ties at random.

    Returns
    -------
    RankFinding

    Raises
    ------
    ValueError
        There are fewer than two copies of the reference, or no seed.
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
    """Random number of runs that precede the candidate among those at its distance, [S]."""
    ties = (distances[:, :1] == distances[:, 1:]).sum(1)
    return np.asarray(rng.integers(0, ties + 1))


def two_sided(total: int, seeds: int, count: int) -> float:
    """Compute the two-sided p-value of a sum of S ranks, each uniform on 1 ... count, from the exact distribution."""
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
