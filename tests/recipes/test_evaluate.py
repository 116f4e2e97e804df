"""Evaluation with an engine that says what the test tells it: exact numbers need exact responses."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from vlpost.model.layout import Ranks
from vlpost.model.records import Example, Message, Rollout, TextPart
from vlpost.model.sampler import request_seed
from vlpost.recipes.evaluate import evaluate
from vlpost.recipes.schema import EvaluateConfig
from vlpost.rewards import RewardManager, RewardsConfig, RewardUnavailableError, Unavailable


def example(name, answer="12"):
    prompt = Message(role="user", parts=(TextPart(text="How much?"),))
    return Example(id=name, messages=(prompt,), answer=answer, task="add", source="test")


class Chat:
    """Encodes nothing: the scripted engine reads the place of a request."""

    def encode_prompt(self, messages):
        return SimpleNamespace(token_ids=(1,), media=(), suffix="", messages=messages)


class ScriptedSampler:
    """Answers by (example id, temperature); a response that starts with # was cut off."""

    policy_version = 0

    def __init__(self, script):
        self.script = script
        self.requests = []

    def sample(self, requests):
        self.requests += requests
        return [tuple(map(rollout, self.script[request.place, request.temperature])) for request in requests]

    def load_weights(self, weights, policy_version):
        raise AssertionError("evaluation changes no weights")


def rollout(text):
    return Rollout(
        token_ids=(1, 2),
        sampled=(False, True),
        sampler_logprobs=(0.0, -0.5),
        media=(),
        text=text.removeprefix("#"),
        prompt_suffix="",
        finish_reason="length" if text.startswith("#") else "stop",
        policy_version=0,
    )


@pytest.fixture
def rewards():
    config = RewardsConfig.model_validate({"components": {"answer": {"use": "count"}}, "max_unavailable_frac": 1.0})
    with RewardManager(config, recipe_folder=None, allow_code=False) as manager:
        yield manager


def measure(script, config, rewards, *, seed=0, examples=None):
    sampler = ScriptedSampler(script)
    names = list(dict.fromkeys(name for name, _ in script))
    measured = evaluate(
        examples or [example(name) for name in names],
        EvaluateConfig.model_validate(config),
        sampler=sampler,
        rewards=rewards,
        chat=Chat(),  # pyright: ignore
        ranks=Ranks(),
        seed=seed,
    ).metrics
    return measured, sampler.requests


RIGHT, WRONG = r"\boxed{12}", r"\boxed{13}"
SCRIPT = {
    ("a", 1.0): [RIGHT, WRONG, WRONG, RIGHT],
    ("b", 1.0): [WRONG, WRONG, "#", "nothing"],
    ("c", 1.0): [RIGHT, RIGHT, RIGHT, RIGHT],
    ("a", 0.5): [RIGHT, RIGHT, RIGHT, WRONG],
    ("b", 0.5): [WRONG, WRONG, WRONG, "#" + WRONG],
    ("c", 0.5): [RIGHT, RIGHT, RIGHT, "#" + RIGHT],
    ("a", 0.0): [RIGHT],
    ("b", 0.0): ["#"],
    ("c", 0.0): [RIGHT],
}


def test_every_number_is_exact(rewards):
    measured, _ = measure(SCRIPT, {"num_samples": 4, "temperatures": [1.0, 0.5]}, rewards)
    assert measured == {
        "avg@4/1": 6 / 12,
        "pass@4/1": 2 / 3,
        "avg@4/0.5": 7 / 12,
        "pass@4/0.5": 2 / 3,
        "greedy": 2 / 3,
        "truncated_frac": 4 / 27,
        "unavailable_frac": 0.0,
    }


def test_without_greedy_nothing_is_drawn_greedily(rewards):
    measured, requests = measure(SCRIPT, {"num_samples": 4, "greedy": False}, rewards)
    assert set(measured) == {"avg@4/1", "pass@4/1", "truncated_frac", "unavailable_frac"}
    assert measured["truncated_frac"] == 1 / 12
    assert {request.temperature for request in requests} == {1.0}
    assert {request.num_rollouts for request in requests} == {4}


def test_greedy_alone_draws_one_response_to_each(rewards):
    measured, requests = measure(SCRIPT, {"num_samples": 4, "temperatures": []}, rewards)
    assert measured == {"greedy": 2 / 3, "truncated_frac": 1 / 3, "unavailable_frac": 0.0}
    assert [(request.place, request.temperature, request.num_rollouts) for request in requests] == [
        ("a", 0.0, 1), ("b", 0.0, 1), ("c", 0.0, 1),
    ]  # fmt: skip


def test_what_could_not_be_judged_counts_in_its_share_alone(rewards):
    examples = [example("a"), example("b", answer="a dozen"), example("c")]  # `count` can judge no response to b
    measured, _ = measure(SCRIPT, {"num_samples": 4}, rewards, examples=examples)
    assert measured == {
        "avg@4/1": 6 / 8,
        "pass@4/1": 1.0,
        "greedy": 1.0,
        "truncated_frac": 2 / 15,
        "unavailable_frac": 5 / 15,
    }


def test_where_nothing_could_be_judged_there_is_no_accuracy(rewards):
    examples = [example(name, answer="a dozen") for name in "abc"]
    measured, _ = measure(SCRIPT, {"num_samples": 4}, rewards, examples=examples)
    assert measured == {"truncated_frac": 2 / 15, "unavailable_frac": 1.0}


def test_one_unjudged_response_leaves_the_others_of_its_example(tmp_path):
    (tmp_path / "odd.py").write_text(
        "from vlpost.rewards import Unavailable\n\n"
        "def odd(example, rollout):\n    return Unavailable(reason='no judge') if rollout.text == 'x' else float(rollout.text)\n"
    )
    config = RewardsConfig.model_validate({"components": {"odd": {"use": "odd.py:odd"}}, "max_unavailable_frac": 0.5})
    with RewardManager(config, recipe_folder=tmp_path, allow_code=False) as manager:
        script = {("a", 1.0): ["x", "0.5", "0.25"], ("b", 1.0): ["0.0", "-1.0", "x"]}
        measured, _ = measure(script, {"num_samples": 3, "greedy": False}, manager)
        assert measured == {"avg@3/1": -0.25 / 4, "pass@3/1": 0.5, "truncated_frac": 0.0, "unavailable_frac": 2 / 6}
        script = {("a", 1.0): ["x", "x", "0.25"], ("b", 1.0): ["0.0", "x", "x"]}
        with pytest.raises(RewardUnavailableError, match="4 of 6 rollouts could not be judged"):
            measure(script, {"num_samples": 3, "greedy": False}, manager)
    assert Unavailable(reason="no judge").reason == "no judge"


def test_seeds_depend_on_seed_temperature_and_example_and_differ(rewards):
    config = {"num_samples": 4, "temperatures": [1.0, 0.5]}

    def seeds(script, config, seed=0):
        _, requests = measure(script, config, rewards, seed=seed)
        return {(request.place, request.temperature): request.seed for request in requests}

    drawn = seeds(SCRIPT, config)
    assert len(set(drawn.values())) == len(drawn) == 9
    assert drawn == seeds(SCRIPT, config)
    assert drawn["b", 0.5] == request_seed(0, "evaluate", "/0.5", "b")
    alone = {key: value for key, value in SCRIPT.items() if key[0] == "b"}
    fewer = seeds(alone, {"num_samples": 2, "temperatures": [0.5]})
    assert fewer == {key: value for key, value in drawn.items() if key in (("b", 0.5), ("b", 0.0))}
    assert set(seeds(SCRIPT, config, seed=1).values()).isdisjoint(drawn.values())


def test_tasks_and_components_have_figures_of_their_own():
    config = RewardsConfig.model_validate(
        {
            "components": {"answer": {"use": "count"}, "form": {"use": "exact", "weight": 0.5, "tasks": ["form"]}},
            "max_unavailable_frac": 1.0,
        }
    )
    script = {
        ("a", 1.0): [RIGHT, WRONG], ("b", 1.0): [RIGHT, RIGHT], ("c", 1.0): [WRONG, WRONG],
        ("a", 0.0): [WRONG], ("b", 0.0): [RIGHT], ("c", 0.0): [RIGHT],
    }  # fmt: skip
    examples = [example("a"), replace(example("b"), task="form"), replace(example("c"), task="form")]
    with RewardManager(config, recipe_folder=None, allow_code=False) as manager:
        measured, _ = measure(script, {"num_samples": 2}, manager, examples=examples)
    assert measured == {
        "avg@2/1": (1 + 0 + 1.5 + 1.5 + 0 + 0) / 6,
        "pass@2/1": 2 / 3,
        "task/add/avg@2/1": 0.5,
        "task/add/pass@2/1": 1.0,
        "task/form/avg@2/1": 0.75,
        "task/form/pass@2/1": 0.5,
        "macro/avg@2/1": (0.5 + 0.75) / 2,
        "macro/pass@2/1": (1.0 + 0.5) / 2,
        "macro/greedy": (0.0 + 1.5) / 2,
        "reward/answer/avg@2/1": 0.5,
        "reward/form/avg@2/1": 0.5,
        "greedy": 1.0,
        "task/add/greedy": 0.0,
        "task/form/greedy": 1.5,
        "reward/answer/greedy": 2 / 3,
        "reward/form/greedy": 1.0,
        "truncated_frac": 0.0,
        "unavailable_frac": 0.0,
    }
