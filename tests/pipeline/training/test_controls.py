"""Controls: the reference again, with other roundings, and with a difference of a known size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likelihood_lab.audit.context import audit_of
from likelihood_lab.audit.evaluate import Loss
from likelihood_lab.audit.examine import examine
from pipeline.replica import (
    BY_PRECISION,
    DITHERED,
    DITHERED_AGAIN,
    DOSE,
    IN_FLOAT64,
    NAMES,
    REORDERED,
    REPLAY,
    is_control,
)
from pipeline.training.controls import base_args, control, declared
from pipeline.training.objectives import Formulation

CPU = torch.device("cpu")
REFERENCES = {
    "ce": Formulation("ce", ("logits", "labels"), nn.CrossEntropyLoss),
    "nll": Formulation("nll", ("log_probs", "labels"), nn.NLLLoss),
    "kl": Formulation("kl", ("log_probs", "target_probs"), lambda: nn.KLDivLoss(reduction="batchmean")),
    "probs": Formulation("probs", ("probs", "labels"), lambda: lambda p, y: F.nll_loss(p.log(), y)),
    "fused": Formulation(
        "fused",
        ("hidden", "weight", "bias", "labels"),
        lambda: lambda h, w, b, y: F.cross_entropy(F.linear(h, w, b), y),
    ),
}


def callable_of(formulation: Formulation) -> Loss:
    return Loss(formulation.instance(CPU, torch.float32), formulation.args)


def finding(name: str, reference: str, **settings: Any) -> Any:
    original = REFERENCES[reference]
    made = control(name, original, **settings)
    audit = audit_of(callable_of(original), made.args, num_classes=(2, 10), dtype=torch.float32)
    return examine(audit, callable_of(made))


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_replay_is_the_reference_itself(reference: str) -> None:
    assert finding(REPLAY, reference).objective == "identical"


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("name", BY_PRECISION["float32"])
def test_a_placebo_is_the_same_function_and_not_the_same_bits(name: str, reference: str) -> None:
    found = finding(name, reference)
    assert found.objective == "rounding", found.sentence


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_dose_is_another_function(reference: str) -> None:
    assert finding(DOSE, reference, dose=1e-3).objective == "different"


def test_a_dose_is_a_temperature() -> None:
    logits = torch.randn(8, 10, dtype=torch.float64)
    labels = torch.arange(8)
    dosed = control(DOSE, REFERENCES["ce"], 0.5).instance(CPU, torch.float64)
    assert torch.equal(dosed(logits, labels), F.cross_entropy(1.5 * logits, labels))


def test_in_float64_a_placebo_is_more_exact_than_the_reference() -> None:
    logits = torch.randn(64, 10).requires_grad_()
    labels = torch.arange(64) % 10
    exact = torch.autograd.grad(F.cross_entropy(logits.double(), labels), logits)[0]
    placebo = control(IN_FLOAT64, REFERENCES["nll"]).instance(CPU, torch.float32)
    value = placebo(logits, labels)
    assert value.dtype == torch.float32
    assert torch.equal(torch.autograd.grad(value, logits)[0], exact)


def test_reordering_leaves_ignored_labels_alone() -> None:
    logits, labels = torch.randn(6, 5), torch.tensor([0, 4, -100, 2, -100, 1])
    reordered = control(REORDERED, REFERENCES["ce"]).instance(CPU, torch.float32)
    assert reordered(logits, labels).item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


def test_a_module_s_buffers_follow_it_into_float64() -> None:
    weights = torch.tensor([0.1, 0.2, 0.7])
    weighted = Formulation("w", ("logits", "labels"), lambda: nn.CrossEntropyLoss(weight=weights))
    placebo = control(IN_FLOAT64, weighted).instance(CPU, torch.float32)
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    value = placebo(logits, labels)
    assert value.item() == pytest.approx(F.cross_entropy(logits, labels, weight=weights).item(), rel=1e-6)


def test_a_control_gets_what_its_own_inputs_are_made_of() -> None:
    assert base_args(("log_probs", "labels")) == ("logits", "labels")
    assert base_args(("probs", "logits", "target_probs")) == ("logits", "target_probs")
    assert base_args(("hidden", "weight", "labels")) == ("hidden", "weight", "labels")


def test_every_control_is_made_from_its_reference_and_says_so() -> None:
    reference = {"fn": {"_target_": "torch.nn.CrossEntropyLoss"}, "args": ["logits", "labels"]}
    made = [declared(name, reference, 0.5) for name in NAMES]
    assert all(reference.items() <= entry.items() for entry in made)
    assert len({str(entry) for entry in made}) == len(NAMES)
    assert declared(DOSE, reference, 0.5) != declared(DOSE, reference, 0.6)


def test_the_names_that_are_refused_for_losses_are_the_controls() -> None:
    assert all(map(is_control, NAMES))
    assert not is_control("ce")


def test_a_loss_that_returns_several_things_is_judged_by_the_first() -> None:
    def returns_two(logits: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        return F.cross_entropy(logits, labels), None

    placebo = control(IN_FLOAT64, Formulation("t", ("logits", "labels"), lambda: returns_two))
    value = placebo.instance(CPU, torch.float32)(torch.zeros(2, 2), torch.tensor([0, 1]))
    assert value.item() == pytest.approx(0.693147, rel=1e-5)


def gradient(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    placebo = control(name, REFERENCES["ce"]).instance(CPU, torch.bfloat16)
    return torch.autograd.grad(placebo(logits, labels), logits)[0]


def test_dithering_rounds_to_a_neighbour_without_bias() -> None:
    logits = torch.randn(8, 10, dtype=torch.bfloat16).requires_grad_()
    labels = torch.arange(8)
    exact = torch.autograd.grad(F.cross_entropy(logits.double(), labels), logits, create_graph=False)[0].double()
    double = logits.detach().double().requires_grad_()
    truth = torch.autograd.grad(F.cross_entropy(double, labels), double)[0]
    torch.manual_seed(0)
    drawn = torch.stack([gradient(DITHERED, logits, labels).double() for _ in range(400)])
    ulp = (torch.nextafter(exact.bfloat16(), torch.tensor(torch.inf, dtype=torch.bfloat16)) - exact.bfloat16()).double()
    assert ((drawn - truth).abs() <= 2 * ulp.abs()).all()
    assert (drawn.std(0) > 0).any()
    assert torch.equal(drawn, drawn.bfloat16().double())
    bias = (drawn.mean(0) - truth) / ulp.abs()
    assert (
        bias.abs().max() < 5 * 0.5 / 400**0.5
    )  # a rounding is at most half a unit from its mean, in standard deviation


def test_two_ditherings_from_one_stream_differ() -> None:
    logits, labels = torch.randn(8, 10, dtype=torch.bfloat16).requires_grad_(), torch.arange(8)
    torch.manual_seed(0)
    one = gradient(DITHERED, logits, labels)
    torch.manual_seed(0)
    other = gradient(DITHERED_AGAIN, logits, labels)
    torch.manual_seed(0)
    assert torch.equal(gradient(DITHERED, logits, labels), one)
    assert not torch.equal(one, other)
