"""Stack of R plain modules as one module, and the loop engine.

A `Stack` runs R modules of one architecture, each on its own batch, in one of two engines:

fold    one copy of the model in which stacked layers replace the leaf layers. Their tensors [R, ...] hold all replicas
        under the plain names. The model's own forward code runs on channels folded as [B, R*C, ...].
loop    the plain modules, one after the other. The result is bitwise that of the plain module.

Both have the same input and output shapes. `stack.weights(i)` is replica i and loads into the plain module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.object_state import get_object_state, set_object_state
from pipeline.engine.seeding import RandomStream, derive_seed


@dataclass(frozen=True)
class Outputs:
    """Outputs of one forward pass of a stack. The last three are set only if `fused=True`.

    Attributes:
        logits: [R, B, C], contiguous.
        hidden: [R, B, D], the head's input.
        weight: R head weights [C, D].
        bias: R head biases [C], or None if the head has no bias.
    """

    logits: Tensor
    hidden: Tensor | None = None
    weight: Sequence[Tensor] | None = None
    bias: Sequence[Tensor] | None = None

    def first(self, count: int) -> Outputs:
        """Return the outputs of the first `count` replicas."""
        if count == len(self.logits):
            return self
        parts = (self.logits, self.hidden, self.weight, self.bias)
        return Outputs(*(None if part is None else part[:count] for part in parts))  # type: ignore[arg-type]


class Stack(nn.Module):
    """R replicas of one model as one module. `choose.build_stack` makes one.

    Attributes:
        engine: "fold" or "loop".
        replica_axis: axis of the inputs that counts replicas: 1 for fold, 0 for loop.
    """

    engine: str
    replica_axis: int

    def __init__(self, num_replicas: int, head: str | None) -> None:
        super().__init__()
        self.num_replicas, self.head = num_replicas, head

    def forward(self, inputs: Tensor, fused: bool = False) -> Outputs:
        """Compute the logits of every replica on its own batch: inputs [B, R, ...] in fold, [R, B, ...] in loop."""
        raise NotImplementedError

    def weights(self, replica: int) -> dict[str, Tensor]:
        """Return a copy of one replica's parameters and buffers, as the `state_dict` of the plain module."""
        raise NotImplementedError

    def parameters_of(self, replica: int) -> dict[str, Tensor]:
        """Return one replica's parameters under the plain names, without a copy."""
        raise NotImplementedError

    def gradients_of(self, replica: int) -> dict[str, Tensor]:
        """Return one replica's gradients under the plain names, without a copy."""
        raise NotImplementedError

    def gradient_norms(self) -> Tensor:
        """Return the Euclidean norm of each replica's whole gradient, [R]."""
        raise NotImplementedError

    def scale_gradients(self, factors: Tensor) -> None:
        """Multiply each replica's gradient by its factor, in place."""
        raise NotImplementedError

    def scale_step(self, before: Sequence[Tensor], factors: Tensor) -> None:
        """Multiply the length of each replica's last step by its factor, given all parameters before the step.

        Every permitted optimizer moves a weight in proportion to the learning rate. The factor therefore acts as a
        learning rate per replica, up to rounding (the optimizer's rounding error is scaled too). A factor of 1 keeps
        the bits.
        """
        with torch.no_grad():
            for now, old, factor in self._by_factor(before, factors):
                now.copy_(torch.where(factor == 1, now, old + factor * (now - old)))

    def _by_factor(self, before: Sequence[Tensor], factors: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield parameters, their values before the step, and factors that broadcast to them."""
        raise NotImplementedError

    @property
    def positions(self) -> list[Any]:
        """Positions of the random streams of the dropout masks."""
        raise NotImplementedError

    @positions.setter
    def positions(self, positions: list[Any]) -> None:
        raise NotImplementedError

    def training_state(self) -> dict[str, Any]:
        """Return all state that training changes: parameters, buffers, plain attributes, and the streams."""
        parameters = [parameter.detach() for parameter in self.parameters()]
        return {"parameters": parameters, "object_state": get_object_state(self), "streams": self.positions}

    @torch.no_grad()
    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state of another stack of the same replicas."""
        for parameter, value in zip(self.parameters(), state["parameters"], strict=True):
            parameter.copy_(value)
        set_object_state(self, state["object_state"], next(self.parameters()).device)
        self.positions = state["streams"]

    def shared(self, inputs: Tensor) -> Tensor:
        """Return one batch [B, ...] in the layout for all replicas, without a copy."""
        axis = self.replica_axis
        return inputs.unsqueeze(axis).expand(*inputs.shape[:axis], self.num_replicas, *inputs.shape[axis:])

    def clip_gradients(self, max_norm: float) -> None:
        """Clip every replica's gradient by its norm, as `torch.nn.utils.clip_grad_norm_` does for one model."""
        self.scale_gradients((max_norm / (self.gradient_norms() + 1e-6)).clamp(max=1.0))


class Loop(Stack):
    """Loop engine: plain modules, each with a separate random stream for its dropout masks.

    With `fast` the convolutions use the channels-last memory format, which changes results only by rounding.
    """

    engine, replica_axis = "loop", 0

    def __init__(
        self, modules: Sequence[nn.Module], seeds: Sequence[int], head: str | None = None, fast: bool = False
    ) -> None:
        super().__init__(len(modules), head)
        self.replicas = nn.ModuleList(modules)
        if fast:
            self.replicas.to(memory_format=torch.channels_last)
        device = next(modules[0].parameters()).device
        self.streams = [RandomStream(seed, device) for seed in seeds]
        self.evaluation_streams = [RandomStream(derive_seed(seed, "evaluation"), device) for seed in seeds]
        self._hidden: list[Tensor] = []
        if head is not None:
            for module in modules:
                module.get_submodule(head).register_forward_pre_hook(self._capture)

    def _capture(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._hidden.append(arguments[0])

    def _run(self, replica: int, inputs: Tensor) -> Tensor:
        module = self.replicas[replica]
        stream = self.streams[replica] if self.training else self.evaluation_streams[replica].restarted()
        with stream.resumed():
            return module(inputs)  # type: ignore[no-any-return]

    def forward(self, inputs: Tensor, fused: bool = False) -> Outputs:
        self._hidden.clear()
        logits = torch.stack([self._run(r, batch) for r, batch in enumerate(inputs.unbind())])
        if not fused:
            self._hidden.clear()
            return Outputs(logits)
        hidden = torch.stack(self._hidden)
        heads = [module.get_submodule(self.head or "") for module in self.replicas]
        weight, bias = [h.weight for h in heads], [h.bias for h in heads]
        self._hidden.clear()
        return Outputs(logits, hidden, weight, None if bias[0] is None else bias)  # type: ignore[arg-type]

    def weights(self, replica: int) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.replicas[replica].state_dict().items()}

    def parameters_of(self, replica: int) -> dict[str, Tensor]:
        return dict(self.replicas[replica].named_parameters())

    def gradients_of(self, replica: int) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.replicas[replica].named_parameters() if p.grad is not None}

    @property
    def positions(self) -> list[Any]:
        return [stream.position for stream in self.streams]

    @positions.setter
    def positions(self, positions: list[Any]) -> None:
        for stream, position in zip(self.streams, positions, strict=True):
            stream.position = position

    def gradient_norms(self) -> Tensor:
        return torch.stack([
            nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
            for module in self.replicas
        ])  # fmt: skip

    def scale_gradients(self, factors: Tensor) -> None:
        for module, factor in zip(self.replicas, factors.unbind(), strict=True):
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def _by_factor(self, before: Sequence[Tensor], factors: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        rest = iter(before)
        for module, factor in zip(self.replicas, factors.unbind(), strict=True):
            yield from ((now, next(rest), factor.to(now)) for now in module.parameters())
