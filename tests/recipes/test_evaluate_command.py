"""`vlpost evaluate MODEL --like RECIPE` and `vlpost compare`, up to where the engine would start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from vlpost.model.records import VlpostError
from vlpost.recipes.confidence import Estimate
from vlpost.recipes.evaluate_command import load_evaluation, model_source
from vlpost.recipes.evaluation_record import JudgedResponse, Outcome, figures_of, write_evaluation
from vlpost.recipes.load import RecipeError
from vlpost.recipes.run import main
from vlpost.recipes.schema import EvaluateRecipe

EXAM = """
method: evaluate
output: {output}
sampler: {{max_response_tokens: 8, max_model_len: 64}}
rewards: {{components: {{answer: {{use: count}}}}}}
data: {{use: handwriting, tasks: {{add: 1.0}}}}
"""
CHAIN = """
method: chain
output: {output}
common:
  model: {{nano: {{size: s}}}}
  sampler: {{max_response_tokens: 8, max_model_len: 64}}
  rewards: {{components: {{answer: {{use: count}}}}}}
  data: {{use: handwriting, tasks: {{add: 1.0}}}}
stages:
  sft: {{method: sft, sft: {{num_steps: 1, examples_per_step: 1}}, learner: {{learning_rate: 1.0e-3}}}}
  look: {{method: evaluate, model: {{stage: sft}}, evaluate: {{num_samples: 3}}}}
"""


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "run" / "sft" / "export"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def written(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text.format(output=folder / "out"), encoding="utf-8")
    return path


def test_a_model_is_measured_as_a_recipe_that_names_none_says(tmp_path, export):
    loaded = load_evaluation(export, like=written(tmp_path, EXAM), stage=None, overrides=["seed=3"])
    assert isinstance(loaded.recipe, EvaluateRecipe)
    assert loaded.recipe.model.path == str(export.resolve())
    assert (loaded.recipe.seed, loaded.origins["model.path"], loaded.origins["seed"]) == (3, "command line", "command line")


def test_a_model_is_measured_as_a_stage_of_a_chain_does(tmp_path, export):
    loaded = load_evaluation(export.parent, like=written(tmp_path, CHAIN), stage="look", overrides=[f"output={tmp_path / 'elsewhere'}"])
    recipe = loaded.recipe
    assert isinstance(recipe, EvaluateRecipe)
    assert (recipe.model.path, recipe.model.stage) == (str(export.resolve()), None)
    assert (recipe.evaluate.num_samples, recipe.output, recipe.name) == (3, tmp_path / "elsewhere" / "look", "look")
    assert loaded.origins["evaluate.num_samples"] == "recipe"
    assert loaded.origins["sampler.max_model_len"] == "common"


def test_of_a_chain_the_stage_has_to_be_named_and_to_measure(tmp_path, export):
    chain = written(tmp_path, CHAIN)
    with pytest.raises(VlpostError, match=r"a chain; say which of its evaluate stages measures: --stage look$"):
        load_evaluation(export, like=chain, stage=None, overrides=[])
    with pytest.raises(VlpostError, match=r"--stage lok: must be one of sft, look$"):
        load_evaluation(export, like=chain, stage="lok", overrides=[])
    with pytest.raises(VlpostError, match="method is 'sft'; `vlpost evaluate` takes a recipe of method evaluate"):
        load_evaluation(export, like=chain, stage="sft", overrides=[])


def test_what_is_wrong_with_the_recipe_is_still_said(tmp_path, export):
    with pytest.raises(RecipeError, match=r"evaluate\.num_sample: unknown key; did you mean 'num_samples'"):
        load_evaluation(export, like=written(tmp_path, EXAM), stage=None, overrides=["evaluate.num_sample=3"])


def test_a_model_is_a_folder_a_stages_folder_or_a_hub_name(tmp_path, export):
    assert model_source(export) == model_source(export.parent) == str(export.resolve())
    assert model_source(Path("Qwen/Qwen3-VL-2B-Instruct")) == "Qwen/Qwen3-VL-2B-Instruct"
    with pytest.raises(VlpostError, match=r"run: no config\.json, .*; the stages below it: sft$"):
        model_source(tmp_path / "run")
    with pytest.raises(VlpostError, match="no such folder; give an export"):
        model_source(tmp_path / "nowhere")
    (export / "adapter_config.json").write_text("{}")
    with pytest.raises(VlpostError, match="an adapter alone, no model: train with export: merged"):
        model_source(export)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "{export}"], "no recipe; to measure a model, name an evaluate recipe too"),
        (["evaluate", "{recipe}", "--stage", "look"], "--stage look: says which stage of --like RECIPE measures; add --like"),
        (["compare", "{export}", "{export}"], "cannot be read (No such file or directory); give the folder of a finished stage"),
    ],
)
def test_words_that_do_not_go_together_are_refused(words, message, tmp_path, export, capsys):
    recipe = written(tmp_path, CHAIN)
    assert main([word.format(export=export, recipe=recipe) for word in words]) == 1
    assert message in capsys.readouterr().err


def evaluated(folder, num_right):
    folder.mkdir()
    outcomes = [
        Outcome(
            id=str(number),
            task="add",
            way="greedy",
            responses=(
                JudgedResponse(text="", reward=float(number < num_right), components={}, tokens=1, is_truncated=False, unavailable={}),
            ),
        )
        for number in range(20)
    ]
    figures: dict[str, Estimate] = figures_of(outcomes, pass_ks=())
    write_evaluation(folder, described={"model": "m", "data": "f00d"}, settings={}, figures=figures, outcomes=outcomes)
    return str(folder)


def test_compare_prints_a_table_without_loading_torch(tmp_path):
    first, second = evaluated(tmp_path / "a", 10), evaluated(tmp_path / "b", 15)
    program = (
        "import sys; from vlpost.recipes.run import main; status = main(sys.argv[1:]); "
        "print('torch' in sys.modules, 'vllm' in sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", program, "compare", first, second], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == f"A: {first}"
    assert lines[3].split() == ["greedy", "examples", "A", "B", "B", "-", "A", "up/down", "p"]
    assert lines[4].split() == ["all", "20", "50.0", "75.0", "+25.0", "[+10.0,", "+45.0]", "5/0", "0.062"]
    assert lines[-1] == "False False"
    assert json.loads((tmp_path / "a" / "evaluation.json").read_text())["intervals"]["greedy"]["mean"] == 0.5
