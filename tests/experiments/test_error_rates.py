"""Reproduce the published error rates in a reduced form, with the functions that trials use."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest

from experiments.error_rates import simulate
from experiments.error_rates.simulate import SCENARIOS, STUDIES, Row, rate, standard_error

STUDIES_HERE = 300


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return simulate.table(STUDIES_HERE, sizes=(10, 30))


@pytest.fixture(scope="module")
def published() -> list[dict[str, str]]:
    with (simulate.HERE / "error_rates.csv").open() as file:
        return list(csv.DictReader(file))


def test_no_simulated_rate_exceeds_its_bound(rows: list[Row]) -> None:
    assert [row.scenario.name for row in rows if row.exceeded(STUDIES_HERE)] == []


def test_published_table_is_reproduced(rows: list[Row], published: list[dict[str, str]]) -> None:
    """Each cell lies within four standard errors, so about one in a hundred such tests fails by chance."""
    table = {(entry["truth"], entry["says"], int(entry["seeds"])): float(entry["percent"]) for entry in published}
    assert {name for name, _, _ in table} == {scenario.name for scenario in SCENARIOS}
    assert all(int(entry["studies"]) >= STUDIES for entry in published)
    for row in rows:
        for seeds, percent in row.percents.items():
            known = table[row.scenario.name, row.scenario.counted, seeds]
            here = standard_error(min(max(known, 0.5), 99.5), STUDIES_HERE)
            assert abs(percent - known) <= 4 * here, (row.scenario.name, seeds, percent, known)


def test_no_published_rate_exceeds_its_bound(published: list[dict[str, str]]) -> None:
    for entry in published:
        if entry["bound"] and int(entry["seeds"]) >= 10:
            bound, studies = float(entry["bound"]), int(entry["studies"])
            assert float(entry["percent"]) <= bound + 3 * standard_error(bound, studies), entry


def test_exceeded_detects_a_rate_above_its_bound() -> None:
    scenario = next(s for s in SCENARIOS if s.name == "at the margin, sigma .5")
    assert Row(scenario, {10: 5 + 4 * standard_error(5, 1000)}).exceeded(1000) == [10]
    assert Row(scenario, {10: 5 + 2 * standard_error(5, 1000)}).exceeded(1000) == []


def test_looks_without_a_protocol_inflate_the_error_rate() -> None:
    naive = next(s for s in SCENARIOS if s.name == "four looks, each at the full alpha")
    assert rate(naive, 40, 1000) > 5 + 3 * standard_error(5, 1000)


def test_scenarios_draw_from_the_stated_distributions() -> None:
    rng = np.random.default_rng(0)
    skewed = np.concatenate([simulate.skewed(rng, 1000).differences[0, 0] for _ in range(50)])
    jumping = np.concatenate([simulate.jumping(rng, 1000).differences[0, 0] for _ in range(50)])
    for drawn in (skewed, jumping):
        assert drawn.mean() == pytest.approx(1, abs=0.02)
        assert drawn.std() == pytest.approx(0.5, abs=0.02)
    assert ((skewed - 1) ** 3).mean() / 0.125 == pytest.approx(2, abs=0.3)  # an exponential's skewness
    both = simulate.correlated((0.0, 0.0), 1.0, 0.9)(rng, 20_000).differences[0]
    assert np.corrcoef(both)[0, 1] == pytest.approx(0.9, abs=0.01)
    ended = simulate.collapsing(0.2)(rng, 20_000).candidate
    assert ended is not None
    assert np.mean([word == "diverged" for word in ended[0]]) == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / 20_000))
