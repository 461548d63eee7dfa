"""The benchmark runs at its smallest, and compares equal work."""

from __future__ import annotations

import subprocess
import sys
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


def test_a_gain_is_taken_repetition_by_repetition() -> None:
    assert gain([2.0, 4.0, 9.0], [1.0, 2.0, 3.0], factor=10) == Spread(20.0, 20.0, 30.0)


def test_contenders_take_turns_and_the_first_turn_is_not_timed() -> None:
    turns: list[str] = []
    contenders = {name: Contender(lambda name=name: turns.append(name), units=2) for name in "ab"}  # type: ignore[misc]
    ticks = iter(range(100))
    assert interleaved(contenders, 2, lambda: float(next(ticks))) == {"a": [0.5, 0.5], "b": [0.5, 0.5]}
    assert turns == ["a", "b"] * 3


@pytest.mark.parametrize(("engine", "with_losses"), [("fold", True), ("fold", False), ("loop", True)])
def test_what_is_timed_trains(engine: str, with_losses: bool) -> None:
    data = digits()
    builder = ModelBuilder(mlp, "mlp", data.input_shape, data.num_classes)
    module = steps.stacked(builder, data, CPU, engine, 3, with_losses)
    before = module.stack.weights(2)
    module.training_step(slice(0, 2), 0)
    assert module.steps_done == 2
    assert not any(torch.equal(tensor, before[name]) for name, tensor in module.stack.weights(2).items())


def test_vmap_does_the_same_training_as_the_bare_loop() -> None:
    data = digits()
    builder = ModelBuilder(mlp, "mlp", data.input_shape, data.num_classes)
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


def test_a_rival_is_on_the_page_and_not_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = steps.Case("tiny", mlp, digits(), [("fold", 3, True), (steps.RIVAL, 3, True)], steps=1)
    monkeypatch.setattr(steps, "cases", lambda device, quick: [case])
    run.main(["--steps-only", "--out", str(tmp_path)])
    (page,) = tmp_path.glob("*.md")
    assert "| tiny | vmap | 3 | with the losses |" in page.read_text()
    assert record.read(page.with_suffix(".csv")).keys() == {("tiny", "fold", "3", "with")}


def test_the_page_states_device_gain_and_extrapolation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Workshop:
        database_seconds = 1.0

        def __init__(self, folder: Path) -> None: ...

        def measure(self, kind: str, num_seeds: int, epochs: int) -> Usage:
            training = {"conventional": 3.0, "alone": 1.5, "product": 2.0}[kind]
            return Usage(4.0, training, num_runs=1 if kind == "alone" else 3 * num_seeds)

    case = steps.Case("tiny", mlp, digits(), [("fold", 3, True)], steps=1)
    monkeypatch.setattr(run, "Workshop", Workshop)
    monkeypatch.setattr(steps, "cases", lambda device, quick: [case])
    run.main(["--out", str(tmp_path)])
    (page,) = tmp_path.glob("*.md")
    assert record.read(page.with_suffix(".csv")).keys() == {("tiny", "fold", "3", "with")}
    text = page.read_text()
    assert run.device_name(CPU) in text
    assert "| tiny | fold | 3 | with the losses |" in text
    assert "extrapolated" in text
    assert "| one process a run | 495.00 [495.00..495.00] | 6.00 [6.00..6.00] | **82.5 [82.5..82.5]** |" in text
    assert "| without imports | 90.00 [90.00..90.00] | 2.00 [2.00..2.00] | **45.0 [45.0..45.0]** |" in text


def row(gain: Spread, replicas: int = 3) -> steps.Row:
    return steps.Row("tiny", "fold", replicas, True, Spread(1, 1, 1), Spread(1, 1, 1), gain)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record.write([row(Spread(2.0, 1.5, 2.25))], tmp_path / "r.csv")
    assert record.read(tmp_path / "r.csv") == {("tiny", "fold", "3", "with"): Spread(2.0, 1.5, 2.25)}


@pytest.mark.parametrize(
    ("now", "regressed"),
    [
        (Spread(2.0, 1.9, 2.1), False),
        (Spread(1.6, 1.5, 1.7), True),
        (Spread(1.6, 1.5, 1.95), False),  # one repetition is as good as the record
        (Spread(1.75, 1.7, 1.8), False),  # within what a shared machine does
    ],
)
def test_a_regression_is_lower_beyond_the_noise(now: Spread, regressed: bool) -> None:
    (line,) = record.compare({("tiny", "fold", "3", "with"): Spread(2.0, 1.9, 2.1)}, [row(now)])
    assert line.regressed == regressed
    assert ("REGRESSED" in str(line)) == regressed


def test_what_is_no_longer_measured_is_a_regression_and_what_is_new_is_none() -> None:
    gone, new = record.compare({("gone", "fold", "3", "with"): Spread(2, 2, 2)}, [row(Spread(1, 1, 1))])
    assert gone.regressed
    assert not new.regressed


def test_a_check_compares_with_the_last_record_of_this_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = steps.Case("tiny", mlp, digits(), [("fold", 3, True)], steps=1)
    monkeypatch.setattr(steps, "cases", lambda device, quick: [case])
    for folder, gains, code in ((tmp_path / "none", None, 2), (tmp_path / "high", 1e6, 1), (tmp_path / "low", 1e-6, 0)):
        folder.mkdir()
        if gains is not None:
            record.write([row(Spread(gains, gains, gains))], folder / f"2026-01-01-{run._slug(CPU)}.csv")
        with pytest.raises(SystemExit) as left:
            run.main(["--check", "--out", str(folder)])
        assert left.value.code == code
    assert "no record of" in capsys.readouterr().err


def test_the_share_of_the_ceiling_counts_what_a_step_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    case = steps.Case("tiny", mlp, digits(), [("fold", 3, False)], steps=1)
    monkeypatch.setattr(steps, "sgemm_rate", lambda: 1e9)
    first, second = 64 * 128, 128 * 10
    products = 2 * steps.BATCH * (2 * first + 3 * second)  # the first layer's input needs no gradient
    share = steps.of_ceiling(
        steps.Row("tiny", "fold", 3, False, Spread(1, 1, 1), Spread(1, 1, 1), Spread(1, 1, 1)), case
    )
    assert share == pytest.approx(3 * products / 1e9)


def test_the_share_of_the_copying_rate_counts_what_a_step_must_move(monkeypatch: pytest.MonkeyPatch) -> None:
    case = steps.Case("tiny", mlp, digits(), [("fold", 3, False)], steps=1)
    monkeypatch.setattr(steps, "copy_rate", lambda: 1e9)
    weights = 64 * 128 + 128 + 128 * 10 + 10
    row = steps.Row("tiny", "fold", 3, False, Spread(1, 1, 1), Spread(1, 1, 1), Spread(1, 1, 1))
    assert steps.of_bandwidth(row, case) == pytest.approx(3 * 7 * 4 * weights / 1e9)


def test_the_rates_are_those_of_a_processor_and_its_memory() -> None:
    assert 1e8 < steps.sgemm_rate(128, 5) < 1e13
    assert 1e8 < steps.copy_rate(2**22, 2) < 1e13


def test_a_start_is_measured_to_the_first_step_and_no_further(tmp_path: Path) -> None:
    trial = ["loss=[ce]", "trainer=cpu", "tracking=none", f"hydra.run.dir={tmp_path / 'trial'}"]
    subprocess.run([sys.executable, "-m", "benchmarks.startup", *trial], cwd=ROOT, check=True)
    assert (tmp_path / "trial" / "request.yaml").exists()
    assert not (tmp_path / "trial" / "cells").exists()
