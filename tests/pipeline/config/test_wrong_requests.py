"""A wrong request gives one line and exit code 2 and leaves nothing; a diverging run is no wrong request."""

from __future__ import annotations

import copy
import errno
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline import train
from pipeline.config.hydra_glue import run_entry_point
from pipeline.data.dataset import Dataset, make_dataset
from pipeline.entry import run_and_report
from pipeline.replica import Replica
from pipeline.storage import cells
from pipeline.storage.cells import TrialFolder
from pipeline.trial.run import run
from pipeline.trial.setup import build_setup
from tests.trials import QUICK, command_error, compose, small_disk, usage_error, verdict

Config = dict[str, Any]


@pytest.fixture(scope="module")
def quick() -> Config:
    config = compose(base=QUICK)
    config["trainer"]["progress"] = False
    return config


# --- refused when the configuration is composed and checked


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["loss=kll"], "loss=kll: no such option; there is brier, ce, ce_one_hot,"),
        (["loss=[nll,kll]"], "loss=kll: no such option; there is brier, ce, ce_one_hot,"),
        (["trainer=gpuu"], "trainer=gpuu: no such option; there is auto, cpu, gpu (did you mean"),
        (["losss=ce"], "unknown key 'losss' (did you mean 'loss'?); the keys are: loss, model,"),
        (["epoch=3"], "unknown key 'epoch' (did you mean 'epochs'?); the keys are: loss, model,"),
        (["+model.hiden=3"], "unknown key 'model.hiden' (did you mean 'hidden'?); pipeline."),
        (["epochs=three"], "epochs: Value 'three' of type 'str' could not be converted to Integer"),
        (["seed=range(3)"], "seed=range(3) is a sweep: add -m, or give a list such as 'seed=[0,1,2]'"),
        (["loss=nll,kl"], "loss=nll,kl is a sweep: add -m, or give a list such as 'loss=[nll,kl]'"),
        (["loss=[nll"], "cannot read 'loss=[nll': no viable alternative at input '[nll'; give"),
        (["model=null"], "a group cannot be null or a number; give the name of one of its files, or leave it out"),
        (["+loss.ce.lr_scale=-1"], "loss.ce.lr_scale=-1; give a positive factor of the learning rate"),
        (["+loss.ce.lr_scale=true"], "loss.ce.lr_scale=True; give a positive factor of the learning rate"),
        (["-m", "epochs=1,2", "losss=ce"], "unknown key 'losss' (did you mean 'loss'?)"),
        (["-m", "loss=nll,kll"], "loss=kll: no such option; there is brier,"),
        (["-m", "model=mlp,cnn", "seed=0,-1"], "seed=-1 is not an integer"),
        (["-m", "seed=[0,0]", "batch_size=8,16"], "seed repeats 0"),
    ],
)
def test_a_wrong_request_is_refused_by_its_check(arguments: list[str], line: str, tmp_path: Path) -> None:
    assert command_error(tmp_path, *arguments).startswith(f"error: {line}")


@pytest.mark.parametrize(
    "arguments", [[], ["hydra.run.dir=deep/down"], ["-m", "hydra.sweep.dir=deep/down"]], ids=["run", "dir", "sweep"]
)
def test_missing_data_leave_no_folder(arguments: list[str], tmp_path: Path) -> None:
    line = command_error(tmp_path, *arguments, "tracking=none", "dataset=image_folder", "dataset.root=/nowhere")
    assert line.endswith("dataset image_folder: there is no folder /nowhere: set dataset.root")


def test_a_torn_loss_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text("mine: {fn: [\n")
    line = command_error(tmp_path, "loss=[ce,mine]", "--config-dir", str(tmp_path))
    assert str(tmp_path / "loss" / "mine.yaml") in line


# --- refused when a trial is set up


@pytest.fixture
def unready(quick: Config) -> Callable[..., str]:
    """Return a function that gives the error of setting up a trial with these values, by group."""
    return lambda **values: usage_error(lambda: build_setup({**copy.deepcopy(quick), **values}))


class Learns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.scale * nn.functional.cross_entropy(logits, labels)


class RefusesItsSettings(nn.Module):
    def __init__(self, power: int = 0) -> None:
        raise ValueError("power must be positive")


def vector(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def detached(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.detach(), labels)


def nine_logits(input_shape: tuple[int, int, int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9))


def one_class() -> Dataset:
    images = np.zeros((6, 1, 2, 2), dtype=np.uint8)
    return make_dataset("one", images, [0] * 6, {"train": [0, 1], "val": [2], "test": [3]}, ["only"])


def text(*_: object) -> str:
    return "no loss, model or dataset"


def raising(*_: object) -> Any:
    raise RuntimeError("the table\nis locked")


def own_loss(name: str) -> Config:
    fn = {"_target_": f"{__name__}.{name}", **({"_partial_": True} if name.islower() else {})}
    return {"mine": {"fn": fn, "args": ["logits", "labels"]}}


def own(name: str) -> Config:
    return {"_target_": f"{__name__}.{name}"}


SIZES = {"_target_": "pipeline.models.mlp", "hidden": {"_target_": "no_such_module.sizes"}}
BETAS = {"_target_": "torch.optim.Adam", "betas": [0.9, 1.0]}


@pytest.mark.parametrize(
    ("group", "value", "reason"),
    [
        ("loss", own_loss("Learns"), "loss.mine.fn has trainable parameters of its own"),
        ("loss", own_loss("RefusesItsSettings"), "loss.mine.fn cannot be made: power must be positive"),
        ("loss", own_loss("vector"), "loss mine returned a tensor of shape [4]"),
        ("loss", own_loss("text"), "loss mine returned str for a batch; the scalar objective is needed"),
        ("loss", own_loss("detached"), "loss mine passes no gradient to its inputs"),
        ("loss", own_loss("raising"), "loss mine failed when called with logits [4, 10], labels [4]: the table"),
        ("model", own("nine_logits"), "nine_logits maps a batch of 2 to [2, 9]; logits of shape [2, 10] are needed"),
        ("model", own("text"), "model text returned str, not a torch.nn.Module"),
        ("model", own("raising"), "the table"),
        ("model", SIZES, "no_such_module"),
        ("dataset", own("one_class"), "dataset one: only 1 class(es)"),
        ("dataset", own("text"), "text returned str; return make_dataset(...)"),
        ("dataset", own("raising"), "raising failed: RuntimeError: the table"),
        ("optimizer", {"_target_": "torch.optim.LBFGS"}, "torch.optim.LBFGS may mix the replicas of a stack"),
        ("optimizer", {"_target_": "torch.optim.SGD", "lr": -1.0}, "SGD refuses its settings: Invalid learn"),
        ("optimizer", BETAS, "optimizer Adam refuses its settings: Inval"),
        ("batch_size", 1138, "batch_size=1138 exceeds the 1137 training examples; lower it"),
    ],
)
def test_an_unusable_object_is_refused(group: str, value: object, reason: str, unready: Callable[..., str]) -> None:
    assert reason in unready(**{group: value})


@pytest.mark.parametrize("batch_size", [1, 2, 1136])
def test_last_batch_of_one_is_refused_under_batch_norm(
    batch_size: int, quick: Config, unready: Callable[..., str]
) -> None:
    normalised = {"_target_": "pipeline.models.mlp", "hidden": [8], "batch_norm": True}
    line = unready(model=normalised, batch_size=batch_size)
    assert "leaves a last batch of one of the 1137 training examples, which BatchNorm cannot" in line
    advised = int(line.rpartition("=")[2])
    assert abs(advised - batch_size) <= 2
    assert 1137 % advised > 1 or advised == 3


def test_last_batch_of_one_is_refused_when_folded(quick: Config, unready: Callable[..., str]) -> None:
    line = unready(trainer={**quick["trainer"], "engine": "fold"}, batch_size=142)
    assert "the last batch holds one example, whose bits depend on the neighbours when folded" in line
    build_setup({**quick, "batch_size": 142})  # the loop engine accepts it


def test_seed_zero_seeds(quick: Config) -> None:
    setting = build_setup(quick)

    def initial(seed: int) -> Tensor:
        torch.manual_seed(np.random.default_rng().integers(2**31))
        return setting.stack([Replica("ce", seed)]).weights(0)["1.weight"]

    assert torch.equal(initial(0), initial(0))
    assert not torch.equal(initial(0), initial(1))


# --- the trial's folder


@pytest.fixture
def attempt(quick: Config, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs a trial in a folder and gives its exit code and its errors."""

    def of(folder: Path, **values: Any) -> tuple[int, str]:
        capsys.readouterr()
        code = run_and_report(lambda: run({**quick, **values}, folder, "the command"))
        return int(code), capsys.readouterr().err

    return of


Attempt = Callable[..., tuple[int, str]]


def assert_refused(outcome: tuple[int, str], message: str) -> None:
    code, line = outcome
    assert (code, line.count("\n")) == (2, 1), line
    assert message in line


def test_a_folder_in_use_is_refused(attempt: Attempt, tmp_path: Path) -> None:
    with TrialFolder(tmp_path).locked():
        assert_refused(attempt(tmp_path), "is in use by another process; wait for it or choose another folder")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_folder_of_another_configuration_is_refused(attempt: Attempt, tmp_path: Path) -> None:
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    assert attempt(tmp_path) == (0, "")
    before = files()
    message = "holds a trial with another batch_size, epochs, name; choose another folder (hydra.run.dir=DIR)"
    assert_refused(attempt(tmp_path, batch_size=32, epochs=2), message)
    assert files() == before


def test_a_file_in_place_of_the_folder_is_refused(attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    assert_refused(attempt(tmp_path / "taken"), f"error: cannot write to {tmp_path / 'taken'}: ")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path, "256k") as place:
        yield place


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)  # noqa: S607


def test_a_read_only_disk_is_one_line(attempt: Attempt, disk: Path) -> None:
    remount(disk, "ro")
    line = f"error: cannot write to {disk / 'trial'}: Read-only file system; free space or choose another folder\n"
    assert attempt(disk / "trial") == (2, line)
    remount(disk, "rw,size=64m")
    assert attempt(disk / "trial") == (0, "")


def test_a_disk_that_fills_up_leaves_no_part_of_a_cell(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cells, "flush_to_disk", full)
        assert_refused(attempt(tmp_path), "No space left on device")
    assert TrialFolder(tmp_path).cells() == []
    assert attempt(tmp_path) == (0, "")


# --- no wrong request


def test_a_loss_that_is_nan_at_once_is_a_diverged_run(attempt: Attempt, tmp_path: Path) -> None:
    assert attempt(tmp_path, loss=compose("loss=[ce,kl_literal]")["loss"]) == (0, "")
    cell = TrialFolder(tmp_path).read(Replica("kl_literal", 0))
    assert cell is not None
    assert cell.record.diverged_at == 1


def test_a_user_s_loss_trains_from_a_folder_of_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The YAML lies in --config-dir, the module in the current directory, as for `python -m`."""
    (tmp_path / "my_conf" / "loss").mkdir(parents=True)
    (tmp_path / "my_conf" / "loss" / "mine.yaml").write_text(
        "mine:\n  fn: {_target_: mine.my_loss, _partial_: true}\n  args: [log_probs, labels]\n"
    )
    (tmp_path / "mine.py").write_text(
        "def my_loss(log_probs, labels):\n    return -log_probs.gather(1, labels[:, None]).mean()\n"
    )
    request = ["--config-dir", "my_conf", *QUICK[1:], "audit=true", "loss=[ce,mine]", "hydra.run.dir=here"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *request])
    with pytest.raises(SystemExit) as left:
        run_entry_point(train.task)
    assert (left.value.code, capsys.readouterr().err) == (0, "")
    (entry,) = verdict(tmp_path / "here")["comparisons"]
    assert (entry["loss"], entry["objective"]) == ("mine", "identical")
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"here", "mine.py", "my_conf"}
