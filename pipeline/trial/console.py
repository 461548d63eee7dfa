"""The messages of a trial in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from pipeline.console import console
from pipeline.entry import ExitCode
from pipeline.replica import Replica
from pipeline.text import MARKS, in_words, shortened
from pipeline.verdict.plan import AnalysisPlan, wanted_controls
from pipeline.verdict.verdict import exit_code_of

if TYPE_CHECKING:
    from pipeline.trial.budget import Budget
    from pipeline.trial.setup import TrialSetup


def announce(
    setup: TrialSetup, plan: AnalysisPlan, missing: Sequence[Replica], moved: Mapping[Replica, str], aside: Path
) -> None:
    """What is about to be trained, on what, and how."""
    total = len(plan.losses) * len(plan.seeds) + len(wanted_controls(plan))
    controls = f" and controls ({', '.join(plan.controls)})" if plan.controls else ""
    console.print(
        f"{setup.data.name}, {setup.builder.name} on {setup.environment['device']}: "
        f"{len(plan.losses)} losses x {len(plan.seeds)} seeds{controls}, "
        f"{len(missing)} of {total} runs to train; "
        f"engine {setup.engine} ({setup.engine_reason})"
    )
    for reason in dict.fromkeys(moved.values()):
        names = [f"{replica.arm}/s{replica.seed}" for replica, why in moved.items() if why == reason]
        console.print(f"moved to {aside} ({reason}), to be trained again: {shortened(names)}")


def announce_damaged(damaged: Mapping[Replica, str]) -> None:
    """The runs that a verdict cannot count."""
    if damaged:
        said = [f"{replica.arm}/s{replica.seed} ({what})" for replica, what in damaged.items()]
        console.print(f"not counted: {shortened(said)}; the command that trained them trains them again")


LARGE = 10**9  # bytes that are worth a line


def announce_budget(budget: Budget, missing: int, tile: int) -> None:
    """What a large trial is about to take."""
    memory, disk = budget.of(min(tile, missing)), missing * budget.run
    if max(memory, disk) > LARGE:
        console.print(
            f"about {in_words(memory)} of memory for {min(tile, missing)} runs at once, {in_words(disk)} on disk"
        )


def announce_lost(lost: Sequence[Replica]) -> None:
    """What the jobs that share a trial have not brought."""
    names = shortened([f"{replica.arm}/s{replica.seed}" for replica in lost])
    console.print(f"{len(lost)} runs are missing ({names}); the same command again trains them")


def show_verdict(verdict: Mapping[str, Any]) -> None:
    """The table, then each finding once for all the losses that it is true of."""
    console.print()
    if verdict["comparisons"]:
        console.print(_table(verdict))
    if verdict["reference_failures"]:
        console.print(f"{verdict['reference']} (the reference) failed: {_failures(verdict['reference_failures'])}")
    findings: dict[str, list[str]] = {}
    for entry in verdict["comparisons"]:
        failed = f" Failed: {_failures(entry['failures'])}." if entry["failures"] else ""
        findings.setdefault(entry["sentence"] + failed, []).append(entry["loss"])
    for sentence, losses in findings.items():
        console.print(f"{', '.join(losses)}: {sentence}")


def _table(verdict: Mapping[str, Any]) -> Table:
    seeds = len(verdict["seeds"])
    title = f"{verdict['sweep']}: each loss against {verdict['reference']}, {seeds} seed{'s' if seeds > 1 else ''}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in ("loss", "verdict", "objective", "outcome", "expected"):
        table.add_column(column, no_wrap=True)
    for entry in verdict["comparisons"]:
        expected = f"{entry['expected'] or '-'}{MARKS[entry['confirmed']]}"
        table.add_row(entry["loss"], entry["verdict"], entry["objective"], entry["outcome"], expected)
    return table


def _failures(failures: Sequence[Mapping[str, Any]]) -> str:
    """Seeds with the same fate together."""
    fates: dict[str, list[int]] = {}
    for failure in failures:
        at = f" at step {failure['step']}" if failure["step"] else ""
        fates.setdefault(failure["cause"] + at, []).append(failure["seed"])
    return "; ".join(f"seeds {shortened(seeds)}: {fate}" for fate, seeds in fates.items())


def print_summary(verdict: Mapping[str, Any], folder: Path, recorded: str | None = None) -> ExitCode:
    """Where to look, and the exit code with what it rests on."""
    console.print(f"\nreport: {folder / 'report.html'}")
    if recorded is not None:
        console.print(recorded)
    named = [(entry["loss"], entry["verdict"], entry) for entry in verdict["comparisons"]]
    return exit_code_of(named)
