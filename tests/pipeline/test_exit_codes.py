"""Exit codes and messages of every entry point."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from hydra.errors import ConfigCompositionException

from likelihood_lab.errors import UsageError
from pipeline.config.hydra_glue import run_entry_point
from pipeline.entry import ExitCode, record_exit_code, run_action, run_and_report, worst_exit_code


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


def test_usage_error_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_and_report(raising(UsageError("seed is empty; give one"))) is ExitCode.USAGE
    assert capsys.readouterr() == ("", "error: seed is empty; give one\n")


@pytest.mark.parametrize("error", [KeyError("lost"), ConnectionResetError("lost")])
def test_bug_prints_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_and_report(raising(error)) is ExitCode.BUG
    assert f"{type(error).__name__}: " in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_disk_error_is_usage_error(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_action(raising(OSError(number, "No room", "/far/away")))
    assert outcome.code is ExitCode.USAGE
    assert str(outcome.error).startswith("cannot read or write /far/away: No room")
    assert capsys.readouterr().err == ""


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
        (KeyboardInterrupt(), 130, "interrupted; what was finished is kept"),
    ],
)
def test_entry_point_maps_errors_to_exit_codes(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(raising(error)) == code
    written = capsys.readouterr().err
    assert written == message if code == 2 else written.startswith(message)
