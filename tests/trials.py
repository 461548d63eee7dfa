"""Helpers for tests of whole trials: run one in this process or as a command, and read what it left."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from likelihood_lab.errors import UsageError
from pipeline import train
from pipeline.config import schema as conf
from pipeline.config.hydra_glue import run_entry_point
from pipeline.config.validate import validate
from pipeline.entry import ExitCode
from pipeline.replica import Replica
from pipeline.storage.cells import TrialFolder
from pipeline.trial.run import run
from pipeline.trial.tiles import weights_sha256

ROOT = Path(__file__).parents[1]
FAST = ("tracking=none", "trainer=cpu", "epochs=2", "model.hidden=[16]", "audit=false", "protocol.controls=none")
# The smallest trial: two losses, one layer, one epoch.
QUICK = (
    "loss=[ce,nll]", "model=softmax_regression", "trainer=cpu", "tracking=none", "epochs=1", "audit=false",
    "protocol.controls=none",
)  # fmt: skip


def compose(*overrides: str, base: tuple[str, ...] = FAST) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        cfg = hydra_compose("train", overrides=[*base, *overrides])
    validate(cfg)
    return conf.plain(cfg)


def trial(path: Path, *overrides: str) -> ExitCode:
    return run(compose(*overrides), path, "the command")


def start_command(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `python -m pipeline.train`; its output and errors are one text."""
    command = [sys.executable, "-m", "pipeline.train", *arguments]
    own = dict(environment) if environment is not None else os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def weights(path: Path, arm: str, seed: int) -> dict[str, torch.Tensor]:
    cell = TrialFolder(path).read(Replica(arm, seed))
    assert cell is not None, f"{arm}/s{seed} is missing"
    return cell.weights


def hashes(path: Path) -> dict[str, str]:
    """Return the hash of the weights in each undamaged cell, controls included, by `arm/sSEED`."""
    cells = [cell for kind in ("cells", "controls") for cell in TrialFolder(path).cells(kind)]
    return {f"{cell.record.arm}/s{cell.record.seed}": weights_sha256(cell.weights) for cell in cells}


def verdict(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((path / "verdict.json").read_text())
    return loaded


def comparisons(path: Path) -> dict[str, dict[str, Any]]:
    return {entry["loss"]: entry for entry in verdict(path)["comparisons"]}


def words(path: Path) -> dict[str, str]:
    return {loss: entry["verdict"] for loss, entry in comparisons(path).items()}


def usage_error(action: Callable[[], object]) -> str:
    """Return the message of the UsageError that `action` raises; it must be one line."""
    with pytest.raises(UsageError) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600
    return line


def command_error(folder: Path, *arguments: str) -> str:
    """Run `pipeline.train` in this process and return its one line on stderr.

    The exit code must be 2, stdout empty, and `folder`, the working directory and store, unchanged.
    """
    before = sorted(folder.rglob("*"))
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("HYDRA_FULL_ERROR", "1")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/runs.db")
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as left:
            run_entry_point(train.task)
    line = err.getvalue()
    assert left.value.code == ExitCode.USAGE, f"{arguments}: {line}"
    assert out.getvalue() == "", arguments
    assert line.startswith(("error: ", "failed: ")), arguments
    assert line.count("\n") == 1, f"{arguments}: {line}"
    assert sorted(folder.rglob("*")) == before, "a refused request leaves neither a folder nor a run"
    return line.rstrip("\n")


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """Mount a file system of this size at `place`; skip the test where that is not permitted."""
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here: run as root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)  # noqa: S607
