"""The server that `make server` starts: permissions, many writers at once, and no secret in any file."""

from __future__ import annotations

import base64
import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from pipeline.tracking.mlflow_store import Run
from pipeline.tracking.recorder import Recorder
from pipeline.tracking.tracker import StoreError, Tracker
from tests.faults.servers import Server, check_store, environment, guarded_server, postgres, start_trial, sync, wait_for

pytest.importorskip("flask_wtf", reason="the server's packages are not installed (make .venv/.server)")
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

API = "/api/2.0/mlflow"
Passwords = tuple[str, str, str]


def call(server: Server, path: str, user: tuple[str, str] | None = None, body: object = None) -> int:
    """Return the status of the answer to a GET, or to a POST of `body`."""
    request = urllib.request.Request(server.url + path)  # noqa: S310 - our own address
    request.add_header("Content-Type", "application/json")
    if user is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(":".join(user).encode()).decode())
    try:
        with urllib.request.urlopen(request, json.dumps(body).encode() if body else None) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def check_permissions(server: Server, admin: tuple[str, str], user: tuple[str, str]) -> None:
    """The server refuses clients without the right password, and users without a grant."""
    search = f"{API}/experiments/search?max_results=1"
    for path in (search, f"{API}/runs/search", "/", f"{API}/users/list", "/api/2.0/mlflow-artifacts/artifacts"):
        assert call(server, path) == 401
        assert call(server, path, (admin[0], "wrong")) == 401
        assert call(server, path, ("nobody", admin[1])) == 401
    assert call(server, search, admin) == 200
    new = {"username": user[0], "password": user[1]}
    assert call(server, f"{API}/users/create", None, new) == 401
    assert call(server, f"{API}/users/create", admin, new) == 200
    assert call(server, f"{API}/users/create", user, new | {"username": "another"}) == 403
    assert call(server, f"{API}/experiments/get?experiment_id=0", user) == 403


def run(name: str) -> Run:
    points = pd.DataFrame({"metric": ["val/nll"], "step": [1], "value": [0.5]})
    return Run(name, {"sweep": "trial", "fingerprint": name}, {"lr": "0.1"}, points, 0.0, 1.0, artifacts={"a": "a"})


def check_no_secret(passwords: Sequence[str], *folders: Path) -> None:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert {"users.db", "auth.ini", "server.log"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert not [password for password in passwords if password.encode() in content], path


@pytest.fixture
def passwords() -> Passwords:
    """Passwords of the administrator, of a user and of the database."""
    return secrets.token_hex(12), secrets.token_hex(12), secrets.token_hex(12)


@pytest.fixture
def client(tmp_path: Path, passwords: Passwords, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Environment of a user's processes; this process gets the same login."""
    names = {"MLFLOW_TRACKING_USERNAME": "lab", "MLFLOW_TRACKING_PASSWORD": passwords[1]}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    return environment(tmp_path, **names)


def test_wrong_passwords_are_refused_and_none_is_stored(
    tmp_path: Path, passwords: Passwords, client: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with guarded_server(tmp_path, passwords[0]) as server:
        check_permissions(server, ("admin", passwords[0]), ("lab", passwords[1]))
        recorder = Recorder(Tracker(server.url, "of the lab", tmp_path), tmp_path / "trial", "")
        recorder.open()
        recorder.offer({"a": lambda: run("a")})
        assert recorder.shortfall is None
        with monkeypatch.context() as wrong:
            wrong.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
            with pytest.raises(StoreError, match="not authenticated"):
                Tracker(server.url, "of the lab", tmp_path).open()
        server.kill()
        recorder.offer({"b": lambda: run("b")})
        assert "(no server answers): 1 of 2 runs are recorded there" in str(recorder.shortfall)
    check_no_secret(passwords, tmp_path)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_eight_writers_through_a_server_on_postgresql(
    tmp_path: Path, passwords: Passwords, client: dict[str, str]
) -> None:
    with postgres(passwords[2]) as (database, kept):
        backend = {"MLFLOW_BACKEND_STORE_URI": database, "PGPASSWORD": passwords[2]}
        with guarded_server(tmp_path, passwords[0], **backend) as server:
            check_permissions(server, ("admin", passwords[0]), ("lab", passwords[1]))
            own = client | {"MLFLOW_TRACKING_URI": server.url}
            folders = [tmp_path / f"trial-{i}" for i in range(8)]
            for output in wait_for(*[start_trial(folder, own, 4, "epochs=3") for folder in folders]):
                assert "continuing without tracking" not in output
            check_store(server.url, folders)
            (output,) = wait_for(start_trial(tmp_path / "wrong", own | {"MLFLOW_TRACKING_PASSWORD": "wrong"}, 2))
            assert "not authenticated" in output
            assert "0 of 7 runs are recorded there" in output
            assert "7 were sent" in sync(tmp_path / "wrong", own)
            check_store(server.url, [*folders, tmp_path / "wrong"])
            check_no_secret(passwords, tmp_path, kept)
