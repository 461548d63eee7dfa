"""Damaged data and damaged cells give one clear line, are not counted, and run no code of a stranger."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import shutil
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pipeline.build import load_dataset
from pipeline.data import loaders, soft_labels
from pipeline.data.dataset import Dataset, make_dataset
from pipeline.entry import ExitCode, run_and_report
from pipeline.replica import Replica
from pipeline.report import report
from pipeline.storage.cells import SEAL, TrialFolder
from pipeline.trial.run import run
from tests.trials import QUICK, compose, usage_error, verdict

Damage = Callable[[Path], object]
executions: list[str] = []


def strangers_code() -> None:
    executions.append("it ran")


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return strangers_code, ()


PAYLOAD = pickle.dumps(Payload())


@pytest.fixture(autouse=True)
def no_code_runs() -> Iterator[None]:
    executions.clear()
    yield
    assert executions == []


def test_the_payload_runs_when_unpickled() -> None:
    pickle.loads(PAYLOAD)  # noqa: S301 - that it runs is the point
    assert executions
    executions.clear()


# --- damages: each takes the folder in which the named file lies


def put(name: str | Path, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str | Path, size: int | None = None) -> Damage:
    """Keep so many bytes of the file, by default half."""
    return lambda folder: (path := folder / name).write_bytes(path.read_bytes()[: size or path.stat().st_size // 2])


def flip_bit(name: str) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return damage


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def replace_by_folder(name: str) -> Damage:
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


def link_out(name: str | Path) -> Damage:
    """Move the file out of the folder and put a link to it in its place."""

    def damage(folder: Path) -> None:
        outside = Path(tempfile.mkdtemp()) / "outside"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return damage


def link_to_itself(name: str | Path) -> Damage:
    return lambda folder: ((folder / name).unlink(), (folder / name).symlink_to((folder / name).name))


# --- IDX files

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
TEST_IMAGES = "t10k-images-idx3-ubyte.gz"


def idx(*shape: int, kind: int = 8, value: int = 1, claim: tuple[int, ...] = (), more: int = 0) -> bytes:
    """Return an IDX file of equal bytes; labels count from 0 to 9 in turn."""
    size = int(np.prod(shape)) + more
    content = bytes(i % 10 for i in range(size)) if len(shape) == 1 and value == 1 else bytes([value]) * size
    header = struct.pack(f">HBB{len(shape)}I", 0, kind, len(shape), *(claim or shape))
    return gzip.compress(header + content, 1)


def idx_folder(root: Path) -> Path:
    root.mkdir()
    for part, count in (("train", 60), ("t10k", 20)):
        put(f"{part}-images-idx3-ubyte.gz", idx(count, 3, 2))(root)
        put(f"{part}-labels-idx1-ubyte.gz", idx(count))(root)
    return root


IDX: dict[str, tuple[Damage, str]] = {
    "half a gzip": (cut(IMAGES, 20), "truncated"),
    "no byte": (put(IMAGES, b""), "truncated"),
    "a text": (put(IMAGES, b"<html>404</html>"), "not an IDX file"),
    "a byte short": (put(IMAGES, idx(60, 3, 2, more=-1)), "other than the 360 bytes"),
    "a byte too long": (put(IMAGES, idx(60, 3, 2, more=1)), "other than the 360 bytes"),
    "a claim of terabytes": (put(IMAGES, idx(60, 3, 2, claim=(2**32 - 1, 28, 28))), "are the most"),
    "the magic of labels": (put(IMAGES, idx(60)), "wrong header"),
    "floats": (put(IMAGES, idx(60, 3, 2, kind=13)), "wrong header"),
    "labels out of range": (put(LABELS, idx(60, value=10)), "labels hold 10, out of range"),
    "one class": (put(LABELS, idx(60, value=0)), "only one class"),
    "too few labels": (put(LABELS, idx(59)), "60 images but 59 labels"),
    "nothing in it": (put(IMAGES, idx(0, 3, 2)), "0 images"),
    "two sizes": (put(TEST_IMAGES, idx(20, 4, 2)), "train has images of [3, 2] and"),
    "a missing file": (remove(LABELS), "has no train-labels-idx1-ubyte"),
    "a folder as a file": (replace_by_folder(LABELS), "has no train-labels-idx1-ubyte"),
    "a link out": (link_out(LABELS), "is a link out of"),
}


# --- pictures


def png_of(side: int, bits: int = 1) -> bytes:
    """Return a PNG that claims side x side pixels and has almost no bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def picture_folder(root: Path) -> Path:
    for kind in ("cat", "dog"):
        (root / kind).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (9, 9), (20 * number, 90, 7)).save(root / kind / f"{number}.png")
    return root


FIRST = Path("cat", "0.png")
PICTURES: dict[str, tuple[Damage, str]] = {
    "a text": (put(FIRST, b"no picture"), "unreadable picture"),
    "no byte": (put(FIRST, b""), "unreadable picture"),
    "cut short": (cut(FIRST, 45), "unreadable picture"),
    "a bomb": (put(FIRST, png_of(100_000)), "decompression bomb"),
    "a bomb of which Pillow only warns": (put(FIRST, png_of(10_000)), "decompression bomb"),
    "sixteen bits": (lambda root: Image.new("I;16", (9, 9)).save(root / FIRST), "more than 8 bits"),
    "a link out": (link_out(FIRST), "is a link out of"),
    "a class that is a link out": (lambda root: (root / "etc").symlink_to("/etc"), "is a link out of"),
    "a link to itself": (link_to_itself(FIRST), "leads nowhere"),
    "an archive among them": (put("cat/x.zip", b"PK"), "is not a picture"),
    "an empty class": (lambda root: (root / "emu").mkdir(), "without pictures"),
    "one class": (lambda root: shutil.rmtree(root / "dog"), "only 1 class"),
    "an empty folder": (lambda root: [shutil.rmtree(root / kind) for kind in ("cat", "dog")], "no class folders"),
    "a text in its place": (lambda root: (shutil.rmtree(root), root.write_text("x")), "there is no folder"),
}
if os.geteuid() != 0:  # root may read everything
    PICTURES["a file without permission"] = (lambda root: (root / FIRST).chmod(0), "Permission denied")


# --- annotations, archives and pickles


def annotated(root: Path) -> Path:
    """Write a small CIFAR-10H: four pictures a class."""
    lines = [",".join(["path", *soft_labels.CIFAR10_CLASSES])]
    for label, kind in enumerate(soft_labels.CIFAR10_CLASSES):
        (root / "test" / kind).mkdir(parents=True)
        for number in range(4):
            path = f"test/{kind}/{number}.jpg"
            Image.new("RGB", (32, 32), (20 * label, 60 * number, 9)).save(root / path)
            lines.append(",".join([path, *("50" if other == label else "1" for other in range(10))]))
    (root / soft_labels.ANNOTATIONS).write_text("\n".join(lines))
    return root


def edit(old: str, new: str) -> Damage:
    """Replace a text in the table of annotations."""
    return lambda root: (file := root / soft_labels.ANNOTATIONS).write_text(file.read_text().replace(old, new, 1))


PERSON = Path("test", "cat", "0.jpg")
ANNOTATED: dict[str, tuple[Damage, str]] = {
    "a bomb": (put(PERSON, png_of(10_000)), "decompression bomb"),
    "another size": (lambda root: Image.new("RGB", (33, 32)).save(root / PERSON), "not 32 x 32"),
    "a link out": (link_out(PERSON), "is a link out of"),
    "a pipe": (lambda root: ((root / PERSON).unlink(), os.mkfifo(root / PERSON)), "which is not there"),
    "a path out of the folder": (edit(str(PERSON), "../../cat/0.jpg"), "which is not there"),
    "a field without end": (edit("path", "p" * 200_000), "is no table"),
    "a count of 5000 digits": (edit("50,", "9" * 5000 + ","), "not ten counts"),
    "a count below 0": (edit("50,", "-50,"), "not ten counts"),
}


# What is damaged: how to write it, its target and keywords, its classes, and the damages with their messages.
DATA: dict[str, tuple[Callable[[Path], Path], dict[str, Any], int, dict[str, tuple[Damage, str]]]] = {
    "idx": (idx_folder, {"_target_": "pipeline.data.loaders.mnist", "val": 20}, 10, IDX),
    "pictures": (picture_folder, {"_target_": "pipeline.data.image_folder.image_folder", "size": 8}, 2, PICTURES),
    "cifar10h": (annotated, {"_target_": "pipeline.data.soft_labels.cifar10h", "val": 10, "test": 10}, 10, ANNOTATED),
}


@pytest.mark.parametrize(("data", "damage"), [(data, damage) for data in DATA for damage in DATA[data][-1]])
def test_damaged_data_are_one_line(data: str, damage: str, tmp_path: Path) -> None:
    write, declared, num_classes, damages = DATA[data]
    declared = declared | {"root": str(write(tmp_path / data))}
    if data == "pictures":
        declared |= {"cache": str(tmp_path / "c")}
    assert load_dataset(declared).num_classes == num_classes
    spoil, text = damages[damage]
    spoil(tmp_path / data)
    assert text in usage_error(lambda: load_dataset(declared))


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader reads at most one byte more than the header announces."""
    root = idx_folder(tmp_path / "idx")
    put(IMAGES, idx(60, 3, 2, more=2**24))(root)
    sizes: list[int] = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: sizes.append(size) or read(self, size))
    assert "other than the 360 bytes" in usage_error(lambda: loaders.mnist(root=str(root)))
    assert 0 < max(sizes) <= 361
    assert min(sizes) > 0


def archive(path: Path, *members: tuple[str, bytes | str]) -> Path:
    """Write a .tar.gz of files (bytes) and symbolic links (text)."""
    with tarfile.open(path, "w:gz", compresslevel=1) as packed:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                packed.addfile(member)
            else:
                member.size = len(content)
                packed.addfile(member, io.BytesIO(content))
    return path


def test_a_hostile_archive_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member outside of the folder, a link out, a cut file and a bomb are refused; nothing is written."""

    def check(path: Path, text: str) -> None:
        assert text in usage_error(lambda: soft_labels.cifar10h(str(path)))

    table = ",".join(["path", *soft_labels.CIFAR10_CLASSES]).encode() + b"\ntest/cat/0.jpg,1,0,0,0,0,0,0,0,0,0"
    climbing = archive(tmp_path / "climbing.tar.gz", ("../../x.jpg", b"x"), (soft_labels.ANNOTATIONS, table))
    linking = archive(
        tmp_path / "linking.tar.gz", ("test/cat/0.jpg", "/etc/hostname"), (soft_labels.ANNOTATIONS, table)
    )
    bomb = archive(tmp_path / "bomb.tar.gz", ("zeros", bytes(2**20)))
    (tmp_path / "cut.tar.gz").write_bytes(climbing.read_bytes()[:-40])
    before = sorted(tmp_path.rglob("*"))
    check(climbing, "names test/cat/0.jpg, which is not there")
    check(linking, "names test/cat/0.jpg, which is not there")
    check(tmp_path / "cut.tar.gz", "unreadable or no .tar.gz")
    monkeypatch.setattr(soft_labels, "UNPACKED_BYTES", 2**16)
    check(bomb, "unpacks to more than 65536 bytes")
    assert sorted(tmp_path.rglob("*")) == before


def test_another_cifar_10_is_not_unpickled(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(PAYLOAD)
    assert "holds no sound cifar-10-batches-py" in usage_error(lambda: loaders.cifar10(root=str(tmp_path)))


@pytest.mark.parametrize("loader", [loaders.mnist, loaders.cifar10])
def test_a_wrong_download_is_refused_and_removed(
    loader: Callable[[], Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(url: str, filename: str | Path, *_: object, **__: object) -> None:
        Path(filename).write_bytes(PAYLOAD)

    monkeypatch.setenv("LIKELIHOOD_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetched)
    assert "corrupted" in usage_error(loader)
    assert list(tmp_path.iterdir()) == []


# --- data of a user's own


def make(**changes: Any) -> Dataset:
    images = np.zeros((12, 1, 2, 2), np.float32)
    given = {"labels": [0, 1] * 6, "splits": {"train": range(8), "val": [8, 9], "test": [10, 11]}, "classes": "ab"}
    return make_dataset("mine", **{"images": images, **given, **changes})


def pickled() -> Dataset:
    np.save("pickled.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    return make(images=np.load("pickled.npy"))


NAN = np.where(np.arange(48).reshape(12, 1, 2, 2) == 15, np.float32("nan"), np.float32(0))  # in image 3
OWN: dict[str, tuple[Callable[[], Dataset], str]] = {
    "NaN": (lambda: make(images=NAN), "image 3 has NaN or infinite pixels"),
    "labels out of range": (lambda: make(labels=[0, 2] * 6), "labels hold 2, out of range"),
    "labels of floats": (lambda: make(labels=[0.0, 1.0] * 6), "not integers"),
    "objects": (lambda: make(images=np.full((12, 1, 2, 2), "x", dtype=object)), "TypeError"),
    "whole numbers": (lambda: make(images=np.zeros((12, 1, 2, 2), np.int64)), "not uint8 or floats"),
    "terabytes": (lambda: make(images=np.zeros((2**20, 1, 2**12, 2**12))), "does not fit into memory"),
    "a pickle": (pickled, "allow_pickle=False"),
}


def own(kind: str) -> Dataset:
    return OWN[kind][0]()


@pytest.mark.parametrize("kind", OWN)
def test_bad_data_of_a_user_are_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert OWN[kind][1] in usage_error(lambda: load_dataset({"_target_": f"{__name__}.own", "kind": kind}))


def test_refused_data_leave_neither_folder_nor_run(tmp_path: Path) -> None:
    root = idx_folder(tmp_path / "idx")
    put(LABELS, idx(60, value=77))(root)
    store = f"sqlite:///{tmp_path}/runs.db"
    config = compose("dataset=mnist", f"dataset.root={root}", "tracking=mlflow", f"tracking.uri={store}", base=QUICK)
    assert run_and_report(lambda: run(config, tmp_path / "trial", "the command")) == ExitCode.USAGE
    assert [path.name for path in tmp_path.iterdir()] == ["idx"]


# --- cells

REQUEST = partial(compose, "seed=[0,1]", base=QUICK)
VICTIM = Replica("nll", 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damaged") / "trial"
    assert run(REQUEST(), path, "the command") == ExitCode.HOLDS
    return path


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "trial"))


def remove_seal(cell: Path) -> None:
    text = (cell / "config.yaml").read_bytes()
    (cell / "config.yaml").write_bytes(text[: text.index(SEAL)])


def edit_history(cell: Path) -> None:
    frame = pd.read_parquet(cell / "history.parquet")
    frame.loc[frame["metric"] == "test/nll", "value"] = 0.001
    frame.to_parquet(cell / "history.parquet", index=False)


CELLS: dict[str, tuple[Damage, str]] = {
    "no config": (remove("config.yaml"), "config.yaml is missing"),
    "half a config": (cut("config.yaml"), "config.yaml is not as it was written"),
    "a bit of the config": (flip_bit("config.yaml"), "config.yaml is not as it was written"),
    "a config without its seal": (remove_seal, "config.yaml bears no seal: an older version wrote it"),
    "no YAML": (put("config.yaml", b"a: [\x00"), "config.yaml is not as it was written"),
    "an empty config": (put("config.yaml", b""), "config.yaml is not as it was written"),
    "no history": (remove("history.parquet"), "history.parquet is missing"),
    "an edited history": (edit_history, "history.parquet is not as it was written"),
    "half a history": (cut("history.parquet"), "history.parquet is not as it was written"),
    "no state": (remove("state.pt"), "state.pt is missing"),
    "half a state": (cut("state.pt"), "state.pt is not as it was written"),
    "a bit of the state": (flip_bit("state.pt"), "state.pt is not as it was written"),
    "code as state": (put("state.pt", PAYLOAD), "state.pt is not as it was written"),
    "a folder as state": (replace_by_folder("state.pt"), "state.pt cannot be read (Is a directory)"),
    "an empty folder": (lambda cell: (shutil.rmtree(cell), cell.mkdir()), "config.yaml is missing"),
    "a file in its place": (
        lambda cell: (shutil.rmtree(cell), cell.write_text("x")),
        "config.yaml cannot be read (Not a directory)",
    ),
    "another's cell": (
        lambda cell: (shutil.rmtree(cell), shutil.copytree(cell.parents[1] / "ce" / "s1", cell)),
        "it is a copy of ce/s1",
    ),
}


@pytest.mark.parametrize("damage", CELLS)
def test_a_damaged_cell_is_not_read_and_moves_aside(damage: str, copied: Path) -> None:
    folder, (spoil, cause) = TrialFolder(copied), CELLS[damage]
    spoil(folder.cell_path(VICTIM))
    assert folder.read(VICTIM) is None
    assert folder.damaged == {VICTIM: cause}
    assert len(folder.cells()) == 3
    assert folder.find_missing({VICTIM: "any"}) == ([VICTIM], {VICTIM: cause})
    assert not os.path.lexists(folder.cell_path(VICTIM))
    assert os.path.lexists(copied / "stale" / "nll" / "s1-damaged")


REDUCED = ("half a state", "an edited history", "another's cell")


@pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=[] if name in REDUCED else pytest.mark.faults) for name in CELLS]
)
def test_a_damaged_cell_is_reported_and_trained_again(
    damage: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report does not count the cell and says why; the same command trains it again, to the same bits."""
    spoil, cause = CELLS[damage]
    before = TrialFolder(copied).read(VICTIM)
    spoil(TrialFolder(copied).cell_path(VICTIM))
    report([str(copied)])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not counted: ")]
    assert f"nll/s1 ({cause})" in line
    (entry,) = verdict(copied)["comparisons"]
    assert entry["outcome"] == "inconclusive"
    assert entry["failures"] == [{"seed": 1, "step": None, "cause": f"damaged, {cause}; train it again"}]
    assert run(REQUEST(), copied, "the command") == ExitCode.HOLDS
    assert f"({cause}), to be trained again: nll/s1" in capsys.readouterr().out
    again = TrialFolder(copied).read(VICTIM)
    assert before is not None
    assert again is not None
    assert again.record.weights_sha256 == before.record.weights_sha256


def test_code_in_a_cell_that_was_sealed_again_does_not_run(copied: Path) -> None:
    """Whoever can write the folder can also seal it; no pickle with code is loaded even then."""
    path = TrialFolder(copied).cell_path(VICTIM)
    text = (path / "config.yaml").read_bytes().rpartition(SEAL)[0]
    old = hashlib.sha256((path / "state.pt").read_bytes()).hexdigest()
    torch.save({"weights": Payload()}, path / "state.pt")
    text = text.replace(old.encode(), hashlib.sha256((path / "state.pt").read_bytes()).hexdigest().encode())
    (path / "config.yaml").write_bytes(text + SEAL + hashlib.sha256(text).hexdigest().encode())
    cell = TrialFolder(copied).read(VICTIM)
    assert cell is not None
    assert "would run code" in usage_error(lambda: cell.weights)


CODE = f"request: !!python/object/apply:{__name__}.strangers_code []\n".encode()
FOLDERS: dict[str, tuple[Damage, str]] = {  # the trial's command refuses the folder
    "a torn trial.yaml": (cut("trial.yaml"), "holds a trial with another"),
    "an empty trial.yaml": (put("trial.yaml", b""), "trial.yaml is damaged"),
    "binary in trial.yaml": (put("trial.yaml", bytes(range(256))), "trial.yaml is dam"),
    "no trial.yaml": (remove("trial.yaml"), "no trial.yaml"),
    "no looks": (put("looks.jsonl", b"{"), "looks.jsonl is damaged"),
    "other looks": (put("looks.jsonl", b'{"alpha": 1}\n'), "looks.jsonl is damaged"),
}
REQUESTS: dict[str, tuple[Damage, str]] = {  # the report refuses the folder
    "a torn request": (put("request.yaml", b"request: {losses: [ce"), "request.yaml"),
    "an empty request": (put("request.yaml", b""), "request.yaml"),
    "a list as request": (put("request.yaml", b"- request\n"), "request.yaml"),
    "half a request": (put("request.yaml", b"request: {losses: [ce, nll]}\nfacts: {}\n"), "request.yaml"),
    "code as request": (put("request.yaml", CODE), "request.yaml"),
    "no request": (remove("request.yaml"), "request.yaml"),
}


@pytest.mark.parametrize("damage", FOLDERS | REQUESTS)
def test_a_folder_damaged_beside_its_cells_is_one_line(
    damage: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, text = (FOLDERS | REQUESTS)[damage]
    spoil(copied)
    command = partial(run, REQUEST(), copied, "the command") if damage in FOLDERS else partial(report, [str(copied)])
    assert run_and_report(command) == ExitCode.USAGE
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert text in errors


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 1}', '{"schema": 1, "losses": 3, "reference": "ce"}'])
def test_a_damaged_audit_counts_as_not_run(content: str, copied: Path) -> None:
    (copied / "audit.json").write_text(content)
    (copied / "tile").write_text("none")
    assert report([str(copied)]) == ExitCode.HOLDS
    (entry,) = verdict(copied)["comparisons"]
    assert entry["objective"] == "not_run"


def test_a_folder_name_is_text_not_markup(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / "a[" / "b] [red] :cat:"
    shutil.copytree(trained, odd)
    assert run_and_report(lambda: report([str(odd)])) == ExitCode.HOLDS
    assert f"report: {odd / 'report.html'}" in capsys.readouterr().out
