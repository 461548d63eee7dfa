"""A tracking store that is absent, slow, restarted, refusing or crowded: nothing of a trial is lost."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from pipeline.tracking import recorder as recording
from pipeline.tracking.recorder import Recorder
from pipeline.tracking.tracker import Tracker
from tests.faults.serving import environment, free_port, plain_server, running
from tests.faults.trials import begin, cells, check_whole, ended, synced

# MLflow's own queries use a loader that SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")


def answer(status: str, body: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


@contextmanager
def impostor(reply: bytes | None) -> Iterator[str]:
    """The address of something that answers every call alike, or never."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        held: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    caller, _ = listener.accept()
                except OSError:
                    return
                held.append(caller)
                if reply is not None:
                    caller.recv(65536)
                    caller.sendall(reply)
                    caller.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        for caller in held:
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
def test_whatever_answers_in_place_of_mlflow_ends_no_trial(
    reply: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "CALL_TIMEOUT", 1.0)
    with impostor(reply) as address:
        recorder = Recorder(Tracker(address, "x", tmp_path), tmp_path, "")
        begun = time.monotonic()
        recorder.open()
        for _ in range(5):
            recorder.offer({"a": lambda: pytest.fail("there is nothing to send it to")})
        assert time.monotonic() - begun < 10
    assert "0 of 1 runs are recorded there" in str(recorder.shortfall)
    assert "\n" not in str(recorder.shortfall)


def fresh_database(home: Path, writers: int) -> None:
    """So many trials at once, into a database that is not there yet."""
    uri = f"sqlite:///{home / 'runs.db'}"
    own = environment(home, MLFLOW_TRACKING_URI=uri)
    folders = [home / f"trial-{i}" for i in range(writers)]
    for said in ended(*[begin(folder, own, 4, "epochs=3") for folder in folders]):
        assert "continuing without tracking" not in said
    check_whole(Tracker(uri, "likelihood-lab", home), folders)


def test_two_writers_on_a_fresh_database(tmp_path: Path) -> None:
    fresh_database(tmp_path, 2)


@pytest.mark.faults
def test_eight_writers_on_a_fresh_database(tmp_path: Path) -> None:
    fresh_database(tmp_path, 8)


KILLS = 20


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_a_server_killed_twenty_times_and_then_for_good(tmp_path: Path) -> None:
    """Two trials at once, one of them with a server that dies all the time: both end alike, and at about one time."""
    homes = {name: tmp_path / name for name in ("calm", "dying")}
    servers, trials, took = {}, {}, {}
    for name, home in homes.items():
        home.mkdir()
        servers[name] = plain_server(home)
        servers[name].start()

    def kill() -> None:
        for _ in range(KILLS):
            time.sleep(2)
            servers["dying"].kill()
            kills.append(time.monotonic())
            time.sleep(1)
            servers["dying"].start()
        time.sleep(2)
        servers["dying"].kill()
        kills.append(time.monotonic())

    def train(name: str) -> None:
        begun = time.monotonic()
        own = environment(homes[name], MLFLOW_TRACKING_URI=servers[name].url)
        (trials[name],) = ended(begin(homes[name] / "trial", own, 60, "epochs=150"))
        took[name] = time.monotonic() - begun

    kills: list[float] = []
    try:
        killer = threading.Thread(target=kill)
        workers = [threading.Thread(target=train, args=(name,)) for name in homes]
        for thread in (killer, *workers):
            thread.start()
        for worker in workers:
            worker.join()
        over = time.monotonic()
        killer.join()
        print(f"trained for {took['calm']:.0f} s and, with {len(kills)} kills, for {took['dying']:.0f} s")
        assert sum(moment < over for moment in kills) == KILLS + 1, "the training is too short for so many kills"
        assert took["dying"] <= 1.2 * took["calm"]
        assert trials["dying"].count("continuing without tracking") == 1
        assert "`make sync DIR=" in trials["dying"]
        assert "continuing without tracking" not in trials["calm"]
        pairs = zip(cells(homes["calm"] / "trial"), cells(homes["dying"] / "trial"), strict=True)
        for calm, dying in pairs:
            assert calm.record.weights_sha256 == dying.record.weights_sha256
            assert calm.history.equals(dying.history)
        servers["dying"].start()
        own = environment(homes["dying"], MLFLOW_TRACKING_URI=servers["dying"].url)
        print(synced(homes["dying"] / "trial", own))
        assert ", 0 were sent" in synced(homes["dying"] / "trial", own)
        for name, home in homes.items():
            check_whole(Tracker(servers[name].url, "likelihood-lab", home), [home / "trial"])
    finally:
        for server in servers.values():
            server.kill()


@pytest.mark.faults
def test_a_server_that_is_gone_for_good_costs_half_a_minute(tmp_path: Path) -> None:
    """One that takes the connection and says nothing is the slowest way to be gone; a closed port the fastest."""
    took: dict[str, float] = {}
    said: dict[str, str] = {}

    def train(name: str, address: str) -> None:
        begun = time.monotonic()
        own = environment(tmp_path, MLFLOW_TRACKING_URI=address)
        (said[name],) = ended(begin(tmp_path / name, own, 8))
        took[name] = time.monotonic() - begun

    with impostor(None) as silent:
        addresses = {"closed": f"http://127.0.0.1:{free_port()}", "silent": silent}
        threads = [threading.Thread(target=train, args=named) for named in addresses.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(took)
    assert took["silent"] - took["closed"] <= 30
    assert all("0 of 25 runs are recorded there" in said[name] for name in addresses)
    home = tmp_path / "later"
    home.mkdir()
    with running(plain_server(home)) as server:
        own = environment(tmp_path, MLFLOW_TRACKING_URI=server.url)
        for name in addresses:
            assert "held 0 of 25 runs, 25 were sent" in synced(tmp_path / name, own)
        check_whole(Tracker(server.url, "likelihood-lab", home), [tmp_path / name for name in addresses])
