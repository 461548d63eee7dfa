from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import entropy
from torch import Tensor

from experiments.soft_labels.entropy import apart, cells_of, data_of, distances, entropy_of_targets
from likelihood_lab.categorical.inputs import derive
from likelihood_lab.errors import UsageError
from pipeline.data.dataset import Dataset
from pipeline.data.soft_labels import ANNOTATIONS, CIFAR10_CLASSES, CIFAR10H, cifar10h, teacher
from pipeline.entry import ExitCode
from pipeline.replica import Replica
from pipeline.storage.cells import TrialFolder
from pipeline.training.module import StackTrainingModule
from tests.laboratory import CPU, refused, shipped
from tests.trials import trial, verdict, weights

ARCHIVE = Path(os.environ.get(CIFAR10H) or Path(__file__).parents[4] / "shared" / "data" / "cifar10h.tar.gz")
SMALL = ("dataset=teacher", "dataset.train=200", "dataset.val=50", "dataset.test=400", "reference=ce_soft")


def counts_of(label: int, number: int) -> list[int]:
    """Fifty votes for the label, one or more for the next class."""
    votes = [0] * 10
    votes[label], votes[(label + 1) % 10] = 50, 1 + number
    return votes


def written(root: Path, per_class: int = 4) -> Path:
    """A folder as `cifar10h` reads it: every picture of one colour, which tells its class and number."""
    lines = ["path," + ",".join(CIFAR10_CLASSES)]
    for label, kind in enumerate(CIFAR10_CLASSES):
        (root / "test" / kind).mkdir(parents=True)
        for number in range(per_class):
            path = f"test/{kind}/{number:04}.jpg"
            Image.new("RGB", (32, 32), (20 * label, 60 * number, 128)).save(root / path, quality=100, subsampling=0)
            lines.append(",".join([path, *map(str, counts_of(label, number))]))
    (root / ANNOTATIONS).write_text("\n".join(lines) + "\n")
    return root


def small(root: Path, **options: Any) -> Dataset:
    return cifar10h(str(root), val=10, test=10, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "cifar10h")


def rewritten(folder: Path, old: str, new: str) -> None:
    """One place of the annotations changed."""
    file = folder / ANNOTATIONS
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))


# --- CIFAR-10H


def test_cifar10h_targets_and_truth_are_the_shares(folder: Path) -> None:
    data = small(folder)
    assert data.classes == CIFAR10_CLASSES
    assert {part: len(rows) for part, rows in data.splits.items()} == {"train": 20, "val": 10, "test": 10}
    for row in range(40):
        label, number = divmod(row, 4)
        votes = torch.tensor(counts_of(label, number), dtype=torch.float64)
        assert data.labels[row] == label
        assert torch.equal(data.target_probs(torch.tensor(row)), (votes / votes.sum()).float())
        assert data.images[row].float().mean((1, 2)).tolist() == pytest.approx([20 * label, 60 * number, 128], abs=3)
    assert data.truth is not None
    assert data.soft_targets is not None
    assert torch.equal(data.truth, data.soft_targets)


def test_cifar10h_labels_are_those_of_cifar10(folder: Path) -> None:
    rewritten(folder, "test/cat/0002.jpg,0,0,0,50,3", "test/cat/0002.jpg,0,0,0,3,50")
    data = small(folder)
    assert data.labels[14] == CIFAR10_CLASSES.index("cat")
    assert data.target_probs(torch.tensor(14)).argmax() == CIFAR10_CLASSES.index("deer")


def test_cifar10h_archive_equals_its_folder_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as archive:
        archive.add(folder, "anything/at/all")
        for name in ("../../outside.jpg", "/tmp/absolute/test/cat/9999.jpg", "x/test/cat/../../../up.jpg"):  # noqa: S108
            content = b"not a picture"
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("anything/test/cat/9998.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    assert small(tmp_path / "packed.tar.gz").digest == small(folder).digest
    assert sorted(tmp_path.rglob("*")) == before


def test_cifar10h_reads_the_folder_of_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CIFAR10H, str(folder))
    assert cifar10h(val=10, test=10).digest == small(folder).digest


def test_cifar10h_without_data_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CIFAR10H, raising=False)
    refused(cifar10h, "cifar10h is not here", "dataset.root", CIFAR10H, "github.com/jcpeterson/cifar-10h")
    refused(lambda: cifar10h(str(tmp_path / "absent")), "there is no", "absent", "dataset.root")
    (tmp_path / "empty").mkdir()
    refused(lambda: cifar10h(str(tmp_path / "empty")), f"has no {ANNOTATIONS}")
    (tmp_path / "text.tar.gz").write_text("no archive")
    refused(lambda: cifar10h(str(tmp_path / "text.tar.gz")), "text.tar.gz", "unreadable")


CAT = "test/cat/0001.jpg"
VOTES = "0,0,0,50,2,0,0,0,0,0"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (f"{CAT},{VOTES}", f"{CAT},0,0,0,0,0,0,0,0,0,0", [CAT, "nobody has annotated"]),
        (f"{CAT},{VOTES}", CAT, [CAT, "nothing", "not ten counts"]),
        (f"{CAT},{VOTES}", f"{CAT},{VOTES[:-2]}", [CAT, "not ten counts"]),
        (f"{CAT},{VOTES}", f"{CAT},{VOTES},1", [CAT, "not ten counts"]),
        (f"{CAT},{VOTES}", f"{CAT},-1{VOTES[1:]}", [CAT, "-1", "not ten counts"]),
        (f"{CAT},{VOTES}", f"{CAT},.5{VOTES[1:]}", [CAT, "not ten counts"]),
        (CAT, "test/lynx/0001.jpg", ["test/lynx/0001.jpg", "in no class folder"]),
        (CAT, "test/cat/0099.jpg", ["test/cat/0099.jpg", "not there"]),
        (CAT, "../../etc/cat/0001.jpg", ["../../etc/cat/0001.jpg", "not there"]),
        (CAT, "test/cat/0002.jpg", ["a picture twice"]),
        ("airplane,automobile", "automobile,airplane", ["begins with 'path,automobile"]),
    ],
)
def test_cifar10h_refuses_bad_annotations(folder: Path, old: str, new: str, words: list[str]) -> None:
    rewritten(folder, old, new)
    refused(lambda: small(folder), "dataset cifar10h", *words)


def test_cifar10h_refuses_annotations_without_pictures(folder: Path) -> None:
    text = (folder / ANNOTATIONS).read_text()
    (folder / ANNOTATIONS).write_text(text.splitlines()[0] + "\n")
    refused(lambda: small(folder), "has no picture")
    (folder / ANNOTATIONS).write_text("")
    refused(lambda: small(folder), ANNOTATIONS, "begins with ''")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: file.unlink(), [CAT, "not there"]),
        (lambda file: file.write_bytes(b""), [CAT, "unreadable"]),
        (lambda file: file.write_bytes(file.read_bytes()[:300]), [CAT, "unreadable"]),
        (lambda file: Image.new("RGB", (32, 31)).save(file), [CAT, "32 x 31, not 32 x 32"]),
    ],
    ids=["missing", "empty", "truncated", "size"],
)
def test_cifar10h_refuses_a_bad_picture_by_name(folder: Path, spoil: Callable[[Path], Any], words: list[str]) -> None:
    spoil(folder / CAT)
    refused(lambda: small(folder), "dataset cifar10h", *words)


@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"CIFAR-10H is not here: set {CIFAR10H}")
def test_cifar10h_reads_the_published_annotations() -> None:
    data = cifar10h(str(ARCHIVE))
    assert {part: len(rows) for part, rows in data.splits.items()} == {"train": 7500, "val": 500, "test": 2000}
    assert data.input_shape == (3, 32, 32)
    assert torch.bincount(data.labels).tolist() == [1000] * 10
    assert data.truth is not None
    assert entropy(data.truth.numpy(), axis=1).mean() == pytest.approx(0.1545, abs=1e-4)
    assert (data.truth.argmax(1) != data.labels).double().mean() == pytest.approx(0.0079, abs=1e-4)


# --- a teacher


def test_teacher_depends_on_the_data_seed_alone() -> None:
    assert teacher().digest == teacher().digest != teacher(data_seed=1).digest
    with pytest.raises(UsageError, match="data_seed=-1"):
        teacher(data_seed=-1)


def test_teacher_labels_share_inputs_truth_and_splits() -> None:
    soft, sampled = teacher("soft"), teacher("sampled")
    assert soft.truth is not None
    assert sampled.truth is not None
    assert torch.equal(soft.images, sampled.images)
    assert torch.equal(soft.truth, sampled.truth)
    assert all(torch.equal(soft.splits[part], sampled.splits[part]) for part in soft.splits)
    assert soft.soft_targets is not None
    assert torch.equal(soft.soft_targets, soft.truth)
    assert torch.equal(soft.labels, soft.truth.argmax(1))
    assert sampled.soft_targets is None
    assert sampled.digest != soft.digest


def test_teacher_samples_labels_from_the_truth() -> None:
    """Pearson's statistic of labels against P, class by class, stays below chi-square's 99.9 % point of 10 degrees."""
    data = teacher("sampled", train=20_000)
    assert data.truth is not None
    expected, variance = data.truth.sum(0), (data.truth * (1 - data.truth)).sum(0)
    z = (torch.bincount(data.labels, minlength=10) - expected) / variance.sqrt()
    assert z.square().sum() < 29.6
    hit = data.truth.gather(1, data.labels[:, None]).mean()
    assert hit.item() == pytest.approx(data.truth.square().sum(1).mean().item(), abs=0.005)


def test_teacher_entropy_falls_with_sharpness() -> None:
    truths = [np.asarray(teacher(sharpness=sharpness).truth) for sharpness in (0.01, 1.0, 5.0, 50.0)]
    surprisal = [entropy(truth, axis=1).mean() for truth in truths]
    assert surprisal[0] == pytest.approx(np.log(10), rel=1e-4)
    assert surprisal == sorted(surprisal, reverse=True)
    assert surprisal[-1] < 0.15


@pytest.mark.parametrize(
    ("options", "word"),
    [({"labels": "hard"}, "labels=hard"), ({"num_classes": 1}, "num_classes=1"), ({"val": 0}, "val")],
)
def test_teacher_refuses_impossible_arguments(options: dict[str, Any], word: str) -> None:
    refused(lambda: teacher(**options), "dataset teacher", word)


# --- the losses


def on_soft_labels(name: str, logits: Tensor, target_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of a shipped loss."""
    (formulation,) = shipped(name)
    leaf = logits.clone().requires_grad_()
    inputs = derive(formulation.args, leaf) | {"target_probs": target_probs, "labels": target_probs.argmax(1)}
    fn = formulation.instance(CPU, logits.dtype)
    value = formulation.objective(fn, [inputs[arg] for arg in formulation.args])
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.fixture
def soft_batch() -> tuple[Tensor, Tensor]:
    """Logits and a teacher's targets, in float64; one target has zeros."""
    data = teacher(train=100)
    assert data.truth is not None
    targets = data.truth[:16].clone()
    targets[3] = torch.tensor([0.5, 0.5, *[0.0] * 8])
    return 3 * torch.randn(16, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), targets


def test_kl_is_ce_soft_minus_the_entropy_of_the_targets(soft_batch: tuple[Tensor, Tensor]) -> None:
    logits, targets = soft_batch
    (kl, gradient), (ce, reference) = (on_soft_labels(name, logits, targets) for name in ("kl", "ce_soft"))
    assert (ce - kl).item() == pytest.approx(entropy(targets.numpy(), axis=1).mean(), rel=1e-13)
    torch.testing.assert_close(gradient, reference, rtol=1e-14, atol=1e-17)
    torch.testing.assert_close(gradient, (logits.softmax(1) - targets) / 16, rtol=1e-12, atol=1e-15)


def test_losses_on_soft_labels_match_ce_soft_or_differ(soft_batch: tuple[Tensor, Tensor]) -> None:
    ce, reference = on_soft_labels("ce_soft", *soft_batch)
    value, gradient = on_soft_labels("ce_soft_logsumexp", *soft_batch)
    assert value.item() == pytest.approx(ce.item(), rel=1e-14)
    torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-16)
    _, hard = on_soft_labels("ce", *soft_batch)
    assert (hard - reference).abs().max() > 0.1 * reference.abs().max()


# --- trials


@pytest.fixture(scope="module")
def soft_trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trial of three losses on a teacher's soft labels, with an audit."""
    path = tmp_path_factory.mktemp("soft") / "trial"
    expect = "expect={kl: offset, ce: different}"
    code = trial(path, *SMALL, "loss=[ce_soft,kl,ce]", "seed=[0,1]", "audit=true", "epochs=3", "batch_size=48", expect)
    assert code == ExitCode.HOLDS
    return path


def soft_truth(part: str) -> Tensor:
    """P(y | x) of a split of the trial's data."""
    data = teacher(train=200, val=50, test=400)
    truth = data.true_probs(data.splits[part])
    assert truth is not None
    return truth


def test_trial_finds_kl_offset_and_identical(soft_trial: Path) -> None:
    kl, ce = verdict(soft_trial)["comparisons"]
    assert (kl["objective"], kl["outcome"], kl["verdict"]) == ("offset", "identical", "identical")
    assert "moves with the targets" in kl["sentence"]
    assert (ce["objective"], ce["verdict"]) == ("different", "different")
    assert "soft targets" in kl["covered"]
    assert all(
        torch.equal(a, b) for a, b in zip(*(weights(soft_trial, n, 1).values() for n in ("kl", "ce_soft")), strict=True)
    )


def test_objectives_differ_by_the_entropy_of_the_targets(soft_trial: Path) -> None:
    history = pd.read_parquet(soft_trial / "history.parquet")
    values = history[history["metric"] == "train/objective"].pivot(
        index=["seed", "step"], columns="loss", values="value"
    )
    exact = entropy(soft_truth("train"), axis=1).mean()
    assert (values["ce_soft"] - values["kl"]).to_numpy() == pytest.approx(exact, rel=1e-6)  # float32 objectives
    assert len(values) == 6


def test_experiment_tables_match_the_cells(soft_trial: Path) -> None:
    cells = cells_of(soft_trial)
    data = data_of(cells)
    exact = entropy(np.asarray(data.truth)[data.splits["train"]], axis=1).mean()
    assert entropy_of_targets(data) == pytest.approx(exact, rel=1e-13)
    name, between, entropy_in_row, off, same = apart("teacher", cells, data).strip("| ").split(" | ")
    assert (name, same) == ("teacher", "2 of 2")
    assert float(between) == pytest.approx(exact, rel=1e-6)
    assert float(entropy_in_row) == pytest.approx(exact, rel=1e-7)
    assert float(off) < 1e-6
    rows = [row.strip("| ").split(" | ") for row in distances("teacher", cells)]
    assert [row[1] for row in rows] == ["`ce_soft`", "`kl`", "`ce`"]
    ce_soft = np.mean([cells[Replica("ce_soft", seed)].metrics["test/kl_truth"] for seed in (0, 1)])
    assert float(rows[0][2].split()[0]) == pytest.approx(ce_soft, abs=1e-4)
    assert rows[1][3].startswith("+0 ")


def test_audit_at_weights_uses_the_training_targets(soft_trial: Path) -> None:
    audit = json.loads((soft_trial / "audit.json").read_text())
    assert audit["settings"]["soft_targets"] is True
    assert audit["losses"]["kl"]["at_weights"]["objective"] == "offset"
    assert audit["losses"]["ce"]["at_weights"]["objective"] == "different"
    cell = TrialFolder(soft_trial).read(Replica("ce_soft", 0))
    assert cell is not None
    truth = soft_truth("train")
    for batch in cell.batches:
        assert batch["target_probs"].dtype == torch.float64
        assert (batch["target_probs"][:, None] == truth).all(2).any(1).all()  # each is a training example's
        assert torch.equal(batch["target_probs"].argmax(1), batch["labels"])


def test_kl_truth_is_recorded_and_matches_its_definition(soft_trial: Path) -> None:
    history = pd.read_parquet(soft_trial / "history.parquet")
    assert {f"{part}/kl_truth" for part in ("train", "val", "test")} < set(history["metric"])
    last = history.groupby(["loss", "seed", "metric"])["value"].last()
    surprisal = entropy(soft_truth("test"), axis=1).mean()
    for loss in ("ce_soft", "ce"):  # targets are the truth: KL(P || q) = -sum P log q - H(P)
        found = last[loss, 0]
        assert found["test/kl_truth"] == pytest.approx(found["test/nll"] - surprisal, rel=1e-6)
    kl, ce = verdict(soft_trial)["comparisons"]
    assert kl["metrics"]["kl_truth"]["mean_difference"] == 0
    assert ce["metrics"]["kl_truth"]["margin"] == 0.01
    assert "KL to the truth" in (soft_trial / "report.html").read_text()


def test_label_entropy_is_that_of_the_soft_frequencies(soft_trial: Path) -> None:
    import yaml

    facts = yaml.safe_load((soft_trial / "request.yaml").read_text())["facts"]
    assert facts["label_entropy"] == pytest.approx(entropy(soft_truth("train").mean(0)), rel=1e-12)


def test_audit_of_label_losses_on_soft_labels(tmp_path: Path) -> None:
    request = (*SMALL[:-1], "audit=true", "seed=[0]", "epochs=1")
    trial(tmp_path / "t", *request, "loss=[ce,nll]")
    assert verdict(tmp_path / "t")["comparisons"][0]["objective"] == "identical"
    trial(tmp_path / "t", *request, "loss=[ce,nll,kl]")
    assert {entry["loss"]: entry["objective"] for entry in verdict(tmp_path / "t")["comparisons"]} == {
        "nll": "identical",
        "kl": "different",
    }


def test_trial_on_sampled_labels_finds_kl_identical(tmp_path: Path) -> None:
    request = (*SMALL, "dataset.labels=sampled", "loss=[ce_soft,kl,ce]", "seed=[0]", "audit=true", "expect=identical")
    assert trial(tmp_path / "t", *request) == ExitCode.HOLDS
    history = pd.read_parquet(tmp_path / "t" / "history.parquet")
    last = history.groupby(["loss", "metric"])["value"].last()["ce_soft"]
    assert 0 < last["test/kl_truth"] < last["test/nll"]


def test_trial_without_a_truth_has_no_kl_truth(tmp_path: Path) -> None:
    trial(tmp_path / "t", "loss=[ce,nll]", "seed=[0]")
    assert not pd.read_parquet(tmp_path / "t" / "history.parquet")["metric"].str.contains("kl_truth").any()
    assert "kl_truth" not in verdict(tmp_path / "t")["comparisons"][0]["metrics"]
    assert "KL to the truth" not in (tmp_path / "t" / "report.html").read_text()


@pytest.mark.parametrize("key", ["dataset.primary=[nll,kl_truth]", "dataset.primary=[nll]"])
def test_trial_refuses_a_margin_for_an_unknown_truth(tmp_path: Path, key: str) -> None:
    margins = "+dataset.margins.kl_truth=0.01"
    refused(lambda: trial(tmp_path / "t", "loss=[ce,nll]", margins, key), "kl_truth", "digits does not know")
    assert not (tmp_path / "t" / "cells").exists()


def test_audit_skips_batches_without_soft_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of older versions have such batches. One-hot targets would be other data."""
    monkeypatch.setattr(StackTrainingModule, "_targets", lambda self, indices: {"labels": self.data.labels[indices]})
    trial(tmp_path / "t", *SMALL, "loss=[ce_soft,kl]", "seed=[0]", "audit=true", "epochs=1")
    assert "at_weights" not in json.loads((tmp_path / "t" / "audit.json").read_text())["losses"]["kl"]


def test_audit_refuses_soft_targets_that_no_loss_uses(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    from pipeline.config import schema as conf
    from pipeline.loss_audit import command as audit_request

    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        config = conf.plain(compose("audit", ["loss=[ce,nll]", "soft_targets=true", "tracking=none"]))
    refused(lambda: audit_request.run(config, tmp_path / "a"), "soft_targets=true", "target_probs", "ce_soft")
    assert not (tmp_path / "a").exists()
