"""The layout holds: who imports whom, what stays light, which names and calls have no place, and nothing is left out of git."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("model", "rewards", "sft", "rl", "distill", "recipes")
MAY_IMPORT = {
    "model": set(),
    "rewards": {"model"},
    "sft": {"model"},
    "rl": {"model", "rewards"},
    "distill": {"model", "rewards", "rl"},  # the log-ratio to a teacher is an advantage in the policy losses of rl
    "recipes": {"model", "rewards", "sft", "rl", "distill"},
}
OURS = {*FOLDERS, "vlpost", "tests"}
HEAVY = ("torch", "torchvision", "transformers", "vllm", "trl", "peft", "accelerate", "datasets")
# With rewards and every config.
LIGHT = {
    "model.records",
    "model.memory",
    "rl.tools_config",
    "recipes.schema",
    "recipes.data_config",
    "recipes.load",
    "recipes.check_memory",
}
VAGUE_NAMES = {"utils", "common", "helpers", "misc", "base", "core", "types"}
UNSAFE_NAMES = {"eval", "exec", "sympify", "parse_expr"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
UNSAFE_YAML = {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}
UNSAFE_OPTIONS = {"trust_remote_code": True, "weights_only": False}

SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_folders(node):
    """Yields (folder, rest of the dotted path, names) for each import of another folder by a relative import."""
    if node.level == 2:
        dotted = (node.module or "").split(".")
        if dotted != [""]:
            yield dotted[0], dotted[1:], [alias.name for alias in node.names]
        else:
            for alias in node.names:
                yield alias.name, [], []


def rewards_may_take(dotted, names):
    """Rewards see the records, the base class of settings and a type of share, nothing else of model."""
    if dotted == ["records"] or (dotted == [] and names == ["records"]):
        return True
    return dotted == ["config"] and set(names) <= {"Settings", "Share"}


def import_faults(folder, tree):
    """Returns a sentence for each import in a module of `folder` that the layout forbids."""
    faults = []
    for node in ast.walk(tree):
        absolute = [f"absolute import of {root}" for root in absolute_roots(node) if root in OURS]
        faults += [f"line {node.lineno}: {fault}" for fault in absolute + relative_faults(folder, node)]
    return faults


def absolute_roots(node):
    """Returns the first names of what a node imports absolutely, by statement or by a literal name."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [(node.module or "").split(".")[0]]
    if isinstance(node, ast.Call) and called_name(node) in {"import_module", "__import__"} and node.args:
        target = node.args[0]
        return [str(target.value).split(".")[0]] if isinstance(target, ast.Constant) else []
    return []


def relative_faults(folder, node):
    if not isinstance(node, ast.ImportFrom) or node.level < 2:
        return []
    if node.level > 2:
        return ["relative import above the package"]
    faults = []
    for other, dotted, names in imported_folders(node):
        if other != folder and other not in MAY_IMPORT[folder]:
            faults.append(f"{folder} may not import {other}")
        elif folder == "rewards" and other == "model" and not rewards_may_take(dotted, names):
            faults.append("rewards may import only model.records and Settings of model.config")
    return faults


def called_name(call):
    function = call.func
    if isinstance(function, ast.Name):
        return function.id
    return function.attr if isinstance(function, ast.Attribute) else ""


def unsafe_faults(tree):
    """Returns a sentence for each place where text or a file could run as code."""
    checks = (unsafe_import, unsafe_name, unsafe_option)
    return [f"line {node.lineno}: {fault}" for node in ast.walk(tree) for check in checks for fault in check(node)]


def unsafe_import(node):
    if isinstance(node, ast.Import):
        return [f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES]
    if not isinstance(node, ast.ImportFrom) or node.level:
        return []
    module = node.module or ""
    if module.split(".")[0] in UNSAFE_MODULES:
        return [f"import from {module}"]
    unsafe = UNSAFE_NAMES | UNSAFE_YAML if module == "yaml" else UNSAFE_NAMES
    return [f"import of {alias.name} from {module}" for alias in node.names if alias.name in unsafe]


def unsafe_name(node):
    if isinstance(node, ast.Name) and node.id in UNSAFE_NAMES:
        return [node.id]
    if not isinstance(node, ast.Attribute):
        return []
    owner = node.value.id if isinstance(node.value, ast.Name) else ""
    # `model.eval()` is another function of the same name.
    unsafe = {"builtins": UNSAFE_NAMES, "yaml": UNSAFE_YAML}.get(owner, UNSAFE_NAMES - {"eval", "exec"})
    return [f"{owner}.{node.attr}"] if node.attr in unsafe else []


def unsafe_option(node):
    """Yields options of a call or a dictionary display that let a file bring code."""
    pairs = []
    if isinstance(node, ast.Call):
        pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
    elif isinstance(node, ast.Dict):
        pairs = [(key.value, value) for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant)]
    for name, value in pairs:
        if name in UNSAFE_OPTIONS and isinstance(value, ast.Constant) and value.value is UNSAFE_OPTIONS[name]:
            yield f"{name}={value.value}"


def is_light(path):
    folder, name = path.parent.name, path.stem
    return folder == "rewards" or name == "config" or f"{folder}.{name}" in LIGHT


def test_no_module_imports_what_its_folder_may_not():
    faults = {str(path.relative_to(ROOT)): import_faults(path.parent.name, parse(path)) for path in SOURCES}
    assert len(faults) > len(FOLDERS), "fewer modules than folders: the listing looked in the wrong place"
    assert {path: found for path, found in faults.items() if found} == {}


@pytest.mark.parametrize(
    ("folder", "line", "words"),
    [
        ("rl", "import model", "absolute import of model"),
        ("rl", "from rl.sapo import loss", "absolute import of rl"),
        ("rl", "from vlpost.model.records import Rollout", "absolute import of vlpost"),
        ("recipes", "import vlpost.rl.train", "absolute import of vlpost"),
        ("recipes", "importlib.import_module('vlpost.rl.train')", "absolute import of vlpost"),
        ("model", "from ..rewards.result import RewardResult", "model may not import rewards"),
        ("sft", "from .. import rewards", "sft may not import rewards"),
        ("sft", "def f():\n    from ..rl.advantages import group_advantages", "sft may not import rl"),
        ("distill", "from ..sft.train import SftStage", "distill may not import sft"),
        ("rl", "from ..recipes.schema import Recipe", "rl may not import recipes"),
        ("rewards", "from ..model.chat import encode", "only model.records"),
        ("rewards", "from ..model.config import SamplerSettings", "only model.records"),
        ("rewards", "from .. import model", "only model.records"),
        ("rewards", "from ...vlpost import model", "above the package"),
    ],
)
def test_a_forbidden_import_is_named(folder, line, words):
    (fault,) = import_faults(folder, ast.parse(line))
    assert words in fault


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("rewards", "from ..model.records import Example"),
        ("rewards", "from ..model import records"),
        ("rewards", "from ..model.config import Settings"),
        ("rewards", "from .result import RewardResult"),
        ("rl", "from ..rewards.result import ScoredGroup"),
        ("recipes", "from ..distill.train import run"),
        ("recipes", "import importlib; importlib.import_module(name)"),
    ],
)
def test_an_allowed_import_is_not(folder, line):
    assert import_faults(folder, ast.parse(line)) == []


def test_light_modules_import_nothing_heavy():
    light = [f"vlpost.{path.parent.name}.{path.stem}".removesuffix(".__init__") for path in SOURCES if is_light(path)]
    program = f"""
import importlib, json, sys
heavy_after = {{}}
for name in {light!r}:
    importlib.import_module(name)
    heavy_after[name] = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]
print(json.dumps(heavy_after))
"""
    outcome = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    heavy_after = json.loads(outcome.stdout.splitlines()[-1])
    assert len(heavy_after) == len(light)
    assert {"vlpost.rewards", *(f"vlpost.{name}" for name in LIGHT)} <= heavy_after.keys()
    # What one module imported is still there after the next: the first name in this dictionary is the culprit.
    assert {name: heavy for name, heavy in heavy_after.items() if heavy} == {}


def test_module_names_say_what_they_hold_and_shadow_nothing():
    names = [path.stem for path in SOURCES if path.stem != "__init__"]
    assert len(names) >= len(FOLDERS)
    assert [name for name in names if name in VAGUE_NAMES] == []
    assert [name for name in names if name in sys.stdlib_module_names] == []


def test_folders_are_flat_packages_that_the_wheel_lists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["packages"] == [f"vlpost.{folder}" for folder in FOLDERS]
    assert project["tool"]["setuptools"]["package-dir"] == {f"vlpost.{folder}": folder for folder in FOLDERS}
    for folder in FOLDERS:
        assert (ROOT / folder / "__init__.py").is_file(), f"{folder} has no __init__.py"
        nested = [path for suffix in ("py", "yaml") for path in (ROOT / folder).glob(f"*/**/*.{suffix}")]
        assert nested == [], "nested files are in an editable install and missing in the wheel"
    assert sorted((ROOT / "tests").rglob("__init__.py")) == [], "tests are not a package"


def test_git_ignores_no_source_file():
    tracked = [*SOURCES, *RECIPES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "install").iterdir())]
    files = [path.relative_to(ROOT).as_posix() for path in tracked if "__pycache__" not in path.parts]
    assert len(files) > len(SOURCES)
    # Without --no-index a file that is already tracked would never count as ignored.
    outcome = subprocess.run(
        ["git", "check-ignore", "--no-index", "--verbose", "--stdin"],
        cwd=ROOT,
        input="\n".join(files),
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode in (0, 1), f"git cannot judge this checkout: {outcome.stderr}"
    assert outcome.stdout == ""


def test_no_source_can_run_text_as_code():
    faults = {str(path.relative_to(ROOT)): unsafe_faults(parse(path)) for path in SOURCES}
    assert len(faults) > len(FOLDERS)
    # What runs inside a jail is there to run a program; nothing imports it.
    (inside,) = faults.pop("rewards/jail_main.py")
    assert inside.endswith(": exec")
    assert {path: found for path, found in faults.items() if found} == {}


def test_nothing_imports_the_program_of_a_jail():
    importers = [
        path.name
        for path in SOURCES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        if "jail_main" in [getattr(node, "module", None), *(alias.name for alias in node.names)]
    ]
    assert importers == []


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "run = exec",
        "builtins.eval(text)",
        "import pickle",
        "from dill import loads",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load",
        "sympy.sympify(text)",
        "from sympy.parsing.sympy_parser import parse_expr",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "torch.load(path, weights_only=False)",
    ],
)
def test_an_unsafe_line_is_named(line):
    assert len(unsafe_faults(ast.parse(line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "model.eval()",
        "yaml.safe_load(text)",
        "torch.load(path, weights_only=True)",
        "options = {'trust_remote_code': False, 'weights_only': True}",
        "asyncio.create_subprocess_exec('ls')",
    ],
)
def test_a_safe_line_is_not(line):
    assert unsafe_faults(ast.parse(line)) == []


def test_every_shipped_recipe_parses():
    from vlpost.recipes.load import load_recipe

    assert "quickstart.yaml" in [path.name for path in RECIPES]
    for path in RECIPES:
        load_recipe(path)
