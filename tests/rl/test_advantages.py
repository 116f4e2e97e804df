"""Advantages: exact zeros, the standard library's mean and std as second implementation, and words of errors."""

import math
import statistics
import subprocess
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from vlpost.rl.advantages import group_advantages, has_signal

reward_values = st.floats(min_value=-100.0, max_value=100.0, allow_nan=False).map(lambda reward: round(reward, 3))
groups = st.lists(reward_values, min_size=2, max_size=16)


def test_std_scaling_of_a_small_group():
    # mean 0.5, squared deviations sum to 1.0, unbiased std sqrt(1/3)
    std = math.sqrt(1 / 3)
    expected = 0.5 / (std + 1e-4)

    assert group_advantages([1.0, 0.0, 0.0, 1.0]) == pytest.approx((expected, -expected, -expected, expected), rel=1e-15)
    assert expected == pytest.approx(0.86588, abs=5e-6)


def test_none_scaling_only_centres():
    assert group_advantages([3.0, 0.0, 0.0, 1.0], scale="none") == (2.0, -1.0, -1.0, 0.0)


def test_eps_is_added_to_the_std():
    assert group_advantages([0.0, 1.0], eps=1.0) == pytest.approx((-0.5 / (math.sqrt(0.5) + 1), 0.5 / (math.sqrt(0.5) + 1)))


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize(("reward", "size"), [(0.1, 3), (0.7, 6), (1 / 3, 7), (1e300, 4), (0.0, 2)])
def test_equal_rewards_give_exact_zeros(reward, size, scale):
    rewards = [reward] * size

    assert group_advantages(rewards, scale=scale) == (0.0,) * size
    assert not has_signal(rewards)


def test_the_smallest_difference_is_signal():
    assert has_signal([0.3, 0.3, math.nextafter(0.3, 1.0)])
    assert has_signal([1.0, 1.0, 1.0, 0.0])
    assert not has_signal([0.0, -0.0])
    assert not has_signal([0.5])
    assert not has_signal([])


@given(rewards=groups, eps=st.sampled_from([1e-6, 1e-4, 1.0]))
def test_agrees_with_the_standard_library(rewards, eps):
    assume(has_signal(rewards))
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)

    assert group_advantages(rewards, eps=eps) == pytest.approx([(reward - mean) / (std + eps) for reward in rewards], rel=1e-9, abs=1e-9)


@given(rewards=groups)
def test_advantages_sum_to_zero_and_keep_the_order(rewards):
    advantages = group_advantages(rewards)

    assert sum(advantages) == pytest.approx(0.0, abs=1e-8)
    by_reward = sorted(zip(rewards, advantages, strict=True))
    assert [advantage for _, advantage in by_reward] == sorted(advantages)


@given(rewards=groups, seed=st.randoms(use_true_random=False))
def test_order_of_the_rollouts_does_not_matter(rewards, seed):
    order = list(range(len(rewards)))
    seed.shuffle(order)

    permuted = group_advantages([rewards[index] for index in order])

    advantages = group_advantages(rewards)
    assert permuted == pytest.approx([advantages[index] for index in order], rel=1e-12, abs=1e-15)


@given(rewards=groups, shift=st.integers(-50, 50), factor=st.sampled_from([0.5, 2.0, 10.0]))
def test_shift_and_scale_of_the_rewards_cancel(rewards, shift, factor):
    assume(has_signal(rewards))
    assume(statistics.stdev(rewards) > 1e-2)
    eps = 1e-12

    moved = group_advantages([factor * reward + shift for reward in rewards], eps=eps)

    assert moved == pytest.approx(group_advantages(rewards, eps=eps), abs=1e-8)


def test_large_rewards_do_not_overflow_the_std():
    assert group_advantages([1e200, -1e200]) == pytest.approx((math.sqrt(0.5), -math.sqrt(0.5)))


@pytest.mark.parametrize("rewards", [[], [1.0]])
def test_fewer_than_two_rollouts_are_refused(rewards):
    with pytest.raises(ValueError, match=rf"^{len(rewards)} judged rollouts in the group.*drop the group$"):
        group_advantages(rewards)


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_named(reward):
    with pytest.raises(ValueError, match=rf"rewards\[2\] = {reward!r}: a reward must be finite.*Unavailable"):
        group_advantages([0.0, 1.0, reward, 0.5])


def test_sum_overflow_is_refused_in_words():
    with pytest.raises(ValueError, match=r"rewards up to 1.7e\+308 overflow when summed"):
        group_advantages([1.7e308, 1.7e308, 1.6e308])


def test_unknown_scale_and_wrong_eps_are_refused():
    with pytest.raises(ValueError, match="scale = 'batch': must be 'std' or 'none'"):
        group_advantages([0.0, 1.0], scale="batch")
    for eps in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"eps = .*: must be finite and above 0"):
            group_advantages([0.0, 1.0], eps=eps)


def test_needs_no_torch():
    script = "import sys, vlpost.rl.advantages; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", script], check=False, cwd="/").returncode == 0
