"""Records for the tests of the rewards: plain functions, so that hypothesis may use them too."""

from collections.abc import Callable, Iterator

import pytest
from vlpost.model.records import Example, Group, Message, Rollout, TextPart
from vlpost.rewards import RewardManager, RewardsConfig


@pytest.fixture(scope="session")
def make_example() -> Callable[..., Example]:
    def make(answer: str = "12", *, task: str = "add", number: int = 0) -> Example:
        prompt = Message(role="user", parts=(TextPart(text="How much?"),))
        return Example(id=f"{task}-{number}", messages=(prompt,), answer=answer, task=task, source="test")

    return make


@pytest.fixture(scope="session")
def make_rollout() -> Callable[..., Rollout]:
    def make(text: str, *, prompt_suffix: str = "") -> Rollout:
        return Rollout(
            token_ids=(1, 2),
            sampled=(False, True),
            sampler_logprobs=(0.0, -0.5),
            media=(),
            text=text,
            prompt_suffix=prompt_suffix,
            finish_reason="stop",
            policy_version=0,
        )

    return make


@pytest.fixture(scope="session")
def make_group(make_example, make_rollout) -> Callable[..., Group]:
    def make(answer: str, *texts: str, task: str = "add", number: int = 0) -> Group:
        return Group(example=make_example(answer, task=task, number=number), rollouts=tuple(map(make_rollout, texts)))

    return make


@pytest.fixture(scope="session")
def math_rewards() -> Iterator[RewardManager]:
    config = RewardsConfig.model_validate({"components": {"answer": {"use": "math_answer"}}, "timeout_s": 5.0, "num_workers": 2})
    with RewardManager(config, recipe_folder=None, allow_code=False) as rewards:
        yield rewards
