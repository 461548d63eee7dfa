"""Losses of other packages, each with the result that the audit must give.

Adapters change shapes and pass keywords; the called and differentiated code is the package's own. Expectations hold
for torch 2.14.1 and the versions in requirements-third-party.txt. They come from the packages' sources and from plain
torch: gradients in float32 and float64 for several batch sizes and C, on ordinary, random and saturated rows.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.audit.case import Case

IGNORE = -100
MASKED = ("masked", 1.0)  # 0 * -inf
SINGLE = {"dtype": torch.float32}
SMOOTHING = 0.1
FEW = (2, 10)
SAMPLES_PER_CLASS = (900, 500, 300, 200, 100, 60, 40, 20, 10, 5)

Loss = Callable[..., Tensor]


def cases() -> tuple[list[Case], list[str]]:
    """Return (cases of every package that can be imported here, names of the other packages)."""
    found: list[Case] = []
    skipped = []
    for package, collect in PACKAGES.items():
        try:
            with warnings.catch_warnings():  # some packages warn about their own imports
                warnings.simplefilter("ignore")
                found += collect()
        except ImportError:
            skipped.append(package)
    return found, skipped


def _soft(logits: Tensor, target_probs: Tensor) -> Tensor:
    """Mean over rows of -sum_c y_c log p_c."""
    return F.cross_entropy(logits, target_probs)


_smoothed = partial(F.cross_entropy, label_smoothing=SMOOTHING)


def _linear(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropy after a last layer without a bias."""
    return F.cross_entropy(F.linear(hidden, weight), labels)


def _class_weights(beta: float = 0.999) -> Tensor:
    """(1 - beta) / (1 - beta^n_c), scaled to sum to C (Cui et al., 2019), in the precision that the packages keep."""
    weights = (1 - beta) / (1 - beta ** torch.tensor(SAMPLES_PER_CLASS, dtype=torch.float64))
    return (weights / weights.sum() * len(weights)).float()


def _weighted(logits: Tensor, labels: Tensor) -> Tensor:
    """Torch's class-weighted mean, which divides by the weights of the rows' labels."""
    return F.cross_entropy(logits, labels, weight=_class_weights().to(logits))


def _weighted_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the same weighted sum, divided by the number of rows."""
    return F.cross_entropy(logits, labels, weight=_class_weights().to(logits), reduction="sum") / len(labels)


def _focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Mean over rows of -(1 - p_y)^gamma log p_y (Lin et al., 2017) from log odds, so that p_y = 1 costs no digits."""
    own = F.one_hot(labels, logits.shape[1]).bool()
    others = logits.masked_fill(own, -torch.inf).logsumexp(1)
    surprise = -F.logsigmoid(logits[own] - others)
    return ((-torch.expm1(-surprise)) ** gamma * surprise).mean()


def _quiet(fn: Loss) -> Loss:
    """Return the same loss without its warnings."""

    def call(*args: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fn(*args)

    return call


def _timm() -> list[Case]:
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    targets = ("logits", "target_probs")
    return [
        Case(
            "timm-a",
            "timm LabelSmoothingCrossEntropy(0)",
            LabelSmoothingCrossEntropy(0.0),
            objective="identical",
            domain=MASKED,
            normaliser="rows",
        ),
        Case(
            "timm-b",
            "timm LabelSmoothingCrossEntropy(0.1) against torch's",
            LabelSmoothingCrossEntropy(SMOOTHING),
            reference=_smoothed,
            objective="rounding",
            normaliser="rows",
        ),
        Case(
            "timm-c",
            "timm LabelSmoothingCrossEntropy(0.1) against plain cross-entropy",
            LabelSmoothingCrossEntropy(SMOOTHING),
            objective="different",
            normaliser="rows",
        ),
        Case(
            "timm-d",
            "timm SoftTargetCrossEntropy, soft targets",
            SoftTargetCrossEntropy(),
            targets,
            _soft,
            targets,
            {"soft_targets": True},
            objective="identical",
            side_effects=("gradient into target_probs",),
            normaliser="rows",
        ),
        Case(
            "timm-e",
            "timm SoftTargetCrossEntropy, one-hot targets against labels",
            SoftTargetCrossEntropy(),
            targets,
            objective="identical",
            domain=MASKED,
            normaliser="rows",
        ),
        Case(
            "timm-f",
            "timm BinaryCrossEntropy(0), classes summed",
            BinaryCrossEntropy(0.0, sum_classes=True),
            objective="different",
            normaliser="rows",
        ),
    ]


def _transformers() -> list[Case]:
    from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss, fixed_cross_entropy
    from transformers.trainer_pt_utils import LabelSmoother

    def counted(logits: Tensor, labels: Tensor) -> Tensor:
        return fixed_cross_entropy(logits, labels, (labels != IGNORE).sum())

    def rows_counted(logits: Tensor, labels: Tensor) -> Tensor:
        return fixed_cross_entropy(logits, labels, labels.numel())

    def causal(logits: Tensor, labels: Tensor) -> Tensor:
        return ForCausalLMLoss(logits.contiguous(), labels, logits.shape[-1])

    def shifted_before(logits: Tensor, labels: Tensor) -> Tensor:
        return ForCausalLMLoss(logits.contiguous(), None, logits.shape[-1], shift_labels=labels.contiguous())

    def masked(logits: Tensor, labels: Tensor) -> Tensor:
        return ForMaskedLMLoss(logits.contiguous(), labels.contiguous(), logits.shape[-1])

    def smoother(epsilon: float) -> Loss:
        return lambda logits, labels: LabelSmoother(epsilon)({"logits": logits}, labels)

    ignoring = {"ignore_index": IGNORE}
    tokens = {"tokens": True, "ignore_index": IGNORE}
    return [
        Case(
            "transformers-a",
            "transformers fixed_cross_entropy",
            fixed_cross_entropy,
            options=ignoring,
            objective="identical",
            normaliser="valid targets",
        ),
        Case(
            "transformers-b",
            "transformers fixed_cross_entropy, sum over the number of valid targets",
            counted,
            options=ignoring,
            objective="identical",
            normaliser="valid targets",
        ),
        Case(
            "transformers-c",
            "transformers fixed_cross_entropy, sum over the number of all tokens",
            rows_counted,
            options=ignoring,
            objective="reweighted",
            side_effects=("all_ignored",),
            normaliser="rows",
        ),
        Case(
            "transformers-d",
            "transformers ForCausalLMLoss, which shifts the labels",
            causal,
            options=tokens,
            objective="different",
            side_effects=("label_out_of_range",),
            normaliser="not a sum over rows",
            note="the first label of every sequence is never read",
        ),
        Case(
            "transformers-e",
            "transformers ForCausalLMLoss, labels shifted before",
            shifted_before,
            options=tokens,
            objective="rounding",
            normaliser="valid targets",
            note="computes in float32",
        ),
        Case(
            "transformers-f",
            "transformers ForMaskedLMLoss",
            masked,
            options=tokens,
            objective="rounding",
            normaliser="valid targets",
            note="computes in float32",
        ),
        Case(
            "transformers-g",
            "transformers LabelSmoother(0)",
            smoother(0.0),
            options=ignoring,
            objective="identical",
            domain=MASKED,
            normaliser="valid targets",
        ),
        Case(
            "transformers-h",
            "transformers LabelSmoother(0.1) against torch's, float32",
            smoother(SMOOTHING),
            reference=_smoothed,
            options={**ignoring, **SINGLE},
            objective="rounding",
            normaliser="valid targets",
        ),
        Case(
            "transformers-i",
            "transformers LabelSmoother(0.1) against torch's, both precisions",
            smoother(SMOOTHING),
            reference=_smoothed,
            options=ignoring,
            objective="different",
            note="its smoothing term is summed in float32, 1e-9 of the gradient",
        ),
    ]


def _segmentation_models() -> list[Case]:
    from segmentation_models_pytorch.losses import FocalLoss, SoftCrossEntropyLoss

    return [
        Case(
            "smp-a",
            "segmentation-models SoftCrossEntropyLoss(smooth_factor=0)",
            SoftCrossEntropyLoss(smooth_factor=0.0),
            objective="identical",
            domain=MASKED,
            normaliser="rows",
        ),
        Case(
            "smp-b",
            "segmentation-models SoftCrossEntropyLoss(smooth_factor=0), ignored rows",
            SoftCrossEntropyLoss(smooth_factor=0.0),
            options={"ignore_index": IGNORE},
            objective="reweighted",
            domain=MASKED,
            side_effects=("all_ignored",),
            normaliser="rows",
        ),
        Case(
            "smp-c",
            "segmentation-models SoftCrossEntropyLoss() as it comes",
            SoftCrossEntropyLoss(),
            objective="error",
            note="smooth_factor=None is subtracted from 1",
        ),
        Case(
            "smp-d",
            "segmentation-models FocalLoss('multiclass', gamma=0)",
            FocalLoss("multiclass", gamma=0.0),
            options={"num_classes": FEW},
            objective="different",
            side_effects=("label_out_of_range",),
            normaliser="rows",
            note="C sigmoids, mean over N and C",
        ),
    ]


def _toolbelt() -> list[Case]:
    from pytorch_toolbelt.losses import BiTemperedLogisticLoss, CrossEntropyFocalLoss, SoftCrossEntropyLoss

    return [
        Case(
            "toolbelt-a",
            "pytorch-toolbelt SoftCrossEntropyLoss()",
            SoftCrossEntropyLoss(),
            objective="identical",
            domain=MASKED,
            normaliser="rows",
        ),
        Case(
            "toolbelt-b",
            "pytorch-toolbelt SoftCrossEntropyLoss(), ignored rows",
            SoftCrossEntropyLoss(),
            options={"ignore_index": IGNORE},
            objective="reweighted",
            domain=MASKED,
            side_effects=("all_ignored",),
            normaliser="rows",
        ),
        Case(
            "toolbelt-c",
            "pytorch-toolbelt CrossEntropyFocalLoss(gamma=0)",
            CrossEntropyFocalLoss(gamma=0.0),
            objective="different",
            note="softmax weights, but C sigmoids below them; float64 logits give a float32 loss",
        ),
        Case(
            "toolbelt-d",
            "pytorch-toolbelt BiTemperedLogisticLoss(1, 1)",
            BiTemperedLogisticLoss(1.0, 1.0),
            objective="offset",
            domain=("gap", 90.1),
            normaliser="rows",
            note="log(1 + 1e-10), seen in float64 alone",
        ),
        Case(
            "toolbelt-e",
            "pytorch-toolbelt BiTemperedLogisticLoss(0.8, 1.2)",
            BiTemperedLogisticLoss(0.8, 1.2),
            objective="different",
            normaliser="rows",
        ),
    ]


def _monai() -> list[Case]:
    from monai.losses import DiceCELoss, FocalLoss

    def pixels(loss: Loss) -> Loss:
        return lambda logits, labels: loss(logits[..., None], labels[:, None, None])

    def column(loss: Loss) -> Loss:
        return lambda logits, labels: loss(logits, labels[:, None])

    dice = partial(DiceCELoss, to_onehot_y=True, softmax=True)
    focal = partial(FocalLoss, to_onehot_y=True)
    return [
        Case(
            "monai-a",
            "MONAI DiceCELoss(lambda_dice=0)",
            pixels(dice(lambda_dice=0.0)),
            options={"num_classes": FEW},
            objective="rounding",
            normaliser="rows",
        ),
        Case(
            "monai-b",
            "MONAI DiceCELoss()",
            pixels(dice()),
            objective="different",
            normaliser="rows",
        ),
        Case(
            "monai-c",
            "MONAI FocalLoss(gamma=0, use_softmax=True)",
            column(focal(gamma=0.0, use_softmax=True)),
            objective="scaled",
            domain=MASKED,
            normaliser="rows",
            note="k = 1/C; computes in float32",
        ),
        Case(
            "monai-d",
            "MONAI FocalLoss(gamma=0), of sigmoids",
            column(focal(gamma=0.0)),
            objective="different",
            normaliser="rows",
            note="computes in float32",
        ),
        Case(
            "monai-e",
            "MONAI FocalLoss(gamma=2, use_softmax=True)",
            column(focal(gamma=2.0, use_softmax=True)),
            objective="different",
            normaliser="rows",
            note="computes in float32",
        ),
    ]


def _kornia() -> list[Case]:
    from kornia.losses import focal_loss, kl_div_loss_2d

    plain = partial(focal_loss, alpha=None, gamma=0.0, reduction="mean")

    def heatmap(probs: Tensor, target_probs: Tensor) -> Tensor:
        return kl_div_loss_2d(probs[:, None, None], target_probs[:, None, None])

    def root(logits: Tensor, labels: Tensor) -> Tensor:
        return focal_loss(logits, labels, alpha=None, gamma=0.5, reduction="sum") / len(labels)

    probs, targets = ("probs", "target_probs"), ("logits", "target_probs")
    return [
        Case(
            "kornia-a",
            "kornia focal_loss(gamma=0)",
            plain,
            objective="scaled",
            normaliser="rows",
            note="k = 1/C",
        ),
        Case(
            "kornia-b",
            "kornia focal_loss(gamma=0), ignored rows",
            plain,
            options={"ignore_index": IGNORE},
            objective="reweighted",
            side_effects=("all_ignored",),
            normaliser="rows",
        ),
        Case(
            "kornia-c",
            "kornia kl_div_loss_2d, one-hot targets",
            heatmap,
            probs,
            objective="rounding",
            domain=("gap", 90.1),
            normaliser="rows",
        ),
        Case(
            "kornia-d",
            "kornia kl_div_loss_2d, soft targets",
            heatmap,
            probs,
            _soft,
            targets,
            {"soft_targets": True},
            objective="offset",
            domain=("gap", None),
            side_effects=("gradient into target_probs",),
            normaliser="rows",
            note="the targets' entropy",
        ),
        Case(
            "kornia-e",
            "kornia focal_loss(gamma=0.5) against a focal loss from log odds",
            root,
            reference=partial(_focal, gamma=0.5),
            objective="rounding",
            normaliser="rows",
        ),
    ]


def _entmax() -> list[Case]:
    from entmax import Entmax15Loss, EntmaxBisectLoss, SparsemaxLoss

    few = {"num_classes": FEW}
    return [
        Case(
            "entmax-a",
            "entmax Entmax15Loss()",
            Entmax15Loss(),
            options=few,
            objective="different",
            side_effects=("nan_logits",),
        ),
        Case(
            "entmax-b",
            "entmax SparsemaxLoss()",
            SparsemaxLoss(),
            options=few,
            objective="different",
            side_effects=("nan_logits",),
        ),
        Case(
            "entmax-c",
            "entmax EntmaxBisectLoss(alpha=1.0001)",
            EntmaxBisectLoss(1.0001),
            options=few,
            objective="different",
            note="2e-4 of the gradient",
        ),
    ]


def _torchmetrics() -> list[Case]:
    from torchmetrics.functional.regression import kl_divergence
    from torchmetrics.functional.text import perplexity

    def kl(target_probs: Tensor, probs: Tensor) -> Tensor:
        return kl_divergence(target_probs, probs)

    args, targets = ("target_probs", "probs"), ("logits", "target_probs")
    soft = {"soft_targets": True, "num_classes": (2,)}
    return [
        Case(
            "torchmetrics-a",
            "torchmetrics kl_divergence, soft targets without a zero",
            kl,
            args,
            _soft,
            targets,
            soft,
            objective="domain",
            domain=("gap", None),
            side_effects=("gradient into target_probs",),
            normaliser="rows",
            note="p / q has 1 / q^2 in its gradient",
        ),
        Case(
            "torchmetrics-b",
            "torchmetrics kl_divergence, one-hot targets",
            kl,
            args,
            objective="different",
            note="0 / 0 in the gradient of every zero target",
        ),
        Case(
            "torchmetrics-c",
            "torchmetrics perplexity",
            perplexity,
            options={"tokens": True},
            objective="reweighted",
            domain=("gap", 45.05),
            note="k = exp(mean cross-entropy)",
        ),
    ]


def _torchvision() -> list[Case]:
    from torchvision.ops import sigmoid_focal_loss

    def plain(logits: Tensor, target_probs: Tensor) -> Tensor:
        return sigmoid_focal_loss(logits, target_probs, alpha=-1, gamma=0, reduction="sum") / len(logits)

    return [
        Case(
            "torchvision-a",
            "torchvision sigmoid_focal_loss(gamma=0)",
            plain,
            ("logits", "target_probs"),
            objective="different",
            normaliser="rows",
        )
    ]


def _fastai() -> list[Case]:
    from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropy

    return [
        Case(
            "fastai-a",
            "fastai CrossEntropyLossFlat(), tokens",
            CrossEntropyLossFlat(),
            options={"tokens": True, "ignore_index": IGNORE},
            objective="rounding",
            normaliser="valid targets",
            note="turns float64 into float32",
        ),
        Case(
            "fastai-b",
            "fastai LabelSmoothingCrossEntropy(0.1) against torch's",
            LabelSmoothingCrossEntropy(SMOOTHING),
            reference=_smoothed,
            objective="rounding",
            normaliser="rows",
        ),
        Case(
            "fastai-c",
            "fastai FocalLossFlat(gamma=0)",
            FocalLossFlat(gamma=0.0),
            objective="rounding",
            normaliser="rows",
            note="turns float64 into float32",
        ),
        Case(
            "fastai-d",
            "fastai FocalLossFlat(gamma=0.5) against a focal loss from log odds",
            FocalLossFlat(gamma=0.5),
            reference=partial(_focal, gamma=0.5),
            objective="domain",
            domain=("confidence", 16.64),
            normaliser="rows",
            note="0^(gamma - 1) once p_y rounds to 1; turns float64 into float32",
        ),
        Case(
            "fastai-e",
            "fastai FocalLossFlat()",
            FocalLossFlat(),
            objective="different",
            normaliser="rows",
            note="turns float64 into float32",
        ),
    ]


def _keras() -> list[Case]:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    from keras.backend import backend
    from keras.losses import CategoricalCrossentropy, SparseCategoricalCrossentropy

    if backend() != "torch":
        raise ImportError("Keras runs on another backend here")

    def swapped(loss: Loss) -> Loss:
        return lambda outputs, labels: loss(labels, outputs)

    ignoring = {"ignore_index": IGNORE}
    return [
        Case(
            "keras-a",
            "Keras SparseCategoricalCrossentropy(from_logits=True)",
            swapped(SparseCategoricalCrossentropy(from_logits=True)),
            objective="rounding",
            normaliser="rows",
            note="casts to float32",
        ),
        Case(
            "keras-b",
            "Keras SparseCategoricalCrossentropy() of probabilities",
            swapped(SparseCategoricalCrossentropy()),
            ("probs", "labels"),
            options=SINGLE,
            objective="domain",
            domain=("gap", 16.12),
            normaliser="rows",
            note="p_y clipped at 1e-7",
        ),
        Case(
            "keras-c",
            "Keras CategoricalCrossentropy() of probabilities",
            swapped(CategoricalCrossentropy()),
            ("probs", "target_probs"),
            options=SINGLE,
            objective="domain",
            domain=("gap", 16.12),
            normaliser="rows",
            note="p_y clipped at 1e-7",
        ),
        Case(
            "keras-d",
            "Keras SparseCategoricalCrossentropy() of logits by mistake",
            swapped(SparseCategoricalCrossentropy()),
            objective="different",
        ),
        Case(
            "keras-e",
            "Keras SparseCategoricalCrossentropy(from_logits=True), ignored rows",
            swapped(SparseCategoricalCrossentropy(from_logits=True, ignore_class=IGNORE)),
            options=ignoring,
            objective="rounding",
            side_effects=("all_ignored",),
            normaliser="valid targets",
            note="casts to float32",
        ),
    ]


def _catalyst() -> list[Case]:
    from catalyst.contrib.losses import NaiveCrossEntropyLoss, SymmetricCrossEntropyLoss

    naive, targets = _quiet(NaiveCrossEntropyLoss()), ("logits", "target_probs")
    return [
        Case(
            "catalyst-a",
            "Catalyst NaiveCrossEntropyLoss()",
            naive,
            targets,
            _soft,
            targets,
            {"soft_targets": True},
            objective="identical",
            side_effects=("gradient into target_probs",),
            normaliser="rows",
        ),
        Case(
            "catalyst-b",
            "Catalyst NaiveCrossEntropyLoss() of tokens",
            naive,
            targets,
            options={"tokens": True},
            objective="different",
            normaliser="not a sum over rows",
            note="softmax over the batch: no dim is given",
        ),
        Case(
            "catalyst-c",
            "Catalyst SymmetricCrossEntropyLoss(1, 0) of probabilities",
            SymmetricCrossEntropyLoss(1.0, 0.0),
            ("probs", "labels"),
            objective="different",
            normaliser="rows",
            note="targets floored at 1e-4 are not renormalised",
        ),
    ]


def _focal_loss_torch() -> list[Case]:
    from focal_loss.focal_loss import FocalLoss

    return [
        Case(
            "focal-loss-torch-a",
            "focal-loss-torch FocalLoss(gamma=0)",
            FocalLoss(gamma=0),
            ("probs", "labels"),
            objective="domain",
            domain=("gap", 25.57),
            side_effects=("nan_logits",),
            normaliser="rows",
            note="log(p_y + 1e-16)",
        )
    ]


def _balanced_loss() -> list[Case]:
    from balanced_loss import Loss

    balanced = Loss("cross_entropy", samples_per_class=list(SAMPLES_PER_CLASS), class_balanced=True)
    ten = {"num_classes": (10,)}
    return [
        Case(
            "balanced-loss-a",
            "balanced-loss Loss('cross_entropy')",
            Loss("cross_entropy"),
            objective="identical",
            domain=MASKED,
            normaliser="rows",
        ),
        Case(
            "balanced-loss-b",
            "balanced-loss Loss('cross_entropy', class_balanced) against torch's weights",
            balanced,
            reference=_weighted,
            options=ten,
            objective="reweighted",
            domain=MASKED,
            normaliser="rows",
            note="torch's mean for probabilities does not divide by the weights",
        ),
        Case(
            "balanced-loss-c",
            "balanced-loss Loss('softmax_binary_cross_entropy')",
            Loss("softmax_binary_cross_entropy"),
            options=SINGLE,
            objective="different",
            side_effects=("nan_logits",),
            note="raises on float64 logits",
        ),
        Case(
            "balanced-loss-d",
            "balanced-loss Loss('focal_loss', fl_gamma=0)",
            Loss("focal_loss", fl_gamma=0),
            objective="different",
            note="C sigmoids; float64 logits give a float32 loss",
        ),
    ]


def _cbloss() -> list[Case]:
    from cbloss.loss import ClassBalancedLoss, FocalLoss

    rows = torch.nn.CrossEntropyLoss(reduction="none")
    balanced = ClassBalancedLoss(list(SAMPLES_PER_CLASS), 0.999, len(SAMPLES_PER_CLASS), rows)
    ten = {"num_classes": (10,)}
    return [
        Case(
            "cbloss-a",
            "cbloss FocalLoss(gamma=0)",
            FocalLoss(10, gamma=0),
            options={"num_classes": (10, 1000)},
            objective="identical",
            normaliser="rows",
        ),
        Case(
            "cbloss-b",
            "cbloss ClassBalancedLoss against torch's weights",
            balanced,
            reference=_weighted,
            options=ten,
            objective="reweighted",
            normaliser="rows",
        ),
        Case(
            "cbloss-c",
            "cbloss ClassBalancedLoss against the same weights over rows",
            balanced,
            reference=_weighted_rows,
            options=ten,
            objective="identical",
            normaliser="rows",
        ),
    ]


def _metric_learning() -> list[Case]:
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import NormalizedSoftmaxLoss

    def of_logits(**keywords: Any) -> Loss:
        loss = NormalizedSoftmaxLoss(10, 10, temperature=1.0, **keywords)
        loss.W.data = torch.eye(10)
        return lambda logits, labels: loss(logits, labels)

    ten = {"num_classes": (10,)}
    plain = DotProductSimilarity(normalize_embeddings=False)
    return [
        Case(
            "metric-learning-a",
            "pytorch-metric-learning NormalizedSoftmaxLoss, rows as they are",
            of_logits(distance=plain),
            options=ten,
            objective="identical",
            domain=MASKED,
            normaliser="rows",
        ),
        Case(
            "metric-learning-b",
            "pytorch-metric-learning NormalizedSoftmaxLoss()",
            of_logits(),
            options=ten,
            objective="different",
            normaliser="rows",
        ),
    ]


def _cut_cross_entropy() -> list[Case]:
    from cut_cross_entropy import linear_cross_entropy

    def compiled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return linear_cross_entropy(hidden, weight, labels, impl="torch_compile")

    def kernel(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, impl="cce")

    args = ("hidden", "weight", "labels")
    return [
        Case(
            "cut-cross-entropy-a",
            "cut-cross-entropy's torch implementation",
            compiled,
            args,
            _linear,
            args,
            {**SINGLE, "num_classes": (2, 10, 1000)},
            objective="rounding",
            normaliser="rows",
        ),
        Case(
            "cut-cross-entropy-b",
            "cut-cross-entropy's kernel without a GPU",
            kernel,
            args,
            _linear,
            args,
            objective="not_run",
        ),
    ]


def _liger() -> list[Case]:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return [
        Case(
            "liger-a",
            "Liger cross-entropy without a GPU",
            LigerCrossEntropyLoss(),
            objective="not_run",
        )
    ]


PACKAGES: dict[str, Callable[[], list[Case]]] = {
    "timm": _timm,
    "transformers": _transformers,
    "segmentation-models-pytorch": _segmentation_models,
    "pytorch-toolbelt": _toolbelt,
    "monai": _monai,
    "kornia": _kornia,
    "entmax": _entmax,
    "torchmetrics": _torchmetrics,
    "torchvision": _torchvision,
    "fastai": _fastai,
    "keras": _keras,
    "catalyst": _catalyst,
    "focal-loss-torch": _focal_loss_torch,
    "balanced-loss": _balanced_loss,
    "cbloss": _cbloss,
    "pytorch-metric-learning": _metric_learning,
    "cut-cross-entropy": _cut_cross_entropy,
    "liger-kernel": _liger,
}
