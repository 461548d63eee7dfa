from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


# --- the words ---


@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_bitwise_equal_pairs_are_identical_at_any_number_of_seeds_and_are_not_tested(n: int) -> None:
    reference = trained(0, n)
    found = judge(reference, reference, bitwise_identical=np.ones(n, dtype=bool))
    assert found.word == "identical"
    assert found.reasons == ()
    assert found.p_equivalent is None
    assert found.p_different is None
    assert {m.p_tost for m in found.metrics.values()} == {None}


def test_one_pair_with_other_weights_leaves_identity_to_the_tests() -> None:
    reference = trained(0, 12)
    same_bits = np.arange(12) != 4
    assert judge(reference, reference, bitwise_identical=same_bits).word == "equivalent"
    few = {name: v[:4] for name, v in reference.items()}
    assert judge(few, few, bitwise_identical=same_bits[1:5]).word == "inconclusive"


def test_small_paired_noise_is_equivalent() -> None:
    reference = trained(1, 20)
    found = judge(retrained(reference, 1), reference)
    assert found.word == "equivalent"
    assert found.reasons == ()
    assert found.p_equivalent == max(found.metrics[name].p_tost or 0 for name in PRIMARY)


def test_a_shift_beyond_the_margin_is_different() -> None:
    reference = trained(2, 20)
    found = judge(retrained(reference, 2, shift=2.0), reference)
    assert found.word == "different"
    assert any(reason.startswith("nll differs by +") for reason in found.reasons)


def test_a_shift_to_the_margin_is_inconclusive_and_says_which_metric() -> None:
    reference = trained(3, 20)
    found = judge(retrained(reference, 3, shift=1.0), reference)
    assert found.word == "inconclusive"
    assert [reason.split(":")[0] for reason in found.reasons] == ["nll", "brier"]


def test_one_primary_metric_that_fails_its_test_blocks_equivalence() -> None:
    reference = trained(4, 20)
    candidate = retrained(reference, 4) | {"brier": retrained(reference, 4, shift=0.95)["brier"]}
    found = judge(candidate, reference)
    assert found.metrics["nll"].equivalent
    assert found.word == "inconclusive"


def test_a_metric_that_is_only_shown_does_not_decide() -> None:
    reference = trained(5, 20)
    candidate = retrained(reference, 5) | {"accuracy": reference["accuracy"] - 0.2}
    found = judge(candidate, reference)
    assert found.metrics["accuracy"].different
    assert found.word == "equivalent"
    assert judge(candidate, reference, primary=(*PRIMARY, "accuracy")).word == "different"


def test_a_reliable_shift_inside_the_margin_is_equivalent_and_said() -> None:
    reference = trained(6, 30)
    found = judge(retrained(reference, 6, shift=0.5, noise=0.2), reference)
    assert found.word == "equivalent"
    assert found.metrics["nll"].excludes_zero


@pytest.mark.parametrize("n", [1, 2, 4, 5, 9])
def test_fewer_than_ten_pairs_are_never_equivalent_and_provisional_from_five(n: int) -> None:
    reference = trained(7, n)
    found = judge(retrained(reference, 7, noise=0.01), reference)
    assert found.word == "inconclusive"
    assert found.provisional == (n >= 5)
    assert f"both runs finished in {n} pairs and equivalence needs 10" in found.reasons


def test_three_seeds_can_be_different() -> None:
    reference = trained(8, 3)
    assert judge(retrained(reference, 8, shift=20.0), reference).word == "different"


def test_one_seed_is_inconclusive_however_large_its_difference() -> None:
    reference = trained(9, 1)
    found = judge(retrained(reference, 9, shift=50.0), reference)
    assert found.word == "inconclusive"
    assert found.seeds_needed is None


def test_without_margins_nothing_is_equivalent_but_a_reliable_difference_is_different() -> None:
    reference = trained(10, 20)
    same = judge(retrained(reference, 11), reference, margins=None)
    assert same.word == "inconclusive"
    assert same.reasons == ("no margins are declared, so equivalence cannot be tested",)
    assert same.seeds_needed is None
    assert judge(retrained(reference, 11, shift=0.5), reference, margins=None).word == "different"


def test_a_difference_in_one_of_two_metrics_has_to_survive_holm() -> None:
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


def test_seeds_that_collapse_under_one_loss_alone_block_equivalence() -> None:
    reference = trained(13, 40)
    candidate, status = with_failures(retrained(reference, 13, noise=0.01), range(1))
    found = judge(candidate, reference, candidate_status=status, margins=dict.fromkeys(MARGINS, 10.0))
    assert all(found.metrics[name].equivalent for name in PRIMARY)
    assert found.word == "inconclusive"
    assert found.reasons == ("seeds that diverged under one loss alone: 1 (candidate 1, reference 0)",)


def test_a_loss_that_always_diverges_is_different() -> None:
    reference = trained(14, 5)
    candidate, status = with_failures(reference, range(5))
    found = judge(candidate, reference, candidate_status=status)
    assert found.word == "different"
    assert found.num_valid == 0
    assert found.collapse_rate_bound == 1.0


def test_frequent_divergence_alone_is_a_difference() -> None:
    reference = trained(15, 20)
    candidate, status = with_failures(retrained(reference, 15), range(9))
    huge = dict.fromkeys(MARGINS, 10.0)
    found = judge(candidate, reference, candidate_status=status, margins=huge)
    assert found.word == "different"
    assert found.p_different == pytest.approx(3 * 2 * 0.5**9)
    assert len(found.reasons) == 1


def test_seeds_that_diverge_under_both_losses_are_no_evidence_of_equivalence() -> None:
    reference, failed = with_failures(trained(16, 14), range(5))
    candidate = retrained(reference, 16, noise=0.01)
    found = judge(candidate, reference, candidate_status=failed, reference_status=failed)
    assert found.failures.both == 5
    assert found.num_valid == 9
    assert found.word == "inconclusive"
    assert found.provisional


def test_two_dead_losses_are_never_the_same() -> None:
    reference, failed = with_failures(trained(17, 12), range(12))
    found = judge(
        reference,
        reference,
        candidate_status=failed,
        reference_status=failed,
        bitwise_identical=np.ones(12, dtype=bool),
    )
    assert found.word == "inconclusive"


def test_a_missing_pair_rules_out_sameness_but_does_not_silence_a_difference() -> None:
    reference = trained(18, 20)
    status: list[Status] = ["missing"] + ["ok"] * 19
    assert judge(retrained(reference, 18), reference, reference_status=status).word == "inconclusive"
    assert judge(retrained(reference, 18, shift=2), reference, reference_status=status).word == "different"
    same_bits = np.ones(20, dtype=bool)
    same = judge(reference, reference, reference_status=status, bitwise_identical=same_bits)
    assert same.word == "inconclusive"
    assert same.reasons == ("pairs without a result: 1",)


def test_no_complete_pair_is_not_run() -> None:
    reference = trained(19, 3)
    found = judge(reference, reference, candidate_status=["missing"] * 3)
    assert found.word == "not_run"
    assert found.metrics == {}


# --- symmetries ---

differences = st.lists(st.floats(-3, 3), min_size=1, max_size=15)


@settings(max_examples=60, deadline=None)
@given(in_margins=differences, num_failed=st.integers(0, 3))
def test_swapping_the_arms_mirrors_the_finding(in_margins: list[float], num_failed: int) -> None:
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


@settings(max_examples=60, deadline=None)
@given(order=st.permutations(range(12)), shift=st.sampled_from([0.0, 0.9, 2.0]))
def test_the_order_of_the_seeds_does_not_matter(order: list[int], shift: float) -> None:
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


# --- seeds, arms, requests ---


def test_the_advice_on_seeds_is_for_the_hardest_primary_metric() -> None:
    reference = trained(22, 10)
    found = judge(retrained(reference, 22, noise=1.5), reference, alpha=0.025)
    each = [judge(retrained(reference, 22, noise=1.5), reference, alpha=0.025, primary=(p,)) for p in PRIMARY]
    assert found.seeds_needed == max(e.seeds_needed for e in each if isinstance(e.seeds_needed, int))
    assert isinstance(found.seeds_needed_shifted, int)
    assert found.seeds_needed_shifted > found.seeds_needed > 10
    brier = found.metrics["brier"]
    assert brier.sd is not None
    assert found.seeds_needed > seeds_needed(brier.sd, MARGINS["brier"], alpha=0.025)


def test_the_advice_is_never_below_the_ten_that_equivalence_needs_nor_above_the_limit() -> None:
    reference = trained(23, 8)
    assert judge(retrained(reference, 23, noise=0.01), reference).seeds_needed == 10
    assert judge(retrained(reference, 23, noise=5.0), reference, max_seeds=30).seeds_needed == "unreachable"


def test_arms_are_corrected_together_by_holm() -> None:
    reference = trained(24, 12)
    arms = {str(k): judge(retrained(reference, k, noise=0.8), reference) for k in range(12)}
    claimed = [name for name, f in arms.items() if f.word == "equivalent"]
    corrected = correct_for_arms(arms)
    p = dict(zip(arms, holm([f.p_equivalent for f in arms.values() if f.p_equivalent is not None]), strict=True))
    kept = [name for name, f in corrected.items() if f.word == "equivalent"]
    assert kept == [name for name in claimed if p[name] <= 0.05]
    assert 0 < len(kept) < len(claimed)
    lost = next(name for name in claimed if name not in kept)
    assert corrected[lost].word == "inconclusive"
    assert "not after Holm over 12 losses" in corrected[lost].reasons[-1]


def test_the_claim_that_all_arms_are_equivalent_needs_no_correction_but_a_difference_does() -> None:
    reference = trained(24, 12)
    arms = {str(k): judge(retrained(reference, k, noise=0.8), reference) for k in range(12)}
    assert correct_for_arms(arms, claim="all") == arms
    different = {str(k): judge(retrained(reference, k, shift=1.75, noise=1.0), reference) for k in range(12)}
    weakened = correct_for_arms(different, claim="all")
    assert (
        0
        < sum(f.word == "different" for f in weakened.values())
        < sum(f.word == "different" for f in different.values())
    )


def test_identical_arms_take_no_part_in_the_correction() -> None:
    reference = trained(25, 12)
    identical = judge(reference, reference, bitwise_identical=np.ones(12, dtype=bool))
    noisy = judge(retrained(reference, 25), reference)
    arms = {"a": identical, "b": noisy, "c": identical}
    assert correct_for_arms(arms) == arms


def test_a_difference_that_needed_no_test_needs_no_correction() -> None:
    reference = trained(28, 12)
    constant = judge(reference | {"brier": reference["brier"] + 0.02}, reference)
    assert constant.word == "different"
    assert constant.p_different is None
    assert constant.reasons == ("brier differs by +0.02 (margin 0.01) in all 12 seeds",)
    noisy = judge(retrained(reference, 28, noise=1.0), reference)
    assert correct_for_arms({"a": constant, "b": noisy, "c": noisy})["a"] == constant


def test_a_provisional_equivalence_has_to_survive_the_correction_too() -> None:
    reference = trained(29, 6)
    arms = {str(k): judge(retrained(reference, k, noise=0.6), reference) for k in range(12)}
    before = [name for name, f in arms.items() if f.provisional]
    after = [name for name, f in correct_for_arms(arms).items() if f.provisional]
    assert 0 < len(after) < len(before)


def test_a_value_that_is_not_finite_must_be_declared() -> None:
    reference = trained(26, 3)
    candidate, _ = with_failures(reference, range(1))
    with pytest.raises(ValueError, match="not finite in a run declared ok"):
        judge(candidate, reference)


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
def test_requests_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    reference = trained(27, 3)
    with pytest.raises(ValueError, match=message):
        judge(reference, reference, **options)


def test_advice_that_was_followed_in_vain_is_not_given_again() -> None:
    """Ten seeds would have decided a difference of 0; this one lies inside the margin, but near to it."""
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(10)
    noise = 0.003 * (noise - noise.mean()) / noise.std(ddof=1)
    brier = {"brier": 0.1 + np.zeros(10)}
    near = compare({"brier": 0.1 + 0.0085 + noise}, brier, primary=["brier"], margins={"brier": 0.01}, num_classes=10)
    assert near.word == "inconclusive"
    assert isinstance(near.seeds_needed, int)
    assert near.seeds_needed > 10
    beyond = compare({"brier": 0.1 + 0.0115 + noise}, brier, primary=["brier"], margins={"brier": 0.01}, num_classes=10)
    assert beyond.word == "inconclusive"
    assert isinstance(beyond.seeds_needed, int)
    assert beyond.seeds_needed > 10
