"""What a report draws, as tables, from the cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pandas as pd

from likelihood_lab.stats.equivalence import paired_differences
from likelihood_lab.stats.pairs import METRICS, measured_in
from pipeline.replica import RANKED, REPLAY, Replica, is_control
from pipeline.storage.cells import Cell, gaps
from pipeline.verdict.outcomes import Cells, status_of
from pipeline.verdict.plan import AnalysisPlan, TrialContext


def trial_history(cells: Cells, plan: AnalysisPlan) -> pd.DataFrame:
    """All measurements of all cells: loss, seed, metric, step, value."""
    frames = []
    for replica, cell in cells.items():
        reference = cells.get(Replica(plan.reference, replica.seed))
        apart = [gaps(cell, reference)] if reference and replica.arm != plan.reference else []
        frames.append(pd.concat([cell.history, *apart]).assign(loss=replica.arm, seed=replica.seed))
    return pd.concat(frames, ignore_index=True)


def differences(cells: Cells, plan: AnalysisPlan, context: TrialContext) -> pd.DataFrame:
    """Paired differences of the final yardsticks, of the controls too: loss, metric, seed, control, difference.

    NaN where a run failed. A replay is under one seed and is compared bit by bit: it has no row.
    """
    rows = []
    for arm, seed, mine, theirs in _pairs(cells, plan):
        ok = status_of(mine, theirs, context) == status_of(theirs, None, context) == "ok"
        for metric in measured_in([mine.metrics]):
            pair = (mine.metrics[f"test/{metric}"], theirs.metrics[f"test/{metric}"])
            difference = float(paired_differences(*pair, METRICS[metric].scale)) if ok else math.nan
            rows.append((arm, metric, seed, is_control(arm), difference))
    return _table(rows, loss="str", metric="str", seed="int64", control="bool", difference="float64")


def distances(cells: Cells, plan: AnalysisPlan) -> pd.DataFrame:
    """||theta_X - theta_A|| / ||theta_A|| of every arm X, controls too, from the reference A of the same seed.

    loss, seed, step, control, value; at steps 1, 3, 10, 30, ... and the last.
    """
    rows = [
        (arm, seed, step, is_control(arm), value)
        for arm, seed, mine, theirs in _pairs(cells, plan)
        for step, value in mine.distances_from(theirs)
    ]
    return _table(rows, loss="str", seed="int64", step="int64", control="bool", value="float64")


def between_seeds(cells: Cells, plan: AnalysisPlan) -> pd.DataFrame:
    """The same distance between the reference under one seed and under the next: step, value."""
    references = [cells.get(Replica(plan.reference, seed)) for seed in plan.seeds]
    known = [cell for cell in references if cell is not None]
    rows = [row for one, other in pairwise(known) for row in one.distances_from(other)]
    return _table(rows, step="int64", value="float64")


def _pairs(cells: Cells, plan: AnalysisPlan) -> Iterator[tuple[str, int, Cell, Cell]]:
    """Arm, seed, its cell and the reference's, in the order of the request."""
    controls = (name for name in plan.controls if name != REPLAY and not name.startswith(RANKED))
    for arm in (*plan.candidates, *controls):
        for seed in plan.seeds:
            mine, theirs = cells.get(Replica(arm, seed)), cells.get(Replica(plan.reference, seed))
            if mine is not None and theirs is not None:
                yield arm, seed, mine, theirs


def _table(rows: Sequence[tuple[object, ...]], **columns: str) -> pd.DataFrame:
    """Rows under names of their types, which an empty table has too."""
    return pd.DataFrame(rows, columns=list(columns)).astype(columns)
