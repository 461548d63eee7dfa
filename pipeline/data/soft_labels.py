"""Datasets with distributions as labels: CIFAR-10H, and a synthetic teacher whose P(y | x) is known."""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from likelihood_lab.errors import UsageError, first_line
from pipeline.data.dataset import Dataset, make_dataset, require
from pipeline.data.image_folder import picture_errors, refuse_bombs
from pipeline.data.loaders import check_inside, random_state, split_pool
from pipeline.runtime import home_expanded

CIFAR10H = "LIKELIHOOD_LAB_CIFAR10H"  # environment variable used if `root` is null
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ANNOTATIONS = "test_annotations.csv"
WHERE = (
    f"set dataset.root or {CIFAR10H} to a folder, or its .tar.gz, that has CIFAR-10's test pictures as "
    f"test/<class>/*.jpg and {ANNOTATIONS}: a path and ten counts a line, from github.com/jcpeterson/cifar-10h"
)
UNPACKED_BYTES = 2**28  # limit for an unpacked archive; the published one has 0.03 GB
SIDE = 8  # the input of the teacher is a Gaussian image, SIDE x SIDE, which every model accepts
HIDDEN = 32
TEACHER_NUMBERS = 2**29  # limit for the inputs and for the probabilities of a teacher: 4 GB

# --- CIFAR-10H


def cifar10h(root: str | None = None, data_seed: int = 0, val: int = 500, test: int = 2000) -> Dataset:
    """Load CIFAR-10's 10 000 test pictures with the choices of about 51 people each (Peterson et al. 2019).

    Targets are the shares of people that chose each class. The shares also serve as an estimate of P(y | x). Labels are
    those of CIFAR-10, even if the majority of people disagrees.
    """
    name, source = "cifar10h", root or os.environ.get(CIFAR10H)
    if not source:
        raise UsageError(f"dataset {name} is not here: {WHERE}")
    files = _read_files(name, home_expanded(source))
    paths, counts = _read_annotations(name, files)
    with refuse_bombs():
        pictures = np.stack([_decode(name, path, files[path]) for path in paths])
    labels = np.array([CIFAR10_CLASSES.index(PurePosixPath(path).parent.name) for path in paths])
    shares = counts / counts.sum(1, keepdims=True)
    splits = split_pool(labels, val, test, data_seed)
    return make_dataset(name, pictures, labels, splits, CIFAR10_CLASSES, target_probs=shares, truth=shares)


def _read_files(name: str, root: Path) -> Mapping[str, bytes]:
    """Read the test pictures and the annotations by path. An archive is read in memory and not unpacked to disk."""
    require(root.exists(), name, f"there is no {root}: {WHERE}")
    try:
        files = dict(_read_folder(root) if root.is_dir() else _read_archive(name, root))
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UsageError(
            f"dataset {name}: {root} is unreadable or no .tar.gz ({first_line(error)}): {WHERE}"
        ) from error
    require(ANNOTATIONS in files, name, f"{root} has no {ANNOTATIONS}: {WHERE}")
    return files


def _read_folder(root: Path) -> Iterator[tuple[str, bytes]]:
    for path in filter(Path.is_file, (*root.glob(ANNOTATIONS), *root.glob("test/*/*.jpg"))):
        yield path.relative_to(root).as_posix(), check_inside(path, root).read_bytes()


def _read_archive(name: str, path: Path) -> Iterator[tuple[str, bytes]]:
    """Read the pictures and annotations from the archive, at any folder depth. Links are skipped."""
    with gzip.open(path) as stream:
        unpacked = stream.read(UNPACKED_BYTES + 1)
    require(len(unpacked) <= UNPACKED_BYTES, name, f"{path} unpacks to more than {UNPACKED_BYTES} bytes: {WHERE}")
    with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            wanted = parts[-1:] == (ANNOTATIONS,) or (parts[-3:-2] == ("test",) and member.name.endswith(".jpg"))
            if wanted and member.isfile() and (content := archive.extractfile(member)) is not None:
                yield "/".join(parts[-1:] if parts[-1] == ANNOTATIONS else parts[-3:]), content.read()


def _read_annotations(name: str, files: Mapping[str, bytes]) -> tuple[list[str], NDArray[np.int64]]:
    """Read the paths, and the numbers of people that chose each class [N, 10]."""
    try:
        table = list(csv.reader(io.StringIO(files[ANNOTATIONS].decode("utf-8", "replace"))))
    except csv.Error as error:
        raise UsageError(f"dataset {name}: {ANNOTATIONS} is no table ({first_line(error)}): {WHERE}") from error
    header, *lines = [line for line in table if line] or [[]]
    expected = ["path", *CIFAR10_CLASSES]
    require(header == expected, name, f"{ANNOTATIONS} begins with '{','.join(header)}', not {','.join(expected)}")
    paths = [line[0] for line in lines]
    require(bool(lines), name, f"{ANNOTATIONS} has no picture")
    require(len(set(paths)) == len(paths), name, f"{ANNOTATIONS} has a picture twice")
    for path in paths:
        kind = PurePosixPath(path).parent.name
        require(kind in CIFAR10_CLASSES, name, f"{ANNOTATIONS}: {path} is in no class folder of CIFAR-10's")
        require(path in files, name, f"{ANNOTATIONS} names {path}, which is not there")
    return paths, np.array([_parse_counts(name, *line) for line in lines])


def _parse_counts(name: str, path: str, *counts: str) -> list[int]:
    whole = len(counts) == len(CIFAR10_CLASSES) and all(count.isdecimal() and len(count) < 7 for count in counts)
    require(whole, name, f"{ANNOTATIONS}: {path} has {','.join(counts)[:80] or 'nothing'}, not ten counts")
    require(any(map(int, counts)), name, f"{ANNOTATIONS}: nobody has annotated {path}; remove its line")
    return list(map(int, counts))


def _decode(name: str, path: str, content: bytes) -> NDArray[np.uint8]:
    """Decode a picture to RGB [3, 32, 32]."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as picture:
            size, pixels = picture.size, np.asarray(picture.convert("RGB"))
    except picture_errors() as error:
        raise UsageError(f"dataset {name}: unreadable picture {path} ({first_line(error)}): replace it") from error
    require(size == (32, 32), name, f"{path} is {size[0]} x {size[1]}, not 32 x 32")
    return pixels.transpose(2, 0, 1)


# --- a teacher


def teacher(
    labels: Literal["soft", "sampled"] = "soft",
    data_seed: int = 0,
    num_classes: int = 10,
    sharpness: float = 5.0,
    train: int = 4000,
    val: int = 500,
    test: int = 2000,
) -> Dataset:
    """Generate Gaussian inputs with P(y | x) = softmax(sharpness * V tanh(W x)), all random numbers from `data_seed`.

    With soft labels, the targets are P and the label is its most probable class. With sampled labels, labels are drawn
    from P and targets are one-hot.
    """
    require(labels in ("soft", "sampled"), "teacher", f"labels={labels}: choose soft or sampled")
    require(math.isfinite(sharpness), "teacher", f"sharpness={sharpness}: give a finite number")
    require(num_classes > 1, "teacher", f"num_classes={num_classes}: give 2 or more")
    require(min(train, val, test) > 0, "teacher", "train, val and test have to be 1 or more")
    most = TEACHER_NUMBERS // max(SIDE * SIDE, num_classes)
    require(train + val + test <= most, "teacher", f"train, val and test may be {most} together, not more")
    generator, count, pixels = random_state(data_seed), train + val + test, SIDE * SIDE
    inner = generator.standard_normal((pixels, HIDDEN)) / np.sqrt(pixels)
    outer = generator.standard_normal((HIDDEN, num_classes)) / np.sqrt(HIDDEN)
    inputs = generator.standard_normal((count, pixels))
    truth = softmax(sharpness * np.tanh(inputs @ inner) @ outer, axis=1)
    below = truth.cumsum(1)[:, :-1] < generator.random_sample((count, 1))
    return make_dataset(
        "teacher",
        inputs.reshape(count, 1, SIDE, SIDE).astype(np.float32),
        truth.argmax(1) if labels == "soft" else below.sum(1),
        {"train": range(train), "val": range(train, train + val), "test": range(train + val, count)},
        [str(label) for label in range(num_classes)],
        target_probs=truth if labels == "soft" else None,
        truth=truth,
    )
