"""What README.md shows works as it stands."""

import re
from pathlib import Path

import pytest
from vlpost.recipes.load import load_recipe
from vlpost.rewards import RewardManager

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_recipe_and_its_plug_in_pass_the_check(tmp_path):
    (recipe,), (plug_in,) = blocks("yaml"), blocks("python")
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (tmp_path / "my_rewards.py").write_text(plug_in, encoding="utf-8")
    loaded = load_recipe(tmp_path / "recipe.yaml")
    lines = RewardManager(loaded.recipe.rewards, recipe_folder=tmp_path, allow_code=False).describe()
    assert len(lines) == 2
    assert "my_rewards.py" in lines[1]


def test_a_plug_in_away_from_the_recipe_needs_the_command_line(tmp_path):
    (recipe,), (plug_in,) = blocks("yaml"), blocks("python")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "my_rewards.py").write_text(plug_in, encoding="utf-8")
    (tmp_path / "recipes" / "recipe.yaml").write_text(recipe.replace("my_rewards.py:", "../my_rewards.py:"), encoding="utf-8")
    loaded = load_recipe(tmp_path / "recipes" / "recipe.yaml")
    with pytest.raises(ValueError, match="--allow-code"):
        RewardManager(loaded.recipe.rewards, recipe_folder=tmp_path / "recipes", allow_code=False)


@pytest.mark.parametrize("name", re.findall(r"^\| .*`([a-z]+)/`", TEXT, flags=re.MULTILINE))
def test_every_folder_of_the_file_map_exists(name):
    assert (ROOT / name).is_dir()


def test_every_pin_of_the_version_table_is_the_constraint():
    header, _, row = re.search(r"(\| torch \|.*)\n(\|.*)\n(\|.*)\n", TEXT).groups()
    names, versions = ([cell.strip() for cell in line.strip("|").split("|")] for line in (header, row))
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and not line.startswith("#")
    )
    assert len(names) == 9
    assert {name: pins[name] for name in names} == dict(zip(names, versions, strict=True))
