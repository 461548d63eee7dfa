"""One candidate, asked everything that an audit asks."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pipeline.auditing.audit import LOW, Audit, name_of
from pipeline.auditing.batches import Batch
from pipeline.auditing.calls import NO_GRADIENT, Evaluation, Loss, evaluate, same_bits
from pipeline.auditing.deciding import SAMENESS, Decision, Scale, decide
from pipeline.auditing.domain import Limit, limits
from pipeline.auditing.effects import backward_effects, changed_state, policies, random_state, state_of
from pipeline.auditing.evidence import evidence
from pipeline.auditing.finding import Finding, in_words
from pipeline.auditing.judging import Judgement, compare
from pipeline.auditing.normaliser import Normaliser, normaliser
from pipeline.auditing.precision import computes_in, systematic_part
from pipeline.auditing.values import judged_values, offset
from pipeline.numerics import SYSTEMATIC

ASKED_AGAIN = 2**14  # logits in a batch that is asked a second time
NEEDS_CUDA = ("cuda", "triton", "nvidia", "active drivers", "gpu")  # what packages say where there is none


@dataclass
class _Answers:
    """What came of the grid: judgements of the cells that could be judged, and the rest by its reason."""

    judged: list[Judgement] = field(default_factory=list)
    refused: list[tuple[Batch, torch.dtype, str]] = field(default_factory=list)
    effects: list[str] = field(default_factory=list)
    unequal: str | None = None


def examine(audit: Audit, loss: Loss, tell: Callable[[Finding], None] = lambda _: None) -> Finding:
    """Ask a candidate everything; `tell` hears what is known so far before the questions that may end a process."""
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answers = _ask(audit, loss)
        if not answers.judged:
            return _unjudged(answers)
        finding = _examined(audit, loss, answers)
        tell(finding)
        dtype = answers.judged[0].dtype
        asked = policies(loss, audit.reference, audit.shape, dtype, audit.device)
        return replace(finding, side_effects=(*finding.side_effects, *asked))


def _ask(audit: Audit, loss: Loss) -> _Answers:
    """Every cell once in order, and the smaller ones again in the opposite order."""
    answers = _Answers()
    for dtype in audit.dtypes:
        with contextlib.suppress(Exception):  # a copy that cannot be made is told of where it is called
            loss.prepared(dtype, audit.device)
    state, drawn = state_of(loss), random_state(audit.device)
    kept: list[tuple[Batch, torch.dtype, Evaluation]] = []
    overwritten: Counter[str] = Counter()
    for batch, dtype in audit.cells:
        found = evaluate(loss, batch, dtype, audit.device)
        if found.error is not None:
            answers.refused.append((batch, dtype, found.error))
            continue
        overwritten.update(found.overwritten)
        answers.judged.append(compare(found, audit.standard, batch, dtype))
        if batch.logits.numel() <= ASKED_AGAIN:
            kept.append((batch, dtype, found))
    for batch, dtype, first in reversed(kept):
        again = evaluate(loss, batch, dtype, audit.device)
        if again.value is None or not _equal(first, again):
            answers.unequal = f"{name_of(dtype)}, {batch.where}"
            break
    answers.effects += [f"overwrites {name}" for name in overwritten]
    if not torch.equal(drawn, random_state(audit.device)):
        answers.effects.append("consumes random numbers")
    if changed := changed_state(loss, state):
        answers.effects.append(f"keeps state: {', '.join(changed)}")
    if answers.unequal is not None:
        answers.effects.append(f"equal calls differ ({answers.unequal})")
    return answers


def _equal(a: Evaluation, b: Evaluation) -> bool:
    pairs = [(a.value, b.value), *((a.gradients[name], b.gradients.get(name)) for name in a.gradients)]
    return all(same_bits(x, y) for x, y in pairs)


def needs_cuda(error: str) -> bool:
    """Whether an error says that there is no CUDA device, and there is none."""
    return any(word in error.lower() for word in NEEDS_CUDA) and not torch.cuda.is_available()


def _unjudged(answers: _Answers) -> Finding:
    """No batch gave a gradient: why."""
    errors = Counter(error for _, _, error in answers.refused)
    error = errors.most_common(1)[0][0]
    if error.startswith(NO_GRADIENT):
        return Finding("different", f"{error}: training would not move", side_effects=("no gradient", *answers.effects))
    if needs_cuda(error):
        return Finding("not_run", f"needs a CUDA device, and there is none: {error}")
    return Finding("error", f"failed on every batch: {error}")


def _examined(audit: Audit, loss: Loss, answers: _Answers) -> Finding:
    cells, inside, systematic = _at_its_precision(audit, loss, answers.judged)
    dtype = max({cell.dtype for cell in cells}, key=lambda d: torch.finfo(d).bits)
    decision = _decided(answers, cells, inside, systematic)
    divided = normaliser(loss, audit.shape, audit.device, dtype, inside)
    effects = [*answers.effects, *backward_effects(loss, audit.shape, dtype, audit.device)]
    constant = None
    wrong = judged_values(cells) if decision.word in ("identical", "rounding") else None
    if wrong is not None:
        constant = offset(loss, audit.standard, audit.shape, dtype, inside or dtype)
        decision = replace(decision, word="rounding" if constant is None else "offset")
        effects += [wrong] if constant is None else []
    found = _limits(audit, loss, decision, cells)
    if decision.word in SAMENESS and any(limit.core for limit in found):
        decision = replace(decision, word="domain")
    nearest = found[0] if found else None
    finding = Finding(
        decision.word, "", decision.scale, constant, nearest, divided, tuple(effects), power=lambda: audit.power
    )
    numbers = evidence(audit, loss, cells, inside, systematic, found)
    return replace(
        finding,
        sentence=_sentence(audit, finding, decision, inside, numbers),
        covered=_covered(audit, cells),
        not_covered=_not_covered(audit, answers),
        evidence=numbers,
        worst=None if decision.worst is None else (decision.worst.batch, decision.worst.dtype_name),
    )


def _at_its_precision(
    audit: Audit, loss: Loss, cells: Sequence[Judgement]
) -> tuple[Sequence[Judgement], torch.dtype | None, float | None]:
    """(cells, the coarser precision that it computes in, the systematic part of its error there).

    A loss that rounds to float32 inside is judged by float32's units, whatever it is handed. It is known by its inputs'
    last bits not mattering, or by an error in float64 that is float32's noise.
    """
    if audit.low is not None or all(cell.same for cell in cells):
        return cells, None, None
    doubles = [cell for cell in cells if cell.dtype == torch.float64]
    if not doubles:
        return cells, None, systematic_part(loss, audit.standard, audit.shape, torch.float32)
    inside = computes_in(loss, audit.shape, audit.device)
    if inside in LOW:
        return cells, inside, None
    if inside is None and not all(cell.same for cell in cells if cell.dtype != torch.float64):
        return cells, None, None
    again = [_judged_again(audit, loss, cell, torch.float32) if cell.dtype == torch.float64 else cell for cell in cells]
    systematic = systematic_part(loss, audit.standard, audit.shape, torch.float64)
    if inside is None and not (systematic < SYSTEMATIC and all(cell.same for cell in again)):
        return cells, None, None  # it computes in float64, and is wrong there
    return again, torch.float32, systematic


def _judged_again(audit: Audit, loss: Loss, cell: Judgement, inside: torch.dtype) -> Judgement:
    found = evaluate(loss, cell.batch, cell.dtype, audit.device)
    return (
        replace(cell, error=found.error)
        if found.error
        else compare(found, audit.standard, cell.batch, cell.dtype, inside)
    )


def _decided(
    answers: _Answers, cells: Sequence[Judgement], inside: torch.dtype | None, systematic: float | None
) -> Decision:
    decision = decide(cells)
    if inside in LOW and decision.word not in ("scaled", "reweighted"):
        name = name_of(inside)
        reason = f"rounds to {name} inside; dtype=torch.{name} judges it at that precision"
        return Decision("different", reason, worst=decision.worst)
    if decision.word in SAMENESS and answers.unequal is not None:
        return Decision("different", "equal calls give different bits", worst=decision.worst)
    if decision.word in SAMENESS and systematic is not None and systematic >= SYSTEMATIC:
        reason = f"computes in float32, but its error there is no rounding: systematic part {systematic:.3g}, noise < 3"
        return Decision("different", reason, worst=decision.worst)
    return decision


def _limits(audit: Audit, loss: Loss, decision: Decision, cells: Sequence[Judgement]) -> list[Limit]:
    if decision.word == "different":
        return []
    dtype = min({cell.dtype for cell in cells}, key=lambda d: torch.finfo(d).bits)
    return limits(loss, audit.standard, audit.shape, dtype, _largest_factor(decision.scale), decision.word == "offset")


def _largest_factor(scale: Scale | None) -> float | None:
    if scale is None:
        return None
    return max(k if isinstance(k, float) else max(k) for k in scale.by_classes.values())


# --- words


def _sentence(audit: Audit, finding: Finding, decision: Decision, inside: torch.dtype | None, numbers: Any) -> str:
    word, said = finding.objective, []
    if word == "domain" and finding.domain is not None:
        said.append(f"the same for ordinary rows, but {in_words(finding.domain)}, within the core")
    elif word == "domain":
        worst = decision.worst.where if decision.worst is not None else ""
        said.append(f"the same for ordinary rows, wrong elsewhere in the core ({worst})")
    else:
        said.append(decision.reason)
    if inside is not None and inside not in LOW and word != "different":
        said.append(f"computes in {name_of(inside)} and is judged there")
    if word == "offset" and finding.offset is not None:
        moving = (
            "a constant in the logits that moves with the targets, for one set of them" if finding.offset.moves else ""
        )
        said.append(f"values differ by {moving or 'the constant'} {finding.offset.constant:.6g} nats")
    if word == "reweighted" and finding.normaliser is not None:
        said.append(_divisors(finding.normaliser, audit.normaliser))
    if word != "domain" and finding.domain is not None:
        said.append(in_words(finding.domain))
    if audit.low is not None and numbers.get("beside_reference"):
        said.append(numbers["beside_reference"])
    return "; ".join(said)


def _divisors(mine: Normaliser, reference: Normaliser) -> str:
    def divides(by: str) -> str:
        return "divides by nothing but a constant" if by == "a constant" else f"divides by {by}"

    if mine.divides_by == "not a sum over rows":
        return f"not a sum over rows; the reference {divides(reference.divides_by)}"
    return f"{divides(mine.divides_by)}, the reference {divides(reference.divides_by)}"


def _covered(audit: Audit, cells: Sequence[Judgement]) -> tuple[str, ...]:
    classes = sorted({cell.batch.num_classes for cell in cells})
    rows = sorted({cell.batch.num_rows for cell in cells})
    dtypes = ", ".join(dict.fromkeys(cell.dtype_name for cell in cells))
    entries = [
        f"{len(cells)} batches: C = {', '.join(map(str, classes))}; {rows[0]} to {rows[-1]} rows; {dtypes}; "
        f"{audit.device}",
        "soft targets" if audit.shape.soft else "one-hot targets",
    ]
    if audit.shape.ignore_index is not None:
        entries.append(f"targets ignored by {audit.shape.ignore_index}")
    if audit.own_batches:
        entries.append(f"{len(audit.own_batches)} batches of the user's own")
    return tuple(entries)


def _not_covered(audit: Audit, answers: _Answers) -> tuple[str, ...]:
    calls = 2 * len(audit.cells)
    entries = [f"state that shows only after more than {calls} calls", "other devices, builds and compiled graphs"]
    if not audit.shape.soft:
        entries.append("soft targets")
    if audit.shape.ignore_index is None:
        entries.append("ignored targets")
    reasons: dict[str, list[str]] = {}
    for batch, dtype, error in answers.refused:
        reasons.setdefault(error, []).append(f"{name_of(dtype)}, {batch.where}")
    for error, places in reasons.items():
        entries.append(f"{len(places)} batches that it refuses, such as {places[0]}: {error}")
    return tuple(entries)
