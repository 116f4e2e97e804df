import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.metrics import Metric, combine, maximum, mean, merge, minimum, total

FINITE = st.floats(-1e6, 1e6)
WEIGHTS = st.integers(0, 5000)
PARTS = st.lists(
    st.fixed_dictionaries(
        {"tokens": st.builds(total, FINITE), "loss": st.builds(mean, FINITE, WEIGHTS)},
        optional={"worst": st.builds(maximum, FINITE), "best": st.builds(minimum, FINITE)},
    ),
    min_size=1,
    max_size=8,
)


def test_each_reduction_gives_its_exact_value():
    parts = [
        {"loss": mean(2.0, 10), "tokens": total(10), "gap": maximum(-3.0), "room": minimum(7)},
        {"loss": mean(5.0, 20), "tokens": total(20), "gap": maximum(-4.0), "room": minimum(9)},
    ]
    assert merge(parts) == {"loss": 4.0, "tokens": 30.0, "gap": -3.0, "room": 7.0}


def test_merging_micro_batches_equals_measuring_the_whole_batch():
    losses = [0.3, 1.7, 2.2, 0.9, 4.0, 3.3]
    whole = merge([{"loss": mean(sum(losses) / 6, 6)}])["loss"]
    halves = merge([{"loss": mean(sum(losses[:2]) / 2, 2)}, {"loss": mean(sum(losses[2:]) / 4, 4)}])["loss"]
    assert halves == pytest.approx(whole, rel=1e-15)
    assert halves != pytest.approx((sum(losses[:2]) / 2 + sum(losses[2:]) / 4) / 2, rel=1e-2)


def test_a_mean_without_weight_is_left_out_and_its_nan_does_not_spread():
    assert merge([{"kl": mean(math.nan, 0), "tokens": total(0)}]) == {"tokens": 0.0}
    assert merge([{"kl": mean(math.nan, 0)}, {"kl": mean(0.25, 8)}]) == {"kl": 0.25}


def test_a_name_missing_in_some_parts_is_merged_over_the_others():
    assert merge([{"reward": mean(1.0)}, {"tokens": total(3)}, {"reward": mean(0.0)}]) == {"reward": 0.5, "tokens": 3.0}


def test_no_parts_give_no_metrics():
    assert merge([]) == {}


@pytest.mark.parametrize("make", [total, mean, maximum, minimum])
@pytest.mark.parametrize("order", [(math.nan, 1.0, 2.0), (1.0, math.nan, 2.0), (2.0, 1.0, math.nan)])
def test_nan_stays_visible_in_any_order(make, order):
    assert math.isnan(merge([{"loss": make(value)} for value in order])["loss"])


def test_infinite_and_overflowing_values_do_not_raise():
    assert merge([{"x": total(math.inf)}, {"x": total(1)}]) == {"x": math.inf}
    assert math.isnan(merge([{"x": total(math.inf)}, {"x": total(-math.inf)}])["x"])
    assert merge([{"x": total(1.5e308)}, {"x": total(1.5e308)}]) == {"x": math.inf}


def test_two_reductions_under_one_name_are_an_error_even_without_weight():
    with pytest.raises(ValueError, match=r"'loss' is declared as mean in one part and as sum in another.*rename"):
        merge([{"loss": mean(1.0, 0)}, {"loss": total(1.0)}])


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_no_count_is_refused(weight):
    with pytest.raises(ValueError, match="finite number of at least 0"):
        mean(1.0, weight)


def test_a_weight_that_cannot_take_effect_is_refused():
    with pytest.raises(ValueError, match="only a mean is weighted"):
        Metric(value=1.0, reduction="max", weight=2.0)


@given(PARTS, st.randoms())
def test_order_changes_no_bit(parts, rng):
    shuffled = list(parts)
    rng.shuffle(shuffled)
    assert merge(shuffled) == merge(parts)


@given(PARTS, st.integers(0, 8))
def test_subtotals_change_only_the_rounding(parts, cut):
    in_two = merge([combine(parts[:cut]), combine(parts[cut:])])
    at_once = merge(parts)
    assert in_two.keys() == at_once.keys()
    for name, value in at_once.items():
        scale = sum(abs(part[name].value) for part in parts if name in part)
        assert in_two[name] == pytest.approx(value, abs=1e-12 * scale, rel=1e-12)


@given(PARTS)
def test_a_mean_lies_between_its_extremes(parts):
    counted = [part["loss"].value for part in parts if part["loss"].weight > 0]
    merged = merge(parts)
    assert ("loss" in merged) == bool(counted)
    if counted:
        assert min(counted) - 1e-6 <= merged["loss"] <= max(counted) + 1e-6


def test_the_module_starts_without_torch():
    code = "import sys, vlpost.model.metrics; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
