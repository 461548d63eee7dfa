"""The same training by `torch.func.vmap`, without code of this project, for comparison.

It is vmap(grad(functional_call)) over stacked parameters, one call for each loss, then SGD with momentum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from pipeline.models import ModelBuilder

Loss = Callable[[Tensor, Tensor], Tensor]


class Vmapped:
    """Replicas of one model, `counts[name]` for each loss. `step` takes inputs [R, B, ...] and labels [R, B]."""

    def __init__(self, builder: ModelBuilder, losses: Mapping[str, Loss], counts: Mapping[str, int], lr: float) -> None:
        self.counts = counts
        seeds = [seed for count in counts.values() for seed in range(count)]
        modules = [builder(seed) for seed in seeds]
        self.parameters, buffers = stack_module_state(modules)  # type: ignore[arg-type]
        if buffers:
            raise ValueError("vmap does not support a model with running statistics: it would share in-place updates")
        self.optimizer = torch.optim.SGD(self.parameters.values(), lr=lr, momentum=0.9)
        self.gradients = {arm: vmap(grad(_objective(modules[0].to("meta"), losses[arm]))) for arm in counts}

    def step(self, inputs: Tensor, labels: Tensor) -> None:
        """Do one optimizer step of every replica."""
        begin, found = 0, []
        with warnings.catch_warnings():
            # kl_div has no batching rule: functorch loops over the replicas and warns. The loop is part of its cost.
            warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
            for arm, count in self.counts.items():
                mine = slice(begin, begin + count)
                weights = {name: stacked.detach()[mine] for name, stacked in self.parameters.items()}
                found.append(self.gradients[arm](weights, inputs[mine], labels[mine]))
                begin += count
        for name, stacked in self.parameters.items():
            stacked.grad = torch.cat([gradients[name] for gradients in found])
        self.optimizer.step()


def _objective(skeleton: nn.Module, loss: Loss) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    def objective(weights: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        return loss(functional_call(skeleton, weights, (inputs,)), labels)

    return objective
