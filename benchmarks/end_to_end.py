"""A whole trial in a process of its own: 3 losses x n seeds on digits, through the product or as is usual."""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOSSES = ("nll", "ce", "kl")
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Usage:
    """CPU seconds of one process: all of it, what importing took, and each run where they came one by one."""

    total: float
    imports: float
    runs: list[float]

    def extrapolated(self, num_runs: int) -> float:
        """The same process doing `num_runs` runs."""
        return self.total - sum(self.runs) + num_runs * sum(self.runs) / len(self.runs)


def measure(kind: str, num_seeds: int, epochs: int) -> Usage:
    """CPU time, user and system, of a fresh process; a kind is `product` or `conventional`."""
    with tempfile.TemporaryDirectory() as scratch:
        before = _children()
        command = [sys.executable, "-m", "benchmarks.end_to_end", kind, scratch, str(num_seeds), str(epochs)]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{scratch}/mlflow.db", "DO_NOT_TRACK": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)  # noqa: S603
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return Usage(_children() - before, **found)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def product(scratch: Path, num_seeds: int, epochs: int) -> dict[str, Any]:
    """One trial of everything."""
    import mlflow.store.tracking.sqlalchemy_store
    import sklearn.datasets  # noqa: F401 - an import to be counted as one
    from hydra import compose, initialize_config_dir

    import pipeline.figures
    from pipeline import config as conf
    from pipeline.trial import run

    imports = time.process_time()
    overrides = [f"loss=[{','.join(LOSSES)}]", f"seed={list(range(num_seeds))}", f"epochs={epochs}", "trainer=cpu"]
    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        config = conf.plain(compose("train", overrides))
    with (scratch / "printed").open("w") as file, redirect_stdout(file):
        run(config, scratch / "trial", "python -m benchmarks.run")
    return {"imports": imports, "runs": []}


def conventional(scratch: Path, num_seeds: int, epochs: int) -> dict[str, Any]:
    """Three runs of each seed, one after the other."""
    import torch
    from mlflow import MlflowClient

    from benchmarks import conventional as usual
    from pipeline.loaders import digits

    imports = time.process_time()
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    uri = os.environ["MLFLOW_TRACKING_URI"]
    MlflowClient(uri).create_experiment(usual.EXPERIMENT)
    data, runs = digits(), []
    for seed in range(num_seeds):
        for arm in LOSSES:
            begun = time.process_time()
            usual.train(arm, seed, epochs, data, uri)
            runs.append(time.process_time() - begun)
    return {"imports": imports, "runs": runs}


KINDS: dict[str, Callable[[Path, int, int], dict[str, Any]]] = {"product": product, "conventional": conventional}


def main() -> None:
    """What `measure` starts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("num_seeds", type=int)
    parser.add_argument("epochs", type=int)
    given = parser.parse_args()
    print(json.dumps(KINDS[given.kind](given.scratch, given.num_seeds, given.epochs)))


if __name__ == "__main__":
    main()
