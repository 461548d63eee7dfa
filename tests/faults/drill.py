"""A trial of 24 runs in a subprocess that is killed, or whose disk is filled, at a named moment.

The pipeline knows nothing of it. The subprocess observes its own system calls through Python's audit hooks, and the
statements that it sends to MLflow's database. Each of them is a crash point, named by the action and by the file or
table. The subprocess can be killed, or its disk filled, right before any of them.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import sqlalchemy

from pipeline.config import schema as conf
from pipeline.entry import ExitCode, run_and_report
from pipeline.trial import tiles
from pipeline.trial.run import run
from tests import trials

LOSSES, SEEDS = ("ce", "nll", "brier"), range(8)
REQUEST = (
    f"loss=[{','.join(LOSSES)}]", f"seed=[{','.join(map(str, SEEDS))}]", "epochs=3", "trainer.tile=16",
    "trainer.checkpoint_every=0", "tracking=mlflow",
)  # fmt: skip
KILLED = -signal.SIGKILL

Moment = tuple[str, int]
"""A crash point and the number of its occurrence, from 1."""


@dataclass
class Watch:
    """Counts the crash points of this process and calls `action` at one of them."""

    root: Path
    moment: Moment | None
    action: Callable[[], None]
    counts: Counter[str] = field(default_factory=Counter)

    def begin(self) -> None:
        sys.addaudithook(self._on_audit_event)
        fsync = os.fsync

        def counted_fsync(handle: int) -> None:
            self._count(f"fsync {self._general(os.readlink(f'/proc/self/fd/{handle}'))}")
            fsync(handle)

        os.fsync = counted_fsync  # type: ignore[assignment]  # raises no audit event
        sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", self._on_statement)
        sqlalchemy.event.listen(sqlalchemy.Engine, "commit", lambda _: self._count("sql COMMIT"))

    def _on_audit_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            path = str(arguments[0])
            if path.startswith(str(self.root)):
                self._count(f"{event.removeprefix('os.')} {self._general(path)}")

    def _on_statement(self, _: Any, __: Any, statement: str, *___: Any) -> None:
        if found := re.match(r"(INSERT INTO|UPDATE) (\w+)", statement):
            self._count(f"sql {found[0]}")

    def _count(self, name: str) -> None:
        self.counts[name] += 1
        if self.moment == (name, self.counts[name]):
            self.action()

    def _general(self, path: str) -> str:
        """Return the path with placeholders for the names of a loss, seed, figure or process."""
        name = str(Path(path).relative_to(self.root)) if path.startswith(str(self.root)) else path
        name = re.sub(rf"\b({'|'.join(LOSSES)})\b", "LOSS", name)
        name = re.sub(r"figures/(\.?)[^/]+svg", r"figures/\1NAME.svg", name)
        return re.sub(r"[0-9a-f]{16,}", "ID", re.sub(r"\bs\d\b", "sN", name))


def kill() -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Ended:
    """Exit code of a process, seconds since its first training step, and its stderr."""

    code: int
    seconds: float
    errors: str


@dataclass(frozen=True)
class Drill:
    """A folder with one trial and the database of its runs."""

    root: Path

    @property
    def trial(self) -> Path:
        return self.root / "trial"

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.root / 'mlflow.db'}"

    def copy(self, target: Path) -> Drill:
        """Copy the database, without a trial, to another folder."""
        target.mkdir(parents=True)
        shutil.copy(self.root / "mlflow.db", target)
        with closing(sqlite3.connect(target / "mlflow.db")) as database, database:
            database.execute("UPDATE experiments SET artifact_location = ?", [str(target / "mlruns")])
        return Drill(target)

    def run(
        self, moment: Moment | None = None, action: Callable[[], None] = kill, kill_after: float | None = None
    ) -> Ended:
        """Run the command once in a subprocess."""
        return run_forked(lambda: self._work(Watch(self.root, moment, action)), kill_after)

    def _work(self, watch: Watch) -> int:
        conf.ROOT = self.root
        config = trials.compose(*REQUEST, f"tracking.uri={self.uri}")
        watch.begin()
        code = run_and_report(lambda: run(config, self.trial, "the command"))
        if watch.moment is None and code == ExitCode.HOLDS:
            (self.root / "counts.json").write_text(json.dumps(watch.counts))
        return code

    def crash_points(self) -> dict[str, int]:
        """Return the crash points of a run that nothing interrupted, with the number of occurrences of each."""
        counts: dict[str, int] = json.loads((self.root / "counts.json").read_text())
        return counts

    @property
    def hashes(self) -> dict[str, str]:
        return trials.hashes(self.trial)

    def assert_whole(self, hashes: dict[str, str]) -> None:
        """Every cell has these weights, every run is recorded once and finished, and no draft is left."""
        assert self.hashes == hashes
        runs: dict[str, list[str]] = {}
        with closing(sqlite3.connect(self.root / "mlflow.db")) as database:
            for name, status in database.execute("SELECT name, status FROM runs WHERE lifecycle_stage = 'active'"):
                runs.setdefault(name, []).append(status)
        names = [f"{loss}/s{seed}" for loss in LOSSES for seed in SEEDS] + ["trial/report"]
        assert runs == {name: ["FINISHED"] for name in names}
        assert trials.verdict(self.trial)["seeds"] == list(SEEDS)
        assert (self.trial / "report.html").is_file()
        assert [path for path in self.trial.rglob("*") if path.name.endswith("-draft")] == []
        assert list(self.trial.glob("partial/*")) == []


def run_forked(work: Callable[[], int], kill_after: float | None = None) -> Ended:
    """Run `work` in a fork of this process, and kill it so many seconds after its first training step."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed below)
    with errors, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; torch's survive a fork idle
        process = multiprocessing.get_context("fork").Process(target=_child, args=(work, sender, errors))
        process.start()
        sender.close()
        multiprocessing.connection.wait([receiver])  # for the first step, or the end
        began = time.monotonic()
        process.join(kill_after)
        process.kill()
        process.join()
        assert process.exitcode is not None
        errors.seek(0)
        return Ended(process.exitcode, time.monotonic() - began, errors.read().decode())


def _child(work: Callable[[], int], sender: multiprocessing.connection.Connection, errors: IO[bytes]) -> None:
    fit = tiles.fit
    os.dup2(errors.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)

    def reporting_fit(*arguments: Any) -> None:
        sender.close()
        fit(*arguments)

    tiles.fit = reporting_fit
    sys.exit(work())
