"""Results of a trial as rows, one for each loss or control and metric; written as CSV and compared with a record."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from likelihood_lab.errors import UsageError, first_line

KEY = ["trial", "loss", "metric"]
WORDS = [
    "kind", "objective", "outcome", "verdict", "expected", "confirmed", "first_steps", "failures", "margin", "level",
    "n",
]  # fmt: skip
NUMBERS = ["mean", "sd", "mean_difference", "ci_low", "ci_high", "p_tost"]
COMPARED = [*WORDS, *NUMBERS, "seeds_needed"]
COLUMNS = [*KEY, *COMPARED]
OF_MARGIN = 0.1  # margins; a difference that moves by at most this still holds
BEYOND = 0.01  # margins; allowance for rounding at the ends of a recorded interval

Row = Mapping[str, Any]


def rows_of(trial: str, folder: Path) -> pd.DataFrame:
    """Return the rows of a trial, from the verdict.json and history.parquet in its folder.

    mean and sd (n - 1) are over the seeds with a score, of the metric on the test set after the last step.
    mean_difference is candidate minus reference (NLL: log ratio); [ci_low, ci_high] is its interval at level 1 - level.
    """
    verdict = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
    spread = _spread(pd.read_parquet(folder / "history.parquet"))
    found = [_flat(row) | {"trial": trial} for row in _entries(verdict, spread)]
    table = pd.DataFrame(found, columns=COLUMNS, dtype="object")
    return _read(io.StringIO(table.to_csv(index=False)))  # as if read back, so that equal rows compare equal


def _spread(history: pd.DataFrame) -> dict[tuple[str, str], tuple[float, float]]:
    """Return (loss, metric) -> mean and standard deviation over seeds of the last value of test/metric."""
    tested = history[history["metric"].str.startswith("test/")]
    last = tested.sort_values("step").groupby(["loss", "metric", "seed"])["value"].last()
    table = last.groupby(["loss", "metric"]).agg(["mean", "std"])
    return {
        (str(loss), str(metric).removeprefix("test/")): (float(mean), float(sd))
        for (loss, metric), mean, sd in table.itertuples()
    }


def _entries(verdict: Row, spread: Mapping[tuple[str, str], tuple[float, float]]) -> Iterator[dict[str, Any]]:
    """Yield rows of the reference, the candidates and the controls."""
    reference, controls = verdict["reference"], verdict["controls"]
    for (loss, metric), (mean, sd) in spread.items():
        if loss == reference:
            failures = len(verdict["reference_failures"])
            yield {"kind": "reference", "loss": loss, "metric": metric, "mean": mean, "sd": sd, "failures": failures}
    for entry in verdict["comparisons"]:
        words = {name: entry[name] for name in ("loss", "objective", "outcome", "verdict", "expected", "confirmed")}
        words |= {"first_steps": entry["envelope"]["word"], "failures": len(entry["failures"])}
        for metric, found in (entry["metrics"] or {"": {}}).items():  # a candidate without pairs has no metrics
            mean, sd = spread.get((entry["loss"], metric), (math.nan, math.nan))
            numbers = {"metric": metric, "mean": mean, "sd": sd, "seeds_needed": entry["seeds_needed"]}
            yield {"kind": "candidate"} | words | numbers | found
    if controls["replay"] is not None:
        same = "identical" if controls["replay"]["bitwise"] else "different"
        yield {"kind": "control", "loss": "replay", "outcome": same}
    for name, metrics in controls["metrics"].items():
        for metric, found in metrics.items():
            words = {"loss": name, "outcome": controls["outcomes"][name], "metric": metric}
            yield {"kind": "control"} | words | found


def _flat(row: Row) -> dict[str, Any]:
    """Return the row with its interval in two columns."""
    low, high = row.get("ci_difference") or (None, None)
    return {name: row.get(name) for name in COLUMNS} | {"ci_low": low, "ci_high": high}


def _read(source: Any) -> pd.DataFrame:
    """Read CSV as text, and convert numbers with Python's `float`, which restores them exactly."""
    table = pd.read_csv(source, dtype="str", keep_default_na=False)
    floats = [name for name in (*NUMBERS, "margin", "level") if name in table]
    return table.assign(**{name: [float(cell or "nan") for cell in table[name]] for name in floats})


def write(table: pd.DataFrame, path: Path) -> None:
    """Write results.csv with every digit."""
    table.to_csv(path, index=False, lineterminator="\n")


def recorded(path: Path) -> pd.DataFrame:
    """Read results.csv.

    Raises:
        UsageError: the file is absent or damaged.
    """
    remedy = f"record it again: python -m experiments.record {path.parent.name}"
    try:
        table = _read(path)
    except FileNotFoundError as error:
        raise UsageError(f"{path} is not there; {remedy}") from error
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} is damaged ({first_line(error)}); {remedy}") from error
    if list(table.columns) != COLUMNS or table.empty or table.duplicated(KEY).any():
        raise UsageError(f"{path} is damaged: unexpected columns or rows; {remedy}")
    return table


# --- comparison


@dataclass(frozen=True)
class Comparison:
    """Comparison of a trial with its record: lines about what moved, and whether all values are equal."""

    moved: tuple[str, ...]
    bitwise: bool

    @property
    def word(self) -> str:
        """One of `bit for bit`, `holds` and `moved`."""
        return "moved" if self.moved else "bit for bit" if self.bitwise else "holds"


def compare(old: pd.DataFrame, new: pd.DataFrame) -> Comparison:
    """Compare the rows of one trial: words exactly, numbers by `_moved`."""
    before, after = _by_key(old), _by_key(new)
    moved = [f"{_name(key)}: is no longer found" for key in before if key not in after]
    moved += [f"{_name(key)}: was not recorded" for key in after if key not in before]
    for key in before.keys() & after.keys():
        moved += [f"{_name(key)} {line}" for line in _moved(before[key], after[key])]
    bitwise = not moved and all(_same(before[key][n], after[key][n]) for key in before for n in COMPARED)
    return Comparison(tuple(dict.fromkeys(sorted(moved))), bitwise)


def _by_key(table: pd.DataFrame) -> dict[tuple[str, str], Row]:
    rows: Sequence[Any] = table.to_dict("records")
    return {(row["loss"], row["metric"]): row for row in rows}


def _name(key: tuple[str, str]) -> str:
    loss, metric = key
    return f"{loss}, {metric}" if metric else str(loss)


def _moved(old: Row, new: Row) -> Iterator[str]:
    for name in WORDS:
        if not _same(old[name], new[name]):
            yield f"{name}: {old[name]} -> {new[name]}"
    for name, holds in (("mean", _mean_holds), ("mean_difference", _difference_holds)):
        if not (_same(old[name], new[name]) or holds(old, new)):
            yield f"{name}: {old[name]:.6g} -> {new[name]:.6g}"


def _same(old: Any, new: Any) -> bool:
    return bool(old == new or (old != old and new != new))  # NaN equals NaN: no value


def _mean_holds(old: Row, new: Row) -> bool:
    """Whether the mean moved by at most the standard deviation over seeds."""
    return bool(abs(new["mean"] - old["mean"]) <= old["sd"])


def _difference_holds(old: Row, new: Row) -> bool:
    """Whether the difference moved by at most a tenth of its margin and lies in its recorded interval up to rounding.

    Without a recorded interval no seed differed, and no seed may differ.
    """
    found, margin = new["mean_difference"], old["margin"]
    rounding = 0.0 if math.isnan(margin) else BEYOND * margin
    inside = old["ci_low"] - rounding <= found <= old["ci_high"] + rounding
    near = math.isnan(margin) or abs(found - old["mean_difference"]) <= OF_MARGIN * margin
    return bool(inside and near)


# --- in the README


def markdown(table: pd.DataFrame) -> list[str]:
    """Return a row for each loss of each trial, then a line for each trial about its reference and controls."""
    shown: Sequence[Any] = table[table["metric"].isin(["nll", ""]) & (table["kind"] == "candidate")].to_dict("records")
    levels = sorted({f"{100 * (1 - row['level']):g} %" for row in shown if row["metric"]})
    interval = f"NLL: mean log ratio [{', '.join(levels)} interval]"
    lines = [
        f"| trial | loss | verdict | objective | first steps | outcome | {interval} | expected |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return [
        *lines,
        *map(_line, shown),
        "",
        *(_beside(str(name), of) for name, of in table.groupby("trial", sort=False)),
    ]


def _line(row: Row) -> str:
    verdict, objective, first, outcome = (
        row[name].replace("_", " ") for name in ("verdict", "objective", "first_steps", "outcome")
    )
    failed = f", {row['failures']} seeds failed" if row["failures"] != "0" else ""
    needed = f", {row['seeds_needed']} seeds would decide" if row["seeds_needed"].isdecimal() else ""
    held = {"True": " holds", "False": " **does not hold**", "": ""}[row["confirmed"]]
    cells = [
        row["trial"], f"`{row['loss']}`", verdict, objective, first, f"{outcome}{failed}{needed}", _interval(row),
        f"{row['expected'] or '-'}{held}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _interval(row: Row) -> str:
    found = f"{row['mean_difference']:+.2g}" if row["mean_difference"] else "0"
    return found if math.isnan(row["ci_low"]) else f"{found} [{row['ci_low']:+.2g}, {row['ci_high']:+.2g}]"


def _beside(trial: str, rows: pd.DataFrame) -> str:
    reference: Sequence[Any] = rows[rows["kind"] == "reference"].to_dict("records")
    reached = {row["metric"]: f"{row['mean']:.4g} (SD {row['sd']:.2g})" for row in reference}
    controls: Sequence[Any] = rows[rows["kind"] == "control"].drop_duplicates("loss").to_dict("records")
    parts = []
    if reached:
        loss = reference[0]["loss"]
        parts.append(f"the reference `{loss}` reaches a test NLL of {reached['nll']}, accuracy {reached['accuracy']}")
    if controls:
        parts.append("controls: " + ", ".join(f"{row['loss']} {row['outcome']}" for row in controls))
    return f"* {trial}: {'; '.join(parts)}."
