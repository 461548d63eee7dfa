"""Controls: replay and placebos (negative), and dose (positive)."""

from __future__ import annotations

from functools import partial
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


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize(
    ("name", "word"),
    [(REPLAY, "identical"), *((name, "rounding") for name in BY_PRECISION["float32"]), (DOSE, "different")],
)
def test_controls_are_classified_by_the_audit(name: str, word: str, reference: str) -> None:
    original = REFERENCES[reference]
    made = control(name, original, 1e-3)
    audit = audit_of(callable_of(original), made.args, num_classes=(2, 10), dtype=torch.float32)
    finding = examine(audit, callable_of(made))
    assert finding.objective == word, finding.sentence


def made(name: str, reference: Formulation, dtype: torch.dtype = torch.float32, dose: float | None = None) -> Any:
    return control(name, reference, dose).instance(CPU, dtype)


def test_dose_is_a_temperature() -> None:
    logits, labels = torch.randn(8, 10, dtype=torch.float64), torch.arange(8)
    dosed = made(DOSE, REFERENCES["ce"], torch.float64, 0.5)
    assert torch.equal(dosed(logits, labels), F.cross_entropy(1.5 * logits, labels))


def test_placebo_in_float64_has_the_exact_gradient() -> None:
    logits, labels = torch.randn(64, 10).requires_grad_(), torch.arange(64) % 10
    exact = torch.autograd.grad(F.cross_entropy(logits.double(), labels), logits)[0]
    value = made(IN_FLOAT64, REFERENCES["nll"])(logits, labels)
    assert value.dtype == torch.float32
    assert torch.equal(torch.autograd.grad(value, logits)[0], exact)


WEIGHTS = torch.tensor([0.1, 0.2, 0.7])


@pytest.mark.parametrize("name", BY_PRECISION["float32"])
@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (nn.CrossEntropyLoss, F.cross_entropy),
        (partial(nn.CrossEntropyLoss, reduction="sum"), partial(F.cross_entropy, reduction="sum")),
        (lambda: lambda z, y: (F.cross_entropy(z, y), None), F.cross_entropy),
    ],
    ids=["ignored labels", "sum", "first of several results"],
)
def test_placebo_has_the_value_of_the_reference(name: str, reference: Any, expected: Any) -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 2, -100, 2, -100, 1])
    placebo = made(name, Formulation("mine", ("logits", "labels"), reference))
    assert placebo(logits, labels).item() == pytest.approx(expected(logits, labels).item(), rel=1e-6)


def test_buffers_of_a_module_become_float64() -> None:
    weighted = Formulation("w", ("logits", "labels"), lambda: nn.CrossEntropyLoss(weight=WEIGHTS))
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    value = made(IN_FLOAT64, weighted)(logits, labels)
    assert value.item() == pytest.approx(F.cross_entropy(logits, labels, weight=WEIGHTS).item(), rel=1e-6)


def test_base_args_are_what_the_inputs_are_made_of() -> None:
    assert base_args(("log_probs", "labels")) == ("logits", "labels")
    assert base_args(("probs", "logits", "target_probs")) == ("logits", "target_probs")
    assert base_args(("hidden", "weight", "labels")) == ("hidden", "weight", "labels")


def test_control_declarations_differ_and_contain_the_reference() -> None:
    reference = {"fn": {"_target_": "torch.nn.CrossEntropyLoss"}, "args": ["logits", "labels"]}
    declarations = [*(declared(name, reference, 0.5) for name in NAMES), declared(DOSE, reference, 0.6)]
    assert all(reference.items() <= entry.items() for entry in declarations)
    assert len({str(entry) for entry in declarations}) == len(NAMES) + 1
    assert all(map(is_control, NAMES))
    assert not is_control("ce")


# --- random rounding in bfloat16

LABELS = torch.arange(8)


def dithered_gradient(name: str, logits: Tensor) -> Tensor:
    return torch.autograd.grad(made(name, REFERENCES["ce"], torch.bfloat16)(logits, LABELS), logits)[0]


def test_dithering_rounds_to_a_neighbour_without_bias() -> None:
    logits = torch.randn(8, 10, dtype=torch.bfloat16).requires_grad_()
    double = logits.detach().double().requires_grad_()
    truth = torch.autograd.grad(F.cross_entropy(double, LABELS), double)[0]
    torch.manual_seed(0)
    drawn = torch.stack([dithered_gradient(DITHERED, logits).double() for _ in range(400)])
    ulp = (torch.nextafter(truth.bfloat16(), torch.tensor(torch.inf, dtype=torch.bfloat16)) - truth.bfloat16()).double()
    assert ((drawn - truth).abs() <= 2 * ulp.abs()).all()
    assert (drawn.std(0) > 0).any()
    assert torch.equal(drawn, drawn.bfloat16().double())
    bias = (drawn.mean(0) - truth) / ulp.abs()
    # the standard deviation of one rounding is at most half a unit
    assert bias.abs().max() < 5 * 0.5 / 400**0.5


def test_two_ditherings_of_one_stream_differ() -> None:
    logits, found = torch.randn(8, 10, dtype=torch.bfloat16).requires_grad_(), []
    for name in (DITHERED, DITHERED_AGAIN, DITHERED):
        torch.manual_seed(0)
        found.append(dithered_gradient(name, logits))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
