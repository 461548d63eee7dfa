"""Streams of random numbers, and the meaning of a seed.

Every use of random numbers has a separate stream, named by seed and purpose. The key `vary` says which streams depend
on the seed. The others use seed 0:

all      initial weights, and all draws during training
weights  initial weights only
order    draws during training only: batch order, dropout masks, random numbers of a loss
bit      only the lowest bit of one initial weight; every seed flips another weight
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FIXED = 0  # seed of the streams that do not depend on the replica's seed

SCOPE = {
    "all": "",
    "weights": " (initial weights alone)",
    "order": " (batch order, dropout and other draws alone)",
    "bit": " (one bit of one initial weight alone)",
}
"""Text that follows the seeds in a verdict, for each value of `vary`."""

_BITS = {4: torch.int32, 8: torch.int64}


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed for one purpose, such as `derive_seed(seed, "order", epoch)`."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


class RandomStream:
    """Separate stream of torch's global random number generators, which can be resumed many times.

    Code that draws from the global generators runs inside `with stream.resumed():`. Examples are dropout in a plain
    module, and a loss that adds noise. Its draws neither depend on other streams nor change them.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        with self._saved():
            torch.manual_seed(seed)
            self._start = self.position = self._read()  # the states of the generators

    def restarted(self) -> RandomStream:
        """Reset the stream to its start and return it."""
        self.position = self._start
        return self

    @property
    def moved(self) -> bool:
        """True if random numbers were drawn from the stream."""
        return not all(map(torch.equal, self._start, self.position))

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
        """Set the global generators to this stream inside the block, and restore them afterwards."""
        with self._saved():
            self._write(self.position)
            try:
                yield
            finally:
                self.position = self._read()


@dataclass(frozen=True)
class Variation:
    """Seeds of the initial weights and of the training draws, given the seed of a replica."""

    vary: str = "all"

    def initial(self, seed: int) -> int:
        """Return the seed of the initial weights."""
        return seed if self.vary in ("all", "weights") else FIXED

    def training(self, seed: int) -> int:
        """Return the seed of all draws during training."""
        return seed if self.vary in ("all", "order") else FIXED

    def touch(self, module: nn.Module, seed: int) -> nn.Module:
        """Return the module, with one bit flipped if `vary` is `bit`."""
        if self.vary == "bit":
            flip_lowest_bit(module, seed)
        return module


EVERYTHING = Variation()


@torch.no_grad()
def flip_lowest_bit(module: nn.Module, number: int) -> None:
    """Flip the lowest bit of one entry of the parameters, in place. Different numbers choose different entries.

    If the entry is exactly 0, the flip gives the smallest subnormal, which the first update rounds away.
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
