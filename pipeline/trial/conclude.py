"""Verdict, report and checkpoints of a trial, computed from its cells alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from likelihood_lab.errors import UsageError
from pipeline.config import schema as conf
from pipeline.console import console
from pipeline.entry import ExitCode
from pipeline.replica import Replica
from pipeline.reporting.tables import between_seeds, differences, distances, trial_history
from pipeline.storage.cells import Cell, TrialFolder
from pipeline.storage.files import write_json
from pipeline.tracking.recorder import Recorder
from pipeline.tracking.runs import report_run
from pipeline.trial.audit_step import read_audit
from pipeline.trial.console import announce_damaged, announce_lost, print_summary, show_verdict
from pipeline.verdict.audit_entry import Audit, audit_in_force
from pipeline.verdict.outcomes import TrialResults, own_controls
from pipeline.verdict.plan import AnalysisPlan, TrialContext, look_at, wanted, wanted_controls
from pipeline.verdict.plan import record as record_look
from pipeline.verdict.results import Verdict
from pipeline.verdict.verdict import check_expectations, decide

Cells = dict[Replica, Cell]


def all_wanted(plan: AnalysisPlan) -> list[Replica]:
    return [*wanted(plan), *wanted_controls(plan)]


def read_cells(folder: TrialFolder, replicas: Sequence[Replica]) -> Cells:
    found = ((replica, folder.read(replica)) for replica in replicas)
    return {replica: cell for replica, cell in found if cell is not None}


def conclude(
    folder: TrialFolder, plan: AnalysisPlan, context: TrialContext, recorder: Recorder | None = None
) -> tuple[ExitCode, Verdict]:
    """Write verdict, report and checkpoints, print the table, and return exit code and verdict.

    The exit code is `BUG` if any requested run is missing, regardless of the other results.
    """
    from pipeline.reporting.figures import write_report
    from pipeline.reporting.page import ReportData

    cells, controls = read_cells(folder, wanted(plan)), read_cells(folder, wanted_controls(plan))
    announce_damaged(folder.damaged)
    if not cells:
        raise UsageError(f"{folder.path} holds no finished run; train first")
    look = look_at(folder.path, plan.seeds, plan.question, plan.alpha, plan.looks)
    if (look.alpha, look.declared) != (plan.alpha, plan.looks):
        console.print(
            f"using alpha={look.alpha:g} and looks={look.declared}, as declared by the first verdict in {folder.path}; "
            "to change them, choose a new folder (hydra.run.dir=DIR)"
        )
    results = TrialResults(cells | own_controls(controls, cells, plan), plan, context, look, folder.damaged)
    audit = None if (content := read_audit(folder.path)) is None else Audit.from_json(content)
    verdict = decide(results, _header(folder, cells), audit)
    words = {comparison.loss: comparison.outcome for comparison in verdict.comparisons}
    record_look(folder.path, look, plan.seeds, plan.question, words)
    data = ReportData(
        verdict=verdict,
        history=trial_history(results),
        differences=differences(results),
        distances=distances(results),
        between_seeds=between_seeds(results),
        audit=audit_in_force(audit, results),
        command=context.command,
    )
    write_json(folder.path / "verdict.json", verdict.to_json())
    folder.write_history(data.history)
    folder.export_checkpoints(list(cells.values()))
    write_report(folder.path, data)
    show_verdict(verdict)
    recorded = None
    if recorder is not None:
        recorder.conclude(report_run(folder, verdict, cells.values()))
        recorded = recorder.shortfall or recorder.page
    entries = [(row.loss, row.verdict, row.expected, row.confirmed) for row in verdict.comparisons]
    code, lines = check_expectations(entries)
    print_summary(folder.path, recorded, lines)
    if lost := [replica for replica in all_wanted(plan) if replica not in cells | controls]:
        announce_lost(lost)
        code = ExitCode.BUG
    return code, verdict


def _header(folder: TrialFolder, cells: Cells) -> dict[str, Any]:
    """Fields of the verdict that describe the trial."""
    record = next(iter(cells.values())).record
    made = record.made_from
    engine = {"engine": record.engine, "tile": made["engine"]["tile"], "threads": made["threads"]}
    return {
        "sweep": folder.path.name,
        "dataset": conf.short_name(made["dataset"]["_target_"]),
        "model": conf.short_name(made["model"]["_target_"]),
        "optimizer": made["optimizer"],
        "precision": made["precision"],
        "vary": made.get("vary", "all"),
        "environment": {**record.environment, **engine},
    }
