"""Measure the cost of a step and of a whole trial, and compare it with conventional training: `make bench`.

python -m benchmarks.run             some minutes of CPU time; writes benchmarks/<date>-<device>.md and .csv
python -m benchmarks.run --quick     half a minute: two stacks, no whole trials; writes a file only with --out
python -m benchmarks.run --check     compares the steps with the last record of this device (`make bench-check`)
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import record, steps
from benchmarks.end_to_end import Usage, Workshop
from benchmarks.timing import Spread, gain

HERE = Path(__file__).parent
PACKAGES = ("torch", "pytorch-lightning", "mlflow", "hydra-core", "numpy", "pandas")


@dataclass(frozen=True)
class Effort:
    """Number of measurements. `trials=0` measures no whole trials."""

    repetitions: int
    trials: int
    seeds: int = 30
    epochs: int = 30


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    given = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        from pipeline.runtime import keep_freed_memory

        keep_freed_memory()  # every trial does this
    whole = not (given.quick or given.steps_only or given.check)
    effort = Effort(repetitions=5 if given.quick else 7, trials=3 if whole else 0)
    if given.check:
        sys.exit(check(device, effort, given.out or HERE))
    rows = list(step_rows(device, effort, given.quick))
    lines = [_header(device, effort), *map(_line, rows), *ceiling_section(device, rows, given.quick)]
    if effort.trials:
        lines += trial_section(effort)
    text = "\n".join(lines) + "\n"
    print(text)
    out = given.out or (None if given.quick else HERE)
    if out is not None:
        print(f"written to {_write(out, device, text, rows)}")


def _write(folder: Path, device: torch.device, text: str, rows: Sequence[steps.Row]) -> Path:
    target = folder / f"{datetime.date.today():%Y-%m-%d}-{_slug(device)}.md"
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    record.write([row for row in rows if row.engine != steps.RIVAL], target.with_suffix(".csv"))
    return target


def _slug(device: torch.device) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def check(device: torch.device, effort: Effort, folder: Path) -> int:
    """Compare the steps with the last record of this device. Return 1 if a gain regressed, 2 without a record."""
    records = sorted(folder.glob(f"*-{_slug(device)}.csv"))
    if not records:
        print(f"error: {folder} has no record of {device_name(device)}; make one: make bench", file=sys.stderr)
        return 2
    ours = [row for row in step_rows(device, effort, quick=False) if row.engine != steps.RIVAL]
    found = list(record.compare(record.read(records[-1]), ours))
    print(f"beside {records[-1].name}:")
    for line in found:
        print(line)
    return int(any(line.regressed for line in found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two stacks and no whole trials")
    parser.add_argument("--steps-only", action="store_true", help="no whole trials")
    parser.add_argument("--check", action="store_true", help="compare with the last record; exit 1 after a regression")
    parser.add_argument("--out", type=Path, help="folder to write the page to (default: beside this file)")
    return parser


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or Linux's name of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return named[1] if named else platform.machine()


HEADER = """\
# Benchmarks on {device}

{date}, Python {python}, {versions}; one thread.

Compare gains, not absolute times: other work on the machine changes all times, but both sides of a gain alike.
Every number is the median of interleaved repetitions, with [lowest..highest].

## A step of R replicas against R bare steps

{clock}, {repetitions} repetitions. NLL, CE and KL in equal shares, batch {batch}, SGD with momentum,
float32. A bare step is a step of a hand-written loop over one `nn.Module` with the data in memory. A step
without the losses receives a fixed dL/dlogits. `fold` and `loop` are the engines of this project. `vmap` is an
alternative: `vmap(grad(functional_call))` of the same model, the same losses as plain functions, SGD on the stack.

| model | engine | R | | bare step, us | our step, us | gain |
|---|---|---|---|---|---|---|"""

CEILING_HEADER = """
## Shares of the limits of this core

The core multiplies 512 x 512 matrices at {sgemm:.0f} GFLOP/s and copies 128 MB at {copy:.1f} GB/s, read and written.
The table shows the shares that the steps without the losses reach. The first share counts their matrix products. The
second counts the necessary reads and writes of weights, gradients and momentum (above 100 % they stay in a cache).

| model | R | of the sgemm rate | of the copying rate |
|---|---|---|---|"""

TRIAL_HEADER = """
## A whole trial: 3 losses x {seeds} seeds on digits, {epochs} epochs, tracked in SQLite

CPU seconds, user and system, of a new process, {trials} repetition(s). The conventional loop (Lightning
module, `self.log`, DataLoader, MLFlowLogger) trained {trained} runs in one process each time. Its time for
{runs} runs is **extrapolated** from these; the time of one process per run, from a process with one run. The
database existed before. MLflow needs {database:.1f} s once to create it, imports included.

| | conventional | pipeline | gain |
|---|---|---|---|"""


def _header(device: torch.device, effort: Effort) -> str:
    return HEADER.format(
        device=device_name(device),
        date=datetime.date.today(),
        python=platform.python_version(),
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in _installed()),
        clock="Wall time of finished work" if device.type == "cuda" else "CPU time of the process",
        repetitions=effort.repetitions,
        batch=steps.BATCH,
    )


def _installed() -> Iterator[str]:
    present = {distribution.metadata["Name"].lower() for distribution in importlib.metadata.distributions()}
    return (name for name in PACKAGES if name in present)


def step_rows(device: torch.device, effort: Effort, quick: bool) -> Iterator[steps.Row]:
    """Measure every stack of every case."""
    for case in steps.cases(device, quick):
        yield from steps.measure(case, device, effort.repetitions)


def _line(row: steps.Row) -> str:
    what = "with the losses" if row.with_losses else "without the losses"
    times = f"{row.bare * 1e6:.0f} | {row.step * 1e6:.0f} | **{row.gain:.2f}**"
    return f"| {row.case} | {row.engine} | {row.replicas} | {what} | {times} |"


def ceiling_section(device: torch.device, rows: Sequence[steps.Row], quick: bool) -> Iterator[str]:
    """Yield the table of the shares of the core's multiplying and copying rates."""
    if device.type != "cpu":
        return
    by_name = {case.name: case for case in steps.cases(device, quick)}
    yield CEILING_HEADER.format(sgemm=steps.sgemm_rate() / 1e9, copy=steps.copy_rate() / 1e9)
    for row in (row for row in rows if not row.with_losses):
        shares = steps.of_ceiling(row, by_name[row.case]), steps.of_bandwidth(row, by_name[row.case])
        yield f"| {row.case} | {row.replicas} | **{shares[0]:.0%}** | {shares[1]:.0%} |"


def trial_section(effort: Effort) -> Iterator[str]:
    """Yield the table of whole trials."""
    usual: list[Usage] = []
    alone: list[Usage] = []
    ours: list[Usage] = []
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for _ in range(effort.trials):
            usual.append(workshop.measure("conventional", 1, effort.epochs))
            alone.append(workshop.measure("alone", 1, effort.epochs))
            ours.append(workshop.measure("product", effort.seeds, effort.epochs))
    runs = ours[0].num_runs
    yield TRIAL_HEADER.format(
        seeds=effort.seeds,
        epochs=effort.epochs,
        trials=effort.trials,
        trained=usual[0].num_runs,
        runs=runs,
        database=workshop.database_seconds,
    )
    here = [_whole(u, runs) for u in ours]
    yield _comparison("one process for all", [_whole(u, runs) for u in usual], here)
    yield _comparison("one process a run", [runs * _whole(u, 1) for u in alone], here)
    yield _comparison("without imports", [_work(u, runs) for u in usual], [_work(u, runs) for u in ours])
    yield _comparison("a run, without imports", [_work(u, 1) for u in usual], [_work(u, 1) for u in ours])


def _work(usage: Usage, num_runs: int) -> float:
    return usage.training / usage.num_runs * num_runs


def _whole(usage: Usage, num_runs: int) -> float:
    return usage.imports + _work(usage, num_runs)


def _comparison(what: str, usual: Sequence[float], ours: Sequence[float]) -> str:
    return f"| {what} | {Spread.of(usual):.2f} | {Spread.of(ours):.2f} | **{gain(usual, ours):.1f}** |"


if __name__ == "__main__":
    main()
