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
import math
import os
import re
import sqlite3
import subprocess
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pipeline.errors import UsageError
from pipeline.imports import lasting

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Experiment
    from mlflow.entities import Run as StoredRun
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.orm import Session

_Row = dict[str, Any]

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
_LONGEST_VALUE = 6000  # MLflow's limit for a param; what is cut stands in the config.yaml artifact
_LONGEST_DIGEST = 36  # MLflow's limit for the digest of a dataset; its source keeps the whole
_CONTEXT = ("mlflow.data.context", "training")  # how MLflow says what a run used a dataset for
_VIEW = "by-loss"

_DESCRIPTION = """\
**[Open the runs grouped by loss]({link})**: every chart shows the mean over seeds and its range.

* A run is one (loss, seed); runs of one seed share their initial weights and their batches.
* Curves that coincide are the finding, not a fault: one line hides the others. Look at `gap/parameters`, the
  relative distance between a run's weights and those of the reference under the same seed.
* Compare `val/*` and `test/*`, which are computed alike for every loss. Never compare `train/objective`: it
  is what each loss minimised, on its own scale.
* The verdict, the report and its pictures are artifacts of the run that `tags.kind = 'report'` finds; they open in
  the page.
* `tags.kind = 'control'` finds what a trial trained to test itself: the reference again (replay), with other roundings
  (placebos) and with a difference that it has to notice (dose).
* A tag `nonfinite.*` counts the points that were NaN or infinite, which no chart can show.
"""

# The grouped view: section -> (metric, chart, scale of both axes). A gap of 0 has no logarithm, hence both.
_SECTIONS = {
    "Compare these": [("val/nll", "LINE", "linear"), ("val/accuracy", "LINE", "linear")],
    "Distance to the reference of the same seed": [
        ("gap/parameters", "LINE", "linear"),
        ("gap/parameters", "LINE", "log"),
    ],
    "At the last step": [("test/nll", "BAR", "linear"), ("test/accuracy", "BAR", "linear")],
    "What each loss minimised: never compare": [("train/objective", "LINE", "linear")],
}


class StoreError(UsageError):
    """The store does not answer, or refuses. What was to be recorded can be sent later."""


@dataclass(frozen=True)
class Run:
    """One cell, or the report of a trial. A diverged cell did its job: FINISHED, and a tag says the rest."""

    name: str
    tags: Mapping[str, str]  # `sweep` and `fingerprint` identify the run
    params: Mapping[str, str]
    metrics: pd.DataFrame  # columns metric, step, value; may be empty
    started: float  # seconds since the epoch
    ended: float
    status: str = "FINISHED"
    dataset: tuple[str, str] | None = None  # name, digest
    artifacts: Mapping[str, Path | str] = field(default_factory=dict)  # path in MLflow -> a file, or text

    @property
    def content(self) -> str:
        """What `present` tells it by."""
        return _content(self.tags)


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
                "mlflow.note.content": _DESCRIPTION.format(link=self._page(_VIEW)),
                f"mlflow.sharedViewState.{_VIEW}": _grouped_view("tags.kind = 'train'"),
            }
            for key in defaults.keys() - self._found.tags.keys():
                _beside_others(partial(self._client.set_experiment_tag, self._id, key, defaults[key]))

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
            return {_content(tags) for tags in complete if copies[tags["fingerprint"]] == 1}

    def record(self, runs: Sequence[Run]) -> None:
        """Write the runs, each in place of any of its sweep with its fingerprint; many at once is cheapest.

        Killed on the way, it leaves a run absent (a database) or RUNNING (a server), never present.
        """
        with _plain_errors(self):
            if database := _database(self._client):
                _insert(database, self._found, runs)
                return
            self._discard(runs)
            for run in runs:
                _send(self._client, self._id, run)

    def link(self, sweep: str, ui: str = "http://127.0.0.1:5000") -> str:
        """Publish the sweep's grouped view and return its address; `ui` is where a database's UI listens."""
        key = f"{_VIEW}-{hashlib.sha256(sweep.encode()).hexdigest()[:12]}"
        view = _grouped_view(f"tags.sweep = {_quoted(sweep)} and tags.kind = 'train'")
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
    with lasting("mlflow"):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def git_state(root: Path) -> dict[str, str]:
    """Commit and cleanliness of the repository around `root`, as tags; empty where there is none."""
    try:
        commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git.commit": commit, "git.dirty": "true" if changes else "false"}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)  # noqa: S603
    return done.stdout.strip()


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


def _beside_others(write: Callable[[], object]) -> None:
    """Of several processes that make the same row at once, a server fails all but one; then the row is there."""
    from mlflow.exceptions import MlflowException

    try:
        write()
    except MlflowException as error:
        if error.error_code != "BAD_REQUEST":
            raise
        write()


def _cannot_be_meant(error: Exception) -> bool:
    """Whether the address is wrong: another try would end the same way."""
    from sqlalchemy.exc import ArgumentError

    if isinstance(error, json.JSONDecodeError):  # some proxy's page in place of an answer
        return False
    wrong = isinstance(error, ImportError | ArgumentError | ValueError) or "file is not a database" in str(error)
    return wrong or getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"


def without_password(text: str) -> str:
    """The text without the user and password of any address: no password is printed or stored."""
    return re.sub(r"\b(ssl)?password=[^&\s]*&?", "", re.sub(r"//[^:/@\s]*:\S*@", "//", text))


def _content(tags: Mapping[str, str]) -> str:
    """What a run holds: a cell is made once and for all, a report again with every verdict."""
    return tags.get("content.sha256", tags["fingerprint"])


def _quoted(text: str) -> str:
    """A string in MLflow's search language, which knows two quotes and no escape."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def _finite(run: Run) -> tuple[list[tuple[str, int, float]], dict[str, str]]:
    """The points that a chart can show, one a metric and step, and tags that account for the others."""
    rows = run.metrics.drop_duplicates(["metric", "step"], keep="last")
    points: list[tuple[str, int, float]] = []
    lost: dict[str, list[str]] = defaultdict(list)
    for metric, step, value in rows[["metric", "step", "value"]].itertuples(index=False, name=None):
        if math.isfinite(value):
            points.append((metric, int(step), float(value)))
        else:
            lost[metric].append(f"{value} at step {step}")
    return points, {f"nonfinite.{metric}": f"{len(what)}, first {what[0]}" for metric, what in lost.items()}


def _identities(runs: Sequence[Run]) -> dict[str, set[str]]:
    """Sweep -> the fingerprints of its runs."""
    found: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        found[run.tags["sweep"]].add(run.tags["fingerprint"])
    return found


def _cut(values: Mapping[str, str]) -> dict[str, str]:
    return {key: value[:_LONGEST_VALUE] for key, value in values.items()}


def _span(run: Run) -> tuple[int, int]:
    """Start and end in milliseconds. Points carry the end: when each was taken is not known."""
    return round(run.started * 1000), round(run.ended * 1000)


def _save_artifacts(run: Run, home: str, uri: str) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    if not run.artifacts:
        return
    with tempfile.TemporaryDirectory() as stage:
        for path, content in run.artifacts.items():
            target = Path(stage, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                target.symlink_to(content.resolve(strict=True))
            else:
                target.write_text(content, encoding="utf-8")
        repository: Any = get_artifact_repository(home, uri)
        repository.log_artifacts(stage)


def _database(client: MlflowClient) -> SqlAlchemyStore | None:
    """The database, where this process writes to one and not to a server."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = client._tracking_client.store
    return store if isinstance(store, SqlAlchemyStore) else None


def _send(client: MlflowClient, experiment: str, run: Run) -> None:
    """One run through MLflow's own calls: RUNNING until the last."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    points, account = _finite(run)
    start, end = _span(run)
    info = client.create_run(experiment, start, _cut({**run.tags, **account}), run.name).info
    metrics = [Metric(metric, value, end, step) for metric, step, value in points]
    client.log_batch(info.run_id, metrics, [Param(key, value) for key, value in _cut(run.params).items()])
    if run.dataset is not None:
        name, digest = run.dataset
        data = Dataset(name, digest[:_LONGEST_DIGEST], "digest", digest)
        _beside_others(partial(client.log_inputs, info.run_id, [DatasetInput(data, [InputTag(*_CONTEXT)])]))
    _save_artifacts(run, info.artifact_uri, client.tracking_uri)
    client.set_terminated(info.run_id, run.status, end)


def _insert(store: SqlAlchemyStore, experiment: Experiment, runs: Sequence[Run]) -> None:
    """The runs in one transaction, as the rows that MLflow's own calls would write far more slowly."""
    from mlflow.store.tracking.dbmodels import models
    from sqlalchemy import insert

    rows: dict[str, list[_Row]] = defaultdict(list)
    datasets: dict[str, tuple[str, str]] = {}
    for run in runs:
        run_id = uuid.uuid4().hex
        home = f"{experiment.artifact_location}/{run_id}/artifacts"
        _save_artifacts(run, home, store.db_uri)
        place = {"experiment_id": int(experiment.experiment_id), "artifact_uri": home}
        for table, row in _rows(run, place):
            rows[table].append({"run_uuid": run_id, **row})
        if run.dataset is not None:
            datasets[run_id] = run.dataset
    with store.ManagedSessionMaker(read_only=False) as session:
        _retire(session, int(experiment.experiment_id), runs)
        for table, batch in rows.items():
            session.execute(insert(getattr(models, table).__table__), batch)
        _insert_datasets(session, int(experiment.experiment_id), datasets)


def _rows(run: Run, place: _Row) -> Iterator[tuple[str, _Row]]:
    """(table, row) for everything but the dataset, the run itself first."""
    points, account = _finite(run)
    start, end = _span(run)
    state = {"status": run.status, "lifecycle_stage": "active", "user_id": "unknown"}
    yield "SqlRun", {"name": run.name, "start_time": start, "end_time": end, **place, **state}
    for key, text in _cut({**run.tags, **account, "mlflow.runName": run.name}).items():
        yield "SqlTag", {"key": key, "value": text}
    for key, text in _cut(run.params).items():
        yield "SqlParam", {"key": key, "value": text}
    latest: dict[str, _Row] = {}
    for metric, step, value in points:
        row = {"key": metric, "step": step, "value": value, "timestamp": end, "is_nan": False}
        yield "SqlMetric", row
        if metric not in latest or step > latest[metric]["step"]:
            latest[metric] = row
    for row in latest.values():
        yield "SqlLatestMetric", row


def _retire(session: Session, experiment: int, runs: Sequence[Run]) -> None:
    """Delete what the runs replace, the way MLflow does: it can be restored."""
    from mlflow.store.tracking.dbmodels.models import SqlRun, SqlTag

    gone = {"lifecycle_stage": "deleted", "deleted_time": round(time.time() * 1000)}
    for sweep, fingerprints in _identities(runs).items():
        tagged: Any = session.query(SqlTag.run_uuid)
        here = tagged.filter(SqlTag.key == "sweep", SqlTag.value == sweep)
        twins = tagged.filter(SqlTag.key == "fingerprint", SqlTag.value.in_(fingerprints))
        old = [SqlRun.experiment_id == experiment, SqlRun.lifecycle_stage == "active"]
        old += [SqlRun.run_uuid.in_(here), SqlRun.run_uuid.in_(twins)]
        session.query(SqlRun).filter(*old).update(gone, synchronize_session=False)


def _insert_datasets(session: Session, experiment: int, used: Mapping[str, tuple[str, str]]) -> None:
    """Each dataset once, and the runs that used it. Reads after the first write, which holds off others."""
    from mlflow.store.tracking.dbmodels.models import SqlDataset, SqlInput, SqlInputTag

    columns = (SqlDataset.name, SqlDataset.digest, SqlDataset.dataset_uuid)
    here: Any = session.query(*columns).filter(SqlDataset.experiment_id == experiment)
    known: dict[tuple[str, str], str] = {(name, digest): key for name, digest, key in here}
    for run_id, (name, digest) in used.items():
        short = digest[:_LONGEST_DIGEST]
        if (name, short) not in known:
            known[name, short] = uuid.uuid4().hex
            identity = {"name": name, "digest": short, "dataset_uuid": known[name, short]}
            source = {"dataset_source_type": "digest", "dataset_source": digest}
            session.add(SqlDataset(experiment_id=experiment, **identity, **source))
        edge = {"source_type": "DATASET", "source_id": known[name, short], "destination_type": "RUN"}
        session.add(SqlInput(input_uuid=run_id, destination_id=run_id, **edge))
        session.add(SqlInputTag(input_uuid=run_id, name=_CONTEXT[0], value=_CONTEXT[1]))


def _grouped_view(query: str) -> str:
    """The state of a page as MLflow's UI shares it, undocumented: runs grouped by loss, charts in order."""
    sections, charts = [], []
    for title, wanted in _SECTIONS.items():
        sections.append({"uuid": title, "name": title, "display": True, "isReordered": True})
        charts += [_chart(title, *chart) for chart in wanted]
    grouping = {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "loss"}]}
    state = {
        "searchFilter": query,
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        "groupBy": grouping,
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,
        "compareRunSections": sections,
        "compareRunCharts": charts,
    }
    return json.dumps(state)


def _chart(section: str, metric: str, kind: str, scale: str) -> _Row:
    axes = {"xAxisKey": "step", "xAxisScaleType": scale, "scaleType": scale, "useGlobalXaxisKey": False}
    curve = {"lineSmoothness": 0, "useGlobalLineSmoothing": False}
    place = {"uuid": f"{metric} {scale}", "metricSectionId": section, "isGenerated": False, "deleted": False}
    return {"type": kind, "metricKey": metric, **place, **axes, **curve}
