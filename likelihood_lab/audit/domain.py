"""Search the domain's limits: the axis, the place and the way in which a loss departs from the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from likelihood_lab.audit.compare import BatchComparison, ReferenceEvaluations, compare
from likelihood_lab.audit.evaluate import Evaluation, Loss, differentiable, evaluate
from likelihood_lab.audit.rounding import CONSTANT
from likelihood_lab.categorical.batches import (
    CORE_GAP,
    CORE_OFFSET,
    WIDTH,
    AuditBatch,
    BatchShape,
    avoid_ignore_index,
    targets_of,
)

POINTS = {
    "gap": (1, 5, 10, 15, 20, 30, 40, 60, 80, 86, 90, 100, 105, 150, 300, 700, 750, 1e3, 3e3, 1e4),
    "confidence": (1, 5, 10, 15, 20, 30, 40, 60, 80, 86, 90, 100, 105, 150, 300, 700, 750, 1e3, 3e3, 1e4),
    "offset": (1, 10, 30, 60, 80, 86, 90, 100, 300, 700, 750, 1e3, 1e4, 1e6),
    "masked": (1, 2),
    "rows": (300, 1000, 3000, 10_000, 30_000, 70_000),
}
APART = 12.0  # logits by which the irrelevant classes lie below the relevant one, plus or minus SPREAD
SPREAD = 3.0
CORE = {
    "gap": CORE_GAP, "confidence": CORE_GAP - APART - SPREAD, "offset": CORE_OFFSET, "masked": 0.0, "rows": math.inf,
}  # fmt: skip
RESOLUTION = 1e-3
ROWS = 4
MANY = 1000  # with more classes than this, the last layer is narrower than their number
MOST = 2**22  # logits in a batch of many rows


@dataclass(frozen=True)
class Limit:
    """Place on an axis at which a loss departs from the reference.

    Attributes
    ----------
    axis: gap, confidence, offset, masked or rows.
    limit: the smallest value at which they differ, in the axis' unit: logits, classes or rows.
    behaviour: the failure there, such as "gradient is NaN".
    core: whether the gradient fails inside the core domain.
    then: the failure further out, if gradient and value do not fail at the same place.
    """

    axis: str
    limit: float
    behaviour: str
    core: bool
    then: str | None = None


def find_domain_limits(
    candidate: Loss,
    standard: ReferenceEvaluations,
    shape: BatchShape,
    dtype: torch.dtype,
    scale: float | None = None,
    offset: bool = False,
) -> list[Limit]:
    """Return the limit on every axis where the candidate fails in `dtype`; limits inside the core come first.

    Args:
        scale: the largest factor between the gradients, if it is not 1; such a factor is not a failure.
        offset: whether the values differ by a constant; such a constant is not a failure.
    """
    classes = shape.typical_classes
    axes = [axis for axis in POINTS if axis != "rows" or dtype in (torch.float16, torch.bfloat16)]
    if shape.fused:  # chosen logits would need D = C; common offsets and masks would need a bias
        axes = [axis for axis in axes if axis in ("gap", "confidence", "rows")]
    if classes < max(POINTS["masked"]) + 2:
        axes = [axis for axis in axes if axis != "masked"]
    probes = [_DomainProbe(candidate, standard, shape, axis, classes, dtype, scale, offset) for axis in axes]
    limits = [limit for probe in probes if (limit := _limit(probe)) is not None]
    return sorted(limits, key=lambda limit: not limit.core)


def _limit(probe: _DomainProbe) -> Limit | None:
    """Return the nearer of the places where the gradient and the value fail."""
    axis = probe.axis
    gradient = _search(axis, lambda place: probe.at(place).gradient)
    value = _search(axis, lambda place: probe.at(place).value)
    failed = sorted((result for result in (gradient, value) if result is not None), key=lambda result: result[0])
    if not failed:
        return None
    (nearest, behaviour), *rest = failed
    then = f"{rest[0][1]} from {rest[0][0]:.4g}" if rest and rest[0][0] > nearest * (1 + RESOLUTION) else None
    return Limit(axis, nearest, behaviour, gradient is not None and gradient[0] <= CORE[axis], then)


def _search(axis: str, failure_at: Callable[[float], str | None]) -> tuple[float, str] | None:
    """Find the axis' first point that fails, then bisect between it and the point before it."""
    before = start = 1.0 if axis == "rows" else 0.0
    for point in POINTS[axis]:
        behaviour = failure_at(float(point))
        if behaviour is None:
            before = float(point)
            continue
        low, high = before, float(point)
        if low == start and axis != "masked" and (failure := failure_at(low)) is not None:
            return low, failure
        whole = axis == "rows"
        while axis != "masked" and high - low > max(RESOLUTION * high, float(whole)):
            middle = float((low + high) // 2) if whole else (low + high) / 2
            failure = failure_at(middle)
            low, high, behaviour = (middle, high, behaviour) if failure is None else (low, middle, failure)
        return high, behaviour
    return None


@dataclass(frozen=True)
class _Failures:
    """The failures of gradient and value at one place, in words; None if they hold."""

    gradient: str | None = None
    value: str | None = None


@dataclass
class _DomainProbe:
    """Compare candidate and reference at places on an axis; results are cached."""

    candidate: Loss
    standard: ReferenceEvaluations
    shape: BatchShape
    axis: str
    classes: int
    dtype: torch.dtype
    scale: float | None
    offset: bool
    results: dict[float, _Failures] = field(default_factory=dict)

    def at(self, place: float) -> _Failures:
        """Return the failures at a place."""
        if place not in self.results:
            self.results[place] = self._compare(place)
        return self.results[place]

    def _compare(self, place: float) -> _Failures:
        if self.axis == "rows" and place * self.classes > MOST:
            return _Failures()
        batch = _batch(self.axis, place, self.classes, self.shape).at(self.dtype)
        fresh = ReferenceEvaluations(
            self.standard.loss, self.standard.device
        )  # not cached: these batches are used once
        exact, own = fresh.exact(batch), fresh.at(batch, self.dtype)
        if exact.error or own.error or not (_finite(exact) and _finite(own)):
            return _Failures()  # the reference itself fails here
        result = evaluate(self.candidate, batch, self.dtype, self.standard.device)
        if result.error:
            return _Failures(f"loss raises {result.error}")
        comparison = compare(result, fresh, batch, self.dtype)
        gradient = None if self._gradient_holds(comparison) else _gradient_failure(result)
        return _Failures(gradient, None if result.value is None else self._value_failure(result.value, comparison))

    def _gradient_holds(self, comparison: BatchComparison) -> bool:
        if self.scale is None:
            return comparison.same
        if comparison.interval.determined:
            return comparison.parallel
        return comparison.growth <= CONSTANT * max(1.0, self.scale)

    def _value_failure(self, value: Tensor, comparison: BatchComparison) -> str | None:
        if not value.isfinite():
            return f"value is {'NaN' if value.isnan() else 'infinite'}"
        return (
            "value is wrong" if self.scale is None and not self.offset and comparison.value_units > CONSTANT else None
        )


def _gradient_failure(result: Evaluation) -> str:
    gradients = [g for g in result.gradients.values() if g is not None]
    if any(g.isnan().any() for g in gradients):
        return "gradient is NaN"
    if any(g.isinf().any() for g in gradients):
        return "gradient is infinite"
    first = gradients[0].flatten(0, -2)
    return "gradient is exactly 0" if (first == 0).all(-1).any() else "gradient is wrong"


def _finite(result: Evaluation) -> bool:
    parts = [result.value, *result.gradients.values()]
    return all(part is not None and bool(part.isfinite().all()) for part in parts)


def _batch(axis: str, value: float, classes: int, shape: BatchShape) -> AuditBatch:
    rows = int(value) if axis == "rows" else ROWS
    generator = torch.Generator().manual_seed(4)
    labels = avoid_ignore_index((torch.arange(rows) * 7 + classes - 1) % classes, classes, shape.ignore_index)
    if shape.fused:
        return _fused(axis, value, labels, classes, shape, generator)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    if axis in ("gap", "confidence"):  # one other class dominates, so that a gap is -log p_y to three digits
        sign = 1 if axis == "confidence" else -1
        rival = (labels + 1) % classes
        logits = (
            (logits.clamp(-SPREAD, SPREAD) - APART)
            .scatter(1, rival[:, None], 0.0)
            .scatter(1, labels[:, None], sign * value)
        )
    elif axis == "offset":
        logits = logits + value * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(rows)[:rows, None]
    elif axis == "masked":
        masked = (labels[:, None] + 1 + torch.arange(int(value))) % classes
        logits = logits.scatter(1, masked, -math.inf)
    logits = logits.float().double()
    return _shaped(logits, labels, classes, shape, {})


def _fused(
    axis: str, value: float, labels: Tensor, classes: int, shape: BatchShape, generator: torch.Generator
) -> AuditBatch:
    """Return rows parallel to their label's weights. These are orthonormal, so that only the label's logit is not 0."""
    width = max(WIDTH, classes) if classes <= MANY else WIDTH
    weight = torch.eye(width, dtype=torch.float64)[:classes]
    if classes > MANY:  # only the labels get a direction
        used = labels.unique()
        weight = torch.zeros(classes, width, dtype=torch.float64)
        weight[used, torch.arange(len(used)) % width] = 1.0
    noise = torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
    hidden = noise / 8
    if axis != "rows":
        sign = 1 if axis == "confidence" else -1
        hidden = hidden + sign * value * weight[labels]
    bias = torch.zeros(classes, dtype=torch.float64) if shape.bias else None
    hidden = hidden.float().double()
    fused = {"hidden": hidden, "weight": weight, "bias": bias}
    return _shaped(F.linear(hidden, weight, bias), labels, classes, shape, fused)


def _shaped(
    logits: Tensor, labels: Tensor, classes: int, shape: BatchShape, fused: dict[str, Tensor | None]
) -> AuditBatch:
    targets = targets_of(labels, classes, shape.soft, torch.Generator().manual_seed(9))
    batch = AuditBatch(
        "domain", logits, labels, targets, torch.ones_like(labels, dtype=torch.bool),
        **fused,  # type: ignore[arg-type]
    )  # fmt: skip
    if not shape.tokens:
        return batch
    lead = {name: getattr(batch, name).unflatten(0, (2, -1)) for name in _leading(batch)}
    return replace(batch, **lead)


def _leading(batch: AuditBatch) -> Iterator[str]:
    yield from ("logits", "labels", "target_probs", "valid")
    if differentiable(batch)[0] == "hidden":
        yield "hidden"
