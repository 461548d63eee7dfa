"""One trial from configuration to exit code: train the missing runs, record them in MLflow, conclude."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from likelihood_lab.errors import UsageError, first_line, is_out_of_memory
from pipeline.config import schema as conf
from pipeline.console import console
from pipeline.entry import ExitCode
from pipeline.replica import BY_PRECISION, DOSE, REPLAY, Replica
from pipeline.storage.cells import Cell, TrialFolder
from pipeline.tracking.mlflow_store import Run
from pipeline.tracking.recorder import Recorder, tracker_of
from pipeline.tracking.runs import cell_run
from pipeline.trial.audit_step import TrialAudit
from pipeline.trial.budget import budget_of, check_disk, shrink_tile_to_memory
from pipeline.trial.conclude import all_wanted, conclude, read_cells
from pipeline.trial.console import announce, announce_budget
from pipeline.trial.progress import Progress
from pipeline.trial.setup import TrialSetup, build_setup, check_resolution, check_truth, context_of
from pipeline.trial.tiles import find_checkpoints, tiles, train_tile
from pipeline.verdict.plan import AnalysisPlan, plan_of, write_plan
from pipeline.verdict.results import Verdict


def run(config: Mapping[str, Any], path: Path, command: str) -> ExitCode:
    """Train the missing runs of the trial in `path` and print its verdict.

    Args:
        config: the resolved configuration, checked.
        command: the command that repeats the trial, for the report.
    """
    plan = plan_of(config)
    setup = shrink_tile_to_memory(build_setup(config))
    check_resolution(plan, setup)
    check_truth(plan, setup)
    context = context_of(setup, plan, command)
    folder = TrialFolder(path)
    with folder.locked(patiently=config["share"] is not None):
        identity = {"name": conf.trial_name(config), **conf.identity(config)}
        folder.check_identity(identity)
        tracker = tracker_of(config["tracking"])
        recorder = Recorder(tracker, path, f"`make sync DIR={shlex.quote(str(path))}` sends the rest")
        recorder.open()
        folder.write_identity(identity)
        audit = TrialAudit(folder) if config["audit"] else None
        if audit:
            audit.compare_losses(setup, plan)
        plan = replace(plan, controls=chosen_controls(config, plan, audit.content if audit else None))
        setup = setup.with_controls(plan.controls, plan.reference).with_tile(folder.tile)
        if config["share"]:  # the job that concludes has share=[]
            write_plan(path, plan, context, tracker.described() if tracker else {})
            folder.release_lock()
            train(setup, plan, folder, recorder)
            return ExitCode.HOLDS
        while True:
            write_plan(path, plan, context, tracker.described() if tracker else {})
            setup = train(setup, plan, folder, recorder)
            if audit:
                audit.compare_at_weights(setup, plan)
            code, verdict = conclude(folder, plan, context, recorder)
            more = 0 if config["protocol"]["max_seeds"] is None else more_seeds(plan, verdict)
            if code is ExitCode.BUG or not more:
                return code
            plan = with_more_seeds(plan, more)
            setup = replace(setup, share=None)
            context = context_of(setup, plan, command)
            console.print(f"\nundecided: continuing with {len(plan.seeds)} seeds")


def chosen_controls(config: Mapping[str, Any], plan: AnalysisPlan, audit: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the controls to train: a replay wherever losses are compared, the others where a loss is not identical.

    Args:
        audit: the content of audit.json, where the losses were audited.
    """
    choice = config["protocol"]["controls"]
    if choice == "none" or (choice == "auto" and not plan.candidates):
        return ()
    entries = {} if audit is None else audit["losses"]
    if choice == "auto" and all(_is_identical(entries.get(name)) for name in plan.candidates):
        return (REPLAY,)
    dose = () if config["dataset"].get("dose") is None else (DOSE,)
    return (REPLAY, *BY_PRECISION[config["precision"]], *dose)


def _is_identical(entry: Mapping[str, Any] | None) -> bool:
    """Whether an entry of audit.json is `identical`, in the precision of the training, too."""
    return entry is not None and {entry["objective"], entry.get("at_precision", entry)["objective"]} == {"identical"}


def more_seeds(plan: AnalysisPlan, verdict: Verdict) -> int:
    """Return how many seeds the next declared look adds; 0 if all is decided or no affordable number decides it."""
    if verdict.protocol.look >= verdict.protocol.looks:
        return 0
    advised = [row.seeds_needed for row in verdict.comparisons if row.outcome == "inconclusive"]
    within = [needed for needed in advised if isinstance(needed, int)]
    return max(0, min(max(within, default=0), plan.max_seeds) - len(plan.seeds))


def with_more_seeds(plan: AnalysisPlan, count: int) -> AnalysisPlan:
    """Return the plan with `count` more seeds, the smallest unused ones."""
    unused = (seed for seed in itertools.count() if seed not in plan.seeds)
    return replace(plan, seeds=(*plan.seeds, *itertools.islice(unused, count)))


def train(setup: TrialSetup, plan: AnalysisPlan, folder: TrialFolder, recorder: Recorder) -> TrialSetup:
    """Train the missing runs. If memory runs out, train them again with half as many at once.

    Returns:
        The setup that they were trained with.
    """
    with folder.training(setup.share or plan.seeds):
        while True:
            try:
                _train(setup, plan, folder, recorder)
                return setup
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                setup = _halved(setup, folder, error)


def _halved(setup: TrialSetup, folder: TrialFolder, error: BaseException) -> TrialSetup:
    """Return the setup with half as many runs at once, and store that number in the folder.

    If another job has stored a smaller number, that number is used.

    Raises:
        UsageError: the number was halved before, or it is 1.
    """
    fewer = folder.tile or setup.tile // 2
    if not 0 < fewer < setup.tile:
        line = f"out of memory while training {setup.tile} run(s) at once ({first_line(error)})"
        raise UsageError(f"{line}; lower batch_size or give trainer.tile={max(1, setup.tile // 2)}") from error
    folder.remember_tile(fewer)
    console.print(f"out of memory with {setup.tile} runs at once; continuing with {fewer}")
    return setup.with_tile(fewer)


def _train(setup: TrialSetup, plan: AnalysisPlan, folder: TrialFolder, recorder: Recorder) -> None:
    """Train the missing runs tile by tile; record each tile as soon as its cells are on disk."""
    share = setup.share
    mine = [replica for replica in all_wanted(plan) if not share or replica.seed in share]
    fingerprints = {replica: setup.fingerprint(replica) for replica in mine}
    missing, moved = folder.find_missing(fingerprints)
    to_train = [] if share == [] else missing
    announce(setup, plan, to_train, moved, folder.path / "stale")
    if to_train:
        budget = budget_of(setup)
        check_disk(budget, len(to_train), folder.path)
        announce_budget(budget, len(to_train), setup.tile)
    done = [replica for replica in fingerprints if replica not in missing]
    recorder.offer(_runs(read_cells(folder, done).values(), folder, plan))
    groups = [] if share == [] else find_checkpoints(folder.path, setup, fingerprints, missing)
    fresh = [replica for replica in to_train if not any(replica in group for group in groups)]
    groups += tiles(fresh, [*plan.losses, *plan.controls], setup.tile)
    waiting: list[Cell] = []  # until the reference of their seed is trained: their distance to it is recorded too
    with Progress(console, groups, setup) as progress:
        for group in groups:
            waiting += train_tile(setup, group, folder, [progress.callback()])
            ready = [cell for cell in waiting if folder.read(Replica(plan.reference, cell.record.seed))]
            waiting = [cell for cell in waiting if cell not in ready]
            recorder.offer(_runs(ready, folder, plan))
    recorder.offer(_runs(waiting, folder, plan))


def _runs(cells: Iterable[Cell], folder: TrialFolder, plan: AnalysisPlan) -> dict[str, Callable[[], Run]]:
    return {cell.record.fingerprint: partial(cell_run, cell, folder, plan.reference) for cell in cells}
