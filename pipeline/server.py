"""Entry point: start an MLflow server on loopback that asks for a password, to try out a shared server.

MLFLOW_AUTH_ADMIN_PASSWORD=... python -m pipeline.server [--folder FOLDER] [--port PORT]

Runs are stored in SQLite in the folder. MLFLOW_BACKEND_STORE_URI names another store, such as
postgresql://mlflow@127.0.0.1/mlflow with its password in PGPASSWORD. Secrets are read from the environment and passed
on in it. None is written to a file or visible in the list of processes.
"""

from __future__ import annotations

import os
import secrets
import sys
from importlib.util import find_spec
from pathlib import Path

from likelihood_lab.errors import UsageError
from pipeline.entry import ExitCode, OneLineParser, run_and_report

MIN_PASSWORD_LENGTH = 12  # required by MLflow

# Users have no right that was not granted. SQLite holds the users and the hashes of their passwords. The cache saves
# MLflow from hashing the password at every call.
AUTH_CONFIG = """\
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///{users}
admin_username = admin
auth_cache_ttl_seconds = 60
"""


def serve(folder: Path, port: int) -> ExitCode:
    """Replace this process by the server."""
    password = os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD", "")
    if len(password) < MIN_PASSWORD_LENGTH:
        problem = f"has {len(password)} characters" if password else "is not set"
        raise UsageError(
            f"MLFLOW_AUTH_ADMIN_PASSWORD {problem}; give the admin one of at least {MIN_PASSWORD_LENGTH} characters"
        )
    if find_spec("flask_wtf") is None:
        raise UsageError("the server's packages are not installed; run pip install '.[lab,server]', or make server")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    auth_config = folder / "auth.ini"
    auth_config.write_text(AUTH_CONFIG.format(users=str(folder / "users.db").replace("%", "%%")), encoding="utf-8")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ |= {
        "MLFLOW_AUTH_CONFIG_PATH": str(auth_config),
        "MLFLOW_BACKEND_STORE_URI": os.environ.get("MLFLOW_BACKEND_STORE_URI") or f"sqlite:///{folder / 'mlflow.db'}",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),  # signs browser forms; valid until the server stops
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--artifacts-destination", str(folder / "artifacts")]
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted


def main() -> None:
    """Console script."""
    description = "Start an MLflow server on loopback that asks for a password."
    parser = OneLineParser(prog="python -m pipeline.server", description=description)
    parser.add_argument("--folder", type=Path, default=Path("mlflow-server"), help="folder of the server's files")
    parser.add_argument("--port", type=int, default=5000)
    sys.exit(run_and_report(lambda: serve(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
