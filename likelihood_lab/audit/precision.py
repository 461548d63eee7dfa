"""Find the precision in which a loss computes, and whether its error there is noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from likelihood_lab.audit.compare import BatchComparison, ReferenceEvaluations
from likelihood_lab.audit.evaluate import Evaluation, Loss, differentiable, equal_evaluations, evaluate
from likelihood_lab.audit.rounding import systematic
from likelihood_lab.categorical.batches import AuditBatch, BatchShape, make_batch

COARSER = (torch.bfloat16, torch.float16, torch.float32)  # the coarsest first
JITTERS = 32
JITTER = 2.0**-8  # relative; with one unit in the last place, neighbours would round alike
NOISY_FAMILIES = ("ordinary", "random")  # without saturated rows: p - 1 = 0 in float32 has a constant error
ROWS = 64
_INPUTS = ("logits", "hidden", "weight", "bias")


@dataclass(frozen=True)
class AtPrecision:
    """Comparisons of a loss, by the units of the precision in which it computes.

    Attributes
    ----------
    computes_in: a coarser precision than the dtype of its inputs, if it rounds to one.
    systematic: the systematic part of its error there, if measured.
    """

    cases: Sequence[BatchComparison]
    computes_in: torch.dtype | None = None
    systematic: float | None = None


def computes_in(loss: Loss, shape: BatchShape, device: torch.device) -> torch.dtype | None:
    """Return the coarsest dtype to which float64 inputs can be rounded without changing a bit of the results.

    None if float32 is already too coarse, if the loss raises on float64, or if it ignores its inputs.
    """
    generator = torch.Generator().manual_seed(1)
    lead = (2, 4) if shape.tokens else (8,)
    batch = make_batch("random", lead, shape.num_classes[0], shape, generator)
    noise = lambda t: t + 1e-3 * torch.randn(t.shape, generator=generator, dtype=torch.float64)  # noqa: E731
    batch = _mapped(batch, noise)
    result = evaluate(loss, batch, torch.float64, device)
    if result.error is not None or equal_evaluations(
        result, evaluate(loss, _mapped(batch, noise), torch.float64, device)
    ):
        return None
    for dtype in COARSER:
        rounded = _mapped(batch, lambda t, d=dtype: t.to(d).double())  # type: ignore[misc]
        if equal_evaluations(result, evaluate(loss, rounded, torch.float64, device)):
            return dtype
    return None


def systematic_part(loss: Loss, standard: ReferenceEvaluations, shape: BatchShape, dtype: torch.dtype) -> float:
    """Return how systematic the error of a loss is that computes in float32: about 1 for noise.

    The result is the largest ratio `systematic` over batches and inputs. Each batch is evaluated `JITTERS` times with
    slightly different inputs, so that each one rounds differently. The residuals to the exact gradient, after one
    factor for each batch is removed, are averaged. Rounding averages out; a small mathematical difference stays. The
    number of rows is a power of two, because 1/N would otherwise be rounded too. If the reference's own error in
    float32 is systematic, as with the exponentials of many classes, the ratio is relative to that error.

    Args:
        dtype: dtype of the inputs; float64 if the loss accepts it.
    """
    generator = torch.Generator().manual_seed(2)
    lead = (2, ROWS // 2) if shape.tokens else (ROWS,)
    no_ignored = replace(shape, ignoring=False)
    largest = 0.0
    for family in NOISY_FAMILIES:
        batch = make_batch(family, lead, shape.typical_classes, no_ignored, generator)
        moved = [_mapped(batch, lambda t: _jittered(t, generator)) for _ in range(JITTERS)]
        exact = [evaluate(standard.loss, one, torch.float64, standard.device) for one in moved]
        mine = _systematic(loss, moved, exact, dtype, standard.device)
        own = _systematic(standard.loss, moved, exact, torch.float32, standard.device)
        largest = max(largest, *(_beside(mine[name], own[name]) for name in mine))
    return largest


def _systematic(
    loss: Loss, batches: Sequence[AuditBatch], exact: Sequence[Evaluation], dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Return `systematic` of the residuals of each input's gradient; the first input's gradient gives the factor."""
    names = differentiable(batches[0])
    residuals: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch, truth in zip(batches, exact, strict=True):
        result = evaluate(loss, batch, dtype, device)
        if result.error is not None:
            return dict.fromkeys(names, math.inf)
        first, right = result.exact(names[0]), truth.exact(names[0])
        factor = (first * right).sum() / right.square().sum()
        for name in names:
            residuals[name].append(result.exact(name) - factor * truth.exact(name))
    return {name: systematic(torch.stack(rests)) for name, rests in residuals.items()}


def _beside(mine: float, own: float) -> float:
    return mine / own if 1 < own < math.inf else mine


def _mapped(batch: AuditBatch, change: Callable[[Tensor], Tensor]) -> AuditBatch:
    """Return the batch with changed inputs. The logits of a fused batch are computed again."""
    changed: dict[str, Any] = {name: change(t) for name in _INPUTS if (t := getattr(batch, name)) is not None}
    if batch.hidden is not None:
        bias = changed.get("bias")
        changed["logits"] = torch.nn.functional.linear(changed["hidden"], changed["weight"], bias)
    return replace(batch, **changed)


def _jittered(tensor: Tensor, generator: torch.Generator) -> Tensor:
    moved = 2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1
    return (tensor * (1 + JITTER * moved)).float().double()
