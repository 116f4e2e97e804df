"""`vlpost check RECIPE --lengths N`: tokens of rows as the run counts them, what is too long, and the packing of a step."""

import json

import pytest
from vlpost.model.chat import Chat
from vlpost.model.loading import load_processor
from vlpost.model.nano import build_nano
from vlpost.model.records import DataError, Message, TextPart
from vlpost.recipes import run
from vlpost.recipes.load import load_recipe
from vlpost.recipes.row_lengths import phase_lines
from vlpost.recipes.sft_phases import open_phases, plan_phases

CORPUS = [f"How much is {number} + {number + 3}? {2 * number + 3}" for number in range(30)]
RECIPE = """
method: sft
output: out
model: {{nano: {{size: s}}}}
data: {{use: jsonl, path: {path}}}
sampler: {{max_response_tokens: 8, max_model_len: 96}}
rewards: {{components: {{answer: {{use: count}}}}}}
sft: {{num_steps: 3, examples_per_step: 4, {sft}}}
learner: {{learning_rate: 1.0e-3, token_budget: 160}}
"""


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = build_nano(tmp_path_factory.mktemp("nano") / "nano", size="s", corpus=CORPUS, seed=5, vocab_size=448)
    return Chat(load_processor(folder))


def turns(count):
    return [{"role": role, "content": "How much is 1 + 4?"} for _ in range(count) for role in ("user", "assistant")]


@pytest.fixture
def lines(tmp_path, chat, monkeypatch):
    def measure(sft, *, num_rows, numbers_of_turns=(1, 1, 1, 4)):
        rows = [json.dumps({"id": f"r{index}", "messages": turns(count)}) for index, count in enumerate(numbers_of_turns)]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
        (tmp_path / "sft.yaml").write_text(RECIPE.format(sft=sft, path=tmp_path / "rows.jsonl"), encoding="utf-8")
        recipe = load_recipe(tmp_path / "sft.yaml").recipe
        plans = plan_phases(recipe)
        stream = open_phases(plans, seed=recipe.seed)
        return list(phase_lines(plans[0], stream, chat=chat, token_budget=recipe.learner.token_budget, num_rows=num_rows))

    return measure


@pytest.fixture
def lengths(chat):
    """Tokens of a row of 1 and of 4 turns, and trained tokens of one turn, by the chat alone."""

    def encoded(count):
        messages = tuple(Message(role=turn["role"], parts=(TextPart(text=turn["content"]),)) for turn in turns(count))
        (conversation,) = chat.encode_conversation(messages)
        return conversation

    one, four = encoded(1), encoded(4)
    assert sum(four.trained) == 4 * sum(one.trained)
    return len(one.token_ids), len(four.token_ids), sum(one.trained)


def test_tokens_and_micro_batches_are_those_of_the_run(lines, lengths):
    one, four, trained = lengths
    assert 3 * one <= 160 < one + four
    found = lines("weighting: token", num_rows=5)
    assert found == [
        f"the first 2 of 3 steps, 8 rows: {one} to {four}, median {one}, 95 % at most {four} tokens a row",
        "0 images and videos, 100.0% of rows without any",
        "no row is above the limit of 160 tokens",
        f"a step of 4 rows is {3 * one + four} tokens, {7 * trained / (3 * one + four):.1%} of them trained, in 2.0 micro-batches "
        "(2 at most) of up to 160",
    ]


def test_all_of_a_short_run_is_measured_and_no_more(lines):
    assert lines("weighting: token", num_rows=1000)[0].startswith("the first 3 of 3 steps, 12 rows: ")


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        ("refuse", "sft.too_long: refuse ends the run at r3 with {four}"),
        ("drop", "left out"),
        ("split", "split into {parts} rows, 0 exchanges too long alone"),
    ],
)
def test_rows_above_the_limit_are_counted_with_what_becomes_of_them(lines, lengths, outcome, words):
    one, four, trained = lengths
    limit = (one + four) // 2
    found = lines(f"max_length: {limit}, too_long: {outcome}", num_rows=4)
    parts = {"refuse": 0, "drop": 0, "split": 2}[outcome]
    assert found[0].endswith(f"{one} to {four}, median {one}, 95 % at most {four} tokens a row")
    assert found[2] == f"1 rows (25.0%) are above the limit of {limit} tokens: {words.format(four=four, parts=parts)}"
    num_trained = (7 if outcome == "split" else 3) * trained
    tokens = int(found[3].split(" is ")[1].split(" tokens")[0])
    assert tokens == 3 * one + (four - 1 if outcome == "split" else 0)  # the line end between the two halves
    assert f" {num_trained / tokens:.1%} of them trained" in found[3]


def test_an_exchange_that_is_too_long_alone_and_a_step_of_nothing(lines, lengths):
    limit = lengths[0] - 1
    found = lines(f"max_length: {limit}, too_long: split", num_rows=1)
    assert found[2].endswith(f"4 rows (100.0%) are above the limit of {limit} tokens: split into 0 rows, 7 exchanges too long alone")
    assert found[3] == "a step of 4 rows is 0 tokens, 0.0% of them trained, in 0.0 micro-batches (0 at most) of up to 160"


def test_another_fault_of_a_row_is_an_error_as_in_the_run(lines):
    with pytest.raises(DataError, match="chat template of this model opens no think block"):
        lines("empty_think: mask", num_rows=1)


CHAIN = """
method: chain
output: out
common:
  model: {nano: {size: s}}
  sampler: {max_response_tokens: 8, max_model_len: 96}
  rewards: {components: {answer: {use: count}}}
  data: {use: handwriting, tasks: {add: 1.0}, languages: [en]}
stages:
  sft:
    method: sft
    sft: {examples_per_step: 4}
    learner: {learning_rate: 1.0e-3}
    data: null
    phases:
      first: {num_steps: 2, data: {use: handwriting, tasks: {arithmetic: 1.0}, languages: [en]}}
      second: {num_steps: 1, data: {use: handwriting, tasks: {add: 1.0}, languages: [en]}}
  sapo:
    method: rl
    model: {stage: sft}
    rl: {num_steps: 2, prompts_per_step: 4, group_size: 2}
    learner: {learning_rate: 1.0e-3}
"""


def test_the_command_measures_each_phase_of_a_chains_supervised_stages(tmp_path, capsys):
    path = tmp_path / "chain.yaml"
    path.write_text(CHAIN, encoding="utf-8")
    assert run.main(["check", str(path), "--lengths", "6"]) == 0
    printed = capsys.readouterr().out
    assert "sft, phase first: the first 2 of 2 steps, 8 rows: " in printed
    assert "sft, phase first: 0 images and videos, 100.0% of rows without any" in printed
    assert "sft, phase second: the first 1 of 1 steps, 4 rows: " in printed
    assert "sft, phase second: 4 images and videos, 0.0% of rows without any" in printed
    assert printed.endswith(f"{path}: fine\n")


@pytest.mark.parametrize(
    ("chain", "number", "words"),
    [
        (CHAIN, "0", "--lengths 0: must be at least 1 row"),
        (
            CHAIN.partition("stages:")[0] + "stages:\n  look: {method: evaluate}\n",
            "3",
            "--lengths 3: the recipe has no stage of method sft",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, capsys, chain, number, words):
    path = tmp_path / "chain.yaml"
    path.write_text(chain, encoding="utf-8")
    assert run.main(["check", str(path), "--lengths", number]) == 1
    assert words in capsys.readouterr().err


def test_a_recipe_that_makes_data_has_no_lengths(tmp_path, capsys):
    path = tmp_path / "curate.yaml"
    path.write_text(
        "method: curate\noutput: out\ndata: {a: {use: handwriting, tasks: {add: 1.0}, num_examples: 2}}\nsteps: {d: {use: dedupe}}\n",
        encoding="utf-8",
    )
    assert run.main(["check", str(path), "--lengths", "3"]) == 1
    assert "--lengths 3: measures the rows of SFT stages, and this recipe makes rows; leave it out" in capsys.readouterr().err
