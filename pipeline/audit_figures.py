"""The audit in pictures: how far each loss's gradient is from the reference's, and p - y itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.cells import write_whole
from pipeline.drawing import COLOURS, INK, MINUS, MUTED, PAPER, canvas, described, row_names, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Audit = Mapping[str, Any]

PRECISIONS = {"float32": "r32", "float64": "r64"}
SAME = frozenset({"identical", "rounding"})
COLUMNS = 3  # of small multiples: names stay readable
ZERO_COLUMN = 2.2  # decades wide
REACH = 1.6  # axis of p - y, in units of the reference's largest component
SMALL = 7.5  # points


@dataclass(frozen=True)
class _Loss:
    """What the audit says of one loss, null read as NaN; `gradient` is None where there is none."""

    name: str
    words: str
    colour: str
    distances: Mapping[str, float]
    measured: bool
    classes: Sequence[str]
    gradient: Sequence[float] | None
    expected: Sequence[float]

    @property
    def nothing(self) -> str:
        """Why there is nothing to draw."""
        return "no gradient" if self.measured else "not measured"


def write_audit_figures(folder: Path, audit: Mapping[str, Any]) -> list[Path]:
    """Write `figures/audit_strip.svg` and `figures/p_minus_y.svg` from the content of audit.json."""
    losses = [_read(name, found) for name, found in audit["losses"].items()]
    if not losses:
        return []
    pictures = {"audit_strip": _strip(losses, audit["reference"]), "p_minus_y": _multiples(losses, audit)}
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for name, svg in pictures.items():
        write_whole(figures / f"{name}.svg", svg.encode())
    return [figures / f"{name}.svg" for name in pictures]


def _read(name: str, found: Mapping[str, Any]) -> _Loss:
    evidence = found.get("evidence") or {}
    example = evidence.get("example") or {}
    gradient = example.get("gradient")
    word, formula = found.get("objective") or "not_run", (found.get("scale") or {}).get("formula")
    return _Loss(
        name=name,
        words=short(word.replace("_", " ") + (f", {formula}" if formula else "")),
        colour=COLOURS[0] if word in SAME else COLOURS[1],
        distances={precision: _number(evidence.get(key)) for precision, key in PRECISIONS.items()},
        measured=bool(example),
        classes=[str(label) for label in example.get("classes") or ()],
        gradient=None if gradient is None else [_number(value) for value in gradient],
        expected=[_number(value) for value in example.get("reference_gradient") or ()],
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


# ---------------------------------------------------------------- the strip


def _strip(losses: Sequence[_Loss], reference: str) -> str:
    """A row for each loss: r in float32 and in float64 on one axis of decades, joined by a line."""
    with canvas("audit_strip", 1.45 + 0.25 * len(losses)) as drawing:
        axes = drawing.axes
        zero = _decades(axes, [value for loss in losses for value in loss.distances.values()])
        for height, loss in enumerate(losses):
            _strip_row(axes, height, loss, zero)
        row_names(axes, [loss.name for loss in losses], [loss.words for loss in losses])
        axes.grid(True, axis="x")
        _key(axes)
        _caption(
            axes,
            f"Distance of the gradient from that of {short(reference)}, relative to its norm.",
            "Nine decades long is rounding; a dot is mathematics. 0: equal in every bit.",
        )
    spoken = "; ".join(f"{loss.name}: {loss.words}, {_spoken(loss)}" for loss in losses)
    alt = f"Relative distance of gradients from those of {reference}, in float32 and float64, logarithmic. {spoken}."
    return described(drawing.svg, alt)


def _decades(axes: Axes, distances: Sequence[float]) -> float:
    """An axis of log10 r with a column for r = 0 at its left, whose place is returned."""
    powers = [math.log10(value) for value in distances if 0 < value < math.inf]
    low, high = math.floor(min([-17.0, *powers])), math.ceil(max([1.0, *powers]))
    zero = low - ZERO_COLUMN / 2
    step = max(1, round((high - low) / 6))
    ticks = range(math.ceil(low / step) * step, high + 1, step)
    axes.set_xticks([zero, *ticks], ["0", *(f"1e{power}" for power in ticks)])
    axes.set_xlim(zero - ZERO_COLUMN / 2, high + 0.3)
    axes.axvspan(zero - ZERO_COLUMN / 2, low, color=MUTED, alpha=0.18, linewidth=0)
    top = axes.get_xaxis_transform()
    for bits, precision in (("32", np.float32), ("64", np.float64)):
        epsilon = float(np.log10(np.finfo(precision).eps))
        axes.axvline(epsilon, color=MUTED, linewidth=1, linestyle="--")
        axes.text(epsilon, 1.0, f"eps of float{bits}", transform=top, ha="center", va="bottom", fontsize=SMALL)
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
        after = max(places.values(), default=zero + ZERO_COLUMN / 2)
        flip = after > (left + right) / 2
        text: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": SMALL}
        axes.annotate(missing, (after, height), (-8 if flip else 8, 0), ha="right" if flip else "left", **text)


def _marker(precision: str) -> dict[str, Any]:
    """A ring for float32 and a small disk for float64: both are seen where they coincide."""
    ring = {"marker": "o", "markersize": 7.5, "markerfacecolor": PAPER, "markeredgewidth": 1.4}
    disk = {"marker": "o", "markersize": 4, "markeredgewidth": 0}
    return {"linestyle": "none"} | (ring if precision == "float32" else disk)


def _missing(loss: _Loss) -> str:
    """What has no place on the axis, in words: the whole row or one precision of it."""
    absent = {name: value for name, value in loss.distances.items() if not math.isfinite(value)}
    if len(absent) == len(loss.distances) and loss.gradient is None:
        return loss.nothing
    said = {math.inf: "infinite", -math.inf: MINUS + "infinite"}
    return ", ".join(f"{name}: {said.get(value, 'not a number')}" for name, value in absent.items())


def _spoken(loss: _Loss) -> str:
    drawn = [f"{name} {value:.1e}" if value else f"{name} 0" for name, value in loss.distances.items() if value >= 0]
    return ", ".join(filter(None, [*(text for text in drawn if "inf" not in text), _missing(loss)]))


def _key(axes: Axes) -> None:
    rings = [axes.plot([], [], color=INK, label=precision, **_marker(precision))[0] for precision in PRECISIONS]
    axes.legend(handles=rings, loc="lower right", bbox_to_anchor=(1, 1.06), ncols=2, frameon=False, borderaxespad=0)


def _caption(axes: Axes, *lines: str) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None  # noqa: S101
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8)


# ---------------------------------------------------------------- p - y


def _multiples(losses: Sequence[_Loss], audit: Audit) -> str:
    """A panel for each loss: bars of its gradient in the logits, the reference's as an outline on top."""
    columns = min(COLUMNS, len(losses))
    rows = -(-len(losses) // columns)
    reach = REACH * max([abs(value) for loss in losses for value in loss.expected if math.isfinite(value)] or [1.0])
    with canvas("p_minus_y", 0.6 + 1.05 * rows, (rows, columns)) as drawing:
        for place, axes in enumerate(drawing.panels):
            if place >= len(losses):
                axes.set_axis_off()
                continue
            _panel(axes, losses[place], reach)
            axes.tick_params(labelleft=place % columns == 0, labelbottom=place + columns >= len(losses))
        lines = [*_example(audit), f"Bars: gradient in the logits; outline: that of {short(audit['reference'])}."]
        _caption(drawing.axes, *lines)
    spoken = "; ".join(f"{loss.name}: {_listed(loss)}" for loss in losses)
    alt = f"p {MINUS} y: the gradient of each loss at one example. {' '.join(lines)} {spoken}."
    return described(drawing.svg, alt)


def _example(audit: Audit) -> list[str]:
    """The example in words."""
    for found in audit["losses"].values():
        if example := (found.get("evidence") or {}).get("example"):
            chances = ", ".join(f"{name} {p:g}" for name, p in zip(example["classes"], example["probs"], strict=True))
            label = example["classes"][example["label"]]
            return [f"A 256 × 256 picture in, three probabilities out: {chances}; the label is {label}."]
    return []


def _panel(axes: Axes, loss: _Loss, reach: float) -> None:
    axes.set_title(f"{short(loss.name)}\n{loss.words}", fontsize=SMALL, loc="left", pad=3)
    axes.set(xlim=(-0.6, max(len(loss.classes), 3) - 0.4), ylim=(-reach, reach))
    axes.set_xticks(range(len(loss.classes)), loss.classes)
    axes.tick_params(labelsize=SMALL, length=0)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}".replace("-", MINUS))
    axes.axhline(0, color=MUTED, linewidth=0.8)
    for place, value in enumerate(loss.gradient or ()):
        _bar(axes, place, value, loss.colour, reach)
    outline: dict[str, Any] = {"facecolor": "none", "edgecolor": INK, "linewidth": 1.2}
    axes.bar(range(len(loss.expected)), loss.expected, 0.66, **outline)
    if loss.gradient is None:
        axes.text(0.5, 0.04, loss.nothing, transform=axes.transAxes, ha="center", fontsize=SMALL)


def _bar(axes: Axes, place: int, value: float, colour: str, reach: float) -> None:
    """A bar; in figures what no bar can show: exact zero, no number, and a value beyond the axis."""
    if math.isfinite(value):
        axes.bar(place, max(-reach, min(value, reach)), 0.66, color=colour, linewidth=0)
    if not math.isfinite(value) or value == 0 or abs(value) > reach:
        below = value < 0
        height = 0.0 if value == 0 or math.isnan(value) else math.copysign(reach, value)
        text: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": SMALL}
        axes.annotate(_figures(value), (place, height), (0, 2), va="bottom" if below else "top", **text)


def _figures(value: float) -> str:
    return f"{value:.2g}".replace("-", MINUS).replace("nan", "NaN")


def _listed(loss: _Loss) -> str:
    return ", ".join(map(_figures, loss.gradient)) if loss.gradient is not None else loss.nothing
