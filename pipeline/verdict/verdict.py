"""The two axes into one word, the sentence that explains it, and the JSON contract."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from likelihood_lab.audit.finding import strict
from likelihood_lab.stats.outcome import OutcomeFinding
from likelihood_lab.stats.trajectory import Envelope
from pipeline.console import console
from pipeline.entry import ExitCode
from pipeline.replica import Replica
from pipeline.verdict.describe import Entry, reconciled, sentence, would_have_caught
from pipeline.verdict.outcomes import (
    Cells,
    control_findings,
    controls_in_words,
    envelope_of,
    outcomes,
    rank_test_of,
    status_of,
)
from pipeline.verdict.plan import AnalysisPlan, Look, TrialContext, level_of

SCHEMA = 1
SAME = frozenset({"identical", "rounding", "offset", "equivalent"})


Damaged = Mapping[Replica, str]

PARTED = {"outside": "different"}
ANOTHER_RATE = Envelope("not_applicable", reason="it was trained at another learning rate")


UNAUDITED: Entry = {
    "objective": "not_run", "sentence": "", "scale": None, "offset": None, "domain": None, "side_effects": [],
    "covered": [], "not_covered": ["the losses themselves"], "would_have_caught": {},
}  # fmt: skip


def exit_code_of(entries: Sequence[tuple[str, str, Mapping[str, Any]]]) -> ExitCode:
    """Each expectation that does not hold, and the exit code; entries are (loss, word, entry)."""
    judged = [found for found in entries if found[2]["confirmed"] is not None]
    failed = [found for found in judged if not found[2]["confirmed"]]
    for loss, word, entry in failed:
        console.print(f"expected {loss}: {entry['expected']}, found {word}")
    if not judged:
        console.print("nothing was asserted (give expect=same, or 'expect={nll: same}', for an exit code)")
        return ExitCode.HOLDS
    console.print(f"{len(judged) - len(failed)} of {len(judged)} expectations hold")
    return ExitCode.REFUTED if failed else ExitCode.HOLDS


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
    plan: AnalysisPlan,
    context: TrialContext,
) -> dict[str, Any]:
    """One entry of `comparisons` in verdict.json; `entry` is the candidate's in audit.json."""
    objective = entry["objective"]
    rate = rate_of(candidate, cells) / rate_of(plan.reference, cells)
    trajectory = envelope_of(candidate, cells, plan) if rate == 1 else ANOTHER_RATE
    ranks = rank_test_of(candidate, cells, plan)
    verdict = word(plan.about, objective, finding.word, trajectory.word, finding.failures.candidate_only > 0, rate)
    expected = plan.expect.get(candidate)
    said = [
        sentence(finding, entry, trajectory, ranks, plan, context),
        "" if rate == 1 else f"It was trained at {rate:g} times the reference's learning rate.",
        reconciled(verdict, finding, entry),
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
        "would_have_caught": would_have_caught(finding, entry, trajectory, plan),
        "covered": [context.scope, *entry["covered"]],
        "not_covered": ["other data, splits, hyperparameters and devices", *entry["not_covered"]],
        "failures": _failures(candidate, cells, damaged, plan, context),
        "metrics": metric_entries(finding),
    }


def rate_of(arm: str, cells: Cells) -> float:
    """What an arm's loss declares its learning rate to be multiplied by."""
    made = next((cell.record.made_from for replica, cell in cells.items() if replica.arm == arm), {})
    return float(made.get("loss", {}).get("lr_scale", 1))


def _failures(
    candidate: str, cells: Cells, damaged: Damaged, plan: AnalysisPlan, context: TrialContext
) -> list[dict[str, Any]]:
    failures = []
    for seed in plan.seeds:
        replica = Replica(candidate, seed)
        cell, reference = cells.get(replica), cells.get(Replica(plan.reference, seed))
        status = status_of(cell, reference, context)
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


def audit_in_force(audit: Mapping[str, Any] | None, cells: Cells, plan: AnalysisPlan) -> dict[str, Any] | None:
    """The audit without what it says of another reference or of other code than the cells were made with."""
    if audit is None:
        return None
    about = {name for name in plan.candidates if audited_entry(name, audit, cells, plan) is not None}
    losses = {name: entry for name, entry in audit["losses"].items() if name in about}
    return {**audit, "losses": losses} if losses else None


def audited_entry(candidate: str, audit: Mapping[str, Any] | None, cells: Cells, plan: AnalysisPlan) -> Entry | None:
    """The candidate's entry in audit.json, where it is about the code that the cells were made with."""
    if audit is None or audit["reference"] != plan.reference or candidate not in audit["losses"]:
        return None
    entry: Entry = audit["losses"][candidate]
    about = {candidate: entry["made_from"], plan.reference: audit["reference_made_from"]}
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
    plan: AnalysisPlan,
    context: TrialContext,
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
    look = look or Look(1, level_of(plan.alpha, plan.looks, 1), plan.alpha, plan.looks)
    found = outcomes(cells, plan, context, look)
    in_force = replace(plan, alpha=look.alpha, looks=look.declared)
    protocol = {
        "hash": in_force.protocol_hash, "alpha": look.alpha, "looks": look.declared, "look": look.number,
        "level": look.level, "margins": dict(plan.margins) or None, "primary": list(plan.primary),
    }  # fmt: skip
    controls = control_findings(cells, plan, context, look)
    tested = {name: metric_entries(finding) for name, finding in controls.pop("findings").items()}
    entries = {name: audited_entry(name, audit, cells, plan) or UNAUDITED for name in plan.candidates}
    comparisons = [
        comparison(name, found[name], entry, controls, cells, damaged, plan, context) for name, entry in entries.items()
    ]
    return {
        "schema": SCHEMA,
        **header,
        "about": plan.about,
        "reference": plan.reference,
        "seeds": list(plan.seeds),
        "protocol": protocol,
        "controls": controls | {"metrics": tested},
        "reference_failures": _failures(plan.reference, cells, damaged, plan, context),
        "comparisons": comparisons,
    }
