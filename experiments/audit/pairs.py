"""Pairs with a known truth: the catalogue, other packages' losses, mutants, planted faults, correct forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.audit.case import LOGITS_AND_LABELS, Case
from experiments.audit.catalogue import CATALOGUE
from experiments.audit.honest import FORMS
from experiments.audit.planted import BLIND_SPOTS
from experiments.audit.third_party import cases
from likelihood_lab.audit.context import audit_of
from likelihood_lab.audit.evaluate import Loss
from likelihood_lab.audit.rounding import unit_roundoff
from likelihood_lab.categorical.mutants import FAULT_SIZES, MUTANTS

SAME = ("identical", "rounding", "offset")
ON_TARGETS = ("logits", "target_probs")
SIZES = (1e-1, 1e-2, 1e-4, 1e-6, 1e-9, 1e-12)
BELOW = 2  # sizes below the smallest that is detected

Fn = Callable[..., Any]


@dataclass(frozen=True)
class Pair:
    """A case, its origin, and a factory for fresh candidates.

    Attributes:
        origin: "catalogue", "package", "mutant", "below the limit", "planted" or "honest".
        make: returns a fresh candidate; some candidates count their calls.
        size: d of a mutant.
    """

    origin: str
    case: Case
    make: Callable[[], Fn]
    size: float | None = None

    @property
    def same(self) -> bool:
        """Whether the candidate trains like the reference."""
        return self.case.objective in SAME


def pairs() -> tuple[list[Pair], list[str]]:
    """Return (pairs, packages that cannot be imported here)."""
    packages, skipped = cases()
    found = [_of("catalogue", case) for case in CATALOGUE if case.fn is not None]
    found += [_of("package", case) for case in packages]
    return [*found, *mutants(), *honest(), *planted()], skipped


def _of(origin: str, case: Case) -> Pair:
    fn = cast(Fn, case.fn)
    return Pair(origin, case, lambda: fn)


def mutants() -> Iterator[Pair]:
    """Return every mutant at `SIZES` down to the smallest that float64 detects, and some below it."""
    for name, mutant in MUTANTS.items():
        limit = limits()[name]["float64"] or FAULT_SIZES[0]
        sizes = [*(d for d in SIZES if d > limit), limit]
        below = [d for d in FAULT_SIZES if d < limit][:BELOW]
        for d in (*sizes, *below):
            case = Case("", f"{name}, d = {d:.0e}", partial(mutant, d=d), ON_TARGETS, objective=_word(name, d))
            yield Pair("mutant" if d >= limit else "below the limit", case, partial(partial, mutant, d=d), d)


def _word(mutant: str, d: float) -> str:
    if mutant == "scale 1 + d":
        return "scaled"
    if mutant == "epsilon in the log" and d < unit_roundoff(torch.float64):
        return "domain"  # p + d equals p in float64 on every ordinary row
    return "different"


@cache
def limits() -> Any:
    """Return {mutant: {precision: smallest d detected}} on the grid of mean cross-entropy."""
    return audit_of(Loss(F.cross_entropy, LOGITS_AND_LABELS), ON_TARGETS).detection_limits


def planted() -> Iterator[Pair]:
    """Return the planted faults."""
    for fault in BLIND_SPOTS:
        case = Case("", fault.title, fault.make(), objective=fault.objective, side_effects=fault.side_effects)
        yield Pair("planted", case, fault.make)


def honest() -> Iterator[Pair]:
    """Return the correct forms, and each again with float32 inside."""
    for name, form in FORMS.items():
        yield _of("honest", Case("", name, form, objective="rounding"))
    for name, form in FORMS.items():
        yield _of("honest", Case("", f"{name}, float32 inside", _inside(form), objective="rounding"))


def _inside(form: Callable[[Tensor, Tensor], Tensor]) -> Fn:
    """Return the form with its logits converted to float32."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return form(logits.to(torch.float32), labels)

    return loss
