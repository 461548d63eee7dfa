"""Detect side effects of a loss on its inputs, the random state and its own state, and its response to bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from likelihood_lab.audit.evaluate import Evaluation, Loss, evaluate, inputs, named_tensors, same_bits, scalar
from likelihood_lab.categorical.batches import AuditBatch, BatchShape, make_batch

OUT_OF_RANGE = 3  # classes beyond the last one
KEEPS_STATE = "keeps state: "


def _small_batch(shape: BatchShape, classes: int, seed: int = 8) -> AuditBatch:
    """Return four rows, none of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    return make_batch("random", (2, 2) if shape.tokens else (4,), classes, replace(shape, ignoring=False), generator)


def random_state(device: torch.device) -> Tensor:
    """Return the state of torch's global generator for this device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def state_of(loss: Loss) -> dict[str, Tensor]:
    """Return copies of the buffers and parameters of the modules behind a loss."""
    return {
        f"{i}.{name}": tensor.detach().clone()
        for i, module in enumerate(loss.modules)
        for name, tensor in named_tensors(module)
    }


def changed_state(loss: Loss, before: dict[str, Tensor]) -> list[str]:
    """Return the names of buffers and parameters that have changed."""
    changed = [
        name for name, tensor in state_of(loss).items() if name in before and not same_bits(tensor, before[name])
    ]
    return sorted({name.partition(".")[2] for name in changed})


def interleaved_effects(loss: Loss, shape: BatchShape, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Call the loss twice, then backpropagate both; each gradient must equal that of the call made alone."""
    batches = [_small_batch(shape, shape.num_classes[0], seed).at(dtype) for seed in (8, 9)]
    alone = [evaluate(loss, batch, dtype, device) for batch in batches]
    if any(result.error is not None for result in alone):
        return
    calls = []
    try:
        for batch in batches:
            leaves, loss_inputs = inputs(batch, loss.args, dtype, device)
            calls.append((list(leaves.values()), scalar(loss(loss_inputs, dtype, device))))
        for result, (leaves_of, value) in zip(alone, calls, strict=True):
            gradients = torch.autograd.grad(value, leaves_of, allow_unused=True)
            if not all(
                same_bits(None if g is None else g.cpu(), known)
                for g, known in zip(gradients, result.gradients.values(), strict=True)
            ):
                effect = "a second forward before the first backward changes the first gradient"
                yield f"{KEEPS_STATE}{effect} (breaks gradient accumulation)"
                return
    except Exception:  # the evaluation of the grid reports it
        return


def backward_effects(loss: Loss, shape: BatchShape, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Detect a second backward that differs or raises, and a gradient into soft targets."""
    leaves, loss_inputs = inputs(_small_batch(shape, shape.typical_classes).at(dtype), loss.args, dtype, device)
    wanted = list(leaves.values())
    targets = loss_inputs.get("target_probs") if shape.soft else None
    if targets is not None:
        wanted.append(targets.requires_grad_())
    try:
        value = scalar(loss(loss_inputs, dtype, device))
        gradients = torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True)
        first = [None if g is None else g.clone() for g in gradients]  # the memory may be that of the inputs
    except Exception:  # the evaluation of the grid reports it
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


# --- bad input


def bad_input_effects(
    loss: Loss, reference: Loss, shape: BatchShape, dtype: torch.dtype, device: torch.device
) -> Iterator[str]:
    """Say in which cases of bad input the loss responds otherwise than the reference. The riskiest case is last."""
    small = _small_batch(shape, shape.typical_classes).at(dtype)
    for name, change in _bad_inputs(shape).items():
        if name == "label_out_of_range" and device.type == "cuda":  # a device assertion would end the process
            continue
        if name == "label_out_of_range" and not {"labels"} <= {*loss.args} & {*reference.args}:
            continue
        batch = change(small)
        mine, other = (_response(evaluate(fn, batch, dtype, device)) for fn in (loss, reference))
        if mine != other:
            yield f"{name}: {mine}; the reference {other}"


def _bad_inputs(shape: BatchShape) -> dict[str, Callable[[AuditBatch], AuditBatch]]:
    changes: dict[str, Callable[[AuditBatch], AuditBatch]] = {}
    changes["nan_logits"] = lambda batch: (
        replace(batch, logits=_with_nan(batch.logits))
        if batch.hidden is None
        else replace(batch, hidden=_with_nan(batch.hidden))
    )
    if (ignored := shape.ignore_index) is not None:
        changes["all_ignored"] = lambda batch: replace(
            batch,
            labels=torch.full_like(batch.labels, ignored),
            target_probs=torch.zeros_like(batch.target_probs),
            valid=torch.zeros_like(batch.valid),
        )
    changes["label_out_of_range"] = lambda batch: replace(
        batch, labels=_with_first(batch.labels, batch.num_classes + OUT_OF_RANGE)
    )
    return changes


def _with_nan(tensor: Tensor) -> Tensor:
    return _with_first(tensor, torch.nan)


def _with_first(tensor: Tensor, entry: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[0] = entry
    return changed


def _response(result: Evaluation) -> str:
    if result.value is None:
        return "raises"
    gradient = next((g for g in result.gradients.values() if g is not None), None)
    value = _kind(result.value)
    return f"gives {value}" + (f", gradient {_kind(gradient)}" if gradient is not None else ", no gradient")


def _kind(tensor: Tensor) -> str:
    if tensor.isnan().any():
        return "NaN"
    if tensor.isinf().any():
        return "inf"
    return "0" if not tensor.any() else "a number"
