"""Measure each loss's gradient error at the reference's logits in bfloat16, and the weights after the first step.

python -m experiments.precision.gradients   after the README's other commands, which write the logits

g is a loss's gradient with respect to a batch's logits in bfloat16, G that of cross-entropy in float64.
Means over the ten seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch.nn.functional as F
from torch import Tensor

from likelihood_lab.categorical.losses import nll_by_logsumexp
from likelihood_lab.errors import UsageError
from pipeline.entry import run_and_report
from pipeline.replica import Replica
from pipeline.storage.cells import TrialFolder

TRIAL = Path(__file__).resolve().parents[2] / "outputs" / "precision" / "bf16_mixed"
SEEDS = range(100, 110)
LOSSES: dict[str, Callable[..., Tensor]] = {"ce": F.cross_entropy, "nll_logsumexp": nll_by_logsumexp}


def gradient(loss: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Return dL/dlogits [B, C] in float64, computed in the precision of the logits."""
    leaf = logits.clone().requires_grad_()
    LOSSES[loss](leaf, labels).backward()
    assert leaf.grad is not None  # noqa: S101 - just made
    return leaf.grad.double()


def rows(trial: Path = TRIAL) -> Iterator[tuple[int, str, float, float, float]]:
    """Yield step, loss, |g - G| / |G|, <g, G> / <G, G>, and the share of rows without a gradient at the label."""
    for seed in SEEDS:
        cell = TrialFolder(trial).read(Replica("ce", seed))
        if cell is None:
            raise UsageError(f"{trial} has no run ce/s{seed}; run the README's commands first")
        for batch in cell.batches:
            logits, labels = batch["logits"].bfloat16(), batch["labels"]
            exact = gradient("ce", logits.double(), labels)
            for loss in LOSSES:
                found = gradient(loss, logits, labels)
                apart = float((found - exact).norm() / exact.norm())
                along = float((found * exact).sum() / (exact * exact).sum())
                silent = float((found.gather(1, labels[:, None]) == 0).double().mean())
                yield batch["step"], loss, apart, along, silent


def first_steps(outputs: Path = TRIAL.parent) -> Iterator[str]:
    """Yield precision, loss, and the weights' relative distance from ce's after one step, median over seeds."""
    for trial in sorted(path.name for path in outputs.iterdir() if (path / "history.parquet").exists()):
        history = pd.read_parquet(outputs / trial / "history.parquet")
        first = history[(history["metric"] == "gap/parameters") & (history["step"] == 1)]
        for loss, distance in first.groupby("loss")["value"].median().items():
            yield f"| {trial} | `{loss}` | {distance:.2g} |"


def table() -> int:
    """Print the means over seeds as a Markdown table."""
    found = pd.DataFrame(rows(), columns=["step", "loss", "apart", "along", "silent"])
    print("| step | loss | distance from the exact gradient | share along it | rows without a gradient at the label |")
    print("|---|---|---|---|---|")
    for row in found.groupby(["step", "loss"], as_index=False).mean().to_dict("records"):
        print(f"| {row['step']} | `{row['loss']}` | {row['apart']:.2g} | {row['along']:.2f} | {row['silent']:.2f} |")
    print("\n| trial | loss | distance of the weights from `ce` after the first step |\n|---|---|---|")
    print("\n".join(first_steps()))
    return 0


if __name__ == "__main__":
    sys.exit(run_and_report(table))
