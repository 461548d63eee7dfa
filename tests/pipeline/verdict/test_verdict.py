"""Two axes into one word: DESIGN's table, the sentence, expectations, failures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from pipeline.replica import Replica
from pipeline.storage.cells import Cell
from pipeline.verdict.outcomes import controls_in_words, status_of
from pipeline.verdict.plan import AnalysisPlan, TrialContext
from pipeline.verdict.verdict import confirms, decide, word

FACTS = TrialContext(
    num_classes=10, label_entropy=math.log(10), scope="seeds 0-11, 5 steps", command="make equivalence"
)
REQUEST = AnalysisPlan(
    losses=("ce", "mine"), seeds=tuple(range(12)), reference="ce", about="objective", expect={},
    margins={"nll": 0.1, "brier": 0.01, "accuracy": 0.01}, primary=("nll", "brier"), alpha=0.05, max_seeds=100,
)  # fmt: skip
HEADER = {
    "sweep": "s",
    "dataset": "d",
    "model": "m",
    "optimizer": {},
    "precision": "float32",
    "environment": {},
}


@dataclass(frozen=True)
class Record:
    initial_sha256: str = "initial"
    weights_sha256: str = "equal"
    diverged_at: int | None = None
    cause: str | None = None
    made_from: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StubCell:
    """What a verdict reads of a cell."""

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


def verdict_of(mine: dict[int, StubCell], request: AnalysisPlan = REQUEST, **reference: Any) -> dict[str, Any]:
    cells = {Replica("ce", seed): StubCell(**reference) for seed in request.seeds}
    cells |= {Replica("mine", seed): cell for seed, cell in mine.items()}
    verdict = decide(cells, request, FACTS, HEADER)  # type: ignore[arg-type]
    json.dumps(verdict, allow_nan=False)
    return verdict


def audited(objective: str, **fields: Any) -> dict[str, Any]:
    """An audit.json that knows the one loss."""
    nothing = {"scale": None, "offset": None, "domain": None, "side_effects": [], "covered": ["the grid"]}
    found = {**nothing, "objective": objective, "sentence": "so it was found", "not_covered": ["soft targets"]}
    power = {"would_have_caught": {"label smoothing": {"float32": 3e-6, "float64": 1e-14}}}
    losses = {"mine": found | power | {"made_from": {}} | fields}
    return {"reference": "ce", "reference_made_from": {}, "losses": losses}


def judged(
    audit: dict[str, Any] | None, mine: dict[int, StubCell], request: AnalysisPlan = REQUEST, **damaged: str
) -> dict[str, Any]:
    """`damaged`: what is wrong with a seed's cell, s3="state.pt is missing"."""
    cells = {Replica("ce", seed): StubCell() for seed in request.seeds}
    cells |= {Replica("mine", seed): cell for seed, cell in mine.items()}
    broken = {Replica("mine", int(seed[1:])): what for seed, what in damaged.items()}
    (found,) = decide(cells, request, FACTS, HEADER, audit, damaged=broken)["comparisons"]  # type: ignore[arg-type]
    return dict(found)


def test_the_audit_s_word_is_the_objective_axis() -> None:
    found = judged(audited("identical"), {seed: StubCell() for seed in REQUEST.seeds})
    assert (found["objective"], found["outcome"], found["verdict"]) == ("identical",) * 3
    assert found["sentence"].startswith("The same function, bit for bit: so it was found.")
    assert "not audited" not in found["sentence"]
    assert found["covered"] == [FACTS.scope, "the grid"]
    assert "soft targets" in found["not_covered"]
    assert "label smoothing 3e-06 in float32, label smoothing 1e-14 in float64" in found["would_have_caught"]


def test_about_the_outcome_the_outcome_is_said_first() -> None:
    request = replace(REQUEST, about="outcome")
    found = judged(audited("scaled"), {seed: StubCell() for seed in request.seeds}, request)
    assert found["verdict"] == "identical"
    assert found["sentence"].startswith("Weights and yardsticks are equal bit for bit")
    assert "A multiple of the same function: so it was found. The minimiser is the same" in found["sentence"]


def test_one_function_and_another_model_are_a_conflict() -> None:
    other = StubCell(nll=0.9, brier=0.5, record=Record(weights_sha256="other"))
    found = judged(audited("rounding"), dict.fromkeys(REQUEST.seeds, other))
    assert (found["outcome"], found["verdict"]) == ("different", "conflict")


def test_another_learning_rate_explains_another_model() -> None:
    made = {"loss": {"lr_scale": 10.0}}
    other = StubCell(nll=0.9, brier=0.5, record=Record(weights_sha256="other", made_from=made))
    found = judged(audited("rounding"), dict.fromkeys(REQUEST.seeds, other))
    assert found["verdict"] == "different"
    assert "trained at 10 times the reference's learning rate" in found["sentence"]
    assert found["envelope"]["reason"] == "it was trained at another learning rate"


def test_the_same_function_at_another_rate_is_the_same_only_by_its_outcome() -> None:
    made = {"loss": {"lr_scale": 2.0}}
    noisy = {s: StubCell(nll=0.2 + 0.1 * (s % 2), record=Record(f"{s}", f"{s}", made_from=made)) for s in REQUEST.seeds}
    noisy = {s: replace(cell, record=replace(cell.record, initial_sha256="initial")) for s, cell in noisy.items()}
    found = judged(audited("identical"), noisy, replace(REQUEST, expect={"mine": "same"}))
    assert (found["outcome"], found["verdict"], found["confirmed"]) == ("inconclusive", "inconclusive", False)
    assert word("objective", "identical", "equivalent", rate=2.0) == "equivalent"


def test_cells_of_one_loss_that_were_declared_otherwise_decide_nothing() -> None:
    other = StubCell(record=Record(made_from={"loss": {"lr_scale": 3.0}}))
    mine = {seed: other if seed == 1 else StubCell() for seed in REQUEST.seeds}
    found = judged(audited("identical"), mine)
    assert found["outcome"] == "inconclusive"
    assert "loss between seeds" in found["sentence"]


@pytest.mark.parametrize(("dose", "said"), [("different", False), ("equivalent", True), ("inconclusive", True)])
def test_an_equivalence_beside_a_dose_that_was_not_noticed_says_so(dose: str, said: bool) -> None:
    controls = {"replay": {"seed": 0, "bitwise": True}, "outcomes": {"dose": dose}}
    assert (f"the planted one was called {dose}" in controls_in_words(controls, "equivalent")) == said
    assert controls_in_words(controls, "different") == ""


def test_a_failed_audit_leaves_the_outcome_to_decide() -> None:
    found = judged(audited("error"), {seed: StubCell() for seed in REQUEST.seeds})
    assert found["verdict"] == "identical"
    assert "The audit failed: so it was found." in found["sentence"]


def entry(mine: dict[int, StubCell], request: AnalysisPlan = REQUEST, **reference: Any) -> dict[str, Any]:
    (found,) = verdict_of(mine, request, **reference)["comparisons"]
    return dict(found)


def shifted(seed: int, nll: float = 0.2) -> StubCell:
    """Another model with about this NLL; the differences vary a little from seed to seed."""
    wobble = 0.001 * (seed % 5 - 2)
    return StubCell(nll=nll * (1 + wobble), brier=0.1 + 0.1 * wobble, record=Record(weights_sha256=f"other {seed}"))


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
def test_the_table_of_verdicts(about: str, objective: str, outcome: str, expected: str) -> None:
    assert word(about, objective, outcome) == expected


def test_equal_bits_in_every_pair_are_identical_with_their_scope_and_their_blind_spot() -> None:
    found = entry({seed: StubCell() for seed in REQUEST.seeds})
    assert found["verdict"] == found["outcome"] == "identical"
    assert FACTS.scope in found["sentence"]
    assert "not audited" in found["sentence"]
    assert "one bit" in found["would_have_caught"]


def test_one_pair_with_other_bits_is_not_identical() -> None:
    mine = {seed: StubCell() for seed in REQUEST.seeds} | {3: StubCell(record=Record(weights_sha256="other"))}
    assert entry(mine)["outcome"] == "equivalent"


def test_a_small_paired_difference_is_equivalent_and_says_what_it_would_have_caught() -> None:
    found = entry({seed: shifted(seed) for seed in REQUEST.seeds})
    assert found["verdict"] == "equivalent"
    assert "nll 0.1" in found["would_have_caught"]


def test_a_large_paired_difference_is_different() -> None:
    assert entry({seed: shifted(seed, nll=0.4) for seed in REQUEST.seeds})["verdict"] == "different"


def test_a_missing_cell_is_a_failure_and_rules_out_sameness() -> None:
    found = entry({seed: StubCell() for seed in REQUEST.seeds if seed != 4})
    assert found["failures"] == [{"seed": 4, "step": None, "cause": "missing"}]
    assert found["verdict"] == "inconclusive"


def test_a_diverged_arm_is_reported_seed_by_seed_and_is_different() -> None:
    dead = StubCell(
        nll=math.nan, brier=math.nan, record=Record(weights_sha256="nan", diverged_at=1, cause="not finite")
    )
    found = entry(dict.fromkeys(REQUEST.seeds, dead))
    assert found["verdict"] == "different"
    assert [f["seed"] for f in found["failures"]] == list(REQUEST.seeds)
    assert {(f["step"], f["cause"]) for f in found["failures"]} == {(1, "not finite")}


def test_a_finite_model_that_learned_nothing_beside_one_that_did_has_diverged() -> None:
    idle, learned = StubCell(nll=2.4), StubCell(nll=0.2)
    assert status_of(idle, learned, FACTS) == "diverged"  # type: ignore[arg-type]
    assert status_of(idle, idle, FACTS) == "ok"  # type: ignore[arg-type]
    assert status_of(None, learned, FACTS) == "missing"  # type: ignore[arg-type]


def test_without_margins_nothing_is_ever_equivalent() -> None:
    request = replace(REQUEST, margins={})
    assert entry({seed: shifted(seed) for seed in REQUEST.seeds}, request)["verdict"] == "inconclusive"


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
def test_an_expectation_holds_or_not(expected: str, verdict: str, objective: str, outcome: str, holds: bool) -> None:
    assert confirms(expected, verdict, objective, outcome) is holds


def test_what_is_not_expected_is_neither_confirmed_nor_refuted() -> None:
    assert entry({seed: StubCell() for seed in REQUEST.seeds})["confirmed"] is None


def test_the_protocol_is_hashed() -> None:
    hashes = {
        replace(REQUEST, **change).protocol_hash
        for change in (
            {},
            {"alpha": 0.01},
            {"margins": {"nll": 0.2}},
            {"expect": {"mine": "same"}},
            {"about": "outcome"},
        )
    }
    assert len(hashes) == 5
    assert verdict_of({})["protocol"]["hash"] == REQUEST.protocol_hash


# --- integrity


def test_a_damaged_cell_is_a_hole_that_is_named() -> None:
    found = judged(None, {seed: StubCell() for seed in REQUEST.seeds if seed != 3}, s3="state.pt is missing")
    assert found["outcome"] == "inconclusive"
    assert found["failures"] == [{"seed": 3, "step": None, "cause": "damaged, state.pt is missing; train it again"}]


def test_pairs_of_different_code_or_device_are_never_the_same() -> None:
    other = Record(made_from={"device": "cuda", "torch": "2.14.1"})
    cells = {seed: StubCell(record=other if seed == 5 else Record()) for seed in REQUEST.seeds}
    found = entry(cells)
    assert found["outcome"] == "inconclusive"
    assert "not made alike: device, torch differ" in found["sentence"]


def test_a_yardstick_that_is_no_number_is_a_diverged_run() -> None:
    found = entry({seed: StubCell(nll=math.nan if seed == 2 else 0.2) for seed in REQUEST.seeds})
    assert found["outcome"] == "inconclusive"
    assert [failure["seed"] for failure in found["failures"]] == [2]


def test_a_conflict_by_divergence_names_where_the_function_ends() -> None:
    limit = {"axis": "gap", "limit": 90.16, "behaviour": "gradient is NaN"}
    dead = StubCell(record=Record(weights_sha256="other", diverged_at=300, cause="the objective is not finite"))
    found = judged(audited("rounding", domain=limit), dict.fromkeys(REQUEST.seeds, dead))
    assert (found["outcome"], found["verdict"]) == ("different", "conflict")
    assert found["sentence"].endswith("where the function ends (gap 90.16: the gradient is NaN).")
