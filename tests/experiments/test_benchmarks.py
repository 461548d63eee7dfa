"""Test the benchmark at its smallest size, and that it compares equal work."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import record, run, steps
from benchmarks.end_to_end import ROOT, Usage
from benchmarks.timing import Contender, Spread, gain, interleaved
from benchmarks.vmapped import Vmapped
from pipeline.data.loaders import digits
from pipeline.models import ModelBuilder, mlp

CPU = torch.device("cpu")
ONE = Spread(1, 1, 1)
KEY = ("tiny", "fold", "3", "with")


@pytest.fixture(scope="module")
def builder() -> ModelBuilder:
    return ModelBuilder(mlp, "mlp", digits().input_shape, digits().num_classes)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> steps.Case:
    """The only case of the benchmark: one step of the folded digits MLP."""
    case = steps.Case("tiny", mlp, digits(), [("fold", 3, True)], steps=1)
    monkeypatch.setattr(steps, "cases", lambda device, quick: [case])
    return case


def row(gain: Spread = ONE, with_losses: bool = True) -> steps.Row:
    return steps.Row("tiny", "fold", 3, with_losses, ONE, ONE, gain)


def test_gain_is_the_ratio_of_each_repetition() -> None:
    assert gain([2.0, 4.0, 9.0], [1.0, 2.0, 3.0], factor=10) == Spread(20.0, 20.0, 30.0)


def test_interleaved_alternates_and_does_not_time_the_first_turn() -> None:
    turns: list[str] = []
    contenders = {name: Contender(lambda name=name: turns.append(name), units=2) for name in "ab"}  # type: ignore[misc]
    ticks = iter(range(100))
    assert interleaved(contenders, 2, lambda: float(next(ticks))) == {"a": [0.5, 0.5], "b": [0.5, 0.5]}
    assert turns == ["a", "b"] * 3


@pytest.mark.parametrize(("engine", "with_losses"), [("fold", True), ("fold", False), ("loop", True)])
def test_timed_module_trains(engine: str, with_losses: bool, builder: ModelBuilder) -> None:
    module = steps.stacked(builder, digits(), CPU, engine, 3, with_losses)
    before = module.stack.weights(2)
    module.training_step(slice(0, 2), 0)
    assert module.steps_done == 2
    assert not any(torch.equal(tensor, before[name]) for name, tensor in module.stack.weights(2).items())


def test_vmap_trains_like_the_bare_loop(builder: ModelBuilder) -> None:
    data = digits()
    model = Vmapped(builder, steps.BARE_LOSSES, {"nll": 1, "kl": 2}, steps.LEARNING_RATE)
    plain = {("nll", 0): builder(0), ("kl", 0): builder(0), ("kl", 1): builder(1)}
    optimizers = [torch.optim.SGD(module.parameters(), steps.LEARNING_RATE, 0.9) for module in plain.values()]
    for batch in data.splits["train"][:128].split(64):
        inputs, labels = data.take(batch)
        for optimizer, ((arm, _), module) in zip(optimizers, plain.items(), strict=True):
            optimizer.zero_grad()
            steps.BARE_LOSSES[arm](module(inputs), labels).backward()
            optimizer.step()
        model.step(inputs.expand(3, *inputs.shape), labels.expand(3, -1))
    for place, module in enumerate(plain.values()):
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(model.parameters[name][place], parameter)


def test_rival_is_on_the_page_and_not_on_record(
    tmp_path: Path, tiny: steps.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = replace(tiny, stacks=[*tiny.stacks, (steps.RIVAL, 3, True)])
    monkeypatch.setattr(steps, "cases", lambda device, quick: [both])
    run.main(["--steps-only", "--out", str(tmp_path)])
    (page,) = tmp_path.glob("*.md")
    assert "| tiny | vmap | 3 | with the losses |" in page.read_text()
    assert record.read(page.with_suffix(".csv")).keys() == {KEY}


@pytest.mark.usefixtures("tiny")
def test_page_has_device_gain_and_extrapolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Workshop:
        database_seconds = 1.0

        def __init__(self, folder: Path) -> None: ...

        def measure(self, kind: str, num_seeds: int, epochs: int) -> Usage:
            training = {"conventional": 3.0, "alone": 1.5, "product": 2.0}[kind]
            return Usage(4.0, training, num_runs=1 if kind == "alone" else 3 * num_seeds)

    monkeypatch.setattr(run, "Workshop", Workshop)
    run.main(["--out", str(tmp_path)])
    (page,) = tmp_path.glob("*.md")
    assert record.read(page.with_suffix(".csv")).keys() == {KEY}
    text = page.read_text()
    for part in (
        run.device_name(CPU),
        "| tiny | fold | 3 | with the losses |",
        "extrapolated",
        "| one process a run | 495.00 [495.00..495.00] | 6.00 [6.00..6.00] | **82.5 [82.5..82.5]** |",
        "| without imports | 90.00 [90.00..90.00] | 2.00 [2.00..2.00] | **45.0 [45.0..45.0]** |",
    ):
        assert part in text


def test_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record.write([row(Spread(2.0, 1.5, 2.25))], tmp_path / "r.csv")
    assert record.read(tmp_path / "r.csv") == {KEY: Spread(2.0, 1.5, 2.25)}


@pytest.mark.parametrize(
    ("now", "regressed"),
    [
        (Spread(2.0, 1.9, 2.1), False),
        (Spread(1.6, 1.5, 1.7), True),
        (Spread(1.6, 1.5, 1.95), False),  # one repetition is as good as the record
        (Spread(1.75, 1.7, 1.8), False),  # within the noise of a shared machine
    ],
)
def test_regression_is_lower_beyond_the_noise(now: Spread, regressed: bool) -> None:
    (line,) = record.compare({KEY: Spread(2.0, 1.9, 2.1)}, [row(now)])
    assert line.regressed == regressed
    assert ("REGRESSED" in str(line)) == regressed


def test_missing_measurement_is_a_regression_and_a_new_one_is_not() -> None:
    gone, new = record.compare({("gone", "fold", "3", "with"): Spread(2, 2, 2)}, [row()])
    assert gone.regressed
    assert not new.regressed


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("gains", "code"), [(None, 2), (1e6, 1), (1e-6, 0)])
def test_check_compares_with_the_devices_last_record(
    gains: float | None, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if gains is not None:
        record.write([row(Spread(gains, gains, gains))], tmp_path / f"2026-01-01-{run._slug(CPU)}.csv")
    with pytest.raises(SystemExit) as left:
        run.main(["--check", "--out", str(tmp_path)])
    assert left.value.code == code
    assert ("no record of" in capsys.readouterr().err) == (gains is None)


def test_shares_count_the_products_and_bytes_of_a_step(tiny: steps.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "sgemm_rate", lambda: 1e9)
    monkeypatch.setattr(steps, "copy_rate", lambda: 1e9)
    first, second = 64 * 128, 128 * 10
    products = 2 * steps.BATCH * (2 * first + 3 * second)  # the first layer's input needs no gradient
    assert steps.of_ceiling(row(with_losses=False), tiny) == pytest.approx(3 * products / 1e9)
    weights = first + 128 + second + 10
    assert steps.of_bandwidth(row(with_losses=False), tiny) == pytest.approx(3 * 7 * 4 * weights / 1e9)


def test_rates_are_those_of_a_processor_and_its_memory() -> None:
    assert 1e8 < steps.sgemm_rate(128, 5) < 1e13
    assert 1e8 < steps.copy_rate(2**22, 2) < 1e13


def test_startup_ends_at_the_first_step(tmp_path: Path) -> None:
    trial = ["loss=[ce]", "trainer=cpu", "tracking=none", f"hydra.run.dir={tmp_path / 'trial'}"]
    subprocess.run([sys.executable, "-m", "benchmarks.startup", *trial], cwd=ROOT, check=True)
    assert (tmp_path / "trial" / "request.yaml").exists()
    assert not (tmp_path / "trial" / "cells").exists()
