"""Dataset: a pool of examples with three index splits. `take` gathers tensors from it.

A loader is a function that returns the result of `make_dataset`, which checks the data. The shipped loaders are in
`loaders`, `image_folder` and `soft_labels`; users can add their own.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from likelihood_lab.errors import UsageError

FLOAT_POOL_BYTES = 2**30  # a pool that would be larger as floats stays as loaded, and take() converts each batch
CHUNK_BYTES = 2**26  # working memory of a pass over the pool
SPLITS = ("train", "val", "test")


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
    """Pool of examples with three index splits. `make_dataset` builds it; `to` moves it to a device."""

    name: str
    classes: tuple[str, ...]
    digest: str  # sha256 of pixels, labels, targets, truth, splits and normalisation
    splits: dict[str, Tensor] = field(repr=False)  # "train", "val", "test" -> int64 indices into the pool
    labels: Tensor = field(repr=False)  # int64 [N]
    soft_targets: Tensor | None = field(repr=False)  # [N, K], float64
    truth: Tensor | None = field(repr=False)  # P(y | x) [N, K], float64
    images: Tensor = field(repr=False)  # [N, C, H, W] as loaded, on the host, possibly a memory map
    statistics: Normalisation = field(repr=False)  # float64 on the host
    pool: Tensor = field(repr=False)  # source of take(): normalised floats, or `images`
    normalisation: Normalisation | None = field(repr=False)  # None if the pool is already normalised
    dtype: torch.dtype = torch.float32

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Dataset:
        """Return the data on `device`, with inputs and targets in `dtype`, computed from the pixels on the host."""
        device = torch.device(device)
        pool, normalisation = _place(self.images, self.statistics, device, dtype)
        return replace(
            self,
            splits={name: indices.to(device) for name, indices in self.splits.items()},
            labels=self.labels.to(device),
            soft_targets=None if self.soft_targets is None else self.soft_targets.to(device),
            truth=None if self.truth is None else self.truth.to(device),
            pool=pool,
            normalisation=normalisation,
            dtype=dtype,
        )

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Gather inputs [*I, C, H, W] and labels [*I] of the examples `indices` [*I]."""
        device, flat = self.labels.device, indices.reshape(-1)
        inputs = self.pool.index_select(0, flat.to(self.pool.device))
        if self.normalisation is not None:
            inputs = self.normalisation.apply_(inputs.to(device).to(self.dtype))
        labels = self.labels.index_select(0, flat.to(device))
        return inputs.view(*indices.shape, *self.input_shape), labels.view(indices.shape)

    def target_probs(self, indices: Tensor) -> Tensor:
        """Return target distributions [*I, K]: soft if the dataset has them, otherwise the labels as one-hot."""
        indices = indices.to(self.labels.device)
        if self.soft_targets is not None:
            return self.soft_targets[indices].to(self.dtype)
        labels = self.labels[indices].unsqueeze(-1)
        return labels.new_zeros(*indices.shape, self.num_classes, dtype=self.dtype).scatter_(-1, labels, 1.0)

    def true_probs(self, indices: Tensor) -> Tensor | None:
        """Return P(y | x) of the examples [*I, K] in float64, or None if it is unknown."""
        return None if self.truth is None else self.truth[indices.to(self.truth.device)]


def make_dataset(
    name: str,
    images: Tensor | NDArray[np.generic],
    labels: ArrayLike,
    splits: Mapping[str, ArrayLike],
    classes: Sequence[str],
    target_probs: ArrayLike | None = None,
    truth: ArrayLike | None = None,
) -> Dataset:
    """Check the data and build a dataset on the CPU in float32.

    Args:
        images: [N, C, H, W], uint8 or floats, not normalised. They are not copied: a memory map stays one.
        labels: [N], counted from 0 in the order of `classes`.
        splits: indices of train, val and test.
        target_probs: targets [N, K], if they are not the labels.
        truth: P(y | x) [N, K], if it is known. It serves to evaluate models, not to train them.

    Raises:
        UsageError: the data are inconsistent.
    """
    images = _as_tensor(images)
    labels, splits = check_labels(name, labels, splits, classes)
    _check_images(name, images, len(labels))
    shape = [len(labels), len(classes)]
    soft = None if target_probs is None else _check_distributions(name, "target_probs", target_probs, shape)
    known = None if truth is None else _check_distributions(name, "truth", truth, shape)
    statistics = _statistics(images, splits["train"])
    parts = {"images": images, "labels": labels, "targets": soft, **splits, **statistics._asdict(), "truth": known}
    pool, normalisation = _place(images, statistics, torch.device("cpu"), torch.float32)
    return Dataset(
        name=name,
        classes=tuple(classes),
        splits=splits,
        digest=_digest(parts),
        labels=labels,
        soft_targets=soft,
        truth=known,
        images=images,
        statistics=statistics,
        pool=pool,
        normalisation=normalisation,
    )


def check_labels(
    name: str, labels: ArrayLike, splits: Mapping[str, ArrayLike], classes: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Check labels and splits and return them as int64 tensors."""
    require(len(classes) > 1, name, f"only {len(classes)} class(es): a classifier needs two or more")
    labels = _check_integers(name, "labels", labels, len(classes))
    require(set(splits) == set(SPLITS), name, f"splits are {sorted(splits)}, not train, val and test")
    indices = {part: _check_integers(name, f"the {part} split", splits[part], len(labels)) for part in SPLITS}
    for part, members in indices.items():
        require(len(members) > 0, name, f"the {part} split is empty")
    uses = torch.cat(list(indices.values())).bincount()
    require(int(uses.max()) == 1, name, f"example {int(uses.argmax())} is in the splits more than once")
    _check_classes(name, {part: set(labels[members].tolist()) for part, members in indices.items()}, classes)
    return labels, indices


def _check_classes(name: str, seen: dict[str, set[int]], classes: Sequence[str]) -> None:
    first, *others = sorted(seen["train"])
    require(bool(others), name, f"only one class, '{classes[first]}', in the train split")
    for part in ("val", "test"):
        for label in sorted(seen[part] - seen["train"]):
            require(False, name, f"class '{classes[label]}' is in {part} but not in train")


def _check_images(name: str, images: Tensor, count: int) -> None:
    shape = tuple(images.shape)
    require(len(shape) == 4 and 0 not in shape, name, f"images are {list(shape)}, not [N, C, H, W]")
    require(shape[0] == count, name, f"{shape[0]} images but {count} labels")
    floats = images.dtype.is_floating_point
    require(floats or images.dtype == torch.uint8, name, f"pixels are {images.dtype}, not uint8 or floats")
    if floats:
        finite = torch.cat([images[rows].isfinite().flatten(1).all(1) for rows in _chunks(images, shape[0])])
        require(bool(finite.all()), name, f"image {int(finite.int().argmin())} has NaN or infinite pixels")


def _check_distributions(name: str, what: str, values: ArrayLike, shape: list[int]) -> Tensor:
    """Check that the rows are probabilities and return `values` as float64 [N, K]."""
    probs = torch.as_tensor(np.array(values, dtype=np.float64))
    require(list(probs.shape) == shape, name, f"{what} are {list(probs.shape)}, not {shape}")
    good = (probs >= 0).all(1) & ((probs.sum(1) - 1).abs() <= 1e-5)  # False for NaN
    bad = int(good.int().argmin())
    require(bool(good.all()), name, f"{what} of example {bad} are not probabilities that sum to 1")
    return probs


def _check_integers(name: str, what: str, values: ArrayLike, limit: int) -> Tensor:
    """Check that all entries lie in [0, limit) and return `values` as an int64 vector."""
    array = np.asarray(values)
    require(array.dtype.kind in "iu" or array.size == 0, name, f"{what} are {array.dtype}, not integers")
    require(array.ndim == 1, name, f"{what} have shape {list(array.shape)}, not [N]")
    for value in array[(array < 0) | (array >= limit)][:1]:
        require(False, name, f"{what} hold {value}, out of range: 0 to {limit - 1} are possible")
    return torch.from_numpy(array.astype(np.int64))


def require(condition: bool, name: str, message: str) -> None:
    """Raise a UsageError about the dataset unless the condition holds."""
    if not condition:
        raise UsageError(f"dataset {name}: {message}")


def _as_tensor(images: Tensor | NDArray[np.generic]) -> Tensor:
    """Return a tensor that shares the array's memory. The memory may be read-only, as nothing writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.as_tensor(images)


def _chunks(images: Tensor, count: int) -> Iterator[slice]:
    """Split `count` rows into slices whose images take CHUNK_BYTES as float64."""
    rows = max(1, CHUNK_BYTES // (8 * images[0].numel()))
    return (slice(start, start + rows) for start in range(0, count, rows))


def _statistics(images: Tensor, train: Tensor) -> Normalisation:
    """Compute mean and population standard deviation of each channel over `train`, [C, 1, 1], in float64.

    For uint8 pixels both sums are exact (integers below 2^53) and hence the same on every machine. The standard
    deviation of a constant channel is replaced by 1.
    """
    total, squares = np.zeros(images.shape[1]), np.zeros(images.shape[1])
    for rows in _chunks(images, len(train)):
        block = images.index_select(0, train[rows]).double().flatten(2).numpy()  # NumPy sums in one fixed order
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
    """Move the pool to `device` and normalise it if it is small. A pool that does not fit on the device stays."""
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
