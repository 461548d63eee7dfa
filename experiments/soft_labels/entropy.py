"""Compare CE - KL with the entropy of the training targets, and each loss's model with the truth.

python -m experiments.soft_labels.entropy     reads outputs/soft_labels/<trial>, prints two tables
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from likelihood_lab.errors import UsageError
from pipeline.build import load_dataset
from pipeline.data.dataset import Dataset
from pipeline.entry import ExitCode, run_and_report
from pipeline.replica import Replica
from pipeline.storage.cells import Cell, TrialFolder
from pipeline.verdict.plan import read_plan

OUTPUTS = Path(__file__).resolve().parents[2] / "outputs" / "soft_labels"
TRIALS = ("teacher", "sampled", "cifar10h")

Cells = Mapping[Replica, Cell]


def cells_of(path: Path) -> Cells:
    """Return the finished cells of a trial's losses."""
    request, _ = read_plan(path)
    wanted = [Replica(loss, seed) for loss in request.losses for seed in request.seeds]
    found = {replica: TrialFolder(path).read(replica) for replica in wanted}
    return {replica: cell for replica, cell in found.items() if cell is not None}


def data_of(cells: Cells) -> Dataset:
    """Load the cells' training data again."""
    made = next(iter(cells.values())).record.made_from
    data = load_dataset(made["dataset"])
    if data.digest != made["data_digest"]:
        raise UsageError("the data are no longer those that the cells were trained on; train again")
    return data


def entropy_of_targets(data: Dataset) -> float:
    """Return the mean of -sum_j y_j log y_j over the training targets, in nats."""
    if data.soft_targets is None:
        return 0.0
    targets = data.soft_targets[data.splits["train"]]
    return -torch.xlogy(targets, targets).sum(1).mean().item()


def objectives(cells: Cells, loss: str) -> pd.Series[float]:
    """Return train/objective by seed and step."""
    frames = [
        cell.history.query("metric == 'train/objective'").assign(seed=replica.seed)
        for replica, cell in cells.items()
        if replica.arm == loss
    ]
    values: pd.Series[float] = pd.concat(frames).set_index(["seed", "step"])["value"]
    return values


def apart(trial: str, cells: Cells, data: Dataset) -> str:
    """Return a row: CE - KL over all epochs and seeds, and H(y)."""
    entropy = entropy_of_targets(data)
    difference = objectives(cells, "ce_soft") - objectives(cells, "kl")
    pairs = [(cells[Replica("kl", replica.seed)], cell) for replica, cell in cells.items() if replica.arm == "ce_soft"]
    same = sum(kl.record.weights_sha256 == ce.record.weights_sha256 for kl, ce in pairs)
    off = (difference - entropy).abs().max()
    return f"| {trial} | {difference.mean():.8f} | {entropy:.8f} | {off:.1e} | {same} of {len(pairs)} |"


def distances(trial: str, cells: Cells) -> Iterator[str]:
    """Yield a row for each loss: mean and SD over seeds of KL(P || q) on the test set, in nats."""
    rows = [(replica.arm, replica.seed, cell.metrics["test/kl_truth"]) for replica, cell in cells.items()]
    table = pd.DataFrame(rows, columns=["loss", "seed", "kl"]).pivot(index="seed", columns="loss", values="kl")
    beside = table.sub(table["ce_soft"], axis=0)
    for loss in dict.fromkeys(replica.arm for replica in cells):
        values, costs = table[loss], beside[loss]
        lowest, highest = costs.min(), costs.max()
        yield (
            f"| {trial} | `{loss}` | {values.mean():.4f} ({values.std():.4f}) | "
            f"{costs.mean():+.2g} ({lowest:+.2g} to {highest:+.2g}) |"
        )


def tables(outputs: Path) -> str:
    """Return both tables of all existing trials."""
    found: dict[str, Any] = {trial: cells_of(outputs / trial) for trial in TRIALS if (outputs / trial).is_dir()}
    if not found:
        raise UsageError(f"{outputs} holds no trial; run the commands of experiments/soft_labels/README.md")
    lines = ["| trial | CE - KL | H(y) | largest error | weights of equal bits |", "|---|---|---|---|---|"]
    for trial, cells in found.items():
        try:
            lines.append(apart(trial, cells, data_of(cells)))
        except UsageError as error:  # data that are not here
            lines.append(f"| {trial} | skipped: {error} | | | |")
    lines += ["", "| trial | loss | KL to the truth (SD) | minus `ce_soft`'s (range over seeds) |", "|---|---|---|---|"]
    lines += [line for trial, cells in found.items() for line in distances(trial, cells)]
    return "\n".join(lines)


def main() -> ExitCode:
    """Print the tables."""
    print(tables(OUTPUTS))
    return ExitCode.HOLDS


if __name__ == "__main__":
    sys.exit(run_and_report(main))
