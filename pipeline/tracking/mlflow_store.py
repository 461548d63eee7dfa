"""Content of an MLflow run, its rows in a database, and the grouped view of the UI."""

from __future__ import annotations

import json
import math
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Experiment
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.orm import Session

_Row = dict[str, Any]

_MAX_VALUE = 6000  # characters of a param in MLflow; the artifact config.yaml holds the full text
_MAX_DIGEST = 36  # characters of a dataset's digest in MLflow; its source holds the full digest
_CONTEXT = ("mlflow.data.context", "training")  # MLflow's tag for the use of a dataset
VIEW = "by-loss"

DESCRIPTION = """\
**[Open the runs grouped by loss]({link})**: every chart shows the mean over seeds and its range.

* A run is one (loss, seed); runs of one seed share their initial weights and their batches.
* Curves that coincide are a result, not a fault: one line hides the others. Look at `gap/parameters`, the
  relative distance between a run's weights and those of the reference under the same seed.
* Compare `val/*` and `test/*`, which are computed alike for every loss. Never compare `train/objective`: each loss
  minimises it on its own scale.
* The verdict, the report and its pictures are artifacts of the run that `tags.kind = 'report'` finds. They open in
  the page.
* `tags.kind = 'control'` finds the controls of a trial: the reference again (replay), the reference with other
  rounding (placebos), and a planted difference that the trial must detect (dose, the positive control).
* A tag `nonfinite.*` counts the points that were NaN or infinite, which no chart can show.
"""

# Grouped view: section -> (metric, chart, scale of both axes). A gap of 0 has no logarithm, hence both scales.
_SECTIONS = {
    "Compare these": [("val/nll", "LINE", "linear"), ("val/accuracy", "LINE", "linear")],
    "Distance to the reference of the same seed": [
        ("gap/parameters", "LINE", "linear"),
        ("gap/parameters", "LINE", "log"),
    ],
    "At the last step": [("test/nll", "BAR", "linear"), ("test/accuracy", "BAR", "linear")],
    "What each loss minimised: never compare": [("train/objective", "LINE", "linear")],
}


@dataclass(frozen=True)
class Run:
    """Run of one cell, or the report of a trial. A diverged run is FINISHED too; a tag marks it."""

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
        """Key of the run in `Tracker.present`."""
        return content_of(self.tags)


def retry_on_conflict(write: Callable[[], object]) -> None:
    """Call `write` again if another process has just made the same row: the server then fails the first call."""
    from mlflow.exceptions import MlflowException

    try:
        write()
    except MlflowException as error:
        if error.error_code != "BAD_REQUEST":
            raise
        write()


def content_of(tags: Mapping[str, str]) -> str:
    """Return the digest of a run's content: its fingerprint, or for a report the digest of its files."""
    return tags.get("content.sha256", tags["fingerprint"])


def _finite(run: Run) -> tuple[list[tuple[str, int, float]], dict[str, str]]:
    """Return the finite points, one for each metric and step, and tags that count the others."""
    rows = run.metrics.drop_duplicates(["metric", "step"], keep="last")
    points: list[tuple[str, int, float]] = []
    nonfinite: dict[str, list[str]] = defaultdict(list)
    for metric, step, value in rows[["metric", "step", "value"]].itertuples(index=False, name=None):
        if math.isfinite(value):
            points.append((metric, int(step), float(value)))
        else:
            nonfinite[metric].append(f"{value} at step {step}")
    return points, {f"nonfinite.{metric}": f"{len(each)}, first {each[0]}" for metric, each in nonfinite.items()}


def _truncated(values: Mapping[str, str]) -> dict[str, str]:
    return {key: value[:_MAX_VALUE] for key, value in values.items()}


def _milliseconds(run: Run) -> tuple[int, int]:
    """Return start and end in milliseconds. All points carry the end, since their own times are unknown."""
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


def database_of(client: MlflowClient) -> SqlAlchemyStore | None:
    """Return the database that this process writes to; None for a server."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = client._tracking_client.store
    return store if isinstance(store, SqlAlchemyStore) else None


def send_run(client: MlflowClient, experiment: str, run: Run) -> None:
    """Record a run with MLflow's own calls; it is RUNNING until the last call."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    points, account = _finite(run)
    start, end = _milliseconds(run)
    info = client.create_run(experiment, start, _truncated({**run.tags, **account}), run.name).info
    metrics = [Metric(metric, value, end, step) for metric, step, value in points]
    client.log_batch(info.run_id, metrics, [Param(key, value) for key, value in _truncated(run.params).items()])
    if run.dataset is not None:
        name, digest = run.dataset
        data = Dataset(name, digest[:_MAX_DIGEST], "digest", digest)
        retry_on_conflict(partial(client.log_inputs, info.run_id, [DatasetInput(data, [InputTag(*_CONTEXT)])]))
    _save_artifacts(run, info.artifact_uri, client.tracking_uri)
    client.set_terminated(info.run_id, run.status, end)


def insert_runs(store: SqlAlchemyStore, experiment: Experiment, runs: Sequence[Run]) -> None:
    """Insert the rows of the runs in one transaction, far faster than MLflow's own calls."""
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
        _delete_replaced(session, int(experiment.experiment_id), runs)
        for table, batch in rows.items():
            session.execute(insert(getattr(models, table).__table__), batch)
        _insert_datasets(session, int(experiment.experiment_id), datasets)


def _rows(run: Run, place: _Row) -> Iterator[tuple[str, _Row]]:
    """Yield (table, row) for the run itself first, then for everything but the dataset."""
    points, account = _finite(run)
    start, end = _milliseconds(run)
    state = {"status": run.status, "lifecycle_stage": "active", "user_id": "unknown"}
    yield "SqlRun", {"name": run.name, "start_time": start, "end_time": end, **place, **state}
    for key, text in _truncated({**run.tags, **account, "mlflow.runName": run.name}).items():
        yield "SqlTag", {"key": key, "value": text}
    for key, text in _truncated(run.params).items():
        yield "SqlParam", {"key": key, "value": text}
    latest: dict[str, _Row] = {}
    for metric, step, value in points:
        row = {"key": metric, "step": step, "value": value, "timestamp": end, "is_nan": False}
        yield "SqlMetric", row
        if metric not in latest or step > latest[metric]["step"]:
            latest[metric] = row
    for row in latest.values():
        yield "SqlLatestMetric", row


def _delete_replaced(session: Session, experiment: int, runs: Sequence[Run]) -> None:
    """Mark the runs that these replace as deleted; like MLflow's own deletion, this can be undone."""
    from mlflow.store.tracking.dbmodels.models import SqlRun, SqlTag

    fingerprints: dict[str, set[str]] = defaultdict(set)  # by sweep
    for run in runs:
        fingerprints[run.tags["sweep"]].add(run.tags["fingerprint"])
    deleted = {"lifecycle_stage": "deleted", "deleted_time": round(time.time() * 1000)}
    for sweep, replaced in fingerprints.items():
        tagged: Any = session.query(SqlTag.run_uuid)
        in_sweep = tagged.filter(SqlTag.key == "sweep", SqlTag.value == sweep)
        same = tagged.filter(SqlTag.key == "fingerprint", SqlTag.value.in_(replaced))
        old = [SqlRun.experiment_id == experiment, SqlRun.lifecycle_stage == "active"]
        old += [SqlRun.run_uuid.in_(in_sweep), SqlRun.run_uuid.in_(same)]
        session.query(SqlRun).filter(*old).update(deleted, synchronize_session=False)


def _insert_datasets(session: Session, experiment: int, used: Mapping[str, tuple[str, str]]) -> None:
    """Insert each dataset once, with its runs. It reads after the transaction's first write, which locks out others."""
    from mlflow.store.tracking.dbmodels.models import SqlDataset, SqlInput, SqlInputTag

    columns = (SqlDataset.name, SqlDataset.digest, SqlDataset.dataset_uuid)
    stored: Any = session.query(*columns).filter(SqlDataset.experiment_id == experiment)
    known: dict[tuple[str, str], str] = {(name, digest): key for name, digest, key in stored}
    for run_id, (name, digest) in used.items():
        short = digest[:_MAX_DIGEST]
        if (name, short) not in known:
            known[name, short] = uuid.uuid4().hex
            identity = {"name": name, "digest": short, "dataset_uuid": known[name, short]}
            source = {"dataset_source_type": "digest", "dataset_source": digest}
            session.add(SqlDataset(experiment_id=experiment, **identity, **source))
        edge = {"source_type": "DATASET", "source_id": known[name, short], "destination_type": "RUN"}
        session.add(SqlInput(input_uuid=run_id, destination_id=run_id, **edge))
        session.add(SqlInputTag(input_uuid=run_id, name=_CONTEXT[0], value=_CONTEXT[1]))


def grouped_view(query: str) -> str:
    """Return a page state in the undocumented format of MLflow's UI: runs grouped by loss, charts in order."""
    sections = [{"uuid": title, "name": title, "display": True, "isReordered": True} for title in _SECTIONS]
    charts = [_chart(title, *chart) for title, section in _SECTIONS.items() for chart in section]
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
