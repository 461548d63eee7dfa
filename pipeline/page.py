"""The verdict in words: one self-contained HTML page around pictures that are already drawn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import ChainableUndefined, Environment

from pipeline.drawing import MINUS, themed

Verdict = Mapping[str, Any]
Run = tuple[str, int]  # loss, seed
Failure = tuple[int | None, str]  # step, cause

YARDSTICKS = {
    "nll": "NLL (nats)",
    "accuracy": "accuracy",
    "brier": "Brier score",
    "ece": "ECE (15 bins, shown only)",
}
PHRASES = {
    "identical": "identical to {}",
    "rounding": "the same as {} up to rounding",
    "equivalent": "equivalent to {} within the margins",
    "inconclusive": "neither shown equivalent to {} nor shown different",
    "different": "different from {}",
    "conflict": "in conflict with {}: audit and training disagree",
    "not_run": "not compared with {}",
}
SIGNS = {"identical": "=", "rounding": "≈", "equivalent": "≈", "different": "≠", "conflict": "!"}
SETTING = ("dataset", "model", "optimizer", "precision", "seeds", "about", "sweep")
COVERAGE = ("covered", "not_covered", "would_have_caught")  # said even where nothing is known
ASIDES = ("assay_sensitivity", "domain", "side_effects", "seeds_needed")


def page(verdict: Verdict, history: pd.DataFrame, chapters: Mapping[str, Sequence[Any]], command: str) -> str:
    """The text of report.html; `chapters` are lists of pictures, empty where there is nothing to draw."""
    environment = Environment(autoescape=True, undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(prose=prose, listed=listed, themed=themed)
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        headline=headline(verdict, history),
        verdict=verdict,
        expecting=any(comparison.get("expected") for comparison in verdict["comparisons"]),
        failures=failures(verdict, history),
        chapters=chapters,
        estimates=estimates(verdict),
        finals=final_yardsticks(verdict, history),
        coverage=coverage(verdict),
        setting=setting(verdict),
        command=command,
        signs=SIGNS,
        yardsticks=YARDSTICKS,
    )


def headline(verdict: Verdict, history: pd.DataFrame) -> str:
    """The verdict in one sentence, from the strongest sameness to the plainest difference."""
    where = f"{prose(verdict.get('model'))} on {prose(verdict.get('dataset'))}, {_seeds(verdict)}"
    agreeing: dict[str, list[str]] = defaultdict(list)
    for comparison in verdict["comparisons"]:
        agreeing[comparison["verdict"] or "not_run"].append(comparison["loss"])
    if not agreeing:
        return f"{listed(losses_in_order(verdict, history))} trained alone ({where}): nothing was compared."
    claims = [
        f"{listed(losses)} {'is' if len(losses) == 1 else 'are'} {phrase.format(verdict['reference'])}"
        for word, phrase in PHRASES.items()
        if (losses := agreeing[word])
    ]
    return f"{'; '.join(claims)} ({where})."


def _seeds(verdict: Verdict) -> str:
    count = len(verdict["seeds"])
    kind = "paired " if verdict["comparisons"] else ""
    return f"{count} {kind}seed{'s' * (count != 1)}"


def failures(verdict: Verdict, history: pd.DataFrame) -> list[tuple[str, list[int], int | None, str]]:
    """Every failed run, as recorded or as the history betrays it; seeds of one step and cause together."""
    losses = losses_in_order(verdict, history)
    found = _absent(losses, verdict["seeds"], history) | _not_finite(history)
    for comparison in verdict["comparisons"]:
        for failure in comparison.get("failures") or ():
            found[comparison["loss"], failure["seed"]] = failure["step"], failure["cause"]
    together: dict[tuple[str, Failure], list[int]] = defaultdict(list)
    for loss, seed in sorted(found, key=lambda run: (losses.index(run[0]), run[1])):
        together[loss, found[loss, seed]].append(seed)
    return [(loss, seeds, *failure) for (loss, failure), seeds in together.items()]


def _absent(losses: Sequence[str], seeds: Sequence[int], history: pd.DataFrame) -> dict[Run, Failure]:
    known = history[["loss", "seed"]].drop_duplicates()
    present = set(zip(known["loss"], known["seed"], strict=True))
    runs = {(loss, seed) for loss in losses for seed in seeds}
    return dict.fromkeys(runs - present, (None, "no recorded result"))


def _not_finite(history: pd.DataFrame) -> dict[Run, Failure]:
    """The first value of each run that is not finite, but for gaps: the other run can break those."""
    broken = history[~np.isfinite(history["value"])]
    broken = broken[~broken["metric"].str.startswith("gap/")]
    first = broken.sort_values("step", kind="stable").drop_duplicates(["loss", "seed"])
    runs = zip(first["loss"], first["seed"], strict=True)
    causes = zip(first["step"], first["metric"] + " is not finite", strict=True)
    return dict(zip(runs, causes, strict=True))


def final_yardsticks(verdict: Verdict, history: pd.DataFrame) -> list[dict[str, str]]:
    """Test metrics at the last step for each loss: mean (lowest to highest) over the seeds that have one."""
    ends = {name: history[history["metric"] == f"test/{name}"] for name in YARDSTICKS}
    return [
        {"loss": loss} | {name: _summary(end["value"][end["loss"] == loss]) for name, end in ends.items()}
        for loss in losses_in_order(verdict, history)
    ]


def _summary(values: pd.Series[float]) -> str:
    values = values[np.isfinite(values)]
    if values.empty:
        return prose(None)
    span = f" ({values.min():.4g} to {values.max():.4g})" if len(values) > 1 else ""
    return f"{values.mean():.4g}{span}"


def estimates(verdict: Verdict) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Every (loss, metric, finding) of the verdict."""
    return [
        (comparison["loss"], metric, found)
        for comparison in verdict["comparisons"]
        for metric, found in (comparison.get("metrics") or {}).items()
        if found
    ]


def coverage(verdict: Verdict) -> list[tuple[list[str], dict[str, Any]]]:
    """What each check saw and did not see; losses of which the same is said share an entry."""
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for comparison in verdict["comparisons"]:
        fields = [*COVERAGE, *(field for field in ASIDES if comparison.get(field) is not None)]
        said = {field.replace("_", " "): comparison.get(field) for field in fields}
        groups.setdefault(repr(said), ([], said))[0].append(comparison["loss"])
    return list(groups.values())


def setting(verdict: Verdict) -> dict[str, Any]:
    """The request, the protocol and the machine, as one list of facts."""
    return {
        **{field: verdict.get(field) for field in SETTING},
        **{f"protocol: {name}": value for name, value in (verdict.get("protocol") or {}).items()},
        **(verdict.get("environment") or {}),
    }


def prose(value: Any) -> str:
    """A JSON value as a reader would write it; a dash for null."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", MINUS)
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {prose(item)}" for key, item in value.items()) or "—"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return (", " if all(isinstance(item, int) for item in value) else "; ").join(map(prose, value)) or "none"
    return str(value) if value is not None and value != "" else "—"


def losses_in_order(verdict: Verdict, frame: pd.DataFrame) -> list[str]:
    """Losses as the report names them: the reference, the candidates, then whatever else was trained."""
    named = [verdict.get("reference"), *(comparison["loss"] for comparison in verdict["comparisons"])]
    return list(dict.fromkeys([name for name in named if name] + sorted(map(str, frame["loss"].unique()))))


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
