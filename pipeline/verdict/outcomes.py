"""Outcome of every loss, computed from the cells of a trial, and the results of the controls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from likelihood_lab.stats.outcome import OutcomeFinding, compare, correct_for_arms
from likelihood_lab.stats.pairs import Status, measured_in
from likelihood_lab.stats.trajectory import (
    SMALLEST_CAUGHT,
    Distances,
    Envelope,
    envelope,
)
from pipeline.replica import BY_PRECISION, DOSE, REPLAY, Replica
from pipeline.storage.cells import Cell
from pipeline.verdict.plan import AnalysisPlan, Look, TrialContext, level_of
from pipeline.verdict.results import ControlResults, MetricResult, Replay

PLACEBOS = tuple(name for names in BY_PRECISION.values() for name in names)

Cells = Mapping[Replica, Cell]


@dataclass(frozen=True)
class TrialResults:
    """Cells of a trial, with everything that a verdict about them depends on.

    Attributes:
        cells: the cells of the losses, and of the controls that were made from the plan's reference.
        damaged: replica -> why its cell cannot be read. It counts as missing.
    """

    cells: Cells
    plan: AnalysisPlan
    context: TrialContext
    look: Look
    damaged: Mapping[Replica, str] = field(default_factory=dict)

    def cells_of(self, arm: str) -> list[Cell | None]:
        """Return the arm's cell for every seed of the plan, None where it is missing."""
        return [self.cells.get(Replica(arm, seed)) for seed in self.plan.seeds]

    def pairs(self, arm: str) -> list[tuple[int, Cell, Cell]]:
        """Return seed, the arm's cell and the reference's cell for every seed that has both."""
        both = zip(self.plan.seeds, self.cells_of(arm), self.cells_of(self.plan.reference), strict=True)
        return [(seed, mine, theirs) for seed, mine, theirs in both if mine is not None and theirs is not None]


def own_controls(controls: Cells, cells: Cells, plan: AnalysisPlan) -> dict[Replica, Cell]:
    """Return the controls derived from this plan's reference. Controls of another reference are ignored."""
    known = next((cell for replica, cell in cells.items() if replica.arm == plan.reference), None)
    if known is None:
        return {}
    declared = known.record.made_from.get("loss", {})
    return {
        replica: cell
        for replica, cell in controls.items()
        if {**declared, "control": replica.arm}.items() <= cell.record.made_from["loss"].items()
    }


def status_of(cell: Cell | None, reference: Cell | None, context: TrialContext) -> Status:
    """Return how a run ended.

    It also counts as diverged if a test metric is not finite, or if it learned nothing while its reference did.
    """
    if cell is None:
        return "missing"
    if cell.record.diverged_at is not None or not all(
        math.isfinite(cell.metrics[f"test/{metric}"]) for metric in measured_in([cell.metrics])
    ):
        return "diverged"
    reference_nll = reference.metrics["test/nll"] if reference else math.nan
    return "diverged" if cell.metrics["test/nll"] >= context.label_entropy > reference_nll else "ok"


def outcomes(results: TrialResults) -> dict[str, OutcomeFinding]:
    """Return the outcome of every candidate, corrected for their number."""
    return correct_for_arms({name: outcome_of(name, results) for name in results.plan.candidates})


def outcome_of(candidate: str, results: TrialResults) -> OutcomeFinding:
    """Return the outcome of one arm against the reference, as if it were the only one."""
    plan, context, look = results.plan, results.context, results.look
    mine, theirs = results.cells_of(candidate), results.cells_of(plan.reference)
    pairs = results.pairs(candidate)
    identical = {seed for seed, a, b in pairs if a.record.weights_sha256 == b.record.weights_sha256}
    unpaired = [seed for seed, a, b in pairs if a.record.initial_sha256 != b.record.initial_sha256]
    metrics = measured_in(cell.metrics for cell in (*mine, *theirs) if cell is not None)
    finding = compare(
        _test_metrics(mine, metrics),
        _test_metrics(theirs, metrics),
        primary=plan.primary,
        margins=plan.margins,
        num_classes=context.num_classes,
        candidate_status=[status_of(a, b, context) for a, b in zip(mine, theirs, strict=True)],
        reference_status=[status_of(b, None, context) for b in theirs],
        bitwise_identical=[seed in identical for seed in plan.seeds],
        alpha=look.level,
        next_alpha=level_of(look.alpha, look.declared, look.number + 1),
        max_seeds=plan.max_seeds,
    )
    if unlike := _differing_settings(mine, theirs, pairs):
        return _undecided(finding, f"the pairs were not made alike: {', '.join(unlike)} differ")
    if unpaired:
        return _undecided(finding, f"initial weights differ within pairs (seeds {', '.join(map(str, unpaired))})")
    if any(cell and cell.record.weights_sha256 == cell.record.initial_sha256 for cell in (*mine, *theirs)):
        return _undecided(finding, "the weights of some runs never moved")
    finished = [cell for cell in theirs if cell is not None and cell.record.diverged_at is None]
    if finding.word == "equivalent" and all(cell.metrics["test/nll"] >= context.label_entropy for cell in finished):
        return _undecided(finding, "the reference learned nothing: it does no better than the class frequencies")
    return finding


def _undecided(finding: OutcomeFinding, reason: str) -> OutcomeFinding:
    """Return the finding as inconclusive: such runs may agree for reasons other than the losses."""
    return replace(finding, word="inconclusive", reasons=(reason,), provisional=False, seeds_needed=None)


def _differing_settings(
    mine: Sequence[Cell | None], theirs: Sequence[Cell | None], pairs: Sequence[tuple[int, Cell, Cell]]
) -> list[str]:
    """Name what differs within a pair apart from the loss, or between the seeds of one loss."""
    keys: set[str] = set()
    for _, a, b in pairs:
        one, other = a.record.made_from, b.record.made_from
        keys |= {key for key in {*one, *other} - {"loss", "loss_code"} if one.get(key) != other.get(key)}
    for arm in (mine, theirs):
        made = [cell.record.made_from for cell in arm if cell is not None]
        keys |= {
            f"{key} between seeds" for key in ("loss", "loss_code") for m in made if m.get(key) != made[0].get(key)
        }
    return sorted(keys)


def _test_metrics(cells: Sequence[Cell | None], metrics: Sequence[str]) -> dict[str, list[float]]:
    return {
        metric: [math.nan if cell is None else cell.metrics[f"test/{metric}"] for cell in cells] for metric in metrics
    }


# --- controls


def control_results(results: TrialResults) -> ControlResults:
    """Compare every control with the reference.

    The study has assay sensitivity if its placebos are equivalent (or identical) and its positive control (the dose)
    is different.
    """
    findings = {
        name: outcome_of(name, results)
        for name in results.plan.controls
        if name in (*PLACEBOS, DOSE) and any(results.cells_of(name))
    }
    words: dict[str, str] = {name: finding.word for name, finding in findings.items()}
    sensitivity = None
    if words:
        same = ControlResults(outcomes=words).placebos_are_equal
        noticed = None if DOSE not in words else words[DOSE] == "different"
        sensitivity = {"placebo_equivalent": same, "dose_different": noticed, "holds": same and noticed is True}
    metrics = {name: metric_results(finding) for name, finding in findings.items()}
    return ControlResults(_replay(results), words, sensitivity, metrics)


def metric_results(finding: OutcomeFinding) -> dict[str, MetricResult]:
    return {name: MetricResult.of(metric) for name, metric in finding.metrics.items()}


def _replay(results: TrialResults) -> Replay | None:
    for seed, again, first in results.pairs(REPLAY):
        return Replay(seed, again.record.weights_sha256 == first.record.weights_sha256)
    return None


# --- the early trajectory


def envelope_of(candidate: str, results: TrialResults) -> Envelope:
    """Compare the candidate's distances from the reference in the first steps with those of the placebos."""
    pairs = results.pairs(candidate)
    if not pairs:
        return Envelope("not_applicable", reason="no pair is complete")
    seeds = {seed for seed, _, _ in pairs}
    references = [reference for _, _, reference in pairs]
    precision = references[0].record.made_from.get("precision", "float32")
    if not BY_PRECISION[precision]:
        return Envelope("not_applicable", reason=f"in {precision} the audit decides")
    known = [[pair for pair in results.pairs(name) if pair[0] in seeds] for name in BY_PRECISION[precision]]
    placebos = [_by_step(pair[1:] for pair in placebo) for placebo in known if len(placebo) == len(pairs)]
    found = envelope(_by_step(pair[1:] for pair in pairs), placebos, _by_step(pairwise(references)))
    has_record = found.word == "inside" and len(pairs) >= 5
    return replace(found, smallest=SMALLEST_CAUGHT[precision]) if has_record else found


def _by_step(pairs: Iterable[tuple[Cell, Cell]]) -> Distances:
    """Map each step to the relative distances between candidate and reference, an array with one entry per pair."""
    found: dict[int, list[float]] = {}
    for mine, reference in pairs:
        for step, distance in mine.distances_from(reference):
            found.setdefault(step, []).append(distance)
    return {step: np.array(values) for step, values in found.items()}
