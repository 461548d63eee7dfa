"""MLflow experiment of a trial's runs.

MLflow is only a view. Every cell is complete on disk before it is sent and can be sent again, so that a lost tracking
server loses no result. `record` replaces the runs of the same sweep with the same fingerprints. `present` lists the
runs that need not be sent. A failing store raises `StoreError`; an invalid address raises `UsageError` on opening.

MLflow takes seconds to import. It is imported when a `Tracker` is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from likelihood_lab.errors import UsageError
from pipeline.entry import gc_paused_import
from pipeline.text import without_password
from pipeline.tracking.mlflow_store import (
    DESCRIPTION,
    VIEW,
    Run,
    content_of,
    database_of,
    grouped_view,
    insert_runs,
    retry_on_conflict,
    send_run,
)

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from mlflow.entities import Run as StoredRun

# Set before MLflow is imported, unless the user has set them. With MLflow's own defaults, a call waits minutes for an
# absent server. MLflow also repeats a call whose answer was lost, which makes a second run; here the caller decides
# when to try again. Logging is off because our own line reports a failing store.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class StoreError(UsageError):
    """Store that does not answer, or refuses a call. The runs can be sent later."""


class Tracker:
    """MLflow experiment that runs are recorded in."""

    def __init__(self, uri: str | None, experiment: str, root: Path) -> None:
        self.root = root.resolve()
        self._given = uri or os.environ.get("MLFLOW_TRACKING_URI")
        self.uri = self._given or f"sqlite:///{self.root / 'mlflow.db'}"
        self.experiment = experiment
        self.is_remote = self.uri.startswith(("http://", "https://"))  # else a database, whose page the user must start
        self.is_file = self.uri.startswith("sqlite")  # it can block only while others write
        self.portion = 1 if self.is_remote else 16  # runs to record in one call, so that each call ends soon

    def described(self) -> dict[str, str | None]:
        """Return the address without a password and the experiment; the default database has no `uri`."""
        return {"uri": self._given and without_password(self._given), "experiment": self.experiment}

    def __str__(self) -> str:
        return f"MLflow at {without_password(self.uri)}"

    def open(self) -> None:
        """Connect, and create the database, the experiment, its description and its grouped view if absent.

        Concurrent calls for one database wait for each other.

        Raises:
            UsageError: the address is invalid, or the experiment is deleted.
            StoreError: the store does not work at present.
        """
        load_mlflow()
        with _errors_in_one_line(self, opening=True), self._creation_lock():
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.uri)
            self._stored = _retry_while_denied(self._find_or_create_experiment)
            self._id = str(self._stored.experiment_id)
            defaults = {
                "mlflow.note.content": DESCRIPTION.format(link=self._page(VIEW)),
                f"mlflow.sharedViewState.{VIEW}": grouped_view("tags.kind = 'train'"),
            }
            for key in defaults.keys() - self._stored.tags.keys():
                retry_on_conflict(partial(self._client.set_experiment_tag, self._id, key, defaults[key]))

    @property
    def is_ready(self) -> bool:
        """True if an SQLite file already holds the experiment; computed without importing MLflow."""
        if not self.is_file:
            return False
        try:
            with closing(sqlite3.connect(f"{self._file.as_uri()}?mode=ro", timeout=0, uri=True)) as database:
                rows = database.execute("SELECT lifecycle_stage FROM experiments WHERE name = ?", [self.experiment])
                return rows.fetchall() == [("active",)]
        except sqlite3.Error:  # `open` will report it
            return False

    def present(self, sweep: str) -> set[str]:
        """Return the contents of the sweep's runs that are complete and have no copy.

        Runs that a killed process left RUNNING are closed. Only the process that holds the trial's folder may call
        this.
        """
        with _errors_in_one_line(self):
            runs = [run for run in self._search(f"tags.sweep = {_quoted(sweep)}") if "fingerprint" in run.data.tags]
            for run in runs:
                if run.info.status == "RUNNING":
                    self._client.set_terminated(run.info.run_id, "KILLED")
            copies = Counter(run.data.tags["fingerprint"] for run in runs)
            complete = (run.data.tags for run in runs if run.info.status == "FINISHED")
            return {content_of(tags) for tags in complete if copies[tags["fingerprint"]] == 1}

    def record(self, runs: Sequence[Run]) -> None:
        """Write the runs; each replaces the runs of its sweep with its fingerprint. Many at once are fastest.

        If the process is killed meanwhile, a run is absent (database) or RUNNING (server), never `present`.
        """
        with _errors_in_one_line(self):
            if database := database_of(self._client):
                insert_runs(database, self._stored, runs)
                return
            self._delete_replaced(runs)
            for run in runs:
                send_run(self._client, self._id, run)

    def link(self, sweep: str, ui: str = "http://127.0.0.1:5000") -> str:
        """Publish the sweep's grouped view and return its address; `ui` is the address of a database's UI."""
        key = f"{VIEW}-{hashlib.sha256(sweep.encode()).hexdigest()[:12]}"
        view = grouped_view(f"tags.sweep = {_quoted(sweep)} and tags.kind = 'train'")
        with _errors_in_one_line(self):
            self._client.set_experiment_tag(self._id, f"mlflow.sharedViewState.{key}", view)
        base = without_password(self.uri if self.is_remote else ui)
        return f"{base.rstrip('/')}/{self._page(key)}"

    def _creation_lock(self) -> AbstractContextManager[object]:
        """Lock against a second process: MLflow cannot create one database or experiment twice at once."""
        if self.is_remote:
            return nullcontext()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self._file}.lock")

    @property
    def _file(self) -> Path:
        """SQLite file of the store, or the default one if the store has none."""
        file = self.uri.partition(":///")[2].partition("?")[0] if self.is_file else ""
        return Path(file or self.root / "mlflow.db").absolute()

    def _find_or_create_experiment(self) -> Experiment:
        experiment = self._client.get_experiment_by_name(self.experiment) or self._create_experiment()
        if experiment.lifecycle_stage != "active":
            raise UsageError(
                f"The MLflow experiment {self.experiment!r} is deleted: choose another name, or restore it "
                f"with `mlflow experiments restore --experiment-id {experiment.experiment_id}`"
            )
        return experiment

    def _create_experiment(self) -> Experiment:
        from mlflow.exceptions import MlflowException

        # By default, MLflow would store the current working directory in an experiment of a database.
        home = None if self.is_remote else (self.root / "mlruns" / self.experiment).as_uri()
        try:
            return self._client.get_experiment(self._client.create_experiment(self.experiment, home))
        except MlflowException:  # another process may have created it
            experiment = self._client.get_experiment_by_name(self.experiment)
            if experiment is None:
                raise
            return experiment

    def _search(self, query: str) -> Iterator[StoredRun]:
        token = None
        while True:
            # A server takes some milliseconds per run. Small pages keep every call below the timeout.
            page = self._client.search_runs([self._id], query, max_results=200, page_token=token)
            yield from page
            if not (token := page.token):
                return

    def _delete_replaced(self, runs: Sequence[Run]) -> None:
        for run in runs:
            identity = [f"tags.{key} = {_quoted(run.tags[key])}" for key in ("sweep", "fingerprint")]
            for old in list(self._search(" and ".join(identity))):
                self._client.delete_run(old.info.run_id)

    def _page(self, view: str) -> str:
        mode = "compareRunsMode=CHART&workflowType=machine_learning"
        return f"#/experiments/{self._id}/runs?viewStateShareKey={view}&{mode}"


def load_mlflow() -> None:
    """Import MLflow; a separate call, so that its seconds do not count as the store's."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with gc_paused_import("mlflow"):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


@contextmanager
def _errors_in_one_line(tracker: Tracker, opening: bool = False) -> Iterator[None]:
    """Turn errors of the store into a one-line `StoreError`; on opening, an invalid address into a `UsageError`."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except UsageError:
        raise
    except (MlflowException, SQLAlchemyError, OSError, ImportError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0][:300] or type(error).__name__
        if re.search("failed with (timeout )?exception", reason):
            reason = "no server answers"
        line = without_password(f"{tracker} cannot be used ({reason})")
        if opening and _is_invalid_address(error):
            raise UsageError(f"{line}: correct MLFLOW_TRACKING_URI or choose tracking=none") from error
        raise StoreError(line) from error


def _retry_while_denied(find: Callable[[], Experiment]) -> Experiment:
    """Call `find` until it is permitted: a server grants the right shortly after another process's creation."""
    from mlflow.exceptions import MlflowException

    for pause in (0.2, 0.5, 1.0, 2.0):
        try:
            return find()
        except MlflowException as error:
            if error.error_code != "PERMISSION_DENIED":
                raise
        time.sleep(pause)
    return find()


def _is_invalid_address(error: Exception) -> bool:
    """Return whether the address is wrong, so that another attempt would fail in the same way."""
    from sqlalchemy.exc import ArgumentError

    if isinstance(error, json.JSONDecodeError):  # a proxy sent a page in place of an answer
        return False
    wrong = isinstance(error, ImportError | ArgumentError | ValueError) or "file is not a database" in str(error)
    return wrong or getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"


def _quoted(text: str) -> str:
    """Quote a string for MLflow's search language, which has two quotes and no escape."""
    return f'"{text}"' if "'" in text else f"'{text}'"
