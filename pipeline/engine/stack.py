"""R plain modules as one and back.

A `Stack` runs R modules of one architecture, each on its own batch, in one of two engines:

fold    one copy of the model whose leaf layers are swapped for stacked twins that hold all replicas' tensors,
        [R, ...], under the plain names; the model's own forward code runs on channels folded as [B, R*C, ...].
loop    the plain modules themselves, one after the other: bitwise the plain module.

Both take and give the same shapes. Replica i of a stack is `stack.weights(i)`, which loads into the plain module.
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
    """What one forward pass of a stack gives; the last three only where they were asked for.

    Attributes:
        logits: [R, B, C], contiguous.
        hidden: [R, B, D], the head's input.
        weight: R head weights [C, D].
        bias: R head biases [C], or None where the head has none.
    """

    logits: Tensor
    hidden: Tensor | None = None
    weight: Sequence[Tensor] | None = None
    bias: Sequence[Tensor] | None = None

    def first(self, count: int) -> Outputs:
        """The outputs of the first replicas alone."""
        if count == len(self.logits):
            return self
        parts = (self.logits, self.hidden, self.weight, self.bias)
        return Outputs(*(None if part is None else part[:count] for part in parts))  # type: ignore[arg-type]


class Stack(nn.Module):
    """R replicas of one model as one module; see `fold` and `loop` for how to make one.

    Attributes:
        engine: "fold" or "loop".
        replica_axis: which axis of the inputs counts replicas: 1 for fold, 0 for loop.
    """

    engine: str
    replica_axis: int

    def __init__(self, num_replicas: int, head: str | None) -> None:
        super().__init__()
        self.num_replicas, self.head = num_replicas, head

    def forward(self, inputs: Tensor, fused: bool = False) -> Outputs:
        """Logits of every replica on its own batch: inputs [B, R, ...] in fold, [R, B, ...] in loop."""
        raise NotImplementedError

    def weights(self, replica: int) -> dict[str, Tensor]:
        """A copy of one replica's parameters and buffers, as the plain module's `state_dict`."""
        raise NotImplementedError

    def parameters_of(self, replica: int) -> dict[str, Tensor]:
        """One replica's parameters, not copied, under the plain names."""
        raise NotImplementedError

    def gradient_norms(self) -> Tensor:
        """Euclidean norm of each replica's whole gradient, [R]."""
        raise NotImplementedError

    def scale_gradients(self, factors: Tensor) -> None:
        """Multiply each replica's gradient by its own factor, in place."""
        raise NotImplementedError

    def scale_step(self, before: Sequence[Tensor], factors: Tensor) -> None:
        """Make each replica's last step its own factor times as long, given all parameters as they were before it.

        Every optimizer that a stack takes moves a weight in proportion to the learning rate, so this is a rate of the
        replica's own, up to rounding: what the optimizer rounded is made longer with the step. Where the factor is 1
        the bits stay as they are.
        """
        with torch.no_grad():
            for now, old, factor in self._by_factor(before, factors):
                now.copy_(torch.where(factor == 1, now, old + factor * (now - old)))

    def _by_factor(self, before: Sequence[Tensor], factors: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Parameters, what they were, and factors that broadcast to them."""
        raise NotImplementedError

    @property
    def positions(self) -> list[Any]:
        """Where the streams of random numbers stand that dropout masks are drawn from."""
        raise NotImplementedError

    @positions.setter
    def positions(self, positions: list[Any]) -> None:
        raise NotImplementedError

    def progress(self) -> dict[str, Any]:
        """All that training changes: parameters, buffers, what the model's code remembers, and the streams."""
        parameters = [parameter.detach() for parameter in self.parameters()]
        return {"parameters": parameters, "memory": get_object_state(self), "streams": self.positions}

    @torch.no_grad()
    def go_on_from(self, progress: Mapping[str, Any]) -> None:
        """Stand where another stack of the same replicas stood."""
        for parameter, value in zip(self.parameters(), progress["parameters"], strict=True):
            parameter.copy_(value)
        set_object_state(self, progress["memory"], next(self.parameters()).device)
        self.positions = progress["streams"]

    def shared(self, inputs: Tensor) -> Tensor:
        """One batch [B, ...] laid out for all replicas, without a copy."""
        axis = self.replica_axis
        return inputs.unsqueeze(axis).expand(*inputs.shape[:axis], self.num_replicas, *inputs.shape[axis:])

    def clip_gradients(self, max_norm: float) -> None:
        """Clip every replica's gradient by its own norm, as `torch.nn.utils.clip_grad_norm_` does for one model."""
        self.scale_gradients((max_norm / (self.gradient_norms() + 1e-6)).clamp(max=1.0))


class Loop(Stack):
    """The loop engine: plain modules, each drawing its dropout masks from a stream of its own.

    With `fast` their convolutions keep pictures channels last, which changes bits and nothing else.
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
