"""What a seed changes, by whole trials: that alone, for all arms alike."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likelihood_lab.errors import UsageError
from pipeline.config import schema as conf
from pipeline.config.validate import validate
from pipeline.engine.seeding import flip_lowest_bit
from pipeline.models import mlp
from pipeline.replica import Replica
from pipeline.storage.cells import CellRecord, TrialFolder
from pipeline.trial.run import run
from pipeline.trial.setup import build_setup

FAST = (
    "loss=[ce,nll]",
    "epochs=1",
    "model.hidden=[16]",
    "audit=false",
    "controls=none",
    "trainer=cpu",
    "tracking=none",
)
ONE_PART = [vary.value for vary in conf.Vary if vary is not conf.Vary.all]


class Unmoved(nn.Module):
    """A dropping network that begins alike under every seed."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = mlp(input_shape, num_classes, hidden=[16], dropout=0.3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)  # type: ignore[no-any-return]


def noisy_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits + 0.1 * torch.randn_like(logits), labels)


NOISY = {"fn": {"_target_": f"{__name__}.noisy_cross_entropy", "_partial_": True}, "args": ["logits", "labels"]}


@cache
def compose(*overrides: str) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        cfg = hydra_compose("train", overrides=[*FAST, *overrides])
    validate(cfg)
    return conf.plain(cfg)


def records(path: Path, *overrides: str, **changes: Any) -> dict[tuple[str, int], CellRecord]:
    """The records of a trial's cells, by arm and seed."""
    run({**compose(*overrides), **changes}, path, "the command")
    return {(cell.record.arm, cell.record.seed): cell.record for cell in TrialFolder(path).cells()}


def bits(found: dict[tuple[str, int], CellRecord], what: str, arm: str = "ce") -> list[str]:
    """`initial_sha256` or `weights_sha256` of an arm's runs, by seed."""
    return [getattr(record, what) for (name, _), record in sorted(found.items()) if name == arm]


@pytest.mark.parametrize(
    ("vary", "beginnings"), [("all", 3), ("weights", 3), ("order", 1), ("bit", 3)], ids=[v.value for v in conf.Vary]
)
def test_arms_of_a_seed_are_paired_and_seeds_train_different_models(vary: str, beginnings: int, tmp_path: Path) -> None:
    found = records(tmp_path, "seed=[0,1,2]", f"vary={vary}", "epochs=3")
    for what in ("initial_sha256", "weights_sha256"):
        assert bits(found, what, "ce") == bits(found, what, "nll")
    assert len(set(bits(found, "initial_sha256"))) == beginnings
    assert len(set(bits(found, "weights_sha256"))) == 3


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_nothing_but_the_initial_weights_follows_the_seed(engine: str, tmp_path: Path) -> None:
    """A network that begins alike under every seed ends alike: batches, dropout masks and noise are those of seed 0."""
    model, losses = {"_target_": f"{__name__}.Unmoved"}, {"noisy": NOISY}
    asked = ("seed=[0,1]", f"trainer.engine={engine}")
    fixed = records(tmp_path / "weights", *asked, "vary=weights", model=model, loss=losses)
    free = records(tmp_path / "all", *asked, model=model, loss=losses)
    assert len(set(bits(fixed, "weights_sha256", "noisy"))) == 1
    assert len(set(bits(free, "weights_sha256", "noisy"))) == 2


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_whatever_is_drawn_while_training_follows_the_seed_as_ever(engine: str, tmp_path: Path) -> None:
    model, losses = {"_target_": f"{__name__}.Unmoved"}, {"noisy": NOISY}
    asked = ("seed=[0,1]", f"trainer.engine={engine}")
    order = records(tmp_path / "order", *asked, "vary=order", model=model, loss=losses)
    free = records(tmp_path / "all", *asked, model=model, loss=losses)
    assert bits(order, "weights_sha256", "noisy") == bits(free, "weights_sha256", "noisy")


@pytest.mark.parametrize("vary", ["weights", "order"])
def test_seed_0_is_seed_0_whatever_varies(vary: str, tmp_path: Path) -> None:
    one, everything = (records(tmp_path / name, "seed=0", f"vary={name}") for name in (vary, "all"))
    assert bits(one, "weights_sha256") == bits(everything, "weights_sha256")


@pytest.mark.parametrize("vary", ONE_PART)
def test_a_run_alone_is_the_run_among_others(vary: str, tmp_path: Path) -> None:
    alone = records(tmp_path / "alone", "seed=2", f"vary={vary}")
    among = records(tmp_path / "among", "seed=[5,0,2,1]", f"vary={vary}")
    assert alone["ce", 2].weights_sha256 == among["ce", 2].weights_sha256


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize(("precision", "ulp"), [("float32", 2.0**-23), ("float64", 2.0**-52)])
def test_the_beginnings_of_two_seeds_differ_from_seed_0s_in_one_bit_each(
    engine: str, precision: str, ulp: float
) -> None:
    asked = (f"precision={precision}", f"trainer.engine={engine}")
    setting = build_setup(compose("vary=bit", *asked))
    stack = setting.stack([Replica("ce", seed) for seed in (0, 1, 2)])
    plain = build_setup(compose(*asked)).stack([Replica("ce", 0)])
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


@pytest.mark.usefixtures("untouched_randomness")
def test_every_entry_can_be_flipped_once_and_back() -> None:
    def fresh() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))

    base = torch.cat([p.detach().flatten() for p in fresh().parameters()])
    times = torch.zeros(len(base))
    for number in range(len(base)):
        module = fresh()
        for expected in (1, 0):
            flip_lowest_bit(module, number)
            moved = torch.cat([p.detach().flatten() for p in module.parameters()]) != base
            assert int(moved.sum()) == expected
            times += moved
    assert torch.equal(times, torch.ones(len(base)))


def test_cells_of_another_variation_are_never_mixed(tmp_path: Path) -> None:
    everything = records(tmp_path, "seed=0")
    with pytest.raises(UsageError, match=f"{tmp_path} "):
        records(tmp_path, "seed=1", "vary=order")
    ordered = records(tmp_path / "order", "seed=0", "vary=order")
    assert ordered["ce", 0].fingerprint != everything["ce", 0].fingerprint


@pytest.mark.parametrize("vary", ONE_PART)
def test_a_comparison_with_controls_says_what_varied(
    vary: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records(tmp_path, "loss=[ce,nll]", "seed=[0,1]", f"vary={vary}", "audit=true", "controls=all")
    said = {"weights": "initial weights alone", "order": "batch order", "bit": "one bit of one initial weight"}
    sentence = " ".join(capsys.readouterr().out.split())
    assert f"seeds 0, 1 ({said[vary]}" in sentence
