from pathlib import Path

import pytest
import vlpost.recipes
import yaml
from vlpost.recipes.load import load_recipe
from vlpost.recipes.show import flat_values, resolved_lines

QUICKSTART = Path(vlpost.recipes.__file__).parent / "quickstart.yaml"
CHAIN = """
method: chain
output: out
common:
  seed: 3
  model: {nano: {size: s}}
  sampler: {max_response_tokens: 8, max_model_len: 64}
  rewards: {components: {answer: {use: count}}}
  data: {use: handwriting, split: train, tasks: {add: 1.0, read: 2.0}, languages: [en]}
stages:
  sft:
    method: sft
    sft: {num_steps: 3, examples_per_step: 4}
    learner: {learning_rate: 1.0e-3, freeze: [vision]}
    data: {split: validation}
  exam:
    method: evaluate
    model: {stage: sft}
"""


@pytest.fixture
def shown(tmp_path):
    """Returns a function: what `show` says of a recipe with overrides, key -> (value, origin)."""

    def show(*overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(CHAIN, encoding="utf-8")
        resolved = {}
        for line in resolved_lines(load_recipe(path, overrides)):
            key, _, rest = line.partition(" = ")
            value, _, origin = rest.rpartition("  # ")
            assert key not in resolved
            resolved[key] = (value, origin)
        return resolved

    return show


def test_every_origin_is_told(shown):
    resolved = shown("stages.sft.sft.num_steps=5", "stages.exam.evaluate.greedy=false")
    assert resolved["method"] == ("'chain'", "recipe")
    assert resolved["output"] == ("'out'", "recipe")
    assert resolved["stages.sft.seed"] == ("3", "common")
    assert resolved["stages.sft.model.nano.size"] == ("'s'", "common")
    assert resolved["stages.sft.model.nano.vocab_size"] == ("448", "default")
    assert resolved["stages.sft.model.stage"] == ("None", "default")
    assert resolved["stages.sft.data.split"] == ("'validation'", "recipe")
    assert resolved["stages.sft.data.tasks.read"] == ("2.0", "common")
    assert resolved["stages.sft.data.languages"] == ("['en']", "common")
    assert resolved["stages.sft.learner.freeze"] == ("['vision']", "recipe")
    assert resolved["stages.sft.learner.beta2"] == ("0.95", "default")
    assert resolved["stages.sft.sft.num_steps"] == ("5", "command line")
    assert resolved["stages.sft.sft.examples_per_step"] == ("4", "recipe")
    assert resolved["stages.sft.name"] == ("'sft'", "chain")
    assert resolved["stages.exam.output"] == ("'out/exam'", "chain")
    assert resolved["stages.exam.data.split"] == ("'train'", "common")
    assert resolved["stages.exam.evaluate.greedy"] == ("False", "command line")
    assert resolved["stages.exam.evaluate.num_samples"] == ("8", "default")


def test_a_stages_own_model_leaves_nothing_of_the_common_one(shown):
    resolved = shown()
    assert resolved["stages.exam.model.stage"] == ("'sft'", "recipe")
    assert resolved["stages.exam.model.nano"] == ("None", "default")
    assert not any(key.startswith("stages.exam.model.nano.") for key in resolved)


def test_an_override_of_a_common_key_comes_from_the_command_line_in_every_stage(shown):
    resolved = shown("common.seed=9", "common.sampler={max_response_tokens: 4, max_model_len: 32}", "common.parity.num_publishes=0")
    for stage in ("sft", "exam"):
        assert resolved[f"stages.{stage}.seed"] == ("9", "command line")
        assert resolved[f"stages.{stage}.sampler.max_model_len"] == ("32", "command line")
        assert resolved[f"stages.{stage}.parity.num_publishes"] == ("0", "command line")
        assert resolved[f"stages.{stage}.parity.num_examples"] == ("8", "default")
        assert resolved[f"stages.{stage}.data.use"] == ("'handwriting'", "common")


def test_a_stages_own_value_is_not_touched_by_an_override_of_common(shown):
    resolved = shown("common.data.split=test")
    assert resolved["stages.sft.data.split"] == ("'validation'", "recipe")
    assert resolved["stages.exam.data.split"] == ("'test'", "command line")


def test_an_override_may_give_a_stage_a_key_of_its_own(shown):
    resolved = shown("stages.exam.sampler.temperature=0.5", "stages.exam.seed=4", "stages.sft.checkpoint.every=7")
    assert resolved["stages.exam.sampler.temperature"] == ("0.5", "command line")
    assert resolved["stages.exam.sampler.max_model_len"] == ("64", "common")
    assert resolved["stages.exam.seed"] == ("4", "command line")
    assert resolved["stages.sft.seed"] == ("3", "common")
    assert resolved["stages.sft.checkpoint.every"] == ("7", "command line")
    assert resolved["stages.sft.checkpoint.keep"] == ("2", "default")


def test_an_override_of_the_output_moves_every_stage(shown):
    resolved = shown("output=elsewhere")
    assert resolved["output"] == ("'elsewhere'", "command line")
    assert resolved["stages.sft.output"] == ("'elsewhere/sft'", "chain")


def test_the_recipe_file_and_show_agree_on_every_value_of_the_quickstart():
    written = dict(flat_values(yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))["stages"], "stages."))
    loaded = load_recipe(QUICKSTART)
    resolved = dict(flat_values(loaded.recipe.model_dump(mode="json")))
    assert len(written) > 30
    for key, value in written.items():
        assert resolved[key] == value, key
        assert loaded.origins[key] == "recipe", key
    assert {loaded.origins.get(key, "default") for key in resolved} == {"recipe", "common", "chain", "default"}
