"""Real servers for the drills: MLflow's, which can be killed as by a power cut, and PostgreSQL."""

from __future__ import annotations

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server of HTTP in a process group of its own."""

    def __init__(self, command: Sequence[str], port: int, log: Path, environment: Mapping[str, str]) -> None:
        self.command, self.log, self.environment = list(command), log, dict(environment)
        self.url = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
        deadline = time.monotonic() + 180
        while not self._answers():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        """At once, with its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:  # noqa: S310 - our own address
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def environment(home: Path, **more: str) -> dict[str, str]:
    """That of a process which leaves its files in `home`."""
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PG"))}
    own = {"HOME": str(home), "TMPDIR": str(home / "tmp"), "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return kept | own | more


@contextmanager
def running(server: Server) -> Iterator[Server]:
    try:
        server.start()
        yield server
    finally:
        server.kill()


def plain_server(home: Path) -> Server:
    """Without passwords, on SQLite."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(home / "artifacts")]
    off = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return Server(command, port, home / "server.log", environment(home, **off))


def guarded_server(home: Path, password: str, **more: str) -> Server:
    """What `make server` starts."""
    port = free_port()
    command = [sys.executable, "-m", "pipeline.server", "--folder", str(home / "kept"), "--port", str(port)]
    own = environment(home, MLFLOW_AUTH_ADMIN_PASSWORD=password, **more)
    return Server(command, port, home / "server.log", own)


@contextmanager
def postgres(password: str) -> Iterator[tuple[str, Path]]:
    """The address, without the password, of a database that `mlflow` owns, and the folder that the server keeps."""
    found = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    psycopg = pytest.importorskip("psycopg")
    home, port = Path(tempfile.mkdtemp(prefix="postgres-")), free_port()
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # it refuses to run as root
    if as_user:
        shutil.chown(home, "postgres")
    control = [*as_user, str(Path(found).with_name("pg_ctl")), "-D", str(home / "data")]
    doors = ["--auth-local=trust", "--auth-host=scram-sha-256"]  # the socket lies in a folder of its own
    make = [*as_user, found, "-D", str(home / "data"), "-U", "owner", *doors]
    try:
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL, cwd="/")
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
