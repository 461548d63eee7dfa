"""Confusions from practice, as pairs with a known verdict: the audit's conformance suite.

Every row has a case, or the reason why it has none.
`python -m experiments.audit.catalogue` prints the table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from experiments.audit import spellings
from experiments.audit.case import Case

ON_TARGETS = ("logits", "target_probs")
LOGS_ON_LABELS = ("log_probs", "labels")
LOGS_ON_TARGETS = ("log_probs", "target_probs")
PROBS_ON_LABELS = ("probs", "labels")
PROBS_ON_TARGETS = ("probs", "target_probs")
FUSED = ("hidden", "weight", "labels")

SOFT = {"soft_targets": True}
IGNORE = {"ignore_index": -100}
NARROW = {"num_classes": (2, 10, 1000)}  # fused batches of 128 256 classes take gigabytes
MASKED = ("masked", 1.0)  # 0 * -inf in the sum over classes
INTO_TARGETS = "gradient into target_probs"  # torch also computes gradients for soft targets

KL = partial(F.kl_div, reduction="batchmean")
SOFT_REFERENCE: dict[str, Any] = {"reference_args": ON_TARGETS, "options": SOFT}

SOURCES: dict[int, str] = {
    1: "pytorch#2259, pytorch#14457, deit#61, LD#74",
    2: "sparseml#674, sparseml#592",
    3: "MXNet forum 4807",
    4: "pytorch#57459, pytorch#7337, attention#6, torchmetrics#2369",
    5: "pytorch#43348, torch/nn#923",
    6: "lego999.github.io",
    7: "aprender#2153",
    8: "lightning-bolts#654, SciCo#2, tflearn#562, CGES#1",
    9: "Pytorch-Deeplab#2",
    10: "ACGAN#4",
    11: "allennlp#2797, skorch#491, skorch#852, keras#7563",
    12: "keras#17634, keras#6338, keras#7563, scikit-learn#24315, scikit-learn#17399",
    13: "pytorch#24933, pytorch#103316, pytorch#49844, pytorch#163975",
    14: "pytorch#65329, pytorch#25571, pytorch#8062, pytorch#50528",
    15: "pytorch#61044, pytorch#61309",
    16: "pytorch#104776, fastai#1814",
    17: "icefall#107, fairseq#2273, pytorch#148884, mlx#166",
    18: "ConvE#55",
    19: "several focal and soft-target packages",
    20: "pytorch#70348, pytorch#75181, pytorch#116349, pytorch#64572, efficient_cross_entropy#6, cosmos-rl#155",
    21: "pytorch#63004",
    22: "transformers#34191, transformers#34242, unsloth#1134, trl#2175, Lightning#20350, LlamaFactory#7443",
    23: "transformers#46731, transformers#46734, transformers#47261",
    24: "Lightning#19987, Lightning#21808",
    25: "transformers#608, transformers#37474, transformers#39648",
    26: "keras#19740",
    27: "pytorch#85791, pytorch#61523, pytorch#91597",
    28: "modalities#464, trl#156, unsloth#1186, modded-nanogpt#133",
    29: "pytorch#55657, pytorch#111484",
    30: "pytorch#17350, pytorch#46024, pytorch#68698, torch-xpu-ops#2517",
    31: "Liger#512, Liger#827, Liger#968, OLMo-core#370, DirectML#739",
    32: "unsloth#5002",
    33: "optax#1786, pytorch#89558",
    34: "pytorch#195829, pytorch#11752, pytorch#39134",
    35: "tensorflow#49178, tensorflow#60314, tensorflow#2327",
    36: "tensorflow#8484, tensorflow#126005, tensorflow#57173, pytorch#15508",
    37: "yolov3#3, yolov5#720, Class-balanced-loss#8",
    38: "Co-Mixup#6",
    39: "kornia#918, liuyuisanai#11, LDAM-DRW#17, optax#1267",
    40: "UNO#4, NIL#2",
    41: "transformers#12299, transformers#1181, sparseml#592",
    42: "pytorch#150638, pytorch#168126, pytorch#168186, pytorch#173307, pytorch#171282",
    43: "pytorch#38767, d2l-en#2035, robosat#166",
    44: "pytorch#28575, pytorch#190058, Paddle#56992",
    45: "pytorch#109457, pytorch#103343, pytorch#92615, rasbt#791",
    46: "Lightning#2993, Lightning#4141, nolearn#247",
}


def _same(row: str, title: str, fn: Callable[..., Any], objective: str = "rounding", **more: Any) -> Case:
    return Case(row, title, fn, objective=objective, **more)


def _different(row: str, title: str, fn: Callable[..., Any], **more: Any) -> Case:
    return Case(row, title, fn, objective="different", **more)


def _domain(row: str, title: str, fn: Callable[..., Any], axis: str, limit: float | None, **more: Any) -> Case:
    return Case(row, title, fn, objective="domain", domain=(axis, limit), **more)


def _reweighted(row: str, title: str, fn: Callable[..., Any], normaliser: str, **more: Any) -> Case:
    return Case(row, title, fn, objective="reweighted", normaliser=normaliser, **more)


DIVERGENCES = (
    Case(
        "1", "kl_div by its default reduction", spellings.kl_mean_of_elements, LOGS_ON_TARGETS, objective="scaled",
        domain=MASKED, normaliser="rows", note="k = 1/C; N C elements are N rows at one C",
    ),
    _reweighted(
        "2a", "kl_div batchmean of tokens", KL, "B", args=LOGS_ON_TARGETS, options={"tokens": True}, domain=MASKED,
        note="k = T",
    ),
    _reweighted(
        "2b", "the same with padding", KL, "B", args=LOGS_ON_TARGETS, options={"tokens": True} | IGNORE,
        domain=MASKED, side_effects=("all_ignored",), note="k = valid tokens / B; 0 where all are ignored",
    ),
    _same(
        "3a", "KL for cross-entropy, soft targets", KL, "offset", args=LOGS_ON_TARGETS, **SOFT_REFERENCE,
        side_effects=(INTO_TARGETS,), note="-H(y), which moves with the targets",
    ),
    _same(
        "3b", "KL for cross-entropy, labels", KL, "identical", args=LOGS_ON_TARGETS, domain=MASKED,
        normaliser="rows", note="H(y) = 0",
    ),
    _different(
        "4a", "kl_div(log y, p): the reverse divergence", spellings.kl_of_swapped_arguments, args=PROBS_ON_TARGETS,
        **SOFT_REFERENCE, side_effects=(INTO_TARGETS,),
    ),
    _different(
        "4b", "kl_div(y, p): swapped and no logarithm", spellings.kl_of_bare_swap, args=PROBS_ON_TARGETS,
        **SOFT_REFERENCE, side_effects=(INTO_TARGETS,),
    ),
    _different(
        "5", "kl_div of probabilities", KL, args=PROBS_ON_TARGETS, note="negative values: -p_y for labels"
    ),
    _different("6", "log_target=True on probabilities", spellings.kl_with_log_target, args=LOGS_ON_TARGETS),
    _different(
        "7a", "distillation by KL(model; target)", spellings.model_to_target_kl, args=LOGS_ON_TARGETS,
        **SOFT_REFERENCE, side_effects=(INTO_TARGETS,), note='neither is "forward" for everybody: name the arguments',
    ),
    _same(
        "7b", "distillation by KL(target; model)", spellings.target_to_model_kl, "offset", args=LOGS_ON_TARGETS,
        **SOFT_REFERENCE, side_effects=(INTO_TARGETS,),
    ),
)  # fmt: skip

SOFTMAX_AND_LOGARITHM = (
    _different(
        "8", "softmax twice", spellings.softmax_twice, args=PROBS_ON_LABELS,
        note="never below ln(1 + (C - 1) / e): 1.46 for C = 10",
    ),
    _same("9", "log_softmax twice", spellings.log_softmax_twice, args=LOGS_ON_LABELS),
    _different("10", "nll_loss of probabilities", F.nll_loss, args=PROBS_ON_LABELS, note="-p_y, in [-1, 0]"),
    _same(
        "11a", "log(softmax(z))", spellings.log_of_softmax, args=PROBS_ON_LABELS, domain=("gap", 90.1),
        note="NaN where 1 / (N p_y) overflows: l = 88.72 + ln N, here N = 4; the value is infinite from 103.97",
    ),
    _same(
        "11b", "log(softmax(z)_y)", spellings.log_of_chosen_probability, args=PROBS_ON_LABELS, domain=("gap", 90.1),
        note="as 11a; without its NaN at confidence 104 and at masked classes",
    ),
    _domain(
        "12a", "probabilities clipped to [1e-7, 1 - 1e-7]", partial(spellings.clipped, epsilon=1e-7), "gap", 16.12,
        args=PROBS_ON_LABELS, note="gradient 0 beyond 16.118 nats",
    ),
    _domain(
        "12b", "probabilities clipped at finfo.eps", spellings.clipped_at_machine_epsilon, "gap", 15.94,
        args=PROBS_ON_LABELS, note="gradient 0 beyond 15.942 nats in float32, 36.044 in float64",
    ),
    _different(
        "12c", "log(p + 1e-7)", partial(spellings.epsilon_added, epsilon=1e-7), args=PROBS_ON_LABELS,
        note="ordinary rows too are off by 1e-7 / p: within rounding in float32, not in float64",
    ),
    _domain(
        "13", "BCE of sigmoid", spellings.bce_of_sigmoid, "gap", 27.63, args=ON_TARGETS,
        reference=F.binary_cross_entropy_with_logits, reference_args=ON_TARGETS, side_effects=("nan_logits",),
        note="gradient wrong at y = 1, z < -27.63 and at y = 0, z > 16.64 (-1.9e-10 for -1 at -50, the value exact); "
        "raises where s is NaN",
    ),
)  # fmt: skip

WEIGHTS_AND_SMOOTHING = (
    _reweighted(
        "14a", "class weights, mean of unreduced losses", spellings.weighted_over_rows, "rows",
        reference=spellings.weighted,
    ),
    _reweighted(
        "14b", "class weights, torch's mean", spellings.weighted, "sum of class weights",
        reference=spellings.weighted_over_rows, note="with one row in the batch the weight cancels",
    ),
    _different("14c", "class weights, against none", spellings.weighted, normaliser="sum of class weights"),
    _reweighted(
        "15", "class weights, one-hot targets for labels", spellings.weighted_probabilities, "rows", args=ON_TARGETS,
        reference=spellings.weighted, domain=MASKED,
    ),
    _different(
        "16", "class weights with smoothing, uniform part not weighted", spellings.weighted_smoothed_labels_only,
        reference=spellings.weighted_smoothed, normaliser="not a sum over rows",
        note="a share of N and a share of the sum of class weights",
    ),
    _different("17a", "smoothing over the C - 1 others", spellings.smoothed_over_others, reference=spellings.smoothed),
    _same(
        "17b", "the same at e (C - 1) / C", spellings.smoothed_over_others_reparametrised,
        reference=spellings.smoothed,
    ),
    _different(
        "18", "smoothing by + 1 / C for + e / C", spellings.smoothed_with_typo, reference=spellings.smoothed,
        note="targets sum to 2 - e",
    ),
)  # fmt: skip

NORMALISERS = (
    _reweighted(
        "19", "ignored rows counted", spellings.over_all_rows, "rows", options=IGNORE, side_effects=("all_ignored",)
    ),
    _same(
        "20", "all targets ignored: 0 for NaN", spellings.over_at_least_one, "identical", options=IGNORE,
        side_effects=("all_ignored",), normaliser="valid targets", note="POLICY",
    ),
    _different(
        "21", "ignore_index of a real class, against removing it", spellings.named_class_ignored,
        reference=spellings.named_class_removed, options={"num_classes": (10,)},
    ),
    _different(
        "22a", "accumulation: mean of the means of four micro-batches", spellings.accumulated, options=IGNORE,
        side_effects=("all_ignored",), normaliser="means of groups",
    ),
    _different(
        "22b", "accumulation: every sequence a micro-batch", spellings.mean_of_sequences,
        options={"tokens": True} | IGNORE, side_effects=("all_ignored",), normaliser="means of groups",
    ),
    _reweighted(
        "23", "label smoother that ignores num_items_in_batch", spellings.smoothed_over_own_items, "valid targets",
        reference=spellings.smoothed_over_all_items, options=IGNORE, side_effects=("all_ignored",),
        note=f"k = {spellings.NUM_ITEMS} / valid targets",
    ),
    _different(
        "24a", "partial accumulation window, over G all the same", spellings.partial_window,
        normaliser="means of groups",
    ),
    _reweighted(
        "24b", "the same, micro-batches of one row", spellings.partial_window_of_single_rows, "a constant",
        note=f"k = N / {spellings.ACCUMULATION}",
    ),
    _different(
        "25a", "DataParallel: mean over two halves' means", spellings.data_parallel, options=IGNORE,
        side_effects=("all_ignored",), normaliser="means of groups",
    ),
    _different(
        "25b", "DDP: two ranks that take turns in taking rows", spellings.distributed, options=IGNORE,
        side_effects=("all_ignored",), normaliser="means of groups",
    ),
    _reweighted(
        "26a", "sample weights, over the batch", spellings.sample_weighted_over_batch, "rows",
        reference=spellings.sample_weighted_mean,
    ),
    _reweighted(
        "26b", "sample weights, over their sum", spellings.sample_weighted_mean, "sum of class weights",
        reference=spellings.sample_weighted_over_batch, note="weights that follow from the label",
    ),
)  # fmt: skip

PRECISION_AND_KERNELS = (
    _domain(
        "27", "mean in float16", F.cross_entropy, "rows", None, reference=spellings.in_float32,
        options={"dtype": torch.float16}, note="the sum passes 65 504: infinite from 24 200 rows of 2.7 nats; "
        "gradient 0 from 65 520 rows",
    ),
    _same(
        "28a", "bfloat16 logits, declared", F.cross_entropy, reference=spellings.in_float32,
        options={"dtype": torch.bfloat16},
    ),
    _different(
        "28b", "float32 logits rounded to bfloat16 inside", spellings.in_bfloat16,
        note="the same function at dtype=torch.bfloat16",
    ),
    _same("28c", "float64 logits brought to float32 inside", spellings.in_float32, note="computes in float32"),
    Case(
        "29", "float32 sums over many rows", outside="because it takes 2e7 rows, or more than 2^32 logits, to show; "
        "the largest batch of the audit has 2^18 logits",
    ),
    Case(
        "30", "nll_loss2d on CUDA differs from run to run", outside="because only the GPU's atomic additions do it; "
        "on the CPU equal calls give equal bits",
    ),
    _different(
        "31a", "right value, no gradient", partial(spellings.hand_written, way="zero"), side_effects=("nan_logits",),
        note="gradients are 0, also where a logit is NaN",
    ),
    _different("31b", "right value, gradient rounded to bfloat16", partial(spellings.hand_written, way="bfloat16")),
    _different(
        "31c", "fused linear loss, weight's gradient added up in bfloat16", spellings.fused_linear_adding_in_bfloat16,
        args=FUSED, options=NARROW,
    ),
    _same("31d", "fused linear loss, an honest one", spellings.fused_linear, args=FUSED, options=NARROW),
    _same(
        "32a", "gradient written over the logits in backward", partial(spellings.hand_written, way="backward"),
        side_effects=("overwrites logits", "second backward differs"),
    ),
    _same(
        "32b", "gradient written over the logits in forward", partial(spellings.hand_written, way="forward"),
        side_effects=("overwrites logits",),
    ),
    _same("33a", "masked classes, labels", F.nll_loss, "identical", args=LOGS_ON_LABELS, normaliser="rows"),
    _same("33b", "masked classes, one-hot targets", F.cross_entropy, "identical", args=ON_TARGETS, domain=MASKED),
    _same("33c", "masked classes, KL", spellings.target_to_model_kl, "identical", args=LOGS_ON_TARGETS, domain=MASKED),
    _domain(
        "34a", "log(sum(exp z)) with nothing subtracted", spellings.unshifted_logsumexp, "offset", 85.6,
        note="exp overflows at 88.72 in float32",
    ),
    _same("34b", "logsumexp(z) - z_y", spellings.shifted_logsumexp),
    _different(
        "35a", "gradient p - y of targets that sum to 2", partial(spellings.probs_minus_targets, mass=2.0),
        args=ON_TARGETS, reference=partial(spellings.cross_entropy_of_mass, mass=2.0), reference_args=ON_TARGETS,
        note="the value is right",
    ),
    _same(
        "35b", "gradient p - y of targets that sum to 1", spellings.probs_minus_targets, args=ON_TARGETS, domain=MASKED,
    ),
    _same(
        "36a", "a label that is no class: NaN for an error", spellings.nan_for_unknown_labels, "identical",
        side_effects=("label_out_of_range",), note="POLICY",
    ),
    _same(
        "36b", "a label that is no class: the nearest one", spellings.nearest_known_label, "identical",
        side_effects=("label_out_of_range",), note="POLICY",
    ),
)  # fmt: skip

OTHER_LOSSES = (
    _same(
        "37", "binary cross-entropy of z_1 - z_0", spellings.bce_of_the_difference, options={"num_classes": (2,)},
        side_effects=("label_out_of_range",),
        note="one function of two logits; a model that has one logit in their place is moved half as far by SGD: "
        "outside of the loss",
    ),
    _different("38", "one binary decision for every class", spellings.bce_over_classes, args=ON_TARGETS),
    _domain(
        "39a", "focal loss, gamma 0.5", partial(spellings.focal, gamma=0.5), "confidence", 16.64,
        reference=partial(spellings.focal_of_log_odds, gamma=0.5),
        note="NaN where p_y rounds to 1: 16.64 in float32, 36.7 in float64",
    ),
    _same(
        "39b", "focal loss, gamma 2", partial(spellings.focal, gamma=2.0),
        reference=partial(spellings.focal_of_log_odds, gamma=2.0),
    ),
    _same("39c", "focal loss, gamma 0", partial(spellings.focal, gamma=0.0), "identical"),
    _different("39d", "focal loss, gamma 2, for cross-entropy", partial(spellings.focal, gamma=2.0)),
    _different(
        "40a", "softmax over the rows", spellings.softmax_over_rows, normaliser="not a sum over rows",
        side_effects=("nan_logits",), note="a NaN spoils its column, which other labels do not read",
    ),
    _different(
        "40b", "[B, T, V] viewed as [B, V, T]", spellings.view_for_transpose, options={"tokens": True},
    ),
    Case(
        "41a", "distillation without T^2", partial(spellings.distillation, factor=1.0), ON_TARGETS,
        partial(spellings.distillation, factor=spellings.TEMPERATURE**2), ON_TARGETS, SOFT, "scaled",
        side_effects=(INTO_TARGETS,), note="k = 1/16; target_probs are the teacher's at T = 4",
    ),
    _different(
        "41b", "distillation with T^2, for T = 1", partial(spellings.distillation, factor=spellings.TEMPERATURE**2),
        args=ON_TARGETS, **SOFT_REFERENCE, side_effects=(INTO_TARGETS,), note="scaled only as T grows",
    ),
    _same(
        "42", "compiled for eager, bfloat16", spellings.stepwise_fused, reference=spellings.stepwise,
        options={"dtype": torch.bfloat16},
        note="what fusing the casts away does, without a compiler; a compiled loss is asked like any other",
    ),
    Case(
        "43a", "Adam(weight_decay), AdamW, L2 term", outside="because decay belongs to the optimizer; "
        "the audit sees the loss",
    ),
    _different("43b", "an L2 term in the loss", spellings.l2_penalised, args=FUSED, options=NARROW),
    Case(
        "44", "Poisson and Gaussian likelihoods", outside="because they are losses of counts and real numbers; "
        "the audit's batches are logits and classes",
    ),
    Case(
        "45", "MPS, CUDA and CPU disagree", outside="because one call runs on one device: ask again with "
        "device='cuda' or 'mps' where there is one",
    ),
    Case(
        "46", "logged epoch loss, a mean of batch means", outside="because it is a metric of a training run; "
        "the metrics divide sums by counts",
    ),
)  # fmt: skip

CATALOGUE: tuple[Case, ...] = (
    *DIVERGENCES, *SOFTMAX_AND_LOGARITHM, *WEIGHTS_AND_SMOOTHING, *NORMALISERS, *PRECISION_AND_KERNELS, *OTHER_LOSSES,
)  # fmt: skip

COLUMNS = ("row", "case", "source", "compared", "objective", "domain", "side effects", "divides by", "note")


def row_number(case: Case) -> int:
    """Return 13 for a case of row "13a"."""
    return int(case.row.rstrip("abcdefgh"))


def markdown() -> str:
    """Return the catalogue as one Markdown table."""
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS)), *(_line(_cells(case)) for case in CATALOGUE)]
    return "\n".join(lines)


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(case: Case) -> list[str]:
    source = SOURCES[row_number(case)]
    if case.fn is None:
        return [case.row, case.title, source, "", "outside", "", "", "", case.outside or ""]
    options = ", ".join(f"{name}={value}" for name, value in case.options.items())
    compared = f"`{_call(case.fn, case.args)}` with `{_call(case.reference, case.reference_args)}`"
    domain = "" if case.domain is None else case.domain[0] + ("" if case.domain[1] is None else f" {case.domain[1]:g}")
    return [
        case.row, case.title, source, compared + (f"; {options}" if options else ""), case.objective or "", domain,
        "; ".join(case.side_effects), case.normaliser or "", case.note,
    ]  # fmt: skip


def _call(fn: Callable[..., Any], args: tuple[str, ...]) -> str:
    """Return a call such as `kl_div(log_probs, target_probs, reduction=batchmean)`."""
    keywords = [f"{name}={value}" for name, value in getattr(fn, "keywords", {}).items()]
    return f"{getattr(fn, 'func', fn).__name__}({', '.join([*args, *keywords])})"


if __name__ == "__main__":
    print(markdown())
