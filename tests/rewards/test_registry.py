"""Looking up reward functions: names, options, and whose code a recipe may bring along."""

import hashlib
import inspect
import sys
from pathlib import Path

import pytest
from vlpost.rewards import RewardConfigError
from vlpost.rewards.registry import BUILT_IN_REWARDS, resolve

PLUG_IN = """
from dataclasses import dataclass
from vlpost.rewards import RewardResult

@dataclass(frozen=True)
class Marks:
    full: float = 1.0

def letters(example, rollout, *, per_letter: float, most: int = 3, kinds: tuple[str, ...] = ("a",), note: str | None = None):
    return RewardResult(value=min(most, sum(map(rollout.text.count, kinds))) * per_letter)

async def later(example, rollout):
    return Marks().full

def loose(example, rollout, option=3):
    return 0.0

def bag(example, rollout, **options):
    return 0.0

def bare(example, rollout, *, option=3):
    return 0.0

def unknown_type(example, rollout, *, option: "Missing" = 3):
    return 0.0
"""


@pytest.fixture
def recipe_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "mine.py").write_text(PLUG_IN)
    return folder


def _resolve(use, options=(), *, folder=None, allow_code=False):
    return resolve(use, dict(options), recipe_folder=folder, allow_code=allow_code)


@pytest.mark.parametrize("use", ["math_answer", "count", "choice", "exact"])
def test_built_in_names(use):
    reward = _resolve(use)
    assert (reward.use, reward.path, reward.sha256, reward.options) == (use, None, None, {})
    assert reward.built_in is not None
    assert (reward.built_in.self_check is not None) == (use == "math_answer")


def test_unknown_name_says_what_is_near_and_how_to_name_ones_own():
    with pytest.raises(RewardConfigError) as caught:
        _resolve("math_anwser")
    assert str(caught.value) == (
        "unknown reward 'math_anwser' (did you mean 'math_answer'?); "
        f"built-in rewards are {', '.join(BUILT_IN_REWARDS)}; "
        "name your own as package.module:function or file.py:function"
    )


def test_file_beside_the_recipe_is_loaded_with_its_hash(recipe_folder, make_example, make_rollout):
    reward = _resolve("mine.py:letters", {"per_letter": 0.5, "kinds": ["a", "b"]}, folder=recipe_folder)
    assert reward.options == {"per_letter": 0.5, "kinds": ("a", "b")}
    assert reward.path == (recipe_folder / "mine.py").resolve()
    assert reward.sha256 == hashlib.sha256(PLUG_IN.encode()).hexdigest()
    assert str(reward) == f"mine.py:letters ({reward.path}, sha256 {reward.sha256})"
    assert reward.function(make_example(), make_rollout("abba"), **reward.options).value == 1.5
    assert not reward.is_async
    assert _resolve("mine.py:later", folder=recipe_folder).is_async
    # Neither byte code beside the recipe nor the file under its own name.
    assert [path.name for path in recipe_folder.iterdir()] == ["mine.py"]
    assert "mine" not in sys.modules


def test_a_changed_file_is_loaded_anew(recipe_folder):
    before = _resolve("mine.py:later", folder=recipe_folder)
    (recipe_folder / "mine.py").write_text("async def later(example, rollout):\n    return 2.0\n")
    after = _resolve("mine.py:later", folder=recipe_folder)
    assert before.sha256 != after.sha256
    assert before.function is not after.function


@pytest.mark.parametrize("how", ["absolute", "dots", "link", "linked folder", "no recipe"])
def test_a_file_elsewhere_needs_the_users_word(how, recipe_folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    trace = elsewhere / "trace"
    foreign = elsewhere / "foreign.py"
    foreign.write_text(f"open({str(trace)!r}, 'w').close()\n\ndef judge(example, rollout):\n    return 1.0\n")
    (recipe_folder / "link.py").symlink_to(foreign)
    (recipe_folder / "sub").symlink_to(elsewhere, target_is_directory=True)
    use = {
        "absolute": f"{foreign}:judge",
        "dots": "../elsewhere/foreign.py:judge",
        "link": "link.py:judge",
        "linked folder": "sub/foreign.py:judge",
        "no recipe": f"{foreign}:judge",
    }[how]
    folder = None if how == "no recipe" else recipe_folder
    with pytest.raises(RewardConfigError, match=r"is code outside the recipe's folder .*allow code on the command line"):
        _resolve(use, folder=folder)
    assert not trace.exists()
    assert _resolve(use, folder=folder, allow_code=True).path == foreign.resolve()
    assert trace.exists()


def test_a_recipe_reached_through_a_link_may_use_the_files_beside_it(recipe_folder, tmp_path):
    (tmp_path / "linked").symlink_to(recipe_folder, target_is_directory=True)
    assert _resolve("mine.py:later", folder=tmp_path / "linked").path == (recipe_folder / "mine.py").resolve()


def test_installed_module_is_loaded_with_its_hash(recipe_folder, monkeypatch):
    monkeypatch.syspath_prepend(str(recipe_folder))
    reward = _resolve("mine:letters", {"per_letter": 1})
    assert reward.path == (recipe_folder / "mine.py").resolve()
    assert reward.sha256 == hashlib.sha256(PLUG_IN.encode()).hexdigest()
    assert reward.options == {"per_letter": 1.0}
    del sys.modules["mine"]


def test_a_module_in_the_working_directory_is_a_file_that_came_along(recipe_folder, monkeypatch):
    monkeypatch.chdir(recipe_folder)
    monkeypatch.syspath_prepend("")
    with pytest.raises(RewardConfigError, match="is code outside the recipe's folder"):
        _resolve("mine:later")
    assert "mine" not in sys.modules
    assert _resolve("mine:later", allow_code=True).is_async
    assert _resolve("mine:later", folder=recipe_folder).is_async
    del sys.modules["mine"]


@pytest.mark.parametrize(
    ("use", "options", "words"),
    [
        ("mine.py:leters", {}, r"has no function 'leters' \(did you mean 'letters'\?\); it has bag, bare, dataclass, later, letters"),
        ("missing.py:f", {}, r"missing.py cannot be read \(No such file or directory\); a relative path starts at the recipe's folder"),
        ("no_such_package.part:f", {}, r"module 'no_such_package.part' cannot be imported .*; install it, or write file.py:function"),
        ("os:system", {}, r"os has no function 'system'"),
        ("sys:exit", {}, r"sys has no function 'exit'"),
        ("subprocess:run", {}, r"its signature is \(\*popenargs.*options stand after the star"),
        (":f", {}, r"module '' cannot be imported"),
        ("mine.py:letters", {}, r"option 'per_letter' is required; its options are: per_letter, most, kinds, note"),
        (
            "mine.py:letters",
            {"per_leter": 1.0},
            r"unknown option 'per_leter' \(did you mean 'per_letter'\?\); its options are: per_letter, most, kinds, note",
        ),
        ("mine.py:letters", {"per_letter": "1.0"}, r"option per_letter = '1.0': Input should be a valid number; it is annotated as float"),
        ("mine.py:letters", {"per_letter": 1.0, "most": 2.5}, r"option most = 2.5: .*annotated as int"),
        ("mine.py:letters", {"per_letter": 1.0, "most": True}, r"option most = True: .*annotated as int"),
        ("mine.py:letters", {"per_letter": 1.0, "kinds": [1]}, r"option kinds = \[1\]: Input should be a valid string"),
        ("mine.py:letters", {"per_letter": float("nan")}, r"option per_letter = nan cannot be checked .*plain JSON values"),
        ("mine.py:letters", {"per_letter": 1.0, "note": object()}, r"plain JSON values"),
        ("mine.py:later", {"most": 1}, r"unknown option 'most'; its options are: none"),
        ("mine.py:loose", {}, r"options stand after the star"),
        ("mine.py:bag", {}, r"options stand after the star"),
        ("mine.py:bare", {"option": 1}, r"option 'option' has no annotation to check 1 against; give it a type"),
        ("mine.py:unknown_type", {}, r"an annotation cannot be resolved .*'Missing'"),
        ("count", {"strict": True}, r"unknown option 'strict'; its options are: none"),
    ],
)
def test_what_is_wrong_is_said(use, options, words, recipe_folder):
    with pytest.raises(RewardConfigError, match=words):
        _resolve(use, options, folder=recipe_folder)


def test_a_file_that_does_not_load_is_named_and_leaves_nothing(recipe_folder):
    known = set(sys.modules)
    (recipe_folder / "broken.py").write_text("def f(:\n")
    with pytest.raises(RewardConfigError, match=r"broken.py cannot be loaded \(invalid syntax"):
        _resolve("broken.py:f", folder=recipe_folder)
    (recipe_folder / "broken.py").write_text("import no_such_package\n")
    with pytest.raises(RewardConfigError, match="its imports must be installed packages"):
        _resolve("broken.py:f", folder=recipe_folder)
    assert set(sys.modules) == known


# ---------------------------------------------------------------- kinds

KINDS = """
from vlpost.rewards import reward

def row(example, rollout, *, a: int = 1): return 0.0
def group(example, rollouts): return []
def batch(groups, *, a: int = 1): return []
def trl_short(completions, **columns): return []
def trl_long(prompts, completions, answer, factor: float = 1.0, **columns): return []
def other_names(case, response): return 0.0
def one_other(things): return []
def by_place(completions, /): return []
def three(example, rollout, extra): return 0.0

@reward(kind="row", name="mine", value_range=(0, 1), cacheable=True, version=3)
def declared(case, response): return 0.0

@reward(kind="batch")
def declared_batch(things): return []

@reward(kind="trl")
def declared_trl(prompts=None, **columns): return []

@reward(kind="group")
def wrong_kind(groups): return []

class Callable:
    def __call__(self, example, rollout): return 0.0

instance = Callable()
"""


@pytest.fixture
def kinds_folder(tmp_path: Path) -> Path:
    (tmp_path / "kinds.py").write_text(KINDS)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("row", "row"),
        ("group", "group"),
        ("batch", "batch"),
        ("trl_short", "trl"),
        ("trl_long", "trl"),
        ("declared", "row"),
        ("declared_batch", "batch"),
        ("declared_trl", "trl"),
    ],
)
def test_the_kind_follows_from_the_arguments_or_the_decorator(name, kind, kinds_folder):
    assert _resolve(f"kinds.py:{name}", folder=kinds_folder).kind == kind


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other_names", r"its signature is \(case, response\); it must be one of \(example, rollout, \*, option: type = default\)"),
        ("one_other", r"its signature is \(things\); it must be one of"),
        ("three", r"its signature is \(example, rollout, extra\)"),
        ("by_place", r"argument 'completions' cannot be given by name, as trl gives all arguments"),
        ("wrong_kind", r"its signature is \(groups\); as @reward\(kind='group'\) says, it must be one of"),
        ("instance", r"has no function 'instance'"),
    ],
)
def test_a_signature_that_is_none_is_refused(name, words, kinds_folder):
    with pytest.raises(RewardConfigError, match=words):
        _resolve(f"kinds.py:{name}", folder=kinds_folder)


def test_what_the_decorator_says_is_kept(kinds_folder):
    traits = _resolve("kinds.py:declared", folder=kinds_folder).traits
    assert (traits.name, traits.value_range, traits.cacheable, traits.version) == ("mine", (0, 1), True, 3)


def test_options_of_a_trl_function_are_its_arguments_with_defaults(kinds_folder):
    assert _resolve("kinds.py:trl_long", {"factor": 2}, folder=kinds_folder).options == {"factor": 2.0}
    with pytest.raises(RewardConfigError, match="unknown option 'answer'; its options are: factor"):
        _resolve("kinds.py:trl_long", {"answer": 2}, folder=kinds_folder)


# ---------------------------------------------------------------- entry points


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package with entry points of ours, as `pip` would lay it down."""

    def make(entries: str, package: str = "brand_new_rewards") -> None:
        (tmp_path / f"{package}.py").write_text("def brevity(example, rollout, *, most: int = 3):\n    return 1.0\n")
        metadata = tmp_path / f"{package}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[vlpost.rewards]\n{entries}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    yield make
    sys.modules.pop("brand_new_rewards", None)


def test_an_entry_point_names_a_reward(install, tmp_path):
    install("brevity = brand_new_rewards:brevity")
    resolved = _resolve("brevity", {"most": 4})
    assert (resolved.use, resolved.kind, resolved.options) == ("brevity", "row", {"most": 4})
    assert resolved.path == (tmp_path / "brand_new_rewards.py").resolve()
    with pytest.raises(RewardConfigError, match=r"unknown reward 'brevty' \(did you mean 'brevity'\?\).*installed are brevity"):
        _resolve("brevty")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ("brevity = brand_new_rewards", "its entry point is 'brand_new_rewards'; it must be package.module:function"),
        ("brevity = no_such_package_at_all:f", "module 'no_such_package_at_all' cannot be imported"),
    ],
)
def test_a_broken_entry_point_is_said(entries, words, install):
    install(entries)
    with pytest.raises(RewardConfigError, match=words):
        _resolve("brevity")


def test_one_name_of_two_packages_is_refused(install):
    install("brevity = brand_new_rewards:brevity")
    install("brevity = other_rewards:brevity", package="other_rewards")
    with pytest.raises(
        RewardConfigError, match="installed packages give the name to brand_new_rewards:brevity and to other_rewards:brevity"
    ):
        _resolve("brevity")


@pytest.mark.parametrize("name", BUILT_IN_REWARDS)
def test_every_built_in_is_whole(name):
    """Options have types and defaults that fit them, so that an empty `options` and one that spells out the defaults are the same."""
    built_in = BUILT_IN_REWARDS[name]
    low, high = built_in.value_range
    assert low < high
    assert low <= built_in.gold_value <= high
    assert built_in.summary
    assert built_in.summary[-1] != "."
    if built_in.options is not None:
        assert not any(field.is_required() for field in built_in.options.model_fields.values())
        return
    assert built_in.function is not None
    parameters = inspect.signature(built_in.function).parameters.values()
    options = {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert _resolve(name, options).options == options
