"""Pictures of a trial's report; of estimates, only means and ranges are computed here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
from pipeline.storage.files import write_whole
from pipeline.text import listed, prose
from pipeline.verdict.outcomes import PLACEBOS
from pipeline.verdict.results import Verdict


def write_report(folder: Path, data: ReportData) -> Path:
    """Write `figures/*.svg` and `report.html`, each renamed into place whole; returns the page's path."""
    chapters = {
        "losses": audit_pictures(data.audit) if data.audit else [],
        "differences": paired_differences(data),
        "margins": smallest_margins(data),
        "distances": weight_distances(data),
        "curves": loss_curves(data.verdict, data.history),
    }
    figures = folder / "figures"
    drawn = {figures / f"{picture.name}.svg": picture.svg for group in chapters.values() for picture in group}
    for path, svg in drawn.items():
        write_whole(path, svg.encode())
    for stale in set(figures.glob("*.svg")) - drawn.keys():
        stale.unlink()
    write_whole(folder / "report.html", page(data, chapters).encode())
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
        *_notes(seen),
    ]
    alt = f"{title} over optimizer steps, a line for each loss. {' '.join(notes)}"
    return Picture(f"curve-{name}", title, alt, notes, described(drawing.svg, alt))


def weight_distances(data: ReportData) -> list[Picture]:
    """Distances of the weights from the reference's, beside those of the placebos and of another seed."""
    mine = data.distances[~data.distances["control"]]
    placebos = data.distances[data.distances["loss"].isin(PLACEBOS)]
    if mine.empty:
        return []
    reference = data.verdict.reference
    with canvas("distance", 3.9) as drawing:
        floor = distance_scale(drawing.axes, pd.concat([data.distances["value"], data.between_seeds["value"]]))
        ceiling(drawing.axes, data.between_seeds)
        ribbon(drawing.axes, placebos)
        raised = mine.assign(value=mine["value"].where(mine["value"] != 0, floor))
        seen = bands(drawing.axes, raised, losses_in_order(data.verdict, mine), "median")
        drawing.axes.set(xlabel="optimizer steps", ylabel="relative distance")
        label_ends(drawing.axes)
    notes = ["Norm of the difference over the reference's norm. Line: median; band: lowest to highest."]
    notes += ["Hatched: the placebos, which show the effect of rounding alone."] if len(placebos) else []
    notes += ["Dotted: two seeds of the reference."] if len(data.between_seeds) else []
    notes += _notes(seen)
    equal = [str(loss) for loss, values in mine.groupby("loss")["value"] if (values == 0).all()]
    if equal:
        notes.append(f"Distance 0 (bitwise equal) at all recorded steps of all seeds: {listed(equal)}.")
    title = f"Distance of the weights from those of {reference}"
    alt = f"{title} over optimizer steps, both axes logarithmic. {' '.join(notes)}"
    return [Picture("distance", title, alt, notes, described(drawing.svg, alt))]


def _notes(seen: Seen) -> list[str]:
    """Sentences about what a picture of curves cannot show."""
    notes = [f"Equal in every value, one line: {listed([first, *hidden])}." for first, hidden in seen.hidden.items()]
    if seen.ended:
        notes.append(f"Cross: a seed stops being finite ({listed(seen.ended)}). Lines and bands continue without it.")
    if seen.never:
        notes.append(f"Not drawn, because never finite: {listed(seen.never)}.")
    return notes


def paired_differences(data: ReportData) -> list[Picture]:
    """One forest plot a metric: a dot for each pair, the interval of the test and the margin; controls below."""
    if data.differences.empty:
        return []
    by_metric = data.differences.groupby("metric", sort=False)
    return [_forest(str(metric), frame, data.verdict) for metric, frame in by_metric]


def _forest(metric: str, frame: pd.DataFrame, verdict: Verdict) -> Picture:
    title = METRICS.get(metric, metric)
    margin = (verdict.protocol.margins or {}).get(metric)
    intervals = {loss: result.ci_tost for loss, name, result in estimates(verdict) if name == metric}
    rows = []
    for loss in dict.fromkeys(map(str, frame["loss"])):
        pairs = frame[frame["loss"] == loss].sort_values("seed")
        values = pairs["difference"].to_numpy(float)
        interval = np.array([end for end in intervals.get(loss) or () if end is not None], float)
        control = bool(pairs["control"].any())
        rows.append(Row(loss, values / (margin or 1), interval / (margin or 1), _tally(values), control))
    picture = f"difference-{metric.replace('/', '-')}"
    with canvas(picture, 1.05 + 0.31 * len(rows)) as drawing:
        forest(drawing.axes, rows, margin is not None)
    what = "logarithm of the ratio to the reference" if metric == "nll" else "difference to the reference"
    band = f"Shaded: the margin, ±{margin:g}." if margin else "Without a margin it does not decide equivalence."
    spoken = "; ".join(f"{row.name}: {row.note}" for row in rows)
    alt = f"{title}: paired differences to {verdict.reference}, a row for each loss. {spoken}."
    notes = [f"Dot: one seed's {what}. {band}"]
    notes += ["Below the line: controls that the trial added."] if any(row.control for row in rows) else []
    return Picture(picture, title, alt, notes, described(drawing.svg, alt))


def smallest_margins(data: ReportData) -> list[Picture]:
    """For each primary metric the smallest margin that the equivalence test passes."""
    primary = data.verdict.protocol.primary
    return [picture for metric in primary if (picture := _smallest(metric, data.verdict)) is not None]


def _smallest(metric: str, verdict: Verdict) -> Picture | None:
    margin = (verdict.protocol.margins or {}).get(metric)
    reached = {
        loss: end
        for loss, name, result in estimates(verdict)
        if name == metric and (end := result.smallest_margin or 0.0) > 0
    }
    if margin is None or not reached:
        return None
    picture, title = f"margin-{metric}", METRICS.get(metric, metric)
    with canvas(picture, 1.05 + 0.27 * len(reached)) as drawing:
        reaches(drawing.axes, reached, margin, [loss in verdict.controls.metrics for loss in reached])
    spoken = "; ".join(f"{loss}: {prose(end)}" for loss, end in reached.items())
    notes = [
        f"Left of the line, which is the margin of {margin:g}, the test of this metric passes.",
        "Equivalence needs that for every primary metric, ten pairs and no failure.",
    ]
    alt = f"{title}: the smallest margin at which the equivalence test passes. {spoken}."
    return Picture(picture, title, alt, notes, described(drawing.svg, alt))


def _tally(values: npt.NDArray[np.float64]) -> str:
    """Number of pairs that failed, are exactly equal, and differ."""
    failed, zeros = int((~np.isfinite(values)).sum()), int((values == 0).sum())
    if zeros == len(values) > 1:
        return f"all {zeros} exactly 0"
    counts = {"failed": failed, "exactly 0": zeros, "differ": len(values) - failed - zeros}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)
