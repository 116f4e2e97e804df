import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import vlpost.recipes
from vlpost.recipes.load import load_recipe
from vlpost.recipes.run import main, set_environment

QUICKSTART = Path(vlpost.recipes.__file__).parent / "quickstart.yaml"
EVALUATE = """
method: evaluate
model: {nano: {size: s}}
sampler: {max_response_tokens: 8, max_model_len: 64}
rewards: {components: {answer: {use: count}}}
data: {use: handwriting, tasks: {add: 1.0}}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "exam.yaml"
    path.write_text(f"{EVALUATE}output: {tmp_path / 'out'}\n", encoding="utf-8")
    return path


def test_check_says_what_it_found(capsys):
    assert main(["check", str(QUICKSTART)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "sft: reward answer: 1 x count, all tasks, options default"
    rewards = [line for line in out if ": reward " in line]
    assert [line.partition(":")[0] for line in rewards] == ["sft", "evaluate_sft", "sapo", "evaluate_sapo"]
    assert [line.partition(":")[0] for line in out if ": memory per device " in line] == ["sft", "sapo"]
    assert out[-1] == f"{QUICKSTART}: fine"


def test_show_prints_every_value(capsys):
    assert main(["show", str(QUICKSTART), "stages.sapo.rl.num_steps=7"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "method = 'chain'  # recipe"
    assert "stages.sapo.rl.num_steps = 7  # command line" in out
    assert len(out) > 100


@pytest.mark.parametrize("command", ["check", "show", "run", "evaluate"])
def test_a_wrong_key_is_refused_on_stderr(command, capsys):
    assert main([command, str(QUICKSTART), "stages.sapo.rl.num_stepz=7"]) == 1
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err == f"vlpost: {QUICKSTART}: stages.sapo.rl.num_stepz: unknown key; did you mean 'num_steps'?\n"


def test_an_unknown_reward_is_refused_by_check(recipe, capsys):
    assert main(["check", str(recipe), "rewards.components.answer.use=coumt"]) == 1
    assert "rewards.components.answer: unknown reward 'coumt'" in capsys.readouterr().err


def test_a_plug_in_from_elsewhere_needs_leave(recipe, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.py").write_text("def mine(example, rollout):\n    return 1.0\n", encoding="utf-8")
    inner = tmp_path / "inner"
    inner.mkdir()
    recipe = recipe.rename(inner / "exam.yaml")
    override = f"rewards.components.answer.use={elsewhere / 'mine.py'}:mine"
    assert main(["check", str(recipe), override]) == 1
    assert "mine.py" in capsys.readouterr().err
    assert main(["check", str(recipe), override, "--allow-code"]) == 0
    assert "sha256" in capsys.readouterr().out


def test_evaluate_takes_recipes_of_method_evaluate_only(capsys):
    assert main(["evaluate", str(QUICKSTART)]) == 1
    assert capsys.readouterr().err == (
        f"vlpost: {QUICKSTART}: method is 'chain'; `vlpost evaluate` takes a recipe of method evaluate, use `vlpost run`\n"
    )


@pytest.mark.parametrize("command", ["run", "evaluate"])
def test_a_folder_that_is_not_empty_is_refused_without_resume(command, recipe, tmp_path, capsys, monkeypatch):
    for name in ("VLLM_LOGGING_LEVEL", "TOKENIZERS_PARALLELISM"):  # the command sets these: put them back afterwards
        monkeypatch.setenv(name, os.environ[name])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep", encoding="utf-8")
    assert main([command, str(recipe)]) == 1
    words = f"vlpost: {tmp_path / 'out'} is not empty: add --resume to go on, or give another folder with output=...\n"
    assert capsys.readouterr().err == words
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_check_with_engine_needs_something_to_compare(recipe, capsys, tmp_path):
    assert main(["check", str(recipe), "--engine"]) == 1
    assert "no stage draws rollouts: there is nothing that an engine and a learner must agree on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["train", "x.yaml"], ["run"], ["show", "x.yaml", "--resume"], ["run", "x.yaml", "--engine"]])
def test_words_that_are_no_command_end_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: vlpost" in capsys.readouterr().err


def test_a_missing_recipe_is_named(capsys, tmp_path):
    assert main(["check", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml: the recipe cannot be read (No such file or directory)" in capsys.readouterr().err


def test_stages_of_a_chain_and_of_one_stage(recipe):
    assert [name for name, _ in load_recipe(QUICKSTART).stages] == ["sft", "evaluate_sft", "sapo", "evaluate_sapo"]
    assert [name for name, _ in load_recipe(recipe).stages] == ["evaluate"]


def test_the_engines_environment_is_set(monkeypatch):
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_LOGGING_LEVEL", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "other")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    set_environment()
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "other"


# ---------------------------------------------------------------- in a process of its own


@pytest.mark.parametrize(("arguments", "status"), [(["check", str(QUICKSTART)], 0), (["show", str(QUICKSTART)], 0), (["--help"], 0)])
def test_light_commands_import_no_torch(arguments, status):
    program = (
        "import json, sys\n"
        "from vlpost.recipes.run import main\n"
        "try:\n    status = main(sys.argv[1:])\n"
        "except SystemExit as ended:\n    status = ended.code\n"
        "heavy = [name for name in ('torch', 'transformers', 'vllm', 'trl', 'numpy', 'sklearn') if name in sys.modules]\n"
        "print(json.dumps([status, heavy]), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stderr) == [status, []]
    assert done.stdout


@pytest.mark.parametrize("command", ["show", "check"])
def test_a_reader_that_has_read_enough_is_no_error(command):
    reading, writing = os.pipe()
    os.close(reading)  # whoever reads has gone before the first line
    process = [sys.executable, "-m", "vlpost.recipes.run", command, str(QUICKSTART)]
    try:
        done = subprocess.run(process, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------- check reads the rows


def with_rows(tmp_path, answer):
    row = {"id": "a", "messages": [{"role": "user", "content": "1 + 1?"}], "answer": answer}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    path = tmp_path / "exam.yaml"
    path.write_text(
        EVALUATE.replace("{use: handwriting, tasks: {add: 1.0}}", f"{{use: jsonl, path: {tmp_path / 'rows.jsonl'}}}")
        + f"output: {tmp_path / 'out'}\n",
        encoding="utf-8",
    )
    return path


def test_check_reads_every_row(tmp_path, capsys):
    assert main(["check", str(with_rows(tmp_path, "2"))]) == 0
    assert f"evaluate: data {tmp_path / 'rows.jsonl'}: 1 rows" in capsys.readouterr().out


def test_check_names_an_answer_that_no_response_could_match(tmp_path, capsys):
    assert main(["check", str(with_rows(tmp_path, "two cats"))]) == 1
    assert "example 'a'" in capsys.readouterr().err


def test_overrides_may_stand_behind_options(capsys):
    assert main(["check", str(QUICKSTART), "--allow-code", "common.sed=3"]) == 1
    assert "common.sed is read by no stage" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(QUICKSTART), "--allow-code", "word"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: word" in capsys.readouterr().err
