"""What a sceptic asks first of a verdict: how small a difference would it have noticed, and did it ever say no?

The answers are made of what was measured in this trial, and say where nothing was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.text import listed, prose

Verdict = Mapping[str, Any]
Audit = Mapping[str, Any] | None

SHOWN = 4  # losses of which the first screen says each by itself
OPEN = ("equivalent", "inconclusive")  # outcomes in which a difference may hide
UNASKED = ("error", "not_run")
LADDER = ("label smoothing", "temperature 1 + d")  # two kinds of planted fault stand for the rest


def smallest_margin(found: Mapping[str, Any]) -> float | None:
    """The smallest margin at which the equivalence test passes: its interval has to lie inside; None without one."""
    ends = [abs(end) for end in found.get("ci_tost") or () if end is not None]
    return max(ends, default=None)


def controls_of(verdict: Verdict) -> Mapping[str, Mapping[str, Any]]:
    """The metrics of every control that was tested like a loss, by its name."""
    return (verdict.get("controls") or {}).get("metrics") or {}


def smallest_detectable(verdict: Verdict, audit: Audit) -> list[str]:
    """The smallest difference that each part of the check would have noticed."""
    return [*_in_the_losses(verdict, audit), *_in_the_first_steps(verdict), *_in_the_outcome(verdict)]


def _in_the_losses(verdict: Verdict, audit: Audit) -> Iterator[str]:
    if not _planted(audit):
        if verdict["comparisons"]:
            yield "In the losses themselves: unknown, they were not audited."
        return
    known = []
    for kind in LADDER:
        sizes = _planted(audit).get(kind) or {}
        caught = [f"{size:.0e} in {name}" for name, size in sizes.items() if size is not None and " " not in name]
        known += [f"{kind} by {listed(caught)}"] if caught else []
    if known:
        yield f"In the losses themselves: {'; '.join(known)}."


def _planted(audit: Audit) -> Mapping[str, Mapping[str, float | None]]:
    """Kind of planted fault -> precision -> the smallest size that was caught on the grid of every loss; None: not all.

    Losses that could not be asked say nothing.
    """
    entries = [entry for entry in (audit or {}).get("losses", {}).values() if entry["objective"] not in UNASKED]
    ladders = [entry["would_have_caught"] for entry in entries if entry.get("would_have_caught")]
    if not ladders or len(ladders) < len(entries):
        return {}
    return {
        kind: {precision: _largest([ladder.get(kind, {}).get(precision) for ladder in ladders]) for precision in sizes}
        for kind, sizes in ladders[0].items()
    }


def _largest(sizes: Sequence[float | None]) -> float | None:
    known = [size for size in sizes if size is not None]
    return max(known) if len(known) == len(sizes) else None


def _in_the_first_steps(verdict: Verdict) -> Iterator[str]:
    known = [(row.get("envelope") or {}).get("smallest") for row in verdict["comparisons"]]
    for size in {size for size in known if size is not None}:
        yield f"In the first steps of training: label smoothing {size:.0e}, as recorded on digits with an MLP."


def _in_the_outcome(verdict: Verdict) -> Iterator[str]:
    if equal := [row["loss"] for row in verdict["comparisons"] if row.get("outcome") == "identical"]:
        yield f"In the trained models: one bit of any weight in any pair ({listed(equal)})."
    own = {
        row["loss"]: limits
        for row in verdict["comparisons"]
        if row.get("outcome") in OPEN and (limits := _reached(verdict, [row.get("metrics") or {}]))
    }
    for loss, limits in list(own.items())[:SHOWN]:
        yield f"In the outcome of {loss}: a difference beyond {limits}."
    if len(own) > SHOWN:
        yield f"In the outcome of {len(own) - SHOWN} others: see their smallest margins below."
    words = (verdict.get("controls") or {}).get("outcomes") or {}
    placebos = [found for name, found in controls_of(verdict).items() if name.startswith("placebo")]
    shown_equal = {word for name, word in words.items() if name.startswith("placebo")} <= {"equivalent", "identical"}
    if placebos and shown_equal and (limits := _reached(verdict, placebos)):
        yield f"At best these seeds could show {limits}: so closely agree the placebos, which differ by rounding alone."


def _reached(verdict: Verdict, found: Sequence[Mapping[str, Any]]) -> str:
    """For each primary metric the smallest margin that all of these pass, beside the one that was declared."""
    limits = []
    for metric in (verdict.get("protocol") or {}).get("primary") or ():
        entries = [metrics[metric] for metrics in found if metrics.get(metric)]
        ends = [end for entry in entries if (end := smallest_margin(entry)) is not None]
        if ends:
            declared = entries[0].get("margin")
            asked = f" where {prose(declared)} was asked" if declared else ""
            limits.append(f"{metric} {prose(float(f'{max(ends):.2g}'))}{asked}")
    return ", ".join(limits)


def what_was_detected(verdict: Verdict, audit: Audit) -> list[str]:
    """What was found different: planted faults, controls, losses. Nothing found is said too."""
    said = [*_planted_in_training(verdict), *_losses_refused(verdict), *_planted_in_losses(audit)]
    if not said:
        said = [
            "Not in this trial: nothing different was planted in it and nothing was found. "
            "Add a loss that must differ, or controls=all."
        ]
    return [*said, *_replayed(verdict)]


def _planted_in_training(verdict: Verdict) -> Iterator[str]:
    words = (verdict.get("controls") or {}).get("outcomes") or {}
    if (dose := words.get("dose")) is not None:
        share = _moved(verdict)
        planted = "the reference with its logits scaled, planted by the trial"
        if share is not None:
            planted += f", which moves {_first_metric(verdict)} by {prose(share)} margins"
        if dose == "different":
            yield f"Yes, in training: {planted}, was called different."
        elif share is not None and abs(share) < 1:
            weak = "That is too little to notice: this setting needs a dose of its own."
            yield f"Not in training: {planted}, was called {dose}. {weak}"
        else:
            yield f"Not in training: {planted}, was called {dose}. So large a difference these seeds cannot tell."
    placebos = [word for name, word in words.items() if name.startswith("placebo")]
    if placebos:
        as_they_should = set(placebos) <= {"identical", "equivalent"}
        start = "And yes where it should" if as_they_should else "Nor did it say yes where it should"
        yield f"{start}: the placebos, which differ by rounding alone, were called {listed(placebos)}."


def _first_metric(verdict: Verdict) -> str:
    return str(next(iter((verdict.get("protocol") or {}).get("primary") or ()), ""))


def _moved(verdict: Verdict) -> float | None:
    """By how many margins the dose moved the first primary metric."""
    found = (controls_of(verdict).get("dose") or {}).get(_first_metric(verdict)) or {}
    if found.get("mean_difference") is None or not found.get("margin"):
        return None
    return float(f"{found['mean_difference'] / found['margin']:.2g}")


def _losses_refused(verdict: Verdict) -> Iterator[str]:
    if refused := [row["loss"] for row in verdict["comparisons"] if row.get("verdict") in ("different", "conflict")]:
        yield f"Yes, of what was asked about: {listed(refused)}."


def _planted_in_losses(audit: Audit) -> Iterator[str]:
    sizes = _planted(audit)
    caught = [kind for kind, found in sizes.items() if any(size is not None for size in found.values())]
    if caught:
        yield (
            f"Yes, in the losses: faults of {len(caught)} of {len(sizes)} kinds were planted and caught, "
            "down to the sizes in the first answer."
        )


def _replayed(verdict: Verdict) -> Iterator[str]:
    replay = (verdict.get("controls") or {}).get("replay")
    if replay is not None:
        bits = "the same bits" if replay["bitwise"] else "other bits: this platform is not deterministic"
        yield f"The reference, trained once more in another place, got {bits}."
