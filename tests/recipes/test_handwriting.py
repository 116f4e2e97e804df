"""The handwriting track: the same examples everywhere, exact answers, no scan in two splits, a constant mix."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from vlpost.model.records import DataError, ImagePart, Rollout
from vlpost.recipes.example_stream import fingerprint
from vlpost.recipes.handwriting import (
    LANGUAGES,
    handwriting_example,
    handwriting_examples,
    tokenizer_corpus,
)
from vlpost.recipes.handwriting_scans import FORM_STARTS, SPLIT_SCANS, hash_key
from vlpost.rewards.visual_answer import check_choice_answer, check_count_answer, choice, count

# The kinds that the track began with; test_handwriting_kinds.py has the later ones.
FIRST_KINDS = ("read", "add", "count", "compare", "arithmetic")
ALL = dict.fromkeys(FIRST_KINDS, 1.0)
WITH_IMAGE = tuple(kind for kind in FIRST_KINDS if kind != "arithmetic")
SPLITS = tuple(SPLIT_SCANS)

PINNED = [
    ("train", 0, "add", "两个数字相加等于多少？用\\boxed{}作答。", "1+1=\\boxed{2}", [1178, 731], "2eb54631fb0229b1"),
    ("train", 1, "arithmetic", "7-5等于多少？用\\boxed{}作答。", "7-5=\\boxed{2}", [], None),
    (
        "train",
        7,
        "compare",
        "Which number is larger? A: the first, B: the second, C: equal. Answer in \\boxed{}.",
        "56>17:\\boxed{A}",
        [930, 989, 1117, 793],
        "e0bcb64054db771e",
    ),
    (
        "validation",
        2,
        "add",
        "What do the two digits add up to? Answer in \\boxed{}.",
        "3+1=\\boxed{4}",
        [1477, 1514],
        "b7ab58aecd29a401",
    ),
    (
        "test",
        123456,
        "count",
        "How often is the digit 3 written here? Answer in \\boxed{}.",
        "398:\\boxed{1}",
        [1680, 1665, 1675],
        "8c1b01172e5facbf",
    ),
]


@pytest.fixture(scope="module")
def digits():
    """The data set, read by this test's own hand."""
    return load_digits()


@pytest.fixture(scope="module")
def many():
    """Two thousand examples of each split."""
    return {split: handwriting_examples(split, tasks=ALL, num_examples=2000, seed=5, with_solution=True) for split in SPLITS}


def expected(example):
    """Returns (answer, solution) worked out from the metadata alone."""
    shown = example.metadata["digits"]
    match example.task:
        case "read":
            answer = str(sum(digit * 10**place for place, digit in enumerate(reversed(shown))))
            return answer, f"\\boxed{{{answer}}}"
        case "add":
            first, second = shown
            return str(first + second), f"{first}+{second}=\\boxed{{{first + second}}}"
        case "count":
            answer = shown.count(example.metadata["target"])
            return str(answer), "".join(map(str, shown)) + f":\\boxed{{{answer}}}"
        case "compare":
            first, second = example.metadata["numbers"]
            assert [int(digit) for digit in f"{first}{second}"] == shown
            answer, sign = ("C", "=") if first == second else ("A", ">") if first > second else ("B", "<")
            return answer, f"{first}{sign}{second}:\\boxed{{{answer}}}"
        case "arithmetic":
            left, right = example.metadata["operands"]
            sign = example.metadata["sign"]
            answer = {"+": left + right, "-": left - right}[sign]
            return str(answer), f"{left}{sign}{right}=\\boxed{{{answer}}}"
    raise AssertionError(f"no expectation for {example.task}")


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


@pytest.mark.parametrize(("split", "index", "kind", "question", "solution", "scans", "digest"), PINNED)
def test_examples_are_those_of_every_other_machine(split, index, kind, question, solution, scans, digest):
    example = handwriting_example(split, index, tasks=ALL, seed=0, with_solution=True)
    assert example.id == f"handwriting/{split}/{kind}/{index:06d}"
    assert (example.task, example.source) == (kind, "handwriting")
    assert [(message.role, message.text) for message in example.messages] == [("user", question), ("assistant", solution)]
    assert example.metadata["scans"] == scans
    assert [part.digest[:16] for part in example.media] == [digest] * bool(digest)
    assert example.answer == solution.split("{")[1].removesuffix("}")


@pytest.mark.parametrize(
    ("split", "seed", "change", "mark"),
    [
        ("train", 3, {}, "d9a6f20c5bb94040"),
        ("validation", 0, {"tasks": {"add": 1.0, "compare": 2.0}, "languages": ("en",), "with_solution": False}, "84079b9629b8c134"),
        ("test", 12, {"digit_pixels": (16, 32)}, "54c812effb22b370"),
    ],
)
def test_the_first_kinds_stay_what_they_were_when_kinds_are_added(split, seed, change, mark):
    settings = {"tasks": ALL, "num_examples": 400, "with_solution": True} | change
    assert fingerprint(handwriting_examples(split, seed=seed, **settings)) == mark


def test_the_corpus_and_with_it_every_nano_tokenizer_stays_what_it_was():
    digest = hashlib.sha256("\x00".join(tokenizer_corpus()).encode()).hexdigest()
    assert digest == "78f7a8e8cd8f4b2cbe274ac6febf6d231a40e73e1012ad444e494c07b6271feb"


def test_another_process_with_other_hash_seeds_draws_the_same():
    program = (
        "from vlpost.recipes.handwriting import *; from vlpost.recipes.example_stream import fingerprint; "
        f"print(fingerprint(handwriting_examples('test', tasks={ALL!r}, num_examples=40, seed=11, with_solution=True)))"
    )
    outcome = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    # From the end to the beginning: nothing may depend on what was drawn before.
    backwards = [handwriting_example("test", index, tasks=ALL, seed=11, with_solution=True) for index in reversed(range(40))]
    assert outcome.stdout.strip() == fingerprint(backwards[::-1])


def test_importing_and_the_corpus_need_neither_sklearn_nor_a_heavy_library():
    program = """
import sys
from vlpost.recipes.handwriting import handwriting_example, tokenizer_corpus
assert len(list(tokenizer_corpus())) > 1000
handwriting_example("train", 0, tasks={"arithmetic": 1}, seed=0, with_solution=False)
print([name for name in ("sklearn", "numpy", "scipy", "torch", "transformers", "vllm") if name in sys.modules])
"""
    outcome = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert outcome.stdout.strip() == "[]"


def test_splits_are_whole_forms_and_hold_every_digit(digits):
    rows = [scan for split in SPLITS for scan in SPLIT_SCANS[split]]
    assert rows == list(range(len(digits.target)))
    assert {split: len(scans) for split, scans in SPLIT_SCANS.items()} == {"train": 1287, "validation": 258, "test": 252}
    for split in SPLITS:
        assert SPLIT_SCANS[split].start in FORM_STARTS
        assert min(np.bincount(digits.target[SPLIT_SCANS[split]], minlength=10)) >= 22


def test_every_form_repeats_the_sequence_of_labels(digits):
    # A form lacks up to eight of the first form's 130 labels and keeps the order of the others; one label of all differs.
    labels = digits.target.tolist()
    forms = [labels[start:end] for start, end in pairwise((*FORM_STARTS, len(labels)))]
    assert len(forms) == 14
    assert all(122 <= len(form) <= 130 for form in forms)
    assert sum(len(form) - _longest_common_subsequence(forms[0], form) for form in forms) == 1
    # The boundaries themselves: each form goes on where the one before it has come to an end.
    assert all(form[:4] in ([0, 1, 2, 3], [1, 2, 3, 4]) for form in forms)
    assert all(set(form[-2:]) <= {0, 8, 9, 3} for form in forms)


def _longest_common_subsequence(first, second):
    lengths = [0] * (len(second) + 1)
    for label in first:
        before = lengths[:]
        for place, other in enumerate(second, start=1):
            lengths[place] = before[place - 1] + 1 if label == other else max(before[place], lengths[place - 1])
    return lengths[-1]


def test_no_two_scans_are_the_same_picture(digits):
    assert len({scan.tobytes() for scan in digits.images}) == len(digits.images)


def test_no_scan_is_in_two_splits_and_all_are_used(many):
    shown = {split: {scan for example in examples for scan in example.metadata["scans"]} for split, examples in many.items()}
    for split, scans in shown.items():
        assert scans <= set(SPLIT_SCANS[split])
        # About 5,200 scans drawn: more than 4 for every one of the largest split.
        assert len(scans) > 0.97 * len(SPLIT_SCANS[split])
    assert sum(map(len, shown.values())) == len(set().union(*shown.values()))


def test_answers_and_solutions_follow_from_the_metadata(many, digits):
    checked = Counter()
    for example in (example for examples in many.values() for example in examples):
        assert (example.answer, example.messages[1].text) == expected(example)
        assert [digits.target[scan] for scan in example.metadata["scans"]] == example.metadata["digits"]
        checked[example.task] += 1
    assert min(checked[kind] for kind in FIRST_KINDS) > 1000


def test_the_question_says_what_the_metadata_says(many):
    for example in (example for examples in many.values() for example in examples):
        question = example.messages[0].text
        numerals = [int(word) for word in "".join(c if c.isdigit() else " " for c in question).split()]
        asked = {"count": [example.metadata.get("target")], "arithmetic": example.metadata.get("operands")}
        assert numerals == asked.get(example.task, [])
        assert "\\boxed{}" in question
        assert any("\u4e00" <= letter <= "\u9fff" for letter in question) == (example.metadata["language"] == "zh")
        if example.task == "arithmetic":
            assert example.metadata["sign"] in question
        if example.task == "compare":
            assert all(f"{letter}:" in question.replace("：", ":") for letter in "ABC")


def test_rewards_read_the_answers_and_pay_for_the_solutions(many):
    paid = Counter()
    for example in many["test"]:
        verify, check = (choice, check_choice_answer) if example.task == "compare" else (count, check_count_answer)
        check(example)
        # Written as one would: the solution of a text row is what a perfect policy responds.
        assert verify(example, respond(example.messages[1].text)).value == 1.0
        wrong = {"A": "B", "B": "C", "C": "A"}.get(example.answer) or str(int(example.answer) + 1)
        assert verify(example, respond(f"\\boxed{{{wrong}}}")).value == 0.0
        paid[example.task] += 1
    assert min(paid[kind] for kind in FIRST_KINDS) > 300


def test_what_is_asked_covers_its_range_evenly():
    def answers(kind):
        examples = handwriting_examples("train", tasks={kind: 1}, num_examples=3000, seed=2, with_solution=False)
        return examples, Counter(example.answer for example in examples)

    examples, read = answers("read")
    assert {len(answer) for answer in read} == {1, 2, 3}
    assert all(abs(number / 1000 - 1) < 0.1 for number in Counter(len(e.metadata["digits"]) for e in examples).values())
    assert all(answer == str(int(answer)) for answer in read)
    assert set(answers("add")[1]) == {str(total) for total in range(19)}
    examples, counts = answers("count")
    assert set(counts) == set("0123")
    assert all(abs(number / 750 - 1) < 0.15 for number in counts.values())
    assert {len(e.metadata["digits"]) for e in examples} == {3, 4, 5, 6}
    # Every place of the row holds the target equally often: the shuffle has no favourite.
    six = [e for e in examples if len(e.metadata["digits"]) == 6]
    places = Counter(place for e in six for place, digit in enumerate(e.metadata["digits"]) if digit == e.metadata["target"])
    assert all(abs(number / (1.5 * len(six) / 6) - 1) < 0.25 for number in places.values())
    examples, letters = answers("compare")
    assert set(letters) == set("ABC")
    assert all(abs(number / 1000 - 1) < 0.1 for number in letters.values())
    lengths = {(len(str(e.metadata["numbers"][0])), len(str(e.metadata["numbers"][1]))) for e in examples}
    assert lengths == {(1, 1), (1, 2), (2, 1), (2, 2)}
    examples, _ = answers("arithmetic")
    assert len({(*e.metadata["operands"], e.metadata["sign"]) for e in examples}) == 155


def test_two_scans_of_one_number_are_chosen_apart():
    examples = handwriting_examples("train", tasks={"compare": 1}, num_examples=300, seed=0, with_solution=False)
    equal = [e.metadata["scans"] for e in examples if e.answer == "C"]
    assert len(equal) > 60
    assert sum(scans[: len(scans) // 2] == scans[len(scans) // 2 :] for scans in equal) <= 3


@pytest.mark.parametrize("kind", WITH_IMAGE)
@pytest.mark.parametrize("digit_pixels", [(64, 64), (32, 64), (8, 8)])
def test_the_image_shows_the_scans_in_order(kind, digit_pixels, digits):
    width, height = digit_pixels
    for index in range(20):
        example = handwriting_example("train", index, tasks={kind: 1}, seed=1, with_solution=False, digit_pixels=digit_pixels)
        image, text = example.messages[0].parts
        assert isinstance(image, ImagePart)
        assert image.image.mode == "RGB"
        assert text.text
        scans = list(example.metadata["scans"])
        if kind == "compare":
            scans.insert(len(str(example.metadata["numbers"][0])), None)
        assert image.image.size == (width * len(scans), height)
        pixels = np.asarray(image.image, dtype=float)
        for place, scan in enumerate(scans):
            cell = pixels[:, place * width : (place + 1) * width]
            assert (cell[..., 0] == cell[..., 1]).all()
            assert (cell[..., 1] == cell[..., 2]).all()
            if scan is None:
                assert not cell.any()
                continue
            # The mean over what one scan pixel became is that pixel, blurred a little by the bicubic filter.
            means = cell[..., 0].reshape(8, height // 8, 8, width // 8).mean(axis=(1, 3)) / 255 * 16
            assert np.abs(digits.images - means).mean(axis=(1, 2)).argmin() == scan


def test_at_its_own_size_a_scan_is_itself(digits):
    example = handwriting_example("test", 3, tasks={"add": 1}, seed=1, with_solution=False, digit_pixels=(8, 8))
    grey = np.asarray(example.media[0].image)[..., 0]
    left, right = example.metadata["scans"]
    assert (grey == np.rint(np.concatenate([digits.images[left], digits.images[right]], axis=1) / 16 * 255)).all()


def test_text_only_arithmetic_has_no_image(many):
    for example in many["train"]:
        assert len(example.media) == (example.task != "arithmetic")


@given(
    split=st.sampled_from(SPLITS),
    index=st.integers(0, 10**9),
    seed=st.integers(-5, 2**63),
    tasks=st.dictionaries(st.sampled_from(FIRST_KINDS), st.floats(1e-3, 1e3), min_size=1),
    languages=st.lists(st.sampled_from(LANGUAGES), min_size=1, unique=True),
)
@settings(max_examples=150, deadline=None)
def test_any_index_gives_a_whole_example(split, index, seed, tasks, languages):
    example = handwriting_example(split, index, tasks=tasks, languages=languages, seed=seed, with_solution=False)
    solved = handwriting_example(split, index, tasks=tasks, languages=languages, seed=seed, with_solution=True)
    assert example.id == f"handwriting/{split}/{example.task}/{index:06d}"
    assert example.task in tasks
    assert example.metadata["language"] in languages
    assert [message.role for message in example.messages] == ["user"]
    assert [message.role for message in solved.messages] == ["user", "assistant"]
    assert solved.messages[:1] == example.messages
    assert (solved.id, solved.answer, solved.metadata) == (example.id, example.answer, example.metadata)
    assert (example.answer, solved.messages[1].text) == expected(example)
    assert set(example.metadata["scans"]) <= set(SPLIT_SCANS[split])
    assert json.loads(json.dumps(example.metadata)) == example.metadata


@given(
    start=st.integers(0, 10**7),
    size=st.integers(1, 1000),
    seed=st.integers(0, 1000),
    tasks=st.dictionaries(st.sampled_from(FIRST_KINDS), st.floats(0.01, 100), min_size=1),
)
@settings(max_examples=60, deadline=None)
def test_any_window_has_the_mix(start, size, seed, tasks):
    # The mix is a function of the settings alone; drawing the images of each window would take minutes.
    from vlpost.recipes import handwriting

    mix = handwriting._mix(tuple(tasks.items()), LANGUAGES)
    phase = hash_key("phase", "train", seed) % 2**64
    found = Counter(mix.at(index, phase=phase) for index in range(start, start + size))
    for kind, share in tasks.items():
        for language in LANGUAGES:
            planned = size * share / sum(tasks.values()) / len(LANGUAGES)
            assert abs(found[kind, language] - planned) < 4
    one = handwriting_example("train", start, tasks=tasks, seed=seed, with_solution=False)
    assert (one.task, one.metadata["language"]) == mix.at(start, phase=phase)


def test_the_mix_of_two_thousand_is_the_one_asked_for():
    tasks = {"add": 3, "read": 1}
    examples = handwriting_examples("train", tasks=tasks, num_examples=2000, seed=9, with_solution=False)
    found = Counter((example.task, example.metadata["language"]) for example in examples)
    planned = {("add", "en"): 750, ("add", "zh"): 750, ("read", "en"): 250, ("read", "zh"): 250}
    assert found.keys() == planned.keys()
    assert all(abs(found[cell] - planned[cell]) <= 3 for cell in planned)


def test_order_and_scale_of_the_settings_change_nothing_and_all_else_does():
    def mark(tasks=None, languages=("en", "zh"), split="train", seed=0):
        tasks = tasks or {"add": 1, "count": 3}
        return fingerprint(handwriting_examples(split, tasks=tasks, languages=languages, num_examples=30, seed=seed, with_solution=True))

    assert mark() == mark(tasks={"count": 3, "add": 1}) == mark(tasks={"add": 10, "count": 30}) == mark(languages=("zh", "en"))
    others = [mark(tasks={"add": 3, "count": 1}), mark(languages=("en",)), mark(split="test"), mark(seed=1), mark(seed=10)]
    assert len({mark(), *others}) == 1 + len(others)


def test_ids_are_unique(many):
    ids = [example.id for examples in many.values() for example in examples]
    assert len(set(ids)) == len(ids) == 6000


def test_questions_hardly_repeat():
    examples = handwriting_examples("train", tasks=dict.fromkeys(WITH_IMAGE, 1), num_examples=1000, seed=0, with_solution=False)
    assert len({(example.messages[0].text, example.media[0].digest) for example in examples}) > 980


def test_the_corpus_holds_every_phrasing_and_solution_shape():
    corpus = list(tokenizer_corpus())
    assert corpus == list(tokenizer_corpus())
    shapes = {_shape(text) for text in corpus}
    assert {"system\n", "user\n", "assistant\n"} <= shapes
    drawn = handwriting_examples("test", tasks=ALL, num_examples=1500, seed=4, with_solution=True)
    phrasings = {_shape(f"{message.role}\n{message.text}") for example in drawn for message in example.messages}
    assert phrasings - shapes == set()
    # Three phrasings of five kinds in two languages; arithmetic has two signs.
    assert sum(text.startswith("user") for text in phrasings) == 5 * 2 * 3 + 2 * 3
    assert {digit for text in corpus for digit in text if digit.isdigit()} == set("0123456789")


def _shape(text):
    """Returns the text with its digits as one mark."""
    return "".join("#" if letter.isdigit() else letter for letter in text)


def test_a_tokenizer_of_the_corpus_writes_solutions_in_few_tokens():
    # Digits are one token each in Qwen's splitting; the longest solution has seven of them.
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=490, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(tokenizer_corpus(), trainer)
    examples = handwriting_examples("train", tasks=ALL, num_examples=500, seed=0, with_solution=True)
    assert max(len(tokenizer.encode(example.messages[1].text).ids) for example in examples) < 13
    assert max(len(tokenizer.encode(example.messages[0].text).ids) for example in examples) < 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": {"reads": 1}}, ["unknown task 'reads'", "did you mean 'read'?", "read, add, count, compare, arithmetic"]),
        ({"tasks": {"xyz": 1}}, ["unknown task 'xyz'", ": give one of read, add"]),
        ({"tasks": {"add": 0}}, ["tasks.add = 0", "above 0"]),
        ({"tasks": {"add": 1, "read": -0.5}}, ["tasks.read = -0.5", "above 0"]),
        ({"tasks": {"add": float("nan")}}, ["tasks.add = nan"]),
        ({"tasks": {"add": float("inf")}}, ["tasks.add = inf"]),
        ({"tasks": {}}, ["tasks: empty", "read, add, count, compare, arithmetic"]),
        ({"languages": ("en", "zhs")}, ["unknown language 'zhs'", "did you mean 'zh'?", "en, zh"]),
        ({"languages": ()}, ["languages = []", "en, zh"]),
        ({"languages": ("en", "en")}, ["languages = ['en', 'en']", "each once"]),
        ({"split": "valid"}, ["unknown split 'valid'", "did you mean 'validation'?", "train, validation, test"]),
        ({"index": -1}, ["index = -1", "from 0"]),
        ({"digit_pixels": (64, 4)}, ["digit_pixels = (64, 4)", "8 to 512"]),
        ({"digit_pixels": (513, 64)}, ["digit_pixels = (513, 64)", "8 to 512"]),
    ],
)
def test_wrong_settings_are_named(change, words):
    settings = {"split": "train", "index": 0, "tasks": {"add": 1.0}, "seed": 0, "with_solution": False} | change
    split, index = settings.pop("split"), settings.pop("index")
    with pytest.raises(DataError) as caught:
        handwriting_example(split, index, **settings)
    assert [word for word in words if word not in str(caught.value)] == []


def test_no_examples_are_an_error():
    with pytest.raises(DataError, match="num_examples = 0: must be at least 1"):
        handwriting_examples("train", tasks=ALL, num_examples=0, seed=0, with_solution=False)
