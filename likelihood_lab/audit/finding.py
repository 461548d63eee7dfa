"""The result of auditing one loss, as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from likelihood_lab.audit.classify import Offset, Scale
from likelihood_lab.audit.domain import Limit
from likelihood_lab.audit.normaliser import Normaliser
from likelihood_lab.categorical.batches import AuditBatch
from likelihood_lab.categorical.mutants import FAULT_SIZES

SAME_FUNCTION = ("identical", "rounding", "offset")
"""Words of a loss that is the same function as the reference for training."""
GROSS = 1000.0
"""Units; an error of the value above this is not due to the order of summation, even if the gradients are right."""

DetectionLimits = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class Finding:
    """Result of auditing one loss against a reference.

    Attributes
    ----------
    objective : str
        One of identical, rounding, offset, scaled, reweighted, domain, different, not_run and error.
    sentence : str
        The reason for this word, in one line.
    scale : Scale or None
        Factor k between the gradients, g = k g_ref, if it is not 1.
    offset : Offset or None
        Constant between the values in nats, if there is one.
    domain : Limit or None
        Nearest limit beyond which the two differ; limits inside the core domain come first.
    normaliser : Normaliser or None
        Divisor of the loss, and which gradient accumulation it allows.
    side_effects : tuple of str
        Effects besides the returned value, such as overwritten inputs; empty if none was seen.
    covered, not_covered : tuple of str
        What the audit tested, and what it did not test.
    evidence : mapping
        Numbers behind the word. `r32` and `r64` are medians over batches of ||g - g_ref|| / ||g_ref|| in float32 and
        float64, `rho` is their ratio, `units` are the largest errors in units of rounding.
    worst : tuple of AuditBatch and str, or None
        Simplest batch that contradicts sameness, and the name of its dtype.
    detection_limits : callable
        Measures `would_have_caught`.

    Examples
    --------
    >>> import torch.nn.functional as F
    >>> from likelihood_lab import check
    >>> finding = check(lambda z, y: 2 * F.cross_entropy(z, y), num_classes=(2, 10))
    >>> finding.objective, finding.same, finding.scale.formula
    ('scaled', False, '2')
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
    detection_limits: Callable[[], DetectionLimits] = field(default=dict, repr=False, compare=False)

    @property
    def same(self) -> bool:
        """True for identical, rounding and offset: training gives the same model."""
        return self.objective in SAME_FUNCTION

    @property
    def value_holds(self) -> bool:
        """True if the value equals the reference's, except for a constant and for a poor order of summation."""
        units = self.evidence.get("value_units") or {}
        off = any(effect.startswith("value") for effect in self.side_effects)
        return not off or max((u if u is not None else math.inf for u in units.values()), default=0.0) <= GROSS

    def __str__(self) -> str:
        return self.show()

    @property
    def would_have_caught(self) -> DetectionLimits:
        """Smallest detected difference, {kind of fault: {dtype: size}}; None if 0.1 is not detected either.

        The first access measures it, which takes several seconds.
        """
        return self.detection_limits()

    def show(self) -> str:
        """Return the finding as text of a few lines."""
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

    def as_json(self, detection_limits: DetectionLimits | None = None) -> dict[str, Any]:
        """Return the finding as an entry of audit.json, which is strict JSON: NaN and infinity become null.

        Parameters
        ----------
        detection_limits : mapping, optional
            Value of `would_have_caught`; measured by default.
        """
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
            "would_have_caught": (
                self.would_have_caught if detection_limits is None else detection_limits
            ),
            "covered": list(self.covered),
            "not_covered": list(self.not_covered),
            "sentence": self.sentence,
            "evidence": self.evidence,
        }  # fmt: skip
        return {name: strict(value) for name, value in entry.items()}


AXES = {
    "gap": "the label's logit {limit} below the largest",
    "confidence": "the label's logit {limit} above all others",
    "offset": "a common offset of {limit}",
    "masked": "{limit} masked (-inf) logits",
    "rows": "{limit} rows",
}


def in_words(limit: Limit) -> str:
    """Describe a limit in a clause: where it lies, and what happens there."""
    later = f" ({limit.then})" if limit.then else ""
    return f"from {AXES[limit.axis].format(limit=f'{limit.limit:.4g}')} on, the {limit.behaviour}{later}"


def strict(value: Any) -> Any:
    """Return the value as strict JSON has it: null for NaN and infinity, string keys, lists."""
    if isinstance(value, Mapping):
        return {str(name): strict(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(sizes: Mapping[str, float | None]) -> str:
    return "  ".join(f"{size_in_words(size):<8}" for size in sizes.values()).rstrip()


def size_in_words(size: float | None) -> str:
    """Return an entry of `would_have_caught` as text; a bound if even the smallest size was caught."""
    if size is None:
        return "not .1"
    return f"< {size:.0e}" if size == FAULT_SIZES[-1] else f"{size:.0e}"
