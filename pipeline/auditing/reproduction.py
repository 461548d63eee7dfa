"""A few lines of Python that show how a loss differs, to be pasted into a bug report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

from pipeline.auditing.calls import Loss
from pipeline.auditing.finding import Finding
from pipeline.formulations import LossFn

LITERAL = 40  # logits that are written out


def reproduction(fn: LossFn, reference: LossFn, finding: Finding, settings: Mapping[str, Any]) -> str:
    """The smallest batch that speaks against sameness, as code; empty where there is none to show."""
    if finding.worst is None:
        return ""
    batch, dtype = finding.worst
    args = tuple(settings.get("args", ("logits", "labels")))
    reference_args = tuple(settings.get("reference_args", ("logits", "labels")))
    if batch.hidden is not None or batch.logits.numel() > LITERAL or not batch.contiguous:
        asked = ", ".join(f"{key}={value!r}" for key, value in settings.items() if key != "batches")
        call = f"check(mine, {_name(reference, 'reference')}{', ' if asked else ''}{asked})"
        return (
            f"# the smallest batch that shows it: {dtype}, {batch.where}\n"
            f"batch, dtype = likelihood_lab.{call}.worst  # batch.logits, .labels, .hidden, .weight"
        )
    logits = batch.logits.tolist()
    lines = [
        "import torch; import torch.nn.functional as F",
        f"z = torch.tensor({logits}, dtype=torch.{dtype}, requires_grad=True)",
    ]
    if "labels" in (*args, *reference_args):
        lines.append(f"labels = torch.tensor({batch.labels.tolist()})")
    if "target_probs" in (*args, *reference_args):
        lines.append(f"target_probs = torch.tensor({batch.target_probs.tolist()}, dtype=torch.{dtype})")
    upstream = f", torch.tensor({batch.upstream}, dtype=torch.{dtype})" if batch.upstream != 1 else ""
    for loss, otherwise in ((Loss(reference, reference_args), "reference"), (Loss(fn, args), "mine")):
        name, flat = _name(loss.fn, otherwise), loss.flattens and batch.labels.ndim > 1
        given = [_expression(arg, flat) for arg in loss.args]
        if otherwise == "reference" and loss.fn is F.cross_entropy and settings.get("ignore_index") is not None:
            given.append(f"ignore_index={settings['ignore_index']}")
        lines.append(f"print(torch.autograd.grad({name}({', '.join(given)}), z{upstream})[0].tolist())")
    return "\n".join(lines)


def _expression(arg: str, flat: bool) -> str:
    made = {"logits": "z", "log_probs": "z.log_softmax(-1)", "probs": "z.softmax(-1)"}.get(arg, arg)
    return made + (".flatten()" if arg == "labels" else ".flatten(0, -2)") if flat else made


def _name(fn: LossFn, otherwise: str) -> str:
    """How torch's own functions are called; another loss by the name that it goes by in the test."""
    name = getattr(fn, "__name__", "")
    return f"F.{name}" if name and getattr(F, name, None) is fn else otherwise
