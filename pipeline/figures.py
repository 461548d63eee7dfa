"""Findings into pictures. Estimates come in ready made: nothing is computed here but means and ranges."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.audit_figures import FIGURES as AUDIT_FIGURES
from pipeline.drawing import Row, Seen, bands, canvas, decades, described, distance_scale, forest, label_ends
from pipeline.page import YARDSTICKS, estimates, listed, losses_in_order, page

Verdict = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """A figure of the report; `name` is the stem of its file."""

    name: str
    title: str
    alt: str
    caption: Sequence[str]
    svg: str


def write_report(
    folder: Path, verdict: Verdict, history: pd.DataFrame, differences: pd.DataFrame, command: str
) -> Path:
    """Write `figures/*.svg` and `report.html`, each renamed into place whole; returns the page's path.

    `verdict` is the content of verdict.json. `history` has the columns loss, seed, metric, step, value.
    `differences` has loss, metric, seed, difference: candidate minus reference (for NLL the log of their
    ratio), NaN where either run failed.
    """
    chapters = {
        "differences": paired_differences(verdict, differences),
        "curves": loss_curves(verdict, history),
        "distances": parameter_distances(verdict, history),
    }
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    drawn = {figures / f"{picture.name}.svg": picture.svg for group in chapters.values() for picture in group}
    for path, svg in drawn.items():
        _replace(path, svg)
    for stale in set(figures.glob("*.svg")) - drawn.keys() - {figures / name for name in AUDIT_FIGURES}:
        stale.unlink()
    return _replace(folder / "report.html", page(verdict, history, chapters, command))


def loss_curves(verdict: Verdict, history: pd.DataFrame) -> list[Picture]:
    """Validation NLL and accuracy over steps: the mean over seeds, in a band from lowest to highest."""
    frames = {name: history[history["metric"] == f"val/{name}"] for name in ("nll", "accuracy")}
    order = losses_in_order(verdict, history)
    return [_loss_curve(name, frame, order) for name, frame in frames.items() if len(frame)]


def _loss_curve(name: str, frame: pd.DataFrame, order: Sequence[str]) -> Picture:
    title = f"Validation {YARDSTICKS[name]}"
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


def parameter_distances(verdict: Verdict, history: pd.DataFrame) -> list[Picture]:
    """How far the weights are from the reference's, pair by pair; exact zero has a line of its own."""
    reference = verdict.get("reference")
    gaps = history[(history["metric"] == "gap/parameters") & (history["step"] > 0)]
    gaps = gaps[gaps["loss"] != reference]
    if gaps.empty:
        return []
    with canvas("distance", 3.6) as drawing:
        floor = distance_scale(drawing.axes, gaps["value"])
        raised = gaps.assign(value=gaps["value"].where(gaps["value"] != 0, floor))
        seen = bands(drawing.axes, raised, losses_in_order(verdict, history), "median")
        drawing.axes.set(xlabel="optimizer steps", ylabel="relative distance")
        label_ends(drawing.axes)
    notes = ["Norm of the difference over the reference's norm. Line: median; band: lowest to highest."]
    notes += _words(seen)
    equal = [str(loss) for loss, values in gaps.groupby("loss")["value"] if (values == 0).all()]
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


def paired_differences(verdict: Verdict, differences: pd.DataFrame) -> list[Picture]:
    """One forest a metric: a dot for each pair, the interval that the test used, and the margin."""
    if differences.empty:
        return []
    margins = (verdict.get("protocol") or {}).get("margins") or {}
    return [
        _forest(str(metric), frame, verdict, margins.get(metric))
        for metric, frame in differences.groupby("metric", sort=False)
    ]


def _forest(metric: str, frame: pd.DataFrame, verdict: Verdict, margin: float | None) -> Picture:
    name, title = f"difference-{metric.replace('/', '-')}", YARDSTICKS.get(metric, metric)
    intervals = {loss: found.get("ci_tost") for loss, of, found in estimates(verdict) if of == metric}
    rows = []
    for loss in losses_in_order(verdict, frame):
        values = frame[frame["loss"] == loss].sort_values("seed")["difference"].to_numpy(float)
        interval = np.array([end for end in intervals.get(loss) or () if end is not None], float)
        if len(values):
            rows.append(Row(loss, values / (margin or 1), interval / (margin or 1), _tally(values)))
    with canvas(name, 1.05 + 0.31 * len(rows)) as drawing:
        forest(drawing.axes, rows, margin is not None)
    what = "logarithm of the ratio to the reference" if metric == "nll" else "difference to the reference"
    band = f"Shaded: the margin, ±{margin:g}." if margin else "It has no margin: equivalence is not judged by it."
    spoken = "; ".join(f"{row.name}: {row.note}" for row in rows)
    alt = f"{title}: paired differences to {verdict.get('reference')}, a row for each loss. {spoken}."
    return Picture(name, title, alt, [f"Dot: one seed's {what}. {band}"], described(drawing.svg, alt))


def _tally(values: npt.NDArray[np.float64]) -> str:
    """What the dots alone do not say: how many pairs there are, failed, and are exactly equal."""
    failed, zeros = int((~np.isfinite(values)).sum()), int((values == 0).sum())
    if zeros == len(values) > 1:
        return f"all {zeros} exactly 0"
    counts = {"failed": failed, "exactly 0": zeros, "differ": len(values) - failed - zeros}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def _replace(path: Path, text: str) -> Path:
    """Write beside the path, then rename: a reader finds the old file or the new one, never half of one."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
    half.write_text(text, encoding="utf-8")
    return half.replace(path)
