"""Parts of a finding: the numbers of its evidence, the textbook example, the sentence and the coverage."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from likelihood_lab.audit.classify import Classification, Offset
from likelihood_lab.audit.compare import BatchComparison
from likelihood_lab.audit.context import MEANS, AuditContext
from likelihood_lab.audit.domain import Limit
from likelihood_lab.audit.evaluate import Loss, evaluate
from likelihood_lab.audit.finding import in_words
from likelihood_lab.audit.normaliser import Normaliser
from likelihood_lab.audit.precision import AtPrecision
from likelihood_lab.audit.rounding import CONSTANT, name_of, relative_distance
from likelihood_lab.categorical.batches import UPSTREAM, AuditBatch

CLASSES = ("cat", "dog", "other")
PROBS = (0.1, 0.2, 0.7)
LABEL = 1

Refusals = Sequence[tuple[AuditBatch, torch.dtype, str]]


def evidence(audit: AuditContext, loss: Loss, at: AtPrecision, limits: Sequence[Limit]) -> dict[str, Any]:
    """Return the numbers that audit.json shows for a loss."""
    cases, names = at.cases, list(dict.fromkeys(case.dtype_name for case in at.cases))
    r32, r64 = _distance(cases, torch.float32), _distance(cases, torch.float64)
    entry: dict[str, Any] = {
        "r32": r32,
        "r64": r64,
        "rho": r32 / r64 if r32 is not None and r64 else None,
        "units": {name: max(c.units for c in cases if c.dtype_name == name) for name in names},
        "value_units": {name: max(c.value_units for c in cases if c.dtype_name == name) for name in names},
        "bitwise": f"{sum(case.bitwise for case in cases)} of {len(cases)}",
        "computes_in": None if at.computes_in is None else name_of(at.computes_in),
        "systematic_part": at.systematic,
        "limits": [
            {name: getattr(limit, name) for name in ("axis", "limit", "behaviour", "core", "then")} for limit in limits
        ],
        "reference_divides_by": audit.normaliser.divides_by,
        "oracle_units": audit.oracle_units,
        "example": example(audit, loss),
    }
    if audit.low is not None:
        entry |= _beside_reference(audit, loss, cases)
    return entry


def _distance(cases: Sequence[BatchComparison], dtype: torch.dtype) -> float | None:
    """Return the median of ||g_B - g_A|| / ||g_A|| over batches whose gradient is not nearly 0."""
    kept = [c.distance for c in cases if c.dtype == dtype and c.batch.family in ("ordinary", "random", "mixed")]
    known = [distance for distance in kept if distance == distance]
    return statistics.median(known) if known else None


def example(audit: AuditContext, loss: Loss) -> dict[str, Any] | None:
    """Return both gradients at one picture of a dog: p = (.1, .2, .7) for cat, dog and other.

    None for fused losses: their gradients are not taken by the logits.
    """
    if audit.shape.fused:
        return None
    lead = (1, 1) if audit.shape.tokens else (1,)
    logits = torch.tensor(PROBS, dtype=torch.float64).log().view(*lead, 3)
    if audit.shape.ignore_index == LABEL:
        return None
    labels = torch.full(lead, LABEL)
    targets = torch.nn.functional.one_hot(labels, 3).double()
    batch = AuditBatch("example", logits, labels, targets, torch.ones(lead, dtype=torch.bool))
    entry: dict[str, Any] = {"classes": list(CLASSES), "probs": list(PROBS), "label": LABEL}
    for name, fn in (("gradient", loss), ("reference_gradient", audit.reference)):
        result = evaluate(fn, batch, audit.low or torch.float64, audit.device)
        entry[name] = None if result.error is not None else result.exact("logits").flatten().tolist()
    return entry


def _beside_reference(audit: AuditContext, loss: Loss, cases: Sequence[BatchComparison]) -> dict[str, Any]:
    """Return the errors of a low-precision loss and of the reference in the same dtype, relative to float64."""
    mine: list[float] = []
    own: list[float] = []
    values: tuple[list[float], list[float]] = ([], [])
    for case in cases:
        exact, standard = audit.standard.exact(case.batch), audit.standard.at(case.batch, case.dtype)
        if standard.error is not None or exact.value is None or standard.value is None:
            continue
        result = evaluate(loss, case.batch, case.dtype, audit.device)
        name = next(iter(exact.gradients))
        mine.append(_off(result.exact(name), exact.exact(name)))
        own.append(_off(standard.exact(name), exact.exact(name)))
        values[0].append(abs(case.value_error))
        values[1].append(abs(standard.value.double() - exact.value.double()).item())
    errors = {
        "gradient_error": statistics.median(mine), "reference_gradient_error": statistics.median(own),
        "value_error": statistics.median(values[0]), "reference_value_error": statistics.median(values[1]),
    }  # fmt: skip
    gradient = _compared(errors["gradient_error"], errors["reference_gradient_error"])
    value = _compared(errors["value_error"], errors["reference_value_error"])
    return errors | {"beside_reference": f"{gradient} in the gradients, {value} in the value"}


def _off(gradient: Tensor, exact: Tensor) -> float:
    known = exact.isfinite()
    return relative_distance(gradient[known], exact[known])


def _compared(mine: float, own: float) -> str:
    if mine == own:
        return "as close to the truth as the reference"
    if not mine <= own:
        return f"further from the truth than the reference ({mine:.2g} against {own:.2g})"
    return f"closer to the truth than the reference ({mine:.2g} against {own:.2g})"


def sentence(
    audit: AuditContext,
    decision: Classification,
    offset: Offset | None,
    divisor: Normaliser,
    limits: Sequence[Limit],
    refused: Refusals,
    numbers: Mapping[str, Any],
) -> str:
    """Return the reason for the word and the facts that belong to it, as clauses in one line."""
    domain = limits[0] if limits else None
    clauses = [_domain(domain, decision) if decision.word == "domain" else decision.reason]
    if numbers["computes_in"] == "float32" and decision.word != "different":
        clauses.append("computes in float32 and is judged there")
    if offset is not None:
        clauses.append(_offset(offset))
    if decision.word == "reweighted":
        clauses.append(_divisors(divisor.divides_by, audit.normaliser.divides_by))
    if domain is not None and not (decision.word == "domain" and domain.core):
        clauses.append(in_words(domain))
    if "beside_reference" in numbers:
        clauses.append(numbers["beside_reference"])
    if refused:
        clauses.append(f"raises on {len(refused)} of {len(audit.cases)} batches ({refused[0][2]})")
    return "; ".join(clauses)


def _domain(domain: Limit | None, decision: Classification) -> str:
    if domain is not None and domain.core:
        return f"the same for ordinary rows, but {in_words(domain)}, within the core"
    if decision.worst is None:
        return "the same for ordinary rows, wrong elsewhere in the core"
    size = f"{decision.worst.units:.3g} units of rounding, where {CONSTANT:g} are allowed"
    return f"the same for ordinary rows, wrong elsewhere in the core: {size} ({decision.worst.where})"


def _offset(offset: Offset) -> str:
    amount = f"{offset.constant:.6g} nats"
    moving = f"a constant in the logits that moves with the targets, {amount} for one set of them"
    return f"values differ by {moving if offset.moves else amount}"


def _divisors(mine: str, reference: str) -> str:
    if "a constant" in (mine, reference):
        return f"this {_kind(mine)}, the reference {_kind(reference)}"
    own = "is not a sum over rows" if mine == "not a sum over rows" else f"divides by {mine}"
    return f"{own}, the reference divides by {reference}"


def _kind(divides_by: str) -> str:
    """Say "is a sum" or "is a mean", which explains the divisor better than the divisor itself."""
    if divides_by == "a constant":
        return "is a sum (constant divisor)"
    if divides_by == "not a sum over rows":
        return "is not a sum over rows"
    return f"is a mean (divides by {divides_by})" if divides_by in MEANS else f"divides by {divides_by}"


def covered(audit: AuditContext, cases: Sequence[BatchComparison]) -> tuple[str, ...]:
    """Say what the audit covered."""
    classes = ", ".join(str(c) for c in sorted({case.batch.num_classes for case in cases}))
    rows = [case.batch.num_rows for case in cases]
    dtypes = ", ".join(dict.fromkeys(case.dtype_name for case in cases))
    entries = [
        f"{len(cases)} batches: C = {classes}; {min(rows)} to {max(rows)} rows; {dtypes}; {audit.device}",
        "soft targets" if audit.shape.soft else "one-hot targets",
    ]
    if any(not case.batch.valid.all() for case in cases):
        entries.append(f"targets ignored by {audit.shape.ignore_index}")
    if audit.own_batches:
        entries.append(f"{len(audit.own_batches)} batches of the user's own")
    return tuple(entries)


def not_covered(audit: AuditContext, refused: Refusals) -> tuple[str, ...]:
    """Say what the audit did not cover, and why."""
    classes = sorted({batch.num_classes for batch, _ in audit.cases})
    rows = max(batch.num_rows for batch, _ in audit.cases)
    entries = [
        f"other numbers of classes than {', '.join(map(str, classes))}; more than {rows} rows; "
        f"gradients from outside above {UPSTREAM:g}",
        f"state that shows only after more than {2 * len(audit.cases)} calls",
        "other devices, builds of torch, and compiled graphs",
    ]
    if not audit.shape.soft:
        entries.append("soft targets")
    if audit.shape.ignore_index is None:
        entries.append("ignored targets")
    if audit.device.type == "cuda":
        entries.append("labels out of range: on a GPU they end the process")
    if audit.refused:
        entries.append(f"{audit.refused} batches that the reference refuses")
    reasons: dict[str, list[str]] = {}
    for batch, dtype, error in refused:
        reasons.setdefault(error, []).append(f"{name_of(dtype)}, {batch.where}")
    entries += [f"{len(places)} batches, such as {places[0]}: {error}" for error, places in reasons.items()]
    return tuple(entries)
