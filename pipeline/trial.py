"""One trial from configuration to exit code: train what is missing, tell MLflow, conclude from the cells."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from rich.console import Console
from rich.table import Table

from pipeline import config as conf
from pipeline.cells import Cell, TrialFolder, write_json, write_whole
from pipeline.errors import UsageError
from pipeline.exit_codes import ExitCode
from pipeline.objectives import Replica
from pipeline.equivalence import paired_differences
from pipeline.progress import Progress
from pipeline.setting import Setting, prepare
from pipeline.statistics import YARDSTICKS
from pipeline.tracking import Run, Tracker, git_state
from pipeline.training import tiles, train_tile
from pipeline.trajectory import relative_distance
from pipeline.verdict import Facts, Request, decide, status_of

Cells = dict[Replica, Cell]
console = Console(highlight=False, soft_wrap=True)


def run(config: Mapping[str, Any], path: Path, command: str) -> ExitCode:
    """Train the missing cells of the trial in `path` and print its verdict.

    Args:
        config: the resolved configuration, checked.
        command: how to get the same again, for the report.
    """
    request = request_of(config)
    setting = prepare(config)
    _check_resolution(request, setting)
    tracker = _tracker(config)
    folder = TrialFolder(path)
    with folder.locked():
        folder.claim(_claim(config))
        write_whole(path / "request.yaml", yaml.safe_dump(_request_file(request, setting, command), sort_keys=False).encode())
        train(setting, request, folder, tracker)
        return conclude(folder, request, tracker)


def request_of(config: Mapping[str, Any]) -> Request:
    """What the configuration asks of the cells."""
    dataset = config["dataset"]
    margins = dataset.get("margins") or {}
    return Request(
        losses=tuple(config["loss"]),
        seeds=tuple(conf.seeds_of(config)),
        reference=conf.reference_of(config),
        about=config["about"],
        expect=conf.expectations_of(config),
        margins=margins,
        primary=tuple(dataset.get("primary") or margins or ("nll", "accuracy", "brier")),
        alpha=config["alpha"],
        max_seeds=config["max_seeds"],
    )


def _claim(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": conf.trial_name(config), **conf.identity(config)}


def _check_resolution(request: Request, setting: Setting) -> None:
    """An accuracy margin below two test examples could not be told from rounding."""
    smallest = 2 / len(setting.data.splits["test"])
    if request.margins.get("accuracy", math.inf) < smallest:
        raise UsageError(
            f"dataset.margins.accuracy={request.margins['accuracy']} is below the resolution of the test set; "
            f"give at least 2/{len(setting.data.splits['test'])} = {smallest:.4f}"
        )


def _tracker(config: Mapping[str, Any]) -> Tracker | None:
    tracking = config["tracking"]
    if not tracking["enabled"]:
        return None
    tracker = Tracker(tracking["uri"], tracking["experiment"], conf.ROOT)
    tracker.open()
    return tracker


# --- training


def train(setting: Setting, request: Request, folder: TrialFolder, tracker: Tracker | None) -> None:
    """Train the cells that the folder lacks; each tile's runs are recorded as soon as its cells are on disk."""
    wanted = {
        replica: setting.fingerprint(replica)
        for replica in (Replica(loss, seed) for loss in request.losses for seed in request.seeds)
    }
    missing, stale = folder.sort_out(wanted)
    _announce(setting, request, folder, missing, stale)
    unsent = set(wanted.values()) - (tracker.present(folder.path.name) if tracker else set(wanted.values()))
    done = [replica for replica in wanted if replica not in missing and wanted[replica] in unsent]
    if tracker and done:
        tracker.record([cell_run(cell, folder, request) for cell in _read(folder, done).values()])
    if not missing:
        return
    groups = tiles(missing, list(request.losses), setting.tile)
    with Progress(console, groups, setting) as progress:
        for group in groups:
            cells = train_tile(setting, group, folder, [progress.callback()])
            if tracker:
                tracker.record([cell_run(cell, folder, request) for cell in cells])


def _read(folder: TrialFolder, replicas: Sequence[Replica]) -> Cells:
    found = ((replica, folder.read(replica)) for replica in replicas)
    return {replica: cell for replica, cell in found if cell is not None}


def _announce(
    setting: Setting, request: Request, folder: TrialFolder, missing: list[Replica], stale: list[Replica]
) -> None:
    total = len(request.losses) * len(request.seeds)
    console.print(
        f"{setting.data.name}, {setting.builder.name} on {setting.environment['device']}: "
        f"{len(request.losses)} losses x {len(request.seeds)} seeds, {len(missing)} of {total} runs to train; "
        f"engine {setting.engine} ({setting.engine_reason})"
    )
    if stale:
        names = ", ".join(f"{replica.arm}/s{replica.seed}" for replica in stale[:6]) + (", ..." if stale[6:] else "")
        console.print(
            f"{len(stale)} runs were made by other code, data or environment; they moved to "
            f"{folder.path / 'stale'} and are trained again: {names}"
        )


# --- tracking


def cell_run(cell: Cell, folder: TrialFolder, request: Request) -> Run:
    """A cell as MLflow sees it."""
    record = cell.record
    made = record.made_from
    tags = {
        "loss": record.arm,
        "seed": str(record.seed),
        "model": conf.short_name(made["model"]["_target_"]),
        "dataset": conf.short_name(made["dataset"]["_target_"]),
        "kind": "train",
        "status": "ok" if record.diverged_at is None else "diverged",
        "sweep": folder.path.name,
        "fingerprint": record.fingerprint,
        "weights.sha256": record.weights_sha256,
        "engine": record.engine,
        "device": made["device"],
        "torch": made["torch"],
        **git_state(conf.ROOT),
    }
    reference = folder.read(Replica(request.reference, record.seed))
    return Run(
        name=f"{record.arm}/s{record.seed}",
        tags=tags,
        params={"loss": record.arm, "seed": str(record.seed), **_flat(made)},
        metrics=pd.concat([cell.history, gaps(cell, reference)], ignore_index=True),
        started=record.started,
        ended=record.ended,
        dataset=(tags["dataset"], made["data_digest"]),
        artifacts={"config.yaml": cell.folder / "config.yaml"},
    )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys with text values; digests are tags, not params."""
    flat: dict[str, str] = {}
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            flat |= _flat(entry, f"{prefix}{key}.")
        elif prefix or key not in ("data_digest", "loss_code", "model_code"):
            flat[f"{prefix}{key}"] = str(entry)
    return {("loss." + k.removeprefix("loss.") if k.startswith("loss.") else k): v for k, v in flat.items()}


def gaps(cell: Cell, reference: Cell | None) -> pd.DataFrame:
    """Distance to the reference of the same seed: of the weights over steps, of the yardsticks at the end.

    `log10/gap/*` holds the logarithm of what is not 0: MLflow shows 1e-9 as 0.00.
    """
    if reference is None:
        return pd.DataFrame(columns=["metric", "step", "value"])
    steps, mine = cell.sketches
    theirs = reference.sketches[1]
    rows = list(zip(["gap/parameters"] * len(steps), steps, relative_distance(mine, theirs).tolist(), strict=True))
    for metric in YARDSTICKS:
        gap = abs(cell.yardsticks[f"test/{metric}"] - reference.yardsticks[f"test/{metric}"])
        rows.append((f"gap/{metric}", steps[-1], gap))
    rows += [(f"{metric}_log10", step, math.log10(value)) for metric, step, value in rows if value > 0]
    return pd.DataFrame(rows, columns=["metric", "step", "value"])


# --- concluding


def conclude(folder: TrialFolder, request: Request, tracker: Tracker | None) -> ExitCode:
    """Verdict, report and checkpoints from the cells alone; prints the table and returns the exit code."""
    from pipeline.figures import write_report

    facts_file = yaml.safe_load((folder.path / "request.yaml").read_text())
    replicas = [Replica(loss, seed) for loss in request.losses for seed in request.seeds]
    cells = _read(folder, replicas)
    facts = Facts(facts_file["num_classes"], facts_file["label_entropy"], facts_file["scope"])
    verdict = decide(cells, request, facts, _header(folder, cells), conf.digest(_protocol(request)))
    write_json(folder.path / "verdict.json", verdict)
    folder.export_checkpoints(list(cells.values()))
    write_report(
        folder.path, verdict, _trial_history(cells, request), _differences(cells, request, facts), facts_file["command"]
    )
    _print_verdict(verdict)
    if tracker:
        _record_report(tracker, folder, verdict, cells)
    return _closing_line(verdict, folder)


def _protocol(request: Request) -> dict[str, Any]:
    return {
        "margins": dict(request.margins), "primary": list(request.primary), "alpha": request.alpha,
        "max_seeds": request.max_seeds, "about": request.about, "expect": dict(request.expect), "looks": 1,
    }  # fmt: skip


def _request_file(request: Request, setting: Setting, command: str) -> dict[str, Any]:
    """`request.yaml`: enough to conclude again without the configuration or the data."""
    labels = setting.data.labels[setting.data.splits["train"]]
    frequencies = torch.bincount(labels).double() / len(labels)
    entropy = -torch.xlogy(frequencies, frequencies).sum().item()
    steps = setting.recipe.epochs * setting.recipe.steps_per_epoch(len(labels))
    return {
        "losses": list(request.losses),
        "seeds": list(request.seeds),
        "reference": request.reference,
        "about": request.about,
        "expect": dict(request.expect),
        "margins": dict(request.margins),
        "primary": list(request.primary),
        "alpha": request.alpha,
        "max_seeds": request.max_seeds,
        "num_classes": setting.data.num_classes,
        "label_entropy": entropy,
        "scope": (
            f"seeds {_spans(request.seeds)}, {steps} steps of "
            f"{conf.short_name(setting.config['optimizer']['_target_'])} in {setting.config['precision']}, "
            f"{setting.data.name}, {setting.builder.name}, on {setting.environment['device']}"
        ),
        "command": command,
    }


def _spans(seeds: Sequence[int]) -> str:
    """0-9 for a run of seeds, else a list."""
    ordered = sorted(seeds)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]}-{ordered[-1]}"
    return ", ".join(map(str, ordered))


def read_request(path: Path) -> Request:
    """The request that a trial's folder was last trained for."""
    try:
        found = yaml.safe_load((path / "request.yaml").read_text())
    except OSError as error:
        raise UsageError(f"{path} is not a trial's folder (it has no request.yaml); give the folder of a trial") from error
    fields = Request.__dataclass_fields__
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in found.items() if key in fields}
    return Request(**values)


def _header(folder: TrialFolder, cells: Cells) -> dict[str, Any]:
    """What the verdict is about, from the cells."""
    if not cells:
        raise UsageError(f"{folder.path} holds no finished run; train first")
    record = next(iter(cells.values())).record
    made = record.made_from
    return {
        "sweep": folder.path.name,
        "dataset": conf.short_name(made["dataset"]["_target_"]),
        "model": conf.short_name(made["model"]["_target_"]),
        "optimizer": made["optimizer"],
        "precision": made["precision"],
        "environment": {**record.environment, "threads": made["threads"], "engine": record.engine, "tile": made["engine"]["tile"]},
    }


def _trial_history(cells: Cells, request: Request) -> pd.DataFrame:
    frames = []
    for replica, cell in cells.items():
        reference = cells.get(Replica(request.reference, replica.seed))
        parts = [cell.history] + ([gaps(cell, reference)] if replica.arm != request.reference and reference else [])
        frames.append(pd.concat(parts, ignore_index=True).assign(loss=replica.arm, seed=replica.seed))
    return pd.concat(frames, ignore_index=True)


def _differences(cells: Cells, request: Request, facts: Facts) -> pd.DataFrame:
    """Paired differences of the final yardsticks: loss, metric, seed, difference (NaN where a run failed)."""
    rows = []
    for name in request.candidates:
        for seed in request.seeds:
            mine, theirs = cells.get(Replica(name, seed)), cells.get(Replica(request.reference, seed))
            if mine is None or theirs is None:
                continue
            ok = status_of(mine, theirs, facts) == "ok" == status_of(theirs, None, facts)
            for metric, yardstick in YARDSTICKS.items():
                pair = (mine.yardsticks[f"test/{metric}"], theirs.yardsticks[f"test/{metric}"])
                rows.append((name, metric, seed, float(paired_differences(*pair, yardstick.scale)) if ok else math.nan))
    return pd.DataFrame(rows, columns=["loss", "metric", "seed", "difference"])


def _print_verdict(verdict: Mapping[str, Any]) -> None:
    if verdict["comparisons"]:
        table = Table(title=f"{verdict['sweep']}: every loss against {verdict['reference']}", title_justify="left")
        for column in ("loss", "objective", "outcome", "verdict", "expected", "what was found"):
            table.add_column(column, overflow="fold", no_wrap=column != "what was found")
        for entry in verdict["comparisons"]:
            mark = {None: "", True: " (holds)", False: " (does not hold)"}[entry["confirmed"]]
            found = entry["sentence"] + _failure_line(entry["failures"])
            table.add_row(
                entry["loss"], entry["objective"], entry["outcome"], entry["verdict"], f"{entry['expected'] or '-'}{mark}", found
            )
        console.print(table, soft_wrap=False)
    if verdict["reference_failures"]:
        console.print(f"the reference {verdict['reference']} failed:{_failure_line(verdict['reference_failures'])}")


def _failure_line(failures: Sequence[Mapping[str, Any]]) -> str:
    said = [f"seed {f['seed']}: {f['cause']}" + (f" at step {f['step']}" if f["step"] else "") for f in failures]
    return (" Failed runs: " + "; ".join(said) + ".") if said else ""


def _record_report(tracker: Tracker, folder: TrialFolder, verdict: Mapping[str, Any], cells: Cells) -> None:
    words = {f"verdict.{entry['loss']}": entry["verdict"] for entry in verdict["comparisons"]}
    records = [cell.record for cell in cells.values()]
    tags = {
        "kind": "report", "sweep": folder.path.name, "fingerprint": "report", "model": verdict["model"],
        "dataset": verdict["dataset"], **words, **git_state(conf.ROOT),
    }  # fmt: skip
    run = Run(
        name=f"{folder.path.name}/report",
        tags=tags,
        params={"reference": verdict["reference"]},
        metrics=pd.DataFrame(columns=["metric", "step", "value"]),
        started=min(record.started for record in records),
        ended=max(record.ended for record in records),
        artifacts={name: folder.path / name for name in ("verdict.json", "report.html")},
    )
    tracker.record([run])
    console.print(f"runs grouped by loss: {tracker.link(folder.path.name)}")
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        console.print("(start the page with `make ui`)")


def _closing_line(verdict: Mapping[str, Any], folder: TrialFolder) -> ExitCode:
    console.print(f"report: {folder.path / 'report.html'}")
    judged = [entry for entry in verdict["comparisons"] if entry["confirmed"] is not None]
    failed = [entry for entry in judged if not entry["confirmed"]]
    if not judged:
        console.print("nothing was asserted (give expect=same, or '{nll: same}', for an exit code)")
        return ExitCode.HOLDS
    for entry in failed:
        console.print(f"expected {entry['loss']}: {entry['expected']}, found {entry['verdict']}")
    console.print(f"{len(judged) - len(failed)} of {len(judged)} expectations hold")
    return ExitCode.REFUTED if failed else ExitCode.HOLDS
