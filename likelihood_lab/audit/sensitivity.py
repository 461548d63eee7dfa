"""Measure the grid's detection limits: mutants of falling size are audited as any candidate is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from likelihood_lab.audit.compare import ReferenceEvaluations, judge
from likelihood_lab.audit.evaluate import Loss
from likelihood_lab.audit.precision import systematic_part
from likelihood_lab.audit.rounding import SYSTEMATIC, name_of
from likelihood_lab.categorical.batches import AuditBatch, BatchShape
from likelihood_lab.categorical.mutants import FAULT_SIZES, MUTANTS, Mutant, mean_cross_entropy

LARGEST = 8192  # logits; larger batches are left out to save time, although they may catch smaller faults
INSIDE = "float32 inside float64"
_ARGS = ("logits", "target_probs")

Cases = Sequence[tuple[AuditBatch, torch.dtype]]


def smallest_differences(
    shape: BatchShape, cases: Cases, device: torch.device
) -> Mapping[str, Mapping[str, float | None]]:
    """Return {mutant: {precision: the smallest d that is detected}}; None if 0.1 is not detected either.

    "float32 inside float64" is a mutant that computes in float32 although its inputs are float64.
    """
    standard = ReferenceEvaluations(Loss(mean_cross_entropy, _ARGS), device)
    small = [(batch, dtype) for batch, dtype in cases if batch.logits.numel() <= LARGEST]
    dtypes = list(dict.fromkeys(dtype for _, dtype in small))
    limits: dict[str, dict[str, float | None]] = {}
    for name, mutant in MUTANTS.items():
        entry: dict[str, float | None] = {}
        for dtype in dtypes:
            caught = partial(_differs, standard, [batch for batch, other in small if other is dtype], dtype)
            entry[name_of(dtype)] = smallest_caught(caught, mutant)
        if torch.float64 in dtypes:
            noise = smallest_caught(partial(_systematic, standard, shape), mutant)
            entry[INSIDE] = min((d for d in (noise, entry.get("float32")) if d is not None), default=None)
        limits[name] = entry
    return limits


def smallest_caught(caught: Any, mutant: Mutant) -> float | None:
    """Bisect FAULT_SIZES for the smallest d at which `caught(mutant, d)` is true; None if it never is."""
    low, high = 0, len(FAULT_SIZES)  # caught below `low`, not from `high` on
    while low < high:
        middle = (low + high) // 2
        if caught(mutant, FAULT_SIZES[middle]):
            low = middle + 1
        else:
            high = middle
    return FAULT_SIZES[low - 1] if low else None


def _differs(
    standard: ReferenceEvaluations, batches: Sequence[AuditBatch], dtype: torch.dtype, mutant: Mutant, d: float
) -> bool:
    loss = Loss(partial(mutant, d=d), _ARGS)
    return any(not judge(loss, standard, batch, dtype).same for batch in batches)


def _systematic(standard: ReferenceEvaluations, shape: BatchShape, mutant: Mutant, d: float) -> bool:
    def inside(logits: Tensor, target_probs: Tensor) -> Tensor:
        return mutant(logits.float(), target_probs.float(), d)

    return systematic_part(Loss(inside, _ARGS), standard, shape, torch.float64) >= SYSTEMATIC
