"""Drawing functions of the report: data frames in, SVG text out. Only this folder uses matplotlib."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import isotonic_regression

from pipeline.text import MINUS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

INK, PAPER, MUTED = "#1b1f25", "#fffffe", "#808890"
COLOURS = ("#2f75c8", "#c8641b", "#2c9467", "#c8415a", "#8865bd", "#92702d", "#c65a97", "#2f93a3")
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (3, 3)))
MARKERS = "os^DvP<X>hp*"
WIDTH = 5.0  # inches: text stays readable where a picture is shown 340 pixels wide
MOST_POINTS = 150  # of one curve
LONGEST_NAME = 24  # characters

Centre = Literal["mean", "median"]


@dataclass(frozen=True)
class Picture:
    """A figure of the report; `name` is the stem of its file."""

    name: str
    title: str
    alt: str
    caption: Sequence[str]
    svg: str


@dataclass
class Canvas:
    """One figure: draw on `axes`, the first of its `panels`, inside the context, read `svg` after it."""

    panels: Sequence[Axes]
    svg: str = ""

    @property
    def axes(self) -> Axes:
        return self.panels[0]


@contextmanager
def canvas(name: str, height: float, grid: tuple[int, int] = (1, 1)) -> Iterator[Canvas]:
    """Open an empty figure of rows x columns. The user's matplotlibrc is ignored; equal input gives equal bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(), warnings.catch_warnings():
        # Names without a glyph, or too long for the layout, only make the picture less pretty.
        warnings.simplefilter("ignore", UserWarning)
        mpl.rcdefaults()
        mpl.rcParams.update(_style(name))  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        drawn = Canvas(figure.subplots(*grid, squeeze=False).ravel().tolist())
        yield drawn
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        drawn.svg = _with_own_ids(stream.getvalue(), name)


def _style(name: str) -> dict[str, Any]:
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    paper = ("figure.facecolor", "savefig.facecolor")
    absent = ("axes.spines.top", "axes.spines.right", "text.parse_math")
    plain = {"axes.facecolor": "none", **dict.fromkeys(absent, False)}
    grid = {"axes.grid": True, "grid.color": MUTED, "grid.alpha": 0.25, "grid.linewidth": 0.6}
    font = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": name}
    return dict.fromkeys(ink, INK) | dict.fromkeys(paper, PAPER) | plain | grid | font


def _with_own_ids(svg: str, name: str) -> str:
    """Return the bare svg element with prefixed ids, because several pictures share one page."""
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])


def described(svg: str, alt: str) -> str:
    """Add an alternative text to the picture."""
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)


def themed(svg: str) -> str:
    """Replace ink and paper by the colours of the page, which may be light, dark or printed."""
    return svg.replace(INK, "var(--ink)").replace(PAPER, "var(--paper)")


@dataclass
class Seen:
    """Facts that a drawing of curves does not show."""

    hidden: dict[str, list[str]] = field(default_factory=dict)  # drawn -> exactly under it
    ended: list[str] = field(default_factory=list)  # some seed has no finite value at the last step
    never: list[str] = field(default_factory=list)  # not one finite value: not drawn


def bands(axes: Axes, frame: pd.DataFrame, order: Sequence[str], centre: Centre) -> Seen:
    """Draw a line in a band for each loss of (loss, seed, step, value). Equal losses are drawn once."""
    seen = Seen()
    for first, *hidden in _bundles(frame, order):
        wide = frame[frame["loss"] == first].pivot(index="step", columns="seed", values="value")
        wide = wide.where(np.isfinite(wide))
        if wide.isna().all(axis=None):
            seen.never += [first, *hidden]
            continue
        _band(axes, wide, centre, order.index(first), _joint_name([first, *hidden]))
        seen.ended += [first, *hidden] * _mark_ends(axes, wide)
        if hidden:
            seen.hidden[first] = hidden
    return seen


def _bundles(frame: pd.DataFrame, order: Sequence[str]) -> list[list[str]]:
    """Group losses whose values are equal at every seed and step, in the order of the report."""
    bundles: dict[bytes, list[str]] = defaultdict(list)
    for loss in order:
        own = frame[frame["loss"] == loss].sort_values(["seed", "step"])
        if len(own):
            values = own["value"].fillna(np.nan).to_numpy(float) + 0.0
            bundles[own[["seed", "step"]].to_numpy().tobytes() + values.tobytes()].append(loss)
    return list(bundles.values())


def _band(axes: Axes, wide: pd.DataFrame, centre: Centre, place: int, label: str) -> None:
    thin = wide.iloc[np.unique(np.linspace(0, len(wide) - 1, MOST_POINTS).round().astype(int))]
    low, middle, high = (thin.agg(how, axis=1) for how in ("min", centre, "max"))
    line: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "linestyle": LINES[place % len(LINES)]}
    every = max(1, len(thin) // 6)
    dots: dict[str, Any] = {"marker": MARKERS[place % len(MARKERS)], "markersize": 4}
    dots["markevery"] = (place % every, every)
    if wide.shape[1] > 1:
        axes.fill_between(thin.index, low, high, color=line["color"], alpha=0.15, linewidth=0)
    axes.plot(thin.index, middle, linewidth=1.4, label=label, **line, **dots)


def _mark_ends(axes: Axes, wide: pd.DataFrame) -> bool:
    """Mark the last finite value of each seed that is NaN at the last step. Return True if any seed was marked."""
    ended = wide.loc[:, wide.iloc[-1].isna()]
    for _, values in ended.items():
        last = values.dropna().tail(1)
        axes.plot(last.index, last, "x", color=INK, markersize=5, markeredgewidth=1.2)
    return not ended.empty


def decades(axis: Axis, subs: Sequence[float]) -> None:
    """Label a logarithmic axis with plain numbers at `subs` times the powers of ten."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.minorticks_off()


def label_ends(axes: Axes) -> None:
    """Write every curve's name at its right end, without overlap, joined to the end by a thin line."""
    curves = [line for line in axes.lines if not str(line.get_label()).startswith("_child")]
    ends = [np.asarray(line.get_xydata())[np.isfinite(line.get_ydata())][-1] for line in curves]
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = np.array([to_axes.transform(end)[1] for end in ends])
    text: dict[str, Any] = {"textcoords": "axes fraction", "va": "center", "fontsize": 8.5}
    for line, end, height in zip(curves, ends, _apart(heights, 0.052), strict=True):
        tie = {"arrowstyle": "-", "linewidth": 0.7, "relpos": (0, 0.5), "shrinkA": 0, "color": line.get_color()}
        name = short(str(line.get_label()))
        axes.annotate(name, end, (1.05, height), arrowprops=tie, annotation_clip=False, **text)


def _apart(heights: npt.NDArray[np.float64], least: float) -> npt.NDArray[np.float64]:
    """Return the nearest heights (least squares) in the same order, within [0, 1], at least `least` apart."""
    order = np.argsort(heights, kind="stable")
    steps = least * np.arange(len(heights))
    pooled = isotonic_regression(heights[order] - steps).x if len(heights) else heights
    spread = np.empty_like(heights)
    spread[order] = np.clip(pooled, 0, max(0.0, 1 - steps.max(initial=0))) + steps
    return spread


def distance_scale(axes: Axes, values: pd.Series[float]) -> float:
    """Set logarithmic axes with a floor below them for values of exactly 0; return the floor."""
    positive = values[(values > 0) & np.isfinite(values)]
    low = int(np.floor(np.log10(positive.min()))) if len(positive) else -16
    high = max(low + 1, int(np.ceil(np.log10(positive.max())))) if len(positive) else 0
    ticks = {10.0**power: f"1e{power}" for power in range(low, high + 1, -(-(high - low) // 6))}
    gap = max(1.0, (high - low) / 8)
    floor = float(10.0 ** (low - gap))
    axes.set(xscale="log", yscale="log")
    decades(axes.xaxis, [1])
    if (values == 0).any():
        axes.axhline(floor, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        below = floor / 10 ** (gap / 4)
        axes.text(0.01, below, "0 (bitwise equal)", transform=axes.get_yaxis_transform(), va="top")
        axes.set_ylim(10.0 ** (low - 2.1 * gap), 10.0**high * 1.5)
        ticks = {floor: "0", **ticks}
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.yaxis.minorticks_off()
    return floor


def ribbon(axes: Axes, placebos: pd.DataFrame) -> None:
    """Draw the placebos' (loss, seed, step, value) as a hatched band from lowest to highest."""
    known = placebos[np.isfinite(placebos["value"]) & (placebos["value"] > 0)]
    if known.empty:
        return
    span = known.groupby("step")["value"].agg(["min", "max"])
    hatched: dict[str, Any] = {"facecolor": "none", "edgecolor": MUTED, "hatch": "////", "linewidth": 0, "alpha": 0.8}
    axes.fill_between(span.index, span["min"], span["max"], zorder=0.6, **hatched)


def ceiling(axes: Axes, between_seeds: pd.DataFrame) -> None:
    """Draw the distance between two seeds of the reference, (step, value), as a dotted line at the median."""
    known = between_seeds[np.isfinite(between_seeds["value"]) & (between_seeds["value"] > 0)]
    if len(known):
        middle = known.groupby("step")["value"].median()
        axes.plot(middle.index, middle, color=INK, linewidth=1.2, linestyle=(0, (1, 2)), label="another seed")


@dataclass(frozen=True)
class Row:
    """A row of a forest: differences [S], NaN where a run failed, and an interval, [2] or empty."""

    name: str
    values: npt.NDArray[np.float64]
    interval: npt.NDArray[np.float64]
    note: str
    control: bool = False


def forest(axes: Axes, rows: Sequence[Row], margin: bool) -> None:
    """Draw rows from the top down. A margin is the unit of the axis, which is logarithmic far outside it."""
    for height, row in enumerate(rows):
        _forest_row(axes, height, row)
    _divide(axes, [row.control for row in rows])
    drawn = np.concatenate([[0.0], *(part for row in rows for part in (row.values, row.interval))])
    drawn = drawn[np.isfinite(drawn)]
    low, high = 1.15 * drawn.min(), 1.15 * drawn.max()
    label = "difference"
    if margin:
        label = "difference in units of the margin"
        low, high = min(-1.35, low), max(1.35, high)
        axes.axvspan(-1, 1, color=MUTED, alpha=0.18, linewidth=0)
        for edge in (-1, 1):
            axes.axvline(edge, color=MUTED, linewidth=1, linestyle="--")
    if margin and max(-low, high) > 5:
        label += ", logarithmic beyond ±1"
        low, high = 1.5 * low, 1.5 * high
        axes.set_xscale("symlog", linthresh=1)
    axes.set(xlim=(low, high) if low < high else (-1, 1), xlabel=label)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}".replace("-", MINUS))
    row_names(axes, [row.name for row in rows], [row.note for row in rows])


def _forest_row(axes: Axes, height: int, row: Row) -> None:
    """Draw dots above the interval; pairs that are exactly equal share one open diamond on 0."""
    moved = np.isfinite(row.values) & (row.values != 0)
    heights = height + np.linspace(-0.3, 0.12, len(row.values))
    colour = MUTED if row.control else COLOURS[0]
    dot: dict[str, Any] = {"color": colour, "markersize": 3, "alpha": 0.7, "markeredgewidth": 0}
    axes.plot(row.values[moved], heights[moved], "o", **dot)
    if len(row.interval) == 2 and row.interval[0] < row.interval[1]:
        axes.plot(row.interval, [height + 0.28] * 2, "|-", color=INK, linewidth=2, markersize=5)
    if (row.values == 0).any():
        axes.plot(0, height, "D", color=INK, markersize=6.5, markerfacecolor=PAPER, markeredgewidth=1.3)


def _divide(axes: Axes, controls: Sequence[bool]) -> None:
    """Draw a line between the losses and the controls below them."""
    first = list(controls).index(True) if True in controls else 0
    if first:
        axes.axhline(first - 0.5, color=MUTED, linewidth=0.8)


def reaches(axes: Axes, reached: Mapping[str, float], margin: float, controls: Sequence[bool]) -> None:
    """Draw a row for each loss: the smallest margin that its test passes, and the declared margin as a line."""
    for height, (value, control) in enumerate(zip(reached.values(), controls, strict=True)):
        colour = MUTED if control else COLOURS[0]
        face = colour if value < margin else PAPER
        axes.plot(value, height, "o", markersize=6, markerfacecolor=face, markeredgecolor=colour)
    _divide(axes, controls)
    axes.axvline(margin, color=INK, linewidth=1, linestyle="--")
    values = [*reached.values(), margin]
    axes.set(xscale="log", xlim=(min(values) / 2, max(values) * 2), xlabel="smallest margin that the test passes")
    decades(axes.xaxis, [1] if max(values) > 50 * min(values) else [1, 2, 5])
    row_names(axes, list(reached), [f"{value:.2g}" for value in reached.values()])
    axes.grid(True, axis="x")


def row_names(axes: Axes, names: Sequence[str], notes: Sequence[str]) -> None:
    """Label rows from the top down, names at the left, notes at the right."""
    right = axes.secondary_yaxis("right")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    right.set_yticks(range(len(notes)), list(notes), fontsize=8)
    for side in (axes, right):
        side.tick_params(axis="y", length=0)
        side.spines[["left", "right"]].set_visible(False)
    axes.grid(False)


def _joint_name(names: Sequence[str]) -> str:
    """Return the label of a line drawn for several losses: all names, or the first and the number of others."""
    joint = " = ".join(names)
    return joint if len(joint) <= LONGEST_NAME else f"{names[0]} +{len(names) - 1}"


def short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
