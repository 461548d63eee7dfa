"""Build the MLflow runs of cells and reports."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.config import schema as conf
from pipeline.replica import Replica, is_control
from pipeline.runtime import git_state
from pipeline.storage.cells import Cell, TrialFolder, gaps
from pipeline.tracking.mlflow_store import Run
from pipeline.verdict.results import Verdict

DIGESTS = ("data_digest", "loss_code", "model_code")  # long, and needed by the fingerprint only


def cell_run(cell: Cell, folder: TrialFolder, reference: str) -> Run:
    """Return the run of a cell, with its distance to the reference of the same seed."""
    record, made = cell.record, cell.record.made_from
    tags = {
        "loss": record.arm,
        "seed": str(record.seed),
        "model": conf.short_name(made["model"]["_target_"]),
        "dataset": conf.short_name(made["dataset"]["_target_"]),
        "kind": "control" if is_control(record.arm) else "train",
        "status": "ok" if record.diverged_at is None else "diverged",
        "sweep": folder.path.name,
        "fingerprint": record.fingerprint,
        "weights.sha256": record.weights_sha256,
        "engine": record.engine,
        "device": made["device"],
        "torch": made["torch"],
        **_code(),
    }
    settings = {key: value for key, value in made.items() if key not in (*DIGESTS, "loss")}
    distances = gaps(cell, folder.read(Replica(reference, record.seed)))
    return Run(
        name=f"{record.arm}/s{record.seed}",
        tags=tags,
        params={"loss": record.arm, "seed": str(record.seed)}
        | _flat({key: made["loss"][key] for key in ("fn", "args", "lr_scale") if key in made["loss"]}, "loss.")
        | _flat(settings),
        metrics=pd.concat([cell.history, distances], ignore_index=True) if len(distances) else cell.history,
        started=record.started,
        ended=record.ended,
        dataset=(tags["dataset"], made["data_digest"]),
        artifacts={"config.yaml": cell.folder / "config.yaml"},
    )


def report_run(folder: TrialFolder, verdict: Verdict, cells: Iterable[Cell]) -> Run:
    """Return the run of a trial's verdict, report and history."""
    records = [cell.record for cell in cells]
    words = {f"verdict.{comparison.loss}": comparison.verdict for comparison in verdict.comparisons}
    identity = {"kind": "report", "sweep": folder.path.name, "fingerprint": "report"}
    about = {"model": verdict.model, "dataset": verdict.dataset}
    names = ["verdict.json", "report.html", "history.parquet"]
    names += ["audit.json"] if (folder.path / "audit.json").exists() else []
    names += [f"figures/{path.name}" for path in sorted((folder.path / "figures").glob("*.svg"))]
    artifacts = {name: folder.path / name for name in names}
    return Run(
        name=f"{folder.path.name}/report",
        tags=identity | about | words | content_tag(artifacts) | _code(),
        params={"reference": verdict.reference, "seeds": str(verdict.seeds)},
        metrics=pd.DataFrame(columns=["metric", "step", "value"]),
        started=min(record.started for record in records),
        ended=max(record.ended for record in records),
        artifacts=artifacts,
    )


def content_tag(artifacts: Mapping[str, Path]) -> dict[str, str]:
    """Return the digest of a report's files, which tells it from an earlier one of the same trial."""
    sha = hashlib.sha256()
    for name, path in artifacts.items():
        sha.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return {"content.sha256": sha.hexdigest()}


@functools.cache
def _code() -> dict[str, str]:
    """Return the git state at the first call; git takes as long as the training of a run."""
    return git_state(conf.ROOT)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings to dotted keys with text values."""
    flat: dict[str, str] = {}
    for key, entry in value.items():
        flat |= _flat(entry, f"{prefix}{key}.") if isinstance(entry, Mapping) else {f"{prefix}{key}": str(entry)}
    return flat
