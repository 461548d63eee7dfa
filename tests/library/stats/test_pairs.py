from __future__ import annotations

import math

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar

from likelihood_lab.stats.pairs import Failures, Pairs, Status, pair_up

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
def test_p_mcnemar_matches_statsmodels(b: int, c: int) -> None:
    expected = mcnemar([[7, b], [c, 2]], exact=True).pvalue
    assert Failures(candidate_only=b, reference_only=c, both=2, missing=0).p_mcnemar == pytest.approx(expected)


def test_pair_up_scores_a_failure_as_the_uniform_prediction() -> None:
    """The finite value of a diverged run is ignored, and its ECE is the worst."""
    uniform = np.full(NUM_CLASSES, 1 / NUM_CLASSES)
    expected = {
        "nll": -math.log(uniform[0]),
        "brier": np.sum((uniform - np.eye(NUM_CLASSES)[3]) ** 2),
        "accuracy": uniform[0],
        "ece": 1.0,
    }
    good = {name: [0.1, 0.1] for name in expected}
    for value in (NAN, 0.01):
        failed = {name: [value, 0.1] for name in expected}
        scored = pair_up(failed, good, ["diverged", "ok"], None, NUM_CLASSES).values
        assert {name: float(values[0, 0]) for name, values in scored.items()} == pytest.approx(expected)


def test_pair_up_scores_a_failure_at_least_as_the_worst_run() -> None:
    assert pair_nll([NAN, 0.1], [0.1, 7.5], ["diverged", "ok"]).values["nll"][0, 0] == 7.5


def test_pair_up_counts_failures_and_leaves_out_missing_pairs() -> None:
    candidate: list[Status] = ["ok", "diverged", "diverged", "ok", "missing", "ok", "missing"]
    reference: list[Status] = ["ok", "ok", "diverged", "diverged", "ok", "missing", "diverged"]
    pairs = pair_nll([0.1, NAN, NAN, 0.1, NAN, 0.1, NAN], [0.1, 0.1, NAN, NAN, 0.1, NAN, NAN], candidate, reference)
    assert pairs.failures == Failures(candidate_only=1, reference_only=1, both=1, missing=3)
    assert pairs.failures.discordant == 2
    assert pairs.num_valid == 1
    assert pairs.present.tolist() == [True] * 4 + [False] * 3
    assert pairs.values["nll"].shape == (2, 4)


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_pair_up_refuses_undeclared_non_finite_values(bad: float) -> None:
    with pytest.raises(ValueError, match="nll is not finite in a run declared ok"):
        pair_nll([0.1, bad], [0.1, 0.1])
    with pytest.raises(ValueError, match="nll is not finite in a run declared ok"):
        pair_nll([0.1, NAN], [0.1, bad], ["ok", "missing"])


def test_pair_up_needs_a_known_status_for_every_seed() -> None:
    with pytest.raises(ValueError, match="one status"):
        pair_nll([0.1, 0.1], [0.1, 0.1], ["ok", "crashed"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="one status"):
        pair_nll([0.1, 0.1], [0.1, 0.1], ["ok", "ok", "ok"], ["ok", "ok", "ok"])


def test_are_identical_needs_equal_bits_values_and_a_finished_pair() -> None:
    both, fails, dead = np.array([True, True]), ["ok", "diverged"], ["diverged"] * 2
    assert pair_nll([0.1, 0.2], [0.1, 0.2]).are_identical(both)
    assert not pair_nll([0.1, 0.2], [0.1, 0.2]).are_identical(np.array([True, False]))
    assert not pair_nll([0.1, np.nextafter(0.2, 1)], [0.1, 0.2]).are_identical(both)
    assert pair_nll([0.1, NAN], [0.1, NAN], fails, fails).are_identical(both)  # type: ignore[arg-type]
    assert not pair_nll([NAN] * 2, [NAN] * 2, dead, dead).are_identical(both)  # type: ignore[arg-type]
    one_fails = pair_nll([0.1, NAN], [0.1, math.log(NUM_CLASSES)], fails)  # type: ignore[arg-type]
    np.testing.assert_array_equal(*one_fails.values["nll"])
    assert not one_fails.are_identical(both)
