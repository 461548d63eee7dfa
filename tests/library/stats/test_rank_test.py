from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from likelihood_lab.stats.trajectory import rank_test, two_sided


def arms(shift: float, seeds: int, copies: int = 9, width: int = 20) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(int(1000 * shift) + seeds)
    weights = {step: rng.standard_normal((seeds, copies + 1, width)) for step in (1, 10)}
    for values in weights.values():
        values[:, 0] += shift
    return weights


def test_two_sided_matches_enumerated_ranks() -> None:
    sums = np.array([sum(ranks) for ranks in product(range(1, 5), repeat=3)])
    for total in range(3, 13):
        expected = min(1.0, 2 * min(np.mean(sums <= total), np.mean(sums >= total)))
        assert two_sided(total, 3, 4) == pytest.approx(expected)


@pytest.mark.parametrize("seeds", [5, 10])
def test_rank_test_of_an_exchangeable_candidate_keeps_its_level(seeds: int) -> None:
    rng = np.random.default_rng(0)
    studies = 1000
    rejected = sum(
        rank_test({step: rng.standard_normal((seeds, 10, 5)) for step in (1, 10)}, rng).rejects()
        for _ in range(studies)
    )
    assert rejected / studies <= 0.05 + 3 * (0.05 * 0.95 / studies) ** 0.5


def test_rank_test_rejects_a_distant_candidate() -> None:
    found = rank_test(arms(2.0, seeds=5), np.random.default_rng(0))
    assert found.rejects()
    assert all(rank > 0.9 for rank in found.mean_rank.values())


def test_rank_test_rejects_a_candidate_near_the_mean() -> None:
    """Deterministic rounding among dithered copies lies too near to their mean."""
    values = arms(0.0, seeds=10)
    for step in values:
        values[step][:, 0] = values[step].mean(1)
    found = rank_test(values, np.random.default_rng(0))
    assert found.rejects()
    assert all(rank < 0.1 for rank in found.mean_rank.values())


def test_rank_test_breaks_ties_at_random() -> None:
    found = [rank_test({1: np.ones((10, 10, 4))}, np.random.default_rng(seed)) for seed in range(200)]
    assert np.mean([finding.mean_rank[1] for finding in found]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([finding.rejects() for finding in found]) < 0.1


@pytest.mark.parametrize("shape", [(0, 10, 4), (5, 2, 4)])
def test_rank_test_refuses_too_few_arms(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="the rank test needs"):
        rank_test({1: np.zeros(shape)}, np.random.default_rng(0))
