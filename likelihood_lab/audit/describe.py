"""The numbers behind a word: distances in both precisions, units, and the textbook's example."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.auditing.audit import Audit
from pipeline.auditing.batches import Batch
from pipeline.auditing.calls import Loss, evaluate
from pipeline.auditing.domain import Limit
from pipeline.auditing.judging import Judgement
from pipeline.numerics import relative_distance

CLASSES = ("cat", "dog", "other")
PROBS = (0.1, 0.2, 0.7)
LABEL = 1


def evidence(
    audit: Audit,
    loss: Loss,
    cells: Sequence[Judgement],
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


def _names(cells: Sequence[Judgement]) -> list[str]:
    return list(dict.fromkeys(cell.dtype_name for cell in cells))


def _largest(values: Sequence[float]) -> float | None:
    return max(values, default=None)


def _distance(cells: Sequence[Judgement], dtype: torch.dtype) -> float | None:
    """The median over batches of ||g_B - g_A|| / ||g_A||; batches whose gradient nearly vanishes are left out."""
    kept = [c.distance for c in cells if c.dtype == dtype and c.batch.family in ("ordinary", "random", "mixed")]
    known = [distance for distance in kept if distance == distance]
    return statistics.median(known) if known else None


def example(audit: Audit, loss: Loss) -> dict[str, Any] | None:
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
    batch = Batch("example", logits, labels, targets, torch.ones(lead, dtype=torch.bool))
    entry: dict[str, Any] = {"classes": list(CLASSES), "probs": list(PROBS), "label": LABEL}
    for name, asked in (("gradient", loss), ("reference_gradient", audit.reference)):
        found = evaluate(asked, batch, audit.low or torch.float64, audit.device)
        entry[name] = None if found.error is not None else found.exact("logits").flatten().tolist()
    return entry


def _beside_reference(audit: Audit, loss: Loss, cells: Sequence[Judgement]) -> dict[str, Any]:
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
