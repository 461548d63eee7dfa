"""The tracker: runs in an MLflow database, and one line for each error of a store."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.parse import parse_qs, urlsplit

import pandas as pd
import pytest

from likelihood_lab.errors import UsageError
from pipeline.runtime import git_state
from pipeline.text import without_password
from pipeline.tracking import tracker as tracking
from pipeline.tracking.mlflow_store import Run
from pipeline.tracking.tracker import StoreError, Tracker

DIGEST = "5e" * 32


def history(*points: tuple[str, int, float]) -> pd.DataFrame:
    return pd.DataFrame(points, columns=["metric", "step", "value"])


def make_run(sweep: str, loss: str = "ce", seed: int = 0, **changes: Any) -> Run:
    identity = {"sweep": sweep, "fingerprint": f"{sweep} {loss} {seed}"}
    run = Run(
        name=f"{loss}/s{seed}",
        tags=identity | {"loss": loss, "seed": str(seed), "kind": "train"},
        params={"loss": loss, "seed": str(seed), "optimizer.lr": "0.1"},
        metrics=history(("val/nll", 10, 0.1 + 0.2), ("val/nll", 20, 5e-324), ("test/accuracy", 20, 0.97)),
        started=1_700_000_000.25,
        ended=1_700_000_003.5,
        dataset=("digits", DIGEST),
    )
    return dataclasses.replace(run, **changes)


def stored(tracker: Tracker, sweep: str) -> list[Any]:
    return list(tracker._search(f"tags.sweep = '{sweep}'"))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of one MLflow database for all tests, since its creation takes seconds; each test has its own sweep."""
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="session")
def tracker(root: Path) -> Iterator[Tracker]:
    tracker = Tracker(f"sqlite:///{root / 'mlflow.db'}", "one estimator", root)
    tracker.open()
    yield tracker
    tracker._client._tracking_client.store.engine.dispose()


@pytest.fixture
def sweep(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


def test_uri_is_argument_environment_or_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere:5000")
    assert Tracker("sqlite:///mine.db", "x", tmp_path).uri == "sqlite:///mine.db"
    assert Tracker(None, "x", tmp_path).uri == "http://somewhere:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert Tracker(None, "x", tmp_path).uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_recorded_run_has_all_content(tracker: Tracker, sweep: str, tmp_path: Path) -> None:
    config = tmp_path / "any name.yaml"
    config.write_text("loss: ce\n")
    sent = make_run(sweep, artifacts={"config.yaml": config, "notes/why.md": "# Why\n"})
    tracker.record([sent])
    (run,) = stored(tracker, sweep)
    assert (run.info.run_name, run.info.status) == ("ce/s0", "FINISHED")
    assert (run.info.start_time, run.info.end_time) == (1_700_000_000_250, 1_700_000_003_500)
    assert dict(sent.tags).items() <= run.data.tags.items()
    assert run.data.params == sent.params
    points = tracker._client.get_metric_history(run.info.run_id, "val/nll")
    assert [(p.step, p.value) for p in points] == [(10, 0.1 + 0.2), (20, 5e-324)]
    (data,) = (each.dataset for each in run.inputs.dataset_inputs)
    assert (data.name, data.digest, data.source) == ("digits", DIGEST[:36], DIGEST)
    fetched = Path(tracker._client.download_artifacts(run.info.run_id, ""))
    assert (fetched / "config.yaml").read_text() == "loss: ce\n"
    assert not (fetched / "config.yaml").is_symlink()
    assert (fetched / "notes/why.md").read_text() == "# Why\n"


def shown(tracker: Tracker, run: Any) -> dict[str, Any]:
    """Return all that MLflow shows of a run, without its id."""
    seen = run.to_dictionary()
    for key in ("run_id", "run_uuid", "artifact_uri"):
        seen["info"].pop(key, None)
    seen["files"] = sorted(entry.path for entry in tracker._client.list_artifacts(run.info.run_id))
    histories = (tracker._client.get_metric_history(run.info.run_id, key) for key in run.data.metrics)
    seen["history"] = [(p.key, p.step, p.value, p.timestamp) for points in histories for p in points]
    return seen


def test_database_and_server_hold_the_same_run(tracker: Tracker, sweep: str) -> None:
    """The latest value is that of the last step, in any order; a report may have neither metrics nor dataset."""
    points = (("val/nll", 20, 0.5), ("val/nll", 10, 0.75), ("val/nll", 10, 0.75), ("val/ece", 10, math.nan))
    full = make_run(sweep, metrics=history(*points), artifacts={"a.txt": "a"})
    report = make_run(f"{sweep} report", metrics=history(), dataset=None, params={}, artifacts={"verdict.json": "{}"})
    for run in (full, report):
        tracking.insert_runs(tracker._client._tracking_client.store, tracker._stored, [run])
        tracking.send_run(tracker._client, tracker._id, run)
        inserted, sent = (shown(tracker, each) for each in stored(tracker, run.tags["sweep"]))
        assert inserted == sent
        assert inserted["data"]["metrics"] == ({"val/nll": 0.5} if run is full else {})
        assert len(inserted["inputs"]["dataset_inputs"]) == (run is full)


@pytest.fixture(params=["database", "server"])
def either(request: pytest.FixtureRequest, tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """The tracker as it writes to a database, and as it writes to a server by MLflow's own calls."""
    if request.param == "server":
        monkeypatch.setattr(tracking, "database_of", lambda client: None)
    return tracker


def test_run_replaces_earlier_ones_of_its_sweep(either: Tracker, sweep: str) -> None:
    """An earlier run, two copies of one, and a run that a killed process left RUNNING are each replaced."""
    other = f"{sweep} other"
    complete, copied, killed = (make_run(sweep, seed=seed) for seed in range(3))
    either.record([complete, copied, make_run(other, tags={"sweep": other, "fingerprint": complete.content})])
    tracking.send_run(either._client, either._id, copied)
    either._client.create_run(either._id, tags=dict(killed.tags), run_name=killed.name)
    assert either.present(sweep) == either.present(other) == {complete.content}
    assert sorted(run.info.status for run in stored(either, sweep)) == ["FINISHED"] * 3 + ["KILLED"]
    either.record([dataclasses.replace(complete, params={"again": "yes"}), copied, killed])
    assert either.present(sweep) == {run.content for run in (complete, copied, killed)}
    assert either.present(other) == {complete.content}
    runs = [(run.data.tags["seed"], run.info.status, run.data.params) for run in stored(either, sweep)]
    again = [{"again": "yes"}, copied.params, killed.params]
    assert sorted(runs) == [(str(seed), "FINISHED", params) for seed, params in enumerate(again)]


def test_report_is_identified_by_its_content(either: Tracker, sweep: str) -> None:
    name = f"it's {sweep}"  # a quote in the name must not break a query
    for content in ("old", "new"):
        tags = {"sweep": name, "fingerprint": "report", "content.sha256": content}
        either.record([make_run(name, tags=tags)])
        assert either.present(name) == {content}


def test_failing_batch_leaves_no_run(tracker: Tracker, sweep: str) -> None:
    good, bad = make_run(sweep), make_run(sweep, seed=1, params={"x": ["not text"]})
    with pytest.raises(StoreError):
        tracker.record([good, bad])
    assert stored(tracker, sweep) == []


def test_unsuitable_values_are_counted_or_cut(tracker: Tracker, sweep: str) -> None:
    """NaN and infinite points are counted in tags; long params are cut to MLflow's limit."""
    objective = [("train/objective", step, value) for step, value in ((10, 1.0), (20, math.inf), (30, math.nan))]
    metrics = history(*objective, ("val/nll", 30, math.nan))
    tracker.record([make_run(sweep, metrics=metrics, params={"long": "x" * 10_000})])
    (run,) = stored(tracker, sweep)
    assert run.data.params == {"long": "x" * 6000}
    assert run.data.metrics == {"train/objective": 1.0}
    assert run.data.tags["nonfinite.train/objective"] == "2, first inf at step 20"
    assert run.data.tags["nonfinite.val/nll"] == "1, first nan at step 30"


def test_link_opens_view_of_the_sweep_grouped_by_loss(tracker: Tracker, sweep: str) -> None:
    """The view shows the runs of the sweep without its report, in charts that each belong to a section."""
    report = make_run(sweep, "report", tags={"sweep": sweep, "fingerprint": "report", "kind": "report"})
    tracker.record([make_run(sweep), report])
    link = urlsplit(tracker.link(sweep, ui="http://localhost:1234/"))
    path, query = link.fragment.split("?")
    key = parse_qs(query)["viewStateShareKey"][0]
    view = json.loads(tracker._client.get_experiment(tracker._id).tags[f"mlflow.sharedViewState.{key}"])
    assert (link.netloc, link.path, path) == ("localhost:1234", "/", f"/experiments/{tracker._id}/runs")
    assert [run.info.run_name for run in tracker._search(view["searchFilter"])] == ["ce/s0"]
    assert view["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "loss"}]
    charts = view["compareRunCharts"]
    assert {chart["metricSectionId"] for chart in charts} == {section["uuid"] for section in view["compareRunSections"]}
    assert len({chart["uuid"] for chart in charts}) == len(charts)


def test_opening_again_keeps_what_the_user_changed(
    tracker: Tracker, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifacts lie under the root, wherever the command runs."""
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert tracker._stored.artifact_location == (root / "mlruns" / "one estimator").as_uri()
    written = tracker._client.get_experiment(tracker._id).tags["mlflow.note.content"]
    assert f"#/experiments/{tracker._id}/runs?viewStateShareKey=by-loss&" in written
    tracker._client.set_experiment_tag(tracker._id, "mlflow.note.content", "mine")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "99")
    again = Tracker(tracker.uri, tracker.experiment, root)
    again.open()
    kept = again._client.get_experiment(again._id).tags["mlflow.note.content"]
    assert (again._id, kept, os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) == (tracker._id, "mine", "99")


def failing_once(code: str) -> Mock:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ErrorCode

    return Mock(side_effect=[MlflowException("once", error_code=ErrorCode.Value(code)), "second"])


def test_calls_are_repeated_after_known_errors_only(tracker: Tracker) -> None:
    conflict = failing_once("BAD_REQUEST")
    tracking.retry_on_conflict(conflict)
    assert conflict.call_count == 2
    assert tracking._retry_while_denied(failing_once("PERMISSION_DENIED")) == "second"
    for retry in (tracking.retry_on_conflict, tracking._retry_while_denied):
        with pytest.raises(Exception, match="once"):
            retry(failing_once("INTERNAL_ERROR"))  # type: ignore[operator]


def test_database_is_ready_if_it_holds_the_experiment(tracker: Tracker, root: Path, tmp_path: Path) -> None:
    """Opening a deleted experiment is refused with a remedy."""
    number = tracker._client.create_experiment("going")
    going = Tracker(tracker.uri, "going", root)
    assert going.is_ready
    tracker._client.delete_experiment(number)
    (tmp_path / "text.db").write_text("not a database " * 100)
    absent = [Tracker(f"sqlite:///{tmp_path}/{name}", "x", tmp_path) for name in ("text.db", "a.db", "a/mlflow.db")]
    for unready in (going, Tracker(tracker.uri, "unknown", root), Tracker("http://127.0.0.1:9", "x", root), *absent):
        assert not unready.is_ready
    assert [path.name for path in tmp_path.iterdir()] == ["text.db"]
    with pytest.raises(UsageError, match=f"--experiment-id {number}"):
        going.open()


@pytest.mark.parametrize(
    ("uri", "error", "problem"),
    [
        ("gopher://x", UsageError, "unsupported URI"),
        ("http://[::1", UsageError, "Invalid IPv6 URL"),
        ("postgresql+nosuchdriver://bob:secret@x/y", UsageError, "Can't load plugin"),
        ("FOLDER/mlruns", UsageError, "filesystem tracking backend"),
        ("sqlite:///FOLDER/text.db", UsageError, "file is not a database"),
        (
            "http://bob:secret@127.0.0.1:9",
            StoreError,
            "MLflow at http://127.0.0.1:9 cannot be used .no server answers",
        ),
        ("sqlite:////proc/nowhere/mlflow.db", StoreError, "No such file or directory"),
    ],
)
def test_unusable_store_is_one_line_soon(
    uri: str, error: type[UsageError], problem: str, tmp_path: Path, tracker: Tracker
) -> None:
    (tmp_path / "text.db").write_text("not a database " * 100)
    started = time.monotonic()
    with pytest.raises(UsageError, match=problem) as caught:
        Tracker(uri.replace("FOLDER", str(tmp_path)), "x", tmp_path).open()
    assert time.monotonic() - started < 10
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.endswith(": correct MLFLOW_TRACKING_URI or choose tracking=none") == (error is UsageError)
    assert "\n" not in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("at http://bob:se/c:ret@host:5000/x, and", "at http://host:5000/x, and"),
        ("at http://bob:se@cr@et@host:5000/x, and", "at http://host:5000/x, and"),
        ("postgresql://bob@host/db", "postgresql://bob@host/db"),
        ("postgresql://host/db?password=secret&x=1", "postgresql://host/db?x=1"),
        ("postgresql://host/db?x=1&sslpassword=secret", "postgresql://host/db?x=1&"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
    ],
)
def test_password_is_removed_from_address(text: str, safe: str) -> None:
    assert without_password(text) == safe


def test_run_costs_at_most_30_ms_of_cpu(tracker: Tracker, sweep: str) -> None:
    metrics = history(*((f"val/m{i % 8}", i, i / 7) for i in range(150)))
    content = {"metrics": metrics, "params": {f"p{i}": str(i) for i in range(30)}, "artifacts": {"a.yaml": "a: 1\n"}}
    seconds = []
    for i in range(3):
        runs = [make_run(f"{sweep} {i}", seed=seed, **content) for seed in range(30)]
        started = time.process_time()
        tracker.record(runs)
        seconds.append((time.process_time() - started) / len(runs))
    assert min(seconds) <= 0.030


def test_git_state_names_commit_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a repository, a folder or git it is empty."""
    assert git_state(tmp_path) == git_state(tmp_path / "absent") == {}
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)  # noqa: S607
    clean = git_state(tmp_path)
    assert (len(clean["git.commit"]), clean["git.dirty"]) == (40, "false")
    (tmp_path / "loss.yaml").write_text("ce: {}\n")
    assert git_state(tmp_path) == {"git.commit": clean["git.commit"], "git.dirty": "true"}
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == {}
