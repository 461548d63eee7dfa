"""From cells to the outcome axis: what is asked of them, how each run ended, and the finding for every arm."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.cells import Cell
from pipeline.controls import CANDIDATE, REPLAY
from pipeline.looks import Look, level_of
from pipeline.objectives import Replica
from pipeline.pairs import Status, measured_in
from pipeline.statistics import OutcomeFinding, compare, correct_for_arms


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
    controls: tuple[str, ...] = ()

    @property
    def candidates(self) -> list[str]:
        """The losses that are compared with the reference."""
        return [loss for loss in self.losses if loss != self.reference]

    @property
    def question(self) -> str:
        """What a look at the same seeds may ask otherwise: the reference, the margins and what decides."""
        asked = {"reference": self.reference, "margins": dict(self.margins), "primary": list(self.primary)}
        return json.dumps(asked, sort_keys=True)

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
        label_entropy: entropy of the classes' frequencies in training in nats; a model that does no better learned
            nothing.
        scope: what a verdict is limited to, in words.
        command: how to get the trial again.
    """

    num_classes: int
    label_entropy: float
    scope: str
    command: str


Cells = Mapping[Replica, Cell]


def wanted(request: Request) -> list[Replica]:
    """Every (arm, seed) that the request is about."""
    return [Replica(loss, seed) for loss in request.losses for seed in request.seeds]


def wanted_controls(request: Request) -> list[Replica]:
    """The controls beside them: a replay under the first seed, the others under every seed."""
    return [
        Replica(name, seed)
        for name in request.controls
        for seed in (request.seeds[:1] if name == REPLAY else request.seeds)
    ]


def own_controls(controls: Cells, cells: Cells, request: Request) -> dict[Replica, Cell]:
    """The controls that were made of the reference that is asked about; those of another one say nothing."""
    known = next((cell for replica, cell in cells.items() if replica.arm == request.reference), None)
    if known is None:
        return {}
    declared = known.record.made_from.get("loss", {})
    return {
        replica: cell
        for replica, cell in controls.items()
        if replica.arm.startswith(CANDIDATE)
        or {**declared, "control": replica.arm}.items() <= cell.record.made_from["loss"].items()
    }


def status_of(cell: Cell | None, reference: Cell | None, facts: Facts) -> Status:
    """How a run ended: a finite model that learned nothing while its reference did, or cannot be scored, diverged."""
    if cell is None:
        return "missing"
    if cell.record.diverged_at is not None or not all(
        math.isfinite(cell.yardsticks[f"test/{metric}"]) for metric in measured_in([cell.yardsticks])
    ):
        return "diverged"
    both = (c.yardsticks["test/nll"] if c else math.nan for c in (cell, reference))
    mine, reference_nll = both
    return "diverged" if mine >= facts.label_entropy > reference_nll else "ok"


def outcomes(cells: Cells, request: Request, facts: Facts, look: Look | None = None) -> dict[str, OutcomeFinding]:
    """The outcome axis for every candidate at a look's level, corrected for their number."""
    look = look or Look(1, level_of(request.alpha, request.looks, 1), request.alpha, request.looks)
    found = {name: outcome_of(name, cells, request, facts, look) for name in request.candidates}
    return correct_for_arms(found)


def outcome_of(candidate: str, cells: Cells, request: Request, facts: Facts, look: Look) -> OutcomeFinding:
    """The outcome of one arm against the reference, as if it were the only one."""
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
    metrics = measured_in(cell.yardsticks for cell in (*mine, *theirs) if cell is not None)
    found = compare(
        _finals(mine, metrics),
        _finals(theirs, metrics),
        primary=request.primary,
        margins=request.margins,
        num_classes=facts.num_classes,
        candidate_status=[status_of(a, b, facts) for a, b in zip(mine, theirs, strict=True)],
        reference_status=[status_of(b, None, facts) for b in theirs],
        bitwise_identical=identical,
        alpha=look.level,
        next_alpha=level_of(look.alpha, look.declared, look.number + 1),
        max_seeds=request.max_seeds,
    )
    if unlike := _unlike(mine, theirs):
        return _undecided(found, f"the pairs were not made alike: {', '.join(unlike)} differ")
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


def _unlike(mine: Sequence[Cell | None], theirs: Sequence[Cell | None]) -> list[str]:
    """What but the loss differs between the runs of some pair: code of the model, data, device, torch, threads."""
    keys: set[str] = set()
    for a, b in zip(mine, theirs, strict=True):
        if a is not None and b is not None:
            one, other = a.record.made_from, b.record.made_from
            keys |= {key for key in {*one, *other} - {"loss", "loss_code"} if one.get(key) != other.get(key)}
    for arm in (mine, theirs):
        made = [cell.record.made_from for cell in arm if cell is not None]
        keys |= {
            f"{key} between seeds" for key in ("loss", "loss_code") for m in made if m.get(key) != made[0].get(key)
        }
    return sorted(keys)


def _never_moved(cell: Cell | None) -> bool:
    return cell is not None and cell.record.weights_sha256 == cell.record.initial_sha256


def _learned_nothing(cell: Cell, facts: Facts) -> bool:
    return cell.yardsticks["test/nll"] >= facts.label_entropy


def _finals(cells: Sequence[Cell | None], metrics: Sequence[str]) -> dict[str, list[float]]:
    return {
        metric: [math.nan if cell is None else cell.yardsticks[f"test/{metric}"] for cell in cells]
        for metric in metrics
    }
