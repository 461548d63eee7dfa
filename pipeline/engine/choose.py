"""Which engine may run a model: a check against the plain modules, and the size of a tile."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pipeline.engine.fold import Fold
from pipeline.engine.stack import Loop, Stack

ENGINES: dict[str, type[Fold] | type[Loop]] = {"fold": Fold, "loop": Loop}


def find_head(module: nn.Module, example: Tensor) -> str | None:
    """The name of the linear layer whose output is the model's output, or None where there is none."""
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
    """Why a full tile of these modules must not be folded, or None: what every fold passes before it trains.

    In float64, three perturbed copies on inputs of their own must give the outputs, gradients and buffers that
    the plain modules give (relative 1e-9), in training at two batch sizes and in evaluation, and must leave the
    global random state alone. In the working precision a replica must keep its bits in any slot through two steps
    of the optimizer, and, where tiles are not padded, among any number of neighbours.
    """
    try:
        return _unfaithful(modules, shape, batch_size) or _slot_dependent(modules, shape, batch_size, make_optimizer)
    except Exception as error:  # a twin that the model's own code cannot work with; the loop can
        return f"{type(error).__name__}: {error}".splitlines()[0]


Trace = dict[str, Tensor]


def _trace(stack: Stack, inputs: Tensor, output_weights: Tensor) -> list[Trace]:
    """Outputs, gradients and buffers of every replica after one backward pass of sum(w * logits)."""
    stack.zero_grad()
    logits = stack(inputs.movedim(0, stack.replica_axis)).logits
    if stack.training:
        (logits * output_weights).sum().backward()
    traces = []
    for replica in range(stack.num_replicas):
        trace = {"output": logits[replica].detach()} | {f"state {k}": v for k, v in stack.weights(replica).items()}
        traces.append(trace | {f"gradient {k}": g for k, g in _gradients(stack, replica)})
    return traces


def _gradients(stack: Stack, replica: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(stack, Fold):
        named = stack.folded.named_parameters()
        return ((name, p.grad[replica].clone()) for name, p in named if p.grad is not None)
    assert isinstance(stack, Loop)  # noqa: S101 - there are two engines
    named = stack.replicas[replica].named_parameters()
    return ((name, p.grad.clone()) for name, p in named if p.grad is not None)


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
    if device.type == "cuda":  # plain dropout draws its masks with another kernel there
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
    """Copies of one module on one batch must stay equal, bit for bit, through two steps in stacks of several sizes."""
    generator = torch.Generator().manual_seed(1)
    module = _perturbed(modules[0], generator)
    inputs, upstream = _batch([module], shape, batch_size, generator)
    tile = len(modules)
    traces = []
    for count in {tile} if pads(inputs.device) else {1, tile // 3 + 1, max(1, tile - 1), tile}:
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
    """Whether a full tile of these modules gives the same bits with the fast path as without, through two steps."""
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
    """Inputs [R, B, ...], laid out as in training, and dL/dlogits [R, B, C]."""
    first = next(modules[0].parameters())
    inputs = torch.randn(batch_size, len(modules), *shape, generator=generator).to(first)
    num_classes = _num_classes(modules[0], shape, first.device)
    return inputs.movedim(1, 0), torch.randn(len(modules), batch_size, num_classes, generator=generator).to(first)


def _two_steps(fold: Fold, inputs: Tensor, upstream: Tensor, make_optimizer: MakeOptimizer) -> list[Trace]:
    """Every replica's bits in two steps of training, the second on a short batch."""
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


def convolves(module: nn.Module) -> bool:
    """Whether the model has convolutions, which decides the engine and the tile."""
    return any(isinstance(layer, nn.modules.conv._ConvNd) for layer in module.modules())


def choose_engine(
    requested: str,
    modules: Sequence[nn.Module],
    shape: Sequence[int],
    batch_size: int,
    make_optimizer: MakeOptimizer = PLAIN_SGD,
) -> tuple[str, str]:
    """The engine to use and the reason, by a static rule; timing would change bits from machine to machine.

    Convolutions gain nothing from folding on a CPU, so they run in the loop there. Everything else is folded if it
    passes `unfit_to_fold`.
    """
    if requested == "loop":
        return "loop", "as configured"
    if requested == "auto" and convolves(modules[0]) and next(modules[0].parameters()).device.type == "cpu":
        return "loop", "convolutions on a CPU gain nothing from folding"
    reason = unfit_to_fold(modules, shape, batch_size, make_optimizer)
    return ("loop", f"cannot be folded: {reason}") if reason else ("fold", "passed the check against plain modules")


def build_stack(
    engine: str, modules: Sequence[nn.Module], seeds: Sequence[int], head: str | None = None, fast: bool = False
) -> Stack:
    """The stack of these modules, replica i seeded with `seeds[i]`, in the engine that `choose_engine` named.

    Args:
        fast: whether to take the engine's fast path: in fold where `fast_path_holds`, in the loop where a network
            `gains_channels_last`.
    """
    return ENGINES[engine](modules, seeds, head, fast)


NARROW = 128  # channels; a CNN of 32 and 64 is 1.6 times as fast with channels last, ResNet-18 with up to 512 is .96


def gains_channels_last(module: nn.Module) -> bool:
    """Whether a plain convolutional network is trained faster on a CPU with channels last: a static rule."""
    widths = [layer.out_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    return bool(widths) and max(widths) <= NARROW


TENSOR_BYTES = 2**25  # on a CPU, allocating a tensor beyond this costs more than folding saves


def tile_size(engine: str, module: nn.Module, batch_bytes: int, device: torch.device) -> int:
    """How many replicas are trained at once, by a static rule of the model, the batch and the kind of device."""
    if engine == "loop":
        return 4  # nothing is gained by more
    if device.type == "cuda":
        return max(1, min(16, 2**27 // batch_bytes)) if convolves(module) else 96
    largest = max(batch_bytes, *(p.numel() * p.element_size() for p in module.parameters()))
    return max(1, min(96, TENSOR_BYTES // largest))


def pads(device: torch.device) -> bool:
    """Whether folded tiles are filled up to their full size: on a GPU kernels are chosen by the number of replicas.

    At one size a replica's bits depend neither on its slot nor on its neighbours, so the fillers change nothing.
    """
    return device.type == "cuda"
