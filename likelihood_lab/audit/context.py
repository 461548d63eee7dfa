"""What all candidates of an audit share: the reference, the batches, and what the reference makes of them."""

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
MEANS = ("rows", "valid targets", "B*T")
ORACLE_LOGITS = 600  # in the batches that mpmath is asked about


def name_of(dtype: torch.dtype) -> str:
    """float32, for torch.float32."""
    return str(dtype).removeprefix("torch.")


@dataclass
class AuditContext:
    """One reference on one grid, ready for any number of candidates.

    Attributes:
        dtypes: float32 and float64, or the one low precision that was declared.
        own_batches: batches of the user's, asked besides the grid.
        with_grid: whether the grid is asked, or the user's batches alone.
    """

    reference: Loss
    shape: BatchShape
    dtypes: tuple[torch.dtype, ...] = BOTH
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    own_batches: Sequence[AuditBatch] = ()
    with_grid: bool = True

    def __post_init__(self) -> None:
        """Make the grid and ask the reference; both once for all candidates."""
        self.standard = ReferenceEvaluations(self.reference, self.device)
        asked = [*(grid(self.shape) if self.with_grid else ()), *self.own_batches]
        self.cells = [(batch.at(dtype), dtype) for batch in asked for dtype in self.dtypes]
        usable = [(batch, dtype) for batch, dtype in self.cells if self._usable(batch)]
        if not usable:
            error = self.standard.exact(self.cells[0][0]).error or ""
            hint = "it has to return a scalar that is differentiable" if NO_GRADIENT in error else "check args"
            raise UsageError(f"the reference cannot be called on any batch: {error}; {hint}")
        ignored = self.shape.ignore_index
        if ignored is not None and self.shape.ignoring and all(batch.valid.all() for batch, _ in usable):
            raise UsageError(
                f"the reference can be called on no batch with targets of {ignored}; let it ignore them too, "
                f"for example partial(cross_entropy, ignore_index={ignored})"
            )
        self.refused = len(self.cells) - len(usable)
        self.cells = usable

    def _usable(self, batch: AuditBatch) -> bool:
        """Whether the reference gives a gradient that says something: finite in some row, and not all zero."""
        found = self.standard.exact(batch)
        if found.error is not None:
            return False
        gradient = found.exact(differentiable(batch)[0])
        return bool((gradient.isfinite().all(-1) & gradient.any(-1)).any())

    def warm(self) -> None:
        """Ask the reference everything that candidates are compared with, so that forks of this process need not."""
        with torch.enable_grad():
            for batch, dtype in self.cells:
                self.standard.allowed(batch, dtype)
            _ = self.normaliser, self.oracle_units

    @property
    def low(self) -> torch.dtype | None:
        """The declared low precision, where one is."""
        return self.dtypes[0] if self.dtypes[0] in LOW else None

    @cached_property
    def normaliser(self) -> Normaliser:
        """What the reference divides by."""
        return normaliser(self.reference, self.shape, self.device, self.low or torch.float64, None)

    @cached_property
    def power(self) -> Mapping[str, Mapping[str, float | None]]:
        """The smallest difference of each kind that this grid catches, by precision."""
        with torch.inference_mode(False), torch.enable_grad():
            return smallest_differences(self.shape, self.cells, self.device)

    @cached_property
    def oracle_units(self) -> float | None:
        """How far the reference in float64 is from the mean cross-entropy in 50 digits, in float64's units.

        None where it is no mean over rows, or no batch is small enough.
        """
        if self.normaliser.divides_by not in MEANS:
            return None
        largest = None
        for batch, dtype in self.cells:
            if batch.hidden is not None or batch.logits.numel() > ORACLE_LOGITS or dtype != self.dtypes[-1]:
                continue
            valid = batch.valid.flatten()
            logits, targets = (t.flatten(0, -2)[valid] for t in (batch.logits, batch.target_probs))
            exact = oracle.cross_entropy(logits.tolist(), targets.tolist())
            found = self.standard.exact(batch).exact("logits").flatten(0, -2)[valid]
            unit = self.standard.rounding(batch, torch.float64)["logits"][valid]
            units = in_units(row_errors(found, exact.gradient), unit).max().item()
            largest = units if largest is None else max(largest, units)
        return largest


def with_ignored(fn: LossFn, ignore_index: int | None) -> LossFn:
    """torch's own losses, as references, ignore what the audit ignores; any other is left as it is."""
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
    """An audit for candidates that take `candidate_args`; a fused one makes every batch a fused one.

    Raises:
        UsageError: the reference cannot be called, or an argument is out of its range.
    """
    if soft_targets and "target_probs" not in {*reference.args, *candidate_args}:
        raise UsageError("soft_targets needs target_probs in args or reference_args; labels cannot be soft")
    for args_given in (reference.args, tuple(candidate_args)):
        if {"hidden", "weight"} & set(args_given) and not {"hidden", "weight"} <= set(args_given):
            raise UsageError(f"args={list(args_given)}: a fused loss takes hidden and weight, both")
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
            raise UsageError(f"batches hold a {type(batch).__name__}; give what `capture` has kept")
    if fused and any(batch.hidden is None for batch in batches):
        raise UsageError(
            "batches hold logits alone, and a fused loss needs hidden and weight; "
            "`capture(model)` keeps them where the model's last linear layer gives the logits"
        )
    shape = BatchShape(classes, tokens, fused, "bias" in args, soft_targets, ignore_index)
    return AuditContext(reference, shape, BOTH if dtype is None else (dtype,), device_of(device), batches, with_grid)


def device_of(device: torch.device | str) -> torch.device:
    """A device that tensors can be made on.

    Raises:
        UsageError: there is none of that name.
    """
    try:
        return torch.empty(0, device=device).device
    except RuntimeError as error:
        raise UsageError(f"device={device} cannot be used here: {first_line(error)}") from None


MEAN_CROSS_ENTROPY = Loss(F.cross_entropy, ("logits", "labels"))
