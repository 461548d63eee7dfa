"""Streams of random numbers, and the parts of a training that depend on the seed under each value of `vary`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from torch import Tensor, nn

from likelihood_lab.errors import UsageError
from pipeline.config import schema as conf
from pipeline.config.validate import validate
from pipeline.engine.seeding import RandomStream, derive_seed, flip_lowest_bit
from pipeline.models import mlp
from pipeline.replica import Replica
from pipeline.storage.cells import CellRecord, TrialFolder
from pipeline.trial.run import run
from pipeline.trial.setup import build_setup
from pipeline.trial.tiles import train_tile

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("untouched_randomness")


def test_purposes_have_distinct_seeds_that_torch_accepts() -> None:
    purposes: list[Any] = [(0, "order", 0), (0, "order", 1), (1, "order", 0), (0, "loss"), (10, "order"), (0,)]
    seeds = [derive_seed(*purpose) for purpose in [*purposes, (1, "0/order")]]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[0] == 0x36E5703597F5E537  # in every process


def test_stream_continues_and_hides_its_draws() -> None:
    stream, other = RandomStream(3, CPU), RandomStream(1, CPU)
    drawn = []
    for _ in range(3):
        with other.resumed():
            torch.rand(5)
            with stream.resumed():
                drawn.append(torch.rand(4))
    assert torch.equal(torch.cat(drawn), torch.rand(12, generator=torch.Generator().manual_seed(3)))


def test_stream_knows_whether_it_was_used() -> None:
    stream = RandomStream(0, CPU)
    with stream.resumed():
        torch.zeros(3).exp()
    assert not stream.moved
    with stream.resumed():
        torch.randint(5, (1,))
    assert stream.moved


def test_stream_restores_the_generators_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), RandomStream(0, CPU).resumed():
        torch.rand(3).sum().item() / 0


# --- what a seed changes

SMALL = ("loss=[ce,nll]", "epochs=1", "model.hidden=[16]", "audit=false", "protocol.controls=none", "trainer=cpu")
ONE_PART = [vary.value for vary in conf.Vary if vary is not conf.Vary.all]


class Unmoved(nn.Module):
    """A network with dropout and the same initial weights under every seed."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = mlp(input_shape, num_classes, hidden=[16], dropout=0.3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


def noisy_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits + 0.1 * torch.randn_like(logits), labels)


NOISY = {"fn": {"_target_": f"{__name__}.noisy_cross_entropy", "_partial_": True}, "args": ["logits", "labels"]}
ALL_DRAWS = {"model": {"_target_": f"{__name__}.Unmoved"}, "loss": {"noisy": NOISY}}


@cache
def compose(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        cfg = hydra_compose("train", overrides=[*SMALL, "tracking=none", *overrides])
    validate(cfg)
    return conf.plain(cfg)


def records(path: Path, *overrides: str, **changes: Any) -> dict[tuple[str, int], CellRecord]:
    """Train a trial's runs, without its report. Returns the records of its cells, by arm and seed."""
    config = {**compose(*overrides), **changes}
    setup = build_setup(config)
    replicas = [Replica(loss, seed) for loss in setup.losses for seed in conf.seeds_of(config)]
    cells = train_tile(setup, replicas, TrialFolder(path))
    return {(cell.record.arm, cell.record.seed): cell.record for cell in cells}


def bits(found: dict[tuple[str, int], CellRecord], what: str, arm: str = "ce") -> list[str]:
    """`initial_sha256` or `weights_sha256` of an arm's runs, by seed."""
    return [getattr(record, what) for (name, _), record in sorted(found.items()) if name == arm]


@pytest.mark.parametrize(("vary", "beginnings"), [("all", 3), ("weights", 3), ("order", 1), ("bit", 3)])
def test_vary_pairs_the_arms_and_varies_the_seeds(vary: str, beginnings: int, tmp_path: Path) -> None:
    """Also, seed 0 does not depend on `vary`, and a run has the same bits alone and among others."""
    found = records(tmp_path / "together", "seed=[0,1,2]", f"protocol.vary={vary}", "epochs=3")
    for what in ("initial_sha256", "weights_sha256"):
        assert bits(found, what, "ce") == bits(found, what, "nll")
    assert len(set(bits(found, "initial_sha256"))) == beginnings
    assert len(set(bits(found, "weights_sha256"))) == 3
    alone = records(tmp_path / "alone", "seed=2", f"protocol.vary={vary}", "epochs=3")
    assert alone["ce", 2].weights_sha256 == found["ce", 2].weights_sha256
    if vary in ("weights", "order"):
        zero = records(tmp_path / "zero", "seed=0", "epochs=3")["ce", 0]
        assert zero.weights_sha256 == found["ce", 0].weights_sha256
        assert zero.fingerprint != found["ce", 0].fingerprint


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_vary_decides_on_all_draws_of_training(engine: str, tmp_path: Path) -> None:
    """Batches, dropout masks and noise are those of seed 0 under `weights`, and those of the seed under `order`."""
    found = {
        vary: bits(
            records(tmp_path / vary, "seed=[0,1]", f"trainer.engine={engine}", f"protocol.vary={vary}", **ALL_DRAWS),
            "weights_sha256",
            "noisy",
        )
        for vary in ("weights", "order", "all")
    }
    assert len(set(found["weights"])) == 1
    assert len(set(found["all"])) == 2
    assert found["order"] == found["all"]


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize(("precision", "ulp"), [("float32", 2.0**-23), ("float64", 2.0**-52)])
def test_vary_bit_flips_one_bit_for_each_seed(engine: str, precision: str, ulp: float) -> None:
    settings = (f"precision={precision}", f"trainer.engine={engine}")
    stack = build_setup(compose("protocol.vary=bit", *settings)).stack([Replica("ce", seed) for seed in (0, 1, 2)])
    plain = build_setup(compose(*settings)).stack([Replica("ce", 0)])
    changed = [_changed_entries(plain.weights(0), stack.weights(slot), ulp) for slot in range(3)]
    assert all(len(entries) == 1 for entries in changed)
    assert len(set.union(*changed)) == 3


def _changed_entries(base: dict[str, Tensor], other: dict[str, Tensor], ulp: float) -> set[tuple[str, int]]:
    """The entries that differ, each by no more than one unit in its last place."""
    found = set()
    for name, tensor in base.items():
        theirs = other[name].flatten()
        for place in (tensor.flatten() != theirs).nonzero().flatten().tolist():
            before, after = tensor.flatten()[place], theirs[place]
            assert 0 < (after - before).abs() <= ulp * before.abs()
            found.add((name, place))
    return found


def test_every_entry_can_be_flipped_and_flipped_back() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    base = nn.utils.parameters_to_vector(module.parameters()).clone()
    flipped = set()
    for number in range(len(base)):
        flip_lowest_bit(module, number)
        moved = (nn.utils.parameters_to_vector(module.parameters()) != base).nonzero().flatten().tolist()
        assert len(moved) == 1
        flipped |= {*moved}
        flip_lowest_bit(module, number)
        assert torch.equal(nn.utils.parameters_to_vector(module.parameters()), base)
    assert len(flipped) == len(base)


@pytest.mark.parametrize(
    ("vary", "text"),
    [("weights", "initial weights alone"), ("order", "batch order"), ("bit", "one bit of one initial weight")],
)
def test_verdict_says_what_varied(vary: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With all controls; and a folder never mixes cells of two values of `vary`."""
    run(compose("seed=[0,1]", f"protocol.vary={vary}", "protocol.controls=all"), tmp_path, "the command")
    assert f"seeds 0, 1 ({text}" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UsageError, match=f"{tmp_path} "):
        run(compose("seed=[2,3]", "protocol.controls=all"), tmp_path, "the command")
