"""A stack of dense networks without autograd between its layers: the fast path of the fold engine.

It begins behind dL/dlogits and calls the very products and sums that autograd would, on operands of the same layout,
so that weights keep their bits; what it saves is autograd's bookkeeping and, with memory of its own for activations
and gradients, trips to main memory. `equals_autograd` shows it on the model at hand before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.twins import Linear


class Chain:
    """Linear layers with ReLU between them, R of each: weight [R, O, I] and bias [R, O].

    One training step is a call and the backward pass through what it returned. Gradients are written, not added.
    """

    def __init__(self, layers: Sequence[Linear]) -> None:
        self.layers = list(layers)
        self._columns: list[Tensor] = []  # each layer's input in the step at hand, [R, I, B]
        self._memory: dict[tuple[str, int, int], Tensor] = {}  # by purpose, layer and batch size

    def __call__(self, inputs: Tensor) -> Tensor:
        """Logits [R, B, C] from inputs [B, R, ...]."""
        logits: Tensor = _Behind.apply(self.layers[0].weight, self, inputs)
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
        """Every layer's gradients from dL/dlogits [R, B, C]."""
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
        """The same memory at every step; given columns, with their batch as the last axis."""
        batch = 0 if columns is None else columns.shape[2]
        key = (purpose, layer, batch)
        if key not in self._memory:
            full = shape if columns is None else (*shape, batch)
            self._memory[key] = self.layers[0].weight.new_empty(full, requires_grad=False)
        return self._memory[key]


class _Behind(torch.autograd.Function):
    """Where autograd hands over; the weight is there so that it does."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, chain: Chain, inputs: Tensor) -> Tensor:
        ctx.chain = chain
        return chain.forward(inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None, None]:
        ctx.chain.backward(upstream)
        return None, None, None


def chain_of(folded: nn.Module) -> Chain | None:
    """The chain that a folded model is: Flatten, Linear, ReLU, Linear, ... in an `nn.Sequential`; None for others."""
    if type(folded) is not nn.Sequential or any(_is_hooked(layer) for layer in folded.modules()):
        return None
    flatten, layers = folded[:1], list(folded[1:])
    if not any(type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1) for layer in flatten):
        return None
    if [type(layer) for layer in layers] != [Linear, *[nn.ReLU, Linear] * (len(layers) // 2)]:
        return None
    if len({*layers}) < len(layers) or not all(parameter.requires_grad for parameter in folded.parameters()):
        return None
    return Chain([layer for layer in layers if isinstance(layer, Linear)])


def _is_hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
