"""Stacked layers equal the plain ones, and the check before training refuses layers and models that do not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.engine import layers
from pipeline.engine.choose import choose_engine, unfit_to_fold
from pipeline.engine.layers import CannotFoldError, Dropout, DropoutStreams, fold_modules
from pipeline.models import mlp

Make = Callable[[], nn.Module]

VECTOR, SIGNAL, PICTURE = (6,), (6, 9), (6, 8, 8)
CONV2D = partial(nn.Conv2d, 6, 4, 3)

LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), VECTOR),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), VECTOR),
    "linear to one output": (lambda: nn.Linear(6, 1), VECTOR),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3), SIGNAL),
    "conv1d strided, dilated, circular": (
        lambda: nn.Conv1d(6, 4, 3, stride=2, dilation=2, padding=2, padding_mode="circular"),
        SIGNAL,
    ),
    "conv2d": (CONV2D, PICTURE),
    "conv2d without bias": (partial(CONV2D, bias=False), PICTURE),
    "conv2d in groups": (partial(CONV2D, groups=2), PICTURE),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding="same"), PICTURE),
    "conv2d strided": (partial(CONV2D, stride=(2, 1), padding=(0, 2)), PICTURE),
    "conv2d dilated": (partial(CONV2D, dilation=2, padding=2), PICTURE),
    **{
        f"conv2d padded with {mode}": (partial(CONV2D, padding=(1, 2), padding_mode=mode), PICTURE)
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "batch norm of vectors": (lambda: nn.BatchNorm1d(6), VECTOR),
    "batch norm of signals": (lambda: nn.BatchNorm1d(6), SIGNAL),
    "batch norm": (lambda: nn.BatchNorm2d(6), PICTURE),
    "batch norm, cumulative": (lambda: nn.BatchNorm2d(6, momentum=None), PICTURE),
    "batch norm, other constants": (lambda: nn.BatchNorm2d(6, momentum=0.3, eps=0.1), PICTURE),
    "batch norm, momentum 0": (lambda: nn.BatchNorm2d(6, momentum=0.0), PICTURE),
    "batch norm, not affine": (lambda: nn.BatchNorm2d(6, affine=False), PICTURE),
    "batch norm without bias": (lambda: nn.BatchNorm2d(6, bias=False), PICTURE),
    "batch norm, untracked": (lambda: nn.BatchNorm2d(6, track_running_stats=False), PICTURE),
    "group norm": (lambda: nn.GroupNorm(3, 6), PICTURE),
    "group norm, one group": (lambda: nn.GroupNorm(1, 6, eps=0.1), SIGNAL),
    "group norm without bias": (lambda: nn.GroupNorm(2, 6, bias=False), PICTURE),
    "group norm, not affine": (lambda: nn.GroupNorm(2, 6, affine=False), PICTURE),
    "layer norm": (lambda: nn.LayerNorm(6), VECTOR),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False, eps=0.1), VECTOR),
    "layer norm, not affine": (lambda: nn.LayerNorm(6, elementwise_affine=False), VECTOR),
}


def perturbed(make: Make, replicas: int) -> list[nn.Module]:
    """Layers that differ, buffers included."""
    generator = torch.Generator().manual_seed(7)
    layers = [make().double() for _ in range(replicas)]
    for layer in layers:
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.data += torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    return layers


def assert_close(ours: Tensor, plain: Tensor, what: str) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12, msg=lambda text: f"{what}: {text}")


def assert_faithful(folded: nn.Module, plains: Sequence[nn.Module], shape: tuple[int, ...], seed: int) -> None:
    """Outputs, all gradients and all buffers are those of the plain layers, each on inputs of its own."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(5, len(plains), *shape, generator=generator, dtype=torch.float64, requires_grad=True)
    together = folded(inputs.flatten(1, 2)).unflatten(1, (len(plains), -1))
    apart = torch.stack([plain(inputs[:, r]) for r, plain in enumerate(plains)], 1)
    assert_close(together, apart, "outputs")
    weights = torch.randn(together.shape, generator=generator, dtype=torch.float64)
    names = [name for name, _ in folded.named_parameters()]
    ours = torch.autograd.grad((together * weights).sum(), [inputs, *folded.parameters()])
    separate = [p for plain in plains for p in plain.parameters()]
    theirs = torch.autograd.grad((apart * weights).sum(), [inputs, *separate])
    assert_close(ours[0], theirs[0], "gradient of the inputs")
    for i, name in enumerate(names):
        stacked = torch.stack([theirs[1 + i + r * len(names)] for r in range(len(plains))])
        assert_close(ours[1 + i], stacked, f"gradient of {name}")
    for name, buffer in folded.named_buffers():
        assert_close(buffer, torch.stack([plain.get_buffer(name) for plain in plains]), name)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("replicas", [1, 3])
def test_stacked_layer_equals_plain_layers(name: str, replicas: int) -> None:
    make, shape = LAYERS[name]
    plains = perturbed(make, replicas)
    folded = fold_modules(plains)
    for seed in range(3):
        assert_faithful(folded, plains, shape, seed)
    for module in (folded, *plains):
        module.eval()
    assert_faithful(folded, plains, shape, seed=3)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_evaluates_before_the_first_batch(momentum: float | None) -> None:
    plains = [nn.BatchNorm1d(6, momentum=momentum).double().eval() for _ in range(2)]
    assert_faithful(fold_modules(plains), plains, VECTOR, seed=0)


def test_folding_does_not_change_the_plain_modules() -> None:
    plains = perturbed(lambda: nn.BatchNorm1d(6), 2)
    before = [copy.deepcopy(plain.state_dict()) for plain in plains]
    fold_modules(plains)(torch.randn(4, 12, dtype=torch.float64)).sum().backward()
    for plain, state in zip(plains, before, strict=True):
        assert type(plain) is nn.BatchNorm1d
        assert all(p.grad is None for p in plain.parameters())
        assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in state.items())


def tied() -> nn.Module:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def test_tied_weights_stay_tied() -> None:
    plains = perturbed(tied, 3)
    folded = fold_modules(plains)
    assert folded.get_submodule("0").weight is folded.get_submodule("2").weight
    assert_faithful(folded, plains, VECTOR, seed=0)


def test_frozen_parameters_stay_frozen() -> None:
    plains = [nn.Linear(6, 4) for _ in range(2)]
    for plain in plains:
        plain.bias.requires_grad_(False)
    assert [p.requires_grad for p in fold_modules(plains).parameters()] == [True, False]


@pytest.mark.parametrize(
    ("modules", "complaint"),
    [
        ([nn.Sequential(nn.PReLU()) for _ in range(2)], "PReLU .* has no stacked version"),
        ([nn.Linear(6, 4), nn.Linear(5, 4)], "differ in the shape of weight"),
        ([nn.Linear(6, 4), nn.Linear(6, 4, bias=False)], "or one has no bias"),
        ([nn.LayerNorm([6, 9])], "more than one axis"),
    ],
    ids=["prelu", "shapes", "missing bias", "layer norm over two axes"],
)
def test_unsupported_modules_are_refused(modules: list[nn.Module], complaint: str) -> None:
    with pytest.raises(CannotFoldError, match=complaint):
        fold_modules(modules)(torch.zeros(2, 6, 9))


# --- dropout


def masks_of_plain_dropout(seed: int, calls: Sequence[tuple[float, Tensor]]) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [F.dropout(inputs, p) for p, inputs in calls]


@pytest.mark.usefixtures("untouched_randomness")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_masks_equal_plain_dropout_after_manual_seed(dtype: torch.dtype) -> None:
    seeds = (3, 0, 3)
    streams = DropoutStreams(seeds)
    generator = torch.Generator().manual_seed(0)
    shapes = {0.3: VECTOR, 0.5: PICTURE, 0.0: VECTOR, 1.0: VECTOR, 0.9: SIGNAL}
    calls = {p: torch.randn(5, 3, *shape, generator=generator).to(dtype) for p, shape in shapes.items()}
    plain = [masks_of_plain_dropout(s, [(p, x[:, r]) for p, x in calls.items()]) for r, s in enumerate(seeds)]
    for i, (p, inputs) in enumerate(calls.items()):
        layer = Dropout(p)
        layer.streams = streams
        ours = layer(inputs.flatten(1, 2)).unflatten(1, (3, -1))
        assert torch.equal(ours, torch.stack([masks[i] for masks in plain], 1))
        assert torch.equal(layer.eval()(inputs.flatten(1, 2)), inputs.flatten(1, 2))


# --- the check before training


def every_layer() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, groups=2, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(8, momentum=0.3, eps=0.01),
        nn.ReLU(),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.Linear(8 * 16, 16),
        nn.LayerNorm(16),
        nn.Dropout(0.5),
        nn.Linear(16, 3),
    )


def convolve(layer: layers.Conv2d, padded: Tensor, groups: int, padding: int = 0) -> Tensor:
    return F.conv2d(padded, layer.weight.flatten(0, 1), layer.bias.flatten(), padding=padding, groups=groups)


def circular(inputs: Tensor) -> Tensor:
    return F.pad(inputs, (1, 1, 1, 1), "circular")


def groups_across_replicas(self: layers.Conv2d, x: Tensor) -> Tensor:
    replicas = len(self.weight)
    return convolve(self, circular(x.unflatten(1, (replicas, -1)).transpose(1, 2).flatten(1, 2)), 2 * replicas)


def with_weight(self: layers.Linear, x: Tensor, weight: Callable[[Tensor], Tensor]) -> Tensor:
    by_replica = x.unflatten(1, (len(self.weight), -1))
    return (torch.einsum("bri,roi->bro", by_replica, weight(self.weight)) + self.bias).flatten(1)


def bias_without_gradient(self: layers.Linear, x: Tensor) -> Tensor:
    return layers.Linear.forward(self, x) - self.bias.flatten() + self.bias.detach().flatten()


def rounded_by_the_slot(self: layers.Linear, x: Tensor) -> Tensor:
    """Equal to 1e-12 in float64, but in float32 the last bits depend on the slot."""
    out = layers.Linear.forward(self, x).unflatten(1, (len(self.weight), -1))
    slots = torch.arange(len(self.weight), dtype=out.dtype)[:, None]
    return (out * (1 + 4 * torch.finfo(out.dtype).eps * slots)).flatten(1)


def rounded_by_the_neighbours(self: layers.Linear, x: Tensor) -> Tensor:
    """Equal to 1e-12 in float64, but in float32 the last bits depend on the number of neighbours."""
    return layers.Linear.forward(self, x) * (1 + 4 * torch.finfo(x.dtype).eps * len(self.weight))


def then(change: Callable[[layers.BatchNorm2d], object]) -> Callable[..., Tensor]:
    """The forward of BatchNorm2d, which changes its buffers afterwards."""

    def forward(self: layers.BatchNorm2d, x: Tensor) -> Tensor:
        out = layers.BatchNorm2d.forward(self, x)
        change(self)
        return out

    return forward


def average(layer: layers.BatchNorm2d) -> None:
    layer.running_mean.data.copy_(layer.running_mean.mean(0).expand_as(layer.running_mean))


def reset(layer: layers.BatchNorm2d) -> None:
    layer.running_mean.data.zero_()
    layer.running_var.data.fill_(1)


def usual_momentum(self: layers.BatchNorm2d, x: Tensor) -> Tensor:
    self.momentum = 0.1
    return layers.BatchNorm2d.forward(self, x)


def never_evaluating(self: layers.BatchNorm2d, x: Tensor) -> Tensor:
    if self.training:
        return layers.BatchNorm2d.forward(self, x)
    return F.batch_norm(x, None, None, self.weight.flatten(), self.bias.flatten(), True, 0.0, self.eps)


def one_mask_for_all(self: layers.Dropout, x: Tensor) -> Tensor:
    self.streams.slots = [0] * len(self.streams.slots)
    return layers.Dropout.forward(self, x)


BROKEN: dict[str, tuple[type[nn.Module], Callable[..., Tensor]]] = {
    "groups across replicas": (nn.Conv2d, groups_across_replicas),
    "plain groups": (nn.Conv2d, lambda self, x: convolve(self, circular(x), self.groups)),
    "padded with zeros": (nn.Conv2d, lambda self, x: convolve(self, x, 2 * len(self.weight), padding=1)),
    "without bias": (nn.Linear, lambda self, x: layers.Linear.forward(self, x) - self.bias.flatten()),
    "bias without gradient": (nn.Linear, bias_without_gradient),
    "first weight for all": (nn.Linear, lambda self, x: with_weight(self, x, lambda w: w[:1].expand_as(w))),
    "neighbours weight": (nn.Linear, lambda self, x: with_weight(self, x, lambda w: w.roll(1, 0))),
    "rounded by the slot": (nn.Linear, rounded_by_the_slot),
    "rounded by the neighbours": (nn.Linear, rounded_by_the_neighbours),
    "shared running statistics": (nn.BatchNorm2d, then(average)),
    "reset statistics": (nn.BatchNorm2d, then(reset)),
    "uncounted batches": (nn.BatchNorm2d, then(lambda layer: layer.num_batches_tracked.zero_())),
    "usual momentum": (nn.BatchNorm2d, usual_momentum),
    "never evaluating": (nn.BatchNorm2d, never_evaluating),
    "groups of all replicas": (
        nn.GroupNorm,
        lambda self, x: F.group_norm(x, self.num_groups, self.weight.flatten(), self.bias.flatten(), self.eps),
    ),
    "norm across replicas": (
        nn.LayerNorm,
        lambda self, x: F.layer_norm(x, x.shape[1:], self.weight.flatten(), self.bias.flatten(), self.eps),
    ),
    "global dropout": (nn.Dropout, lambda self, x: F.dropout(x, self.p, self.training)),
    "one mask for all": (nn.Dropout, one_mask_for_all),
    "unscaled dropout": (
        nn.Dropout,
        lambda self, x: layers.Dropout.forward(self, x) * (1 - self.p if self.training else 1),
    ),
}


def seeded(make: Make, count: int = 3) -> list[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [make() for _ in range(count)]


@pytest.mark.parametrize("name", BROKEN)
def test_check_refuses_a_broken_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, forward = BROKEN[name]
    broken = type("Broken", (layers.STACKED_LAYERS[plain],), {"forward": forward})
    monkeypatch.setitem(layers.STACKED_LAYERS, plain, broken)
    with torch.random.fork_rng(devices=[]):
        reason = unfit_to_fold(seeded(every_layer), (2, 4, 4), 8)
    assert reason is not None
    assert "Error" not in reason or name == "plain groups"  # refused for its results, not for an exception
    if name.startswith("rounded"):
        assert "depend on the slot or on the number of neighbours" in reason


class Residual(nn.Module):
    """A residual network in ordinary code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(32, 16), nn.Linear(16, 16)
        self.heads = nn.ModuleDict({"classes": nn.Linear(16, 3)})

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.stem(torch.flatten(inputs, 1)))
        for _ in range(2):
            hidden = hidden + F.relu(self.body(hidden))
        return self.heads["classes"](hidden)


class Foreign(nn.Module):
    """A small network with a function between its layers that may not fold."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 16) -> None:
        super().__init__()
        self.between, self.stem, self.head = between, nn.Linear(32, 16), nn.Linear(width, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.between(self.stem(inputs.flatten(1))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.lstm(inputs.flatten(1, 2))[0][:, -1])


def shipped_mlp(width: int, batch_norm: bool) -> Make:
    return partial(mlp, (2, 4, 4), 3, hidden=[width, width], batch_norm=batch_norm, dropout=0.3)


@pytest.mark.parametrize("make", [Residual, *(shipped_mlp(w, b) for w in (7, 16) for b in (False, True))])
def test_foldable_models_are_folded(make: Make) -> None:
    expected = ("fold", "passed the check against plain modules")
    assert choose_engine("auto", seeded(make), (2, 4, 4), 20) == expected


@pytest.mark.parametrize(
    ("make", "because"),
    [
        (Recurrent, "LSTM (lstm) has no stacked version"),
        (lambda: Foreign(lambda hidden: F.dropout(hidden, 0.5)), "global random state"),
        (lambda: Foreign(lambda hidden: torch.cat([hidden, hidden.tanh()], 1), 32), "differs from the plain module's"),
        (lambda: Foreign(lambda hidden: hidden.softmax(1)), "differs from the plain module's"),
        (lambda: Foreign(nn.PReLU()), "PReLU (between) has no stacked version"),
        (lambda: Foreign(lambda hidden: hidden.view(-1, 16)), ""),
    ],
    ids=["lstm", "functional dropout", "concatenation", "softmax of channels", "prelu", "hard-coded shape"],
)
def test_other_models_run_in_the_loop_with_the_reason(make: Make, because: str) -> None:
    with torch.random.fork_rng(devices=[]):
        engine, reason = choose_engine("auto", seeded(make), (2, 4, 4), 8)
    assert engine == "loop"
    assert reason.startswith("cannot be folded: ")
    assert because in reason


@pytest.mark.parametrize(("requested", "engine"), [("auto", "loop"), ("fold", "fold"), ("loop", "loop")])
def test_convolutions_on_a_cpu_fold_only_on_request(requested: str, engine: str) -> None:
    """`fold` also shows that the check passes every stacked layer."""
    chosen, reason = choose_engine(requested, seeded(every_layer), (2, 4, 4), 8)
    assert chosen == engine
    assert (reason == "as configured") is (requested == "loop")
