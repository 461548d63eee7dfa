"""What a seed changes: all that is random, or one part of it while the others stay those of seed 0.

all      initial weights, and everything that is drawn while training
weights  the initial weights alone
order    what is drawn while training alone: batch order, dropout masks, a loss's own random numbers
bit      the lowest bit of one initial weight, another one for every seed
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

FIXED = 0  # the seed of what does not vary

SCOPE = {
    "all": "",
    "weights": " (initial weights alone)",
    "order": " (batch order, dropout and other draws alone)",
    "bit": " (one bit of one initial weight alone)",
}
"""What is said beside the seeds."""

_BITS = {4: torch.int32, 8: torch.int64}


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
