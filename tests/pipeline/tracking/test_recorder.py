"""A failing store costs a trial one line and little time, and the missing runs are counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from likelihood_lab.errors import UsageError
from pipeline.tracking import recorder as recording
from pipeline.tracking.mlflow_store import Run
from pipeline.tracking.recorder import Recorder, tracker_of
from pipeline.tracking.tracker import StoreError

MANY = "abcdefghijklmnopqrst"


class Store:
    """Stub of a tracker; `fault` is called before every call."""

    is_remote, is_file, is_ready = True, False, False

    def __init__(self, fault: Callable[[], None] = lambda: None, portion: int = 1) -> None:
        self.fault, self.portion = fault, portion
        self.calls: list[str] = []
        self.runs: dict[str, Run] = {}

    def __str__(self) -> str:
        return "MLflow at nowhere"

    def _call(self, name: str) -> None:
        self.calls.append(name)
        self.fault()

    def open(self) -> None:
        self._call("open")

    def present(self, sweep: str) -> set[str]:
        self._call("present")
        return {run.content for run in self.runs.values()}

    def record(self, runs: list[Run]) -> None:
        self._call(f"record {len(runs)}")
        self.runs |= {run.tags["fingerprint"]: run for run in runs}

    def link(self, sweep: str) -> str:
        self._call("link")
        return "http://nowhere"


def run(name: str, **tags: str) -> Run:
    return Run(name, {"sweep": "trial", "fingerprint": name} | tags, {}, pd.DataFrame(), 0.0, 1.0)


def cells(*names: str) -> dict[str, Callable[[], Run]]:
    return {name: lambda name=name: run(name) for name in names}  # type: ignore[misc]


REPORT = run("report", **{"content.sha256": "first"})


def recorder_of(store: Any) -> Recorder:
    recorder = Recorder(store, Path("outputs/trial"), "`make sync` sends the rest")
    recorder.open()
    return recorder


def raising(error: Exception) -> Callable[[], None]:
    def fault() -> None:
        raise error

    return fault


@pytest.fixture
def timeout(monkeypatch: pytest.MonkeyPatch) -> float:
    """Divide every limit by fifty and return the timeout of a call."""
    for name in ("CALL_TIMEOUT", "RUN_SECONDS", "PAUSE_AFTER", "GIVE_UP_AFTER"):
        monkeypatch.setattr(recording, name, getattr(recording, name) / 50)
    return recording.CALL_TIMEOUT


def test_recorder_sends_each_run_once_in_portions() -> None:
    store = Store(portion=2)
    recorder = recorder_of(store)
    recorder.offer(cells("a", "b", "c"))
    recorder.offer(cells("c", "d"))
    recorder.conclude(REPORT)
    assert set(store.runs) == {"a", "b", "c", "d", "report"}
    assert [call for call in store.calls if "record" in call] == ["record 2", "record 1", "record 1", "record 1"]
    assert (recorder.shortfall, recorder.page) == (None, "runs grouped by loss: http://nowhere")


def test_recorder_sends_only_new_content() -> None:
    store = Store()
    store.runs = {"a": run("a"), "report": run("report", **{"content.sha256": "an older one"})}
    for _ in range(2):
        recorder = recorder_of(store)
        recorder.offer(cells("a"))
        recorder.conclude(REPORT)
        assert store.calls.count("record 1") == 1
        assert store.runs["report"] is REPORT


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (StoreError("MLflow is shut"), "MLflow is shut"),
        (KeyError("experiment"), "MLflow at nowhere cannot be used (KeyError: 'experiment')"),
    ],
)
def test_failing_store_is_one_line_and_counted(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = recorder_of(Store(raising(error)))
    recorder.offer(cells("a"))
    recorder.offer(cells("b"))
    recorder.conclude(REPORT)
    assert capsys.readouterr().out.count("\n") == 1
    assert recorder.page is None
    counted = "0 of 3 runs are recorded there, all are in outputs/trial; `make sync` sends the rest"
    assert recorder.shortfall == f"{line}: {counted}"


@pytest.mark.parametrize("loses_runs", [False, True])
def test_missed_and_lost_runs_are_sent_when_store_is_back(loses_runs: bool) -> None:
    store = Store()
    recorder = recorder_of(store)
    recorder.offer(cells("a"))
    store.fault = raising(StoreError("shut"))
    recorder.offer(cells("b"))
    if loses_runs:
        store.runs.clear()
    store.fault = lambda: None
    recorder.offer(cells("c"))
    assert set(store.runs) == {"a", "b", "c"}
    recorder.conclude(REPORT)
    assert set(store.runs) == {"a", "b", "c", "report"}
    assert recorder.shortfall is None


@pytest.mark.parametrize(("patience", "calls"), [(50.0, ["open"]), (1.2, ["open", "open"])])
def test_hanging_store_is_left_until_the_end(timeout: float, patience: float, calls: list[str]) -> None:
    """While a call hangs, no second one is made; after its end there is one more, at the end of the trial."""
    store = Store(lambda: time.sleep(patience * timeout))
    started = time.monotonic()
    recorder = recorder_of(store)
    for name in MANY[:5]:
        recorder.offer(cells(name))
        time.sleep(timeout / 10)
    assert store.calls == ["open"]
    recorder.conclude(REPORT)
    assert store.calls == calls
    assert time.monotonic() - started < (3 + 5 / 10) * timeout
    assert "does not answer within" in str(recorder.shortfall)


def test_slow_store_is_given_up_between_runs(timeout: float) -> None:
    store = Store()
    recorder = recorder_of(store)
    store.fault = lambda: time.sleep(0.9 * timeout)
    started = time.monotonic()
    recorder.offer(cells(*MANY))
    assert time.monotonic() - started < 5 * timeout  # each run loses three quarters of the timeout
    assert "is too slow: 3 of 20 runs" in str(recorder.shortfall)


def test_usage_error_ends_trial_before_training_only() -> None:
    deleted = raising(UsageError("the experiment is deleted"))
    with pytest.raises(UsageError, match="is deleted"):
        recorder_of(Store(deleted))
    store = Store()
    recorder = recorder_of(store)
    recorder.offer(cells("a"))
    store.fault = deleted
    recorder.offer(cells("b"))
    assert "the experiment is deleted: 1 of 2 runs are recorded there" in str(recorder.shortfall)


def test_ready_store_is_opened_with_the_first_run() -> None:
    store = Store()
    store.is_ready = True
    recorder = recorder_of(store)
    recorder.offer({})
    assert store.calls == []
    recorder.offer(cells("a"))
    assert store.calls == ["open", "present", "record 1"]


def test_recorder_without_tracking_does_nothing() -> None:
    recorder = recorder_of(tracker_of({"enabled": False}))
    recorder.offer(cells("a"))
    recorder.conclude(REPORT)
    assert (recorder.shortfall, recorder.page) == (None, None)
