"""The early trajectory: inside the placebos' envelope, outside it, or not to be told."""

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


def test_a_candidate_that_parts_as_placebos_do_is_inside() -> None:
    found = envelope(distances(1e-8), PLACEBOS, BETWEEN)
    assert found.word == "inside"
    assert set(found.excess) == set(STEPS)
    assert all(abs(excess) < limit(SEEDS) for excess in found.excess.values())


def test_one_that_parts_three_times_as_fast_is_outside_and_the_step_is_named() -> None:
    mine = distances(1e-8)
    found = envelope(mine | {3: 5 * mine[3]}, PLACEBOS, BETWEEN)
    assert found.word == "outside"
    assert "at step 3" in found.reason
    assert found.excess[3] == pytest.approx(0.7, abs=0.15)


def test_no_distance_at_all_is_identical_even_without_placebos() -> None:
    zero = {step: np.zeros(SEEDS) for step in STEPS}
    assert envelope(zero, [], BETWEEN).word == "identical"
    assert envelope(zero | {10: np.array([0.0] * 9 + [1e-12])}, PLACEBOS, BETWEEN).word == "inside"


def test_parting_slower_than_placebos_is_no_fault() -> None:
    assert envelope(distances(1e-10), PLACEBOS, BETWEEN).word == "inside"


def test_a_candidate_that_diverges_early_in_most_seeds_is_outside() -> None:
    mine = distances(1e-8)
    found = envelope(mine | {10: np.full(SEEDS, np.nan)}, PLACEBOS, BETWEEN)
    assert (found.word, found.reason) == ("outside", "it diverges by step 10 in most seeds")
    few = mine[10].copy()
    few[:2] = np.nan
    assert envelope(mine | {10: few}, PLACEBOS, BETWEEN).word == "inside"  # the outcome has to say it


@pytest.mark.parametrize("count", [0, 1])
def test_two_placebos_are_needed(count: int) -> None:
    found = envelope(distances(1e-8), PLACEBOS[:count], BETWEEN)
    assert (found.word, found.reason) == ("not_applicable", "there are no two placebos to compare with")


def test_one_seed_is_too_few() -> None:
    placebos = [distances(1e-8, seeds=1), distances(1e-8, seeds=1)]
    assert envelope(distances(1e-8, seeds=1), placebos, BETWEEN).word == "not_applicable"


def test_steps_at_which_rounding_has_become_chaos_are_not_judged() -> None:
    chaotic = [placebo | {10: np.full(SEEDS, 1e-3)} for placebo in PLACEBOS]
    assert usable_steps(chaotic, BETWEEN) == [1, 3]
    found = envelope(distances(1e-8) | {10: np.full(SEEDS, 0.4)}, chaotic, BETWEEN)
    assert found.word == "inside"


def test_steps_at_which_placebos_disagree_are_not_judged() -> None:
    apart = [PLACEBOS[0], PLACEBOS[1] | {3: 10 * PLACEBOS[1][3]}]
    assert usable_steps(apart, BETWEEN) == [1, 10]


def test_a_few_disagreeing_seeds_do_not_spoil_a_step() -> None:
    many = 40
    one, other = distances(1e-8, seeds=many), distances(1e-8, seeds=many)
    other[3][0] *= 100
    assert 3 in usable_steps([one, other], BETWEEN)
    other[3][:12] *= 100
    assert 3 not in usable_steps([one, other], BETWEEN)


def test_where_no_step_can_be_judged_it_is_not_applicable() -> None:
    near = {step: np.full(SEEDS - 1, 1e-8) for step in STEPS}
    found = envelope(distances(1e-8), PLACEBOS, near)
    assert found.word == "not_applicable"
    assert "cannot be told apart" in found.reason


def test_a_placebo_without_any_distance_measures_nothing() -> None:
    silent = [PLACEBOS[0], {step: np.zeros(SEEDS) for step in STEPS}]
    assert usable_steps(silent, BETWEEN) == []


def test_later_steps_are_never_judged() -> None:
    late = {step: np.full(SEEDS, 1e-8) for step in (30, 100)}
    found = envelope(distances(1e-8) | {100: np.full(SEEDS, 1.0)}, [p | late for p in PLACEBOS], BETWEEN)
    assert found.word == "inside"
    assert set(found.excess) <= set(STEPS)


def test_the_smallest_caught_is_what_the_record_says() -> None:
    record = pd.read_csv(Path(__file__).parents[3] / "experiments" / "envelope" / "envelope.csv")
    mutants = record[record["arm"].str.startswith(("label smoothing", "temperature"))]
    size = mutants["arm"].str.rpartition(", ")[2].astype(float)
    for precision, smallest in SMALLEST_CAUGHT.items():
        regimes = mutants["regime"].str.startswith("bf16") == (precision == "bf16_mixed")
        caught = mutants[regimes].groupby(size)["outside"].min()
        assert caught[smallest] >= 0.95
        assert (caught[caught.index < smallest] < 0.95).all()


def test_few_seeds_are_allowed_more_for_the_error_of_their_median() -> None:
    assert [round(limit(seeds), 2) for seeds in (5, 10, 30)] == [0.47, 0.39, 0.31]
    size = 10**0.42
    few = [{step: values[:5] for step, values in placebo.items()} for placebo in PLACEBOS]
    exactly = {step: 10 ** np.median(np.log10(np.concatenate([p[step] for p in few]))) * size for step in STEPS}
    mine = {step: np.full(5, value) for step, value in exactly.items()}
    assert envelope(mine, few, BETWEEN).word == "inside"
    many = {step: np.full(30, value) for step, value in exactly.items()}
    placebos = [{step: np.resize(values, 30) for step, values in placebo.items()} for placebo in few]
    assert envelope(many, placebos, BETWEEN).word == "outside"
