"""Every recipe that the project ships can be read, and says of itself what is true."""

from pathlib import Path

import pytest
import vlpost.recipes
from vlpost.recipes.load import load_recipe

RECIPES = sorted(Path(vlpost.recipes.__file__).parent.glob("*.yaml"))
STAGES = ["sft", "cold_start", "off_policy", "on_policy", "reasoning_rl", "general_rl", "tool_cold_start", "tool_rl"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_loads_and_that_of_a_real_model_says_that_it_was_not_run(path):
    recipe = load_recipe(path).recipe
    assert recipe.output == Path("outputs") / path.stem
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Not run") == path.stem.startswith("qwen3_vl"), "nobody has run a real model yet"


@pytest.mark.parametrize(("name", "stages"), [("thinking", STAGES), ("instruct", [name for name in STAGES if name != "cold_start"])])
def test_the_chains_have_the_stages_of_the_report_in_order_each_from_the_one_before(name, stages):
    (path,) = (path for path in RECIPES if path.stem == f"qwen3_vl_chain_{name}")
    found = dict(load_recipe(path).stages)
    assert list(found) == stages
    assert [stage.model.stage for stage in found.values()] == [None, *stages[:-1]]
