"""Linear sketch of the weights at a few steps, stored with every cell.

Because it is linear, the distance of two runs follows from their stored sketches: ||S a - S b|| = ||S (a - b)||.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EXACT = 2048  # up to this number of parameters the sketch is the parameters themselves
BUCKETS = 2039  # prime: a column of a weight matrix is spread over all buckets, for every width of the matrix


def snapshot_steps(last: int) -> list[int]:
    """Return the steps at which a sketch is taken: 1, 3, 10, 30, 100, ... and the last step."""
    steps = [base * 10**power for power in range(len(str(last))) for base in (1, 3)]
    return sorted({step for step in steps if step < last} | {last})


def sketch(parameters: Mapping[str, Tensor]) -> Tensor:
    r"""Return a float64 vector of at most 2048 numbers whose norm estimates the norm of all parameters.

    Up to 2048 parameters it is the parameters themselves, so distances are exact. For more, coordinates get fixed
    random signs and every 2039th is summed up: E ||S x||^2 = ||x||^2. The relative standard deviation is about
    sqrt(2 / 2039) = 3 % of the square, 1.6 % of the norm. Equal weights give equal sketches.
    Source: Charikar, Chen and Farach-Colton, *Finding frequent items in data streams*, 2002.
    """
    flat = torch.cat([tensor.detach().double().flatten() for tensor in parameters.values()])
    if flat.numel() <= EXACT:
        return flat.cpu()
    generator = torch.Generator().manual_seed(flat.numel())
    signs = torch.randint(0, 2, (flat.numel(),), generator=generator, dtype=torch.int8) * 2 - 1
    signed = flat * signs.to(flat.device)
    padding = -flat.numel() % BUCKETS
    return torch.nn.functional.pad(signed, (0, padding)).view(-1, BUCKETS).sum(0).cpu()


def sketch_distance(candidate: Tensor, reference: Tensor) -> Tensor:
    """Return ||theta_X - theta_A|| / ||theta_A|| from sketches [steps, width]; 0 where the weights are equal."""
    distance: Tensor = torch.linalg.vector_norm(candidate - reference, dim=-1)
    size: Tensor = torch.linalg.vector_norm(reference, dim=-1)
    return distance / size
