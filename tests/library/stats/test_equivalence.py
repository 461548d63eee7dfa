from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from likelihood_lab.stats.equivalence import (
    Floats,
    MetricFinding,
    compare_metric,
    holm,
    minimum_effect,
    paired_differences,
    power_of_tost,
    sd_upper_limit,
    seeds_needed,
    seeds_to_differ,
    tost,
)

MARGIN = 0.01


def compare_accuracy(differences: Floats, margin: float | None = MARGIN, *, alpha: float = 0.05) -> MetricFinding:
    """Candidate and reference whose differences are exactly the given ones: the reference scores 0."""
    return compare_metric(np.stack([differences, np.zeros_like(differences)]), "difference", margin, alpha=alpha)


def noisy_pairs(seed: int, n: int) -> Floats:
    rng = np.random.default_rng(seed)
    reference = 0.9 + 0.01 * rng.standard_normal(n)
    return np.stack([reference + 0.003 * rng.standard_normal(n), reference])


def normal_scores(n: int) -> Floats:
    """Normal quantiles at equal steps: a sample of mean 0."""
    return stats.norm.ppf((np.arange(n) + 0.5) / n)


@pytest.mark.parametrize("n", [2, 3, 10, 100])
def test_compare_metric_matches_statsmodels_tost(n: int) -> None:
    candidate, reference = noisy_pairs(n, n)
    p, (_, p_lower, _), (_, p_upper, _) = ttost_paired(candidate, reference, -0.004, 0.004)
    found = compare_metric(np.stack([candidate, reference]), "difference", 0.004, alpha=0.05)
    assert (found.p_lower, found.p_upper, found.p_tost) == pytest.approx((p_lower, p_upper, p), abs=1e-12)


def test_compare_metric_matches_statsmodels_on_log_ratios() -> None:
    values = noisy_pairs(1, 12)
    p, *_ = ttost_paired(values[0], values[1], math.exp(-0.004), math.exp(0.004), transform=np.log)
    assert compare_metric(values, "log_ratio", 0.004, alpha=0.05).p_tost == pytest.approx(p, abs=1e-12)


def test_tests_and_intervals_match_scipys() -> None:
    values = noisy_pairs(2, 9)
    found = compare_metric(values, "difference", 0.004, alpha=0.01)
    expected = stats.ttest_rel(*values)
    assert found.p_zero == pytest.approx(expected.pvalue, abs=1e-12)
    assert found.ci_tost == pytest.approx(expected.confidence_interval(0.98))
    assert found.ci_difference == pytest.approx(expected.confidence_interval(0.99))


@settings(max_examples=50, deadline=None)
@given(mean=st.floats(-3, 3), sd=st.floats(0.05, 2), n=st.integers(2, 30), alpha=st.sampled_from([0.01, 0.025, 0.05]))
def test_compare_metric_decides_as_its_intervals_do(mean: float, sd: float, n: int, alpha: float) -> None:
    found = compare_accuracy(mean + sd * normal_scores(n), margin=1.0, alpha=alpha)
    assert found.ci_tost is not None
    assert found.ci_difference is not None
    assert found.equivalent == (max(map(abs, found.ci_tost)) < 1.0)
    assert found.different == (found.ci_difference[0] > 1.0 or found.ci_difference[1] < -1.0)
    assert found.excludes_zero == (found.ci_difference[0] > 0 or found.ci_difference[1] < 0)
    assert not (found.equivalent and found.different)


@settings(max_examples=50, deadline=None)
@given(
    differences=st.lists(st.floats(-0.1, 0.1), min_size=1, max_size=20),
    margin=st.floats(1e-4, 0.1),
    factor=st.floats(1.0, 100.0),
)
def test_compare_metric_is_monotone_in_the_margin(differences: list[float], margin: float, factor: float) -> None:
    narrow, wide = (compare_accuracy(np.array(differences), m) for m in (margin, margin * factor))
    assert wide.equivalent >= narrow.equivalent
    assert wide.different <= narrow.different


# Per cent of studies of normal differences, margin 1: (mean, sd, word) and one value for each number of seeds.
SEEDS = (3, 5, 10, 20, 30, 100)
OPERATING_CHARACTERISTICS = {
    (1.0, 0.5, "equivalent"): (5.2, 4.7, 5.2, 5.3, 5.0, 5.0),
    (0.0, 0.5, "equivalent"): (56, 95, 100, 100, 100, 100),
    (0.0, 1.0, "equivalent"): (13, 30, 80, 99, 100, 100),
    (2.0, 1.0, "different"): (18, 40, 81, 99, 100, 100),
}


@pytest.mark.parametrize("case", OPERATING_CHARACTERISTICS, ids=str)
def test_tests_have_the_published_error_rates(case: tuple[float, float, str]) -> None:
    mean, sd, word = case
    studies, published_studies = 4000, 20_000
    rng = np.random.default_rng(20_240_501)
    for n, percent in zip(SEEDS, OPERATING_CHARACTERISTICS[case], strict=True):
        differences = mean + sd * rng.standard_normal((studies, n))
        p = np.maximum(*tost(differences, 1.0)) if word == "equivalent" else minimum_effect(differences, 1.0)
        rate = percent / 100
        noise = 3 * math.sqrt(rate * (1 - rate) * (1 / studies + 1 / published_studies))
        rounding = 0.0005 if percent < 10 else 0.005
        assert np.mean(p <= 0.05) == pytest.approx(rate, abs=noise + rounding), f"{n} seeds"


@pytest.mark.parametrize(("n", "percent"), [(5, 16.0), (10, 13.0), (30, 9.7), (100, 7.3)])
def test_tost_has_the_published_error_under_outward_skew(n: int, percent: float) -> None:
    differences = 1.0 + 0.5 * (np.random.default_rng(7).exponential(size=(4000, n)) - 1.0)
    rate = percent / 100
    noise = 3 * math.sqrt(rate * (1 - rate) * (1 / 4000 + 1 / 20_000))
    assert np.mean(np.maximum(*tost(differences, 1.0)) <= 0.05) == pytest.approx(rate, abs=noise + 0.005)


@pytest.mark.parametrize("m", [2, 3, 10])
def test_holm_matches_statsmodels(m: int) -> None:
    p = np.random.default_rng(m).uniform(0, 0.1, m)
    np.testing.assert_allclose(holm(p.tolist()), multipletests(p, method="holm")[1], atol=1e-15)
    assert holm([]).size == 0


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1])
def test_holm_refuses_values_outside_0_to_1(bad: float) -> None:
    with pytest.raises(ValueError, match="p-values"):
        holm([0.01, bad])


@pytest.mark.parametrize(
    ("sd", "n", "mean"),
    [(0.5, 3, 0.0), (1.0, 2, 0.0), (1.0, 11, 0.0), (1.0, 20, 0.25), (3.0, 79, -0.25), (0.5, 5, 1.0)],
)
def test_power_of_tost_matches_simulation(sd: float, n: int, mean: float) -> None:
    studies = 20_000
    differences = mean + sd * np.random.default_rng(n).standard_normal((studies, n))
    power = power_of_tost(sd, 1.0, n, mean=mean)
    error = math.sqrt(power * (1 - power) / studies)
    assert np.mean(np.maximum(*tost(differences, 1.0)) <= 0.05) == pytest.approx(power, abs=3.5 * error)


def test_power_of_tost_is_symmetric_free_of_units_and_alpha_at_the_margin() -> None:
    power = power_of_tost(0.8, 1.0, 12, mean=0.3)
    assert power_of_tost(0.8, 1.0, 12, mean=-0.3) == pytest.approx(power, abs=1e-12)
    assert power_of_tost(8e-5, 1e-4, 12, mean=3e-5) == pytest.approx(power, abs=1e-12)
    assert power_of_tost(1.0, 1.0, 500, alpha=0.025, mean=1.0) == pytest.approx(0.025, abs=1e-9)


def test_power_of_tost_is_continuous_at_the_limits_of_sd() -> None:
    assert power_of_tost(0.0, 1.0, 2) == 1.0
    assert power_of_tost(1e-9, 1.0, 2) == pytest.approx(1.0, abs=1e-8)
    assert power_of_tost(0.0, 1.0, 2, mean=1.0) == 0.0
    assert power_of_tost(1e9, 1.0, 2) == pytest.approx(0.0, abs=1e-8)
    assert power_of_tost(1e-9, 1.0, 1) == 0.0


@pytest.mark.parametrize(
    ("ratio", "for_80", "for_90"),
    [(0.5, 4, 5), (0.75, 7, 8), (1, 11, 13), (1.2, 14, 18), (math.sqrt(2), 19, 24), (2, 36, 45), (3, 79, 99),
     (4, 139, 175), (1 / 0.3, 97, 122)],
)  # fmt: skip
def test_seeds_needed_are_the_published_ones(ratio: float, for_80: int, for_90: int) -> None:
    assert seeds_needed(ratio, 1.0, power=0.8) == for_80
    assert seeds_needed(ratio * 0.01, 0.01, power=0.9) == for_90


def test_seeds_needed_are_the_fewest_with_the_power() -> None:
    n = seeds_needed(1.7, 1.0, mean=0.25, alpha=0.025)
    assert isinstance(n, int)
    power, fewer = (power_of_tost(1.7, 1.0, size, mean=0.25, alpha=0.025) for size in (n, n - 1))
    assert fewer < 0.8 <= power


def test_seeds_needed_beyond_the_limit_are_unreachable() -> None:
    assert seeds_needed(4.0, 1.0, max_seeds=139) == 139
    assert seeds_needed(4.0, 1.0, max_seeds=138) == "unreachable"
    assert seeds_needed(0.1, 1.0, mean=1.0) == "unreachable"


def test_seeds_to_differ_have_the_power_in_simulation() -> None:
    n = seeds_to_differ(1.0, 1.0, 2.0)
    assert isinstance(n, int)
    rng = np.random.default_rng(0)
    power = {size: np.mean(minimum_effect(2 + rng.standard_normal((20_000, size)), 1.0) <= 0.05) for size in (n - 1, n)}
    assert power[n - 1] < 0.81
    assert power[n] >= 0.79


def test_seeds_to_differ_at_the_limits() -> None:
    assert seeds_to_differ(1.0, 1.0, 1.0) == "unreachable"
    assert seeds_to_differ(1.0, 1.0, 1.001, max_seeds=100) == "unreachable"
    assert seeds_to_differ(0.0, 1.0, 1.5) == 2


def test_sd_upper_limit_covers_four_times_in_five() -> None:
    sds = np.random.default_rng(3).standard_normal((2000, 6)).std(axis=1, ddof=1)
    covered = np.mean([sd_upper_limit(float(sd), 6) > 1.0 for sd in sds])
    assert covered == pytest.approx(0.8, abs=3 * math.sqrt(0.16 / 2000))


# --- differences without variance


@pytest.mark.parametrize(
    ("difference", "n", "alpha", "word"),
    [(0.004, n, 0.05, "equivalent" if n >= 10 else "") for n in (1, 2, 9, 10)]
    + [(sign * 0.02, n, 0.05, "different" if n >= 6 else "") for sign in (-1, 1) for n in (1, 5, 6, 10)]
    + [(MARGIN, 12, 0.05, ""), (-MARGIN, 12, 0.05, "")]
    + [(0.02, 6, 0.025, ""), (0.02, 7, 0.025, "different")]
    + [(0.0, 10, 2.0**-11, ""), (0.0, 11, 2.0**-11, "equivalent")],
)
def test_compare_metric_of_equal_differences_counts_seeds(difference: float, n: int, alpha: float, word: str) -> None:
    found = compare_accuracy(np.full(n, difference), alpha=alpha)
    assert (found.equivalent, found.different) == (word == "equivalent", word == "different")
    assert found.mean_difference == pytest.approx(difference)
    assert (found.p_tost, found.p_difference, found.p_zero, found.ci_tost, found.ci_difference) == (None,) * 5


def test_compare_metric_takes_rounding_for_no_variance() -> None:
    reference = np.linspace(0.1, 0.99, 12)
    found = compare_metric(np.stack([reference + 0.02, reference]), "difference", MARGIN, alpha=0.05)
    assert np.ptp(reference + 0.02 - reference) > 0
    assert found.p_difference is None
    assert found.different


def test_compare_metric_of_nan_decides_nothing() -> None:
    values = noisy_pairs(3, 5)
    values[0, 1] = math.nan
    found = compare_metric(values, "difference", MARGIN, alpha=0.05)
    assert not any((found.equivalent, found.different, found.excludes_zero))
    assert found.p_tost is not None
    assert math.isnan(found.p_tost)


# --- without a margin


@pytest.mark.parametrize("n", [2, 5, 6, 20])
def test_compare_metric_without_a_margin_needs_six_seeds(n: int) -> None:
    found = compare_accuracy(0.02 + 1e-4 * normal_scores(n), margin=None)
    assert found.different == (n >= 6)
    assert not found.equivalent
    assert found.p_tost is None
    assert found.ci_tost is not None
    equal = compare_accuracy(np.zeros(n), margin=None)
    assert (equal.equivalent, equal.different) == (False, False)


# --- scales


def test_paired_differences_are_candidate_minus_reference() -> None:
    """A log ratio takes NLLs below the epsilon of float64 as equal."""
    np.testing.assert_allclose(paired_differences([0.9, 0.8], [0.8, 0.9], "difference"), [0.1, -0.1])
    np.testing.assert_allclose(paired_differences([0.2, math.nan], [0.1, 0.1], "log_ratio"), [math.log(2), math.nan])
    np.testing.assert_array_equal(paired_differences([0.0, 0.0, 1e-17], [0.0, 1e-17, 0.0], "log_ratio"), 0.0)


def test_pair_correlation_is_pearsons_from_three_varying_pairs() -> None:
    values = noisy_pairs(5, 12)
    found = compare_metric(values, "difference", MARGIN, alpha=0.05)
    assert found.pair_correlation == pytest.approx(stats.pearsonr(*values).statistic)
    assert compare_metric(values[:, :2], "difference", MARGIN, alpha=0.05).pair_correlation is None
    assert compare_accuracy(values[0]).pair_correlation is None
