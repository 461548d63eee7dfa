"""`python -m pipeline.sync` sends the missing runs of a trial's folder, each once."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

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

RUNS = {f"{loss}/s{seed}" for loss in ("ce", "brier") for seed in (0, 7)} | {"replay/s0", "trial/report"}


def train(folder: Path, *overrides: str) -> None:
    from hydra import compose, initialize_config_dir

    quick = [
        "trainer=cpu",
        "epochs=2",
        "model.hidden=[16]",
        "audit=false",
        "protocol.controls=all",
        "dataset.dose=null",
    ]
    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        config = compose("train", overrides=[*quick, "loss=[ce,brier]", "seed=[0,7]", *overrides])
    run(conf.plain(config), folder, "the command")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a trial whose database could not be created: a file was in its way. Its output lies beside it."""
    home = tmp_path_factory.mktemp("sync")
    (home / "store").write_text("in the way")
    with (home / "output.txt").open("w") as output, redirect_stdout(output):
        train(home / "trial", f"tracking.uri=sqlite:///{home / 'store' / 'runs.db'}")
    (home / "store").unlink()
    return home / "trial"


def opened(folder: Path) -> Tracker:
    tracker = Tracker(f"sqlite:///{folder.parent / 'store' / 'runs.db'}", "likelihood-lab", folder)
    tracker.open()
    return tracker


def names(folder: Path) -> Counter[str]:
    runs = list(opened(folder)._search(f"tags.sweep = '{folder.name}'"))
    assert {run.info.status for run in runs} == {"FINISHED"}
    return Counter(run.info.run_name for run in runs)


def synced(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert sync([str(folder)]) == 0
    return capsys.readouterr().out


def test_trial_without_its_store_counts_missing_runs(folder: Path) -> None:
    output = (folder.parent / "output.txt").read_text()
    assert output.count("continuing without tracking; the number of missing runs is printed at the end") == 1
    assert output.count(f"0 of 10 runs are recorded there, all are in {folder}; `make sync DIR=") == 1
    assert len(TrialFolder(folder).cells()) == 4


def test_sync_sends_each_run_once(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "held 0 of 10 runs, 10 were sent" in synced(folder, capsys)
    sent = names(folder)
    assert set(sent) >= RUNS
    assert (sent.total(), set(sent.values())) == (10, {1})
    assert "held 10 of 10 runs, 0 were sent" in synced(folder, capsys)
    monkeypatch.chdir(folder)
    assert "held 10 of 10 runs, 0 were sent" in synced(Path("."), capsys)
    assert names(folder) == sent


def test_sync_repairs_the_store(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synced(folder, capsys)
    tracker = opened(folder)
    before = names(folder)
    ids = {run.info.run_name: run.info.run_id for run in tracker._search(f"tags.sweep = '{folder.name}'")}
    tracker._client.delete_run(ids["ce/s0"])
    tracker._client.update_run(ids["ce/s7"], status="RUNNING")
    orphan = tracker._client.create_run(tracker._id, tags={"sweep": folder.name, "fingerprint": "of older code"})
    verdict = json.loads((folder / "verdict.json").read_text())
    (folder / "verdict.json").write_text(json.dumps(verdict | {"about": "outcome"}))
    assert f"held {len(ids) - 3} of {len(ids)} runs, 3 were sent" in synced(folder, capsys)
    assert tracker._client.get_run(orphan.info.run_id).info.status == "KILLED"
    tracker._client.delete_run(orphan.info.run_id)
    assert names(folder) == before


def test_sync_skips_and_counts_damaged_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = TrialFolder(folder).cell_path(Replica("brier", 7)) / "history.parquet"
    intact = history.read_bytes()
    history.write_bytes(intact[:-1])
    try:
        assert "damaged and not sent: 1; train again" in synced(folder, capsys)
    finally:
        history.write_bytes(intact)


def test_sync_obeys_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:secret@127.0.0.1:9")
    with pytest.raises(UsageError, match=r"http://127\.0\.0\.1:9 cannot be used .*: start it"):
        sync([str(folder)])


def test_password_is_not_stored_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:secret@127.0.0.1:9")
    train(tmp_path / "trial", "loss=[ce]", "seed=0", "epochs=1", "protocol.controls=none")
    request = yaml.safe_load((tmp_path / "trial" / "request.yaml").read_text())
    assert request["tracking"] == {"uri": "http://127.0.0.1:9", "experiment": "likelihood-lab"}
    texts = (path.read_bytes() for path in (tmp_path / "trial").rglob("*") if path.is_file())
    assert not any(b"secret" in text for text in texts)


def test_report_rewrites_a_damaged_verdict_for_sync(folder: Path) -> None:
    report([str(folder)])
    verdict = folder / "verdict.json"
    content = verdict.read_bytes()
    for damage in (lambda: verdict.write_bytes(content[:100]), verdict.unlink):
        damage()
        with pytest.raises(UsageError, match="damaged or missing: `make report DIR="):
            sync([str(folder)])
    report([str(folder)])
    assert json.loads(verdict.read_text()) == json.loads(content)
    assert sync([str(folder)]) == 0
