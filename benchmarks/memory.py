"""Measure the memory of a stack in training, and compare it with pipeline/trial/budget.py: python -m benchmarks.memory

The measure is the growth of the peak resident set over a few steps. Each model runs in a new process, because freed
memory is used again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CASES = (
    ("dataset=digits", "model=mlp", "batch_size=1024"),
    ("dataset=digits", "model=mlp", "batch_size=1024", "optimizer=adam"),
    ("dataset=digits", "model=cnn", "batch_size=256"),
    ("dataset=digits", "model=resnet18", "batch_size=32"),
    ("dataset=digits", "model=resnet18", "batch_size=64", "optimizer=adam"),
)
STEPS = 4


def measure(overrides: list[str]) -> dict[str, float]:
    """Return the bytes of a full tile: estimated by the budget, and measured."""
    from hydra import compose, initialize_config_dir

    from benchmarks.steps import WithoutTrainer
    from pipeline.config import schema as conf
    from pipeline.replica import Replica
    from pipeline.training.objectives import Objectives
    from pipeline.trial.budget import budget_of
    from pipeline.trial.setup import build_setup

    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        setting = build_setup(conf.plain(compose("train", [*overrides, "trainer=cpu"])))
    budget = budget_of(setting)
    arms = [formulation.name for formulation in setting.formulations]
    replicas = [Replica(arm, seed) for arm in arms for seed in range(setting.tile // len(arms) + 1)][: setting.tile]
    with _peak() as peak:
        objectives = Objectives(setting.formulations, replicas, setting.data.num_classes, setting.device, setting.dtype)
        stack = setting.stack(replicas)
        module = WithoutTrainer(stack, objectives, replicas, setting.data, setting.builder.input_shape, setting.recipe)
        module.on_fit_start()
        module.on_train_epoch_start()
        module.training_step(slice(0, STEPS), 0)
    return {"budget": setting.tile * budget.replica, "seen": peak["after"] - peak["before"], "tile": setting.tile}


@contextmanager
def _peak() -> Iterator[dict[str, int]]:
    """Yield the resident set before the block and, in the end, its peak during the block."""
    import psutil

    process, done = psutil.Process(), threading.Event()
    seen = {"before": process.memory_info().rss, "after": 0}

    def watch() -> None:
        while not done.is_set():
            seen["after"] = max(seen["after"], process.memory_info().rss)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def main() -> None:
    """Print a line for each case."""
    from pipeline.text import in_words

    print("| model | replicas | budget | measured | measured / budget |\n|---|---|---|---|---|")
    for overrides in CASES:
        child = [sys.executable, "-m", "benchmarks.memory", *overrides]
        done = subprocess.run(child, capture_output=True, text=True, check=True)  # noqa: S603 - this file
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        both = (
            f"{in_words(int(found['budget']))} | {in_words(int(found['seen']))} | {found['seen'] / found['budget']:.2f}"
        )
        print(f"| {', '.join(overrides)} | {found['tile']:.0f} | {both} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measure(sys.argv[1:])))
    else:
        main()
