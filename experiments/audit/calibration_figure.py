"""Figure of `calibration`: false alarms above, the smallest label smoothing that is detected below."""

from __future__ import annotations

import pandas as pd

from likelihood_lab.audit.rounding import CONSTANT
from pipeline.reporting.plotting import COLOURS, LINES, MARKERS, MUTED, canvas, described, label_ends

MUTANT = "label smoothing"
TICKS = (0.25, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0)
POWERS = tuple(10.0**-k for k in range(1, 17, 3))
ROOT = "\N{SQUARE ROOT}C"
ALT = (
    "Above: share of honest forms accused by precision, against the constant of the rounding rule. "
    "Below: smallest label smoothing caught. A dashed line marks the constant in use, 8."
)


def draw(table: pd.DataFrame) -> str:
    """Return an SVG of the rounding rule's curves, one line for each precision."""
    with canvas("calibration", 5.6, (2, 1)) as drawn:
        above, below = drawn.panels
        precisions = [of for of in table["of"].unique() if " " not in of]
        for place, of in enumerate(precisions):
            own = table[table["of"] == of]
            style = {
                "color": COLOURS[place], "linestyle": LINES[place], "marker": MARKERS[place], "markersize": 4,
                "linewidth": 1.4, "label": of,
            }  # fmt: skip
            above.plot(own["constant"], 100 * own["accused"].astype(float) / own["honest"], **style)
            caught = own[MUTANT].astype(float).where(lambda d: d > 0)
            below.plot(own["constant"], caught, **style)
        single = table[table["of"] == "float32"]
        shares = 100 * single["accused_without_root"].astype(float) / single["honest"]
        above.plot(single["constant"], shares, color=MUTED, linewidth=1.2, label=f"float32 without {ROOT}")
        below.set_yscale("log")
        below.set_yticks(POWERS, [f"{power:.0e}" for power in POWERS])
        below.yaxis.minorticks_off()
        above.set(ylabel="honest forms accused, %", ylim=(-3, None))
        below.set(ylabel=f"smallest {MUTANT} caught", xlabel="constant, in units of what rounding must cost")
        for axes in (above, below):
            axes.set_xscale("log")
            axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
            axes.xaxis.minorticks_off()
            label_ends(axes)
            axes.axvline(CONSTANT, color=MUTED, linewidth=1, linestyle="--")
    return described(drawn.svg, ALT) + "\n"
