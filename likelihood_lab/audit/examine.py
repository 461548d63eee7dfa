"""One candidate, asked everything that an audit asks."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from likelihood_lab.audit.classify import SAMENESS, Classification, classify, judged_values, offset
from likelihood_lab.audit.compare import BatchComparison, compare, judge
from likelihood_lab.audit.context import LOW, AuditContext, name_of
from likelihood_lab.audit.describe import covered, evidence, not_covered, sentence
from likelihood_lab.audit.domain import Limit, find_domain_limits
from likelihood_lab.audit.evaluate import NO_GRADIENT, Evaluation, Loss, evaluate, same_bits
from likelihood_lab.audit.finding import Finding
from likelihood_lab.audit.normaliser import normaliser
from likelihood_lab.audit.precision import NOISY_FAMILIES, computes_in, systematic_part
from likelihood_lab.audit.rounding import SYSTEMATIC
from likelihood_lab.audit.side_effects import (
    backward_effects,
    changed_state,
    interleaved_effects,
    policies,
    random_state,
    state_of,
)
from likelihood_lab.categorical.batches import AuditBatch, BatchShape

ASKED_AGAIN = 2**14  # logits in a batch that is asked a second time
FEW_ROWS = 2  # rows whose float32 gradients may be exact by luck
ASKED_LAST = 6  # batches, asked once more when all else has been
NEEDS_CUDA = ("cuda", "triton", "nvidia", "active drivers", "gpu")  # what packages say where there is none


def examine(audit: AuditContext, loss: Loss, tell: Callable[[Finding], None] = lambda _: None) -> Finding:
    """Ask a candidate everything; `tell` hears what is known so far before the questions that may end a process."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(audit.device.type, enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        answers = _Answers(audit, loss)
        answers.ask()
        if not answers.judged:
            return _unjudged(answers)
        finding = _examined(audit, loss, answers)
        tell(finding)
        dtype = answers.judged[0].dtype
        asked = policies(loss, audit.reference, answers.shape, dtype, audit.device)
        return replace(finding, side_effects=(*finding.side_effects, *asked))


def needs_cuda(error: str) -> bool:
    """Whether an error says that there is no CUDA device, and there is none."""
    return any(word in error.lower() for word in NEEDS_CUDA) and not torch.cuda.is_available()


# --- the grid


@dataclass
class _Answers:
    """What a candidate answers on the grid.

    Attributes:
        judged: a judgement of each cell that gave a value.
        refused: the cells that raised, and what.
        kept: answers of the smaller cells, to be compared with later ones.
        unequal: where an equal call gave other bits, if one did.
    """

    audit: AuditContext
    loss: Loss
    judged: list[BatchComparison] = field(default_factory=list)
    refused: list[tuple[AuditBatch, torch.dtype, str]] = field(default_factory=list)
    kept: list[tuple[AuditBatch, torch.dtype, Evaluation]] = field(default_factory=list)
    unequal: str | None = None
    effects: list[str] = field(default_factory=list)

    @property
    def shape(self) -> BatchShape:
        """What the audit's batches have in common, with the C that the candidate takes."""
        return replace(self.audit.shape, num_classes=tuple(sorted({cell.batch.num_classes for cell in self.judged})))

    def ask(self) -> None:
        """Every cell once in order, and the smaller ones again in the opposite order."""
        for dtype in self.audit.dtypes:
            with contextlib.suppress(Exception):  # a copy that cannot be made is told of where it is called
                self.loss.prepared(dtype, self.audit.device)
        state, drawn = state_of(self.loss), random_state(self.audit.device)
        overwritten: Counter[str] = Counter()
        for batch, dtype in self.audit.cells:
            overwritten.update(self._ask_once(batch, dtype))
        self.ask_again(self.kept[::-1])
        self.effects += [f"overwrites {name}" for name in overwritten]
        if not torch.equal(drawn, random_state(self.audit.device)):
            self.effects.append("consumes random numbers")
        if changed := changed_state(self.loss, state):
            self.effects.append(f"keeps state: {', '.join(changed)}")

    def _ask_once(self, batch: AuditBatch, dtype: torch.dtype) -> tuple[str, ...]:
        found = evaluate(self.loss, batch, dtype, self.audit.device)
        if found.value is None:
            self.refused.append((batch, dtype, found.error or ""))
        elif found.error is not None:
            self.judged.append(BatchComparison(batch, dtype, found.error))
        else:
            self.judged.append(compare(found, self.audit.standard, batch, dtype))
            if batch.logits.numel() <= ASKED_AGAIN:
                self.kept.append((batch, dtype, found))
        return found.overwritten

    def ask_again(self, kept: Sequence[tuple[AuditBatch, torch.dtype, Evaluation]]) -> None:
        """Equal calls must give equal bits."""
        for batch, dtype, first in kept:
            again = evaluate(self.loss, batch, dtype, self.audit.device)
            if self.unequal is None and not _equal(first, again):
                self.unequal = f"{name_of(dtype)}, {batch.where}"
                self.effects.append(f"equal calls differ ({self.unequal})")


def _equal(a: Evaluation, b: Evaluation) -> bool:
    pairs = [(a.value, b.value), *((a.gradients[name], b.gradients.get(name)) for name in a.gradients)]
    return all(same_bits(x, y) for x, y in pairs)


def _unjudged(answers: _Answers) -> Finding:
    """No batch gave a value: why."""
    error = Counter(error for _, _, error in answers.refused).most_common(1)[0][0]
    if needs_cuda(error):
        return Finding("not_run", f"needs a CUDA device, and there is none: {error}")
    return Finding("error", f"failed on every batch: {error}")


# --- the finding


def _examined(audit: AuditContext, loss: Loss, answers: _Answers) -> Finding:
    if all(cell.error is not None for cell in answers.judged):
        error = answers.judged[0].error or NO_GRADIENT
        return Finding("different", f"{error}: training would not move", side_effects=("no gradient", *answers.effects))
    shape = answers.shape
    cells, inside, systematic = _at_its_precision(audit, loss, shape, answers.judged)
    dtype = max({cell.dtype for cell in cells}, key=lambda d: torch.finfo(d).bits)
    divided = normaliser(loss, shape, audit.device, dtype, inside)
    forgets = [] if answers.unequal else list(interleaved_effects(loss, shape, dtype, audit.device))
    effects = [*forgets, *backward_effects(loss, shape, dtype, audit.device)]
    decision = _decided(cells, inside, systematic)
    constant = None
    if decision.word in SAMENESS and (wrong := judged_values(cells)) is not None:
        constant = offset(loss, audit.standard, shape, dtype, inside or dtype)
        decision = replace(decision, word="rounding" if constant is None else "offset")
        effects += [wrong] if constant is None else []
    answers.ask_again(answers.kept[:ASKED_LAST])
    decision = _without_excuses(answers, decision)
    found = _limits(audit, loss, shape, decision, cells)
    answers.ask_again(answers.kept[:ASKED_LAST])
    decision = _without_excuses(answers, decision)
    if decision.word in SAMENESS and any(limit.core for limit in found):
        decision = replace(decision, word="domain")
    if decision.word in SAMENESS and forgets:
        decision = Classification("different", forgets[0].removeprefix("keeps state: "), worst=decision.worst)
    numbers = evidence(audit, loss, cells, inside, systematic, found)
    finding = Finding(
        decision.word,
        "",
        decision.scale,
        constant,
        found[0] if found else None,
        divided,
        (*answers.effects, *effects),
        covered(audit, cells),
        not_covered(audit, answers.refused),
        numbers,
        None if decision.worst is None else (decision.worst.batch, decision.worst.dtype_name),
        power=lambda: audit.power,
    )
    return replace(finding, sentence=sentence(audit, finding, decision, answers.refused, numbers))


def _without_excuses(answers: _Answers, decision: Classification) -> Classification:
    """No word of sameness where equal calls differ, or where batches are refused whose like are not."""
    if decision.word not in SAMENESS:
        return decision
    if answers.unequal is not None:
        return Classification("different", f"equal calls give different bits ({answers.unequal})", worst=decision.worst)
    taken = {(cell.batch.num_classes, cell.dtype) for cell in answers.judged}
    refused_only_sometimes = [
        (batch, error) for batch, dtype, error in answers.refused if (batch.num_classes, dtype) in taken
    ]
    if not refused_only_sometimes:
        return decision
    if all(not batch.contiguous for batch, _ in refused_only_sometimes):
        effect = f"refuses inputs that are not contiguous ({refused_only_sometimes[0][1]})"
        answers.effects += [effect] if effect not in answers.effects else []
        return decision
    batch, error = refused_only_sometimes[0]
    number = len(refused_only_sometimes)
    reason = f"raises on {number} batches that the reference takes, such as {batch.where}: {error}"
    return Classification("different", reason, worst=decision.worst)


def _at_its_precision(
    audit: AuditContext, loss: Loss, shape: BatchShape, cells: Sequence[BatchComparison]
) -> tuple[Sequence[BatchComparison], torch.dtype | None, float | None]:
    """(cells, the coarser precision that it computes in, the systematic part of its error there).

    A loss that rounds to float32 inside is judged by float32's units, whatever it is handed. It is known by its inputs'
    last bits not mattering, or by an error in float64 that is float32's noise.
    """
    doubles = any(cell.dtype == torch.float64 for cell in cells)
    if audit.low is not None or all(cell.bitwise for cell in cells) or (doubles and all(cell.same for cell in cells)):
        return cells, None, None
    if not doubles:
        return cells, None, systematic_part(loss, audit.standard, shape, torch.float32)
    inside = computes_in(loss, shape, audit.device)
    if inside in LOW:
        return cells, inside, None
    if inside is None and not all(cell.same for cell in cells if cell.dtype != torch.float64):
        return cells, None, None
    again = [
        judge(loss, audit.standard, cell.batch, cell.dtype, torch.float32) if cell.dtype == torch.float64 else cell
        for cell in cells
    ]
    systematic = systematic_part(loss, audit.standard, shape, torch.float64)
    noise = systematic < SYSTEMATIC and _noisy(cells)
    if inside is None and not (noise and all(cell.same for cell in again)):
        return cells, None, None  # it computes in float64, and is wrong there
    return again, torch.float32, systematic


def _noisy(cells: Sequence[BatchComparison]) -> bool:
    """Whether every batch in float64 whose rows are not saturated is off by more than float64 and a factor explain.

    What computes in float32 is off for every number of classes and rows; what is wrong for some of them alone is not.
    """
    asked = [
        cell
        for cell in cells
        if cell.dtype == torch.float64 and cell.batch.family in NOISY_FAMILIES and cell.batch.num_rows > FEW_ROWS
    ]
    return bool(asked) and not any(cell.parallel for cell in asked)


def _decided(cells: Sequence[BatchComparison], inside: torch.dtype | None, systematic: float | None) -> Classification:
    decision = classify(cells)
    if inside in LOW and decision.word not in ("scaled", "reweighted"):
        name = name_of(inside)
        reason = f"rounds to {name} inside; dtype=torch.{name} judges it at that precision"
        return Classification("different", reason, worst=decision.worst)
    if decision.word in SAMENESS and systematic is not None and systematic >= SYSTEMATIC:
        ratio = f"systematic part {systematic:.3g}, noise < {SYSTEMATIC:g}"
        reason = f"computes in float32, but its error there is no rounding: {ratio}"
        return Classification("different", reason, worst=decision.worst)
    return decision


def _limits(
    audit: AuditContext, loss: Loss, shape: BatchShape, decision: Classification, cells: Sequence[BatchComparison]
) -> list[Limit]:
    """In the coarsest precision that was asked; of a loss that differs everywhere there is none to find."""
    if decision.word == "different":
        return []
    dtype = min({cell.dtype for cell in cells}, key=lambda d: torch.finfo(d).bits)
    largest = None if decision.scale is None else decision.scale.largest
    return find_domain_limits(loss, audit.standard, shape, dtype, largest, decision.word == "offset")
