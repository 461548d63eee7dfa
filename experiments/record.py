"""Run experiments and record their results, or check whether the recorded results still hold.

python -m experiments.record [SLUG ...]           runs the README's commands; results.csv, figure.svg, README's block
python -m experiments.record [SLUG ...] --check   runs them in a scratch folder and compares with results.csv

Without a slug: every experiment whose README has commands of the recorder's form (experiments/commands.py).
A check reports for each trial one of three words. `bit for bit`: all values are the same. `holds`: every word is the
same, every difference lies in its recorded interval and moved by at most a tenth of its margin, and every mean moved by
at most the standard deviation over seeds. `moved`: anything else.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from experiments.commands import Command, Readme, read, with_block
from experiments.results import compare, markdown, recorded, rows_of, write
from likelihood_lab.errors import UsageError, did_you_mean
from pipeline.entry import GRAVITY, ExitCode, run_action

BEFORE = "trained before"  # text in place of the CPU time
EXPERIMENTS = Path(__file__).resolve().parent
SHAPES_NUMBERS = ("likelihood_lab", "pipeline", "conf", "hydra_plugins", "constraints.txt")
# Messages of a trial without its data or device: the request is right, but cannot run here.
ABSENT = ("is not here: ", "put the four IDX files there", "holds no sound", "torch sees no CUDA GPU here")


class CannotRunHereError(Exception):
    """The data or the device of a trial is missing."""


# --- running


def train(command: Command, root: Path) -> float:
    """Run a training command in `root` and return its CPU time in seconds. Its expectations may be refuted.

    Raises:
        CannotRunHereError: the data or the device is missing.
        UsageError: the command was refused.
        RuntimeError: the command failed.
    """
    print(f"\n$ python -m pipeline.train {shlex.join(command.words)}", flush=True)
    before = _cpu_seconds()
    ended = subprocess.run(  # noqa: S603 - the README's own command
        [sys.executable, "-m", "pipeline.train", *command.words], cwd=root, stderr=subprocess.PIPE, text=True
    )
    print(ended.stderr, end="", file=sys.stderr)
    if ended.returncode in (ExitCode.HOLDS, ExitCode.REFUTED):
        return _cpu_seconds() - before
    last = next((line for line in reversed(ended.stderr.splitlines()) if line.startswith("error: ")), "")
    reason = last.removeprefix("error: ")
    if any(words in reason for words in ABSENT):
        raise CannotRunHereError(reason)
    if ended.returncode == ExitCode.USAGE:
        raise UsageError(f"trial {command.trial} was refused: {reason}")
    raise RuntimeError(f"trial {command.trial} left with exit code {ended.returncode}")


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# --- recording


def record(readme: Readme) -> ExitCode:
    """Run every command, then write results.csv, figure.svg and the README's block."""
    root, folder = readme.path.parents[2], readme.path.parent
    _check_form(readme)
    commit = _commit(root)
    costs = {}
    for command in readme.commands:
        begun = (root / "outputs" / readme.slug / command.trial / "cells").exists()
        try:
            seconds = train(command, root)
        except CannotRunHereError as error:
            print(f"{readme.slug}: skipped, nothing was written: {error}")
            return ExitCode.HOLDS
        costs[command.trial] = BEFORE if begun else f"{seconds:.0f} s"
    trials = {trial: root / "outputs" / readme.slug / trial for trial in costs}
    table = pd.concat([rows_of(trial, path) for trial, path in trials.items()], ignore_index=True)
    write(table, folder / "results.csv")
    _copy_figure(readme, trials)
    lines = [*markdown(table), "", _environment(next(iter(trials.values())), commit, costs)]
    readme.path.write_text(with_block(readme.path.read_text(encoding="utf-8"), lines), encoding="utf-8")
    print(f"{readme.slug}: recorded {len(table)} rows of {len(trials)} trials")
    return ExitCode.HOLDS


def _check_form(readme: Readme) -> None:
    """Refuse a README without a block for the results or with a figure of no trial, before anything runs."""
    try:
        with_block(readme.path.read_text(encoding="utf-8"), [])
    except ValueError as error:
        raise UsageError(f"{readme.path}: {error}") from error
    trials = [command.trial for command in readme.commands]
    if readme.figure and readme.figure.partition("/")[0] not in trials:
        raise UsageError(f"{readme.path}: the figure {readme.figure} is of none of the trials, {', '.join(trials)}")


def _copy_figure(readme: Readme, trials: Mapping[str, Path]) -> None:
    """Copy the README's figure, by default the first trial's differences in its first primary metric."""
    trial, _, name = (readme.figure or next(iter(trials))).partition("/")
    if not name:
        primary = json.loads((trials[trial] / "verdict.json").read_text(encoding="utf-8"))["protocol"]["primary"]
        name = f"difference-{next(iter(primary), 'nll')}.svg"
    source = trials[trial] / "figures" / name
    if not source.is_file():
        raise UsageError(f"{source} is not there; name another figure in {readme.path}")
    shutil.copyfile(source, readme.path.parent / "figure.svg")


def _environment(folder: Path, commit: str, costs: Mapping[str, str]) -> str:
    made = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))["environment"]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    if BEFORE in costs.values():
        commit = "from runs that were there, by whatever code"
    spent = ", ".join(f"{trial} {cost}" for trial, cost in costs.items())
    return (
        f"Recorded {today} {commit}; {made['device']}, {made['threads']} thread{'s' if made['threads'] > 1 else ''}, "
        f"torch {made['torch']}, Python {made['python']}. CPU time: {spent}."
    )


def _commit(root: Path) -> str:
    """Describe the current commit, and whether files that affect the numbers have changed since."""
    try:
        commit = _git(root, "rev-parse", "--short=10", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", *SHAPES_NUMBERS)
    except (OSError, subprocess.CalledProcessError):
        return "outside of a git repository"
    return f"at commit {commit}" + (" with uncommitted changes" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603


# --- checking


def check(readme: Readme) -> ExitCode:
    """Run every command in a scratch folder, compare with the record, and print a line for each trial."""
    known = recorded(readme.path.parent / "results.csv")
    commands = {command.trial for command in readme.commands}
    lines = [f"{trial}: moved: its command is gone" for trial in known["trial"].unique() if trial not in commands]
    code = ExitCode.REFUTED if lines else ExitCode.HOLDS
    compared = 0
    with tempfile.TemporaryDirectory(prefix="experiment-") as scratch:
        for command in readme.commands:
            folder = Path(scratch) / command.trial
            try:
                train(command.into(folder), readme.path.parents[2])
            except CannotRunHereError as error:
                lines.append(f"{command.trial}: skipped: {error}")
                continue
            found = compare(known[known["trial"] == command.trial], rows_of(command.trial, folder))
            compared += 1
            lines += [f"{command.trial}: {found.word}", *(f"{command.trial}: {line}" for line in found.moved)]
            code = ExitCode.REFUTED if found.moved else code
    if not compared:
        lines.append("nothing was compared, so it is undecided whether the record holds")
    print("\n".join(["", *(f"{readme.slug} {line}" for line in lines)]))
    return code if compared else ExitCode.REFUTED


# --- which


def chosen(slugs: Sequence[str], experiments: Path) -> list[Readme]:
    """Return the READMEs of these experiments, by default of all.

    Raises:
        UsageError: an experiment does not exist, or its README has no command of the recorder's form.
    """
    folders = {path.parent.name: path for path in sorted(experiments.glob("*/README.md"))}
    for slug in slugs:
        if slug not in folders:
            raise UsageError(f"no experiment '{slug}'{did_you_mean(slug, folders)}; there are {', '.join(folders)}")
    readmes = [read(folders[slug]) for slug in slugs or folders]
    for readme in readmes:
        if slugs and not readme.commands:
            form = f"$ python -m pipeline.train experiment={readme.slug} hydra.run.dir=outputs/{readme.slug}/TRIAL"
            raise UsageError(f"{readme.path} has no command of this form in a console block: {form}")
    return readmes


def run(slugs: Sequence[str], again: bool, experiments: Path = EXPERIMENTS) -> ExitCode:
    """Record or check every experiment, even if one fails. Return the worst exit code."""
    readmes = chosen(slugs, experiments)
    action = check if again else record
    outcomes = [run_action(partial(action, readme)) for readme in readmes if readme.commands]
    for outcome in outcomes:
        if outcome.error is not None:
            print(f"error: {outcome.error}", file=sys.stderr)
    _print_others(readmes)
    return max((outcome.code for outcome in outcomes), key=GRAVITY.index, default=ExitCode.HOLDS)


def _print_others(readmes: Sequence[Readme]) -> None:
    """Print the commands that were not run."""
    left = [(readme, line) for readme in readmes for line in readme.others]
    if left:
        print("\nnot run here:")
    for readme, line in left:
        print(f"  {readme.slug}: {line}")


def main() -> None:
    """Console script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slug", nargs="*", help="a folder in experiments/; by default all that can run")
    parser.add_argument("--check", action="store_true", help="compare with the record and write nothing")
    options = parser.parse_args()
    try:
        ended = run_action(lambda: run(options.slug, options.check))
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    if ended.error is not None:
        print(f"error: {ended.error}", file=sys.stderr)
    sys.exit(ended.code)


if __name__ == "__main__":
    main()
