"""Test the decomposition of the variance over seeds on results with known parts."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from experiments.seed_variance.decompose import disagreement, outside, ratio_interval, rule_of_thumb, spread

SEEDS = 40


def independent_errors(random: np.random.Generator, examples: int, shift: float = 0.0) -> np.ndarray:
    """Draw hits [seeds, examples]. Each example has its own probability; a seed shifts all of them alike."""
    chances = random.uniform(0.3, 0.7, examples) + shift * random.standard_normal((SEEDS, 1))
    return (random.random((SEEDS, examples)) < chances).astype(float)


def test_spread_has_the_variance_and_a_95_percent_interval() -> None:
    random = np.random.default_rng(0)
    found = [spread(random.standard_normal((SEEDS, 1)).repeat(2, 1)) for _ in range(2000)]
    assert np.mean([s.sd**2 for s in found]) == pytest.approx(1, abs=0.03)
    assert np.mean([s.sd_low <= 1 <= s.sd_high for s in found]) == pytest.approx(0.95, abs=0.015)


def test_spread_of_independent_errors_is_the_test_sets() -> None:
    random = np.random.default_rng(1)
    found = [spread(independent_errors(random, 200)) for _ in range(400)]
    total, test_set = (np.mean([getattr(s, name) ** 2 for s in found]) for name in ("sd", "test_set_sd"))
    assert test_set == pytest.approx(total, rel=0.03)
    assert test_set == pytest.approx((0.25 - 0.4**2 / 12) / 200, rel=0.01)  # E p(1 - p) / N
    assert np.mean([s.distribution_sd == 0 for s in found]) > 0.4  # half of the estimates of 0 lie below it


@pytest.mark.parametrize("examples", [20, 200])
def test_spread_of_a_common_shift_is_the_distributions(examples: int) -> None:
    random = np.random.default_rng(2)
    found = [spread(independent_errors(random, examples, shift=0.1)) for _ in range(600)]
    assert np.mean([s.distribution_sd**2 for s in found]) == pytest.approx(0.1**2, rel=0.05)


def test_spread_of_equal_runs_is_zero() -> None:
    found = spread(np.tile([1.0, 0.0, 1.0], (SEEDS, 1)))
    assert found.sd == found.sd_high == found.distribution_sd == 0
    assert np.isnan(found.test_set_share)


def test_disagreement_is_the_mean_over_pairs() -> None:
    predicted = np.random.default_rng(3).integers(0, 4, (7, 50))
    by_pairs = np.mean([(a != b).mean() for a, b in combinations(predicted, 2)])
    assert disagreement(predicted) == pytest.approx(by_pairs, rel=1e-12)


def test_ratio_interval_has_95_percent_coverage() -> None:
    random = np.random.default_rng(4)
    mine, reference = (scale * random.standard_normal((2000, 25)) for scale in (2.0, 1.0))
    pairs = zip(mine.std(1, ddof=1), reference.std(1, ddof=1), strict=True)
    intervals = [ratio_interval(a, b, 25) for a, b in pairs]
    assert np.mean([low <= 2 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.015)


def test_rule_of_thumb_holds_for_a_calibrated_ensemble() -> None:
    """Two classes, with a symmetric distribution of probabilities: E p(1 - p) = error / 2."""
    chances = np.random.default_rng(5).uniform(0, 1, 200_000)
    error = np.mean(2 * chances * (1 - chances))  # error of a model drawn with the same probabilities
    assert rule_of_thumb(1 - error, 100) ** 2 == pytest.approx(np.mean(chances * (1 - chances)) / 100, rel=1e-9)


def test_outside_names_a_new_sd_beyond_the_recorded_interval() -> None:
    recorded = pd.DataFrame({"setting": ["digits"] * 2, "vary": ["all", "bit"], "metric": ["nll"] * 2})
    recorded = recorded.assign(sd=[1.0, 0.0], sd_low=[0.8, 0.0], sd_high=[1.3, 0.0])
    assert outside(recorded, recorded) == []
    assert outside(recorded.assign(sd=[1.4, 0.0]), recorded) == ["digits all nll"]
    assert outside(recorded.assign(sd=[1.0, 0.1]), recorded) == ["digits bit nll"]
