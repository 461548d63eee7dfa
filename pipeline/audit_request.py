"""One audit from configuration to exit code: every loss in a child of its own, then the table, JSON and pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pipeline import config as conf
from pipeline.audit_figures import write_audit_figures
from pipeline.auditing.audit import Audit, audit_of
from pipeline.auditing.calls import Loss
from pipeline.auditing.deciding import SAMENESS
from pipeline.auditing.examination import examine, needs_cuda
from pipeline.auditing.finding import Finding
from pipeline.cells import write_json
from pipeline.checks import check_loss
from pipeline.children import Job, Limits, Outcome, Tell
from pipeline.children import run as run_children
from pipeline.errors import UsageError
from pipeline.exit_codes import ExitCode
from pipeline.formulations import FUSED_INPUTS, LossFn
from pipeline.setting import formulation_of
from pipeline.targets import BrokenImportError
from pipeline.terminal import closing_audit, show_audit
from pipeline.tracking import Run, Tracker, git_state

SCHEMA = 1
POWER = ""  # the job that measures what the grid would have caught; no loss has this name

Config = Mapping[str, Any]


def run(config: Config, folder: Path) -> ExitCode:
    """Audit the chosen losses, write `audit.json` and the pictures, and print the table.

    Args:
        config: the resolved configuration, checked.
    """
    started = time.time()
    _check_device(config["device"])
    torch.set_num_threads(1)
    reference = conf.reference_of(config)
    tracker = _tracker(config["tracking"])
    entries = _audited(config, reference)
    audit = {
        "schema": SCHEMA,
        "reference": reference,
        "losses": {name: entries[name] for name in config["loss"] if name != reference},
        "settings": {key: config[key] for key in conf.AUDIT_IDENTITY if key not in ("loss", "reference")},
        "environment": {"torch": torch.__version__, "device": config["device"]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "audit.json", audit)
    pictures = write_audit_figures(folder, audit)
    if tracker is not None:
        tracker.record([_report_run(audit, folder, pictures, started)])
    show_audit(audit)
    return closing_audit(audit, folder)


def _check_device(device: str) -> None:
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"device={device}; choose cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device={device}, but torch finds no CUDA device; choose device=cpu")


def _tracker(tracking: Config) -> Tracker | None:
    """An open tracker: MLflow is imported before the losses are asked, so that a wrong address is told at once."""
    if not tracking["enabled"]:
        return None
    tracker = Tracker(tracking["uri"], tracking["experiment"], conf.ROOT)
    tracker.open()
    return tracker


# --- the losses, each in a child


def _audited(config: Config, reference: str) -> dict[str, dict[str, Any]]:
    """The entry of each candidate in audit.json."""
    groups: dict[tuple[bool, bool], list[str]] = {}
    for name, loss in config["loss"].items():
        if name != reference:
            groups.setdefault((bool(FUSED_INPUTS & set(loss["args"])), "bias" in loss["args"]), []).append(name)
    limits = Limits(config["time_limit"], config["memory_limit"] * 2**30)
    expected = conf.expectations_of(config)
    entries: dict[str, dict[str, Any]] = {}
    for names in groups.values():
        ready = _shared(config, reference, names)
        jobs = {POWER: _power(ready)} | {name: _job(name, config["loss"][name], ready) for name in names}
        outcomes = dict(run_children(jobs, limits, config["jobs"]))
        del ready, jobs  # and with them the reference's gradients, before the next group's are computed
        power = outcomes.pop(POWER).value or {}
        for name, outcome in outcomes.items():
            entries[name] = _entry(name, outcome) | {"would_have_caught": power}
    for name, entry in entries.items():
        word = expected.get(name)
        same = entry["objective"] in SAMENESS
        entry |= {"expected": word, "confirmed": word and (same if word == "same" else word == entry["objective"])}
    return entries


def _shared(config: Config, reference: str, names: Sequence[str]) -> Callable[[], Audit]:
    """How a child gets the audit: ready where it can be inherited, made by the child where it is on a GPU."""
    declared = config["loss"][reference]

    def make() -> Audit:
        formulation = formulation_of(reference, declared)
        fn = formulation.instance(torch.device("cpu"), torch.float32)
        args = [arg for name in names for arg in config["loss"][name]["args"]]
        dtype = None if config["dtype"] is None else getattr(torch, config["dtype"])
        settings = {name: config[name] for name in ("device", "ignore_index", "soft_targets", "tokens", "num_classes")}
        audit = audit_of(
            Loss(_with_ignored(fn, config["ignore_index"]), formulation.args), args, dtype=dtype, **settings
        )
        audit.warm()
        return audit

    if config["device"] != "cpu":
        return make
    audit = make()
    return lambda: audit


def _with_ignored(fn: LossFn, ignore_index: int | None) -> LossFn:
    """torch's own cross-entropy as a reference ignores what the audit ignores."""
    if ignore_index is not None and isinstance(fn, torch.nn.CrossEntropyLoss | torch.nn.NLLLoss):
        fn.ignore_index = ignore_index
    return fn


def _power(ready: Callable[[], Audit]) -> Job:
    return lambda _: ready().power


def _job(name: str, declared: Config, ready: Callable[[], Audit]) -> Job:
    """What a child does for one loss: find it, import it, ask it."""

    def job(tell: Tell) -> dict[str, Any]:
        try:
            check_loss(f"loss.{name}", declared)
        except BrokenImportError as error:
            raise RuntimeError(str(error)) from error
        formulation = formulation_of(name, declared)
        fn = formulation.instance(torch.device("cpu"), torch.float32)
        loss = Loss(fn, formulation.args)
        return examine(ready(), loss, lambda finding: tell(finding.as_json({}))).as_json({})

    return job


def _entry(name: str, outcome: Outcome) -> dict[str, Any]:
    """What a child came to as an entry of audit.json; what it told before it ended badly is kept.

    Raises:
        UsageError: the loss is declared wrongly.
    """
    if outcome.refused is not None and not needs_cuda(outcome.refused):
        raise UsageError(outcome.refused)
    problem = outcome.refused or outcome.failed
    if outcome.value is not None:
        entry: dict[str, Any] = outcome.value
    elif outcome.told is not None:
        entry = outcome.told
        entry["side_effects"].append(f"ends the process when asked about bad input: {problem}")
    elif problem is not None and needs_cuda(problem):
        entry = Finding("not_run", f"needs a CUDA device, and there is none: {problem}").as_json({})
    else:
        entry = Finding("error", str(problem)).as_json({})
    if line := next((line for line in outcome.printed.splitlines() if line.strip()), None):
        entry["side_effects"].append(f"prints: {line.strip()[:80]}")
    entry["evidence"] = {**entry["evidence"], "cpu_seconds": round(outcome.seconds, 2)}
    return entry


def _report_run(audit: Config, folder: Path, pictures: list[Path], started: float) -> Run:
    words = {f"objective.{name}": entry["objective"] for name, entry in audit["losses"].items()}
    identity = {"kind": "report", "sweep": folder.name, "fingerprint": "audit"}
    artifacts = {"audit.json": folder / "audit.json"} | {f"figures/{path.name}": path for path in pictures}
    return Run(
        name=f"{folder.name}/report",
        tags=identity | words | git_state(conf.ROOT),
        params={"reference": audit["reference"], "losses": ", ".join(audit["losses"])},
        metrics=pd.DataFrame(columns=["metric", "step", "value"]),
        started=started,
        ended=time.time(),
        artifacts=artifacts,
    )
