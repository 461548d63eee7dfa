"""The audit of a trial: before the training on a grid of batches, after it on batches of the training itself."""

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


class TrialAudit:
    """The audit of a trial: audit.json of its folder, read once and written when it changes.

    Attributes:
        content: the content of audit.json; None where there is none that can be read.
    """

    def __init__(self, folder: TrialFolder) -> None:
        self._folder = folder
        self.content = read_audit(folder.path)

    def compare_losses(self, setup: TrialSetup, plan: AnalysisPlan) -> None:
        """Audit the losses that the content does not cover, or covers with other code or settings."""
        if not plan.candidates:
            return
        losses, reference = setup.losses, plan.reference
        settings = _settings(setup, sorted({*AUDITED_CLASSES, setup.data.num_classes}))
        low_precision = setup.precision == "bf16_mixed"
        known = self.content or {}
        about = {"reference": reference, "reference_made_from": made_from(reference, losses[reference])}
        kept: dict[str, Any] = {}
        if known.get("settings") == settings.asked and all(known[key] == value for key, value in about.items()):
            kept = {
                name: entry
                for name, entry in known["losses"].items()
                if name in losses
                and ("at_precision" in entry) == low_precision
                and entry["made_from"] == made_from(name, losses[name])
            }
        missing = [name for name in plan.candidates if name not in kept]
        if not missing:
            return
        console.print(f"auditing {', '.join(missing)} against {reference}")
        declared = {name: losses[name] for name in (reference, *missing)}
        audit = _audited_once(declared, reference, settings)
        if low_precision:  # the precision in which the losses of this trial are called
            low = _audited_once(declared, reference, replace(settings, dtype="bfloat16"))
            for name, entry in low["losses"].items():
                at_precision = {key: entry[key] for key in ("objective", "sentence", "covered")}
                audit["losses"][name]["at_precision"] = at_precision
        self._write(audit | {"losses": kept | audit["losses"]})

    def compare_at_weights(self, setup: TrialSetup, plan: AnalysisPlan) -> None:
        """Audit the losses on batches that the reference received during this trial.

        Only saturated logits reveal an epsilon or a clamp. The results go into audit.json beside those of the grid.
        Only losses that were trained from the same code are audited.
        """
        audit, cell = self.content, self._folder.read(Replica(plan.reference, plan.seeds[0]))
        if audit is None or cell is None or not (batches := cell.batches):
            return
        if setup.data.soft_targets is not None and "target_probs" not in batches[0]:
            return
        steps = [batch["step"] for batch in batches]
        about = {"weights": cell.record.weights_sha256, "steps": steps, "seed": cell.record.seed}
        missing = [name for name, entry in audit["losses"].items() if entry.get("at_weights", {}).get("about") != about]
        losses = {name: setup.losses[name] for name in (plan.reference, *missing) if name in plan.losses}
        if len(losses) < 2:
            return
        settings = _settings(setup, [setup.data.num_classes])
        for name, entry in audit_at(losses, plan.reference, settings, [_batch(**batch) for batch in batches]).items():
            at_weights = {"objective": entry["objective"], "sentence": entry["sentence"], "about": about}
            audit["losses"][name]["at_weights"] = at_weights
        self._write(audit)

    def _write(self, content: dict[str, Any]) -> None:
        self.content = content
        write_json(self._folder.path / "audit.json", content)


def read_audit(path: Path) -> dict[str, Any] | None:
    """Return the content of the folder's audit.json, or None if the file is missing or unreadable."""
    try:
        found: dict[str, Any] = json.loads((path / "audit.json").read_text())
        whole = {"reference", "reference_made_from", "settings"} <= found.keys() and all(
            {"objective", "made_from"} <= entry.keys() for entry in found["losses"].values()
        )
    except (OSError, ValueError, AttributeError, KeyError):
        return None
    return found if whole and found.get("schema") == AUDIT_SCHEMA else None


def _settings(setup: TrialSetup, num_classes: list[int]) -> AuditSettings:
    return AuditSettings(num_classes=num_classes, soft_targets=setup.data.soft_targets is not None)


_known: dict[str, dict[str, Any]] = {}  # audits of this process: the trials of a sweep share their losses


def _audited_once(losses: Mapping[str, Any], reference: str, settings: AuditSettings) -> dict[str, Any]:
    """`audit_losses`, once a process for the same losses from the same code; a failed audit is not kept."""
    about = [made_from(name, loss) for name, loss in losses.items()]
    key = conf.digest([list(losses), about, reference, settings.asked])
    if key not in _known:
        audit = audit_losses(losses, reference, settings)
        if any(entry["objective"] in ("error", "not_run") for entry in audit["losses"].values()):
            return audit
        _known[key] = audit
    return copy.deepcopy(_known[key])


def _batch(step: int, logits: Tensor, labels: Tensor, target_probs: Tensor | None = None) -> AuditBatch:
    targets = F.one_hot(labels, logits.shape[-1]).double() if target_probs is None else target_probs
    valid = torch.ones_like(labels, dtype=torch.bool)
    return AuditBatch(f"the trial's (step {step})", logits.double(), labels, targets, valid)
