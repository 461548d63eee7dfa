"""The set-up of a trial: the objects that its configuration declares, and the fingerprint of every run."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from likelihood_lab.errors import UsageError, first_line
from likelihood_lab.stats.pairs import METRICS
from pipeline.build import bind_target, formulation_of, load_dataset
from pipeline.config import schema as conf
from pipeline.config.targets import locate
from pipeline.data.dataset import Dataset
from pipeline.engine.choose import (
    build_stack,
    choose_engine,
    fast_path_holds,
    find_head,
    gains_channels_last,
    has_convolutions,
    pads_tiles,
    tile_size,
)
from pipeline.engine.seeding import SCOPE, Variation
from pipeline.engine.stack import Stack
from pipeline.models import ModelBuilder
from pipeline.replica import Replica
from pipeline.runtime import choose_device, environment_record, keep_freed_memory, set_numerics
from pipeline.training.controls import control, declared
from pipeline.training.module import Recipe
from pipeline.training.objectives import Formulation, code_digest, probe
from pipeline.verdict.plan import AnalysisPlan, TrialContext

ENGINE_VERSION = 1  # raise it when the bits of a run change

# Optimizers that update each weight independently of the others, so that stacked replicas do not mix.
ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta")

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bf16_mixed": torch.float32}


def context_of(setup: TrialSetup, plan: AnalysisPlan, command: str) -> TrialContext:
    """Return what the metrics of a setup mean."""
    train = setup.data.splits["train"]
    if setup.data.soft_targets is None:
        frequencies = torch.bincount(setup.data.labels[train]).double() / len(train)
    else:
        frequencies = setup.data.soft_targets[train].mean(0)
    steps = setup.recipe.epochs * setup.recipe.steps_per_epoch(len(train))
    return TrialContext(
        num_classes=setup.data.num_classes,
        label_entropy=-torch.xlogy(frequencies, frequencies).sum().item(),
        scope=(
            f"{_spans(plan.seeds)}{SCOPE[setup.recipe.variation.vary]}, {steps} steps of "
            f"{conf.short_name(setup.identity['optimizer']['_target_'])} in {setup.precision}, "
            f"{setup.data.name}, {setup.builder.name}, on {setup.environment['device']}"
        ),
        command=command,
    )


def check_resolution(plan: AnalysisPlan, setup: TrialSetup) -> None:
    """Refuse an accuracy margin of less than two test examples."""
    examples = len(setup.data.splits["test"])
    margin = plan.margins.get("accuracy")
    if margin is not None and margin < 2 / examples:
        raise UsageError(
            f"dataset.margins.accuracy={margin} is below the resolution of the test set; "
            f"give at least 2/{examples} = {2 / examples:.4f}"
        )


def check_truth(plan: AnalysisPlan, setup: TrialSetup) -> None:
    """Refuse a metric that needs P(y | x) if the dataset does not know it."""
    asked = [name for name in (*plan.primary, *plan.margins) if METRICS[name].needs_truth]
    if asked and setup.data.truth is None:
        raise UsageError(
            f"dataset.primary or dataset.margins names '{asked[0]}', but {setup.data.name} does not know P(y | x); "
            "leave it out"
        )


def _spans(seeds: Sequence[int]) -> str:
    """Return "seed 7", "seeds 0-9" for consecutive seeds, else a list."""
    ordered = sorted(seeds)
    if len(ordered) == 1:
        return f"seed {ordered[0]}"
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"seeds {ordered[0]}-{ordered[-1]}"
    return f"seeds {', '.join(map(str, ordered))}"


@dataclass(frozen=True, eq=False)
class TrialSetup:
    """Everything that a trial needs to train any of its runs.

    Attributes:
        identity: the settings that influence the results of every loss.
        losses: the declaration of each loss, and of each control after the controls are added.
        precision: float64, float32 or bf16_mixed. `dtype` is the dtype of the weights.
        dose: the size of the positive control; None if the dataset declares none.
        trainer: the configuration group `trainer`.
        share: the seeds that this job trains if several jobs share the trial. An empty list means no seed.
    """

    identity: Mapping[str, Any]
    losses: Mapping[str, Any]
    precision: str
    dose: float | None
    trainer: Mapping[str, Any]
    share: list[int] | None
    device: torch.device
    dtype: torch.dtype
    data: Dataset
    builder: ModelBuilder
    formulations: tuple[Formulation, ...]
    recipe: Recipe
    engine: str
    engine_reason: str
    tile: int
    fast: bool
    head: str | None
    environment: Mapping[str, Any]

    def with_controls(self, names: Sequence[str], reference: str) -> TrialSetup:
        """Return the setup with controls of the reference among its losses."""
        declaration = self.losses[reference]
        formulation = next(formulation for formulation in self.formulations if formulation.name == reference)
        return replace(
            self,
            losses={**self.losses, **{name: declared(name, declaration, self.dose) for name in names}},
            formulations=(*self.formulations, *(control(name, formulation, self.dose) for name in names)),
        )

    def with_tile(self, size: int | None) -> TrialSetup:
        """Return the setup with at most so many replicas at once."""
        return self if size is None or size >= self.tile else replace(self, tile=size)

    @functools.cache  # noqa: B019 - one setting a process
    def fingerprint_parts(self, arm: str) -> dict[str, Any]:
        """Return what decides the bits of the runs of an arm, apart from the seed."""
        return {
            **self.identity,
            "loss": self.losses[arm],
            "loss_code": code_digest(locate(f"loss.{arm}.fn", self.losses[arm]["fn"]["_target_"])),
            "model_code": code_digest(self.builder.make),
            "data_digest": self.data.digest,
            "engine": {"name": self.engine, "version": ENGINE_VERSION, "tile": self.tile, **self._layout},
            "torch": str(torch.__version__),
            "device": self.environment["device"],
            "threads": self.trainer["threads"],
        }

    @property
    def _layout(self) -> dict[str, str]:
        """The fast path of the loop engine changes bits; that of the fold engine does not."""
        return {"memory_format": "channels_last"} if self.engine == "loop" and self.fast else {}

    def fingerprint(self, replica: Replica) -> str:
        return conf.digest({**self.fingerprint_parts(replica.arm), "arm": replica.arm, "seed": replica.seed})

    def stack(self, replicas: list[Replica]) -> Stack:
        """Return a stack of these replicas with their initial weights, equal in bits for all losses of a seed.

        If tiles are padded, copies of the last replica fill the stack.
        """
        seeds = [replica.seed for replica in replicas]
        if self.engine == "fold" and pads_tiles(self.device):
            seeds += [seeds[-1]] * (self.tile - len(seeds))
        vary = self.recipe.variation
        fresh = (self.builder(vary.initial(seed)).to(self.device, self.dtype) for seed in seeds)
        modules = [vary.touch(module, seed) for module, seed in zip(fresh, seeds, strict=True)]
        training = [vary.training(seed) for seed in seeds]
        return build_stack(self.engine, modules, training, self.head, self.fast).train()


def build_setup(config: Mapping[str, Any]) -> TrialSetup:
    """Load the data, build the model and call each loss once, before anything is written.

    Raises:
        UsageError: any part of the configuration cannot be trained.
    """
    device = choose_device(config["trainer"]["accelerator"])
    dtype = DTYPES[config["precision"]]
    keep_freed_memory()
    set_numerics(config["trainer"]["threads"])
    recipe = _recipe(config)
    data = load_dataset(config["dataset"]).to(device, dtype)
    builder = ModelBuilder(
        bind_target(config["model"]),
        conf.short_name(config["model"]["_target_"]),
        data.input_shape,
        data.num_classes,
    )
    formulations = tuple(formulation_of(name, loss) for name, loss in config["loss"].items())
    for formulation in formulations:
        probe(formulation, data.num_classes, device, dtype)
    model, num_examples = builder(0), len(data.splits["train"])  # one plain module for all that follows
    _check_batches(recipe.batch_size, model, num_examples)
    _check_pairing(builder, model)
    head = _head(formulations, builder, model)
    single = _last_batch(num_examples, recipe.batch_size) == 1
    engine, reason, tile, fast = _engine(config["trainer"], builder, model.to(device, dtype), recipe, device, single)
    return TrialSetup(
        identity=conf.identity(config), losses=config["loss"], precision=config["precision"],
        dose=config["dataset"].get("dose"), trainer=config["trainer"], share=config["share"], device=device,
        dtype=dtype, data=data, builder=builder, formulations=formulations, recipe=recipe, engine=engine,
        engine_reason=reason, tile=tile, fast=fast, head=head, environment=environment_record(device),
    )  # fmt: skip


def _check_batches(batch_size: int, model: nn.Module, num_examples: int) -> None:
    if batch_size > num_examples:
        raise UsageError(f"batch_size={batch_size} exceeds the {num_examples} training examples; lower it")
    normalises = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if normalises and _last_batch(num_examples, batch_size) == 1:
        fitting = (size for size in range(2, num_examples + 1) if _last_batch(num_examples, size) > 1)
        nearest = min(fitting, key=lambda size: abs(size - batch_size))
        raise UsageError(
            f"batch_size={batch_size} leaves a last batch of one of the {num_examples} training examples, "
            f"which BatchNorm cannot normalise; try batch_size={nearest}"
        )


def _last_batch(num_examples: int, batch_size: int) -> int:
    return num_examples % batch_size or batch_size


def _engine(
    trainer: Mapping[str, Any],
    builder: ModelBuilder,
    model: nn.Module,
    recipe: Recipe,
    device: torch.device,
    has_single_example_batch: bool,
) -> tuple[str, str, int, bool]:
    """Return engine, reason, tile and fast path. They depend on the configuration, never on the missing runs."""
    requested, dtype = trainer["engine"], next(model.parameters()).dtype
    channels_last = trainer["fast"] and device.type == "cpu" and dtype == torch.float32 and gains_channels_last(model)
    if has_single_example_batch and requested == "fold":
        raise UsageError(
            "trainer.engine=fold, but the last batch holds one example, whose bits depend on the neighbours when "
            "folded; use trainer.engine=auto or another batch_size"
        )
    if has_single_example_batch and requested == "auto":
        why = "a batch of one example has other bits when folded"
        return "loop", why, trainer["tile"] or 4, channels_last
    batch_bytes = recipe.batch_size * math.prod(builder.input_shape) * dtype.itemsize
    tile = trainer["tile"] or tile_size("fold", model, batch_bytes, device)
    static_loop = requested == "loop" or (requested == "auto" and has_convolutions(model) and device.type == "cpu")
    others = [] if static_loop else [builder(seed).to(device, dtype) for seed in range(1, tile)]
    how = ([model, *others], builder.input_shape, recipe.batch_size, recipe.make_optimizer)
    engine, reason = choose_engine(requested, *how)
    if engine == "loop" and requested == "fold":
        raise UsageError(f"trainer.engine=fold, but {builder.name} {reason}; use trainer.engine=auto")
    fast = channels_last if engine == "loop" else trainer["fast"] and fast_path_holds(*how)
    return engine, reason, trainer["tile"] or tile_size(engine, model, batch_bytes, device), fast


def _check_pairing(builder: ModelBuilder, model: nn.Module) -> None:
    """Refuse a model whose initial bits differ when it is built twice with one seed."""
    first, again = model.state_dict(), builder(0).state_dict()
    unequal = [name for name in first if not torch.equal(first[name], again[name])]
    if unequal:
        raise UsageError(
            f"model {builder.name} draws other initial weights ({unequal[0]}) each time it is built with one seed; "
            "draw them from torch's generator alone"
        )


def _head(formulations: tuple[Formulation, ...], builder: ModelBuilder, model: nn.Module) -> str | None:
    fused = [formulation.name for formulation in formulations if formulation.fused]
    if not fused:
        return None
    head = find_head(model, torch.zeros(2, *builder.input_shape))
    if head is None:
        raise UsageError(f"loss {fused[0]} takes hidden and weight, but {builder.name} does not end in a linear layer")
    return head


def _recipe(config: Mapping[str, Any]) -> Recipe:
    target = config["optimizer"]["_target_"]
    if target not in {f"torch.optim.{name}" for name in ELEMENTWISE}:
        raise UsageError(
            f"optimizer {target} may mix the replicas of a stack; use one of torch.optim.{{{', '.join(ELEMENTWISE)}}}"
        )
    make = bind_target(config["optimizer"])
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    try:
        make([weight]).step()
    except Exception as error:
        name = conf.short_name(target)
        raise UsageError(f"optimizer {name} refuses its settings: {first_line(error)}") from error
    return Recipe(
        epochs=config["epochs"],
        batch_size=config["batch_size"],
        make_optimizer=make,
        schedule=config["schedule"],
        warmup_steps=config["warmup_steps"],
        clip_norm=config["clip_norm"],
        autocast=config["precision"] == "bf16_mixed",
        inner_steps=config["trainer"]["inner_steps"],
        variation=Variation(config["protocol"]["vary"]),
    )
