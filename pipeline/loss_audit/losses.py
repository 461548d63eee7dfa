"""The audit of declared losses: each is found, imported and asked in a child of its own.

What a grid of batches catches depends on no candidate, and measuring it costs more than all of them. It is cached: a
file for each grid, code, build of torch and processor. A file that cannot be read or written counts as absent.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import likelihood_lab.audit
import likelihood_lab.categorical
from likelihood_lab.audit.context import AuditContext, audit_of, with_ignored
from likelihood_lab.audit.evaluate import Loss
from likelihood_lab.audit.examine import examine, needs_cuda
from likelihood_lab.audit.finding import Finding
from likelihood_lab.categorical.batches import AuditBatch
from likelihood_lab.categorical.inputs import FUSED_INPUTS
from likelihood_lab.errors import UsageError
from pipeline.build import formulation_of
from pipeline.config.targets import BrokenImportError, locate
from pipeline.config.validate import validate_loss
from pipeline.loss_audit.isolation import Job, JobResult, Limits, Tell, run_isolated
from pipeline.runtime import cache_dir
from pipeline.storage.files import write_json
from pipeline.training.objectives import code_digest

SCHEMA = 1
VERSION = 1  # raised whenever an audit may find something else; what was found before is then asked again
POWER = ""  # the job that measures what the grid would have caught; no loss has this name

Entry = dict[str, Any]


CODE = tuple(Path(str(package.__file__)).parent for package in (likelihood_lab.audit, likelihood_lab.categorical))


@dataclass(frozen=True)
class AuditSettings:
    """What is asked, as `conf/audit.yaml` has it, and what each child may use: seconds, GiB, children at once."""

    dtype: str | None = None
    device: str = "cpu"
    ignore_index: int | None = None
    soft_targets: bool = False
    tokens: bool = False
    num_classes: Sequence[int] | None = None
    time_limit: float = 300.0
    memory_limit: float = 8.0
    jobs: int = 2

    @property
    def asked(self) -> dict[str, Any]:
        """The settings that decide what is found."""
        names = ("dtype", "device", "ignore_index", "soft_targets", "tokens")
        classes = None if self.num_classes is None else list(self.num_classes)
        return {name: getattr(self, name) for name in names} | {"num_classes": classes}


def audit_losses(losses: Mapping[str, Any], reference: str, settings: AuditSettings) -> dict[str, Any]:
    """The content of audit.json: an entry for every declared loss but the reference.

    Raises:
        UsageError: a loss is declared wrongly, or the reference cannot be called.
    """
    groups: dict[tuple[bool, ...], list[str]] = {}
    for name, loss in losses.items():
        if name != reference:
            args, pair = set(loss["args"]), {*loss["args"], *losses[reference]["args"]}
            soft = settings.soft_targets and "target_probs" in pair  # two that see labels alone see no soft ones
            groups.setdefault((bool(FUSED_INPUTS & args), "bias" in args, soft), []).append(name)
    entries: dict[str, Entry] = {}
    for (*_, soft), names in groups.items():
        asked = replace(settings, soft_targets=soft)
        entries |= _audited({name: losses[name] for name in names}, reference, losses[reference], asked)
    return {
        "schema": SCHEMA,
        "reference": reference,
        "reference_made_from": made_from(reference, losses[reference]),
        "losses": {name: entries[name] for name in losses if name != reference},
        "settings": settings.asked,
        "environment": {"torch": str(torch.__version__), "device": settings.device, "audit": VERSION},
    }


def audit_at(
    losses: Mapping[str, Any], reference: str, settings: AuditSettings, batches: Sequence[AuditBatch]
) -> dict[str, Entry]:
    """Entries of losses asked on these batches alone; fused losses, which need more than logits, are left out."""
    asked = {name: loss for name, loss in losses.items() if not FUSED_INPUTS & set(loss["args"])}
    candidates = {name: loss for name, loss in asked.items() if name != reference}
    if reference not in asked or not candidates:
        return {}
    seen = {arg for loss in asked.values() for arg in loss["args"]}
    settings = replace(settings, soft_targets=settings.soft_targets and "target_probs" in seen)
    ready = _shared(reference, losses[reference], sorted(seen), settings, batches)
    jobs = {name: _job(name, loss, ready) for name, loss in candidates.items()}
    limits = Limits(settings.time_limit, settings.memory_limit * 2**30)
    outcomes = run_isolated(jobs, limits, settings.jobs)
    return {name: _entry(candidates[name], outcome) for name, outcome in outcomes}


def made_from(name: str, declared: Mapping[str, Any]) -> Entry:
    """What an entry is about: the declaration, and a digest of the code behind it."""
    return {
        "loss": dict(declared),
        "loss_code": code_digest(locate(f"loss.{name}.fn", declared["fn"]["_target_"])),
        "torch": str(torch.__version__),
    }


def _audited(
    losses: Mapping[str, Any], reference: str, declared: Mapping[str, Any], settings: AuditSettings
) -> dict[str, Entry]:
    """Entries of losses that take the same kind of input, each with what its grid would have caught."""
    ready = _shared(reference, declared, [arg for loss in losses.values() for arg in loss["args"]], settings)
    at_hand = ready() if settings.device == "cpu" else None
    known = recall(at_hand) if at_hand else None
    jobs = {name: _job(name, loss, ready) for name, loss in losses.items()}
    if known is None:
        jobs = {POWER: _power(ready), **jobs}
    limits = Limits(settings.time_limit, settings.memory_limit * 2**30)
    outcomes = dict(run_isolated(jobs, limits, settings.jobs))
    measured = outcomes.pop(POWER, JobResult(value=known))
    if at_hand and known is None and measured.value is not None:
        keep(at_hand, measured.value)
    entries = {
        name: _entry(losses[name], outcome) | {"would_have_caught": measured.value or {}}
        for name, outcome in outcomes.items()
    }
    if measured.value is None:
        for entry in entries.values():
            lost = f"the smallest difference that would have been caught: measuring it {measured.failed}"
            entry["not_covered"] = [*entry["not_covered"], lost]
    return entries


def _shared(
    reference: str,
    declared: Mapping[str, Any],
    args: Sequence[str],
    settings: AuditSettings,
    batches: Sequence[AuditBatch] = (),
) -> Callable[[], AuditContext]:
    """How a child gets the audit: ready where it can be inherited, made by the child where it is on a GPU."""

    def make() -> AuditContext:
        formulation = formulation_of(reference, declared)
        fn = formulation.instance(torch.device("cpu"), torch.float32)
        asked = settings.asked
        dtype = None if asked["dtype"] is None else getattr(torch, asked["dtype"])
        loss = Loss(with_ignored(fn, settings.ignore_index), formulation.args)
        audit = audit_of(loss, args, **asked | {"dtype": dtype}, batches=batches, with_grid=not batches)
        audit.warm()
        return audit

    if settings.device != "cpu":
        return make
    with _one_thread():
        audit = make()
    return lambda: audit


def _power(ready: Callable[[], AuditContext]) -> Job:
    def job(tell: Tell) -> Any:
        torch.set_num_threads(1)
        return ready().detection_limits

    return job


@contextmanager
def _one_thread() -> Iterator[None]:
    """What the parent computes has the bits that a child would get: OpenMP's threads do not survive a fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _job(name: str, declared: Mapping[str, Any], ready: Callable[[], AuditContext]) -> Job:
    """What a child does for one loss: find it, import it, ask it."""

    def job(tell: Tell) -> Entry:
        torch.set_num_threads(1)
        try:
            validate_loss(f"loss.{name}", declared)
        except BrokenImportError as error:
            raise RuntimeError(str(error)) from error
        formulation = formulation_of(name, declared)
        fn = formulation.instance(torch.device("cpu"), torch.float32)
        loss = Loss(fn, formulation.args)
        about = made_from(name, declared)
        found = examine(ready(), loss, lambda finding: tell(finding.as_json({}) | {"made_from": about}))
        return found.as_json({}) | {"made_from": about}

    return job


def _entry(declared: Mapping[str, Any], outcome: JobResult) -> Entry:
    """What a child came to as an entry of audit.json; what it told before it ended badly is kept.

    Raises:
        UsageError: the loss is declared wrongly.
    """
    if outcome.refused is not None and not needs_cuda(outcome.refused):
        raise UsageError(outcome.refused)
    problem = outcome.refused or outcome.failed
    if outcome.value is not None:
        entry: Entry = outcome.value
    elif outcome.told is not None:
        entry = outcome.told
        entry["side_effects"].append(f"ends the process when asked about bad input: {problem}")
    elif problem is not None and needs_cuda(problem):
        entry = Finding("not_run", f"needs a CUDA device, and there is none: {problem}").as_json({})
    else:
        entry = Finding("error", str(problem)).as_json({})
    if line := next((line for line in outcome.printed.splitlines() if line.strip()), None):
        entry["side_effects"].append(f"prints: {line.strip()[:80]}")
    entry.setdefault("made_from", {"loss": dict(declared)})
    entry["evidence"] = {**entry["evidence"], "cpu_seconds": round(outcome.seconds, 2)}
    return entry


def recall(audit: AuditContext) -> dict[str, Any] | None:
    """What was measured of this grid before, on this machine and by this code; None where nothing was."""
    with suppress(OSError, ValueError, TypeError, KeyError, UsageError):
        kept: dict[str, Any] = json.loads(_place(audit).read_text(encoding="utf-8"))
        if kept["about"] == _about(audit):
            return dict(kept["power"])
    return None


def keep(audit: AuditContext, power: dict[str, Any]) -> None:
    """Remember what was measured."""
    with suppress(OSError, UsageError):
        place = _place(audit)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, {"about": _about(audit), "power": power})


def _place(audit: AuditContext) -> Path:
    name = hashlib.sha256(json.dumps(_about(audit), sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "audit_power" / f"{name}.json"


def _about(audit: AuditContext) -> dict[str, Any]:
    """All that the measurement depends on."""
    return {
        "shape": repr(audit.shape),
        "batches": [_named(batch, dtype) for batch, dtype in audit.cases],
        "device": str(audit.device),
        "torch": str(torch.__version__),
        "processor": _processor(),
        "code": _code(),
    }


def _named(batch: AuditBatch, dtype: torch.dtype) -> str:
    return f"{batch.family} {list(batch.logits.shape)} {batch.layout} {batch.upstream} {dtype}"


@functools.cache
def _processor() -> str:
    """Its name as Linux has it, and the instructions that torch uses of it."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"{named[1] if named else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def _code() -> str:
    """SHA-256 of the audit's own files."""
    files = [file for folder in CODE for file in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
