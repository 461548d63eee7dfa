"""Exit codes and messages of every entry point."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException

from likelihood_lab.errors import UsageError
from pipeline import report, server, sync
from pipeline.config.hydra_glue import run_entry_point
from pipeline.entry import ExitCode, record_exit_code, run_and_report, worst_exit_code


def raising(error: BaseException) -> Callable[[], int]:
    def action() -> int:
        raise error

    return action


@pytest.fixture(autouse=True)
def _restored_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # `run_entry_point` sets it


def code_of(main: Callable[[], object]) -> int:
    with pytest.raises(SystemExit) as left:
        run_entry_point(main)
    assert isinstance(left.value.code, int)
    return left.value.code


def test_exit_codes_are_the_documented_ones() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "HOLDS": 0, "REFUTED": 1, "USAGE": 2, "BUG": 3, "INTERRUPTED": 130,
    }  # fmt: skip


@pytest.mark.parametrize("error", [KeyError("lost"), ConnectionResetError("lost")])
def test_bug_prints_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_and_report(raising(error)) is ExitCode.BUG
    assert f"{type(error).__name__}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [(UsageError("seed is empty; give one"), "seed is empty; give one")]
    + [
        (OSError(number, "No room", "/x"), "cannot read or write /x: No room; free space or choose another folder")
        for number in (errno.ENOSPC, errno.EROFS, errno.EACCES)
    ],
)
def test_wrong_request_is_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_and_report(raising(error)) is ExitCode.USAGE
    assert capsys.readouterr() == ("", f"error: {line}\n")


@pytest.mark.parametrize(
    ("jobs", "code"),
    [([], 0), ([0, 0], 0), ([0, 1, 0], 1), ([1, 2], 2), ([3, 2, 1], 3), ([130, 3], 130)],
)
def test_entry_point_returns_worst_code_of_its_own_jobs(jobs: list[int], code: int) -> None:
    record_exit_code(130)  # of an earlier entry point
    assert code_of(lambda: [record_exit_code(job) for job in jobs]) == code
    assert worst_exit_code() == code


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigCompositionException("two\nlines"), 2, "error: two lines\n"),
        (ValueError("ours"), 3, "Traceback"),
        (KeyboardInterrupt(), 130, "interrupted; finished runs are kept"),
    ],
)
def test_entry_point_maps_errors_to_exit_codes(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(raising(error)) == code
    written = capsys.readouterr().err
    assert written == message if code == 2 else written.startswith(message)


@pytest.mark.parametrize(
    ("main", "arguments", "line"),
    [
        (server.main, "", "MLFLOW_AUTH_ADMIN_PASSWORD has 5 characters; give the admin one of at least 12 characters"),
        (server.main, "--port x", "argument --port: invalid int value: 'x'; see python -m pipeline.server --help"),
        (sync.main, ".", "/work is not a trial's folder"),
        (sync.main, "", "the following arguments are required: DIR; see python -m pipeline.sync --help"),
        (report.main, "", "the following arguments are required: DIR; see python -m pipeline.report --help"),
        (report.main, "a b=c", "give one folder of a trial; found a, b=c; see python -m pipeline.report --help"),
        (report.main, "a sweep=b", "give one folder of a trial; found a, outputs/b; see"),
        (report.main, "expect=same", "give one folder of a trial; found none; see"),
        (report.main, "a --quiet", "unrecognized arguments: --quiet; see"),
        (report.main, "sweep=absent", "/work/outputs/absent is not a trial's folder"),
    ],
)
def test_wrong_arguments_are_one_line(
    main: Callable[[], None],
    arguments: str,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The line is what is wrong and what to do; nothing is written."""
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "short")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["command", *arguments.split()])
    with pytest.raises(SystemExit) as left:
        main()
    output, errors = capsys.readouterr()
    assert (left.value.code, output, errors.count("\n")) == (2, "", 1)
    assert line.replace("/work", str(tmp_path)) in errors
    assert errors.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_server_needs_a_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_AUTH_ADMIN_PASSWORD", raising=False)
    with pytest.raises(UsageError, match="MLFLOW_AUTH_ADMIN_PASSWORD is not set; give the admin one of at least 12"):
        server.serve(tmp_path / "new", 5000)
    assert not (tmp_path / "new").exists()


def test_reader_that_leaves_early_is_no_bug() -> None:
    """`python -m pipeline.train --help | head -1` ends without a traceback."""
    command = f"{sys.executable} -m pipeline.train --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)  # noqa: S607
    assert done.returncode in (ExitCode.HOLDS, ExitCode.INTERRUPTED)
    assert done.stderr == ""
