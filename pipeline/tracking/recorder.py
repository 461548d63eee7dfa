"""Record a trial in MLflow while it trains. A failing store costs one line and half a minute, never the trial."""

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
from pipeline.tracking.tracker import StoreError, Tracker, load_mlflow

T = TypeVar("T")

CALL_TIMEOUT = 10.0  # seconds
LISTED_PER_SECOND = 20  # runs that a slow store lists in a second
RUN_SECONDS = 2.0  # normal time to send one run; time beyond it counts as lost
# Limits of the seconds lost to a slow store. After the first, nothing is sent until the end of the trial. After the
# second, nothing more is sent. With the call in progress, a trial waits for 30 s at most.
PAUSE_AFTER, GIVE_UP_AFTER = CALL_TIMEOUT, 2 * CALL_TIMEOUT


class Recorder:
    """Queue of a trial's MLflow runs. Without a tracker it does nothing.

    Runs are sent as soon as they exist. A run that could not be sent is tried again with the next ones.
    """

    def __init__(self, tracker: Tracker | None, folder: Path, remedy: str) -> None:
        """`remedy` is the end of the `shortfall` line: how the user can send the rest."""
        self._tracker = tracker
        self._folder = folder
        self._remedy = remedy
        self._cells: dict[str, Callable[[], Run]] = {}  # by content
        self._report: Run | None = None
        self._stored: set[str] = set()  # contents that the store holds, as far as is known
        self._is_listed = False  # whether `_stored` was read from the store after its last error
        self._link: str | None = None
        self._last_error: UsageError | None = None
        self._lost_seconds = 0.0
        self._hanging: threading.Thread | None = None  # thread of a call that timed out; it may still return

    def open(self) -> None:
        """Connect before anything is trained, so that an invalid address is refused.

        A database that holds the experiment needs no check. MLflow is then imported with the first run.
        """
        if self._tracker is not None and not self._tracker.is_ready:
            self._attempt(self._connect, GIVE_UP_AFTER)

    def offer(self, cells: Mapping[str, Callable[[], Run]]) -> None:
        """Record these cells, and all that earlier calls failed to record.

        The key of each cell identifies its content.
        """
        self._cells |= cells
        if self._cells:
            self._attempt(self._send, PAUSE_AFTER)

    def conclude(self, report: Run) -> None:
        """Record the report and everything that could not be recorded before."""
        self._report = report
        self._attempt(self._send, GIVE_UP_AFTER)

    @property
    def page(self) -> str | None:
        """One line with the link to the runs."""
        if self._tracker is None or self._link is None:
            return None
        hint = "" if self._tracker.is_remote else " (start the page with `make ui`)"
        return f"runs grouped by loss: {self._link}{hint}"

    @property
    def shortfall(self) -> str | None:
        """One line on missing runs: how many, why, and what to do; None if all are recorded."""
        wanted = {*self._cells} | ({self._report.content} if self._report else set())
        if self._tracker is None or wanted <= self._stored:
            return None
        stored = f"{len(wanted & self._stored)} of {len(wanted)} runs are recorded there, all are in {self._folder}"
        return f"{self._last_error}: {stored}; {self._remedy}"

    def _attempt(self, action: Callable[[Tracker], None], limit: float) -> None:
        """Call the action unless a call hangs or more than `limit` seconds are lost."""
        hangs = self._hanging is not None and self._hanging.is_alive()
        if self._tracker is None or hangs or self._lost_seconds >= limit:
            return
        try:
            action(self._tracker)
        except UsageError as error:
            if not self._cells and not isinstance(error, StoreError):
                raise  # nothing is trained yet, so that the user can still correct the address
            if self._last_error is None:
                console.print(f"{error}; continuing without tracking; the number of missing runs is printed at the end")
            self._last_error, self._is_listed = error, False

    def _connect(self, tracker: Tracker) -> None:
        load_mlflow()
        # Other processes may be creating the same database file: wait for them without a limit.
        self._in_time(tracker.open, None if tracker.is_file else CALL_TIMEOUT)

    def _send(self, tracker: Tracker) -> None:
        if not self._is_listed:
            self._connect(tracker)
            timeout = CALL_TIMEOUT + len(self._cells) / LISTED_PER_SECOND
            self._stored = self._in_time(lambda: tracker.present(self._folder.name), timeout)
            self._is_listed = True
        missing = [make for content, make in self._cells.items() if content not in self._stored]
        for i in range(0, len(missing), tracker.portion):
            self._record(tracker, [make() for make in missing[i : i + tracker.portion]])
        if self._report is not None:
            if self._report.content not in self._stored:
                self._record(tracker, [self._report])
            self._link = self._in_time(lambda: tracker.link(self._folder.name))

    def _record(self, tracker: Tracker, runs: Sequence[Run]) -> None:
        if self._lost_seconds >= GIVE_UP_AFTER:
            raise StoreError(f"{tracker} is too slow")
        started = time.monotonic()
        self._in_time(lambda: tracker.record(runs))
        self._lost_seconds += max(0.0, time.monotonic() - started - RUN_SECONDS * len(runs))
        self._stored |= {run.content for run in runs}

    def _in_time(self, call: Callable[[], T], timeout: float | None = CALL_TIMEOUT) -> T:
        """Return the result of the call. After a timeout the call goes on in its thread.

        Raises:
            StoreError: the call timed out or raised something else than a `UsageError`.
        """
        started, outcome = time.monotonic(), Future[T]()
        thread = threading.Thread(target=_run_into, args=(outcome, call), daemon=True)
        thread.start()
        try:
            return outcome.result(timeout)
        except Exception as error:
            self._lost_seconds += time.monotonic() - started
            if not outcome.done():
                self._hanging = thread
                raise StoreError(f"{self._tracker} does not answer within {timeout:g} s") from error
            if isinstance(error, UsageError):
                raise
            # An error of MLflow on an unexpected answer must not end the training.
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise StoreError(f"{self._tracker} cannot be used ({reason})") from error


def tracker_of(tracking: Mapping[str, Any]) -> Tracker | None:
    """Return the tracker of a configuration; None for `tracking=none`."""
    return Tracker(tracking["uri"], tracking["experiment"], conf.ROOT) if tracking["enabled"] else None


def _run_into(outcome: Future[T], call: Callable[[], T]) -> None:
    try:
        outcome.set_result(call())
    except BaseException as error:
        outcome.set_exception(error)
