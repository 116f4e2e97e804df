"""One step of reinforcement learning: a scripted engine, a real policy, and the same gradient from transformers alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import Example, Message, Rollout, TextPart
from vlpost.model.sampler import request_seed
from vlpost.rewards import JudgedRollout, RolloutScore, ScoredGroup, UnjudgedRollout
from vlpost.rl.config import RlConfig
from vlpost.rl.policy_loss import ratio_statistics
from vlpost.rl.train import policy_families

# ---------------------------------------------------------------- families: who weighs what


def a_rollout(length, *, text="", logprobs=None):
    return Rollout(
        token_ids=(1, 2, *range(10, 10 + length)),
        sampled=(False, False, *[True] * length),
        sampler_logprobs=(0.0, 0.0, *(logprobs or [-0.5] * length)),
        media=(),
        text=text,
        prompt_suffix="",
        finish_reason="stop",
        policy_version=0,
    )


def scored(*outcomes):
    """A group from (reward, length) pairs; a reward of None could not be judged."""
    message = Message(role="user", parts=(TextPart(text="?"),))
    judged = [JudgedRollout(rollout=a_rollout(n), score=RolloutScore(reward=r, results={})) for r, n in outcomes if r is not None]
    unjudged = [UnjudgedRollout(rollout=a_rollout(n), reasons={"a": "?"}) for r, n in outcomes if r is None]
    example = Example(id="e", messages=(message,), answer="", task="t", source="s")
    return ScoredGroup(example=example, judged=tuple(judged), unjudged=tuple(unjudged))


def rl_config(**changes):
    return RlConfig.model_validate({"num_steps": 1, "prompts_per_step": 4, "group_size": 3, "num_mini_batches": 1} | changes)


def summary(families):
    return [[(len(w.sequence.token_ids) - 2, w.sequence.targets.advantage, w.token_weight) for w in family] for family in families]


SIGNAL = scored((1.0, 2), (0.0, 1), (0.0, 4))
NO_SIGNAL = scored((1.0, 2), (1.0, 1), (1.0, 3))
ONE_UNJUDGED = scored((0.5, 2), (None, 3), (1.0, 5))
ONE_JUDGED = scored((None, 2), (None, 3), (1.0, 5))
ALL_GROUPS = [SIGNAL, NO_SIGNAL, ONE_UNJUDGED, ONE_JUDGED]


@pytest.mark.parametrize(("normalize_by", "num_responses"), [("planned", 12), ("signal", 5)])
def test_weights_and_advantages_are_exact(normalize_by, num_responses):
    families = policy_families(ALL_GROUPS, rl_config(normalize_by=normalize_by))
    spread, pair = math.sqrt(1 / 3) + 1e-4, math.sqrt(0.125) + 1e-4
    expected = [
        [(2, 2 / 3 / spread, 1 / 2), (1, -1 / 3 / spread, 1.0), (4, -1 / 3 / spread, 1 / 4)],
        [(2, -0.25 / pair, 1 / 2), (5, 0.25 / pair, 1 / 5)],
    ]
    assert [len(family) for family in families] == [3, 2]  # without signal and with one judgement: left out
    for found, wanted in zip(summary(families), expected, strict=True):
        for (length, advantage, weight), other in zip(found, wanted, strict=True):
            assert (length, advantage, weight * num_responses) == pytest.approx(other, rel=1e-12)


def test_without_scaling_an_advantage_is_the_distance_from_the_mean():
    (family,) = policy_families([SIGNAL], rl_config(scale_advantages="none"))
    assert [w.sequence.targets.advantage for w in family] == pytest.approx([2 / 3, -1 / 3, -1 / 3], rel=1e-12)


@pytest.mark.parametrize("normalize_by", ["planned", "signal"])
def test_where_no_group_has_signal_nothing_is_left(normalize_by):
    assert policy_families([NO_SIGNAL, ONE_JUDGED], rl_config(normalize_by=normalize_by)) == []


def test_a_sequence_holds_what_the_engine_drew():
    drawn = a_rollout(3, logprobs=[-0.25, -0.5, -1.0])
    first, second = scored((1.0, 2), (0.0, 1)).judged
    group = ScoredGroup(example=SIGNAL.example, judged=(JudgedRollout(rollout=drawn, score=first.score), second), unjudged=())
    sequence = policy_families([group], rl_config(group_size=2))[0][0].sequence
    assert sequence.token_ids == (1, 2, 10, 11, 12)
    assert sequence.trained == (False, False, True, True, True)
    assert sequence.targets.sampler_logprobs == (-0.25, -0.5, -1.0)


@given(
    groups=st.lists(st.lists(st.integers(1, 6), min_size=4, max_size=4), min_size=1, max_size=5),
    normalize_by=st.sampled_from(["planned", "signal"]),
)
def test_weights_of_groups_that_all_have_signal_sum_to_one(groups, normalize_by):
    made = [scored(*((float(index), length) for index, length in enumerate(lengths))) for lengths in groups]
    families = policy_families(made, rl_config(group_size=4, normalize_by=normalize_by))
    weights = [(w.sequence.num_trained_tokens, w.token_weight) for family in families for w in family]
    assert sum(length * weight for length, weight in weights) == pytest.approx(1.0, rel=1e-9)
    assert all(length * weight == pytest.approx(1 / (4 * len(groups)), rel=1e-9) for length, weight in weights)


SIGNS = ("pos", "neg")


# ---------------------------------------------------------------- the stage


def weights_of(learner):
    return {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}


def same_weights(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


NO_SIGNAL_SCRIPT = {"e0": ["1", "1", "1"], "e1": ["0", "0", "0"], "e2": ["0", "0", "#0"], "e3": ["x", "x", "1"]}


def no_interrupt():
    """Nobody pressed Ctrl-C."""


class StopError(Exception):
    """Stands for what the runner raises."""


def stop():
    raise StopError


def test_an_interrupt_after_the_rollouts_changes_nothing(make_stage, examples):
    stage = make_stage()
    before = weights_of(stage.learner)
    with pytest.raises(StopError):
        stage.step(0, examples, stop)
    assert len(stage.sampler.requests) == 4
    assert same_weights(before, weights_of(stage.learner))
    assert (stage.learner.policy_version, stage.sampler.loaded, stage.learner.losses) == (0, [], [])


def test_without_signal_the_metrics_say_why(make_stage, examples):
    stage = make_stage(NO_SIGNAL_SCRIPT, num_mini_batches=2)
    before = weights_of(stage.learner)
    result = stage.step(0, examples, no_interrupt)
    assert same_weights(before, weights_of(stage.learner))
    untimed = {name: value for name, value in result.metrics.items() if not name.startswith("time/")}
    assert untimed == {
        "skipped_updates": 2.0,
        "sampled_tokens": 36.0,
        "groups_without_signal": 3.0,
        "dropped_groups": 1.0,
        "reward": 4 / 10,
        "truncated_frac": 1 / 10,
        "response_tokens": pytest.approx((9 + 9 + 9 + 4) / 10),
        "response_tokens_max": 4.0,
        "unavailable_frac": 2 / 12,
        "solved_all_frac": 1 / 3,
        "solved_none_frac": 2 / 3,
        "reward/number": 4 / 10,
        "reward/number/full_frac": 4 / 10,
        "reward/number/judged": 10.0,
        "reward/number/unavailable": 2.0,
        "reward/number/unavailable/other": 2.0,
        "dropped_frac": 0.0,
    }


@pytest.mark.parametrize("num_mini_batches", [1, 2, 4])
def test_a_step_without_signal_skips_every_update_even_after_others(make_stage, num_mini_batches, examples):
    stage = make_stage(num_mini_batches=num_mini_batches)
    stage.step(0, examples, no_interrupt)  # now the optimizer has momentum, which alone would move the weights
    assert stage.learner.policy_version == num_mini_batches
    before = weights_of(stage.learner)
    stage.sampler.script = NO_SIGNAL_SCRIPT
    metrics = stage.step(1, examples, no_interrupt).metrics
    assert metrics["skipped_updates"] == num_mini_batches
    assert same_weights(before, weights_of(stage.learner))
    assert stage.learner.policy_version == stage.sampler.policy_version == num_mini_batches


def test_a_mini_batch_without_signal_is_skipped_alone(make_stage, examples):
    script = {"e0": ["1", "1", "1"], "e1": ["0", "0", "0"], "e2": ["0", "1", "1"], "e3": ["1", "0", "#1"]}
    stage = make_stage(script, num_mini_batches=2)
    metrics = stage.step(0, examples, no_interrupt).metrics
    assert (metrics["skipped_updates"], stage.learner.policy_version) == (1.0, 1)
    # Nothing has moved before this update, so its old policy is the policy itself, up to the order of additions.
    assert metrics["gate_mean_pos"] == pytest.approx(1.0, abs=1e-6)


def test_requests_ask_for_groups_with_seeds_of_their_own(make_stage, examples):
    stage = make_stage()
    stage.step(7, examples, no_interrupt)
    assert [(r.place, r.num_rollouts, r.temperature, r.seed) for r in stage.sampler.requests] == [
        (name, 3, 0.7, request_seed(11, "rollout", 7, name)) for name in ("e0", "e1", "e2", "e3")
    ]


def test_mini_batches_are_equal_parts_in_the_order_of_the_groups(make_stage, chat, examples):
    stage = make_stage(num_mini_batches=2)
    stage.step(0, examples, no_interrupt)
    prompts = [chat.encode_prompt(example.messages).token_ids for example in examples]
    found = {}
    for update, batch, _ in stage.learner.losses:
        for sequence in batch.sequences:
            found.setdefault(update, set()).add(next(i for i, ids in enumerate(prompts) if sequence.token_ids[: len(ids)] == ids))
    assert found == {0: {0, 1}, 1: {2, 3}}
    for update in (0, 1):
        weights = [batch.token_weights.sum().item() for number, batch, _ in stage.learner.losses if number == update]
        assert sum(weights) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("token_budget", [4096, 64])
def test_the_first_mini_batch_is_on_policy_exactly_and_later_ones_are_not(make_stage, token_budget, examples):
    stage = make_stage(num_mini_batches=2, token_budget=token_budget)
    metrics = stage.step(0, examples, no_interrupt).metrics
    counts = {0: 0, 1: 0}
    for update, _, loss in stage.learner.losses:
        (seen,) = loss.seen
        statistics = ratio_statistics(seen.logprobs, seen.old_logprobs, advantages=seen.advantages, tau_pos=1.0, tau_neg=1.05)
        gates = [value for name, value in statistics.items() if name.startswith(("gate_mean", "ratio_p"))]
        assert len(gates) in (4, 8)
        assert all(gate == 1.0 for gate in gates) if update == 0 else any(gate != 1.0 for gate in gates)
        counts[update] += 1
    assert counts == ({0: 1, 1: 1} if token_budget == 4096 else counts)
    assert min(counts.values()) >= (1 if token_budget == 4096 else 2)
    assert metrics["gate_mean_pos"] < 1.0


def test_one_mini_batch_is_on_policy_throughout(make_stage, examples):
    metrics = make_stage(num_mini_batches=1).step(0, examples, no_interrupt).metrics
    assert {metrics[name] for name in ("gate_mean_pos", "gate_mean_neg", "gate_p01_pos", "ratio_p99_pos", "ratio_p01_neg")} == {1.0}
    assert metrics["old_kl_k3"] == metrics["ratio_beyond_2_frac"] == 0.0


def test_the_metrics_of_a_step(make_stage, examples):
    stage = make_stage(num_mini_batches=2)
    result = stage.step(0, examples, no_interrupt)
    measured = result.metrics
    assert set(measured) >= {
        "grad_norm", "learning_rate", "skipped_updates", "entropy", "trained_tokens", "unique_tokens", "recomputed_tokens",
        *(f"{name}_{sign}" for name in ("ratio_p01", "ratio_p50", "ratio_p99", "gate_p01", "gate_p50", "gate_mean") for sign in SIGNS),
        "ratio_beyond_2_frac", "old_kl_k3", "engine_mean_abs_gap", "engine_max_abs_gap", "engine_kl_k3", "engine_beyond_2_frac",
        "reward", "reward/number", "truncated_frac", "response_tokens", "response_tokens_max", "unavailable_frac", "dropped_groups",
        "groups_without_signal", "solved_all_frac", "solved_none_frac",
        "time/rollout_s", "time/reward_s", "time/update_s", "time/publish_s", "time/sampled_tokens_per_s", "time/updated_tokens_per_s",
    }  # fmt: skip
    assert all(math.isfinite(value) for value in measured.values())
    assert measured["trained_tokens"] == 4 * (2 + 3 + 4)
    assert measured["reward"] == pytest.approx((1 + 1.5 + 2 + 2) / 12)
    assert measured["truncated_frac"] == 1 / 12
    assert measured["solved_none_frac"] == measured["solved_all_frac"] == 0.0
    assert [group.example.id for group in result.scored_groups] == ["e0", "e1", "e2", "e3"]
    assert 0.0 < measured["entropy"] <= math.log(448)


def test_the_engine_gets_the_weights_after_the_last_update(make_stage, examples):
    stage = make_stage(num_mini_batches=2)
    stage.step(0, examples, no_interrupt)
    (published,) = stage.sampler.loaded
    assert stage.sampler.policy_version == stage.learner.policy_version == 2
    after = weights_of(stage.learner)
    assert all(torch.equal(published[name], tensor) for name, tensor in after.items())
    assert not same_weights(after, stage.learner.updates[-1][0])


# ---------------------------------------------------------------- against transformers, one response at a time


def clipped(ratio, advantage, low, high):
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def by_hand(name, logprobs, old, advantage):
    ratio = (logprobs - old).exp()
    if name == "sapo":
        tau = 1.0 if advantage > 0 else 1.05
        return -advantage * 4 / tau / (1 + torch.exp(-tau * (ratio - 1)))
    if name == "grpo":
        return clipped(ratio, advantage, 0.2, 0.2)
    if name == "gspo":
        return clipped((logprobs - old).mean().exp().expand(len(old)), advantage, 0.1, 0.3)
    return -advantage * logprobs


LOSSES = [{"name": "sapo"}, {"name": "grpo"}, {"name": "gspo", "clip_low": 0.1, "clip_high": 0.3}, {"name": "reinforce"}]


@pytest.mark.parametrize("policy_loss", LOSSES, ids=lambda loss: loss["name"])
@pytest.mark.parametrize("num_mini_batches", [1, 2])
def test_every_update_has_the_gradient_of_the_formula(make_stage, plain_model, alone, policy_loss, num_mini_batches, examples):
    cap, group_size = 1.5, 3
    stage = make_stage(num_mini_batches=num_mini_batches, policy_loss=policy_loss, importance_cap=cap)
    result = stage.step(0, examples, no_interrupt)
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert len(stage.learner.updates) == num_mini_batches
    size = 4 // num_mini_batches
    start_weights = stage.learner.updates[0][0]
    num_capped = 0
    for number, (weights, gradients) in enumerate(stage.learner.updates):
        loss = torch.tensor(0.0)
        plain_model.zero_grad()
        for group in result.scored_groups[number * size : (number + 1) * size]:
            values = torch.tensor([judged.score.reward for judged in group.judged])
            advantages = (values - values.mean()) / (values.std() + 1e-4)
            for judged, advantage in zip(group.judged, advantages, strict=True):
                sequence = policy_families([group], stage.config)[0][group.judged.index(judged)].sequence
                with torch.no_grad():
                    plain_model.load_state_dict(start_weights, strict=False)
                    old = alone(plain_model, sequence)
                plain_model.load_state_dict(weights, strict=False)
                logprobs = alone(plain_model, sequence)
                drawn = torch.tensor([p for p, s in zip(judged.rollout.sampler_logprobs, judged.rollout.sampled, strict=True) if s])
                correction = (old - drawn).exp().clamp(max=cap)
                num_capped += int((correction == cap).sum())
                per_token = by_hand(policy_loss["name"], logprobs, old, advantage) * correction
                part = per_token.mean() / (size * group_size)
                part.backward()  # before other weights are loaded
                loss = loss + part.detach()
        assert math.isfinite(loss.item())
        expected = {name: parameter.grad for name, parameter in plain_model.named_parameters()}
        norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
        assert norm > 1e-3
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).norm() <= 1e-5 * norm, name
    assert num_capped > 0
