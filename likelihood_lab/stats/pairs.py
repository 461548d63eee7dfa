"""Metrics of a candidate and a reference over the same seeds, with scores for diverged runs.

`METRICS` is the registry of the metrics that are compared: title, scale and score of a diverged run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from likelihood_lab.stats.equivalence import Floats, Scale

Bools = NDArray[np.bool_]
Status = Literal["ok", "diverged", "missing"]
STATUSES: tuple[Status, ...] = ("ok", "diverged", "missing")


@dataclass(frozen=True)
class MetricSpec:
    """Definition of a metric for the comparison.

    Attributes
    ----------
    title : str
        Name with unit, as reports show it.
    scale : {"difference", "log_ratio"}
        Scale on which candidate and reference are subtracted.
    score_of_failure : callable
        Score of a diverged run: (num_classes, worst value of the finished runs) -> value.
    needs_truth : bool
        True for a metric that is measured only if P(y | x) is known.
    """

    title: str
    scale: Scale
    score_of_failure: Callable[[int, float], float]
    needs_truth: bool = False


def _score_in_nats(num_classes: int, worst: float) -> float:
    return max(math.log(num_classes), worst)


# Intention to treat: without the diverged runs, exactly the seeds would be missing in which two losses differ. A
# diverged run therefore scores as the uniform prediction. Its Brier score is (1 - 1/C)^2 + (C - 1)/C^2 = (C - 1)/C.
# Its KL to the truth is ln C minus the entropy of the truth, at most ln C. NLL and KL have no upper bound: a diverged
# run is never better than the worst finished run. The ECE of the uniform prediction is close to 0, which would be too
# good for a diverged run, so that it gets the worst ECE, 1.
METRICS: Mapping[str, MetricSpec] = {
    "nll": MetricSpec("NLL (nats)", "log_ratio", _score_in_nats),
    "brier": MetricSpec("Brier score", "difference", lambda num_classes, worst: (num_classes - 1) / num_classes),
    "accuracy": MetricSpec("accuracy", "difference", lambda num_classes, worst: 1 / num_classes),
    "ece": MetricSpec("ECE (15 bins, shown only)", "difference", lambda num_classes, worst: 1.0),
    "kl_truth": MetricSpec("KL to the truth (nats)", "difference", _score_in_nats, needs_truth=True),
}


def measured_in(runs: Iterable[Mapping[str, float]]) -> list[str]:
    """Return the metrics that runs are compared by; a metric of the truth needs a run that has `test/<name>`."""
    runs = list(runs)
    return [
        name for name, metric in METRICS.items() if not metric.needs_truth or any(f"test/{name}" in run for run in runs)
    ]


@dataclass(frozen=True)
class Failures:
    """Numbers of seeds that diverged under the candidate, the reference or both, and of incomplete pairs."""

    candidate_only: int
    reference_only: int
    both: int
    missing: int

    @property
    def discordant(self) -> int:
        """Number of seeds that diverged under one loss alone."""
        return self.candidate_only + self.reference_only

    @property
    def p_mcnemar(self) -> float:
        """P-value of McNemar's exact two-sided test: both losses are equally likely to diverge alone."""
        return float(stats.binomtest(self.candidate_only, self.discordant).pvalue) if self.discordant else 1.0


@dataclass(frozen=True)
class Pairs:
    """The P complete pairs among S.

    Attributes
    ----------
    values : mapping of str to ndarray [2, P]
        Each metric, candidate first, with scores for diverged runs.
    present : ndarray of bool [S]
        True for a complete pair.
    failures : Failures
        Counts of diverged and missing runs.
    num_valid : int
        Number of pairs in which both runs finished.
    """

    values: Mapping[str, Floats]
    present: Bools
    failures: Failures
    num_valid: int

    def are_identical(self, same_bits: Bools) -> bool:
        """Tell whether weights [S] and metrics agree in every complete pair, and both runs of a pair finished."""
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
    """Collect the complete pairs.

    Parameters
    ----------
    candidate, reference : mapping of str to array_like [S]
        Values of each metric, one for each seed. Values of a run that is not `ok` are ignored.
    candidate_status, reference_status : sequence of {"ok", "diverged", "missing"}, or None
        Status of each run; None: all are `ok`.
    num_classes : int
        Number of classes C.

    Returns
    -------
    Pairs

    Raises
    ------
    ValueError
        A run declared `ok` has a value that is not finite, or a status is unknown or missing.
    """
    values = {name: np.array([candidate[name], reference[name]], dtype=np.float64) for name in candidate}
    statuses = _statuses(candidate_status, reference_status, shape=next(iter(values.values())).shape)
    _check_finite(values, statuses == "ok")
    present = np.logical_and(*np.isin(statuses, ("ok", "diverged")))
    diverged = (statuses == "diverged")[:, present]
    scored = {k: intention_to_treat(k, v[:, present], diverged, num_classes) for k, v in values.items()}
    failures = _count_failures(diverged, missing=int(np.sum(~present)))
    return Pairs(scored, present, failures, num_valid=int(np.sum(~diverged.any(axis=0))))


def intention_to_treat(name: str, values: Floats, diverged: Bools, num_classes: int) -> Floats:
    """Replace the value of every diverged run in a metric [2, S] by the score of a failure."""
    worst = float(values[np.isfinite(values)].max(initial=0.0))
    return np.where(diverged, METRICS[name].score_of_failure(num_classes, worst), values)


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
