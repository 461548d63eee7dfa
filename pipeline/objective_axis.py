"""The audit in a trial: asked before anything is trained, kept in its folder, asked again only where it must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.audited import SCHEMA as AUDIT_SCHEMA
from pipeline.audited import AuditSettings, audit_losses, made_from
from pipeline.cells import TrialFolder, write_json
from pipeline.outcomes import Request
from pipeline.setting import Setting
from pipeline.terminal import console

AUDITED_CLASSES = (2, 10, 1000)  # besides the dataset's own number


def ask_audit(setting: Setting, request: Request, folder: TrialFolder) -> None:
    """Ask whether the losses are the same function, as far as audit.json does not know it, and write it down."""
    if not request.candidates:
        return
    losses, reference = setting.config["loss"], request.reference
    known = read_audit(folder.path) or {}
    settings = AuditSettings(num_classes=sorted({*AUDITED_CLASSES, setting.data.num_classes}))
    about = {"reference": reference, "reference_made_from": made_from(reference, losses[reference])}
    kept: dict[str, Any] = {}
    if known.get("settings") == settings.asked and all(known[key] == value for key, value in about.items()):
        found = {name: entry for name, entry in known["losses"].items() if name in losses}
        kept = {name: entry for name, entry in found.items() if entry["made_from"] == made_from(name, losses[name])}
    missing = [name for name in request.candidates if name not in kept]
    if not missing:
        return
    console.print(f"auditing {', '.join(missing)} against {reference}")
    audit = audit_losses({name: losses[name] for name in (reference, *missing)}, reference, settings)
    write_json(folder.path / "audit.json", audit | {"losses": kept | audit["losses"]})


def read_audit(path: Path) -> dict[str, Any] | None:
    """The content of a folder's audit.json; None where there is none that can be read."""
    try:
        found: dict[str, Any] = json.loads((path / "audit.json").read_text())
    except (OSError, ValueError):
        return None
    return found if found.get("schema") == AUDIT_SCHEMA else None
