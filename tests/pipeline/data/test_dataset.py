from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from pipeline.data import dataset as datasets
from pipeline.data import image_folder as pictures
from pipeline.data import loaders
from pipeline.data.dataset import Dataset, make_dataset
from pipeline.data.image_folder import image_folder
from pipeline.data.loaders import digits, fashion_mnist, split_off
from tests.laboratory import refused

TINY_SPLITS = {"train": range(8), "val": [8, 9], "test": [10, 11]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIKELIHOOD_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny(**changes: Any) -> Dataset:
    """Twelve 3-channel 4 x 5 examples of two classes, with `changes` to what `make_dataset` is given."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3, 4, 5), dtype=np.uint8)
    given = {"images": pixels, "labels": [0, 1] * 6, "splits": TINY_SPLITS, "classes": ["a", "b"]}
    return make_dataset("tiny", **{**given, **changes})


def picture(path: Path, size: tuple[int, int] = (20, 14), mode: str = "RGB", **save: Any) -> Path:
    """A picture whose colour depends on its class folder, name and size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    level = (60 * len(path.parent.name) + sum(path.name.encode()) + size[0]) % 256
    Image.new("RGB", size, (level, 255 - level, 40)).convert(mode).save(path, **save)
    return path


def folder_of(root: Path, kinds: tuple[str, ...] = ("cat", "horse"), count: int = 5) -> Path:
    for kind in kinds:
        for number in range(count):
            picture(root / kind / f"{number}.png", size=(16 + number, 20 - number % 9))
    return root


def fresh(path: Path) -> Path:
    """`path` as an empty file in a folder that may not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


# splits


def test_digits_splits_are_disjoint_covering_and_stratified() -> None:
    data = digits()
    sizes = {part: len(indices) for part, indices in data.splits.items()}
    assert sizes == {"train": 1137, "val": 300, "test": 360}
    assert torch.equal(torch.cat(list(data.splits.values())).sort().values, torch.arange(1797))
    share = torch.bincount(data.labels) / 1797
    for indices in data.splits.values():
        counts = torch.bincount(data.labels[indices], minlength=10)
        assert ((counts - share * len(indices)).abs() < 1.5).all()


def test_split_depends_on_the_data_seed_alone() -> None:
    assert digits(data_seed=3).digest == digits(data_seed=3).digest
    refused(lambda: digits(data_seed=-1), "data_seed=-1")
    first = digits(data_seed=0).splits
    assert not torch.equal(first["test"], digits(data_seed=1).splits["test"])
    assert first["val"][:6].tolist() == [22, 25, 26, 45, 49, 50]
    assert first["test"][:6].tolist() == [3, 7, 13, 19, 36, 38]


@pytest.mark.parametrize("size", [1, 2, 7, 10, 11])
def test_split_off_is_stratified_and_has_the_size(size: int) -> None:
    labels = np.array([0] * 6 + [1] * 3 + [2] * 3)
    rest, drawn = split_off(np.arange(12), labels, size, np.random.RandomState(0))
    assert len(drawn) == size
    assert sorted([*rest, *drawn]) == list(range(12))
    assert (np.abs(np.bincount(labels[drawn], minlength=3) - size * np.array([6, 3, 3]) / 12) < 1).all()


# digest


@pytest.mark.parametrize(
    "change",
    [
        {"labels": [1, 1] + [0, 1] * 5},
        {"splits": {"train": range(7), "val": [7, 8, 9], "test": [10, 11]}},
        {"splits": {"train": range(8), "val": [8, 9], "test": [11, 10]}},
        {"target_probs": np.eye(2)[[0, 1] * 6]},
        {"truth": np.eye(2)[[0, 1] * 6]},
        {"images": np.zeros((12, 3, 4, 5), np.uint8)},
        {"images": np.zeros((12, 3, 4, 5), np.float32)},
    ],
)
def test_digest_changes_with_any_part_of_the_data(change: dict[str, Any]) -> None:
    assert tiny(**change).digest != tiny().digest


def test_digest_of_digits_never_changes() -> None:
    data = digits()
    assert data.digest == "b9f9394e0132c2ccdb100d9963feef432070d788940c19f39d7d34ef472c1fc9"
    assert data.to("cpu", torch.float64).digest == data.digest


def test_digest_changes_with_one_pixel_of_a_test_example() -> None:
    images = tiny().images.clone()
    assert tiny(images=images).digest == tiny().digest
    images[11, 2, 3, 4] ^= 1
    assert tiny(images=images).digest != tiny().digest


# take


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_take_gives_the_same_bits_for_any_shape_and_storage(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled = tiny().to("cpu", dtype)
    monkeypatch.setattr(datasets, "FLOAT_POOL_BYTES", 0)
    converted = tiny().to("cpu", dtype)
    assert converted.pool.dtype == torch.uint8
    for data in (pooled, converted):
        for indices in (torch.tensor(3), torch.tensor([5, 5, 0]), torch.tensor([[1, 2], [11, 4], [7, 7]])):
            inputs, labels = data.take(indices)
            assert (inputs.dtype, labels.dtype) == (dtype, torch.int64)
            assert inputs.shape == (*indices.shape, 3, 4, 5)
            rows = [pooled.take(index.view(1)) for index in indices.view(-1)]
            assert torch.equal(inputs.view(-1, 3, 4, 5), torch.cat([row for row, _ in rows]))
            assert torch.equal(labels.view(-1), torch.cat([label for _, label in rows]))


def test_take_does_not_change_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "FLOAT_POOL_BYTES", 0)
    data = tiny(images=np.random.default_rng(0).normal(size=(12, 3, 4, 5)).astype(np.float32))
    first, _ = data.take(torch.arange(12))
    assert torch.equal(data.take(torch.arange(12))[0], first)


def test_inputs_are_normalised_by_the_train_split_alone() -> None:
    data = tiny().to("cpu", torch.float64)
    train, _ = data.take(data.splits["train"])
    assert torch.allclose(train.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(train.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), atol=1e-12)
    brighter = data.images.clone()
    brighter[8:] = 255
    assert torch.equal(tiny(images=brighter).take(torch.arange(8))[0], tiny().take(torch.arange(8))[0])


def test_a_constant_channel_becomes_zero_not_nan() -> None:
    images = tiny().images.clone()
    images[:, 1] = 77
    assert (tiny(images=images).take(torch.arange(12))[0][:, 1] == 0).all()


def test_float64_inputs_are_computed_from_the_pixels() -> None:
    single, double = tiny(), tiny().to("cpu", torch.float64)
    assert not torch.equal(single.take(torch.arange(12))[0].double(), double.take(torch.arange(12))[0])
    assert torch.equal(double.to("cpu", torch.float32).pool, single.pool)


def test_target_probs_are_one_hot_or_the_soft_targets() -> None:
    indices = torch.tensor([[0, 1], [3, 2]])
    expected = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    assert torch.equal(tiny().target_probs(indices), expected)
    soft = np.full((12, 2), [0.3, 0.7])
    data = tiny(target_probs=soft).to("cpu", torch.float64)
    assert torch.equal(data.target_probs(indices), torch.from_numpy(soft)[indices])


def test_true_probs_are_float64_and_no_targets() -> None:
    truth = np.full((12, 2), [0.3, 0.7])
    data = tiny(truth=truth).to("cpu", torch.float32)
    indices = torch.tensor([[0, 1], [3, 2]])
    found = data.true_probs(indices)
    assert found is not None
    assert torch.equal(found, torch.from_numpy(truth)[indices])
    assert torch.equal(data.target_probs(indices), tiny().target_probs(indices))
    assert tiny().true_probs(indices) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("limit", [0, 2**30], ids=["uint8 pool", "float pool"])
def test_take_on_a_gpu_gives_the_bits_of_the_cpu(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "FLOAT_POOL_BYTES", limit)
    host, device = tiny(), tiny().to("cuda", torch.float32)
    for indices in (torch.arange(12), torch.arange(12, device="cuda")):
        inputs, labels = device.take(indices)
        assert inputs.is_cuda
        assert labels.is_cuda
        assert torch.equal(inputs.cpu(), host.take(torch.arange(12))[0])
        assert torch.equal(device.target_probs(indices).cpu(), host.target_probs(torch.arange(12)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pool_too_large_for_the_gpu_stays_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "FLOAT_POOL_BYTES", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1))
    device = tiny().to("cuda", torch.float32)
    assert not device.pool.is_cuda
    inputs, _ = device.take(torch.arange(12, device="cuda"))
    assert inputs.is_cuda
    assert torch.equal(inputs.cpu(), tiny().take(torch.arange(12))[0])


# bad data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"splits": {**TINY_SPLITS, "val": []}}, ["val split is empty"]),
        ({"splits": {"train": range(8), "test": [8]}}, ["train, val and test"]),
        ({"splits": {**TINY_SPLITS, "val": [7, 8]}}, ["example 7", "more than once"]),
        ({"splits": {**TINY_SPLITS, "val": [8, 12]}}, ["val split", "12", "out of range"]),
        ({"classes": ["a"]}, ["only 1 class"]),
        ({"labels": [0] * 12}, ["only one class", "'a'"]),
        ({"labels": [0] * 8 + [1] * 4, "splits": {**TINY_SPLITS}}, ["only one class"]),
        ({"labels": [0, 1] * 5 + [2, 0], "classes": "abc"}, ["class 'c'", "in test", "not in train"]),
        ({"labels": [0, 1] * 5 + [0, 2]}, ["labels", "2", "out of range"]),
        ({"labels": [0, 1] * 5 + [0, -1]}, ["labels", "-1", "out of range"]),
        ({"labels": [0.0, 1.0] * 6}, ["labels", "not integers"]),
        ({"labels": [0, 1] * 5}, ["out of range"]),
        ({"labels": [[0, 1]] * 6}, ["labels", "shape"]),
        ({"images": np.zeros((12, 4, 5), np.uint8)}, ["[N, C, H, W]"]),
        ({"images": np.zeros((11, 1, 4, 5), np.uint8)}, ["11 images but 12 labels"]),
        ({"images": np.zeros((12, 1, 4, 5), np.int64)}, ["not uint8 or floats"]),
        ({"target_probs": np.full((12, 2), 0.6)}, ["target_probs of example 0"]),
        ({"target_probs": np.full((12, 2), np.nan)}, ["target_probs of example 0"]),
        ({"target_probs": np.full((12, 3), 1 / 3)}, ["[12, 3]", "[12, 2]"]),
        ({"truth": np.full((12, 2), 0.6)}, ["truth of example 0"]),
        ({"truth": np.full((11, 2), 0.5)}, ["truth are [11, 2]", "[12, 2]"]),
    ],
)
def test_make_dataset_refuses_bad_data(change: dict[str, Any], words: list[str]) -> None:
    refused(lambda: tiny(**change), "dataset tiny", *words)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_make_dataset_names_the_first_non_finite_image(value: float) -> None:
    images = np.zeros((12, 3, 4, 5), np.float32)
    images[9, 1, 2, 3] = value
    refused(lambda: tiny(images=images), "image 9", "NaN or infinite")


@pytest.mark.parametrize("loader", [digits, fashion_mnist, loaders.mnist, loaders.cifar10, image_folder])
def test_loaders_can_be_checked_against_their_signature(loader: Callable[..., Dataset]) -> None:
    with pytest.raises(ValidationError, match="data_sed"):
        TypeAdapter(loader).validate_python({"data_sed": 1, "root": "x"})


# IDX files


def write_idx(folder: Path, part: str, count: int, **options: bool) -> None:
    """`count` 3 x 2 images of classes 0 to 9 in turn, gzipped."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.arange(count * 6, dtype=np.uint32).astype(np.uint8).tobytes()
    labels = bytes(number % 10 for number in range(count - options.get("label_missing", False)))
    header = struct.pack(">HBB3I", 0, 8, 3, count, 3, 2)
    (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images))
    header = struct.pack(">HBBI", 0, 8, 1, len(labels))
    (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels))


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    write_idx(tmp_path / "idx", "train", 60)
    write_idx(tmp_path / "idx", "t10k", 20)
    return tmp_path / "idx"


def test_fashion_mnist_draws_val_from_train(idx: Path) -> None:
    data = fashion_mnist(root=str(idx), val=20)
    assert data.input_shape == (1, 3, 2)
    assert data.splits["test"].tolist() == list(range(60, 80))
    assert torch.bincount(data.labels[data.splits["val"]]).tolist() == [2] * 10
    assert sorted(torch.cat([data.splits["train"], data.splits["val"]]).tolist()) == list(range(60))
    assert data.images[61, 0].tolist() == [[6, 7], [8, 9], [10, 11]]


def test_plain_idx_files_are_read_like_gzipped_ones(idx: Path) -> None:
    packed = fashion_mnist(root=str(idx), val=20)
    for path in list(idx.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert fashion_mnist(root=str(idx), val=20).digest == packed.digest


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: gzip.compress(gzip.decompress(content)[:-1]),
        lambda content: gzip.compress(gzip.decompress(content)[:2]),
        lambda content: gzip.compress(b"\0\0\x0d" + gzip.decompress(content)[3:]),
    ],
    ids=["half a gzip", "empty", "a byte short", "no header", "floats"],
)
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
def test_a_damaged_idx_file_is_named(idx: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    (idx / name).write_bytes(damage((idx / name).read_bytes()))
    refused(lambda: fashion_mnist(root=str(idx), val=20), name, "truncated")


def test_missing_and_unequal_idx_files_are_refused(idx: Path) -> None:
    write_idx(idx, "train", 60, label_missing=True)
    refused(lambda: fashion_mnist(root=str(idx), val=20), "60 images but 59 labels")
    (idx / "t10k-labels-idx1-ubyte.gz").unlink()
    refused(lambda: fashion_mnist(root=str(idx), val=20), "t10k-labels-idx1-ubyte", str(idx))


@pytest.mark.parametrize("val", [0, 60, -1])
def test_fashion_mnist_refuses_an_empty_split(idx: Path, val: int) -> None:
    refused(lambda: fashion_mnist(root=str(idx), val=val), f"{val} of 60")


def test_loaders_offline_say_what_to_do(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr(loaders, "DEBIAN_FASHION_MNIST", Path("/nowhere"))
    for source in ("FashionMNIST", "MNIST", "CIFAR10"):
        monkeypatch.setattr(f"torchvision.datasets.{source}", offline)
    refused(fashion_mnist, "apt-get install dataset-fashion-mnist", "download", "not known")
    refused(loaders.mnist, "mnist", "download", "dataset.root")
    refused(loaders.cifar10, "cifar10", "download", "dataset.root")
    assert list(cache.iterdir()) == []


def test_download_is_done_once(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def fetch(root: str, download: bool) -> None:
        write_idx(Path(root) / "MNIST" / "raw", "train", 60)
        write_idx(Path(root) / "MNIST" / "raw", "t10k", 20)

    monkeypatch.setattr("torchvision.datasets.MNIST", fetch)
    first = loaders.mnist(val=20)
    monkeypatch.delattr("torchvision.datasets.MNIST")
    assert loaders.mnist(val=20).digest == first.digest
    assert [path.name for path in cache.iterdir()] == ["MNIST"]


def test_cifar10_refuses_a_folder_without_it(tmp_path: Path) -> None:
    refused(lambda: loaders.cifar10(root=str(tmp_path)), "cifar10", str(tmp_path))


@pytest.mark.skipif(not loaders.DEBIAN_FASHION_MNIST.is_dir(), reason="needs `apt-get install dataset-fashion-mnist`")
def test_debians_fashion_mnist_is_the_published_one() -> None:
    data = fashion_mnist()
    assert [len(data.splits[part]) for part in ("train", "val", "test")] == [55_000, 5_000, 10_000]
    assert torch.bincount(data.labels[60_000:]).tolist() == [1000] * 10
    assert torch.bincount(data.labels[data.splits["val"]]).tolist() == [500] * 10
    mean, std = data.statistics.mean.item() / 255, data.statistics.std.item() / 255
    assert (round(mean, 2), round(std, 2)) == (0.29, 0.35)  # 0.2860 and 0.3530 in the literature


# picture folders


def test_image_folder_is_split_by_data_seed(tmp_path: Path) -> None:
    data = image_folder(str(folder_of(tmp_path / "p", count=10)), size=8)
    assert data.classes == ("cat", "horse")
    assert data.input_shape == (3, 8, 8)
    assert {part: len(indices) for part, indices in data.splits.items()} == {"train": 16, "val": 2, "test": 2}
    assert data.labels[data.splits["test"]].tolist() == [0, 1]
    other = image_folder(str(tmp_path / "p"), size=8, data_seed=1)
    assert other.digest != data.digest
    assert torch.equal(other.images, data.images)


def test_image_folder_keeps_train_and_test_folders(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", count=10)
    folder_of(tmp_path / "test", kinds=("horse",), count=2)
    data = image_folder(str(tmp_path), size=8, cache=str(tmp_path.parent / "elsewhere"))
    assert data.splits["test"].tolist() == [20, 21]
    assert len(data.splits["val"]) == 2
    assert data.labels[20:].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [("png", "RGB"), ("png", "L"), ("png", "LA"), ("png", "RGBA"), ("png", "P"), ("png", "1"),
     ("jpg", "CMYK"), ("gif", "P"), ("webp", "RGB"), ("tif", "RGB"), ("bmp", "RGB"), ("JPEG", "L")],
)  # fmt: skip
def test_decode_converts_every_mode_to_rgb(tmp_path: Path, suffix: str, mode: str) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.new("RGB", (30, 17), (255, 255, 255)).convert(mode).save(path)
    decoded = pictures.decode(path, 8)
    assert decoded.shape == (3, 8, 8)
    assert (decoded >= 250).all()


def test_decode_drops_transparency_in_a_palette(tmp_path: Path) -> None:
    palette = Image.new("RGB", (9, 9), (200, 10, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "x.png", transparency=bytes([0]))
    assert pictures.decode(tmp_path / "x.png", 4)[:, 0, 0].tolist() == [200, 10, 30]


def test_decode_resizes_and_cuts_to_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255  # a white square between two black ones
    Image.fromarray(pixels).save(tmp_path / "x.png")
    decoded = pictures.decode(tmp_path / "x.png", 4)
    assert (decoded[:, :, 1:3] == 255).all()
    assert (decoded > 200).all()  # at the cut the antialiasing sees a little of what lies beyond


def test_decode_respects_exif_orientation(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # white above black
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees: white on the right
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    decoded = pictures.decode(tmp_path / "x.png", 16)
    assert (decoded[:, :, 8:] == 255).all()
    assert (decoded[:, :, :8] == 0).all()


def test_decode_of_a_large_jpeg_keeps_its_content(tmp_path: Path) -> None:
    pixels = np.zeros((640, 640, 3), np.uint8)
    pixels[:, 320:] = (250, 120, 10)
    Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=95)
    decoded = pictures.decode(tmp_path / "x.jpg", 16).astype(int)
    assert (np.abs(decoded[:, 4, 12] - [250, 120, 10]) <= 4).all()
    assert (decoded[:, 4, 3] <= 4).all()


def test_image_folder_decodes_every_picture_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of(tmp_path / "p", count=70)  # more than are decoded at a time
    first = image_folder(str(root), size=8)
    for row, (kind, number) in {0: ("cat", "0"), 69: ("cat", "9"), 139: ("horse", "9")}.items():
        expected = pictures.decode(root / kind / f"{number}.png", 8)
        assert np.array_equal(first.images[row].numpy(), expected)
    monkeypatch.setattr(pictures, "decode", lambda *_: pytest.fail("decoded again"))
    second = image_folder(str(root), size=8)
    assert second.digest == first.digest


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_image_folder_takes_large_pools_from_the_memory_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(folder_of(tmp_path / "p"))
    pooled = image_folder(root, size=8)
    monkeypatch.setattr(datasets, "FLOAT_POOL_BYTES", 0)
    mapped = image_folder(root, size=8)
    assert mapped.pool.data_ptr() == mapped.images.data_ptr()
    assert str(tmp_path / "cache" / "pictures-") in Path("/proc/self/maps").read_text()
    assert torch.equal(mapped.take(torch.arange(10))[0], pooled.take(torch.arange(10))[0])


def test_image_folder_decodes_again_after_changes(tmp_path: Path, cache: Path) -> None:
    """After a change of a picture or of the size, and if the cache file is too short. A failure leaves no cache."""
    root = folder_of(tmp_path / "p")
    first = image_folder(str(root), size=8)
    (pixels,) = cache.iterdir()
    pixels.write_bytes(pixels.read_bytes()[:-1])
    assert image_folder(str(root), size=8).digest == first.digest
    picture(root / "cat" / "0.png", size=(33, 12))
    assert image_folder(str(root), size=8).digest != first.digest
    assert image_folder(str(root), size=9).input_shape == (3, 9, 9)
    (root / "horse" / "4.png").write_bytes(b"")
    refused(lambda: image_folder(str(root), size=8), "horse/4.png")
    assert len(list(cache.iterdir())) == 3


def test_image_folder_ignores_hidden_files(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "p")
    fresh(root / ".DS_Store")
    fresh(root / "cat" / ".thumbs")
    fresh(root / ".git" / "config")
    assert image_folder(str(root), size=8).classes == ("cat", "horse")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: fresh(root / "cat" / "0.png"), ["cat/0.png", "unreadable"]),
        (lambda root: (root / "cat" / "0.png").write_text("no picture"), ["cat/0.png", "unreadable"]),
        (lambda root: truncate(picture(root / "cat" / "z.jpg", size=(64, 64))), ["cat/z.jpg", "unreadable"]),
        (lambda root: Image.new("I;16", (9, 9)).save(root / "cat" / "0.png"), ["cat/0.png", "8 bits"]),
        (lambda root: fresh(root / "cat" / "notes.txt"), ["cat/notes.txt", "not a picture"]),
        (lambda root: fresh(root / "notes.txt"), ["notes.txt", "not a class folder"]),
        (lambda root: (root / "cat" / "deep.png").mkdir(), ["cat/deep.png", "not a picture"]),
        (lambda root: (root / "dog").mkdir(), ["dog", "without pictures"]),
        (lambda root: (root / "cat" / "x.png").symlink_to("/etc/hostname"), ["cat/x.png", "link out of"]),
        (lambda root: (root / "etc").symlink_to("/etc"), ["etc", "link out of"]),
        (lambda root: (root / "cat" / "x.png").symlink_to("gone.png"), ["cat/x.png", "not a picture"]),
    ],
    ids=["zero bytes", "text", "truncated", "16 bit", "not an image", "stray file", "folder", "empty class",
         "link", "linked class", "dangling"],
)  # fmt: skip
def test_image_folder_refuses_a_bad_file_by_name(
    tmp_path: Path, spoil: Callable[[Path], object], words: list[str]
) -> None:
    root = folder_of(tmp_path / "p")
    spoil(root)
    refused(lambda: image_folder(str(root), size=8), *words)


def test_image_folder_refuses_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of(tmp_path / "p")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    refused(lambda: image_folder(str(root), size=8), ".png", "decompression bomb")


def test_image_folder_refuses_a_class_of_test_alone_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "p" / "train", count=10)
    folder_of(tmp_path / "p" / "test", kinds=("cat", "dog"), count=1)
    monkeypatch.setattr(pictures, "decode", lambda *_: pytest.fail("decoded"))
    refused(lambda: image_folder(str(tmp_path / "p"), size=8), "'dog'", "in test", "not in train")


def test_image_folder_refuses_a_third_split_folder(tmp_path: Path) -> None:
    for part in ("train", "test", "val"):
        folder_of(tmp_path / "p" / part)
    refused(lambda: image_folder(str(tmp_path / "p"), size=8), "val", "neither train/ nor test/")


def test_image_folder_refuses_absent_empty_and_one_class(tmp_path: Path) -> None:
    refused(lambda: image_folder(str(tmp_path / "absent")), "absent", "dataset.root")
    (tmp_path / "empty").mkdir()
    refused(lambda: image_folder(str(tmp_path / "empty")), "empty", "no class folders")
    folder_of(tmp_path / "one", kinds=("cat",), count=20)
    refused(lambda: image_folder(str(tmp_path / "one"), size=8), "only 1 class")


def test_image_folder_refuses_an_unwritable_cache(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "p")
    blocked = fresh(tmp_path / "file") / "cache"
    refused(lambda: image_folder(str(root), size=8, cache=str(blocked)), str(blocked), "LIKELIHOOD_LAB_CACHE")
