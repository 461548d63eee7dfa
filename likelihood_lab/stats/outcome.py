"""Decision whether two losses trained the same model, from the metrics of paired seeds.

A diverged run is scored, a missing run is counted. Neither is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from likelihood_lab.stats.equivalence import (
    MIN_PAIRS_EQUIVALENT,
    MetricFinding,
    SeedCount,
    compare_metric,
    holm,
    sd_upper_limit,
    seeds_needed,
    seeds_to_differ,
)
from likelihood_lab.stats.pairs import METRICS, Failures, Pairs, Status, pair_up

Word = Literal["identical", "equivalent", "inconclusive", "different", "not_run"]

MIN_PAIRS_PROVISIONAL = 5


@dataclass(frozen=True)
class OutcomeFinding:
    """Result for one candidate.

    Attributes
    ----------
    word : {"identical", "equivalent", "inconclusive", "different", "not_run"}
        The decision.
    level : float
        Significance level alpha.
    num_valid : int
        Number of pairs in which both runs finished.
    failures : Failures
        Counts of diverged and missing runs.
    metrics : mapping of str to MetricFinding
        Results of the single metrics.
    reasons : tuple of str
        Reasons why the word is `different`, or not stronger.
    provisional : bool
        All tests pass, but on 5 to 9 pairs only.
    p_equivalent, p_different : float or None
        P-values of the decision after the correction over metrics. None if no test decided.
    seeds_needed : int, "unreachable" or None
        Number of seeds for a decision if the true difference is 0. If that many seeds were inconclusive, the
        observed difference is assumed.
    """

    word: Word
    level: float
    num_valid: int
    failures: Failures
    metrics: Mapping[str, MetricFinding]
    reasons: tuple[str, ...] = ()
    provisional: bool = False
    p_equivalent: float | None = None
    p_different: float | None = None
    seeds_needed: SeedCount | None = None

    @property
    def collapse_rate_bound(self) -> float | None:
        """Upper 95 % confidence limit (Clopper-Pearson) of the rate at which the candidate diverges."""
        failed = self.failures.candidate_only + self.failures.both
        num_pairs = self.num_valid + self.failures.reference_only + failed
        if not num_pairs:
            return None
        return float(stats.binomtest(failed, num_pairs, alternative="less").proportion_ci(0.95).high)


def compare(
    candidate: Mapping[str, ArrayLike],
    reference: Mapping[str, ArrayLike],
    *,
    primary: Sequence[str],
    margins: Mapping[str, float] | None,
    num_classes: int,
    candidate_status: Sequence[Status] | None = None,
    reference_status: Sequence[Status] | None = None,
    bitwise_identical: ArrayLike | None = None,
    alpha: float = 0.05,
    next_alpha: float | None = None,
    max_seeds: int = 1000,
) -> OutcomeFinding:
    """Compare a candidate with the reference over S paired seeds.

    * identical: weights and metrics are bitwise equal in every pair, for any S. Nothing is tested.
    * different: after Holm, a primary |mean| exceeds its margin, or one loss diverges more often. Without margins:
      a primary mean is not 0, in at least 6 seeds.
    * equivalent: TOST passes for every primary metric, both runs finished in at least 10 pairs, and no seed diverged
      under one loss alone. TOST over metrics is an intersection-union test and needs no correction.
    * inconclusive: none of these. A missing pair excludes `identical` and `equivalent`, but not `different`.
    * not_run: no pair is complete.

    Parameters
    ----------
    candidate, reference : mapping of str to array_like [S]
        Values of each metric, one for each seed, seeds in the same order. Keys are names of `pairs.METRICS`.
    primary : sequence of str
        Metrics that decide. The others are computed in the same way, but do not decide.
    margins : mapping of str to float, or None
        Equivalence margin of each metric, in units of its scale.
    num_classes : int
        Number of classes C, for the score of a diverged run.
    candidate_status, reference_status : sequence of {"ok", "diverged", "missing"}, optional
        Status of each run; `ok` by default. Values of a run that is not `ok` are ignored.
    bitwise_identical : array_like of bool [S], optional
        True where the weights of the pair are equal bit for bit.
    alpha : float
        Significance level, in (0, 0.5).
    next_alpha : float, optional
        Level of the look that `seeds_needed` is computed for; `alpha` by default.
    max_seeds : int
        Upper limit of `seeds_needed`.

    Returns
    -------
    OutcomeFinding

    Raises
    ------
    ValueError
        A run declared `ok` has a value that is not finite, a primary metric has no margin, or an argument is out of
        range.

    Examples
    --------
    >>> runs = {"nll": [0.30, 0.31, 0.29]}
    >>> compare(runs, runs, primary=["nll"], margins=None, num_classes=10, bitwise_identical=[True] * 3).word
    'identical'
    """
    margins = margins or {}
    _check_request(candidate, primary, margins, alpha)
    pairs = pair_up(candidate, reference, candidate_status, reference_status, num_classes)
    if not pairs.present.any():
        return OutcomeFinding("not_run", alpha, 0, pairs.failures, {}, ("no pair is complete",))
    finding = _undecided(pairs, margins, alpha)
    if bitwise_identical is not None and pairs.are_identical(np.asarray(bitwise_identical, dtype=bool)):
        return _without_test(finding)
    return _add_seeds_needed(_decide(finding, primary), primary, next_alpha or alpha, max_seeds)


def correct_for_arms(
    findings: Mapping[str, OutcomeFinding], *, claim: Literal["each", "all"] = "each"
) -> dict[str, OutcomeFinding]:
    """Correct the candidates of one reference by Holm; a word that is no longer significant becomes inconclusive.

    Candidates that were decided without a test (bitwise identity, no variance) are not part of the family.

    Parameters
    ----------
    findings : mapping of str to OutcomeFinding
        Results of all candidates of one reference.
    claim : {"each", "all"}
        With "all", equivalence is claimed for all candidates together. This is an intersection-union test and needs
        no correction. Differences are corrected in both cases.

    Returns
    -------
    dict of str to OutcomeFinding
    """
    corrected = _survivors(findings, "different", {name: f.p_different for name, f in findings.items()})
    if claim == "all":
        return corrected
    return _survivors(corrected, "equivalent", {name: f.p_equivalent for name, f in findings.items()})


def _undecided(pairs: Pairs, margins: Mapping[str, float], alpha: float) -> OutcomeFinding:
    metrics = {
        name: compare_metric(values, METRICS[name].scale, margins.get(name), alpha=alpha)
        for name, values in pairs.values.items()
    }
    return OutcomeFinding(
        word="inconclusive",
        level=alpha,
        num_valid=pairs.num_valid,
        failures=pairs.failures,
        metrics=metrics,
    )


def _without_test(finding: OutcomeFinding) -> OutcomeFinding:
    """Decide if every complete pair is bitwise identical: `identical` unless a pair is missing."""
    blocked = _integrity_reasons(finding.failures)
    return replace(finding, word="inconclusive" if blocked else "identical", reasons=blocked)


def _decide(finding: OutcomeFinding, primary: Sequence[str]) -> OutcomeFinding:
    grounds, p_different = _grounds_for_different(finding, primary)
    p_tost = [p for name in primary if (p := finding.metrics[name].p_tost) is not None]
    finding = replace(finding, p_different=p_different, p_equivalent=max(p_tost, default=None))
    if grounds:
        return replace(finding, word="different", reasons=grounds)
    blocked = _integrity_reasons(finding.failures) + _metric_reasons(finding.metrics, primary)
    if finding.num_valid >= MIN_PAIRS_EQUIVALENT:
        return replace(finding, word="inconclusive" if blocked else "equivalent", reasons=blocked)
    few = f"both runs finished in {finding.num_valid} pairs and equivalence needs {MIN_PAIRS_EQUIVALENT}"
    provisional = not blocked and finding.num_valid >= MIN_PAIRS_PROVISIONAL
    return replace(finding, reasons=(*blocked, few), provisional=provisional)


def _grounds_for_different(finding: OutcomeFinding, primary: Sequence[str]) -> tuple[tuple[str, ...], float | None]:
    """Reasons for `different` after Holm, and the smallest adjusted p (None if a difference needs no test).

    A metric without variance stays in the family with p = 1. Divergence is part of the family only if a seed diverged
    under one loss alone. Otherwise its p is always 1, so that it can be left out (Tarone 1990).
    """
    metrics, failures = finding.metrics, finding.failures
    family = {name: p if (p := metrics[name].p_difference) is not None else 1.0 for name in primary}
    if failures.discordant:
        family["divergence"] = failures.p_mcnemar
    adjusted = _holm_by_name(family)
    untested = [name for name in primary if metrics[name].different and metrics[name].p_difference is None]
    tested = [name for name in primary if metrics[name].different and adjusted[name] <= finding.level]
    grounds = [f"{_effect(name, metrics[name])} in all {metrics[name].n} seeds" for name in untested]
    grounds += [f"{_effect(name, metrics[name])}, p = {adjusted[name]:.2g}" for name in tested]
    if adjusted.get("divergence", 1.0) <= finding.level:
        grounds.append(f"{_divergence(failures)}, p = {adjusted['divergence']:.2g}")
    return tuple(grounds), None if untested else min(adjusted.values())


def _survivors(
    findings: Mapping[str, OutcomeFinding], word: Word, p_values: Mapping[str, float | None]
) -> dict[str, OutcomeFinding]:
    adjusted = _holm_by_name({name: p for name, p in p_values.items() if p is not None})
    weakened = dict(findings)
    for name, finding in findings.items():
        claimed = finding.word == word or (word == "equivalent" and finding.provisional)
        if claimed and adjusted.get(name, 0.0) > finding.level:
            reason = f"{word} alone, not after Holm over {len(adjusted)} losses, p = {adjusted[name]:.2g}"
            reasons = (*finding.reasons, reason)
            weakened[name] = replace(finding, word="inconclusive", provisional=False, reasons=reasons)
    return weakened


def _holm_by_name(p_values: Mapping[str, float]) -> dict[str, float]:
    return dict(zip(p_values, holm(list(p_values.values())).tolist(), strict=True))


def _add_seeds_needed(finding: OutcomeFinding, primary: Sequence[str], alpha: float, max_seeds: int) -> OutcomeFinding:
    metrics = [finding.metrics[name] for name in primary]
    needed = _seeds_at_zero(metrics, alpha, max_seeds)
    if isinstance(needed, int) and needed <= finding.num_valid and finding.word == "inconclusive":
        needed = _seeds_at_observed(metrics, alpha, max_seeds)  # these seeds would have decided a difference of 0
    return replace(finding, seeds_needed=needed)


def _seeds_at_zero(metrics: Sequence[MetricFinding], alpha: float, max_seeds: int) -> SeedCount | None:
    """Seeds for 80 % power in every metric if the means are 0, with each sd at its upper 80 % limit."""
    most = MIN_PAIRS_EQUIVALENT
    for m in metrics:
        if m.margin is None or m.sd is None:
            return None
        needed = seeds_needed(sd_upper_limit(m.sd, m.n), m.margin, alpha=alpha, max_seeds=max_seeds)
        if needed == "unreachable":
            return needed
        most = max(most, needed)
    return most


def _seeds_at_observed(metrics: Sequence[MetricFinding], alpha: float, max_seeds: int) -> SeedCount | None:
    """Seeds for 80 % power if the true means are the observed ones.

    If a mean exceeds its margin, the seeds are those that show a difference, otherwise those that show equivalence.
    """
    counts: list[SeedCount] = []
    beyond = [m for m in metrics if m.margin is not None and abs(m.mean_difference) > m.margin]
    for m in beyond or metrics:
        if m.margin is None or m.sd is None:
            return None
        if beyond:
            counts.append(seeds_to_differ(m.sd, m.margin, abs(m.mean_difference), alpha=alpha, max_seeds=max_seeds))
        else:
            mean = abs(m.mean_difference)
            counts.append(seeds_needed(m.sd, m.margin, alpha=alpha, mean=mean, max_seeds=max_seeds))
    known = [count for count in counts if isinstance(count, int)]
    if beyond:
        return max(MIN_PAIRS_EQUIVALENT, min(known)) if known else "unreachable"
    return max(MIN_PAIRS_EQUIVALENT, max(known)) if len(known) == len(counts) else "unreachable"


def _integrity_reasons(failures: Failures) -> tuple[str, ...]:
    missing = (f"pairs without a result: {failures.missing}",) if failures.missing else ()
    return missing + ((_divergence(failures),) if failures.discordant else ())


def _metric_reasons(metrics: Mapping[str, MetricFinding], primary: Sequence[str]) -> tuple[str, ...]:
    if any(metrics[name].margin is None for name in primary):
        return ("no margins are declared, so equivalence cannot be tested",)
    return tuple(_not_equivalent(name, metrics[name]) for name in primary if not metrics[name].equivalent)


def _not_equivalent(name: str, metric: MetricFinding) -> str:
    if metric.ci_tost is None and metric.margin and abs(metric.mean_difference) < metric.margin:
        return f"{name}: {metric.mean_difference:+.3g} without a spread, in too few seeds ({metric.n})"
    if metric.ci_tost is None:
        shown = f"{metric.mean_difference:+.3g} in all {metric.n} seeds"
    else:
        shown = "the {:.0%} interval [{:+.3g}, {:+.3g}]".format(1 - 2 * metric.level, *metric.ci_tost)
    return f"{name}: {shown}, not inside the margin of {metric.margin:g}"


def _effect(name: str, metric: MetricFinding) -> str:
    limit = "" if metric.margin is None else f" (margin {metric.margin:g})"
    return f"{name} differs by {metric.mean_difference:+.3g}{limit}"


def _divergence(failures: Failures) -> str:
    arms = f"candidate {failures.candidate_only}, reference {failures.reference_only}"
    return f"seeds that diverged under one loss alone: {failures.discordant} ({arms})"


def _check_request(
    metrics: Mapping[str, ArrayLike], primary: Sequence[str], margins: Mapping[str, float], alpha: float
) -> None:
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must lie in (0, 0.5), got {alpha}")
    if not primary or not set(primary) <= set(metrics) <= set(METRICS):
        raise ValueError(f"primary {list(primary)} must be among {list(metrics)}, these among {[*METRICS]}")
    if margins and not set(primary) <= set(margins):
        raise ValueError(f"every primary metric of {list(primary)} needs a margin, got {list(margins)}")
    if not all(0 < margin < math.inf for margin in margins.values()):
        raise ValueError(f"margins must be positive and finite, got {dict(margins)}")
