"""The conclusion of a trial from its cells alone: verdict, report and checkpoints."""

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
from pipeline.verdict.outcomes import own_controls
from pipeline.verdict.plan import AnalysisPlan, TrialContext, look_at, wanted, wanted_controls
from pipeline.verdict.plan import record as record_look
from pipeline.verdict.verdict import audit_in_force, decide

Cells = dict[Replica, Cell]


def all_wanted(plan: AnalysisPlan) -> list[Replica]:
    return [*wanted(plan), *wanted_controls(plan)]


def read_cells(folder: TrialFolder, replicas: Sequence[Replica]) -> Cells:
    found = ((replica, folder.read(replica)) for replica in replicas)
    return {replica: cell for replica, cell in found if cell is not None}


def conclude(
    folder: TrialFolder, plan: AnalysisPlan, context: TrialContext, recorder: Recorder | None = None
) -> tuple[ExitCode, dict[str, Any]]:
    """Verdict, report and checkpoints from the cells alone; prints the table, returns exit code and verdict.

    Whatever holds of the others, a run that is missing makes it `BUG`.
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
            f"alpha={look.alpha:g} and looks={look.declared} hold, which the first verdict in {folder.path} declared; "
            "to declare others, choose a new folder (hydra.run.dir=DIR)"
        )
    known = cells | own_controls(controls, cells, plan)
    audit = read_audit(folder.path)
    verdict = decide(known, plan, context, _header(folder, cells), audit, look, folder.damaged)
    words = {entry["loss"]: entry["outcome"] for entry in verdict["comparisons"]}
    record_look(folder.path, look, plan.seeds, plan.question, words)
    found = ReportData(
        verdict=verdict,
        history=trial_history(cells, plan),
        differences=differences(known, plan, context),
        distances=distances(known, plan),
        between_seeds=between_seeds(known, plan),
        audit=audit_in_force(audit, known, plan),
        command=context.command,
    )
    write_json(folder.path / "verdict.json", verdict)
    folder.write_history(found.history)
    folder.export_checkpoints(list(cells.values()))
    write_report(folder.path, found)
    show_verdict(verdict)
    recorded = None
    if recorder is not None:
        recorder.conclude(report_run(folder, verdict, cells.values()))
        recorded = recorder.shortfall or recorder.page
    code = print_summary(verdict, folder.path, recorded)
    if lost := [replica for replica in all_wanted(plan) if replica not in cells | controls]:
        announce_lost(lost)
        code = ExitCode.BUG
    return code, verdict


def _header(folder: TrialFolder, cells: Cells) -> dict[str, Any]:
    """What the verdict is about, from the cells."""
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
