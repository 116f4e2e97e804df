"""The later kinds of the handwriting track: places, films, several images, several turns, pages, long sums, and rows that need no image."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import vlpost.recipes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from vlpost.model.records import DataError, ImagePart, Rollout, VideoPart
from vlpost.recipes.example_stream import fingerprint
from vlpost.recipes.handwriting import LANGUAGES, TASK_KINDS, handwriting_example, handwriting_examples, tokenizer_corpus
from vlpost.recipes.handwriting_questions import sum_steps
from vlpost.recipes.handwriting_scans import SPLIT_SCANS, Dice, ink_box
from vlpost.recipes.load import load_recipe
from vlpost.rewards.grounding import box, check_box_answer
from vlpost.rewards.time_answer import check_time_span_answer, time_span
from vlpost.rewards.visual_answer import check_count_answer, count

KINDS = ("find", "video", "multi_image", "multi_turn", "page", "sum2", "sum2_steps", "blind")
ALL = dict.fromkeys(KINDS, 1.0)
SMALL_PAGES = {"page_pixels": (200, 400)}
REWARDS = {"find": (box, check_box_answer), "video": (time_span, check_time_span_answer)}


@pytest.fixture(scope="module")
def digits():
    """The data set, read by this test's own hand."""
    return load_digits()


@pytest.fixture(scope="module")
def many():
    """Hundreds of examples of each split, solved."""
    return {
        split: handwriting_examples(split, tasks=ALL, num_examples=800, seed=5, with_solution=True, **SMALL_PAGES) for split in SPLIT_SCANS
    }


def draw(kind, index=0, *, split="train", seed=1, with_solution=True, **changes):
    return handwriting_example(split, index, tasks={kind: 1}, seed=seed, with_solution=with_solution, **changes)


def respond(text, prompt_suffix=""):
    return Rollout(
        token_ids=(1, 2),
        sampled=(False, True),
        sampler_logprobs=(0.0, -1.0),
        media=(),
        text=text,
        prompt_suffix=prompt_suffix,
        finish_reason="stop",
        policy_version=0,
    )


def grey(image):
    pixels = np.asarray(image)
    assert pixels.shape[2] == 3
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 1] == pixels[..., 2]).all()
    return pixels[..., 0]


def enlarged(scan, size, digits):
    """Returns a scan as a picture, by this test's own hand."""
    return np.asarray(Image.fromarray(np.rint(digits.images[scan] / 16 * 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC))


def expected(example):
    """Returns (answer, solution) worked out from the metadata alone; for `find` None: its answer is in the pixels."""
    shown, facts = list(example.metadata["digits"]), example.metadata
    match example.task:
        case "find":
            return None
        case "video":
            start = sum(facts["seconds"][: shown.index(facts["target"])])
            answer = f"[[{start}, {start + facts['seconds'][shown.index(facts['target'])]}]]"
            return answer, f"\\boxed{{{answer}}}"
        case "multi_image":
            numbers = facts["numbers"]
            assert shown == [int(digit) for number in numbers for digit in str(number)]
            if facts["asked"] == "sum":
                return str(sum(numbers)), "+".join(map(str, numbers)) + f"=\\boxed{{{sum(numbers)}}}"
            place = 1 + max(range(len(numbers)), key=numbers.__getitem__)
            return str(place), ",".join(map(str, numbers)) + f":\\boxed{{{place}}}"
        case "multi_turn" | "blind":
            first, second = shown
            return str(first + second), f"{first}+{second}=\\boxed{{{first + second}}}"
        case "page":
            answer = str(int("".join(map(str, shown))))
            return answer, f"\\boxed{{{answer}}}"
        case "sum2" | "sum2_steps":
            a, b, c, d = shown
            assert facts["operands"] == [10 * a + b, 10 * c + d]
            answer = str(10 * (a + c) + b + d)
            tens = a + c + (1 if b + d > 9 else 0)
            steps = f"<think>\n{a}{b}+{c}{d}:{b}+{d}={b + d},{a}+{c}+{tens - a - c}={tens}\n</think>\n\n"
            return answer, (steps if example.task == "sum2_steps" else "") + f"\\boxed{{{answer}}}"
    raise AssertionError(f"no expectation for {example.task}")


PINNED = {
    "find": "5742128d325ca585",
    "video": "a557394942a4db8f",
    "multi_image": "2fa01d302d3480b0",
    "multi_turn": "794a7f381fec4942",
    "page": "772b5a66c14eaa91",
    "sum2": "58e5e86b47d58e83",
    "sum2_steps": "a3f6835a6cd457fb",
    "blind": "7880fe01a06d9303",
}


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_those_of_every_other_machine(kind):
    examples = handwriting_examples("test", tasks={kind: 1}, num_examples=30, seed=0, with_solution=True, **SMALL_PAGES)
    assert fingerprint(examples) == PINNED[kind]


def test_the_kinds_come_after_the_first_ones():
    assert TASK_KINDS[: 5 + len(KINDS)] == ("read", "add", "count", "compare", "arithmetic", *KINDS)


def test_answers_and_solutions_are_what_the_metadata_says(many):
    checked = Counter()
    for split, examples in many.items():
        for example in examples:
            assert set(example.metadata["scans"]) <= set(SPLIT_SCANS[split])
            if (known := expected(example)) is not None:
                assert (example.answer, example.messages[-1].text) == known
            checked[example.task] += 1
    assert set(checked) == set(KINDS)
    assert min(checked.values()) >= 290


def test_the_digits_are_those_of_the_scans(many, digits):
    for example in (example for examples in many.values() for example in examples):
        assert [digits.target[scan] for scan in example.metadata["scans"]] == list(example.metadata["digits"])
        assert len(example.metadata["digits"]) >= 1


def test_rewards_pay_for_solutions_and_for_nothing_else(many):
    paid = Counter()
    for example in many["test"]:
        verify, check = REWARDS.get(example.task, (count, check_count_answer))
        check(example)
        assert verify(example, respond(example.messages[-1].text)).value == 1.0
        wrong = {"find": '[{"bbox_2d": [0, 0, 1, 1]}]', "video": "[[90, 91]]"}.get(example.task) or str(int(example.answer) + 1)
        assert verify(example, respond(f"\\boxed{{{wrong}}}")).value == 0.0
        paid[example.task] += 1
    assert min(paid[kind] for kind in KINDS) >= 90


def test_a_response_that_continues_an_opened_think_block_is_paid():
    example = draw("sum2_steps")
    text = example.messages[-1].text.removeprefix("<think>\n")
    assert count(example, respond(text, prompt_suffix="<think>\n")).value == 1.0
    assert count(example, respond(text.split("</think>")[0], prompt_suffix="<think>\n")).value == 0.0


@given(
    split=st.sampled_from(tuple(SPLIT_SCANS)),
    index=st.integers(0, 10**9),
    seed=st.integers(0, 2**63),
    tasks=st.dictionaries(st.sampled_from(KINDS), st.floats(1e-3, 1e3), min_size=1),
    languages=st.lists(st.sampled_from(LANGUAGES), min_size=1, unique=True),
)
@settings(max_examples=80, deadline=None)
def test_any_index_gives_a_whole_example(split, index, seed, tasks, languages):
    arguments = {"tasks": tasks, "languages": languages, "seed": seed, **SMALL_PAGES}
    example = handwriting_example(split, index, with_solution=False, **arguments)
    solved = handwriting_example(split, index, with_solution=True, **arguments)
    assert example.id == f"handwriting/{split}/{example.task}/{index:06d}"
    assert example.task in tasks
    assert example.metadata["language"] in languages
    assert [message.role for message in example.messages] == ["user", "assistant", "user"][: 3 if example.task == "multi_turn" else 1]
    assert solved.messages[:-1] == example.messages
    assert solved.messages[-1].role == "assistant"
    assert (solved.id, solved.answer, solved.metadata) == (example.id, example.answer, example.metadata)
    assert json.loads(json.dumps(example.metadata)) == example.metadata
    asked = example.messages[-1].text
    assert any("\u4e00" <= letter <= "\u9fff" for letter in asked) == (example.metadata["language"] == "zh")
    assert "{" not in asked.replace("\\boxed{", "").replace('[{"bbox_2d"', "")


@pytest.mark.parametrize("digit_pixels", [(64, 64), (32, 64), (8, 8)])
def test_the_box_holds_the_ink_of_the_asked_digit(digit_pixels, digits):
    width, height = digit_pixels
    seen_places = set()
    for index in range(40):
        example = draw("find", index, digit_pixels=digit_pixels)
        (found,) = json.loads(example.answer)
        image = grey(example.media[0].image)
        assert image.shape == (2 * (height + height // 4), 4 * (width + width // 4))
        target = example.metadata["target"]
        assert found["label"] == str(target)
        assert f" {target}" in example.messages[0].text or f"数字{target}" in example.messages[0].text
        assert list(example.metadata["digits"]).count(target) == 1
        scan = example.metadata["scans"][list(example.metadata["digits"]).index(target)]
        picture = enlarged(scan, digit_pixels, digits)
        corners = [
            (left, top)
            for top in range(image.shape[0] - height + 1)
            for left in range(image.shape[1] - width + 1)
            if image[top, left + width // 2] == picture[0, width // 2] and (image[top : top + height, left : left + width] == picture).all()
        ]
        assert len(corners) == 1
        left, top = corners[0]
        ink = digits.images[scan] >= 4
        across, down = np.flatnonzero(ink.any(axis=0)), np.flatnonzero(ink.any(axis=1))
        exact = (
            (left + across[0] * width / 8) / image.shape[1],
            (top + down[0] * height / 8) / image.shape[0],
            (left + (across[-1] + 1) * width / 8) / image.shape[1],
            (top + (down[-1] + 1) * height / 8) / image.shape[0],
        )
        assert found["bbox_2d"] == pytest.approx([1000 * side for side in exact], abs=0.5 + 1e-9)
        seen_places.add((left, top))
    assert len(seen_places) > 20


def test_the_ink_of_every_scan_has_a_size(digits):
    boxes = [ink_box(scan) for scan in range(len(digits.target))]
    assert all(0 <= left < right <= 8 and 0 <= top < bottom <= 8 for left, top, right, bottom in boxes)
    assert len(set(boxes)) > 10


def test_the_film_shows_each_page_for_its_seconds(digits):
    lengths = Counter()
    for index in range(60):
        example = draw("video", index)
        film = example.media[0]
        assert isinstance(film, VideoPart)
        assert film.fps == 2.0
        assert film.frame_indices == tuple(range(len(film.frames)))
        seconds, scans = example.metadata["seconds"], example.metadata["scans"]
        assert len(set(example.metadata["digits"])) == len(scans) == len(seconds)
        shown = [scan for scan, lasts in zip(scans, seconds, strict=True) for _ in range(2 * lasts)]
        assert len(shown) == len(film.frames)
        assert all((grey(frame) == enlarged(scan, (64, 64), digits)).all() for frame, scan in zip(film.frames, shown, strict=True))
        ((start, end),) = json.loads(example.answer)
        target = example.metadata["target"]
        visible = [number / film.fps for number, scan in enumerate(shown) if digits.target[scan] == target]
        assert (visible[0], visible[-1] + 1 / film.fps) == (start, end)
        lengths[sum(seconds)] += 1
    assert len(lengths) > 5


def test_several_images_stand_between_their_numbers(digits):
    asked = Counter()
    for index in range(200):
        example = draw("multi_image", index, languages=("en",))
        numbers, parts = example.metadata["numbers"], example.messages[0].parts
        assert len(set(numbers)) == len(numbers)
        assert [type(part) is ImagePart for part in parts] == [False, True] * len(numbers) + [False]
        assert [part.text for part in parts[:-1:2]] == [f"Image {place}: " for place in range(1, len(numbers) + 1)]
        scans = list(example.metadata["scans"])
        for number, part in zip(numbers, parts[1::2], strict=True):
            row, scans = scans[: len(str(number))], scans[len(str(number)) :]
            assert (grey(part.image) == np.concatenate([enlarged(scan, (64, 64), digits) for scan in row], axis=1)).all()
        assert scans == []
        asked[len(numbers), example.metadata["asked"], example.answer if example.metadata["asked"] == "largest" else ""] += 1
    assert set(asked) == {(2, "sum", ""), (3, "sum", ""), *((2, "largest", n) for n in "12"), *((3, "largest", n) for n in "123")}


def test_two_turns_are_about_one_picture():
    example = draw("multi_turn", languages=("en",))
    first, second = example.metadata["digits"]
    roles = [message.role for message in example.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert [len(message.media) for message in example.messages] == [1, 0, 0, 0]
    assert example.messages[1].text == f"\\boxed{{{first}}}"
    assert example.messages[3].text == f"{first}+{second}=\\boxed{{{first + second}}}"


def test_the_page_shows_the_number_where_it_is_asked_for(digits):
    for index in range(12):
        example = draw("page", index, languages=("en",), page_pixels=(200, 900))
        image, facts = grey(example.media[0].image), example.metadata
        height, width = image.shape
        assert 200 <= min(height, width) <= max(height, width) <= 900
        assert (facts["lines"], facts["columns"]) == (height // 48, width // 96)
        assert f"line {facts['line']}, column {facts['column']}" in example.messages[0].text
        for line in range(facts["lines"]):
            for column in range(facts["columns"]):
                cell = image[48 * line : 48 * line + 48, 96 * column : 96 * column + 96]
                assert cell[:32, :24].max() > 100
                assert not cell[32:].any()
                assert not cell[:, 72:].any()
                if (line + 1, column + 1) == (facts["line"], facts["column"]):
                    row = np.concatenate([enlarged(scan, (24, 32), digits) for scan in facts["scans"]], axis=1)
                    assert (cell[:32, : row.shape[1]] == row).all()
                    assert not cell[:, row.shape[1] :].any()


def test_pages_are_small_and_large_and_as_large_as_asked():
    sides = {side for index in range(6) for side in draw("page", index).media[0].image.size}
    assert min(sides) < 800 < 2000 < max(sides) <= 4000
    largest = draw("page", page_pixels=(4000, 4000))
    assert largest.media[0].image.size == (4000, 4000)
    assert (largest.metadata["lines"], largest.metadata["columns"]) == (83, 41)


def test_steps_add_the_ones_and_then_the_tens():
    assert sum_steps(38, 47) == "38+47:8+7=15,3+4+1=8"
    assert sum_steps(20, 71) == "20+71:0+1=1,2+7+0=9"
    assert sum_steps(99, 99) == "99+99:9+9=18,9+9+1=19"
    for left in range(10, 100):
        for right in range(10, 100):
            numbers, ones, tens = sum_steps(left, right).replace(":", ",").split(",")
            assert numbers == f"{left}+{right}"
            # Each line is true, and the last digits of both are the sum.
            assert all(sum(map(int, part.split("=")[0].split("+"))) == int(part.split("=")[1]) for part in (ones, tens))
            assert int(tens.split("=")[1] + ones.split("=")[1][-1]) == left + right


def test_both_kinds_of_long_sums_ask_the_same():
    for index in range(50):
        plain, steps = draw("sum2", index, split="test"), draw("sum2_steps", index, split="test")
        assert plain.messages[0] == steps.messages[0]
        assert (plain.answer, plain.metadata) == (steps.answer, steps.metadata)
        assert steps.messages[1].text.endswith(f"</think>\n\n{plain.messages[1].text}")


def test_sums_need_both_numbers():
    sums = Counter(draw("sum2", index, with_solution=False).metadata["operands"][0] for index in range(900))
    assert set(sums) == set(range(10, 100))
    assert max(sums.values()) < 30


def test_half_of_the_blind_rows_tell_all(many):
    told = Counter()
    for example in (example for examples in many.values() for example in examples if example.task == "blind"):
        numerals = [int(word) for word in "".join(c if c.isdigit() else " " for c in example.messages[0].text).split()]
        left, right = example.metadata["operands"]
        assert len(example.media) == 1
        assert list(example.metadata["digits"]) == [left, right]
        if example.metadata["needs_image"]:
            assert numerals in ([left], [right])
        else:
            assert numerals == [left, right]
        told[example.metadata["needs_image"]] += 1
    assert abs(told[True] - told[False]) < 60
    assert sum(told.values()) >= 290


def test_the_other_later_kinds_all_need_their_images(many):
    others = [example for examples in many.values() for example in examples if example.task != "blind"]
    assert all(example.metadata["needs_image"] is True for example in others)
    # A number of the answer may stand in the text by chance, never by rule: the same text has many answers.
    answers = {}
    for example in others:
        if example.task in ("sum2", "multi_turn"):
            answers.setdefault((example.task, example.messages[-2].text), set()).add(example.answer)
    assert min(map(len, answers.values())) > 5


def test_dice_choose_several_without_repeating():
    drawn = [tuple(Dice("several", number).several(range(4), 3)) for number in range(600)]
    assert all(len(set(three)) == 3 for three in drawn)
    assert len(set(drawn)) == 24
    assert max(Counter(drawn).values()) < 50


@pytest.mark.parametrize("page_pixels", [(199, 400), (200, 4001), (500, 400)])
def test_wrong_page_sizes_are_named(page_pixels):
    with pytest.raises(DataError) as caught:
        draw("page", page_pixels=page_pixels)
    assert f"page_pixels = {page_pixels}" in str(caught.value)
    assert "200 to 4000" in str(caught.value)


@pytest.mark.parametrize("thinking", [False, True])
def test_a_nano_reads_every_kind(tmp_path, thinking):
    from vlpost.model.chat import Chat
    from vlpost.model.loading import load_processor
    from vlpost.model.nano import build_nano

    folder = build_nano(tmp_path / "nano", size="s", corpus=tokenizer_corpus(), vocab_size=448, thinking=thinking, seed=0)
    chat = Chat(load_processor(folder))
    longest = Counter()
    for index in range(8):
        for kind in KINDS:
            example = draw(kind, index, split="validation", **SMALL_PAGES)
            prompt = chat.encode_prompt(example.messages[:-1])
            branches = chat.encode_conversation(example.messages)
            assert prompt.media == example.media
            assert branches[-1].token_ids[: len(prompt.token_ids)] == prompt.token_ids
            longest[kind] = max(longest[kind], len(branches[-1].token_ids))
            trained = [token for token, is_trained in zip(branches[-1].token_ids, branches[-1].trained, strict=True) if is_trained]
            wanted = example.messages[-1].text
            if thinking and kind != "sum2_steps":
                wanted = f"\n</think>\n\n{wanted}"
            written = chat.decode(trained)
            assert written.endswith(wanted.removeprefix("<think>\n") if thinking else wanted)
    # Chinese characters that the corpus lacks are up to three tokens each; the longest are films, with a time stamp a second.
    assert longest["sum2_steps"] <= 100
    assert longest["find"] <= 240
    assert longest["video"] <= 320
    assert max(longest.values()) == longest["video"]


@pytest.mark.parametrize("name", ["nano_sft.yaml", "nano_cold_start.yaml"])
def test_the_nano_recipes_judge_every_kind_and_keep_their_splits_apart(name):
    loaded = load_recipe(Path(vlpost.recipes.__file__).parent / name)
    (_, train), (_, measure) = loaded.stages
    assert (train.method, measure.method) == ("sft", "evaluate")
    assert (train.data.split, train.validation.data.split, measure.data.split) == ("train", "validation", "test")
    assert train.data.tasks == train.validation.data.tasks == measure.data.tasks
    assert train.data.languages == train.validation.data.languages == measure.data.languages == ("en",)
    fitting = {"compare": "choice", "find": "box", "video": "time_span"}
    for kind in train.data.tasks:
        judges = [part.use for part in measure.rewards.components.values() if part.tasks is None or kind in part.tasks]
        assert judges == [fitting.get(kind, "count")]


def test_thinking_rows_need_the_template_that_opens_a_think_block():
    (_, train), _ = load_recipe(Path(vlpost.recipes.__file__).parent / "nano_cold_start.yaml").stages
    assert train.model.nano.thinking
    assert tuple(train.data.tasks) == ("sum2_steps",)
