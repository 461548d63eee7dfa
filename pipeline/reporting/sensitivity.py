"""Text of the report's first section: detection limits, and the differences that were detected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pipeline.text import listed, plural, prose
from pipeline.verdict.audit_entry import Audit
from pipeline.verdict.describe import limit_of_audit, limit_of_envelope
from pipeline.verdict.results import MetricResult, Verdict

SHOWN = 4  # losses that the first screen lists one by one


def smallest_detectable(verdict: Verdict, audit: Audit | None) -> list[str]:
    """Name the smallest difference that each part of the check would have detected."""
    sizes = _planted_sizes(audit)
    lines = [f"Losses: {limit}."] if (limit := limit_of_audit(sizes)) else []
    if not sizes and verdict.comparisons:
        lines = ["Losses: unknown, because they were not audited."]
    in_steps = dict.fromkeys(row.envelope.smallest for row in verdict.comparisons)
    lines += [f"First steps of training: {limit_of_envelope(size)}." for size in in_steps if size is not None]
    return [*lines, *_limits_of_training(verdict)]


def _planted_sizes(audit: Audit | None) -> Mapping[str, Mapping[str, float | None]]:
    """Kind of planted fault -> precision -> the smallest size that was detected for every loss; None: not for all.

    Losses that could not be audited are ignored.
    """
    entries = [entry for entry in audit.losses.values() if entry.is_known] if audit else []
    sizes = [entry.would_have_caught for entry in entries]
    if not sizes or not all(sizes):
        return {}
    return {
        kind: {precision: _largest([size.get(kind, {}).get(precision) for size in sizes]) for precision in precisions}
        for kind, precisions in sizes[0].items()
    }


def _largest(sizes: Sequence[float | None]) -> float | None:
    known = [size for size in sizes if size is not None]
    return max(known) if len(known) == len(sizes) else None


def _limits_of_training(verdict: Verdict) -> Iterator[str]:
    if equal := [row.loss for row in verdict.comparisons if row.outcome == "identical"]:
        yield f"Trained models: one bit of any weight in any pair ({listed(equal)})."
    own = {
        row.loss: limits
        for row in verdict.comparisons
        if row.outcome in ("equivalent", "inconclusive") and (limits := _smallest_margins(verdict, [row.metrics]))
    }
    for loss, limits in list(own.items())[:SHOWN]:
        yield f"Trained model of {loss}: a difference beyond {limits}."
    if len(own) > SHOWN:
        yield f"Trained models of {len(own) - SHOWN} more losses: see the smallest margins below."
    controls = verdict.controls
    placebos = [controls.metrics[name] for name in controls.placebos if name in controls.metrics]
    if controls.placebos_are_equal and (limits := _smallest_margins(verdict, placebos)):
        yield f"Smallest margin that the placebos pass, which differ from the reference by rounding alone: {limits}."


def _smallest_margins(verdict: Verdict, metrics: Sequence[Mapping[str, MetricResult]]) -> str:
    """For each primary metric the smallest margin that all of these pass, beside the declared one."""
    limits = []
    for name in verdict.protocol.primary:
        known = [results[name] for results in metrics if name in results]
        ends = [end for result in known if (end := result.smallest_margin) is not None]
        if ends:
            declared = f" (declared: {prose(known[0].margin)})" if known[0].margin else ""
            limits.append(f"{name} {prose(float(f'{max(ends):.2g}'))}{declared}")
    return ", ".join(limits)


def what_was_detected(verdict: Verdict, audit: Audit | None) -> list[str]:
    """Say which planted differences, controls and losses were found different, also if none was."""
    lines = [*_controls(verdict)]
    if found := [row.loss for row in verdict.comparisons if row.verdict in ("different", "conflict")]:
        lines.append(f"Losses: {listed(found)}.")
    sizes = _planted_sizes(audit)
    if caught := [kind for kind, found in sizes.items() if any(size is not None for size in found.values())]:
        lines.append(
            f"Faults planted in the losses: {len(caught)} of {plural(len(sizes), 'kind')} detected; "
            "audit.json has the smallest sizes."
        )
    if not lines:
        lines = ["Nothing: no difference was planted and none was found. Add a loss that must differ, or controls=all."]
    if replay := verdict.controls.replay:
        bits = "the same bits" if replay.bitwise else "other bits: this platform is not deterministic"
        lines.append(f"Replay: the reference, trained again in another slot, has {bits}.")
    return lines


def _controls(verdict: Verdict) -> Iterator[str]:
    controls = verdict.controls
    if (dose := controls.outcomes.get("dose")) is not None:
        name = next(iter(verdict.protocol.primary), "")
        size = _dose_in_margins(verdict, name)
        moves = "" if size is None else f", which moves {name} by {prose(size)} margins"
        word = "detected" if dose == "different" else "not detected"
        line = f"Positive control: {word}. The reference with scaled logits{moves}, was called {dose}."
        if dose != "different":
            is_weak = size is not None and abs(size) < 1
            line += (
                " It is too small for this setting; choose another dataset.dose."
                if is_weak
                else (" These seeds cannot detect a difference of that size.")
            )
        yield line
    if words := list(dict.fromkeys(controls.placebos.values())):
        line = f"Placebos (the reference with other rounding): called {listed(words)}"
        if controls.placebos_are_equal:
            yield f"{line}, as they should be."
        elif "different" in words:
            yield f"{line}. Rounding alone makes a difference here."
        elif not verdict.protocol.margins:
            yield f"{line}. Nothing can be shown equivalent without margins."
        else:
            yield f"{line}. There are too few seeds to show them equivalent."


def _dose_in_margins(verdict: Verdict, name: str) -> float | None:
    """Shift of this metric by the positive control, in margins."""
    result = verdict.controls.metrics.get("dose", {}).get(name)
    if result is None or result.mean_difference is None or not result.margin:
        return None
    return float(f"{result.mean_difference / result.margin:.2g}")
