"""Machine settings: device, threads, determinism, allocator, cache folder, environment record and git state."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from likelihood_lab.errors import UsageError


def cache_dir(cache: str | None = None) -> Path:
    """Return the cache folder: `cache`, $LIKELIHOOD_LAB_CACHE or ~/.cache/likelihood-lab; create it if absent."""
    folder = home_expanded(cache or os.environ.get("LIKELIHOOD_LAB_CACHE") or "~/.cache/likelihood-lab")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn write errors in the cache folder into one-line `UsageError`s."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write to the cache {folder} ({error}): set LIKELIHOOD_LAB_CACHE to a folder with space"
        ) from error


def home_expanded(path: str) -> Path:
    """Expand ~ as a shell does; unlike pathlib, leave the name of an unknown user as it is."""
    return Path(os.path.expanduser(path))


def choose_device(accelerator: str) -> torch.device:
    """Return the first GPU, or the CPU if there is no GPU or `accelerator` is `cpu`."""
    available = torch.cuda.is_available()
    if accelerator == "gpu" and not available:
        raise UsageError("trainer=gpu, but torch sees no CUDA GPU here; use trainer=auto or trainer=cpu")
    return torch.device("cuda:0" if available and accelerator != "cpu" else "cpu")


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks: every step allocates the same megabytes, and fresh pages cost page faults."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**25)


def set_numerics(threads: int) -> None:
    """Set what decides the bits of results: number of threads, no TF32, deterministic kernels."""
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@functools.cache
def environment_record(device: torch.device) -> dict[str, Any]:
    """Return the device, platform and versions that results depend on."""
    cuda, cpu = device.type == "cuda", torch.backends.cpu.get_cpu_capability()
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu ({cpu})",
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if cuda else None,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def git_state(root: Path) -> dict[str, str]:
    """Return the commit around `root` and whether files changed, as tags; empty without a repository."""
    try:
        commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git.commit": commit, "git.dirty": "true" if changes else "false"}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)  # noqa: S603
    return done.stdout.strip()
