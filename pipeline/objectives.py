"""Every replica's own loss on its own batch: the declared callable is what runs, once for each replica."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.formulations import Formulation, LossFn, derive, probe
from pipeline.randomness import RandomStream, derive_seed
from pipeline.stack import Outputs


@dataclass(frozen=True)
class Replica:
    """One (arm, seed)."""

    arm: str
    seed: int


@dataclass(frozen=True)
class _Arm:
    formulation: Formulation
    fns: list[LossFn]
    streams: list[RandomStream] | None  # only for a loss that draws random numbers


class Objectives:
    """The objectives of a stack whose replicas are sorted by arm.

    Nothing that one arm needs is computed for another: softmax and its logarithm are taken of an arm's own logits,
    so an arm's bits do not depend on who else is in the trial.
    """

    def __init__(
        self,
        formulations: Sequence[Formulation],
        replicas: Sequence[Replica],
        num_classes: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.arms: list[_Arm] = []
        for formulation in formulations:
            seeds = [replica.seed for replica in replicas if replica.arm == formulation.name]
            draws = probe(formulation, num_classes, device, dtype).draws_random_numbers
            streams = [RandomStream(derive_seed(seed, "loss"), device) for seed in seeds] if draws else None
            self.arms.append(_Arm(formulation, [formulation.instance(device, dtype) for _ in seeds], streams))
        self.sizes = [len(arm.fns) for arm in self.arms]
        self.fused = any(arm.formulation.fused for arm in self.arms)
        self.needs_target_probs = any("target_probs" in arm.formulation.args for arm in self.arms)

    def __call__(self, outputs: Outputs, labels: Tensor, target_probs: Tensor | None) -> list[Tensor]:
        """R scalars in replica order, from logits [R, B, C], labels [R, B] and target_probs [R, B, C]."""
        logits = outputs.logits.split(self.sizes)
        objectives: list[Tensor] = []
        for arm, arm_logits in zip(self.arms, logits, strict=True):
            objectives += self._of_arm(arm, arm_logits, len(objectives), outputs, labels, target_probs)
        return objectives

    def _of_arm(
        self, arm: _Arm, logits: Tensor, first: int, outputs: Outputs, labels: Tensor, target_probs: Tensor | None
    ) -> list[Tensor]:
        size = len(arm.fns)
        mine = slice(first, first + size)
        made: dict[str, Sequence[Tensor]] = {
            name: tensor.unbind() for name, tensor in derive(arm.formulation.args, logits).items()
        }
        made["labels"] = labels[mine].unbind()
        if target_probs is not None:
            made["target_probs"] = target_probs[mine].unbind()
        for name, tensors in (("hidden", outputs.hidden), ("weight", outputs.weight), ("bias", outputs.bias)):
            if name in arm.formulation.args and tensors is not None:
                made[name] = tensors[mine]
        return [self._of_replica(arm, i, {name: made[name][i] for name in arm.formulation.args}) for i in range(size)]

    def _of_replica(self, arm: _Arm, i: int, inputs: dict[str, Tensor]) -> Tensor:
        with arm.streams[i].resumed() if arm.streams else nullcontext():
            return arm.formulation.objective(arm.fns[i], inputs)
