"""How far a loss holds: along which axis it parts from the reference first, where, and how."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.auditing.batches import WIDTH, Batch, Shape
from pipeline.auditing.calls import Evaluation, Loss, differentiable, evaluate
from pipeline.auditing.judging import Judgement, Standard, compare
from pipeline.numerics import CONSTANT

POINTS = {
    "gap": (1, 5, 10, 15, 20, 30, 40, 60, 80, 86, 90, 100, 105, 150, 300, 700, 750, 1e3, 3e3, 1e4),
    "confidence": (1, 5, 10, 15, 20, 30, 40, 60, 80, 86, 90, 100, 105, 150, 300, 700, 750, 1e3, 3e3, 1e4),
    "offset": (1, 10, 30, 60, 80, 86, 90, 100, 300, 700, 750, 1e3, 1e4, 1e6),
    "masked": (1, 2),
    "rows": (300, 1000, 3000, 10_000, 30_000, 70_000),
}
CORE = {"gap": 80.0, "confidence": 80.0, "offset": 100.0, "masked": 0.0, "rows": math.inf}
RESOLUTION = 1e-3
ROWS = 4
APART = 12.0


@dataclass(frozen=True)
class Limit:
    """Where a loss and the reference part.

    Attributes:
        axis: gap, confidence, offset, masked or rows.
        limit: the smallest value found at which they differ, in the axis' unit: logits, classes or rows.
        behaviour: what the loss does there.
        core: whether that lies inside the core domain.
        of_gradient: whether it is the gradient that is wrong there, not the value alone.
        value_limit: where the value is no longer finite, if the gradient fails first.
    """

    axis: str
    limit: float
    behaviour: str
    core: bool
    of_gradient: bool
    value_limit: float | None = None


def limits(
    candidate: Loss, standard: Standard, shape: Shape, dtype: torch.dtype, allowed_in: torch.dtype, scale: float | None
) -> list[Limit]:
    """Every axis along which the candidate parts from the reference, those within the core first.

    Args:
        dtype: the precision of the inputs.
        allowed_in: the precision that its rounding is judged by.
        scale: the largest factor between the gradients, where there is one other than 1: it is left out of account.
    """
    classes = next((c for c in shape.num_classes if c >= 10), shape.num_classes[0])
    axes = [axis for axis in POINTS if axis != "rows" or dtype in (torch.float16, torch.bfloat16)]
    if shape.fused:  # designed logits would need D = C, and common offsets and masks a bias
        axes = [axis for axis in axes if axis in ("gap", "confidence", "rows")]
    found = []
    for axis in axes:
        if axis == "masked" and classes < 4:
            continue
        ask = _asker(candidate, standard, shape, axis, classes, dtype, allowed_in, scale)
        limit = _search(axis, ask)
        if limit is None:
            continue
        if limit.of_gradient:
            of_value = _asker(candidate, standard, shape, axis, classes, dtype, allowed_in, scale, value_alone=True)
            later = _search(axis, of_value)
            limit = replace(limit, value_limit=None if later is None else later.limit)
        found.append(limit)
    return sorted(found, key=lambda limit: not limit.core)


Ask = Callable[[float], str | None]
VALUE = "value"


def _search(axis: str, ask: Ask) -> Limit | None:
    """The first of the axis' points that fails, moved towards the one before it by bisection."""
    before = 0.0
    for point in POINTS[axis]:
        behaviour = ask(float(point))
        if behaviour is None:
            before = float(point)
            continue
        low, high = before, float(point)
        while axis not in ("masked", "rows") and high - low > RESOLUTION * high:
            middle = (low + high) / 2
            said = ask(middle)
            low, high, behaviour = (middle, high, behaviour) if said is None else (low, middle, said)
        return Limit(axis, high, behaviour, high <= CORE[axis], not behaviour.startswith(VALUE))
    return None


def _asker(
    candidate: Loss, standard: Standard, shape: Shape, axis: str, classes: int, dtype: torch.dtype,
    allowed_in: torch.dtype, scale: float | None, value_alone: bool = False,
) -> Ask:  # fmt: skip
    def ask(value: float) -> str | None:
        batch = _batch(axis, value, classes, shape).at(dtype)
        fresh = Standard(standard.loss, standard.device)  # these batches are asked once
        exact, own = fresh.exact(batch), fresh.at(batch, dtype)
        if exact.error or own.error or not (_finite(exact) and _finite(own)):
            return None  # the reference itself gives nothing to hold the candidate to
        found = evaluate(candidate, batch, dtype, standard.device)
        if found.error:
            return f"loss raises {found.error}"
        if value_alone:
            return None if found.value is None else _of_value(found.value)
        judgement = compare(found, fresh, batch, dtype, allowed_in)
        return _behaviour(found, judgement, scale)

    return ask


def _behaviour(found: Evaluation, judgement: Judgement, scale: float | None) -> str | None:
    if scale is None:
        right = judgement.same
    elif judgement.interval.determined:
        right = judgement.parallel
    else:
        right = judgement.growth <= CONSTANT * max(1.0, scale)
    if not right:
        gradients = [g for g in found.gradients.values() if g is not None]
        if any(g.isnan().any() for g in gradients):
            return "gradient is NaN"
        if any(g.isinf().any() for g in gradients):
            return "gradient is infinite"
        first = gradients[0].flatten(0, -2)
        return "gradient is exactly 0" if (first == 0).all(-1).any() else "gradient is wrong"
    said = None if found.value is None else _of_value(found.value)
    if said is not None:
        return said
    return "value is wrong" if scale is None and judgement.value_units > CONSTANT else None


def _of_value(value: Tensor) -> str | None:
    return None if value.isfinite() else f"value is {'NaN' if value.isnan() else 'infinite'}"


def _finite(found: Evaluation) -> bool:
    parts = [found.value, *found.gradients.values()]
    return all(part is not None and bool(part.isfinite().all()) for part in parts)


def _batch(axis: str, value: float, classes: int, shape: Shape) -> Batch:
    rows = int(value) if axis == "rows" else ROWS
    draw = torch.Generator().manual_seed(4)
    labels = (torch.arange(rows) * 7 + classes - 1) % classes
    if shape.fused:
        return _fused(axis, value, labels, classes, shape, draw)
    logits = torch.randn(rows, classes, generator=draw, dtype=torch.float64)
    if axis in ("gap", "confidence"):  # one other class alone matters, so that a gap is -log p_y to three digits
        sign = 1 if axis == "confidence" else -1
        rival = (labels + 1) % classes
        logits = (logits - APART).scatter(1, rival[:, None], 0.0).scatter(1, labels[:, None], sign * value)
    elif axis == "offset":
        logits = logits + value * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(rows)[:rows, None]
    elif axis == "masked":
        masked = (labels[:, None] + 1 + torch.arange(int(value))) % classes
        logits = logits.scatter(1, masked, -math.inf)
    logits = logits.float().double()
    return _shaped(logits, labels, classes, shape, {})


def _fused(axis: str, value: float, labels: Tensor, classes: int, shape: Shape, draw: torch.Generator) -> Batch:
    """Rows along their label's weights, which are orthonormal: the label's logit is the length, the others are 0."""
    width = max(WIDTH, classes)
    weight = torch.eye(width, dtype=torch.float64)[:classes] if classes <= 1000 else torch.empty(0)
    noise = torch.randn(len(labels), width, generator=draw, dtype=torch.float64)
    hidden = noise / 8
    if axis != "rows":
        sign = 1 if axis == "confidence" else -1
        hidden = hidden + sign * value * weight[labels]
    bias = torch.zeros(classes, dtype=torch.float64) if shape.bias else None
    hidden = hidden.float().double()
    fused = {"hidden": hidden, "weight": weight, "bias": bias}
    return _shaped(F.linear(hidden, weight, bias), labels, classes, shape, fused)


def _shaped(logits: Tensor, labels: Tensor, classes: int, shape: Shape, fused: dict[str, Tensor | None]) -> Batch:
    targets = F.one_hot(labels, classes).double()
    batch = Batch(
        "domain", logits, labels, targets, torch.ones_like(labels, dtype=torch.bool),
        **fused,  # type: ignore[arg-type]
    )  # fmt: skip
    if not shape.tokens:
        return batch
    lead = {name: getattr(batch, name).unflatten(0, (2, -1)) for name in _leading(batch)}
    return replace(batch, **lead)


def _leading(batch: Batch) -> Iterator[str]:
    yield from ("logits", "labels", "target_probs", "valid")
    if differentiable(batch)[0] == "hidden":
        yield "hidden"
