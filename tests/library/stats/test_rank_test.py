"""The dithered rank test: an exact null, and no more false alarms than it promises."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from likelihood_lab.stats.trajectory import rank_test, two_sided


def arms(shift: float, seeds: int, copies: int = 9, width: int = 20) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(int(1000 * shift) + seeds)
    found = {step: rng.standard_normal((seeds, copies + 1, width)) for step in (1, 10)}
    for values in found.values():
        values[:, 0] += shift
    return found


def test_the_null_distribution_is_that_of_enumerated_ranks() -> None:
    sums = [sum(ranks) for ranks in product(range(1, 5), repeat=3)]
    for total in range(3, 13):
        lower = np.mean([s <= total for s in sums])
        upper = np.mean([s >= total for s in sums])
        assert two_sided(total, 3, 4) == pytest.approx(min(1.0, 2 * min(lower, upper)))


@pytest.mark.parametrize("seeds", [5, 10])
def test_an_exchangeable_candidate_is_rejected_as_often_as_promised(seeds: int) -> None:
    rng = np.random.default_rng(0)
    studies = 1000
    rejected = 0
    for _ in range(studies):
        values = {step: rng.standard_normal((seeds, 10, 5)) for step in (1, 10)}
        rejected += rank_test(values, rng).rejects()
    assert rejected / studies <= 0.05 + 3 * (0.05 * 0.95 / studies) ** 0.5


def test_a_candidate_that_lies_apart_is_found_and_ranks_high() -> None:
    found = rank_test(arms(2.0, seeds=5), np.random.default_rng(0))
    assert found.rejects()
    assert all(rank > 0.9 for rank in found.mean_rank.values())


def test_one_that_lies_too_near_is_found_too() -> None:
    values = arms(0.0, seeds=10)
    for step in values:
        values[step][:, 0] = values[step].mean(1)  # as a deterministic rounding would among dithered ones
    found = rank_test(values, np.random.default_rng(0))
    assert found.rejects()
    assert all(rank < 0.1 for rank in found.mean_rank.values())


def test_ties_are_broken_at_random_and_never_decide() -> None:
    same = {1: np.ones((10, 10, 4))}
    ranks = [rank_test(same, np.random.default_rng(seed)).mean_rank[1] for seed in range(200)]
    assert np.mean(ranks) == pytest.approx(0.5, abs=0.03)
    assert np.mean([rank_test(same, np.random.default_rng(seed)).rejects() for seed in range(200)]) < 0.1


@pytest.mark.parametrize("shape", [(0, 10, 4), (5, 2, 4)])
def test_too_little_to_rank_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="the rank test needs"):
        rank_test({1: np.zeros(shape)}, np.random.default_rng(0))
