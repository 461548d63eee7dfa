"""Pictures of an audit: distances of the gradients from the reference's, and p - y at one example."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.reporting.plotting import COLOURS, INK, MUTED, PAPER, Picture, canvas, described, row_names, short
from pipeline.storage.files import write_whole
from pipeline.text import MINUS
from pipeline.verdict.audit_entry import Audit, AuditEntry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PRECISIONS = {"float32": "r32", "float64": "r64"}
TIMES = "\N{MULTIPLICATION SIGN}"
COLUMNS = 3  # of small multiples: names stay readable
REACH = 1.75  # half the axis of p - y, in units of the reference's largest component
SLIVER = 0.01  # of that half: a bar lower than this cannot be seen
LINE = 78  # characters of a caption
LONGEST_FORMULA = 8  # characters
SMALL = 7.5  # points
LABEL: dict[str, Any] = {
    "textcoords": "offset points",
    "fontsize": SMALL,
    "bbox": {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8},
}


@dataclass(frozen=True)
class _Loss:
    """Numbers of one loss, null read as NaN; `gradient` is None where there is none."""

    name: str
    words: str
    colour: str
    distances: Mapping[str, float]
    measured: bool
    classes: Sequence[str]
    gradient: Sequence[float] | None
    expected: Sequence[float]

    @property
    def why_empty(self) -> str:
        """Reason why there is nothing to draw."""
        return "no gradient" if self.measured else "not measured"


def write_audit_figures(folder: Path, audit: Mapping[str, Any]) -> list[Path]:
    """Write `figures/audit_strip.svg` and `figures/p_minus_y.svg` from the content of audit.json."""
    figures = folder / "figures"
    drawn = {figures / f"{picture.name}.svg": picture.svg for picture in audit_pictures(Audit.from_json(audit))}
    if drawn:
        figures.mkdir(parents=True, exist_ok=True)
    for path, svg in drawn.items():
        write_whole(path, svg.encode())
    return list(drawn)


def audit_pictures(audit: Audit) -> list[Picture]:
    """Draw the strip and p - y, with the captions inside; nothing where nothing was audited."""
    losses = [_read(name, entry) for name, entry in audit.losses.items()]
    return [_strip(losses, audit.reference), _multiples(losses, audit)] if losses else []


def _read(name: str, entry: AuditEntry) -> _Loss:
    example = entry.evidence.get("example") or {}
    gradient = example.get("gradient")
    formula = (entry.scale or {}).get("formula") or ""
    return _Loss(
        name=name,
        words=entry.objective.replace("_", " ") + (f", {formula}" if 0 < len(formula) <= LONGEST_FORMULA else ""),
        colour=COLOURS[0] if entry.is_same else COLOURS[1],
        distances={precision: _number(entry.evidence.get(key)) for precision, key in PRECISIONS.items()},
        measured=bool(example),
        classes=[str(label) for label in example.get("classes") or ()],
        gradient=None if gradient is None else [_number(value) for value in gradient],
        expected=[_number(value) for value in example.get("reference_gradient") or ()],
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


# ---------------------------------------------------------------- the strip


def _strip(losses: Sequence[_Loss], reference: str) -> Picture:
    """Draw a row for each loss: its distance in float32 and in float64 on one logarithmic axis, joined by a line."""
    with canvas("audit_strip", 1.5 + 0.25 * len(losses)) as drawing:
        axes = drawing.axes
        zero = _decades(axes, [value for loss in losses for value in loss.distances.values()])
        for height, loss in enumerate(losses):
            _strip_row(axes, height, loss, zero)
        row_names(axes, [loss.name for loss in losses], [loss.words for loss in losses])
        axes.grid(True, axis="x")
        rings = [axes.plot([], [], color=INK, label=precision, **_marker(precision))[0] for precision in PRECISIONS]
        axes.figure.legend(handles=rings, loc="outside upper right", ncols=len(rings), frameon=False, borderpad=0)
        lines = [
            f"Gradients: norm of the difference to {short(reference)} over its norm, median over batches.",
            "A long line (about nine decades) means rounding. A single dot means a mathematical difference,",
            "or bitwise equality at 0.",
            "Colour: identical, rounding and offset have the same gradient.",
        ]
        _caption(axes, lines)
    spoken = "; ".join(f"{loss.name}: {loss.words}, {_spoken(loss)}" for loss in losses)
    alt = f"Relative distance of gradients, float32 and float64, logarithmic. {' '.join(lines)} {spoken}."
    title = f"How far gradients are from those of {reference}"
    return Picture("audit_strip", title, alt, (), described(drawing.svg, alt))


def _decades(axes: Axes, distances: Sequence[float]) -> float:
    """Set an axis of log10 r with a column for r = 0 at its left; return the place of that column."""
    powers = [math.log10(value) for value in distances if 0 < value < math.inf]
    low, high = math.floor(min([-17.0, *powers])), math.ceil(max([1.0, *powers]))
    column = (high - low) / 9
    zero = low - column / 2
    step = 3 if high - low <= 20 else 5 * math.ceil((high - low) / 30)
    ticks = range(math.ceil((low + column / 2) / step) * step, high + 1, step)
    axes.set_xticks([zero, *ticks], ["0", *(f"1e{power}" for power in ticks)], fontsize=8)
    axes.set_xlim(low - column, high + column / 3)
    axes.axvspan(low - column, low, color=MUTED, alpha=0.18, linewidth=0)
    top = axes.get_xaxis_transform()
    for precision, side in (("float64", "right"), ("float32", "left")):
        epsilon = math.log10(np.finfo(precision).eps)
        axes.axvline(epsilon, color=MUTED, linewidth=1, linestyle="--")
        axes.text(epsilon, 1.0, f"eps of {precision}", transform=top, ha=side, va="bottom", fontsize=SMALL)
    return zero


def _strip_row(axes: Axes, height: int, loss: _Loss, zero: float) -> None:
    places = {
        precision: math.log10(value) if value > 0 else zero
        for precision, value in loss.distances.items()
        if math.isfinite(value)
    }
    axes.plot(list(places.values()), [height] * len(places), color=loss.colour, linewidth=2)
    for precision, place in places.items():
        axes.plot(place, height, color=loss.colour, **_marker(precision))
    if missing := _missing(loss):
        left, right = axes.get_xlim()
        last = max(places.values(), default=2 * zero - left)  # right of the column for 0
        side, shift = ("right", -9) if last > (left + right) / 2 else ("left", 9)
        axes.annotate(missing, (last, height), (shift, 0), va="center", ha=side, **LABEL)


def _marker(precision: str) -> dict[str, Any]:
    """Return a ring for float32 and a small disk for float64, so that both are visible where they coincide."""
    ring = {"marker": "o", "markersize": 7.5, "markerfacecolor": PAPER, "markeredgewidth": 1.4}
    disk = {"marker": "o", "markersize": 4, "markeredgewidth": 0}
    return {"linestyle": "none"} | (ring if precision == "float32" else disk)


def _missing(loss: _Loss) -> str:
    """Describe values that have no place on the axis: the whole row or one precision of it."""
    absent = {name: value for name, value in loss.distances.items() if not math.isfinite(value)}
    if len(absent) == len(loss.distances) and loss.gradient is None:
        return loss.why_empty
    words = {name: "infinite" if math.isinf(value) else "no number" for name, value in absent.items()}
    if len(words) == len(loss.distances) and len(set(words.values())) == 1:
        return words.popitem()[1]
    return ", ".join(f"{name}: {word}" for name, word in words.items())


def _spoken(loss: _Loss) -> str:
    finite = {name: value for name, value in loss.distances.items() if math.isfinite(value)}
    return ", ".join(filter(None, [*(f"{name} {value:.1g}" for name, value in finite.items()), _missing(loss)]))


def _caption(axes: Axes, lines: Sequence[str]) -> None:
    wrapped = "\n".join(textwrap.fill(line, LINE) for line in lines)
    axes.figure.supxlabel(wrapped, x=0.01, ha="left", fontsize=8)


# ---------------------------------------------------------------- p - y


def _multiples(losses: Sequence[_Loss], audit: Audit) -> Picture:
    """Draw a panel for each loss: bars of its gradient in the logits, the reference's as an outline on top."""
    columns = min(COLUMNS, len(losses))
    rows = -(-len(losses) // columns)
    reach = REACH * max([abs(value) for loss in losses for value in loss.expected if math.isfinite(value)] or [1.0])
    with canvas("p_minus_y", 0.75 + 1.05 * rows, (rows, columns)) as drawing:
        for place, axes in enumerate(drawing.panels):
            if place >= len(losses):
                axes.set_axis_off()
                continue
            _panel(axes, losses[place], reach)
            axes.tick_params(labelleft=place % columns == 0, labelbottom=place + columns >= len(losses))
        lines = [*_example(audit), f"Bars: gradient in the logits; outline: that of {short(audit.reference)}."]
        _caption(drawing.axes, lines)
    spoken = "; ".join(f"{loss.name}: {_listed(loss)}" for loss in losses)
    alt = f"p {MINUS} y: the gradient of each loss at one example. {' '.join(lines)} {spoken}."
    title = f"p {MINUS} y: the gradient at one example"
    return Picture("p_minus_y", title, alt, (), described(drawing.svg, alt))


def _example(audit: Audit) -> list[str]:
    """Describe the example."""
    for entry in audit.losses.values():
        if example := entry.evidence.get("example"):
            chances = ", ".join(f"{name} {p:g}" for name, p in zip(example["classes"], example["probs"], strict=True))
            label = example["classes"][example["label"]]
            return [f"A 256 {TIMES} 256 picture, label {label}; probabilities: {chances}."]
    return []


def _panel(axes: Axes, loss: _Loss, reach: float) -> None:
    axes.set_title(f"{short(loss.name)}\n{loss.words}", fontsize=SMALL, loc="left", pad=3)
    axes.set(xlim=(-0.6, max(len(loss.classes), 3) - 0.4), ylim=(-reach, reach))
    axes.set_xticks(range(len(loss.classes)), loss.classes)
    axes.tick_params(labelsize=SMALL, length=0)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}".replace("-", MINUS))
    axes.set_axisbelow(True)
    axes.grid(False, axis="x")
    axes.axhline(0, color=MUTED, linewidth=0.8, zorder=0.5)
    axes.bar(range(len(loss.expected)), loss.expected, 0.66, facecolor="none", edgecolor=INK, linewidth=1.2, zorder=2)
    for place, value in enumerate(loss.gradient or ()):
        _bar(axes, place, value, loss.colour)
        _figure(axes, place, value, above=place < len(loss.expected) and loss.expected[place] < 0)
    if loss.gradient is None:
        axes.annotate(loss.why_empty, (0, 1), (4, -3), xycoords="axes fraction", va="top", **LABEL)


def _bar(axes: Axes, place: int, value: float, colour: str) -> None:
    axes.bar(place, np.clip(value, *axes.get_ylim()), 0.66, color=colour, linewidth=0)


def _figure(axes: Axes, place: int, value: float, above: bool) -> None:
    """Write the value where its bar cannot show it: too low to see, beyond the axis, or not a number."""
    high = axes.get_ylim()[1]
    if SLIVER * high <= abs(value) <= high:
        return
    beyond = abs(value) > high
    height = math.copysign(high, value) if beyond else 0.0
    above = value < 0 if beyond else above  # a figure stays within the axis, and off the outline
    axes.annotate(
        _figures(value), (place, height), (0, 3 if above else -3), ha="center", va="bottom" if above else "top", **LABEL
    )


def _figures(value: float) -> str:
    """Format with two digits, or with one where an exponent needs the room."""
    digits = 2 if 0.01 <= abs(value) < 1000 else 1
    return f"{value:.{digits}g}".replace("-", MINUS).replace("nan", "NaN")


def _listed(loss: _Loss) -> str:
    return ", ".join(map(_figures, loss.gradient)) if loss.gradient is not None else loss.why_empty
