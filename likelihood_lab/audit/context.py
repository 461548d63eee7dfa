"""State that all candidates of an audit share: the reference, the cases, and the reference's results on them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import nn

from likelihood_lab.audit.compare import ReferenceEvaluations
from likelihood_lab.audit.evaluate import NO_GRADIENT, Loss, differentiable
from likelihood_lab.audit.normaliser import Normaliser, normaliser
from likelihood_lab.audit.rounding import in_units, row_errors
from likelihood_lab.audit.sensitivity import smallest_differences
from likelihood_lab.categorical import oracle
from likelihood_lab.categorical.batches import CLASSES, VOCABULARIES, AuditBatch, BatchShape, grid
from likelihood_lab.categorical.inputs import LossFn
from likelihood_lab.errors import UsageError, first_line

BOTH = (torch.float32, torch.float64)
LOW = (torch.bfloat16, torch.float16)
MEANS = ("rows", "valid targets", "B*T")  # divisors of a mean over rows
ORACLE_LOGITS = 600  # mpmath is slow: it evaluates batches of at most so many logits


@dataclass
class AuditContext:
    """One reference on one grid of cases, for any number of candidates.

    Attributes
    ----------
    dtypes: float32 and float64, or the one dtype that was declared.
    own_batches: the user's batches, added to the grid.
    with_grid: false to use the user's batches alone.
    cases: (batch, dtype) pairs on which the reference has a useful gradient.
    refused: the number of cases without one.
    """

    reference: Loss
    shape: BatchShape
    dtypes: tuple[torch.dtype, ...] = BOTH
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    own_batches: Sequence[AuditBatch] = ()
    with_grid: bool = True

    def __post_init__(self) -> None:
        self.standard = ReferenceEvaluations(self.reference, self.device)
        batches = [*(grid(self.shape) if self.with_grid else ()), *self.own_batches]
        self.cases = [(batch.at(dtype), dtype) for batch in batches for dtype in self.dtypes]
        usable = [(batch, dtype) for batch, dtype in self.cases if self._usable(batch)]
        if not usable:
            error = self.standard.exact(self.cases[0][0]).error or ""
            hint = "it has to return a scalar that is differentiable" if NO_GRADIENT in error else "check args"
            raise UsageError(f"the reference cannot be called on any batch: {error}; {hint}")
        ignored = self.shape.ignore_index
        if ignored is not None and self.shape.ignoring and all(batch.valid.all() for batch, _ in usable):
            raise UsageError(
                f"the reference can be called on no batch with targets of {ignored}; let it ignore them too, "
                f"for example partial(cross_entropy, ignore_index={ignored})"
            )
        self.refused = len(self.cases) - len(usable)
        self.cases = usable

    def _usable(self, batch: AuditBatch) -> bool:
        """Return whether some row of the reference's gradient is finite and not 0."""
        result = self.standard.exact(batch)
        if result.error is not None:
            return False
        gradient = result.exact(differentiable(batch)[0])
        return bool((gradient.isfinite().all(-1) & gradient.any(-1)).any())

    def warm(self) -> None:
        """Evaluate the reference completely, so that forks of this process share the results."""
        with torch.enable_grad():
            for batch, dtype in self.cases:
                self.standard.allowed(batch, dtype)
            _ = self.normaliser, self.oracle_units

    @property
    def low(self) -> torch.dtype | None:
        """The declared low precision, or None."""
        return self.dtypes[0] if self.dtypes[0] in LOW else None

    @cached_property
    def normaliser(self) -> Normaliser:
        """The divisor of the reference."""
        return normaliser(self.reference, self.shape, self.device, self.low or torch.float64, None)

    @cached_property
    def detection_limits(self) -> Mapping[str, Mapping[str, float | None]]:
        """The smallest difference of each kind that this grid detects, by precision."""
        with torch.inference_mode(False), torch.enable_grad():
            return smallest_differences(self.shape, self.cases, self.device)

    @cached_property
    def oracle_units(self) -> float | None:
        """Largest error of the float64 reference against mean cross-entropy in 50 digits, in float64's units.

        None if the reference is not a mean over rows, or if no batch is small enough.
        """
        if self.normaliser.divides_by not in MEANS:
            return None
        largest = None
        for batch, dtype in self.cases:
            if batch.hidden is not None or batch.logits.numel() > ORACLE_LOGITS or dtype != self.dtypes[-1]:
                continue
            valid = batch.valid.flatten()
            logits, targets = (t.flatten(0, -2)[valid] for t in (batch.logits, batch.target_probs))
            exact = oracle.cross_entropy(logits.tolist(), targets.tolist())
            gradient = self.standard.exact(batch).exact("logits").flatten(0, -2)[valid]
            unit = self.standard.rounding(batch, torch.float64)["logits"][valid]
            units = in_units(row_errors(gradient, exact.gradient), unit).max().item()
            largest = units if largest is None else max(largest, units)
        return largest


def with_ignored(fn: LossFn, ignore_index: int | None) -> LossFn:
    """Return one of torch's own losses with this ignore_index; any other loss unchanged."""
    if ignore_index is None:
        return fn
    if fn in (F.cross_entropy, F.nll_loss):
        return partial(fn, ignore_index=ignore_index)
    if isinstance(fn, nn.CrossEntropyLoss | nn.NLLLoss):
        changed = copy.copy(fn)
        changed.ignore_index = ignore_index
        return changed
    return fn


def audit_of(
    reference: Loss,
    candidate_args: Sequence[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignore_index: int | None = None,
    soft_targets: bool = False,
    tokens: bool = False,
    num_classes: Sequence[int] | None = None,
    batches: Sequence[AuditBatch] = (),
    with_grid: bool = True,
) -> AuditContext:
    """Prepare an audit of candidates that take `candidate_args`. A fused candidate needs fused batches throughout.

    Raises
    ------
    UsageError: the reference cannot be called, or an argument is out of its range.
    """
    if soft_targets and "target_probs" not in {*reference.args, *candidate_args}:
        raise UsageError("soft_targets needs target_probs in args or reference_args; labels cannot be soft")
    for taken in (reference.args, tuple(candidate_args)):
        if len({"hidden", "weight"} & set(taken)) == 1:
            raise UsageError(f"args={list(taken)}: a fused loss takes hidden and weight, both")
    if dtype is not None and dtype not in (*LOW, *BOTH):
        raise UsageError(f"dtype={dtype}; give one of torch.bfloat16, float16, float32 and float64, or nothing")
    args = {*reference.args, *candidate_args}
    fused = bool(args & {"hidden", "weight", "bias"})
    if num_classes is None:
        classes: tuple[int, ...] = VOCABULARIES if fused or tokens else CLASSES
    else:
        classes = tuple(num_classes)
    if not classes or any(not isinstance(c, int) or c < 2 for c in classes):
        raise UsageError(f"num_classes={list(classes)}; give numbers of classes, each at least 2")
    for batch in batches:
        if not isinstance(batch, AuditBatch):
            raise UsageError(f"batches hold a {type(batch).__name__}; give the batches of `capture`")
    if fused and any(batch.hidden is None for batch in batches):
        raise UsageError(
            "batches hold logits alone, and a fused loss needs hidden and weight; "
            "`capture(model)` keeps them where the model's last linear layer gives the logits"
        )
    shape = BatchShape(classes, tokens, fused, "bias" in args, soft_targets, ignore_index)
    return AuditContext(reference, shape, BOTH if dtype is None else (dtype,), device_of(device), batches, with_grid)


def device_of(device: torch.device | str) -> torch.device:
    """Return the device, after checking that tensors can be created on it.

    Raises
    ------
    UsageError: there is no such device.
    """
    try:
        return torch.empty(0, device=device).device
    except RuntimeError as error:
        raise UsageError(f"device={device} cannot be used here: {first_line(error)}") from None
