"""The two axes into one word, the sentence that explains it, and the JSON contract."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.assay import control_findings, controls_in_words, envelope_of, rank_test_of
from pipeline.auditing.finding import strict
from pipeline.envelope import Envelope
from pipeline.looks import Look, level_of
from pipeline.objectives import Replica
from pipeline.outcomes import Cells, Facts, Request, outcomes, status_of
from pipeline.rank_test import RankFinding
from pipeline.statistics import OutcomeFinding

SCHEMA = 1
SAME = frozenset({"identical", "rounding", "offset", "equivalent"})


Entry = Mapping[str, Any]
Damaged = Mapping[Replica, str]

PARTED = {"outside": "different"}
ANOTHER_RATE = Envelope("not_applicable", reason="it was trained at another learning rate")
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
UNAUDITED: Entry = {
    "objective": "not_run", "sentence": "", "scale": None, "offset": None, "domain": None, "side_effects": [],
    "covered": [], "not_covered": ["the losses themselves"], "would_have_caught": {},
}  # fmt: skip


def word(
    about: str,
    objective: str,
    outcome: str,
    trajectory: str = "not_applicable",
    diverged: bool = False,
    rate: float = 1.0,
) -> str:
    """One word for both axes; the axis that the request is about, checked against the other.

    Args:
        trajectory: the envelope's word: weights that part faster than rounding makes them part contradict an audit
            that found the same function.
        diverged: whether the candidate diverged where the reference did not, which no sameness survives.
        rate: the candidate's learning rate over the reference's. Under another one the same function is another
            training, and the outcome alone can say that it trained the same model.
    """
    same_function = objective in ("identical", "rounding", "offset")
    if same_function and rate != 1:
        return outcome
    if same_function and (diverged or "different" in (outcome, PARTED.get(trajectory))):
        return "conflict"
    if about == "outcome":
        return outcome
    if objective in ("not_run", "error"):
        return outcome
    if same_function:
        return "identical" if outcome == "identical" else "rounding"
    return "different"


def confirms(expected: str, verdict: str, objective: str, outcome: str) -> bool:
    """Whether an expectation holds: `same`, or the word of the verdict or of either axis."""
    return verdict in SAME if expected == "same" else expected in (verdict, objective, outcome)


def comparison(
    candidate: str,
    finding: OutcomeFinding,
    entry: Entry,
    controls: Mapping[str, Any],
    cells: Cells,
    damaged: Damaged,
    request: Request,
    facts: Facts,
) -> dict[str, Any]:
    """One entry of `comparisons` in verdict.json; `entry` is the candidate's in audit.json."""
    objective = entry["objective"]
    rate = rate_of(candidate, cells) / rate_of(request.reference, cells)
    trajectory = envelope_of(candidate, cells, request) if rate == 1 else ANOTHER_RATE
    ranks = rank_test_of(candidate, cells, request)
    verdict = word(request.about, objective, finding.word, trajectory.word, finding.failures.candidate_only > 0, rate)
    expected = request.expect.get(candidate)
    said = [
        sentence(finding, entry, trajectory, ranks, request, facts),
        "" if rate == 1 else f"It was trained at {rate:g} times the reference's learning rate.",
        _reconciled(verdict, finding, entry),
        controls_in_words(controls, finding.word),
    ]
    return {
        "loss": candidate,
        "objective": objective,
        "scale": entry["scale"],
        "offset": entry["offset"],
        "domain": entry["domain"],
        "side_effects": entry["side_effects"],
        "outcome": finding.word,
        "envelope": {
            "word": trajectory.word,
            "excess": strict(trajectory.excess),
            "reason": trajectory.reason,
            "smallest": trajectory.smallest,
        },
        "rank_test": None if ranks is None else {"p": ranks.p, "mean_rank": dict(ranks.mean_rank)},
        "seeds_needed": finding.seeds_needed if finding.word == "inconclusive" else None,
        "verdict": verdict,
        "sentence": " ".join(filter(None, said)),
        "expected": expected,
        "confirmed": None if expected is None else confirms(expected, verdict, objective, finding.word),
        "assay_sensitivity": controls["assay_sensitivity"],
        "would_have_caught": would_have_caught(finding, entry, trajectory, request),
        "covered": [facts.scope, *entry["covered"]],
        "not_covered": ["other data, splits, hyperparameters and devices", *entry["not_covered"]],
        "failures": _failures(candidate, cells, damaged, request, facts),
        "metrics": metric_entries(finding),
    }


def sentence(
    finding: OutcomeFinding,
    entry: Entry,
    trajectory: Envelope,
    ranks: RankFinding | None,
    request: Request,
    facts: Facts,
) -> str:
    """Both axes in prose, the one that the request is about first."""
    objective = _objective(entry)
    outcome = _outcome_in_words(finding, request, facts)
    if objective is None:
        outcome, objective = f"{outcome} The losses themselves were not audited.", ""
    if trajectory.word in TRAJECTORIES:
        objective = f"{objective} {TRAJECTORIES[trajectory.word]}: {trajectory.reason}.".strip()
    if ranks is not None:
        objective = f"{objective} {_ranks(ranks, finding.level)}".strip()
    both = (objective, outcome) if request.about == "objective" else (outcome, objective)
    return " ".join(filter(None, both))


def _reconciled(verdict: str, finding: OutcomeFinding, entry: Entry) -> str:
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


def _outcome_in_words(finding: OutcomeFinding, request: Request, facts: Facts) -> str:
    pairs = f"{finding.num_valid} of {len(request.seeds)} pairs"
    if finding.word == "identical":
        every = f"all {len(request.seeds)} pairs" if len(request.seeds) > 1 else "the one pair"
        both = f" Under {finding.failures.both} seeds both arms diverged." if finding.failures.both else ""
        return f"Weights and yardsticks are equal bit for bit in {every} ({facts.scope}).{both}"
    effects = "; ".join(_effect(name, finding, request) for name in request.primary if name in finding.metrics)
    known = {
        "equivalent": f"Equivalent within the margins over {pairs}: {effects}.",
        "different": f"Another model: {'; '.join(finding.reasons)}.",
        "not_run": f"Not decided: {'; '.join(finding.reasons)}.",
    }
    provisional = "provisionally equivalent, but " if finding.provisional else ""
    inconclusive = f"Inconclusive over {pairs}: {provisional}{'; '.join(finding.reasons)}.{_advice(finding)}"
    return known.get(finding.word, inconclusive)


def _effect(name: str, finding: OutcomeFinding, request: Request) -> str:
    metric, margin = finding.metrics[name], request.margins.get(name)
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


def rate_of(arm: str, cells: Cells) -> float:
    """What an arm's loss declares its learning rate to be multiplied by."""
    made = next((cell.record.made_from for replica, cell in cells.items() if replica.arm == arm), {})
    return float(made.get("loss", {}).get("lr_scale", 1))


def would_have_caught(finding: OutcomeFinding, entry: Entry, trajectory: Envelope, request: Request) -> str | None:
    """The smallest difference that this check would have noticed, in words, on both axes."""
    noticed = []
    if finding.word == "identical":
        noticed.append("one bit in any weight or yardstick of any pair")
    if finding.word == "equivalent":
        limits = ", ".join(f"{name} {request.margins[name]:g}" for name in request.primary)
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


def _failures(candidate: str, cells: Cells, damaged: Damaged, request: Request, facts: Facts) -> list[dict[str, Any]]:
    failures = []
    for seed in request.seeds:
        replica = Replica(candidate, seed)
        cell, reference = cells.get(replica), cells.get(Replica(request.reference, seed))
        status = status_of(cell, reference, facts)
        if status == "missing":
            cause = f"damaged, {damaged[replica]}; train it again" if replica in damaged else "missing"
            failures.append({"seed": seed, "step": None, "cause": cause})
        elif status == "diverged" and cell is not None:
            cause = cell.record.cause or "its test NLL is no better than the classes' frequencies, the reference's was"
            failures.append({"seed": seed, "step": cell.record.diverged_at, "cause": cause})
    return failures


def metric_entries(finding: OutcomeFinding) -> dict[str, dict[str, Any]]:
    """What is said of each metric."""
    return {name: _metric(metric) for name, metric in finding.metrics.items()}


def _metric(finding: Any) -> dict[str, Any]:
    """A metric's entry; null for what was not computed."""
    names = (
        "mean_difference",
        "ci_tost",
        "ci_difference",
        "level",
        "margin",
        "p_tost",
        "n",
        "pair_correlation",
    )
    return {name: _strict(getattr(finding, name)) for name in names}


def _strict(value: Any) -> Any:
    if isinstance(value, tuple | list | np.ndarray):
        return [_strict(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def audit_in_force(audit: Mapping[str, Any] | None, cells: Cells, request: Request) -> dict[str, Any] | None:
    """The audit without what it says of another reference or of other code than the cells were made with."""
    if audit is None:
        return None
    about = {name for name in request.candidates if audited_entry(name, audit, cells, request) is not None}
    losses = {name: entry for name, entry in audit["losses"].items() if name in about}
    return {**audit, "losses": losses} if losses else None


def audited_entry(candidate: str, audit: Mapping[str, Any] | None, cells: Cells, request: Request) -> Entry | None:
    """The candidate's entry in audit.json, where it is about the code that the cells were made with."""
    if audit is None or audit["reference"] != request.reference or candidate not in audit["losses"]:
        return None
    entry: Entry = audit["losses"][candidate]
    about = {candidate: entry["made_from"], request.reference: audit["reference_made_from"]}
    for replica, cell in cells.items():
        known = about.get(replica.arm, {})
        if any(cell.record.made_from.get(key) != value for key, value in known.items()):
            return None
    return _at_weights(_at_precision(entry))


def _at_precision(entry: Entry) -> Entry:
    """The entry with what bfloat16 adds to it, where the trial trains in it."""
    at = entry.get("at_precision")
    if at is None or at["objective"] in ("not_run", "error"):
        return entry
    covered = [*entry["covered"], *at["covered"]]
    if entry["objective"] in SAME and at["objective"] not in SAME:
        said = f"the same function in float32 and float64, but not in bfloat16: {at['sentence']}"
        return {**entry, "objective": "different", "sentence": said, "covered": covered}
    word = "rounding" if entry["objective"] == "identical" else entry["objective"]
    if at["objective"] != "identical":  # the weaker of the two
        return {
            **entry,
            "objective": word,
            "sentence": f"{entry['sentence']}; in bfloat16 {at['sentence']}",
            "covered": covered,
        }
    return {**entry, "covered": covered}


def _at_weights(entry: Entry) -> Entry:
    """The entry with what the trial's own logits add to it: a difference there is a difference."""
    at = entry.get("at_weights")
    if at is None or at["objective"] in ("not_run", "error"):
        return entry
    steps = ", ".join(map(str, at["about"]["steps"]))
    covered = [*entry["covered"], f"the reference's own logits at steps {steps} (seed {at['about']['seed']})"]
    if entry["objective"] in SAME and at["objective"] not in SAME:
        said = f"the same function on the grid, but not at this trial's own weights: {at['sentence']}"
        return {**entry, "objective": "different", "sentence": said, "covered": covered}
    return {**entry, "covered": covered}


def decide(
    cells: Cells,
    request: Request,
    facts: Facts,
    header: Mapping[str, Any],
    audit: Mapping[str, Any] | None = None,
    look: Look | None = None,
    damaged: Damaged | None = None,
) -> dict[str, Any]:
    """The content of verdict.json.

    Args:
        header: what it is about: sweep, dataset, model and so on.
        audit: the content of audit.json, where the losses were audited.
        look: which look at the data this is; the first and only one where none is given.
        damaged: what is wrong with cells that are there and cannot be counted.
    """
    damaged = damaged or {}
    look = look or Look(1, level_of(request.alpha, request.looks, 1), request.alpha, request.looks)
    found = outcomes(cells, request, facts, look)
    in_force = replace(request, alpha=look.alpha, looks=look.declared)
    protocol = {
        "hash": in_force.protocol_hash, "alpha": look.alpha, "looks": look.declared, "look": look.number,
        "level": look.level, "margins": dict(request.margins) or None, "primary": list(request.primary),
    }  # fmt: skip
    controls = control_findings(cells, request, facts, look)
    tested = {name: metric_entries(finding) for name, finding in controls.pop("findings").items()}
    entries = {name: audited_entry(name, audit, cells, request) or UNAUDITED for name in request.candidates}
    comparisons = [
        comparison(name, found[name], entry, controls, cells, damaged, request, facts)
        for name, entry in entries.items()
    ]
    return {
        "schema": SCHEMA,
        **header,
        "about": request.about,
        "reference": request.reference,
        "seeds": list(request.seeds),
        "protocol": protocol,
        "controls": controls | {"metrics": tested},
        "reference_failures": _failures(request.reference, cells, damaged, request, facts),
        "comparisons": comparisons,
    }
