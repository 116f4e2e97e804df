"""Kinds of the handwriting track for tools and general tasks: zooms, habits of counting, one language, programs, JSON, constraints."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from vlpost.model.records import Rollout
from vlpost.recipes.example_stream import fingerprint
from vlpost.recipes.handwriting import LANGUAGES, TASK_KINDS, handwriting_example, handwriting_examples, tokenizer_corpus
from vlpost.recipes.handwriting_scans import SPLIT_SCANS
from vlpost.recipes.handwriting_zoom import TRACK_ZOOM
from vlpost.rewards.code_execution import CodeExecutionOptions, CodeJudge, check_code_problem
from vlpost.rewards.code_switching import code_switching
from vlpost.rewards.json_answer import check_json_answer, json_answer
from vlpost.rewards.response_format import check_format_answer, response_format
from vlpost.rewards.sandbox import Sandbox
from vlpost.rewards.sandbox_config import SandboxConfig
from vlpost.rewards.visual_answer import check_count_answer, count
from vlpost.rl.tool_calls import parse_turn
from vlpost.rl.tools import ZoomTool

KINDS = ("zoom", "zoom_calls", "ordered", "counter", "mixing", "program", "json", "constrained")
ZOOMS = ("zoom", "zoom_calls")
ALL = dict.fromkeys(KINDS, 1.0)


@pytest.fixture(scope="module")
def digits():
    """The data set, read by this test's own hand."""
    return load_digits()


@pytest.fixture(scope="module")
def many():
    """Hundreds of examples of each split, solved."""
    return {split: handwriting_examples(split, tasks=ALL, num_examples=640, seed=5, with_solution=True) for split in SPLIT_SCANS}


@pytest.fixture(scope="module")
def code_judge():
    with Sandbox(SandboxConfig(num_workers=1)) as sandbox:
        yield CodeJudge(sandbox, CodeExecutionOptions())


def of_kind(many, *kinds):
    found = [example for examples in many.values() for example in examples if example.task in kinds]
    assert len(found) >= 200
    return found


def draw(kind, index=0, *, split="train", seed=1, with_solution=True, **changes):
    return handwriting_example(split, index, tasks={kind: 1}, seed=seed, with_solution=with_solution, **changes)


def respond(text):
    return Rollout(
        token_ids=(1, 2),
        sampled=(False, True),
        sampler_logprobs=(0.0, -1.0),
        media=(),
        text=text,
        prompt_suffix="",
        finish_reason="stop",
        policy_version=0,
    )


def grey(image):
    pixels = np.asarray(image)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 1] == pixels[..., 2]).all()
    return pixels[..., 0]


def enlarged(scan, size, digits):
    """Returns a scan as a picture, by this test's own hand."""
    return np.asarray(Image.fromarray(np.rint(digits.images[scan] / 16 * 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC))


def solution(example):
    return example.messages[-1].text


# ---------------------------------------------------------------- all kinds


PINNED = {
    "zoom": "1eb66f7428e7df5d",
    "zoom_calls": "ce21034bedbc427e",
    "ordered": "f1e9a4bdfbab88b9",
    "counter": "6c321e05bff07920",
    "mixing": "44fbad01c8e0e782",
    "program": "d975946c9cf69d10",
    "json": "bd2fd0d03570effd",
    "constrained": "092291980eef0e53",
}


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_those_of_every_other_machine(kind):
    examples = handwriting_examples("test", tasks={kind: 1}, num_examples=30, seed=0, with_solution=True)
    assert fingerprint(examples) == PINNED[kind]


def test_the_kinds_come_after_those_of_the_supervised_stages():
    first = TASK_KINDS.index(KINDS[0])
    assert TASK_KINDS[first : first + len(KINDS)] == KINDS
    assert TASK_KINDS[first - 1] == "blind"


def test_the_digits_are_those_of_the_scans_of_the_split(many, digits):
    for split, examples in many.items():
        for example in examples:
            assert set(example.metadata["scans"]) <= set(SPLIT_SCANS[split])
            assert [digits.target[scan] for scan in example.metadata["scans"]] == list(example.metadata["digits"])
            assert len(example.metadata["digits"]) >= 1
            assert example.metadata["needs_image"] is True


@given(
    split=st.sampled_from(tuple(SPLIT_SCANS)),
    index=st.integers(0, 10**9),
    seed=st.integers(0, 2**63),
    tasks=st.dictionaries(st.sampled_from(KINDS), st.floats(1e-3, 1e3), min_size=1),
    languages=st.lists(st.sampled_from(LANGUAGES), min_size=1, unique=True),
)
@settings(max_examples=60, deadline=None)
def test_any_index_gives_a_whole_example(split, index, seed, tasks, languages):
    arguments = {"tasks": tasks, "languages": languages, "seed": seed}
    example = handwriting_example(split, index, with_solution=False, **arguments)
    solved = handwriting_example(split, index, with_solution=True, **arguments)
    assert example.id == f"handwriting/{split}/{example.task}/{index:06d}"
    assert example.task in tasks
    (question,) = example.messages
    assert (question.role, len(question.media)) == ("user", 1)
    assert solved.messages[0] == question
    assert solved.messages[-1].role == "assistant"
    assert (solved.id, solved.answer, solved.metadata) == (example.id, example.answer, example.metadata)
    assert json.loads(json.dumps(example.metadata)) == example.metadata
    if example.task != "mixing":
        asked = question.text
        assert any("\u4e00" <= letter <= "\u9fff" for letter in asked) == (example.metadata["language"] == "zh")
    assert "{shape}" not in question.text
    assert "{result}" not in question.text


@pytest.mark.parametrize("thinking", [False, True])
def test_a_nano_reads_every_kind(tmp_path, thinking):
    from vlpost.model.chat import Chat
    from vlpost.model.loading import load_processor
    from vlpost.model.nano import build_nano

    folder = build_nano(tmp_path / "nano", size="s", corpus=tokenizer_corpus(), vocab_size=448, thinking=thinking, seed=0)
    chat = Chat(load_processor(folder))
    longest = Counter()
    for index in range(6):
        for kind in KINDS:
            example = draw(kind, index, split="validation")
            prompt = chat.encode_prompt(example.messages[:1])
            branches = chat.encode_conversation(example.messages)
            assert branches[0].token_ids[: len(prompt.token_ids)] == prompt.token_ids
            longest[kind] = max(longest[kind], len(branches[-1].token_ids))
            trained = [token for token, is_trained in zip(branches[-1].token_ids, branches[-1].trained, strict=True) if is_trained]
            assert chat.decode(trained).endswith(solution(example))
    assert longest["zoom"] <= 160
    assert longest["zoom_calls"] <= 480
    assert max(longest.values()) == longest["zoom_calls"]


# ---------------------------------------------------------------- zoom


def test_the_canvas_shows_what_the_metadata_says(many, digits):
    targets = Counter()
    for example in of_kind(many, *ZOOMS):
        canvas, facts = grey(example.media[0].image), example.metadata
        assert canvas.shape == (1000, 1000)
        targets[facts["target_calls"]] += 1
        assert len(facts["boxes"]) == facts["target_calls"]
        assert example.answer == str(sum(facts["numbers"]))
        assert [int(digit) for number in facts["numbers"] for digit in str(number)] == list(facts["digits"])
        scans = list(facts["scans"])
        rest = canvas.copy()
        for number, (left, top, right, bottom) in zip(facts["numbers"], facts["boxes"], strict=False):
            assert (right - left, bottom - top) == (32, 32)
            plate = np.full((32, 32), 64, dtype=np.uint8)
            own, scans = scans[: len(str(number))], scans[len(str(number)) :]
            row = np.concatenate([enlarged(scan, (8, 8), digits) for scan in own], axis=1)
            start = 16 - row.shape[1] // 2
            plate[12:20, start : start + row.shape[1]] = np.maximum(row, 64)
            assert (canvas[top:bottom, left:right] == plate).all()
            rest[top:bottom, left:right] = 0
        if facts["target_calls"]:
            assert not rest.any()
            assert scans == []
        else:
            (number,) = facts["numbers"]
            assert 10 <= number < 100
            lines, columns = np.flatnonzero(canvas.any(axis=1)), np.flatnonzero(canvas.any(axis=0))
            assert lines[-1] - lines[0] < 250
            assert 250 < columns[-1] - columns[0] < 500
    assert set(targets) == {0, 1, 2}
    assert min(targets.values()) > 0.25 * targets.total()


def test_two_small_numbers_never_share_a_cell():
    for index in range(60):
        boxes = draw("zoom", index, with_solution=False).metadata["boxes"]
        cells = [(left // 125, top // 125) for left, top, _, _ in boxes]
        assert len(set(cells)) == len(cells)
        assert all((left % 125, top % 125) == (46, 46) for left, top, _, _ in boxes)
        assert all(first[1] < second[1] or (first[1] == second[1] and first[0] < second[0]) for first, second in pairwise(boxes))


def test_a_zoom_on_the_true_box_shows_the_number_and_nothing_else(digits):
    tool = ZoomTool(TRACK_ZOOM)
    seen = 0
    for index in range(30):
        example = draw("zoom", index, with_solution=False)
        for box in example.metadata["boxes"]:
            (crop,) = tool.run({"bbox_2d": box, "label": "", "img_idx": 0}, images=example.media).images
            plate = example.media[0].image.crop(tuple(box))
            assert crop.image == plate.resize((256, 256), Image.Resampling.BICUBIC)
            seen += 1
    assert seen > 20


def test_small_digits_are_illegible_until_one_zooms(digits):
    """Nearest neighbours among the training scans, on what is seen of a digit: 2 x 2 pixels without a zoom, all with one."""
    train, test = list(SPLIT_SCANS["train"]), list(SPLIT_SCANS["test"])
    accuracy = {}
    for pixels in (2, 8):
        seen = np.stack([enlarged(scan, (pixels, pixels), digits).ravel() for scan in range(len(digits.target))]).astype(float)
        accuracy[pixels] = KNeighborsClassifier(5).fit(seen[train], digits.target[train]).score(seen[test], digits.target[test])
    assert accuracy[2] < 0.55
    assert accuracy[8] > 0.9


def test_both_kinds_of_zoom_ask_the_same():
    for index in range(40):
        plain, calls = draw("zoom", index, split="test"), draw("zoom_calls", index, split="test")
        assert plain.messages[0] == calls.messages[0]
        assert (plain.answer, plain.metadata) == (calls.answer, calls.metadata)
        assert plain.messages[-1] == calls.messages[-1]
        assert len(plain.messages) == 2


def test_the_steps_are_what_the_tool_answers(many):
    tool = ZoomTool(TRACK_ZOOM)
    called = Counter()
    for example in (example for example in many["train"] if example.task == "zoom_calls"):
        steps = example.messages[1:-1]
        assert [message.role for message in steps] == ["assistant", "tool"] * example.metadata["target_calls"]
        images = list(example.messages[0].media)
        for asked, shown, box in zip(steps[::2], steps[1::2], example.metadata["boxes"], strict=True):
            (call,) = asked.tool_calls
            turn = f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>'
            (parsed,) = parse_turn(turn, prompt_suffix="").calls
            assert (parsed.name, parsed.arguments["bbox_2d"], parsed.arguments["img_idx"]) == (tool.name, box, 0)
            result = tool.run(parsed.arguments, images=images)
            assert not result.is_error
            assert shown.media == result.images
            images += result.images
        called[len(steps) // 2] += 1
    assert set(called) == {0, 1, 2}


def test_a_policy_that_repeats_the_solution_writes_the_tokens_of_the_cold_start(tmp_path):
    from vlpost.model.chat import Chat
    from vlpost.model.loading import load_processor
    from vlpost.model.nano import build_nano
    from vlpost.rl.agent import Agent, Conversation
    from vlpost.rl.tools_config import AgentConfig

    chat = Chat(load_processor(build_nano(tmp_path / "nano", size="s", corpus=tokenizer_corpus(), vocab_size=448, seed=0)))
    tool, config = ZoomTool(TRACK_ZOOM), AgentConfig(tools=(TRACK_ZOOM,), describe_tools=False)
    agent = Agent(chat=chat, tools={tool.name: tool}, config=config, max_turn_tokens=200, max_tokens=2048, max_images=8)
    seen = Counter()
    for index in range(9):
        example = draw("zoom_calls", index, split="validation")
        asked = draw("zoom", index, split="validation", with_solution=False)
        (row,) = chat.encode_conversation(example.messages)
        conversation = Conversation(agent, agent.encode_prompt(asked.messages), place=example.id)
        while conversation.ending is None:
            prompt = conversation.prompt()
            start = len(prompt.token_ids)
            assert row.token_ids[:start] == prompt.token_ids
            sampled = row.token_ids[start : row.token_ids.index(chat.end_of_turn_id, start) + 1]
            conversation.receive(
                Rollout(
                    token_ids=prompt.token_ids + sampled,
                    sampled=(False,) * start + (True,) * len(sampled),
                    sampler_logprobs=(0.0,) * start + (-1.0,) * len(sampled),
                    media=prompt.media,
                    text=chat.decode(sampled),
                    prompt_suffix=prompt.suffix,
                    finish_reason="stop",
                    policy_version=0,
                )
            )
            if conversation.ending is None:
                conversation.run_tools()
        whole = conversation.rollout()
        answers = [answer for turn in whole.turns for answer in turn.answers]
        assert (whole.ending, len(answers)) == ("answered", example.metadata["target_calls"])
        assert not any(answer.is_error for answer in answers)
        assert (whole.token_ids, whole.sampled) == (row.token_ids, row.trained)
        assert whole.media == example.media
        assert count(example, whole).value == 1.0
        seen[len(answers)] += 1
    assert set(seen) == {0, 1, 2}


def test_sums_of_a_zoom_are_judged_by_count(many):
    for example in of_kind(many, *ZOOMS):
        check_count_answer(example)
        assert count(example, respond(solution(example))).value == 1.0
        assert count(example, respond(f"\\boxed{{{int(example.answer) + 1}}}")).value == 0.0


# ---------------------------------------------------------------- counts against habit


@pytest.mark.parametrize("kind", ["ordered", "counter"])
def test_rows_of_digits_in_order(kind, many, digits):
    answers, offsets = Counter(), set()
    for example in of_kind({kind: [draw(kind, index) for index in range(240)]}, kind):
        image = grey(example.media[0].image)
        assert image.shape == (64, 7 * 64)
        cells = [image[:, 64 * at : 64 * at + 64] for at in range(7)]
        filled = [at for at, cell in enumerate(cells) if cell.any()]
        assert len(filled) == int(example.answer)
        for at, scan in zip(filled, example.metadata["scans"], strict=True):
            assert (cells[at] == enlarged(scan, (64, 64), digits)).all()
        shown, usual = list(example.metadata["digits"]), int(example.metadata["usual_answer"])
        # Both signs of the habit, the last digit and the length of the row, say the usual answer.
        assert shown[-1] == usual == filled[-1] - filled[0] + 1
        assert [at - filled[0] + 1 for at in filled] == shown
        assert 3 <= usual <= 6
        assert int(example.answer) == (usual if kind == "ordered" else usual - 1)
        assert solution(example) == f"\\boxed{{{example.answer}}}"
        assert count(example, respond(solution(example))).value == 1.0
        assert count(example, respond(f"\\boxed{{{usual}}}")).value == float(kind == "ordered")
        answers[example.answer] += 1
        offsets.add(filled[0])
    assert set(answers) == set("3456" if kind == "ordered" else "2345")
    assert offsets == set(range(5))
    assert len(of_kind(many, kind)) > 200


def test_every_place_but_the_first_and_last_may_be_empty():
    missing = Counter()
    for index in range(300):
        facts = draw("counter", index, with_solution=False).metadata
        (gone,) = set(range(1, int(facts["usual_answer"]) + 1)) - set(facts["digits"])
        missing[int(facts["usual_answer"]), gone] += 1
    assert set(missing) == {(length, gone) for length in range(3, 7) for gone in range(2, length)}


# ---------------------------------------------------------------- language mixing


def test_one_language_is_wanted_and_the_other_is_punished(many):
    for example in of_kind(many, "mixing"):
        left, right = example.metadata["digits"]
        language = example.metadata["answer_language"]
        assert language == example.metadata["language"]
        assert example.answer == str(left + right)
        own = solution(example)
        assert count(example, respond(own)).value == 1.0
        assert code_switching(example, respond(own)).value == 0.0
        english = f"The two digits in the image are {left} and {right}, so the sum of them is \\boxed{{{left + right}}}."
        chinese = f"图中写了两个数字，是{left}和{right}，它们加起来的和等于\\boxed{{{left + right}}}。"
        assert own == {"en": english, "zh": chinese}[language]
        other = {"en": chinese, "zh": english}[language]
        assert code_switching(example, respond(other)).value == -1.0
        assert code_switching(example, respond(f"{own} {other}")).value == -1.0


def test_the_prompt_quotes_the_other_language(many):
    for example in of_kind(many, "mixing"):
        _, quoted, _ = example.messages[0].text.split("`")
        assert any("\u4e00" <= letter <= "\u9fff" for letter in quoted) == (example.metadata["language"] == "en")


# ---------------------------------------------------------------- programs


def test_programs_are_judged_by_hidden_cases(many, code_judge):
    asked = Counter()
    examples = of_kind(many, "program")
    for example in examples:
        check_code_problem(example)
        (digit,) = example.metadata["digits"]
        code = example.metadata["code"]
        expected = {"plus": lambda n, d: n + d, "times": lambda n, d: n * d, "repeat": lambda n, d: int(str(d) * n)}[
            example.metadata["asked"]
        ]
        numbers = [int(case["stdin"]) for case in code["cases"]]
        assert len(set(numbers)) == 3
        assert min(numbers) >= 2
        assert [int(case["stdout"]) for case in code["cases"]] == [expected(number, digit) for number in numbers]
        assert code["solution"] == example.answer
        assert solution(example) == f"```python\n{example.answer}\n```"
        assert not any(case["stdout"].strip() in example.messages[0].text for case in code["cases"])
        asked[example.metadata["asked"]] += 1
    assert set(asked) == {"plus", "times", "repeat"}
    for example in examples[:12]:
        assert code_judge.judge_row(example, respond(solution(example)))[0].value == 1.0
        printed = example.metadata["code"]["cases"][0]["stdout"].strip()
        if example.metadata["digits"] != [0]:
            assert code_judge.judge_row(example, respond(f"```python\nprint('{printed}')\n```"))[0].value == 0.0


def test_a_program_for_another_digit_is_wrong(code_judge):
    for index in range(6):
        example = draw("program", index)
        (digit,) = example.metadata["digits"]
        wrong = example.answer.replace(str(digit), str((digit + 1) % 10))
        assert wrong != example.answer
        assert code_judge.judge_row(example, respond(f"```python\n{wrong}\n```"))[0].value == 0.0


# ---------------------------------------------------------------- JSON


def test_json_answers_hold_the_values_and_meet_the_schema(many):
    forms = Counter()
    for example in of_kind(many, "json"):
        check_json_answer(example)
        shown = list(example.metadata["digits"])
        value = json.loads(example.answer)
        known = {"digits": shown, "sum": sum(shown), "largest": max(shown), "count": len(shown)}
        assert value == {key: known[key] for key in value}
        assert len(value) == 2
        validator = Draft202012Validator(example.metadata["schema"])
        assert validator.is_valid(value)
        assert not validator.is_valid({**value, "more": 1})
        assert not validator.is_valid(dict(list(value.items())[:1]))
        assert not validator.is_valid({key: str(member) for key, member in value.items()})
        shape = "{" + ", ".join(f'"{key}": {"[...]" if key == "digits" else "..."}' for key in value) + "}"
        assert shape in example.messages[0].text
        assert solution(example) == example.answer
        forms[tuple(value)] += 1
    assert set(forms) == {("digits", "sum"), ("digits", "largest"), ("count", "sum")}


def test_wrong_json_is_not_paid(many):
    for example in of_kind(many, "json")[:40]:
        value = json.loads(example.answer)
        wrong = {key: member + 1 if isinstance(member, int) else member for key, member in value.items()}
        verdict = json_answer(example, respond(json.dumps(wrong)))
        assert getattr(verdict, "value", None) == 0.0
        assert getattr(json_answer(example, respond(example.answer[:-1])), "value", None) == 0.0


# ---------------------------------------------------------------- constraints


def test_constraints_are_met_by_the_solution_and_by_no_bare_answer(many):
    forms = Counter()
    for example in of_kind(many, "constrained"):
        check_format_answer(example)
        facts = example.metadata
        assert example.answer == "".join(map(str, facts["digits"]))
        assert response_format(example, respond(solution(example)), credit="all").value == 1.0
        assert count(example, respond(solution(example))).value == 1.0
        bare = "\\boxed{" + example.answer + "}"
        others = "Well, what I can read here is this number: " + bare + "."
        assert response_format(example, respond(others), credit="all").value == 0.0
        if facts["form"] != "short":
            assert response_format(example, respond(bare), credit="all").value == 0.0
        forms[facts["form"], facts["language"]] += 1
    assert len(forms) == 2 * 8
    assert min(forms.values()) >= 5


def test_constraints_are_asked_for_in_words(many):
    words = {}
    for example in of_kind(many, "constrained"):
        text = example.messages[0].text
        for constraint in example.metadata["constraints"]:
            if "text" in constraint:
                assert constraint["text"] in text
            if "at_most" in constraint:
                assert str(constraint["at_most"]) in text
        asked = text.split("作答。" if example.metadata["language"] == "zh" else "\\boxed{}. ", 1)[1]
        words.setdefault((example.metadata["form"], example.metadata["language"]), set()).add(asked)
    assert all(len(asked) == 1 for asked in words.values())
    assert len({next(iter(asked)) for asked in words.values()}) == 16
