"""Tests of equivalence and of difference for one metric over paired seeds, and the number of seeds they need.

A difference is candidate minus reference, one for each seed. Equivalence is shown by two one-sided tests against a
margin (TOST). The absence of a significant difference does not show it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

Floats = NDArray[np.float64]
Interval = tuple[float, float]
Scale = Literal["difference", "log_ratio"]
SeedCount = int | Literal["unreachable"]

RESOLUTION = 1e-12  # a smaller spread of differences is rounding of the float64 metrics and counts as no variance
MIN_PAIRS_EQUIVALENT = 10
MIN_PAIRS_DIFFERENT = 6  # without a t-test against a margin: fewer equal signs are not significant at 5 %


@dataclass(frozen=True)
class MetricFinding:
    """Result for one metric, before any correction for several metrics or losses.

    Attributes
    ----------
    scale : {"difference", "log_ratio"}
        Scale on which candidate and reference are subtracted.
    n : int
        Number of pairs.
    level : float
        Significance level alpha.
    margin : float or None
        Equivalence margin, in units of the scale.
    mean_difference, sd : float
        Mean and standard deviation of the differences. `sd` is None for one pair.
    pair_correlation : float or None
        Pearson correlation of candidate and reference over seeds. None for fewer than three pairs or a constant.
    equivalent, different : bool
        Results of TOST and of the minimum-effect test at `level`.
    ci_tost : (float, float) or None
        1 - 2 alpha interval of the mean. It lies inside the margin iff the metric is equivalent.
    ci_difference : (float, float) or None
        1 - alpha interval of the mean. It lies outside the margin iff the metric is different.
    p_lower, p_upper, p_tost : float or None
        P-values of mean <= -margin and of mean >= margin, and the larger of the two.
    p_difference, p_zero : float or None
        P-values of |mean| <= margin and of mean = 0.

    Notes
    -----
    Intervals and p-values are None if the differences have no variance. Without a margin, `p_lower`, `p_upper` and
    `p_tost` are None.
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
        """Tell whether the mean differs from 0 significantly. This is possible for an equivalent metric too."""
        return self.p_zero is not None and self.p_zero <= self.level


def compare_metric(values: Floats, scale: Scale, margin: float | None, *, alpha: float) -> MetricFinding:
    """Compare candidate and reference in one metric.

    Differences without variance (a range within RESOLUTION, or one seed) are not tested. They are equivalent if all
    lie inside the margin and there are max(10, log2(1 / alpha)) seeds. They are different if all lie outside it on
    one side and there are max(6, log2(2 / alpha)) seeds. Without a margin, a difference is tested against RESOLUTION
    and needs 6 seeds.

    Parameters
    ----------
    values : ndarray [2, S]
        Metric of the candidate and of the reference for each seed.
    scale : {"difference", "log_ratio"}
        Scale on which the two are subtracted.
    margin : float or None
        Equivalence margin, in units of the scale.
    alpha : float
        Significance level.

    Returns
    -------
    MetricFinding
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
    """Subtract the reference from the candidate for each seed [S], as logarithms for a log ratio. NaN stays NaN."""
    return np.subtract(_on_scale(candidate, scale), _on_scale(reference, scale))


def tost(differences: Floats, margin: float) -> tuple[Floats, Floats]:
    """Compute two one-sided paired t-tests over the last axis.

    Parameters
    ----------
    differences : ndarray [..., S]
        Candidate minus reference for each seed.
    margin : float
        Equivalence margin, in units of the differences.

    Returns
    -------
    p_lower, p_upper : ndarray [...]
        P-values in [0, 1] of mean <= -margin and of mean >= margin. Both at most alpha: equivalent at level alpha.

    References
    ----------
    Schuirmann (1987), J. Pharmacokinet. Biopharm. 15, 657-680.

    Examples
    --------
    >>> p_lower, p_upper = tost(np.array([0.001, -0.002, 0.0, 0.001]), margin=0.01)
    >>> bool(max(p_lower, p_upper) < 0.05)
    True
    """
    mean, se, df = _moments(differences)
    p_lower, p_upper = stats.t.sf(np.stack([mean + margin, margin - mean]) / se, df)
    return p_lower, p_upper


def minimum_effect(differences: Floats, margin: float) -> Floats:
    """Compute the p-value of |mean| <= margin over the last axis: the two-sided paired t-test at margin 0.

    The p-value is min(1, 2 P(t_{S-1} > (|mean| - margin) / SE)) with SE = sd / sqrt(S). It is at most alpha iff the
    1 - alpha interval of the mean lies outside the margin.

    Parameters
    ----------
    differences : ndarray [..., S]
        Candidate minus reference for each seed.
    margin : float
        Largest mean difference that does not matter, in units of the differences.

    Returns
    -------
    ndarray [...]
        P-values in [0, 1].
    """
    mean, se, df = _moments(differences)
    return np.minimum(1.0, 2 * stats.t.sf((np.abs(mean) - margin) / se, df))


def holm(p_values: Sequence[float]) -> Floats:
    """Adjust p-values by Holm's method: the i-th smallest of m is multiplied by m - i + 1 and made monotone.

    Parameters
    ----------
    p_values : sequence of float
        P-values in [0, 1].

    Returns
    -------
    ndarray [m]
        Adjusted p-values, in the given order.

    Raises
    ------
    ValueError
        A p-value is NaN or lies outside [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must lie in [0, 1], got {p_values}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return adjusted


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(128)


def power_of_tost(sd: float, margin: float, n: int, *, alpha: float = 0.05, mean: float = 0.0) -> float:
    """Compute the probability that TOST finds n normal differences equivalent.

    The value is the integral over u from 0 to umax of

        [Phi((h - mean) / SE) - Phi((-h - mean) / SE)] f(u),  h = margin - t_{1-alpha,n-1} u SE,

    where SE = sd / sqrt(n), u = observed sd / true sd has the density f of chi_{n-1} / sqrt(n-1), and h(umax) = 0.

    Parameters
    ----------
    sd, mean : float
        True standard deviation and mean of the differences.
    margin : float
        Equivalence margin.
    n : int
        Number of seeds. The power is 0 for fewer than 2.
    alpha : float
        Significance level.

    Returns
    -------
    float
        Power in [0, 1], by Gauss-Legendre quadrature.
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
    h = margin - t * u * se
    p_inside = special.ndtr((h - mean) / se) - special.ndtr((-h - mean) / se)
    return float((high - low) / 2 * np.sum(_WEIGHTS * p_inside * _spread_density(u, df)))


def seeds_needed(
    sd: float,
    margin: float,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    mean: float = 0.0,
    max_seeds: int = 1000,
) -> SeedCount:
    """Return the smallest number of seeds for which TOST has the given power.

    Parameters
    ----------
    sd, mean : float
        True standard deviation and mean of the differences.
    margin : float
        Equivalence margin.
    alpha, power : float
        Significance level, and the probability of finding equivalence.
    max_seeds : int
        Largest number that is tried.

    Returns
    -------
    int or "unreachable"
        A number from 2 to `max_seeds`, or "unreachable".

    Examples
    --------
    >>> seeds_needed(sd=1.0, margin=1.0)
    11
    """
    return _first_size(lambda n: power_of_tost(sd, margin, n, alpha=alpha, mean=mean) >= power, max_seeds)


def seeds_to_differ(
    sd: float, margin: float, mean: float, *, alpha: float = 0.05, power: float = 0.8, max_seeds: int = 1000
) -> SeedCount:
    """Return the smallest number of seeds for which the minimum-effect test has the given power.

    The power is P(t > t_{1-alpha/2,n-1}), where t is noncentral with parameter (mean - margin) sqrt(n) / sd.
    The parameters are those of `seeds_needed`; `mean` must exceed the margin, otherwise the result is "unreachable".
    """
    if not mean > margin:
        return "unreachable"

    def suffices(n: int) -> bool:
        beyond = (mean - margin) * math.sqrt(n) / sd if sd > 0 else math.inf
        return sd == 0 or 1 - float(special.nctdtr(n - 1, beyond, -special.stdtrit(n - 1, alpha / 2))) >= power

    return _first_size(suffices, max_seeds)


def sd_upper_limit(sd: float, n: int) -> float:
    """Compute the upper 80 % confidence limit of a standard deviation that was estimated from n normal values."""
    return sd * math.sqrt((n - 1) / float(special.chdtri(n - 1, 0.8)))


def _first_size(suffices: Callable[[int], bool], max_seeds: int) -> SeedCount:
    """Find the smallest n from 2 to max_seeds that suffices, by bisection: a larger n suffices too."""
    sizes = range(2, max_seeds + 1)
    first = bisect_left(sizes, True, key=suffices)
    return sizes[first] if first < len(sizes) else "unreachable"


def _spread_density(u: Floats, df: int) -> Floats:
    """Density of chi_df / sqrt(df), the ratio of observed to true standard deviation, at u > 0."""
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
    mean, se, df = _moments(differences)
    low, high = np.array(stats.t.interval([1 - 2 * alpha, 1 - alpha], df, loc=mean, scale=se))
    p_difference = float(minimum_effect(differences, margin or RESOLUTION))
    finding = replace(
        finding,
        different=p_difference <= alpha and (margin is not None or finding.n >= MIN_PAIRS_DIFFERENT),
        ci_tost=(float(low[0]), float(high[0])),
        ci_difference=(float(low[1]), float(high[1])),
        p_difference=p_difference,
        p_zero=float(minimum_effect(differences, 0.0)),
    )
    if margin is None:
        return finding
    p_lower, p_upper = map(float, tost(differences, margin))
    p_tost = max(p_lower, p_upper)
    return replace(finding, equivalent=p_tost <= alpha, p_lower=p_lower, p_upper=p_upper, p_tost=p_tost)


def _on_scale(values: ArrayLike, scale: Scale) -> Floats:
    """Take logarithms for a ratio. Values below the epsilon of float64, such as an NLL of 0, count as epsilon."""
    raw = np.asarray(values, dtype=np.float64)
    return raw if scale == "difference" else np.log(np.maximum(raw, np.finfo(np.float64).eps))


def _moments(differences: Floats) -> tuple[Floats, Floats, int]:
    n = differences.shape[-1]
    return differences.mean(axis=-1), differences.std(axis=-1, ddof=1) / math.sqrt(n), n - 1


def _pair_correlation(values: Floats) -> float | None:
    """Pearson's r of candidate and reference; None for two points, which always correlate, and for a constant."""
    if values.shape[1] < 3 or np.ptp(values, axis=1).min() <= RESOLUTION:
        return None
    return float(np.corrcoef(values[0], values[1])[0, 1])
