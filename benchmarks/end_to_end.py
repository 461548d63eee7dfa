"""Measure whole trials in separate processes: 3 losses x n seeds on digits, by the pipeline or conventionally."""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

LOSSES = ("nll", "ce", "kl")
EXPERIMENTS = ("likelihood-lab", "conventional")
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Usage:
    """CPU seconds, user and system, of one new process that trained `num_runs` runs."""

    imports: float
    training: float  # all other work, without start and exit of the interpreter
    num_runs: int


class Workshop:
    """Scratch folder with a database made by MLflow. Every measured process gets a copy of the database."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.template = folder, folder / "empty.db"
        self.database_seconds = self._child("database", self.template)[0]

    def measure(self, kind: str, num_seeds: int, epochs: int) -> Usage:
        """Measure `num_seeds` seeds of three losses (`product`, `conventional`) or of one loss (`alone`)."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            database = Path(shutil.copy(self.template, Path(scratch, "mlflow.db")))
            total, imports = self._child(kind, database, "--seeds", str(num_seeds), "--epochs", str(epochs))
        return Usage(imports, total - imports, num_seeds * (1 if kind == "alone" else len(LOSSES)))

    def _child(self, kind: str, database: Path, *arguments: str) -> tuple[float, float]:
        """Return the CPU seconds of a child process: its total, and its time until the end of its imports."""
        settings = {
            "MLFLOW_TRACKING_URI": f"sqlite:///{database}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-m", "benchmarks.end_to_end", kind, str(database.parent), *arguments]
        before = children_seconds()
        environment = os.environ | settings
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)  # noqa: S603
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        return children_seconds() - before, float(json.loads(done.stdout.splitlines()[-1]))


def children_seconds() -> float:
    """Return the CPU seconds, user and system, of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# --- the work of a child process; each function returns the CPU seconds until the end of its imports


def database(scratch: Path, num_seeds: int, epochs: int) -> float:
    """Create MLflow's tables and empty experiments, with their artifacts in the scratch folder."""
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - counted as an import
    from mlflow import MlflowClient

    imports = time.process_time()
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    for name in EXPERIMENTS:
        client.create_experiment(name, (scratch / "artifacts" / name).as_uri())
    return imports


def product(scratch: Path, num_seeds: int, epochs: int) -> float:
    """Run one trial, as `python -m pipeline.train` does."""
    from hydra import compose, initialize_config_dir

    from pipeline.config import schema as conf
    from pipeline.entry import gc_paused_import

    with gc_paused_import("torch"):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - counted as imports
        import sklearn.datasets  # noqa: F401

        import pipeline.reporting.figures  # noqa: F401
        from pipeline.trial.run import run

    imports = time.process_time()
    seeds = list(range(num_seeds))
    overrides = [f"loss=[{','.join(LOSSES)}]", f"seed={seeds}", f"epochs={epochs}", "trainer=cpu"]
    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        config = conf.plain(compose("train", overrides))
    with (scratch / "printed").open("w") as file, redirect_stdout(file):
        run(config, scratch / "trial", "python -m benchmarks.run")
    return imports


def conventional(scratch: Path, num_seeds: int, epochs: int, losses: Sequence[str] = LOSSES) -> float:
    """Train one run after the other."""
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - counted as imports
    import sklearn.datasets  # noqa: F401
    import torch

    from benchmarks.conventional import train
    from pipeline.data.loaders import digits

    imports = time.process_time()
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    data = digits()
    for seed in range(num_seeds):
        for arm in losses:
            train(arm, seed, epochs, data, os.environ["MLFLOW_TRACKING_URI"])
    return imports


KINDS: dict[str, Callable[[Path, int, int], float]] = {
    "database": database, "product": product, "conventional": conventional,
    "alone": partial(conventional, losses=("ce",)),
}  # fmt: skip


def main() -> None:
    """Run the work of one child process of `Workshop`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=30)
    given = parser.parse_args()
    print(json.dumps(KINDS[given.kind](given.scratch, given.seeds, given.epochs)))


if __name__ == "__main__":
    main()
