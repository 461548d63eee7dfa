"""Inputs that a softmax loss may take, and their computation from the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LossFn = Callable[..., Any]
Given = dict[str, Sequence[Tensor | None]]  # name -> a tensor for each replica; None for a missing bias

INPUTS = ("logits", "log_probs", "probs", "hidden", "weight", "bias", "labels", "target_probs")
"""Names that `args` may contain.

`logits` [B, C]; `log_probs` and `probs` [B, C], their log_softmax and softmax; `hidden` [B, D], `weight` [C, D] and
`bias` [C], the input and parameters of the last linear layer; `labels` int64 [B]; `target_probs` [B, C], one-hot if the
data are labels.
"""
FUSED_INPUTS = frozenset({"hidden", "weight", "bias"})


def derive(args: Iterable[str], logits: Tensor) -> dict[str, Tensor]:
    """Compute the requested inputs from the logits.

    `log_probs` and `probs` have at least float32, on every device. The autocast of torch ensures this on a GPU, but
    not on a CPU.

    Parameters
    ----------
    args : iterable of str
        Requested inputs. Names other than logits, log_probs and probs are skipped.
    logits : Tensor [..., C]
        Logits in any precision.

    Returns
    -------
    dict of str to Tensor [..., C]
    """
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    compute: dict[str, Callable[[], Tensor]] = {
        "logits": lambda: logits,
        "log_probs": lambda: F.log_softmax(wide, -1),
        "probs": lambda: F.softmax(wide, -1),
    }
    autocast = torch.is_autocast_enabled(logits.device.type)
    with torch.autocast(logits.device.type, enabled=False) if autocast else nullcontext():
        return {arg: compute[arg]() for arg in args if arg in compute}
