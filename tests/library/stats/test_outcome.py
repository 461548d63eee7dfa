from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from likelihood_lab.stats.equivalence import Floats, holm, minimum_effect, seeds_needed
from likelihood_lab.stats.outcome import OutcomeFinding, compare, correct_for_arms
from likelihood_lab.stats.pairs import Status

MARGINS = {"nll": 0.1, "brier": 0.01, "accuracy": 0.01}
PRIMARY = ("nll", "brier")
MetricSums = dict[str, Floats]


def trained(seed: int, n: int) -> MetricSums:
    rng = np.random.default_rng(seed)
    return {
        "nll": 0.2 * np.exp(0.05 * rng.standard_normal(n)),
        "brier": 0.08 + 0.004 * rng.standard_normal(n),
        "accuracy": 0.95 + 0.004 * rng.standard_normal(n),
        "ece": 0.02 + 0.002 * rng.random(n),
    }


def retrained(reference: MetricSums, seed: int, *, shift: float = 0.0, noise: float = 0.3) -> MetricSums:
    """The same runs with paired noise and a shift of the mean, both in units of the margins."""
    rng = np.random.default_rng(1000 + seed)
    moved = {}
    for name, values in reference.items():
        change = MARGINS.get(name, 0.01) * (shift + noise * rng.standard_normal(values.size))
        moved[name] = values * np.exp(change) if name == "nll" else values + change
    return moved


def judge(candidate: MetricSums, reference: MetricSums, **options: Any) -> OutcomeFinding:
    request: dict[str, Any] = {"primary": PRIMARY, "margins": MARGINS, "num_classes": 10}
    return compare(candidate, reference, **(request | options))


def with_failures(values: MetricSums, failed: range) -> tuple[MetricSums, list[Status]]:
    broken = {name: v.copy() for name, v in values.items()}
    for v in broken.values():
        v[failed] = math.nan
    return broken, ["diverged" if s in failed else "ok" for s in range(values["nll"].size)]


def judge_noise(seed: int, n: int, *, shift: float = 0.0, noise: float = 0.3, **options: Any) -> OutcomeFinding:
    """Judge runs that differ from their reference by paired noise."""
    reference = trained(seed, n)
    return judge(retrained(reference, seed, shift=shift, noise=noise), reference, **options)


def judge_failures(seed: int, n: int, failed: range, **options: Any) -> OutcomeFinding:
    """Judge a candidate that diverges in some seeds and hardly differs in the others."""
    reference = trained(seed, n)
    candidate, status = with_failures(retrained(reference, seed, noise=0.01), failed)
    return judge(candidate, reference, candidate_status=status, **options)


# --- the words ---


@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_compare_of_bitwise_equal_pairs_is_identical_without_tests(n: int) -> None:
    reference = trained(0, n)
    found = judge(reference, reference, bitwise_identical=np.ones(n, dtype=bool))
    assert (found.word, found.reasons, found.p_equivalent, found.p_different) == ("identical", (), None, None)
    assert {m.p_tost for m in found.metrics.values()} == {None}


def test_compare_with_one_pair_of_other_weights_is_not_identical() -> None:
    reference = trained(0, 12)
    same_bits = np.arange(12) != 4
    assert judge(reference, reference, bitwise_identical=same_bits).word == "equivalent"
    few = {name: v[:4] for name, v in reference.items()}
    assert judge(few, few, bitwise_identical=same_bits[1:5]).word == "inconclusive"


def test_compare_of_small_noise_is_equivalent() -> None:
    found = judge_noise(1, 20)
    assert (found.word, found.reasons) == ("equivalent", ())
    assert found.p_equivalent == max(found.metrics[name].p_tost or 0 for name in PRIMARY)
    shifted = judge_noise(6, 30, shift=0.5, noise=0.2)
    assert shifted.word == "equivalent"
    assert shifted.metrics["nll"].excludes_zero


def test_compare_of_a_shift_beyond_the_margin_is_different() -> None:
    found = judge_noise(2, 20, shift=2.0)
    assert found.word == "different"
    assert any(reason.startswith("nll differs by +") for reason in found.reasons)
    assert judge_noise(8, 3, shift=20.0).word == "different"


def test_compare_of_a_shift_to_the_margin_names_the_metrics() -> None:
    found = judge_noise(3, 20, shift=1.0)
    assert found.word == "inconclusive"
    assert [reason.split(":")[0] for reason in found.reasons] == ["nll", "brier"]


def test_compare_needs_every_primary_metric_to_be_equivalent() -> None:
    reference = trained(4, 20)
    candidate = retrained(reference, 4) | {"brier": retrained(reference, 4, shift=0.95)["brier"]}
    found = judge(candidate, reference)
    assert found.metrics["nll"].equivalent
    assert found.word == "inconclusive"


def test_compare_does_not_decide_by_other_metrics() -> None:
    reference = trained(5, 20)
    candidate = retrained(reference, 5) | {"accuracy": reference["accuracy"] - 0.2}
    found = judge(candidate, reference)
    assert found.metrics["accuracy"].different
    assert found.word == "equivalent"
    assert judge(candidate, reference, primary=(*PRIMARY, "accuracy")).word == "different"


@pytest.mark.parametrize("n", [1, 2, 4, 5, 9])
def test_compare_of_few_pairs_is_provisional_from_five(n: int) -> None:
    found = judge_noise(7, n, noise=0.01)
    assert found.word == "inconclusive"
    assert found.provisional == (n >= 5)
    assert f"both runs finished in {n} pairs and equivalence needs 10" in found.reasons


def test_compare_of_one_seed_is_inconclusive_for_any_difference() -> None:
    found = judge_noise(9, 1, shift=50.0)
    assert found.word == "inconclusive"
    assert found.seeds_needed is None


def test_compare_without_margins_is_never_equivalent() -> None:
    reference = trained(10, 20)
    same = judge(retrained(reference, 11), reference, margins=None)
    assert same.word == "inconclusive"
    assert same.reasons == ("no margins are declared, so equivalence cannot be tested",)
    assert same.seeds_needed is None
    assert judge(retrained(reference, 11, shift=0.5), reference, margins=None).word == "different"


def test_compare_corrects_a_difference_for_two_metrics() -> None:
    reference = trained(12, 12)
    offset = np.linspace(-1, 1, 12)
    for mean in np.linspace(1.0, 2.0, 201):
        shifted = reference["brier"] + MARGINS["brier"] * (mean + offset)
        alone = float(minimum_effect(shifted - reference["brier"], MARGINS["brier"]))
        if 0.026 < alone < 0.049:
            break
    candidate = reference | {"brier": shifted}
    assert judge(candidate, reference, primary=("brier",)).word == "different"
    found = judge(candidate, reference)
    assert found.word == "inconclusive"
    assert found.p_different == pytest.approx(2 * alone)


# --- failures ---

WIDE = dict.fromkeys(MARGINS, 10.0)


def test_compare_with_divergence_under_one_loss_is_not_equivalent() -> None:
    found = judge_failures(13, 40, range(1), margins=WIDE)
    assert all(found.metrics[name].equivalent for name in PRIMARY)
    assert found.word == "inconclusive"
    assert found.reasons == ("seeds that diverged under one loss alone: 1 (candidate 1, reference 0)",)


def test_compare_of_a_loss_that_always_diverges_is_different() -> None:
    found = judge_failures(14, 5, range(5))
    assert (found.word, found.num_valid) == ("different", 0)


def test_compare_takes_frequent_divergence_for_a_difference() -> None:
    found = judge_failures(15, 20, range(9), margins=WIDE)
    assert found.word == "different"
    assert found.p_different == pytest.approx(3 * 2 * 0.5**9)
    assert len(found.reasons) == 1


@pytest.mark.parametrize(("failed", "n"), [(0, 5), (0, 10), (0, 30), (3, 10), (10, 10)])
def test_collapse_rate_bound_matches_clopper_pearson(failed: int, n: int) -> None:
    """A seed that diverges under both losses counts alike. Without a pair there is no bound."""
    bound = judge_failures(15, n, range(failed)).collapse_rate_bound
    expected = 1.0 if failed == n else float(proportion_confint(failed, n, alpha=0.1, method="beta")[1])
    assert bound == pytest.approx(expected)
    reference, both = with_failures(trained(15, n), range(failed))
    found = judge(reference, reference, candidate_status=both, reference_status=both)
    assert found.collapse_rate_bound == bound
    missing: list[Status] = ["missing"] * n
    not_run = judge(reference, reference, candidate_status=missing, reference_status=missing)
    assert not_run.collapse_rate_bound is None
    if not failed:
        assert bound == pytest.approx(1 - 0.05 ** (1 / n))


def test_compare_with_divergence_under_both_losses_counts_finished_pairs() -> None:
    reference, failed = with_failures(trained(16, 14), range(5))
    candidate = retrained(reference, 16, noise=0.01)
    found = judge(candidate, reference, candidate_status=failed, reference_status=failed)
    assert (found.failures.both, found.num_valid) == (5, 9)
    assert (found.word, found.provisional) == ("inconclusive", True)


def test_compare_of_two_losses_that_always_diverge_is_inconclusive() -> None:
    reference, failed = with_failures(trained(17, 12), range(12))
    same_bits = np.ones(12, dtype=bool)
    found = judge(reference, reference, candidate_status=failed, reference_status=failed, bitwise_identical=same_bits)
    assert found.word == "inconclusive"


def test_compare_with_a_missing_pair_is_at_most_different() -> None:
    reference = trained(18, 20)
    status: list[Status] = ["missing"] + ["ok"] * 19
    assert judge(retrained(reference, 18), reference, reference_status=status).word == "inconclusive"
    assert judge(retrained(reference, 18, shift=2), reference, reference_status=status).word == "different"
    same = judge(reference, reference, reference_status=status, bitwise_identical=np.ones(20, dtype=bool))
    assert (same.word, same.reasons) == ("inconclusive", ("pairs without a result: 1",))


def test_compare_without_a_complete_pair_is_not_run() -> None:
    reference = trained(19, 3)
    found = judge(reference, reference, candidate_status=["missing"] * 3)
    assert (found.word, found.metrics) == ("not_run", {})


# --- symmetries ---

differences = st.lists(st.floats(-3, 3), min_size=1, max_size=15)


@settings(max_examples=30, deadline=None)
@given(in_margins=differences, num_failed=st.integers(0, 3))
def test_compare_mirrors_swapped_losses(in_margins: list[float], num_failed: int) -> None:
    n = len(in_margins)
    reference = trained(20, n)
    candidate = {name: v + MARGINS.get(name, 0.01) * np.array(in_margins) for name, v in reference.items()}
    candidate["nll"] = reference["nll"] * np.exp(MARGINS["nll"] * np.array(in_margins))
    candidate, status = with_failures(candidate, range(min(num_failed, n)))
    there = judge(candidate, reference, candidate_status=status)
    back = judge(reference, candidate, reference_status=status)
    assert there.word == back.word
    assert there.failures.candidate_only == back.failures.reference_only
    assert there.seeds_needed == back.seeds_needed
    for name in PRIMARY:
        assert there.metrics[name].mean_difference == -back.metrics[name].mean_difference
        assert there.metrics[name].p_lower == back.metrics[name].p_upper
        assert there.metrics[name].p_difference == back.metrics[name].p_difference


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(12)), shift=st.sampled_from([0.0, 0.9, 2.0]))
def test_compare_does_not_depend_on_the_order_of_seeds(order: list[int], shift: float) -> None:
    reference = trained(21, 12)
    candidate, status = with_failures(retrained(reference, 21, shift=shift), range(1))
    found = judge(candidate, reference, candidate_status=status)
    shuffled = judge(
        {name: v[order] for name, v in candidate.items()},
        {name: v[order] for name, v in reference.items()},
        candidate_status=[status[s] for s in order],
    )
    assert shuffled.word == found.word
    assert shuffled.failures == found.failures
    for name in PRIMARY:
        assert shuffled.metrics[name].p_tost == pytest.approx(found.metrics[name].p_tost, rel=1e-9)


# --- seeds needed ---


def test_seeds_needed_are_for_the_hardest_primary_metric() -> None:
    found = judge_noise(22, 10, noise=1.5, alpha=0.025)
    each = [judge_noise(22, 10, noise=1.5, alpha=0.025, primary=(p,)).seeds_needed for p in PRIMARY]
    assert found.seeds_needed == max(needed for needed in each if isinstance(needed, int)) > 10
    brier = found.metrics["brier"]
    assert brier.sd is not None
    assert found.seeds_needed > seeds_needed(brier.sd, MARGINS["brier"], alpha=0.025)


def test_seeds_needed_are_at_least_ten_and_at_most_the_limit() -> None:
    assert judge_noise(23, 8, noise=0.01).seeds_needed == 10
    assert judge_noise(23, 8, noise=5.0, max_seeds=30).seeds_needed == "unreachable"


@pytest.mark.parametrize("mean", [0.0085, 0.0115])
def test_seeds_needed_grow_if_they_were_inconclusive(mean: float) -> None:
    """Ten seeds would have decided a difference of 0; these means are close to the margin, inside and outside."""
    noise = np.random.default_rng(1).standard_normal(10)
    noise = 0.003 * (noise - noise.mean()) / noise.std(ddof=1)
    reference = {"brier": 0.1 + np.zeros(10)}
    found = judge({"brier": 0.1 + mean + noise}, reference, primary=["brier"])
    assert found.word == "inconclusive"
    assert isinstance(found.seeds_needed, int)
    assert found.seeds_needed > 10


# --- correction for several losses ---


def arms_of(seed: int, n: int, **noise: float) -> dict[str, OutcomeFinding]:
    """Twelve candidates of one reference."""
    reference = trained(seed, n)
    return {str(k): judge(retrained(reference, k, **noise), reference) for k in range(12)}


def test_correct_for_arms_applies_holm() -> None:
    arms = arms_of(24, 12, noise=0.8)
    claimed = [name for name, f in arms.items() if f.word == "equivalent"]
    corrected = correct_for_arms(arms)
    p = dict(zip(arms, holm([f.p_equivalent for f in arms.values() if f.p_equivalent is not None]), strict=True))
    kept = [name for name, f in corrected.items() if f.word == "equivalent"]
    assert kept == [name for name in claimed if p[name] <= 0.05]
    assert 0 < len(kept) < len(claimed)
    lost = next(name for name in claimed if name not in kept)
    assert corrected[lost].word == "inconclusive"
    assert "not after Holm over 12 losses" in corrected[lost].reasons[-1]
    assert correct_for_arms(arms, claim="all") == arms


def test_correct_for_arms_corrects_differences_for_any_claim() -> None:
    arms = arms_of(24, 12, shift=1.75, noise=1.0)
    before, after = (
        sum(f.word == "different" for f in findings.values())
        for findings in (arms, correct_for_arms(arms, claim="all"))
    )
    assert 0 < after < before


def test_correct_for_arms_corrects_provisional_equivalence() -> None:
    arms = arms_of(29, 6, noise=0.6)
    before, after = (sum(f.provisional for f in findings.values()) for findings in (arms, correct_for_arms(arms)))
    assert 0 < after < before


def test_correct_for_arms_leaves_out_findings_without_a_test() -> None:
    reference = trained(25, 12)
    identical = judge(reference, reference, bitwise_identical=np.ones(12, dtype=bool))
    arms = {"a": identical, "b": judge(retrained(reference, 25), reference), "c": identical}
    assert correct_for_arms(arms) == arms
    constant = judge(reference | {"brier": reference["brier"] + 0.02}, reference)
    assert (constant.word, constant.p_different) == ("different", None)
    assert constant.reasons == ("brier differs by +0.02 (margin 0.01) in all 12 seeds",)
    noisy = judge(retrained(reference, 28, noise=1.0), reference)
    assert correct_for_arms({"a": constant, "b": noisy, "c": noisy})["a"] == constant


# --- wrong arguments ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 0.5}, "alpha"),
        ({"primary": ()}, "primary"),
        ({"primary": ("loss",)}, "primary"),
        ({"margins": {"nll": 0.1}}, "needs a margin"),
        ({"margins": MARGINS | {"nll": 0.0}}, "positive"),
        ({"margins": MARGINS | {"nll": math.nan}}, "positive"),
    ],
)
def test_compare_refuses_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    reference = trained(27, 3)
    with pytest.raises(ValueError, match=message):
        judge(reference, reference, **options)


def test_compare_refuses_undeclared_non_finite_values() -> None:
    reference = trained(26, 3)
    with pytest.raises(ValueError, match="not finite in a run declared ok"):
        judge(with_failures(reference, range(1))[0], reference)
