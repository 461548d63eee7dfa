"""Pair of losses with a known verdict, shared by the audit's conformance suite and its experiments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F

LOGITS_AND_LABELS = ("logits", "labels")


@dataclass(frozen=True)
class Case:
    """A candidate, its reference, and the result that the audit must give.

    Attributes:
        row: the row of the catalogue, with a letter where it has several cases: "13a".
        title: what the pair is, in a few words.
        fn: the candidate; called with `args` in their order, returns the scalar objective.
        options: further keywords of `likelihood_lab.check`: dtype, ignore_index, soft_targets, tokens, num_classes.
        objective: the expected word of the objective axis.
        domain: the expected axis, with the expected limit where one is known (float32), else None.
        side_effects: beginnings of the expected entries; no other side effect is allowed.
        normaliser: the candidate's divisor, in the audit's words.
        outside: "because ...", for a row that the audit cannot evaluate; then `fn` is None.
        note: a size or a condition worth printing beside the row.
    """

    row: str
    title: str
    fn: Callable[..., Any] | None = None
    args: tuple[str, ...] = LOGITS_AND_LABELS
    reference: Callable[..., Any] = F.cross_entropy
    reference_args: tuple[str, ...] = LOGITS_AND_LABELS
    options: Mapping[str, Any] = field(default_factory=dict)
    objective: str | None = None
    domain: tuple[str, float | None] | None = None
    side_effects: tuple[str, ...] = ()
    normaliser: str | None = None
    outside: str | None = None
    note: str = ""
