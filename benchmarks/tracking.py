"""Measure the cost of recording a run in MLflow with SQLite: python -m benchmarks.tracking

It is the CPU time of a run with 30 params, 150 metrics and an artifact, recorded in portions as a trial does. The
import of MLflow and the creation of its database are not counted.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.timing import Contender, Spread, interleaved
from pipeline.tracking.mlflow_store import Run
from pipeline.tracking.tracker import Tracker

RUNS, PARAMS, METRICS, EPOCHS = 96, 30, 5, 30
REPETITIONS = 5


def a_run(number: int, artifact: Path) -> Run:
    """Return a run as large as that of one cell."""
    values = np.random.default_rng(number).random(METRICS * EPOCHS)
    names = np.repeat([f"val/metric_{i}" for i in range(METRICS)], EPOCHS)
    steps = np.tile(np.arange(EPOCHS), METRICS)
    return Run(
        name=f"ce/s{number}",
        tags={f"tag_{i}": "value" for i in range(15)} | {"sweep": "measured", "fingerprint": str(number)},
        params={f"param_{i}": f"value {i}" for i in range(PARAMS)},
        metrics=pd.DataFrame({"metric": names, "step": steps, "value": values}),
        started=time.time(),
        ended=time.time(),
        dataset=("digits", "digest"),
        artifacts={"config.yaml": artifact},
    )


def main() -> None:
    """Measure and print one line."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder, "config.yaml")
        artifact.write_text("seed: 0\n" * 100)
        tracker = Tracker(f"sqlite:///{folder}/mlflow.db", "measured", Path(folder))
        tracker.open()
        runs = [a_run(number, artifact) for number in range(RUNS)]

        def record() -> None:
            for begin in range(0, RUNS, tracker.portion):
                tracker.record(runs[begin : begin + tracker.portion])

        seconds = interleaved({"record": Contender(record, RUNS)}, REPETITIONS, time.process_time)["record"]
    spread = Spread.of(seconds) * 1000
    print(f"{spread:.1f} ms of CPU a run of {PARAMS} params and {METRICS * EPOCHS} metrics, {RUNS} runs in SQLite")


if __name__ == "__main__":
    main()
