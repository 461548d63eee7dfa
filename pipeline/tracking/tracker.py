"""What was trained, as runs in MLflow.

MLflow is a view: a cell is complete on disk before anything here hears of it and can be sent again, so a
lost tracking server costs a page, never evidence. `record` replaces whatever the same sweep already holds
under the same fingerprints; `present` tells what need not be sent. A store that fails is `StoreError`; one that
cannot be meant is a `UsageError` when it is opened.

MLflow takes seconds to import, so nothing here does before a `Tracker` is opened.
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
    beside_others,
    content_of,
    database_of,
    grouped_view,
    insert_runs,
    send_run,
)

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from mlflow.entities import Run as StoredRun

# Set before MLflow is imported, and only where the user has not decided. MLflow's own defaults wait minutes for a
# server that is not there, and repeat a call whose answer was lost, which makes a second run; here whoever calls
# decides when to try again. What MLflow would log about a store that fails is in our one line.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class StoreError(UsageError):
    """The store does not answer, or refuses. What was to be recorded can be sent later."""


class Tracker:
    """An MLflow experiment to record runs in. `tracking=none` is the absence of one."""

    def __init__(self, uri: str | None, experiment: str, root: Path) -> None:
        self.root = root.resolve()
        self._given = uri or os.environ.get("MLFLOW_TRACKING_URI")
        self.uri = self._given or f"sqlite:///{self.root / 'mlflow.db'}"
        self.experiment = experiment

    def described(self) -> dict[str, str | None]:
        """Where the runs go, without a password; no `uri` stands for the database at the root."""
        return {"uri": self._given and without_password(self._given), "experiment": self.experiment}

    def __str__(self) -> str:
        return f"MLflow at {without_password(self.uri)}"

    def open(self) -> None:
        """Connect, and create what is missing: database, experiment, its description and its grouped view.

        Concurrent calls for one database wait for each other.

        Raises:
            UsageError: no store can be meant by this address, or the experiment is deleted.
            StoreError: the store fails, for now.
        """
        load()
        with _plain_errors(self, opening=True), self._creating():
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.uri)
            self._found = _once_permitted(self._find_or_create_experiment)
            self._id = str(self._found.experiment_id)
            defaults = {
                "mlflow.note.content": DESCRIPTION.format(link=self._page(VIEW)),
                f"mlflow.sharedViewState.{VIEW}": grouped_view("tags.kind = 'train'"),
            }
            for key in defaults.keys() - self._found.tags.keys():
                beside_others(partial(self._client.set_experiment_tag, self._id, key, defaults[key]))

    @property
    def is_ready(self) -> bool:
        """Whether a file of SQLite holds the experiment already, told without MLflow and its second of imports."""
        if not self.is_file:
            return False
        try:
            with closing(sqlite3.connect(f"{self._file.as_uri()}?mode=ro", timeout=0, uri=True)) as database:
                known = database.execute("SELECT lifecycle_stage FROM experiments WHERE name = ?", [self.experiment])
                return known.fetchall() == [("active",)]
        except sqlite3.Error:  # whatever it is, opening will say it
            return False

    def present(self, sweep: str) -> set[str]:
        """The content of the runs that this sweep already holds complete, and once.

        What a killed process left RUNNING is closed: nobody but the holder of the trial's folder may ask.
        """
        with _plain_errors(self):
            runs = [run for run in self._search(f"tags.sweep = {_quoted(sweep)}") if "fingerprint" in run.data.tags]
            for run in runs:
                if run.info.status == "RUNNING":
                    self._client.set_terminated(run.info.run_id, "KILLED")
            copies = Counter(run.data.tags["fingerprint"] for run in runs)
            complete = (run.data.tags for run in runs if run.info.status == "FINISHED")
            return {content_of(tags) for tags in complete if copies[tags["fingerprint"]] == 1}

    def record(self, runs: Sequence[Run]) -> None:
        """Write the runs, each in place of any of its sweep with its fingerprint; many at once is cheapest.

        Killed on the way, it leaves a run absent (a database) or RUNNING (a server), never present.
        """
        with _plain_errors(self):
            if database := database_of(self._client):
                insert_runs(database, self._found, runs)
                return
            self._discard(runs)
            for run in runs:
                send_run(self._client, self._id, run)

    def link(self, sweep: str, ui: str = "http://127.0.0.1:5000") -> str:
        """Publish the sweep's grouped view and return its address; `ui` is where a database's UI listens."""
        key = f"{VIEW}-{hashlib.sha256(sweep.encode()).hexdigest()[:12]}"
        view = grouped_view(f"tags.sweep = {_quoted(sweep)} and tags.kind = 'train'")
        with _plain_errors(self):
            self._client.set_experiment_tag(self._id, f"mlflow.sharedViewState.{key}", view)
        base = without_password(self.uri if self._is_remote else ui)
        return f"{base.rstrip('/')}/{self._page(key)}"

    @property
    def is_local(self) -> bool:
        """Whether the runs go to a database whose page has yet to be started."""
        return not self._is_remote

    @property
    def is_file(self) -> bool:
        """Whether the store is a file of SQLite, which only other writers can make wait."""
        return self.uri.startswith("sqlite")

    @property
    def portion(self) -> int:
        """How many runs to record at once, where each call shall end soon."""
        return 1 if self._is_remote else 16

    @property
    def _is_remote(self) -> bool:
        return self.uri.startswith(("http://", "https://"))

    def _creating(self) -> AbstractContextManager[object]:
        """MLflow creates neither a database nor an experiment safely where two processes begin at once."""
        if self._is_remote:
            return nullcontext()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self._file}.lock")

    @property
    def _file(self) -> Path:
        """The file of SQLite; where the store is none, the one that it would be by default."""
        file = self.uri.partition(":///")[2].partition("?")[0] if self.is_file else ""
        return Path(file or self.root / "mlflow.db").absolute()

    def _find_or_create_experiment(self) -> Experiment:
        found = self._client.get_experiment_by_name(self.experiment) or self._create_experiment()
        if found.lifecycle_stage != "active":
            raise UsageError(
                f"The MLflow experiment {self.experiment!r} is deleted: choose another name, or restore it "
                f"with `mlflow experiments restore --experiment-id {found.experiment_id}`"
            )
        return found

    def _create_experiment(self) -> Experiment:
        from mlflow.exceptions import MlflowException

        # Left alone, MLflow freezes the current working directory into an experiment of a database.
        home = None if self._is_remote else (self.root / "mlruns" / self.experiment).as_uri()
        try:
            return self._client.get_experiment(self._client.create_experiment(self.experiment, home))
        except MlflowException:  # another process was faster
            found = self._client.get_experiment_by_name(self.experiment)
            if found is None:
                raise
            return found

    def _search(self, query: str) -> Iterator[StoredRun]:
        token = None
        while True:
            # A server takes some milliseconds a run: no call may take longer than a silent server is waited for.
            page = self._client.search_runs([self._id], query, max_results=200, page_token=token)
            yield from page
            if not (token := page.token):
                return

    def _discard(self, runs: Sequence[Run]) -> None:
        for run in runs:
            identity = [f"tags.{key} = {_quoted(run.tags[key])}" for key in ("sweep", "fingerprint")]
            for old in list(self._search(" and ".join(identity))):
                self._client.delete_run(old.info.run_id)

    def _page(self, view: str) -> str:
        mode = "compareRunsMode=CHART&workflowType=machine_learning"
        return f"#/experiments/{self._id}/runs?viewStateShareKey={view}&{mode}"


def load() -> None:
    """Import MLflow, which takes seconds that no store is to blame for."""
    _set_environment()
    with gc_paused_import("mlflow"):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def _set_environment() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def _plain_errors(tracker: Tracker, opening: bool = False) -> Iterator[None]:
    """A store that fails is one line; so is one that cannot be meant, where it is opened."""
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
        if opening and _cannot_be_meant(error):
            raise UsageError(f"{line}: correct MLFLOW_TRACKING_URI or choose tracking=none") from error
        raise StoreError(line) from error


def _once_permitted(find: Callable[[], Experiment]) -> Experiment:
    """What is found. A server grants the right to an experiment a moment after another process has made it."""
    from mlflow.exceptions import MlflowException

    for pause in (0.2, 0.5, 1.0, 2.0):
        try:
            return find()
        except MlflowException as error:
            if error.error_code != "PERMISSION_DENIED":
                raise
        time.sleep(pause)
    return find()


def _cannot_be_meant(error: Exception) -> bool:
    """Whether the address is wrong: another try would end the same way."""
    from sqlalchemy.exc import ArgumentError

    if isinstance(error, json.JSONDecodeError):  # some proxy's page in place of an answer
        return False
    wrong = isinstance(error, ImportError | ArgumentError | ValueError) or "file is not a database" in str(error)
    return wrong or getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"


def _quoted(text: str) -> str:
    """A string in MLflow's search language, which knows two quotes and no escape."""
    return f'"{text}"' if "'" in text else f"'{text}'"
