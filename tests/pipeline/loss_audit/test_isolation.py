"""A job that crashes, hangs, prints, eats memory or leaves costs the other jobs nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from likelihood_lab.errors import UsageError
from pipeline.loss_audit.isolation import JobResult, Limits, Tell, run_isolated

ROOT = Path(__file__).parents[3]
AMPLE = Limits(seconds=60, memory=8 * 2**30)


def outcome(job: object, limits: Limits = AMPLE) -> JobResult:
    ((name, found),) = run_isolated({"job": job}, limits, 1)  # type: ignore[dict-item]
    assert name == "job"
    return found


def gone(pid: int) -> bool:
    """Whether a process that was killed ends within some seconds; nobody may have waited for it."""
    for _ in range(100):
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.1)
            continue
        return True
    return False


def test_a_job_gives_its_value_and_sees_what_the_parent_has() -> None:
    here = {"answer": 42}
    found = outcome(lambda tell: here["answer"])
    assert (found.value, found.failed, found.refused, found.printed) == (42, None, None, "")


def test_every_job_has_a_process_of_its_own() -> None:
    found = dict(run_isolated({str(i): lambda tell: os.getpid() for i in range(4)}, AMPLE, 2))
    pids = {done.value for done in found.values()}
    assert len(pids) == 4
    assert os.getpid() not in pids


def test_a_job_that_aborts_is_told_by_its_signal_and_the_others_go_on() -> None:
    found = dict(run_isolated({"dies": lambda tell: os.abort(), "works": lambda tell: 1}, AMPLE, 2))
    assert found["dies"].failed == "ended by SIGABRT"
    assert found["works"].value == 1


def test_what_was_told_before_the_end_is_kept() -> None:
    def job(tell: Tell) -> None:
        tell("first")
        tell("second")
        os.abort()

    assert outcome(job).told == "second"


def test_a_job_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    def job(tell: Tell) -> None:
        child = os.fork()
        if child:
            (tmp_path / "pid").write_text(str(child))
        while True:
            time.sleep(1)

    started = time.monotonic()
    assert outcome(job, Limits(1, AMPLE.memory)).failed == "took more than 1 s"
    assert time.monotonic() - started < 30
    grandchild = int((tmp_path / "pid").read_text())
    assert gone(grandchild)


def test_a_job_that_eats_memory_is_ended() -> None:
    def job(tell: Tell) -> int:
        held = bytearray(os.urandom(1)) * (3 * 2**30)
        time.sleep(30)
        return len(held)

    failed = outcome(job, Limits(60, 2**30)).failed
    assert failed is not None
    assert failed.endswith("GiB of memory")


def test_an_exception_is_told_in_a_line_and_so_is_an_exit() -> None:
    def raises(tell: Tell) -> None:
        raise ValueError("first line\nsecond line")

    assert outcome(raises).failed == "ValueError: first line"
    assert outcome(lambda tell: sys.exit(3)).failed == "SystemExit: 3"


def test_a_refused_request_stays_one() -> None:
    def job(tell: Tell) -> None:
        raise UsageError("give another")

    found = outcome(job)
    assert (found.refused, found.failed) == ("give another", None)


def test_output_is_caught_and_does_not_reach_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    def job(tell: Tell) -> None:
        print("from Python")
        os.write(1, b"from below\n")
        os.write(2, b"an error\n")

    found = outcome(job)
    assert sorted(found.printed.splitlines()) == ["from Python", "from below"]
    assert capfd.readouterr() == ("", "")


def test_the_last_line_of_a_dead_child_is_kept() -> None:
    def job(tell: Tell) -> None:
        os.write(2, b"some context\nassertion failed\n")
        os._exit(7)

    assert outcome(job).failed == "ended by exit code 7: assertion failed"


def test_no_child_outlives_a_caller_that_gives_up(tmp_path: Path) -> None:
    def job(tell: Tell) -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(60)

    running = run_isolated({"sleeps": job, "quick": lambda tell: time.sleep(0.5)}, AMPLE, 2)
    assert next(running)[0] == "quick"
    running.close()  # type: ignore[attr-defined]
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid)


def test_no_child_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys, time\n"
        "from pipeline.loss_audit.isolation import Limits, run_isolated\n"
        "def job(tell):\n"
        "    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "list(run_isolated({'sleeps': job}, Limits(600, 2**33), 1))\n"
    )
    told = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", script, str(told)], cwd=ROOT)
    while not (told.exists() and told.read_text()):
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    assert gone(int(told.read_text()))


def test_no_more_than_asked_for_run_at_once() -> None:
    def job(tell: Tell) -> tuple[float, float]:
        started = time.monotonic()
        time.sleep(0.3)
        return started, time.monotonic()

    spans = [done.value for _, done in run_isolated({str(i): job for i in range(5)}, AMPLE, 2)]
    busiest = max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)
    assert busiest == 2
