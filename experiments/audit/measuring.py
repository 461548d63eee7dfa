"""Measure the errors of correct forms and mutants in units of rounding, to calibrate the audit's two constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.audit.case import LOGITS_AND_LABELS
from experiments.audit.honest import FORMS, HonestForm
from experiments.audit.pairs import ON_TARGETS
from likelihood_lab.audit.context import AuditContext, audit_of
from likelihood_lab.audit.evaluate import Loss, evaluate
from likelihood_lab.audit.precision import systematic_part
from likelihood_lab.audit.rounding import in_units, row_errors
from likelihood_lab.audit.sensitivity import LARGEST
from likelihood_lab.categorical.batches import AuditBatch
from likelihood_lab.categorical.mutants import FAULT_SIZES, MUTANTS, Mutant, mean_cross_entropy

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NO_FORM = {
    torch.float64: ("float32 and back",),  # float32 inside: the other constant covers it
    torch.float16: ("log of softmax", "log of softmax at the label"),  # p underflows at 17 nats: `domain`, not rounding
}
SMALLEST = 0.1  # units; smaller mutants are not measured


@dataclass(frozen=True)
class Units:
    """Largest error over all rows of the grid.

    Attributes:
        gradient: in the unit of the rounding rule.
        rootless: in the same unit without sqrt(C).
        value: of the objective's value, in the value's unit.
        classes: the C of the batch with the largest `rootless`.
    """

    gradient: float
    rootless: float
    value: float
    classes: int


class Ruler:
    """Grid of one precision, with the exact gradients and the units of its rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.audit = audit_of(Loss(F.cross_entropy, LOGITS_AND_LABELS), LOGITS_AND_LABELS, dtype=dtype)
        self.cells = [self._cell(batch) for batch, _ in self.audit.cases]

    def _cell(self, batch: AuditBatch) -> tuple[AuditBatch, Tensor, Tensor, Tensor]:
        """Return (batch, exact gradient [N, C], units [N], units without sqrt(C) [N])."""
        standard = self.audit.standard
        exact = standard.exact(batch).exact("logits")
        rounding = standard.rounding(batch, self.dtype)["logits"]
        own = row_errors(standard.at(batch, self.dtype).exact("logits"), exact)
        rows = standard.rows(batch)
        rootless = rounding * (1 + rows.magnitude) / rows.reach
        return batch, exact, torch.maximum(rounding, own), torch.maximum(rootless, own)

    def largest(self, loss: Loss, most: float = math.inf) -> Units:
        """Return the largest units of a loss over the batches of at most so many logits."""
        found = []
        for batch, exact, unit, rootless in self.cells:
            if batch.logits.numel() > most:
                continue
            asked = evaluate(loss, batch, self.dtype, self.audit.device)
            if asked.error is not None or asked.value is None:
                return Units(math.inf, math.inf, math.inf, 0)
            errors = row_errors(asked.exact("logits"), exact)
            truth = cast(Tensor, self.audit.standard.exact(batch).value)
            off = abs(asked.value.double() - truth).item() / self.audit.standard.value_unit(batch, self.dtype)
            units = [in_units(errors, size).max().item() for size in (unit, rootless)]
            found.append(Units(units[0], units[1], off if off == off else math.inf, batch.num_classes))
        worst = max(found, key=lambda units: units.rootless)
        return Units(
            max(u.gradient for u in found), worst.rootless, max(u.value for u in found), worst.classes
        )  # fmt: skip


def honest_units(ruler: Ruler) -> Mapping[str, Units]:
    """Return the units of every form that is correct in this precision."""
    left_out = NO_FORM.get(ruler.dtype, ())
    return {name: ruler.largest(Loss(form, LOGITS_AND_LABELS)) for name, form in FORMS.items() if name not in left_out}


def mutant_units(ruler: Ruler) -> Mapping[str, Mapping[float, float]]:
    """Return {mutant: {d: units}}, from the largest d down to one without effect, and for d = 0."""
    unharmed = ruler.largest(Loss(mean_cross_entropy, ON_TARGETS), LARGEST).gradient

    def measure(mutant: Mutant, d: float) -> float:
        return ruler.largest(Loss(partial(mutant, d=d), ON_TARGETS), LARGEST).gradient

    return {name: _followed(partial(measure, mutant), SMALLEST) | {0.0: unharmed} for name, mutant in MUTANTS.items()}


def _followed(measure: Callable[[float], float], least: float) -> dict[float, float]:
    found: dict[float, float] = {}
    for d in FAULT_SIZES:
        found[d] = measure(d)
        if found[d] < least:
            break
    return found


def smallest_caught(units: Mapping[float, float], constant: float) -> float | None:
    """Return the smallest d from which on all are above the constant; 0 if d = 0 is above it too."""
    caught = None
    for d, size in sorted(units.items(), reverse=True):
        if not size > constant:
            break
        caught = d
    return caught


# --- the systematic part of losses that compute in float32 for float64 inputs


def honest_parts(audit: AuditContext) -> Mapping[str, float]:
    """Return the systematic part of every correct form with float32 inside."""
    return {name: _part(audit, Loss(_inside(form), LOGITS_AND_LABELS)) for name, form in FORMS.items()}


def mutant_parts(audit: AuditContext) -> Mapping[str, Mapping[float, float]]:
    """Return {mutant: {d: systematic part}}, d from 1e-5 down by half decades, without scales, which it ignores."""
    sizes = [d for d in FAULT_SIZES if 1e-10 < d < 2e-5]
    unharmed = _part(audit, Loss(_mutant_inside(lambda z, y, _: mean_cross_entropy(z, y), 0.0), ON_TARGETS))
    return {
        name: {d: _part(audit, Loss(_mutant_inside(mutant, d), ON_TARGETS)) for d in sizes} | {0.0: unharmed}
        for name, mutant in MUTANTS.items()
        if not name.startswith("scale")
    }


def _part(audit: AuditContext, loss: Loss) -> float:
    return systematic_part(loss, audit.standard, audit.shape, torch.float64)


def _inside(form: HonestForm) -> HonestForm:
    return lambda logits, labels: form(logits.float(), labels)


def _mutant_inside(mutant: Callable[[Tensor, Tensor, float], Tensor], d: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, target_probs: mutant(logits.float(), target_probs.float(), d)
