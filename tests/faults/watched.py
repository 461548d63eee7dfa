"""A trial of 24 runs in a child, to which something happens at a named moment, and what must be there then.

Nothing in the pipeline knows of it: the child watches its own system calls by Python's audit hooks, and the statements
that it sends to MLflow's database. Each is a crash point, named after what it does to which file or table; right before
any of them the child can be killed, or its disk filled.
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
from pipeline.storage.cells import TrialFolder
from pipeline.trial import tiles as training
from pipeline.trial.run import run
from tests import trials

LOSSES, SEEDS = ("ce", "nll", "brier"), range(8)
REQUEST = (
    f"loss=[{','.join(LOSSES)}]", f"seed=[{','.join(map(str, SEEDS))}]", "epochs=3", "trainer.tile=16",
    "trainer.checkpoint_every=0", "tracking=mlflow",
)  # fmt: skip
KILLED = -signal.SIGKILL

Moment = tuple[str, int]
"""A crash point, and at which of its passings."""


@dataclass
class Watch:
    """Counts the crash points of this process, and lets something happen at one of them."""

    root: Path
    where: Moment | None
    happens: Callable[[], None]
    passed: Counter[str] = field(default_factory=Counter)

    def begin(self) -> None:
        sys.addaudithook(self._audited)
        fsync = os.fsync

        def synced(handle: int) -> None:
            self._pass(f"fsync {self._named(os.readlink(f'/proc/self/fd/{handle}'))}")
            fsync(handle)

        os.fsync = synced  # type: ignore[assignment]  # raises no audit event
        sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", self._stated)
        sqlalchemy.event.listen(sqlalchemy.Engine, "commit", lambda _: self._pass("sql COMMIT"))

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            path = str(arguments[0])
            if path.startswith(str(self.root)):
                self._pass(f"{event.removeprefix('os.')} {self._named(path)}")

    def _stated(self, _: Any, __: Any, statement: str, *___: Any) -> None:
        found = re.match(r"(INSERT INTO|UPDATE) (\w+)", statement)
        if found:
            self._pass(f"sql {found[0]}")

    def _pass(self, name: str) -> None:
        self.passed[name] += 1
        if self.where == (name, self.passed[name]):
            self.happens()

    def _named(self, path: str) -> str:
        """A path without what tells one cell, run or process from another."""
        name = str(Path(path).relative_to(self.root)) if path.startswith(str(self.root)) else path
        name = re.sub(rf"\b({'|'.join(LOSSES)})\b", "LOSS", name)
        name = re.sub(r"figures/(\.?)[^/]+svg", r"figures/\1NAME.svg", name)
        return re.sub(r"[0-9a-f]{16,}", "ID", re.sub(r"\bs\d\b", "sN", name))


def kill() -> None:
    """This process."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Drill:
    """A folder with one trial and the database that it is recorded in."""

    root: Path

    @property
    def trial(self) -> Path:
        return self.root / "trial"

    def copied(self, target: Path) -> Drill:
        """The same database, whose making takes MLflow seconds, before any run."""
        target.mkdir(parents=True)
        shutil.copy(self.root / "mlflow.db", target)
        with closing(sqlite3.connect(target / "mlflow.db")) as database, database:
            database.execute("UPDATE experiments SET artifact_location = ?", [str(target / "mlruns")])
        return Drill(target)

    def remove(self) -> None:
        shutil.rmtree(self.root)

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.root / 'mlflow.db'}"

    def run(
        self, where: Moment | None = None, happens: Callable[[], None] = kill, kill_after: float | None = None
    ) -> Ended:
        """The command, once."""
        return in_a_child(lambda: self._work(Watch(self.root, where, happens)), kill_after)

    def crash_points(self) -> dict[str, int]:
        """What a run that nothing interrupted has passed, and how often."""
        passed: dict[str, int] = json.loads((self.root / "passed.json").read_text())
        return passed

    def _work(self, watch: Watch) -> int:
        conf.ROOT = self.root
        config = trials.compose(*REQUEST, f"tracking.uri={self.uri}")
        watch.begin()
        code = run_and_report(lambda: run(config, self.trial, "the command"))
        if watch.where is None and code == ExitCode.HOLDS:
            (self.root / "passed.json").write_text(json.dumps(watch.passed))
        return code

    def hashes(self) -> dict[str, str]:
        """Of the weights in every sound cell."""
        return {
            f"{cell.record.arm}/s{cell.record.seed}": training.weights_sha256(cell.weights)
            for cell in TrialFolder(self.trial).cells()
        }

    def recorded(self) -> dict[str, list[str]]:
        """Status of MLflow's runs, by name."""
        found: dict[str, list[str]] = {}
        with closing(sqlite3.connect(self.root / "mlflow.db")) as database:
            for name, status in database.execute("SELECT name, status FROM runs WHERE lifecycle_stage = 'active'"):
                found.setdefault(name, []).append(status)
        return found

    def assert_whole(self, hashes: dict[str, str]) -> None:
        """Every cell with these weights, every run recorded once and finished, and nothing left lying about."""
        assert self.hashes() == hashes
        names = [f"{loss}/s{seed}" for loss in LOSSES for seed in SEEDS] + ["trial/report"]
        assert self.recorded() == {name: ["FINISHED"] for name in names}
        assert json.loads((self.trial / "verdict.json").read_text())["seeds"] == list(SEEDS)
        assert (self.trial / "report.html").is_file()
        assert [path for path in self.trial.rglob("*") if path.name.endswith("-draft")] == []
        assert list(self.trial.glob("partial/*")) == []


@dataclass(frozen=True)
class Ended:
    """How a process ended, how many seconds after its first step, and what it told the user of errors."""

    code: int
    seconds: float
    errors: str


def in_a_child(work: Callable[[], int], kill_after: float | None = None) -> Ended:
    """Run in a fork of this process, which has imported everything, and kill it so long after its first step."""
    here, there = multiprocessing.Pipe(duplex=False)
    errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed below)
    with errors, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; torch's survive a fork idle
        process = multiprocessing.get_context("fork").Process(target=_child, args=(work, there, errors))
        process.start()
        there.close()
        multiprocessing.connection.wait([here])  # for the first step, or the end
        began = time.monotonic()
        process.join(kill_after)
        process.kill()
        process.join()
        assert process.exitcode is not None
        errors.seek(0)
        return Ended(process.exitcode, time.monotonic() - began, errors.read().decode())


def _child(work: Callable[[], int], there: multiprocessing.connection.Connection, errors: IO[bytes]) -> None:
    fit = training.fit
    os.dup2(errors.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)

    def telling(*arguments: Any) -> None:
        there.close()
        fit(*arguments)

    training.fit = telling
    sys.exit(work())
