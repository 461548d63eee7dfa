"""Text of report.html: one self-contained page around pictures that are already drawn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from likelihood_lab.stats import pairs
from pipeline.reporting.plotting import themed
from pipeline.reporting.sensitivity import smallest_detectable, what_was_detected
from pipeline.text import listed, plural, prose
from pipeline.verdict.audit_entry import Audit
from pipeline.verdict.results import MetricResult, Verdict

Run = tuple[str, int]  # loss, seed
Failure = tuple[int | None, str]  # step, cause

METRICS = {name: metric.title for name, metric in pairs.METRICS.items()}
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
SETTING = ("dataset", "model", "optimizer", "precision", "vary", "seeds", "about", "sweep")
COVERAGE = ("covered", "not_covered", "would_have_caught")  # shown even if empty
ASIDES = ("assay_sensitivity", "domain", "side_effects", "seeds_needed")


@dataclass(frozen=True)
class ReportData:
    """Content of a report.

    Attributes:
        history: loss, seed, metric, step, value.
        differences: loss, metric, seed, control, difference: candidate minus reference (for NLL the log of their
            ratio), NaN where either run failed.
        distances: loss, seed, step, control, value: of the weights from the reference's of the same seed, relative.
        between_seeds: step, value: the same between the reference under two seeds.
        audit: None where the losses were not audited.
        command: shell command that repeats the trial.
    """

    verdict: Verdict
    history: pd.DataFrame
    differences: pd.DataFrame
    distances: pd.DataFrame
    between_seeds: pd.DataFrame
    audit: Audit | None
    command: str


def page(data: ReportData, chapters: Mapping[str, Sequence[Any]]) -> str:
    """Return the text of report.html; `chapters` are lists of pictures, empty where there is nothing to draw."""
    verdict, history = data.verdict, data.history
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(prose=prose, listed=listed, themed=themed)
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        headline=headline(verdict, history),
        verdict=verdict,
        expecting=any(comparison.expected for comparison in verdict.comparisons),
        failures=failures(verdict, history),
        chapters=chapters,
        detectable=smallest_detectable(verdict, data.audit),
        detected=what_was_detected(verdict, data.audit),
        estimates=estimates(verdict),
        finals=final_metrics(verdict, history),
        coverage=coverage(verdict),
        setup=setup(verdict),
        command=data.command,
        signs=SIGNS,
        metrics={name: title for name, title in METRICS.items() if (history["metric"] == f"test/{name}").any()},
    )


def headline(verdict: Verdict, history: pd.DataFrame) -> str:
    """Return the verdict in one sentence, the strongest sameness first."""
    where = f"{prose(verdict.model)} on {prose(verdict.dataset)}, {_seeds(verdict)}"
    agreeing: dict[str, list[str]] = defaultdict(list)
    for comparison in verdict.comparisons:
        agreeing[comparison.verdict].append(comparison.loss)
    if not agreeing:
        return f"{listed(losses_in_order(verdict, history))} trained alone ({where}): nothing was compared."
    claims = [
        f"{listed(losses)} {'is' if len(losses) == 1 else 'are'} {phrase.format(verdict.reference)}"
        for word, phrase in PHRASES.items()
        if (losses := agreeing[word])
    ]
    return f"{'; '.join(claims)} ({where})."


def _seeds(verdict: Verdict) -> str:
    what = "" if verdict.vary == "all" else f" that change the {verdict.vary} alone"
    return plural(len(verdict.seeds), "paired seed" if verdict.comparisons else "seed") + what


def failures(verdict: Verdict, history: pd.DataFrame) -> list[tuple[str, list[int], int | None, str]]:
    """Return loss, seeds, step and cause of all failed runs, recorded or visible in the history."""
    losses = losses_in_order(verdict, history)
    found = _absent(losses, verdict.seeds, history) | _not_finite(history)
    for comparison in verdict.comparisons:
        for failure in comparison.failures:
            found[comparison.loss, failure.seed] = failure.step, failure.cause
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
    """Find the first value of each run that is not finite; not in gaps, which depend on another run too."""
    broken = history[~np.isfinite(history["value"])]
    broken = broken[~broken["metric"].str.startswith("gap/")]
    first = broken.sort_values("step", kind="stable").drop_duplicates(["loss", "seed"])
    runs = zip(first["loss"], first["seed"], strict=True)
    causes = zip(first["step"], first["metric"] + " is not finite", strict=True)
    return dict(zip(runs, causes, strict=True))


def final_metrics(verdict: Verdict, history: pd.DataFrame) -> list[dict[str, str]]:
    """Test metrics at the last step for each loss: mean (lowest to highest) over the seeds that have one."""
    ends = {name: history[history["metric"] == f"test/{name}"] for name in METRICS}
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


def estimates(verdict: Verdict) -> list[tuple[str, str, MetricResult]]:
    """Return every (loss, metric, result) of the verdict, those of controls last."""
    by_arm = {comparison.loss: comparison.metrics for comparison in verdict.comparisons}
    arms = {**by_arm, **verdict.controls.metrics}
    return [(arm, metric, result) for arm, metrics in arms.items() for metric, result in metrics.items()]


def coverage(verdict: Verdict) -> list[tuple[list[str], dict[str, Any]]]:
    """Return what each check covered and did not cover; losses with equal text share an entry."""
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for comparison in verdict.comparisons:
        fields = [*COVERAGE, *(field for field in ASIDES if getattr(comparison, field) is not None)]
        text = {field.replace("_", " "): getattr(comparison, field) for field in fields}
        groups.setdefault(repr(text), ([], text))[0].append(comparison.loss)
    return list(groups.values())


def setup(verdict: Verdict) -> dict[str, Any]:
    """Return the settings, the protocol and the environment as one table."""
    return {
        **{field: getattr(verdict, field) for field in SETTING},
        **{f"protocol: {name}": value for name, value in verdict.protocol.to_json().items()},
        **verdict.environment,
    }


def losses_in_order(verdict: Verdict, frame: pd.DataFrame) -> list[str]:
    """Return the losses in the report's order: the reference, the candidates, then any others."""
    named = [verdict.reference, *(comparison.loss for comparison in verdict.comparisons)]
    return list(dict.fromkeys([name for name in named if name] + sorted(map(str, frame["loss"].unique()))))
