"""Classify a loss from the comparisons of all cases, and find a constant offset between values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from likelihood_lab.audit.compare import BatchComparison, ReferenceEvaluations
from likelihood_lab.audit.evaluate import Loss, evaluate
from likelihood_lab.audit.rounding import CONSTANT, ScaleInterval, narrowest, overlap
from likelihood_lab.categorical.batches import BatchShape, make_batch

DIGITS = 12  # significant digits of a factor
SHARP = 1e-10  # relative uncertainty of the factors that a range is taken from, if there are any
TARGET_SETS = 3
LOGIT_DRAWS = 4  # for each set of targets


@dataclass(frozen=True)
class Scale:
    """The factor between two gradients.

    Attributes
    ----------
    formula: the factor in terms of C ("1/C", "0.1"), or "by C"; for a reweighted loss "by batch".
    by_classes: the factor for each C; for a reweighted loss the smallest and the largest factor.
    """

    formula: str
    by_classes: Mapping[int, float | tuple[float, float]]

    @property
    def largest(self) -> float:
        """The largest factor in any batch."""
        return max(k if isinstance(k, float) else max(k) for k in self.by_classes.values())


@dataclass(frozen=True)
class Classification:
    """A word of the column `function`, the reason, and the simplest batch that contradicts sameness."""

    word: str
    reason: str
    scale: Scale | None = None
    worst: BatchComparison | None = None


def classify(cases: Sequence[BatchComparison]) -> Classification:
    """Return the word for a candidate's comparisons, in the order of protocol section 2."""
    failing = [case for case in cases if not case.same]
    if not failing:
        if all(case.bitwise for case in cases):
            return Classification("identical", f"gradients equal bit for bit in {len(cases)} of {len(cases)} batches")
        largest = max(case.units for case in cases)
        return Classification("rounding", f"gradients equal up to rounding: errors of {largest:.2g} units at most")
    worst = _simplest(failing)
    if not any(case.finite for case in cases):
        return Classification("different", "gradients are not finite in any batch", worst=worst)
    if _ordinary_rows_hold(cases):
        return Classification("domain", "", worst=worst)
    return _scaled(cases, failing)


def _simplest(failing: Sequence[BatchComparison]) -> BatchComparison:
    """Return the comparison whose batch is simplest to print: contiguous, small, upstream gradient 1."""
    return min(
        failing, key=lambda case: (not case.batch.contiguous, case.batch.logits.numel(), case.batch.upstream != 1)
    )


def _ordinary_rows_hold(cases: Sequence[BatchComparison]) -> bool:
    """Return whether rows with .1 <= -log p_y <= 1 are right in every batch."""
    for dtype in {case.dtype for case in cases}:
        of_dtype = [case for case in cases if case.dtype == dtype]
        if not any(case.ordinary.any() for case in of_dtype):
            return False
        if any((case.row_units[case.ordinary] > CONSTANT).any() for case in of_dtype):
            return False
    return all(case.same for case in cases if case.batch.family == "ordinary")


def _scaled(cases: Sequence[BatchComparison], failing: Sequence[BatchComparison]) -> Classification:
    """Classify a loss that fails in ordinary rows: parallel to the reference in every batch, or different."""
    worst = _simplest(failing)
    finite = [case for case in cases if case.finite]
    known = [case for case in finite if case.interval.determined]
    not_parallel = [case for case in known if not case.parallel]
    if not known or not_parallel:
        reason = _apart(cases, failing, known, not_parallel)
        return Classification("different", reason, worst=_simplest(not_parallel) if not_parallel else worst)
    factors = [case.interval.factor for case in known]
    if min(factors) < 0:
        turned = "points the other way" if max(factors) < 0 else "points the other way in some batches"
        reason = f"the gradient {turned}: k from {min(factors):.4g} to {max(factors):.4g}"
        return Classification("different", reason, worst=worst)
    if any(case.growth > CONSTANT * max(factors) for case in finite if not case.interval.determined):
        return Classification("different", "parallel in most batches, finite and wrong in others", worst=worst)
    by_classes: dict[int, list[ScaleInterval]] = {}
    for case in known:
        by_classes.setdefault(case.batch.num_classes, []).append(case.interval)
    if all(overlap(intervals) for intervals in by_classes.values()):
        scale = _constant({c: narrowest(intervals) for c, intervals in sorted(by_classes.items())})
        if not all(case.finite for case in cases) and scale.formula.split()[0] == "1":
            reason = f"right in most batches, no finite gradient in others ({worst.where})"
            return Classification("different", reason, worst=worst)
        return Classification("scaled", f"k = {scale.formula} in every batch", scale, worst)
    if (where := separating(cases, failing, _of_the_call(cases))) is not None:
        reason = f"wrong {where}: k from {min(factors):.4g} to {max(factors):.4g}"
        return Classification("different", reason, worst=worst)
    spans = {c: _span(intervals) for c, intervals in sorted(by_classes.items())}
    low, high = f"{min(factors):.4g}", f"{max(factors):.4g}"
    if low == high:  # they differ by less
        low, high = f"{min(factors):.{DIGITS}g}", f"{max(factors):.{DIGITS}g}"
    reason = f"parallel in every batch, k from {low} to {high}"
    return Classification("reweighted", reason, Scale("by batch", spans), worst)


def _span(intervals: Sequence[ScaleInterval]) -> tuple[float, float]:
    sharp = [interval for interval in intervals if interval.tolerance < SHARP * abs(interval.factor)] or intervals
    factors = [interval.factor for interval in sharp]
    return min(factors), max(factors)


def _constant(intervals: Mapping[int, ScaleInterval]) -> Scale:
    """Return one formula for all C, if one holds to DIGITS digits or to the digits that the dtype gives."""
    uncertain = max(interval.tolerance / abs(interval.factor) for interval in intervals.values())
    digits = max(1, min(DIGITS, math.floor(-math.log10(max(uncertain, 10.0**-DIGITS)))))
    by_classes = {c: interval.factor for c, interval in intervals.items()}
    rounded = {c: float(f"{k:.{DIGITS}g}") for c, k in by_classes.items()}
    powers = {"{}": 0, "{}/C": 1, "{}*C": -1} if len(by_classes) > 1 else {"{}": 0}
    for form, power in powers.items():
        values = [k * float(c) ** power for c, k in by_classes.items()]
        if all(math.isclose(value, values[0], rel_tol=max(10.0**-DIGITS, 2 * uncertain)) for value in values):
            number = f"{values[0]:.{digits}g}"
            if number == "1" and form == "{}" and values[0] != 1 and digits == DIGITS:  # too near to 1 for so many
                number = f"1 {values[0] - 1:+.1e}"
            formula = form.format(number)
            return Scale("C" if formula == "1*C" else formula, rounded)
    return Scale("by C", rounded)


# --- the property that separates the batches in which a candidate is right from the others

Trait = tuple[str, Callable[[BatchComparison], bool]]


def _apart(
    cases: Sequence[BatchComparison],
    failing: Sequence[BatchComparison],
    known: Sequence[BatchComparison],
    not_parallel: Sequence[BatchComparison],
) -> str:
    where = separating(cases, failing, _traits(cases)) or _where_rows_fail(failing)
    if where is not None:
        worst = max(failing, key=lambda case: case.units if math.isfinite(case.units) else 0.0)
        off = f", off by {worst.distance:.2g} relative to the reference" if worst.distance > 0 else ""
        return f"wrong {where}{off}"
    if not known:
        return "gradients bear no relation to the reference's"
    largest = max(not_parallel, key=lambda case: case.residual if math.isfinite(case.residual) else 0.0)
    size = f"{largest.residual:.2g} units of rounding, where {CONSTANT:g} are allowed ({largest.where})"
    if largest.distance == 0:  # the first input's gradient is right, another's is not
        return f"wrong in the gradient of {largest.worst_input}: {size}"
    return f"not parallel to the reference: off by {largest.distance:.2g} relative to it, {size}"


def separating(
    cases: Sequence[BatchComparison], failing: Sequence[BatchComparison], traits: Sequence[Trait]
) -> str | None:
    """Return the first trait that all failing batches have and no other batch has, in words.

    A batch that passes only because its gradient is too small to compare is left out.
    """
    failed = {id(case) for case in failing}
    comparable = [case for case in cases if id(case) in failed or case.interval.determined]
    if len(failed) == len(comparable):
        return None
    for words, holds in traits:
        if all(holds(case) == (id(case) in failed) for case in comparable):
            return words
    return None


def _where_rows_fail(failing: Sequence[BatchComparison]) -> str | None:
    """Return the property that all failing rows have and no other row of the same batches has, in words."""
    others = 0
    for case in failing:
        labels = case.batch.labels.flatten()
        if len(labels) != len(case.row_units) or not case.finite:
            return None
        last = labels == case.batch.num_classes - 1
        if (case.row_units[~last] > CONSTANT).any() or not (case.row_units[last] > CONSTANT).any():
            return None
        others += int((~last).sum())
    return "in rows of the last class" if others else None


def _of_the_call(cases: Sequence[BatchComparison]) -> list[Trait]:
    """Return traits of the call: memory layout, upstream gradient, dtype."""
    return [
        ("on inputs that are not contiguous", lambda case: not case.batch.contiguous),
        ("where a gradient other than 1 reaches it from outside", lambda case: case.batch.upstream != 1),
        *((f"in {name}", lambda case, name=name: case.dtype_name == name) for name in {c.dtype_name for c in cases}),
    ]


def _traits(cases: Sequence[BatchComparison]) -> list[Trait]:
    traits: list[Trait] = [
        *_of_the_call(cases),
        ("where some targets are ignored", lambda case: not bool(case.batch.valid.all())),
        ("in a batch of one row", lambda case: case.batch.num_rows == 1),
    ]
    for rows in sorted({case.batch.num_rows for case in cases})[:-1]:
        traits.append((f"in batches of more than {rows} rows", _above(lambda case: case.batch.num_rows, rows)))
    for classes in sorted({case.batch.num_classes for case in cases})[:-1]:
        traits.append((f"for more than {classes} classes", _above(lambda case: case.batch.num_classes, classes)))
    return traits


def _above(read: Callable[[BatchComparison], int], value: int) -> Callable[[BatchComparison], bool]:
    return lambda case: read(case) > value


@dataclass(frozen=True)
class Offset:
    """Difference of two values that does not depend on the logits.

    Attributes
    ----------
    constant: the value minus the reference's, in nats; for one set of targets if it depends on them.
    moves: whether it depends on the targets.
    """

    constant: float
    moves: bool


def judged_values(cases: Sequence[BatchComparison]) -> str | None:
    """Describe the largest error of the values in the core; None if rounding explains all errors."""
    wrong = [case for case in cases if case.value_units > CONSTANT]
    if not wrong:
        return None
    infinite = [case for case in wrong if not case.value_error < torch.inf]
    if infinite:
        return f"value is not finite where the reference's is ({infinite[0].where})"
    worst = max(wrong, key=lambda case: case.value_units)
    return f"value off by {worst.value_error:.3g} nats ({worst.where})"


def offset(
    loss: Loss, standard: ReferenceEvaluations, shape: BatchShape, dtype: torch.dtype, allowed_in: torch.dtype
) -> Offset | None:
    """Return the constant between the two values, or None if their difference depends on the logits.

    For each of several sets of targets, one of another size, several draws of logits are compared.
    """
    generator = torch.Generator().manual_seed(7)
    classes, no_ignored = shape.typical_classes, replace(shape, ignoring=False)
    constants: list[float] = []
    unit = 0.0
    for place in range(TARGET_SETS):
        lead = ((2, 4), (2, 4), (1, 5))[place] if shape.tokens else ((8,), (8,), (5,))[place]
        first = make_batch("random", lead, classes, no_ignored, generator).at(dtype)
        differences = []
        for _ in range(LOGIT_DRAWS):
            other = make_batch("random", lead, classes, no_ignored, generator).at(dtype)
            batch = replace(other, labels=first.labels, target_probs=first.target_probs)
            fresh = ReferenceEvaluations(standard.loss, standard.device)
            result, exact = evaluate(loss, batch, dtype, standard.device), fresh.exact(batch)
            if result.value is None or exact.value is None:
                return None
            differences.append(result.value.double().item() - exact.value.double().item())
            unit = max(unit, fresh.value_unit(batch, allowed_in), abs(differences[-1]) * torch.finfo(allowed_in).eps)
        if not max(differences) - min(differences) <= 2 * CONSTANT * unit:
            return None
        constants.append(sum(differences) / LOGIT_DRAWS)
    if max(map(abs, constants)) <= 2 * CONSTANT * unit:
        return None
    return Offset(constants[0], max(constants) - min(constants) > 2 * CONSTANT * unit)
