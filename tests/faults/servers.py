"""Servers for the drills (MLflow's and PostgreSQL), trials as commands, and checks of a store's contents."""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pipeline.storage.cells import TrialFolder
from pipeline.tracking.tracker import load_mlflow
from tests.trials import start_command


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a process that leaves its files in `home`."""
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PG"))}
    own = {"HOME": str(home), "TMPDIR": str(home / "tmp"), "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return kept | own | more


class Server:
    """An HTTP server in its own process group."""

    def __init__(self, command: Sequence[str], port: int, log: Path, environment: Mapping[str, str]) -> None:
        self.command = [*command, "--port", str(port)]
        self.url, self.log, self.environment = f"http://127.0.0.1:{port}", log, dict(environment)
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
        deadline = time.monotonic() + 180
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(self.log.read_text())
            time.sleep(0.2)

    def kill(self) -> None:
        """Kill the server and its workers at once."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:  # noqa: S310 - our own address
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def plain_server(home: Path) -> Server:
    """Return a server without passwords, on SQLite."""
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
    command += ["--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(home / "artifacts")]
    own = environment(home, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    return Server(command, free_port(), home / "server.log", own)


def guarded_server(home: Path, password: str, **more: str) -> Server:
    """Return the server that `make server` starts."""
    command = [sys.executable, "-m", "pipeline.server", "--folder", str(home / "kept")]
    own = environment(home, MLFLOW_AUTH_ADMIN_PASSWORD=password, **more)
    return Server(command, free_port(), home / "server.log", own)


@contextmanager
def postgres(password: str) -> Iterator[tuple[str, Path]]:
    """Run PostgreSQL; yield the address of a database of `mlflow`, without the password, and the server's folder."""
    initdb = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    if initdb is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    psycopg = pytest.importorskip("psycopg")
    home, port = Path(tempfile.mkdtemp(prefix="postgres-")), free_port()
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # it refuses to run as root
    if as_user:
        shutil.chown(home, "postgres")
    control = [*as_user, str(Path(initdb).with_name("pg_ctl")), "-D", str(home / "data")]
    logins = ["--auth-local=trust", "--auth-host=scram-sha-256"]  # the socket lies in a folder of its own
    create = [*as_user, initdb, "-D", str(home / "data"), "-U", "owner", *logins]
    try:
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL, cwd="/")
        options = f"-p {port} -h 127.0.0.1 -k {home}"
        start = [*control, "-w", "-o", options, "-l", str(home / "log"), "start"]
        subprocess.run(start, check=True, stdout=subprocess.DEVNULL, cwd="/")
        with psycopg.connect(host=str(home), port=port, user="owner", dbname="postgres", autocommit=True) as owner:
            owner.execute(psycopg.sql.SQL("CREATE ROLE mlflow LOGIN PASSWORD {}").format(password))
            owner.execute("CREATE DATABASE mlflow OWNER mlflow")
        yield f"postgresql://mlflow@127.0.0.1:{port}/mlflow", home
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=False, stdout=subprocess.DEVNULL, cwd="/")
        shutil.rmtree(home, ignore_errors=True)


def start_trial(folder: Path, environment: Mapping[str, str], seeds: int, *overrides: str) -> subprocess.Popen[str]:
    """Start a trial of three losses in `folder`; a tile is a seed."""
    return start_command(
        "trainer=cpu", "model.hidden=[16]", "audit=false", "protocol.controls=none", "loss=[ce,nll,brier]",
        f"seed={list(range(seeds))}", "trainer.tile=3", *overrides, f"hydra.run.dir={folder}", environment=environment,
    )  # fmt: skip


def wait_for(*trials: subprocess.Popen[str]) -> list[str]:
    """Wait for the trials and return their outputs; each must end with code 0."""
    outputs = [trial.communicate()[0] for trial in trials]
    for trial, output in zip(trials, outputs, strict=True):
        assert trial.returncode == 0, output
    return outputs


def sync(folder: Path, environment: Mapping[str, str]) -> str:
    command = [sys.executable, "-m", "pipeline.sync", str(folder)]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_store(uri: str, folders: Sequence[Path]) -> None:
    """The store holds every cell and report once, FINISHED, with every finite point, and nothing else."""
    load_mlflow()
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, max_results=10_000)
    assert {run.info.status for run in runs} == {"FINISHED"}
    names = Counter((run.data.tags["sweep"], run.info.run_name) for run in runs)
    cells = {(path.name, f"{c.record.arm}/s{c.record.seed}"): c for path in folders for c in TrialFolder(path).cells()}
    assert names == Counter([*cells, *((folder.name, f"{folder.name}/report") for folder in folders)])
    for run in runs:
        cell = cells.get((run.data.tags["sweep"], run.info.run_name))
        if cell is not None:
            for metric, points in cell.history.groupby("metric"):
                finite = [(int(p.step), float(p.value)) for p in points.itertuples() if math.isfinite(p.value)]
                stored = client.get_metric_history(run.info.run_id, str(metric))
                assert sorted((p.step, p.value) for p in stored) == sorted(finite)
