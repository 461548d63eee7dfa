"""Count the seeds of each loss that end below a test accuracy of .9.

python -m experiments.negative_controls.stuck

Reads outputs/negative_controls/outcome, which the README's commands write.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from likelihood_lab.errors import UsageError
from pipeline.entry import ExitCode, run_and_report

TRIAL = Path(__file__).resolve().parents[2] / "outputs" / "negative_controls" / "outcome"
LOW = 0.9


def counts(history: pd.DataFrame) -> pd.Series[int]:
    """Return for each loss the number of seeds with a low last test accuracy."""
    accuracy = history[history["metric"] == "test/accuracy"].sort_values("step")
    last = accuracy.groupby(["loss", "seed"])["value"].last()
    return (last < LOW).groupby("loss").sum()


def main() -> ExitCode:
    """Print the table."""
    path = TRIAL / "history.parquet"
    if not path.exists():
        raise UsageError(f"{TRIAL} holds no trial; run the commands of experiments/negative_controls/README.md")
    print("| loss | seeds below .9 |\n|---|---|")
    for loss, count in counts(pd.read_parquet(path)).items():
        print(f"| `{loss}` | {count} |")
    return ExitCode.HOLDS


if __name__ == "__main__":
    sys.exit(run_and_report(main))
