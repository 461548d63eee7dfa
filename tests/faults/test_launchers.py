"""One sweep through every launcher gives the same weights and the same verdict, also after a job was killed."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.trials import comparisons, hashes, start_command, verdict

pytestmark = pytest.mark.faults

LAUNCHERS = {"basic": (), "joblib": ("hydra.launcher.n_jobs=2",), "submitit_local": ()}
REQUEST = (
    "loss=ce,nll", "seed=range(6)", "hydra.sweeper.replicas_per_job=4", "protocol.controls=all",
    "trainer=cpu", "expect=same",
)  # fmt: skip
SHARES = ["share=[0,1]", "share=[2,3]", "share=[4,5]", "share=[]"]


def start(folder: Path, launcher: str) -> subprocess.Popen[str]:
    """Start a sweep with audit, controls and tracking, all of it in its own folder."""
    return start_command(
        "-m", *REQUEST, f"hydra/launcher={launcher}", *LAUNCHERS[launcher], f"hydra.sweep.dir={folder}",
        f"tracking.uri=sqlite:///{folder}.db",
    )  # fmt: skip


def wait_for(sweep: subprocess.Popen[str], code: int) -> str:
    output, _ = sweep.communicate(timeout=500)
    assert sweep.returncode == code, output
    return output


def trial_of(folder: Path) -> Path:
    (path,) = folder.glob("digits-mlp-*")
    return path


def jobs(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "sweep.json").read_text())["jobs"])


def recorded(folder: Path) -> list[tuple[str, str]]:
    """Return name and status of the runs in MLflow."""
    with sqlite3.connect(f"{folder}.db") as database:
        return sorted(database.execute("select name, status from runs where lifecycle_stage = 'active'"))


def assert_alike(path: Path, reference: Path) -> None:
    """The trials have the same weights in every cell, the same recorded runs and the same verdict."""
    assert verdict(path) == verdict(reference)
    assert hashes(path) == hashes(reference)
    assert recorded(path.parent) == recorded(reference.parent)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One job after the other, undisturbed."""
    folder = tmp_path_factory.mktemp("launchers") / "basic"
    wait_for(start(folder, "basic"), 0)
    assert [job["overrides"][-1] for job in jobs(folder)] == SHARES
    path = trial_of(folder)
    assert recorded(folder) == sorted((name, "FINISHED") for name in [*hashes(path), f"{path.name}/report"])
    return path


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_every_launcher_gives_the_same_verdict(launcher: str, reference: Path, tmp_path: Path) -> None:
    wait_for(start(tmp_path / launcher, launcher), 0)
    done = [(job["overrides"][-1], job["status"]) for job in jobs(tmp_path / launcher)]
    assert done == [(share, "done") for share in SHARES]
    assert_alike(trial_of(tmp_path / launcher), reference)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_killed_job_is_reported_and_made_up_for(launcher: str, reference: Path, tmp_path: Path) -> None:
    """The sweep reports the lost runs as a failure; the same command trains them."""
    folder = tmp_path / launcher
    sweep = start(folder, launcher)
    while sweep.poll() is None and not list(folder.glob("*/.training/s4")):  # the third share has begun to train
        time.sleep(0.05)
    job_of_seed("s4", sweep.pid, trial_of(folder)).kill()
    assert "unknown: " in wait_for(sweep, 3)
    assert {job["status"] for job in jobs(folder)[:3]} == {"unknown"}
    entries = comparisons(trial_of(folder)).values()
    assert {entry["outcome"] for entry in entries} == {"inconclusive"}
    assert {4, 5} <= {failure["seed"] for entry in entries for failure in entry["failures"]}
    wait_for(start(folder, launcher), 0)
    assert_alike(trial_of(folder), reference)


def job_of_seed(seed: str, sweep: int, path: Path) -> psutil.Process:
    """Return the job of a sweep that holds the lock of a seed's cells."""
    for process in psutil.Process(sweep).children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if any(file.path == str(path / ".training" / seed) for file in process.open_files()):
                return process
    raise AssertionError(f"no job trains {seed}")
