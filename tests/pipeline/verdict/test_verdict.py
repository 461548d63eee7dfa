"""Verdicts: the table of words, sentences, expectations, failures and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from pipeline.entry import ExitCode
from pipeline.replica import Replica
from pipeline.storage.cells import Cell
from pipeline.verdict.audit_entry import Audit, AuditEntry
from pipeline.verdict.describe import limits_of_controls
from pipeline.verdict.outcomes import TrialResults, status_of
from pipeline.verdict.plan import AnalysisPlan, Look, TrialContext
from pipeline.verdict.results import Comparison, ControlResults, Failure, Replay, Verdict
from pipeline.verdict.verdict import check_expectations, confirms, decide, verdict_word

CONTEXT = TrialContext(
    num_classes=10, label_entropy=math.log(10), scope="seeds 0-11, 5 steps", command="make equivalence"
)
PLAN = AnalysisPlan(
    losses=("ce", "mine"), seeds=tuple(range(12)), reference="ce", about="objective", expect={},
    margins={"nll": 0.1, "brier": 0.01, "accuracy": 0.01}, primary=("nll", "brier"), alpha=0.05, max_seeds=100,
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    initial_sha256: str = "initial"
    weights_sha256: str = "equal"
    diverged_at: int | None = None
    cause: str | None = None
    made_from: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StubCell:
    """The part of a cell that a verdict reads."""

    nll: float = 0.2
    brier: float = 0.1
    record: Record = Record()

    @property
    def sketches(self) -> tuple[list[int], torch.Tensor]:
        """Weights at the first steps; those of other bits lie a hundredth away."""
        return [1, 3, 10], torch.ones(3, 2) * (1.0 if self.record.weights_sha256 == "equal" else 1.01)

    def distances_from(self, reference: StubCell) -> list[tuple[int, float]]:
        return Cell.distances_from(self, reference)  # type: ignore[arg-type]

    @property
    def metrics(self) -> dict[str, float]:
        return {"test/nll": self.nll, "test/brier": self.brier, "test/accuracy": 0.95, "test/ece": 0.02}


EQUAL = dict.fromkeys(PLAN.seeds, StubCell())
OTHER = dict.fromkeys(PLAN.seeds, StubCell(nll=0.9, brier=0.5, record=Record(weights_sha256="other")))


def shifted(nll: float = 0.2) -> dict[int, StubCell]:
    """Other models with about this NLL; the differences vary a little from seed to seed."""
    wobbles = {seed: 0.001 * (seed % 5 - 2) for seed in PLAN.seeds}
    return {
        seed: StubCell(nll * (1 + wobble), 0.1 + 0.1 * wobble, Record(weights_sha256=f"other {seed}"))
        for seed, wobble in wobbles.items()
    }


def audited(objective: str, **fields: Any) -> Audit:
    """An audit of the one loss."""
    entry = AuditEntry(
        objective, "the reason", covered=["the grid"], not_covered=["soft targets"],
        would_have_caught={"label smoothing": {"float32": 3e-6, "float64": 1e-14}},
    )  # fmt: skip
    return Audit("ce", losses={"mine": replace(entry, **fields)})


def verdict_of(
    mine: Mapping[int, StubCell], plan: AnalysisPlan = PLAN, audit: Audit | None = None, **controls: StubCell
) -> Verdict:
    """`controls`: the cell of a control under every seed."""
    plan = replace(plan, controls=tuple(controls))
    cells = {Replica("ce", seed): StubCell() for seed in plan.seeds}
    cells |= {Replica("mine", seed): cell for seed, cell in mine.items()}
    cells |= {Replica(name, seed): cell for name, cell in controls.items() for seed in plan.seeds}
    results = TrialResults(cells, plan, CONTEXT, Look(1, plan.alpha), {Replica("mine", 3): "state.pt is missing"})  # type: ignore[arg-type]
    return decide(results, {"sweep": "s", "dataset": "d", "model": "m"}, audit)


def compared(mine: Mapping[int, StubCell], plan: AnalysisPlan = PLAN, audit: Audit | None = None) -> Comparison:
    (found,) = verdict_of(mine, plan, audit).comparisons
    return found


@pytest.mark.parametrize(
    ("about", "objective", "outcome", "expected"),
    [
        ("objective", "identical", "identical", "identical"),
        ("objective", "offset", "identical", "identical"),
        ("objective", "rounding", "equivalent", "rounding"),
        ("objective", "identical", "inconclusive", "rounding"),
        ("objective", "offset", "not_run", "rounding"),
        ("objective", "rounding", "different", "conflict"),
        ("objective", "scaled", "identical", "different"),
        ("objective", "domain", "equivalent", "different"),
        ("objective", "not_run", "identical", "identical"),
        ("objective", "error", "inconclusive", "inconclusive"),
        ("objective", "not_run", "different", "different"),
        ("outcome", "scaled", "equivalent", "equivalent"),
        ("outcome", "identical", "different", "conflict"),
        ("outcome", "not_run", "identical", "identical"),
    ],
)
def test_verdict_word_is_that_of_the_table(about: str, objective: str, outcome: str, expected: str) -> None:
    assert verdict_word(about, objective, outcome) == expected


def test_verdict_word_contradicted_by_envelope_or_divergence() -> None:
    assert verdict_word("objective", "identical", "equivalent", "outside") == "conflict"
    assert verdict_word("objective", "identical", "equivalent", diverged=True) == "conflict"
    assert verdict_word("objective", "identical", "equivalent", "outside", rate=2.0) == "equivalent"
    assert verdict_word("objective", "scaled", "equivalent", "outside", diverged=True) == "different"


# --- audit and outcome


def test_audit_decides_the_objective() -> None:
    found = compared(EQUAL, audit=audited("identical"))
    assert (found.objective, found.outcome, found.verdict) == ("identical",) * 3
    assert found.sentence.startswith("The same function, bit for bit: the reason.")
    assert "not audited" not in found.sentence
    assert found.covered == [CONTEXT.scope, "the grid"]
    assert found.not_covered is not None
    assert "soft targets" in found.not_covered
    assert found.would_have_caught == (
        "one bit in any weight or metric of any pair; "
        "in the losses themselves label smoothing by 3e-06 in float32 and 1e-14 in float64"
    )


def test_about_outcome_puts_the_outcome_first() -> None:
    found = compared(EQUAL, replace(PLAN, about="outcome"), audited("scaled"))
    assert found.verdict == "identical"
    assert found.sentence.startswith("Weights and metrics are equal bit for bit")
    assert "A multiple of the same function: the reason. It has the same minimiser." in found.sentence


def test_same_function_and_other_model_conflict() -> None:
    found = compared(OTHER, audit=audited("rounding"))
    assert (found.outcome, found.verdict) == ("different", "conflict")


def test_conflict_by_divergence_names_the_domain_limit() -> None:
    limit = {"axis": "gap", "limit": 90.16, "behaviour": "gradient is NaN"}
    dead = StubCell(record=Record(weights_sha256="other", diverged_at=300, cause="the objective is not finite"))
    found = compared(dict.fromkeys(PLAN.seeds, dead), audit=audited("rounding", domain=limit))
    assert (found.outcome, found.verdict) == ("different", "conflict")
    assert found.sentence.endswith("for which the functions differ (gap 90.16: the gradient is NaN).")


def test_another_learning_rate_leaves_the_outcome_to_decide() -> None:
    """An identical function at another rate is not the same on the strength of its audit."""
    made = {"loss": {"lr_scale": 10.0}}
    far = StubCell(nll=0.9, brier=0.5, record=Record(weights_sha256="other", made_from=made))
    found = compared(dict.fromkeys(PLAN.seeds, far), audit=audited("rounding"))
    assert found.verdict == "different"
    assert "trained at 10 times the reference's learning rate" in found.sentence
    assert found.envelope.reason == "it was trained at another learning rate"
    noisy = {s: StubCell(0.2 + 0.1 * (s % 2), record=Record("initial", f"{s}", made_from=made)) for s in PLAN.seeds}
    found = compared(noisy, replace(PLAN, expect={"mine": "same"}), audited("identical"))
    assert (found.outcome, found.verdict, found.confirmed) == ("inconclusive", "inconclusive", False)


def test_without_an_audit_the_outcome_decides_and_says_so() -> None:
    found = compared(EQUAL, audit=audited("error"))
    assert found.verdict == "identical"
    assert "The audit failed: the reason." in found.sentence
    found = compared(EQUAL)
    assert found.verdict == found.outcome == "identical"
    assert CONTEXT.scope in found.sentence
    assert "not audited" in found.sentence
    assert found.confirmed is None


@pytest.mark.parametrize(
    ("mine", "margins", "outcome"),
    [
        (EQUAL | {3: StubCell(record=Record(weights_sha256="other"))}, PLAN.margins, "equivalent"),
        (shifted(), PLAN.margins, "equivalent"),
        (shifted(nll=0.4), PLAN.margins, "different"),
        (shifted(), {}, "inconclusive"),
    ],
    ids=["one pair with other bits", "small difference", "large difference", "no margins"],
)
def test_outcome_of_paired_differences(mine: dict[int, StubCell], margins: dict[str, float], outcome: str) -> None:
    found = compared(mine, replace(PLAN, margins=margins))
    assert found.verdict == found.outcome == outcome
    assert ("nll 0.1" in (found.would_have_caught or "")) == (outcome == "equivalent")


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (Record(made_from={"loss": {"lr_scale": 3.0}}), "loss between seeds"),
        (Record(made_from={"device": "cuda", "torch": "2.14.1"}), "not made alike: device, torch differ"),
        (Record(initial_sha256="other"), "initial weights differ within pairs (seeds 5)"),
    ],
)
def test_unlike_pairs_are_inconclusive(record: Record, text: str) -> None:
    found = compared(EQUAL | {5: StubCell(record=record)})
    assert found.outcome == "inconclusive"
    assert text in found.sentence


# --- failed runs


@pytest.mark.parametrize(("seed", "cause"), [(4, "missing"), (3, "damaged, state.pt is missing; train it again")])
def test_missing_cell_rules_out_sameness(seed: int, cause: str) -> None:
    found = compared({s: cell for s, cell in EQUAL.items() if s != seed})
    assert found.failures == [Failure(seed, None, cause)]
    assert found.verdict == "inconclusive"


def test_diverged_runs_are_different_and_listed_by_seed() -> None:
    dead = StubCell(math.nan, math.nan, Record(weights_sha256="nan", diverged_at=1, cause="not finite"))
    found = compared(dict.fromkeys(PLAN.seeds, dead))
    assert found.verdict == "different"
    assert found.failures == [Failure(seed, 1, "not finite") for seed in PLAN.seeds]


def test_metric_that_is_not_finite_is_a_failure() -> None:
    found = compared(EQUAL | {2: StubCell(nll=math.nan)})
    assert found.outcome == "inconclusive"
    assert [failure.seed for failure in found.failures] == [2]


def test_model_that_learned_nothing_diverged_if_its_reference_learned() -> None:
    idle, learned = StubCell(nll=2.4), StubCell(nll=0.2)
    assert status_of(idle, learned, CONTEXT) == "diverged"  # type: ignore[arg-type]
    assert status_of(idle, idle, CONTEXT) == "ok"  # type: ignore[arg-type]
    assert status_of(None, learned, CONTEXT) == "missing"  # type: ignore[arg-type]


# --- controls


@pytest.mark.parametrize(
    ("dose", "sensitivity"),
    [
        (StubCell(nll=0.9, brier=0.5, record=Record(weights_sha256="dose")), (True, True, True)),
        (StubCell(), (True, False, False)),
    ],
)
def test_assay_sensitivity_needs_placebos_equal_and_dose_different(
    dose: StubCell, sensitivity: tuple[bool, bool, bool]
) -> None:
    verdict = verdict_of(EQUAL, placebo_float64=StubCell(), dose=dose, replay=StubCell())
    keys = ("placebo_equivalent", "dose_different", "holds")
    assert verdict.controls.assay_sensitivity == dict(zip(keys, sensitivity, strict=True))
    assert verdict.comparisons[0].assay_sensitivity == verdict.controls.assay_sensitivity
    assert verdict.controls.metrics["dose"]["nll"].margin == 0.1
    assert verdict.controls.replay == Replay(0, True)
    assert verdict_of(EQUAL).controls == ControlResults()


@pytest.mark.parametrize(("dose", "said"), [("different", False), ("equivalent", True), ("inconclusive", True)])
def test_equivalence_beside_an_undetected_dose_says_so(dose: str, said: bool) -> None:
    controls = ControlResults(Replay(0, True), {"dose": dose})
    assert (f"its positive control was called {dose}" in limits_of_controls(controls, "equivalent")) == said
    assert limits_of_controls(controls, "different") == ""


# --- expectations and JSON


@pytest.mark.parametrize(
    ("expected", "verdict", "objective", "outcome", "holds"),
    [
        ("same", "identical", "not_run", "identical", True),
        ("same", "equivalent", "not_run", "equivalent", True),
        ("same", "inconclusive", "not_run", "inconclusive", False),
        ("same", "different", "scaled", "equivalent", False),
        ("scaled", "different", "scaled", "equivalent", True),
        ("identical", "equivalent", "not_run", "equivalent", False),
        ("different", "different", "not_run", "different", True),
    ],
)
def test_expectation_is_confirmed(expected: str, verdict: str, objective: str, outcome: str, holds: bool) -> None:
    assert confirms(expected, verdict, objective, outcome) is holds


def test_expectations_decide_the_exit_code() -> None:
    holds, fails = ("kl", "scaled", "scaled", True), ("nll", "different", "same", False)
    silent = ("ce", "identical", None, None)
    assert check_expectations([holds, silent]) == (ExitCode.HOLDS, ["1 of 1 expectations hold"])
    lines = ["expected nll: same, found different", "1 of 2 expectations hold"]
    assert check_expectations([holds, fails, silent]) == (ExitCode.REFUTED, lines)
    code, (line,) = check_expectations([silent])
    assert code is ExitCode.HOLDS
    assert line.startswith("nothing was asserted")


def test_protocol_is_hashed() -> None:
    changes: list[dict[str, Any]] = [
        {}, {"alpha": 0.01}, {"margins": {"nll": 0.2}}, {"expect": {"mine": "same"}}, {"about": "outcome"},
    ]  # fmt: skip
    assert len({replace(PLAN, **change).protocol_hash for change in changes}) == 5
    assert verdict_of({}).protocol.hash == PLAN.protocol_hash


def test_json_of_a_verdict_is_strict_and_reads_back() -> None:
    dead = StubCell(math.nan, math.nan, Record(weights_sha256="nan", diverged_at=1))
    verdict = verdict_of(EQUAL | {1: dead}, audit=audited("rounding"), placebo_float64=StubCell(), replay=StubCell())
    text = json.dumps(verdict.to_json(), allow_nan=False)
    assert json.dumps(Verdict.from_json(json.loads(text)).to_json()) == text


def test_json_of_an_older_verdict_has_defaults() -> None:
    verdict = Verdict.from_json({"reference": "ce", "comparisons": [{"loss": "nll", "metrics": None}], "removed": 1})
    assert (verdict.vary, verdict.controls, verdict.comparisons) == ("all", ControlResults(), [Comparison("nll")])
    with pytest.raises(ValueError, match="Verdict is an object in JSON, got list"):
        Verdict.from_json([])  # type: ignore[arg-type]
