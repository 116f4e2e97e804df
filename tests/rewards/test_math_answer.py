"""Mathematical answers: verdicts, and what hostile answers can do to the run and to their neighbours (nothing)."""

import pytest
from vlpost.model.records import DataError, Group
from vlpost.rewards import RewardManager, RewardResult, RewardsConfig
from vlpost.rewards.math_answer import MAX_ANSWER_CHARS, MAX_PREDICTION_CHARS, check_math_answer, expression, math_answer, request
from vlpost.rewards.worker import MAX_REQUEST_BYTES, WorkerPool

HOSTILE_ANSWERS = [
    "9^{9^{9}}",
    "10^{10^{10}}",
    "9**9**9**9",
    "(10^9)!",
    r"\binom{10^8}{5 \cdot 10^7}",
    "(x+y+z)^{300}",
    r"\sum_{n=1}^{10^9} n^n",
    r"\int_0^1 \frac{\ln(1+x^{2+\sqrt{3}})}{1+x} dx",
    r"\frac{1}{1+" * 60 + "x" + "}" * 60,
    "(" * 1400 + "1" + ")" * 1400,
    "e^{e^{e^{e^{79}}}}",
    r"\lfloor\pi^{10^6}\rfloor",
    "{" * 1400,
    r"\frac" * 500,
    "1" * 2900 + "!",
]


@pytest.mark.parametrize(
    ("answer", "text", "value"),
    [
        ("12", "12", 1.0),
        ("12", "12.", 1.0),
        ("12", "１２", 1.0),
        ("12", "$12$", 1.0),
        ("12", "**12**", 1.0),
        ("8", "2**3", 1.0),
        ("1/2", "$$0.5$$", 1.0),
        ("$\\frac12$", "1/2", 1.0),
        ("\\(3\\sqrt{2}\\)", "\\boxed{\\sqrt{18}}", 1.0),
        ("1234", "1,234", 1.0),
        ("4", "x = 4", 1.0),
        ("x^2+2x+1", "(x+1)^2", 1.0),
        ("12", "13", 0.0),
        ("12", "The answer is 12", 0.0),
        ("4", "4 or 5", 0.0),
        ("4", "4, 5", 0.0),
        ("1728", "1331 and 1728", 0.0),
        ("4", "$4$ is not the answer", 0.0),
        ("4", "\\boxed{4} \\boxed{5}", 0.0),
        ("4", "x=3=4", 0.0),
        ("4", "1=2=3=4", 0.0),
        ("12", "<think>12", 0.0),
        ("12", "", 0.0),
        ("12", "$$", 0.0),
        ("\\pi", "3.14159", 0.0),
    ],
)
def test_verdicts(answer, text, value, make_group, math_rewards):
    (scored,) = math_rewards.score([make_group(answer, text)])
    assert [judged.score.reward for judged in scored.judged] == [value]


@pytest.mark.parametrize("dress", ["{}", "${}$", "$${}$$", "\\({}\\)", "\\[{}\\]", " {}. ", "**{}**"])
@pytest.mark.parametrize("bare", ["\\frac{3}{7}", "12", "(1,2)", "x=4"])
def test_dress_of_the_answer_changes_nothing(dress, bare):
    assert expression(dress.format(bare)) == bare


def test_hostile_answers_end_and_cost_no_neighbour(make_group):
    config = RewardsConfig.model_validate({"components": {"answer": {"use": "math_answer"}}, "timeout_s": 0.4, "num_workers": 2})
    groups: list[Group] = [
        make_group("\\frac37", f"\\boxed{{{hostile}}}", "3/7", "4/7", number=number) for number, hostile in enumerate(HOSTILE_ANSWERS)
    ]
    with RewardManager(config, recipe_folder=None, allow_code=False) as rewards:
        scored = rewards.score(groups)
    assert len(scored) == 15
    for hostile, group in zip(HOSTILE_ANSWERS, scored, strict=True):
        assert [judged.score.reward for judged in group.judged] == [0.0, 1.0, 0.0], hostile[:40]
        assert group.unjudged == ()
    notes = [group.judged[0].score.results["answer"].note for group in scored]
    # Which of them hang depends on the machine; that some do is the point of the test.
    assert sum(note == "ungradable answer: no verdict in 0.4 s and then no verdict in 0.4 s" for note in notes) >= 5, notes


def test_answers_are_never_run(make_group, math_rewards: RewardManager, tmp_path):
    trace = tmp_path / "trace"
    payloads = [
        f"__import__('os').system('touch {trace}')",
        f"\\pi+len(open('{trace}','w').name)",
        f"[open('{trace}','w')]",
        f"\\begin{{pmatrix}} open('{trace}','w') \\end{{pmatrix}}",
        f"1+exec(\"open('{trace}','w')\")",
        f"{{x.__class__.__init__.__globals__}} $(touch {trace}) `touch {trace}`",
        f"\\input{{|touch {trace}}} \\write18{{touch {trace}}}",
        f"!!python/object/apply:os.system ['touch {trace}']",
    ]
    groups = [make_group("12", payload, f"\\boxed{{{payload}}}") for payload in payloads]
    rewards = [judged.score.reward for group in math_rewards.score(groups) for judged in group.judged]
    assert rewards == [0.0] * 16
    # As the right answer they reach the parser by its other door; which verdict that gives does not matter here.
    with WorkerPool("math_answer", num_workers=1, timeout_s=5.0) as pool:
        assert len(pool.judge([request(payload, prediction) for payload in payloads for prediction in ("12", payload)])) == 16
    assert list(tmp_path.iterdir()) == []


def test_length_is_bounded_before_a_worker_is_asked(make_example, make_rollout):
    verdict = math_answer(make_example("12"), make_rollout("1" * (MAX_PREDICTION_CHARS + 1)))
    assert isinstance(verdict, RewardResult)
    assert verdict.value == 0.0
    assert verdict.note == "a final answer of 3001 characters; at most 3000 are read"
    # The longest request of the dearest characters still fits what a pipe takes without waiting.
    longest = request("\U0001f600" * MAX_ANSWER_CHARS, "\U0001f600" * MAX_PREDICTION_CHARS)
    assert len(str(longest.arguments).encode("ascii", "backslashreplace")) * 12 // 10 + 200 < MAX_REQUEST_BYTES


@pytest.mark.parametrize(
    ("answer", "words"), [("", "an answer of 0 characters"), ("$ $", "an answer of 0"), ("1" * 1001, "1 to 1000 characters")]
)
def test_answers_that_cannot_be_compared_with_are_named(answer, words, make_example):
    with pytest.raises(DataError, match=rf"example 'add-3'.*{words}"):
        check_math_answer(make_example(answer, number=3))


def test_the_examples_own_answer_must_be_found_right(make_example, math_rewards):
    assert math_rewards.check_examples([make_example("$\\frac37$"), make_example("x=4", number=1)]) == 2
    with pytest.raises(DataError, match=r"example 'add-1': component 'answer' \(math_answer\) does not find its own answer '2\*\*' right"):
        math_rewards.check_examples([make_example("12"), make_example("2**", number=1)])
