"""Decomposition of the variance of test results over seeds, from the recorded cells of the trials.

python -m experiments.seed_variance.decompose            results.csv, figure.svg and the README's tables
python -m experiments.seed_variance.decompose --check    writes nothing; exit code 1 where a fresh standard deviation
                                                         lies outside the recorded 95 % interval

Var_s(mean_i x_i) of per-example results x_i(s) is the sum of two parts (Jordan, arXiv 2304.01910): what N examples
that vary independently would give, sum_i Var_s(x_i) / N^2, and what their covariances add. The first is the finite
test set's; the second, times N / (N - 1), estimates without bias the variance on the whole distribution.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import yaml
from hydra.utils import instantiate
from numpy.typing import NDArray
from scipy import stats

from experiments.commands import with_block
from experiments.seed_variance.picture import draw
from likelihood_lab.errors import UsageError
from pipeline.build import load_dataset
from pipeline.config import schema as conf
from pipeline.data.dataset import Dataset
from pipeline.entry import ExitCode, run_and_report
from pipeline.storage.cells import Cell, TrialFolder

HERE = Path(__file__).parent
OUTPUTS = conf.ROOT / "outputs" / "seed_variance"
SETTINGS = ("digits", "calm", "chaotic", "annealed")
VARIES = tuple(vary.value for vary in conf.Vary)
LEVEL = 0.95

Floats = NDArray[np.float64]


# --- arrays in, findings out


@dataclass(frozen=True)
class Spread:
    """Standard deviation of a mean over n seeds, and its two parts. The share of a part may exceed 1 by chance.

    Attributes:
        test_set_sd: what N examples that vary independently would give.
        test_set_share: the test set's part of the variance; NaN where there is no variance.
        distribution_sd: the estimate for the whole distribution, 0 where its variance comes out negative.
        distribution_high: the same at the upper end of the interval of `sd`.
    """

    mean: float
    sd: float
    sd_low: float
    sd_high: float
    test_set_sd: float
    test_set_share: float
    distribution_sd: float
    distribution_high: float


def spread(results: Floats) -> Spread:
    """Decompose the variance over seeds of the mean result, from results [seeds, examples]."""
    seeds, examples = results.shape
    total = results.mean(1).var(ddof=1)
    low, high = total * (seeds - 1) / stats.chi2.ppf([(1 + LEVEL) / 2, (1 - LEVEL) / 2], seeds - 1)
    test_set = results.var(0, ddof=1).sum() / examples**2
    rest, highest = ((np.array([total, high]) - test_set) * examples / (examples - 1)).clip(min=0)
    return Spread(
        mean=float(results.mean()),
        sd=float(np.sqrt(total)), sd_low=float(np.sqrt(low)), sd_high=float(np.sqrt(high)),
        test_set_sd=float(np.sqrt(test_set)),
        test_set_share=float(test_set / total) if total else float("nan"),
        distribution_sd=float(np.sqrt(rest)), distribution_high=float(np.sqrt(highest)),
    )  # fmt: skip


def disagreement(predicted: NDArray[np.int64]) -> float:
    """Rate at which two models predict different classes, from classes [seeds, examples]: the mean over pairs."""
    seeds = len(predicted)
    counts = (predicted[:, :, None] == np.arange(predicted.max() + 1)).sum(0)  # [examples, classes]
    return float(1 - (counts * (counts - 1)).sum(1).mean() / (seeds * (seeds - 1)))


def ratio_interval(mine: float, reference: float, seeds: int) -> tuple[float, float]:
    """Interval of the ratio of two standard deviations with the given numbers of seeds, from the F distribution."""
    wide = np.sqrt(stats.f.ppf((1 + LEVEL) / 2, seeds - 1, seeds - 1))
    return mine / reference / wide, mine / reference * wide


# --- cells


@dataclass(frozen=True)
class Row:
    """Row of results.csv: one setting under one `vary`, for one metric."""

    setting: str
    vary: str
    metric: str
    seeds: int
    different_models: int
    test_examples: int
    disagreement: float
    distance: float  # median over pairs of runs: ||a - b|| / ||a|| of the final weights
    mean: float
    sd: float
    sd_low: float
    sd_high: float
    test_set_sd: float
    test_set_share: float
    distribution_sd: float
    distribution_high: float


def rows_of(setting: str, vary: str, cells: Sequence[Cell], data: Dataset) -> list[Row]:
    """Compute the rows of one trial, for accuracy and for NLL."""
    nll, predicted, labels = outputs(cells, data)
    results = {"accuracy": (predicted == labels).astype(np.float64), "nll": nll}
    for metric, values in results.items():
        check_against(cells, metric, values)
    common = {
        "seeds": len(cells),
        "different_models": len({cell.record.weights_sha256 for cell in cells}),
        "test_examples": len(labels),
        "disagreement": disagreement(predicted),
        "distance": distance(cells),
    }
    return [Row(setting, vary, metric, **common, **asdict(spread(values))) for metric, values in results.items()]


@torch.no_grad()
def outputs(cells: Sequence[Cell], data: Dataset) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """Compute NLL in nats and predicted class of every test example for every cell [seeds, N], and labels [N]."""
    inputs, labels = data.take(data.splits["test"])
    declared = cells[0].record.made_from["model"]
    model = instantiate(declared, input_shape=data.input_shape, num_classes=data.num_classes, _convert_="all").eval()
    nll, predicted = [], []
    for cell in cells:
        model.load_state_dict(cell.weights)
        logits = model(inputs)
        nll.append(F.cross_entropy(logits.double(), labels, reduction="none").numpy())
        predicted.append(logits.argmax(-1).numpy())
    return np.stack(nll), np.stack(predicted), labels.numpy()


def check_against(cells: Sequence[Cell], metric: str, results: Floats) -> None:
    """Check that the plain model gives the recorded results: within one example, and 1e-5 of the NLL."""
    recorded = np.array([cell.metrics[f"test/{metric}"] for cell in cells])
    apart = np.abs(results.mean(1) - recorded)
    allowed = 1.01 / results.shape[1] if metric == "accuracy" else 1e-5 * recorded
    if not (apart <= allowed).all():
        raise UsageError(f"{cells[0].folder.parent}: the weights do not give the recorded test {metric}; train again")


def distance(cells: Sequence[Cell]) -> float:
    """Median over pairs of runs of the distance between their final weights, relative to the norm of one."""
    vectors = [torch.cat([tensor.double().flatten() for tensor in cell.weights.values()]) for cell in cells]
    return float(np.median([((a - b).norm() / a.norm()).item() for a, b in combinations(vectors, 2)]))


def trials(folder: Path) -> Iterator[tuple[str, str, Path, Mapping[str, Any]]]:
    """List setting, `vary`, path and identity of every trial, in the order of the tables."""
    for setting in SETTINGS:
        found = {}
        for statement in sorted((folder / setting).glob("*/trial.yaml")):
            identity = yaml.safe_load(statement.read_text())
            found[identity.get("vary", conf.VARY_ALL)] = (statement.parent, identity)
        for vary in VARIES:
            if vary not in found:
                raise UsageError(f"{folder / setting} has no trial with vary={vary}; run the README's commands first")
            yield setting, vary, *found[vary]


def analysed(folder: Path) -> tuple[pd.DataFrame, str]:
    """Compute all rows, and a line about the environment."""
    rows: list[Row] = []
    data: dict[str, Dataset] = {}
    for setting, vary, path, identity in trials(folder):
        if setting not in data:
            data[setting] = load_dataset(identity["dataset"]).to("cpu", torch.float32)
        cells = list(TrialFolder(path).cells())
        diverged = [f"s{cell.record.seed}" for cell in cells if cell.record.diverged_at is not None]
        if diverged:
            raise UsageError(f"{path}: {', '.join(diverged)} diverged, and have no accuracy to take apart")
        rows += rows_of(setting, vary, cells, data[setting])
    made = cells[-1].record
    day, environment = time.strftime("%Y-%m-%d", time.gmtime(made.ended)), made.environment
    line = f"Recorded {day}: {environment['device']}, torch {environment['torch']}, Python {environment['python']}."
    return pd.DataFrame(rows), line


# --- tables


PUBLISHED = """\
| published, accuracy SD in pp | everything | weights | order | one bit | two models disagree, % |
|---|---|---|---|---|---|
| ResNet-14 on CIFAR-10, 100 models each [1] | .26 | .22 | .25 | .21 | 10.6-10.7 |
| MLPs on MNIST [1] | .05-.19 | | | | |

[1] Summers and Dinneen 2021 (arXiv 2103.04514), as replicated in ReScience. ResNets in TensorFlow on GPUs (arXiv
2001.11396): an accuracy SD of .027 with free seeds and of .020 with fixed ones, where the kernels' rounding varies."""


def tables(frame: pd.DataFrame) -> str:
    """Format the spread in both metrics, the distances between models and the published numbers as Markdown."""
    blocks: dict[tuple[str, str], list[Row]] = {}
    for values in frame.itertuples(index=False):
        row = Row(*values)
        blocks.setdefault((row.metric, row.setting), []).append(row)
    accuracy, nll = ([blocks[metric, setting] for setting in SETTINGS] for metric in ("accuracy", "nll"))
    return "\n\n".join([_spreads(accuracy, 100, "pp"), _spreads(nll, 1, "nats"), _models(accuracy), PUBLISHED])


def _spreads(blocks: Sequence[Sequence[Row]], scale: float, unit: str) -> str:
    """Format a row for each setting and `vary`; the first of a block is `all`."""
    thumbs = blocks[0][0].metric == "accuracy"
    lines = [
        [
            "setting", "`vary`", f"test {blocks[0][0].metric}", f"SD, {unit} [95 %]", "of that of `all` [95 %]",
            "test set's part of the variance", f"SD on the distribution, {unit} (at most)",
            *([f"sqrt(error / (2 N)), {unit}"] if thumbs else []),
        ]
    ]  # fmt: skip
    for everything, row in ((block[0], row) for block in blocks for row in block):
        low, high = ratio_interval(row.sd, everything.sd, row.seeds)
        interval = f"[{_two(scale * row.sd_low)}, {_two(scale * row.sd_high)}]"
        lines.append(
            [
                row.setting, f"`{row.vary}`", f"{row.mean:.4f}", f"{_two(scale * row.sd)} {interval}",
                "" if row is everything else f"{_two(row.sd / everything.sd)} [{_two(low)}, {_two(high)}]",
                f"{row.test_set_share:.2f}" if row.sd else "",
                f"{_two(scale * row.distribution_sd)} ({_two(scale * row.distribution_high)})",
                *([_two(scale * rule_of_thumb(row.mean, row.test_examples))] if thumbs else []),
            ]
        )  # fmt: skip
    return _markdown(lines)


def _models(blocks: Sequence[Sequence[Row]]) -> str:
    """Format the distances between the models of each setting and `vary`."""
    titles = ["setting", "`vary`", "two models disagree, %", "relative distance of their weights", "different weights"]
    rows = [
        [row.setting, f"`{row.vary}`", _two(100 * row.disagreement), _two(row.distance),
         f"in {row.different_models} of {row.seeds}"]
        for block in blocks for row in block
    ]  # fmt: skip
    return _markdown([titles, *rows])


def _two(value: float) -> str:
    """Format with two significant digits."""
    return f"{value:#.2g}".rstrip(".") if value else "0"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    """Format a table whose first row is the header."""
    header, *rows = ("| " + " | ".join(entries) + " |" for entries in lines)
    return "\n".join([header, "|" + "---|" * len(lines[0]), *rows])


def rule_of_thumb(accuracy: float, examples: int) -> float:
    """Compute the rule of thumb sqrt(error / (2 N))."""
    return float(np.sqrt((1 - accuracy) / (2 * examples)))


# --- the command


def record(frame: pd.DataFrame, line: str) -> None:
    """Write results.csv, figure.svg and the block between the markers of the README."""
    frame.to_csv(HERE / "results.csv", index=False, float_format="%.6g", lineterminator="\n")
    accuracy = frame[frame["metric"] == "accuracy"]
    free = [Row(*values) for values in accuracy[accuracy["vary"] == "all"].itertuples(index=False)]
    thumbs = {row.setting: rule_of_thumb(row.mean, row.test_examples) for row in free}
    (HERE / "figure.svg").write_text(draw(accuracy, thumbs))
    readme = HERE / "README.md"
    readme.write_text(with_block(readme.read_text(), [tables(frame), "", line]))


def outside(fresh: pd.DataFrame, recorded: pd.DataFrame) -> list[str]:
    """List the rows whose new standard deviation lies outside the recorded interval."""
    keys = ["setting", "vary", "metric"]
    both = fresh.merge(recorded, on=keys, suffixes=("", "_recorded"), validate="one_to_one")
    slack = 1e-5 * both["sd_recorded"]  # of the six digits on file
    off = (both["sd"] < both["sd_low_recorded"] - slack) | (both["sd"] > both["sd_high_recorded"] + slack)
    return [" ".join(names) for names in both.loc[off, keys].itertuples(index=False)]


def run(arguments: Sequence[str]) -> ExitCode:
    """Record the results, or compare them with the recorded ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is recorded, and write nothing")
    parser.add_argument("--outputs", type=Path, default=OUTPUTS, help="the folder of the settings")
    asked = parser.parse_args(arguments)
    frame, line = analysed(asked.outputs)
    if not asked.check:
        record(frame, line)
        print(f"{tables(frame)}\n\n{line}")
        return ExitCode.HOLDS
    off = outside(frame, pd.read_csv(HERE / "results.csv"))
    print(f"outside the recorded interval: {', '.join(off) or 'nothing'}, of {len(frame)} standard deviations")
    return ExitCode.REFUTED if off else ExitCode.HOLDS


if __name__ == "__main__":
    sys.exit(run_and_report(lambda: run(sys.argv[1:])))
