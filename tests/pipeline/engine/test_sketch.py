"""Sketches of the weights: steps, linearity, and accuracy of the norm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.engine.sketch import sketch, sketch_distance, snapshot_steps


def random_weights(seed: int, *shape: int) -> dict[str, Tensor]:
    return {"weight": torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}


@pytest.mark.parametrize(
    ("last", "steps"),
    [(1, [1]), (2, [1, 2]), (3, [1, 3]), (10, [1, 3, 10]), (690, [1, 3, 10, 30, 100, 300, 690])],
)
def test_snapshot_steps(last: int, steps: list[int]) -> None:
    assert snapshot_steps(last) == steps


@pytest.mark.parametrize("size", [1, 2048])
def test_small_sketch_is_the_parameters(size: int) -> None:
    weights = random_weights(0, size)
    assert torch.equal(sketch(weights), weights["weight"])


def test_sketch_joins_all_tensors_in_float64() -> None:
    made = sketch({"a": torch.ones(2, 3, requires_grad=True), "b": torch.full((4,), 2.0, dtype=torch.bfloat16)})
    assert made.tolist() == [1.0] * 6 + [2.0] * 4
    assert made.dtype == torch.float64
    assert not made.requires_grad


@pytest.mark.parametrize("size", [2049, 5000, 100_000])
def test_large_sketch_is_short_linear_and_repeatable(size: int) -> None:
    a, b = random_weights(0, size), random_weights(1, size)
    combined = sketch({"weight": 3 * a["weight"] - 0.5 * b["weight"]})
    assert combined.numel() <= 2048
    torch.testing.assert_close(combined, 3 * sketch(a) - 0.5 * sketch(b), rtol=1e-12, atol=1e-10)
    assert torch.equal(sketch(a), sketch(a))


def test_difference_in_one_parameter_shows() -> None:
    weights = random_weights(0, 30, 100)
    plain = sketch(weights)
    for index in range(0, 3000, 7):
        weights["weight"].view(-1)[index] += 1.0
        assert (sketch(weights) - plain).abs().max().item() == pytest.approx(1.0)
        weights["weight"].view(-1)[index] -= 1.0


def test_sketch_norm_has_the_stated_spread() -> None:
    """The standard deviation is sqrt(2 / 2039) / 2 = 1.6 % of the norm; the estimate is in [1.1 %, 2.2 %]."""
    errors = []
    for seed in range(60):
        weights = random_weights(seed, 20_000)
        errors.append(sketch(weights).norm() / weights["weight"].norm() - 1)
    assert abs(sum(errors) / 60) < 4 * 0.016 / math.sqrt(60)
    assert 0.011 < math.sqrt(sum(e**2 for e in errors) / 60) < 0.022


@pytest.mark.parametrize("columns", [64, 128, 512, 784, 1024])
def test_difference_in_one_input_column_is_measured(columns: int) -> None:
    """A pixel that is always black never moves its column, so the sketch must not be aligned with columns."""
    errors = []
    for column in range(20):
        weights = {"weight": torch.zeros(1000, columns, dtype=torch.float64)}
        weights["weight"][:, column] = random_weights(column, 1000)["weight"]
        errors.append(abs((sketch(weights).norm() / weights["weight"].norm() - 1).item()))
    assert max(errors) < 0.08


def test_sketch_distance_is_relative_to_the_reference() -> None:
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    candidate = torch.tensor([[3.0, 4.0], [0.0, 3.0]])
    assert sketch_distance(candidate, reference).tolist() == [0.0, 0.5]
