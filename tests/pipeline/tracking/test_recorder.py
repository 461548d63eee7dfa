"""A store that fails costs a trial a line and little time; what it lacks is counted."""

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


class Store:
    """Stands for a tracker; `fault` is called before everything that it is asked."""

    is_local, is_file, is_ready = False, False, False

    def __init__(self, fault: Callable[[], None] = lambda: None, portion: int = 1) -> None:
        self.fault, self.portion = fault, portion
        self.calls: list[str] = []
        self.runs: dict[str, Run] = {}

    def __str__(self) -> str:
        return "MLflow at nowhere"

    def _asked(self, what: str) -> None:
        self.calls.append(what)
        self.fault()

    def open(self) -> None:
        self._asked("open")

    def present(self, sweep: str) -> set[str]:
        self._asked("present")
        return {run.content for run in self.runs.values()}

    def record(self, runs: list[Run]) -> None:
        self._asked(f"record {len(runs)}")
        self.runs |= {run.tags["fingerprint"]: run for run in runs}

    def link(self, sweep: str) -> str:
        self._asked("link")
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


def refuse() -> None:
    raise StoreError("MLflow at nowhere cannot be used (permission denied)")


def hang() -> None:
    time.sleep(5 * recording.PATIENCE)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> float:
    """Every limit a fiftieth of what it is."""
    for name in ("PATIENCE", "PACE", "LEFT_ALONE", "GIVEN_UP"):
        monkeypatch.setattr(recording, name, getattr(recording, name) / 50)
    return recording.PATIENCE


def test_a_store_that_works_gets_each_run_once_and_only_the_link_is_told() -> None:
    store = Store()
    recorder = recorder_of(store)
    recorder.offer(cells("a", "b"))
    recorder.offer(cells("b", "c"))
    recorder.conclude(REPORT)
    assert set(store.runs) == {"a", "b", "c", "report"}
    assert store.calls.count("record 1") == 4
    assert (recorder.shortfall, recorder.page) == (None, "runs grouped by loss: http://nowhere")


def test_what_the_store_holds_is_not_sent_again_but_a_new_report_is() -> None:
    store = Store()
    store.runs = {"a": run("a"), "report": run("report", **{"content.sha256": "an older one"})}
    recorder = recorder_of(store)
    recorder.offer(cells("a"))
    recorder.conclude(REPORT)
    assert store.calls.count("record 1") == 1
    assert store.runs["report"] is REPORT
    again = recorder_of(store)
    again.offer(cells("a"))
    again.conclude(REPORT)
    assert store.calls.count("record 1") == 1


def test_many_runs_are_sent_in_portions() -> None:
    store = Store(portion=2)
    recorder_of(store).offer(cells("a", "b", "c"))
    assert [call for call in store.calls if call.startswith("record")] == ["record 2", "record 1"]


def test_a_fault_is_warned_of_once_and_counted_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = recorder_of(Store(refuse))
    recorder.offer(cells("a"))
    recorder.offer(cells("b"))
    recorder.conclude(REPORT)
    assert capsys.readouterr().out.count("\n") == 1
    assert recorder.page is None
    assert recorder.shortfall == (
        "MLflow at nowhere cannot be used (permission denied): 0 of 3 runs are recorded there, "
        "all are in outputs/trial; `make sync` sends the rest"
    )


def test_what_was_missed_is_sent_as_soon_as_the_store_is_back() -> None:
    store = Store()
    recorder = recorder_of(store)
    recorder.offer(cells("a"))
    store.fault = refuse
    recorder.offer(cells("b"))
    store.fault = lambda: None
    recorder.offer(cells("c"))
    assert set(store.runs) == {"a", "b", "c"}
    recorder.conclude(REPORT)
    assert recorder.shortfall is None


def test_runs_that_a_store_has_lost_are_sent_again() -> None:
    store = Store()
    recorder = recorder_of(store)
    recorder.offer(cells("a"))
    store.fault = refuse
    recorder.offer(cells("b"))
    store.runs.clear()
    store.fault = lambda: None
    recorder.conclude(REPORT)
    assert set(store.runs) == {"a", "b", "report"}


def test_a_store_that_hangs_costs_three_times_the_patience_at_most(hurried: float) -> None:
    store = Store(hang)
    begun = time.monotonic()
    recorder = recorder_of(store)
    for name in "abcdefgh":
        recorder.offer(cells(name))
    recorder.conclude(REPORT)
    assert time.monotonic() - begun < 3 * hurried
    assert "does not answer within" in str(recorder.shortfall)
    assert store.calls == ["open"], "while the first call hangs, no second may write beside it"


def test_a_store_that_hangs_is_left_alone_and_asked_once_more_at_the_end(hurried: float) -> None:
    store = Store(lambda: time.sleep(1.2 * hurried))
    recorder = recorder_of(store)
    for name in "abcdefgh":
        recorder.offer(cells(name))
        time.sleep(hurried / 10)
    assert store.calls == ["open"]
    recorder.conclude(REPORT)
    assert store.calls == ["open", "open"]


def test_a_store_that_is_slow_is_given_up_in_the_midst_of_its_runs(hurried: float) -> None:
    store = Store()
    recorder = recorder_of(store)
    store.fault = lambda: time.sleep(0.9 * hurried)
    begun = time.monotonic()
    recorder.offer(cells(*"abcdefghijklmnopqrst"))
    assert time.monotonic() - begun < 5 * hurried  # three quarters of the patience lost at each run
    assert recorder.shortfall is not None
    assert "is too slow: 3 of 20 runs" in recorder.shortfall


def test_an_answer_that_nobody_foresaw_is_a_fault_and_no_end() -> None:
    def nonsense() -> None:
        raise KeyError("experiment")

    recorder = recorder_of(Store(nonsense))
    recorder.offer(cells("a"))
    assert "cannot be used (KeyError: 'experiment')" in str(recorder.shortfall)


def test_an_address_that_cannot_be_meant_ends_the_trial_before_it_begins() -> None:
    def refuse_address() -> None:
        raise UsageError("no such scheme")

    with pytest.raises(UsageError, match="no such scheme"):
        recorder_of(Store(refuse_address))


def test_a_store_that_is_ready_hears_nothing_before_there_is_a_run() -> None:
    store = Store()
    store.is_ready = True
    recorder = recorder_of(store)
    recorder.offer({})
    assert store.calls == []
    recorder.offer(cells("a"))
    assert store.calls == ["open", "present", "record 1"]


def test_an_experiment_that_is_deleted_in_the_midst_of_a_trial_does_not_end_it() -> None:
    def deleted() -> None:
        raise UsageError("the experiment is deleted")

    store = Store()
    recorder = recorder_of(store)
    recorder.offer(cells("a"))
    store.fault = deleted
    recorder.offer(cells("b"))
    assert "the experiment is deleted: 1 of 2 runs are recorded there" in str(recorder.shortfall)


def test_without_tracking_nothing_is_told() -> None:
    recorder = recorder_of(tracker_of({"enabled": False}))
    recorder.offer(cells("a"))
    recorder.conclude(REPORT)
    assert (recorder.shortfall, recorder.page) == (None, None)
