"""Content of audit.json that a verdict reads, and the parts of it that hold for a trial's cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from likelihood_lab.audit.finding import SAME_FUNCTION
from pipeline.verdict.outcomes import TrialResults
from pipeline.verdict.results import JsonContent, Readers


@dataclass(frozen=True)
class AuditEntry(JsonContent):
    """Result of the audit of one loss.

    Attributes:
        made_from: code and configuration of the audited loss.
        at_precision: result in bfloat16, where the trial trains in it.
        at_weights: result on the logits of the trained reference; its `about` says at which steps and seed.
    """

    objective: str = "not_run"
    sentence: str = ""
    scale: Mapping[str, Any] | None = None
    offset: Mapping[str, Any] | None = None
    domain: Mapping[str, Any] | None = None
    side_effects: Sequence[str] = ()
    covered: Sequence[str] = ()
    not_covered: Sequence[str] = ()
    would_have_caught: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    made_from: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    at_precision: AuditEntry | None = None
    at_weights: AuditEntry | None = None

    @property
    def is_same(self) -> bool:
        """Training with this loss is training with the reference."""
        return self.objective in SAME_FUNCTION

    @property
    def is_known(self) -> bool:
        return self.objective not in ("not_run", "error")


AuditEntry.nested = dict.fromkeys(("at_precision", "at_weights"), AuditEntry.from_json)
NOT_AUDITED = AuditEntry(not_covered=("the losses themselves",))


@dataclass(frozen=True)
class Audit(JsonContent):
    """Content of audit.json."""

    reference: str = ""
    reference_made_from: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, AuditEntry] = field(default_factory=dict)

    nested: ClassVar[Readers] = {
        "losses": lambda entries: {name: AuditEntry.from_json(entry) for name, entry in entries.items()}
    }


def audit_in_force(audit: Audit | None, results: TrialResults) -> Audit | None:
    """Return the audit without entries about another reference or about code other than the cells'."""
    if audit is None:
        return None
    losses = {name: audit.losses[name] for name in audit.losses if entry_in_force(name, audit, results) is not None}
    return replace(audit, losses=losses) if losses else None


def entry_in_force(candidate: str, audit: Audit | None, results: TrialResults) -> AuditEntry | None:
    """Return the candidate's entry if it is about the code that its cells were made with, else None."""
    plan = results.plan
    if audit is None or audit.reference != plan.reference or candidate not in {*plan.candidates} & {*audit.losses}:
        return None
    entry = audit.losses[candidate]
    about = {candidate: entry.made_from, plan.reference: audit.reference_made_from}
    for replica, cell in results.cells.items():
        known = about.get(replica.arm, {})
        if any(cell.record.made_from.get(key) != value for key, value in known.items()):
            return None
    return with_weights(_with_precision(entry))


def _with_precision(entry: AuditEntry) -> AuditEntry:
    """Combine the entry with the result in bfloat16: the weaker of the two holds."""
    at = entry.at_precision
    if at is None or not at.is_known:
        return entry
    entry = replace(entry, covered=[*entry.covered, *at.covered])
    if entry.is_same and not at.is_same:
        text = f"the same function in float32 and float64, but not in bfloat16: {at.sentence}"
        return replace(entry, objective="different", sentence=text)
    if at.objective == "identical":
        return entry
    word = "rounding" if entry.objective == "identical" else entry.objective
    return replace(entry, objective=word, sentence=f"{entry.sentence}; in bfloat16 {at.sentence}")


def with_weights(entry: AuditEntry) -> AuditEntry:
    """Combine the entry with the result on the trial's own logits: a difference there decides."""
    at = entry.at_weights
    if at is None or not at.is_known:
        return entry
    steps = ", ".join(map(str, at.about["steps"]))
    covered = [*entry.covered, f"the reference's own logits at steps {steps} (seed {at.about['seed']})"]
    entry = replace(entry, covered=covered)
    if entry.is_same and not at.is_same:
        text = f"the same function on the grid, but not at this trial's own weights: {at.sentence}"
        return replace(entry, objective="different", sentence=text)
    return entry
