"""One sweep through every launcher: the same verdict from the same weights, also where a job was killed on the way."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.pipeline.trial.test_shared_trials import ROOT, arms
from tests.trials import same_bits, verdict, weights

pytestmark = pytest.mark.faults

LAUNCHERS = {"basic": (), "joblib": ("hydra.launcher.n_jobs=2",), "submitit_local": ()}
ASKED = (
    "loss=ce,nll", "seed=range(6)", "hydra.sweeper.replicas_per_job=4", "controls=all", "trainer=cpu", "expect=same",
)  # fmt: skip
SHARES = ["share=[0,1]", "share=[2,3]", "share=[4,5]", "share=[]"]


def started(folder: Path, launcher: str) -> subprocess.Popen[str]:
    """A sweep with audit, controls and tracking, all of it in a folder of its own."""
    command = [
        sys.executable, "-m", "pipeline.train", "-m", *ASKED, f"hydra/launcher={launcher}", *LAUNCHERS[launcher],
        f"hydra.sweep.dir={folder}", f"tracking.uri=sqlite:///{folder}.db",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(sweep: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = sweep.communicate(timeout=500)
    return sweep.returncode, said


def trial_of(folder: Path) -> Path:
    (path,) = folder.glob("digits-mlp-*")
    return path


def jobs(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "sweep.json").read_text())["jobs"])


def recorded(folder: Path) -> list[tuple[str, str]]:
    """Name and status of the runs in MLflow."""
    with sqlite3.connect(f"{folder}.db") as database:
        return sorted(database.execute("select name, status from runs where lifecycle_stage = 'active'"))


def assert_alike(path: Path, reference: Path) -> None:
    """The same cells with the same weights, each recorded once, and the same verdict to the letter."""
    assert verdict(path) == verdict(reference)
    assert arms(path) == arms(reference)
    for arm, seeds in arms(reference).items():
        for seed in (int(name[1:]) for name in seeds):
            assert same_bits(weights(path, arm, seed), weights(reference, arm, seed)), f"{arm}/s{seed}"
    assert recorded(path.parent) == recorded(reference.parent)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One job after the other, undisturbed."""
    folder = tmp_path_factory.mktemp("launchers") / "basic"
    code, said = ended(started(folder, "basic"))
    assert code == 0, said
    assert [job["overrides"][-1] for job in jobs(folder)] == SHARES
    runs = [f"{arm}/{seed}" for arm, seeds in arms(trial_of(folder)).items() for seed in seeds]
    expected = [*runs, f"{trial_of(folder).name}/report"]
    assert recorded(folder) == sorted((name, "FINISHED") for name in expected)
    return trial_of(folder)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_every_launcher_gives_the_same_verdict(launcher: str, reference: Path, tmp_path: Path) -> None:
    code, said = ended(started(tmp_path / launcher, launcher))
    assert code == 0, said
    assert [(job["overrides"][-1], job["status"]) for job in jobs(tmp_path / launcher)] == [
        (share, "done") for share in SHARES
    ]
    assert_alike(trial_of(tmp_path / launcher), reference)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_killed_job_is_reported_and_the_same_command_brings_what_it_lost(
    launcher: str, reference: Path, tmp_path: Path
) -> None:
    folder = tmp_path / launcher
    sweep = started(folder, launcher)
    while sweep.poll() is None and not list(folder.glob("*/.training/s4")):  # the third share has begun to train
        time.sleep(0.05)
    holder_of("s4", sweep.pid, trial_of(folder)).kill()
    code, said = ended(sweep)
    assert code == 3, said
    assert "unknown: " in said
    assert {job["status"] for job in jobs(folder)[:3]} == {"unknown"}
    assert {entry["outcome"] for entry in verdict(trial_of(folder))["comparisons"]} == {"inconclusive"}
    lost = {failure["seed"] for entry in verdict(trial_of(folder))["comparisons"] for failure in entry["failures"]}
    assert {4, 5} <= lost
    code, said = ended(started(folder, launcher))
    assert code == 0, said
    assert_alike(trial_of(folder), reference)


def holder_of(seed: str, sweep: int, path: Path) -> psutil.Process:
    """The job of a sweep that has the lock of a seed's cells open."""
    for process in psutil.Process(sweep).children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if any(file.path == str(path / ".training" / seed) for file in process.open_files()):
                return process
    raise AssertionError(f"no job trains {seed}")
