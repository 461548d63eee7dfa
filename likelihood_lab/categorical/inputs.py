"""The inputs that a softmax loss may take, and how they are derived from the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LossFn = Callable[..., Any]
Given = dict[str, Sequence[Tensor | None]]  # name -> a tensor for each replica; None for a bias that is not there

INPUTS = ("logits", "log_probs", "probs", "hidden", "weight", "bias", "labels", "target_probs")
"""What `args` may name.

logits [B, C]; log_probs and probs, their log_softmax and softmax; hidden [B, D], weight [C, D] and bias [C], the
last linear layer's input and parameters; labels int64 [B]; target_probs [B, C], one-hot where the data are labels.
"""
FUSED_INPUTS = frozenset({"hidden", "weight", "bias"})


def derive(args: Iterable[str], logits: Tensor) -> dict[str, Tensor]:
    """The logits [..., C] themselves, their log_softmax and softmax, as far as `args` ask for them.

    The last two are in float32 at least, on every device: torch's autocast does it on a GPU and not on a CPU.
    """
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    made: dict[str, Callable[[], Tensor]] = {
        "logits": lambda: logits,
        "log_probs": lambda: F.log_softmax(wide, -1),
        "probs": lambda: F.softmax(wide, -1),
    }
    autocast = torch.is_autocast_enabled(logits.device.type)
    with torch.autocast(logits.device.type, enabled=False) if autocast else nullcontext():
        return {arg: made[arg]() for arg in args if arg in made}
