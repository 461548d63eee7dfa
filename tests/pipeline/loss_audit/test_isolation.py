"""A job that crashes, hangs, prints or exceeds a limit affects no other job."""

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
from pipeline.loss_audit.isolation import Job, JobResult, Limits, SendPartial, run_isolated

ROOT = Path(__file__).parents[3]
AMPLE = Limits(seconds=60, memory=8 * 2**30)


def result_of(job: Job, limits: Limits = AMPLE) -> JobResult:
    ((_, result),) = run_isolated({"job": job}, limits, 1)
    return result


def ends(pid: int) -> bool:
    """Whether a killed process ends within some seconds; it may stay a zombie."""
    for _ in range(100):
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.1)
                continue
        return True
    return False


def test_jobs_return_from_their_own_processes() -> None:
    """Each job inherits the parent's objects, and no more than two run at once."""
    inherited = {"answer": 42}

    def job(send: SendPartial) -> tuple[int, int, float, float]:
        started = time.monotonic()
        time.sleep(0.3)
        return inherited["answer"], os.getpid(), started, time.monotonic()

    results = [result for _, result in run_isolated({str(i): job for i in range(5)}, AMPLE, 2)]
    assert all((result.failure, result.refusal, result.output) == (None, None, "") for result in results)
    answers, pids, starts, ends = zip(*(result.value for result in results), strict=True)
    assert set(answers) == {42}
    assert len({*pids} - {os.getpid()}) == 5
    busy = [sum(start <= moment < end for start, end in zip(starts, ends, strict=True)) for moment in starts]
    assert max(busy) == 2


def test_crash_keeps_partial_result_and_other_jobs() -> None:
    def crash(send: SendPartial) -> None:
        send("first")
        send("second")
        os.abort()

    results = dict(run_isolated({"crashes": crash, "works": lambda send: 1}, AMPLE, 2))
    assert (results["crashes"].partial, results["crashes"].failure) == ("second", "ended by SIGABRT")
    assert results["works"].value == 1


def test_time_limit_ends_job_and_its_children(tmp_path: Path) -> None:
    def hang(send: SendPartial) -> None:
        if child := os.fork():
            (tmp_path / "pid").write_text(str(child))
        time.sleep(600)

    started = time.monotonic()
    results = dict(run_isolated({"hangs": hang, "works": lambda send: 1}, Limits(1, AMPLE.memory), 1))
    assert results["hangs"].failure == "took more than 1 s"
    assert results["works"].value == 1
    assert time.monotonic() - started < 30
    assert ends(int((tmp_path / "pid").read_text()))


def test_memory_limit_ends_job() -> None:
    def allocate(send: SendPartial) -> int:
        time.sleep(1)  # the first measurement is the inherited memory
        memory = bytearray(os.urandom(1)) * 2**30
        time.sleep(30)
        return len(memory)

    assert str(result_of(allocate, Limits(60, 2**28)).failure).endswith("GiB of memory")


def raise_two_lines(send: SendPartial) -> None:
    raise ValueError("first line\nsecond line")


def refuse(send: SendPartial) -> None:
    raise UsageError("give another")


def exit_with_error(send: SendPartial) -> None:
    os.write(2, b"some context\nassertion failed\n")
    os._exit(7)


@pytest.mark.parametrize(
    ("job", "failure", "refusal"),
    [
        (raise_two_lines, "ValueError: first line", None),
        (lambda send: sys.exit(3), "SystemExit: 3", None),
        (exit_with_error, "ended by exit code 7: assertion failed", None),
        (refuse, None, "give another"),
    ],
)
def test_failure_is_one_line(job: Job, failure: str | None, refusal: str | None) -> None:
    result = result_of(job)
    assert (result.value, result.failure, result.refusal) == (None, failure, refusal)


def test_output_is_captured(capfd: pytest.CaptureFixture[str]) -> None:
    def write(send: SendPartial) -> None:
        print("from Python")
        os.write(1, b"from below\n")
        os.write(2, b"an error\n")

    assert sorted(result_of(write).output.splitlines()) == ["from Python", "from below"]
    assert capfd.readouterr() == ("", "")


def test_closed_generator_kills_running_jobs(tmp_path: Path) -> None:
    def sleep(send: SendPartial) -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(60)

    results = run_isolated({"sleeps": sleep, "quick": lambda send: time.sleep(0.5)}, AMPLE, 2)
    assert next(results)[0] == "quick"
    results.close()  # type: ignore[attr-defined]
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_killed_parent_leaves_no_subprocess(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys, time\n"
        "from pipeline.loss_audit.isolation import Limits, run_isolated\n"
        "def job(send):\n"
        "    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "list(run_isolated({'sleeps': job}, Limits(600, 2**33), 1))\n"
    )
    pid = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", script, str(pid)], cwd=ROOT)
    while not (pid.exists() and pid.read_text()):
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    assert ends(int(pid.read_text()))
