"""What a grid of batches catches, remembered: it depends on no candidate, and measuring it costs more than all of them.

A file for each grid, code, build of torch and processor, in the cache's folder; one that cannot be read or written is
as good as none.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pipeline.auditing.audit import Audit
from pipeline.auditing.batches import Batch
from pipeline.cells import write_json
from pipeline.errors import UsageError
from pipeline.loaders import cache_dir

CODE = (Path(__file__).with_name("auditing"), Path(__file__).with_name("numerics.py"))


def recall(audit: Audit) -> dict[str, Any] | None:
    """What was measured of this grid before, on this machine and by this code; None where nothing was."""
    with suppress(OSError, ValueError, TypeError, KeyError, UsageError):
        kept: dict[str, Any] = json.loads(_place(audit).read_text(encoding="utf-8"))
        if kept["about"] == _about(audit):
            return dict(kept["power"])
    return None


def keep(audit: Audit, power: dict[str, Any]) -> None:
    """Remember what was measured."""
    with suppress(OSError, UsageError):
        place = _place(audit)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, {"about": _about(audit), "power": power})


def _place(audit: Audit) -> Path:
    name = hashlib.sha256(json.dumps(_about(audit), sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "audit_power" / f"{name}.json"


def _about(audit: Audit) -> dict[str, Any]:
    """All that the measurement depends on."""
    return {
        "shape": repr(audit.shape),
        "batches": [_named(batch, dtype) for batch, dtype in audit.cells],
        "device": str(audit.device),
        "torch": str(torch.__version__),
        "processor": _processor(),
        "code": _code(),
    }


def _named(batch: Batch, dtype: torch.dtype) -> str:
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
    files = [file for path in CODE for file in (sorted(path.glob("*.py")) if path.is_dir() else [path])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
