"""How far a loss holds: along which axis it parts from the reference first, where, and how."""

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
APART = 12.0  # logits between the one class that matters and those that do not, give or take SPREAD
SPREAD = 3.0
CORE = {
    "gap": CORE_GAP, "confidence": CORE_GAP - APART - SPREAD, "offset": CORE_OFFSET, "masked": 0.0, "rows": math.inf,
}  # fmt: skip
RESOLUTION = 1e-3
ROWS = 4
MANY = 1000  # classes from which on the last layer is narrower than they are many
MOST = 2**22  # logits in a batch of many rows


@dataclass(frozen=True)
class Limit:
    """Where a loss and the reference part.

    Attributes:
        axis: gap, confidence, offset, masked or rows.
        limit: the smallest value found at which they differ, in the axis' unit: logits, classes or rows.
        behaviour: what the loss does there.
        core: whether the gradient fails inside the core domain.
        then: what fails further out, where gradient and value do not fail together.
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
    """Every axis along which the candidate parts from the reference in `dtype`, those within the core first.

    Args:
        scale: the largest factor between the gradients, where there is one other than 1: it is left out of account.
        offset: whether the values differ by a constant, which is left out too.
    """
    classes = next((c for c in shape.num_classes if c >= 10), shape.num_classes[0])
    axes = [axis for axis in POINTS if axis != "rows" or dtype in (torch.float16, torch.bfloat16)]
    if shape.fused:  # designed logits would need D = C, and common offsets and masks a bias
        axes = [axis for axis in axes if axis in ("gap", "confidence", "rows")]
    if classes < max(POINTS["masked"]) + 2:
        axes = [axis for axis in axes if axis != "masked"]
    found = [
        _limit(axis, _DomainProbe(candidate, standard, shape, axis, classes, dtype, scale, offset)) for axis in axes
    ]
    return sorted((limit for limit in found if limit is not None), key=lambda limit: not limit.core)


def _limit(axis: str, ask: _DomainProbe) -> Limit | None:
    """The nearer of where the gradient and where the value fails."""
    gradient = _search(axis, lambda place: ask(place).gradient)
    value = _search(axis, lambda place: ask(place).value)
    failed = sorted((found for found in (gradient, value) if found is not None), key=lambda found: found[0])
    if not failed:
        return None
    (nearest, behaviour), *rest = failed
    then = f"{rest[0][1]} from {rest[0][0]:.4g}" if rest and rest[0][0] > nearest * (1 + RESOLUTION) else None
    return Limit(axis, nearest, behaviour, gradient is not None and gradient[0] <= CORE[axis], then)


def _search(axis: str, ask: Callable[[float], str | None]) -> tuple[float, str] | None:
    """The first of the axis' points that fails, moved towards the one before it by bisection."""
    before = start = 1.0 if axis == "rows" else 0.0
    for point in POINTS[axis]:
        behaviour = ask(float(point))
        if behaviour is None:
            before = float(point)
            continue
        low, high = before, float(point)
        if low == start and axis != "masked" and (said := ask(low)) is not None:
            return low, said
        whole = axis == "rows"
        while axis != "masked" and high - low > max(RESOLUTION * high, float(whole)):
            middle = float((low + high) // 2) if whole else (low + high) / 2
            said = ask(middle)
            low, high, behaviour = (middle, high, behaviour) if said is None else (low, middle, said)
        return high, behaviour
    return None


@dataclass(frozen=True)
class _Said:
    """What is wrong with gradient and value at one place, in words."""

    gradient: str | None = None
    value: str | None = None


@dataclass
class _DomainProbe:
    """Compares candidate and reference at a place on an axis, each place once."""

    candidate: Loss
    standard: ReferenceEvaluations
    shape: BatchShape
    axis: str
    classes: int
    dtype: torch.dtype
    scale: float | None
    offset: bool
    heard: dict[float, _Said] = field(default_factory=dict)

    def __call__(self, place: float) -> _Said:
        if place not in self.heard:
            self.heard[place] = self._ask(place)
        return self.heard[place]

    def _ask(self, place: float) -> _Said:
        if self.axis == "rows" and place * self.classes > MOST:
            return _Said()
        batch = _batch(self.axis, place, self.classes, self.shape).at(self.dtype)
        fresh = ReferenceEvaluations(self.standard.loss, self.standard.device)  # these batches are asked once
        exact, own = fresh.exact(batch), fresh.at(batch, self.dtype)
        if exact.error or own.error or not (_finite(exact) and _finite(own)):
            return _Said()  # the reference itself gives nothing to hold the candidate to
        found = evaluate(self.candidate, batch, self.dtype, self.standard.device)
        if found.error:
            return _Said(f"loss raises {found.error}")
        judgement = compare(found, fresh, batch, self.dtype)
        gradient = None if self._holds(judgement) else _of_gradient(found)
        return _Said(gradient, None if found.value is None else self._of_value(found.value, judgement))

    def _holds(self, judgement: BatchComparison) -> bool:
        if self.scale is None:
            return judgement.same
        if judgement.interval.determined:
            return judgement.parallel
        return judgement.growth <= CONSTANT * max(1.0, self.scale)

    def _of_value(self, value: Tensor, judgement: BatchComparison) -> str | None:
        if not value.isfinite():
            return f"value is {'NaN' if value.isnan() else 'infinite'}"
        return "value is wrong" if self.scale is None and not self.offset and judgement.value_units > CONSTANT else None


def _of_gradient(found: Evaluation) -> str:
    gradients = [g for g in found.gradients.values() if g is not None]
    if any(g.isnan().any() for g in gradients):
        return "gradient is NaN"
    if any(g.isinf().any() for g in gradients):
        return "gradient is infinite"
    first = gradients[0].flatten(0, -2)
    return "gradient is exactly 0" if (first == 0).all(-1).any() else "gradient is wrong"


def _finite(found: Evaluation) -> bool:
    parts = [found.value, *found.gradients.values()]
    return all(part is not None and bool(part.isfinite().all()) for part in parts)


def _batch(axis: str, value: float, classes: int, shape: BatchShape) -> AuditBatch:
    rows = int(value) if axis == "rows" else ROWS
    draw = torch.Generator().manual_seed(4)
    labels = avoid_ignore_index((torch.arange(rows) * 7 + classes - 1) % classes, classes, shape.ignore_index)
    if shape.fused:
        return _fused(axis, value, labels, classes, shape, draw)
    logits = torch.randn(rows, classes, generator=draw, dtype=torch.float64)
    if axis in ("gap", "confidence"):  # one other class alone matters, so that a gap is -log p_y to three digits
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
    axis: str, value: float, labels: Tensor, classes: int, shape: BatchShape, draw: torch.Generator
) -> AuditBatch:
    """Rows along their label's weights, which are orthonormal: the label's logit is the length, the others are 0."""
    width = max(WIDTH, classes) if classes <= MANY else WIDTH
    weight = torch.eye(width, dtype=torch.float64)[:classes]
    if classes > MANY:  # a direction for each of the labels alone
        used = labels.unique()
        weight = torch.zeros(classes, width, dtype=torch.float64)
        weight[used, torch.arange(len(used)) % width] = 1.0
    noise = torch.randn(len(labels), width, generator=draw, dtype=torch.float64)
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
