"""A wrong request is one line and exit code 2 and leaves nothing behind; a run that diverges is none."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from likelihood_lab.errors import UsageError
from pipeline import train
from pipeline.config import schema as conf
from pipeline.config.hydra_glue import run_entry_point
from pipeline.data.dataset import Dataset, make_dataset
from pipeline.entry import ExitCode, run_and_report
from pipeline.replica import Replica
from pipeline.storage import cells
from pipeline.storage.cells import TrialFolder
from pipeline.trial import run as trials
from pipeline.trial.run import run
from pipeline.trial.setup import build_setup

ROOT = Path(__file__).parents[3]
QUICK = [
    "loss=[ce,nll]",
    "model=softmax_regression",
    "trainer=cpu",
    "tracking=none",
    "epochs=1",
    "audit=false",
    "controls=none",
]
Config = dict[str, Any]


@pytest.fixture(scope="module")
def quick() -> Config:
    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        config = conf.plain(compose("train", overrides=QUICK))
    config["trainer"]["progress"] = False
    return config


# --- what Hydra refuses, through the entry point


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line that a command ends with, once it is clear that nothing else came of it."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def command(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as left:
            run_entry_point(train.task)
        said = capsys.readouterr()
        assert left.value.code == ExitCode.USAGE, said.err
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return said.err.rstrip("\n")

    return command


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("loss=kll", "error: loss=kll: no such option; there is brier, ce, ce_one_hot,"),
        ("loss=[nll,kll]", "error: loss=kll: no such option; there is brier, ce, ce_one_hot,"),
        ("trainer=gpuu", "error: trainer=gpuu: no such option; there is auto, cpu, gpu (did you mean"),
        ("losss=ce", "error: unknown key 'losss' (did you mean 'loss'?); the keys are: loss, model,"),
        ("epoch=3", "error: unknown key 'epoch' (did you mean 'epochs'?); the keys are: loss, model,"),
        ("model.hiden=3", "error: unknown key 'model.hiden' (did you mean 'hidden'?); model takes: _target_"),
        ("+model.hiden=3", "error: unknown key 'model.hiden' (did you mean 'hidden'?); pipeline."),
        ("+nonsense=1", "error: unknown key 'nonsense'; the keys are: loss, model, dataset,"),
        ("epochs=three", "error: epochs: Value 'three' of type 'str' could not be converted to Integer"),
        ("seed=range(3)", "error: seed=range(3) is a sweep: add -m, or give a list such as 'seed=[0,1,2]'"),
        ("loss=nll,kl", "error: loss=nll,kl is a sweep: add -m, or give a list such as 'loss=[nll,kl]'"),
        ("loss=[nll", "error: cannot read 'loss=[nll': no viable alternative at input '[nll'; give"),
        ("model=null", "error: a group cannot be null or a number; give the name of one of its files, or leave it out"),
        ("seed=-1", "error: seed=-1 is not an integer from 0 to 4294967295"),
        ("+loss.ce.lr_scale=-1", "error: loss.ce.lr_scale=-1; give a positive factor of the learning rate"),
        ("+loss.ce.lr_scale=true", "error: loss.ce.lr_scale=True; give a positive factor of the learning rate"),
    ],
)
def test_what_does_not_compose_is_refused_with_the_options(
    argument: str, line: str, refused: Callable[..., str]
) -> None:
    assert refused(argument).startswith(line)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["epochs=1,2", "losss=ce"], "error: unknown key 'losss' (did you mean 'loss'?)"),
        (["loss=nll,kll"], "error: loss=kll: no such option; there is brier,"),
        (["model=mlp,cnn", "seed=0,-1"], "error: seed=-1 is not an integer"),
        (["seed=[0,0]", "batch_size=8,16"], "error: seed repeats 0"),
    ],
)
def test_a_sweep_is_refused_before_its_first_job(arguments: list[str], line: str, refused: Callable[..., str]) -> None:
    assert refused("-m", *arguments).startswith(line)


def test_what_only_the_data_tell_leaves_no_folder_either(refused: Callable[..., str]) -> None:
    request = ["tracking=none", "dataset=image_folder", "dataset.root=/nowhere"]
    reason = "dataset image_folder: there is no folder /nowhere: set dataset.root"
    assert refused(*request) == f"error: {reason}"
    assert refused(*request, "hydra.run.dir=deep/down") == f"error: {reason}"
    assert refused("-m", *request, "hydra.sweep.dir=deep/down").endswith(reason)


def test_a_torn_loss_file_is_named(refused: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("torn")
    (folder / "loss").mkdir()
    (folder / "loss" / "mine.yaml").write_text("mine: {fn: [\n")
    line = refused("loss=[ce,mine]", "--config-dir", str(folder))
    assert line.startswith("error: ")
    assert str(folder / "loss" / "mine.yaml") in line


# --- what comes to light when a trial is made ready


@pytest.fixture
def unready(quick: Config) -> Callable[..., str]:
    """Why a trial with these values, by group, cannot be made ready."""

    def of(**values: Any) -> str:
        with pytest.raises(UsageError) as refused:
            build_setup({**copy.deepcopy(quick), **values})
        line = str(refused.value)
        assert "\n" not in line
        return line

    return of


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


def number(logits: Tensor, labels: Tensor) -> float:
    return 1.0


def detached(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.detach(), labels)


def raising(logits: Tensor, labels: Tensor) -> Tensor:
    raise RuntimeError("the labels\nare odd")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Learns", "loss.mine.fn has trainable parameters of its own"),
        ("RefusesItsSettings", "loss.mine.fn cannot be made: power must be positive"),
        ("vector", "loss mine returned a tensor of shape [4]"),
        ("number", "loss mine returned float for a batch; the scalar objective is needed"),
        ("detached", "loss mine passes no gradient to its inputs"),
        ("raising", "loss mine failed when called with logits [4, 10], labels [4]: the labels"),
    ],
)
def test_a_loss_that_cannot_train_is_refused(name: str, reason: str, unready: Callable[..., str]) -> None:
    fn = {"_target_": f"{__name__}.{name}", **({"_partial_": True} if name.islower() else {})}
    assert reason in unready(loss={"mine": {"fn": fn, "args": ["logits", "labels"]}})


def nine_logits(input_shape: tuple[int, int, int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9))


def no_module() -> str:
    return "a model"


def torn(num_classes: int) -> nn.Module:
    raise RuntimeError("no such layer")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nine_logits", "model nine_logits maps a batch of 2 to [2, 9]; logits of shape [2, 10] are needed"),
        ("no_module", "model no_module returned str, not a torch.nn.Module"),
        ("torn", "no such layer"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(name: str, reason: str, unready: Callable[..., str]) -> None:
    assert reason in unready(model={"_target_": f"{__name__}.{name}"})


def test_a_wrong_target_among_the_keywords_is_refused(unready: Callable[..., str]) -> None:
    model = {"_target_": "pipeline.models.mlp", "hidden": {"_target_": "no_such_module.sizes"}}
    assert "no_such_module" in unready(model=model)


def one_class() -> Dataset:
    images = np.zeros((6, 1, 2, 2), dtype=np.uint8)
    return make_dataset("one", images, [0] * 6, {"train": [0, 1], "val": [2], "test": [3]}, ["only"])


def no_dataset() -> str:
    return "data"


def broken_dataset() -> Dataset:
    raise RuntimeError("the table is locked")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("one_class", "dataset one: only 1 class(es)"),
        ("no_dataset", "no_dataset returned str; return make_dataset(...)"),
        ("broken_dataset", "broken_dataset failed: RuntimeError: the table is locked"),
    ],
)
def test_data_that_cannot_be_learned_are_refused(name: str, reason: str, unready: Callable[..., str]) -> None:
    assert reason in unready(dataset={"_target_": f"{__name__}.{name}"})


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        ({"_target_": "torch.optim.LBFGS"}, "optimizer torch.optim.LBFGS may mix the replicas of a stack"),
        ({"_target_": "torch.optim.SGD", "lr": -1.0}, "optimizer SGD refuses its settings: Invalid learn"),
        ({"_target_": "torch.optim.Adam", "betas": [0.9, 1.0]}, "optimizer Adam refuses its settings: Inval"),
    ],
)  # fmt: skip
def test_an_optimizer_that_cannot_step_a_stack_is_refused(
    optimizer: Config, reason: str, unready: Callable[..., str]
) -> None:
    assert reason in unready(optimizer=optimizer)


def test_a_batch_larger_than_the_data_is_refused(unready: Callable[..., str]) -> None:
    assert unready(batch_size=1138) == "batch_size=1138 exceeds the 1137 training examples; lower it"


@pytest.mark.parametrize("batch_size", [1, 2, 1136])
def test_a_last_batch_of_one_is_refused_under_batch_norm(
    batch_size: int, quick: Config, unready: Callable[..., str]
) -> None:
    normalised = {"_target_": "pipeline.models.mlp", "hidden": [8], "batch_norm": True}
    line = unready(model=normalised, batch_size=batch_size)
    assert "leaves a last batch of one of the 1137 training examples, which BatchNorm cannot" in line
    advised = int(line.rpartition("=")[2])
    assert abs(advised - batch_size) <= 2
    assert 1137 % advised > 1 or advised == 3


def test_folding_a_last_batch_of_one_is_refused(quick: Config, unready: Callable[..., str]) -> None:
    line = unready(trainer={**quick["trainer"], "engine": "fold"}, batch_size=142)
    assert "the last batch holds one example, whose bits depend on the neighbours when folded" in line


def test_a_last_batch_of_one_is_no_matter_without_batch_norm(quick: Config) -> None:
    build_setup({**quick, "batch_size": 1136})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(quick: Config, unready: Callable[..., str]) -> None:
    trainer = {**quick["trainer"], "accelerator": "gpu"}
    assert unready(trainer=trainer).startswith("trainer=gpu, but torch sees no CUDA GPU here")


def test_seed_zero_seeds(quick: Config) -> None:
    setting = build_setup(quick)

    def initial(seed: int) -> Tensor:
        torch.manual_seed(np.random.default_rng().integers(2**31))
        return setting.stack([Replica("ce", seed)]).weights(0)["1.weight"]

    assert torch.equal(initial(0), initial(0))
    assert not torch.equal(initial(0), initial(1))


# --- the trial's folder


def outcome(config: Config, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    code = run_and_report(lambda: run(config, folder, "the command"))
    return int(code), capsys.readouterr().err


def test_a_folder_in_use_is_refused(quick: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TrialFolder(tmp_path).locked():
        code, line = outcome(quick, tmp_path, capsys)
    assert (code, line.count("\n")) == (2, 1)
    assert "is in use by another process; wait for it or choose another folder" in line
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_folder_of_another_configuration_is_refused_and_untouched(
    quick: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(quick, tmp_path, capsys)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, line = outcome({**quick, "batch_size": 32, "epochs": 2}, tmp_path, capsys)
    assert (code, line.count("\n")) == (2, 1)
    assert "holds a trial with another batch_size, epochs, name; choose another folder" in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_file_in_place_of_the_folder_is_refused(
    quick: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("mine")
    code, line = outcome(quick, tmp_path / "taken", capsys)
    assert (code, line.count("\n")) == (2, 1)
    assert line.startswith(f"error: cannot write to {tmp_path / 'taken'}: ")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting takes root")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)  # noqa: S607


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)  # noqa: S607


def whole(disk: Path) -> list[str]:
    """The cells that are there, and every one of them can be read."""
    found = TrialFolder(disk / "trial").cells()
    assert all(len(cell.history) and cell.weights for cell in found)
    return [f"{cell.record.arm}/s{cell.record.seed}" for cell in found]


@pytest.mark.parametrize("foreseen", [False, True])
@pytest.mark.parametrize("room", [0, 56, 100])
def test_a_full_disk_costs_one_line_and_the_same_command_ends_right_once_there_is_room(
    room: int,
    foreseen: bool,
    quick: Config,
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not foreseen:  # others may fill a disk after the trial has looked at it
        monkeypatch.setattr(trials, "check_disk", lambda *_: None)
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast.write_bytes(bytes(free - room * 1024))
    code, line = outcome(quick, small_disk / "trial", capsys)
    assert (code, line.count("\n")) == (2, 1), line
    assert "free space or choose another folder" in line
    assert set(whole(small_disk)) <= (set() if foreseen else {"ce/s0", "nll/s0"})
    ballast.unlink()
    remount(small_disk, "size=64m")
    assert outcome(quick, small_disk / "trial", capsys) == (0, "")
    assert whole(small_disk) == ["ce/s0", "nll/s0"]
    assert not list(small_disk.rglob("*draft*"))


def test_a_read_only_disk_costs_one_line(quick: Config, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remount(small_disk, "ro")
    code, line = outcome(quick, small_disk / "trial", capsys)
    assert (code, line) == (
        2,
        f"error: cannot write to {small_disk / 'trial'}: Read-only file system; free space or choose another folder\n",
    )
    remount(small_disk, "rw,size=64m")
    assert outcome(quick, small_disk / "trial", capsys) == (0, "")


def test_a_disk_that_fills_up_under_a_cell_leaves_no_part_of_it(
    quick: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cells, "flush_to_disk", full)
        code, line = outcome(quick, tmp_path, capsys)
    assert (code, line.count("\n")) == (2, 1)
    assert TrialFolder(tmp_path).cells() == []
    assert outcome(quick, tmp_path, capsys) == (0, "")


# --- what is not a wrong request


def test_a_loss_that_is_nan_from_the_first_step_is_a_diverged_arm(
    quick: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        loss = conf.plain(compose("train", overrides=["loss=[ce,kl_literal]"]))["loss"]
    assert outcome({**quick, "loss": loss}, tmp_path, capsys) == (0, "")
    cell = TrialFolder(tmp_path).read(Replica("kl_literal", 0))
    assert cell is not None
    assert cell.record.diverged_at == 1


def test_a_loss_of_the_users_own_trains_from_a_folder_of_theirs(tmp_path: Path) -> None:
    """As a stranger would: a YAML in --config-dir, the module in the current directory."""
    (tmp_path / "my_conf" / "loss").mkdir(parents=True)
    (tmp_path / "my_conf" / "loss" / "mine.yaml").write_text(
        "mine:\n  fn: {_target_: mine.my_loss, _partial_: true}\n  args: [log_probs, labels]\n"
    )
    (tmp_path / "mine.py").write_text(
        "def my_loss(log_probs, labels):\n    return -log_probs.gather(1, labels[:, None]).mean()\n"
    )
    request = [*QUICK[1:], "audit=true", "loss=[ce,mine]", "hydra.run.dir=here"]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.train", "--config-dir", "my_conf", *request],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    verdict = json.loads((tmp_path / "here" / "verdict.json").read_text())
    assert [(entry["loss"], entry["objective"]) for entry in verdict["comparisons"]] == [("mine", "identical")]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "here", "mine.py", "my_conf",
    ]  # fmt: skip
