from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("password", "says"),
    [
        (None, "error: MLFLOW_AUTH_ADMIN_PASSWORD is not set; give the admin one of at least 12 characters"),
        ("short", "error: MLFLOW_AUTH_ADMIN_PASSWORD has 5 characters; give the admin one of at least 12 characters"),
    ],
)
def test_without_a_password_no_server_starts(password: str | None, says: str, tmp_path: Path) -> None:
    own = {key: value for key, value in os.environ.items() if key != "MLFLOW_AUTH_ADMIN_PASSWORD"}
    own |= {} if password is None else {"MLFLOW_AUTH_ADMIN_PASSWORD": password}
    command = [sys.executable, "-m", "pipeline.server", "--folder", str(tmp_path / "kept")]
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines(), done.stdout) == (2, [says], "")
    assert not (tmp_path / "kept").exists()
