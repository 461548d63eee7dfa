from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from likelihood_lab.stats.trajectory import SMALLEST_CAUGHT, STEPS, Distances, envelope, limit, usable_steps

RNG = np.random.default_rng(0)
SEEDS = 10
BETWEEN = {step: np.full(SEEDS - 1, 0.5) for step in STEPS}


def distances(size: float, decades: float = 0.1, seeds: int = SEEDS) -> dict[int, NDArray[np.float64]]:
    """Log-normal around `size`, growing with the step."""
    return {step: size * step * 10 ** (decades * RNG.standard_normal(seeds)) for step in STEPS}


PLACEBOS: list[Distances] = [distances(1e-8), distances(1.2e-8)]


def test_envelope_of_a_placebo_is_inside() -> None:
    found = envelope(distances(1e-8), PLACEBOS, BETWEEN)
    assert found.word == "inside"
    assert set(found.excess) == set(STEPS)
    assert all(abs(excess) < limit(SEEDS) for excess in found.excess.values())
    assert envelope(distances(1e-10), PLACEBOS, BETWEEN).word == "inside"


def test_envelope_of_a_faster_candidate_is_outside_and_names_the_step() -> None:
    mine = distances(1e-8)
    found = envelope(mine | {3: 5 * mine[3]}, PLACEBOS, BETWEEN)
    assert found.word == "outside"
    assert "at step 3" in found.reason
    assert found.excess[3] == pytest.approx(0.7, abs=0.15)


def test_envelope_without_distance_is_identical_even_without_placebos() -> None:
    zero = {step: np.zeros(SEEDS) for step in STEPS}
    assert envelope(zero, [], BETWEEN).word == "identical"
    assert envelope(zero | {10: np.array([0.0] * 9 + [1e-12])}, PLACEBOS, BETWEEN).word == "inside"


def test_envelope_of_early_divergence_is_outside_in_most_seeds_only() -> None:
    mine = distances(1e-8)
    found = envelope(mine | {10: np.full(SEEDS, np.nan)}, PLACEBOS, BETWEEN)
    assert (found.word, found.reason) == ("outside", "it diverges by step 10 in most seeds")
    few = mine[10].copy()
    few[:2] = np.nan
    assert envelope(mine | {10: few}, PLACEBOS, BETWEEN).word == "inside"


@pytest.mark.parametrize("count", [0, 1])
def test_envelope_needs_two_placebos(count: int) -> None:
    found = envelope(distances(1e-8), PLACEBOS[:count], BETWEEN)
    assert (found.word, found.reason) == ("not_applicable", "there are no two placebos to compare with")


def test_envelope_needs_two_seeds() -> None:
    one, other, candidate = (distances(1e-8, seeds=1) for _ in range(3))
    assert envelope(candidate, [one, other], BETWEEN).word == "not_applicable"


def test_usable_steps_leave_out_chaos() -> None:
    chaotic = [placebo | {10: np.full(SEEDS, 1e-3)} for placebo in PLACEBOS]
    assert usable_steps(chaotic, BETWEEN) == [1, 3]
    assert envelope(distances(1e-8) | {10: np.full(SEEDS, 0.4)}, chaotic, BETWEEN).word == "inside"


def test_usable_steps_leave_out_disagreeing_placebos() -> None:
    """A few disagreeing seeds do not count; a placebo without any distance measures nothing."""
    assert usable_steps([PLACEBOS[0], PLACEBOS[1] | {3: 10 * PLACEBOS[1][3]}], BETWEEN) == [1, 10]
    one, other = distances(1e-8, seeds=40), distances(1e-8, seeds=40)
    other[3][0] *= 100
    assert 3 in usable_steps([one, other], BETWEEN)
    other[3][:12] *= 100
    assert 3 not in usable_steps([one, other], BETWEEN)
    assert usable_steps([PLACEBOS[0], {step: np.zeros(SEEDS) for step in STEPS}], BETWEEN) == []


def test_envelope_without_usable_steps_is_not_applicable() -> None:
    found = envelope(distances(1e-8), PLACEBOS, {step: np.full(SEEDS - 1, 1e-8) for step in STEPS})
    assert found.word == "not_applicable"
    assert "cannot be told apart" in found.reason


def test_envelope_ignores_later_steps() -> None:
    late = {step: np.full(SEEDS, 1e-8) for step in (30, 100)}
    found = envelope(distances(1e-8) | {100: np.full(SEEDS, 1.0)}, [p | late for p in PLACEBOS], BETWEEN)
    assert found.word == "inside"
    assert set(found.excess) <= set(STEPS)


def test_smallest_caught_matches_the_record() -> None:
    record = pd.read_csv(Path(__file__).parents[3] / "experiments" / "envelope" / "envelope.csv")
    mutants = record[record["arm"].str.startswith(("label smoothing", "temperature"))]
    size = mutants["arm"].str.rpartition(", ")[2].astype(float)
    for precision, smallest in SMALLEST_CAUGHT.items():
        regimes = mutants["regime"].str.startswith("bf16") == (precision == "bf16_mixed")
        caught = mutants[regimes].groupby(size)["outside"].min()
        assert caught[smallest] >= 0.95
        assert (caught[caught.index < smallest] < 0.95).all()


def test_limit_allows_few_seeds_more() -> None:
    assert [round(limit(seeds), 2) for seeds in (5, 10, 30)] == [0.47, 0.39, 0.31]
    size = 10**0.42
    few = [{step: values[:5] for step, values in placebo.items()} for placebo in PLACEBOS]
    exactly = {step: 10 ** np.median(np.log10(np.concatenate([p[step] for p in few]))) * size for step in STEPS}
    mine = {step: np.full(5, value) for step, value in exactly.items()}
    assert envelope(mine, few, BETWEEN).word == "inside"
    many = {step: np.full(30, value) for step, value in exactly.items()}
    placebos = [{step: np.resize(values, 30) for step, values in placebo.items()} for placebo in few]
    assert envelope(many, placebos, BETWEEN).word == "outside"
