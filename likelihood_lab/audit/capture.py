"""Record batches of a user's own training run: the inputs of its loss, for the audit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from likelihood_lab.categorical.batches import AuditBatch
from likelihood_lab.errors import UsageError

MAX_BATCHES = 4
_WITH_LOGITS = (F.cross_entropy,)
_WITH_LOG_PROBS = (F.nll_loss, F.kl_div)


class Captured(list[AuditBatch]):
    """List of the recorded batches, for `check(..., batches=...)`."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.head: tuple[Tensor, nn.Linear] | None = None

    def add(self, logits: Tensor, target: Tensor, ignore_index: int = -100) -> None:
        """Record a batch. If the model's last linear layer has just given the logits, record its input and weights too.

        Parameters
        ----------
        logits : Tensor
            Logits [..., C], or log-probabilities.
        target : Tensor
            Labels int64 [...], or target probabilities [..., C].
        ignore_index : int
            Label of rows that do not count.

        Raises
        ------
        UsageError
            The shapes do not fit each other.
        """
        if len(self) >= self.most:
            return
        classes = logits.shape[-1]
        logits, target = logits.detach().cpu().double(), target.detach().cpu()
        hard = not target.is_floating_point()
        if (hard and target.shape != logits.shape[:-1]) or (not hard and target.shape != logits.shape):
            raise UsageError(
                f"capture: logits {list(logits.shape)} and target {list(target.shape)} do not fit; "
                "give labels [...] or target probabilities [..., C] for logits [..., C]"
            )
        valid = target != ignore_index if hard else torch.ones(logits.shape[:-1], dtype=torch.bool)
        if hard:
            probs = F.one_hot(target.where(valid, 0), classes).double() * valid[..., None]
            labels = target.long()
        else:
            probs, labels = target.double(), target.argmax(-1)
        self.append(AuditBatch("captured", logits, labels, probs, valid, *self._fused(logits)))

    def _fused(self, logits: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.head is None:
            return None, None, None
        hidden, layer = self.head
        made = F.linear(*(None if t is None else t.detach().cpu().double() for t in (hidden, layer.weight, layer.bias)))
        if made.shape != logits.shape or not torch.allclose(made, logits, rtol=1e-2, atol=1e-2):
            return None, None, None
        bias = None if layer.bias is None else layer.bias.detach().cpu().double()
        return hidden.detach().cpu().double(), layer.weight.detach().cpu().double(), bias


class _LossRecorder(TorchFunctionMode):
    """Record the inputs of torch's own losses."""

    def __init__(self, captured: Captured) -> None:
        super().__init__()
        self.captured = captured

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _WITH_LOGITS or func in _WITH_LOG_PROBS:
            arguments = dict(zip(("input", "target"), args, strict=False)) | kwargs
            self._record(arguments["input"], arguments["target"], kwargs.get("ignore_index", -100))
        return func(*args, **kwargs)

    def _record(self, logits: Tensor, target: Tensor, ignore_index: int) -> None:
        if logits.ndim > 2:  # torch expects classes second
            logits = logits.movedim(1, -1)
            target = target.movedim(1, -1) if target.is_floating_point() else target
        self.captured.add(logits, target, ignore_index)


@contextmanager
def capture(model: nn.Module, most: int = MAX_BATCHES) -> Iterator[Captured]:
    """Record the first batches that reach a loss inside the block.

    It records calls of torch's `cross_entropy`, `nll_loss` and `kl_div`, and of the modules that use them. For any
    other loss call `.add(logits, target)`. Log-probabilities serve as logits, because they are logits of the same
    probabilities. If the model's last linear layer gives the logits, (hidden, weight, bias) are recorded for fused
    losses.

    Parameters
    ----------
    model : torch.nn.Module
        The model whose logits reach the loss.
    most : int
        Largest number of batches to record.

    Yields
    ------
    Captured
        List of AuditBatch with logits [..., C], labels [...] and target_probs [..., C].

    Raises
    ------
    UsageError
        No loss was called in the block.

    Examples
    --------
    >>> import torch, torch.nn.functional as F
    >>> from likelihood_lab import assert_same_loss, capture
    >>> model, x, y = torch.nn.Linear(20, 5), torch.randn(8, 20), torch.randint(5, (8,))
    >>> with capture(model) as batches:
    ...     F.cross_entropy(model(x), y).backward()
    >>> assert_same_loss(lambda z, y: F.nll_loss(z.log_softmax(1), y), batches=batches, num_classes=(2, 10))
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"capture needs a torch.nn.Module, got {type(model).__name__}")
    captured = Captured(most)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]

    def record_head(layer: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
        if isinstance(layer, nn.Linear):
            captured.head = inputs[0], layer

    hooks = [layer.register_forward_hook(record_head) for layer in layers[-1:]]
    try:
        with _LossRecorder(captured):
            yield captured
    finally:
        for hook in hooks:
            hook.remove()
    if not captured:
        raise UsageError(
            "capture saw no call of cross_entropy, nll_loss or kl_div; "
            "call .add(logits, target) where your own loss is computed"
        )
