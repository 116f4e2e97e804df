"""Every mini-batch has the task shares of its step, over all processes and in each."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import Example, Message, TextPart
from vlpost.recipes.data_config import MixData
from vlpost.recipes.example_stream import open_stream
from vlpost.recipes.strata import stratified


def example(number, task):
    return Example(
        id=f"e{number}", messages=(Message(role="user", parts=(TextPart(text="?"),)),), answer="", task=task, source="s", metadata={}
    )


@given(
    st.lists(st.sampled_from("abcde"), min_size=1, max_size=6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_each_task_has_its_share_in_each_mini_batch_and_in_each_process(kinds, num_mini_batches, num_ranks, per_part, dice):
    count = num_mini_batches * num_ranks * per_part
    examples = [example(number, dice.choice(kinds)) for number in range(count)]
    ordered = stratified(examples, num_mini_batches=num_mini_batches)
    assert sorted(row.id for row in ordered) == sorted(row.id for row in examples)
    of_step = Counter(row.task for row in examples)
    size = count // num_mini_batches
    parts = [ordered[start : start + size] for start in range(0, count, size)]
    # A process takes every n-th row of the step and cuts what it has into as many parts: the n-th rows of the parts.
    for rank in range(num_ranks):
        own = ordered[rank::num_ranks]
        cut = [own[start : start + per_part] for start in range(0, len(own), per_part)]
        assert cut == [part[rank::num_ranks] for part in parts]
    for task, number in of_step.items():
        for part in parts:
            in_part = sum(row.task == task for row in part)
            assert abs(in_part - number / num_mini_batches) < 1
            for rank in range(num_ranks):
                assert abs(sum(row.task == task for row in part[rank::num_ranks]) - in_part / num_ranks) < 1


def test_one_task_keeps_its_order_and_several_are_dealt():
    alone = [example(number, "a") for number in range(6)]
    assert stratified(alone, num_mini_batches=3) == alone
    mixed = [example(number, task) for number, task in enumerate("aaaabb")]
    assert [row.id for row in stratified(mixed, num_mini_batches=2)] == ["e0", "e2", "e4", "e1", "e3", "e5"]


def test_every_mini_batch_of_a_mix_has_its_constant_shares_in_every_step():
    parts = {
        name: {"share": share, "data": {"use": "handwriting", "tasks": {name: 1.0}}}
        for name, share in (("add", 2), ("read", 1), ("count", 1))
    }
    stream = open_stream(MixData.model_validate({"use": "mix", "parts": parts}), seed=0, with_solution=False)
    for step in range(5):
        ordered = stratified(stream.examples(step * 16, 16), num_mini_batches=4)
        for start in range(0, 16, 4):
            assert Counter(row.task for row in ordered[start : start + 4]) == {"add": 2, "read": 1, "count": 1}
