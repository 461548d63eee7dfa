"""One audit from configuration to exit code: the findings, then the table, JSON and pictures."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pipeline import config as conf
from pipeline.audit_figures import write_audit_figures
from pipeline.audited import AuditSettings, audit_losses
from pipeline.auditing.deciding import SAMENESS
from pipeline.cells import refusing_disk_errors, write_json
from pipeline.errors import UsageError
from pipeline.exit_codes import ExitCode
from pipeline.recording import Recorder, tracker_of
from pipeline.runs import content_tag
from pipeline.terminal import closing_audit, show_audit
from pipeline.tracking import Run, git_state

Config = Mapping[str, Any]


def run(config: Config, folder: Path) -> ExitCode:
    """Audit the chosen losses, write `audit.json` and the pictures, and print the table.

    Args:
        config: the resolved configuration, checked.
    """
    started = time.time()
    if (folder / "request.yaml").exists():
        raise UsageError(f"{folder} holds a trial, whose audit this would replace; choose another hydra.run.dir")
    _check_device(config["device"])
    torch.set_num_threads(1)
    reference = conf.reference_of(config)
    recorder = Recorder(tracker_of(config["tracking"]), folder, "the same command again sends them")
    recorder.open()  # before the losses are asked, so that a wrong address is told at once
    settings = AuditSettings(**{name: config[name] for name in AuditSettings.__dataclass_fields__})
    if settings.soft_targets and not any("target_probs" in loss["args"] for loss in config["loss"].values()):
        raise UsageError("soft_targets=true, but no chosen loss takes target_probs; add one that does, such as ce_soft")
    audit = audit_losses(config["loss"], reference, settings)
    expected = conf.expectations_of(config)
    for name, entry in audit["losses"].items():
        word, same = expected.get(name), entry["objective"] in SAMENESS
        entry |= {"expected": word, "confirmed": word and (same if word == "same" else word == entry["objective"])}
    with refusing_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "audit.json", audit)
    pictures = write_audit_figures(folder, audit)
    report = _report_run(audit, folder, pictures, started)
    recorder.offer({report.content: lambda: report})
    show_audit(audit)
    return closing_audit(audit, folder, recorder.shortfall)


def _check_device(device: str) -> None:
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"device={device}; choose cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device={device}, but torch finds no CUDA device; choose device=cpu")


def _report_run(audit: Config, folder: Path, pictures: list[Path], started: float) -> Run:
    words = {f"objective.{name}": entry["objective"] for name, entry in audit["losses"].items()}
    identity = {"kind": "report", "sweep": folder.name, "fingerprint": "audit"}
    artifacts = {"audit.json": folder / "audit.json"} | {f"figures/{path.name}": path for path in pictures}
    return Run(
        name=f"{folder.name}/report",
        tags=identity | words | content_tag(artifacts) | git_state(conf.ROOT),
        params={"reference": audit["reference"], "losses": ", ".join(audit["losses"])},
        metrics=pd.DataFrame(columns=["metric", "step", "value"]),
        started=started,
        ended=time.time(),
        artifacts=artifacts,
    )
