"""Fold engine, and its fast path for dense networks without autograd between the layers.

The fast path starts from dL/dlogits. It calls the same products and sums as autograd, on operands of the same layout,
so the weights keep their bits. It saves the bookkeeping of autograd. Its buffers for activations and gradients are
reused, which saves memory traffic. `choose.fast_path_holds` checks it on the model before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.layers import Dropout, DropoutStreams, Linear, fold_modules
from pipeline.engine.stack import Outputs, Stack


class Fold(Stack):
    """Fold engine. `streams` are the generators of the dropout masks, one for each distinct seed.

    With `fast` a dense network is trained by `DenseFastPath`, without autograd between the layers.
    """

    engine, replica_axis = "fold", 1

    def __init__(
        self, modules: Sequence[nn.Module], seeds: Sequence[int], head: str | None = None, fast: bool = False
    ) -> None:
        super().__init__(len(modules), head)
        self.folded = fold_modules(modules)
        self.fast_path = dense_fast_path_of(self.folded) if fast and head is None else None
        self.streams = DropoutStreams(seeds)
        for layer in self.folded.modules():
            if isinstance(layer, Dropout):
                layer.streams = self.streams
        self._hidden: Tensor | None = None
        if head is not None:
            self.folded.get_submodule(head).register_forward_pre_hook(self._capture)

    def _capture(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._hidden = arguments[0]

    def forward(self, inputs: Tensor, fused: bool = False) -> Outputs:
        if self.fast_path is not None and self._uses_fast_path(inputs):
            return Outputs(self.fast_path(inputs))
        logits = self._by_replica(self.folded(inputs.flatten(1, 2)))
        hidden, self._hidden = self._hidden, None
        if not fused:
            return Outputs(logits)
        layer = self.folded.get_submodule(self.head or "")
        if hidden is None or not isinstance(layer, nn.Linear):
            raise ValueError("a fused loss needs a stack that was built with its head's name")
        bias = None if layer.bias is None else layer.bias.unbind()
        return Outputs(logits, self._by_replica(hidden), layer.weight.unbind(), bias)

    def _uses_fast_path(self, inputs: Tensor) -> bool:
        """Return True if the fast path equals autograd. For batch size 1 torch picks another matmul kernel."""
        return self.training and len(inputs) > 1 and not torch.is_autocast_enabled(inputs.device.type)

    def _by_replica(self, folded: Tensor) -> Tensor:
        """Return [B, R*F] as a contiguous [R, B, F]."""
        by_replica: Tensor = folded.unflatten(1, (self.num_replicas, -1)).transpose(0, 1)
        return by_replica.contiguous()

    def weights(self, replica: int) -> dict[str, Tensor]:
        return {name: tensor[replica].clone() for name, tensor in self.folded.state_dict().items()}

    def parameters_of(self, replica: int) -> dict[str, Tensor]:
        return {name: parameter[replica] for name, parameter in self.folded.named_parameters()}

    def gradients_of(self, replica: int) -> dict[str, Tensor]:
        return {name: p.grad[replica] for name, p in self.folded.named_parameters() if p.grad is not None}

    @property
    def positions(self) -> list[Any]:
        return self.streams.positions

    @positions.setter
    def positions(self, positions: list[Any]) -> None:
        self.streams.positions = positions

    def _gradients(self) -> Iterator[Tensor]:
        return (p.grad.flatten(1) for p in self.folded.parameters() if p.grad is not None)

    def gradient_norms(self) -> Tensor:
        norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in self._gradients()])
        whole: Tensor = torch.linalg.vector_norm(norms, dim=0)
        return whole

    def scale_gradients(self, factors: Tensor) -> None:
        for gradient in self._gradients():
            gradient.mul_(factors[:, None])

    def _by_factor(self, before: Sequence[Tensor], factors: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for now, old in zip(self.parameters(), before, strict=True):
            yield now, old, factors.to(now).view(-1, *[1] * (now.ndim - 1))


class DenseFastPath:
    """Dense network without autograd inside: stacked linear layers (weight [R, O, I], bias [R, O]) with ReLU between.

    One training step is one call and one backward pass through the result. Gradients are overwritten, not added.
    """

    def __init__(self, layers: Sequence[Linear]) -> None:
        self.layers = list(layers)
        self._columns: list[Tensor] = []  # input of each layer in the current step, [R, I, B]
        self._buffers: dict[tuple[str, int, int], Tensor] = {}  # by purpose, layer and batch size

    def __call__(self, inputs: Tensor) -> Tensor:
        """Compute logits [R, B, C] from inputs [B, R, ...]."""
        logits: Tensor = _DenseFastPathFunction.apply(self.layers[0].weight, self, inputs)
        return logits

    def forward(self, inputs: Tensor) -> Tensor:
        columns = inputs.flatten(2).permute(1, 2, 0)
        self._columns = [columns]
        for i, layer in enumerate(self.layers):
            out = self._buffer("output", i, layer.weight.shape[:2], columns)
            columns = torch.bmm(layer.weight, columns, out=out)
            if layer.bias is not None:
                columns += layer.bias.unsqueeze(-1)
            if layer is not self.layers[-1]:
                self._columns.append(columns.relu_())
        return columns.transpose(1, 2).contiguous()

    def backward(self, upstream: Tensor) -> None:
        """Compute the gradients of every layer from dL/dlogits [R, B, C]."""
        gradient = upstream.transpose(1, 2).contiguous()
        for i, (layer, columns) in reversed(list(enumerate(zip(self.layers, self._columns, strict=True)))):
            weight = self._buffer("weight", i, layer.weight.shape)
            layer.weight.grad = torch.bmm(gradient, columns.transpose(1, 2), out=weight)
            if layer.bias is not None:
                layer.bias.grad = torch.sum(gradient, 2, out=self._buffer("bias", i, layer.bias.shape))
            if i:
                out = self._buffer("input", i, layer.weight.shape[::2], columns)
                gradient = torch.bmm(layer.weight.transpose(1, 2), gradient, out=out)
                torch.ops.aten.threshold_backward.grad_input(gradient, columns, 0, grad_input=gradient)

    def _buffer(self, purpose: str, layer: int, shape: Sequence[int], columns: Tensor | None = None) -> Tensor:
        """Return a buffer that is reused at every step. Given columns, their batch size is its last axis."""
        batch = 0 if columns is None else columns.shape[2]
        key = (purpose, layer, batch)
        if key not in self._buffers:
            full = shape if columns is None else (*shape, batch)
            self._buffers[key] = self.layers[0].weight.new_empty(full, requires_grad=False)
        return self._buffers[key]


class _DenseFastPathFunction(torch.autograd.Function):
    """Autograd function around the fast path. `weight` is passed only so that autograd calls `backward`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, fast_path: DenseFastPath, inputs: Tensor) -> Tensor:
        ctx.fast_path = fast_path
        return fast_path.forward(inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None, None]:
        ctx.fast_path.backward(upstream)
        return None, None, None


def dense_fast_path_of(folded: nn.Module) -> DenseFastPath | None:
    """Return the fast path of an `nn.Sequential` of Flatten, Linear, ReLU, Linear, ...; None for other models."""
    if type(folded) is not nn.Sequential or any(_is_hooked(layer) for layer in folded.modules()):
        return None
    flatten, layers = folded[:1], list(folded[1:])
    if not any(type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1) for layer in flatten):
        return None
    if [type(layer) for layer in layers] != [Linear, *[nn.ReLU, Linear] * (len(layers) // 2)]:
        return None
    if len({*layers}) < len(layers) or not all(parameter.requires_grad for parameter in folded.parameters()):
        return None
    return DenseFastPath([layer for layer in layers if isinstance(layer, Linear)])


def _is_hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
