"""The value of a loss whose gradients are the reference's: exact, off by a constant, or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.auditing.batches import Shape, make_batch
from pipeline.auditing.calls import Loss, evaluate
from pipeline.auditing.judging import Judgement, Standard
from pipeline.numerics import CONSTANT

TARGET_SETS = 3
LOGIT_DRAWS = 4


@dataclass(frozen=True)
class Offset:
    """Value minus the reference's, constant in the logits.

    Attributes:
        constant: it, in nats; where it moves with the targets, what it was for one set of them.
        moves: whether it depends on the targets.
    """

    constant: float
    moves: bool


def judged_values(cells: Sequence[Judgement]) -> str | None:
    """What is wrong with the values of the core, in words; None where rounding accounts for all of it."""
    wrong = [cell for cell in cells if cell.value_units > CONSTANT]
    if not wrong:
        return None
    infinite = [cell for cell in wrong if not cell.value_error < torch.inf]
    if infinite:
        return f"value is not finite where the reference's is ({infinite[0].where})"
    worst = max(wrong, key=lambda cell: cell.value_units)
    return f"value off by {worst.value_error:.3g} nats ({worst.where})"


def offset(loss: Loss, standard: Standard, shape: Shape, dtype: torch.dtype, allowed_in: torch.dtype) -> Offset | None:
    """The constant between two values, where the difference does not move with the logits.

    Several draws of logits are asked for each of several sets of targets, one of them of another size.
    """
    draw = torch.Generator().manual_seed(7)
    classes = next((c for c in shape.num_classes if c >= 10), shape.num_classes[0])
    asked = replace(shape, ignoring=False)
    constants: list[float] = []
    unit = 0.0
    for place in range(TARGET_SETS):
        lead = ((2, 4), (2, 4), (1, 5))[place] if shape.tokens else ((8,), (8,), (5,))[place]
        first = make_batch("random", lead, classes, asked, draw).at(dtype)
        differences = []
        for _ in range(LOGIT_DRAWS):
            other = make_batch("random", lead, classes, asked, draw).at(dtype)
            batch = replace(other, labels=first.labels, target_probs=first.target_probs)
            fresh = Standard(standard.loss, standard.device)
            found, exact = evaluate(loss, batch, dtype, standard.device), fresh.exact(batch)
            if found.value is None or exact.value is None:
                return None
            differences.append(found.value.double().item() - exact.value.double().item())
            unit = max(unit, fresh.value_unit(batch, allowed_in), abs(differences[-1]) * torch.finfo(allowed_in).eps)
        if not max(differences) - min(differences) <= 2 * CONSTANT * unit:
            return None
        constants.append(sum(differences) / LOGIT_DRAWS)
    if max(map(abs, constants)) <= 2 * CONSTANT * unit:
        return None
    return Offset(constants[0], max(constants) - min(constants) > 2 * CONSTANT * unit)
