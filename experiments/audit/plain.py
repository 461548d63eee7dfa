"""Common plain test: standard normal logits, 64 rows of 10 classes, assert_close with its default tolerances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from experiments.audit.case import Case
from likelihood_lab.audit.evaluate import Evaluation, Loss, evaluate
from likelihood_lab.categorical.batches import WIDTH, AuditBatch

ROWS, CLASSES = 64, 10
BOTH = (torch.float32, torch.float64)
TESTS = ("values, float32", "values, float64", "gradients, float32", "gradients, float64", "all of these")
CPU = torch.device("cpu")


def plain_test(fn: Any, case: Case) -> Mapping[str, bool] | None:
    """Return {test: whether it calls the pair the same}, with None if the test cannot run.

    A case that declares a precision is tested in that precision and counts under both names.
    """
    batch = _batch(case)
    declared = case.options.get("dtype")
    found: dict[str, bool] = {}
    for dtype in BOTH:
        asked = declared or dtype
        mine, other = (
            evaluate(Loss(*pair), batch, asked, CPU)
            for pair in ((fn, case.args), (case.reference, case.reference_args))
        )
        if other.error is not None:
            return None
        name = str(dtype).removeprefix("torch.")
        found[f"values, {name}"] = mine.error is None and _close(mine.value, other.value)
        found[f"gradients, {name}"] = mine.error is None and _gradients_close(mine, other)
    return found | {"all of these": all(found.values())}


def _gradients_close(mine: Evaluation, other: Evaluation) -> bool:
    return all(_close(mine.gradients[name], gradient) for name, gradient in other.gradients.items())


def _close(mine: Any, other: Any) -> bool:
    try:
        torch.testing.assert_close(mine, other, check_dtype=False)
    except AssertionError:
        return False
    return True


def _batch(case: Case) -> AuditBatch:
    """Return standard normal logits, with ignored rows and soft targets if the case has them."""
    draw = torch.Generator().manual_seed(0)
    options = case.options
    allowed = options.get("num_classes") or (CLASSES,)
    classes = CLASSES if CLASSES in allowed else allowed[0]
    logits = torch.randn(ROWS, classes, generator=draw, dtype=torch.float64)
    fused: dict[str, Any] = {}
    if {"hidden", "weight"} & set(case.args):
        hidden = torch.randn(ROWS, WIDTH, generator=draw, dtype=torch.float64)
        weight = torch.randn(classes, WIDTH, generator=draw, dtype=torch.float64) / WIDTH**0.5
        logits, fused = F.linear(hidden, weight), {"hidden": hidden, "weight": weight}
    labels = torch.randint(classes, (ROWS,), generator=draw)
    targets = F.one_hot(labels, classes).double()
    if options.get("soft_targets"):
        targets = torch.randn(ROWS, classes, generator=draw, dtype=torch.float64).softmax(1)
    valid = torch.ones(ROWS, dtype=torch.bool)
    if (ignored := options.get("ignore_index")) is not None:
        valid = torch.rand(ROWS, generator=draw) > 0.25
        labels, targets = labels.masked_fill(~valid, ignored), targets * valid[:, None]
    flat: dict[str, Any] = {"logits": logits, "labels": labels, "target_probs": targets, "valid": valid}
    if options.get("tokens"):
        flat = {name: tensor.unflatten(0, (4, -1)) for name, tensor in flat.items()}
    return AuditBatch("plain", **flat, **fused)
