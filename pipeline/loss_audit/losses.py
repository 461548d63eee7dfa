"""Audit declared losses; each is imported and evaluated in its own subprocess.

The detection limits of a grid do not depend on the candidates, and they take longer than all candidates. They are
cached in one file for each grid, code, torch build and processor. An unreadable file counts as absent.
"""

from __future__ import annotations

import functools
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
from pipeline.loss_audit.isolation import Job, JobResult, Limits, SendPartial, run_isolated
from pipeline.runtime import cache_dir
from pipeline.storage.files import sha256, write_json
from pipeline.training.objectives import code_digest

SCHEMA = 1
VERSION = 1  # increase when the results of an audit may change; earlier results are then computed again
DETECTION_LIMITS = ""  # name of the job that measures the detection limits; no loss has this name

Entry = dict[str, Any]  # of one loss in audit.json

AUDIT_CODE = [Path(str(package.__file__)).parent for package in (likelihood_lab.audit, likelihood_lab.categorical)]


@dataclass(frozen=True)
class AuditSettings:
    """Settings of an audit, as in `conf/audit.yaml`."""

    dtype: str | None = None
    device: str = "cpu"
    ignore_index: int | None = None
    soft_targets: bool = False
    tokens: bool = False
    num_classes: Sequence[int] | None = None
    time_limit: float = 300.0  # seconds for each subprocess
    memory_limit: float = 8.0  # GiB for each subprocess
    jobs: int = 2  # subprocesses at once

    @property
    def asked(self) -> dict[str, Any]:
        """The settings that decide the results."""
        names = ("dtype", "device", "ignore_index", "soft_targets", "tokens")
        classes = None if self.num_classes is None else list(self.num_classes)
        return {name: getattr(self, name) for name in names} | {"num_classes": classes}

    @property
    def limits(self) -> tuple[Limits, int]:
        """Limits of each subprocess, and the number of subprocesses at once."""
        return Limits(self.time_limit, self.memory_limit * 2**30), self.jobs


def audit_losses(losses: Mapping[str, Any], reference: str, settings: AuditSettings) -> dict[str, Any]:
    """Return the content of audit.json: an entry for every declared loss but the reference.

    Raises:
        UsageError: a loss is declared wrongly, or the reference cannot be called.
    """
    groups: dict[tuple[bool, ...], list[str]] = {}
    for name, loss in losses.items():
        if name != reference:
            args, pair = set(loss["args"]), {*loss["args"], *losses[reference]["args"]}
            soft = settings.soft_targets and "target_probs" in pair  # labels alone cannot show soft targets
            groups.setdefault((bool(FUSED_INPUTS & args), "bias" in args, soft), []).append(name)
    entries: dict[str, Entry] = {}
    for (*_, soft), names in groups.items():
        group = {name: losses[name] for name in names}
        entries |= _audit_group(group, reference, losses[reference], replace(settings, soft_targets=soft))
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
    """Return entries of the losses on these batches only; without fused losses, which need more than logits."""
    unfused = {name: loss for name, loss in losses.items() if not FUSED_INPUTS & set(loss["args"])}
    candidates = {name: loss for name, loss in unfused.items() if name != reference}
    if reference not in unfused or not candidates:
        return {}
    args = {arg for loss in unfused.values() for arg in loss["args"]}
    settings = replace(settings, soft_targets=settings.soft_targets and "target_probs" in args)
    ready = _context_factory(reference, losses[reference], sorted(args), settings, batches)
    jobs = {name: _audit_job(name, loss, ready) for name, loss in candidates.items()}
    return {name: _entry(candidates[name], result) for name, result in run_isolated(jobs, *settings.limits)}


def made_from(name: str, declared: Mapping[str, Any]) -> Entry:
    """Return the key of an entry: the declaration of the loss, the digest of its code and the torch version."""
    return {
        "loss": dict(declared),
        "loss_code": code_digest(locate(f"loss.{name}.fn", declared["fn"]["_target_"])),
        "torch": str(torch.__version__),
    }


def _audit_group(
    losses: Mapping[str, Any], reference: str, declared: Mapping[str, Any], settings: AuditSettings
) -> dict[str, Entry]:
    """Return entries of losses with the same kind of input, each with the detection limits of their grid."""
    ready = _context_factory(reference, declared, [arg for loss in losses.values() for arg in loss["args"]], settings)
    context = ready() if settings.device == "cpu" else None
    cached = load_cached(context) if context else None
    jobs = {name: _audit_job(name, loss, ready) for name, loss in losses.items()}
    if cached is None:
        jobs = {DETECTION_LIMITS: _detection_job(ready), **jobs}
    results = dict(run_isolated(jobs, *settings.limits))
    detection = results.pop(DETECTION_LIMITS, JobResult(value=cached))
    if context and cached is None and detection.value is not None:
        save_cached(context, detection.value)
    entries = {name: _entry(losses[name], result) for name, result in results.items()}
    for entry in entries.values():
        entry["would_have_caught"] = detection.value or {}
        if detection.value is None:
            missing = f"the smallest difference that would have been caught: measuring it {detection.failure}"
            entry["not_covered"] = [*entry["not_covered"], missing]
    return entries


def _context_factory(
    reference: str,
    declared: Mapping[str, Any],
    args: Sequence[str],
    settings: AuditSettings,
    batches: Sequence[AuditBatch] = (),
) -> Callable[[], AuditContext]:
    """Return a function that gives a subprocess the context: inherited on a CPU, made by the subprocess on a GPU."""

    def make() -> AuditContext:
        formulation = formulation_of(reference, declared)
        fn = formulation.instance(torch.device("cpu"), torch.float32)
        options = settings.asked
        dtype = None if options["dtype"] is None else getattr(torch, options["dtype"])
        loss = Loss(with_ignored(fn, settings.ignore_index), formulation.args)
        audit = audit_of(loss, args, **options | {"dtype": dtype}, batches=batches, with_grid=not batches)
        audit.warm()
        return audit

    if settings.device != "cpu":
        return make
    with _one_thread():
        audit = make()
    return lambda: audit


def _detection_job(ready: Callable[[], AuditContext]) -> Job:
    def job(send_partial: SendPartial) -> Any:
        torch.set_num_threads(1)
        return ready().detection_limits

    return job


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread, so that parent and forks compute the same bits: OpenMP's threads do not survive a fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _audit_job(name: str, declared: Mapping[str, Any], ready: Callable[[], AuditContext]) -> Job:
    """Return the job of one loss: import it and examine it."""

    def job(send_partial: SendPartial) -> Entry:
        torch.set_num_threads(1)
        try:
            validate_loss(f"loss.{name}", declared)
        except BrokenImportError as error:
            raise RuntimeError(str(error)) from error
        formulation = formulation_of(name, declared)
        fn = formulation.instance(torch.device("cpu"), torch.float32)
        loss = Loss(fn, formulation.args)
        about = made_from(name, declared)
        found = examine(ready(), loss, lambda finding: send_partial(finding.as_json({}) | {"made_from": about}))
        return found.as_json({}) | {"made_from": about}

    return job


def _entry(declared: Mapping[str, Any], result: JobResult) -> Entry:
    """Return the result of a subprocess as an entry of audit.json; after a crash, its last partial result.

    Raises:
        UsageError: the loss is declared wrongly.
    """
    if result.refusal is not None and not needs_cuda(result.refusal):
        raise UsageError(result.refusal)
    problem = result.refusal or result.failure
    if result.value is not None:
        entry: Entry = result.value
    elif result.partial is not None:
        entry = result.partial
        entry["side_effects"].append(f"ends the process on bad input: {problem}")
    elif problem is not None and needs_cuda(problem):
        entry = Finding("not_run", f"needs a CUDA device, and there is none: {problem}").as_json({})
    else:
        entry = Finding("error", str(problem)).as_json({})
    if line := next((line for line in result.output.splitlines() if line.strip()), None):
        entry["side_effects"].append(f"prints: {line.strip()[:80]}")
    entry.setdefault("made_from", {"loss": dict(declared)})
    entry["evidence"] = {**entry["evidence"], "cpu_seconds": round(result.cpu_seconds, 2)}
    return entry


def load_cached(audit: AuditContext) -> dict[str, Any] | None:
    """Return the cached detection limits of this grid, machine and code; None if there are none."""
    with suppress(OSError, ValueError, TypeError, KeyError, UsageError):
        content: dict[str, Any] = json.loads(_cache_file(audit).read_text(encoding="utf-8"))
        if content["about"] == _cache_key(audit):
            return dict(content["power"])
    return None


def save_cached(audit: AuditContext, limits: dict[str, Any]) -> None:
    """Write the detection limits to the cache; a cache that cannot be written is left as it is."""
    with suppress(OSError, UsageError):
        write_json(_cache_file(audit), {"about": _cache_key(audit), "power": limits})


def _cache_file(audit: AuditContext) -> Path:
    name = sha256(json.dumps(_cache_key(audit), sort_keys=True).encode())[:16]
    return cache_dir() / "audit_power" / f"{name}.json"


def _cache_key(audit: AuditContext) -> dict[str, Any]:
    """Return everything that the detection limits depend on."""
    return {
        "shape": repr(audit.shape),
        "batches": [
            f"{batch.family} {list(batch.logits.shape)} {batch.layout} {batch.upstream} {dtype}"
            for batch, dtype in audit.cases
        ],
        "device": str(audit.device),
        "torch": str(torch.__version__),
        "processor": _processor(),
        "code": _code_digest(),
    }


@functools.cache
def _processor() -> str:
    """Return the processor's name in Linux and the instruction set that torch uses."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"{name[1] if name else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def _code_digest() -> str:
    """Return the SHA-256 of the audit's own files."""
    files = [file for folder in AUDIT_CODE for file in sorted(folder.glob("*.py"))]
    return sha256(b"".join(file.read_bytes() for file in files))
