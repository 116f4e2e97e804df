"""The wheel is whole, and its core works alone: an empty environment, no torch, nothing generic importable."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("model", "rewards", "sft", "rl", "distill", "recipes")
GENERIC = (*FOLDERS, "tests", "install", "benchmarks", "docs")
HEAVY = ("torch", "torchvision", "transformers", "vllm", "trl", "peft", "accelerate", "datasets")

HELP_PROGRAM = f"""
import json, sys
from vlpost.recipes.run import main
sys.argv = ["vlpost", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps([heavy for heavy in {HEAVY!r} if heavy in sys.modules]))
"""

SCORE_PROGRAM = f"""
import json, sys
from vlpost.model.records import Example, Group, Rollout
from vlpost.rewards import ComponentConfig, RewardManager, RewardsConfig

def rollout(text):
    return Rollout(
        token_ids=(1, 2), sampled=(False, True), sampler_logprobs=(0.0, -0.5), media=(), text=text, prompt_suffix="",
        finish_reason="stop", policy_version=0,
    )

if __name__ == "__main__":
    rewards = RewardsConfig(
        components={{"count": ComponentConfig(use="count"), "math": ComponentConfig(use="math_answer", weight=0.5)}}, timeout_s=60.0
    )
    row = Group(
        example=Example(id="row", messages=(), answer="12", task="count", source="test"),
        rollouts=(rollout(r"\\boxed{{12}}"), rollout(r"\\boxed{{13}}")),
    )
    with RewardManager(rewards, recipe_folder=None, allow_code=False) as manager:
        (scored,) = manager.score([row])
    assert scored.unjudged == (), scored.unjudged
    print(json.dumps([[judged.score.reward for judged in scored.judged], [heavy for heavy in {HEAVY!r} if heavy in sys.modules]]))
"""


def run(*command, cwd):
    """Returns what a command prints; a failure shows all that it said."""
    outcome = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, f"{command}\n{outcome.stdout}\n{outcome.stderr}"
    return outcome.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: setuptools would otherwise pack what an older build left in the checkout."""
    folder = tmp_path_factory.mktemp("build")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels", ".", cwd=folder)
    (built,) = (folder / "wheels").glob("vlpost-*.whl")
    return built


@pytest.fixture(scope="module")
def core_python(wheel, tmp_path_factory):
    """The interpreter of an empty environment that holds the wheel and its core dependencies, nothing else."""
    folder = tmp_path_factory.mktemp("core")
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel, cwd=folder)
    return python


def test_the_wheel_holds_every_module_and_recipe_and_nothing_else(wheel):
    expected = {f"vlpost/{folder}/{path.name}" for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
    expected |= {f"vlpost/{folder}/{path.name}" for folder in ("recipes", "rewards") for path in (ROOT / folder).glob("*.yaml")}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert len(expected) > len(FOLDERS)
    assert packed == expected


def test_nothing_generic_is_importable_beside_the_core(core_python, tmp_path):
    program = f"import importlib.util, json; print(json.dumps([n for n in {GENERIC!r} if importlib.util.find_spec(n)]))"
    assert json.loads(run(core_python, "-I", "-c", program, cwd=tmp_path)) == []


def test_the_command_line_helps_with_the_core_alone(core_python, tmp_path):
    printed = run(core_python.with_name("vlpost"), "--help", cwd=tmp_path)
    for command in ("run", "check", "show", "evaluate"):
        assert command in printed


def test_the_command_line_helps_without_a_heavy_import_where_all_is_installed(tmp_path):
    assert json.loads(run(sys.executable, "-I", "-c", HELP_PROGRAM, cwd=tmp_path).splitlines()[-1]) == []


@pytest.mark.parametrize("everything_installed", [False, True])
def test_a_row_is_scored_without_a_heavy_import(core_python, tmp_path, everything_installed):
    script = tmp_path / "score.py"
    script.write_text(SCORE_PROGRAM, encoding="utf-8")
    python = sys.executable if everything_installed else core_python
    assert json.loads(run(python, "-I", script, cwd=tmp_path).splitlines()[-1]) == [[1.5, 0.0], []]
