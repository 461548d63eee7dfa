"""Trials that several jobs share: each trains its own seeds in one folder, and one job concludes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from pipeline.entry import ExitCode
from pipeline.report import report
from pipeline.storage.cells import TrialFolder
from tests.pipeline.trial.test_budget import limit_memory
from tests.trials import FAST, hashes, start_command, trial, usage_error, verdict

REQUEST = ("loss=[ce,nll,brier]", "seed=[0,1,2]", "protocol.controls=all")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same trial by one job."""
    path = tmp_path_factory.mktemp("alone") / "t"
    trial(path, *REQUEST)
    return path


def test_shared_seeds_give_the_trial_of_one_job(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing seeds are named by the job that concludes and by the report, until a job trains them."""
    path = tmp_path / "t"
    assert trial(path, *REQUEST, "share=[1,0]") == ExitCode.HOLDS
    arms = ("ce", "nll", "brier", "dose", "placebo_float64", "placebo_reordered")
    assert hashes(path).keys() == {f"{arm}/s{seed}" for arm in arms for seed in (0, 1)} | {"replay/s0"}
    assert not (path / "verdict.json").exists()
    assert trial(path, *REQUEST, "share=[]", "expect={brier: different}") == ExitCode.BUG
    assert "missing (ce/s2, nll/s2, brier/s2, " in capsys.readouterr().out
    for entry in verdict(path)["comparisons"]:
        assert [failure["seed"] for failure in entry["failures"]] == [2]
        assert entry["outcome"] == "inconclusive"
    assert report([str(path)]) == ExitCode.BUG
    assert "missing (ce/s2, nll/s2, brier/s2, " in capsys.readouterr().out
    assert trial(path, *REQUEST, "share=[2]") == ExitCode.HOLDS
    assert trial(path, *REQUEST, "share=[]") == ExitCode.HOLDS
    assert hashes(path) == hashes(alone)
    assert verdict(path) == verdict(alone)


@pytest.mark.parametrize("share", ["[3]", "1", "[true]", "[1.0]", "all", "[]"])
def test_a_wrong_share_is_refused(share: str, tmp_path: Path) -> None:
    some = "give a list of some of the seeds (0, 1, 2), or null"
    message = "holds no finished run; train first" if share == "[]" else some
    assert message in usage_error(lambda: trial(tmp_path / "t", *REQUEST, f"share={share}"))


def test_a_seed_is_trained_by_one_job_at_once(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with TrialFolder(tmp_path / "t").training([0]):
        trial(tmp_path / "t", "loss=[ce,nll]", "seed=[0,1,2]", "share=[1]")
        for other in ("share=[0,2]", "share=[]", "share=null"):
            line = usage_error(partial(trial, tmp_path / "t", "loss=[ce,nll]", "seed=[0,1,2]", other))
            assert "is in use by another process" in line
    assert hashes(tmp_path / "t").keys() == {"ce/s1", "nll/s1"}


def test_jobs_adopt_the_smaller_tile_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second job starts before the first has run out of memory and halved the tile."""
    sizes = limit_memory(monkeypatch, most=3)
    read, stale = TrialFolder.tile.fget, iter([None])
    request = ("loss=[ce,nll]", "seed=[0,1,2,3,4,5]", "trainer.tile=6")
    trial(tmp_path / "t", *request, "share=[0,1,2]")
    assert read is not None
    monkeypatch.setattr(TrialFolder, "tile", property(lambda self: next(stale, read(self))))
    trial(tmp_path / "t", *request, "share=[3,4,5]")
    assert sizes.count(6) == 2
    assert trial(tmp_path / "t", *request, "share=[]") == ExitCode.HOLDS
    assert verdict(tmp_path / "t")["comparisons"][0]["failures"] == []


def test_the_job_that_concludes_goes_on_until_decided(tmp_path: Path) -> None:
    request = (
        "loss=[ce,nll_softmax]",
        "seed=[0,1,2,3,4]",
        "protocol.looks=2",
        "protocol.max_seeds=100",
        "about=outcome",
    )
    trial(tmp_path / "t", *request, "share=[0,1]")
    trial(tmp_path / "t", *request, "share=[2,3,4]")
    assert trial(tmp_path / "t", *request, "share=[]", "expect=equivalent") == ExitCode.HOLDS
    assert verdict(tmp_path / "t")["seeds"] == list(range(10))


@pytest.mark.parametrize(
    "launcher",
    [
        ("hydra/launcher=basic",),
        pytest.param(("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), marks=pytest.mark.slow),
    ],
    ids=["basic", "joblib"],
)
def test_a_sweep_in_shares_is_one_trial(launcher: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    sweep = start_command(
        "-m", *FAST, "loss=nll,ce", "seed=range(4)", "expect=same", "hydra.sweeper.replicas_per_job=4", *launcher,
        f"hydra.sweep.dir={folder}",
    )  # fmt: skip
    output, _ = sweep.communicate()
    assert sweep.returncode == ExitCode.HOLDS, output
    jobs = json.loads((folder / "sweep.json").read_text())["jobs"]
    assert [job["overrides"][-1] for job in jobs] == ["share=[0,1]", "share=[2,3]", "share=[]"]
    (swept,) = folder.glob("digits-mlp-*")
    path = tmp_path / swept.name
    assert trial(path, "loss=[nll,ce]", "seed=[0,1,2,3]", "expect=same") == ExitCode.HOLDS
    assert verdict(swept) == verdict(path)
    assert verdict(path)["comparisons"][0]["outcome"] == "identical"
