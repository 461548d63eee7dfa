"""Messages of a trial in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from pipeline.console import console
from pipeline.replica import Replica
from pipeline.text import MARKS, in_words, plural, shortened
from pipeline.verdict.plan import AnalysisPlan, wanted_controls
from pipeline.verdict.results import Failure, Verdict

if TYPE_CHECKING:
    from pipeline.trial.budget import Budget
    from pipeline.trial.setup import TrialSetup


def announce(
    setup: TrialSetup, plan: AnalysisPlan, missing: Sequence[Replica], moved: Mapping[Replica, str], aside: Path
) -> None:
    """Print what will be trained, on which data, device and engine."""
    total = len(plan.losses) * len(plan.seeds) + len(wanted_controls(plan))
    controls = f" and controls ({', '.join(plan.controls)})" if plan.controls else ""
    console.print(
        f"{setup.data.name}, {setup.builder.name} on {setup.environment['device']}: "
        f"{plural(len(plan.losses), 'loss', 'losses')} x {plural(len(plan.seeds), 'seed')}{controls}, "
        f"{len(missing)} of {plural(total, 'run')} to train; "
        f"engine {setup.engine} ({setup.engine_reason})"
    )
    for reason in dict.fromkeys(moved.values()):
        names = [f"{replica.arm}/s{replica.seed}" for replica, why in moved.items() if why == reason]
        console.print(f"moved to {aside} ({reason}), to be trained again: {shortened(names)}")


def announce_damaged(damaged: Mapping[Replica, str]) -> None:
    """Print the runs that cannot be read."""
    if damaged:
        names = [f"{replica.arm}/s{replica.seed} ({why})" for replica, why in damaged.items()]
        console.print(f"not counted: {shortened(names)}; to train them again, repeat the command that trained them")


LARGE = 10**9  # bytes; smaller trials print no estimate


def announce_budget(budget: Budget, missing: int, tile: int) -> None:
    """Print the memory and disk that a large trial will need."""
    memory, disk = budget.of(min(tile, missing)), missing * budget.run
    if max(memory, disk) > LARGE:
        console.print(
            f"needs about {in_words(memory)} of memory ({plural(min(tile, missing), 'run')} at once) "
            f"and {in_words(disk)} on disk"
        )


def announce_lost(lost: Sequence[Replica]) -> None:
    """Print the runs that are missing."""
    names = shortened([f"{replica.arm}/s{replica.seed}" for replica in lost])
    console.print(f"{plural(len(lost), 'run')} missing ({names}); to train them, repeat the command")


def show_verdict(verdict: Verdict) -> None:
    """Print the table, then each sentence with all the losses that it describes."""
    console.print()
    if verdict.comparisons:
        console.print(_table(verdict))
    if verdict.reference_failures:
        console.print(f"{verdict.reference} (the reference) failed: {_failures(verdict.reference_failures)}")
    sentences: dict[str, list[str]] = {}
    for row in verdict.comparisons:
        failed = f" Failed: {_failures(row.failures)}." if row.failures else ""
        sentences.setdefault(row.sentence + failed, []).append(row.loss)
    for sentence, losses in sentences.items():
        console.print(f"{', '.join(losses)}: {sentence}")


def _table(verdict: Verdict) -> Table:
    title = f"{verdict.sweep}: each loss against {verdict.reference}, {plural(len(verdict.seeds), 'seed')}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in ("loss", "verdict", "objective", "outcome", "expected"):
        table.add_column(column, no_wrap=True)
    for row in verdict.comparisons:
        expected = f"{row.expected or '-'}{MARKS[row.confirmed]}"
        table.add_row(row.loss, row.verdict, row.objective, row.outcome, expected)
    return table


def _failures(failures: Sequence[Failure]) -> str:
    """Return one text that lists each failure cause with its seeds, such as "seeds 1, 2: CAUSE at step 5"."""
    causes: dict[str, list[int]] = {}
    for failure in failures:
        at = f" at step {failure.step}" if failure.step else ""
        causes.setdefault(failure.cause + at, []).append(failure.seed)
    return "; ".join(
        f"{'seed' if len(seeds) == 1 else 'seeds'} {shortened(seeds)}: {cause}" for cause, seeds in causes.items()
    )


def print_summary(folder: Path, recorded: str | None, expectations: Sequence[str]) -> None:
    """Print where the results are, and which expectations hold."""
    console.print(f"\nreport: {folder / 'report.html'}")
    if recorded is not None:
        console.print(recorded)
    for line in expectations:
        console.print(line)
