"""Intervals, pass@k and paired tests against numbers worked out elsewhere."""

import math
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from vlpost.recipes.confidence import (
    estimate_mean,
    mean_of_differences,
    mean_of_estimates,
    paired_difference,
    pass_at,
    sign_flip_p_value,
    wilson,
)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(1, 10))
def test_pass_at_is_the_share_of_all_choices_that_hold_a_right_one(right, k):
    choices = list(combinations(right, min(k, len(right))))
    assert pass_at(sum(right), len(right), k=k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)


def test_pass_at_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="pass@1 of 3 right among 2 responses"):
        pass_at(3, 2, k=1)


@pytest.mark.parametrize(("right", "count"), [(0, 10), (5, 10), (10, 10), (83, 100), (1, 1)])
def test_one_response_an_example_gives_wilsons_interval(right, count):
    sums = [1.0] * right + [0.0] * (count - right)
    estimate = estimate_mean(sums, [1] * count, max_trials=count)
    expected = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert estimate.mean == right / count
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert estimate.num_examples == count


def test_responses_that_agree_count_as_one_and_independent_ones_as_many():
    agreeing = estimate_mean([4.0] * 10 + [0.0] * 10, [4] * 20, max_trials=80)
    assert (agreeing.low, agreeing.high) == pytest.approx(wilson(0.5, 20))
    alike = estimate_mean([2.0] * 20, [4] * 20, max_trials=80)
    assert (alike.low, alike.high) == pytest.approx(wilson(0.5, 80))
    between = estimate_mean([3.0] * 10 + [1.0] * 10, [4] * 20, max_trials=80)
    assert (between.low, between.high) == pytest.approx(wilson(0.5, 80))  # error^2 is 1/320, and 0.25 x 320 = 80
    mixed = estimate_mean([4.0] * 5 + [3.0] * 5 + [1.0] * 5 + [0.0] * 5, [4] * 20, max_trials=80)
    assert (mixed.low, mixed.high) == pytest.approx(wilson(0.5, 0.25 / (2.5 / 16 / 20)))


def test_rewards_beyond_a_share_get_students_interval():
    values = [1.5, -0.25, 0.75, 1.0, 0.0]
    estimate = estimate_mean(values, [1] * 5, max_trials=None)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert estimate.mean == pytest.approx(0.6)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))
    alone = estimate_mean([1.5], [1], max_trials=None)
    assert (alone.mean, alone.low, alone.high) == (1.5, -math.inf, math.inf)
    with pytest.raises(ValueError, match="no examples"):
        estimate_mean([], [], max_trials=1)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_an_interval_holds_its_mean_and_stays_a_share(rights):
    estimate = estimate_mean([float(right) for right in rights], [4] * len(rights), max_trials=4 * len(rights))
    assert 0.0 <= estimate.low <= estimate.mean <= estimate.high <= 1.0
    assert estimate.high - estimate.low > 0.0
    assert estimate.half_width >= (estimate.high - estimate.low) / 2


def test_the_macro_mean_adds_squared_distances():
    tasks = [estimate_mean([1.0] * 8 + [0.0] * 2, [1] * 10, max_trials=10), estimate_mean([1.0] + [0.0] * 3, [1] * 4, max_trials=4)]
    macro = mean_of_estimates(tasks)
    assert macro.mean == pytest.approx((0.8 + 0.25) / 2)
    assert macro.low == pytest.approx(macro.mean - math.hypot(0.8 - tasks[0].low, 0.25 - tasks[1].low) / 2)
    assert macro.high == pytest.approx(macro.mean + math.hypot(tasks[0].high - 0.8, tasks[1].high - 0.25) / 2)
    assert macro.num_examples == 14


def test_with_one_response_each_the_p_value_is_that_of_the_sign_test():
    for better, worse in ((0, 0), (5, 0), (7, 2), (1, 1), (3, 11)):
        differences = [1.0] * better + [-1.0] * worse + [0.0] * 20
        expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
        assert sign_flip_p_value(differences) == pytest.approx(expected)


@given(st.lists(st.floats(-1, 1, allow_subnormal=False).map(lambda value: round(value, 3)), min_size=1, max_size=7))
def test_the_p_value_is_the_share_of_sign_patterns_as_far_out(differences):
    moved = [value for value in differences if value]
    far = abs(sum(moved)) - 1e-9
    sums = [abs(sum(sign * value for sign, value in zip(signs, moved, strict=True))) for signs in product((-1, 1), repeat=len(moved))]
    assert sign_flip_p_value(differences) == pytest.approx(sum(one >= far for one in sums) / len(sums))


def test_many_differences_are_drawn_and_come_near_the_exact_value():
    differences = [1.0] * 30 + [-1.0] * 16
    drawn = sign_flip_p_value(differences)
    assert drawn == pytest.approx(stats.binomtest(30, 46).pvalue, abs=0.01)
    assert drawn == sign_flip_p_value(differences)
    assert sign_flip_p_value([1.0] * 60) == 1 / 10_001


def test_a_paired_interval_is_that_of_resampled_examples():
    differences = [1.0] * 40 + [-1.0] * 20 + [0.0] * 140
    found = paired_difference(differences)
    assert (found.mean, found.num_better, found.num_worse, found.num_examples) == (0.1, 40, 20, 200)
    reach = 1.96 * math.sqrt((60 / 200 - 0.1**2) / 200)
    assert (found.low, found.high) == pytest.approx((0.1 - reach, 0.1 + reach), abs=0.008)
    assert found == paired_difference(list(reversed(differences)))
    same = paired_difference([0.0] * 5)
    assert (same.mean, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_one_pair_alone_says_nothing_of_the_spread():
    for value in (1.0, 0.0):
        found = paired_difference([value])
        assert (found.mean, found.low, found.high, found.p_value) == (value, -math.inf, math.inf, 1.0)


def test_each_task_counts_once_in_the_macro_difference():
    found = mean_of_differences([[1.0, 1.0, 0.0, 0.0], [-0.5]])
    assert found.mean == pytest.approx((0.5 - 0.5) / 2)
    assert (found.num_better, found.num_worse, found.num_examples) == (2, 1, 5)
    # Of the eight sign patterns of (1/4, 1/4, -1/2) every one is at least as far from 0 as their sum, 0.
    assert found.p_value == 1.0
