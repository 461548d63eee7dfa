"""The two axes into one word, the sentence that explains it, and the JSON contract."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.cells import Cell
from pipeline.looks import Look, level_of
from pipeline.objectives import Replica
from pipeline.pairs import YARDSTICKS, Status
from pipeline.statistics import OutcomeFinding, compare, correct_for_arms

SCHEMA = 1
SAME = frozenset({"identical", "rounding", "offset", "equivalent"})


@dataclass(frozen=True)
class Request:
    """What is asked of a trial's cells: fixed before the data and hashed into the verdict."""

    losses: tuple[str, ...]
    seeds: tuple[int, ...]
    reference: str
    about: str
    expect: Mapping[str, str]
    margins: Mapping[str, float]
    primary: tuple[str, ...]
    alpha: float
    max_seeds: int
    looks: int = 1

    @property
    def candidates(self) -> list[str]:
        """The losses that are compared with the reference."""
        return [loss for loss in self.losses if loss != self.reference]

    @property
    def protocol_hash(self) -> str:
        """SHA-256 over all that must not be chosen after the data were seen."""
        fixed = {
            "expect": dict(self.expect), "margins": dict(self.margins), "primary": self.primary, "about": self.about,
            "looks": self.looks, "alpha": self.alpha, "max_seeds": self.max_seeds,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Facts:
    """What the yardsticks mean for this dataset.

    Attributes:
        num_classes: C.
        label_entropy: entropy of the training labels' frequencies in nats; a model that does no better learned nothing.
        scope: what a verdict is limited to, in words.
        command: how to get the trial again.
    """

    num_classes: int
    label_entropy: float
    scope: str
    command: str


Cells = Mapping[Replica, Cell]
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
UNAUDITED: Entry = {
    "objective": "not_run", "sentence": "", "scale": None, "offset": None, "domain": None, "side_effects": [],
    "covered": [], "not_covered": ["the losses themselves"], "would_have_caught": {},
}  # fmt: skip


def status_of(cell: Cell | None, reference: Cell | None, facts: Facts) -> Status:
    """ok, diverged or missing. A finite model that learned nothing while its reference did has diverged too."""
    if cell is None:
        return "missing"
    if cell.record.diverged_at is not None:
        return "diverged"
    both = (c.yardsticks["test/nll"] if c else math.nan for c in (cell, reference))
    mine, reference_nll = both
    return "diverged" if mine >= facts.label_entropy > reference_nll else "ok"


def outcomes(cells: Cells, request: Request, facts: Facts, look: Look | None = None) -> dict[str, OutcomeFinding]:
    """The outcome axis for every candidate at a look's level, corrected for their number."""
    look = look or Look(1, level_of(request.alpha, request.looks, 1))
    found = {name: _outcome(name, cells, request, facts, look) for name in request.candidates}
    return correct_for_arms(found)


def _outcome(candidate: str, cells: Cells, request: Request, facts: Facts, look: Look) -> OutcomeFinding:
    theirs = [cells.get(Replica(request.reference, seed)) for seed in request.seeds]
    mine = [cells.get(Replica(candidate, seed)) for seed in request.seeds]
    identical = [
        a is not None and b is not None and a.record.weights_sha256 == b.record.weights_sha256
        for a, b in zip(mine, theirs, strict=True)
    ]
    unpaired = [
        seed
        for seed, a, b in zip(request.seeds, mine, theirs, strict=True)
        if a is not None and b is not None and a.record.initial_sha256 != b.record.initial_sha256
    ]
    found = compare(
        _finals(mine),
        _finals(theirs),
        primary=request.primary,
        margins=request.margins,
        num_classes=facts.num_classes,
        candidate_status=[status_of(a, b, facts) for a, b in zip(mine, theirs, strict=True)],
        reference_status=[status_of(b, None, facts) for b in theirs],
        bitwise_identical=identical,
        alpha=look.level,
        next_alpha=level_of(request.alpha, request.looks, look.number + 1),
        max_seeds=request.max_seeds,
    )
    if unpaired:
        return _undecided(found, f"the pairs did not begin with equal weights (seeds {', '.join(map(str, unpaired))})")
    if any(map(_never_moved, (*mine, *theirs))):
        return _undecided(found, "the weights of some runs never moved")
    finished = [cell for cell in theirs if cell is not None and cell.record.diverged_at is None]
    if found.word == "equivalent" and all(_learned_nothing(cell, facts) for cell in finished):
        return _undecided(found, "the reference learned nothing: it does no better than the classes' frequencies")
    return found


def _undecided(finding: OutcomeFinding, reason: str) -> OutcomeFinding:
    """Fail closed: two dead models agree about everything, which says nothing."""
    return replace(finding, word="inconclusive", reasons=(reason,), provisional=False, seeds_needed=None)


def _never_moved(cell: Cell | None) -> bool:
    return cell is not None and cell.record.weights_sha256 == cell.record.initial_sha256


def _learned_nothing(cell: Cell, facts: Facts) -> bool:
    return cell.yardsticks["test/nll"] >= facts.label_entropy


def _finals(cells: Sequence[Cell | None]) -> dict[str, list[float]]:
    return {
        metric: [math.nan if cell is None else cell.yardsticks[f"test/{metric}"] for cell in cells]
        for metric in YARDSTICKS
    }


def word(about: str, objective: str, outcome: str) -> str:
    """One word for both axes; the axis that the request is about, checked against the other."""
    if objective in ("identical", "rounding", "offset") and outcome == "different":
        return "conflict"
    if about == "outcome":
        return outcome
    if objective in ("not_run", "error"):
        return outcome
    if objective in ("identical", "rounding", "offset"):
        return "identical" if outcome == "identical" else "rounding"
    return "different"


def confirms(expected: str, verdict: str, objective: str, outcome: str) -> bool:
    """Whether an expectation holds: `same`, or the word of the verdict or of either axis."""
    return verdict in SAME if expected == "same" else expected in (verdict, objective, outcome)


def comparison(
    candidate: str, finding: OutcomeFinding, audited: Entry | None, cells: Cells, request: Request, facts: Facts
) -> dict[str, Any]:
    """One entry of `comparisons` in verdict.json; `audited` is the candidate's entry in audit.json."""
    entry: Entry = audited or UNAUDITED
    objective = entry["objective"]
    verdict = word(request.about, objective, finding.word)
    expected = request.expect.get(candidate)
    return {
        "loss": candidate,
        "objective": objective,
        "scale": entry["scale"],
        "offset": entry["offset"],
        "domain": entry["domain"],
        "side_effects": entry["side_effects"],
        "outcome": finding.word,
        "seeds_needed": finding.seeds_needed if finding.word == "inconclusive" else None,
        "verdict": verdict,
        "sentence": sentence(finding, entry, request, facts),
        "expected": expected,
        "confirmed": None if expected is None else confirms(expected, verdict, objective, finding.word),
        "assay_sensitivity": None,
        "would_have_caught": would_have_caught(finding, entry, request),
        "covered": [facts.scope, *entry["covered"]],
        "not_covered": ["other data, splits, hyperparameters and devices", *entry["not_covered"]],
        "failures": _failures(candidate, cells, request, facts),
        "metrics": {name: _metric(metric) for name, metric in finding.metrics.items()},
    }


def sentence(finding: OutcomeFinding, entry: Entry, request: Request, facts: Facts) -> str:
    """Both axes in prose, the one that the request is about first."""
    objective = _objective(entry)
    outcome = _outcome_in_words(finding, request, facts)
    if objective is None:
        return f"{outcome} The losses themselves were not audited."
    return f"{objective} {outcome}" if request.about == "objective" else f"{outcome} {objective}"


def _objective(entry: Entry) -> str | None:
    return f"{AS_FUNCTIONS[entry['objective']]}: {entry['sentence']}." if entry["sentence"] else None


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
    if needed is None:
        return ""
    return (
        " No affordable number of seeds would decide it."
        if needed == "unreachable"
        else f" About {needed} seeds would decide it."
    )


def would_have_caught(finding: OutcomeFinding, entry: Entry, request: Request) -> str | None:
    """The smallest difference that this check would have noticed, in words, on both axes."""
    noticed = []
    if finding.word == "identical":
        noticed.append("one bit in any weight or yardstick of any pair")
    if finding.word == "equivalent":
        limits = ", ".join(f"{name} {request.margins[name]:g}" for name in request.primary)
        noticed.append(f"a true mean difference at the margins ({limits}), in {1 - finding.level:.3g} of such studies")
    if power := entry["would_have_caught"]:
        noticed.append(f"in the losses themselves {_smallest(power)}")
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


def _failures(candidate: str, cells: Cells, request: Request, facts: Facts) -> list[dict[str, Any]]:
    failures = []
    for seed in request.seeds:
        cell, reference = cells.get(Replica(candidate, seed)), cells.get(Replica(request.reference, seed))
        status = status_of(cell, reference, facts)
        if status == "missing":
            failures.append({"seed": seed, "step": None, "cause": "missing"})
        elif status == "diverged" and cell is not None:
            cause = cell.record.cause or "it learned nothing, while the reference did"
            failures.append({"seed": seed, "step": cell.record.diverged_at, "cause": cause})
    return failures


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
    return entry


def decide(
    cells: Cells,
    request: Request,
    facts: Facts,
    header: Mapping[str, Any],
    audit: Mapping[str, Any] | None = None,
    look: Look | None = None,
) -> dict[str, Any]:
    """The content of verdict.json.

    Args:
        header: what it is about: sweep, dataset, model and so on.
        audit: the content of audit.json, where the losses were audited.
        look: which look at the data this is; the first and only one where none is given.
    """
    look = look or Look(1, level_of(request.alpha, request.looks, 1))
    found = outcomes(cells, request, facts, look)
    protocol = {
        "hash": request.protocol_hash, "alpha": request.alpha, "looks": request.looks, "look": look.number,
        "level": look.level, "margins": dict(request.margins) or None, "primary": list(request.primary),
    }  # fmt: skip
    return {
        "schema": SCHEMA,
        **header,
        "about": request.about,
        "reference": request.reference,
        "seeds": list(request.seeds),
        "protocol": protocol,
        "reference_failures": _failures(request.reference, cells, request, facts),
        "comparisons": [
            comparison(name, found[name], audited_entry(name, audit, cells, request), cells, request, facts)
            for name in request.candidates
        ],
    }
