"""The shipped datasets but for pictures: digits, Fashion-MNIST, MNIST, CIFAR-10; how a pool is split."""

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
IDX_BYTES = 2**30  # no IDX file may unpack to more; EMNIST's largest has 0.64 GB
ARTICLES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")

Indices = NDArray[np.int64]


def draws_of(data_seed: int) -> np.random.RandomState:
    """NumPy froze this generator's stream: a data_seed names the same split under every version."""
    if not 0 <= data_seed < 2**32:
        raise UsageError(f"data_seed={data_seed}: give an integer from 0 to {2**32 - 1}")
    return np.random.RandomState(data_seed)


def carve(pool: Indices, labels: Indices, size: int, draws: np.random.RandomState) -> tuple[Indices, Indices]:
    """Draw `size` of the indices in `pool`, each class in its share (largest remainders): (rest, drawn)."""
    if not 0 < size < len(pool):
        raise UsageError(f"cannot set {size} of {len(pool)} examples apart: change the size or the fraction")
    members = [pool[labels[pool] == label] for label in np.unique(labels[pool])]
    counts, remainders = np.divmod(size * np.array([len(group) for group in members]), len(pool))
    counts[np.argsort(-remainders, kind="stable")[: size - counts.sum()]] += 1
    drawn = np.concatenate([draws.permutation(group)[:count] for group, count in zip(members, counts, strict=True)])
    return np.setdiff1d(pool, drawn), np.sort(drawn)


def three_way(labels: Indices, val: int, test: int, data_seed: int) -> dict[str, Indices]:
    """Splits of a pool that comes without any."""
    draws = draws_of(data_seed)
    rest, drawn = carve(np.arange(len(labels)), labels, test, draws)
    train, held_out = carve(rest, labels, val, draws)
    return {"train": train, "val": held_out, "test": drawn}


def with_val(labels: Indices, train: int, val: int, data_seed: int) -> dict[str, Indices]:
    """Splits of a pool that begins with the `train` official training examples and ends with the test's."""
    rest, drawn = carve(np.arange(train), labels, val, draws_of(data_seed))
    return {"train": rest, "val": drawn, "test": np.arange(train, len(labels))}


def inside(path: Path, root: Path) -> Path:
    """The path, which must not lead out of a dataset's folder by a link: whoever made the folder has no say over that.

    Raises:
        UsageError: it does.
    """
    try:
        if path.resolve().is_relative_to(root.resolve()):
            return path
    except (OSError, RuntimeError) as error:  # a link to itself
        raise UsageError(f"{path} leads nowhere ({first_line(error)}): put the file itself there") from error
    raise UsageError(f"{path} is a link out of {root}: put the file itself there")


def digits(data_seed: int = 0) -> Dataset:
    """1797 grey 8 x 8 digits bundled with scikit-learn: 1137 train, 300 val, 360 test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images[:, None].astype(np.uint8)  # integers from 0 to 16
    splits = three_way(bunch.target, val=300, test=360, data_seed=data_seed)
    return make_dataset("digits", images, bunch.target, splits, "0123456789")


def fashion_mnist(root: str | None = None, data_seed: int = 0, val: int = 5000) -> Dataset:
    """70 000 grey 28 x 28 articles of clothing: from `root`, else Debian's package, else a download."""
    name = "fashion_mnist"
    debian = None if root or not DEBIAN_FASHION_MNIST.is_dir() else DEBIAN_FASHION_MNIST
    remedy = "run `apt-get install dataset-fashion-mnist`, "
    folder = debian or _mnist_folder(name, "FashionMNIST", root, remedy)
    return _mnist(name, folder, ARTICLES, data_seed, val)


def mnist(root: str | None = None, data_seed: int = 0, val: int = 5000) -> Dataset:
    """70 000 grey 28 x 28 digits: from `root`, else torchvision's download."""
    folder = _mnist_folder("mnist", "MNIST", root)
    return _mnist("mnist", folder, "0123456789", data_seed, val)


def cifar10(root: str | None = None, data_seed: int = 0, val: int = 5000) -> Dataset:
    """60 000 colour 32 x 32 pictures of ten classes: from `root`, else torchvision's download."""
    from torchvision.datasets import CIFAR10

    folder = home_expanded(root) if root else _download("cifar10", "CIFAR10", "cifar-10-batches-py").parent
    for file in folder.glob("cifar-10-batches-py/*"):
        inside(file, folder)
    try:  # torchvision unpickles these files only where their digests are those of the published ones
        train, test = CIFAR10(folder, train=True), CIFAR10(folder, train=False)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"dataset cifar10: {folder} holds no sound cifar-10-batches-py: replace it, or unset dataset.root"
        ) from error
    images = np.concatenate([train.data, test.data]).transpose(0, 3, 1, 2)
    labels = np.array(train.targets + test.targets)
    splits = with_val(labels, len(train.targets), val, data_seed)
    return make_dataset("cifar10", np.ascontiguousarray(images), labels, splits, train.classes)


def _mnist(name: str, folder: Path, classes: Sequence[str], data_seed: int, val: int) -> Dataset:
    images = [_read_idx(folder, f"{part}-images-idx3-ubyte") for part in ("train", "t10k")]
    labels = [_read_idx(folder, f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")]
    for pictures, answers in zip(images, labels, strict=True):
        found = f"{len(pictures)} images but {len(answers)} labels"
        require(len(pictures) == len(answers), name, f"{found} in {folder}")
    sizes = [list(pictures.shape[1:]) for pictures in images]
    require(sizes[0] == sizes[1], name, f"train has images of {sizes[0]} and t10k of {sizes[1]} pixels in {folder}")
    pooled = np.concatenate(labels).astype(np.int64)
    splits = with_val(pooled, len(labels[0]), val, data_seed)
    return make_dataset(name, np.concatenate(images)[:, None], pooled, splits, classes)


def _mnist_folder(name: str, source: str, root: str | None, remedy: str = "") -> Path:
    if root is None:
        return _download(name, source, source, remedy) / "raw"
    given = home_expanded(root)
    raw = given / source / "raw"  # where torchvision puts it
    return raw if raw.is_dir() else given


def _download(name: str, source: str, folder: str, remedy: str = "") -> Path:
    """`folder` of torchvision's dataset `source`, in the cache: fetched once, renamed into place whole."""
    import torchvision.datasets

    cache = cache_dir()
    kept = cache / folder
    if kept.is_dir():
        return kept
    with writing(cache), tempfile.TemporaryDirectory(dir=cache) as scratch:
        try:
            getattr(torchvision.datasets, source)(scratch, download=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"dataset {name} is not here: {remedy}connect to the network once for the download, "
                f"or set dataset.root to a folder that has its files ({reason})"
            ) from error
        (Path(scratch) / folder).replace(kept)
    return kept


def _read_idx(folder: Path, stem: str) -> NDArray[np.uint8]:
    """An IDX file of bytes, plain or gzipped: zero, zero, type 8, rank; big-endian uint32 shape; the data."""
    path = next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)
    if path is None:
        raise UsageError(f"{folder} has no {stem} or {stem}.gz: put the four IDX files there")
    inside(path, folder)
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
