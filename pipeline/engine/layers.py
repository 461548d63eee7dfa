"""Stacked layers: each computes R torch layers of one shape at once, with the replicas folded into channels.

A stacked layer is a subclass of the plain layer and keeps its attributes. Its tensors keep the plain names and have a
leading replica axis. Its inputs and outputs are [B, R*C, ...], replica-major. Therefore the model's own code between
the layers (ReLU, pooling, flatten, residual additions) works unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CannotFoldError(Exception):
    """A model has a layer without a stacked version, or its modules differ."""


def _flat(tensor: Tensor | None) -> Tensor | None:
    """Return [R, C] as [R*C] for torch's functions. It is a view, so buffers are updated in place."""
    return None if tensor is None else tensor.view(-1)


def _with_contiguous_gradient(tensor: Tensor) -> Tensor:
    """Make the gradient of the tensor contiguous. The bits of a sum over a strided one depend on the slot."""
    if tensor.requires_grad:
        tensor.register_hook(torch.Tensor.contiguous)
    return tensor


class Linear(nn.Linear):
    """weight [R, O, I], bias [R, O]. It computes W x^T, because [R, O, B] is [B, R*O] without a copy."""

    def forward(self, input: Tensor) -> Tensor:
        replicas, out_features, in_features = self.weight.shape
        columns = input.reshape(-1, replicas * in_features).t().unflatten(0, (replicas, in_features))
        out = torch.bmm(self.weight, columns)
        if self.bias is not None:
            out += self.bias.unsqueeze(-1)
        return _with_contiguous_gradient(out).flatten(0, 1).t().view(*input.shape[:-1], replicas * out_features)


class _Conv:
    """R convolutions as one grouped convolution with R times the groups."""

    weight: Tensor
    bias: Tensor | None
    groups: int

    def forward(self, input: Tensor) -> Tensor:
        replicas = self.weight.shape[0]
        plain_groups, self.groups = self.groups, self.groups * replicas
        try:
            return self._conv_forward(input, self.weight.flatten(0, 1), _flat(self.bias))  # type: ignore[attr-defined, no-any-return]
        finally:
            self.groups = plain_groups


class Conv1d(_Conv, nn.Conv1d):
    """weight [R, O, I/g, K], bias [R, O]."""


class Conv2d(_Conv, nn.Conv2d):
    """weight [R, O, I/g, K, K], bias [R, O]."""


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Statistics are per channel, so R*C channels act as R separate layers."""

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            input,
            _flat(self.running_mean),
            _flat(self.running_var),
            _flat(self.weight),
            _flat(self.bias),
            self.training or self.running_mean is None,
            self._momentum(),
            self.eps,
        )

    def _momentum(self) -> float:
        """Return the weight of a batch in the running statistics. Without momentum they are the mean of all batches."""
        if self.momentum is not None:
            return self.momentum
        if not self.training or self.num_batches_tracked is None:
            return 0.0
        return 1.0 / float(self.num_batches_tracked.flatten()[0])


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """Tensors are [R, C], inputs [B, R*C] or [B, R*C, L].

    Vectors are normalised as one signal [1, R*C, B], the memory order of `Linear`. Each channel is then summed over a
    separate row, so its bits do not depend on the slot.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim != 2:
            return super().forward(input)
        rows = super().forward(input.t().contiguous().unsqueeze(0)).squeeze(0)
        return _with_contiguous_gradient(rows).t()


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Tensors are [R, C], inputs [B, R*C, H, W]."""


class GroupNorm(nn.GroupNorm):
    """Tensors are [R, C]; R*C channels have R times the groups."""

    def forward(self, input: Tensor) -> Tensor:
        replicas = input.shape[1] // self.num_channels
        return F.group_norm(input, self.num_groups * replicas, _flat(self.weight), _flat(self.bias), self.eps)


class LayerNorm(nn.LayerNorm):
    """Tensors are [R, F], inputs [..., R*F]. Only one axis can be normalised."""

    def forward(self, input: Tensor) -> Tensor:
        if len(self.normalized_shape) != 1:
            raise CannotFoldError("LayerNorm over more than one axis cannot be stacked")
        out = F.layer_norm(input.unflatten(-1, (-1, *self.normalized_shape)), self.normalized_shape, eps=self.eps)
        if self.elementwise_affine:
            out = out * self.weight
            out = out if self.bias is None else out + self.bias
        return out.flatten(-2)


class DropoutStreams:
    """Generators of dropout masks: one for each distinct seed, shared by all layers and all replicas of that seed."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = list(dict.fromkeys(seeds))
        self.slots = [self.seeds.index(seed) for seed in seeds]
        self.generators: list[torch.Generator] = []
        self._initial_states: list[Tensor] = []  # initial states of the generators after a resume

    @property
    def positions(self) -> list[Tensor]:
        """States of the generators; empty before the first draw."""
        return [generator.get_state() for generator in self.generators]

    @positions.setter
    def positions(self, states: list[Tensor]) -> None:
        self.generators, self._initial_states = [], states

    def keep(self, like: Tensor, probability: float) -> Tensor:
        """Draw masks of zeros and ones, [B, R*C, ...], equal to plain dropout's after `manual_seed(seed)`."""
        if not self.generators:
            self.generators = [torch.Generator(like.device).manual_seed(seed) for seed in self.seeds]
            for generator, state in zip(self.generators, self._initial_states, strict=False):
                generator.set_state(state)
        shape = (like.shape[0], like.shape[1] // len(self.slots), *like.shape[2:])
        masks = [
            torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(probability, generator=generator)
            for generator in self.generators
        ]
        return torch.stack([masks[slot] for slot in self.slots], 1).flatten(1, 2)


class Dropout(nn.Dropout):
    """Dropout with masks from the generator of the replica's seed, never from the global one."""

    streams: DropoutStreams

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return input
        if self.p == 1.0:
            return input * 0.0
        return input * self.streams.keep(input, 1 - self.p).div_(1 - self.p)


STACKED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.GroupNorm: GroupNorm,
    nn.LayerNorm: LayerNorm,
    nn.Dropout: Dropout,
}


def fold_modules(modules: Sequence[nn.Module]) -> nn.Module:
    """Return a copy of the first module with stacked leaf layers and every tensor stacked to [R, ...].

    Raises:
        CannotFoldError: a layer with tensors has no stacked version, or the modules' tensors differ in name or shape.
    """
    folded = copy.deepcopy(modules[0])
    for name, layer in folded.named_modules():
        if type(layer) in STACKED_LAYERS:
            layer.__class__ = STACKED_LAYERS[type(layer)]
        elif [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]:
            raise CannotFoldError(f"{type(layer).__name__} ({name or 'the model itself'}) has no stacked version")
    states = [dict([*m.named_parameters(), *m.named_buffers()]) for m in modules]
    for name, tensor in [*folded.named_parameters(), *folded.named_buffers()]:
        if any(name not in state or state[name].shape != tensor.shape for state in states):
            raise CannotFoldError(f"the modules differ in the shape of {name}, or one has no {name}")
        tensor.data = torch.stack([state[name].detach() for state in states])
    return folded
