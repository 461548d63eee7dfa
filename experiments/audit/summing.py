"""Sums of exponentials and their logarithms, each with the additions in another order: [N, C] to [N]."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

CLASSES_AT_ONCE = 64
LN2 = math.log(2.0)


# sums over classes


class _OneByOne(torch.autograd.Function):
    """Sum over columns in their order, rounded after each addition, without a graph of C nodes."""

    @staticmethod
    def forward(ctx: Any, terms: Tensor) -> Tensor:
        ctx.columns = terms.shape[1]
        total = terms[:, 0].clone()
        for column in terms.T.contiguous()[1:].unbind():
            total += column
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return upstream[0][:, None].expand(-1, ctx.columns)


def one_by_one(terms: Tensor) -> Tensor:
    total: Tensor = _OneByOne.apply(terms)
    return total


def from_the_last(terms: Tensor) -> Tensor:
    return one_by_one(terms.flip(1))


def smallest_first(terms: Tensor) -> Tensor:
    return terms.sort(1).values.sum(1)


def largest_first_one_by_one(terms: Tensor) -> Tensor:
    return one_by_one(terms.sort(1, descending=True).values)


def in_halves(terms: Tensor, join: Callable[[Tensor, Tensor], Tensor] = torch.add) -> Tensor:
    """Join the first half of the columns with the second until one is left; an odd column waits."""
    while (width := terms.shape[1]) > 1:
        half = width // 2
        joined = join(terms[:, :half], terms[:, half : 2 * half])
        terms = torch.cat([joined, terms[:, 2 * half :]], 1)
    return terms[:, 0]


def dot_product(terms: Tensor) -> Tensor:
    return terms @ torch.ones_like(terms[0])


def in_blocks(terms: Tensor) -> Tensor:
    blocks: list[Tensor] = [block.sum(1) for block in terms.split(CLASSES_AT_ONCE, 1)]
    return reduce(torch.add, blocks)


# logarithms of the normaliser


def running_logcumsumexp(logits: Tensor) -> Tensor:
    return torch.logcumsumexp(logits, 1)[:, -1]


def logaddexp_in_halves(logits: Tensor) -> Tensor:
    return in_halves(logits, torch.logaddexp)


class _LogAddExpOneByOne(torch.autograd.Function):
    """a_c = log(exp a_(c-1) + exp z_c), and the chain rule back along it; the bits of torch.logaddexp, no graph."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        columns = logits.T.contiguous()
        running = torch.empty_like(columns)
        running[0] = columns[0]
        for before, column, after in zip(running.unbind(), columns[1:].unbind(), running[1:].unbind(), strict=False):
            torch.logaddexp(before, column, out=after)
        ctx.save_for_backward(columns, running)
        return running[-1].clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        columns, running = ctx.saved_tensors
        own = 1 + (running[:-1] - columns[1:]).exp()
        past = 1 + (columns[1:] - running[:-1]).exp()
        found = torch.empty_like(columns)
        carried = upstream[0].clone()
        parts = zip(found[1:].unbind(), own.unbind(), past.unbind(), strict=True)
        for place, by_own, by_past in reversed(list(parts)):
            torch.div(carried, by_own, out=place)
            carried /= by_past
        found[0] = carried
        return found.T


def logaddexp_one_by_one(logits: Tensor) -> Tensor:
    total: Tensor = _LogAddExpOneByOne.apply(logits)
    return total


def of_blocks(logits: Tensor) -> Tensor:
    """Compute logsumexp of the blocks' logsumexps."""
    return torch.stack([block.logsumexp(1) for block in logits.split(CLASSES_AT_ONCE, 1)], 1).logsumexp(1)


def online(logits: Tensor) -> Tensor:
    """Pass over blocks of classes once and rescale the running sum at each larger maximum (online softmax)."""
    top = logits.new_full((len(logits),), -math.inf)
    total = torch.zeros_like(top)
    for block in logits.split(CLASSES_AT_ONCE, 1):
        new = torch.maximum(top, block.detach().amax(1))
        total = total * (top - new).exp() + (block - new[:, None]).exp().sum(1)
        top = new
    return total.log() + top


def base_two(logits: Tensor) -> Tensor:
    top = logits.detach().amax(1, keepdim=True)
    return ((logits - top) / LN2).exp2().sum(1).log2() * LN2 + top[:, 0]


def log1p_of_others(logits: Tensor) -> Tensor:
    """Compute max + log1p(sum over the other classes of exp(z - max))."""
    top, place = logits.max(1)
    others = (logits - top[:, None]).exp().scatter(1, place[:, None], 0.0)
    return others.sum(1).log1p() + top


def shifted_by_the_middle(logits: Tensor) -> Tensor:
    middle = ((logits.amax(1) + logits.amin(1)) / 2).detach()
    return (logits - middle[:, None]).logsumexp(1) + middle
