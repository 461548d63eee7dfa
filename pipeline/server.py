"""Entry point: an MLflow server on loopback that asks for a password, to try out a shared one.

MLFLOW_AUTH_ADMIN_PASSWORD=... python -m pipeline.server [--folder FOLDER] [--port PORT]

Runs are kept in SQLite in the folder, or in MLFLOW_BACKEND_STORE_URI where that is set, such as
postgresql://mlflow@127.0.0.1/mlflow with its password in PGPASSWORD. Secrets come from the environment and are handed
on in it: none is written to a file or shown in the list of processes.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from importlib.util import find_spec
from pathlib import Path

from likelihood_lab.errors import UsageError
from pipeline.entry import ExitCode, run_and_report

SHORTEST = 12  # MLflow's rule

# Nobody may do what was not granted. The users and the hashes of their passwords are in SQLite. MLflow hashes a
# password at every call unless it may remember for some seconds that it was right.
RULES = """\
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///{users}
admin_username = admin
auth_cache_ttl_seconds = 60
"""


def serve(folder: Path, port: int) -> ExitCode:
    """Become the server."""
    password = os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD", "")
    if len(password) < SHORTEST:
        said = f"has {len(password)} characters" if password else "is not set"
        raise UsageError(f"MLFLOW_AUTH_ADMIN_PASSWORD {said}; give the admin one of at least {SHORTEST} characters")
    if find_spec("flask_wtf") is None:
        raise UsageError("the server's packages are not installed; run pip install '.[lab,server]', or make server")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    rules = folder / "auth.ini"
    rules.write_text(RULES.format(users=str(folder / "users.db").replace("%", "%%")), encoding="utf-8")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ |= {
        "MLFLOW_AUTH_CONFIG_PATH": str(rules),
        "MLFLOW_BACKEND_STORE_URI": os.environ.get("MLFLOW_BACKEND_STORE_URI") or f"sqlite:///{folder / 'mlflow.db'}",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),  # of forms in a browser, as long as the server runs
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--artifacts-destination", str(folder / "artifacts")]
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted


def main() -> None:
    """Console script."""
    parser = argparse.ArgumentParser(description="an MLflow server on loopback that asks for a password")
    parser.add_argument("--folder", type=Path, default=Path("mlflow-server"), help="where its files are kept")
    parser.add_argument("--port", type=int, default=5000)
    asked = parser.parse_args()
    sys.exit(run_and_report(lambda: serve(asked.folder, asked.port)))


if __name__ == "__main__":
    main()
