"""Pairing, and independence of every run from the other runs (DESIGN section 7, laws 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra.utils import instantiate
from torch import Tensor, nn
from torchvision.models import resnet18

from pipeline.config import schema as conf
from pipeline.data.dataset import Dataset
from pipeline.engine.choose import choose_engine, tile_size, unfit_to_fold
from pipeline.models import ModelBuilder, cnn, mlp
from pipeline.replica import Replica
from pipeline.training.module import StackTrainingModule
from pipeline.training.objectives import Formulation
from pipeline.trial.tiles import tiles
from tests.laboratory import CPU, Weights, builder, recipe, same_bits, shipped, toy_data, trained, untrained, weights_of

Make = Callable[..., nn.Module]

MLP = partial(mlp, hidden=[16])
DROPPING_MLP = partial(mlp, hidden=[16, 16], batch_norm=True, dropout=0.3)
CNN = partial(cnn, channels=[4, 8], hidden=16)
DROPPING_CNN = partial(cnn, channels=[4, 8], hidden=16, dropout=0.3)


NOISY = Formulation(
    "noisy", ("logits", "labels"), lambda: lambda z, y: F.cross_entropy(z + 0.1 * torch.randn_like(z), y)
)
FUSED = Formulation(
    "fused", ("hidden", "weight", "bias", "labels"), lambda: lambda h, w, b, y: F.cross_entropy(F.linear(h, w, b), y)
)


def run(
    make: Make, arms: list[Formulation], seeds: tuple[int, ...] = (0, 3), engine: str = "fold", head: str | None = None
) -> StackTrainingModule:
    """Train eight steps; the last batch of each epoch is short."""
    data = toy_data((1, 8, 8))
    return trained(builder(make, data), data, arms, seeds, recipe(), engine, head)


def result(module: StackTrainingModule, arm: str, seed: int) -> Weights:
    """The results of a run: weights, history and sketches."""
    replica = module.replicas.index(Replica(arm, seed))
    history = module.history(replica)
    values = {f"{metric} at {step}": torch.tensor(v) for metric, step, v in history.itertuples(index=False)}
    return weights_of(module, arm, seed) | values | {"sketch": torch.stack([s[replica] for s in module.sketches])}


# --- law 1: the same initial weights and batches for all losses of a seed


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("make", [DROPPING_MLP, DROPPING_CNN], ids=["mlp", "cnn"])
def test_losses_of_a_seed_have_the_same_initial_bits(make: Make, engine: str) -> None:
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
    """Model that records the first pixel of every training example."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(64, num_classes)
        self.pages: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.pages.append(inputs[:, 0, 0, 0].clone())
        return self.head(inputs.flatten(1))


def test_losses_of_a_seed_see_the_same_batches() -> None:
    """Each example once an epoch, in another order in every epoch and under every seed."""
    module = run(Diary, shipped("ce", "brier", "kl_literal"), seeds=(0, 1, 3), engine="loop")
    pages = {
        (replica.arm, replica.seed): torch.cat(model.pages).view(2, -1)  # [epochs, examples]
        for replica, model in zip(module.replicas, module.stack.replicas, strict=True)
    }
    everything = toy_data((1, 8, 8)).pool[:20, 0, 0, 0].sort().values
    for (_, seed), seen in pages.items():
        assert torch.equal(seen, pages["ce", seed])
        assert torch.equal(seen.sort().values, everything.expand(2, -1))
        assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(pages["ce", 0], pages["ce", 1])


@pytest.mark.usefixtures("untouched_randomness")
@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_trial_neither_uses_nor_changes_the_global_generator(engine: str) -> None:
    once = run(DROPPING_MLP, [*shipped("ce"), NOISY], engine=engine)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        again = run(DROPPING_MLP, [*shipped("ce"), NOISY], engine=engine)
    for arm in ("ce", "noisy"):
        assert same_bits(result(once, arm, 0), result(again, arm, 0))


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_losses_of_a_seed_share_dropout_masks(engine: str) -> None:
    """The same loss under two names has equal bits."""
    again = Formulation("again", ("logits", "labels"), nn.CrossEntropyLoss)
    module = run(DROPPING_MLP, [*shipped("ce"), again], engine=engine)
    for seed in (0, 3):
        assert same_bits(result(module, "ce", seed), result(module, "again", seed))
    assert not same_bits(result(module, "ce", 0), result(module, "ce", 3))


# --- law 2: a run depends only on its loss and seed


def tile_with(arm: str, seed: int, seeds: int, engine: str, make: Make, data: Dataset) -> list[Replica]:
    """The replicas of the tile of one replica, in a trial with `seeds` seeds."""
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
def test_seed_alone_has_the_bits_of_the_seed_among_30(make: Make, engine: str, neighbours: int, epochs: int) -> None:
    """In the engine that is chosen. Only the seeds in the tile of seed 3 are trained."""
    data = toy_data((1, 8, 8), train=10)
    build, how = builder(make, data), recipe(epochs=epochs)
    assert choose_engine("auto", [build(seed) for seed in range(3)], build.input_shape, how.batch_size)[0] == engine
    tile = tile_with("ce", 3, 30, engine, make, data)
    assert len(tile) == neighbours
    alone = trained(build, data, shipped("ce"), (3,), how, engine)
    among = trained(build, data, shipped("ce"), [replica.seed for replica in tile], how, engine)
    assert same_bits(result(alone, "ce", 3), result(among, "ce", 3))


@pytest.mark.parametrize("width", [5, 16])
def test_bits_do_not_depend_on_the_slot(width: int) -> None:
    make = partial(mlp, hidden=[width, width], batch_norm=True, dropout=0.3)
    one, other = (run(make, shipped("ce"), seeds) for seeds in ((0, 1, 2, 3), (3, 9, 0)))
    for seed in (0, 3):
        assert same_bits(result(one, "ce", seed), result(other, "ce", seed))


@pytest.fixture(scope="module")
def all_together() -> StackTrainingModule:
    return run(DROPPING_MLP, shipped())


@pytest.mark.parametrize("arm", [formulation.name for formulation in shipped()])
def test_loss_alone_has_the_bits_of_the_loss_among_all(arm: str, all_together: StackTrainingModule) -> None:
    """One of the others, kl_literal, is NaN from its first step."""
    alone = run(DROPPING_MLP, shipped(arm))
    for seed in (0, 3):
        assert same_bits(result(alone, arm, seed), result(all_together, arm, seed))


def test_only_the_literal_kl_is_nan(all_together: StackTrainingModule) -> None:
    for replica, divergence in zip(all_together.replicas, all_together.divergences(), strict=True):
        assert (divergence is not None) is (replica.arm == "kl_literal")


@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_nan_neighbour_changes_no_bits(engine: str, clip_norm: float | None) -> None:
    data = toy_data((1, 8, 8))
    build, how = builder(DROPPING_MLP, data), recipe(clip_norm=clip_norm)
    alone = trained(build, data, shipped("ce"), (0, 3), how, engine)
    beside = trained(build, data, shipped("kl_literal", "ce", "nll_on_probs"), (0, 3), how, engine)
    for seed in (0, 3):
        assert same_bits(result(alone, "ce", seed), result(beside, "ce", seed))
        assert weights_of(beside, "kl_literal", seed)["1.weight"].isnan().all()


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_loss_that_draws_changes_no_other_draws(engine: str) -> None:
    quiet = run(DROPPING_MLP, shipped("ce"), engine=engine)
    noisy = run(DROPPING_MLP, [NOISY], engine=engine)
    both = run(DROPPING_MLP, [NOISY, *shipped("ce")], engine=engine)
    for seed in (0, 3):
        assert same_bits(result(both, "ce", seed), result(quiet, "ce", seed))
        assert same_bits(result(both, "noisy", seed), result(noisy, "noisy", seed))
        assert not same_bits(weights_of(both, "noisy", seed), weights_of(both, "ce", seed))


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_fused_neighbour_changes_no_bits(engine: str) -> None:
    """The head then has two consumers, and one sends it zeros."""
    quiet = run(MLP, shipped("ce"), engine=engine)
    both = run(MLP, [FUSED, *shipped("ce")], engine=engine, head="3")
    for seed in (0, 3):
        assert same_bits(result(both, "ce", seed), result(quiet, "ce", seed))


def full_tile_refusal(make_optimizer: Callable[..., torch.optim.Optimizer]) -> str | None:
    build = ModelBuilder(mlp, "mlp", (1, 8, 8), 10)
    return unfit_to_fold([build(seed) for seed in range(96)], build.input_shape, 64, make_optimizer)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_shipped_optimizers_do_not_depend_on_the_slot(optimizer: str) -> None:
    declared = yaml.safe_load((conf.CONF / "optimizer" / f"{optimizer}.yaml").read_text())
    assert full_tile_refusal(instantiate({**declared, "_partial_": True}, _convert_="all")) is None


def test_optimizer_that_depends_on_the_slot_is_detected() -> None:
    """In torch's fused SGD, the last biases of a stack get other bits if 16 does not divide their number."""
    found = full_tile_refusal(partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True))
    assert "depend on the slot" in str(found)
