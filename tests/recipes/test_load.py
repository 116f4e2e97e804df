from pathlib import Path

import pytest
import vlpost.recipes
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vlpost.model.records import VlpostError
from vlpost.recipes.load import RecipeError, load_recipe
from vlpost.recipes.schema import ChainRecipe, RlRecipe

RECIPES = Path(vlpost.recipes.__file__).parent
QUICKSTART = RECIPES / "quickstart.yaml"

RL = """
method: rl
output: out
model: {nano: {size: s}}
sampler: {max_response_tokens: 8, max_model_len: 64}
rewards: {components: {answer: {use: count}}}
data: {use: handwriting, tasks: {add: 1.0}}
rl: {num_steps: 3, prompts_per_step: 4, group_size: 2, policy_loss: {name: grpo}}
learner: {learning_rate: 1.0e-3}
"""
CHAIN = """
method: chain
output: out
common:
  model: {nano: {size: s}}
  sampler: {max_response_tokens: 8, max_model_len: 64}
  rewards: {components: {answer: {use: count}}}
  data: {use: handwriting, split: train, tasks: {add: 1.0}}
  seed: 3
stages:
  sft:
    method: sft
    sft: {num_steps: 3, examples_per_step: 4}
    learner: {learning_rate: 1.0e-3}
    data: {split: test}
  exam:
    method: evaluate
    model: {stage: sft}
"""


@pytest.fixture
def write(tmp_path):
    def put(text):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return put


@pytest.fixture
def refusal(write):
    """Returns a function: the words with which a recipe is refused, without the path at the start of each line."""

    def refuse(text, *overrides):
        path = write(text)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, overrides)
        assert isinstance(caught.value, VlpostError)
        return str(caught.value).replace(f"{path}: ", "")

    return refuse


# ---------------------------------------------------------------- the bundled recipes


def test_every_bundled_recipe_loads():
    paths = sorted(RECIPES.glob("*.yaml"))
    assert len(paths) >= 1
    assert QUICKSTART in paths
    for path in paths:
        assert load_recipe(path).path == path


def test_the_quickstart_means_what_it_says():
    recipe = load_recipe(QUICKSTART).recipe
    assert isinstance(recipe, ChainRecipe)
    assert list(recipe.stages) == ["sft", "evaluate_sft", "sapo", "evaluate_sapo"]
    sapo = recipe.stages["sapo"]
    assert isinstance(sapo, RlRecipe)
    assert sapo.model.stage == "sft"
    assert sapo.model.nano is None
    assert sapo.name == "sapo"
    assert sapo.output == Path("outputs/quickstart/sapo")
    assert sapo.sampler.max_response_tokens == 16


# ---------------------------------------------------------------- unknown and missing keys


@pytest.mark.parametrize(
    ("text", "old", "new", "words"),
    [
        (RL, "learner:", "lerner:", "lerner: unknown key; did you mean 'learner'?"),
        (RL, "num_steps", "num_step", "rl.num_step: unknown key; did you mean 'num_steps'?"),
        (RL, "name: grpo", "name: grpo, clip_hihg: 0.3", "rl.policy_loss.clip_hihg: unknown key; did you mean 'clip_high'?"),
        (RL, "name: grpo", "name: grpo, tau_pos: 1.0", "rl.policy_loss.tau_pos: unknown key; allowed here: clip_high, clip_low, name"),
        (RL, "name: grpo", "name: grpo, grpo: 1.0", "rl.policy_loss.grpo: unknown key; allowed here: clip_high, clip_low, name"),
        (RL, "use: count", "use: count, weightt: 2.0", "rewards.components.answer.weightt: unknown key; did you mean 'weight'?"),
        (RL, "use: count", "use: option, option: 2.0", "rewards.components.answer.option: unknown key; did you mean 'options'?"),
        (RL, "components:", "component:", "rewards.component: unknown key; did you mean 'components'?"),
        (RL, "tasks:", "task:", "data.task: unknown key; did you mean 'tasks'?"),
        (RL, "tasks:", "path: x, tasks:", "data.path: unknown key; allowed here: languages, num_examples, page_pixels, seed, "),
        (RL, "size: s", "sizze: s", "model.nano.sizze: unknown key; did you mean 'size'?"),
        (CHAIN, "stages:", "stagess:", "stagess: unknown key; did you mean 'stages'?"),
        (CHAIN, "common:", "commonn:", "commonn: unknown key; did you mean 'common'?"),
        (CHAIN, "    learner:", "    lerner:", "stages.sft.lerner: unknown key; did you mean 'learner'?"),
        (CHAIN, "num_steps", "num_step", "stages.sft.sft.num_step: unknown key; did you mean 'num_steps'?"),
        (
            CHAIN,
            "    model: {stage",
            "    evaluatee: {}\n    model: {stage",
            "stages.exam.evaluatee: unknown key; did you mean 'evaluate'?",
        ),
        (CHAIN, "seed: 3", "sede: 3", "common.sede is read by no stage; remove it; did you mean 'seed'?"),
        (CHAIN, "seed: 3", "rl: {num_steps: 3}", "common.rl is read by no stage; remove it; allowed here: "),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(refusal, text, old, new, words):
    assert text.count(old) == 1
    assert words in refusal(text.replace(old, new))


def test_a_common_key_that_no_stage_of_these_methods_reads_is_not_its_own_nearest_name(refusal):
    assert "did you mean 'rl'" not in refusal(CHAIN.replace("seed: 3", "rl: {num_steps: 3}"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("output: out\n", "", "output: missing; add it"),
        ("num_steps: 3, ", "", "rl.num_steps: missing; add it"),
        ("use: count", "weight: 1.0", "rewards.components.answer.use: missing; add it"),
        ("method: rl\n", "", "method is missing; it says which keys there are"),
        ("method: rl", "mmethod: rl", "method is missing; it says which keys there are; unknown key mmethod; did you mean 'method'?"),
        (
            "use: handwriting",
            "uses: handwriting",
            "data: use is missing; it says which keys there are; unknown key uses; did you mean 'use'?",
        ),
        (
            "name: grpo",
            "namee: grpo",
            "rl.policy_loss: name is missing; it says which keys there are; unknown key namee; did you mean 'name'?",
        ),
    ],
)
def test_a_missing_key_is_named(refusal, old, new, words):
    assert RL.count(old) == 1
    assert words in refusal(RL.replace(old, new)).split("\n")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "method: rl",
            "method: rll",
            "method = 'rll': must be one of 'sft', 'rl', 'on_policy_distill', 'off_policy_distill', 'evaluate', 'chain', 'curate'",
        ),
        (
            "use: handwriting",
            "use: handwritten",
            "data: use = 'handwritten': must be one of 'handwriting', 'jsonl', 'parquet', 'hub', 'curated', 'mix'",
        ),
        ("name: grpo", "name: ppo", "rl.policy_loss: name = 'ppo': must be one of 'sapo', 'grpo', 'gspo', 'reinforce'"),
        ("group_size: 2", "group_size: 1", "rl.group_size = 1: Input should be greater than or equal to 2"),
        ("num_steps: 3", "num_steps: many", "rl.num_steps = 'many': Input should be a valid integer, unable to parse string as an integer"),
        ("size: s", "size: xl", "model.nano.size = 'xl': Input should be 's', 'm' or 'moe-s'"),
        ("1.0e-3", ".inf", "learner.learning_rate = inf: Input should be a finite number"),
        ("1.0e-3", ".nan", "learner.learning_rate = nan: Input should be a finite number"),
        ("learner: {learning_rate: 1.0e-3}", "learner: 3", "learner = 3: Input should be a valid dictionary or instance of LearnerConfig"),
        ("nano: {size: s}", "stage: sft", "model.stage = 'sft': only a stage of a chain has an earlier stage; give model.path"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(refusal, old, new, words):
    assert RL.count(old) == 1
    assert refusal(RL.replace(old, new)) == words


def test_all_faults_are_told_at_once_each_with_the_file(write):
    path = write(RL.replace("num_steps: 3", "num_steps: 0").replace("learner:", "lerner:"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    lines = str(caught.value).split("\n")
    assert len(lines) == 3
    assert all(line.startswith(f"{path}: ") for line in lines)


# ---------------------------------------------------------------- YAML that a recipe may not hold


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: rl\nmethod: sft\n", "line 2: key 'method' is given twice; remove one"),
        ("rl: {num_steps: 1, num_steps: 2}", "line 1: key 'num_steps' is given twice; remove one"),
        ("a: &a [1]\nb: *a\n", "line 2: a YAML alias (*name) is not allowed; write the value out"),
        ("- a\n- b\n", "a recipe is a mapping of keys, this is list"),
        ("", "a recipe is a mapping of keys, this is NoneType"),
        ("just words", "a recipe is a mapping of keys, this is str"),
    ],
)
def test_text_of_another_shape_is_refused(refusal, text, words):
    assert refusal(text) == words


@pytest.mark.parametrize(
    "text",
    [
        b"a: [1",
        b"a: 1\n---\nb: 2\n",
        b"\xff\xfe\x00",
        b"? [a]\n: b\n",
        b"seed: 2020-13-41",
        b"seed: !!bool maybe",
        b"seed: !!timestamp x",
        b"seed: !!int x",
        b"seed: " + b"9" * 5000,
        b"seed: " + b"[" * 20_000,
    ],
)
def test_what_yaml_cannot_read_is_refused_in_the_librarys_words(refusal, text):
    assert refusal(text).startswith("not YAML that a recipe may hold: ")


def test_aliases_do_not_blow_up(refusal):
    laughs = ["a0: &a0 [lol, lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    assert refusal("\n".join(laughs)) == "line 2: a YAML alias (*name) is not allowed; write the value out"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.system", "!!python/object:vlpost.Nothing", "!local"])
def test_tags_that_build_objects_are_refused_and_run_nothing(refusal, tmp_path, tag):
    victim = tmp_path / "made"
    words = refusal(f"method: {tag} ['{victim}']\n")
    assert "could not determine a constructor for the tag" in words
    assert not victim.exists()
    words = refusal(RL, f"seed={tag} ['{victim}']")
    assert "on the command line: not YAML that a recipe may hold: could not determine a constructor for the tag" in words
    assert not victim.exists()


def test_a_huge_file_is_refused_unread(refusal):
    assert refusal("# " + "x" * 256 * 1024) == "262146 bytes, a recipe has at most 262144"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.yaml: the recipe cannot be read \(No such file or directory\)"):
        load_recipe(tmp_path / "none.yaml")


# ---------------------------------------------------------------- overrides


def test_overrides_replace_add_and_reach_into_mappings(write):
    loaded = load_recipe(write(RL), ["rl.num_steps=7", "rl.policy_loss={name: sapo, tau_neg: 1.1}", "checkpoint.every=2", "seed=5"])
    assert isinstance(loaded.recipe, RlRecipe)
    assert loaded.recipe.rl.num_steps == 7
    assert loaded.recipe.rl.policy_loss.model_dump() == {"name": "sapo", "tau_pos": 1.0, "tau_neg": 1.1}
    assert loaded.recipe.checkpoint.every == 2
    assert loaded.recipe.seed == 5


def test_a_replaced_mapping_keeps_nothing_of_the_old_one(write):
    loaded = load_recipe(write(RL.replace("name: grpo", "name: grpo, clip_low: 0.1")), ["rl.policy_loss={name: grpo}"])
    assert isinstance(loaded.recipe, RlRecipe)
    assert loaded.recipe.rl.policy_loss.model_dump() == {"name": "grpo", "clip_low": 0.2, "clip_high": 0.2}
    assert "rl.policy_loss.clip_low" not in loaded.origins


def test_later_overrides_win(write):
    assert load_recipe(write(RL), ["rl.num_steps=7", "rl.num_steps=8"]).recipe.rl.num_steps == 8  # pyright: ignore


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "'seed' on the command line: write key=value, e.g. seed=1 or stages.sapo.rl.num_steps=20"),
        ("=3", "'=3' on the command line: write key=value, e.g. seed=1 or stages.sapo.rl.num_steps=20"),
        ("seed.x=3", None),
        ("output.x=3", "'output.x=3' on the command line: 'output' holds a value, not keys"),
        ("seed=[1", "'seed=[1' on the command line: not YAML that a recipe may hold: "),
        ("seed=*a", "'seed=*a' on the command line: line 1: a YAML alias (*name) is not allowed; write the value out"),
        ("rl={a: 1, a: 2}", "'rl={a: 1, a: 2}' on the command line: line 1: key 'a' is given twice; remove one"),
        ("rl.num_stepz=3", "rl.num_stepz: unknown key; did you mean 'num_steps'?"),
        ("seed=", "seed = None: Input should be a valid integer"),
    ],
)
def test_a_wrong_override_is_named(refusal, override, words):
    assert refusal(RL, override).startswith(words or "seed: Input should be a valid integer")


# ---------------------------------------------------------------- chains


def test_common_lies_under_every_stage_and_the_stage_wins(write):
    recipe = load_recipe(write(CHAIN)).recipe
    assert isinstance(recipe, ChainRecipe)
    sft, exam = recipe.stages["sft"], recipe.stages["exam"]
    assert (sft.data.split, sft.data.tasks, sft.seed) == ("test", {"add": 1.0}, 3)  # pyright: ignore
    assert (exam.data.split, exam.seed) == ("train", 3)  # pyright: ignore
    assert exam.model.model_dump() == {"path": None, "nano": None, "stage": "sft"}
    assert (sft.name, sft.output, exam.output) == ("sft", Path("out/sft"), Path("out/exam"))


def test_a_block_is_not_handed_to_a_method_that_has_none(write):
    recipe = load_recipe(write(CHAIN.replace("  seed: 3", "  checkpoint: {every: 9}"))).recipe
    assert isinstance(recipe, ChainRecipe)
    assert recipe.stages["sft"].checkpoint.every == 9  # pyright: ignore
    assert not hasattr(recipe.stages["exam"], "checkpoint")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("    data: {split: test}", "    name: x", "stages.sft.name is set by the chain; remove it"),
        ("    data: {split: test}", "    output: x", "stages.sft.output is set by the chain; remove it"),
        ("  seed: 3", "  output: x", "common.output: every stage has its own; remove it"),
        ("  seed: 3", "  name: x", "common.name: every stage has its own; remove it"),
        ("  seed: 3", "  method: sft", "common.method: every stage has its own; remove it"),
        ("  seed: 3", "  1: x", "common: 1 is no key; keys are words"),
        ("  exam:", "  1:", "stages: 1: a stage's name is its folder's too; use letters, digits, _ and -"),
        ("  exam:", "  ../exam:", "stages: '../exam': a stage's name is its folder's too; use letters, digits, _ and -"),
        ("  exam:", "  ex.am:", "stages: 'ex.am': a stage's name is its folder's too; use letters, digits, _ and -"),
        (
            "method: evaluate",
            "method: evaluatee",
            "stages.exam: method = 'evaluatee': must be one of 'sft', 'rl', 'on_policy_distill', 'off_policy_distill', 'evaluate'",
        ),
        ("stage: sft", "stage: sfx", "stages.exam.model.stage = 'sfx': must be an earlier training stage, one of ['sft']"),
        ("stage: sft", "stage: exam", "stages.exam.model.stage = 'exam': must be an earlier training stage, one of ['sft']"),
    ],
)
def test_a_wrong_chain_is_refused(refusal, old, new, words):
    assert CHAIN.count(old) == 1
    assert refusal(CHAIN.replace(old, new)) == words


@pytest.mark.parametrize(
    "text", ["method: chain\noutput: x\nstages: [a]", "method: chain\noutput: x\nstages: {a: b}", "method: chain\ncommon: 3"]
)
def test_a_chain_of_another_shape_is_refused(refusal, text):
    assert refusal(text) == "`common` is a mapping and `stages` maps names to stages"


def test_a_chain_without_stages_is_refused(refusal):
    words = "stages: Dictionary should have at least 1 item after validation, not 0"
    assert refusal("method: chain\noutput: x\nstages: {}") == refusal("method: chain\noutput: x") == words


def test_an_evaluation_is_no_start_for_another_stage(refusal):
    text = CHAIN + "  again:\n    method: evaluate\n    model: {stage: exam}\n"
    assert refusal(text) == "stages.again.model.stage = 'exam': must be an earlier training stage, one of ['sft']"


def measured_after_each(settings):
    """Returns the chain with two training stages, measured after each of them."""
    second = "  more: {method: sft, model: {stage: sft}, sft: {num_steps: 1, examples_per_step: 4}, learner: {learning_rate: 1.0e-3}}\n"
    return CHAIN.replace("stages:", f"evaluate_after_each: {settings}\nstages:") + second


def test_a_chain_is_measured_after_each_stage_that_trains(write):
    loaded = load_recipe(write(measured_after_each("{data: {split: test}, evaluate: {num_examples: 9}}")), ["evaluate_after_each.seed=5"])
    recipe = loaded.recipe
    assert isinstance(recipe, ChainRecipe)
    assert list(recipe.stages) == ["sft", "evaluate_sft", "exam", "more", "evaluate_more"]
    for name in ("sft", "more"):
        measured = recipe.stages[f"evaluate_{name}"]
        assert (measured.method, measured.model.stage, measured.output) == ("evaluate", name, Path(f"out/evaluate_{name}"))  # pyright: ignore
        assert (measured.data.split, measured.data.tasks, measured.evaluate.num_examples) == ("test", {"add": 1.0}, 9)  # pyright: ignore
        assert (measured.seed, recipe.stages["exam"].seed) == (5, 3)
        place = f"stages.evaluate_{name}"
        origins = [loaded.origins[f"{place}.{key}"] for key in ("data.split", "data.tasks.add", "model.stage", "seed")]
        assert origins == ["recipe", "common", "chain", "command line"]
    assert not [key for key in loaded.origins if key.startswith("evaluate_after_each")]


def test_a_stage_that_is_skipped_is_not_measured(write):
    recipe = load_recipe(write(measured_after_each("{skip: [sft]}"))).recipe
    assert isinstance(recipe, ChainRecipe)
    assert list(recipe.stages) == ["sft", "exam", "more", "evaluate_more"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("3", "`evaluate_after_each` is a mapping of what an evaluate stage has, and `stages` maps names to stages"),
        ("{skip: [exam]}", "evaluate_after_each.skip = ['exam']: must be a list of stages that train: sft, more"),
        ("{skip: sft}", "evaluate_after_each.skip = 'sft': must be a list of stages that train: sft, more"),
        ("{method: rl}", "evaluate_after_each.method is set by the chain; remove it"),
        ("{model: {stage: sft}}", "evaluate_after_each.model is set by the chain; remove it"),
    ],
)
def test_wrong_settings_of_the_measurements_are_refused(refusal, settings, words):
    assert refusal(measured_after_each(settings)) == words


def test_a_measurement_does_not_replace_a_stage_of_its_name(refusal):
    text = measured_after_each("{seed: 1}").replace("  exam:", "  evaluate_sft:")
    assert refusal(text) == "stages.evaluate_sft is what evaluate_after_each would add; remove it, or add 'sft' to evaluate_after_each.skip"


def test_an_unknown_key_of_the_measurements_is_named(refusal):
    assert "evaluate.num_exampels: unknown key; did you mean 'num_examples'?" in refusal(
        measured_after_each("{evaluate: {num_exampels: 3}}")
    )


# ---------------------------------------------------------------- any typo in any key


def key_paths(values, prefix=()):
    for key, value in values.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from key_paths(value, (*prefix, key))


FREE_NAMES = {("stages", None), ("common", "rewards", "components", None), ("common", "data", "tasks", None)}
QUICKSTART_VALUES = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
KEYS = [
    path
    for path in key_paths(QUICKSTART_VALUES)
    if (*path[:-1], None) not in FREE_NAMES and path[-2:-1] != ("tasks",)  # these name a stage, a component, a kind of question
]


@st.composite
def typos(draw):
    path = draw(st.sampled_from(KEYS))
    key, place = path[-1], draw(st.integers(0, len(path[-1]) - 1))
    letter = draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_0"))
    changed = draw(
        st.sampled_from([key[:place] + key[place + 1 :], key[:place] + letter + key[place:], key[:place] + letter + key[place + 1 :]])
    )
    siblings = QUICKSTART_VALUES
    for part in path[:-1]:
        siblings = siblings[part]
    assume(changed and changed not in siblings and isinstance(yaml.safe_load(changed), str))
    return path, changed


def renamed(values, path, changed):
    return {
        (changed if len(path) == 1 and key == path[0] else key): renamed(value, path[1:], changed)
        if len(path) > 1 and key == path[0]
        else value
        for key, value in values.items()
    }


def test_the_typos_reach_every_key_of_the_quickstart():
    assert len(KEYS) >= 60
    assert ("method",) in KEYS
    assert ("stages", "sapo", "rl", "policy_loss", "name") in KEYS


@settings(max_examples=150)
@given(typo=typos())
def test_a_typo_in_any_key_is_refused_with_file_and_key(typo, tmp_path_factory):
    path, changed = typo
    recipe = tmp_path_factory.getbasetemp() / "typo.yaml"
    recipe.write_text(yaml.safe_dump(renamed(QUICKSTART_VALUES, path, changed), sort_keys=False), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert "typo.yaml" in str(caught.value)
    assert changed in str(caught.value)


def test_settings_of_another_kind_replace_the_common_ones(tmp_path):
    text = QUICKSTART.read_text(encoding="utf-8").replace("data: {split: test}", "data: {use: jsonl, path: rows.jsonl}", 1)
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    stages = load_recipe(path).recipe.stages
    assert stages["evaluate_sft"].data.use == "jsonl"
    assert stages["evaluate_sapo"].data.tasks == {"add": 1.0}
