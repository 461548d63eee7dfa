from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pandas as pd
import pytest

from likelihood_lab.errors import UsageError
from pipeline.runtime import git_state
from pipeline.text import without_password
from pipeline.tracking import tracker as tracking
from pipeline.tracking.mlflow_store import Run
from pipeline.tracking.tracker import StoreError, Tracker

# MLflow's own queries use a loader that SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

DIGEST = "5e" * 32


def history(*points: tuple[str, int, float]) -> pd.DataFrame:
    return pd.DataFrame(points, columns=["metric", "step", "value"])


def make_run(sweep: str, loss: str = "ce", seed: int = 0, **changes: Any) -> Run:
    tags = {
        "sweep": sweep,
        "fingerprint": f"{sweep} {loss} {seed}",
        "loss": loss,
        "seed": str(seed),
        "kind": "train",
    }
    run = Run(
        name=f"{loss}/s{seed}",
        tags=tags,
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
    """A fresh MLflow database takes seconds to create: every test has a sweep of its own in this one."""
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


def test_importing_the_module_imports_no_mlflow() -> None:
    check = "import sys, pipeline.tracking; sys.exit(not {'mlflow', 'pandas', 'torch'}.isdisjoint(sys.modules))"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_uri_is_the_argument_else_the_environment_else_a_database_at_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere:5000")
    assert Tracker("sqlite:///mine.db", "x", tmp_path).uri == "sqlite:///mine.db"
    assert Tracker(None, "x", tmp_path).uri == "http://somewhere:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert Tracker(None, "x", tmp_path).uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_opening_keeps_settings_of_the_user_and_turns_telemetry_off(tracker: Tracker) -> None:
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    before = dict(os.environ)
    try:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "99"
        tracking._set_environment()
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "99"
    finally:
        os.environ.update(before)


def test_a_run_comes_back_as_it_was_sent(tracker: Tracker, sweep: str, tmp_path: Path) -> None:
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
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest, used.dataset.source) == ("digits", DIGEST[:36], DIGEST)
    fetched = Path(tracker._client.download_artifacts(run.info.run_id, ""))
    assert (fetched / "config.yaml").read_text() == "loss: ce\n"
    assert not (fetched / "config.yaml").is_symlink()
    assert (fetched / "notes/why.md").read_text() == "# Why\n"


def everything(tracker: Tracker, run: Any) -> dict[str, Any]:
    """All that MLflow shows of a run, but for what makes it another run."""
    seen = run.to_dictionary()
    for key in ("run_id", "run_uuid", "artifact_uri"):
        seen["info"].pop(key, None)
    seen["files"] = sorted(entry.path for entry in tracker._client.list_artifacts(run.info.run_id))
    histories = (tracker._client.get_metric_history(run.info.run_id, key) for key in run.data.metrics)
    seen["history"] = [(p.key, p.step, p.value, p.timestamp) for points in histories for p in points]
    return seen


def test_a_database_and_a_server_are_left_with_the_same_run(tracker: Tracker, sweep: str) -> None:
    points = (("val/nll", 20, 0.5), ("val/nll", 10, 0.75), ("val/nll", 10, 0.75), ("val/ece", 10, math.nan))
    run = make_run(sweep, metrics=history(*points), artifacts={"a.txt": "a"})
    tracking.insert_runs(tracker._client._tracking_client.store, tracker._found, [run])
    tracking.send_run(tracker._client, tracker._id, run)
    inserted, sent = (everything(tracker, each) for each in stored(tracker, sweep))
    assert inserted == sent


def test_the_latest_value_is_that_of_the_last_step_in_any_order(tracker: Tracker, sweep: str) -> None:
    tracker.record([make_run(sweep, metrics=history(("val/nll", 30, 3.0), ("val/nll", 10, 1.0)))])
    (run,) = stored(tracker, sweep)
    assert run.data.metrics == {"val/nll": 3.0}


def test_a_report_without_metrics_or_dataset_is_a_run_too(tracker: Tracker, sweep: str) -> None:
    tracker.record([make_run(sweep, metrics=history(), dataset=None, params={}, artifacts={"verdict.json": "{}"})])
    (run,) = stored(tracker, sweep)
    assert run.data.metrics == {}
    assert run.inputs.dataset_inputs == []


@pytest.fixture(params=["database", "server"])
def either(request: pytest.FixtureRequest, tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """The tracker as it writes to a database, and as it writes to a server, through MLflow's own calls."""
    if request.param == "server":
        monkeypatch.setattr(tracking, "database_of", lambda client: None)
    return tracker


def test_recording_twice_leaves_one_run_and_the_later_content(either: Tracker, sweep: str) -> None:
    either.record([make_run(sweep), make_run(sweep, seed=1)])
    either.record([make_run(sweep, params={"again": "yes"})])
    runs = {run.data.tags["seed"]: run.data.params for run in stored(either, sweep)}
    assert len(stored(either, sweep)) == 2
    assert runs["0"] == {"again": "yes"}
    assert runs["1"] != {"again": "yes"}


def test_one_fingerprint_in_two_sweeps_is_two_runs(either: Tracker, sweep: str) -> None:
    for name in (sweep, f"{sweep} again"):
        either.record([make_run(name, tags={"sweep": name, "fingerprint": "shared"})])
    assert either.present(sweep) == either.present(f"{sweep} again") == {"shared"}


def test_present_is_what_finished_in_this_sweep(tracker: Tracker, sweep: str) -> None:
    tracker.record([make_run(sweep), make_run(sweep, seed=1), make_run(f"not {sweep}", seed=2)])
    assert tracker.present(sweep) == {f"{sweep} ce 0", f"{sweep} ce 1"}


def test_what_a_killed_process_left_is_closed_not_present_and_replaced(either: Tracker, sweep: str) -> None:
    run = make_run(sweep)
    either._client.create_run(either._id, tags=dict(run.tags), run_name=run.name)
    assert either.present(sweep) == set()
    assert [left.info.status for left in stored(either, sweep)] == ["KILLED"]
    either.record([run])
    assert [left.info.status for left in stored(either, sweep)] == ["FINISHED"]
    assert either.present(sweep) == {run.tags["fingerprint"]}


def test_two_copies_of_one_run_are_not_present_and_become_one(tracker: Tracker, sweep: str) -> None:
    run = make_run(sweep)
    for _ in range(2):
        tracking.send_run(tracker._client, tracker._id, run)
    assert tracker.present(sweep) == set()
    tracker.record([run])
    assert tracker.present(sweep) == {run.content}
    assert len(stored(tracker, sweep)) == 1


def test_a_report_is_told_by_its_files(tracker: Tracker, sweep: str) -> None:
    tags = {"sweep": sweep, "fingerprint": "report", "content.sha256": "old"}
    tracker.record([make_run(sweep, tags=tags)])
    assert tracker.present(sweep) == {"old"}
    tracker.record([make_run(sweep, tags=tags | {"content.sha256": "new"})])
    assert tracker.present(sweep) == {"new"}


def test_a_batch_that_fails_leaves_none_of_its_runs(tracker: Tracker, sweep: str) -> None:
    good, bad = make_run(sweep), make_run(sweep, seed=1, params={"x": ["not text"]})
    with pytest.raises(StoreError):
        tracker.record([good, bad])
    assert stored(tracker, sweep) == []


def test_points_that_are_not_finite_are_counted_in_a_tag(tracker: Tracker, sweep: str) -> None:
    points = (
        ("train/objective", 10, 1.0),
        ("train/objective", 20, math.inf),
        ("train/objective", 30, math.nan),
    )
    tracker.record([make_run(sweep, metrics=history(*points, ("val/nll", 30, math.nan)))])
    (run,) = stored(tracker, sweep)
    assert run.data.metrics == {"train/objective": 1.0}
    assert run.data.tags["nonfinite.train/objective"] == "2, first inf at step 20"
    assert run.data.tags["nonfinite.val/nll"] == "1, first nan at step 30"


def test_long_params_are_cut_to_what_mlflow_holds(tracker: Tracker, sweep: str) -> None:
    tracker.record([make_run(sweep, params={"long": "x" * 10_000})])
    (run,) = stored(tracker, sweep)
    assert run.data.params == {"long": "x" * 6000}


def test_the_link_opens_a_view_of_the_sweep_grouped_by_loss(tracker: Tracker, sweep: str) -> None:
    link = urlsplit(tracker.link(sweep, ui="http://localhost:1234/"))
    path, query = link.fragment.split("?")
    key = parse_qs(query)["viewStateShareKey"][0]
    tags = tracker._client.get_experiment(tracker._id).tags
    view = json.loads(tags[f"mlflow.sharedViewState.{key}"])
    assert (link.netloc, link.path, path) == ("localhost:1234", "/", f"/experiments/{tracker._id}/runs")
    assert f"tags.sweep = '{sweep}'" in view["searchFilter"]
    assert view["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "loss"}]
    sections = {section["uuid"] for section in view["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in view["compareRunCharts"]} == sections
    assert len({chart["uuid"] for chart in view["compareRunCharts"]}) == len(view["compareRunCharts"])


def test_the_filter_of_the_view_finds_the_runs_and_not_the_report(tracker: Tracker, sweep: str) -> None:
    report = make_run(sweep, "report", tags={"sweep": sweep, "fingerprint": "report", "kind": "report"})
    tracker.record([make_run(sweep), report])
    key = tracker.link(sweep).split("viewStateShareKey=")[1].split("&")[0]
    view = json.loads(tracker._client.get_experiment(tracker._id).tags[f"mlflow.sharedViewState.{key}"])
    assert [run.info.run_name for run in tracker._search(view["searchFilter"])] == ["ce/s0"]


def test_an_apostrophe_in_the_name_of_a_sweep_is_no_query(tracker: Tracker) -> None:
    tracker.record([make_run("it's")])
    tracker.record([make_run("it's")])
    assert tracker.present("it's") == {"it's ce 0"}


def test_opening_again_finds_the_experiment_and_keeps_what_a_user_wrote(tracker: Tracker, root: Path) -> None:
    written = tracker._client.get_experiment(tracker._id).tags["mlflow.note.content"]
    assert f"#/experiments/{tracker._id}/runs?viewStateShareKey=by-loss&" in written
    tracker._client.set_experiment_tag(tracker._id, "mlflow.note.content", "mine")
    again = Tracker(tracker.uri, tracker.experiment, root)
    again.open()
    kept = again._client.get_experiment(again._id).tags["mlflow.note.content"]
    assert (again._id, kept) == (tracker._id, "mine")


def test_artifacts_live_under_the_root_wherever_the_command_runs(tracker: Tracker, root: Path) -> None:
    assert tracker._found.artifact_location == (root / "mlruns" / "one estimator").as_uri()


def failing_once(code: str) -> Callable[[], int]:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ErrorCode

    calls: list[None] = []

    def call() -> int:
        calls.append(None)
        if len(calls) == 1:
            raise MlflowException("once", error_code=ErrorCode.Value(code))
        return len(calls)

    return call


def test_a_row_that_another_process_made_first_is_written_again(tracker: Tracker) -> None:
    lost = failing_once("BAD_REQUEST")
    tracking.beside_others(lost)
    assert lost() == 3
    with pytest.raises(Exception, match="once"):
        tracking.beside_others(failing_once("TEMPORARILY_UNAVAILABLE"))


def test_the_right_to_a_new_experiment_is_waited_for(tracker: Tracker) -> None:
    assert tracking._once_permitted(failing_once("PERMISSION_DENIED")) == 2  # type: ignore[arg-type]
    with pytest.raises(Exception, match="once"):
        tracking._once_permitted(failing_once("INTERNAL_ERROR"))  # type: ignore[arg-type]


def test_a_deleted_experiment_is_refused_with_the_way_back(tracker: Tracker, root: Path) -> None:
    number = tracker._client.create_experiment("gone")
    tracker._client.delete_experiment(number)
    with pytest.raises(UsageError, match=f"--experiment-id {number}"):
        Tracker(tracker.uri, "gone", root).open()


def test_a_database_is_ready_once_it_holds_the_experiment(tracker: Tracker, root: Path, tmp_path: Path) -> None:
    assert tracker.is_ready
    number = tracker._client.create_experiment("going")
    assert Tracker(tracker.uri, "going", root).is_ready
    tracker._client.delete_experiment(number)
    for uri, experiment in ((tracker.uri, "going"), (tracker.uri, "unknown"), ("http://127.0.0.1:9", "one estimator")):
        assert not Tracker(uri, experiment, root).is_ready
    (tmp_path / "text.db").write_text("not a database " * 100)
    for name in ("text.db", "absent.db", "absent/mlflow.db"):
        assert not Tracker(f"sqlite:///{tmp_path / name}", "one estimator", tmp_path).is_ready
    assert not (tmp_path / "absent.db").exists()


@pytest.mark.parametrize(
    ("make_uri", "says"),
    [
        (lambda folder: "gopher://x", "unsupported URI"),
        (lambda folder: "http://[::1", "Invalid IPv6 URL"),
        (lambda folder: "postgresql+nosuchdriver://bob:secret@x/y", "Can't load plugin"),
        (lambda folder: str(folder / "mlruns"), "filesystem tracking backend"),
        (lambda folder: f"sqlite:///{folder / 'text.db'}", "file is not a database"),
    ],
    ids=["no such scheme", "no address", "no such driver", "a folder of files", "not a database"],
)
def test_an_address_that_cannot_be_meant_is_refused(
    make_uri: Callable[[Path], str], says: str, tmp_path: Path, tracker: Tracker
) -> None:
    (tmp_path / "text.db").write_text("not a database " * 100)
    with pytest.raises(UsageError, match=f"{says}.*: correct MLFLOW_TRACKING_URI or choose tracking=none") as caught:
        Tracker(make_uri(tmp_path), "x", tmp_path).open()
    assert not isinstance(caught.value, StoreError)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://bob:secret@127.0.0.1:9", "MLflow at http://127.0.0.1:9 cannot be used .no server answers"),
        ("sqlite:////proc/nowhere/mlflow.db", "No such file or directory"),
    ],
)
def test_a_store_that_is_not_there_is_one_line_soon(uri: str, says: str, tmp_path: Path, tracker: Tracker) -> None:
    begun = time.monotonic()
    with pytest.raises(StoreError, match=says) as caught:
        Tracker(uri, "x", tmp_path).open()
    assert time.monotonic() - begun < 10
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


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
def test_no_password_is_left_in_an_address(text: str, safe: str) -> None:
    assert without_password(text) == safe


def test_a_run_costs_at_most_30_ms_of_cpu(tracker: Tracker, sweep: str) -> None:
    metrics = history(*((f"val/m{i % 8}", i, i / 7) for i in range(150)))
    params = {f"p{i}": str(i) for i in range(30)}

    def milliseconds(name: str) -> float:
        runs = [
            make_run(name, seed=seed, metrics=metrics, params=params, artifacts={"config.yaml": "a: 1\n"})
            for seed in range(30)
        ]
        begun = time.process_time()
        tracker.record(runs)
        return 1000 * (time.process_time() - begun) / len(runs)

    assert min(milliseconds(f"{sweep} {i}") for i in range(3)) <= 30


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)  # noqa: S607
    return tmp_path


def test_git_state_names_the_commit_and_notices_a_change(repository: Path) -> None:
    clean = git_state(repository)
    assert len(clean["git.commit"]) == 40
    assert clean["git.dirty"] == "false"
    (repository / "loss.yaml").write_text("ce: {}\n")
    assert git_state(repository) == {"git.commit": clean["git.commit"], "git.dirty": "true"}


def test_git_state_is_empty_without_a_repository_a_folder_or_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert git_state(tmp_path) == {}
    assert git_state(tmp_path / "absent") == {}
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == {}
