"""Yardsticks of two arms over the same seeds: what failed is scored, what is missing is counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from likelihood_lab.stats.equivalence import Floats, Scale

Bools = NDArray[np.bool_]
Status = Literal["ok", "diverged", "missing"]
STATUSES: tuple[Status, ...] = ("ok", "diverged", "missing")


@dataclass(frozen=True)
class Yardstick:
    """How a metric is compared, and what a diverged run scores: (num_classes, largest observed) -> value."""

    scale: Scale
    of_failure: Callable[[int, float], float]
    needs_truth: bool = False  # measured only where P(y | x) is known


# Intention to treat: dropping diverged runs would drop exactly the seeds that tell two losses apart, so a
# failure scores as the uniform prediction does; its Brier score is (1 - 1/C)^2 + (C - 1)/C^2 = (C - 1)/C. NLL
# has no upper bound, so a run that finished may be worse than ln C; a failure is never better than that one.
# The uniform prediction has hardly any calibration error, which would flatter a failure: ECE takes its worst.
# Its divergence from the truth is ln C less the truth's entropy: at most ln C.
METRICS: Mapping[str, Yardstick] = {
    "nll": Yardstick("log_ratio", lambda num_classes, worst: max(math.log(num_classes), worst)),
    "brier": Yardstick("difference", lambda num_classes, worst: (num_classes - 1) / num_classes),
    "accuracy": Yardstick("difference", lambda num_classes, worst: 1 / num_classes),
    "ece": Yardstick("difference", lambda num_classes, worst: 1.0),
    "kl_truth": Yardstick("difference", lambda num_classes, worst: max(math.log(num_classes), worst), needs_truth=True),
}


def measured_in(runs: Iterable[Mapping[str, float]]) -> list[str]:
    """The yardsticks that these runs are compared by: each run's test metrics, `test/<name>`, say which it has."""
    runs = list(runs)
    return [
        name for name, metric in METRICS.items() if not metric.needs_truth or any(f"test/{name}" in run for run in runs)
    ]


@dataclass(frozen=True)
class Failures:
    """How many seeds diverged under which arm, and how many pairs are incomplete."""

    candidate_only: int
    reference_only: int
    both: int
    missing: int

    @property
    def discordant(self) -> int:
        return self.candidate_only + self.reference_only

    @property
    def p_mcnemar(self) -> float:
        """McNemar's exact two-sided test: which arm a discordant seed fails under is a fair coin."""
        rarer = min(self.candidate_only, self.reference_only)
        return min(1.0, 2 * float(special.bdtr(rarer, self.discordant, 0.5)))


@dataclass(frozen=True)
class Pairs:
    """The P complete ones of S pairs: `values` [2, P], candidate first, failures scored; `present` [S]."""

    values: Mapping[str, Floats]
    present: Bools
    failures: Failures
    num_valid: int  # pairs in which both runs finished

    @property
    def collapse_rate_bound(self) -> float:
        return collapse_rate_bound(self.failures.candidate_only + self.failures.both, int(self.present.sum()))

    def are_identical(self, same_bits: Bools) -> bool:
        """Bits and yardsticks agree in every complete pair, and both runs finished in one at least."""
        same_values = all(np.array_equal(*values) for values in self.values.values())
        return (
            bool(same_bits[self.present].all()) and same_values and self.num_valid > 0 and not self.failures.discordant
        )


def pair_up(
    candidate: Mapping[str, ArrayLike],
    reference: Mapping[str, ArrayLike],
    candidate_status: Sequence[Status] | None,
    reference_status: Sequence[Status] | None,
    num_classes: int,
) -> Pairs:
    """Complete pairs from one value a seed [S] for each metric and arm; values are ignored unless `ok`."""
    values = {name: np.array([candidate[name], reference[name]], dtype=np.float64) for name in candidate}
    statuses = _statuses(candidate_status, reference_status, shape=next(iter(values.values())).shape)
    _check_finite(values, statuses == "ok")
    present = np.logical_and(*np.isin(statuses, ("ok", "diverged")))
    diverged = (statuses == "diverged")[:, present]
    scored = {k: intention_to_treat(k, v[:, present], diverged, num_classes) for k, v in values.items()}
    failures = _count_failures(diverged, missing=int(np.sum(~present)))
    return Pairs(scored, present, failures, num_valid=int(np.sum(~diverged.any(axis=0))))


def intention_to_treat(name: str, values: Floats, diverged: Bools, num_classes: int) -> Floats:
    """The yardstick [2, S] with the score of a failure in place of every diverged run's value."""
    worst = float(values[np.isfinite(values)].max(initial=0.0))
    return np.where(diverged, METRICS[name].of_failure(num_classes, worst), values)


def collapse_rate_bound(num_failures: int, num_seeds: int) -> float:
    """Upper 95 % limit of a failure rate (Clopper-Pearson): 1 - .05^(1/S) when no seed failed."""
    if num_failures == num_seeds:
        return 1.0
    return float(special.betaincinv(num_failures + 1, num_seeds - num_failures, 0.95))


def _statuses(
    candidate: Sequence[Status] | None, reference: Sequence[Status] | None, shape: tuple[int, ...]
) -> NDArray[np.str_]:
    statuses = np.array([["ok"] * shape[1] if arm is None else list(arm) for arm in (candidate, reference)])
    if statuses.shape != shape or not np.isin(statuses, STATUSES).all():
        raise ValueError(f"each arm needs one status of {STATUSES} for each of {shape[1]} seeds")
    return statuses


def _check_finite(values: Mapping[str, Floats], ok: Bools) -> None:
    for name, both in values.items():
        if not np.isfinite(both[ok]).all():
            raise ValueError(f"{name} is not finite in a run declared ok; declare it diverged or missing")


def _count_failures(diverged: Bools, missing: int) -> Failures:
    candidate, reference = diverged
    return Failures(
        candidate_only=int(np.sum(candidate & ~reference)),
        reference_only=int(np.sum(reference & ~candidate)),
        both=int(np.sum(candidate & reference)),
        missing=missing,
    )
