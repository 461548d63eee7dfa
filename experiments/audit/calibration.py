"""Calibrate the constants of `rounding`: false alarms among correct forms, and the smallest mutants detected.

    python -m experiments.audit.calibration --csv experiments/audit/calibration.csv \
        --svg experiments/audit/calibration.svg
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.audit.calibration_figure import draw
from experiments.audit.honest import FORMS
from experiments.audit.measuring import (
    DTYPES,
    NO_FORM,
    Ruler,
    Units,
    honest_parts,
    honest_units,
    mutant_parts,
    mutant_units,
    smallest_caught,
)
from experiments.audit.planted import BLIND_SPOTS
from experiments.audit.tables import environment, markdown
from likelihood_lab.audit.api import check
from likelihood_lab.audit.rounding import CONSTANT, SYSTEMATIC, name_of

CONSTANTS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)
THRESHOLDS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
INSIDE = "float32 inside float64"
SHOWN = ("label smoothing", "temperature 1 + d", "z-loss", "class weight 1 + d", "gradient noise")
ACCUSED = {"accused": "honest forms accused", "accused_without_root": "without sqrt(C)", "accused_value": "by value"}
LEGEND = "Mutants: the smallest d caught; 0 where cross-entropy itself is accused, - where not even 0.1 is caught."
WORST = 4  # correct forms to name


def curve(
    of: str, constants: Sequence[float], honest: Mapping[str, float], mutants: Mapping[str, Mapping[float, float]],
    rootless: Mapping[str, float] | None = None, values: Mapping[str, float] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Return a row for each constant: the correct forms above it, and the smallest d of each mutant above it."""
    rows: list[dict[str, Any]] = []
    for constant in constants:
        row: dict[str, Any] = {"of": of, "constant": constant, "honest": len(honest)}
        for name, sizes in (("accused", honest), ("accused_without_root", rootless), ("accused_value", values)):
            row[name] = None if sizes is None else sum(size > constant for size in sizes.values())
        rows.append(row | {name: smallest_caught(units, constant) for name, units in mutants.items()})
    return pd.DataFrame(rows)


def precision_curve(ruler: Ruler, honest: Mapping[str, Units]) -> pd.DataFrame:
    """Return the curve of the rounding rule's constant in one precision."""
    parts = [{name: getattr(u, part) for name, u in honest.items()} for part in ("gradient", "rootless", "value")]
    return curve(name_of(ruler.dtype), CONSTANTS, parts[0], mutant_units(ruler), *parts[1:])


def _table(frame: pd.DataFrame) -> str:
    mutants = [name for name in SHOWN if name in frame]
    accused = {
        "accused": "honest forms accused",
        "accused_without_root": "without sqrt(C)",
        "accused_value": "by value",
    }
    kept = [name for name in accused if frame[name].notna().any()]
    columns = ["constant", *(accused[name] for name in kept), *mutants]
    rows = []
    for entry in frame.to_dict("records"):
        shares = [_share(entry[name], entry["honest"]) for name in kept]
        caught = [None if pd.isna(entry[name]) else f"{entry[name]:.0e}" if entry[name] else "0" for name in mutants]
        rows.append([f"{entry['constant']:g}", *shares, *caught])
    return markdown(columns, rows)


def _share(count: Any, of: int) -> str | None:
    return None if pd.isna(count) else f"{int(count)} of {of}"


def _worst(honest: Mapping[str, Units]) -> str:
    """Name the correct forms with the largest errors."""
    ordered = sorted(honest.items(), key=lambda item: -item[1].gradient)[:WORST]
    rows = [[name, u.gradient, u.rootless, u.classes, u.value] for name, u in ordered]
    return markdown(["largest of the honest forms", "units", "without sqrt(C)", "at C", "units of its value"], rows)


def root(rulers: Mapping[torch.dtype, Mapping[str, Units]]) -> str:
    """Show the need for sqrt(C) in the unit: log_softmax along dimension 0 sums classes one by one."""
    name = "log_softmax along dimension 0"
    rows = [[name_of(dtype), u[name].gradient, u[name].rootless, u[name].classes] for dtype, u in rulers.items()]
    return markdown([name, "units", "without sqrt(C)", "at C"], rows)


# --- promises


def _smoothed(logits: Tensor, labels: Tensor, d: float) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=d)


def _smoothed_inside(logits: Tensor, labels: Tensor, d: float) -> Tensor:
    return _smoothed(logits.float(), labels, d)


def promises() -> list[tuple[str, bool]]:
    """Return each fault that the audit must detect, and whether it does."""
    kept = [
        ("label smoothing 1e-12 is caught in float64", not _same(partial(_smoothed, d=1e-12))),
        ("label smoothing 1e-5 is caught in float32", not _same(partial(_smoothed, d=1e-5), dtype=torch.float32)),
        ("label smoothing 1e-7 is caught inside a float32 loss", not _same(partial(_smoothed_inside, d=1e-7))),
    ]
    for fault in BLIND_SPOTS:
        found = check(fault.make())
        named = all(any(e.startswith(effect) for e in found.side_effects) for effect in fault.side_effects)
        kept.append(
            (f"planted and caught: {fault.title} ({found.objective})", found.objective == fault.objective and named)
        )
    for name, form in FORMS.items():
        if not _same(form):
            kept.append((f"honest form called the same: {name}", False))
    return kept


def _same(fn: Callable[..., Tensor], **settings: Any) -> bool:
    return check(fn, **settings).same


def main() -> int:
    """Print the study and return 1 if an expectation fails."""
    parser = argparse.ArgumentParser(prog="python -m experiments.audit.calibration", description=__doc__)
    parser.add_argument("--csv", type=Path, help="write the curves to this file")
    parser.add_argument("--svg", type=Path, help="draw them to this file")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(f"# The audit's two constants\n\n{environment()}. {len(FORMS)} honest forms.")
    frames, honest = [], {}
    for dtype in DTYPES:
        ruler = Ruler(dtype)
        honest[dtype] = honest_units(ruler)
        frames.append(precision_curve(ruler, honest[dtype]))
        left_out = f" Not honest here: {', '.join(NO_FORM[dtype])}." if dtype in NO_FORM else ""
        print(f"\n## Rounding rule, {name_of(dtype)} (the constant is {CONSTANT:g})\n")
        print(f"{_table(frames[-1])}\n\n{_worst(honest[dtype])}\n\n{LEGEND}{left_out}")
        if dtype == torch.float64:
            audit = ruler.audit
    parts = honest_parts(audit)
    frames.append(curve(INSIDE, THRESHOLDS, parts, mutant_parts(audit)))
    largest = max(parts, key=lambda name: parts[name])
    print(f"\n## Systematic part, {INSIDE} (the threshold is {SYSTEMATIC:g})\n\n{_table(frames[-1])}\n")
    print(f"The largest of the honest forms: {parts[largest]:.3g}, {largest}.")
    print(f"\n## Why the unit has sqrt(C)\n\n{root(honest)}")
    table = pd.concat(frames, ignore_index=True)
    if options.csv is not None:
        table.to_csv(options.csv, index=False, float_format="%.4g")
    if options.svg is not None:
        options.svg.write_text(draw(table))
    kept = promises()
    print("\n## Promises\n\n" + "\n".join(f"- {'kept' if held else 'NOT KEPT'}: {said}" for said, held in kept))
    return int(not all(held for _, held in kept))


if __name__ == "__main__":
    sys.exit(main())
