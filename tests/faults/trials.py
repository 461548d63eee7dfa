"""Trials for the drills, as commands, and what of them is in a store."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.storage.cells import Cell, TrialFolder
from pipeline.tracking.tracker import Tracker

QUICK = ("trainer=cpu", "model.hidden=[16]", "audit=false", "controls=none", "loss=[ce,nll,brier]")


def begin(folder: Path, environment: Mapping[str, str], seeds: int, *overrides: str) -> subprocess.Popen[str]:
    """A trial of three losses in `folder`, begun; a tile is a seed."""
    asked = [*QUICK, f"seed={list(range(seeds))}", "trainer.tile=3", *overrides, f"hydra.run.dir={folder}"]
    command = [sys.executable, "-m", "pipeline.train", *asked]
    return subprocess.Popen(command, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(*trials: subprocess.Popen[str]) -> list[str]:
    """What they said; all must have ended well."""
    said = [trial.communicate()[0] for trial in trials]
    for trial, text in zip(trials, said, strict=True):
        assert trial.returncode == 0, text
    return said


def synced(folder: Path, environment: Mapping[str, str]) -> str:
    command = [sys.executable, "-m", "pipeline.sync", str(folder)]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def cells(folder: Path) -> list[Cell]:
    return TrialFolder(folder).cells()


def check_whole(tracker: Tracker, folders: Sequence[Path]) -> None:
    """Every cell and report exactly once, FINISHED, with every point that a chart can show; and nothing else."""
    tracker.open()
    found: list[Any] = list(tracker._search("tags.sweep != ''"))
    assert {run.info.status for run in found} == {"FINISHED"}
    names = Counter((run.data.tags["sweep"], run.info.run_name) for run in found)
    trained = {(folder.name, f"{c.record.arm}/s{c.record.seed}"): c for folder in folders for c in cells(folder)}
    assert names == Counter([*trained, *((folder.name, f"{folder.name}/report") for folder in folders)])
    for run in found:
        cell = trained.get((run.data.tags["sweep"], run.info.run_name))
        if cell is not None:
            for metric, points in cell.history.groupby("metric"):
                finite = [(int(p.step), float(p.value)) for p in points.itertuples() if math.isfinite(p.value)]
                sent = tracker._client.get_metric_history(run.info.run_id, str(metric))
                assert sorted((p.step, p.value) for p in sent) == sorted(finite)
