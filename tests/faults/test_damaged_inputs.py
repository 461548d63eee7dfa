"""Damaged data and damaged cells: a clear line each, nothing of it counted, and no code of a stranger's run."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from likelihood_lab.errors import UsageError
from pipeline.build import load_dataset
from pipeline.config import schema as conf
from pipeline.config.validate import validate
from pipeline.data import loaders, soft_labels
from pipeline.data.dataset import Dataset, make_dataset
from pipeline.entry import ExitCode, run_and_report
from pipeline.replica import Replica
from pipeline.report import report
from pipeline.storage.cells import SEAL, TrialFolder
from pipeline.trial.run import run

Damage = Callable[[Path], object]
ran: list[str] = []  # what code of a stranger has left


def strangers_code() -> None:
    ran.append("it ran")


class Payload:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return strangers_code, ()


PAYLOAD = pickle.dumps(Payload())


@pytest.fixture(autouse=True)
def no_code_runs() -> Iterator[None]:
    ran.clear()
    yield
    assert ran == []


def test_the_payload_would_be_noticed() -> None:
    pickle.loads(PAYLOAD)  # noqa: S301 - that it runs is the point
    assert ran
    ran.clear()


def refusal(load: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as refused:
        load()
    line = str(refused.value)
    assert "\n" not in line
    assert len(line) < 600
    return line


# --- IDX files


def idx(path: Path, *shape: int, kind: int = 8, value: int = 1, claimed: tuple[int, ...] = (), more: int = 0) -> None:
    """An IDX file of so many equal bytes, but for labels, which count from 0 to 9 in turn."""
    size = int(np.prod(shape)) + more
    content = bytes(i % 10 for i in range(size)) if len(shape) == 1 and value == 1 else bytes([value]) * size
    header = struct.pack(f">HBB{len(shape)}I", 0, kind, len(shape), *(claimed or shape))
    path.write_bytes(gzip.compress(header + content, 1))


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def idx_folder(root: Path) -> Path:
    root.mkdir()
    for part, count in (("train", 60), ("t10k", 20)):
        idx(root / f"{part}-images-idx3-ubyte.gz", count, 3, 2)
        idx(root / f"{part}-labels-idx1-ubyte.gz", count)
    return root


def linked_out(path: Path) -> None:
    """The file lies outside of the folder, and a link leads to it."""
    outside = Path(tempfile.mkdtemp()) / path.name
    path.rename(outside)
    path.symlink_to(outside)


def linked_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


IDX: dict[str, tuple[Damage, str]] = {
    "half a gzip": (lambda root: (root / IMAGES).write_bytes((root / IMAGES).read_bytes()[:20]), "truncated"),
    "no byte": (lambda root: (root / IMAGES).write_bytes(b""), "truncated"),
    "a text": (lambda root: (root / IMAGES).write_text("<html>404</html>"), "not an IDX file"),
    "a byte short": (lambda root: idx(root / IMAGES, 60, 3, 2, more=-1), "other than the 360 bytes"),
    "a byte too long": (lambda root: idx(root / IMAGES, 60, 3, 2, more=1), "other than the 360 bytes"),
    "a gzip bomb": (lambda root: idx(root / IMAGES, 60, 3, 2, more=2**26), "other than the 360 bytes"),
    "a claim of terabytes": (lambda root: idx(root / IMAGES, 60, 3, 2, claimed=(2**32 - 1, 28, 28)), "are the most"),
    "the magic of labels": (lambda root: idx(root / IMAGES, 60), "wrong header"),
    "floats": (lambda root: idx(root / IMAGES, 60, 3, 2, kind=13), "wrong header"),
    "labels out of range": (lambda root: idx(root / LABELS, 60, value=10), "labels hold 10, out of range"),
    "one class": (lambda root: idx(root / LABELS, 60, value=0), "only one class"),
    "too few labels": (lambda root: idx(root / LABELS, 59), "60 images but 59 labels"),
    "nothing in it": (lambda root: idx(root / IMAGES, 0, 3, 2), "0 images"),
    "two sizes": (lambda root: idx(root / "t10k-images-idx3-ubyte.gz", 20, 4, 2), "train has images of [3, 2] and"),
    "a missing file": (lambda root: (root / LABELS).unlink(), "has no train-labels-idx1-ubyte"),
    "a folder as a file": (
        lambda root: ((root / LABELS).unlink(), (root / LABELS).mkdir()),
        "has no train-labels-idx1-ubyte",
    ),
    "a link out": (lambda root: linked_out(root / LABELS), "is a link out of"),
}


@pytest.mark.parametrize("damage", IDX)
def test_a_damaged_idx_file_is_one_line(damage: str, tmp_path: Path) -> None:
    root = idx_folder(tmp_path / "idx")
    declared = {"_target_": "pipeline.data.loaders.mnist", "root": str(root), "val": 20}
    assert load_dataset(declared).num_classes == 10
    spoil, said = IDX[damage]
    spoil(root)
    assert said in refusal(lambda: load_dataset(declared))


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read of a file is a byte more than its header says."""
    root = idx_folder(tmp_path / "idx")
    idx(root / IMAGES, 60, 3, 2, more=2**24)
    asked: list[int] = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: asked.append(size) or read(self, size))
    refusal(lambda: loaders.mnist(root=str(root)))
    assert 0 < max(asked) <= 361
    assert min(asked) > 0


# --- pictures


def png_of(side: int, bits: int = 1) -> bytes:
    """A PNG that claims side x side pixels and has almost no bytes."""

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
    "a text": (lambda root: (root / FIRST).write_text("no picture"), "unreadable picture"),
    "no byte": (lambda root: (root / FIRST).write_bytes(b""), "unreadable picture"),
    "cut short": (lambda root: (root / FIRST).write_bytes((root / FIRST).read_bytes()[:45]), "unreadable picture"),
    "a bomb": (lambda root: (root / FIRST).write_bytes(png_of(100_000)), "decompression bomb"),
    "a bomb of which Pillow only warns": (
        lambda root: (root / FIRST).write_bytes(png_of(10_000)),
        "decompression bomb",
    ),
    "sixteen bits": (lambda root: Image.new("I;16", (9, 9)).save(root / FIRST), "more than 8 bits"),
    "a link out": (lambda root: linked_out(root / FIRST), "is a link out of"),
    "a class that is a link out": (lambda root: (root / "etc").symlink_to("/etc"), "is a link out of"),
    "a link to itself": (lambda root: linked_to_itself(root / FIRST), "leads nowhere"),
    "an archive among them": (lambda root: (root / "cat" / "x.zip").write_bytes(b"PK"), "is not a picture"),
    "an empty class": (lambda root: (root / "emu").mkdir(), "without pictures"),
    "one class": (lambda root: shutil.rmtree(root / "dog"), "only 1 class"),
    "an empty folder": (lambda root: [shutil.rmtree(root / kind) for kind in ("cat", "dog")], "no class folders"),
    "a text in its place": (lambda root: (shutil.rmtree(root), root.write_text("x")), "there is no folder"),
}


@pytest.mark.parametrize("damage", PICTURES)
def test_a_damaged_folder_of_pictures_is_one_line(damage: str, tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "pictures")
    declared = {
        "_target_": "pipeline.data.image_folder.image_folder",
        "root": str(root),
        "size": 8,
        "cache": str(tmp_path / "c"),
    }
    assert load_dataset(declared).num_classes == 2
    spoil, said = PICTURES[damage]
    spoil(root)
    assert said in refusal(lambda: load_dataset(declared))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_picture_that_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "pictures")
    (root / FIRST).chmod(0)
    declared = {
        "_target_": "pipeline.data.image_folder.image_folder",
        "root": str(root),
        "size": 8,
        "cache": str(tmp_path / "c"),
    }
    assert "Permission denied" in refusal(lambda: load_dataset(declared))


# --- archives and pickles


def annotated(root: Path) -> Path:
    """CIFAR-10H in the small: four pictures a class."""
    lines = [",".join(["path", *soft_labels.CIFAR10_CLASSES])]
    for label, kind in enumerate(soft_labels.CIFAR10_CLASSES):
        (root / "test" / kind).mkdir(parents=True)
        for number in range(4):
            path = f"test/{kind}/{number}.jpg"
            Image.new("RGB", (32, 32), (20 * label, 60 * number, 9)).save(root / path)
            lines.append(",".join([path, *("50" if other == label else "1" for other in range(10))]))
    (root / soft_labels.ANNOTATIONS).write_text("\n".join(lines))
    return root


def table(root: Path, old: str, new: str) -> None:
    file = root / soft_labels.ANNOTATIONS
    file.write_text(file.read_text().replace(old, new, 1))


PERSON = Path("test", "cat", "0.jpg")
ANNOTATED: dict[str, tuple[Damage, str]] = {
    "a bomb": (lambda root: (root / PERSON).write_bytes(png_of(10_000)), "decompression bomb"),
    "another size": (lambda root: Image.new("RGB", (33, 32)).save(root / PERSON), "not 32 x 32"),
    "a link out": (lambda root: linked_out(root / PERSON), "is a link out of"),
    "a pipe": (lambda root: ((root / PERSON).unlink(), os.mkfifo(root / PERSON)), "which is not there"),
    "a path out of the folder": (lambda root: table(root, str(PERSON), "../../cat/0.jpg"), "which is not there"),
    "a field without end": (lambda root: table(root, "path", "p" * 200_000), "is no table"),
    "a count of 5000 digits": (lambda root: table(root, "50,", "9" * 5000 + ","), "not ten counts"),
    "a count below 0": (lambda root: table(root, "50,", "-50,"), "not ten counts"),
}


@pytest.mark.parametrize("damage", ANNOTATED)
def test_damaged_annotations_are_one_line(damage: str, tmp_path: Path) -> None:
    root = annotated(tmp_path / "cifar10h")
    spoil, said = ANNOTATED[damage]
    spoil(root)
    declared = {"_target_": "pipeline.data.soft_labels.cifar10h", "root": str(root), "val": 10, "test": 10}
    assert said in refusal(lambda: load_dataset(declared))[:600]


def archive(path: Path, *members: tuple[str, bytes | str]) -> Path:
    """A .tar.gz of files, and of links where a member's content is the text of one."""
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


def test_an_archive_that_climbs_out_writes_nothing_and_one_that_swells_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(path: Path) -> str:
        return refusal(lambda: soft_labels.cifar10h(str(path)))

    header = ",".join(["path", *soft_labels.CIFAR10_CLASSES]).encode()
    row = b"\ntest/cat/0.jpg,1,0,0,0,0,0,0,0,0,0"
    climbing = archive(tmp_path / "climbing.tar.gz", ("../../x.jpg", b"x"), (soft_labels.ANNOTATIONS, header + row))
    linking = archive(
        tmp_path / "linking.tar.gz", ("test/cat/0.jpg", "/etc/hostname"), (soft_labels.ANNOTATIONS, header + row)
    )
    before = sorted(tmp_path.rglob("*"))
    assert "names test/cat/0.jpg, which is not there" in line(climbing)
    assert "names test/cat/0.jpg, which is not there" in line(linking)
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(climbing.read_bytes()[:-40])
    assert "unreadable or no .tar.gz" in line(cut)
    monkeypatch.setattr(soft_labels, "UNPACKED_BYTES", 2**16)
    swelling = archive(tmp_path / "swelling.tar.gz", ("zeros", bytes(2**20)))
    assert "unpacks to more than 65536 bytes" in line(swelling)
    assert sorted({*tmp_path.rglob("*")} - {cut, swelling}) == before


def test_a_cifar_10_that_is_not_the_published_one_is_not_unpickled(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(PAYLOAD)
    assert "holds no sound cifar-10-batches-py" in refusal(lambda: loaders.cifar10(root=str(tmp_path)))


@pytest.mark.parametrize("loader", [loaders.mnist, loaders.cifar10])
def test_a_download_of_other_bytes_is_refused_and_not_kept(
    loader: Callable[[], Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(url: str, filename: str | Path, *_: object, **__: object) -> None:
        Path(filename).write_bytes(PAYLOAD)

    monkeypatch.setenv("LIKELIHOOD_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetched)
    assert "corrupted" in refusal(loader)
    assert list(tmp_path.iterdir()) == []


# --- data of a user's own


def spoilt(**changes: Any) -> Dataset:
    images = np.zeros((12, 1, 2, 2), np.float32)
    given = {"labels": [0, 1] * 6, "splits": {"train": range(8), "val": [8, 9], "test": [10, 11]}, "classes": "ab"}
    return make_dataset("mine", **{"images": images, **given, **changes})


def nan_pixels() -> Dataset:
    images = np.zeros((12, 1, 2, 2), np.float32)
    images[3, 0, 1, 1] = np.nan
    return spoilt(images=images)


def labels_out_of_range() -> Dataset:
    return spoilt(labels=[0, 2] * 6)


def labels_of_floats() -> Dataset:
    return spoilt(labels=[0.0, 1.0] * 6)


def pixels_of_objects() -> Dataset:
    return spoilt(images=np.full((12, 1, 2, 2), "x", dtype=object))


def pixels_of_whole_numbers() -> Dataset:
    return spoilt(images=np.zeros((12, 1, 2, 2), np.int64))


def more_than_there_is() -> Dataset:
    return spoilt(images=np.zeros((2**20, 1, 2**12, 2**12)))


def pickled() -> Dataset:
    np.save("pickled.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    return spoilt(images=np.load("pickled.npy"))


OWN = {
    nan_pixels: "image 3 has NaN or infinite pixels",
    labels_out_of_range: "labels hold 2, out of range",
    labels_of_floats: "not integers",
    pixels_of_objects: "TypeError",
    pixels_of_whole_numbers: "not uint8 or floats",
    more_than_there_is: "does not fit into memory",
    pickled: "allow_pickle=False",
}


@pytest.mark.parametrize("loader", OWN, ids=lambda loader: loader.__name__)
def test_a_users_own_bad_data_are_one_line(
    loader: Callable[[], Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert OWN[loader] in refusal(lambda: load_dataset({"_target_": f"{__name__}.{loader.__name__}"}))


# --- cells


def request(*overrides: str) -> dict[str, Any]:
    quick = ["loss=[ce,nll]", "seed=[0,1]", "model=softmax_regression", "trainer=cpu", "epochs=1", "audit=false"]
    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        cfg = compose("train", overrides=[*quick, "tracking=none", "controls=none", *overrides])
    validate(cfg)
    return conf.plain(cfg)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damaged") / "trial"
    assert run(request(), path, "the command") == ExitCode.HOLDS
    return path


def bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_its_seal(cell: Path) -> None:
    text = (cell / "config.yaml").read_bytes()
    (cell / "config.yaml").write_bytes(text[: text.index(SEAL)])


CELLS: dict[str, tuple[Damage, str]] = {
    "no config": (lambda cell: (cell / "config.yaml").unlink(), "config.yaml is missing"),
    "half a config": (lambda cell: halved(cell / "config.yaml"), "config.yaml is not as it was written"),
    "a bit of the config": (lambda cell: bit_flipped(cell / "config.yaml"), "config.yaml is not as it was written"),
    "a config without its seal": (without_its_seal, "config.yaml bears no seal: an older version wrote it"),
    "no YAML": (lambda cell: (cell / "config.yaml").write_text("a: [\x00"), "config.yaml is not as it was written"),
    "an empty config": (lambda cell: (cell / "config.yaml").write_bytes(b""), "config.yaml is not as it was written"),
    "no history": (lambda cell: (cell / "history.parquet").unlink(), "history.parquet is missing"),
    "half a history": (lambda cell: halved(cell / "history.parquet"), "history.parquet is not as it was written"),
    "no state": (lambda cell: (cell / "state.pt").unlink(), "state.pt is missing"),
    "half a state": (lambda cell: halved(cell / "state.pt"), "state.pt is not as it was written"),
    "a bit of the state": (lambda cell: bit_flipped(cell / "state.pt"), "state.pt is not as it was written"),
    "code as state": (lambda cell: (cell / "state.pt").write_bytes(PAYLOAD), "state.pt is not as it was written"),
    "a folder as state": (
        lambda cell: ((cell / "state.pt").unlink(), (cell / "state.pt").mkdir()),
        "state.pt cannot be read (Is a directory)",
    ),
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
VICTIM = Replica("nll", 1)


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "trial"))


@pytest.mark.parametrize("damage", CELLS)
def test_a_damaged_cell_is_never_read_and_moves_aside(damage: str, copied: Path) -> None:
    folder, (spoil, what) = TrialFolder(copied), CELLS[damage]
    spoil(folder.cell_path(VICTIM))
    assert folder.read(VICTIM) is None
    assert folder.damaged == {VICTIM: what}
    assert len(folder.cells()) == 3
    assert folder.find_missing({VICTIM: "any"}) == ([VICTIM], {VICTIM: what})
    assert not os.path.lexists(folder.cell_path(VICTIM))
    assert os.path.lexists(copied / "stale" / "nll" / "s1-damaged")


def retold(folder: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The report counts nothing of it and says so; the same command trains it again, to the same bits."""
    spoil, what = CELLS[damage]
    cells = TrialFolder(folder)
    before = cells.read(VICTIM)
    assert before is not None
    spoil(cells.cell_path(VICTIM))
    report([str(folder)])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not counted: ")]
    assert f"nll/s1 ({what})" in line
    (found,) = json.loads((folder / "verdict.json").read_text())["comparisons"]
    assert found["outcome"] == "inconclusive"
    assert found["failures"] == [{"seed": 1, "step": None, "cause": f"damaged, {what}; train it again"}]
    assert run(request(), folder, "the command") == ExitCode.HOLDS
    assert f"({what}), to be trained again: nll/s1" in capsys.readouterr().out
    again = TrialFolder(folder).read(VICTIM)
    assert again is not None
    assert again.record.weights_sha256 == before.record.weights_sha256


@pytest.mark.parametrize("damage", ["half a state"])
def test_a_damaged_cell_is_said_by_the_report_and_trained_again(
    damage: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    retold(copied, damage, capsys)


@pytest.mark.faults
@pytest.mark.parametrize("damage", CELLS)
def test_every_damaged_cell_is_said_by_the_report_and_trained_again(
    damage: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    retold(copied, damage, capsys)


def test_a_cell_that_was_sealed_again_around_code_does_not_run_it(copied: Path) -> None:
    """Whoever can write the whole folder can seal it, too: what holds then is that no pickle of code is loaded."""
    import hashlib

    path = TrialFolder(copied).cell_path(VICTIM)
    text = (path / "config.yaml").read_bytes().rpartition(SEAL)[0]
    old = hashlib.sha256((path / "state.pt").read_bytes()).hexdigest()
    torch.save({"weights": Payload()}, path / "state.pt")
    text = text.replace(old.encode(), hashlib.sha256((path / "state.pt").read_bytes()).hexdigest().encode())
    (path / "config.yaml").write_bytes(text + SEAL + hashlib.sha256(text).hexdigest().encode())
    cell = TrialFolder(copied).read(VICTIM)
    assert cell is not None
    assert "would run code" in refusal(lambda: cell.weights)


FOLDERS: dict[str, tuple[Damage, str]] = {
    "a torn trial.yaml": (lambda folder: halved(folder / "trial.yaml"), "holds a trial with another"),
    "an empty trial.yaml": (lambda folder: (folder / "trial.yaml").write_text(""), "trial.yaml is damaged"),
    "binary in trial.yaml": (
        lambda folder: (folder / "trial.yaml").write_bytes(bytes(range(256))),
        "trial.yaml is dam",
    ),
    "no trial.yaml": (lambda folder: (folder / "trial.yaml").unlink(), "no trial.yaml"),
    "no looks": (lambda folder: (folder / "looks.jsonl").write_text("{"), "looks.jsonl is damaged"),
    "other looks": (lambda folder: (folder / "looks.jsonl").write_text('{"alpha": 1}\n'), "looks.jsonl is damaged"),
}


@pytest.mark.parametrize("damage", FOLDERS)
def test_a_folder_that_is_damaged_beside_its_cells_is_one_line(
    damage: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = FOLDERS[damage]
    spoil(copied)
    assert run_and_report(lambda: run(request(), copied, "the command")) == ExitCode.USAGE
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert said in told


REQUESTS: dict[str, bytes | None] = {
    "torn": b"request: {losses: [ce",
    "empty": b"",
    "a list": b"- request\n",
    "half": b"request: {losses: [ce, nll]}\nfacts: {}\n",
    "code": b"request: !!python/object/apply:tests.faults.test_damaged_inputs.strangers_code []\n",
    "missing": None,
}


@pytest.mark.parametrize("content", REQUESTS)
def test_a_damaged_request_is_one_line_of_the_report(
    content: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = REQUESTS[content]
    (copied / "request.yaml").unlink() if damaged is None else (copied / "request.yaml").write_bytes(damaged)
    assert run_and_report(lambda: report([str(copied)])) == ExitCode.USAGE
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "request.yaml" in told


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 1}', '{"schema": 1, "losses": 3, "reference": "ce"}'])
def test_a_damaged_audit_says_nothing(content: str, copied: Path) -> None:
    (copied / "audit.json").write_text(content)
    (copied / "tile").write_text("none")
    assert report([str(copied)]) == ExitCode.HOLDS
    (found,) = json.loads((copied / "verdict.json").read_text())["comparisons"]
    assert found["objective"] == "not_run"


def test_a_folder_s_name_is_text_and_no_markup(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "a[" / "b] [red] :cat:"
    shutil.copytree(trained, odd)
    assert run_and_report(lambda: report([str(odd)])) == ExitCode.HOLDS
    assert f"report: {odd / 'report.html'}" in capsys.readouterr().out


def test_data_that_are_refused_leave_neither_a_folder_nor_a_run(tmp_path: Path) -> None:
    root = idx_folder(tmp_path / "idx")
    idx(root / LABELS, 60, value=77)
    store = f"sqlite:///{tmp_path}/runs.db"
    config = request("dataset=mnist", f"dataset.root={root}", "tracking=mlflow", f"tracking.uri={store}")
    assert run_and_report(lambda: run(config, tmp_path / "trial", "the command")) == ExitCode.USAGE
    assert [path.name for path in tmp_path.iterdir()] == ["idx"]
