"""A finding in prose: the reason for its word, what was asked, and what was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline.auditing.audit import Audit, name_of
from pipeline.auditing.batches import UPSTREAM, Batch
from pipeline.auditing.deciding import Decision
from pipeline.auditing.finding import Finding, in_words
from pipeline.auditing.judging import Judgement
from pipeline.auditing.normaliser import Normaliser
from pipeline.auditing.values import Offset
from pipeline.numerics import CONSTANT

Refusals = Sequence[tuple[Batch, torch.dtype, str]]


def sentence(audit: Audit, finding: Finding, decision: Decision, refused: Refusals, numbers: Mapping[str, Any]) -> str:
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


def _domain(finding: Finding, decision: Decision) -> str:
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


def covered(audit: Audit, cells: Sequence[Judgement]) -> tuple[str, ...]:
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


def _classes(batch: Batch) -> int:
    return batch.num_classes


def _rows(batch: Batch) -> int:
    return batch.num_rows


def not_covered(audit: Audit, refused: Refusals) -> tuple[str, ...]:
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
