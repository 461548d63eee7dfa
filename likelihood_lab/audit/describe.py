"""A finding in numbers and in words: distances, units, the textbook example, the sentence and what was covered."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from likelihood_lab.audit.classify import Classification, Offset
from likelihood_lab.audit.compare import BatchComparison
from likelihood_lab.audit.context import AuditContext, name_of
from likelihood_lab.audit.domain import Limit
from likelihood_lab.audit.evaluate import Loss, evaluate
from likelihood_lab.audit.finding import Finding, in_words
from likelihood_lab.audit.normaliser import Normaliser
from likelihood_lab.audit.rounding import CONSTANT, relative_distance
from likelihood_lab.categorical.batches import UPSTREAM, AuditBatch

CLASSES = ("cat", "dog", "other")
PROBS = (0.1, 0.2, 0.7)
LABEL = 1


Refusals = Sequence[tuple[AuditBatch, torch.dtype, str]]


def evidence(
    audit: AuditContext,
    loss: Loss,
    cells: Sequence[BatchComparison],
    inside: torch.dtype | None,
    systematic: float | None,
    found: Sequence[Limit],
) -> dict[str, Any]:
    """What audit.json shows of a loss beside the words."""
    r32, r64 = _distance(cells, torch.float32), _distance(cells, torch.float64)
    entry: dict[str, Any] = {
        "r32": r32,
        "r64": r64,
        "rho": r32 / r64 if r32 is not None and r64 else None,
        "units": {name: _largest([c.units for c in cells if c.dtype_name == name]) for name in _names(cells)},
        "value_units": {
            name: _largest([c.value_units for c in cells if c.dtype_name == name]) for name in _names(cells)
        },
        "bitwise": f"{sum(cell.bitwise for cell in cells)} of {len(cells)}",
        "computes_in": None if inside is None else str(inside).removeprefix("torch."),
        "systematic_part": systematic,
        "limits": [
            {name: getattr(limit, name) for name in ("axis", "limit", "behaviour", "core", "then")} for limit in found
        ],
        "reference_divides_by": audit.normaliser.divides_by,
        "oracle_units": audit.oracle_units,
        "example": example(audit, loss),
    }
    if audit.low is not None:
        entry |= _beside_reference(audit, loss, cells)
    return entry


def _names(cells: Sequence[BatchComparison]) -> list[str]:
    return list(dict.fromkeys(cell.dtype_name for cell in cells))


def _largest(values: Sequence[float]) -> float | None:
    return max(values, default=None)


def _distance(cells: Sequence[BatchComparison], dtype: torch.dtype) -> float | None:
    """The median over batches of ||g_B - g_A|| / ||g_A||; batches whose gradient nearly vanishes are left out."""
    kept = [c.distance for c in cells if c.dtype == dtype and c.batch.family in ("ordinary", "random", "mixed")]
    known = [distance for distance in kept if distance == distance]
    return statistics.median(known) if known else None


def example(audit: AuditContext, loss: Loss) -> dict[str, Any] | None:
    """The gradients of both at one picture of a dog: p = (.1, .2, .7) for cat, dog and other.

    None for fused losses, whose gradient is not that of the logits.
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
    for name, asked in (("gradient", loss), ("reference_gradient", audit.reference)):
        found = evaluate(asked, batch, audit.low or torch.float64, audit.device)
        entry[name] = None if found.error is not None else found.exact("logits").flatten().tolist()
    return entry


def _beside_reference(audit: AuditContext, loss: Loss, cells: Sequence[BatchComparison]) -> dict[str, Any]:
    """How far a low-precision loss and the reference in the same precision are from the truth."""
    mine: list[float] = []
    own: list[float] = []
    values: tuple[list[float], list[float]] = ([], [])
    for cell in cells:
        exact, standard = audit.standard.exact(cell.batch), audit.standard.at(cell.batch, cell.dtype)
        if standard.error is not None or exact.value is None or standard.value is None:
            continue
        found = evaluate(loss, cell.batch, cell.dtype, audit.device)
        name = next(iter(exact.gradients))
        mine.append(_off(found.exact(name), exact.exact(name)))
        own.append(_off(standard.exact(name), exact.exact(name)))
        values[0].append(abs(cell.value_error))
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
    audit: AuditContext, finding: Finding, decision: Classification, refused: Refusals, numbers: Mapping[str, Any]
) -> str:
    """Why the word is what it is, and what goes with it; clauses in one line."""
    said = [_domain(finding, decision) if finding.objective == "domain" else decision.reason]
    if numbers["computes_in"] == "float32" and finding.objective != "different":
        said.append("computes in float32 and is judged there")
    if finding.offset is not None:
        said.append(_offset(finding.offset))
    if finding.objective == "reweighted" and finding.normaliser is not None:
        said.append(_divisors(finding.normaliser, audit.normaliser))
    if finding.domain is not None and not (finding.objective == "domain" and finding.domain.core):
        said.append(in_words(finding.domain))
    if "beside_reference" in numbers:
        said.append(numbers["beside_reference"])
    if refused:
        said.append(f"it refuses {len(refused)} of {len(audit.cells)} batches ({refused[0][2]})")
    return "; ".join(said)


def _domain(finding: Finding, decision: Classification) -> str:
    if finding.domain is not None and finding.domain.core:
        return f"the same for ordinary rows, but {in_words(finding.domain)}, within the core"
    if decision.worst is None:
        return "the same for ordinary rows, wrong elsewhere in the core"
    size = f"{decision.worst.units:.3g} units of rounding, where {CONSTANT:g} are allowed"
    return f"the same for ordinary rows, wrong elsewhere in the core: {size} ({decision.worst.where})"


def _offset(offset: Offset) -> str:
    amount = f"{offset.constant:.6g} nats"
    moving = f"a constant in the logits that moves with the targets, {amount} for one set of them"
    return f"values differ by {moving if offset.moves else amount}"


def _divisors(mine: Normaliser, reference: Normaliser) -> str:
    own = "is no sum over rows" if mine.divides_by == "not a sum over rows" else _divides(mine.divides_by)
    return f"{own}, the reference {_divides(reference.divides_by)}"


def _divides(by: str) -> str:
    return "divides by nothing but a constant" if by == "a constant" else f"divides by {by}"


def covered(audit: AuditContext, cells: Sequence[BatchComparison]) -> tuple[str, ...]:
    """What was asked."""
    classes = ", ".join(str(c) for c in sorted({cell.batch.num_classes for cell in cells}))
    rows = [cell.batch.num_rows for cell in cells]
    dtypes = ", ".join(dict.fromkeys(cell.dtype_name for cell in cells))
    entries = [
        f"{len(cells)} batches: C = {classes}; {min(rows)} to {max(rows)} rows; {dtypes}; {audit.device}",
        "soft targets" if audit.shape.soft else "one-hot targets",
    ]
    if any(not cell.batch.valid.all() for cell in cells):
        entries.append(f"targets ignored by {audit.shape.ignore_index}")
    if audit.own_batches:
        entries.append(f"{len(audit.own_batches)} batches of the user's own")
    return tuple(entries)


def _classes(batch: AuditBatch) -> int:
    return batch.num_classes


def _rows(batch: AuditBatch) -> int:
    return batch.num_rows


def not_covered(audit: AuditContext, refused: Refusals) -> tuple[str, ...]:
    """What was not asked, and what could not be."""
    classes, rows = (sorted({read(batch) for batch, _ in audit.cells}) for read in (_classes, _rows))
    entries = [
        f"other numbers of classes than {', '.join(map(str, classes))}; more than {rows[-1]} rows; "
        f"gradients from outside above {UPSTREAM:g}",
        f"state that shows only after more than {2 * len(audit.cells)} calls",
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
