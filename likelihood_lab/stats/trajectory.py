"""Tests on early weight trajectories: the envelope of the placebos, and the dithered rank test. Both take arrays.

Envelope: D_X(s, t) = ||theta_X - theta_A|| / ||theta_A|| is the distance of arm X from the reference A under seed s
after t steps. A placebo is the reference itself, computed with other roundings. A candidate that is the same function
parts from the reference as fast as a placebo does; one that is not parts faster, from the first steps on.

Rank test, for kernel swaps in float32, where rounding is the only measure left: the gradient that leaves the loss is
rounded at random to BITS significant bits, in the candidate and in K copies of the reference, each with draws of its
own. If the candidate is the reference, the K + 1 arms of a seed are exchangeable, and the rank of the candidate's
distance from the mean of all is uniform on 1 ... K + 1.
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
CLOSE = 1e-3  # placebos must stay this much nearer to the reference than two seeds are to each other
AGREEMENT = 0.5  # decades within which two placebos of one seed agree
AGREEING = 0.8  # share of the seeds in which they do
FEWEST_SEEDS = 2
SMALLEST_CAUGHT = {"float32": 1e-5, "bf16_mixed": 1e-2}
"""The smallest label smoothing and temperature that 95 % of studies of five seeds or more caught, in every recorded
regime of the precision (experiments/envelope)."""


BITS = 16
RANK_STEPS = (1, 10)


def limit(seeds: int) -> float:
    """Decades that a median over S seeds may lie above the placebos': .2 and .6 / sqrt(S), its sampling error.

    The curve behind the numbers is in experiments/envelope.
    """
    return 0.2 + 0.6 / math.sqrt(seeds)


@dataclass(frozen=True)
class Envelope:
    """What the early trajectory showed of one candidate.

    Attributes:
        word: identical (no distance at any step), inside, outside, or not_applicable with the reason.
        excess: step -> decades by which the candidate's median lies above the placebos'; only steps that are judged.
        reason: why it is not applicable, or which step decided.
        smallest: the label smoothing that studies like this one catch, where there is a record of such studies.
    """

    word: Word
    excess: Mapping[int, float] = field(default_factory=dict)
    reason: str = ""
    smallest: float | None = None


def usable_steps(placebos: Sequence[Distances], between_seeds: Distances) -> list[int]:
    """The steps at which placebos are near the reference, and agree with each other about how near.

    Args:
        placebos: distances of each placebo arm from the reference, in the same seeds.
        between_seeds: step -> relative distances between the reference under two seeds, for pairs of seeds.
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
    """Judge a candidate's early distances by the placebos'; at least two placebos and two seeds are needed."""
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

    A run that has diverged by then is infinitely far away; that it diverged is for the outcome to say. One that has not
    parted at all counts as a tenth of the nearest placebo.
    """
    known = np.concatenate([*placebos])
    distances = np.where(np.isfinite(candidate), np.maximum(candidate, known.min() / 10), np.inf)
    return float(np.median(np.log10(distances)) - np.median(np.log10(known)))


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
