"""The outcome axis: did two losses train the same model? Yardsticks of paired seeds in, a finding out.

A run that failed is part of the outcome, a run that is missing is a hole in it: neither is ever dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

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
    """The word for one candidate, with everything that a sentence about it needs.

    `reasons` says why the word is not a stronger one, or what makes it `different`. `provisional`: all tests
    pass, on 5 to 9 pairs. `num_valid` counts the pairs in which both runs finished. `p_equivalent` and
    `p_different` stand behind the word after the correction over metrics; None where no test decided.
    `seeds_needed` assumes a true difference of 0, or the one seen where that many seeds have not decided;
    `seeds_needed_shifted` assumes one of a quarter of the margin.
    `collapse_rate_bound` is the upper 95 % limit of the rate at which the candidate diverges.
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
    seeds_needed_shifted: SeedCount | None = None
    collapse_rate_bound: float | None = None


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
    """The outcome of a candidate against the reference over S paired seeds.

    Each mapping holds one value a seed, [S], seeds in the same order. A run without a result is declared by
    its status (all `ok` when omitted) and its values are ignored. `bitwise_identical` [S]: the weights of the
    pair are equal bit for bit. Only the primary metrics decide; the others are examined alike and shown.

    * identical: weights and yardsticks are bitwise equal in every pair, whatever S; nothing is tested.
    * different: after Holm, some primary |mean| exceeds its margin, or one arm diverges more often. Without
      margins: some primary mean is not 0, in 6 seeds at least.
    * equivalent: TOST passes for every primary metric (intersection-union, hence no correction), both runs
      finished in at least 10 pairs, and no seed diverged under one arm alone.
    * inconclusive: none of these. A missing pair rules out sameness; it does not silence a difference.
    * not_run: no pair is complete.

    `seeds_needed` is for a verdict at `next_alpha`, the level of the look that would use them; alpha where omitted.

    Raises ValueError where a run declared `ok` has a value that is not finite, a primary metric lacks its
    margin, or an argument is out of range.
    """
    margins = margins or {}
    _check_request(candidate, primary, margins, alpha)
    pairs = pair_up(candidate, reference, candidate_status, reference_status, num_classes)
    if not pairs.present.any():
        return OutcomeFinding("not_run", alpha, 0, pairs.failures, {}, ("no pair is complete",))
    finding = _undecided(pairs, margins, alpha)
    if bitwise_identical is not None and pairs.are_identical(np.asarray(bitwise_identical, dtype=bool)):
        return _without_test(finding)
    return _with_seeds_needed(_decided(finding, primary), primary, next_alpha or alpha, max_seeds)


def correct_for_arms(
    findings: Mapping[str, OutcomeFinding], *, claim: Literal["each", "all"] = "each"
) -> dict[str, OutcomeFinding]:
    """Holm over the candidates of one reference: a word that does not survive becomes inconclusive.

    The claim that *all* are equivalent is an intersection-union and needs no correction; a difference always
    does. Candidates decided without a test (bitwise identity, no variance) are not part of the family.
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
        collapse_rate_bound=pairs.collapse_rate_bound,
    )


def _without_test(finding: OutcomeFinding) -> OutcomeFinding:
    """Every complete pair is bitwise identical: only a missing one stands in the way of the word."""
    blocked = _integrity_reasons(finding.failures)
    return replace(finding, word="inconclusive" if blocked else "identical", reasons=blocked)


def _decided(finding: OutcomeFinding, primary: Sequence[str]) -> OutcomeFinding:
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
    """What shows a difference after Holm, in words; the smallest adjusted p (None where no test is needed).

    A metric without variance stays in the family with p = 1. Divergence joins it only when some seed diverged
    under one arm alone: otherwise its p is 1 whatever the truth, and it raises no false alarm (Tarone 1990).
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


def _with_seeds_needed(finding: OutcomeFinding, primary: Sequence[str], alpha: float, max_seeds: int) -> OutcomeFinding:
    metrics = [finding.metrics[name] for name in primary]
    centred, shifted = (_advised_seeds(metrics, shift, alpha, max_seeds) for shift in (0.0, 0.25))
    if isinstance(centred, int) and centred <= finding.num_valid and finding.word == "inconclusive":
        centred = _advised_as_seen(metrics, alpha, max_seeds)  # a difference of 0 would have been decided by now
    return replace(finding, seeds_needed=centred, seeds_needed_shifted=shifted)


def _advised_seeds(metrics: Sequence[MetricFinding], shift: float, alpha: float, max_seeds: int) -> SeedCount | None:
    """Seeds for 80 % power in every metric: its sd at the upper 80 % limit, its mean at shift x margin."""
    advised = MIN_PAIRS_EQUIVALENT
    for m in metrics:
        if m.margin is None or m.sd is None:
            return None
        sd = sd_upper_limit(m.sd, m.n)
        needed = seeds_needed(sd, m.margin, alpha=alpha, mean=shift * m.margin, max_seeds=max_seeds)
        if needed == "unreachable":
            return needed
        advised = max(advised, needed)
    return advised


def _advised_as_seen(metrics: Sequence[MetricFinding], alpha: float, max_seeds: int) -> SeedCount | None:
    """Seeds for 80 % power if the true means are those seen: for a difference where one lies beyond its margin."""
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
