from __future__ import annotations

import math

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from likelihood_lab.stats.pairs import Failures, Pairs, Status, collapse_rate_bound, pair_up

NUM_CLASSES = 10
NAN = math.nan


def pair_nll(
    candidate: list[float],
    reference: list[float],
    candidate_status: list[Status] | None = None,
    reference_status: list[Status] | None = None,
) -> Pairs:
    return pair_up({"nll": candidate}, {"nll": reference}, candidate_status, reference_status, NUM_CLASSES)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (3, 5), (0, 6), (10, 1)])
def test_mcnemar_agrees_with_statsmodels(b: int, c: int) -> None:
    expected = mcnemar([[7, b], [c, 2]], exact=True).pvalue
    assert Failures(candidate_only=b, reference_only=c, both=2, missing=0).p_mcnemar == pytest.approx(expected)


@pytest.mark.parametrize(("seeds", "percent"), [(5, 45), (10, 26), (30, 9.5)])
def test_no_failure_bounds_the_collapse_rate_as_published(seeds: int, percent: float) -> None:
    assert collapse_rate_bound(0, seeds) == pytest.approx(1 - 0.05 ** (1 / seeds))
    assert 100 * collapse_rate_bound(0, seeds) == pytest.approx(percent, abs=0.5)


def test_failures_bound_the_collapse_rate_as_clopper_and_pearson_do() -> None:
    _, upper = proportion_confint(3, 10, alpha=0.1, method="beta")
    assert collapse_rate_bound(3, 10) == pytest.approx(upper)
    assert collapse_rate_bound(10, 10) == 1.0


def test_a_failure_scores_what_the_uniform_prediction_scores() -> None:
    uniform = np.full(NUM_CLASSES, 1 / NUM_CLASSES)
    brier = np.sum((uniform - np.eye(NUM_CLASSES)[3]) ** 2)
    good = {"nll": [0.1, 0.1], "brier": [0.05, 0.05], "accuracy": [0.97, 0.97]}
    failed = {name: [NAN, 0.1] for name in good}
    pairs = pair_up(failed, good, ["diverged", "ok"], None, NUM_CLASSES)
    assert pairs.values["nll"][0, 0] == pytest.approx(-math.log(uniform[0]))
    assert pairs.values["brier"][0, 0] == pytest.approx(brier)
    assert pairs.values["accuracy"][0, 0] == pytest.approx(uniform[0])


def test_a_failure_is_never_more_likely_than_the_worst_run_that_finished() -> None:
    pairs = pair_nll([NAN, 0.1], [0.1, 7.5], ["diverged", "ok"])
    assert pairs.values["nll"][0, 0] == 7.5


def test_calibration_does_not_flatter_a_failure() -> None:
    pairs = pair_up({"ece": [NAN, 0.02]}, {"ece": [0.01, 0.02]}, ["diverged", "ok"], None, NUM_CLASSES)
    assert pairs.values["ece"][0, 0] == 1.0


def test_the_finite_value_of_a_diverged_run_is_not_taken_at_its_word() -> None:
    assert pair_nll([0.01, 0.1], [0.1, 0.1], ["diverged", "ok"]).values["nll"][0, 0] == math.log(NUM_CLASSES)


def test_failures_are_counted_by_arm_and_holes_are_left_out() -> None:
    candidate: list[Status] = ["ok", "diverged", "diverged", "ok", "missing", "ok", "missing"]
    reference: list[Status] = ["ok", "ok", "diverged", "diverged", "ok", "missing", "diverged"]
    pairs = pair_nll([0.1, NAN, NAN, 0.1, NAN, 0.1, NAN], [0.1, 0.1, NAN, NAN, 0.1, NAN, NAN], candidate, reference)
    assert pairs.failures == Failures(candidate_only=1, reference_only=1, both=1, missing=3)
    assert pairs.failures.discordant == 2
    assert pairs.num_valid == 1
    assert pairs.present.tolist() == [True] * 4 + [False] * 3
    assert pairs.values["nll"].shape == (2, 4)
    assert pairs.collapse_rate_bound == collapse_rate_bound(2, 4)


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_value_that_is_not_finite_must_be_declared(bad: float) -> None:
    with pytest.raises(ValueError, match="nll is not finite in a run declared ok"):
        pair_nll([0.1, bad], [0.1, 0.1])
    with pytest.raises(ValueError, match="nll is not finite in a run declared ok"):
        pair_nll([0.1, NAN], [0.1, bad], ["ok", "missing"])


def test_every_seed_needs_a_known_status() -> None:
    with pytest.raises(ValueError, match="one status"):
        pair_nll([0.1, 0.1], [0.1, 0.1], ["ok", "crashed"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="one status"):
        pair_nll([0.1, 0.1], [0.1, 0.1], ["ok", "ok", "ok"], ["ok", "ok", "ok"])


def test_identity_needs_bits_and_values_and_a_run_that_finished() -> None:
    both = np.array([True, True])
    assert pair_nll([0.1, 0.2], [0.1, 0.2]).are_identical(both)
    assert not pair_nll([0.1, 0.2], [0.1, 0.2]).are_identical(np.array([True, False]))
    assert not pair_nll([0.1, np.nextafter(0.2, 1)], [0.1, 0.2]).are_identical(both)
    assert pair_nll([0.1, NAN], [0.1, NAN], ["ok", "diverged"], ["ok", "diverged"]).are_identical(both)
    assert not pair_nll([NAN] * 2, [NAN] * 2, ["diverged"] * 2, ["diverged"] * 2).are_identical(both)


def test_a_failure_under_one_arm_alone_is_no_identity_even_at_equal_scores() -> None:
    uniform = math.log(NUM_CLASSES)
    pairs = pair_nll([0.1, NAN], [0.1, uniform], ["ok", "diverged"])
    np.testing.assert_array_equal(pairs.values["nll"][0], pairs.values["nll"][1])
    assert not pairs.are_identical(np.array([True, True]))
