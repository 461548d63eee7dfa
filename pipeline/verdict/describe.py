"""Sentences of a verdict."""

from __future__ import annotations

from collections.abc import Mapping

from likelihood_lab.stats.outcome import OutcomeFinding
from likelihood_lab.stats.trajectory import Envelope
from pipeline.replica import DOSE
from pipeline.text import listed, plural
from pipeline.verdict.audit_entry import AuditEntry
from pipeline.verdict.plan import AnalysisPlan, TrialContext
from pipeline.verdict.results import ControlResults

AS_FUNCTIONS = {
    "identical": "The same function, bit for bit",
    "rounding": "The same function up to rounding",
    "offset": "The same function up to a constant",
    "scaled": "A multiple of the same function",
    "reweighted": "A different weighting of the data",
    "domain": "The same function in part of its domain",
    "different": "A different function",
    "not_run": "Not audited",
    "error": "The audit failed",
}
TRAJECTORIES = {
    "inside": "In the first steps it moves away from the reference no faster than rounding does",
    "outside": "In the first steps it moves away from the reference faster than rounding does",
}
MINIMISER = (
    "It has the same minimiser. It trains the same model only under an optimizer that ignores a constant factor."
)


def sentence(
    finding: OutcomeFinding,
    entry: AuditEntry,
    trajectory: Envelope,
    plan: AnalysisPlan,
    context: TrialContext,
) -> str:
    """Describe both axes, first the one that the request is about."""
    outcome, objective = [_outcome(finding, plan, context)], []
    if entry.sentence:
        objective.append(f"{AS_FUNCTIONS[entry.objective]}: {entry.sentence}.")
        objective += [MINIMISER] * (entry.objective == "scaled")
    else:
        outcome.append("The losses themselves were not audited.")
    if trajectory.word in TRAJECTORIES:
        objective.append(f"{TRAJECTORIES[trajectory.word]}: {trajectory.reason}.")
    return " ".join([*objective, *outcome] if plan.about == "objective" else [*outcome, *objective])


def cause_of_conflict(verdict: str, finding: OutcomeFinding, entry: AuditEntry) -> str:
    """Name the end of the loss's domain as the possible cause of a conflict with runs that diverged."""
    limit = entry.domain
    if verdict != "conflict" or limit is None or not finding.failures.candidate_only:
        return ""
    end = f"{limit['axis']} {limit['limit']:.4g}: the {limit['behaviour']}"
    return f"A possible cause: training reached inputs for which the functions differ ({end})."


def limits_of_controls(controls: ControlResults, outcome: str) -> str:
    """Say how the controls limit an outcome; empty if they do not."""
    replay, dose = controls.replay, controls.outcomes.get(DOSE)
    text = []
    if replay is not None and not replay.bitwise:
        text.append(f"This platform is not deterministic: the reference, replayed with seed {replay.seed}, differs.")
    if outcome == "equivalent" and dose not in (None, "different"):
        text.append(f"The study may miss differences: its positive control was called {dose}.")
    return " ".join(text)


def _outcome(finding: OutcomeFinding, plan: AnalysisPlan, context: TrialContext) -> str:
    seeds, reasons = len(plan.seeds), "; ".join(finding.reasons)
    pairs = f"{finding.num_valid} of {plural(seeds, 'pair')}"
    if finding.word == "identical":
        every = f"all {seeds} pairs" if seeds > 1 else "the one pair"
        diverged = finding.failures.both
        both = f" In {plural(diverged, 'pair')} both runs diverged." if diverged else ""
        return f"Weights and metrics are equal bit for bit in {every} ({context.scope}).{both}"
    if finding.word == "equivalent":
        effects = [_effect(name, finding, plan) for name in plan.primary if name in finding.metrics]
        return f"Equivalent within the margins over {pairs}: {'; '.join(effects)}."
    if finding.word == "different":
        return f"A different model: {reasons}."
    if finding.word == "not_run":
        return f"Not compared: {reasons}."
    provisional = "provisionally equivalent, but " if finding.provisional else ""
    return f"Inconclusive over {pairs}: {provisional}{reasons}.{_advice(finding)}"


def _effect(name: str, finding: OutcomeFinding, plan: AnalysisPlan) -> str:
    metric, margin = finding.metrics[name], plan.margins.get(name)
    reliably = "reliably " if metric.excludes_zero else ""
    ratio = " (log ratio)" if metric.scale == "log_ratio" else ""
    return f"{name} {reliably}{metric.mean_difference:+.2g}{ratio}, margin {margin:g}" if margin else name


def _advice(finding: OutcomeFinding) -> str:
    needed = finding.seeds_needed
    if needed is None or (isinstance(needed, int) and needed <= finding.num_valid):
        return ""
    if needed == "unreachable":
        return " No affordable number of seeds would decide it."
    return f" About {needed} seeds would decide it."


# --- detection limits


def would_have_caught(
    finding: OutcomeFinding, entry: AuditEntry, trajectory: Envelope, plan: AnalysisPlan
) -> str | None:
    """Name the smallest difference that each part of the check would have detected."""
    limits = []
    if finding.word == "identical":
        limits.append("one bit in any weight or metric of any pair")
    if finding.word == "equivalent":
        margins = ", ".join(f"{name} {plan.margins[name]:g}" for name in plan.primary)
        limits.append(f"a true mean difference at the margins ({margins}), in {1 - finding.level:.3g} of such studies")
    if in_losses := limit_of_audit(entry.would_have_caught):
        limits.append(f"in the losses themselves {in_losses}")
    if trajectory.smallest is not None:
        limits.append(f"in the first steps {limit_of_envelope(trajectory.smallest)}")
    return "; ".join(limits) or None


def limit_of_audit(sizes: Mapping[str, Mapping[str, float | None]]) -> str:
    """Detection limit of an audit, by two kinds of planted fault; audit.json has the others."""
    limits = []
    for kind in ("label smoothing", "temperature 1 + d"):
        known = {name: size for name, size in sizes.get(kind, {}).items() if size is not None}
        caught = [f"{size:.0e} in {name}" for name, size in known.items() if " " not in name]
        limits += [f"{kind} by {listed(caught)}"] if caught else []
    return ", ".join(limits)


def limit_of_envelope(smallest: float) -> str:
    """Detection limit of the envelope."""
    return f"label smoothing by {smallest:.0e} (as recorded on digits with an MLP)"
