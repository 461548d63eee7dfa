"""From the judgements of all batches to one word, and from the values of same gradients to an offset."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from likelihood_lab.audit.compare import BatchComparison, ReferenceEvaluations
from likelihood_lab.audit.evaluate import Loss, evaluate
from likelihood_lab.audit.rounding import CONSTANT, ScaleInterval, narrowest, overlap
from likelihood_lab.categorical.batches import BatchShape, make_batch

SAMENESS = ("identical", "rounding", "offset")
DIGITS = 12
SHARP = 1e-10


TARGET_SETS = 3
LOGIT_DRAWS = 4


@dataclass(frozen=True)
class Scale:
    """The factor between two gradients.

    Attributes:
        formula: the factor in terms of C where one fits ("1/C", "0.1"), else "by C"; of a reweighted loss "by batch".
        by_classes: the factor for each C; of a reweighted loss the smallest and the largest that was met.
    """

    formula: str
    by_classes: Mapping[int, float | tuple[float, float]]

    @property
    def largest(self) -> float:
        """The largest factor that was met."""
        return max(k if isinstance(k, float) else max(k) for k in self.by_classes.values())


@dataclass(frozen=True)
class Classification:
    """A word, why, and the smallest batch that speaks against sameness."""

    word: str
    reason: str
    scale: Scale | None = None
    worst: BatchComparison | None = None


def classify(cells: Sequence[BatchComparison]) -> Classification:
    """The word for a candidate whose gradients were judged in these cells, in the order of protocol section 2."""
    failing = [cell for cell in cells if not cell.same]
    if not failing:
        if all(cell.bitwise for cell in cells):
            return Classification("identical", f"gradients equal bit for bit in {len(cells)} of {len(cells)} batches")
        largest = max(cell.units for cell in cells)
        return Classification("rounding", f"gradients equal up to rounding: errors of {largest:.2g} units at most")
    worst = _simplest(failing)
    if not any(cell.finite for cell in cells):
        return Classification("different", "gradients are not finite in any batch", worst=worst)
    if _ordinary_rows_hold(cells):
        return Classification("domain", "", worst=worst)
    return _scaled(cells, failing)


def _simplest(failing: Sequence[BatchComparison]) -> BatchComparison:
    """The batch that is most easily written out: contiguous, small, with nothing from outside."""
    return min(
        failing, key=lambda cell: (not cell.batch.contiguous, cell.batch.logits.numel(), cell.batch.upstream != 1)
    )


def _ordinary_rows_hold(cells: Sequence[BatchComparison]) -> bool:
    """Rows with .1 <= -log p_y <= 1 are right wherever they occur, whatever shares the batch with them."""
    for dtype in {cell.dtype for cell in cells}:
        asked = [cell for cell in cells if cell.dtype == dtype]
        if not any(cell.ordinary.any() for cell in asked):
            return False
        if any((cell.row_units[cell.ordinary] > CONSTANT).any() for cell in asked):
            return False
    return all(cell.same for cell in cells if cell.batch.family == "ordinary")


def _scaled(cells: Sequence[BatchComparison], failing: Sequence[BatchComparison]) -> Classification:
    """Parallel to the reference in every batch where that can be told, or not at all."""
    worst = _simplest(failing)
    finite = [cell for cell in cells if cell.finite]
    known = [cell for cell in finite if cell.interval.determined]
    not_parallel = [cell for cell in known if not cell.parallel]
    if not known or not_parallel:
        reason = _apart(cells, failing, known, not_parallel)
        return Classification("different", reason, worst=_simplest(not_parallel) if not_parallel else worst)
    factors = [cell.interval.factor for cell in known]
    if min(factors) < 0:
        turned = "points the other way" if max(factors) < 0 else "points the other way in some batches"
        reason = f"the gradient {turned}: k from {min(factors):.4g} to {max(factors):.4g}"
        return Classification("different", reason, worst=worst)
    if any(cell.growth > CONSTANT * max(factors) for cell in finite if not cell.interval.determined):
        return Classification("different", "parallel in most batches, finite and wrong in others", worst=worst)
    by_classes: dict[int, list[ScaleInterval]] = {}
    for cell in known:
        by_classes.setdefault(cell.batch.num_classes, []).append(cell.interval)
    if all(overlap(intervals) for intervals in by_classes.values()):
        scale = _constant({c: narrowest(intervals) for c, intervals in sorted(by_classes.items())})
        if not all(cell.finite for cell in cells) and scale.formula.split()[0] == "1":
            reason = f"right in most batches, no finite gradient in others ({worst.where})"
            return Classification("different", reason, worst=worst)
        return Classification("scaled", f"k = {scale.formula} in every batch", scale, worst)
    if (where := separating(cells, failing, _of_the_call(cells))) is not None:
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
    """One formula for all C, where there is one to DIGITS digits, or to as many as the precision gives."""
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


# --- what tells the batches where a candidate is right from those where it is wrong

Trait = tuple[str, Callable[[BatchComparison], bool]]


def _apart(
    cells: Sequence[BatchComparison],
    failing: Sequence[BatchComparison],
    known: Sequence[BatchComparison],
    not_parallel: Sequence[BatchComparison],
) -> str:
    where = separating(cells, failing, _traits(cells)) or _where_rows_fail(failing)
    if where is not None:
        worst = max(failing, key=lambda cell: cell.units if math.isfinite(cell.units) else 0.0)
        off = f", off by {worst.distance:.2g} relative to the reference" if worst.distance > 0 else ""
        return f"wrong {where}{off}"
    if not known:
        return "gradients bear no relation to the reference's"
    largest = max(not_parallel, key=lambda cell: cell.residual if math.isfinite(cell.residual) else 0.0)
    size = f"{largest.residual:.2g} units of rounding, where {CONSTANT:g} are allowed ({largest.where})"
    if largest.distance == 0:  # the first input's gradient is right, another's is not
        return f"wrong in the gradient of {largest.worst_input}: {size}"
    return f"not parallel to the reference: off by {largest.distance:.2g} relative to it, {size}"


def separating(
    cells: Sequence[BatchComparison], failing: Sequence[BatchComparison], traits: Sequence[Trait]
) -> str | None:
    """The one trait that all failing batches share and no other has, in words.

    A batch that passes because its gradient is too small to tell counts for neither.
    """
    failed = {id(cell) for cell in failing}
    telling = [cell for cell in cells if id(cell) in failed or cell.interval.determined]
    if len(failed) == len(telling):
        return None
    for words, holds in traits:
        if all(holds(cell) == (id(cell) in failed) for cell in telling):
            return words
    return None


def _where_rows_fail(failing: Sequence[BatchComparison]) -> str | None:
    """What the rows that fail have in common and others of the same batches have not."""
    others = 0
    for cell in failing:
        labels = cell.batch.labels.flatten()
        if len(labels) != len(cell.row_units) or not cell.finite:
            return None
        last = labels == cell.batch.num_classes - 1
        if (cell.row_units[~last] > CONSTANT).any() or not (cell.row_units[last] > CONSTANT).any():
            return None
        others += int((~last).sum())
    return "in rows of the last class" if others else None


def _of_the_call(cells: Sequence[BatchComparison]) -> list[Trait]:
    """Traits of how a loss is called, rather than of what it is asked about."""
    return [
        ("on inputs that are not contiguous", lambda cell: not cell.batch.contiguous),
        ("where a gradient other than 1 reaches it from outside", lambda cell: cell.batch.upstream != 1),
        *((f"in {dtype}", _is(lambda cell: cell.dtype_name, dtype)) for dtype in {c.dtype_name for c in cells}),
    ]


def _traits(cells: Sequence[BatchComparison]) -> list[Trait]:
    traits: list[Trait] = [
        *_of_the_call(cells),
        ("where some targets are ignored", lambda cell: not bool(cell.batch.valid.all())),
        ("in a batch of one row", lambda cell: cell.batch.num_rows == 1),
    ]
    for rows in sorted({cell.batch.num_rows for cell in cells})[:-1]:
        traits.append((f"in batches of more than {rows} rows", _above(lambda cell: cell.batch.num_rows, rows)))
    for classes in sorted({cell.batch.num_classes for cell in cells})[:-1]:
        traits.append((f"for more than {classes} classes", _above(lambda cell: cell.batch.num_classes, classes)))
    return traits


def _is(read: Callable[[BatchComparison], str], value: str) -> Callable[[BatchComparison], bool]:
    return lambda cell: read(cell) == value


def _above(read: Callable[[BatchComparison], int], value: int) -> Callable[[BatchComparison], bool]:
    return lambda cell: read(cell) > value


@dataclass(frozen=True)
class Offset:
    """Value minus the reference's, constant in the logits.

    Attributes:
        constant: it, in nats; where it moves with the targets, what it was for one set of them.
        moves: whether it depends on the targets.
    """

    constant: float
    moves: bool


def judged_values(cells: Sequence[BatchComparison]) -> str | None:
    """What is wrong with the values of the core, in words; None where rounding accounts for all of it."""
    wrong = [cell for cell in cells if cell.value_units > CONSTANT]
    if not wrong:
        return None
    infinite = [cell for cell in wrong if not cell.value_error < torch.inf]
    if infinite:
        return f"value is not finite where the reference's is ({infinite[0].where})"
    worst = max(wrong, key=lambda cell: cell.value_units)
    return f"value off by {worst.value_error:.3g} nats ({worst.where})"


def offset(
    loss: Loss, standard: ReferenceEvaluations, shape: BatchShape, dtype: torch.dtype, allowed_in: torch.dtype
) -> Offset | None:
    """The constant between two values, where the difference does not move with the logits.

    Several draws of logits are asked for each of several sets of targets, one of them of another size.
    """
    draw = torch.Generator().manual_seed(7)
    classes = next((c for c in shape.num_classes if c >= 10), shape.num_classes[0])
    asked = replace(shape, ignoring=False)
    constants: list[float] = []
    unit = 0.0
    for place in range(TARGET_SETS):
        lead = ((2, 4), (2, 4), (1, 5))[place] if shape.tokens else ((8,), (8,), (5,))[place]
        first = make_batch("random", lead, classes, asked, draw).at(dtype)
        differences = []
        for _ in range(LOGIT_DRAWS):
            other = make_batch("random", lead, classes, asked, draw).at(dtype)
            batch = replace(other, labels=first.labels, target_probs=first.target_probs)
            fresh = ReferenceEvaluations(standard.loss, standard.device)
            found, exact = evaluate(loss, batch, dtype, standard.device), fresh.exact(batch)
            if found.value is None or exact.value is None:
                return None
            differences.append(found.value.double().item() - exact.value.double().item())
            unit = max(unit, fresh.value_unit(batch, allowed_in), abs(differences[-1]) * torch.finfo(allowed_in).eps)
        if not max(differences) - min(differences) <= 2 * CONSTANT * unit:
            return None
        constants.append(sum(differences) / LOGIT_DRAWS)
    if max(map(abs, constants)) <= 2 * CONSTANT * unit:
        return None
    return Offset(constants[0], max(constants) - min(constants) > 2 * CONSTANT * unit)
