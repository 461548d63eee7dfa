"""Measure size and power of the dithered rank test on real training of the digits MLP.

python -m experiments.envelope.ranks             as recorded: 200 seeds, three regimes, 9 copies of the reference
python -m experiments.envelope.ranks --seeds 40  a fifth of it
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from experiments.envelope.study import HONEST, MUTANTS, REFERENCE, REGIMES, plain, train_sketches
from likelihood_lab.stats.trajectory import BITS, rank_test
from likelihood_lab.stats.trajectory import RANK_STEPS as STEPS
from likelihood_lab.stats.trajectory import STEPS as KEPT
from pipeline.replica import Replica
from pipeline.training.controls import dithered
from pipeline.training.objectives import Formulation

HERE = Path(__file__).parent
COPIES = 9
SEEDS = 200
SIZES = (5, 10)
STUDIES = 1000
DOSES = (1e-3, 1e-4, 1e-5, 1e-6)
FLOAT32 = ("calm SGD", "chaotic SGD", "Adam")


def arms() -> list[Formulation]:
    """Return the copies of the reference, then every candidate, each with its own dithering."""
    candidates = [REFERENCE]
    candidates += [Formulation(name, args, partial(plain, fn)) for name, (args, fn) in HONEST.items()]
    candidates += [
        Formulation(f"{name}, {d:g}", ("logits", "labels"), partial(plain, partial(fn, d=d)))
        for name, fn in MUTANTS.items()
        for d in DOSES
    ]
    copies = [dithered(f"copy {k}", REFERENCE, BITS, k) for k in range(1, COPIES + 1)]
    return [*copies, *(dithered(f.name, f, BITS, COPIES + 1 + i) for i, f in enumerate(candidates))]


def rejected(found: Mapping[Replica, Tensor], seeds: Sequence[int], studies: int) -> dict[tuple[str, int], float]:
    """Return {(candidate, S): share of studies that reject}."""
    names = [formulation.name for formulation in arms()]
    copies = [name for name in names if name.startswith("copy")]
    rng = np.random.default_rng(0)
    rates: dict[tuple[str, int], float] = {}
    reference = np.stack([[found[Replica(name, seed)].numpy() for name in copies] for seed in seeds])
    for name in names[len(copies) :]:
        mine = np.stack([found[Replica(name, seed)].numpy() for seed in seeds])[:, None]
        both = np.concatenate([mine, reference], 1)  # [S, K + 1, steps, width]
        for size in SIZES:
            count = 0
            for _ in range(studies):
                chosen = both[rng.choice(len(seeds), size, replace=False)]
                count += rank_test({step: chosen[:, :, KEPT.index(step)] for step in STEPS}, rng).rejects()
            rates[name, size] = count / studies
    return rates


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; after a full run also write it beside this file."""
    parser = argparse.ArgumentParser(description="size and power of the dithered rank test")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--studies", type=int, default=STUDIES)
    options = parser.parse_args(arguments)
    seeds = range(options.seeds)
    rates = {
        regime: rejected(train_sketches(REGIMES[regime], seeds, arms()), seeds, options.studies) for regime in FLOAT32
    }
    lines = [
        f"Per cent of {options.studies} studies, each a subset of {options.seeds} trained seeds, that reject at 5 %; "
        f"{COPIES} copies of the reference a seed.",
        "",
        "| arm | S | " + " | ".join(FLOAT32) + " |",
        "|---" * (2 + len(FLOAT32)) + "|",
    ]
    for name, size in next(iter(rates.values())):
        lines.append(f"| {name} | {size} | " + " | ".join(f"{100 * rates[r][name, size]:.3g}" for r in FLOAT32) + " |")
    text = "\n".join(lines)
    print(text)
    if options.seeds >= SEEDS:
        (HERE / "ranks.md").write_text(text + "\n")
    honest = {"ce", *HONEST}
    large = {(r, *key): rate for r in FLOAT32 for key, rate in rates[r].items() if key[0] in honest and rate > 0.08}
    for key, rate in large.items():
        print(f"an honest form is rejected too often: {key}, {rate:.3f}", file=sys.stderr)
    return 1 if large else 0


if __name__ == "__main__":
    sys.exit(main())
