"""Command of an audit: write the findings as table, JSON and figures, and return the exit code."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich import box
from rich.table import Table

from likelihood_lab.audit.finding import SAME_FUNCTION, size_in_words
from likelihood_lab.errors import UsageError
from pipeline.config import schema as conf
from pipeline.console import console
from pipeline.entry import ExitCode
from pipeline.loss_audit.losses import AuditSettings, audit_losses
from pipeline.reporting.audit_figures import write_audit_figures
from pipeline.runtime import git_state
from pipeline.storage.files import write_json
from pipeline.text import MARKS, shortened
from pipeline.tracking.mlflow_store import Run
from pipeline.tracking.recorder import Recorder, tracker_of
from pipeline.tracking.runs import content_tag
from pipeline.verdict.verdict import check_expectations

Config = Mapping[str, Any]


def run(config: Config, folder: Path) -> ExitCode:
    """Audit the losses of a validated configuration, write `audit.json` and the figures, and print the table."""
    started = time.time()
    if (folder / "request.yaml").exists():
        raise UsageError(f"{folder} holds a trial, and its audit would be replaced; choose another hydra.run.dir")
    _check_device(config["device"])
    torch.set_num_threads(1)
    reference = conf.reference_of(config)
    recorder = Recorder(tracker_of(config["tracking"]), folder, "the same command sends them again")
    recorder.open()  # before the audit, so that an invalid address is refused at once
    settings = AuditSettings(**{name: config[name] for name in AuditSettings.__dataclass_fields__})
    if settings.soft_targets and not any("target_probs" in loss["args"] for loss in config["loss"].values()):
        raise UsageError("soft_targets=true, but no chosen loss takes target_probs; add one that does, such as ce_soft")
    audit = audit_losses(config["loss"], reference, settings)
    expected = conf.expectations_of(config)
    for name, entry in audit["losses"].items():
        word, same = expected.get(name), entry["objective"] in SAME_FUNCTION
        entry |= {"expected": word, "confirmed": word and (same if word == "same" else word == entry["objective"])}
    write_json(folder / "audit.json", audit)
    report = _report_run(audit, folder, write_audit_figures(folder, audit), started)
    recorder.offer({report.content: lambda: report})
    show_audit(audit)
    console.print(f"\naudit: {folder / 'audit.json'}, with figures in figures/")
    if recorder.shortfall is not None:
        console.print(recorder.shortfall)
    keys = ("objective", "expected", "confirmed")
    code, lines = check_expectations([(name, *map(entry.get, keys)) for name, entry in audit["losses"].items()])
    console.print("\n".join(lines))
    return code


def _check_device(device: str) -> None:
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"device={device}; choose cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device={device}, but torch finds no CUDA device; choose device=cpu")


def _report_run(audit: Config, folder: Path, figures: list[Path], started: float) -> Run:
    words = {f"objective.{name}": entry["objective"] for name, entry in audit["losses"].items()}
    identity = {"kind": "report", "sweep": folder.name, "fingerprint": "audit"}
    artifacts = {"audit.json": folder / "audit.json"} | {f"figures/{path.name}": path for path in figures}
    return Run(
        name=f"{folder.name}/report",
        tags=identity | words | content_tag(artifacts) | git_state(conf.ROOT),
        params={"reference": audit["reference"], "losses": ", ".join(audit["losses"])},
        metrics=pd.DataFrame(columns=["metric", "step", "value"]),
        started=started,
        ended=time.time(),
        artifacts=artifacts,
    )


def show_audit(audit: Config) -> None:
    """Print the table, the sentence of each loss, and the detection limits."""
    title = f"each loss against {audit['reference']}: is it the same function?"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in ("loss", "objective", "scale", "domain", "divides by", "expected"):
        table.add_column(column, no_wrap=True)
    for name, entry in audit["losses"].items():
        scale, limit, divided = entry["scale"], entry["domain"], entry["normaliser"]
        expected = f"{entry['expected'] or '-'}{MARKS[entry['confirmed']]}"
        table.add_row(
            name, entry["objective"], scale["formula"] if scale else "-",
            f"{limit['axis']} {limit['limit']:.4g}" if limit else "-",
            divided["divides_by"] if divided else "-", expected,
        )  # fmt: skip
    console.print()
    console.print(table)
    for name, entry in audit["losses"].items():
        console.print(f"{name}: {entry['sentence']}")
        for effect in entry["side_effects"]:
            console.print(f"  side effect: {effect}")
    groups: dict[str, list[str]] = {}
    for name, entry in audit["losses"].items():
        groups.setdefault(str(entry["would_have_caught"]), []).append(name)
    for names in groups.values():
        _show_detection_limits(audit["losses"][names[0]]["would_have_caught"], names if len(groups) > 1 else [])


def _show_detection_limits(limits: Mapping[str, Mapping[str, float | None]], names: Sequence[str]) -> None:
    """Print the smallest difference of each kind that the grid of these losses detects."""
    if not limits:
        return
    precisions = list(next(iter(limits.values())))
    title = "the smallest difference that would have been caught" + (f", for {shortened(names)}" if names else "")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", *precisions):
        table.add_column(column, no_wrap=True)
    for kind, sizes in limits.items():
        table.add_row(kind, *(size_in_words(sizes[precision]) for precision in precisions))
    console.print(table)
