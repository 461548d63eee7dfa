"""Compare a loss with the reference on one batch in one dtype. Errors are in units of rounding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from likelihood_lab.audit.evaluate import Evaluation, Loss, differentiable, evaluate, same_bits
from likelihood_lab.audit.rounding import (
    CONSTANT,
    UNKNOWN_SCALE,
    Rows,
    ScaleInterval,
    in_units,
    name_of,
    relative_distance,
    row_errors,
    rows_of,
    scale,
    unit_roundoff,
    units,
)
from likelihood_lab.categorical.batches import ORDINARY, ORDINARY_LOGITS, AuditBatch


@dataclass(frozen=True)
class BatchComparison:
    """Result of comparing a candidate with the reference on one batch.

    Attributes
    ----------
    error: the reason if there is no gradient; the other attributes are then meaningless.
    finite: whether every gradient is finite wherever the reference's exact gradient is.
    bitwise: whether gradients equal the reference's in the same dtype; +0 equals -0.
    units: the largest row error of any input's gradient, in units.
    worst_input: the input whose gradient has that error.
    row_units: errors of the rows of the first input's gradient [N], in units.
    surprisal: -log p_y of the rows [N], in nats.
    magnitude: the largest |logit| or |log p| of the rows [N].
    interval: the factor between the gradients.
    residual: the same as `units`, after the factor is removed.
    growth: the largest ratio of a row to the reference's row plus its tolerance.
    distance: ||g_B - g_A|| / ||g_A||, both in this dtype.
    value_error: the value minus the exact value, in nats.
    value_units: the same in units of the value's rounding.
    """

    batch: AuditBatch
    dtype: torch.dtype
    error: str | None = None
    finite: bool = False
    bitwise: bool = False
    units: float = torch.inf
    worst_input: str = ""
    row_units: Tensor = field(default_factory=lambda: torch.empty(0))
    surprisal: Tensor = field(default_factory=lambda: torch.empty(0))
    magnitude: Tensor = field(default_factory=lambda: torch.empty(0))
    interval: ScaleInterval = UNKNOWN_SCALE
    residual: float = torch.inf
    growth: float = torch.inf
    distance: float = torch.nan
    value_error: float = torch.nan
    value_units: float = torch.inf

    @property
    def same(self) -> bool:
        """True if rounding explains the difference."""
        return self.error is None and self.units <= CONSTANT

    @property
    def parallel(self) -> bool:
        """True if a factor and rounding explain the difference."""
        return self.error is None and self.residual <= CONSTANT

    @property
    def ordinary(self) -> Tensor:
        """Mask [N] of the rows that any correct loss gets right: not saturated, and logits not far from 0."""
        low, high = ORDINARY
        return (self.surprisal >= low) & (self.surprisal <= high) & (self.magnitude <= ORDINARY_LOGITS)

    @property
    def dtype_name(self) -> str:
        """The dtype's name, such as "float32"."""
        return name_of(self.dtype)

    @property
    def where(self) -> str:
        """The dtype and the batch in words."""
        return f"{self.dtype_name}, {self.batch.where}"


LARGE = 2**20  # weights; with a larger last layer, only the gradients of the latest batch stay in memory


class ReferenceEvaluations:
    """Cached evaluations of the reference on the batches of an audit, shared by all candidates."""

    def __init__(self, loss: Loss, device: torch.device) -> None:
        self.loss, self.device = loss, device
        self._kept: dict[tuple[int, torch.dtype], tuple[AuditBatch, Evaluation]] = {}
        self._latest: dict[tuple[int, torch.dtype], tuple[AuditBatch, Evaluation]] = {}  # of one large batch
        self._rows: dict[int, tuple[AuditBatch, Rows]] = {}

    def at(self, batch: AuditBatch, dtype: torch.dtype) -> Evaluation:
        """Return the reference evaluated on the batch in a dtype."""
        kept = self._kept
        if batch.weight is not None and batch.weight.numel() > LARGE:
            kept = self._latest
            if any(other is not batch for other, _ in kept.values()):
                kept.clear()
        key = id(batch), dtype
        if key not in kept:  # the batch is stored too, so that its id is not used again
            kept[key] = batch, evaluate(self.loss, batch, dtype, self.device)
        return kept[key][1]

    def exact(self, batch: AuditBatch) -> Evaluation:
        """Return the reference evaluated in float64."""
        return self.at(batch, torch.float64)

    def rows(self, batch: AuditBatch) -> Rows:
        """Return the properties of the batch's rows that decide their rounding units."""
        if id(batch) not in self._rows:
            flat = {name: getattr(batch, name).flatten(0, -2) for name in ("logits", "target_probs")}
            size = None
            if batch.hidden is not None and batch.weight is not None:
                size = batch.hidden.flatten(0, -2).abs() @ batch.weight.abs().T
            gradient = None if batch.hidden is not None else self.exact(batch).exact("logits").flatten(0, -2)
            rows = rows_of(flat["logits"], flat["target_probs"], batch.valid.flatten(), gradient, size)
            self._rows[id(batch)] = batch, rows
        return self._rows[id(batch)][1]

    def rounding(self, batch: AuditBatch, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the unavoidable rounding error in `dtype` of each row of each gradient."""
        flat = {"hidden": None if batch.hidden is None else batch.hidden.flatten(0, -2), "weight": batch.weight}
        rows, u = self.rows(batch), unit_roundoff(dtype)
        return {name: units(rows, u, name, **flat) for name in differentiable(batch)}

    def allowed(self, batch: AuditBatch, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the unit of each row of each gradient: `rounding`, or the reference's own error if larger."""
        own, exact = self.at(batch, dtype), self.exact(batch)
        allowed = {}
        for name, unit in self.rounding(batch, dtype).items():
            if own.error is None:
                mine = row_errors(_flat(own.exact(name), name), _flat(exact.exact(name), name))
                unit = torch.maximum(unit, torch.where(mine.isfinite(), mine, 0.0))
            allowed[name] = unit
        return allowed

    def value_unit(self, batch: AuditBatch, dtype: torch.dtype) -> float:
        """Return the unit of the value: its unavoidable rounding error, or the reference's own error if larger."""
        rows, own, exact = self.rows(batch), self.at(batch, dtype), self.exact(batch)
        valid = batch.valid.flatten()
        unit = unit_roundoff(dtype) * (rows.weight * rows.reach)[valid].sum().item()
        if own.value is not None and exact.value is not None and own.value.isfinite():
            unit = max(unit, abs(own.value.double() - exact.value.double()).item())
        return unit


def judge(
    candidate: Loss,
    standard: ReferenceEvaluations,
    batch: AuditBatch,
    dtype: torch.dtype,
    computes_in: torch.dtype | None = None,
) -> BatchComparison:
    """Evaluate a candidate in `dtype` and compare it with the reference.

    Args:
        computes_in: the coarser precision in which the loss is known to compute; its units then apply.
    """
    result = evaluate(candidate, batch, dtype, standard.device)
    if result.error is not None:
        return BatchComparison(batch, dtype, result.error)
    return compare(result, standard, batch, dtype, computes_in)


def compare(
    result: Evaluation,
    standard: ReferenceEvaluations,
    batch: AuditBatch,
    dtype: torch.dtype,
    computes_in: torch.dtype | None = None,
) -> BatchComparison:
    """Compare an evaluation of a candidate with the reference; see `judge`."""
    allowed = standard.allowed(batch, computes_in or dtype)
    exact, own = standard.exact(batch), standard.at(batch, dtype)
    names = differentiable(batch)
    first = names[0]
    mine = {name: _flat(result.exact(name), name) for name in names}
    truth = {name: _flat(exact.exact(name), name) for name in names}
    known = {
        name: truth[name].flatten(1).isfinite().all(1) if truth[name].ndim > 1 else truth[name].isfinite()
        for name in names
    }
    mine, truth, allowed = ({name: part[name][known[name]] for name in names} for part in (mine, truth, allowed))
    errors = {name: in_units(row_errors(mine[name], truth[name]), allowed[name]) for name in names}
    interval = scale(mine[first], truth[first], CONSTANT * allowed[first], unit_roundoff(computes_in or dtype))
    rests = [
        in_units(row_errors(mine[name], interval.factor * truth[name]), abs(interval.factor) * allowed[name])
        for name in names
    ]
    comparison = BatchComparison(
        batch,
        dtype,
        finite=all(bool(gradient.isfinite().all()) for gradient in mine.values()),
        bitwise=own.error is None and all(same_bits(result.gradients[name], own.gradients[name]) for name in names),
        units=_largest(errors.values()),
        worst_input=max(errors, key=lambda name: _largest([errors[name]])),
        row_units=errors[first],
        surprisal=standard.rows(batch).surprisal[known[first]],
        magnitude=standard.rows(batch).magnitude[known[first]],
        interval=interval,
        residual=_largest(rests),
        growth=_largest(_size(mine[name]) / (_size(truth[name]) + CONSTANT * allowed[name]) for name in names),
    )
    if own.error is None:
        comparison = replace(comparison, distance=relative_distance(result.exact(first), own.exact(first)))
    if result.value is None or exact.value is None or not exact.value.isfinite():
        return comparison
    difference = (result.value.double() - exact.value.double()).item()
    unit = standard.value_unit(batch, computes_in or dtype)
    wrong = abs(difference) / unit if difference == difference else torch.inf
    return replace(comparison, value_error=difference, value_units=wrong)


def _flat(gradient: Tensor, name: str) -> Tensor:
    """Flatten the leading dimensions of logits and hidden to [N, ...]."""
    return gradient.flatten(0, -2) if name in ("logits", "hidden") else gradient


def _size(gradient: Tensor) -> Tensor:
    return row_errors(gradient, torch.zeros_like(gradient))


def _largest(parts: Iterable[Tensor]) -> float:
    tensors = [tensor.max().item() for tensor in parts if tensor.numel()]
    return max((torch.inf if value != value else value for value in tensors), default=0.0)
