"""Evaluations on disk: read back, compared in pairs, told in tables, summed up for a chain."""

import json
from pathlib import Path

import pytest
from vlpost.model.records import VlpostError
from vlpost.recipes.chain_summary import summary_lines, summary_rows, write_summary
from vlpost.recipes.compare import compare
from vlpost.recipes.confidence import wilson
from vlpost.recipes.evaluation_record import JudgedResponse, Outcome, figures_of, read_evaluation, write_evaluation
from vlpost.recipes.evaluation_table import WIDTH, comparison_lines, figure_lines, table_lines
from vlpost.recipes.load import load_recipe
from vlpost.recipes.runner import run_recipe
from vlpost.recipes.schema import EvaluateRecipe
from vlpost.recipes.training import ResumeError

SETTINGS = {"evaluate": {"num_samples": 2, "temperatures": [1.0]}, "rewards": {"components": {"answer": {"use": "count"}}}}


def response(reward):
    unavailable = {} if reward is not None else {"answer": "no judge"}
    components = {} if reward is None else {"answer": reward}
    return JudgedResponse(text="12", reward=reward, components=components, tokens=3, is_truncated=False, unavailable=unavailable)


def outcome(name, task, *rewards, way="@2/1"):
    return Outcome(id=name, task=task, way=way, responses=tuple(map(response, rewards)))


def evaluation(folder, outcomes, *, data="f00d", settings=SETTINGS):
    folder.mkdir(parents=True)
    figures = figures_of(outcomes, pass_ks=(1, 2))
    described = {"model": "somewhere", "num_examples": len(outcomes), "data": data}
    write_evaluation(folder, described=described, settings=settings, figures=figures, outcomes=outcomes)
    return read_evaluation(folder)


def test_an_evaluation_that_was_cut_off_is_not_compared_on_what_is_left(tmp_path):
    whole, cut = evaluation(tmp_path / "whole", rows(10)), evaluation(tmp_path / "cut", rows(10)[:7])
    for first, second in ((whole, cut), (cut, whole)):
        with pytest.raises(VlpostError, match=r"cut: no responses to example 'add-7' \(@2/1\): the file was cut off; measure again"):
            compare(first, second)


def test_examples_of_two_data_sets_with_one_id_are_paired_in_order(tmp_path):
    asked = (outcome("0", "add", 1.0, 1.0), outcome("0", "add", 0.0, 0.0))
    found = compare(evaluation(tmp_path / "one", asked), evaluation(tmp_path / "two", asked)).by_way["@2/1"]["all"]
    assert (found.first, found.second, found.difference.num_better, found.difference.num_examples) == (0.5, 0.5, 0, 2)


def test_one_pair_is_shown_without_an_interval(tmp_path):
    found = compare(evaluation(tmp_path / "one", rows(0, 1)), evaluation(tmp_path / "two", rows(1, 1)))
    assert any("+100.0 [?]" in line for line in comparison_lines(found))


def rows(num_right, num_rows=20, task="add"):
    """Returns examples of which the first `num_right` are always right, the others never."""
    return [outcome(f"{task}-{number}", task, *(2 * [float(number < num_right)])) for number in range(num_rows)]


def test_an_evaluation_is_read_back_as_it_was_written(tmp_path):
    outcomes = (outcome("a", "add", 1.0, None), outcome("b", "add", 0.0, 1.0), outcome("c", "read", 0.0, 0.0))
    found = evaluation(tmp_path / "one", outcomes)
    assert found.outcomes == outcomes
    assert found.figures == figures_of(outcomes, pass_ks=(1, 2))
    assert (found.model, found.data, found.settings) == ("somewhere", "f00d", SETTINGS)
    assert found.figures["avg@2/1"].mean == 2 / 5
    assert found.figures["pass@1/1"].mean == (1 + 0.5 + 0) / 3
    assert found.figures["pass@2/1"].mean == 2 / 3
    alike = figures_of([outcome(str(number), "add", 1.0, 0.0) for number in range(20)], pass_ks=(1, 2))
    assert (alike["pass@1/1"].low, alike["pass@1/1"].high) == wilson(0.5, 40) == (alike["avg@2/1"].low, alike["avg@2/1"].high)
    assert (alike["pass@2/1"].low, alike["pass@2/1"].high) == wilson(1.0, 20)
    assert found.figures["task/read/avg@2/1"].mean == 0.0
    assert found.figures["macro/avg@2/1"].mean == pytest.approx((2 / 3 + 0) / 2)
    again = evaluation(tmp_path / "two", outcomes)
    assert (again.folder / "evaluation.json").read_bytes() == (found.folder / "evaluation.json").read_bytes()


def test_an_interval_without_ends_survives_the_file(tmp_path):
    found = evaluation(tmp_path / "one", [outcome("a", "add", 1.5, 1.5)])
    assert "Infinity" not in (found.folder / "evaluation.json").read_text()
    assert found.figures["avg@2/1"].high == float("inf")


def test_what_is_no_evaluation_is_named(tmp_path):
    with pytest.raises(VlpostError, match=r"evaluation\.json: cannot be read .*; give the folder of a finished stage"):
        read_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps({"model": "m", "avg@8/1": 0.5}))
    with pytest.raises(VlpostError, match=r"no evaluation of this version .*measure again"):
        read_evaluation(tmp_path)


def test_a_comparison_pairs_by_id_whatever_the_order(tmp_path):
    first = evaluation(tmp_path / "first", rows(10))
    second = evaluation(tmp_path / "second", list(reversed(rows(16))))
    compared = compare(first, second)
    found = compared.by_way["@2/1"]["all"]
    assert (found.first, found.second, found.difference.mean) == (0.5, 0.8, pytest.approx(0.3))
    assert (found.difference.num_better, found.difference.num_worse) == (6, 0)
    assert found.difference.p_value == 2 / 2**6
    assert 0.05 < found.difference.low < found.difference.high < 0.55
    back = compare(second, first).by_way["@2/1"]["all"].difference
    assert (back.mean, back.p_value) == (pytest.approx(-0.3), found.difference.p_value)


def test_tasks_are_compared_each_on_its_own(tmp_path):
    first = evaluation(tmp_path / "first", rows(10) + rows(4, 10, "read"))
    second = evaluation(tmp_path / "second", rows(12) + rows(2, 10, "read"))
    found = compare(first, second).by_way["@2/1"]
    assert {name: round(figure.difference.mean, 6) for name, figure in found.items()} == {
        "all": 0.0,
        "macro": -0.05,
        "task/add": 0.1,
        "task/read": -0.2,
    }


def test_what_one_of_both_could_not_judge_is_left_out_and_counted(tmp_path):
    first = evaluation(tmp_path / "first", [outcome("a", "add", 1.0, 1.0), outcome("b", "add", None, None)])
    second = evaluation(tmp_path / "second", [outcome("a", "add", 0.0, 1.0), outcome("b", "add", 1.0, 1.0)])
    compared = compare(first, second)
    assert compared.num_left_out == {"@2/1": 1}
    assert compared.by_way["@2/1"]["all"].difference.mean == -0.5
    assert any("left out, not judged in both: 1 examples" in line for line in comparison_lines(compared))


def test_other_data_and_other_settings_are_refused_in_words(tmp_path):
    first = evaluation(tmp_path / "first", rows(10))
    other = evaluation(tmp_path / "other", rows(10), data="beef")
    with pytest.raises(
        VlpostError, match=r"first and .*other cannot be compared: they asked other examples \(fingerprints f00d and beef\)"
    ):
        compare(first, other)
    settings = {**SETTINGS, "evaluate": {"num_samples": 2, "temperatures": [0.5]}}
    warm = evaluation(tmp_path / "warm", rows(10), settings=settings)
    with pytest.raises(VlpostError, match=r"evaluate\.temperatures is \[1\.0\] in the first and \[0\.5\] in the second"):
        compare(first, warm)


def test_a_file_that_was_cut_off_is_named(tmp_path):
    first, second = (evaluation(tmp_path / name, rows(10)) for name in ("first", "second"))
    lines = (second.folder / "evaluation.jsonl").read_text().splitlines(keepends=True)
    (second.folder / "evaluation.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(VlpostError, match="no responses to example 'add-19'"):
        compare(first, read_evaluation(second.folder))


def test_tables_are_at_most_80_columns_wide_and_hold_every_figure(tmp_path):
    tasks = ["add", "a_task_with_a_name_that_is_far_too_long", "read", "a/b"]
    outcomes = [one for task in tasks for one in rows(10, task=task)]
    found = evaluation(tmp_path / "one", outcomes)
    lines = figure_lines(found.figures, {"truncated_frac": 0.125, "unavailable_frac": 0.0})
    assert max(map(len, lines)) <= WIDTH
    assert [line.split()[0] for line in lines[1:7]] == ["all", "macro", "a/b", "a_task_with_a_n..oo_long", "add", "read"]
    assert lines[1].split(maxsplit=2)[:2] == ["all", "80"]
    # 40 of 80 examples, all responses alike: Wilson's interval of 40 in 80.
    assert "50.0 [39.3, 60.7]" in lines[1]
    assert lines[-1] == "of all responses: truncated 12.5%, unavailable 0.0%"
    compared = comparison_lines(compare(found, found))
    assert max(map(len, compared[3:])) <= WIDTH
    assert figure_lines({}, {"truncated_frac": 0.0, "unavailable_frac": 1.0})[0] == "nothing could be judged"


def test_a_wide_table_is_broken_into_blocks_that_repeat_the_names():
    lines = table_lines(["name", *"abc"], [["x", *(30 * letter for letter in "abc")]], num_fixed=1)
    assert lines[0].split() == ["name", "a", "b"]
    assert lines[2] == ""
    assert lines[3].split() == ["name", "c"]
    assert lines[4].split() == ["x", 30 * "c"]


def stage(folder, source="sft", temperatures=(1.0,)):
    return EvaluateRecipe.model_validate(
        {
            "method": "evaluate",
            "output": folder,
            "model": {"stage": source},
            "data": {"use": "handwriting", "tasks": {"add": 1.0}},
            "rewards": SETTINGS["rewards"],
            "sampler": {"max_response_tokens": 8, "max_model_len": 64},
            "evaluate": {"num_samples": 2, "temperatures": temperatures},
        }
    )


@pytest.fixture
def chain(tmp_path):
    evaluation(tmp_path / "look_sft", rows(15) + rows(8, task="read"))
    evaluation(tmp_path / "other", rows(15), data="beef")
    evaluation(tmp_path / "look_rl", rows(4) + rows(9, task="read"))
    return tmp_path, [(name, stage(tmp_path / name, source)) for name, source in (("look_sft", "sft"), ("other", "x"), ("look_rl", "rl"))]


def test_a_regression_beyond_its_interval_is_marked_against_the_last_like_row(chain):
    _, stages = chain
    found = summary_rows(stages)
    assert [(row.after, row.compared_with) for row in found] == [("sft", None), ("x", None), ("rl", "sft")]
    assert found[2].regressions == {"add", "macro", "all"}
    lines = summary_lines(found)
    assert lines[0].split() == ["after", "macro", "add", "read", "all"]
    marked = next(line for line in lines if line.startswith("rl"))
    assert marked.split()[3:7] == ["20.0", "±21.6!", "45.0", "±20.8"]
    assert any(line.startswith("Not compared, asked otherwise than all rows before: x.") for line in lines)
    assert max(map(len, lines)) <= 100


def test_the_summary_is_written_beside_the_stages(chain):
    folder, stages = chain
    lines = write_summary(folder, stages)
    assert (folder / "summary.txt").read_text() == "\n".join(lines) + "\n"
    assert (folder / "summary.png").stat().st_size > 10_000
    assert write_summary(Path("nowhere"), []) == []


def test_a_chain_that_ended_before_its_summary_is_resumed_to_write_it(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
method: chain
output: {tmp_path / "run"}
trackers: []
common: {{data: {{use: handwriting, tasks: {{add: 1.0}}}}, sampler: {{max_response_tokens: 8, max_model_len: 64}}}}
stages:
  look: {{method: evaluate, model: {{path: {tmp_path}}}, rewards: {{components: {{answer: {{use: count}}}}}}, evaluate: {{num_samples: 2}}}}
""")
    loaded = load_recipe(path)
    folder = evaluation(tmp_path / "run" / "look", rows(15)).folder
    (folder / "done.json").write_text('{"export": null}')
    (tmp_path / "run" / "events.jsonl").touch()
    assert run_recipe(loaded, resume=True, allow_code=False) == 0
    assert "look" in (tmp_path / "run" / "summary.txt").read_text()
    assert "75.0" in capsys.readouterr().out
    with pytest.raises(ResumeError, match="nothing to resume, the run is finished"):
        run_recipe(loaded, resume=True, allow_code=False)


def test_a_model_that_is_measured_twice_bears_the_evaluations_names(chain):
    _, stages = chain
    found = summary_rows([stages[0], (stages[2][0], stage(stages[2][1].output, "sft"))])
    assert [row.after for row in found] == ["look_sft", "look_rl"]
