"""Rewards for conversations with tools: exact values, conditions, what is never asked, and what plug-ins in a process see."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from vlpost.model.records import DataError, Example, Group, ImagePart, Message, Rollout, TextPart, ToolAnswer, ToolCall, Turn
from vlpost.rewards import RewardConfigError, RewardManager, RewardsConfig
from vlpost.rewards.cache import verdict_key
from vlpost.rewards.coherence import Coherence, CoherenceOptions, open_coherence, transcript
from vlpost.rewards.plugin_worker import decode_groups, encode_groups
from vlpost.rewards.result import RewardResult, Unavailable
from vlpost.rewards.tool_calls import check_target, tool_calls, tool_used

CALL = ToolCall(name="zoom", arguments='{"label": "7"}')


def example(target=None, **changes):
    metadata = {} if target is None else {"target_calls": target}
    message = Message(role="user", parts=(TextPart(text="?"),))
    return Example(**({"id": "e", "messages": (message,), "answer": "7", "task": "zoom", "source": "s", "metadata": metadata} | changes))


def rollout(num_calls=0, num_errors=0, *, text="\\boxed{7}", ending="answered", reason=""):
    answers = [ToolAnswer(text="", num_images=1, is_error=False)] * num_calls + [
        ToolAnswer(text="no", num_images=0, is_error=True)
    ] * num_errors
    turns = [Turn(text="I look", prompt_suffix="", words="I look", calls=(CALL,), answers=(answer,)) for answer in answers]
    turns.append(Turn(text=text, prompt_suffix="", words=text, calls=(), answers=()))
    return Rollout(
        token_ids=(1, 2), sampled=(False, True), sampler_logprobs=(0.0, -1.0), media=(), text=text, prompt_suffix="",
        finish_reason="stop" if ending == "answered" else "length", policy_version=0, turns=tuple(turns), ending=ending, reason=reason,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("calls", "errors", "target", "options", "value"),
    [
        (1, 0, 1, {}, 1.0),
        (0, 0, 1, {}, 0.5),
        (2, 0, 1, {}, 0.5),
        (3, 0, 1, {}, 0.0),
        (9, 0, 1, {}, 0.0),
        (0, 0, 0, {}, 1.0),
        (1, 3, 1, {}, 1.0),
        (1, 3, 1, {"error_cost": 0.25}, 0.25),
        (0, 2, 2, {"tolerance": 4.0}, 0.5),
    ],
)
def test_values(calls, errors, target, options, value):
    result = tool_calls(example(target), rollout(calls, errors), **options)
    assert not isinstance(result, Unavailable)
    assert result.value == pytest.approx(value)
    assert result.metrics == {"calls": calls, "target": target, "gap": abs(calls - target), "errors": errors}


@given(st.integers(0, 6), st.integers(0, 6), st.floats(0.5, 10))
def test_one_too_many_costs_what_one_too_few_does(target, gap, tolerance):
    def value(calls):
        return tool_calls(example(target), rollout(calls), tolerance=tolerance).value  # pyright: ignore

    assert 0.0 <= value(target + gap) <= value(target) == 1.0
    if gap <= target:
        assert value(target + gap) == value(target - gap)


@pytest.mark.parametrize("target", [None, -1, 1.0, True, "1"])
def test_a_row_without_a_target_is_refused_and_never_scored(target):
    with pytest.raises(DataError, match=r"metadata.target_calls = .*: must be a whole number of calls, 0 or more"):
        check_target(example(target))
    assert isinstance(tool_calls(example(target), rollout(1)), Unavailable)


def score(components, *rollouts, **changes):
    config = RewardsConfig.model_validate({"components": components} | changes)
    with RewardManager(config, recipe_folder=None, allow_code=False) as rewards:
        (scored,) = rewards.score([Group(example=example(1), rollouts=rollouts)])
    return scored


def test_a_bonus_counts_only_where_the_answer_is_right():
    components = {"answer": {"use": "count", "weight": 0.8}, "tool": {"use": "tool_used", "weight": 1.2, "when": "answer"}}
    scored = score(components, rollout(1), rollout(0), rollout(1, text="\\boxed{8}"), rollout(0, 2))
    assert [judged.score.reward for judged in scored.judged] == pytest.approx([2.0, 0.8, 0.0, 0.8])
    assert scored.judged[2].score.results["tool"].note == "counts only where answer is above 0; by itself 1"
    assert tool_used(example(), rollout(0, 2)).value == 0.0


@pytest.mark.parametrize(
    ("components", "words"),
    [
        (
            {"a": {"use": "count", "when": "b"}},
            "components.a.when = 'b': must be another component that has no `when` of its own, one of none",
        ),
        ({"a": {"use": "count", "when": "a"}, "b": {"use": "count"}}, "one of b"),
        ({"a": {"use": "count", "when": "b"}, "b": {"use": "count", "when": "a"}}, "components.a.when = 'b': must be another"),
        ({"a": {"use": "tool_used", "when": "b"}, "b": {"use": "count", "tasks": ["x"]}}, "b judges only the tasks x; give a no others"),
    ],
)
def test_conditions_that_cannot_hold_are_refused(components, words):
    with pytest.raises(ValidationError) as caught:
        RewardsConfig.model_validate({"components": components})
    assert words in str(caught.value)


def test_a_conversation_that_a_tool_broke_is_never_scored():
    broken = rollout(1, ending="unavailable", reason="tool python: the sandbox failed")
    components = {"answer": {"use": "count"}, "calls": {"use": "tool_calls"}}
    scored = score(components, rollout(1), broken, rollout(0), max_unavailable_frac=0.5)
    assert [judged.score.reward for judged in scored.judged] == [2.0, 1.5]
    assert [unjudged.reasons for unjudged in scored.unjudged] == [{"agent": "tool python: the sandbox failed"}]
    assert score(components, broken, broken, max_unavailable_frac=1.0).judged == ()


def test_turns_reach_a_plug_in_in_another_process():
    groups = [Group(example=example(1), rollouts=(rollout(2, 1), rollout(0, ending="turns")))]
    assert decode_groups(*encode_groups(groups)) == groups


def test_other_turns_are_another_verdict():
    keys = {verdict_key(example(1), one, judge={}) for one in (rollout(0), rollout(1), rollout(0, 1), rollout(0, ending="length"))}
    assert len(keys) == 4


def test_the_record_for_a_judge_has_every_turn():
    thinking = Turn(text="a</think>b", prompt_suffix="<think>", words="a</think>b", calls=(CALL,), answers=())
    whole = rollout(1, 1)
    assert transcript(whole).splitlines() == [
        "Turn 1, the assistant writes: I look", 'Turn 1, call: zoom {"label": "7"}', "Turn 1, result: [image]",
        "Turn 2, the assistant writes: I look", 'Turn 2, call: zoom {"label": "7"}', "Turn 2, result (an error): no",
        "Turn 3, the assistant writes: \\boxed{7}",
    ]  # fmt: skip
    cut = Rollout(
        token_ids=(1,), sampled=(True,), sampler_logprobs=(0.0,), media=(), text="", prompt_suffix="", finish_reason="length",
        policy_version=0, turns=(thinking,), ending="turns",
    )  # fmt: skip
    assert transcript(cut).splitlines() == [
        "Turn 1, the assistant writes: [thinking] a [end of thinking] b", 'Turn 1, call: zoom {"label": "7"}',
        "The conversation was cut off here, before an answer.",
    ]  # fmt: skip


class ScriptedJudge:
    """Keeps the rows that it is shown."""

    def __init__(self):
        self.rows = []

    def judge(self, rows):
        self.rows += rows
        return [(RewardResult(value=0.5), 0.1) for _ in rows]


@pytest.mark.parametrize("images", [True, False])
def test_a_judge_sees_the_record_and_where_asked_the_images_of_tools(images):
    crop = ImagePart.from_image(Image.new("RGB", (32, 32)))
    judge = ScriptedJudge()
    whole = replace(rollout(1), media=(crop,), prompt_suffix="<think>")
    assert Coherence(judge, images=images).judge([(example(1), whole)]) == [(RewardResult(value=0.5), 0.1)]  # pyright: ignore
    ((shown, record),) = judge.rows
    assert record.text == transcript(whole)
    assert record.prompt_suffix == ""
    assert shown.media == ((crop,) if images else ())


def test_without_a_judge_it_says_what_is_missing():
    config = RewardsConfig.model_validate({"components": {"c": {"use": "coherence"}}})
    with pytest.raises(RewardConfigError, match=r"needs a judge: give rewards.judge"), open_coherence(CoherenceOptions(), config, None):
        pass
