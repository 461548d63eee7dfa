"""In which precision a loss really computes, and whether what it is off by there is noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from likelihood_lab.audit.compare import ReferenceEvaluations
from likelihood_lab.audit.evaluate import Evaluation, Loss, differentiable, evaluate, same_bits
from likelihood_lab.audit.rounding import systematic
from likelihood_lab.categorical.batches import AuditBatch, BatchShape, make_batch

COARSER = (torch.bfloat16, torch.float16, torch.float32)  # the coarsest first
JITTERS = 32
JITTER = 2.0**-8  # relative: one unit in the last place would leave the roundings of neighbours alike
NOISY_FAMILIES = ("ordinary", "random")  # where p - 1 is 0 in float32, its error is the same each time
ROWS = 64
_INPUTS = ("logits", "hidden", "weight", "bias")


def computes_in(loss: Loss, shape: BatchShape, device: torch.device) -> torch.dtype | None:
    """The coarsest precision that float64 inputs may be rounded to without a bit of value or gradient changing.

    None where even float32 is too coarse, where the loss does not take float64, and where it does not notice its
    inputs at all.
    """
    draw = torch.Generator().manual_seed(1)
    lead = (2, 4) if shape.tokens else (8,)
    batch = make_batch("random", lead, shape.num_classes[0], shape, draw)
    noise = lambda t: t + 1e-3 * torch.randn(t.shape, generator=draw, dtype=torch.float64)  # noqa: E731
    batch = _mapped(batch, noise)
    found = evaluate(loss, batch, torch.float64, device)
    if found.error is not None or _same(found, evaluate(loss, _mapped(batch, noise), torch.float64, device)):
        return None
    for dtype in COARSER:
        rounded = _mapped(batch, lambda t, d=dtype: t.to(d).double())  # type: ignore[misc]
        if _same(found, evaluate(loss, rounded, torch.float64, device)):
            return dtype
    return None


def systematic_part(loss: Loss, standard: ReferenceEvaluations, shape: BatchShape, dtype: torch.dtype) -> float:
    """How far the error of a loss that computes in float32 is from noise: the largest ratio over batches and inputs.

    Each batch is asked `JITTERS` times with inputs a little apart, so that each rounds in its own way. The residual to
    the exact gradient, one factor a batch removed, is averaged: rounding averages out, a small mathematical difference
    stays. The number of rows is a power of two, since 1/N would otherwise be rounded too. Where the reference's own
    error in float32 is no noise either, as the exponentials of many classes are off by the same each time, the ratio
    is to its.

    Args:
        dtype: of the inputs handed over; float64 where the loss takes it.
    """
    draw = torch.Generator().manual_seed(2)
    lead = (2, ROWS // 2) if shape.tokens else (ROWS,)
    classes = next((c for c in shape.num_classes if c >= 10), shape.num_classes[0])
    asked = replace(shape, ignoring=False)
    largest = 0.0
    for family in NOISY_FAMILIES:
        batch = make_batch(family, lead, classes, asked, draw)
        moved = [_mapped(batch, lambda t: _jittered(t, draw)) for _ in range(JITTERS)]
        exact = [evaluate(standard.loss, one, torch.float64, standard.device) for one in moved]
        mine = _systematic(loss, moved, exact, dtype, standard.device)
        own = _systematic(standard.loss, moved, exact, torch.float32, standard.device)
        largest = max(largest, *(_beside(mine[name], own[name]) for name in mine))
    return largest


def _systematic(
    loss: Loss, batches: Sequence[AuditBatch], exact: Sequence[Evaluation], dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """`systematic` of the residuals of every input's gradient; the factor is that of the first input's."""
    names = differentiable(batches[0])
    residuals: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch, truth in zip(batches, exact, strict=True):
        found = evaluate(loss, batch, dtype, device)
        if found.error is not None:
            return dict.fromkeys(names, math.inf)
        first, right = found.exact(names[0]), truth.exact(names[0])
        factor = (first * right).sum() / right.square().sum()
        for name in names:
            residuals[name].append(found.exact(name) - factor * truth.exact(name))
    return {name: systematic(torch.stack(rests)) for name, rests in residuals.items()}


def _beside(mine: float, own: float) -> float:
    return mine / own if 1 < own < math.inf else mine


def _mapped(batch: AuditBatch, change: Callable[[Tensor], Tensor]) -> AuditBatch:
    """A batch whose inputs are changed; logits of a fused one are made anew."""
    changed: dict[str, Any] = {name: change(t) for name in _INPUTS if (t := getattr(batch, name)) is not None}
    if batch.hidden is not None:
        bias = changed.get("bias")
        changed["logits"] = torch.nn.functional.linear(changed["hidden"], changed["weight"], bias)
    return replace(batch, **changed)


def _jittered(tensor: Tensor, draw: torch.Generator) -> Tensor:
    moved = 2 * torch.rand(tensor.shape, generator=draw, dtype=torch.float64) - 1
    return (tensor * (1 + JITTER * moved)).float().double()


def _same(a: Evaluation, b: Evaluation) -> bool:
    both = [(a.value, b.value), *((a.gradients[name], b.gradients.get(name)) for name in a.gradients)]
    return all(x is not None and same_bits(x, y) for x, y in both)
