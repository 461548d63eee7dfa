"""Tables that a report draws, computed from the cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pandas as pd

from likelihood_lab.stats.equivalence import paired_differences
from likelihood_lab.stats.pairs import METRICS, measured_in
from pipeline.replica import RANKED, REPLAY, Replica, is_control
from pipeline.storage.cells import gaps
from pipeline.verdict.outcomes import TrialResults, status_of


def trial_history(results: TrialResults) -> pd.DataFrame:
    """All measurements of the losses' cells: loss, seed, metric, step, value."""
    frames = []
    for replica, cell in results.cells.items():
        if not is_control(replica.arm):
            reference = results.cells.get(Replica(results.plan.reference, replica.seed))
            apart = [gaps(cell, reference)] if reference and replica.arm != results.plan.reference else []
            frames.append(pd.concat([cell.history, *apart]).assign(loss=replica.arm, seed=replica.seed))
    return pd.concat(frames, ignore_index=True)


def differences(results: TrialResults) -> pd.DataFrame:
    """Paired differences of the test metrics, also of controls: loss, metric, seed, control, difference.

    A failed run gives NaN.
    """
    rows = []
    for arm in _compared(results):
        for seed, mine, theirs in results.pairs(arm):
            status = {status_of(mine, theirs, results.context), status_of(theirs, None, results.context)}
            for metric in measured_in([mine.metrics]):
                pair = (mine.metrics[f"test/{metric}"], theirs.metrics[f"test/{metric}"])
                known = status == {"ok"}
                difference = float(paired_differences(*pair, METRICS[metric].scale)) if known else math.nan
                rows.append((arm, metric, seed, is_control(arm), difference))
    return _table(rows, loss="str", metric="str", seed="int64", control="bool", difference="float64")


def distances(results: TrialResults) -> pd.DataFrame:
    """||theta_X - theta_A|| / ||theta_A|| of every arm X, also of controls, from the reference A of the same seed.

    loss, seed, step, control, value; at steps 1, 3, 10, 30, ... and the last.
    """
    rows = [
        (arm, seed, step, is_control(arm), value)
        for arm in _compared(results)
        for seed, mine, theirs in results.pairs(arm)
        for step, value in mine.distances_from(theirs)
    ]
    return _table(rows, loss="str", seed="int64", step="int64", control="bool", value="float64")


def between_seeds(results: TrialResults) -> pd.DataFrame:
    """The same distance between the reference under one seed and under the next: step, value."""
    known = [cell for cell in results.cells_of(results.plan.reference) if cell is not None]
    rows = [row for one, other in pairwise(known) for row in one.distances_from(other)]
    return _table(rows, step="int64", value="float64")


def _compared(results: TrialResults) -> list[str]:
    """Candidates and controls, without the replay (one seed, compared bit by bit) and the arms of the rank test."""
    plan = results.plan
    controls = [name for name in plan.controls if name != REPLAY and not name.startswith(RANKED)]
    return [*plan.candidates, *controls]


def _table(rows: Sequence[tuple[object, ...]], **columns: str) -> pd.DataFrame:
    """A table with columns of the named types, also where it is empty."""
    return pd.DataFrame(rows, columns=list(columns)).astype(columns)
