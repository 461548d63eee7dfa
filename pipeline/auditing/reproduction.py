"""A few lines of Python that show how a loss differs, to be pasted into a bug report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.auditing.finding import Finding
from pipeline.formulations import LossFn

LITERAL = 40  # logits that are written out


def reproduction(fn: LossFn, reference: LossFn, finding: Finding, settings: Mapping[str, Any]) -> str:
    """The smallest batch that speaks against sameness, as code; empty where there is none to show."""
    if finding.worst is None:
        return ""
    batch, dtype = finding.worst
    args = settings.get("args", ("logits", "labels"))
    reference_args = settings.get("reference_args", ("logits", "labels"))
    if batch.hidden is not None or batch.logits.numel() > LITERAL or batch.layout != "contiguous":
        return f"# the smallest batch that shows it: {dtype}, {batch.where}"
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
    for name, given in ((_name(reference, "reference"), reference_args), (_name(fn, "mine"), args)):
        lines.append(f"print(torch.autograd.grad({name}({', '.join(map(_expression, given))}), z{upstream}))")
    return "\n".join(lines)


def _expression(arg: str) -> str:
    return {"logits": "z", "log_probs": "z.log_softmax(-1)", "probs": "z.softmax(-1)"}.get(arg, arg)


def _name(fn: LossFn, otherwise: str) -> str:
    """How torch's own functions are called; another loss by the name that it goes by in the test."""
    name = getattr(fn, "__name__", "")
    return f"F.{name}" if name and getattr(torch.nn.functional, name, None) is fn else otherwise
