"""What a trial's controls showed: is the platform deterministic, and would the study have noticed a difference?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.cells import Cell
from pipeline.controls import BY_PRECISION, CANDIDATE, COPY, DOSE, REPLAY
from pipeline.envelope import SMALLEST_CAUGHT, Distances, Envelope, envelope
from pipeline.looks import Look
from pipeline.objectives import Replica
from pipeline.outcomes import Cells, Facts, Request, outcome_of
from pipeline.rank_test import STEPS as RANKED_STEPS
from pipeline.rank_test import RankFinding, rank_test

PLACEBOS = tuple(name for names in BY_PRECISION.values() for name in names)


def control_findings(cells: Cells, request: Request, facts: Facts, look: Look) -> dict[str, Any]:
    """Replay, each placebo's outcome, the dose's, the findings behind them, and whether both are as they should be.

    A placebo has to come out equivalent (or identical) and a dosed control different: then the study can tell.
    """
    findings = {
        name: outcome_of(name, cells, request, facts, look)
        for name in request.controls
        if name in (*PLACEBOS, DOSE) and any(Replica(name, seed) in cells for seed in request.seeds)
    }
    words = {name: finding.word for name, finding in findings.items()}
    placebos = [word for name, word in words.items() if name != DOSE]
    sensitivity = None
    if placebos or DOSE in words:
        same = bool(placebos) and all(word in ("equivalent", "identical") for word in placebos)
        noticed = None if DOSE not in words else words[DOSE] == "different"
        sensitivity = {"placebo_equivalent": same, "dose_different": noticed, "holds": same and noticed is True}
    replay = _replay(cells, request)
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


def _replay(cells: Cells, request: Request) -> dict[str, Any] | None:
    for seed in request.seeds:
        again, first = cells.get(Replica(REPLAY, seed)), cells.get(Replica(request.reference, seed))
        if again is not None and first is not None:
            return {"seed": seed, "bitwise": again.record.weights_sha256 == first.record.weights_sha256}
    return None


# --- the early trajectory


def envelope_of(candidate: str, cells: Cells, request: Request) -> Envelope:
    """The candidate's distances from the reference in the early steps, judged by the placebos'."""
    seeds = _paired(candidate, cells, request)
    if not seeds:
        return Envelope("not_applicable", reason="no pair is complete")
    references = [cells[Replica(request.reference, seed)] for seed in seeds]
    precision = references[0].record.made_from.get("precision", "float32")
    if not BY_PRECISION[precision]:
        return Envelope("not_applicable", reason=f"in {precision} the audit decides")
    placebos = [name for name in BY_PRECISION[precision] if set(seeds) <= set(_paired(name, cells, request))]
    mine = _distances([cells[Replica(candidate, seed)] for seed in seeds], references)
    theirs = [_distances([cells[Replica(name, seed)] for seed in seeds], references) for name in placebos]
    found = envelope(mine, theirs, _between(references))
    recorded = found.word == "inside" and len(seeds) >= 5
    return replace(found, smallest=SMALLEST_CAUGHT[precision]) if recorded else found


def _paired(arm: str, cells: Cells, request: Request) -> list[int]:
    """The seeds under which both this arm and the reference have a cell."""
    return [seed for seed in request.seeds if Replica(arm, seed) in cells and Replica(request.reference, seed) in cells]


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


def rank_test_of(candidate: str, cells: Cells, request: Request) -> RankFinding | None:
    """The candidate's ranks among the dithered copies of the reference; None where they were not trained."""
    arms = [f"{CANDIDATE}{candidate}", *(name for name in request.controls if name.startswith(COPY))]
    seeds = [seed for seed in request.seeds if all(Replica(arm, seed) in cells for arm in arms)]
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
