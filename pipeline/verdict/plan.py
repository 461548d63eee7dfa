"""What is asked of a trial's cells, and what its answer is limited to; fixed before the data.

Both are kept in the trial's folder as `request.yaml`, so that a verdict can be had again without configuration or data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline import config as conf
from pipeline.cells import read_yaml, write_whole, yaml_bytes
from pipeline.errors import UsageError
from pipeline.outcomes import Facts, Request
from pipeline.pairs import YARDSTICKS
from pipeline.setting import Setting
from pipeline.variation import SCOPE


def request_of(config: Mapping[str, Any]) -> Request:
    """The request that a configuration makes."""
    dataset = config["dataset"]
    margins = dataset.get("margins") or {}
    return Request(
        losses=tuple(config["loss"]),
        seeds=tuple(conf.seeds_of(config)),
        reference=conf.reference_of(config),
        about=config["about"],
        expect=conf.expectations_of(config),
        margins=margins,
        primary=tuple(dataset.get("primary") or margins or ("nll", "brier", "accuracy")),
        alpha=config["alpha"],
        max_seeds=config["max_seeds"],
        looks=config["looks"],
    )


def facts_of(setting: Setting, request: Request, command: str) -> Facts:
    """What the yardsticks of a setting mean."""
    train = setting.data.splits["train"]
    if setting.data.soft_targets is None:
        frequencies = torch.bincount(setting.data.labels[train]).double() / len(train)
    else:
        frequencies = setting.data.soft_targets[train].mean(0)
    steps = setting.recipe.epochs * setting.recipe.steps_per_epoch(len(train))
    return Facts(
        num_classes=setting.data.num_classes,
        label_entropy=-torch.xlogy(frequencies, frequencies).sum().item(),
        scope=(
            f"{_spans(request.seeds)}{SCOPE[setting.recipe.variation.vary]}, {steps} steps of "
            f"{conf.short_name(setting.config['optimizer']['_target_'])} in {setting.config['precision']}, "
            f"{setting.data.name}, {setting.builder.name}, on {setting.environment['device']}"
        ),
        command=command,
    )


def check_resolution(request: Request, setting: Setting) -> None:
    """An accuracy margin below two test examples could not be told from rounding."""
    examples = len(setting.data.splits["test"])
    margin = request.margins.get("accuracy")
    if margin is not None and margin < 2 / examples:
        raise UsageError(
            f"dataset.margins.accuracy={margin} is below the resolution of the test set; "
            f"give at least 2/{examples} = {2 / examples:.4f}"
        )


def check_truth(request: Request, setting: Setting) -> None:
    """A yardstick that needs the truth decides nothing where it is not known."""
    asked = [name for name in (*request.primary, *request.margins) if YARDSTICKS[name].needs_truth]
    if asked and setting.data.truth is None:
        raise UsageError(
            f"dataset.primary or dataset.margins names '{asked[0]}', but {setting.data.name} does not know P(y | x); "
            "leave it out"
        )


def write_request(path: Path, request: Request, facts: Facts, tracking: Mapping[str, Any]) -> None:
    """Keep the request in the trial's folder, and where its runs are recorded."""
    content = {"request": _listed(asdict(request)), "facts": asdict(facts), "tracking": dict(tracking)}
    write_whole(path / "request.yaml", yaml_bytes(content))


def read_request(path: Path) -> tuple[Request, Facts]:
    """What the folder was last trained for."""
    found = _read(path)
    try:
        request: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in found["request"].items()}
        return Request(**request), Facts(**found["facts"])
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


def _spans(seeds: Sequence[int]) -> str:
    """ "seed 7", "seeds 0-9" for a run of them, else a list."""
    ordered = sorted(seeds)
    if len(ordered) == 1:
        return f"seed {ordered[0]}"
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"seeds {ordered[0]}-{ordered[-1]}"
    return f"seeds {', '.join(map(str, ordered))}"
