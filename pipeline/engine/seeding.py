"""Where random numbers come from, and what a seed changes.

Every use has a stream of its own, named by its seed and purpose. A seed changes all that is random, or one part of it
while the others stay those of seed 0:

all      initial weights, and everything that is drawn while training
weights  the initial weights alone
order    what is drawn while training alone: batch order, dropout masks, a loss's own random numbers
bit      the lowest bit of one initial weight, another one for every seed
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FIXED = 0  # the seed of what does not vary

SCOPE = {
    "all": "",
    "weights": " (initial weights alone)",
    "order": " (batch order, dropout and other draws alone)",
    "bit": " (one bit of one initial weight alone)",
}
"""What is said beside the seeds."""

_BITS = {4: torch.int32, 8: torch.int64}


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


@dataclass(frozen=True)
class Variation:
    """The seed of every source of randomness, and the bit that is flipped, given a replica's seed."""

    vary: str = "all"

    def initial(self, seed: int) -> int:
        """Of the initial weights."""
        return seed if self.vary in ("all", "weights") else FIXED

    def training(self, seed: int) -> int:
        """Of what is drawn while training."""
        return seed if self.vary in ("all", "order") else FIXED

    def touch(self, module: nn.Module, seed: int) -> nn.Module:
        """The module as it begins under a seed: as it is, or with the seed's bit flipped."""
        if self.vary == "bit":
            flip_lowest_bit(module, seed)
        return module


EVERYTHING = Variation()


@torch.no_grad()
def flip_lowest_bit(module: nn.Module, number: int) -> None:
    """Flip the lowest bit of one entry of the parameters, in place; different numbers choose different entries.

    Of an entry that is exactly 0 that makes the smallest denormal number, which the first step rounds away.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    entries = sum(parameter.numel() for parameter in parameters)
    shuffled = torch.randperm(entries, generator=torch.Generator().manual_seed(FIXED))
    place = int(shuffled[number % entries])
    for parameter in parameters:
        if place < parameter.numel():
            changed = parameter.flatten().clone()
            changed.view(_BITS[changed.itemsize])[place] ^= 1
            parameter.copy_(changed.view_as(parameter))
            return
        place -= parameter.numel()
