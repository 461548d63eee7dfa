"""Findings into pictures. Estimates come in ready made: nothing is computed here but means and ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.reporting.audit_figures import audit_pictures
from pipeline.reporting.page import METRICS, ReportData, estimates, losses_in_order, page
from pipeline.reporting.plotting import (
    Picture,
    Row,
    Seen,
    bands,
    canvas,
    ceiling,
    decades,
    described,
    distance_scale,
    forest,
    label_ends,
    reaches,
    ribbon,
)
from pipeline.reporting.sensitivity import controls_of, smallest_margin
from pipeline.storage.files import write_whole
from pipeline.text import listed, prose
from pipeline.verdict.outcomes import PLACEBOS

Verdict = Mapping[str, Any]


def write_report(folder: Path, found: ReportData) -> Path:
    """Write `figures/*.svg` and `report.html`, each renamed into place whole; returns the page's path."""
    chapters = {
        "losses": audit_pictures(found.audit) if found.audit else [],
        "differences": paired_differences(found),
        "margins": smallest_margins(found),
        "distances": weight_distances(found),
        "curves": loss_curves(found.verdict, found.history),
    }
    figures = folder / "figures"
    drawn = {figures / f"{picture.name}.svg": picture.svg for group in chapters.values() for picture in group}
    for path, svg in drawn.items():
        write_whole(path, svg.encode())
    for stale in set(figures.glob("*.svg")) - drawn.keys():
        stale.unlink()
    write_whole(folder / "report.html", page(found, chapters).encode())
    return folder / "report.html"


def loss_curves(verdict: Verdict, history: pd.DataFrame) -> list[Picture]:
    """Validation NLL and accuracy over steps: the mean over seeds, in a band from lowest to highest."""
    frames = {name: history[history["metric"] == f"val/{name}"] for name in ("nll", "accuracy")}
    order = losses_in_order(verdict, history)
    return [_loss_curve(name, frame, order) for name, frame in frames.items() if len(frame)]


def _loss_curve(name: str, frame: pd.DataFrame, order: Sequence[str]) -> Picture:
    title = f"Validation {METRICS[name]}"
    seeds = frame["seed"].nunique()
    values = frame["value"][np.isfinite(frame["value"])]
    with canvas(f"curve-{name}", 3.6) as drawing:
        seen = bands(drawing.axes, frame, order, "mean")
        drawing.axes.set(xlabel="optimizer steps", ylabel=title)
        if name == "nll" and len(values) and 0 < 10 * values.min() < values.max():
            drawing.axes.set_yscale("log")
            decades(drawing.axes.yaxis, [1, 2, 5])
        label_ends(drawing.axes)
    notes = [
        f"Line: mean of {seeds} seeds; band: lowest to highest." if seeds > 1 else "One seed.",
        *_words(seen),
    ]
    alt = f"{title} over optimizer steps, a line for each loss. {' '.join(notes)}"
    return Picture(f"curve-{name}", title, alt, notes, described(drawing.svg, alt))


def weight_distances(found: ReportData) -> list[Picture]:
    """How far the weights are from the reference's, pair by pair, beside what rounding and another seed do."""
    mine = found.distances[~found.distances["control"]]
    placebos = found.distances[found.distances["loss"].isin(PLACEBOS)]
    if mine.empty:
        return []
    reference = found.verdict.get("reference")
    with canvas("distance", 3.9) as drawing:
        floor = distance_scale(drawing.axes, pd.concat([found.distances["value"], found.between_seeds["value"]]))
        ceiling(drawing.axes, found.between_seeds)
        ribbon(drawing.axes, placebos)
        raised = mine.assign(value=mine["value"].where(mine["value"] != 0, floor))
        seen = bands(drawing.axes, raised, losses_in_order(found.verdict, mine), "median")
        drawing.axes.set(xlabel="optimizer steps", ylabel="relative distance")
        label_ends(drawing.axes)
    notes = ["Norm of the difference over the reference's norm. Line: median; band: lowest to highest."]
    notes += ["Hatched: the placebos, what rounding alone does."] if len(placebos) else []
    notes += ["Dotted: the reference under one seed and under the next."] if len(found.between_seeds) else []
    notes += _words(seen)
    equal = [str(loss) for loss, values in mine.groupby("loss")["value"] if (values == 0).all()]
    if equal:
        notes.append(f"Exactly 0, equal in every bit, at every recorded step of every seed: {listed(equal)}.")
    title = f"Distance of the weights from those of {reference}"
    alt = f"{title} over optimizer steps, both axes logarithmic. {' '.join(notes)}"
    return [Picture("distance", title, alt, notes, described(drawing.svg, alt))]


def _words(seen: Seen) -> list[str]:
    """What cannot be seen in a picture of curves, said."""
    notes = [f"One line, equal in every value: {listed([first, *hidden])}." for first, hidden in seen.hidden.items()]
    if seen.ended:
        notes.append(f"A cross ends each seed that stopped being finite: {listed(seen.ended)}.")
        notes.append("Lines and bands go on over the other seeds.")
    if seen.never:
        notes.append(f"Not drawn, never finite: {listed(seen.never)}.")
    return notes


def paired_differences(found: ReportData) -> list[Picture]:
    """One forest a metric: a dot for each pair, the interval that the test used, and the margin; controls below."""
    if found.differences.empty:
        return []
    by_metric = found.differences.groupby("metric", sort=False)
    return [_forest(str(metric), frame, found.verdict) for metric, frame in by_metric]


def _forest(metric: str, frame: pd.DataFrame, verdict: Verdict) -> Picture:
    name, title = f"difference-{metric.replace('/', '-')}", METRICS.get(metric, metric)
    margin = _margin(verdict, metric)
    intervals = {loss: found.get("ci_tost") for loss, of, found in estimates(verdict) if of == metric}
    rows = []
    for loss in dict.fromkeys(map(str, frame["loss"])):
        pairs = frame[frame["loss"] == loss].sort_values("seed")
        values = pairs["difference"].to_numpy(float)
        interval = np.array([end for end in intervals.get(loss) or () if end is not None], float)
        control = bool(pairs["control"].any())
        rows.append(Row(loss, values / (margin or 1), interval / (margin or 1), _tally(values), control))
    with canvas(name, 1.05 + 0.31 * len(rows)) as drawing:
        forest(drawing.axes, rows, margin is not None)
    what = "logarithm of the ratio to the reference" if metric == "nll" else "difference to the reference"
    band = f"Shaded: the margin, ±{margin:g}." if margin else "It has no margin: equivalence is not judged by it."
    spoken = "; ".join(f"{row.name}: {row.note}" for row in rows)
    alt = f"{title}: paired differences to {verdict.get('reference')}, a row for each loss. {spoken}."
    notes = [f"Dot: one seed's {what}. {band}"]
    notes += ["Below the line: controls that the trial added."] if any(row.control for row in rows) else []
    return Picture(name, title, alt, notes, described(drawing.svg, alt))


def _margin(verdict: Verdict, metric: str) -> float | None:
    margins = (verdict.get("protocol") or {}).get("margins") or {}
    margin: float | None = margins.get(metric)
    return margin


def smallest_margins(found: ReportData) -> list[Picture]:
    """For each primary metric how small the margin could have been: the farther end of the test's interval."""
    primary = (found.verdict.get("protocol") or {}).get("primary") or ()
    return [picture for metric in primary if (picture := _smallest(metric, found.verdict)) is not None]


def _smallest(metric: str, verdict: Verdict) -> Picture | None:
    margin = _margin(verdict, metric)
    reached = {
        loss: end
        for loss, of, entry in estimates(verdict)
        if of == metric and (end := smallest_margin(entry) or 0.0) > 0
    }
    if margin is None or not reached:
        return None
    name, title = f"margin-{metric}", METRICS.get(metric, metric)
    with canvas(name, 1.05 + 0.27 * len(reached)) as drawing:
        reaches(drawing.axes, reached, margin, [loss in controls_of(verdict) for loss in reached])
    spoken = "; ".join(f"{loss}: {prose(end)}" for loss, end in reached.items())
    notes = [
        f"Left of the line, the margin of {margin:g}, the interval lies inside it; to be called equivalent takes more:"
    ]
    notes += ["every primary metric, ten pairs and no failure."]
    alt = f"{title}: the smallest margin at which the equivalence test passes. {spoken}."
    return Picture(name, title, alt, notes, described(drawing.svg, alt))


def _tally(values: npt.NDArray[np.float64]) -> str:
    """What the dots alone do not say: how many pairs there are, failed, and are exactly equal."""
    failed, zeros = int((~np.isfinite(values)).sum()), int((values == 0).sum())
    if zeros == len(values) > 1:
        return f"all {zeros} exactly 0"
    counts = {"failed": failed, "exactly 0": zeros, "differ": len(values) - failed - zeros}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)
