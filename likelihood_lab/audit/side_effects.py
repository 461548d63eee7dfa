"""What a loss does besides returning a value: to its inputs, to the random state, to itself, and at bad labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from likelihood_lab.audit.evaluate import Evaluation, Loss, evaluate, inputs, numbers, same_bits, scalar
from likelihood_lab.categorical.batches import AuditBatch, BatchShape, make_batch

OUT_OF_RANGE = 3  # beyond the last class


def small_batch(shape: BatchShape) -> AuditBatch:
    """Four rows, none of them to be ignored."""
    draw = torch.Generator().manual_seed(8)
    classes = next((c for c in shape.num_classes if c >= 10), shape.num_classes[0])
    return make_batch("random", (2, 2) if shape.tokens else (4,), classes, replace(shape, ignoring=False), draw)


def random_state(device: torch.device) -> Tensor:
    """Where torch's generator of this device stands."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def state_of(loss: Loss) -> dict[str, Tensor]:
    """The buffers and parameters of the modules behind a loss, copied."""
    return {
        f"{i}.{name}": tensor.detach().clone()
        for i, module in enumerate(loss.modules)
        for name, tensor in numbers(module)
    }


def changed_state(loss: Loss, before: dict[str, Tensor]) -> list[str]:
    """The buffers whose bits are others than before."""
    changed = [
        name for name, tensor in state_of(loss).items() if name in before and not same_bits(tensor, before[name])
    ]
    return sorted({name.partition(".")[2] for name in changed})


def interleaved_effects(loss: Loss, shape: BatchShape, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Two calls before either backward, as gradient accumulation over a stack has them: neither may forget itself."""
    lead, asked = (2, 2) if shape.tokens else (4,), replace(shape, ignoring=False)
    draws = (torch.Generator().manual_seed(seed) for seed in (8, 9))
    batches = [make_batch("random", lead, shape.num_classes[0], asked, draw).at(dtype) for draw in draws]
    alone = [evaluate(loss, batch, dtype, device) for batch in batches]
    if any(found.error is not None for found in alone):
        return
    calls = []
    try:
        for batch in batches:
            leaves, given = inputs(batch, loss.args, dtype, device)
            calls.append((list(leaves.values()), scalar(loss(given, dtype, device))))
        for found, (leaves_of, value) in zip(alone, calls, strict=True):
            gradients = torch.autograd.grad(value, leaves_of, allow_unused=True)
            if not all(
                same_bits(None if g is None else g.cpu(), known)
                for g, known in zip(gradients, found.gradients.values(), strict=True)
            ):
                yield "keeps state: a call forgets what it was called with once another follows before its backward"
                return
    except Exception:  # told where the loss is judged
        return


def backward_effects(loss: Loss, shape: BatchShape, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """A second backward, and gradients that go into soft targets."""
    leaves, given = inputs(small_batch(shape).at(dtype), loss.args, dtype, device)
    wanted = list(leaves.values())
    targets = given.get("target_probs") if shape.soft else None
    if targets is not None:
        wanted.append(targets.requires_grad_())
    try:
        value = scalar(loss(given, dtype, device))
        found = torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True)
        first = [None if gradient is None else gradient.clone() for gradient in found]  # it may lie in the inputs
    except Exception:  # told where the loss is judged
        return
    try:
        second = torch.autograd.grad(value, wanted, allow_unused=True)
    except RuntimeError:
        yield "refuses a second backward"
        return
    if not all(same_bits(a, b) for a, b in zip(first, second, strict=True)):
        yield "second backward differs"
    if targets is not None and second[-1] is not None and bool(second[-1].any()):
        yield "gradient into target_probs"


# --- policies: what happens where the inputs are not what they should be


def policies(loss: Loss, reference: Loss, shape: BatchShape, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Where a loss answers bad input otherwise than the reference, in words; the most dangerous question last."""
    small = small_batch(shape).at(dtype)
    for name, change in _questions(shape).items():
        if name == "label_out_of_range" and device.type == "cuda":  # an assertion there ends all later calls
            continue
        if name == "label_out_of_range" and not {"labels"} <= {*loss.args} & {*reference.args}:
            continue
        batch = change(small)
        mine, other = (_answer(evaluate(asked, batch, dtype, device)) for asked in (loss, reference))
        if mine != other:
            yield f"{name}: {mine}; the reference {other}"


def _questions(shape: BatchShape) -> dict[str, Callable[[AuditBatch], AuditBatch]]:
    questions: dict[str, Callable[[AuditBatch], AuditBatch]] = {}
    questions["nan_logits"] = lambda batch: (
        replace(batch, logits=_with_nan(batch.logits))
        if batch.hidden is None
        else replace(batch, hidden=_with_nan(batch.hidden))
    )
    if (ignored := shape.ignore_index) is not None:
        questions["all_ignored"] = lambda batch: replace(
            batch,
            labels=torch.full_like(batch.labels, ignored),
            target_probs=torch.zeros_like(batch.target_probs),
            valid=torch.zeros_like(batch.valid),
        )
    questions["label_out_of_range"] = lambda batch: replace(
        batch, labels=batch.labels.masked_fill(_first(batch.labels), batch.num_classes + OUT_OF_RANGE)
    )
    return questions


def _first(labels: Tensor) -> Tensor:
    mask = torch.zeros(labels.numel(), dtype=torch.bool)
    mask[0] = True
    return mask.view(labels.shape)


def _with_nan(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[0] = torch.nan
    return changed


def _answer(found: Evaluation) -> str:
    if found.value is None:
        return "raises"
    gradient = next((g for g in found.gradients.values() if g is not None), None)
    value = _kind(found.value)
    return f"gives {value}" + (f", gradient {_kind(gradient)}" if gradient is not None else ", no gradient")


def _kind(tensor: Tensor) -> str:
    if tensor.isnan().any():
        return "NaN"
    if tensor.isinf().any():
        return "inf"
    return "0" if not tensor.any() else "a number"
