"""The audit in a trial: asked before anything is trained, kept in its folder, asked again only where it must be."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from likelihood_lab.categorical.batches import AuditBatch
from pipeline.config import schema as conf
from pipeline.console import console
from pipeline.loss_audit.losses import SCHEMA as AUDIT_SCHEMA
from pipeline.loss_audit.losses import AuditSettings, audit_at, audit_losses, made_from
from pipeline.replica import Replica
from pipeline.storage.cells import TrialFolder
from pipeline.storage.files import write_json
from pipeline.verdict.plan import AnalysisPlan

if TYPE_CHECKING:
    from pipeline.trial.setup import TrialSetup

AUDITED_CLASSES = (2, 10, 1000)  # besides the dataset's own number


def ask_audit(setup: TrialSetup, plan: AnalysisPlan, folder: TrialFolder) -> None:
    """Ask whether the losses are the same function, as far as audit.json does not know it, and write it down."""
    if not plan.candidates:
        return
    losses, reference = setup.config["loss"], plan.reference
    known = read_audit(folder.path) or {}
    soft = setup.data.soft_targets is not None
    settings = AuditSettings(num_classes=sorted({*AUDITED_CLASSES, setup.data.num_classes}), soft_targets=soft)
    low_precision = setup.config["precision"] == "bf16_mixed"
    about = {"reference": reference, "reference_made_from": made_from(reference, losses[reference])}
    kept: dict[str, Any] = {}
    if known.get("settings") == settings.asked and all(known[key] == value for key, value in about.items()):
        found = {
            name: entry
            for name, entry in known["losses"].items()
            if name in losses and ("at_precision" in entry) == low_precision
        }
        kept = {name: entry for name, entry in found.items() if entry["made_from"] == made_from(name, losses[name])}
    missing = [name for name in plan.candidates if name not in kept]
    if not missing:
        return
    console.print(f"auditing {', '.join(missing)} against {reference}")
    asked = {name: losses[name] for name in (reference, *missing)}
    audit = _audited_once(asked, reference, settings)
    if low_precision:  # what reaches the losses in this trial
        low = _audited_once(asked, reference, replace(settings, dtype="bfloat16"))
        for name, entry in low["losses"].items():
            said = {key: entry[key] for key in ("objective", "sentence", "covered")}
            audit["losses"][name]["at_precision"] = said
    write_json(folder.path / "audit.json", audit | {"losses": kept | audit["losses"]})


_known: dict[str, dict[str, Any]] = {}  # what this process has asked: the trials of a sweep share their losses


def _audited_once(losses: Mapping[str, Any], reference: str, settings: AuditSettings) -> dict[str, Any]:
    """`audit_losses`, asked once a process about the same losses from the same code, unless some answer was none."""
    about = [made_from(name, loss) for name, loss in losses.items()]
    key = conf.digest([list(losses), about, reference, settings.asked])
    if key not in _known:
        audit = audit_losses(losses, reference, settings)
        if any(entry["objective"] in ("error", "not_run") for entry in audit["losses"].values()):
            return audit
        _known[key] = audit
    return copy.deepcopy(_known[key])


def read_audit(path: Path) -> dict[str, Any] | None:
    """The content of a folder's audit.json; None where there is none that can be read."""
    try:
        found: dict[str, Any] = json.loads((path / "audit.json").read_text())
        whole = {"reference", "reference_made_from", "settings"} <= found.keys() and all(
            {"objective", "made_from"} <= entry.keys() for entry in found["losses"].values()
        )
    except (OSError, ValueError, AttributeError, KeyError):
        return None
    return found if whole and found.get("schema") == AUDIT_SCHEMA else None


# --- at the trial's own weights


def ask_at_weights(setup: TrialSetup, plan: AnalysisPlan, folder: TrialFolder) -> None:
    """Ask again on what reached the reference's loss in this trial: epsilons and clamps show at saturation alone.

    The answers go into audit.json, beside what the grid has said, for the losses that were trained from the same code.
    """
    audit, cell = read_audit(folder.path), folder.read(Replica(plan.reference, plan.seeds[0]))
    soft = setup.data.soft_targets is not None
    if audit is None or cell is None or not (met := cell.batches) or (soft and "target_probs" not in met[0]):
        return
    about = {"weights": cell.record.weights_sha256, "steps": [batch["step"] for batch in met], "seed": cell.record.seed}
    missing = [name for name, entry in audit["losses"].items() if entry.get("at_weights", {}).get("about") != about]
    losses = {name: setup.config["loss"][name] for name in (plan.reference, *missing) if name in plan.losses}
    if len(losses) < 2:
        return
    settings = AuditSettings(num_classes=[setup.data.num_classes], soft_targets=soft)
    found = audit_at(losses, plan.reference, settings, [_batch(**batch) for batch in met])
    for name, entry in found.items():
        said = {"objective": entry["objective"], "sentence": entry["sentence"], "about": about}
        audit["losses"][name]["at_weights"] = said
    write_json(folder.path / "audit.json", audit)


def _batch(step: int, logits: Tensor, labels: Tensor, target_probs: Tensor | None = None) -> AuditBatch:
    targets = F.one_hot(labels, logits.shape[-1]).double() if target_probs is None else target_probs
    valid = torch.ones_like(labels, dtype=torch.bool)
    return AuditBatch(f"the trial's (step {step})", logits.double(), labels, targets, valid)
