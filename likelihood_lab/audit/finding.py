"""What an audit found of one loss, in words and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from likelihood_lab.audit.classify import SAMENESS, Offset, Scale
from likelihood_lab.audit.domain import Limit
from likelihood_lab.audit.normaliser import Normaliser
from likelihood_lab.categorical.batches import AuditBatch
from likelihood_lab.categorical.mutants import FAULT_SIZES

GROSS = 1000.0
"""Units by which no order of summation makes a value wrong; the gradients, which decide the word, may be right."""

Power = Mapping[str, Mapping[str, float | None]]


def _no_power() -> Power:
    return {}


@dataclass(frozen=True)
class Finding:
    """What an audit found of one loss.

    Attributes:
        objective: identical, rounding, offset, scaled, reweighted, domain, different, not_run or error.
        sentence: it in prose, with the reason.
        scale: the factor between the gradients, where there is one other than 1.
        offset: the constant between the values, where there is one.
        domain: where the two part, the nearest limit within the core first.
        normaliser: what the loss divides by.
        side_effects: what it does besides; empty where nothing was seen.
        covered, not_covered: what was asked, and what was not.
        evidence: numbers behind the word: r32 and r64, the median over batches of ||g - g_ref|| / ||g_ref|| in float32
            and float64, and rho, their ratio; the largest errors in units of rounding; the limits found.
        worst: the smallest batch that speaks against sameness, and its precision.
        power: what `would_have_caught` asks.
    """

    objective: str
    sentence: str
    scale: Scale | None = None
    offset: Offset | None = None
    domain: Limit | None = None
    normaliser: Normaliser | None = None
    side_effects: tuple[str, ...] = ()
    covered: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)
    worst: tuple[AuditBatch, str] | None = field(default=None, repr=False)
    power: Callable[[], Power] = field(default=_no_power, repr=False, compare=False)

    @property
    def same(self) -> bool:
        """Whether training with it is training with the reference: identical, rounding or offset."""
        return self.objective in SAMENESS

    @property
    def value_holds(self) -> bool:
        """Whether the value is the reference's too, up to a constant and to what a poor order of summation may cost."""
        units = self.evidence.get("value_units") or {}
        off = any(effect.startswith("value") for effect in self.side_effects)
        return not off or max((u if u is not None else math.inf for u in units.values()), default=0.0) <= GROSS

    def __str__(self) -> str:
        return self.show()

    @property
    def would_have_caught(self) -> Power:
        """The smallest difference of each kind that the grid catches, by precision; measured when first asked."""
        return self.power()

    def show(self) -> str:
        """The finding as text of a few lines."""
        lines = [f"{self.objective}: {self.sentence}"]
        if self.domain is not None:
            lines.append(f"  domain        {in_words(self.domain)}")
        if self.normaliser is not None:
            lines.append(
                f"  divides by    {self.normaliser.divides_by}; accumulated micro-batches are right by "
                f"{self.normaliser.survives}"
            )
        lines += [f"  side effect   {effect}" for effect in self.side_effects]
        lines += [f"  covered       {entry}" for entry in self.covered]
        lines += [f"  not covered   {entry}" for entry in self.not_covered]
        if caught := self.would_have_caught:
            lines.append(f"  would have caught, from  {'  '.join(next(iter(caught.values())))}")
            lines += [f"    {name:<20} {_row(sizes)}" for name, sizes in caught.items()]
        return "\n".join(lines)

    def as_json(self, power: Power | None = None) -> dict[str, Any]:
        """An entry of audit.json; null for what is not finite."""
        scale, limit, divided = self.scale, self.domain, self.normaliser
        by_classes = {} if scale is None else {str(c): k for c, k in scale.by_classes.items()}
        entry = {
            "objective": self.objective,
            "scale": scale and {"formula": scale.formula, "by_classes": by_classes},
            "offset": self.offset and {"constant": self.offset.constant, "moves_with_targets": self.offset.moves},
            "domain": limit and {"axis": limit.axis, "limit": limit.limit, "behaviour": limit.behaviour},
            "normaliser": divided and {
                "divides_by": divided.divides_by, "accumulation": divided.accumulation, "cosine": divided.cosine,
            },
            "side_effects": list(self.side_effects),
            "would_have_caught": self.would_have_caught if power is None else power,
            "covered": list(self.covered),
            "not_covered": list(self.not_covered),
            "sentence": self.sentence,
            "evidence": self.evidence,
        }  # fmt: skip
        return {name: strict(value) for name, value in entry.items()}


UNITS = {"gap": "logits", "confidence": "logits", "offset": "logits", "masked": "classes", "rows": "rows"}
AXES = {
    "gap": "the label's logit {limit} below the largest",
    "confidence": "the label's logit {limit} above all others",
    "offset": "a common offset of {limit}",
    "masked": "{limit} masked (-inf) logits",
    "rows": "{limit} rows",
}


def in_words(limit: Limit) -> str:
    """A limit as a clause: where, and what happens there."""
    later = f" ({limit.then})" if limit.then else ""
    return f"from {AXES[limit.axis].format(limit=f'{limit.limit:.4g}')} on, the {limit.behaviour}{later}"


def strict(value: Any) -> Any:
    """Only what strict JSON has."""
    if isinstance(value, Mapping):
        return {str(name): strict(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(sizes: Mapping[str, float | None]) -> str:
    return "  ".join(f"{size_in_words(size):<8}" for size in sizes.values()).rstrip()


def size_in_words(size: float | None) -> str:
    """An entry of `would_have_caught`: a bound where even the smallest that was tried is caught."""
    if size is None:
        return "not .1"
    return f"< {size:.0e}" if size == FAULT_SIZES[-1] else f"{size:.0e}"
