"""Datasets: one pool of examples and three index splits, from which `take` gathers tensors.

A loader is a plain function that ends in `make_dataset`, where every check lives; so can a user's own.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import math
import os
import struct
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pipeline.errors import UsageError

FLOAT_POOL_BYTES = 2**30  # a pool that is larger than this as floats stays as it was loaded; take() converts
CHUNK_BYTES = 2**26  # working memory of a pass over the pool
SPLITS = ("train", "val", "test")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
ARTICLES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")

Indices = NDArray[np.int64]
Files = Mapping[str, Sequence[Path]]  # class -> its pictures

log = logging.getLogger(__name__)


class Normalisation(NamedTuple):
    """x -> (x - mean) / std per channel, both [C, 1, 1]."""

    mean: Tensor
    std: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Normalisation:
        return Normalisation(self.mean.to(device, dtype), self.std.to(device, dtype))

    def apply_(self, images: Tensor) -> Tensor:
        return images.sub_(self.mean).div_(self.std)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A pool of examples and three index splits into it; `make_dataset` builds it, `to` places it."""

    name: str
    classes: tuple[str, ...]
    digest: str  # sha256 of pixels, labels, targets, splits and normalisation
    splits: dict[str, Tensor] = field(repr=False)  # "train", "val", "test" -> int64 indices into the pool
    labels: Tensor = field(repr=False)  # int64 [N]
    soft_targets: Tensor | None = field(repr=False)  # [N, K], float64 on the host
    images: Tensor = field(repr=False)  # [N, C, H, W] as loaded, on the host, possibly a memory map
    statistics: Normalisation = field(repr=False)  # float64 on the host
    pool: Tensor = field(repr=False)  # what take() gathers from: normalised floats, or `images`
    normalisation: Normalisation | None = field(repr=False)  # None where the pool is already normalised
    dtype: torch.dtype = torch.float32

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Dataset:
        """The same data on `device`, inputs and targets in `dtype`; always made from the host's pixels."""
        device = torch.device(device)
        pool, normalisation = _place(self.images, self.statistics, device, dtype)
        return replace(
            self,
            splits={name: indices.to(device) for name, indices in self.splits.items()},
            labels=self.labels.to(device),
            soft_targets=None if self.soft_targets is None else self.soft_targets.to(device),
            pool=pool,
            normalisation=normalisation,
            dtype=dtype,
        )

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [*I, C, H, W] and labels [*I] of the examples `indices` [*I]."""
        device, flat = self.labels.device, indices.reshape(-1)
        inputs = self.pool.index_select(0, flat.to(self.pool.device))
        if self.normalisation is not None:
            inputs = self.normalisation.apply_(inputs.to(device).to(self.dtype))
        labels = self.labels.index_select(0, flat.to(device))
        return inputs.view(*indices.shape, *self.input_shape), labels.view(indices.shape)

    def target_probs(self, indices: Tensor) -> Tensor:
        """Target distributions [*I, K]: soft where the dataset has them, else the labels one-hot."""
        indices = indices.to(self.labels.device)
        if self.soft_targets is not None:
            return self.soft_targets[indices].to(self.dtype)
        labels = self.labels[indices].unsqueeze(-1)
        return labels.new_zeros(*indices.shape, self.num_classes, dtype=self.dtype).scatter_(-1, labels, 1.0)


def make_dataset(
    name: str,
    images: Tensor | NDArray[np.generic],
    labels: ArrayLike,
    splits: Mapping[str, ArrayLike],
    classes: Sequence[str],
    target_probs: ArrayLike | None = None,
) -> Dataset:
    """Check the data and make a dataset of it, on the CPU in float32.

    `images` [N, C, H, W] are uint8 or floats, not normalised, and are not copied: a memory map stays one.
    `labels` [N] count from 0 in the order of `classes`; `splits` holds the indices of train, val and test;
    `target_probs` [N, K] are the targets where these are not simply the labels.
    """
    images = _shared(images)
    labels, splits = checked_labels(name, labels, splits, classes)
    _check_images(name, images, len(labels))
    soft = None if target_probs is None else _checked_targets(name, target_probs, len(labels), len(classes))
    statistics = _statistics(images, splits["train"])
    parts = {"images": images, "labels": labels, "targets": soft, **splits, **statistics._asdict()}
    pool, normalisation = _place(images, statistics, torch.device("cpu"), torch.float32)
    return Dataset(
        name=name,
        classes=tuple(classes),
        splits=splits,
        digest=_digest(parts),
        labels=labels,
        soft_targets=soft,
        images=images,
        statistics=statistics,
        pool=pool,
        normalisation=normalisation,
    )


def checked_labels(
    name: str, labels: ArrayLike, splits: Mapping[str, ArrayLike], classes: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Labels and splits as int64 tensors, or one line on what is wrong with them."""
    _require(len(classes) > 1, name, f"only {len(classes)} class(es): a classifier needs two or more")
    labels = _integers(name, "labels", labels, len(classes))
    _require(set(splits) == set(SPLITS), name, f"splits are {sorted(splits)}, not train, val and test")
    indices = {part: _integers(name, f"the {part} split", splits[part], len(labels)) for part in SPLITS}
    for part, members in indices.items():
        _require(len(members) > 0, name, f"the {part} split is empty")
    uses = torch.cat(list(indices.values())).bincount()
    _require(int(uses.max()) == 1, name, f"example {int(uses.argmax())} is in the splits more than once")
    _check_classes(name, {part: set(labels[members].tolist()) for part, members in indices.items()}, classes)
    return labels, indices


def _check_classes(name: str, seen: dict[str, set[int]], classes: Sequence[str]) -> None:
    first, *others = sorted(seen["train"])
    _require(bool(others), name, f"only one class, '{classes[first]}', in the train split")
    for part in ("val", "test"):
        for label in sorted(seen[part] - seen["train"]):
            _require(False, name, f"class '{classes[label]}' is in {part} but not in train")


def _check_images(name: str, images: Tensor, count: int) -> None:
    shape = tuple(images.shape)
    _require(len(shape) == 4 and 0 not in shape, name, f"images are {list(shape)}, not [N, C, H, W]")
    _require(shape[0] == count, name, f"{shape[0]} images but {count} labels")
    floats = images.dtype.is_floating_point
    _require(floats or images.dtype == torch.uint8, name, f"pixels are {images.dtype}, not uint8 or floats")
    if floats:
        finite = torch.cat([images[rows].isfinite().flatten(1).all(1) for rows in _chunks(images, shape[0])])
        _require(bool(finite.all()), name, f"image {int(finite.int().argmin())} has NaN or infinite pixels")


def _checked_targets(name: str, target_probs: ArrayLike, count: int, num_classes: int) -> Tensor:
    targets = torch.as_tensor(np.array(target_probs, dtype=np.float64))
    shape = list(targets.shape)
    _require(shape == [count, num_classes], name, f"target_probs are {shape}, not {[count, num_classes]}")
    good = (targets >= 0).all(1) & ((targets.sum(1) - 1).abs() <= 1e-5)  # false for NaN
    bad = int(good.int().argmin())
    _require(bool(good.all()), name, f"target_probs of example {bad} are not probabilities that sum to 1")
    return targets


def _integers(name: str, what: str, values: ArrayLike, limit: int) -> Tensor:
    """`values` as an int64 vector with entries in [0, limit)."""
    array = np.asarray(values)
    _require(array.dtype.kind in "iu" or array.size == 0, name, f"{what} are {array.dtype}, not integers")
    _require(array.ndim == 1, name, f"{what} have shape {list(array.shape)}, not [N]")
    for value in array[(array < 0) | (array >= limit)][:1]:
        _require(False, name, f"{what} hold {value}, out of range: 0 to {limit - 1} are possible")
    return torch.from_numpy(array.astype(np.int64))


def _require(holds: bool, name: str, complaint: str) -> None:
    if not holds:
        raise UsageError(f"dataset {name}: {complaint}")


def _shared(images: Tensor | NDArray[np.generic]) -> Tensor:
    """The array's memory as a tensor; nothing writes to it, so that it may be read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.as_tensor(images)


def _chunks(images: Tensor, count: int) -> Iterator[slice]:
    """`count` rows in slices whose images take CHUNK_BYTES as float64."""
    rows = max(1, CHUNK_BYTES // (8 * images[0].numel()))
    return (slice(start, start + rows) for start in range(0, count, rows))


def _statistics(images: Tensor, train: Tensor) -> Normalisation:
    """Per-channel mean and population standard deviation over `train`, [C, 1, 1], in float64.

    Of uint8 pixels both sums are exact (integers below 2^53 in float64), hence the same everywhere.
    A constant channel is divided by 1.
    """
    total, squares = np.zeros(images.shape[1]), np.zeros(images.shape[1])
    for rows in _chunks(images, len(train)):
        block = (
            images.index_select(0, train[rows]).double().flatten(2).numpy()
        )  # NumPy sums in one fixed order
        total += block.sum((0, 2))
        squares += np.einsum("ncp,ncp->c", block, block)
    count = len(train) * images[0, 0].numel()
    mean = total / count
    variance = squares / count - mean**2
    std = np.sqrt(np.where(variance > 1e-12 * mean**2, variance, 1.0))
    return Normalisation(torch.from_numpy(mean).view(-1, 1, 1), torch.from_numpy(std).view(-1, 1, 1))


def _place(
    images: Tensor, statistics: Normalisation, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Normalisation | None]:
    """The pool on `device`, normalised if small; else as loaded, on the host if the device is too full."""
    normalisation = statistics.to(device, dtype)
    if images.numel() * dtype.itemsize <= FLOAT_POOL_BYTES:
        return normalisation.apply_(images.to(device).to(dtype, copy=True)), None
    if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return images, normalisation
    return images.to(device), normalisation


def _digest(parts: Mapping[str, Tensor | None]) -> str:
    sha = hashlib.sha256()
    for name, part in parts.items():
        if part is not None:
            sha.update(f"{name} {part.dtype} {list(part.shape)}\n".encode())
            sha.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _draws(data_seed: int) -> np.random.RandomState:
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
    drawn = np.concatenate(
        [draws.permutation(group)[:count] for group, count in zip(members, counts, strict=True)]
    )
    return np.setdiff1d(pool, drawn), np.sort(drawn)


def _three_way(labels: Indices, val: int, test: int, data_seed: int) -> dict[str, Indices]:
    draws = _draws(data_seed)
    rest, drawn = carve(np.arange(len(labels)), labels, test, draws)
    train, held_out = carve(rest, labels, val, draws)
    return {"train": train, "val": held_out, "test": drawn}


def _with_val(labels: Indices, train: int, val: int, data_seed: int) -> dict[str, Indices]:
    """Splits of a pool that begins with the `train` official training examples and ends with the test's."""
    rest, drawn = carve(np.arange(train), labels, val, _draws(data_seed))
    return {"train": rest, "val": drawn, "test": np.arange(train, len(labels))}


def cache_dir(cache: str | None = None) -> Path:
    """Where downloads and decoded pictures go: `cache`, $LIKELIHOOD_LAB_CACHE or ~/.cache/likelihood-lab."""
    folder = Path(cache or os.environ.get("LIKELIHOOD_LAB_CACHE") or "~/.cache/likelihood-lab").expanduser()
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write to the cache {folder} ({error}): set LIKELIHOOD_LAB_CACHE to a folder with space"
        ) from error


def digits(data_seed: int = 0) -> Dataset:
    """1797 grey 8 x 8 digits bundled with scikit-learn: 1137 train, 300 val, 360 test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images[:, None].astype(np.uint8)  # integers from 0 to 16
    splits = _three_way(bunch.target, val=300, test=360, data_seed=data_seed)
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

    folder = Path(root or _download("cifar10", "CIFAR10", "cifar-10-batches-py").parent).expanduser()
    try:
        train, test = CIFAR10(folder, train=True), CIFAR10(folder, train=False)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"dataset cifar10: {folder} holds no sound cifar-10-batches-py: replace it, or unset dataset.root"
        ) from error
    images = np.concatenate([train.data, test.data]).transpose(0, 3, 1, 2)
    labels = np.array(train.targets + test.targets)
    splits = _with_val(labels, len(train.targets), val, data_seed)
    return make_dataset("cifar10", np.ascontiguousarray(images), labels, splits, train.classes)


def _mnist(name: str, folder: Path, classes: Sequence[str], data_seed: int, val: int) -> Dataset:
    images = [_read_idx(folder, f"{part}-images-idx3-ubyte") for part in ("train", "t10k")]
    labels = [_read_idx(folder, f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")]
    for pictures, answers in zip(images, labels, strict=True):
        found = f"{len(pictures)} images but {len(answers)} labels"
        _require(len(pictures) == len(answers), name, f"{found} in {folder}")
    pooled = np.concatenate(labels).astype(np.int64)
    splits = _with_val(pooled, len(labels[0]), val, data_seed)
    return make_dataset(name, np.concatenate(images)[:, None], pooled, splits, classes)


def _mnist_folder(name: str, source: str, root: str | None, remedy: str = "") -> Path:
    if root is None:
        return _download(name, source, source, remedy) / "raw"
    given = Path(root).expanduser()
    raw = given / source / "raw"  # where torchvision puts it
    return raw if raw.is_dir() else given


def _download(name: str, source: str, folder: str, remedy: str = "") -> Path:
    """`folder` of torchvision's dataset `source`, in the cache: fetched once, renamed into place whole."""
    import torchvision.datasets

    cache = cache_dir()
    kept = cache / folder
    if kept.is_dir():
        return kept
    with _writing(cache), tempfile.TemporaryDirectory(dir=cache) as scratch:
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
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, rank = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{rank}I", content, 4)
        if (zeros, kind) != (0, 8) or f"idx{rank}" not in stem:
            raise ValueError("wrong header")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise UsageError(f"{path}: unreadable, truncated or not an IDX file ({error}): replace it") from error


def image_folder(
    root: str,
    size: int = 256,
    data_seed: int = 0,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    cache: str | None = None,
) -> Dataset:
    """Pictures in root/train/<class>/ and root/test/<class>/, or in root/<class>/ and split by `data_seed`.

    Each is decoded once, to RGB [3, size, size], into a file under `cache` that is memory-mapped ever after.
    """
    name, folder = "image_folder", Path(root).expanduser().resolve()
    _require(folder.is_dir(), name, f"there is no folder {folder}: set dataset.root")
    _require(size > 0, name, f"size={size}: give the side in pixels, 1 or more")
    parts = _parts(folder)
    files = [file for part in parts.values() for found in part.values() for file in found]
    _require(bool(files), name, f"{folder} has no class folders with pictures")
    classes = sorted({kind for part in parts.values() for kind in part})
    number = {kind: label for label, kind in enumerate(classes)}
    labels = np.array([number[file.parent.name] for file in files])
    if "test" in parts:
        train = sum(map(len, parts["train"].values()))
        splits = _with_val(labels, train, round(val_fraction * train), data_seed)
    else:
        val, test = round(val_fraction * len(files)), round(test_fraction * len(files))
        splits = _three_way(labels, val, test, data_seed)
    checked_labels(name, labels, splits, classes)  # before the long decoding
    return make_dataset(name, _decoded(files, size, cache_dir(cache)), labels, splits, classes)


def _parts(root: Path) -> dict[str, Files]:
    """The pictures of train/ and test/ where `root` has these two, else of all its folders as "all"."""
    names = {entry.name for entry in _visible(root, root)}
    if not {"train", "test"} <= names:
        return {"all": _classes(root, root)}
    for extra in sorted(names - {"train", "test"}):
        raise UsageError(f"{root / extra} is neither train/ nor test/: val is drawn from train, move it away")
    return {part: _classes(root / part, root) for part in ("train", "test")}


def _classes(folder: Path, root: Path) -> Files:
    found = {}
    for entry in _visible(folder, root):
        if not entry.is_dir():
            raise UsageError(f"{entry} is not a class folder: move it out of {folder}")
        found[entry.name] = _visible(entry, root)
        if not found[entry.name]:
            raise UsageError(f"{entry} is a class folder without pictures: fill or remove it")
        for file in found[entry.name]:
            if file.suffix.lower() not in PICTURES or not file.is_file():
                raise UsageError(f"{file} is not a picture ({', '.join(sorted(PICTURES))}): move it away")
    return found


def _visible(folder: Path, root: Path) -> list[Path]:
    """What `folder` holds, sorted by name, without hidden entries; a link must not lead out of `root`."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        if entry.is_symlink() and not entry.resolve().is_relative_to(root):
            raise UsageError(f"{entry} is a link out of {root}: put the file itself there")
    return entries


def _decoded(files: Sequence[Path], size: int, cache: Path) -> NDArray[np.uint8]:
    """The pictures [N, 3, size, size] as a read-only memory map; decoded unless the cache has them."""
    import PIL

    stats = [(str(file), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]
    key = hashlib.sha256(json.dumps([size, PIL.__version__, stats]).encode()).hexdigest()[:32]
    pixels, shape = cache / f"pictures-{key}.u8", (len(files), 3, size, size)
    if not pixels.is_file() or pixels.stat().st_size != math.prod(shape):
        log.info("decoding %d pictures into %s", len(files), pixels)
        with _writing(cache):
            _decode_all(files, size, pixels)
    return np.memmap(pixels, np.uint8, "r", shape=shape)


def _decode_all(files: Sequence[Path], size: int, pixels: Path) -> None:
    """Write the pictures one after another, a few in memory at a time; the file appears when it is whole."""
    threads = min(4, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(dir=pixels.parent) as scratch, ThreadPoolExecutor(threads) as pool:
        partial = Path(scratch) / pixels.name
        with partial.open("wb") as out:
            for start in range(0, len(files), 64):
                for picture in pool.map(decode, files[start : start + 64], repeat(size)):
                    out.write(picture.tobytes())
            out.flush()
            os.fsync(out.fileno())
        partial.replace(pixels)


def decode(file: Path, size: int) -> NDArray[np.uint8]:
    """One picture as RGB [3, size, size]: upright by its EXIF, centre square, antialiased, alpha dropped."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as picture:
            if picture.mode[0] in "IF":
                raise ValueError(f"more than 8 bits a channel, mode {picture.mode}")
            picture.draft("RGB", (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size
            upright = ImageOps.exif_transpose(picture)
            opaque = (upright.convert("RGBA") if upright.mode == "P" else upright).convert("RGB")
            square = ImageOps.fit(opaque, (size, size), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UsageError(f"unreadable picture {file} ({error}): replace or remove it") from error
    return np.asarray(square).transpose(2, 0, 1)
