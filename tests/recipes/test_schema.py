"""What a recipe may say, and that everything it can say is read somewhere."""

import ast
import importlib
import warnings
from pathlib import Path

import pytest
import vlpost.recipes
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from vlpost.model.config import LearnerConfig, NanoConfig, ParityConfig, SamplerConfig, Settings
from vlpost.recipes.schema import CheckpointConfig, EvaluateConfig, ModelConfig, Recipe, RlRecipe, SftRecipe, StageConfig, ValidationConfig
from vlpost.rl.config import RlConfig
from vlpost.sft.config import SftConfig

ROOT = Path(vlpost.recipes.__file__).parent.parent
FOLDERS = ("model", "rewards", "sft", "rl", "distill", "recipes")


def stage(method, **changes):
    values = {
        "method": method,
        "output": "out",
        "model": {"nano": {}},
        "sampler": {"max_response_tokens": 8, "max_model_len": 64},
        "rewards": {"components": {"answer": {"use": "count"}}},
        "data": {"use": "handwriting", "tasks": {"add": 1.0}},
    }
    if method != "evaluate":
        values["learner"] = {"learning_rate": 1e-3}
    if method == "sft":
        values["sft"] = {"num_steps": 3, "examples_per_step": 2}
    if method == "rl":
        values["rl"] = {"num_steps": 3, "prompts_per_step": 4, "group_size": 2}
    return values | changes


VALIDATION = {"data": {"use": "handwriting", "tasks": {"add": 1.0}}, "every": 5}


def refused(settings, values, words):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(settings).validate_python(values)
    assert words in str(caught.value)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("given", [{"path": "org/name"}, {"path": "./folder"}, {"nano": {}}, {"stage": "sft"}])
def test_a_model_has_one_source(given):
    (name,) = given
    assert {key for key, value in ModelConfig.model_validate(given).model_dump().items() if value is not None} == {name}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "model names nothing: give exactly one of path, nano, stage"),
        ({"path": "a/b", "stage": "sft"}, "model names ['path', 'stage']: give exactly one of path, nano, stage"),
        ({"nano": {}, "path": "a/b", "stage": "s"}, "model names ['path', 'nano', 'stage']: give exactly one"),
        ({"path": "model"}, "'model' is neither a hub name (org/name) nor a path: write ./model for a folder here"),
    ],
)
def test_a_model_without_or_with_two_sources_or_a_bare_name_is_refused(given, words):
    refused(ModelConfig, given, words)


# ---------------------------------------------------------------- stages and chains


def test_a_chain_may_start_from_an_earlier_stage_only():
    first, second = stage("sft"), stage("rl", model={"stage": "first"})
    TypeAdapter(Recipe).validate_python({"method": "chain", "output": "out", "stages": {"first": first, "second": second}})
    words = "stages.second.model.stage = 'first': must be an earlier training stage, one of []"
    refused(Recipe, {"method": "chain", "output": "out", "stages": {"second": second, "first": first}}, words)
    measured = {"method": "chain", "output": "out", "stages": {"first": stage("evaluate"), "second": second}}
    refused(Recipe, measured, words)


def test_a_plateau_needs_a_validation_with_a_temperature():
    sft = {"num_steps": 3, "examples_per_step": 2, "plateau": {}}
    refused(SftRecipe, stage("sft", sft=sft), "sft.plateau needs validation: it watches the validation accuracy")
    refused(
        SftRecipe, stage("sft", sft=sft, validation=VALIDATION | {"temperatures": []}), "sft.plateau needs a temperature in validation.temp"
    )
    assert SftRecipe.model_validate(stage("sft", sft=sft, validation=VALIDATION)).validation is not None
    assert SftRecipe.model_validate(stage("sft", validation=VALIDATION | {"temperatures": []})).validation is not None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperatures": [0.0]}, "Input should be greater than 0"),
        ({"temperatures": [1.0, -0.5]}, "Input should be greater than 0"),
        ({"temperatures": [1.0, 0.5, 1.0]}, "temperatures = [1.0, 0.5, 1.0]: each may stand once"),
        ({"temperatures": [1.0, 1.0000001]}, "each may stand once, to 6 digits"),
        ({"temperatures": [], "greedy": False}, "temperatures is empty and greedy is false: nothing would be drawn"),
        ({"num_samples": 0}, "greater than or equal to 1"),
        ({"num_examples": 0}, "greater than or equal to 1"),
    ],
)
def test_an_evaluation_that_measures_nothing_or_one_thing_twice_is_refused(given, words):
    refused(EvaluateConfig, given, words)


def test_greedy_alone_is_an_evaluation():
    assert EvaluateConfig.model_validate({"temperatures": []}).greedy


# ---------------------------------------------------------------- all settings


def all_settings():
    """Returns every settings class of the package."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*config*.py")) + sorted((ROOT / folder).glob("schema.py")):
            importlib.import_module(f"vlpost.{folder}.{path.stem}")
    found, waiting = set(), [Settings]
    while waiting:
        below = waiting.pop().__subclasses__()
        found |= set(below)
        waiting += below
    return sorted(found, key=lambda settings: settings.__qualname__)


def attribute_reads():
    """Returns the names of all attributes that the package reads outside of pydantic's validators, and its files."""
    reads = set()

    def visit(node):
        if isinstance(node, ast.FunctionDef) and any("_validator" in ast.unparse(decorator) for decorator in node.decorator_list):
            return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            reads.add(node.attr)
        for child in ast.iter_child_nodes(node):
            visit(child)

    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
    for path in files:
        visit(ast.parse(path.read_text(encoding="utf-8")))
    return reads, files


def test_every_declared_option_is_read():
    reads, files = attribute_reads()
    declared = all_settings()
    assert len(files) > 40
    wanted = {LearnerConfig, SamplerConfig, RlConfig, SftConfig, NanoConfig, ParityConfig, EvaluateConfig, ValidationConfig}
    assert {*wanted, CheckpointConfig, StageConfig} <= set(declared)
    fields = [(settings, name) for settings in declared for name in settings.model_fields]
    assert len(fields) > 120
    unread = [
        f"{settings.__module__}.{settings.__name__}.{name}"
        for settings, name in fields
        if name not in reads | {"allow_plain_http"}  # a permission: the validator that may refuse is all that asks for it
    ]
    assert unread == []


def test_every_settings_class_is_frozen_and_forbids_unknown_keys_and_infinite_numbers():
    declared = all_settings()
    assert len(declared) >= 24
    for settings in declared:
        assert settings.model_config.get("frozen") is True
        assert settings.model_config.get("extra") == "forbid"
        assert settings.model_config.get("allow_inf_nan") is False


@given(value=st.sampled_from([float("inf"), float("-inf"), float("nan")]), key=st.sampled_from(["temperature", "gpu_memory_utilization"]))
def test_no_number_may_be_infinite(value, key):
    with pytest.raises(ValidationError):
        SamplerConfig.model_validate({"max_response_tokens": 4, "max_model_len": 64, key: value})


def test_defaults_hold_their_own_rules():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method, settings in (("sft", SftRecipe), ("rl", RlRecipe)):
            recipe = settings.model_validate(stage(method))
            again = settings.model_validate(recipe.model_dump(mode="json"))
            assert again == recipe
