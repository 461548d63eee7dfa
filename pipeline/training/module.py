"""Lightning module that trains all replicas of a stack on paired batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from likelihood_lab.categorical.metrics import MetricSums
from likelihood_lab.errors import UsageError
from pipeline.data.dataset import Dataset
from pipeline.engine.seeding import EVERYTHING, Variation, derive_seed
from pipeline.engine.sketch import sketch, snapshot_steps
from pipeline.engine.stack import Stack
from pipeline.replica import Replica
from pipeline.training.objectives import Objectives

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Recipe:
    """Training settings that all replicas share."""

    epochs: int
    batch_size: int
    make_optimizer: Callable[..., torch.optim.Optimizer]
    schedule: str = "constant"
    warmup_steps: int = 0
    clip_norm: float | None = None
    autocast: bool = False
    inner_steps: int = 11
    variation: Variation = EVERYTHING

    def steps_per_epoch(self, num_examples: int) -> int:
        """Return the number of batches in an epoch. The last one may be short."""
        return math.ceil(num_examples / self.batch_size)

    def rate(self, step: int, last: int) -> float:
        """Return the factor of the learning rate at a step: linear warm-up, then constant or half a cosine to 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warm * (0.5 * (1 + math.cos(math.pi * step / last)) if self.schedule == "cosine" else 1.0)


@dataclass(frozen=True)
class Batch:
    """Examples and targets of one step, with a row for each distinct seed.

    Attributes:
        indices: [S, B].
        layout: indices for every replica in the input layout of the stack: [B, R] or [R, B].
        labels: [S, B].
        target_probs: [S, B, C], or None if no loss takes them.
    """

    indices: Tensor
    layout: Tensor
    labels: Tensor
    target_probs: Tensor | None


@dataclass(frozen=True)
class Divergence:
    """First step at which a replica failed or was not finite, and the cause."""

    step: int
    cause: str


class StepChunks:
    """Epoch as slices of consecutive step numbers. The data are gathered inside the step.

    It yields slices and is no sequence: Lightning treats a list as several loaders, and copies a range to the device.
    """

    def __init__(self, num_steps: int, size: int) -> None:
        self.starts, self.num_steps, self.size = range(0, num_steps, size), num_steps, size

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[slice]:
        return (slice(start, min(start + self.size, self.num_steps)) for start in self.starts)


class StackTrainingModule(pl.LightningModule):
    """Lightning module that trains all replicas of one stack.

    One gather by index reads the data of a step: a row of `indices` [S, B] is the batch of all losses of one seed.
    One Lightning `training_step` does several optimizer steps and logs nothing. Measurements stay tensors until the
    end.
    """

    def __init__(
        self,
        stack: Stack,
        objectives: Objectives,
        replicas: Sequence[Replica],
        data: Dataset,
        input_shape: tuple[int, int, int],
        recipe: Recipe,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.stack, self.objectives, self.replicas, self.recipe = stack, objectives, list(replicas), recipe
        self.data, self.input_shape = data, input_shape
        self.num_examples = len(data.splits["train"])
        self.last_step = recipe.epochs * recipe.steps_per_epoch(self.num_examples)
        self.epochs_done = self.steps_done = 0
        self.sketch_steps = snapshot_steps(self.last_step)
        self.sketches: list[Tensor] = []  # one [R, width] for each of these steps
        self.captured_steps = {1, self.last_step // 4, self.last_step // 2, self.last_step} - {0}
        self.captured_batches: list[tuple[int, Tensor, Tensor]] = []  # step, logits [R, B, C], examples [S, B]
        fillers = stack.num_replicas - len(replicas)
        self._slots = torch.tensor(objectives.slots + objectives.slots[-1:] * fillers)
        self._measured: list[tuple[str, int, Tensor]] = []
        device = next(stack.parameters()).device
        self._slots = self._slots.to(device)
        scales = objectives.lr_scales + [1.0] * fillers
        self._lr_scales = None if set(scales) == {1.0} else torch.tensor(scales, dtype=torch.float64, device=device)
        self._first_nonfinite = torch.zeros(len(self.replicas), dtype=torch.int64, device=device)
        self._objectives: list[tuple[int, Tensor]] = []  # of the current epoch: batch size, values [R]
        self._optimizer_state: Any = None  # of the checkpoint, in a resumed training

    # --- hooks that Lightning calls

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.recipe.make_optimizer(self.stack.parameters())

    def train_dataloader(self) -> StepChunks:
        return StepChunks(self.recipe.steps_per_epoch(self.num_examples), self.recipe.inner_steps)

    def on_fit_start(self) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)  # noqa: S101 - there is one
        self._optimizer = optimizer
        self._trained = list(self.stack.parameters())
        self._base_rates = [group["lr"] for group in optimizer.param_groups]
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)

    def on_train_epoch_start(self) -> None:
        train = self.data.splits["train"]
        self._orders = torch.stack([train[self._order(seed)] for seed in self.objectives.seeds])

    def _order(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(
            derive_seed(self.recipe.variation.training(seed), "order", self.epochs_done)
        )
        return torch.randperm(self.num_examples, generator=generator).to(self._slots.device)

    def training_step(self, steps: slice, batch_idx: int) -> None:
        for batch in self._batches(steps):
            self._step(batch)

    def _batches(self, steps: slice) -> Iterator[Batch]:
        """Yield the batches of these steps. All but the inputs, which are large, is gathered for all steps at once."""
        size, axis = self.recipe.batch_size, self.stack.replica_axis
        indices = self._orders[:, steps.start * size : steps.stop * size]
        layout = indices[self._slots].movedim(0, axis).contiguous()
        labels = self.data.labels[indices]
        target_probs = self.data.target_probs(indices) if self.objectives.needs_target_probs else None
        for start in range(0, indices.shape[1], size):
            one = slice(start, start + size)
            yield Batch(
                indices=indices[:, one],
                layout=layout[one] if axis else layout[:, one],
                labels=labels[:, one],
                target_probs=None if target_probs is None else target_probs[:, one],
            )

    def on_train_epoch_end(self) -> None:
        self._finish_epoch_objectives()
        self._evaluate("val")
        self.epochs_done += 1

    def on_train_end(self) -> None:
        for split in ("train", "test"):
            self._evaluate(split)

    # --- checkpoints

    def training_state(self) -> dict[str, Any]:
        """Return all state that the next epoch and the records of earlier epochs need."""
        return {
            "epochs_done": self.epochs_done,
            "steps_done": self.steps_done,
            "stack": self.stack.training_state(),
            "optimizer": self._optimizer.state_dict(),
            "objectives": self.objectives.training_state(),
            "measured": self._measured,
            "first_nonfinite": self._first_nonfinite,
            "sketches": self.sketches,
            "captured_batches": self.captured_batches,
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Restore, before `fit`, the state of the same replicas at the end of an epoch."""
        device = self._slots.device
        self.epochs_done, self.steps_done = state["epochs_done"], state["steps_done"]
        self.stack.load_training_state(state["stack"])
        self._optimizer_state = state["optimizer"]
        self.objectives.load_training_state(state["objectives"])
        self._measured, self.sketches = state["measured"], state["sketches"]
        self._first_nonfinite = state["first_nonfinite"].to(device)
        self.captured_batches = [(step, z.to(device), i.to(device)) for step, z, i in state["captured_batches"]]

    # --- the step

    def _step(self, batch: Batch) -> None:
        """Do one optimizer step of every replica on its own batch."""
        self._set_rate()
        with self._autocast():
            objectives = torch.stack(self._forward(batch))
        objectives.backward(torch.ones_like(objectives))
        if self.objectives.fused:  # a loss that does not use the bias must not depend on a neighbour that does
            for parameter in self._trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        if self.recipe.clip_norm is not None:
            self.stack.clip_gradients(self.recipe.clip_norm)
        self._update()
        for parameter in self._trained:
            parameter.grad = None
        self.steps_done += 1
        self._objectives.append((batch.indices.shape[1], objectives.detach()))
        if self.steps_done in self.sketch_steps:
            self._add_sketch()

    def _update(self) -> None:
        """Do the optimizer's step, scaled for replicas whose loss declares an `lr_scale`."""
        if self._lr_scales is None:
            self._optimizer.step()
            return
        before = [parameter.detach().clone() for parameter in self._trained]
        self._optimizer.step()
        self.stack.scale_step(before, self._lr_scales)

    def _forward(self, batch: Batch) -> list[Tensor]:
        inputs = self._take(batch.layout)
        outputs = self.stack(inputs, fused=self.objectives.fused).first(len(self.replicas))
        if self.steps_done + 1 in self.captured_steps:
            self.captured_batches.append((self.steps_done + 1, outputs.logits.detach().clone(), batch.indices.clone()))
        return self.objectives(outputs, batch.labels, batch.target_probs)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Return the bfloat16 autocast context if the recipe asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.recipe.autocast else nullcontext()

    def _take(self, indices: Tensor) -> Tensor:
        """Return the inputs. Grey pictures are repeated if the model takes colour."""
        return self.data.take(indices)[0].expand(*indices.shape, *self.input_shape)

    def _set_rate(self) -> None:
        if self.recipe.schedule == "constant" and self.steps_done >= self.recipe.warmup_steps:
            factor = 1.0
        else:
            factor = self.recipe.rate(self.steps_done, self.last_step)
        for group, rate in zip(self._optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor

    # --- measurements

    def _finish_epoch_objectives(self) -> None:
        """Record the epoch's mean objective over examples, and the first step with an objective that is not finite."""
        sizes, objectives = zip(*self._objectives, strict=True)
        values = torch.stack(objectives).double()  # [steps, R]
        self._measure("train/objective", torch.einsum("s,sr->r", values.new_tensor(sizes), values) / self.num_examples)
        bad = ~values.isfinite()
        first = self.steps_done - len(values) + 1 + bad.int().argmax(0)
        fresh = bad.any(0) & (self._first_nonfinite == 0)
        self._first_nonfinite = torch.where(fresh, first, self._first_nonfinite)
        self._objectives.clear()

    def _add_sketch(self) -> None:
        replicas = range(len(self.replicas))
        self.sketches.append(torch.stack([sketch(self.stack.parameters_of(r)) for r in replicas]))

    def _measure(self, metric: str, values: Tensor) -> None:
        self._measured.append((metric, self.steps_done, values.clone()))

    @torch.no_grad()
    def _evaluate(self, split: str) -> None:
        metrics = MetricSums(len(self.replicas), self.device)
        was_training = self.stack.training
        self.stack.eval()
        for indices in evaluation_batches(self.data.splits[split]):
            inputs, labels = self._take(indices), self.data.labels[indices]
            with self._autocast():
                logits = self.stack(self.stack.shared(inputs)).first(len(self.replicas)).logits
            metrics.update(logits, labels, self.data.target_probs(indices), self.data.true_probs(indices))
        self.stack.train(was_training)
        for metric, values in metrics.result().items():
            self._measure(f"{split}/{metric}", values)

    def batches(self, replica: int) -> list[dict[str, Any]]:
        """Return the logits and targets of one replica at the first step, and after 1/4, 1/2 and all of the steps."""
        seed = self.objectives.slots[replica]
        # Cloned, because torch saves the whole storage of a view.
        mine = ((step, logits[replica].clone(), indices[seed]) for step, logits, indices in self.captured_batches)
        return [{"step": step, "logits": logits.cpu(), **self._targets(indices)} for step, logits, indices in mine]

    def _targets(self, indices: Tensor) -> dict[str, Tensor]:
        """Return labels [B] and, for soft targets, targets [B, C] in float64, on the CPU."""
        found = {"labels": self.data.labels[indices]}
        if self.data.soft_targets is not None:
            found["target_probs"] = self.data.soft_targets[indices]
        return {name: tensor.cpu() for name, tensor in found.items()}

    def latest(self, metric: str) -> dict[str, float]:
        """Return the last measured value of a metric, as the mean over the replicas of each arm."""
        values = next(values for name, _, values in reversed(self._measured) if name == metric)
        arms = dict.fromkeys(replica.arm for replica in self.replicas)
        return {
            arm: values[[i for i, replica in enumerate(self.replicas) if replica.arm == arm]].mean().item()
            for arm in arms
        }

    def history(self, replica: int) -> pd.DataFrame:
        """Return all measurements of one replica: metric, step, value."""
        metrics, steps, values = zip(*self._measured, strict=True)
        column = torch.stack([each.cpu() for each in values])[:, replica]
        return pd.DataFrame({"metric": list(metrics), "step": np.array(steps), "value": column.numpy()})

    def divergences(self) -> Iterator[Divergence | None]:
        """Yield for each replica when and how objective, weights or logits became non-finite, or None."""
        final = {metric: values for metric, _, values in self._measured}
        for replica, step in enumerate(self._first_nonfinite.tolist()):
            weights = self.stack.weights(replica)
            if replica in self.objectives.raised:
                yield Divergence(*self.objectives.raised[replica])
            elif step:
                yield Divergence(step, "the objective is not finite")
            elif not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
                yield Divergence(self.last_step, "the weights are not finite")
            elif not all(bool(values[replica].isfinite()) for values in final.values()):
                yield Divergence(self.last_step, "the logits are not finite")
            else:
                yield None


def evaluation_batches(indices: Tensor) -> tuple[Tensor, ...]:
    """Split examples into batches, none of a single example: in the fold engine its bits depend on the neighbours."""
    size = next(size for size in range(EVALUATION_BATCH, 0, -1) if len(indices) % size != 1 or len(indices) == 1)
    batches: tuple[Tensor, ...] = indices.split(size)
    return batches


def fit(module: StackTrainingModule, callbacks: Sequence[pl.Callback], accelerator: str) -> None:
    """Train the stack. SIGINT and SIGTERM raise KeyboardInterrupt."""
    trainer = pl.Trainer(
        accelerator=accelerator, devices=1, max_epochs=module.recipe.epochs - module.epochs_done,
        callbacks=list(callbacks), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    try:
        trainer.fit(module)
    except SystemExit as error:  # Lightning raises it for both signals
        if isinstance(error, SIGTERMException) or isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        line = f"the model's own code calls sys.exit({error.code}) in training; raise an error there"
        raise UsageError(line) from error
    if module.steps_done < module.last_step:  # Lightning treats every StopIteration as the end
        raise RuntimeError(f"training ended after {module.steps_done} of {module.last_step} steps")
