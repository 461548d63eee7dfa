"""Loader of a folder of pictures, which are decoded once into a memory-mapped file."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import struct
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from likelihood_lab.errors import UsageError, first_line
from pipeline.data.dataset import Dataset, check_labels, make_dataset, require
from pipeline.data.loaders import check_inside, split_pool, split_training_set
from pipeline.runtime import cache_dir, home_expanded, writing

PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
LARGEST_SIDE = 4096  # pixels; limit for `size`

Files = Mapping[str, Sequence[Path]]  # class -> its pictures

log = logging.getLogger(__name__)


def image_folder(
    root: str,
    size: int = 256,
    data_seed: int = 0,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    cache: str | None = None,
) -> Dataset:
    """Load pictures from root/train/<class>/ and root/test/<class>/, or from root/<class>/, split by `data_seed`.

    Each picture is decoded once to RGB [3, size, size]. The pixels stay in a memory-mapped file under `cache`.
    """
    name, folder = "image_folder", home_expanded(root).resolve()
    require(folder.is_dir(), name, f"there is no folder {folder}: set dataset.root")
    require(0 < size <= LARGEST_SIDE, name, f"size={size}: give the side in pixels, from 1 to {LARGEST_SIDE}")
    for key, fraction in {"val_fraction": val_fraction, "test_fraction": test_fraction}.items():
        require(0 < fraction < 1, name, f"{key}={fraction}: give a fraction between 0 and 1")
    parts = _parts(folder)
    files = [file for part in parts.values() for found in part.values() for file in found]
    require(bool(files), name, f"{folder} has no class folders with pictures")
    classes = sorted({kind for part in parts.values() for kind in part})
    number = {kind: label for label, kind in enumerate(classes)}
    labels = np.array([number[file.parent.name] for file in files])
    if "test" in parts:
        train = sum(map(len, parts["train"].values()))
        splits = split_training_set(labels, train, round(val_fraction * train), data_seed)
    else:
        val, test = round(val_fraction * len(files)), round(test_fraction * len(files))
        splits = split_pool(labels, val, test, data_seed)
    check_labels(name, labels, splits, classes)  # before the long decoding
    return make_dataset(name, _load_pixels(files, size, cache_dir(cache)), labels, splits, classes)


def _parts(root: Path) -> dict[str, Files]:
    """List the pictures of train/ and test/ if `root` has both, otherwise those of all folders as "all"."""
    names = {entry.name for entry in _list_visible(root, root)}
    if not {"train", "test"} <= names:
        return {"all": _classes(root, root)}
    for extra in sorted(names - {"train", "test"}):
        raise UsageError(f"{root / extra} is neither train/ nor test/: val is drawn from train, move it away")
    return {part: _classes(root / part, root) for part in ("train", "test")}


def _classes(folder: Path, root: Path) -> Files:
    found = {}
    for entry in _list_visible(folder, root):
        if not entry.is_dir():
            raise UsageError(f"{entry} is not a class folder: move it out of {folder}")
        found[entry.name] = _list_visible(entry, root)
        if not found[entry.name]:
            raise UsageError(f"{entry} is a class folder without pictures: fill or remove it")
        for file in found[entry.name]:
            if file.suffix.lower() not in PICTURES or not file.is_file():
                raise UsageError(f"{file} is not a picture ({', '.join(sorted(PICTURES))}): move it away")
    return found


def _list_visible(folder: Path, root: Path) -> list[Path]:
    """List the entries of `folder` by name, without hidden ones. A link must not lead out of `root`."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        if entry.is_symlink():
            check_inside(entry, root)
    return entries


def _load_pixels(files: Sequence[Path], size: int, cache: Path) -> NDArray[np.uint8]:
    """Return the pictures [N, 3, size, size] as a read-only memory map. Decode them if they are not in the cache."""
    import PIL

    stats = [(str(file), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]
    key = hashlib.sha256(json.dumps([size, PIL.__version__, stats]).encode()).hexdigest()[:32]
    pixels, shape = cache / f"pictures-{key}.u8", (len(files), 3, size, size)
    if not pixels.is_file() or pixels.stat().st_size != math.prod(shape):
        log.info("decoding %d pictures into %s", len(files), pixels)
        with writing(cache), refuse_bombs():
            _decode_all(files, size, pixels)
    return np.memmap(pixels, np.uint8, "r", shape=shape)


def _decode_all(files: Sequence[Path], size: int, pixels: Path) -> None:
    """Decode the pictures in groups of 64 into a temporary file, then rename it."""
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


@contextmanager
def refuse_bombs() -> Iterator[None]:
    """Make Pillow raise for a decompression bomb, and silence its warnings about metadata.

    Enter it before starting threads: warning filters belong to the process.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode(file: Path, size: int) -> NDArray[np.uint8]:
    """Decode a picture to RGB [3, size, size]: rotated by EXIF, centre square, antialiased, without alpha."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as picture:
            if picture.mode[0] in "IF":
                raise ValueError(f"more than 8 bits a channel, mode {picture.mode}")
            picture.draft("RGB", (2 * size, 2 * size))  # decode a large JPEG at a fraction of its size
            upright = ImageOps.exif_transpose(picture)
            opaque = (upright.convert("RGBA") if upright.mode == "P" else upright).convert("RGB")
            square = ImageOps.fit(opaque, (size, size), Image.Resampling.BILINEAR)
    except picture_errors() as error:
        raise UsageError(f"unreadable picture {file} ({first_line(error)}): replace or remove it") from error
    return np.asarray(square).transpose(2, 0, 1)


def picture_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of Pillow for a damaged file, a file that is no picture and a decompression bomb."""
    from PIL import Image

    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    return (OSError, ValueError, SyntaxError, EOFError, struct.error, *bombs)
