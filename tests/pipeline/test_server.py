from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.server import main


@pytest.mark.parametrize(
    ("password", "arguments", "line"),
    [
        (None, [], "MLFLOW_AUTH_ADMIN_PASSWORD is not set; give the admin one of at least 12 characters"),
        ("short", [], "MLFLOW_AUTH_ADMIN_PASSWORD has 5 characters; give the admin one of at least 12 characters"),
        ("short", ["--port", "x"], "argument --port: invalid int value: 'x'; see python -m pipeline.server --help"),
    ],
)
def test_server_refuses_wrong_request_in_one_line(
    password: str | None,
    arguments: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MLFLOW_AUTH_ADMIN_PASSWORD", raising=False)
    if password is not None:
        monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", password)
    monkeypatch.setattr("sys.argv", ["server.py", "--folder", str(tmp_path / "new"), *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert (left.value.code, *capsys.readouterr()) == (2, "", f"error: {line}\n")
    assert not (tmp_path / "new").exists()
