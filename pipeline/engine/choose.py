"""Choose the engine and the tile size of a model. An engine is checked against the plain modules first."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pipeline.engine.fold import Fold
from pipeline.engine.stack import Loop, Stack

ENGINES: dict[str, type[Fold] | type[Loop]] = {"fold": Fold, "loop": Loop}


def find_head(module: nn.Module, example: Tensor) -> str | None:
    """Return the name of the linear layer whose output is the model's output, or None."""
    outputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear
    ]
    was_training = module.training
    with torch.no_grad():
        logits = module.eval()(example)
    module.train(was_training)
    for hook in hooks:
        hook.remove()
    return next((name for name, output in outputs.items() if output is logits), None)


MakeOptimizer = Callable[..., torch.optim.Optimizer]
PLAIN_SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def unfit_to_fold(
    modules: Sequence[nn.Module], shape: Sequence[int], batch_size: int, make_optimizer: MakeOptimizer = PLAIN_SGD
) -> str | None:
    """Return the reason why a full tile of these modules must not be folded, or None.

    In float64, three perturbed copies with different inputs must give the outputs, gradients and buffers of the plain
    modules (relative 1e-9). This holds in training at two batch sizes and in evaluation. The global random state must
    not change. In the working precision the bits of a replica must not depend on its slot, through two optimizer
    steps. Without padding they must not depend on the number of neighbours either.
    """
    try:
        return _unfaithful(modules, shape, batch_size) or _slot_dependent(modules, shape, batch_size, make_optimizer)
    except Exception as error:  # the model's own code fails with a stacked layer; the loop engine can run it
        return f"{type(error).__name__}: {error}".splitlines()[0]


Trace = dict[str, Tensor]


def _trace(stack: Stack, inputs: Tensor, output_weights: Tensor) -> list[Trace]:
    """Return outputs, gradients and buffers of every replica after one backward pass of sum(w * logits)."""
    stack.zero_grad()
    logits = stack(inputs.movedim(0, stack.replica_axis)).logits
    if stack.training:
        (logits * output_weights).sum().backward()
    traces = []
    for replica in range(stack.num_replicas):
        trace = {"output": logits[replica].detach()} | {f"state {k}": v for k, v in stack.weights(replica).items()}
        traces.append(trace | {f"gradient {k}": g.clone() for k, g in stack.gradients_of(replica).items()})
    return traces


def _perturbed(module: nn.Module, generator: torch.Generator) -> nn.Module:
    module = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.mul_((1 + 0.1 * noise).to(tensor)).add_((0.01 * noise).to(tensor))
    return module


def _unfaithful(modules: Sequence[nn.Module], shape: Sequence[int], batch_size: int) -> str | None:
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in modules[0].parameters()):
        return "its parameters have hooks, which a stacked copy loses"
    generator = torch.Generator().manual_seed(0)
    device = next(modules[0].parameters()).device
    copies = [_perturbed(modules[i % len(modules)], generator).double() for i in range(3)]
    if device.type == "cuda":  # plain dropout draws its masks with another kernel on a GPU
        for layer in (layer for module in copies for layer in module.modules() if isinstance(layer, nn.Dropout)):
            layer.p = 0.0
    num_classes = _num_classes(copies[0], shape, device)
    for training, size in ((True, batch_size), (True, max(2, batch_size // 2 - 1)), (False, batch_size)):
        inputs = torch.randn(3, size, *shape, generator=generator, dtype=torch.float64).to(device)
        weights = torch.randn(3, size, num_classes, generator=generator, dtype=torch.float64).to(device)
        fold = Fold(copies, range(3)).train(training)
        loop = Loop([copy.deepcopy(m) for m in copies], range(3)).train(training)
        before = torch.get_rng_state()
        folded = _trace(fold, inputs, weights)
        if not torch.equal(before, torch.get_rng_state()):
            return "it draws from the global random state"
        for ours, plain in zip(folded, _trace(loop, inputs, weights), strict=True):
            for name, exact in plain.items():
                scale = exact.abs().max() if exact.numel() else torch.tensor(0.0)
                if name not in ours or ours[name].shape != exact.shape:
                    return f"{name} has another shape"
                if not bool(((ours[name] - exact).abs() <= 1e-9 * scale + 1e-12).all()):
                    return f"{name} differs from the plain module's"
    return None


def _slot_dependent(
    modules: Sequence[nn.Module], shape: Sequence[int], batch_size: int, make_optimizer: MakeOptimizer
) -> str | None:
    """Check that copies of one module on one batch stay bitwise equal for two steps, in stacks of several sizes."""
    generator = torch.Generator().manual_seed(1)
    module = _perturbed(modules[0], generator)
    inputs, upstream = _batch([module], shape, batch_size, generator)
    tile = len(modules)
    traces = []
    for count in {tile} if pads_tiles(inputs.device) else {1, tile // 3 + 1, max(1, tile - 1), tile}:
        fold = Fold([module] * count, [0] * count)
        many, theirs = (tensor.expand(count, *tensor.shape[1:]) for tensor in (inputs, upstream))
        traces += _two_steps(fold, many, theirs, make_optimizer)
    seen: Trace = {}
    for name, bits in (item for trace in traces for item in trace.items()):
        if not _same_bits(seen.setdefault(name, bits), bits):
            return f"the bits of {name} depend on the slot or on the number of neighbours"
    return None


def fast_path_holds(
    modules: Sequence[nn.Module], shape: Sequence[int], batch_size: int, make_optimizer: MakeOptimizer = PLAIN_SGD
) -> bool:
    """Return True if two training steps of a full tile are bitwise equal with and without the fast path."""
    if Fold(modules[:1], [0], fast=True).fast_path is None:
        return False
    generator = torch.Generator().manual_seed(2)
    perturbed = [_perturbed(module, generator) for module in modules]
    batch = _batch(perturbed, shape, batch_size, generator)
    plain, fast = (
        _two_steps(Fold(perturbed, range(len(modules)), fast=fast), *batch, make_optimizer) for fast in (False, True)
    )
    pairs = ((ours[name], exact[name]) for ours, exact in zip(fast, plain, strict=True) for name in exact)
    return all(itertools.starmap(_same_bits, pairs))


def _batch(
    modules: Sequence[nn.Module], shape: Sequence[int], batch_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return inputs [R, B, ...] in the memory layout of training, and dL/dlogits [R, B, C]."""
    first = next(modules[0].parameters())
    inputs = torch.randn(batch_size, len(modules), *shape, generator=generator).to(first)
    num_classes = _num_classes(modules[0], shape, first.device)
    return inputs.movedim(1, 0), torch.randn(len(modules), batch_size, num_classes, generator=generator).to(first)


def _two_steps(fold: Fold, inputs: Tensor, upstream: Tensor, make_optimizer: MakeOptimizer) -> list[Trace]:
    """Return the tensors of every replica in two training steps. The second batch is shorter."""
    optimizer = make_optimizer(fold.train().parameters())
    batch_size = inputs.shape[1]
    traces = []
    for step, size in ((1, batch_size), (2, max(2, 3 * batch_size // 4 + 1))):
        found = _trace(fold, inputs[:, :size], upstream[:, :size])
        optimizer.step()
        traces.append([{f"{name} at step {step}": bits for name, bits in trace.items()} for trace in found])
    after = [{f"{name} after step 2": bits for name, bits in fold.weights(r).items()} for r in range(fold.num_replicas)]
    return [one | two | last for one, two, last in zip(*traces, after, strict=True)]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _num_classes(module: nn.Module, shape: Sequence[int], device: torch.device) -> int:
    module = copy.deepcopy(module).eval()
    parameter = next(module.parameters())
    with torch.no_grad():
        return int(module(torch.zeros(2, *shape, dtype=parameter.dtype, device=device)).shape[1])


def has_convolutions(module: nn.Module) -> bool:
    """Return True if the model has convolutions. They decide the engine and the tile size."""
    return any(isinstance(layer, nn.modules.conv._ConvNd) for layer in module.modules())


def choose_engine(
    requested: str,
    modules: Sequence[nn.Module],
    shape: Sequence[int],
    batch_size: int,
    make_optimizer: MakeOptimizer = PLAIN_SGD,
) -> tuple[str, str]:
    """Return the engine and the reason. The rule is static: a timing would change bits from machine to machine.

    Convolutions are not faster when folded on a CPU, so they run in the loop there. All other models are folded if
    `unfit_to_fold` returns None.
    """
    if requested == "loop":
        return "loop", "as configured"
    if requested == "auto" and has_convolutions(modules[0]) and next(modules[0].parameters()).device.type == "cpu":
        return "loop", "convolutions on a CPU gain nothing from folding"
    reason = unfit_to_fold(modules, shape, batch_size, make_optimizer)
    return ("loop", f"cannot be folded: {reason}") if reason else ("fold", "passed the check against plain modules")


def build_stack(
    engine: str, modules: Sequence[nn.Module], seeds: Sequence[int], head: str | None = None, fast: bool = False
) -> Stack:
    """Build the stack of these modules in an engine that `choose_engine` returned. Replica i has seed `seeds[i]`.

    Args:
        fast: use the engine's fast path. It requires `fast_path_holds` (fold) or `gains_channels_last` (loop).
    """
    return ENGINES[engine](modules, seeds, head, fast)


NARROW = 128  # channels: channels last makes a CNN of 32 and 64 1.6 times as fast, and ResNet-18 (up to 512) .96 times


def gains_channels_last(module: nn.Module) -> bool:
    """Return True if channels last makes a plain convolutional network faster on a CPU. The rule is static."""
    widths = [layer.out_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    return bool(widths) and max(widths) <= NARROW


TENSOR_BYTES = 2**25  # on a CPU, the allocation of a larger tensor costs more than folding saves


def tile_size(engine: str, module: nn.Module, batch_bytes: int, device: torch.device) -> int:
    """Return the number of replicas to train at once. It depends on the model, the batch and the kind of device."""
    if engine == "loop":
        return 4  # a larger tile is not faster
    if device.type == "cuda":
        return max(1, min(16, 2**27 // batch_bytes)) if has_convolutions(module) else 96
    largest = max(batch_bytes, *(p.numel() * p.element_size() for p in module.parameters()))
    return max(1, min(96, TENSOR_BYTES // largest))


def pads_tiles(device: torch.device) -> bool:
    """Return True if folded tiles are padded to their full size. A GPU chooses kernels by the number of replicas.

    At a fixed size the bits of a replica depend neither on its slot nor on its neighbours, so padding changes nothing.
    """
    return device.type == "cuda"
