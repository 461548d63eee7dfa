"""The divisor of losses that have a known one, and the gradient accumulation that it allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from likelihood_lab.audit.evaluate import Loss
from likelihood_lab.audit.normaliser import SINGLE, Normaliser, normaliser
from likelihood_lab.categorical.batches import BatchShape
from tests.laboratory import CPU

IGNORED = -100
FLAT, FLAT_IGNORING = BatchShape((2, 10)), BatchShape((2, 10), ignore_index=IGNORED)
TOKENS, TOKENS_IGNORING = BatchShape((2, 10), tokens=True), BatchShape((2, 10), tokens=True, ignore_index=IGNORED)

LossOf = Callable[[Tensor, Tensor], Tensor]


def measured(
    fn: Callable[..., Any],
    shape: BatchShape,
    args: tuple[str, ...] = ("logits", "labels"),
    dtype: torch.dtype = torch.float64,
    computes_in: torch.dtype | None = None,
) -> Normaliser:
    return normaliser(Loss(fn, args), shape, CPU, dtype, computes_in)


# --- losses of one divisor each; logits [..., C] and labels [...]


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y of every row, 0 where it is to be ignored."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)


def over(count: Callable[[Tensor], Any]) -> LossOf:
    return lambda logits, labels: losses(logits, labels).sum() / count(labels)


def valid(labels: Tensor) -> Tensor:
    return (labels != IGNORED).sum().clamp_min(1)


def distinct(labels: Tensor) -> int:
    return len(labels.unique())


def weights(labels: Tensor, classes: int) -> Tensor:
    """1 to 2, growing with the class; 0 for ignored rows."""
    return (1 + labels.double() / (classes - 1)) * (labels != IGNORED)


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    w = weights(labels, logits.shape[-1]).to(logits.dtype)
    return (w * losses(logits, labels)).sum() / w.sum()


def weighted_over_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return (weights(labels, logits.shape[-1]).to(logits.dtype) * losses(logits, labels)).mean()


def weighted_over_largest(logits: Tensor, labels: Tensor) -> Tensor:
    w = weights(labels, logits.shape[-1]).to(logits.dtype)
    return (w * losses(logits, labels)).sum() / w.max()


def mean_of_means(groups: Callable[[Tensor], Any]) -> LossOf:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        pairs = [(z, y) for z, y in zip(groups(logits), groups(labels), strict=True) if y.numel()]
        return torch.stack([over(valid)(z, y) for z, y in pairs]).mean()

    return loss


def over_the_rows_axis(logits: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(logits.log_softmax(0), labels)


def hardest(logits: Tensor, labels: Tensor) -> Tensor:
    return losses(logits, labels).max()


def log_of_mean_probability(logits: Tensor, labels: Tensor) -> Tensor:
    return -(-losses(logits, labels)).exp().mean().log()


CONSTRUCTED: dict[str, tuple[LossOf, BatchShape, str]] = {
    "sum": (over(lambda y: 1), FLAT, "a constant"),
    "sum over a fixed 8": (over(lambda y: 8), FLAT_IGNORING, "a constant"),
    "mean": (torch.nn.CrossEntropyLoss(), FLAT, "rows"),
    "sum over N, ignored rows counted": (over(len), FLAT_IGNORING, "rows"),
    "mean over valid targets": (F.cross_entropy, FLAT_IGNORING, "valid targets"),
    "class-weighted mean": (weighted, FLAT, "sum of class weights"),
    "class-weighted mean, ignoring": (weighted, FLAT_IGNORING, "sum of class weights"),
    "class-weighted sum over N": (weighted_over_rows, FLAT, "rows"),
    "weighted sum over the largest weight": (weighted_over_largest, FLAT, "a different weight for every row"),
    "two contiguous halves": (mean_of_means(lambda t: t.chunk(2)), FLAT, "means of groups"),
    "four micro-batches, ignoring": (mean_of_means(lambda t: t.chunk(4)), FLAT_IGNORING, "means of groups"),
    "three ranks that take turns": (mean_of_means(lambda t: [t[r::3] for r in range(3)]), FLAT, "means of groups"),
    "softmax over rows": (over_the_rows_axis, FLAT, "not a sum over rows"),
    "hardest row": (hardest, FLAT, "not a sum over rows"),
    "log of the mean probability": (log_of_mean_probability, FLAT, "a different weight for every row"),
    "square root of N": (over(lambda y: math.sqrt(len(y))), FLAT, "another count (3.4641 for 12 rows"),
    "N + 1": (over(lambda y: len(y) + 1), FLAT, "another count (6.5 for 12 rows"),
    "distinct labels": (over(distinct), FLAT, "another count (5 for 12 rows"),
    "tokens over B": (over(len), TOKENS, "B"),
    "tokens over B, ignoring": (over(len), TOKENS_IGNORING, "B"),
    "tokens over T": (over(lambda y: y.shape[1]), TOKENS, "T"),
    "tokens over T, ignoring": (over(lambda y: y.shape[1]), TOKENS_IGNORING, "T"),
    "tokens over B*T": (over(torch.numel), TOKENS, "B*T"),
    "tokens over B*T, ignoring": (over(torch.numel), TOKENS_IGNORING, "B*T"),
    "valid tokens": (over(valid), TOKENS_IGNORING, "valid targets"),
    "sum of tokens": (over(lambda y: 1), TOKENS_IGNORING, "a constant"),
    "weighted tokens": (weighted, TOKENS_IGNORING, "sum of class weights"),
    "mean of sequences' means": (mean_of_means(lambda t: t.unbind()), TOKENS_IGNORING, "means of groups"),
    "mean of positions' means": (mean_of_means(lambda t: t.unbind(1)), TOKENS_IGNORING, "means of groups"),
    "distinct labels of tokens": (over(distinct), TOKENS, "another count ("),
}


@pytest.mark.parametrize(("fn", "shape", "divisor"), CONSTRUCTED.values(), ids=CONSTRUCTED)
@pytest.mark.usefixtures("untouched_randomness")
def test_divisor_of_a_constructed_loss(fn: LossOf, shape: BatchShape, divisor: str) -> None:
    found = measured(fn, shape).divides_by
    assert found.startswith(divisor) if "(" in divisor else found == divisor


FUSED = BatchShape((2, 10), fused=True), ("hidden", "weight", "labels")


def two_rows(logits: Tensor, labels: Tensor) -> Tensor:
    if len(labels) == 1:
        raise ValueError("batch norm")
    return F.cross_entropy(logits, labels)


@pytest.mark.parametrize(
    ("fn", "settings", "divisor"),
    [
        (lambda z, y: 0.1 * F.cross_entropy(z, y), (FLAT,), "rows"),
        (lambda h, w, y: F.cross_entropy(h @ w.T, y), FUSED, "rows"),
        (lambda h, w, y: losses(h @ w.T, y).sum(), FUSED, "a constant"),
        (two_rows, (FLAT,), "not measured: refuses a batch of one row (ValueError: batch norm)"),
        (lambda z, y: F.cross_entropy(z * 0, y), (FLAT,), "not measured: passes no gradient"),
        (lambda z, y: 1 / 0, (FLAT,), "not measured: ZeroDivisionError: division by zero"),
    ],
    ids=["factor", "fused mean", "fused sum", "no single row", "no gradient", "raises"],
)
def test_divisor_or_the_reason_why_there_is_none(fn: Callable[..., Any], settings: tuple[Any], divisor: str) -> None:
    assert measured(fn, *settings).divides_by == divisor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_divisor_is_found_in_spite_of_rounding(dtype: torch.dtype) -> None:
    assert measured(F.cross_entropy, FLAT_IGNORING, dtype=dtype).divides_by == "valid targets"
    inside = measured(lambda z, y: F.cross_entropy(z.to(dtype), y), FLAT_IGNORING, computes_in=dtype)
    assert inside.divides_by == "valid targets"


# --- gradient accumulation


def test_accumulation_of_a_mean_fails_for_unequal_valid_counts() -> None:
    found = measured(F.cross_entropy, FLAT_IGNORING)
    assert found.accumulation["mean"] < 1e-12
    assert found.accumulation["mean of unequal"] > 0.1
    assert 0.5 < found.cosine < 0.99
    assert found.survives == "a mean of equal micro-batches"


def test_accumulation_distance_and_cosine_agree() -> None:
    """A mean over 12 rows cut at 3: the parts weigh 2 and 2/3 in the mean of their means.

    With a the share of the first part in the squared norm: distance^2 = a + (1 - a) / 9.
    """
    found = measured(F.cross_entropy, FLAT)
    share = (found.accumulation["mean of unequal"] ** 2 - 1 / 9) / (8 / 9)
    assert 0 < share < 1
    cosine = (2 * share + 2 / 3 * (1 - share)) / math.sqrt(4 * share + 4 / 9 * (1 - share))
    assert found.cosine == pytest.approx(cosine, rel=1e-9)
    assert found.accumulation["mean"] < 1e-12
    assert found.accumulation["sum"] > SINGLE


@pytest.mark.parametrize("shape", [FLAT, FLAT_IGNORING, TOKENS, TOKENS_IGNORING])
def test_accumulation_of_a_fixed_divisor_is_a_sum(shape: BatchShape) -> None:
    found = measured(over(lambda y: 64), shape)
    assert found.accumulation["sum"] < 1e-12
    assert found.accumulation["mean"] == pytest.approx(0.5)
    assert found.cosine == pytest.approx(1.0)
    assert found.survives == "a sum"


def test_accumulation_of_tokens_over_b_is_a_mean() -> None:
    found = measured(over(len), TOKENS_IGNORING)
    assert found.accumulation["mean"] < 1e-12
    assert found.accumulation["mean of unequal"] < 1e-12
    assert found.survives == "a mean of equal micro-batches, a mean of unequal ones"


def test_accumulation_over_the_rows_axis_is_wrong() -> None:
    assert measured(over_the_rows_axis, FLAT).survives == "none"
