"""Telling MLflow of a trial while it trains: a fault of the store costs a line and half a minute, never the trial."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from likelihood_lab.errors import UsageError, first_line
from pipeline.config import schema as conf
from pipeline.console import console
from pipeline.tracking.mlflow_store import Run
from pipeline.tracking.tracker import StoreError, Tracker, load

T = TypeVar("T")

PATIENCE = 10.0  # seconds that one call may take
LISTED_IN_A_SECOND = 20  # runs, by a slow store
PACE = 2.0  # seconds that a run may take to be sent; what is beyond is lost to a slow store
# When so many seconds are lost, the store is left alone until the end, and then given up: with the call that is the
# last straw, half a minute altogether.
LEFT_ALONE, GIVEN_UP = PATIENCE, 2 * PATIENCE


class Recorder:
    """What a trial has for MLflow, and how much of it is there; without a tracker, nothing.

    Runs are offered as soon as they can be made. What could not be sent is tried again with the next.
    """

    def __init__(self, tracker: Tracker | None, folder: Path, remedy: str) -> None:
        self._tracker = tracker
        self._folder = folder
        self._remedy = remedy  # what sends the rest
        self._cells: dict[str, Callable[[], Run]] = {}  # by content
        self._report: Run | None = None
        self._held: set[str] = set()  # content that the store has, as far as is known
        self._asked = False  # what it has, since the last fault
        self._link: str | None = None
        self._fault: UsageError | None = None  # the latest
        self._lost = 0.0
        self._pending: threading.Thread | None = None  # a call that took too long; it may yet return

    def open(self) -> None:
        """Connect, so that an address that cannot be meant is refused before anything is trained.

        A database that holds the experiment already needs no trial: MLflow is imported once there is something for it.
        """
        if self._tracker is not None and not self._tracker.is_ready:
            self._attempt(self._connect, GIVEN_UP)

    def offer(self, cells: Mapping[str, Callable[[], Run]]) -> None:
        """Record these, by content, and whatever could not be recorded before."""
        self._cells |= cells
        if self._cells:
            self._attempt(self._send, LEFT_ALONE)

    def conclude(self, report: Run) -> None:
        """Record the report, and whatever could not be recorded before."""
        self._report = report
        self._attempt(self._send, GIVEN_UP)

    @property
    def page(self) -> str | None:
        """One line: where to look at the runs."""
        if self._tracker is None or self._link is None:
            return None
        return f"runs grouped by loss: {self._link}" + (" (start the page with `make ui`)" * self._tracker.is_local)

    @property
    def shortfall(self) -> str | None:
        """One line, where runs are not recorded: how many, why, and what to do."""
        wanted = {*self._cells} | ({self._report.content} if self._report else set())
        if self._tracker is None or wanted <= self._held:
            return None
        there = f"{len(wanted & self._held)} of {len(wanted)} runs are recorded there, all are in {self._folder}"
        return f"{self._fault}: {there}; {self._remedy}"

    def _attempt(self, action: Callable[[Tracker], None], limit: float) -> None:
        """Do it, unless faults have cost too much time already."""
        waiting = self._pending is not None and self._pending.is_alive()
        if self._tracker is None or waiting or self._lost >= limit:
            return
        try:
            action(self._tracker)
        except UsageError as fault:
            if not self._cells and not isinstance(fault, StoreError):
                raise  # nothing is trained yet: this is the moment to correct the address
            if self._fault is None:
                console.print(f"{fault}; going on without, and the end says what was not recorded")
            self._fault, self._asked = fault, False

    def _connect(self, tracker: Tracker) -> None:
        load()
        # A file that other processes are making at this moment is worth waiting for.
        self._in_time(tracker.open, None if tracker.is_file else PATIENCE)

    def _send(self, tracker: Tracker) -> None:
        if not self._asked:
            self._connect(tracker)
            patience = PATIENCE + len(self._cells) / LISTED_IN_A_SECOND
            self._held = self._in_time(lambda: tracker.present(self._folder.name), patience)
            self._asked = True
        missing = [make for content, make in self._cells.items() if content not in self._held]
        for i in range(0, len(missing), tracker.portion):
            self._record(tracker, [make() for make in missing[i : i + tracker.portion]])
        if self._report is not None:
            if self._report.content not in self._held:
                self._record(tracker, [self._report])
            self._link = self._in_time(lambda: tracker.link(self._folder.name))

    def _record(self, tracker: Tracker, runs: Sequence[Run]) -> None:
        if self._lost >= GIVEN_UP:
            raise StoreError(f"{tracker} is too slow")
        begun = time.monotonic()
        self._in_time(lambda: tracker.record(runs))
        self._lost += max(0.0, time.monotonic() - begun - PACE * len(runs))
        self._held |= {run.content for run in runs}

    def _in_time(self, call: Callable[[], T], patience: float | None = PATIENCE) -> T:
        """What the call returns. One that takes longer is left behind, in its thread."""
        begun, outcome = time.monotonic(), Future[T]()
        thread = threading.Thread(target=_settle, args=(outcome, call), daemon=True)
        thread.start()
        try:
            return outcome.result(patience)
        except Exception as error:
            self._lost += time.monotonic() - begun
            if not outcome.done():
                self._pending = thread
                raise StoreError(f"{self._tracker} does not answer within {patience:g} s") from error
            if isinstance(error, UsageError):
                raise
            # Whatever MLflow makes of a strange answer must not end a training.
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise StoreError(f"{self._tracker} cannot be used ({reason})") from error


def tracker_of(tracking: Mapping[str, Any]) -> Tracker | None:
    """The tracker that a configuration asks for."""
    return Tracker(tracking["uri"], tracking["experiment"], conf.ROOT) if tracking["enabled"] else None


def _settle(outcome: Future[T], call: Callable[[], T]) -> None:
    try:
        outcome.set_result(call())
    except BaseException as error:
        outcome.set_exception(error)
