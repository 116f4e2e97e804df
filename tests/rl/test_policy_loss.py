"""Policy losses: the numbers of the SAPO paper's formula, gradients, bounds, extremes, and an exact policy gradient."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vlpost.rl.policy_loss import (
    NonFiniteLogprobsError,
    engine_mismatch,
    gate_weights,
    grpo,
    gspo,
    ratio_statistics,
    reinforce,
    sapo,
    truncated_importance_weights,
)

# ratio, f and w at tau 1.0, f and w at tau 1.05; from the formulas, rounded to six digits
GATE_TABLE = [
    (0.0, 1.075766, 0.786448, 0.987524, 0.768110),
    (0.5, 1.510163, 0.940015, 1.415938, 0.934140),
    (0.8, 1.800664, 0.990066, 1.705494, 0.989056),
    (1.0, 2.000000, 1.000000, 1.904762, 1.000000),
    (1.2, 2.199336, 0.990066, 2.104030, 0.989056),
    (2.0, 2.924234, 0.786448, 2.822000, 0.768110),
    (3.0, 3.523188, 0.419974, 3.393917, 0.388779),
    (5.0, 3.928055, 0.070651, 3.753242, 0.058223),
]
TAUS = {"tau_pos": 1.0, "tau_neg": 1.05}

log_ratios = st.lists(st.floats(-6.0, 6.0, width=32), min_size=1, max_size=12)
advantage_values = st.integers(-3000, 3000).map(lambda thousandths: thousandths / 1000)


def gradient(loss, log_ratio, old=-30.0, **options):
    """The gradient of the summed loss with respect to logprobs of the given log-ratios."""
    old_logprobs = torch.full((len(log_ratio),), old)
    logprobs = (old_logprobs + torch.tensor(log_ratio)).requires_grad_()
    (result,) = torch.autograd.grad(loss(logprobs, old_logprobs, **options).sum(), logprobs)
    return result


@pytest.mark.parametrize("row", GATE_TABLE, ids=lambda row: f"r={row[0]}")
def test_gate_values_and_slopes_of_the_formula(row):
    ratio, f_pos, w_pos, f_neg, w_neg = row
    logprobs = torch.tensor([math.log(max(ratio, 1e-30))] * 2, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0])

    loss = sapo(logprobs, torch.zeros(2), advantages=advantages, **TAUS)
    weights = gate_weights(torch.tensor([ratio, ratio]), advantages=advantages, **TAUS)

    assert loss.tolist() == pytest.approx([-f_pos, f_neg], abs=1e-6)
    assert weights.tolist() == pytest.approx([w_pos, w_neg], abs=1e-6)


def test_gradient_is_gate_weight_times_ratio_times_advantage():
    ratio = torch.tensor([row[0] for row in GATE_TABLE[1:]])
    advantages = torch.tensor([1.0, -1.0, 0.3, -2.0, 2.5, -0.1, 1.5])

    result = gradient(sapo, ratio.log().tolist(), old=0.0, advantages=advantages, **TAUS)

    expected = -gate_weights(ratio, advantages=advantages, **TAUS) * ratio * advantages
    torch.testing.assert_close(result, expected, rtol=2e-6, atol=1e-7)


def test_gradient_agrees_with_finite_differences():
    # Another way to the slope than autograd: central differences of the formula in plain floats.
    def f(log_ratio, tau):
        return 4 / tau / (1 + math.exp(-tau * (math.exp(log_ratio) - 1)))

    for log_ratio, advantage, tau in [(0.4, 1.0, 1.0), (-1.1, 2.0, 1.0), (0.9, -0.5, 1.05), (0.0, -1.0, 1.05)]:
        slope = (f(log_ratio + 1e-5, tau) - f(log_ratio - 1e-5, tau)) / 2e-5
        result = gradient(sapo, [log_ratio], old=0.0, advantages=torch.tensor([advantage]), **TAUS)
        assert result.item() == pytest.approx(-advantage * slope, rel=1e-5)


def test_temperature_follows_the_sign_of_the_advantage():
    advantages = torch.tensor([1.0, -1.0, 0.0])
    options = {"advantages": advantages, "tau_pos": 2.0, "tau_neg": 4.0}

    loss = sapo(torch.zeros(3), torch.zeros(3), **options)

    # At r = 1 the gate is 2 / tau: 1.0 for tau 2, 0.5 for tau 4.
    assert loss.tolist() == [-1.0, 0.5, 0.0]
    assert gradient(sapo, [0.7, -0.7, 0.7], **options)[2].item() == 0.0


@pytest.mark.parametrize("loss", [sapo, grpo])
@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("log_ratio", [1e4, -1e4, 100.0, -100.0, 89.0, 20.0, -20.0, math.inf, -math.inf])
def test_extreme_ratios_keep_loss_and_gradient_finite(loss, log_ratio, advantage):
    options = {"advantages": torch.tensor([advantage]), **(TAUS if loss is sapo else {})}
    logprobs = torch.tensor([log_ratio], requires_grad=True)

    value = loss(logprobs, torch.zeros(1), **options)
    (slope,) = torch.autograd.grad(value.sum(), logprobs)

    assert value.isfinite().all()
    assert slope.isfinite().all()
    if loss is sapo:
        assert abs(slope.item()) < 1e-8


@pytest.mark.parametrize("log_ratio", [1e4, -1e4, math.inf, -math.inf])
def test_extreme_ratios_keep_gspo_finite(log_ratio):
    logprobs = torch.tensor([log_ratio, 0.1, 0.0], requires_grad=True)

    value = gspo(logprobs, torch.zeros(3), advantages=torch.tensor([-1.0, -1.0, 1.0]), sequence_ids=torch.tensor([0, 0, 1]))
    (slope,) = torch.autograd.grad(value.sum(), logprobs)

    assert value.isfinite().all()
    assert slope.isfinite().all()


def test_nan_is_not_hidden():
    nan = torch.tensor([math.nan])

    assert sapo(nan, torch.zeros(1), advantages=torch.ones(1), **TAUS).isnan().all()
    assert grpo(torch.zeros(1), nan, advantages=torch.ones(1)).isnan().all()
    assert truncated_importance_weights(torch.zeros(1), nan).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_is_in_fp32_whatever_comes_in(dtype):
    logprobs = torch.tensor([-0.5, -2.0, -7.25], dtype=dtype)
    old_logprobs = torch.tensor([-0.625, -1.5, -9.0], dtype=dtype)
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=dtype)
    ids = torch.tensor([0, 0, 1])

    def losses(logprobs, old_logprobs, advantages):
        return [
            sapo(logprobs, old_logprobs, advantages=advantages, **TAUS),
            grpo(logprobs, old_logprobs, advantages=advantages),
            gspo(logprobs, old_logprobs, advantages=advantages, sequence_ids=ids),
            reinforce(logprobs, advantages=advantages),
            truncated_importance_weights(old_logprobs, logprobs),
        ]

    given_dtype, in_fp32 = losses(logprobs, old_logprobs, advantages), losses(logprobs.float(), old_logprobs.float(), advantages.float())
    assert len(given_dtype) == 5
    for result, expected in zip(given_dtype, in_fp32, strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_temperatures_do_not_follow_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        loss = sapo(torch.zeros(1), torch.zeros(1), advantages=torch.tensor([-1.0], dtype=torch.float32), tau_pos=1.0, tau_neg=1.05)
    finally:
        torch.set_default_dtype(torch.float32)
    # In bfloat16 1.05 would be 1.046875 and the gate 1.910.
    assert loss.item() == pytest.approx(2 / 1.05, rel=1e-6)


@given(log_ratio=log_ratios, advantage=advantage_values, tau_pos=st.floats(1.0, 8.0), tau_neg=st.floats(1.0, 8.0))
def test_push_of_a_token_is_bounded(log_ratio, advantage, tau_pos, tau_neg):
    advantages = torch.full((len(log_ratio),), advantage)

    result = gradient(sapo, log_ratio, advantages=advantages, tau_pos=tau_pos, tau_neg=tau_neg)

    assert result.abs().max().item() <= 1.58 * abs(advantage)


@pytest.mark.parametrize(("tau", "peak"), [(1.0, 1.5747), (1.05, 1.5363)])
def test_largest_push_of_a_token(tau, peak):
    log_ratio = torch.linspace(-2.0, 2.0, 4001).tolist()

    result = gradient(sapo, log_ratio, old=0.0, advantages=-torch.ones(4001), tau_pos=9.0, tau_neg=tau)

    assert result.max().item() == pytest.approx(peak, abs=1e-4)


@given(log_ratio=log_ratios, tau=st.floats(0.05, 8.0))
def test_gate_rises_with_the_ratio(log_ratio, tau):
    ordered = torch.tensor(sorted(log_ratio))

    loss = sapo(ordered, torch.zeros(len(log_ratio)), advantages=torch.ones(len(log_ratio)), tau_pos=tau, tau_neg=9.0)

    assert (loss.diff() <= 0).all()
    # The gate lies in (0, 4 / tau], so no response can gain more than that from one token.
    assert (loss < 0).all()
    assert (loss >= -4 / tau * (1 + 1e-6)).all()


@given(log_ratio=st.lists(st.floats(-2.0, 2.0, width=32), min_size=1, max_size=8), advantage=advantage_values)
def test_small_temperature_is_the_unclipped_ratio(log_ratio, advantage):
    advantages = torch.full((len(log_ratio),), advantage)

    result = gradient(sapo, log_ratio, old=0.0, advantages=advantages, tau_pos=1e-3, tau_neg=1e-3)

    torch.testing.assert_close(result, -torch.tensor(log_ratio).exp() * advantages, rtol=2e-5, atol=1e-6)


@given(tau_pos=st.floats(0.1, 10.0), tau_neg=st.floats(0.1, 10.0), advantages=st.lists(advantage_values, min_size=1, max_size=8))
def test_on_policy_every_loss_has_the_plain_policy_gradient(tau_pos, tau_neg, advantages):
    expected = -torch.tensor(advantages)
    options = {"advantages": torch.tensor(advantages)}
    sequence_ids = torch.arange(len(advantages))  # responses of one token, so that the mean over tokens is the token

    on_policy = [0.0] * len(advantages)
    results = [
        gradient(sapo, on_policy, tau_pos=tau_pos, tau_neg=tau_neg, **options),
        gradient(grpo, on_policy, **options),
        gradient(gspo, on_policy, sequence_ids=sequence_ids, **options),
        gradient(lambda logprobs, old_logprobs, **options: reinforce(logprobs, **options), on_policy, **options),
    ]

    for result in results:
        torch.testing.assert_close(result, expected, rtol=2e-6, atol=1e-12)


@given(seed=st.integers(0, 2**31), size=st.integers(1, 20))
def test_order_of_the_tokens_does_not_matter(seed, size):
    generator = torch.Generator().manual_seed(seed)
    old_logprobs = -torch.rand(size, generator=generator) * 5
    logprobs = old_logprobs + torch.randn(size, generator=generator) * 0.5
    ids = torch.randint(0, size, (size,), generator=generator)
    advantages = torch.randn(size, generator=generator)[ids]
    order = torch.randperm(size, generator=generator)

    def all_losses(pick):
        arrays = {"advantages": advantages[pick]}
        return torch.stack(
            [
                sapo(logprobs[pick], old_logprobs[pick], **arrays, **TAUS),
                grpo(logprobs[pick], old_logprobs[pick], **arrays),
                gspo(logprobs[pick], old_logprobs[pick], **arrays, sequence_ids=ids[pick], clip_low=0.1, clip_high=0.1),
                reinforce(logprobs[pick], **arrays),
            ]
        )

    torch.testing.assert_close(all_losses(order), all_losses(torch.arange(size))[:, order], rtol=1e-5, atol=1e-6)


def test_grpo_clips_on_the_pessimistic_side_only():
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])

    loss = grpo(ratio.log(), torch.zeros(5), advantages=advantages, clip_low=0.2, clip_high=0.3)
    slope = gradient(grpo, ratio.log().tolist(), old=0.0, advantages=advantages, clip_low=0.2, clip_high=0.3)

    assert loss.tolist() == pytest.approx([-1.3, -0.5, 1.5, 0.8, -2.2], rel=1e-6)
    assert slope.tolist() == pytest.approx([0.0, -0.5, 1.5, 0.0, -2.2], rel=1e-6)


def test_grpo_clips_at_a_fifth_by_default():
    loss = grpo(torch.tensor([1.0, -1.0]), torch.zeros(2), advantages=torch.tensor([1.0, -1.0]))

    assert loss.tolist() == pytest.approx([-1.2, 0.8], rel=1e-6)


def test_gspo_ratio_is_the_geometric_mean_of_its_response():
    log_ratio = torch.tensor([0.3, -0.1, -0.2, 0.01, 0.02])  # responses interleaved: ids 1 0 1 0 0
    ids = torch.tensor([1, 0, 1, 0, 0])
    means = {0: (-0.1 + 0.01 + 0.02) / 3, 1: (0.3 - 0.2) / 2}

    loss = gspo(log_ratio, torch.zeros(5), advantages=torch.ones(5), sequence_ids=ids, clip_low=0.9, clip_high=0.9)

    assert loss.tolist() == pytest.approx([-math.exp(means[int(i)]) for i in ids], rel=1e-6)


def test_gspo_defaults_clip_a_whole_response():
    # Response 0 moved by 1e-3 per token, beyond 4e-4: no gradient for A > 0. Response 1 by 1e-4: full gradient, shared by two tokens.
    log_ratio, ids = [1.5e-3, 0.5e-3, 1e-4, 1e-4], torch.tensor([0, 0, 1, 1])

    slope = gradient(gspo, log_ratio, old=0.0, advantages=torch.ones(4), sequence_ids=ids)

    assert slope[:2].tolist() == [0.0, 0.0]
    assert slope[2:].tolist() == pytest.approx([-math.exp(1e-4)] * 2, rel=1e-6)
    loss = gspo(torch.tensor(log_ratio), torch.zeros(4), advantages=torch.ones(4), sequence_ids=ids)
    assert loss[:2].tolist() == pytest.approx([-1.0004] * 2, abs=1e-7)


def test_reinforce_is_the_gradient_of_the_expected_reward():
    """The loss, averaged over all responses by their probability, has minus the gradient of the expected reward, exactly."""
    generator = torch.Generator().manual_seed(3)
    # A policy over a vocabulary of 3 that writes 2 tokens: its second token depends on its first.
    first = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    second = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    rewards = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    baseline = 0.7

    expected_reward = (first.softmax(0)[:, None] * second.softmax(1) * rewards).sum()
    exact = torch.autograd.grad(expected_reward, (first, second))

    first_logprobs, second_logprobs = first.log_softmax(0), second.log_softmax(1)
    surrogate = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.product(range(3), range(3)):
        logprobs = torch.stack([first_logprobs[a], second_logprobs[a, b]])
        probability = logprobs.sum().exp().detach()
        surrogate = surrogate + probability * reinforce(logprobs, advantages=(rewards[a, b] - baseline).expand(2)).sum()
    estimated = torch.autograd.grad(surrogate, (first, second))

    for exact_part, estimated_part in zip(exact, estimated, strict=True):
        torch.testing.assert_close(-estimated_part, exact_part, rtol=1e-5, atol=1e-7)


def test_old_logprobs_get_no_gradient():
    logprobs = torch.tensor([-1.0], requires_grad=True)

    # With old = logprobs and no detach the ratio would be the constant 1 and the gradient would vanish.
    (slope,) = torch.autograd.grad(sapo(logprobs, logprobs, advantages=torch.ones(1), **TAUS).sum(), logprobs)

    assert slope.item() == -1.0


def test_importance_weights_are_capped_and_detached():
    old_logprobs = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1e4], requires_grad=True)
    sampler_logprobs = torch.tensor([-1.0, -1.5, -3.0, -0.5, -1.0])

    weights = truncated_importance_weights(old_logprobs, sampler_logprobs)

    assert not weights.requires_grad
    assert weights.tolist() == pytest.approx([1.0, math.exp(0.5), 2.0, math.exp(-0.5), math.exp(-20)], rel=1e-6)
    assert truncated_importance_weights(old_logprobs, sampler_logprobs, cap=5.0)[2].item() == 5.0
    assert truncated_importance_weights(torch.tensor([0.0]), torch.tensor([-1e4]), cap=math.inf).isfinite().all()


def test_gate_weight_does_not_round_to_zero_early():
    # 1 - sigmoid(x) is 0 in fp32 from x = 17 on.
    weight = gate_weights(torch.tensor([21.0]), advantages=torch.ones(1), **TAUS)

    assert weight.item() == pytest.approx(4 * math.exp(-20.0), rel=1e-5)


def test_ratio_statistics_of_known_ratios():
    # 101 tokens with A > 0 whose ratios are 0.52, 0.53, ... 1.52 in a shuffled order, and one with A < 0 and ratio 3.
    ratio = torch.cat([0.52 + torch.arange(101) / 100, torch.tensor([3.0])]).double()
    advantages = torch.cat([torch.ones(101), -torch.ones(1)])
    order = torch.randperm(102, generator=torch.Generator().manual_seed(0))
    old_logprobs = torch.full((102,), -2.0, dtype=torch.float64)

    result = ratio_statistics((old_logprobs + ratio.log())[order], old_logprobs, advantages=advantages[order], **TAUS)

    assert result["ratio_p01_pos"] == pytest.approx(0.53)
    assert result["ratio_p50_pos"] == pytest.approx(1.02)
    assert result["ratio_p99_pos"] == pytest.approx(1.51)
    assert result["ratio_p01_neg"] == result["ratio_p50_neg"] == result["ratio_p99_neg"] == pytest.approx(3.0)
    assert result["gate_p50_neg"] == result["gate_mean_neg"] == pytest.approx(0.388779, abs=1e-6)
    # The gate falls with |r - 1|: lowest at 1.52, second lowest at 1.51.
    assert result["gate_p01_pos"] == pytest.approx(1 / math.cosh(0.51 / 2) ** 2, rel=1e-6)
    assert result["gate_mean_pos"] == pytest.approx(sum(1 / math.cosh((r - 1) / 2) ** 2 for r in ratio[:101].tolist()) / 101, rel=1e-6)
    assert result["ratio_beyond_2_frac"] == pytest.approx(1 / 102)
    assert result["old_kl_k3"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratio.tolist()) / 102, rel=1e-9)
    assert all(type(value) is float for value in result.values())


def test_ratio_statistics_are_taken_before_the_clamp():
    result = ratio_statistics(torch.tensor([0.0]), torch.tensor([-100.0]), advantages=torch.ones(1), **TAUS)

    assert result["ratio_p50_pos"] == pytest.approx(math.exp(100), rel=1e-9)
    assert result["gate_p50_pos"] == 0.0
    assert result["old_kl_k3"] == pytest.approx(math.exp(100), rel=1e-9)


def test_ratio_quantiles_agree_with_torch():
    log_ratio = torch.randn(57, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    result = ratio_statistics(log_ratio, torch.zeros(57), advantages=torch.ones(57), **TAUS)

    expected = log_ratio.exp().quantile(torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64), interpolation="nearest").tolist()
    assert [result["ratio_p01_pos"], result["ratio_p50_pos"], result["ratio_p99_pos"]] == pytest.approx(expected, rel=1e-12)


def test_ratio_statistics_leave_out_a_sign_without_tokens():
    advantages = torch.tensor([-1.0, 0.0])

    # The token without advantage has another ratio and counts for neither sign.
    result = ratio_statistics(torch.zeros(2, requires_grad=True), torch.tensor([0.0, -3.0]), advantages=advantages, **TAUS)

    assert set(result) == {
        "ratio_beyond_2_frac",
        "old_kl_k3",
        "ratio_p01_neg",
        "ratio_p50_neg",
        "ratio_p99_neg",
        "gate_p01_neg",
        "gate_p50_neg",
        "gate_mean_neg",
    }
    assert result["old_kl_k3"] == pytest.approx((math.exp(3) - 1 - 3) / 2)
    assert result["gate_mean_neg"] == result["ratio_p50_neg"] == result["ratio_p99_neg"] == 1.0


def test_engine_mismatch_of_known_gaps():
    gaps = [0.0, 0.1, -0.3, 0.8, -0.7]
    sampler_logprobs = torch.full((5,), -1.0, dtype=torch.float64)

    result = engine_mismatch(sampler_logprobs + torch.tensor(gaps, dtype=torch.float64), sampler_logprobs)

    assert result == pytest.approx(
        {
            "engine_mean_abs_gap": 0.38,
            "engine_max_abs_gap": 0.8,
            "engine_kl_k3": sum(math.exp(gap) - 1 - gap for gap in gaps) / 5,
            "engine_beyond_2_frac": 0.4,  # log 2 = 0.693 lies below 0.7 and 0.8
        },
        rel=1e-9,
    )
    assert engine_mismatch(sampler_logprobs, sampler_logprobs) == dict.fromkeys(result, 0.0)


def test_k3_estimates_the_kl_divergence_of_the_drawing_policy_from_the_other():
    """Weighted by the drawing policy, k3 is KL(sampler || learner) exactly; the test enumerates a vocabulary of 4 in rational shares."""
    sampler = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    learner = torch.tensor([0.25, 0.35, 0.1, 0.3], dtype=torch.float64)
    drawn = torch.repeat_interleave(torch.arange(4), torch.tensor([4, 3, 2, 1]))  # ten draws in the sampler's proportions

    result = engine_mismatch(learner.log()[drawn], sampler.log()[drawn])

    assert result["engine_kl_k3"] == pytest.approx((sampler * (sampler / learner).log()).sum().item(), rel=1e-12)


def test_small_mismatch_is_not_lost_to_rounding():
    # exp(d) - 1 - d is about d^2 / 2 = 5e-17 here: less than the rounding of exp(d) near 1.
    result = engine_mismatch(torch.tensor([1e-8], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64))

    assert result["engine_kl_k3"] == pytest.approx(5e-17, rel=1e-6, abs=0.0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_statistics_name_logprobs_that_are_not_finite(wrong):
    broken, sound = torch.tensor([-1.0, wrong, -2.0, wrong]), torch.zeros(4)

    with pytest.raises(NonFiniteLogprobsError, match=rf"^sampler_logprobs: 2 of 4 .* not finite, the first is {wrong} at token 1"):
        engine_mismatch(sound, broken)
    with pytest.raises(NonFiniteLogprobsError, match=r"^logprobs: 2 of 4 log-probs are not finite"):
        ratio_statistics(broken, sound, advantages=torch.ones(4), **TAUS)


def test_statistics_refuse_no_tokens():
    with pytest.raises(ValueError, match="old_logprobs holds no tokens"):
        engine_mismatch(torch.zeros(0), torch.zeros(0))


def test_arrays_that_would_broadcast_are_refused():
    flat, column = torch.zeros(3), torch.zeros(3, 1)
    ids = torch.zeros(3, dtype=torch.int64)
    calls = [
        lambda: sapo(flat, flat, advantages=column, **TAUS),
        lambda: sapo(flat, flat, advantages=torch.zeros(1), **TAUS),
        lambda: grpo(flat, column, advantages=flat),
        lambda: gspo(flat, flat, advantages=flat, sequence_ids=ids[:2]),
        lambda: gspo(column, column, advantages=column, sequence_ids=ids[:, None]),
        lambda: reinforce(flat, advantages=column),
        lambda: truncated_importance_weights(flat, column),
        lambda: gate_weights(flat, advantages=column, **TAUS),
        lambda: ratio_statistics(flat, flat, advantages=column, **TAUS),
        lambda: engine_mismatch(column, column),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"all must be \[N\]"):
            call()


def test_settings_out_of_range_are_refused_by_name():
    one = torch.ones(1)
    for tau in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"tau_neg = .*: must be finite and above 0"):
            sapo(one, one, advantages=one, tau_pos=1.0, tau_neg=tau)
    with pytest.raises(ValueError, match=r"clip_low = 1.0: must be in \[0, 1\)"):
        grpo(one, one, advantages=one, clip_low=1.0)
    with pytest.raises(ValueError, match=r"clip_high = -0.1: must be 0 or more"):
        grpo(one, one, advantages=one, clip_high=-0.1)
    with pytest.raises(ValueError, match="cap = 0: must be above 0"):
        truncated_importance_weights(one, one, cap=0)
    with pytest.raises(ValueError, match=r"sequence_ids of dtype torch.float32: must be torch.int64"):
        gspo(one, one, advantages=one, sequence_ids=one)
