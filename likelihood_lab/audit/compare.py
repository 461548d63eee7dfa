"""One batch, one precision: how far a loss is from the reference, in units of what rounding may do."""

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
    """What a batch showed of a candidate.

    Attributes:
        error: why there is no gradient to judge; then nothing else counts.
        finite: whether every gradient is finite where the reference's exact one is.
        bitwise: gradients equal to the reference's in the same precision, the sign of a zero aside.
        units: the largest error of a row of any input's gradient, in units.
        guilty: the input whose gradient has it.
        row_units: those of the rows [N] themselves.
        surprise: -log p_y of the rows [N].
        magnitude: the largest |logit| or |log p| of the rows [N].
        interval: the factor between the gradients.
        residual: as `units`, once the factor is taken out.
        growth: the largest factor by which a row exceeds the reference's own size and its tolerance.
        distance: ||g_B - g_A|| / ||g_A||, both in this precision.
        value_error: value minus the exact one.
        value_units: the same, in units of its own.
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
        """Whether rounding accounts for the difference."""
        return self.error is None and self.units <= CONSTANT

    @property
    def parallel(self) -> bool:
        """Whether rounding accounts for what a factor leaves."""
        return self.error is None and self.residual <= CONSTANT

    @property
    def ordinary(self) -> Tensor:
        """Which rows [N] any loss should get right: neither saturated nor far from 0."""
        low, high = ORDINARY
        return (self.surprisal >= low) & (self.surprisal <= high) & (self.magnitude <= ORDINARY_LOGITS)

    @property
    def dtype_name(self) -> str:
        """float32, say."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def where(self) -> str:
        """The batch and the precision in words."""
        return f"{self.dtype_name}, {self.batch.where}"


LARGE = 2**20  # weights of a last layer, whose gradients are not kept for every batch


class ReferenceEvaluations:
    """The reference on the batches of an audit: computed once, whatever the number of candidates."""

    def __init__(self, loss: Loss, device: torch.device) -> None:
        self.loss, self.device = loss, device
        self._kept: dict[tuple[int, torch.dtype], tuple[AuditBatch, Evaluation]] = {}
        self._latest: dict[
            tuple[int, torch.dtype], tuple[AuditBatch, Evaluation]
        ] = {}  # of the latest large batch alone
        self._rows: dict[int, tuple[AuditBatch, Rows]] = {}

    def at(self, batch: AuditBatch, dtype: torch.dtype) -> Evaluation:
        """The reference in a precision, its inputs those of the batch."""
        kept = self._kept
        if batch.weight is not None and batch.weight.numel() > LARGE:
            kept = self._latest
            if any(other is not batch for other, _ in kept.values()):
                kept.clear()
        key = id(batch), dtype
        if key not in kept:  # the batch is kept too, so that its id stays its own
            kept[key] = batch, evaluate(self.loss, batch, dtype, self.device)
        return kept[key][1]

    def exact(self, batch: AuditBatch) -> Evaluation:
        """The reference in float64."""
        return self.at(batch, torch.float64)

    def rows(self, batch: AuditBatch) -> Rows:
        """What the batch's rows allow."""
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
        """What rounding in `dtype` must cost every row of every gradient, whoever computes it."""
        flat = {"hidden": None if batch.hidden is None else batch.hidden.flatten(0, -2), "weight": batch.weight}
        rows, u = self.rows(batch), unit_roundoff(dtype)
        return {name: units(rows, u, name, **flat) for name in differentiable(batch)}

    def allowed(self, batch: AuditBatch, dtype: torch.dtype) -> dict[str, Tensor]:
        """The unit of every row of every gradient: `rounding`, or the reference's own error where that is larger."""
        own, exact = self.at(batch, dtype), self.exact(batch)
        found = {}
        for name, unit in self.rounding(batch, dtype).items():
            if own.error is None:
                mine = row_errors(_flat(own.exact(name), name), _flat(exact.exact(name), name))
                unit = torch.maximum(unit, torch.where(mine.isfinite(), mine, 0.0))
            found[name] = unit
        return found

    def value_unit(self, batch: AuditBatch, dtype: torch.dtype) -> float:
        """What rounding may do to the value."""
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
    """Compare a candidate, called in `dtype`, with the reference.

    Args:
        computes_in: the precision that it is allowed, where it is known to compute in a coarser one than `dtype`.
    """
    found = evaluate(candidate, batch, dtype, standard.device)
    if found.error is not None:
        return BatchComparison(batch, dtype, found.error)
    return compare(found, standard, batch, dtype, computes_in)


def compare(
    found: Evaluation,
    standard: ReferenceEvaluations,
    batch: AuditBatch,
    dtype: torch.dtype,
    computes_in: torch.dtype | None = None,
) -> BatchComparison:
    """`judge`, for what a candidate has already been found to give."""
    allowed = standard.allowed(batch, computes_in or dtype)
    exact, own = standard.exact(batch), standard.at(batch, dtype)
    names = differentiable(batch)
    first = names[0]
    mine = {name: _flat(found.exact(name), name) for name in names}
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
    judgement = BatchComparison(
        batch,
        dtype,
        finite=all(bool(gradient.isfinite().all()) for gradient in mine.values()),
        bitwise=own.error is None and all(same_bits(found.gradients[name], own.gradients[name]) for name in names),
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
        judgement = replace(judgement, distance=relative_distance(found.exact(first), own.exact(first)))
    if found.value is None or exact.value is None or not exact.value.isfinite():
        return judgement
    difference = (found.value.double() - exact.value.double()).item()
    unit = standard.value_unit(batch, computes_in or dtype)
    wrong = abs(difference) / unit if difference == difference else torch.inf
    return replace(judgement, value_error=difference, value_units=wrong)


def _flat(gradient: Tensor, name: str) -> Tensor:
    """Rows first: [N, ...] for logits and hidden, whatever shape the rows had."""
    return gradient.flatten(0, -2) if name in ("logits", "hidden") else gradient


def _size(gradient: Tensor) -> Tensor:
    return row_errors(gradient, torch.zeros_like(gradient))


def _largest(parts: Iterable[Tensor]) -> float:
    tensors = [tensor.max().item() for tensor in parts if tensor.numel()]
    return max((torch.inf if value != value else value for value in tensors), default=0.0)
