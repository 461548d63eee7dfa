"""Trials that several jobs share: each trains the cells of its own seeds into one folder, and one concludes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from likelihood_lab.errors import UsageError
from pipeline.entry import ExitCode
from pipeline.report import report
from pipeline.storage.cells import TrialFolder
from tests.pipeline.trial.test_budget import failing
from tests.trials import FAST, same_bits, trial, verdict, weights

ASKED = ("loss=[ce,nll,brier]", "seed=[0,1,2]", "controls=all")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same trial by one job."""
    path = tmp_path_factory.mktemp("alone") / "t"
    trial(path, *ASKED)
    return path


def arms(path: Path) -> dict[str, list[str]]:
    """What is there of each loss and control."""
    found: dict[str, list[str]] = {}
    for cell in sorted([*path.glob("cells/*/*"), *path.glob("controls/*/*")]):
        found.setdefault(cell.parent.name, []).append(cell.name)
    return found


def test_shares_train_their_own_seeds_and_one_job_concludes_as_a_trial_alone_does(alone: Path, tmp_path: Path) -> None:
    path = tmp_path / "t"
    assert trial(path, *ASKED, "share=[2,0]") == ExitCode.HOLDS
    assert arms(path)["nll"] == arms(path)["dose"] == ["s0", "s2"]
    assert arms(path)["replay"] == ["s0"]
    assert not (path / "verdict.json").exists()
    assert trial(path, *ASKED, "share=[1]") == ExitCode.HOLDS
    assert trial(path, *ASKED, "share=[]") == ExitCode.HOLDS
    assert arms(path) == arms(alone)
    assert verdict(path) == verdict(alone)
    for arm, seeds in arms(alone).items():
        for seed in seeds:
            assert same_bits(weights(path, arm, int(seed[1:])), weights(alone, arm, int(seed[1:])))


def test_what_a_share_has_not_brought_is_named_and_trained_by_the_same_command(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t"
    trial(path, *ASKED, "share=[0,1]")
    assert trial(path, *ASKED, "share=[]", "expect={brier: different}") == ExitCode.BUG
    assert "missing (ce/s2, nll/s2, brier/s2, " in capsys.readouterr().out
    for entry in verdict(path)["comparisons"]:
        assert [failure["seed"] for failure in entry["failures"]] == [2]
        assert entry["outcome"] == "inconclusive"
    assert report([str(path)]) == ExitCode.BUG
    assert "missing (ce/s2, nll/s2, brier/s2, " in capsys.readouterr().out
    trial(path, *ASKED, "share=[2]")
    assert trial(path, *ASKED, "share=[]") == ExitCode.HOLDS
    assert verdict(path) == verdict(alone)


def test_nothing_to_conclude_on_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no finished run; train first"):
        trial(tmp_path / "t", *ASKED, "share=[]")


def test_a_seed_is_trained_by_one_job_at_once(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with TrialFolder(tmp_path / "t").training([0]):
        trial(tmp_path / "t", *ASKED, "share=[1]")
        for other in ("share=[0,2]", "share=[]", "share=null"):
            with pytest.raises(UsageError, match="is in use by another process"):
                trial(tmp_path / "t", *ASKED, other)
    assert arms(tmp_path / "t")["ce"] == ["s1"]


def test_where_one_share_ran_out_of_memory_another_goes_on_with_its_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = failing(monkeypatch, above=3)
    read, stale = TrialFolder.tile.fget, iter([None])  # the second share begins before the first has found out
    asked = ("loss=[ce,nll]", "seed=[0,1,2,3,4,5]", "trainer.tile=6")
    trial(tmp_path / "t", *asked, "share=[0,1,2]")
    assert read is not None
    monkeypatch.setattr(TrialFolder, "tile", property(lambda self: next(stale, read(self))))
    trial(tmp_path / "t", *asked, "share=[3,4,5]")
    assert tried.count(6) == 2
    assert trial(tmp_path / "t", *asked, "share=[]") == ExitCode.HOLDS
    assert verdict(tmp_path / "t")["comparisons"][0]["failures"] == []


def test_the_job_that_concludes_goes_on_until_it_is_decided(tmp_path: Path) -> None:
    asked = ("loss=[ce,nll_softmax]", "seed=[0,1,2,3,4]", "looks=2", "until=decided", "about=outcome")
    trial(tmp_path / "t", *asked, "share=[0,1]")
    trial(tmp_path / "t", *asked, "share=[2,3,4]")
    assert trial(tmp_path / "t", *asked, "share=[]", "expect=equivalent") == ExitCode.HOLDS
    assert verdict(tmp_path / "t")["seeds"] == list(range(10))


@pytest.mark.parametrize("share", ["[3]", "1", "[true]", "[1.0]", "all"])
def test_a_share_is_some_of_the_seeds(tmp_path: Path, share: str) -> None:
    with pytest.raises(UsageError, match=r"share=.*; give a list of some of the seeds \(0, 1, 2\), or null"):
        trial(tmp_path / "t", *ASKED, f"share={share}")


def swept(folder: Path, launcher: str, *overrides: str) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """A sweep from the command line: its exit code, the jobs in sweep.json, and the verdict."""
    asked = [*FAST, *overrides, f"hydra.sweep.dir={folder}", f"hydra/launcher={launcher}"]
    command = [sys.executable, "-m", "pipeline.train", "-m", *asked]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    jobs = json.loads((folder / "sweep.json").read_text())["jobs"]
    (path,) = folder.glob("digits-mlp-*")
    return done.returncode, jobs, verdict(path)


def test_a_sweep_through_joblib_is_one_trial_with_one_verdict(tmp_path: Path) -> None:
    asked = ("loss=nll,ce", "seed=range(4)", "expect=same")
    code, jobs, found = swept(tmp_path / "joblib", "joblib", *asked, "hydra.launcher.n_jobs=2",
                              "hydra.sweeper.replicas_per_job=4")  # fmt: skip
    assert (code, [job["overrides"][-1] for job in jobs]) == (0, ["share=[0,1]", "share=[2,3]", "share=[]"])
    path = tmp_path / found["sweep"]
    assert trial(path, "loss=[nll,ce]", "seed=[0,1,2,3]", "expect=same") == ExitCode.HOLDS
    assert found == verdict(path)
    assert found["comparisons"][0]["outcome"] == "identical"
