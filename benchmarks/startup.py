"""Measure the CPU time from the command to the first step, and that of two imports: python -m benchmarks.startup

The command is the main job's, with an audit of two losses. Each process exits at once with `os._exit`; a normal exit
takes one more second, even after the two imports alone. "Database ready" means that MLflow has created it and it
holds the experiment, as after the first trial.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.end_to_end import ROOT, Workshop, children_seconds

IMPORTS = "import os, torch, pytorch_lightning; os._exit(0)"
REPETITIONS = 5


def to_the_first_step(arguments: list[str]) -> None:
    """Run `python -m pipeline.train` and exit before the first step."""
    from pipeline import train

    validate = train.validate

    def validate_and_prepare_to_stop(*given: object) -> None:
        validate(*given)  # type: ignore[arg-type]
        from pipeline.training.module import StackTrainingModule

        StackTrainingModule.training_step = lambda *_: os._exit(0)  # type: ignore[method-assign]

    train.validate = validate_and_prepare_to_stop
    sys.argv = ["pipeline.train", *arguments]
    train.main()


def measure(command: list[str], database: Path) -> float:
    """Return the CPU seconds of a new process and of its children."""
    settings = {"MLFLOW_TRACKING_URI": f"sqlite:///{database}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    before = children_seconds()
    subprocess.run(command, cwd=ROOT, env=os.environ | settings, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    return children_seconds() - before


def main() -> None:
    """Measure the cases in turns and print a line for each."""
    from benchmarks.timing import Spread, gain  # imported here: it imports torch, which the child must do itself

    with tempfile.TemporaryDirectory() as folder:
        ready = Workshop(Path(folder)).template
        trial = [sys.executable, "-m", "benchmarks.startup", "loss=[nll,ce,kl]", "seed=[0,1,2]", "trainer=cpu"]
        commands = {
            "import torch, pytorch_lightning": [sys.executable, "-c", IMPORTS],
            "a trial without tracking": [*trial, "tracking=none"],
            "a trial, its database ready": trial,
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for repetition in range(REPETITIONS):
            for name, command in commands.items():
                own = [f"hydra.run.dir={folder}/{len(name)}-{repetition}"] if "trial" in name else []
                seconds[name].append(measure([*command, *own], ready))
    baseline = seconds["import torch, pytorch_lightning"]
    for name, found in seconds.items():
        print(f"{name}: {Spread.of(found):.2f} s, {gain(found, baseline):.2f} x the imports")


if __name__ == "__main__":
    if sys.argv[1:]:
        to_the_first_step(sys.argv[1:])
    else:
        main()
