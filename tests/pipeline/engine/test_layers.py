from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.engine import layers as twins
from pipeline.engine.choose import choose_engine, unfit_to_fold
from pipeline.engine.layers import CannotFoldError, Dropout, DropoutStreams, fold_modules
from pipeline.models import mlp

Make = Callable[[], nn.Module]

VECTOR, SIGNAL, PICTURE = (6,), (6, 9), (6, 8, 8)

LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), VECTOR),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), VECTOR),
    "linear to one output": (lambda: nn.Linear(6, 1), VECTOR),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3), SIGNAL),
    "conv1d strided, dilated, circular": (
        lambda: nn.Conv1d(6, 4, 3, stride=2, dilation=2, padding=2, padding_mode="circular"),
        SIGNAL,
    ),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3), PICTURE),
    "conv2d without bias": (lambda: nn.Conv2d(6, 4, 3, bias=False), PICTURE),
    "conv2d in groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), PICTURE),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding="same"), PICTURE),
    "conv2d strided": (lambda: nn.Conv2d(6, 4, 3, stride=(2, 1), padding=(0, 2)), PICTURE),
    "conv2d dilated": (lambda: nn.Conv2d(6, 4, 3, dilation=2, padding=2), PICTURE),
    **{
        f"conv2d padded with {mode}": (
            lambda mode=mode: nn.Conv2d(6, 4, 3, padding=(1, 2), padding_mode=mode),
            PICTURE,
        )
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
def test_a_twin_does_what_its_plain_layers_do_one_by_one(name: str, replicas: int) -> None:
    make, shape = LAYERS[name]
    plains = perturbed(make, replicas)
    folded = fold_modules(plains)
    for seed in range(3):
        assert_faithful(folded, plains, shape, seed)
    for module in (folded, *plains):
        module.eval()
    assert_faithful(folded, plains, shape, seed=3)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_can_be_evaluated_before_it_has_seen_a_batch(momentum: float | None) -> None:
    plains = [nn.BatchNorm1d(6, momentum=momentum).double().eval() for _ in range(2)]
    assert_faithful(fold_modules(plains), plains, VECTOR, seed=0)


def test_folding_leaves_the_plain_modules_as_they_were() -> None:
    plains = perturbed(lambda: nn.BatchNorm1d(6), 2)
    before = [copy.deepcopy(plain.state_dict()) for plain in plains]
    fold_modules(plains)(torch.randn(4, 12, dtype=torch.float64)).sum().backward()
    for plain, state in zip(plains, before, strict=True):
        assert type(plain) is nn.BatchNorm1d
        assert all(p.grad is None for p in plain.parameters())
        assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in state.items())


class Tied(nn.Module):
    """One weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(6, 6), nn.Linear(6, 6)
        self.again.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.again(self.first(inputs).tanh())  # type: ignore[no-any-return]


def test_tied_weights_stay_tied() -> None:
    plains = perturbed(Tied, 3)
    folded = fold_modules(plains)
    assert folded.get_submodule("first").weight is folded.get_submodule("again").weight
    assert_faithful(folded, plains, VECTOR, seed=0)


def test_a_frozen_parameter_stays_frozen() -> None:
    plains = [nn.Linear(6, 4) for _ in range(2)]
    for plain in plains:
        plain.bias.requires_grad_(False)
    assert [p.requires_grad for p in fold_modules(plains).parameters()] == [True, False]


def test_layers_that_have_no_twin_or_disagree_are_refused_in_words() -> None:
    with pytest.raises(CannotFoldError, match=r"PReLU .* has no stacked version"):
        fold_modules([nn.Sequential(nn.PReLU()) for _ in range(2)])
    with pytest.raises(CannotFoldError, match="differ in the shape of weight"):
        fold_modules([nn.Linear(6, 4), nn.Linear(5, 4)])
    with pytest.raises(CannotFoldError, match="cannot be stacked"):
        fold_modules([nn.LayerNorm([6, 9])])(torch.zeros(2, 6, 9))


# --- dropout


def masks_of_plain_dropout(seed: int, calls: Sequence[tuple[float, Tensor]]) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [F.dropout(inputs, p) for p, inputs in calls]


@pytest.mark.usefixtures("untouched_randomness")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_masks_are_those_of_plain_dropout_after_manual_seed(dtype: torch.dtype) -> None:
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


# --- what the check lets through


class Everything(nn.Module):
    """Every kind of layer that has a twin."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, groups=2, padding=1, padding_mode="circular")
        self.batch_norm = nn.BatchNorm2d(8, momentum=0.3, eps=0.01)
        self.group_norm = nn.GroupNorm(2, 8)
        self.hidden = nn.Linear(8 * 16, 16)
        self.layer_norm = nn.LayerNorm(16)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.group_norm(self.batch_norm(self.conv(inputs)).relu()).flatten(1)
        return self.head(self.dropout(self.layer_norm(self.hidden(hidden))))  # type: ignore[no-any-return]


class Convolutions(twins.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight, bias, replicas = self.weight.flatten(0, 1), self.bias.flatten(), len(self.weight)  # type: ignore[union-attr]
        return self.wrong(input, weight, bias, replicas)

    def wrong(self, input: Tensor, weight: Tensor, bias: Tensor, replicas: int) -> Tensor:
        raise NotImplementedError


class GroupsAcrossReplicas(Convolutions):
    def wrong(self, input: Tensor, weight: Tensor, bias: Tensor, replicas: int) -> Tensor:
        interleaved = input.unflatten(1, (replicas, -1)).transpose(1, 2).flatten(1, 2)
        return F.conv2d(F.pad(interleaved, (1, 1, 1, 1), "circular"), weight, bias, groups=2 * replicas)


class PlainGroups(Convolutions):
    def wrong(self, input: Tensor, weight: Tensor, bias: Tensor, replicas: int) -> Tensor:
        return F.conv2d(F.pad(input, (1, 1, 1, 1), "circular"), weight, bias, groups=self.groups)


class PaddedWithZeros(Convolutions):
    def wrong(self, input: Tensor, weight: Tensor, bias: Tensor, replicas: int) -> Tensor:
        return F.conv2d(input, weight, bias, padding=1, groups=2 * replicas)


class WithoutBias(twins.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) - self.bias.flatten()


class BiasWithoutGradient(twins.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) - self.bias.flatten() + self.bias.detach().flatten()


class FirstWeightForAll(twins.Linear):
    def forward(self, input: Tensor) -> Tensor:
        columns = input.unflatten(1, (len(self.weight), -1))
        return (columns @ self.weight[0].t() + self.bias).flatten(1)


class NeighboursWeight(twins.Linear):
    def forward(self, input: Tensor) -> Tensor:
        columns = input.unflatten(1, (len(self.weight), -1))
        return (torch.einsum("bri,roi->bro", columns, self.weight.roll(1, 0)) + self.bias).flatten(1)


class RoundedByTheSlot(twins.Linear):
    """Faithful to 1e-12 in float64, but in float32 the last bits tell the slot."""

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input).unflatten(1, (len(self.weight), -1))
        slots = torch.arange(len(self.weight), dtype=out.dtype)[:, None]
        return (out * (1 + 4 * torch.finfo(out.dtype).eps * slots)).flatten(1)


class RoundedByTheNeighbours(twins.Linear):
    """Faithful to 1e-12 in float64, but in float32 the last bits tell how many neighbours there are."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (1 + 4 * torch.finfo(input.dtype).eps * len(self.weight))


class SharedRunningStatistics(twins.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        for buffer in (self.running_mean, self.running_var):
            buffer.copy_(buffer.mean(0).expand_as(buffer))  # type: ignore[union-attr]
        return out


class FrozenStatistics(twins.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        kept = [buffer.clone() for buffer in self.buffers()]
        out = super().forward(input)
        for buffer, before in zip(self.buffers(), kept, strict=True):
            buffer.copy_(before)
        return out


class UncountedBatches(twins.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        self.num_batches_tracked.zero_()  # type: ignore[union-attr]
        return out


class UsualMomentum(twins.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        self.momentum = 0.1
        return super().forward(input)


class NeverEvaluating(twins.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.flatten(), self.bias.flatten()
        if self.training:
            return super().forward(input)
        return F.batch_norm(input, None, None, weight, bias, True, 0.0, self.eps)


class GroupsOfAllReplicas(twins.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return F.group_norm(input, self.num_groups, self.weight.flatten(), self.bias.flatten(), self.eps)


class NormAcrossReplicas(twins.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, input.shape[1:], self.weight.flatten(), self.bias.flatten(), self.eps)


class GlobalDropout(twins.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training)


class OneMaskForAll(twins.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        self.streams.slots = [0] * len(self.streams.slots)
        return super().forward(input)


class UnscaledDropout(twins.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (1 - self.p if self.training else 1)


BROKEN: tuple[type[nn.Module], ...] = (
    GroupsAcrossReplicas, PlainGroups, PaddedWithZeros, WithoutBias, BiasWithoutGradient, FirstWeightForAll,
    NeighboursWeight, RoundedByTheSlot, RoundedByTheNeighbours, SharedRunningStatistics, FrozenStatistics,
    UncountedBatches, UsualMomentum, NeverEvaluating, GroupsOfAllReplicas, NormAcrossReplicas, GlobalDropout,
    OneMaskForAll, UnscaledDropout,
)  # fmt: skip


def seeded(make: Make, count: int = 3) -> list[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [make() for _ in range(count)]


def plain_type(twin: type[nn.Module]) -> type[nn.Module]:
    return next(plain for plain, right in twins.STACKED_LAYERS.items() if issubclass(twin, right))


def test_the_check_passes_the_shipped_twins() -> None:
    assert unfit_to_fold(seeded(Everything), (2, 4, 4), 8) is None


@pytest.mark.parametrize("broken", BROKEN, ids=lambda twin: twin.__name__)
def test_the_check_refuses_a_broken_twin(broken: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(twins.STACKED_LAYERS, plain_type(broken), broken)
    with torch.random.fork_rng(devices=[]):
        assert unfit_to_fold(seeded(Everything), (2, 4, 4), 8) is not None


def test_rounding_that_tells_the_slot_is_refused_for_that_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(twins.STACKED_LAYERS, nn.Linear, RoundedByTheSlot)
    assert "depend on the slot" in str(unfit_to_fold(seeded(Everything), (2, 4, 4), 8))


class UsersOwn(nn.Module):
    """A residual network in ordinary code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(32, 16), nn.Linear(16, 16)
        self.heads = nn.ModuleDict({"classes": nn.Linear(16, 3)})

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.stem(torch.flatten(inputs, 1)))
        for _ in range(2):
            hidden = hidden + F.relu(self.body(hidden))
        return self.heads["classes"](hidden)  # type: ignore[no-any-return]


class Foreign(nn.Module):
    """A small network with something foreign between its layers."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 16) -> None:
        super().__init__()
        self.between, self.stem, self.head = between, nn.Linear(32, 16), nn.Linear(width, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.between(self.stem(inputs.flatten(1))))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.lstm(inputs.flatten(1, 2))[0][:, -1])  # type: ignore[no-any-return]


def test_a_model_of_the_users_own_folds() -> None:
    assert choose_engine("auto", seeded(UsersOwn), (2, 4, 4), 8)[0] == "fold"


@pytest.mark.parametrize("width", [7, 16])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_shipped_mlp_folds_whatever_its_width(width: int, batch_norm: bool) -> None:
    make = partial(mlp, (2, 4, 4), 3, hidden=[width, width], batch_norm=batch_norm, dropout=0.3)
    assert choose_engine("auto", seeded(make), (2, 4, 4), 20) == (
        "fold",
        "passed the check against plain modules",
    )


@pytest.mark.parametrize(
    ("make", "because"),
    [
        (Recurrent, "LSTM (lstm) has no stacked version"),
        (lambda: Foreign(lambda hidden: F.dropout(hidden, 0.5)), "global random state"),
        (
            lambda: Foreign(lambda hidden: torch.cat([hidden, hidden.tanh()], 1), 32),
            "differs from the plain module's",
        ),
        (lambda: Foreign(lambda hidden: hidden.softmax(1)), "differs from the plain module's"),
        (lambda: Foreign(nn.PReLU()), "PReLU (between) has no stacked version"),
        (lambda: Foreign(lambda hidden: hidden.view(-1, 16)), ""),
    ],
    ids=["lstm", "functional dropout", "concatenation", "softmax of channels", "prelu", "hard-coded shape"],
)
def test_what_cannot_be_folded_runs_in_the_loop_and_says_why(make: Make, because: str) -> None:
    with torch.random.fork_rng(devices=[]):
        engine, reason = choose_engine("auto", seeded(make), (2, 4, 4), 8)
    assert engine == "loop"
    assert reason.startswith("cannot be folded: ")
    assert because in reason


def test_convolutions_on_a_cpu_run_in_the_loop_unless_folding_is_asked_for() -> None:
    modules: list[Any] = seeded(Everything)
    assert choose_engine("auto", modules, (2, 4, 4), 8)[0] == "loop"
    assert choose_engine("fold", modules, (2, 4, 4), 8)[0] == "fold"
    assert choose_engine("loop", modules, (2, 4, 4), 8) == ("loop", "as configured")
