"""What MLflow lacks of a trial's folder is sent, once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from likelihood_lab.errors import UsageError
from pipeline.config import schema as conf
from pipeline.replica import Replica
from pipeline.report import report
from pipeline.storage.cells import TrialFolder
from pipeline.sync import sync
from pipeline.tracking.tracker import Tracker
from pipeline.trial.run import run

ALL = {f"{loss}/s{seed}" for loss in ("ce", "brier") for seed in (0, 7)} | {"replay/s0", "trial/report"}


def train(folder: Path, *overrides: str) -> None:
    from hydra import compose, initialize_config_dir

    quick = ["trainer=cpu", "epochs=2", "model.hidden=[16]", "audit=false", "controls=all", "dataset.dose=null"]
    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        asked = compose("train", overrides=[*quick, "loss=[ce,brier]", "seed=[0,7]", *overrides])
    run(conf.plain(asked), folder, "the command")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trial whose database could not be made: a file is in its way."""
    home = tmp_path_factory.mktemp("sync")
    (home / "store").write_text("in the way")
    train(home / "trial", f"tracking.uri=sqlite:///{home / 'store' / 'runs.db'}")
    (home / "store").unlink()
    return home / "trial"


def stored(folder: Path) -> list[Any]:
    tracker = Tracker(f"sqlite:///{folder.parent / 'store' / 'runs.db'}", "likelihood-lab", folder)
    tracker.open()
    return list(tracker._search(f"tags.sweep = '{folder.name}'"))


def names(folder: Path) -> Counter[str]:
    assert {run.info.status for run in stored(folder)} == {"FINISHED"}
    return Counter(run.info.run_name for run in stored(folder))


def synced(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert sync([str(folder)]) == 0
    return capsys.readouterr().out


def test_a_trial_ends_well_without_its_store_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    train(tmp_path / "trial", f"tracking.uri=sqlite:///{tmp_path / 'file' / 'runs.db'}")
    said = capsys.readouterr().out
    assert said.count("going on without, and the end says what was not recorded") == 1
    assert said.count(f"0 of 10 runs are recorded there, all are in {tmp_path / 'trial'}; `make sync DIR=") == 1
    assert len(TrialFolder(tmp_path / "trial").cells()) == 4


def test_everything_is_sent_and_then_nothing_more(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    total = len(TrialFolder(folder).cells()) + len(TrialFolder(folder).cells("controls")) + 1
    assert f"held 0 of {total} runs, {total} were sent" in synced(folder, capsys)
    assert names(folder).total() == total
    assert set(names(folder)) >= ALL
    assert set(names(folder).values()) == {1}
    assert f"held {total} of {total} runs, 0 were sent" in synced(folder, capsys)
    assert names(folder).total() == total


def test_what_is_damaged_in_the_store_is_mended(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synced(folder, capsys)
    tracker = Tracker(f"sqlite:///{folder.parent / 'store' / 'runs.db'}", "likelihood-lab", folder)
    tracker.open()
    before = {run.info.run_name: run for run in stored(folder)}
    tracker._client.delete_run(before["ce/s0"].info.run_id)
    tracker._client.update_run(before["ce/s7"].info.run_id, status="RUNNING")
    orphan = tracker._client.create_run(tracker._id, tags={"sweep": folder.name, "fingerprint": "of older code"})
    verdict = json.loads((folder / "verdict.json").read_text())
    (folder / "verdict.json").write_text(json.dumps(verdict | {"about": "outcome"}))
    assert f"held {len(before) - 3} of {len(before)} runs, 3 were sent" in synced(folder, capsys)
    assert tracker._client.get_run(orphan.info.run_id).info.status == "KILLED"
    tracker._client.delete_run(orphan.info.run_id)
    assert names(folder) == Counter(before.keys())


def test_a_damaged_cell_is_not_sent_but_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = TrialFolder(folder).cell_path(Replica("brier", 7))
    intact = (cell / "history.parquet").read_bytes()
    (cell / "history.parquet").write_bytes(intact[:-1])
    try:
        assert "1 of its cells damaged: train again" in synced(folder, capsys)
    finally:
        (cell / "history.parquet").write_bytes(intact)


def test_the_environment_names_another_store(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:secret@127.0.0.1:9")
    with pytest.raises(UsageError, match=r"http://127\.0\.0\.1:9 cannot be used .*: start it"):
        sync([str(folder)])


def test_no_password_is_stored_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:secret@127.0.0.1:9")
    train(tmp_path / "trial", "loss=[ce]", "controls=none")
    kept = yaml.safe_load((tmp_path / "trial" / "request.yaml").read_text())["tracking"]
    assert kept == {"uri": "http://127.0.0.1:9", "experiment": "likelihood-lab"}
    texts = (path.read_bytes() for path in (tmp_path / "trial").rglob("*") if path.is_file())
    assert not any(b"secret" in text for text in texts)


def test_a_folder_that_is_no_trial_s_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a trial's folder"):
        sync([str(tmp_path)])
    with pytest.raises(UsageError, match="usage"):
        sync([])


def test_help_is_told_at_once() -> None:
    done = subprocess.run([sys.executable, "-m", "pipeline.sync", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: ")


def test_a_folder_that_is_named_by_a_dot_has_the_same_runs(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sync([str(folder)])
    before = names(folder)
    monkeypatch.chdir(folder)
    assert "held 10 of 10 runs, 0 were sent" in synced(Path("."), capsys)
    assert names(folder) == before


@pytest.mark.parametrize("damage", ["gone", "cut short"])
def test_a_verdict_that_is_damaged_or_gone_is_one_line_and_the_report_mends_it(folder: Path, damage: str) -> None:
    report([str(folder)])
    verdict = folder / "verdict.json"
    whole = verdict.read_bytes()
    verdict.write_bytes(whole[:100])
    if damage == "gone":
        verdict.unlink()
    with pytest.raises(UsageError, match="damaged or gone: `make report DIR="):
        sync([str(folder)])
    report([str(folder)])
    assert json.loads(verdict.read_text()) == json.loads(whole)
    assert sync([str(folder)]) == 0
