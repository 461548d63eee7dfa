"""Files that are written whole or not at all, and disk errors in one line."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pandas as pd
import torch
import yaml

from likelihood_lab.errors import UsageError, first_line


@contextmanager
def refusing_disk_errors(path: Path) -> Iterator[None]:
    """A disk that is full or read-only is not our bug: one line and exit code 2."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write to {path}: {error.strerror or error}; free space or choose another folder"
        ) from error


@contextmanager
def writing_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write so that readers see the old content or the new, never a part; its folder is made where absent."""
    draft = path.with_name(f".{path.name}-draft")
    with refusing_disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with writing_whole(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Strict JSON, written whole."""
    write_whole(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def parquet_bytes(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def torch_bytes(state: Mapping[str, Any]) -> bytes:
    """As `torch.save` writes it; to memory first, since on a full disk torch dies in ways of its own."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def yaml_bytes(value: Any) -> bytes:
    """YAML by libyaml, ten times as fast as the Python one."""
    text: str = yaml.dump(value, Dumper=yaml.CSafeDumper, sort_keys=False)
    return text.encode()


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of a trial's folder: a mapping."""
    try:
        found = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is damaged: {first_line(error)}; move its folder away and train again") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is damaged: it holds no mapping; move its folder away and train again")
    return found
