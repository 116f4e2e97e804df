"""The reward for the number of calls tells policies apart: always calling once is no way to earn it."""

import pytest
from vlpost.model.records import Example, Message, Rollout, TextPart, ToolAnswer, ToolCall, Turn
from vlpost.rewards.tool_calls import tool_calls

TARGETS = (0, 1, 2, 0, 1, 2)


def reward(*, num_calls, target):
    turn = Turn(
        text="I look",
        prompt_suffix="",
        words="I look",
        calls=(ToolCall(name="zoom", arguments="{}"),),
        answers=(ToolAnswer(text="", num_images=1, is_error=False),),
    )
    rollout = Rollout(
        token_ids=(1, 2), sampled=(False, True), sampler_logprobs=(0.0, -1.0), media=(), text="7", prompt_suffix="",
        finish_reason="stop", policy_version=0, turns=(turn,) * num_calls, ending="answered",
    )  # fmt: skip
    message = Message(role="user", parts=(TextPart(text="?"),))
    example = Example(id="e", messages=(message,), answer="7", task="zoom", source="s", metadata={"target_calls": target})
    return tool_calls(example, rollout).value


@pytest.mark.parametrize(
    ("policy", "mean"), [(lambda target: target, 1.0), (lambda target: 1, 2 / 3), (lambda target: 0, 0.5), (lambda target: 4, 0.0)]
)
def test_only_the_policy_that_follows_the_target_earns_all(policy, mean):
    assert sum(reward(num_calls=policy(target), target=target) for target in TARGETS) / len(TARGETS) == pytest.approx(mean)
