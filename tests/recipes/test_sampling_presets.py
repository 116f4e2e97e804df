"""The report's sampling in evaluations: what a preset stands for, what it refuses, and what reaches the engine."""

from types import SimpleNamespace

import pytest
from vlpost.model.sampler import SampleRequest
from vlpost.recipes.evaluate import NarrowedSampler, sampling_line
from vlpost.recipes.load import RecipeError, load_recipe
from vlpost.recipes.run import main
from vlpost.recipes.schema import SAMPLING_PRESETS, EvaluateConfig

CHAIN = """
method: chain
output: out
common:
  sampler: {max_response_tokens: 8, max_model_len: 64}
  rewards: {components: {answer: {use: count}}}
  data: {use: handwriting, tasks: {add: 1.0}}
stages:
  sft:
    method: sft
    model: {nano: {size: s}}
    sft: {num_steps: 1, examples_per_step: 1}
    learner: {learning_rate: 1.0e-3}
    validation: {every: 1, data: {use: handwriting, tasks: {add: 1.0}}}
  look: {method: evaluate, model: {stage: sft}, evaluate: {preset: qwen3_vl_instruct}}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(CHAIN, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("preset", "expected"), [("qwen3_vl_instruct", ((0.7,), 0.8, 20, 1.5)), ("qwen3_vl_thinking", ((0.6,), 0.95, 20, 0.0))]
)
def test_a_preset_stands_for_values(preset, expected):
    config = EvaluateConfig.model_validate({"preset": preset})
    assert (config.temperatures, config.top_p, config.top_k, config.presence_penalty) == expected
    assert config.is_narrowed
    assert EvaluateConfig.model_validate(config.model_dump(mode="json")) == config
    assert set(SAMPLING_PRESETS[preset]) == {"temperatures", "top_p", "top_k", "presence_penalty"}


def test_show_tells_the_values_and_that_the_preset_set_them(recipe, capsys):
    assert main(["show", str(recipe)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "stages.look.evaluate.preset = 'qwen3_vl_instruct'  # recipe" in lines
    assert "stages.look.evaluate.temperatures = [0.7]  # preset" in lines
    assert "stages.look.evaluate.presence_penalty = 1.5  # preset" in lines
    assert "stages.look.evaluate.num_samples = 8  # default" in lines


@pytest.mark.parametrize(("key", "value"), [("temperatures", "[1.0]"), ("top_p", "0.9"), ("top_k", "0"), ("presence_penalty", "0.0")])
def test_a_key_that_says_otherwise_is_refused(recipe, key, value):
    with pytest.raises(RecipeError, match=rf"preset: qwen3_vl_instruct means {key}: .*, and {key} = .* is given: take one of them out"):
        load_recipe(recipe, [f"stages.look.evaluate.{key}={value}"])


def test_a_key_that_says_the_same_may_stand(recipe):
    loaded = load_recipe(recipe, ["stages.look.evaluate.top_k=20"])
    assert loaded.origins["stages.look.evaluate.top_k"] == "command line"


def test_an_unknown_preset_is_refused_with_those_there_are(recipe):
    with pytest.raises(RecipeError, match=r"'qwen2': Input should be 'qwen3_vl_instruct' or 'qwen3_vl_thinking'"):
        load_recipe(recipe, ["stages.look.evaluate.preset=qwen2"])


@pytest.mark.parametrize("override", ["preset=qwen3_vl_thinking", "top_p=0.9", "top_k=20", "presence_penalty=1.5"])
def test_a_training_stage_has_none_of_them(recipe, override):
    with pytest.raises(RecipeError, match="a validation follows the policy that is trained"):
        load_recipe(recipe, [f"stages.sft.validation.{override}"])
    with pytest.raises(RecipeError, match="unknown key"):
        load_recipe(recipe, [f"stages.sft.sampler.{override}"])


def request(temperature):
    prompt = SimpleNamespace(token_ids=(1,), media=(), suffix="")
    return SampleRequest(place="a", prompt=prompt, num_rollouts=1, seed=3, temperature=temperature)  # pyright: ignore


def test_sampled_requests_are_narrowed_and_greedy_ones_are_not():
    asked = []
    engine = SimpleNamespace(policy_version=4, sample=lambda requests: asked.extend(requests) or [()] * len(requests))
    sampler = NarrowedSampler(engine, EvaluateConfig.model_validate({"preset": "qwen3_vl_instruct"}))  # pyright: ignore
    assert sampler.sample([request(0.7), request(0.0)]) == [(), ()]
    assert sampler.policy_version == 4
    assert [(one.temperature, one.top_p, one.top_k, one.presence_penalty, one.seed) for one in asked] == [
        (0.7, 0.8, 20, 1.5, 3),
        (0.0, 1.0, 0, 0.0, 3),
    ]


def test_the_log_tells_how_responses_are_drawn():
    config = EvaluateConfig.model_validate({"preset": "qwen3_vl_thinking"})
    assert sampling_line(config) == "draws at temperature 0.6 with top_p 0.95, top_k 20, presence_penalty 0 (qwen3_vl_thinking)"
    assert not EvaluateConfig().is_narrowed
