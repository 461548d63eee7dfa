"""Every replica's own loss on its own batch: the declared callable is what runs, once for each replica."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UsageError, first_line, is_out_of_memory
from pipeline.formulations import FUSED_INPUTS, Formulation, Given, LossFn, derive, probe
from pipeline.memory import memory_of, remind
from pipeline.randomness import RandomStream, derive_seed
from pipeline.stack import Outputs
from pipeline.variation import EVERYTHING, Variation

_NOTHING = nullcontext()


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

    Attributes:
        seeds: the distinct seeds; labels and targets come once for each.
        lr_scales: what each replica's learning rate is multiplied by.
    """

    def __init__(
        self,
        formulations: Sequence[Formulation],
        replicas: Sequence[Replica],
        num_classes: int,
        device: torch.device,
        dtype: torch.dtype,
        variation: Variation = EVERYTHING,
    ) -> None:
        self.seeds = list(dict.fromkeys(replica.seed for replica in replicas))
        self.slots = [self.seeds.index(replica.seed) for replica in replicas]
        self.raised: dict[int, tuple[int, str]] = {}  # replica -> the call at which its loss first raised, and what
        self.calls = 0
        self.device = device
        self.arms: list[_Arm] = []
        for formulation in formulations:
            seeds = [variation.training(replica.seed) for replica in replicas if replica.arm == formulation.name]
            draws = probe(formulation, num_classes, device, dtype).draws_random_numbers
            streams = [RandomStream(derive_seed(seed, "loss"), device) for seed in seeds] if draws else None
            self.arms.append(_Arm(formulation, [formulation.instance(device, dtype) for _ in seeds], streams))
        self.sizes = [len(arm.fns) for arm in self.arms]
        self.fused = any(arm.formulation.fused for arm in self.arms)
        self.lr_scales = [arm.formulation.lr_scale for arm in self.arms for _ in arm.fns]
        self.needs_target_probs = any("target_probs" in arm.formulation.args for arm in self.arms)

    def __call__(self, outputs: Outputs, labels: Tensor, target_probs: Tensor | None) -> list[Tensor]:
        """R scalars in replica order, from logits [R, B, C], labels [S, B] and target_probs [S, B, C] by seed."""
        by_seed = {"labels": labels} if target_probs is None else {"labels": labels, "target_probs": target_probs}
        objectives: list[Tensor] = []
        self.calls += 1
        for arm, logits in zip(self.arms, outputs.logits.split(self.sizes), strict=True):
            mine = slice(len(objectives), len(objectives) + len(arm.fns))
            given: Given = {name: tensor.unbind() for name, tensor in derive(arm.formulation.args, logits).items()}
            for name in arm.formulation.args:
                if name in by_seed:  # the arm's own copy: what writes behind torch's back reaches no other
                    rows = by_seed[name].clone().unbind()
                    given[name] = [rows[slot] for slot in self.slots[mine]]
                elif name in FUSED_INPUTS:
                    given[name] = _of_fused(outputs, name, mine)
            with arm.formulation.unwritten(given):
                objectives += self._of_arm(arm, given, logits, mine.start)
        return objectives

    def progress(self) -> dict[str, Any]:
        """What the losses remember, where their streams stand, and which have raised."""
        return {
            "calls": self.calls,
            "raised": self.raised,
            "memory": [[memory_of(fn) for fn in arm.fns] for arm in self.arms],
            "streams": [[stream.position for stream in arm.streams or ()] for arm in self.arms],
        }

    def go_on_from(self, progress: Mapping[str, Any]) -> None:
        """Stand where the objectives of the same replicas stood."""
        self.calls, self.raised = progress["calls"], progress["raised"]
        for arm, memories, positions in zip(self.arms, progress["memory"], progress["streams"], strict=True):
            for fn, memory in zip(arm.fns, memories, strict=True):
                remind(fn, memory, self.device)
            for stream, position in zip(arm.streams or (), positions, strict=True):
                stream.position = position

    def _of_arm(self, arm: _Arm, given: Given, logits: Tensor, first: int) -> list[Tensor]:
        batches = zip(*(given[name] for name in arm.formulation.args), strict=True)
        objectives = []
        for i, (fn, batch) in enumerate(zip(arm.fns, batches, strict=True)):
            try:
                with arm.streams[i].resumed() if arm.streams else _NOTHING:
                    objectives.append(arm.formulation.objective(fn, batch))
            except UsageError:
                raise
            except (Exception, SystemExit) as error:  # this replica has failed; its neighbours go on
                if is_out_of_memory(error):
                    raise
                self.raised.setdefault(
                    first + i, (self.calls, f"the loss raised {type(error).__name__}: {first_line(error)}")
                )
                objectives.append(logits[i].sum() * torch.nan)
        return objectives


def _of_fused(outputs: Outputs, name: str, mine: slice) -> Sequence[Tensor | None]:
    """An arm's share of `hidden`, `weight` or `bias`; a head may have no bias."""
    tensors: Sequence[Tensor] | None = getattr(outputs, name)
    return [None] * (mine.stop - mine.start) if tensors is None else tensors[mine]
