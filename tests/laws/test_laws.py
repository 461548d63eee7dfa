"""Pairing is sacred, and a run's result is its own (DESIGN section 7, laws 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra.utils import instantiate
from torch import Tensor, nn
from torchvision.models import resnet18

from pipeline.data.dataset import Dataset
from pipeline.engine.choose import choose_engine, tile_size, unfit_to_fold
from pipeline.models import ModelBuilder, cnn, mlp
from pipeline.replica import Replica
from pipeline.training.module import StackTrainingModule
from pipeline.training.objectives import Formulation
from pipeline.trial.tiles import tiles
from tests.laboratory import (
    CPU,
    Weights,
    builder,
    recipe,
    same_bits,
    shipped,
    toy_data,
    trained,
    untrained,
    weights_of,
)

Make = Callable[..., nn.Module]

MLP = partial(mlp, hidden=[16])
DROPPING_MLP = partial(mlp, hidden=[16, 16], batch_norm=True, dropout=0.3)
CNN = partial(cnn, channels=[4, 8], hidden=16)
DROPPING_CNN = partial(cnn, channels=[4, 8], hidden=16, dropout=0.3)
EVERY_LOSS = [formulation.name for formulation in shipped()]


def noisy_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits + 0.1 * torch.randn_like(logits), labels)


NOISY = Formulation("noisy", ("logits", "labels"), lambda: noisy_cross_entropy)


def fused_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), labels)


FUSED = Formulation("fused", ("hidden", "weight", "bias", "labels"), lambda: fused_cross_entropy)


def run(
    make: Make,
    arms: list[Formulation],
    seeds: tuple[int, ...] = (0, 3),
    engine: str = "fold",
    head: str | None = None,
) -> StackTrainingModule:
    """Eight steps, the last of each epoch on a short batch."""
    data = toy_data((1, 8, 8))
    return trained(builder(make, data), data, arms, seeds, recipe(), engine, head)


def result(module: StackTrainingModule, arm: str, seed: int) -> Weights:
    """All that a run leaves behind: its weights, its history and its sketches."""
    replica = module.replicas.index(Replica(arm, seed))
    history = module.history(replica)
    values = {f"{metric} at {step}": torch.tensor(v) for metric, step, v in history.itertuples(index=False)}
    return weights_of(module, arm, seed) | values | {"sketch": torch.stack([s[replica] for s in module.sketches])}


# --- law 1: one seed, one beginning and one order


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("make", [DROPPING_MLP, DROPPING_CNN], ids=["mlp", "cnn"])
def test_all_arms_of_a_seed_begin_with_the_same_bits_and_seeds_with_different_ones(make: Make, engine: str) -> None:
    data = toy_data((1, 8, 8))
    build = builder(make, data)
    module = untrained(build, data, shipped("ce", "brier", "kl_literal"), (0, 1, 3), recipe(), engine)
    beginnings = {seed: build(seed).state_dict() for seed in (0, 1, 3)}
    for arm in ("ce", "brier", "kl_literal"):
        for seed, beginning in beginnings.items():
            assert same_bits(weights_of(module, arm, seed), dict(beginning))
    assert not same_bits(dict(beginnings[0]), dict(beginnings[1]))
    assert not same_bits(dict(beginnings[0]), dict(build(0xD1CE).state_dict()))


class Diary(nn.Module):
    """Writes down the first pixel of every example that is trained on."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(64, num_classes)
        self.pages: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.pages.append(inputs[:, 0, 0, 0].clone())
        return self.head(inputs.flatten(1))  # type: ignore[no-any-return]


def pages(module: StackTrainingModule, arm: str, seed: int) -> Tensor:
    """[epochs, examples] in the order in which a replica saw them."""
    diary = module.stack.replicas[module.replicas.index(Replica(arm, seed))]  # type: ignore[index, union-attr]
    return torch.cat(diary.pages).view(2, -1)  # type: ignore[union-attr, arg-type]


def test_all_arms_of_a_seed_see_the_same_examples_in_the_same_order_and_each_once_an_epoch() -> None:
    module = run(Diary, shipped("ce", "brier", "kl_literal"), seeds=(0, 1, 3), engine="loop")
    everything = toy_data((1, 8, 8)).pool[:20, 0, 0, 0].sort().values
    for seed in (0, 1, 3):
        seen = pages(module, "ce", seed)
        for arm in ("brier", "kl_literal"):
            assert torch.equal(pages(module, arm, seed), seen)
        assert torch.equal(seen.sort().values, everything.expand(2, -1))
        assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(pages(module, "ce", 0), pages(module, "ce", 1))


def test_a_trial_with_seed_0_is_repeatable_whatever_the_global_generator_stands_at() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        once = run(DROPPING_MLP, [*shipped("ce"), NOISY], seeds=(0,))
        torch.manual_seed(2)
        again = run(DROPPING_MLP, [*shipped("ce"), NOISY], seeds=(0,))
    for arm in ("ce", "noisy"):
        assert same_bits(result(once, arm, 0), result(again, arm, 0))


@pytest.mark.usefixtures("untouched_randomness")
@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_a_trial_leaves_the_global_generator_alone(engine: str) -> None:
    run(DROPPING_MLP, [*shipped("ce"), NOISY], engine=engine)


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_dropout_masks_are_shared_by_the_arms_of_a_seed_and_differ_between_seeds(engine: str) -> None:
    """Under one loss in two arms, equal bits; a mask that an arm drew for itself would show."""
    module = run(
        DROPPING_MLP,
        [*shipped("ce"), Formulation("again", ("logits", "labels"), nn.CrossEntropyLoss)],
        engine=engine,
    )
    for seed in (0, 3):
        assert same_bits(result(module, "ce", seed), result(module, "again", seed))
    assert not same_bits(result(module, "ce", 0), result(module, "ce", 3))


# --- law 2: a run's result depends on its own arm and seed


def tile_with(arm: str, seed: int, seeds: int, engine: str, make: Make, data: Dataset) -> list[Replica]:
    """Those that are trained together with one replica where there are that many seeds."""
    module = builder(make, data)(0)
    size = tile_size(engine, module, 6 * data.pool[0].numel() * 4, CPU)
    everybody = [Replica(arm, s) for s in range(seeds)]
    return next(tile for tile in tiles(everybody, [arm], size) if Replica(arm, seed) in tile)


@pytest.mark.parametrize(
    ("make", "engine", "neighbours", "epochs"),
    [
        (MLP, "fold", 30, 2),
        (DROPPING_MLP, "fold", 30, 2),
        (CNN, "loop", 4, 2),
        (DROPPING_CNN, "loop", 4, 2),
        (resnet18, "loop", 4, 1),
    ],
    ids=["mlp", "mlp with dropout and batch norm", "cnn", "cnn with dropout", "resnet18"],
)
def test_seed_3_alone_is_seed_3_among_30_bit_for_bit(make: Make, engine: str, neighbours: int, epochs: int) -> None:
    """In the engine that is chosen; of the thirty, those that share a tile with seed 3 are trained here."""
    data = toy_data((1, 8, 8), train=10)
    build, how = builder(make, data), recipe(epochs=epochs)
    assert choose_engine("auto", [build(seed) for seed in range(3)], build.input_shape, how.batch_size)[0] == engine
    tile = tile_with("ce", 3, 30, engine, make, data)
    assert len(tile) == neighbours
    alone = trained(build, data, shipped("ce"), (3,), how, engine)
    among = trained(build, data, shipped("ce"), [replica.seed for replica in tile], how, engine)
    assert same_bits(result(alone, "ce", 3), result(among, "ce", 3))


@pytest.mark.parametrize("width", [5, 16])
def test_the_slot_does_not_matter(width: int) -> None:
    make = partial(mlp, hidden=[width, width], batch_norm=True, dropout=0.3)
    one, other = (run(make, shipped("ce"), seeds) for seeds in ((0, 1, 2, 3), (3, 9, 0)))
    for seed in (0, 3):
        assert same_bits(result(one, "ce", seed), result(other, "ce", seed))


@pytest.fixture(scope="module")
def all_side_by_side() -> StackTrainingModule:
    return run(DROPPING_MLP, shipped())


@pytest.mark.parametrize("arm", EVERY_LOSS)
def test_an_arm_alone_is_the_arm_beside_all_others_bit_for_bit(arm: str, all_side_by_side: StackTrainingModule) -> None:
    """One of which, kl_literal, is NaN from its first step on."""
    alone = run(DROPPING_MLP, shipped(arm))
    for seed in (0, 3):
        assert same_bits(result(alone, arm, seed), result(all_side_by_side, arm, seed))


def test_only_the_literal_divergence_is_nan(all_side_by_side: StackTrainingModule) -> None:
    for replica, divergence in zip(all_side_by_side.replicas, all_side_by_side.divergences(), strict=True):
        assert (divergence is not None) is (replica.arm == "kl_literal")


@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_a_neighbour_that_is_nan_changes_nothing_with_or_without_clipping(engine: str, clip_norm: float | None) -> None:
    data = toy_data((1, 8, 8))
    build, how = builder(DROPPING_MLP, data), recipe(clip_norm=clip_norm)
    alone = trained(build, data, shipped("ce"), (0, 3), how, engine)
    beside = trained(build, data, shipped("kl_literal", "ce", "nll_on_probs"), (0, 3), how, engine)
    for seed in (0, 3):
        assert same_bits(result(alone, "ce", seed), result(beside, "ce", seed))
        assert weights_of(beside, "kl_literal", seed)["1.weight"].isnan().all()


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_a_loss_that_draws_random_numbers_is_repeatable_and_shifts_nobody_elses(engine: str) -> None:
    quiet = run(DROPPING_MLP, shipped("ce"), engine=engine)
    noisy = run(DROPPING_MLP, [NOISY], engine=engine)
    both = run(DROPPING_MLP, [NOISY, *shipped("ce")], engine=engine)
    for seed in (0, 3):
        assert same_bits(result(both, "ce", seed), result(quiet, "ce", seed))
        assert same_bits(result(both, "noisy", seed), result(noisy, "noisy", seed))
        assert not same_bits(weights_of(both, "noisy", seed), weights_of(both, "ce", seed))


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_an_arm_beside_one_with_a_fused_loss_keeps_its_bits(engine: str) -> None:
    """Its head then serves two consumers, of which one sends it zeros."""
    quiet = run(MLP, shipped("ce"), engine=engine)
    both = run(MLP, [FUSED, *shipped("ce")], engine=engine, head="3")
    for seed in (0, 3):
        assert same_bits(result(both, "ce", seed), result(quiet, "ce", seed))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_every_slot_of_a_full_tile_gives_the_same_bits_under_each_shipped_optimizer(optimizer: str) -> None:
    declared = yaml.safe_load((Path(__file__).parents[2] / "conf" / "optimizer" / f"{optimizer}.yaml").read_text())
    make = instantiate({**declared, "_partial_": True}, _convert_="all")
    build = ModelBuilder(mlp, "mlp", (1, 8, 8), 10)
    assert unfit_to_fold([build(seed) for seed in range(96)], build.input_shape, 64, make) is None


def test_an_optimizer_that_rounds_the_end_of_a_tensor_otherwise_is_seen() -> None:
    """torch's fused SGD: the last biases of a stack, whose number 16 does not divide, get other bits."""
    fused = partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True)
    build = ModelBuilder(mlp, "mlp", (1, 8, 8), 10)
    found = unfit_to_fold([build(seed) for seed in range(96)], build.input_shape, 64, fused)
    assert found is not None
    assert "depend on the slot" in found
