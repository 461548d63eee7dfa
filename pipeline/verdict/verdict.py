"""Verdict of a trial: both axes combined into one word, a sentence, and the exit code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from likelihood_lab.audit.finding import SAME_FUNCTION
from likelihood_lab.stats.outcome import OutcomeFinding
from likelihood_lab.stats.trajectory import Envelope
from pipeline.entry import ExitCode
from pipeline.replica import Replica
from pipeline.verdict.audit_entry import NOT_AUDITED, Audit, AuditEntry, entry_in_force
from pipeline.verdict.describe import cause_of_conflict, limits_of_controls, sentence, would_have_caught
from pipeline.verdict.outcomes import (
    Cells,
    TrialResults,
    control_results,
    envelope_of,
    metric_results,
    outcomes,
    status_of,
)
from pipeline.verdict.results import Comparison, ControlResults, Failure, Protocol, Verdict

ANOTHER_RATE = Envelope("not_applicable", reason="it was trained at another learning rate")


def verdict_word(
    about: str,
    objective: str,
    outcome: str,
    trajectory: str = "not_applicable",
    diverged: bool = False,
    rate: float = 1.0,
) -> str:
    """Combine the audit's word (objective) and the training's word (outcome) into one verdict.

    `about` says which word decides. The other word can turn the verdict into `conflict`.

    Args:
        trajectory: the envelope's word. If the audit found the same function, `outside` gives `conflict`.
        diverged: True if the candidate diverged in a pair in which the reference did not. If the audit found the same
            function, this gives `conflict`.
        rate: the candidate's learning rate divided by the reference's. If it is not 1, training differs even for the
            same function, so the outcome alone decides.
    """
    same_function = objective in SAME_FUNCTION
    if same_function and rate != 1:
        return outcome
    if same_function and (diverged or outcome == "different" or trajectory == "outside"):
        return "conflict"
    if about == "outcome" or objective in ("not_run", "error"):
        return outcome
    if same_function:
        return "identical" if outcome == "identical" else "rounding"
    return "different"


def confirms(expected: str, verdict: str, objective: str, outcome: str) -> bool:
    """An expectation holds if it is the word of the verdict or of an axis; `same` if the verdict is a sameness."""
    if expected == "same":
        return verdict in (*SAME_FUNCTION, "equivalent")
    return expected in (verdict, objective, outcome)


def check_expectations(
    entries: Iterable[tuple[str, str, str | None, bool | None]],
) -> tuple[ExitCode, list[str]]:
    """Return the exit code and the lines that explain it.

    Args:
        entries: loss, the word that was found, the expected one, and whether that is confirmed (None: not expected).
    """
    judged = [entry for entry in entries if entry[-1] is not None]
    if not judged:
        return ExitCode.HOLDS, ["nothing was asserted (give expect=same, or 'expect={nll: same}', for an exit code)"]
    lines = [f"expected {loss}: {expected}, found {word}" for loss, word, expected, holds in judged if not holds]
    code = ExitCode.REFUTED if lines else ExitCode.HOLDS
    return code, [*lines, f"{len(judged) - len(lines)} of {len(judged)} expectations hold"]


def decide(results: TrialResults, header: Mapping[str, Any], audit: Audit | None = None) -> Verdict:
    """Return the verdict.

    Args:
        header: the fields that describe the trial: sweep, dataset, model and so on.
        audit: the content of audit.json, where the losses were audited.
    """
    plan, look = results.plan, results.look
    findings, controls = outcomes(results), control_results(results)
    comparisons = [
        _comparison(name, findings[name], entry_in_force(name, audit, results) or NOT_AUDITED, controls, results)
        for name in plan.candidates
    ]
    return Verdict(
        **header,
        about=plan.about,
        reference=plan.reference,
        seeds=list(plan.seeds),
        protocol=Protocol(
            hash=replace(plan, alpha=look.alpha, looks=look.declared).protocol_hash,
            alpha=look.alpha,
            looks=look.declared,
            look=look.number,
            level=look.level,
            margins=dict(plan.margins) or None,
            primary=list(plan.primary),
        ),
        controls=controls,
        reference_failures=_failures(plan.reference, results),
        comparisons=comparisons,
    )


def _comparison(
    candidate: str, finding: OutcomeFinding, entry: AuditEntry, controls: ControlResults, results: TrialResults
) -> Comparison:
    plan, context = results.plan, results.context
    rate = _rate_of(candidate, results.cells) / _rate_of(plan.reference, results.cells)
    trajectory = envelope_of(candidate, results) if rate == 1 else ANOTHER_RATE
    diverged = finding.failures.candidate_only > 0
    verdict = verdict_word(plan.about, entry.objective, finding.word, trajectory.word, diverged, rate)
    expected = plan.expect.get(candidate)
    sentences = [
        sentence(finding, entry, trajectory, plan, context),
        "" if rate == 1 else f"It was trained at {rate:g} times the reference's learning rate.",
        cause_of_conflict(verdict, finding, entry),
        limits_of_controls(controls, finding.word),
    ]
    return Comparison(
        loss=candidate,
        objective=entry.objective,
        scale=entry.scale,
        offset=entry.offset,
        domain=entry.domain,
        side_effects=entry.side_effects,
        outcome=finding.word,
        envelope=trajectory,
        seeds_needed=finding.seeds_needed if finding.word == "inconclusive" else None,
        verdict=verdict,
        sentence=" ".join(filter(None, sentences)),
        expected=expected,
        confirmed=None if expected is None else confirms(expected, verdict, entry.objective, finding.word),
        assay_sensitivity=controls.assay_sensitivity,
        would_have_caught=would_have_caught(finding, entry, trajectory, plan),
        covered=[context.scope, *entry.covered],
        not_covered=["other data, splits, hyperparameters and devices", *entry.not_covered],
        failures=_failures(candidate, results),
        metrics=metric_results(finding),
    )


def _rate_of(arm: str, cells: Cells) -> float:
    """Factor on the learning rate that the arm's loss declares."""
    made = next((cell.record.made_from for replica, cell in cells.items() if replica.arm == arm), {})
    return float(made.get("loss", {}).get("lr_scale", 1))


def _failures(arm: str, results: TrialResults) -> list[Failure]:
    failures = []
    references = results.cells_of(results.plan.reference)
    for seed, cell, reference in zip(results.plan.seeds, results.cells_of(arm), references, strict=True):
        status = status_of(cell, reference, results.context)
        if cell is None:
            why = results.damaged.get(Replica(arm, seed))
            failures.append(Failure(seed, None, f"damaged, {why}; train it again" if why else "missing"))
        elif status == "diverged":
            cause = cell.record.cause or "its test NLL is no better than the class frequencies give, the reference's is"
            failures.append(Failure(seed, cell.record.diverged_at, cause))
    return failures
