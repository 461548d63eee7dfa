"""Analysis plan of a trial, the context that its verdict is limited to, and the record of looks.

Plan and context are stored in the trial's folder as `request.yaml`. A verdict can be repeated from it without
configuration or data.

A verdict with other seeds, margins or another reference is a look (an interim analysis). Every look is another chance
of a false claim. Declared looks share alpha equally (Bonferroni). Each look beyond them gets half the level of the one
before, so the rate of false claims stays below twice alpha. The record of looks is a file that only grows.
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
    """Analysis plan of a trial, fixed before the data and hashed into the verdict."""

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
        """Losses that are compared with the reference."""
        return [loss for loss in self.losses if loss != self.reference]

    @property
    def question(self) -> str:
        """Return reference, margins and primary metrics as JSON.

        A verdict on the same seeds with other values is a new look.
        """
        settings = {"reference": self.reference, "margins": dict(self.margins), "primary": list(self.primary)}
        return json.dumps(settings, sort_keys=True)

    @property
    def protocol_hash(self) -> str:
        """SHA-256 over everything that must not be chosen after the data were seen."""
        fixed = {
            "expect": dict(self.expect), "margins": dict(self.margins), "primary": self.primary, "about": self.about,
            "looks": self.looks, "alpha": self.alpha, "max_seeds": self.max_seeds,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TrialContext:
    """Properties of the dataset and the trial that a verdict needs.

    Attributes:
        num_classes: C.
        label_entropy: entropy of the class frequencies in training, in nats. A model with no lower NLL learned nothing.
        scope: seeds, steps, data and device that the verdict is limited to, as text.
        command: shell command that repeats the trial.
    """

    num_classes: int
    label_entropy: float
    scope: str
    command: str


def wanted(plan: AnalysisPlan) -> list[Replica]:
    """Return every (loss, seed) of the plan."""
    return [Replica(loss, seed) for loss in plan.losses for seed in plan.seeds]


def wanted_controls(plan: AnalysisPlan) -> list[Replica]:
    """Return every (control, seed) of the plan: the replay under the first seed, the others under every seed."""
    return [
        Replica(name, seed) for name in plan.controls for seed in (plan.seeds[:1] if name == REPLAY else plan.seeds)
    ]


def plan_of(config: Mapping[str, Any]) -> AnalysisPlan:
    """Return the plan of a configuration."""
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
    """Write the plan, its context and the tracking address to the trial's folder."""
    content = {"request": _listed(asdict(plan)), "facts": asdict(context), "tracking": dict(tracking)}
    write_whole(path / "request.yaml", yaml_bytes(content))


def read_plan(path: Path) -> tuple[AnalysisPlan, TrialContext]:
    """Read the plan that the folder was last trained for."""
    found = _read(path)
    try:
        plan: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in found["request"].items()}
        return AnalysisPlan(**plan), TrialContext(**found["facts"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path / 'request.yaml'} is damaged; to restore it, repeat the command that trained the folder"
        ) from error


def read_tracking(path: Path) -> dict[str, Any]:
    """Read the uri and experiment that the folder's runs are recorded in; empty if none."""
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
    """Number of a look, from 1, its level, and the alpha and number of looks that were declared."""

    number: int
    level: float
    alpha: float = 0.05
    declared: int = 1


def level_of(alpha: float, declared: int, number: int) -> float:
    """Return alpha / declared, halved with every look beyond the declared ones.

    Raises:
        ValueError: declared or number is below 1.
    """
    if declared < 1 or number < 1:
        raise ValueError(f"looks are counted from 1, got declared={declared}, number={number}")
    return float(alpha / declared / 2.0 ** max(0, number - declared))


def look_at(folder: Path, seeds: Sequence[int], question: str, alpha: float, declared: int) -> Look:
    """Return the recorded look with these seeds and question, or the next one.

    Alpha and the number of declared looks are those of the first look on record.

    Args:
        question: reference, margins and primary metrics.
    """
    taken = _taken(folder)
    if taken:
        alpha, declared = taken[0]["alpha"], taken[0]["declared"]
    settings = {"seeds": sorted(seeds), "question": question}
    number = next((i for i, entry in enumerate(taken, 1) if settings.items() <= entry.items()), len(taken) + 1)
    return Look(number, level_of(alpha, declared, number), alpha, declared)


def record(folder: Path, look: Look, seeds: Sequence[int], question: str, words: Mapping[str, str]) -> None:
    """Append a look to the record, unless it is there or nothing was tested (all identical)."""
    tested = any(word not in ("identical", "not_run") for word in words.values())
    taken = _taken(folder)
    if not tested or look.number <= len(taken):
        return
    entry = asdict(look) | {"question": question, "seeds": sorted(seeds), "words": dict(words)}
    earlier = (folder / FILE).read_bytes() if taken else b""
    write_whole(folder / FILE, earlier + json.dumps(entry).encode() + b"\n")


def _taken(folder: Path) -> list[dict[str, Any]]:
    """Return the recorded looks in order."""
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
