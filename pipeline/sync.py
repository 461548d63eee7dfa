"""Entry point: send MLflow the missing runs of a trial's folder.

python -m pipeline.sync outputs/digits-mlp-1f2e3d4c

MLFLOW_TRACKING_URI names the store; without it, the runs go where the trial was to be recorded.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from likelihood_lab.errors import UsageError
from pipeline.entry import ExitCode, OneLineParser, run_and_report

if TYPE_CHECKING:
    from pipeline.storage.cells import TrialFolder
    from pipeline.tracking.tracker import Tracker


def sync(arguments: list[str]) -> ExitCode:
    """Send every undamaged run and the last report, each once; replace incomplete runs of a killed process."""
    description = "Send the missing runs to MLFLOW_TRACKING_URI, by default to the store that the trial was given."
    parser = OneLineParser(prog="python -m pipeline.sync", description=description)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the trial's folder")
    folder_path = parser.parse_args(arguments).folder

    from pipeline.config import schema as conf
    from pipeline.storage.cells import TrialFolder
    from pipeline.tracking.tracker import StoreError, Tracker
    from pipeline.verdict.plan import read_tracking

    folder = TrialFolder(folder_path)
    tracking = read_tracking(folder.path)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking.get("uri")
    tracker = Tracker(uri, tracking.get("experiment", conf.TrackingConf.experiment), conf.ROOT)
    with folder.locked():
        try:
            print(_send(folder, tracker))
        except StoreError as error:
            raise UsageError(f"{error}: start it, or name another in MLFLOW_TRACKING_URI") from error
    return ExitCode.HOLDS


def _send(folder: TrialFolder, tracker: Tracker) -> str:
    """Send the missing runs and return one line about them."""
    from pipeline.tracking.runs import cell_run, report_run
    from pipeline.verdict.plan import read_plan
    from pipeline.verdict.results import Verdict

    reference = read_plan(folder.path)[0].reference
    tracker.open()
    held = tracker.present(folder.path.name)
    cells = [*folder.cells(), *folder.cells("controls")]
    runs = [cell_run(cell, folder, reference) for cell in cells if cell.record.fingerprint not in held]
    has_report = (folder.path / "report.html").exists()
    if has_report:
        try:
            content = json.loads((folder.path / "verdict.json").read_text())
            report = report_run(folder, Verdict.from_json(content), cells)
        except (FileNotFoundError, ValueError) as error:
            line = f"the verdict or report in {folder.path} is damaged or missing"
            raise UsageError(f"{line}: `make report DIR={folder.path}` writes it again") from error
        runs += [report] if report.content not in held else []
    tracker.record(runs)
    tracker.link(folder.path.name)
    total, damaged = len(cells) + has_report, len(folder.damaged)
    line = f"{tracker} held {total - len(runs)} of {total} runs, {len(runs)} were sent"
    return line + (f"; damaged and not sent: {damaged}; train again" if damaged else "")


def main() -> None:
    """Console script."""
    sys.exit(run_and_report(lambda: sync(sys.argv[1:])))


if __name__ == "__main__":
    main()
