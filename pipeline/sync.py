"""Entry point: send MLflow what it lacks of a trial's folder.

python -m pipeline.sync outputs/digits-mlp-1f2e3d4c

The store is that of MLFLOW_TRACKING_URI, else the one that the trial was to be recorded in.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from likelihood_lab.errors import UsageError
from pipeline.entry import ExitCode, run_and_report

if TYPE_CHECKING:
    from pipeline.storage.cells import TrialFolder
    from pipeline.tracking.tracker import Tracker

USAGE = "usage: python -m pipeline.sync DIR"


def sync(arguments: list[str]) -> ExitCode:
    """Send every whole cell and the last report, each once, whatever is left there of a process that was killed."""
    from pipeline.config import schema as conf
    from pipeline.storage.cells import TrialFolder
    from pipeline.tracking.tracker import StoreError, Tracker
    from pipeline.verdict.plan import read_tracking

    if len(arguments) != 1:
        raise UsageError(USAGE)
    folder = TrialFolder(Path(arguments[0]))
    where = read_tracking(folder.path)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or where.get("uri")
    tracker = Tracker(uri, where.get("experiment", conf.TrackingConf.experiment), conf.ROOT)
    with folder.locked():
        try:
            print(_send(folder, tracker))
        except StoreError as error:
            raise UsageError(f"{error}: start it, or name another in MLFLOW_TRACKING_URI") from error
    return ExitCode.HOLDS


def _send(folder: TrialFolder, tracker: Tracker) -> str:
    """What was sent, in one line."""
    from pipeline.tracking.runs import cell_run, report_run
    from pipeline.verdict.plan import read_plan
    from pipeline.verdict.results import Verdict

    reference = read_plan(folder.path)[0].reference
    tracker.open()
    held = tracker.present(folder.path.name)
    cells = [*folder.cells(), *folder.cells("controls")]
    runs = [cell_run(cell, folder, reference) for cell in cells if cell.record.fingerprint not in held]
    concluded = (folder.path / "report.html").exists()
    if concluded:
        try:
            content = json.loads((folder.path / "verdict.json").read_text())
            report = report_run(folder, Verdict.from_json(content), cells)
        except (FileNotFoundError, ValueError) as error:
            line = f"the verdict or report in {folder.path} is damaged or gone"
            raise UsageError(f"{line}: `make report DIR={folder.path}` makes it again") from error
        runs += [report] if report.content not in held else []
    tracker.record(runs)
    tracker.link(folder.path.name)
    total, damaged = len(cells) + concluded, len(folder.damaged)
    line = f"{tracker} held {total - len(runs)} of {total} runs, {len(runs)} were sent"
    return line + (f"; {damaged} of its cells damaged: train again" if damaged else "")


def main() -> None:
    """Console script."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(USAGE)
        sys.exit(0)
    sys.exit(run_and_report(lambda: sync(sys.argv[1:])))


if __name__ == "__main__":
    main()
