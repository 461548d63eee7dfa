"""Atomic file writes, and disk errors as one line. Imports neither torch nor pandas."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from likelihood_lab.errors import UsageError, first_line


@contextmanager
def refusing_disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of a full or read-only disk into a one-line `UsageError`."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write to {path}: {error.strerror or error}; free space or choose another folder"
        ) from error


@contextmanager
def writing_whole(path: Path, draft_name: str | None = None) -> Iterator[IO[bytes]]:
    """Open a file for an atomic write: readers see the old content or the new, never a part.

    The folder is created if absent. Processes that may write the file at the same time need different draft names.
    """
    draft = path.with_name(draft_name or f".{path.name}-draft")
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


def write_whole(path: Path, content: bytes, draft_name: str | None = None) -> None:
    """Write a file atomically."""
    with writing_whole(path, draft_name) as file:
        file.write(content)


def write_json(path: Path, value: Any, draft_name: str | None = None) -> None:
    """Write strict JSON atomically."""
    write_whole(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode(), draft_name)


def flush_to_disk(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(content: bytes) -> str:
    """Return the SHA-256 of the content in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def yaml_bytes(value: Any) -> bytes:
    """Return YAML, written by libyaml: ten times as fast as PyYAML's own writer."""
    text: str = yaml.dump(value, Dumper=yaml.CSafeDumper, sort_keys=False)
    return text.encode()


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file of a trial's folder.

    Raises:
        UsageError: the file is damaged or holds no mapping.
    """
    try:
        content = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is damaged: {first_line(error)}; move its folder away and train again") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is damaged: it holds no mapping; move its folder away and train again")
    return content
