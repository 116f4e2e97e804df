"""The penalty for repetition: loops in any language are found, honest tables, code and lists are not."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.rewards.config import RewardConfigError
from vlpost.rewards.registry import check_options
from vlpost.rewards.repetition import REWARDS, parts, repeated_frac, repetition, units

PROSE = (
    "The train leaves the station at nine and reaches the coast before noon. We count the passengers at each stop, add those who "
    "board and subtract those who leave. After the second stop there are forty people on board, which is eight more than at the start."
)
CHINESE = (
    "火车九点离开车站，中午以前到达海边。我们在每一站数一数乘客，加上上车的人，减去下车的人。第二站之后车上有四十个人，比开始时多八个。"
)
CODE = '''
def add(first, second):
    """Return the sum."""
    total = first + second
    return total

def subtract(first, second):
    """Return the difference."""
    total = first - second
    return total

class Counter:
    def __init__(self, start, step):
        self.start = start
        self.step = step
        self.value = start

    def up(self):
        self.value += self.step
        return self.value

    def down(self):
        self.value -= self.step
        return self.value

for i in range(len(rows)):
    for j in range(len(rows[i])):
        if rows[i][j] > best:
            best = rows[i][j]
'''
HONEST = {
    "prose": PROSE,
    "chinese": CHINESE,
    "code": CODE,
    "multiplication table": "\n".join(f"{a} x {b} = {a * b}" for a in range(1, 11) for b in range(1, 11)),
    "multiplication in words": "\n".join(f"{a} times {b} is {a * b}" for a in range(1, 11) for b in range(1, 11)),
    "chinese multiplication": "\n".join(f"{a}乘以{b}等于{a * b}。" for a in range(1, 10) for b in range(1, 10)),
    "markdown table": "| city | country | people |\n|---|---|---|\n"
    + "\n".join(f"| town {i} | land {i % 7} | {i * i} |" for i in range(40)),
    "html table": "<table>" + "".join(f"<tr><td>{i}</td><td>{i * i}</td></tr>" for i in range(40)) + "</table>",
    "matrix": "\\begin{pmatrix}" + " \\\\ ".join(" & ".join("0" if i != j else "1" for j in range(8)) for i in range(8)) + "\\end{pmatrix}",
    "list": "\n".join(f"- Step {i}: look at picture {i}, then write down number {i * 3}." for i in range(1, 30)),
    "json": "[" + ", ".join(f'{{"label": "car", "bbox_2d": [{i}, {i * 2}, {i * 3}, {i * 5}]}}' for i in range(30)) + "]",
    "rules": "-" * 150 + "\n" + PROSE + "\n" + "=" * 150,
    "laughter": "ha ha ha, she said, very very very good.",
    "hash": "".join(random.Random(5).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=2000)),
}
LOOPS = {
    "one word": "the " * 200,
    "after prose": PROSE + " the" * 400,
    "phrase": "I need to check this again. " * 60,
    "no spaces": "ha" * 1000,
    "one letter": "a" * 5000,
    "chinese phrase": "我需要再检查一下。" * 60,
    "chinese character": "好" * 400,
    "japanese phrase": "もう一度確認します。" * 60,
    "numbers": "1 2 3 " * 400,
    "marks": "! " * 2000,
    "long period": "\n".join(str(i % 70) for i in range(3000)),
    "code": "x = 1;\n" * 400,
    "mixed": "so 答案 is 答案 " * 80,
}


@pytest.fixture(scope="module")
def penalty(make_example, make_rollout):
    def value(text, **options):
        return repetition(make_example(), make_rollout(text), **options).value

    return value


@pytest.mark.parametrize("name", HONEST)
def test_honest_texts_are_not_penalised(penalty, name):
    assert penalty(HONEST[name]) == 0.0


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_penalised(penalty, name):
    assert penalty(LOOPS[name]) > 0.8 if name != "after prose" else penalty(LOOPS[name]) > 0.7


def test_a_paragraph_that_comes_twice_is_half_of_the_text(penalty):
    assert penalty(PROSE + "\n\n" + PROSE, tolerated_frac=0.0) == 0.5
    assert penalty(CHINESE + "\n\n" + CHINESE, tolerated_frac=0.0) == 0.5
    assert penalty(PROSE + "\n\n" + CHINESE + "\n\n" + PROSE) > 0.2


def test_the_value_is_what_the_formula_says(make_example, make_rollout):
    # 30 units; the first 12-gram is new, each of the other 18 stood before, and together they cover all units but the first.
    judged = repetition(make_example(), make_rollout("the " * 30), tolerated_frac=0.2)
    assert judged.value == pytest.approx((29 / 30 - 0.2) / 0.8)
    assert judged.metrics == {"repeated_frac": 29 / 30}
    assert judged.note == "97% of a part is repeated"
    assert repeated_frac("the " * 12) == 0.0
    assert repeated_frac("the " * 13) == 12 / 13


def test_the_answer_may_say_again_what_the_thinking_found(penalty):
    assert penalty(f"<think>{PROSE}</think>{PROSE}") == 0.0
    assert penalty(f"{PROSE}</think>{PROSE}") == 0.0


def test_a_long_clean_part_does_not_water_down_one_that_loops(penalty):
    clean = " ".join(f"word{i}" for i in range(5000))
    assert penalty(f"<think>{clean}</think>" + "so it is " * 20) > 0.9
    assert penalty("<think>" + "so it is " * 20 + f"</think>{clean}") > 0.9
    assert penalty("so it is " * 20) > 0.9


def test_a_repetition_beyond_the_window_does_not_count(penalty):
    between = " ".join(f"word{i}" for i in range(300))
    text = f"{PROSE} {between} {PROSE}"
    assert penalty(text, window=1000) > 0.0
    assert penalty(text, window=100) == 0.0


def test_a_longer_gram_finds_less(penalty):
    text = "we add them up and write it down then. " + CHINESE + " we add them up and write it down now."
    assert penalty(text, n=6, tolerated_frac=0.0) > 0.0
    assert penalty(text, n=12, tolerated_frac=0.0) == 0.0


def test_units_are_words_characters_and_marks():
    assert units("It's 猫们, カナ 3.5x") == ["it", "'", "s", "猫", "们", ",", "カ", "ナ", "3", ".", "5x"]
    assert units("b" * 32) == ["b" * 32]
    assert units("b" * 34) == ["b", "b", "b" * 32]
    assert parts("<think>a</think>b") == ("a", "b")
    assert parts("a") == ("a",)
    assert parts(" </think> ") == ()


def _repeated_frac_by_definition(text, *, n, window):
    sequence = units(text)
    repeated = set()
    for length, only_words in ((n, True), (16 * n, False)):
        for start in range(len(sequence) - length + 1):
            gram = sequence[start : start + length]
            if only_words and 2 * sum(any(c.isalpha() for c in unit) for unit in gram) < length:
                continue
            if any(sequence[before : before + length] == gram for before in range(max(0, start - window), start)):
                repeated.update(range(start, start + length))
    return len(repeated) / len(sequence) if len(sequence) > n else 0.0


@given(st.lists(st.sampled_from(["a", "b", "1", "我", "."]), max_size=150), st.integers(1, 7), st.sampled_from([3, 20, 1000]))
def test_the_share_is_that_of_the_definition(tokens, n, window):
    text = " ".join(tokens)
    assert repeated_frac(text, n=n, window=window) == _repeated_frac_by_definition(text, n=n, window=window)


@given(st.text() | st.text(alphabet="ab我。 \n<>/think1", max_size=300))
def test_every_text_has_a_value_between_0_and_1(make_example, make_rollout, text):
    assert 0.0 <= repetition(make_example(), make_rollout(text), n=4).value <= 1.0


@pytest.mark.parametrize("text", ["a" * 100_000, "a " * 50_000, "我" * 100_000, "|" * 100_000, " " * 100_000, "ab" * 32 * 1500, ""])
def test_texts_of_100_kb_have_a_value(penalty, text):
    assert penalty(text) == (0.0 if not text.strip() else pytest.approx(1.0, abs=0.01))


@pytest.mark.parametrize(("option", "value"), [("n", 2), ("n", 65), ("window", 10), ("tolerated_frac", 1.0), ("tolerated_frac", -0.1)])
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(RewardConfigError, match=f"option {option} = {value}"):
        check_options("repetition", repetition, {option: value}, kind="row")


def test_the_penalty_of_a_right_answer_is_none(make_example, make_rollout):
    entry = REWARDS["repetition"]
    example = make_example("12")
    assert entry.function(example, make_rollout(entry.gold_response(example))).value == entry.gold_value == 0.0
