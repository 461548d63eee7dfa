"""The error rates that are published, reproduced in a reduced form through the functions that decide."""

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


def test_no_rate_that_is_promised_is_exceeded(rows: list[Row]) -> None:
    exceeded = {row.scenario.name: row.exceeded(STUDIES_HERE) for row in rows if row.exceeded(STUDIES_HERE)}
    assert exceeded == {}


def test_the_published_table_is_what_the_code_gives(rows: list[Row]) -> None:
    """Each cell within four standard errors of both, so that about one in a hundred such tests would fail by chance."""
    with (simulate.HERE / "error_rates.csv").open() as file:
        published = {(entry["truth"], entry["says"], int(entry["seeds"])): entry for entry in csv.DictReader(file)}
    assert {name for name, _, _ in published} == {scenario.name for scenario in SCENARIOS}
    assert all(int(entry["studies"]) >= STUDIES for entry in published.values())
    for row in rows:
        for seeds, percent in row.percents.items():
            known = float(published[row.scenario.name, row.scenario.counted, seeds]["percent"])
            here = standard_error(min(max(known, 0.5), 99.5), STUDIES_HERE)
            assert abs(percent - known) <= 4 * here, (row.scenario.name, seeds, percent, known)


def test_no_published_rate_exceeds_its_bound() -> None:
    with (simulate.HERE / "error_rates.csv").open() as file:
        for entry in csv.DictReader(file):
            if entry["bound"] and int(entry["seeds"]) >= 10:
                bound, studies = float(entry["bound"]), int(entry["studies"])
                assert float(entry["percent"]) <= bound + 3 * standard_error(bound, studies), entry


def test_an_exceeded_bound_is_noticed() -> None:
    scenario = next(s for s in SCENARIOS if s.name == "at the margin, sigma .5")
    assert Row(scenario, {10: 5 + 4 * standard_error(5, 1000)}).exceeded(1000) == [10]
    assert Row(scenario, {10: 5 + 2 * standard_error(5, 1000)}).exceeded(1000) == []


def test_looks_without_a_protocol_are_caught_out() -> None:
    """The simulation sees the inflation that the looks are there to prevent."""
    naive = next(s for s in SCENARIOS if s.name == "four looks, each at the full alpha")
    assert rate(naive, 40, 1000) > 5 + 3 * standard_error(5, 1000)


def test_what_is_true_is_what_is_drawn() -> None:
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
