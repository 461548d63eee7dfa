"""Rounding units of rows, errors in units, scale intervals and the systematic part."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from likelihood_lab.audit.rounding import (
    CONSTANT,
    SYSTEMATIC,
    UNKNOWN_SCALE,
    Rows,
    ScaleInterval,
    in_units,
    narrowest,
    overlap,
    relative_distance,
    row_errors,
    rows_of,
    scale,
    systematic,
    unit_roundoff,
    units,
)

ROUNDOFFS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

finite = st.floats(-100, 100, allow_nan=False)
seeds = st.integers(0, 10_000)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_hot(labels: list[int], classes: int) -> Tensor:
    return F.one_hot(torch.tensor(labels), classes).double()


def described(logits: Tensor, labels: list[int], **more: Any) -> Rows:
    valid = torch.ones(len(labels), dtype=torch.bool)
    return rows_of(logits, one_hot(labels, logits.shape[1]), valid, more.pop("gradient", None), **more)


def cross_entropy_gradient(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    leaf = logits.to(dtype).requires_grad_()
    return torch.autograd.grad(F.cross_entropy(leaf, labels), leaf)[0].double()


# --- units


@pytest.mark.parametrize("dtype", ROUNDOFFS, ids=str)
def test_unit_roundoff_is_lost_next_to_1(dtype: torch.dtype) -> None:
    u = unit_roundoff(dtype)
    assert u == ROUNDOFFS[dtype]
    one = torch.ones((), dtype=dtype)
    assert one + u == one  # a tie, to even
    assert one + 2 * u > one


def test_rows_have_values_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [-7.0, -7.0]], dtype=torch.float64)
    rows = described(logits, [0, 1])
    torch.testing.assert_close(rows.probs, torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64))
    torch.testing.assert_close(rows.surprisal, torch.tensor([math.log(4), math.log(2)], dtype=torch.float64))
    torch.testing.assert_close(rows.magnitude, torch.tensor([math.log(4), 7.0], dtype=torch.float64))
    torch.testing.assert_close(rows.reach, 1 + rows.magnitude + math.sqrt(2))
    assert rows.weight.tolist() == [0.5, 0.5]


def test_rows_with_soft_targets_and_masked_logits() -> None:
    """The surprisal is the expected one; a masked logit does not count into the magnitude."""
    logits = torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64)
    targets = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64)
    rows = rows_of(logits, targets, torch.tensor([True]), None)
    assert rows.surprisal.item() == pytest.approx(math.log(2))
    assert rows.magnitude.item() == pytest.approx(math.log(2))


def test_rows_take_their_weight_from_the_gradient() -> None:
    """The weight is at least 1 / N, and ignored rows do not count into N."""
    logits, labels = normal(3, 4), [0, 3, 1]
    direction = logits.softmax(1) - one_hot(labels, 4)
    gradient = torch.tensor([[2.0], [1 / 3], [0.0]], dtype=torch.float64) * direction
    weights = described(logits, labels, gradient=gradient).weight
    torch.testing.assert_close(weights, torch.tensor([2.0, 1 / 3, 1 / 3], dtype=torch.float64))
    valid = torch.tensor([True, False, True])
    assert rows_of(logits, one_hot(labels, 4), valid, None).weight.tolist() == [0.5, 0.5, 0.5]


def test_rows_take_their_magnitude_from_the_terms_of_logits() -> None:
    size = torch.full((2, 3), 50.0, dtype=torch.float64)
    assert described(normal(2, 3), [0, 1], size=size).magnitude.tolist() == [50.0, 50.0]


def test_units_of_logits_are_roundoff_reach_weight() -> None:
    rows = described(torch.tensor([[0.0, 20.0]], dtype=torch.float64), [0])
    expected = 2.0**-24 * (1 + (20 + math.log1p(math.exp(-20))) + math.sqrt(2)) * 1.0
    assert units(rows, unit_roundoff(torch.float32), "logits").item() == pytest.approx(expected)


def test_units_behind_a_linear_layer() -> None:
    """|d hidden| <= sum_c s_c |w_c| per entry, |d weight_c| <= sum_n s_nc |h_n|, s = p + y + 1 at the largest."""
    hidden, weight, bias = normal(5, 3, seed=1), normal(4, 3, seed=2), normal(4, seed=3)
    rows = described(F.linear(hidden, weight, bias), [0, 1, 2, 3, 3])
    row = units(rows, 1e-8, "logits")
    share = rows.probs + rows.targets + F.one_hot(rows.probs.argmax(1), 4)
    by_hand: dict[str, Tensor] = {
        "hidden": torch.stack([row[n] * max(share[n] @ weight[:, d].abs() for d in range(3)) for n in range(5)]),
        "weight": torch.stack([(row * share[:, c] * hidden.abs().amax(1)).sum() for c in range(4)]),
        "bias": (row[:, None] * share).sum(0),
    }  # fmt: skip
    for name, expected in by_hand.items():
        torch.testing.assert_close(units(rows, 1e-8, name, hidden, weight), expected, rtol=1e-12, atol=0)


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 8), st.integers(2, 50), st.sampled_from([0.1, 1.0, 10.0, 30.0]), st.floats(-100, 100))
def test_cross_entropy_of_torch_stays_within_its_units(
    seed: int, n: int, classes: int, spread: float, shift: float
) -> None:
    logits = (spread * normal(n, classes, seed=seed) + shift).float().double()
    labels = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    exact = cross_entropy_gradient(logits, labels, torch.float64)
    rounded = cross_entropy_gradient(logits, labels, torch.float32)
    unit = units(described(logits, labels.tolist(), gradient=exact), unit_roundoff(torch.float32), "logits")
    assert in_units(row_errors(rounded, exact), unit).max() <= CONSTANT / 2
    assert in_units(row_errors(exact + 1e-3 / n, exact), unit).min() > CONSTANT


# --- errors


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("gradient", "exact", "errors"),
    [
        ([[0.0, 0.0], [0.5, -2.0], [1.0, 0.0]], [[0.0, 0.0]] * 3, [0.0, 2.0, 1.0]),
        ([0.0, 0.5, 1.0], [0.0] * 3, [0.0, 0.5, 1.0]),
        ([[[0.0, 0.0]], [[0.5, -2.0]]], [[[0.0, 0.0]]] * 2, [0.0, 2.0]),
        *([[[1.0, broken], [1.0, 1.0]], [[1.0, 1.0]] * 2, [INF, 0.0]] for broken in (NAN, INF, -INF)),
        ([[INF, 0.0]], [[INF, 0.0]], [INF]),  # a compared gradient is finite; inf - inf must not pass for 0
    ],
)
def test_row_errors_are_the_largest_of_a_row(gradient: list[Any], exact: list[Any], errors: list[float]) -> None:
    assert row_errors(torch.tensor(gradient), torch.tensor(exact)).tolist() == errors


def test_error_of_0_is_0_units() -> None:
    errors, unit = torch.tensor([0.0, 1e-9, 3e-8]), torch.tensor([0.0, 0.0, 1e-8])
    found = in_units(errors.double(), unit.double())
    assert found[0] == 0
    assert found[1] > 1e100
    assert found[2].item() == pytest.approx(3.0, rel=1e-6)


# --- scales


@settings(max_examples=50, deadline=None)
@given(seeds, st.floats(1e-6, 1e6), st.floats(0, 1e-6))
def test_scale_interval_contains_the_factor(seed: int, factor: float, tolerance: float) -> None:
    exact = normal(6, 5, seed=seed)
    tolerances = torch.full((6,), tolerance, dtype=torch.float64)
    worst = factor * (exact + tolerance * exact.sign())  # every entry off in the direction that moves it most
    for gradient in (factor * exact, worst, factor * (exact - tolerance * exact.sign())):
        found = scale(gradient, exact, tolerances)
        assert abs(found.factor - factor) <= found.tolerance * 1.0001 + 1e-12 * factor
        assert found.determined


def test_scale_interval_has_the_width_of_its_rows() -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    found = scale(0.1 * exact, exact, torch.tensor([1e-6, 1e3], dtype=torch.float64))
    assert found.factor == pytest.approx(0.1, rel=1e-15)
    assert found.tolerance == pytest.approx(0.1 * 7e-6 / 25)


def test_scale_is_unknown_without_a_direction() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.float64)
    assert scale(normal(2, 3), nothing, torch.ones(2)) is UNKNOWN_SCALE
    assert not UNKNOWN_SCALE.determined
    assert not scale(nothing, normal(2, 3), torch.zeros(2)).determined  # a gradient of 0 has no direction
    assert not scale(torch.full((2, 3), math.nan), normal(2, 3), torch.zeros(2)).determined
    assert not scale(normal(2, 3), normal(2, 3), torch.full((2,), 1.0)).determined


def test_scale_of_a_vector() -> None:
    exact = normal(4)
    found = scale(-2.0 * exact, exact, torch.full((4,), 1e-9, dtype=torch.float64))
    assert found.factor == pytest.approx(-2.0, rel=1e-14)
    assert found.tolerance == pytest.approx(2e-9 * (exact.abs().sum() / exact.square().sum()).item())


intervals = st.builds(ScaleInterval, finite, st.floats(0, 10))


@given(st.lists(intervals, min_size=1, max_size=6))
def test_overlap_is_a_common_constant(found: list[ScaleInterval]) -> None:
    low = max(i.factor - i.tolerance for i in found)
    high = min(i.factor + i.tolerance for i in found)
    inside = all(abs(i.factor - (low + high) / 2) <= i.tolerance * (1 + 1e-12) + 1e-12 for i in found)
    assert overlap(found) == (low <= high)
    assert overlap(found) <= inside


def test_overlap_is_false_for_two_intervals_apart() -> None:
    apart, between = [ScaleInterval(1.0, 0.1), ScaleInterval(1.3, 0.1)], ScaleInterval(1.15, 0.2)
    assert not overlap(apart)
    assert not overlap([*apart, between])
    assert overlap([apart[0], between])


def test_narrowest_is_relative() -> None:
    assert narrowest([ScaleInterval(1.0, 0.1), ScaleInterval(100.0, 1.0), ScaleInterval(1e-3, 1e-3)]).factor == 100.0


# --- the systematic part


@pytest.mark.parametrize("seed", range(10))
def test_systematic_of_noise_is_about_1(seed: int) -> None:
    noise = 1e-9 * normal(32, 64, 10, seed=seed)
    assert 0.5 < systematic(noise) < SYSTEMATIC / 2


@pytest.mark.parametrize("bias", [0.5, 2.0])
def test_systematic_of_a_bias(bias: float) -> None:
    noise = normal(32, 64, 10)
    assert systematic(noise + bias) == pytest.approx(1 + 32 * bias**2, rel=0.1)
    assert systematic(noise + bias) > SYSTEMATIC


def test_systematic_of_entries_without_noise() -> None:
    """Constant entries beside noisy ones do not dominate; alone they are systematic, and zeros are not."""
    quiet = torch.full((32, 10), 1e-6, dtype=torch.float64)
    assert systematic(torch.cat([normal(32, 10), quiet], 1)) < SYSTEMATIC
    assert systematic(quiet) == math.inf
    assert systematic(0 * quiet) == 0.0


def test_relative_distance_is_in_float64() -> None:
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert relative_distance(a, b) == 1.25
    assert relative_distance(torch.full((2,), 1 + 2.0**-20), torch.ones(2)) == 2.0**-20
    assert math.isnan(relative_distance(a, torch.zeros(2)))
    assert math.isnan(relative_distance(torch.tensor([math.nan]), torch.ones(1)))
