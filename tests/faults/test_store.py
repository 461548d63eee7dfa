"""A tracking store that is absent, slow, restarted, refusing or used by many loses nothing of a trial."""

from __future__ import annotations

import multiprocessing
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from pathlib import Path

import pytest

from pipeline.entry import run_and_report
from pipeline.storage.cells import TrialFolder
from pipeline.tracking import recorder as recording
from pipeline.tracking.recorder import Recorder
from pipeline.tracking.tracker import Tracker
from pipeline.trial.run import run
from tests.faults.servers import check_store, environment, free_port, plain_server, start_trial, sync, wait_for
from tests.trials import compose

# MLflow's own queries use a loader that SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")


def answer(status: str, body: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


@contextmanager
def fake_server(reply: bytes | None) -> Iterator[str]:
    """Yield the address of a server that gives every call the same answer, or none."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        callers: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    caller, _ = listener.accept()
                except OSError:
                    return
                callers.append(caller)
                if reply is not None:
                    caller.recv(65536)
                    caller.sendall(reply)
                    caller.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        for caller in callers:
            caller.close()


@pytest.mark.parametrize(
    "reply",
    [
        None,
        answer("200 OK", "<html>a proxy's page</html>"),
        answer("401 Unauthorized", "You are not authenticated."),
        answer("403 Forbidden", '{"error_code": "PERMISSION_DENIED", "message": "no"}'),
        answer("500 Internal Server Error"),
        answer("503 Service Unavailable", "busy"),
        b"no HTTP at all\r\n\r\n",
    ],
    ids=["silent", "a page", "401", "403", "500", "503", "noise"],
)
def test_an_answer_of_no_mlflow_ends_no_trial(
    reply: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "CALL_TIMEOUT", 1.0)
    with fake_server(reply) as address:
        recorder = Recorder(Tracker(address, "x", tmp_path), tmp_path, "")
        began = time.monotonic()
        recorder.open()
        for _ in range(5):
            recorder.offer({"a": lambda: pytest.fail("there is nothing to send it to")})
        assert time.monotonic() - began < 10
    assert "0 of 1 runs are recorded there" in str(recorder.shortfall)
    assert "\n" not in str(recorder.shortfall)


def write(folder: Path, uri: str) -> None:
    """Train a trial and record it in MLflow; stdout goes to a file beside the folder."""
    config = compose(
        "loss=[ce,nll,brier]", "seed=[0,1,2,3]", "trainer.tile=3", "tracking=mlflow", f"tracking.uri={uri}"
    )
    with folder.with_suffix(".txt").open("w") as output, redirect_stdout(output):
        sys.exit(run_and_report(lambda: run(config, folder, "the command")))


@pytest.mark.parametrize("num_writers", [2, pytest.param(8, marks=pytest.mark.faults)])
def test_writers_on_a_fresh_database(num_writers: int, tmp_path: Path) -> None:
    """So many processes record at once, before the database exists."""
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    folders = [tmp_path / f"trial-{i}" for i in range(num_writers)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; torch's survive a fork idle
        writers = [multiprocessing.get_context("fork").Process(target=write, args=(path, uri)) for path in folders]
        for writer in writers:
            writer.start()
    for writer, folder in zip(writers, folders, strict=True):
        writer.join()
        assert writer.exitcode == 0
        assert "continuing without tracking" not in folder.with_suffix(".txt").read_text()
    check_store(uri, folders)


NUM_KILLS = 20


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_a_server_killed_20_times_and_then_for_good(tmp_path: Path) -> None:
    """Two trials run at once, one with a server that is killed often: same results, and about the same time."""
    homes = {name: tmp_path / name for name in ("calm", "dying")}
    outputs, seconds, kills = {}, {}, []
    with ExitStack() as stack:
        for home in homes.values():
            home.mkdir()
        servers = {name: stack.enter_context(plain_server(home)) for name, home in homes.items()}

        def kill() -> None:
            for _ in range(NUM_KILLS):
                time.sleep(2)
                servers["dying"].kill()
                kills.append(time.monotonic())
                time.sleep(1)
                servers["dying"].start()
            time.sleep(2)
            servers["dying"].kill()
            kills.append(time.monotonic())

        def train(name: str) -> None:
            began = time.monotonic()
            own = environment(homes[name], MLFLOW_TRACKING_URI=servers[name].url)
            (outputs[name],) = wait_for(start_trial(homes[name] / "trial", own, 60, "epochs=150"))
            seconds[name] = time.monotonic() - began

        killer = threading.Thread(target=kill)
        workers = [threading.Thread(target=train, args=(name,)) for name in homes]
        for thread in (killer, *workers):
            thread.start()
        for worker in workers:
            worker.join()
        end = time.monotonic()
        killer.join()
        print(f"trained for {seconds['calm']:.0f} s and, with {len(kills)} kills, for {seconds['dying']:.0f} s")
        assert sum(moment < end for moment in kills) == NUM_KILLS + 1, "the training is too short for so many kills"
        assert seconds["dying"] <= 1.2 * seconds["calm"]
        assert outputs["dying"].count("continuing without tracking") == 1
        assert "`make sync DIR=" in outputs["dying"]
        assert "continuing without tracking" not in outputs["calm"]
        cells = (TrialFolder(home / "trial").cells() for home in homes.values())
        for calm, dying in zip(*cells, strict=True):
            assert calm.record.weights_sha256 == dying.record.weights_sha256
            assert calm.history.equals(dying.history)
        servers["dying"].start()
        own = environment(homes["dying"], MLFLOW_TRACKING_URI=servers["dying"].url)
        print(sync(homes["dying"] / "trial", own))
        assert ", 0 were sent" in sync(homes["dying"] / "trial", own)
        for name, home in homes.items():
            check_store(servers[name].url, [home / "trial"])


@pytest.mark.faults
def test_a_server_gone_for_good_costs_half_a_minute(tmp_path: Path) -> None:
    """A server that accepts connections and never answers is the slowest case; a closed port is the fastest."""
    with fake_server(None) as silent:
        addresses = {"closed": f"http://127.0.0.1:{free_port()}", "silent": silent}
        seconds: dict[str, float] = {}
        outputs: dict[str, str] = {}

        def train(name: str) -> None:
            began = time.monotonic()
            own = environment(tmp_path, MLFLOW_TRACKING_URI=addresses[name])
            (outputs[name],) = wait_for(start_trial(tmp_path / name, own, 8))
            seconds[name] = time.monotonic() - began

        threads = [threading.Thread(target=train, args=(name,)) for name in addresses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(seconds)
    assert seconds["silent"] - seconds["closed"] <= 30
    assert all("0 of 25 runs are recorded there" in outputs[name] for name in addresses)
    home = tmp_path / "later"
    home.mkdir()
    with plain_server(home) as server:
        own = environment(tmp_path, MLFLOW_TRACKING_URI=server.url)
        for name in addresses:
            assert "held 0 of 25 runs, 25 were sent" in sync(tmp_path / name, own)
        check_store(server.url, [tmp_path / name for name in addresses])
