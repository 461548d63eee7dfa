"""From cells to the outcome axis: how each run ended, the finding for every arm, and what the controls showed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from likelihood_lab.stats.outcome import OutcomeFinding, compare, correct_for_arms
from likelihood_lab.stats.pairs import Status, measured_in
from likelihood_lab.stats.trajectory import RANK_STEPS as RANKED_STEPS
from likelihood_lab.stats.trajectory import SMALLEST_CAUGHT, Distances, Envelope, RankFinding, envelope, rank_test
from pipeline.replica import BY_PRECISION, CANDIDATE, COPY, DOSE, REPLAY, Replica
from pipeline.storage.cells import Cell
from pipeline.verdict.plan import AnalysisPlan, Look, TrialContext, level_of

PLACEBOS = tuple(name for names in BY_PRECISION.values() for name in names)


Cells = Mapping[Replica, Cell]


def own_controls(controls: Cells, cells: Cells, plan: AnalysisPlan) -> dict[Replica, Cell]:
    """The controls that were made of the reference that is asked about; those of another one say nothing."""
    known = next((cell for replica, cell in cells.items() if replica.arm == plan.reference), None)
    if known is None:
        return {}
    declared = known.record.made_from.get("loss", {})
    return {
        replica: cell
        for replica, cell in controls.items()
        if replica.arm.startswith(CANDIDATE)
        or {**declared, "control": replica.arm}.items() <= cell.record.made_from["loss"].items()
    }


def status_of(cell: Cell | None, reference: Cell | None, context: TrialContext) -> Status:
    """How a run ended: a finite model that learned nothing while its reference did, or cannot be scored, diverged."""
    if cell is None:
        return "missing"
    if cell.record.diverged_at is not None or not all(
        math.isfinite(cell.metrics[f"test/{metric}"]) for metric in measured_in([cell.metrics])
    ):
        return "diverged"
    both = (c.metrics["test/nll"] if c else math.nan for c in (cell, reference))
    mine, reference_nll = both
    return "diverged" if mine >= context.label_entropy > reference_nll else "ok"


def outcomes(
    cells: Cells, plan: AnalysisPlan, context: TrialContext, look: Look | None = None
) -> dict[str, OutcomeFinding]:
    """The outcome axis for every candidate at a look's level, corrected for their number."""
    look = look or Look(1, level_of(plan.alpha, plan.looks, 1), plan.alpha, plan.looks)
    found = {name: outcome_of(name, cells, plan, context, look) for name in plan.candidates}
    return correct_for_arms(found)


def outcome_of(candidate: str, cells: Cells, plan: AnalysisPlan, context: TrialContext, look: Look) -> OutcomeFinding:
    """The outcome of one arm against the reference, as if it were the only one."""
    theirs = [cells.get(Replica(plan.reference, seed)) for seed in plan.seeds]
    mine = [cells.get(Replica(candidate, seed)) for seed in plan.seeds]
    identical = [
        a is not None and b is not None and a.record.weights_sha256 == b.record.weights_sha256
        for a, b in zip(mine, theirs, strict=True)
    ]
    unpaired = [
        seed
        for seed, a, b in zip(plan.seeds, mine, theirs, strict=True)
        if a is not None and b is not None and a.record.initial_sha256 != b.record.initial_sha256
    ]
    metrics = measured_in(cell.metrics for cell in (*mine, *theirs) if cell is not None)
    found = compare(
        _finals(mine, metrics),
        _finals(theirs, metrics),
        primary=plan.primary,
        margins=plan.margins,
        num_classes=context.num_classes,
        candidate_status=[status_of(a, b, context) for a, b in zip(mine, theirs, strict=True)],
        reference_status=[status_of(b, None, context) for b in theirs],
        bitwise_identical=identical,
        alpha=look.level,
        next_alpha=level_of(look.alpha, look.declared, look.number + 1),
        max_seeds=plan.max_seeds,
    )
    if unlike := _unlike(mine, theirs):
        return _undecided(found, f"the pairs were not made alike: {', '.join(unlike)} differ")
    if unpaired:
        return _undecided(found, f"the pairs did not begin with equal weights (seeds {', '.join(map(str, unpaired))})")
    if any(map(_never_moved, (*mine, *theirs))):
        return _undecided(found, "the weights of some runs never moved")
    finished = [cell for cell in theirs if cell is not None and cell.record.diverged_at is None]
    if found.word == "equivalent" and all(_learned_nothing(cell, context) for cell in finished):
        return _undecided(found, "the reference learned nothing: it does no better than the classes' frequencies")
    return found


def _undecided(finding: OutcomeFinding, reason: str) -> OutcomeFinding:
    """Fail closed: two dead models agree about everything, which says nothing."""
    return replace(finding, word="inconclusive", reasons=(reason,), provisional=False, seeds_needed=None)


def _unlike(mine: Sequence[Cell | None], theirs: Sequence[Cell | None]) -> list[str]:
    """What but the loss differs between the runs of some pair: code of the model, data, device, torch, threads."""
    keys: set[str] = set()
    for a, b in zip(mine, theirs, strict=True):
        if a is not None and b is not None:
            one, other = a.record.made_from, b.record.made_from
            keys |= {key for key in {*one, *other} - {"loss", "loss_code"} if one.get(key) != other.get(key)}
    for arm in (mine, theirs):
        made = [cell.record.made_from for cell in arm if cell is not None]
        keys |= {
            f"{key} between seeds" for key in ("loss", "loss_code") for m in made if m.get(key) != made[0].get(key)
        }
    return sorted(keys)


def _never_moved(cell: Cell | None) -> bool:
    return cell is not None and cell.record.weights_sha256 == cell.record.initial_sha256


def _learned_nothing(cell: Cell, context: TrialContext) -> bool:
    return cell.metrics["test/nll"] >= context.label_entropy


def _finals(cells: Sequence[Cell | None], metrics: Sequence[str]) -> dict[str, list[float]]:
    return {
        metric: [math.nan if cell is None else cell.metrics[f"test/{metric}"] for cell in cells] for metric in metrics
    }


def control_findings(cells: Cells, plan: AnalysisPlan, context: TrialContext, look: Look) -> dict[str, Any]:
    """Replay, each placebo's outcome, the dose's, the findings behind them, and whether both are as they should be.

    A placebo has to come out equivalent (or identical) and a dosed control different: then the study can tell.
    """
    findings = {
        name: outcome_of(name, cells, plan, context, look)
        for name in plan.controls
        if name in (*PLACEBOS, DOSE) and any(Replica(name, seed) in cells for seed in plan.seeds)
    }
    words = {name: finding.word for name, finding in findings.items()}
    placebos = [word for name, word in words.items() if name != DOSE]
    sensitivity = None
    if placebos or DOSE in words:
        same = bool(placebos) and all(word in ("equivalent", "identical") for word in placebos)
        noticed = None if DOSE not in words else words[DOSE] == "different"
        sensitivity = {"placebo_equivalent": same, "dose_different": noticed, "holds": same and noticed is True}
    replay = _replay(cells, plan)
    return {"replay": replay, "outcomes": words, "findings": findings, "assay_sensitivity": sensitivity}


def controls_in_words(controls: Mapping[str, Any], outcome: str) -> str:
    """What of the controls limits a finding; empty where nothing does."""
    replay, dose = controls["replay"], controls["outcomes"].get(DOSE)
    said = []
    if replay is not None and not replay["bitwise"]:
        said.append(
            f"This platform is not deterministic: the reference replayed under seed {replay['seed']} got other bits."
        )
    if outcome == "equivalent" and dose not in (None, "different"):
        said.append(f"That this study notices a difference is not shown: the planted one was called {dose}.")
    return " ".join(said)


def _replay(cells: Cells, plan: AnalysisPlan) -> dict[str, Any] | None:
    for seed in plan.seeds:
        again, first = cells.get(Replica(REPLAY, seed)), cells.get(Replica(plan.reference, seed))
        if again is not None and first is not None:
            return {"seed": seed, "bitwise": again.record.weights_sha256 == first.record.weights_sha256}
    return None


# --- the early trajectory


def envelope_of(candidate: str, cells: Cells, plan: AnalysisPlan) -> Envelope:
    """The candidate's distances from the reference in the early steps, judged by the placebos'."""
    seeds = _paired(candidate, cells, plan)
    if not seeds:
        return Envelope("not_applicable", reason="no pair is complete")
    references = [cells[Replica(plan.reference, seed)] for seed in seeds]
    precision = references[0].record.made_from.get("precision", "float32")
    if not BY_PRECISION[precision]:
        return Envelope("not_applicable", reason=f"in {precision} the audit decides")
    placebos = [name for name in BY_PRECISION[precision] if set(seeds) <= set(_paired(name, cells, plan))]
    mine = _distances([cells[Replica(candidate, seed)] for seed in seeds], references)
    theirs = [_distances([cells[Replica(name, seed)] for seed in seeds], references) for name in placebos]
    found = envelope(mine, theirs, _between(references))
    recorded = found.word == "inside" and len(seeds) >= 5
    return replace(found, smallest=SMALLEST_CAUGHT[precision]) if recorded else found


def _paired(arm: str, cells: Cells, plan: AnalysisPlan) -> list[int]:
    """The seeds under which both this arm and the reference have a cell."""
    return [seed for seed in plan.seeds if Replica(arm, seed) in cells and Replica(plan.reference, seed) in cells]


def _distances(arm: Sequence[Cell], references: Sequence[Cell]) -> Distances:
    """Step -> relative distance of each pair, [S]."""
    return _by_step(zip(arm, references, strict=True))


def _between(references: Sequence[Cell]) -> Distances:
    """Step -> relative distance of the reference under one seed from that under the next."""
    return _by_step(pairwise(references))


def _by_step(pairs: Iterable[tuple[Cell, Cell]]) -> Distances:
    found: dict[int, list[float]] = {}
    for mine, reference in pairs:
        for step, distance in mine.distances_from(reference):
            found.setdefault(step, []).append(distance)
    return {step: np.array(values) for step, values in found.items()}


# --- ranks among dithered copies


def rank_test_of(candidate: str, cells: Cells, plan: AnalysisPlan) -> RankFinding | None:
    """The candidate's ranks among the dithered copies of the reference; None where they were not trained."""
    arms = [f"{CANDIDATE}{candidate}", *(name for name in plan.controls if name.startswith(COPY))]
    seeds = [seed for seed in plan.seeds if all(Replica(arm, seed) in cells for arm in arms)]
    if not seeds or len(arms) < 3:
        return None
    found = [[cells[Replica(arm, seed)].sketches for arm in arms] for seed in seeds]
    steps = [step for step in RANKED_STEPS if step in found[0][0][0]]
    values = {
        step: np.stack([[sketches[taken.index(step)].numpy() for taken, sketches in row] for row in found])
        for step in steps
    }
    if not all(np.isfinite(entries).all() for entries in values.values()):
        return None
    return rank_test(values, np.random.default_rng(0))
