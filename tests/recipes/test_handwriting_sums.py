"""Sums of two numbers of four digits, with the columns written out in the think block, and without."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import Rollout
from vlpost.recipes.example_stream import fingerprint
from vlpost.recipes.handwriting import TASK_KINDS, handwriting_example, handwriting_examples
from vlpost.recipes.handwriting_questions import sum_steps
from vlpost.rewards.visual_answer import check_count_answer, count

PINNED = {"sum4": "8b21ea1a1835f531", "sum4_steps": "cc0a50d0527bb1cd"}


def draw(kind, index=0, split="train"):
    return handwriting_example(split, index, tasks={kind: 1.0}, languages=("en",), seed=0, with_solution=True)


@pytest.mark.parametrize("kind", PINNED)
def test_examples_are_those_of_every_other_machine(kind):
    assert fingerprint(handwriting_examples("test", tasks={kind: 1}, num_examples=30, seed=0, with_solution=True)) == PINNED[kind]


def test_the_kinds_stand_at_the_end_so_that_no_older_mix_changes():
    assert TASK_KINDS[-2:] == ("sum4", "sum4_steps")


@given(st.integers(1, 6).flatmap(lambda n: st.tuples(*[st.integers(10 ** (n - 1), 10**n - 1)] * 2)))
def test_every_written_column_is_true_and_their_last_digits_are_the_sum(numbers):
    left, right = numbers
    read, columns = sum_steps(left, right).split(":")
    assert read == f"{left}+{right}"
    digits, carry = "", 0
    for place, column in enumerate(columns.split(",")):
        terms, total = column.split("=")
        above, below, *carried = map(int, terms.split("+"))
        assert (above, below) == tuple(number // 10**place % 10 for number in numbers)
        assert carried == ([] if place == 0 else [carry])
        assert int(total) == above + below + sum(carried)
        digits, carry = total[-1] + digits, int(total) // 10
    assert int((str(carry) if carry else "") + digits) == left + right


def test_the_example_of_the_docstring():
    assert sum_steps(38, 47) == "38+47:8+7=15,3+4+1=8"
    assert sum_steps(3812, 4759) == "3812+4759:2+9=11,1+5+1=7,8+7+0=15,3+4+1=8"


def test_both_kinds_ask_the_same_and_the_answer_is_the_sum_of_what_is_shown():
    first = Counter()
    for index in range(60):
        plain, steps = draw("sum4", index, split="test"), draw("sum4_steps", index, split="test")
        assert plain.messages[0] == steps.messages[0]
        assert (plain.answer, plain.metadata) == (steps.answer, steps.metadata)
        shown = plain.metadata["digits"]
        operands = [int("".join(map(str, digits))) for digits in (shown[:4], shown[4:])]
        assert (operands, str(sum(operands))) == (plain.metadata["operands"], plain.answer)
        assert plain.messages[1].text == f"\\boxed{{{plain.answer}}}"
        assert steps.messages[1].text == f"<think>\n{sum_steps(*operands)}\n</think>\n\n\\boxed{{{plain.answer}}}"
        check_count_answer(steps)
        first[shown[0]] += 1
    assert set(first) == set(range(1, 10))


def test_the_reward_is_for_the_sum_alone():

    def paid(example, text):
        drawn = Rollout(
            token_ids=(1,), sampled=(True,), sampler_logprobs=(0.0,), media=(), text=text, prompt_suffix="", finish_reason="stop",
            policy_version=0,
        )  # fmt: skip
        return count(example, drawn).value

    example = draw("sum4_steps")
    assert paid(example, example.messages[1].text) == 1.0
    assert paid(example, f"\\boxed{{{int(example.answer) + 1}}}") == 0.0
