"""One metric over paired seeds: tests of equivalence and of difference, intervals, how many seeds they need.

Differences are candidate minus reference, one a seed. Sameness is a claim that has to be shown (two one-sided
tests against a margin), never the absence of a significant difference.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Floats = NDArray[np.float64]
Interval = tuple[float, float]
Scale = Literal["difference", "log_ratio"]
SeedCount = int | Literal["unreachable"]

RESOLUTION = 1e-12  # a smaller spread of differences is rounding of the float64 yardsticks: no variance
MIN_PAIRS_EQUIVALENT = 10
MIN_PAIRS_DIFFERENT = 6  # where no t-test against a margin applies: fewer equal signs prove nothing at 5 %


@dataclass(frozen=True)
class MetricFinding:
    """One metric on its own, before any correction for several metrics or arms.

    `level` is alpha. `ci_tost` covers 1 - 2 alpha and lies inside the margin iff the metric is equivalent;
    `ci_difference` covers 1 - alpha and lies wholly outside iff it is different. `p_lower` is the p-value of
    mean <= -margin, `p_upper` of mean >= margin, `p_tost` the larger of the two, `p_difference` that of
    |mean| <= margin, `p_zero` that of mean = 0. Intervals and p-values are None where the differences have no
    variance, those of TOST also without a margin.
    """

    scale: Scale
    n: int
    level: float
    margin: float | None
    mean_difference: float
    sd: float | None
    pair_correlation: float | None
    equivalent: bool
    different: bool
    ci_tost: Interval | None = None
    ci_difference: Interval | None = None
    p_lower: float | None = None
    p_upper: float | None = None
    p_tost: float | None = None
    p_difference: float | None = None
    p_zero: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """The mean difference has a reliable sign; an equivalent metric may have one inside its margin."""
        return self.p_zero is not None and self.p_zero <= self.level


def compare_metric(values: Floats, scale: Scale, margin: float | None, *, alpha: float) -> MetricFinding:
    """What the values [2, S] of candidate and reference show; the margin is in units of the scale.

    Differences without variance (a spread within RESOLUTION, or one seed) are not tested. They are
    equivalent if all lie inside the margin in max(10, log2(1/alpha)) seeds, different if all lie outside it
    on one side in max(6, log2(2/alpha)). Without a margin RESOLUTION takes its place in the search for a
    difference, which then needs 6 seeds in any case.
    """
    differences = paired_differences(values[0], values[1], scale)
    finding = MetricFinding(
        scale=scale,
        n=differences.size,
        level=alpha,
        margin=margin,
        mean_difference=float(differences.mean()),
        sd=float(differences.std(ddof=1)) if differences.size > 1 else None,
        pair_correlation=_pair_correlation(_on_scale(values, scale)),
        equivalent=False,
        different=False,
    )
    return (_untested if np.ptp(differences) <= RESOLUTION else _tested)(finding, differences)


def paired_differences(candidate: ArrayLike, reference: ArrayLike, scale: Scale) -> Floats:
    """Candidate minus reference, seed by seed [S]; a log ratio where the scale says so. NaN stays NaN."""
    return np.subtract(_on_scale(candidate, scale), _on_scale(reference, scale))


def tost(differences: Floats, margin: float) -> tuple[Floats, Floats]:
    """Two one-sided paired t-tests over the last axis [..., S]: p of mean <= -margin, of mean >= margin."""
    mean, se, df = _moments(differences)
    return _upper_tail((mean + margin) / se, df), _upper_tail((margin - mean) / se, df)


def minimum_effect(differences: Floats, margin: float) -> Floats:
    """p of |mean| <= margin over the last axis [..., S]; the ordinary two-sided paired t-test at margin 0.

    At most alpha iff the 1 - alpha interval lies wholly outside the margin.
    """
    mean, se, df = _moments(differences)
    return np.minimum(1.0, 2 * _upper_tail((np.abs(mean) - margin) / se, df))


def holm(p_values: Sequence[float]) -> Floats:
    """Holm's adjusted p-values, in the order given: the i-th smallest of m times m - i + 1, made monotone."""
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must lie in [0, 1], got {p_values}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return adjusted


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(128)


def power_of_tost(sd: float, margin: float, n: int, *, alpha: float = 0.05, mean: float = 0.0) -> float:
    """Probability that n normal differences of the given true mean and sd come out equivalent. Exact:

        int_0^umax [Phi((h - mean) / SE) - Phi((-h - mean) / SE)] f(u) du,  h = margin - t_{1-alpha,n-1} u SE

    with SE = sd / sqrt(n), u = observed sd / true sd ~ chi_{n-1} / sqrt(n-1) of density f, h(umax) = 0.
    """
    if n < 2:
        return 0.0
    if sd == 0:
        return float(abs(mean) < margin)
    df, se = n - 1, sd / math.sqrt(n)
    t = -special.stdtrit(df, alpha)
    low, high = np.sqrt(special.chdtri(df, [1 - 1e-12, 1e-12]) / df)
    high = min(high, margin / (t * se))
    if high <= low:
        return 0.0
    u = low + (high - low) * (_NODES + 1) / 2
    reach = margin - t * u * se
    inside = special.ndtr((reach - mean) / se) - special.ndtr((-reach - mean) / se)
    return float((high - low) / 2 * np.sum(_WEIGHTS * inside * _spread_density(u, df)))


def seeds_needed(
    sd: float,
    margin: float,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    mean: float = 0.0,
    max_seeds: int = 1000,
) -> SeedCount:
    """The fewest seeds at which TOST reaches the power; `unreachable` beyond max_seeds."""

    def suffices(n: int) -> bool:
        return power_of_tost(sd, margin, n, alpha=alpha, mean=mean) >= power

    sizes = range(2, max_seeds + 1)
    first = bisect_left(sizes, True, key=suffices)
    return sizes[first] if first < len(sizes) else "unreachable"


def seeds_to_differ(
    sd: float, margin: float, mean: float, *, alpha: float = 0.05, power: float = 0.8, max_seeds: int = 1000
) -> SeedCount:
    """The fewest seeds at which the minimum-effect test finds a mean beyond the margin, with that power.

    P(t > t_{1-alpha/2, n-1}) for t noncentral with (mean - margin) sqrt(n) / sd; `unreachable` beyond max_seeds.
    """
    if not mean > margin:
        return "unreachable"

    def suffices(n: int) -> bool:
        beyond = (mean - margin) * math.sqrt(n) / sd if sd > 0 else math.inf
        return sd == 0 or 1 - float(special.nctdtr(n - 1, beyond, -special.stdtrit(n - 1, alpha / 2))) >= power

    sizes = range(2, max_seeds + 1)
    first = bisect_left(sizes, True, key=suffices)
    return sizes[first] if first < len(sizes) else "unreachable"


def sd_upper_limit(sd: float, n: int) -> float:
    """Upper 80 % confidence limit of a standard deviation estimated from n normal values."""
    return sd * math.sqrt((n - 1) / float(special.chdtri(n - 1, 0.8)))


def _spread_density(u: Floats, df: int) -> Floats:
    """Density of chi_df / sqrt(df) at u > 0: what an observed standard deviation is of the true one."""
    log_norm = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
    return np.exp(log_norm + (df - 1) * np.log(u) - df * u**2 / 2)


def _untested(finding: MetricFinding, differences: Floats) -> MetricFinding:
    n, alpha, margin = finding.n, finding.level, finding.margin
    beyond = margin or RESOLUTION
    inside = margin is not None and bool((np.abs(differences) < margin).all())
    outside = bool((differences > beyond).all() or (differences < -beyond).all())
    return replace(
        finding,
        equivalent=inside and n >= max(MIN_PAIRS_EQUIVALENT, math.log2(1 / alpha)),
        different=outside and n >= max(MIN_PAIRS_DIFFERENT, math.log2(2 / alpha)),
    )


def _tested(finding: MetricFinding, differences: Floats) -> MetricFinding:
    margin, alpha = finding.margin, finding.level
    p_difference = float(minimum_effect(differences, margin or RESOLUTION))
    finding = replace(
        finding,
        ci_tost=_interval(differences, tail=alpha),
        ci_difference=_interval(differences, tail=alpha / 2),
        p_difference=p_difference,
        p_zero=float(minimum_effect(differences, 0.0)),
    )
    if margin is None:
        return replace(finding, different=p_difference <= alpha and finding.n >= MIN_PAIRS_DIFFERENT)
    p_lower, p_upper = map(float, tost(differences, margin))
    p_tost = max(p_lower, p_upper)
    finding = replace(finding, equivalent=p_tost <= alpha, different=p_difference <= alpha)
    return replace(finding, p_lower=p_lower, p_upper=p_upper, p_tost=p_tost)


def _on_scale(values: ArrayLike, scale: Scale) -> Floats:
    """Logarithms for a ratio. A mean negative log-likelihood below one ulp of 1 is rounding, as is zero."""
    raw = np.asarray(values, dtype=np.float64)
    return raw if scale == "difference" else np.log(np.maximum(raw, np.finfo(np.float64).eps))


def _moments(differences: Floats) -> tuple[Floats, Floats, int]:
    n = differences.shape[-1]
    return differences.mean(axis=-1), differences.std(axis=-1, ddof=1) / math.sqrt(n), n - 1


def _upper_tail(t: Floats, df: int) -> Floats:
    return np.asarray(special.stdtr(df, -t), dtype=np.float64)


def _interval(differences: Floats, tail: float) -> Interval:
    mean, se, df = _moments(differences)
    reach = -float(special.stdtrit(df, tail)) * float(se)
    return float(mean) - reach, float(mean) + reach


def _pair_correlation(values: Floats) -> float | None:
    """Pearson's r of the arms over seeds: what pairing buys. Two points always correlate, constants never."""
    if values.shape[1] < 3 or np.ptp(values, axis=1).min() <= RESOLUTION:
        return None
    return float(np.corrcoef(values[0], values[1])[0, 1])
