"""What a process tells its caller, whatever becomes of its work."""

from __future__ import annotations

import errno

import pytest
from hydra.errors import ConfigCompositionException

from likelihood_lab.errors import UsageError
from pipeline import entry as exit_codes
from pipeline.config.hydra_glue import run_entry_point
from pipeline.entry import ExitCode, record_exit_code, run_action, run_and_report


def raising(error: BaseException) -> object:
    def action() -> int:
        raise error

    return action


def code_of(main: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as left:
        run_entry_point(main)  # type: ignore[arg-type]
    assert isinstance(left.value.code, int)
    return left.value.code


def test_the_codes_are_those_that_callers_rely_on() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "HOLDS": 0, "REFUTED": 1, "USAGE": 2, "BUG": 3, "INTERRUPTED": 130,
    }  # fmt: skip


def test_a_wrong_request_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_and_report(raising(UsageError("seed is empty; give one"))) is ExitCode.USAGE  # type: ignore[arg-type]
    assert capsys.readouterr() == ("", "error: seed is empty; give one\n")


def test_a_bug_shows_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_and_report(raising(KeyError("lost"))) is ExitCode.BUG  # type: ignore[arg-type]
    assert "KeyError: 'lost'" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_no_bug(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_action(raising(OSError(number, "No room", "/far/away")))  # type: ignore[arg-type]
    assert outcome.code is ExitCode.USAGE
    assert outcome.error is not None
    assert outcome.error.startswith("cannot read or write /far/away: No room")
    assert capsys.readouterr().err == ""


def test_another_error_of_the_operating_system_is_a_bug() -> None:
    assert run_action(raising(ConnectionResetError("gone"))).code is ExitCode.BUG  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("jobs", "code"),
    [([], 0), ([0, 0], 0), ([0, 1, 0], 1), ([1, 2], 2), ([3, 2, 1], 3), ([130, 3], 130)],
)
def test_the_gravest_job_decides(jobs: list[int], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_of(lambda: [record_exit_code(job) for job in jobs], monkeypatch) == code


def test_an_entry_point_forgets_what_an_earlier_one_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    record_exit_code(3)
    assert code_of(lambda: None, monkeypatch) == 0
    assert exit_codes.worst_exit_code() is ExitCode.HOLDS


def test_a_configuration_that_does_not_compose_is_a_wrong_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(raising(ConfigCompositionException("two\nlines")), monkeypatch) == 2
    assert capsys.readouterr().err == "error: two lines\n"


def test_a_value_error_of_the_pipeline_itself_is_a_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(raising(ValueError("ours")), monkeypatch) == 3
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_says_that_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(raising(KeyboardInterrupt()), monkeypatch) == 130
    assert capsys.readouterr().err.startswith("interrupted; what was finished is kept")
