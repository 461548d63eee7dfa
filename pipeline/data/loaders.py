"""Loaders of digits, Fashion-MNIST, MNIST and CIFAR-10, and functions that split a pool."""

from __future__ import annotations

import gzip
import math
import struct
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from likelihood_lab.errors import UsageError, first_line
from pipeline.data.dataset import Dataset, make_dataset, require
from pipeline.runtime import cache_dir, home_expanded, writing

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IDX_BYTES = 2**30  # limit for an unpacked IDX file; the largest of EMNIST has 0.64 GB
ARTICLES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")

Indices = NDArray[np.int64]


def random_state(data_seed: int) -> np.random.RandomState:
    """Return NumPy's legacy generator. Its stream is the same in every version of NumPy, and so is the split."""
    if not 0 <= data_seed < 2**32:
        raise UsageError(f"data_seed={data_seed}: give an integer from 0 to {2**32 - 1}")
    return np.random.RandomState(data_seed)


def split_off(pool: Indices, labels: Indices, size: int, generator: np.random.RandomState) -> tuple[Indices, Indices]:
    """Draw `size` indices from `pool`, stratified by class (largest remainders). Return (rest, drawn)."""
    if not 0 < size < len(pool):
        raise UsageError(f"cannot set {size} of {len(pool)} examples apart: change the size or the fraction")
    members = [pool[labels[pool] == label] for label in np.unique(labels[pool])]
    counts, remainders = np.divmod(size * np.array([len(group) for group in members]), len(pool))
    counts[np.argsort(-remainders, kind="stable")[: size - counts.sum()]] += 1
    drawn = np.concatenate([generator.permutation(group)[:count] for group, count in zip(members, counts, strict=True)])
    return np.setdiff1d(pool, drawn), np.sort(drawn)


def split_pool(labels: Indices, val: int, test: int, data_seed: int) -> dict[str, Indices]:
    """Split a pool without official splits into train, val and test."""
    generator = random_state(data_seed)
    rest, drawn = split_off(np.arange(len(labels)), labels, test, generator)
    train, held_out = split_off(rest, labels, val, generator)
    return {"train": train, "val": held_out, "test": drawn}


def split_training_set(labels: Indices, train: int, val: int, data_seed: int) -> dict[str, Indices]:
    """Draw val from the first `train` examples of a pool, the official training set. The others are the test set."""
    rest, drawn = split_off(np.arange(train), labels, val, random_state(data_seed))
    return {"train": rest, "val": drawn, "test": np.arange(train, len(labels))}


def check_inside(path: Path, root: Path) -> Path:
    """Return the path if it lies inside `root` after links are resolved.

    Data of other people may contain links to private files.

    Raises:
        UsageError: a link leads out of `root`.
    """
    try:
        if path.resolve().is_relative_to(root.resolve()):
            return path
    except (OSError, RuntimeError) as error:  # a link to itself
        raise UsageError(f"{path} leads nowhere ({first_line(error)}): put the file itself there") from error
    raise UsageError(f"{path} is a link out of {root}: put the file itself there")


def digits(data_seed: int = 0) -> Dataset:
    """Load 1797 grey 8 x 8 digits, bundled with scikit-learn: 1137 train, 300 val, 360 test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images[:, None].astype(np.uint8)  # integers from 0 to 16
    splits = split_pool(bunch.target, val=300, test=360, data_seed=data_seed)
    return make_dataset("digits", images, bunch.target, splits, "0123456789")


def fashion_mnist(root: str | None = None, data_seed: int = 0, val: int = 5000) -> Dataset:
    """Load 70 000 grey 28 x 28 articles of clothing from `root`, Debian's package or a download."""
    name = "fashion_mnist"
    debian = None if root or not DEBIAN_FASHION_MNIST.is_dir() else DEBIAN_FASHION_MNIST
    remedy = "run `apt-get install dataset-fashion-mnist`, "
    folder = debian or _mnist_folder(name, "FashionMNIST", root, remedy)
    return _mnist(name, folder, ARTICLES, data_seed, val)


def mnist(root: str | None = None, data_seed: int = 0, val: int = 5000) -> Dataset:
    """Load 70 000 grey 28 x 28 digits from `root` or torchvision's download."""
    folder = _mnist_folder("mnist", "MNIST", root)
    return _mnist("mnist", folder, "0123456789", data_seed, val)


def cifar10(root: str | None = None, data_seed: int = 0, val: int = 5000) -> Dataset:
    """Load 60 000 colour 32 x 32 pictures of ten classes from `root` or torchvision's download."""
    from torchvision.datasets import CIFAR10

    folder = home_expanded(root) if root else _download("cifar10", "CIFAR10", "cifar-10-batches-py").parent
    for file in folder.glob("cifar-10-batches-py/*"):
        check_inside(file, folder)
    try:  # torchvision unpickles these files only if they have the published digests
        train, test = CIFAR10(folder, train=True), CIFAR10(folder, train=False)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"dataset cifar10: {folder} holds no sound cifar-10-batches-py: replace it, or unset dataset.root"
        ) from error
    images = np.concatenate([train.data, test.data]).transpose(0, 3, 1, 2)
    labels = np.array(train.targets + test.targets)
    splits = split_training_set(labels, len(train.targets), val, data_seed)
    return make_dataset("cifar10", np.ascontiguousarray(images), labels, splits, train.classes)


def _mnist(name: str, folder: Path, classes: Sequence[str], data_seed: int, val: int) -> Dataset:
    images = [_read_idx(folder, f"{part}-images-idx3-ubyte") for part in ("train", "t10k")]
    labels = [_read_idx(folder, f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")]
    for num_images, num_labels in zip(map(len, images), map(len, labels), strict=True):
        require(num_images == num_labels, name, f"{num_images} images but {num_labels} labels in {folder}")
    sizes = [list(pictures.shape[1:]) for pictures in images]
    require(sizes[0] == sizes[1], name, f"train has images of {sizes[0]} and t10k of {sizes[1]} pixels in {folder}")
    pooled = np.concatenate(labels).astype(np.int64)
    splits = split_training_set(pooled, len(labels[0]), val, data_seed)
    return make_dataset(name, np.concatenate(images)[:, None], pooled, splits, classes)


def _mnist_folder(name: str, source: str, root: str | None, remedy: str = "") -> Path:
    if root is None:
        return _download(name, source, source, remedy) / "raw"
    given = home_expanded(root)
    raw = given / source / "raw"  # the folder that torchvision uses
    return raw if raw.is_dir() else given


def _download(name: str, source: str, folder: str, remedy: str = "") -> Path:
    """Download `folder` of torchvision's dataset `source` once into the cache. A failed download leaves nothing."""
    import torchvision.datasets

    cache = cache_dir()
    target = cache / folder
    if target.is_dir():
        return target
    with writing(cache), tempfile.TemporaryDirectory(dir=cache) as scratch:
        try:
            getattr(torchvision.datasets, source)(scratch, download=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"dataset {name} is not here: {remedy}connect to the network once for the download, "
                f"or set dataset.root to a folder that has its files ({reason})"
            ) from error
        (Path(scratch) / folder).replace(target)
    return target


def _read_idx(folder: Path, stem: str) -> NDArray[np.uint8]:
    """Read an IDX file of bytes, plain or gzipped.

    Its format: two zero bytes, type 8, rank, the shape in big-endian uint32, the data.
    """
    path = next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)
    if path is None:
        raise UsageError(f"{folder} has no {stem} or {stem}.gz: put the four IDX files there")
    check_inside(path, folder)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            zeros, kind, rank = struct.unpack(">HBB", file.read(4))
            shape = struct.unpack(f">{rank}I", file.read(4 * rank))
            if (zeros, kind) != (0, 8) or f"idx{rank}" not in stem:
                raise ValueError("wrong header")
            size = math.prod(shape)
            if size > IDX_BYTES:
                raise ValueError(f"its header claims {size} bytes; {IDX_BYTES} are the most")
            content = file.read(size + 1)
        if len(content) != size:
            raise ValueError(f"other than the {size} bytes of its header follow")
        return np.frombuffer(content, np.uint8).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise UsageError(f"{path}: unreadable, truncated or not an IDX file ({error}): replace it") from error
