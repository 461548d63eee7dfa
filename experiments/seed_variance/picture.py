"""Figure of the spread of test accuracy over seeds, with a panel for each setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from pipeline.reporting.plotting import COLOURS, INK, MUTED, PAPER, canvas, described, row_names

TITLES = {
    "digits": "digits, 360 test examples",
    "calm": "Fashion-MNIST, 10 000 test examples, rate 0.01",
    "chaotic": "Fashion-MNIST, 10 000 test examples, rate 0.1",
    "annealed": "Fashion-MNIST, 10 000 test examples, rate 0.1 falling to 0",
}
ALT = (
    "Standard deviation of test accuracy over seeds by what a seed changes, in four settings. Dot and bar: measured, "
    "with its 95 % interval. Open diamond: the finite test set's part. Dashed line: the rule of thumb sqrt(error / 2N)."
)


def draw(accuracy: pd.DataFrame, rule_of_thumb: Mapping[str, float]) -> str:
    """Return an SVG of one metric's rows: a panel for each setting, the rule of thumb as a dashed line."""
    with canvas("seed_variance", 1.9 * len(TITLES) + 0.4, (len(TITLES), 1)) as drawn:
        for axes, (setting, title) in zip(drawn.panels, TITLES.items(), strict=True):
            own = accuracy[accuracy["setting"] == setting]
            for height, row in enumerate(own.itertuples()):
                interval = [100 * row.sd_low, 100 * row.sd_high]
                bar: dict[str, Any] = {"color": COLOURS[0], "clip_on": False}
                axes.plot(interval, [height] * 2, "|-", linewidth=2, markersize=7, **bar)
                axes.plot(100 * row.sd, height, "o", markersize=6, label="measured, 95 % interval", **bar)
                axes.plot(
                    100 * row.test_set_sd, height + 0.28, "D", color=INK, markersize=5, markerfacecolor=PAPER,
                    clip_on=False, label="the test set's part",
                )  # fmt: skip
            axes.axvline(
                100 * rule_of_thumb[setting], color=MUTED, linewidth=1.2, linestyle="--", label="sqrt(error / 2N)"
            )
            row_names(axes, list(own["vary"]), [f"disagree {100 * share:.2g} %" for share in own["disagreement"]])
            axes.set_title(title, loc="left", fontsize=9)
            axes.set_xlim(0, None)
        handles, labels = drawn.axes.get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True))
        drawn.axes.figure.legend(
            named.values(), named.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
        )
        drawn.panels[-1].set_xlabel("standard deviation of test accuracy over seeds, percentage points")
    return described(drawn.svg, ALT) + "\n"
