"""What a trial and an audit say in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.auditing.finding import size_in_words
from pipeline.budget import Budget, in_words
from pipeline.exit_codes import ExitCode
from pipeline.objectives import Replica
from pipeline.outcomes import Request, wanted_controls
from pipeline.setting import Setting

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)  # what others wrote is text
SHOWN = 6  # of a list that may be long
MARKS = {None: "", True: " holds", False: " does not hold"}


def announce(
    setting: Setting, request: Request, missing: Sequence[Replica], moved: Mapping[Replica, str], aside: Path
) -> None:
    """What is about to be trained, on what, and how."""
    total = len(request.losses) * len(request.seeds) + len(wanted_controls(request))
    controls = f" and controls ({', '.join(request.controls)})" if request.controls else ""
    console.print(
        f"{setting.data.name}, {setting.builder.name} on {setting.environment['device']}: "
        f"{len(request.losses)} losses x {len(request.seeds)} seeds{controls}, "
        f"{len(missing)} of {total} runs to train; "
        f"engine {setting.engine} ({setting.engine_reason})"
    )
    for reason in dict.fromkeys(moved.values()):
        names = [f"{replica.arm}/s{replica.seed}" for replica, why in moved.items() if why == reason]
        console.print(f"moved to {aside} ({reason}), to be trained again: {_listed(names)}")


def announce_damaged(damaged: Mapping[Replica, str]) -> None:
    """The runs that a verdict cannot count."""
    if damaged:
        said = [f"{replica.arm}/s{replica.seed} ({what})" for replica, what in damaged.items()]
        console.print(f"not counted: {_listed(said)}; the command that trained them trains them again")


LARGE = 10**9  # bytes that are worth a line


def announce_budget(budget: Budget, missing: int, tile: int) -> None:
    """What a large trial is about to take."""
    memory, disk = budget.of(min(tile, missing)), missing * budget.run
    if max(memory, disk) > LARGE:
        console.print(
            f"about {in_words(memory)} of memory for {min(tile, missing)} runs at once, {in_words(disk)} on disk"
        )


LONG = 60.0  # seconds that are worth a line


def announce_time(seconds: float, runs: int) -> None:
    """What a long training is going to take."""
    if seconds > LONG:
        taken = f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
        console.print(f"about {taken} to train {runs} runs, if they go on at the pace of the first seconds")


def announce_lost(lost: Sequence[Replica]) -> None:
    """What the jobs that share a trial have not brought."""
    names = _listed([f"{replica.arm}/s{replica.seed}" for replica in lost])
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
    return "; ".join(f"seeds {_listed(seeds)}: {fate}" for fate, seeds in fates.items())


def _listed(words: Sequence[object]) -> str:
    more = len(words) - SHOWN
    return ", ".join(map(str, words[:SHOWN])) + (f" and {more} more" if more > 0 else "")


def closing(verdict: Mapping[str, Any], folder: Path, recorded: str | None = None) -> ExitCode:
    """Where to look, and the exit code with what it rests on."""
    console.print(f"\nreport: {folder / 'report.html'}")
    if recorded is not None:
        console.print(recorded)
    named = [(entry["loss"], entry["verdict"], entry) for entry in verdict["comparisons"]]
    return _asserted(named)


def _asserted(entries: Sequence[tuple[str, str, Mapping[str, Any]]]) -> ExitCode:
    """Each expectation that does not hold, and the exit code; entries are (loss, word, entry)."""
    judged = [found for found in entries if found[2]["confirmed"] is not None]
    failed = [found for found in judged if not found[2]["confirmed"]]
    for loss, word, entry in failed:
        console.print(f"expected {loss}: {entry['expected']}, found {word}")
    if not judged:
        console.print("nothing was asserted (give expect=same, or 'expect={nll: same}', for an exit code)")
        return ExitCode.HOLDS
    console.print(f"{len(judged) - len(failed)} of {len(judged)} expectations hold")
    return ExitCode.REFUTED if failed else ExitCode.HOLDS


# --- an audit


def show_audit(audit: Mapping[str, Any]) -> None:
    """The table, each loss's sentence, and what the grid would have caught."""
    title = f"each loss against {audit['reference']}: is it the same function?"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in ("loss", "objective", "scale", "domain", "divides by", "expected"):
        table.add_column(column, no_wrap=True)
    for name, entry in audit["losses"].items():
        scale, limit, divided = entry["scale"], entry["domain"], entry["normaliser"]
        expected = f"{entry['expected'] or '-'}{MARKS[entry['confirmed']]}"
        table.add_row(
            name, entry["objective"], scale["formula"] if scale else "-",
            f"{limit['axis']} {limit['limit']:.4g}" if limit else "-",
            divided["divides_by"] if divided else "-", expected,
        )  # fmt: skip
    console.print()
    console.print(table)
    for name, entry in audit["losses"].items():
        console.print(f"{name}: {entry['sentence']}")
        for effect in entry["side_effects"]:
            console.print(f"  side effect: {effect}")
    groups: dict[str, list[str]] = {}
    for name, entry in audit["losses"].items():
        groups.setdefault(str(entry["would_have_caught"]), []).append(name)
    for names in groups.values():
        _show_power(audit["losses"][names[0]]["would_have_caught"], names if len(groups) > 1 else [])


def _show_power(sizes: Mapping[str, Mapping[str, float | None]], names: Sequence[str]) -> None:
    """The smallest difference of each kind that the grid of these losses catches."""
    if not sizes:
        return
    precisions = list(next(iter(sizes.values())))
    title = "the smallest difference that would have been caught" + (f", for {_listed(names)}" if names else "")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", *precisions):
        table.add_column(column, no_wrap=True)
    for kind, caught in sizes.items():
        table.add_row(kind, *(size_in_words(caught[precision]) for precision in precisions))
    console.print(table)


def closing_audit(audit: Mapping[str, Any], folder: Path, recorded: str | None) -> ExitCode:
    """Where to look, and the exit code with what it rests on."""
    console.print(f"\naudit: {folder / 'audit.json'}, pictures beside it in figures/")
    if recorded is not None:
        console.print(recorded)
    return _asserted([(name, entry["objective"], entry) for name, entry in audit["losses"].items()])
