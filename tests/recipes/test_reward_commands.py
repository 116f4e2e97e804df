"""`vlpost rewards list | try | lint | attack`, and the lint inside `vlpost check`."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from vlpost.model.records import DataError
from vlpost.recipes.reward_commands import read_responses
from vlpost.recipes.run import main
from vlpost.rewards import RewardManager, RewardResult, RewardsConfig, registry
from vlpost.rewards.built_in import BuiltInReward

DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "rewards.md"
RECIPE = """
method: evaluate
model: {{nano: {{size: s}}}}
sampler: {{max_response_tokens: 8, max_model_len: 64}}
rewards: {{components: {{answer: {{use: {use}}}}}}}
data: {{use: jsonl, path: {folder}/rows.jsonl}}
output: {folder}/out
"""


@pytest.fixture
def make_rows(tmp_path):
    def make(*rows):
        path = tmp_path / "responses.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return path

    return make


@pytest.fixture
def make_recipe(tmp_path):
    def make(use="count"):
        rows = [{"messages": [{"role": "user", "content": f"How many? {n}"}], "answer": str(n)} for n in range(3)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(use=use, folder=tmp_path), encoding="utf-8")
        return tmp_path / "recipe.yaml"

    return make


@pytest.fixture
def zero(monkeypatch):
    entry = BuiltInReward(summary="-", value_range=(0.0, 1.0), function=lambda example, rollout: RewardResult(value=0.0))
    monkeypatch.setattr(registry, "BUILT_IN_REWARDS", {**registry.BUILT_IN_REWARDS, "zero": entry})


def test_list_names_every_reward_with_range_and_options(capsys):
    assert main(["rewards", "list"]) == 0
    out = capsys.readouterr().out.splitlines()
    heads = [line for line in out if not line.startswith(" ")]
    assert [line.partition(":")[0] for line in heads] == sorted(registry.BUILT_IN_REWARDS)
    for name, built_in in registry.BUILT_IN_REWARDS.items():
        (head,) = [line for line in heads if line.startswith(f"{name}: ")]
        assert head == f"{name}: {built_in.summary}; {built_in.value_range[0]:g} to {built_in.value_range[1]:g}"
    assert len(out) > len(heads), "some reward has options"


def test_the_table_of_the_docs_is_what_list_prints(capsys):
    assert main(["rewards", "list", "--markdown"]) == 0
    table = capsys.readouterr().out
    assert table.count("\n") == 2 + len(registry.BUILT_IN_REWARDS)
    assert f"\n{table}\n## " in DOCS.read_text(encoding="utf-8"), "paste what `vlpost rewards list --markdown` prints into docs/rewards.md"


def test_what_the_docs_show_works(tmp_path):
    """The plug-in with its recipe's lines, judged; and the decorated function is one that the registry takes."""
    text = DOCS.read_text(encoding="utf-8")
    plug_in, decorated, _trl = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (settings,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(f"{plug_in}\n{decorated}", encoding="utf-8")
    rewards = RewardManager(RewardsConfig.model_validate(yaml.safe_load(settings)["rewards"]), recipe_folder=tmp_path, allow_code=False)
    assert [component.name for component in rewards.components] == ["answer", "brevity"]
    assert rewards.components[1].reward.options == {"most": 400}
    decorated_reward = registry.resolve("my_rewards.py:answer_in_table", {}, recipe_folder=tmp_path, allow_code=False)
    assert (decorated_reward.traits.cacheable, decorated_reward.traits.version) == (True, 2)


def test_try_shows_distribution_slowest_and_unavailable(make_rows, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "def half(example, rollout, *, factor: float = 0.5):\n    return factor * float(rollout.text)\n"
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    path = make_rows(
        {"prompt": "how many?", "answer": "4", "responses": ["4", "5", "many"], "id": "first"},
        {"messages": [{"role": "user", "content": "?"}], "response": "4"},
    )
    assert main(["rewards", "try", "mine.py:half", str(path), "factor=2.0"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("reward: 1 x mine.py:half (")
    assert out[1] == "2 rows, 4 responses: 3 judged, 1 unavailable"
    assert out[2] == "mean 8.667, smallest 8, largest 10"
    assert out[3].split() == ["8", "2", "#" * 40]
    assert out[4].split() == ["10", "1", "#" * 20]
    assert len([line for line in out if line.startswith("slowest: ")]) == 3
    assert any(line.startswith("unavailable: first response 3: Traceback") for line in out)
    assert out[-1] == "ValueError: could not convert string to float: 'many'"


def test_try_takes_settings_of_the_rewards_too(make_rows, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("import time\n\ndef slow(example, rollout):\n    time.sleep(60)\n", encoding="utf-8")
    path = make_rows({"prompt": "?", "response": "a"})
    assert main(["rewards", "try", "mine.py:slow", str(path), "rewards.timeout_s=0.2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("response 1: no verdict in 0.2 s")


def test_try_bins_many_values(make_rows, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def value(example, rollout):\n    return float(rollout.text)\n", encoding="utf-8")
    path = make_rows({"prompt": "?", "responses": [str(number / 10) for number in range(101)]})
    assert main(["rewards", "try", "mine.py:value", str(path)]) == 0
    bars = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("#")]
    assert len(bars) == 10
    assert sum(int(bar[3]) for bar in bars) == 101
    assert bars[0][:3] == ["0", "to", "1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["coumt"], "unknown reward 'coumt' (did you mean 'count'?)"),
        (["count", "strict=true"], "unknown option 'strict'; its options are: none"),
        (["count", "rewards.timeout_s=0"], "rewards.timeout_s = 0: Input should be greater than 0"),
        (["count", "rewards.timeout=1"], "rewards.timeout = 1: Extra inputs are not permitted"),
        (["count", "rewards.cache.x=1", "rewards.cache=1", "rewards.cache.x=1"], "cache is a value, nothing stands below it"),
        (["count", "=1"], "'=1' is no option of the reward: write key=value"),
        (["count", "a=[1"], "the value is no YAML"),
    ],
)
def test_try_refuses_what_it_cannot_use(words, message, make_rows, capsys):
    path = make_rows({"prompt": "?", "answer": "4", "response": "4"})
    assert main(["rewards", "try", words[0], str(path), *words[1:]]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "?"}, "one of the two is needed"),
        ({"prompt": "?", "responses": []}, "at least one text"),
        ({"prompt": "?", "responses": ["a", 1]}, "at least one text"),
        ({"response": "a"}, "either `messages` or `prompt`"),
        ({"prompt": "?", "messages": [], "response": "a"}, "either `messages` or `prompt`"),
        ({"prompt": "?", "response": "a", "finish_reason": "end"}, "finish_reason = 'end': must be stop or length"),
        ({"prompt": "?", "response": "a", "source": 1}, "source = 1: must be a text"),
        ({"prompt": "?", "response": "a", "gold": 1}, "unknown key 'gold'"),
        ({"prompt": ["?"], "response": "a"}, "a part is"),
        ([1], "a row is an object, this is list"),
    ],
)
def test_a_bad_row_is_named(row, words, make_rows):
    with pytest.raises(DataError, match=r"responses.jsonl, line 1: ") as caught:
        read_responses(make_rows(row))
    assert words in str(caught.value)


def test_rows_keep_what_they_say(make_rows):
    row = {
        "prompt": "?",
        "response": "a",
        "prompt_suffix": "<think>\n",
        "finish_reason": "length",
        "source": "s",
        "task": "t",
        "metadata": {"k": 1},
    }
    (group,) = read_responses(make_rows(row))
    (rollout,) = group.rollouts
    assert (rollout.text, rollout.prompt_suffix, rollout.finish_reason) == ("a", "<think>\n", "length")
    assert (group.example.source, group.example.task, group.example.metadata) == ("s", "t", {"k": 1})


def test_lint_prints_a_table_and_says_fine(make_recipe, capsys):
    path = make_recipe()
    assert main(["rewards", "lint", str(path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("evaluate: reward  gold  ")
    assert out[1].split()[:4] == ["evaluate:", "answer", "1", "1"]
    assert out[-1] == f"{path}: fine"


def test_lint_refuses_a_verifier_that_never_pays(make_recipe, zero, capsys):
    path = make_recipe("zero")
    assert main(["rewards", "lint", str(path)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert any("FAULT answer (zero): example " in line for line in out)
    assert out[-1] == f"{path}: 6 faults"


def test_check_lints_the_rewards(make_recipe, zero, capsys):
    assert main(["check", str(make_recipe())]) == 0
    assert main(["check", str(make_recipe("zero"))]) == 1
    error = capsys.readouterr().err
    assert "the rewards do not say what they must (6 faults):\n  answer (zero): example " in error


def test_lint_needs_a_reward(tmp_path, make_recipe, capsys):
    make_recipe()
    sft = tmp_path / "sft.yaml"
    text = RECIPE.replace("evaluate", "sft").format(use="count", folder=tmp_path)
    sft.write_text(f"{text}learner: {{learning_rate: 0.1}}\nsft: {{num_steps: 1, examples_per_step: 1}}\n", encoding="utf-8")
    assert main(["rewards", "lint", str(sft)]) == 1
    assert "there is no reward to lint" in capsys.readouterr().err


@pytest.mark.parametrize(("all_stopped", "status"), [(True, 0), (False, 1)])
def test_attack_ends_with_1_when_anything_gets_through(all_stopped, status, monkeypatch, capsys):
    asked = []

    def main_attack(*, backends, names=None):
        asked.append(tuple(backends))
        return "the table", all_stopped

    monkeypatch.setitem(sys.modules, "vlpost.rewards.attack", types.SimpleNamespace(main_attack=main_attack))
    assert main(["rewards", "attack"]) == status
    assert main(["rewards", "attack", "--backend", "landlock"]) == status
    assert asked == [("bubblewrap", "landlock"), ("landlock",)]
    assert capsys.readouterr().out == "the table\nthe table\n"


@pytest.mark.parametrize("words", [["list", "a=1"], ["attack", "a=1"]])
def test_words_that_cannot_take_effect_are_refused(words, capsys):
    assert main(["rewards", *words]) == 1
    assert "'a=1' cannot take effect, leave it out" in capsys.readouterr().err


def test_the_commands_import_no_torch(make_rows, make_recipe):
    path = make_rows({"prompt": "?", "answer": "4", "response": "4"})
    program = (
        "import json, sys\nfrom vlpost.recipes.run import main\n"
        "statuses = [main(words) for words in json.loads(sys.argv[1])]\n"
        "heavy = [name for name in ('torch', 'transformers', 'vllm', 'trl', 'datasets') if name in sys.modules]\n"
        "print(json.dumps([statuses, heavy]), file=sys.stderr)\n"
    )
    commands = [["rewards", "list"], ["rewards", "try", "count", str(path)], ["rewards", "lint", str(make_recipe())]]
    done = subprocess.run([sys.executable, "-c", program, json.dumps(commands)], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stderr) == [[0, 0, 0], []]
