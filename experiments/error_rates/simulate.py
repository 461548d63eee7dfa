"""Simulate the error rates of the outcome, with the functions that trials use.

python -m experiments.error_rates.simulate                 the full table, as recorded: 20 000 studies a cell
python -m experiments.error_rates.simulate --studies 500   the same in a minute

Differences are in units of the margin, with true mean mu and standard deviation sigma. The exit code is 1 if a bounded
rate lies more than three Monte Carlo standard errors above its bound.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from likelihood_lab.stats.outcome import OutcomeFinding, compare, correct_for_arms
from likelihood_lab.stats.pairs import Status
from pipeline.verdict.plan import level_of

HERE = Path(__file__).parent
ALPHA = 0.05
SIZES = (5, 10, 20, 30, 100)
STUDIES = 20_000
METRICS = ("brier", "accuracy")  # both compared as differences, so that margin 1 is margin 1
JUMP, JUMP_RATE = 4.0, 0.05

Draw = Callable[[Generator, int], "Study"]


@dataclass(frozen=True)
class Study:
    """Differences [arms, metrics, S] in margin units, and the end of each run."""

    differences: NDArray[np.float64]
    candidate: Sequence[Sequence[Status]] | None = None
    reference: Sequence[Status] | None = None


@dataclass(frozen=True)
class Scenario:
    """A truth, the word to count, and the bound of its rate.

    Attributes:
        counted: the word whose frequency is counted, for any arm.
        bound: the largest allowed rate in per cent; None for power and for stated weak spots.
        looks: the fractions of S at which there is a look.
        declared: the number of declared looks; 0: each look uses the full alpha, as without a protocol.
    """

    name: str
    counted: str
    draw: Draw = field(repr=False)
    bound: float | None = None
    looks: tuple[float, ...] = (1.0,)
    declared: int = 1
    smallest: int = 0  # the smallest S at which it makes sense


# --- what may be true


def normal(mu: Sequence[float], sigma: float, arms: int = 1) -> Draw:
    """Return normal differences with mean `mu` for each primary metric, the same in every arm."""
    means = np.asarray(mu)[None, :, None]
    return lambda rng, seeds: Study(means + sigma * rng.standard_normal((arms, len(mu), seeds)))


def arms_at(mus: Sequence[float], sigma: float) -> Draw:
    """Return one metric with a true mean for each arm."""
    means = np.asarray(mus)[:, None, None]
    return lambda rng, seeds: Study(means + sigma * rng.standard_normal((len(mus), 1, seeds)))


def correlated(mu: Sequence[float], sigma: float, rho: float) -> Draw:
    """Return two correlated metrics."""
    root = np.linalg.cholesky(np.array([[1.0, rho], [rho, 1.0]]))

    def draw(rng: Generator, seeds: int) -> Study:
        return Study((np.asarray(mu)[:, None] + sigma * root @ rng.standard_normal((2, seeds)))[None])

    return draw


def skewed(rng: Generator, seeds: int) -> Study:
    """Return differences with mean at the margin, sigma 1/2 and an outward exponential tail; most lie inside."""
    return Study(1 + 0.5 * (rng.standard_exponential((1, 1, seeds)) - 1))


def jumping(rng: Generator, seeds: int) -> Study:
    """Return differences with mean at the margin; one seed in twenty lies four sigma further out."""
    jumps = JUMP * (rng.random((1, 1, seeds)) < JUMP_RATE)
    spread = math.sqrt(1 + JUMP**2 * JUMP_RATE * (1 - JUMP_RATE))
    return Study(1 + 0.5 / spread * (rng.standard_normal((1, 1, seeds)) + jumps - JUMP * JUMP_RATE))


def collapsing(rate: float) -> Draw:
    """Collapse the candidate's seeds at a rate; the others hardly differ."""

    def draw(rng: Generator, seeds: int) -> Study:
        ended: list[Status] = ["diverged" if failed else "ok" for failed in rng.random(seeds) < rate]
        return Study(0.1 * rng.standard_normal((1, 1, seeds)), [ended])

    return draw


def both_collapsing(rate: float) -> Draw:
    """Collapse seeds under both losses at a rate."""

    def draw(rng: Generator, seeds: int) -> Study:
        ended: list[Status] = ["diverged" if failed else "ok" for failed in rng.random(seeds) < rate]
        return Study(0.1 * rng.standard_normal((1, 1, seeds)), [ended], ended)

    return draw


def one_missing(rng: Generator, seeds: int) -> Study:
    """Return small differences and one run without a result."""
    ended: list[Status] = ["missing", *["ok"] * (seeds - 1)]
    return Study(0.1 * rng.standard_normal((1, 1, seeds)), [ended])


AT = (1.0,)
SCENARIOS = (
    Scenario("at the margin, sigma .5", "equivalent", normal(AT, 0.5), 5),
    Scenario("at the margin, sigma 1", "equivalent", normal(AT, 1.0), 5),
    Scenario("one of two metrics at the margin", "equivalent", normal((1.0, 0.0), 0.5), 5),
    Scenario("both metrics at the margin, correlation .9", "equivalent", correlated((1.0, 1.0), 0.5, 0.9), 5),
    Scenario("five arms at the margin: any", "equivalent", arms_at((1.0,) * 5, 0.5), 5),
    Scenario("one of five arms at the margin: any false", "equivalent", arms_at((1.0, 9.0, 9.0, 9.0, 9.0), 0.5), 5),
    Scenario("at the margin: false DIFFERENT", "different", normal(AT, 0.5), 5),
    Scenario("five arms at the margin: any false DIFFERENT", "different", arms_at((1.0,) * 5, 0.5), 5),
    Scenario("two metrics at the margin: false DIFFERENT", "different", normal((1.0, 1.0), 0.5), 5),
    Scenario("two declared looks, at S/2 and S", "equivalent", normal(AT, 0.5), 5, (0.5, 1.0), 2, 20),
    Scenario("two declared looks: false DIFFERENT", "different", normal(AT, 0.5), 5, (0.5, 1.0), 2, 20),
    Scenario("four looks, one declared", "equivalent", normal(AT, 0.5), 10, (0.25, 0.5, 0.75, 1.0), 1, 20),
    Scenario("four looks, each at the full alpha", "equivalent", normal(AT, 0.5), None, (0.25, 0.5, 0.75, 1.0), 0, 20),
    Scenario("one run missing", "equivalent", one_missing, 0),
    Scenario("mu 0, sigma .5: power", "equivalent", normal((0.0,), 0.5)),
    Scenario("mu 0, sigma 1: power", "equivalent", normal((0.0,), 1.0)),
    Scenario("mu 0, sigma .5, five arms: power of the first", "equivalent", arms_at((0.0, 9.0, 9.0, 9.0, 9.0), 0.5)),
    Scenario("mu 2, sigma 1: says DIFFERENT", "different", normal((2.0,), 1.0)),
    Scenario("20 % of the candidate's seeds collapse: says EQUIVALENT", "equivalent", collapsing(0.2)),
    Scenario("20 % of the candidate's seeds collapse: says DIFFERENT", "different", collapsing(0.2)),
    Scenario("20 % of the seeds collapse under both: says EQUIVALENT", "equivalent", both_collapsing(0.2)),
    Scenario("outward exponential skew, at the margin", "equivalent", skewed),
    Scenario("5 % of seeds jump 4 sigma, at the margin", "equivalent", jumping),
)


# --- one study, judged by the functions that trials use


def words(study: Study, level: float) -> list[str]:
    """Return the word for each arm."""
    seeds = study.differences.shape[-1]
    names = METRICS[: study.differences.shape[1]]
    found: dict[str, OutcomeFinding] = {}
    for i, arm in enumerate(study.differences):
        found[str(i)] = compare(
            dict(zip(names, arm, strict=True)),
            dict.fromkeys(names, np.zeros(seeds)),
            primary=names,
            margins=dict.fromkeys(names, 1.0),
            num_classes=10,
            candidate_status=None if study.candidate is None else study.candidate[i],
            reference_status=study.reference,
            alpha=level,
            max_seeds=2,  # no advice is needed
        )
    return [finding.word for finding in correct_for_arms(found).values()]


def first(study: Study, seeds: int) -> Study:
    """Return the study after its first seeds."""
    candidate = None if study.candidate is None else [ended[:seeds] for ended in study.candidate]
    reference = None if study.reference is None else study.reference[:seeds]
    return Study(study.differences[..., :seeds], candidate, reference)


def is_counted(scenario: Scenario, study: Study) -> bool:
    """Whether any arm gets the counted word at any look."""
    seeds = study.differences.shape[-1]
    for number, fraction in enumerate(scenario.looks, 1):
        level = level_of(ALPHA, scenario.declared, number) if scenario.declared else ALPHA
        if scenario.counted in words(first(study, max(3, round(fraction * seeds))), level):
            return True
    return False


def rate(scenario: Scenario, seeds: int, studies: int) -> float:
    """Return the rate of the counted word in per cent."""
    rng = np.random.default_rng([SCENARIOS.index(scenario), seeds])
    return 100 * sum(is_counted(scenario, scenario.draw(rng, seeds)) for _ in range(studies)) / studies


def standard_error(percent: float, studies: int) -> float:
    """Return the Monte Carlo standard error of a rate, in per cent."""
    return math.sqrt(max(percent * (100 - percent), 0.0) / studies)


# --- the table


@dataclass(frozen=True)
class Row:
    """One scenario at every S."""

    scenario: Scenario
    percents: dict[int, float]

    def exceeded(self, studies: int) -> list[int]:
        """Return each S at which the rate exceeds the bound by more than three standard errors."""
        bound = self.scenario.bound
        if bound is None:
            return []
        reach = bound + 3 * standard_error(bound, studies)
        return [seeds for seeds, percent in self.percents.items() if percent > reach]


def _cell(job: tuple[int, int, int]) -> float:
    index, seeds, studies = job
    return rate(SCENARIOS[index], seeds, studies)


def table(studies: int, sizes: Sequence[int] = SIZES, processes: int = 1) -> list[Row]:
    """Simulate every scenario at every S."""
    jobs = [
        (index, seeds, studies)
        for index, scenario in enumerate(SCENARIOS)
        for seeds in sizes
        if seeds >= scenario.smallest
    ]
    if processes == 1:
        percents = list(map(_cell, jobs))
    else:
        with ProcessPoolExecutor(processes) as pool:
            percents = list(pool.map(_cell, jobs))
    found: dict[int, dict[int, float]] = {}
    for (index, seeds, _), percent in zip(jobs, percents, strict=True):
        found.setdefault(index, {})[seeds] = percent
    return [Row(SCENARIOS[index], cells) for index, cells in found.items()]


def markdown(rows: Sequence[Row], studies: int) -> str:
    """Return the table as Markdown."""
    sizes = sorted({seeds for row in rows for seeds in row.percents})
    error = 50 / math.sqrt(studies)
    lines = [f"Per cent of {studies} simulated studies; Monte Carlo standard error at most {error:.2g}.", ""]
    lines.append("| truth | says | bound | " + " | ".join(f"S={seeds}" for seeds in sizes) + " |")
    lines.append("|---" * (3 + len(sizes)) + "|")
    for row in rows:
        bound = "-" if row.scenario.bound is None else f"{row.scenario.bound:g}"
        cells = [f"{row.percents[seeds]:.3g}" if seeds in row.percents else "" for seeds in sizes]
        lines.append(f"| {row.scenario.name} | {row.scenario.counted} | {bound} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; after a full run also write it beside this file."""
    parser = argparse.ArgumentParser(description="error rates of the outcome axis")
    parser.add_argument("--studies", type=int, default=STUDIES)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    rows = table(options.studies, processes=options.processes)
    text = markdown(rows, options.studies)
    print(text)
    if options.studies >= STUDIES:
        (HERE / "error_rates.md").write_text(text + "\n")
        with (HERE / "error_rates.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["truth", "says", "bound", "seeds", "percent", "studies"])
            for row in rows:
                for seeds, percent in row.percents.items():
                    s = row.scenario
                    writer.writerow([s.name, s.counted, s.bound, seeds, f"{percent:.4g}", options.studies])
    exceeded = [(row.scenario.name, seeds) for row in rows for seeds in row.exceeded(options.studies)]
    for name, seeds in exceeded:
        print(f"above its bound: {name}, S={seeds}", file=sys.stderr)
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
