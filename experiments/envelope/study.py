"""Error rates of the envelope test on real training of the digits MLP.

python -m experiments.envelope.study             the full study, as recorded: 300 seeds, six regimes
python -m experiments.envelope.study --seeds 60  a fifth of it

Every arm trains 18 steps under every seed; a study is a subset of S seeds, judged by the function that trials use.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from likelihood_lab.categorical.losses import nll_by_logsumexp, nll_of_log_of_softmax
from likelihood_lab.stats.trajectory import STEPS, Distances, envelope
from pipeline.config import schema as conf
from pipeline.engine.sketch import sketch_distance
from pipeline.replica import BY_PRECISION, Replica
from pipeline.training.controls import control
from pipeline.training.module import StackTrainingModule, fit
from pipeline.training.objectives import Formulation, Objectives
from pipeline.trial.setup import TrialSetup, build_setup

HERE = Path(__file__).parent
SEEDS = 300
SIZES = (5, 10, 30)
STUDIES = 1000
DOSES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
REGIMES = {
    "calm SGD": ("optimizer=sgd", "optimizer.lr=0.1"),
    "chaotic SGD": ("optimizer=sgd", "optimizer.lr=1.0"),
    "Adam": ("optimizer=adam",),
    "chaotic Adam": ("optimizer=adam", "optimizer.lr=0.05"),
    "bf16, calm SGD": ("optimizer=sgd", "optimizer.lr=0.1", "precision=bf16_mixed"),
    "bf16, chaotic SGD": ("optimizer=sgd", "optimizer.lr=1.0", "precision=bf16_mixed"),
}
REFERENCE = Formulation("ce", ("logits", "labels"), nn.CrossEntropyLoss)


# --- the arms


def _one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    return -(F.one_hot(labels, logits.shape[-1]) * logits.log_softmax(-1)).sum(-1).mean()


def _cast_back(logits: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(logits.double().log_softmax(-1), labels).to(logits.dtype)


def _smoothed(logits: Tensor, labels: Tensor, d: float) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=d)


def _warmed(logits: Tensor, labels: Tensor, d: float) -> Tensor:
    return F.cross_entropy(logits * (1 + d), labels)


def _scaled(logits: Tensor, labels: Tensor, d: float) -> Tensor:
    return F.cross_entropy(logits, labels) * (1 + d)


HONEST: Mapping[str, tuple[tuple[str, ...], Callable[..., Tensor]]] = {
    "log of softmax": (("probs", "labels"), nll_of_log_of_softmax),
    "logsumexp": (("logits", "labels"), nll_by_logsumexp),
    "one-hot": (("logits", "labels"), _one_hot),
    "float64, cast back": (("logits", "labels"), _cast_back),
}
MUTANTS = {"label smoothing": _smoothed, "temperature 1 + d": _warmed, "scale 1 + d": _scaled}


def arms() -> list[Formulation]:
    """List the reference, placebos, equivalent formulas and mutants."""
    placebos = [name for names in BY_PRECISION.values() for name in names]
    found = [REFERENCE, *(control(name, REFERENCE) for name in placebos)]
    found += [Formulation(name, args, partial(given, fn)) for name, (args, fn) in HONEST.items()]
    for name, fn in MUTANTS.items():
        found += [Formulation(f"{name}, {d:g}", ("logits", "labels"), partial(given, partial(fn, d=d))) for d in DOSES]
    return found


def given(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function itself, as `make` of a formulation has to."""
    return fn


# --- training


def trained_sketches(
    overrides: Sequence[str], seeds: Sequence[int], formulations: Sequence[Formulation]
) -> dict[Replica, Tensor]:
    """Train and return the sketches [steps, width] of every (arm, seed) at STEPS."""
    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        fixed = ["loss=[ce]", "dataset=digits", "model=mlp", "epochs=1", "trainer=cpu", "tracking=none"]
        setting = build_setup(conf.plain(compose("train", overrides=[*fixed, *overrides])))
    found: dict[Replica, Tensor] = {}
    for first in range(0, len(seeds), 2):
        found |= _trained(setting, seeds[first : first + 2], formulations)
    return found


def _trained(setting: TrialSetup, seeds: Sequence[int], formulations: Sequence[Formulation]) -> dict[Replica, Tensor]:
    replicas = [Replica(formulation.name, seed) for formulation in formulations for seed in seeds]
    objectives = Objectives(formulations, replicas, setting.data.num_classes, setting.device, setting.dtype)
    module = StackTrainingModule(
        setting.stack(replicas), objectives, replicas, setting.data, setting.builder.input_shape, setting.recipe
    )
    fit(module, (), "cpu")
    kept = [module.sketch_steps.index(step) for step in STEPS]
    return {
        replica: torch.stack([module.sketches[place][slot] for place in kept]).double()
        for slot, replica in enumerate(replicas)
    }


# --- studies


@dataclass(frozen=True)
class Rate:
    """Rates of `outside` and of `not_applicable` for one arm."""

    regime: str
    arm: str
    seeds: int
    outside: float
    inapplicable: float
    median_excess: float


def rates(regime: str, found: Mapping[Replica, Tensor], seeds: Sequence[int], studies: int) -> list[Rate]:
    """Compute the rates of each arm for each S, over random subsets of the seeds."""
    placebos = BY_PRECISION["bf16_mixed" if "precision=bf16_mixed" in REGIMES[regime] else "float32"]
    names = [formulation.name for formulation in arms() if not formulation.name.startswith(("ce", "placebo"))]
    reference = torch.stack([found[Replica("ce", seed)] for seed in seeds])
    distance = {
        name: _from(torch.stack([found[Replica(name, seed)] for seed in seeds]), reference)
        for name in (*names, *placebos)
    }
    rng = np.random.default_rng(0)
    rows = []
    for size in SIZES:
        subsets = [rng.choice(len(seeds), size, replace=False) for _ in range(studies)]
        between = [_between(reference, subset) for subset in subsets]
        for name in names:
            words = [
                envelope(_of(distance[name], s), [_of(distance[placebo], s) for placebo in placebos], b)
                for s, b in zip(subsets, between, strict=True)
            ]
            outside = np.mean([word.word == "outside" for word in words])
            silent = np.mean([word.word == "not_applicable" for word in words])
            largest = [max(word.excess.values()) for word in words if word.excess]
            rows.append(Rate(regime, name, size, float(outside), float(silent), float(np.median(largest or [np.nan]))))
    return rows


def _from(arm: Tensor, reference: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Compute relative distances [S, steps]."""
    return sketch_distance(arm, reference).numpy()


def _of(distance: np.ndarray[Any, Any], subset: np.ndarray[Any, Any]) -> Distances:
    return {step: distance[subset, i] for i, step in enumerate(STEPS)}


def _between(reference: Tensor, subset: np.ndarray[Any, Any]) -> Distances:
    chosen = reference[torch.from_numpy(subset)]
    pairs = np.array([sketch_distance(a, b).numpy() for a, b in pairwise(chosen)])
    return {step: pairs[:, i] for i, step in enumerate(STEPS)}


# --- the table


def markdown(rows: Sequence[Rate], seeds: int, studies: int) -> str:
    """Format the per cent of studies with `outside`, and in brackets the per cent that is not applicable if above 1."""
    lines = [f"Per cent of {studies} studies, each a subset of {seeds} trained seeds, that say `outside`.", ""]
    regimes = list(dict.fromkeys(row.regime for row in rows))
    lines.append("| arm | S | " + " | ".join(regimes) + " |")
    lines.append("|---" * (2 + len(regimes)) + "|")
    for arm in dict.fromkeys(row.arm for row in rows):
        for size in SIZES:
            cells = [
                f"{100 * row.outside:.3g}" + (f" (n/a {100 * row.inapplicable:.3g})" if row.inapplicable > 0.01 else "")
                for regime in regimes
                for row in rows
                if (row.arm, row.seeds, row.regime) == (arm, size, regime)
            ]
            lines.append(f"| {arm} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table. Write it beside this file if the run is a full one."""
    parser = argparse.ArgumentParser(description="error rates of the envelope")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--studies", type=int, default=STUDIES)
    parser.add_argument("--regimes", nargs="*", default=list(REGIMES))
    asked = parser.parse_args(arguments)
    rows: list[Rate] = []
    for regime in asked.regimes:
        seeds = range(asked.seeds)
        rows += rates(regime, trained_sketches(REGIMES[regime], seeds, arms()), seeds, asked.studies)
    text = markdown(rows, asked.seeds, asked.studies)
    print(text)
    if asked.seeds >= SEEDS and asked.regimes == list(REGIMES):
        (HERE / "envelope.md").write_text(text + "\n")
        with (HERE / "envelope.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["regime", "arm", "seeds", "outside", "inapplicable", "median_excess"])
            writer.writerows([r.regime, r.arm, r.seeds, r.outside, r.inapplicable, r.median_excess] for r in rows)
    accused = [row for row in rows if row.arm in HONEST and row.outside > 0.05]
    for row in accused:
        print(f"an honest form is accused: {row}", file=sys.stderr)
    return 1 if accused else 0


if __name__ == "__main__":
    sys.exit(main())
