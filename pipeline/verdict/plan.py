"""What is asked of a trial's cells, what its answer is limited to, and the looks at growing data.

The request is fixed before the data. Request and facts are kept in the trial's folder as `request.yaml`, so that a
verdict can be had again without configuration or data.

Every verdict over another set of seeds, or by other margins or another reference, is a look (an interim analysis), and
every look is another chance of a false claim. Looks that were declared share alpha equally (Bonferroni). One more than
declared gets half of the last level, the next a quarter: however many follow, false claims stay below twice alpha. The
record is a file in the trial's folder that only grows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from likelihood_lab.errors import UsageError
from pipeline.config import schema as conf
from pipeline.replica import REPLAY, Replica
from pipeline.storage.files import read_yaml, write_whole, yaml_bytes

FILE = "looks.jsonl"
MOST_ADVISED = 100  # seeds; a verdict that needs more says "unreachable", unless protocol.max_seeds says otherwise


@dataclass(frozen=True)
class AnalysisPlan:
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
class TrialContext:
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


def wanted(plan: AnalysisPlan) -> list[Replica]:
    """Every (arm, seed) that the request is about."""
    return [Replica(loss, seed) for loss in plan.losses for seed in plan.seeds]


def wanted_controls(plan: AnalysisPlan) -> list[Replica]:
    """The controls beside them: a replay under the first seed, the others under every seed."""
    return [
        Replica(name, seed) for name in plan.controls for seed in (plan.seeds[:1] if name == REPLAY else plan.seeds)
    ]


def plan_of(config: Mapping[str, Any]) -> AnalysisPlan:
    """The request that a configuration makes."""
    dataset, protocol = config["dataset"], config["protocol"]
    margins = dataset.get("margins") or {}
    return AnalysisPlan(
        losses=tuple(config["loss"]),
        seeds=tuple(conf.seeds_of(config)),
        reference=conf.reference_of(config),
        about=config["about"],
        expect=conf.expectations_of(config),
        margins=margins,
        primary=tuple(dataset.get("primary") or margins or ("nll", "brier", "accuracy")),
        alpha=protocol["alpha"],
        max_seeds=protocol["max_seeds"] or MOST_ADVISED,
        looks=protocol["looks"],
    )


def write_plan(path: Path, plan: AnalysisPlan, context: TrialContext, tracking: Mapping[str, Any]) -> None:
    """Keep the request in the trial's folder, and where its runs are recorded."""
    content = {"request": _listed(asdict(plan)), "facts": asdict(context), "tracking": dict(tracking)}
    write_whole(path / "request.yaml", yaml_bytes(content))


def read_plan(path: Path) -> tuple[AnalysisPlan, TrialContext]:
    """What the folder was last trained for."""
    found = _read(path)
    try:
        plan: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in found["request"].items()}
        return AnalysisPlan(**plan), TrialContext(**found["facts"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path / 'request.yaml'} is damaged; the command that trained the folder mends it") from error


def read_tracking(path: Path) -> dict[str, Any]:
    """Where the runs of a trial's folder are recorded: uri and experiment; empty where nowhere."""
    return dict(_read(path).get("tracking", {}))


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path / "request.yaml")
    except OSError as error:
        raise UsageError(f"{path} is not a trial's folder (no request.yaml in it); give a trial's folder") from error


def _listed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


@dataclass(frozen=True)
class Look:
    """The number of a look, from 1, the alpha that it is judged at, and what both follow from."""

    number: int
    level: float
    alpha: float = 0.05
    declared: int = 1


def level_of(alpha: float, declared: int, number: int) -> float:
    """alpha / declared, and half as much with every look beyond the declared ones.

    Raises:
        ValueError: declared or number is below 1.
    """
    if declared < 1 or number < 1:
        raise ValueError(f"looks are counted from 1, got declared={declared}, number={number}")
    return float(alpha / declared / 2.0 ** max(0, number - declared))


def look_at(folder: Path, seeds: Sequence[int], question: str, alpha: float, declared: int) -> Look:
    """The look that a verdict over these seeds is: one that was taken before, or the next.

    Args:
        question: what else makes it another chance of a false claim: reference, margins, primary metrics.

    Alpha and the number of declared looks are those of the first look on record.
    """
    taken = _taken(folder)
    if taken:
        alpha, declared = taken[0]["alpha"], taken[0]["declared"]
    asked = {"seeds": sorted(seeds), "question": question}
    number = next((i for i, entry in enumerate(taken, 1) if asked.items() <= entry.items()), len(taken) + 1)
    return Look(number, level_of(alpha, declared, number), alpha, declared)


def record(folder: Path, look: Look, seeds: Sequence[int], question: str, words: Mapping[str, str]) -> None:
    """Append a look that is not on record yet; one at which nothing was tested (all identical) is none."""
    tested = any(word not in ("identical", "not_run") for word in words.values())
    taken = _taken(folder)
    if not tested or look.number <= len(taken):
        return
    entry = asdict(look) | {"question": question, "seeds": sorted(seeds), "words": dict(words)}
    earlier = (folder / FILE).read_bytes() if taken else b""
    write_whole(folder / FILE, earlier + json.dumps(entry).encode() + b"\n")


def _taken(folder: Path) -> list[dict[str, Any]]:
    """The looks on record, in order."""
    try:
        lines = (folder / FILE).read_text().splitlines()
    except FileNotFoundError:
        return []
    try:
        entries = [json.loads(line) for line in lines]
        return [
            entry for entry in entries if entry["seeds"] and entry["question"] and entry["alpha"] and entry["declared"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        line = f"{folder / FILE} is damaged; it counts the looks at the data: restore it, or start a new folder"
        raise UsageError(line) from error
