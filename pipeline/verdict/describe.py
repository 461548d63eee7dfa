"""A verdict in prose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from likelihood_lab.stats.outcome import OutcomeFinding
from likelihood_lab.stats.trajectory import Envelope, RankFinding
from pipeline.verdict.plan import AnalysisPlan, TrialContext

Entry = Mapping[str, Any]


AS_FUNCTIONS = {
    "identical": "The same function, bit for bit",
    "rounding": "The same function up to rounding",
    "offset": "The same function but for a constant",
    "scaled": "A multiple of the same function",
    "reweighted": "Another weighting of the data",
    "domain": "The same function in part of its domain",
    "different": "Another function",
    "not_run": "Not audited",
    "error": "The audit failed",
}
TRAJECTORIES = {
    "inside": "In training it parts from the reference as rounding does",
    "outside": "In training it parts from the reference faster than rounding does",
}
MINIMISER = "The minimiser is the same, the training only under an optimizer that a constant factor does not move."


def sentence(
    finding: OutcomeFinding,
    entry: Entry,
    trajectory: Envelope,
    ranks: RankFinding | None,
    plan: AnalysisPlan,
    context: TrialContext,
) -> str:
    """Both axes in prose, the one that the request is about first."""
    objective = _objective(entry)
    outcome = _outcome_in_words(finding, plan, context)
    if objective is None:
        outcome, objective = f"{outcome} The losses themselves were not audited.", ""
    if trajectory.word in TRAJECTORIES:
        objective = f"{objective} {TRAJECTORIES[trajectory.word]}: {trajectory.reason}.".strip()
    if ranks is not None:
        objective = f"{objective} {_ranks(ranks, finding.level)}".strip()
    both = (objective, outcome) if plan.about == "objective" else (outcome, objective)
    return " ".join(filter(None, both))


def reconciled(verdict: str, finding: OutcomeFinding, entry: Entry) -> str:
    """What a conflict comes from where the audit has named it: runs that left the domain of the loss."""
    limit = entry["domain"]
    if verdict != "conflict" or limit is None or not finding.failures.candidate_only:
        return ""
    end = f"{limit['axis']} {limit['limit']:.4g}: the {limit['behaviour']}"
    return f"Both may be true: this training may have gone where the function ends ({end})."


def _ranks(ranks: RankFinding, level: float) -> str:
    apart = "is told apart from" if ranks.rejects(level) else "ranks like"
    return f"With gradients rounded at random it {apart} the reference's own copies (p = {ranks.p:.2g})."


def _objective(entry: Entry) -> str | None:
    if not entry["sentence"]:
        return None
    said = f"{AS_FUNCTIONS[entry['objective']]}: {entry['sentence']}."
    return f"{said} {MINIMISER}" if entry["objective"] == "scaled" else said


def _outcome_in_words(finding: OutcomeFinding, plan: AnalysisPlan, context: TrialContext) -> str:
    pairs = f"{finding.num_valid} of {len(plan.seeds)} pairs"
    if finding.word == "identical":
        every = f"all {len(plan.seeds)} pairs" if len(plan.seeds) > 1 else "the one pair"
        both = f" Under {finding.failures.both} seeds both arms diverged." if finding.failures.both else ""
        return f"Weights and yardsticks are equal bit for bit in {every} ({context.scope}).{both}"
    effects = "; ".join(_effect(name, finding, plan) for name in plan.primary if name in finding.metrics)
    known = {
        "equivalent": f"Equivalent within the margins over {pairs}: {effects}.",
        "different": f"Another model: {'; '.join(finding.reasons)}.",
        "not_run": f"Not decided: {'; '.join(finding.reasons)}.",
    }
    provisional = "provisionally equivalent, but " if finding.provisional else ""
    inconclusive = f"Inconclusive over {pairs}: {provisional}{'; '.join(finding.reasons)}.{_advice(finding)}"
    return known.get(finding.word, inconclusive)


def _effect(name: str, finding: OutcomeFinding, plan: AnalysisPlan) -> str:
    metric, margin = finding.metrics[name], plan.margins.get(name)
    reliably = "reliably " if metric.excludes_zero else ""
    ratio = " (log ratio)" if metric.scale == "log_ratio" else ""
    return f"{name} {reliably}{metric.mean_difference:+.2g}{ratio}, margin {margin:g}" if margin else name


def _advice(finding: OutcomeFinding) -> str:
    needed = finding.seeds_needed
    if needed is None or (isinstance(needed, int) and needed <= finding.num_valid):
        return ""
    return (
        " No affordable number of seeds would decide it."
        if needed == "unreachable"
        else f" About {needed} seeds would decide it."
    )


def would_have_caught(finding: OutcomeFinding, entry: Entry, trajectory: Envelope, plan: AnalysisPlan) -> str | None:
    """The smallest difference that this check would have noticed, in words, on both axes."""
    noticed = []
    if finding.word == "identical":
        noticed.append("one bit in any weight or yardstick of any pair")
    if finding.word == "equivalent":
        limits = ", ".join(f"{name} {plan.margins[name]:g}" for name in plan.primary)
        noticed.append(f"a true mean difference at the margins ({limits}), in {1 - finding.level:.3g} of such studies")
    if power := entry["would_have_caught"]:
        noticed.append(f"in the losses themselves {_smallest(power)}")
    if trajectory.smallest is not None:
        noticed.append(
            f"in the first steps label smoothing {trajectory.smallest:.0e} (as recorded on digits with an MLP)"
        )
    return "; ".join(noticed) or None


def _smallest(power: Mapping[str, Mapping[str, float | None]]) -> str:
    """Two kinds of the ladder stand for the rest, which audit.json has."""
    shown = [
        f"{kind} {size:.0e} in {precision}"
        for kind in ("label smoothing", "temperature 1 + d")
        for precision in ("float32", "float64")
        if (size := power.get(kind, {}).get(precision)) is not None
    ]
    return ", ".join(shown)
