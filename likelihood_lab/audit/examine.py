"""Examine one candidate loss: call it on every case, classify its gradients, find its limits and side effects."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from likelihood_lab.audit.classify import Classification, Offset, classify, judged_values, offset
from likelihood_lab.audit.compare import BatchComparison, compare, judge
from likelihood_lab.audit.context import LOW, AuditContext
from likelihood_lab.audit.describe import Refusals, covered, evidence, not_covered, sentence
from likelihood_lab.audit.domain import Limit, find_domain_limits
from likelihood_lab.audit.evaluate import NO_GRADIENT, Evaluation, Loss, equal_evaluations, evaluate
from likelihood_lab.audit.finding import SAME_FUNCTION, Finding
from likelihood_lab.audit.normaliser import normaliser
from likelihood_lab.audit.precision import NOISY_FAMILIES, AtPrecision, computes_in, systematic_part
from likelihood_lab.audit.rounding import SYSTEMATIC, name_of
from likelihood_lab.audit.side_effects import (
    KEEPS_STATE,
    backward_effects,
    bad_input_effects,
    changed_state,
    interleaved_effects,
    random_state,
    state_of,
)
from likelihood_lab.categorical.batches import AuditBatch, BatchShape

REPEATED_LOGITS = 2**14  # batches of at most so many logits are evaluated twice
FEW_ROWS = 2  # with so few rows, a float32 gradient may be exact by luck
REPEATED_CASES = 6  # cases that are evaluated again after each later step
NEEDS_CUDA = ("cuda", "triton", "nvidia", "active drivers", "gpu")  # words in errors of packages that find no GPU


def examine(audit: AuditContext, loss: Loss, report_early: Callable[[Finding], None] = lambda _: None) -> Finding:
    """Audit a candidate loss.

    Args:
        report_early: receives the finding before the loss is called with invalid input, which may crash the process.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(audit.device.type, enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        grid = _GridEvaluation(audit, loss)
        grid.run()
        if not grid.comparisons:
            return _nothing_evaluated(grid.refused)
        finding = _finding(audit, loss, grid)
        report_early(finding)
        dtype = grid.comparisons[0].dtype
        effects = bad_input_effects(loss, audit.reference, grid.shape, dtype, audit.device)
        return replace(finding, side_effects=(*finding.side_effects, *effects))


def needs_cuda(error: str) -> bool:
    """Return whether an error reports a missing CUDA device on a machine that has none."""
    return any(word in error.lower() for word in NEEDS_CUDA) and not torch.cuda.is_available()


# --- the grid


@dataclass
class _GridEvaluation:
    """Results of a candidate on all cases (batch, dtype).

    Attributes
    ----------
    comparisons: one for each case in which the loss returned a value.
    refused: the cases in which the loss raised, with the error.
    repeatable: evaluations of the small cases, for comparison with later calls.
    unequal: the first case whose repetition gave other bits.
    """

    audit: AuditContext
    loss: Loss
    comparisons: list[BatchComparison] = field(default_factory=list)
    refused: list[tuple[AuditBatch, torch.dtype, str]] = field(default_factory=list)
    repeatable: list[tuple[AuditBatch, torch.dtype, Evaluation]] = field(default_factory=list)
    unequal: str | None = None
    side_effects: list[str] = field(default_factory=list)

    @property
    def shape(self) -> BatchShape:
        """The shape of the audit's batches, with the numbers of classes that the candidate accepts."""
        classes = tuple(sorted({case.batch.num_classes for case in self.comparisons}))
        return replace(self.audit.shape, num_classes=classes)

    def run(self) -> None:
        """Evaluate every case in order, then the small ones again in reverse order."""
        for dtype in self.audit.dtypes:
            with contextlib.suppress(Exception):  # if the copy fails, the first call reports it
                self.loss.prepared(dtype, self.audit.device)
        state, random_before = state_of(self.loss), random_state(self.audit.device)
        overwritten: Counter[str] = Counter()
        for batch, dtype in self.audit.cases:
            overwritten.update(self._evaluate(batch, dtype))
        self._repeat(self.repeatable[::-1])
        self.side_effects += [f"overwrites {name}" for name in overwritten]
        if not torch.equal(random_before, random_state(self.audit.device)):
            self.side_effects.append("consumes random numbers")
        if changed := changed_state(self.loss, state):
            self.side_effects.append(f"{KEEPS_STATE}{', '.join(changed)}")

    def _evaluate(self, batch: AuditBatch, dtype: torch.dtype) -> tuple[str, ...]:
        result = evaluate(self.loss, batch, dtype, self.audit.device)
        if result.value is None:
            self.refused.append((batch, dtype, result.error or ""))
        elif result.error is not None:
            self.comparisons.append(BatchComparison(batch, dtype, result.error))
        else:
            self.comparisons.append(compare(result, self.audit.standard, batch, dtype))
            if batch.logits.numel() <= REPEATED_LOGITS:
                self.repeatable.append((batch, dtype, result))
        return result.overwritten

    def repeat_first(self) -> None:
        """Evaluate the first few cases again, to detect state that a later step has changed."""
        self._repeat(self.repeatable[:REPEATED_CASES])

    def _repeat(self, cases: Sequence[tuple[AuditBatch, torch.dtype, Evaluation]]) -> None:
        for batch, dtype, first in cases:
            again = evaluate(self.loss, batch, dtype, self.audit.device)
            if self.unequal is None and not equal_evaluations(first, again):
                self.unequal = f"{name_of(dtype)}, {batch.where}"
                self.side_effects.append(f"equal calls differ ({self.unequal})")


def _nothing_evaluated(refused: Refusals) -> Finding:
    """Return the finding for a loss that raised in every case."""
    error = Counter(error for _, _, error in refused).most_common(1)[0][0]
    if needs_cuda(error):
        return Finding("not_run", f"needs a CUDA device, and there is none: {error}")
    return Finding("error", f"failed on every batch: {error}")


# --- the finding


def _finding(audit: AuditContext, loss: Loss, grid: _GridEvaluation) -> Finding:
    if all(case.error is not None for case in grid.comparisons):
        error = grid.comparisons[0].error or NO_GRADIENT
        effects = ("no gradient", *grid.side_effects)
        return Finding("different", f"{error}: training would not move", side_effects=effects)
    shape = grid.shape
    at = _at_precision(audit, loss, shape, grid.comparisons)
    dtype = max({case.dtype for case in at.cases}, key=lambda d: torch.finfo(d).bits)
    divisor = normaliser(loss, shape, audit.device, dtype, at.computes_in)
    interleaved = [] if grid.unequal else list(interleaved_effects(loss, shape, dtype, audit.device))
    backward = list(backward_effects(loss, shape, dtype, audit.device))
    by_value = _classify_with_values(audit, loss, shape, at, dtype)
    decision, limits = _confirm(audit, loss, grid, at.cases, by_value.classification, interleaved)
    numbers = evidence(audit, loss, at, limits)
    return Finding(
        decision.word,
        sentence(audit, decision, by_value.offset, divisor, limits, grid.refused, numbers),
        decision.scale,
        by_value.offset,
        limits[0] if limits else None,
        divisor,
        (*grid.side_effects, *interleaved, *backward, *by_value.effects),
        covered(audit, at.cases),
        not_covered(audit, grid.refused),
        numbers,
        None if decision.worst is None else (decision.worst.batch, decision.worst.dtype_name),
        detection_limits=lambda: audit.detection_limits,
    )


def _at_precision(audit: AuditContext, loss: Loss, shape: BatchShape, cases: Sequence[BatchComparison]) -> AtPrecision:
    """Compare the loss by the units of the precision in which it computes.

    A loss that rounds to float32 inside gets float32's units, whatever the dtype of its inputs. Two signs show such a
    loss: the last bits of its float64 inputs do not matter, or its error in float64 is float32's noise.
    """
    has_float64 = any(case.dtype == torch.float64 for case in cases)
    if audit.low is not None or all(case.bitwise for case in cases) or (has_float64 and all(c.same for c in cases)):
        return AtPrecision(cases)
    if not has_float64:
        return AtPrecision(cases, None, systematic_part(loss, audit.standard, shape, torch.float32))
    inside = computes_in(loss, shape, audit.device)
    if inside in LOW:
        return AtPrecision(cases, inside)
    if inside is None and not all(case.same for case in cases if case.dtype != torch.float64):
        return AtPrecision(cases)
    again = [
        judge(loss, audit.standard, case.batch, case.dtype, torch.float32) if case.dtype == torch.float64 else case
        for case in cases
    ]
    systematic = systematic_part(loss, audit.standard, shape, torch.float64)
    is_noise = systematic < SYSTEMATIC and _is_noisy(cases)
    if inside is None and not (is_noise and all(case.same for case in again)):
        return AtPrecision(cases)  # it computes in float64, and is wrong there
    return AtPrecision(again, torch.float32, systematic)


def _is_noisy(cases: Sequence[BatchComparison]) -> bool:
    """Return whether every unsaturated float64 case has a larger error than float64 and a factor explain.

    A loss that computes in float32 has such errors for all numbers of classes and rows. A fault has them for some only.
    """
    unsaturated = [
        case
        for case in cases
        if case.dtype == torch.float64 and case.batch.family in NOISY_FAMILIES and case.batch.num_rows > FEW_ROWS
    ]
    return bool(unsaturated) and not any(case.parallel for case in unsaturated)


@dataclass(frozen=True)
class _WithValues:
    """Classification by gradients and values, with the offset of the values or the side effect of a wrong value."""

    classification: Classification
    offset: Offset | None = None
    effects: tuple[str, ...] = ()


def _classify_with_values(
    audit: AuditContext, loss: Loss, shape: BatchShape, at: AtPrecision, dtype: torch.dtype
) -> _WithValues:
    decision = _classify_gradients(at)
    if decision.word not in SAME_FUNCTION or (wrong := judged_values(at.cases)) is None:
        return _WithValues(decision)
    constant = offset(loss, audit.standard, shape, dtype, at.computes_in or dtype)
    if constant is None:
        return _WithValues(replace(decision, word="rounding"), effects=(wrong,))
    return _WithValues(replace(decision, word="offset"), constant)


def _classify_gradients(at: AtPrecision) -> Classification:
    decision = classify(at.cases)
    if at.computes_in in LOW and decision.word not in ("scaled", "reweighted"):
        name = name_of(at.computes_in)
        reason = f"rounds to {name} inside; dtype=torch.{name} judges it at that precision"
        return Classification("different", reason, worst=decision.worst)
    if decision.word in SAME_FUNCTION and at.systematic is not None and at.systematic >= SYSTEMATIC:
        ratio = f"systematic part {at.systematic:.3g}, noise < {SYSTEMATIC:g}"
        reason = f"computes in float32, but its error there is not rounding: {ratio}"
        return Classification("different", reason, worst=decision.worst)
    return decision


def _confirm(
    audit: AuditContext,
    loss: Loss,
    grid: _GridEvaluation,
    cases: Sequence[BatchComparison],
    decision: Classification,
    interleaved: Sequence[str],
) -> tuple[Classification, list[Limit]]:
    """Find the domain's limits and withdraw a word of sameness that calls, refusals, limits or state contradict."""
    grid.repeat_first()
    decision = _without_contradiction(grid, decision)
    limits = _limits(audit, loss, grid.shape, decision, cases)
    grid.repeat_first()
    decision = _without_contradiction(grid, decision)
    if decision.word in SAME_FUNCTION and any(limit.core for limit in limits):
        decision = replace(decision, word="domain")
    if decision.word in SAME_FUNCTION and interleaved:
        decision = Classification("different", interleaved[0].removeprefix(KEEPS_STATE), worst=decision.worst)
    return decision, limits


def _without_contradiction(grid: _GridEvaluation, decision: Classification) -> Classification:
    """Return `different` instead of a same-function word if the evidence contradicts it.

    It does so if equal calls give different bits, or if the loss raises on some batches of a (C, dtype) and
    not on others.
    If all of these batches are non-contiguous, the word stays and a side effect is recorded.
    """
    if decision.word not in SAME_FUNCTION:
        return decision
    if grid.unequal is not None:
        return Classification("different", f"equal calls give different bits ({grid.unequal})", worst=decision.worst)
    accepted = {(case.batch.num_classes, case.dtype) for case in grid.comparisons}
    sometimes = [(batch, error) for batch, dtype, error in grid.refused if (batch.num_classes, dtype) in accepted]
    if not sometimes:
        return decision
    batch, error = sometimes[0]
    if all(not batch.contiguous for batch, _ in sometimes):
        effect = f"refuses inputs that are not contiguous ({error})"
        grid.side_effects += [effect] if effect not in grid.side_effects else []
        return decision
    reason = f"raises on {len(sometimes)} batches that the reference accepts, such as {batch.where}: {error}"
    return Classification("different", reason, worst=decision.worst)


def _limits(
    audit: AuditContext, loss: Loss, shape: BatchShape, decision: Classification, cases: Sequence[BatchComparison]
) -> list[Limit]:
    """Search in the coarsest dtype of the cases. A loss that differs everywhere has no limits to search for."""
    if decision.word == "different":
        return []
    dtype = min({case.dtype for case in cases}, key=lambda d: torch.finfo(d).bits)
    largest = None if decision.scale is None else decision.scale.largest
    return find_domain_limits(loss, audit.standard, shape, dtype, largest, decision.word == "offset")
