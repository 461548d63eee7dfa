"""Where random numbers come from: every use has a stream of its own, named by its seed and purpose."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed for one purpose, such as `derive_seed(seed, "order", epoch)`; distinct parts, distinct streams."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


class RandomStream:
    """A position in torch's global random number generators that can be resumed again and again.

    Code that draws from the global generators, such as dropout in a plain module or a loss that adds noise, runs
    inside `with stream.resumed():` and so neither sees nor moves anybody else's randomness.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        with self._saved():
            torch.manual_seed(seed)
            self._start = self._state = self._read()

    def restarted(self) -> RandomStream:
        """The same stream, back where it began."""
        self._state = self._start
        return self

    @property
    def moved(self) -> bool:
        """Whether anything was drawn from it."""
        return not all(map(torch.equal, self._start, self._state))

    @property
    def position(self) -> list[Tensor]:
        """Where it was left: the states of the generators."""
        return self._state

    @position.setter
    def position(self, state: list[Tensor]) -> None:
        self._state = state

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(self._cuda)] if self._cuda else [])

    def _write(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if self._cuda:
            torch.cuda.set_rng_state(state[1], self._cuda)

    @contextmanager
    def _saved(self) -> Iterator[None]:
        outside = self._read()
        try:
            yield
        finally:
            self._write(outside)

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """The global generators stand where this stream was left; afterwards as they were before."""
        with self._saved():
            self._write(self._state)
            try:
                yield
            finally:
                self._state = self._read()
