"""One trial from configuration to exit code: train what is missing, tell MLflow, conclude from the cells."""

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
from pipeline.replica import BY_PRECISION, DOSE, REPLAY, Replica, ranked_arms
from pipeline.storage.cells import Cell, TrialFolder
from pipeline.tracking.mlflow_store import Run
from pipeline.tracking.recorder import Recorder, tracker_of
from pipeline.tracking.runs import cell_run
from pipeline.trial.audit_step import ask_at_weights, ask_audit, read_audit
from pipeline.trial.budget import budget_of, check_disk, fitted
from pipeline.trial.conclude import all_wanted, conclude, read_cells
from pipeline.trial.console import announce, announce_budget
from pipeline.trial.progress import Progress
from pipeline.trial.setup import Setting, check_resolution, check_truth, facts_of, prepare
from pipeline.trial.tiles import interrupted, tiles, train_tile
from pipeline.verdict.plan import Request, request_of, write_request


def run(config: Mapping[str, Any], path: Path, command: str) -> ExitCode:
    """Train the missing cells of the trial in `path` and print its verdict.

    Args:
        config: the resolved configuration, checked.
        command: how to get the same again, for the report.
    """
    request = request_of(config)
    setting = fitted(prepare(config))
    check_resolution(request, setting)
    check_truth(request, setting)
    facts = facts_of(setting, request, command)
    folder = TrialFolder(path)
    with folder.locked(patiently=config["share"] is not None):
        identity = {"name": conf.trial_name(config), **conf.identity(config)}
        folder.check_claim(identity)
        tracker = tracker_of(config["tracking"])
        recorder = Recorder(tracker, path, f"`make sync DIR={shlex.quote(str(path))}` sends the rest")
        recorder.open()
        folder.claim(identity)
        if config["audit"]:
            ask_audit(setting, request, folder)
        request = replace(request, controls=chosen_controls(config, request, folder))
        setting = setting.with_controls(request.controls, request.reference).with_tile(folder.tile)
        if config["share"]:  # the job that concludes has share=[]
            write_request(path, request, facts, tracker.described() if tracker else {})
            folder.let_others_in()
            train(setting, request, folder, recorder)
            return ExitCode.HOLDS
        while True:
            write_request(path, request, facts, tracker.described() if tracker else {})
            setting = train(setting, request, folder, recorder)
            if config["audit"]:
                ask_at_weights(setting, request, folder)
            code, verdict = conclude(folder, request, facts, recorder)
            more = more_seeds(request, verdict) if config["until"] == "decided" else 0
            if code is ExitCode.BUG or not more:
                return code
            request = with_more_seeds(request, more)
            setting = replace(setting, config={**setting.config, "share": None})
            facts = facts_of(setting, request, command)
            console.print(f"\nundecided: going on to {len(request.seeds)} seeds")


def chosen_controls(config: Mapping[str, Any], request: Request, folder: TrialFolder) -> tuple[str, ...]:
    """A replay wherever losses are compared; placebos and dose where rounding may part some of them, or if told to."""
    ranks = ranked_arms(request.candidates, config["rank_test"]) if config["rank_test"] else []
    if config["controls"] == "none" or (config["controls"] == "auto" and not request.candidates):
        return tuple(ranks)
    audit = read_audit(folder.path) if config["audit"] else None
    found = (
        {}
        if audit is None
        else {name: [entry, entry.get("at_precision", entry)] for name, entry in audit["losses"].items()}
    )
    rounding = any(
        {entry["objective"] for entry in found.get(name, [{"objective": "not_run"}])} != {"identical"}
        for name in request.candidates
    )
    if config["controls"] == "auto" and not rounding:
        return (REPLAY, *ranks)
    dose = () if config["dataset"].get("dose") is None else (DOSE,)
    return (REPLAY, *BY_PRECISION[config["precision"]], *dose, *ranks)


def more_seeds(request: Request, verdict: Mapping[str, Any]) -> int:
    """How many seeds the next declared look needs; 0 where all is decided, or nothing within reach decides it."""
    if verdict["protocol"]["look"] >= verdict["protocol"]["looks"]:
        return 0
    advised = [entry["seeds_needed"] for entry in verdict["comparisons"] if entry["outcome"] == "inconclusive"]
    within = [needed for needed in advised if isinstance(needed, int)]
    return max(0, min(max(within, default=0), request.max_seeds) - len(request.seeds))


def with_more_seeds(request: Request, count: int) -> Request:
    """The request over so many more seeds, the smallest that it does not have."""
    unused = (seed for seed in itertools.count() if seed not in request.seeds)
    return replace(request, seeds=(*request.seeds, *itertools.islice(unused, count)))


def train(setting: Setting, request: Request, folder: TrialFolder, recorder: Recorder) -> Setting:
    """Train the cells that the folder lacks; where memory runs out, once more with half as many at a time.

    Returns the setting that they were trained with.
    """
    with folder.training(setting.config["share"] or request.seeds):
        while True:
            try:
                _train(setting, request, folder, recorder)
                return setting
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                setting = _halved(setting, folder, error)


def _halved(setting: Setting, folder: TrialFolder, error: BaseException) -> Setting:
    """The setting with half as many runs at once, which the folder remembers, or as another job has it remember.

    Raises:
        UsageError: that was done before, or there is but one.
    """
    fewer = folder.tile or setting.tile // 2
    if not 0 < fewer < setting.tile:
        line = f"out of memory while training {setting.tile} run(s) at once ({first_line(error)})"
        raise UsageError(f"{line}; lower batch_size or give trainer.tile={max(1, setting.tile // 2)}") from error
    folder.remember_tile(fewer)
    console.print(f"out of memory with {setting.tile} runs at once; going on with {fewer}")
    return setting.with_tile(fewer)


def _train(setting: Setting, request: Request, folder: TrialFolder, recorder: Recorder) -> None:
    """Each tile's runs are recorded as soon as its cells are on disk."""
    share = setting.config["share"]
    mine = [replica for replica in all_wanted(request) if not share or replica.seed in share]
    fingerprints = {replica: setting.fingerprint(replica) for replica in mine}
    missing, moved = folder.sort_out(fingerprints)
    to_train = [] if share == [] else missing
    announce(setting, request, to_train, moved, folder.path / "stale")
    if to_train:
        budget = budget_of(setting)
        check_disk(budget, len(to_train), folder.path)
        announce_budget(budget, len(to_train), setting.tile)
    done = [replica for replica in fingerprints if replica not in missing]
    recorder.offer(_runs(read_cells(folder, done).values(), folder, request))
    groups = [] if share == [] else interrupted(folder.path, setting, fingerprints, missing)
    fresh = [replica for replica in to_train if not any(replica in group for group in groups)]
    groups += tiles(fresh, [*request.losses, *request.controls], setting.tile)
    waiting: list[Cell] = []  # for the reference of their seed: their distance to it is recorded with them
    with Progress(console, groups, setting) as progress:
        for group in groups:
            waiting += train_tile(setting, group, folder, [progress.callback()])
            ready = [cell for cell in waiting if folder.read(Replica(request.reference, cell.record.seed))]
            waiting = [cell for cell in waiting if cell not in ready]
            recorder.offer(_runs(ready, folder, request))
    recorder.offer(_runs(waiting, folder, request))


def _runs(cells: Iterable[Cell], folder: TrialFolder, request: Request) -> dict[str, Callable[[], Run]]:
    return {cell.record.fingerprint: partial(cell_run, cell, folder, request.reference) for cell in cells}
