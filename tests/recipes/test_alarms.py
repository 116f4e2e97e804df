"""Alarms: a collapse rings before the reward falls; a roll-back goes on with the next examples and is the same run when interrupted."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from vlpost.model.metrics import merge
from vlpost.model.records import Example, Message, Rollout, TextPart
from vlpost.recipes.alarms import AlarmError, Alarms, reward_spread
from vlpost.recipes.roll_back import RollBacks
from vlpost.recipes.schema import RL_ALARMS, SFT_ALARMS, AlarmConfig, RlRecipe, SftRecipe
from vlpost.rewards.result import JudgedRollout, RolloutScore, ScoredGroup


def alarms(**settings):
    return Alarms([AlarmConfig.model_validate({"metric": "entropy"} | settings)])


def rings(board, values, metric="entropy"):
    """Returns the steps, from 1, at which a series of reports rings."""
    return [step for step, value in enumerate(values, start=1) if board.update(step, {metric: value})]


# ---------------------------------------------------------------- when an alarm rings


@pytest.mark.parametrize(
    ("settings", "values", "expected"),
    [
        ({"below": 0.05, "steps": 1}, [0.1, 0.05, 0.04, 0.03], [3]),
        ({"below": 0.05, "steps": 2}, [0.04, 0.06, 0.04, 0.04, 0.04], [4]),
        ({"below": 0.05, "steps": 2}, [0.0, 0.0, 0.0, 0.1, 0.0, 0.0], [2, 6]),
        ({"above": 1.0, "steps": 2}, [2.0, math.nan, 2.0], [2]),
        ({"above": 1.0, "steps": 1}, [math.inf], [1]),
        ({"below": 0.5, "above": 2.0, "steps": 2}, [0.4, 2.1, 1.0], [2]),
        ({"below": 0.5, "steps": 1, "baseline_steps": 2}, [8.0, 4.0, 3.1, 3.0, 2.9], [5]),
        ({"above": 2.0, "steps": 1, "baseline_steps": 2}, [0.0, 1.0, 0.0, 3.0, 4.0, 4.1], [6]),
        ({"above": 2.0, "steps": 1, "baseline_steps": 3}, [math.nan], [1]),
    ],
)
def test_an_alarm_rings_once_after_its_steps(settings, values, expected):
    assert rings(alarms(**settings), values) == expected


def test_what_rings_says_what_and_since_when():
    board = alarms(below=0.05, steps=2)
    assert board.update(7, {"entropy": 0.03}) == []
    assert board.update(8, {"loss": 1.0}) == []
    (ringing,) = board.update(9, {"entropy": 0.02})
    assert str(ringing) == "entropy = 0.02, below 0.05, 2 times in a row (steps 7 to 9)"
    board = alarms(above=3.0, steps=1, baseline_steps=1)
    board.update(1, {"entropy": 2.0})
    (ringing,) = board.update(2, {"entropy": 7.0})
    assert str(ringing) == "entropy = 7, above 3 x the mean of its first 1 (2), 1 times in a row (steps 2 to 2)"


@given(
    values=st.lists(st.floats(0, 10) | st.just(math.nan), min_size=1, max_size=30),
    cut=st.integers(0, 29),
    steps=st.integers(1, 4),
    baseline_steps=st.integers(0, 3),
)
def test_a_restored_alarm_rings_as_the_one_that_was_never_interrupted(values, cut, steps, baseline_steps):
    settings = {"below": 0.5, "above": 4.0, "steps": steps, "baseline_steps": baseline_steps}
    whole, first, second = (alarms(**settings) for _ in range(3))
    expected = rings(whole, values)
    before = rings(first, values[:cut])
    second.load(json.loads(json.dumps(first.state())))
    after = [step for step, value in list(enumerate(values, start=1))[cut:] if second.update(step, {"entropy": value})]
    assert before + after == expected
    assert second.state() == whole.state()


def test_an_alarm_that_was_changed_starts_anew():
    board = alarms(below=1.0, steps=3)
    rings(board, [0.5, 0.5])
    changed = alarms(below=1.0, steps=4)
    changed.load(board.state())
    assert changed.state() == alarms(below=1.0, steps=4).state()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "the alarm on 'entropy' has no bound: give below, above or both"),
        ({"below": 2.0, "above": 1.0}, "below = 2.0 and above = 1.0: nothing is within bounds"),
        ({"below": 1.0, "steps": 0}, "greater than or equal to 1"),
        ({"below": 1.0, "action": "panic"}, "Input should be 'warn', 'stop' or 'roll_back'"),
    ],
)
def test_an_alarm_that_cannot_work_is_refused(settings, words):
    with pytest.raises(ValidationError) as caught:
        AlarmConfig.model_validate({"metric": "entropy"} | settings)
    assert words in str(caught.value)


# ---------------------------------------------------------------- an alarm that nothing feeds


def test_an_alarm_that_nothing_feeds_is_an_error_with_the_nearest_name():
    board = Alarms([AlarmConfig(metric="entropie", below=1.0), AlarmConfig(metric="validation/accurate", below=1.0)])
    board.update(1, {"entropy": 1.0})
    board.check_reported()  # no update yet: some metrics come with the first
    board.update(2, {"entropy": 1.0, "grad_norm": 1.0})
    with pytest.raises(AlarmError, match="nothing reports the metric 'entropie', so its alarm could never ring; did you mean 'entropy'"):
        board.check_reported()
    board.update(2, {"validation/accuracy": 0.5})
    with pytest.raises(AlarmError, match=r"'validation/accurate'.*did you mean 'validation/accuracy'"):
        board.check_reported("validation/")
    lonely = Alarms([AlarmConfig(metric="zzz", below=1.0)])
    lonely.update(1, {"loss": 1.0, "grad_norm": 1.0})
    with pytest.raises(AlarmError, match="there are grad_norm, loss"):
        lonely.check_reported()


def test_a_validation_alarm_without_validation_is_refused():
    recipe = {
        "method": "sft",
        "output": "out",
        "model": {"nano": {}},
        "sampler": {"max_response_tokens": 8, "max_model_len": 64},
        "rewards": {"components": {"answer": {"use": "count"}}},
        "data": {"use": "handwriting", "tasks": {"add": 1.0}},
        "learner": {"learning_rate": 1e-3},
        "sft": {"num_steps": 3, "examples_per_step": 2},
        "alarms": [{"metric": "validation/accuracy", "below": 0.1}],
    }
    with pytest.raises(ValidationError, match="the alarm on 'validation/accuracy' needs validation: nothing else reports it"):
        TypeAdapter(SftRecipe).validate_python(recipe)


# ---------------------------------------------------------------- the warnings that every run has


def collapse(kind):
    """Returns 40 steps of a run that is well for 20 of them, then collapses; its reward falls last, as in runs that were reported."""
    log = []
    for step in range(40):
        ill = max(0, step - 19) / 10  # 0.1 at step 20, 2.0 at the end
        metrics = {
            "reward": 0.6 if ill < 1 else max(0.0, 0.6 * (2 - ill)),
            "entropy": 0.5,
            "old_kl_k3": 0.002,
            "engine_kl_k3": 1e-4,
            "response_tokens": 120.0,
            "groups_without_signal_frac": 0.3,
            "reward_std": 0.4,
            "truncated_frac": 0.02,
            "unavailable_frac": 0.0,
            "grad_norm": 0.8,
            "loss": 0.02,
        }
        changes = {
            "entropy falls": {"entropy": 0.5 * math.exp(-5 * ill)},
            "entropy explodes": {"entropy": 0.5 * math.exp(3 * ill)},
            "policy runs away": {"old_kl_k3": 0.002 * math.exp(8 * ill)},
            "engine and learner part": {"engine_kl_k3": 1e-4 * math.exp(12 * ill)},
            "responses shrink": {"response_tokens": 120 * math.exp(-3 * ill)},
            "responses run on": {"response_tokens": 120 * math.exp(3 * ill), "truncated_frac": min(1.0, 2 * ill)},
            "no signal": {"groups_without_signal_frac": min(1.0, 0.3 + 2 * ill), "reward_std": max(0.0, 0.4 - ill)},
            "the judge is gone": {"unavailable_frac": min(1.0, ill)},
            "gradients explode": {"grad_norm": 0.8 * math.exp(6 * ill)},
        }
        log.append(metrics | (changes[kind] if ill else {}))
    return log


KINDS = (
    "entropy falls",
    "entropy explodes",
    "policy runs away",
    "engine and learner part",
    "responses shrink",
    "responses run on",
    "no signal",
    "the judge is gone",
    "gradients explode",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_collapse_rings_before_the_reward_has_halved(kind):
    board, log = Alarms(RL_ALARMS), collapse(kind)
    halved = next(step for step, metrics in enumerate(log, start=1) if metrics["reward"] <= 0.3)
    rung = [step for step, metrics in enumerate(log, start=1) if board.update(step, metrics)]
    assert rung, "no alarm at all"
    assert 20 < rung[0] < halved


def test_a_run_without_a_collapse_never_rings():
    log = collapse("no signal")[:20]
    board = Alarms(RL_ALARMS)
    assert [board.update(step, metrics) for step, metrics in enumerate(log * 3, start=1)] == [[]] * 60
    board.check_reported()
    falling = Alarms(SFT_ALARMS)
    assert [falling.update(step, {"loss": 6 / step, "grad_norm": 2 / step**0.5}) for step in range(1, 60)] == [[]] * 59
    falling.check_reported()


def test_the_defaults_only_warn():
    assert {alarm.action for alarm in (*RL_ALARMS, *SFT_ALARMS)} == {"warn"}
    assert SftRecipe.model_fields["alarms"].default == SFT_ALARMS
    assert RlRecipe.model_fields["alarms"].default == RL_ALARMS


def group(*rewards):
    message = Message(role="user", parts=(TextPart(text="?"),))
    rollout = Rollout(
        token_ids=(1, 2),
        sampled=(False, True),
        sampler_logprobs=(0.0, -1.0),
        media=(),
        text="",
        prompt_suffix="",
        finish_reason="stop",
        policy_version=0,
    )
    judged = tuple(JudgedRollout(rollout=rollout, score=RolloutScore(reward=reward, results={})) for reward in rewards)
    return ScoredGroup(example=Example(id="e", messages=(message,), answer="", task="t", source="s"), judged=judged, unjudged=())


def test_reward_spread_is_over_groups_with_two_judged():
    groups = [group(0.0, 1.0), group(1.0, 1.0, 1.0), group(0.5), group(), group(0.25, 0.75)]
    spread = {"reward_std": pytest.approx((math.sqrt(0.5) + math.sqrt(0.125)) / 3), "groups_without_signal_frac": pytest.approx(1 / 3)}
    assert merge([reward_spread(groups)]) == spread
    assert merge([reward_spread(groups[:1]), reward_spread(groups[1:])]) == spread, "two ranks measure what one does"
    assert reward_spread([group(1.0)]) == {}
    assert reward_spread([]) == {}


# ---------------------------------------------------------------- where to roll back to


def test_the_target_is_the_newest_checkpoint_of_the_schedule_from_before_the_fault():
    back = RollBacks(every=3)
    steps = {0, 3, 6, 7, 9}
    assert back.target(steps, first_step=8) == 6, "7 was saved by a Ctrl-C: the uninterrupted run has no such checkpoint"
    assert back.target(steps, first_step=7) == 3, "step 7 was measured on the weights of step 6"
    assert back.target(steps, first_step=1) == 0
    assert back.target(steps - {0}, first_step=4) is None
    back.add(first_step=7, step=9)
    assert back.spans == [(6, 8)]
    assert back.target(steps, first_step=11) == 9, "saved after the roll-back"
    assert back.target(steps, first_step=10) == 3, "6 held the fault"
    again = RollBacks(every=3)
    again.load(json.loads(json.dumps(back.state())))
    assert again == back


@given(
    every=st.integers(1, 5),
    interrupts=st.sets(st.integers(1, 40)),
    keep=st.integers(1, 3),
    first_step=st.integers(1, 40),
    length=st.integers(1, 8),
)
def test_retention_spares_what_a_roll_back_will_want(every, interrupts, keep, first_step, length):
    """Saves on schedule and at any interrupts, fault from `first_step`: its target is there when the alarm rings."""
    back = RollBacks(every=every)
    kept = {0}
    for step in range(1, first_step + length + 1):
        if step == first_step + length - 1:
            uninterrupted = range(0, first_step + length, every)
            assert back.target(kept, first_step=first_step) == back.target(uninterrupted, first_step=first_step)
        if step % every == 0 or step in interrupts:
            kept.add(step)
            protected = back.protected(kept, step=step, first_steps=[first_step] if step >= first_step else [])
            kept = set(sorted(kept)[-keep:]) | protected
