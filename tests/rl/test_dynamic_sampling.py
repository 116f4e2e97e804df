"""Groups without a signal are replaced by further groups of their task, the same on every rank and however often."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import Example, Message, Rollout, TextPart
from vlpost.rewards import JudgedRollout, RolloutScore, ScoredGroup
from vlpost.rl.dynamic_sampling import refill
from vlpost.rl.overlong import has_signal_left

ROLLOUT = Rollout(
    token_ids=(1, 2),
    sampled=(False, True),
    sampler_logprobs=(0.0, -0.5),
    media=(),
    text="",
    prompt_suffix="",
    finish_reason="stop",
    policy_version=0,
)


def example(number, task="t"):
    return Example(id=f"e{number}", messages=(Message(role="user", parts=(TextPart(text="?"),)),), answer="", task=task, source="s")


def group(example, *, has_signal):
    rewards = (0.0, 1.0 if has_signal else 0.0)
    judged = tuple(JudgedRollout(rollout=ROLLOUT, score=RolloutScore(reward=reward, results={})) for reward in rewards)
    return ScoredGroup(example=example, judged=judged, unjudged=())


def is_learned(group):
    return has_signal_left(group, None)


class Source:
    """Further examples, `size` at a time, and groups of them; which have a signal is drawn."""

    def __init__(self, tasks, signals, size):
        self.tasks, self.signals, self.size = tasks, signals, size
        self.taken, self.asked = 0, []

    def next_examples(self):
        numbers = range(100 + self.taken, 100 + self.taken + self.size)
        self.taken += self.size
        return [example(number, self.tasks[number % len(self.tasks)]) for number in numbers]

    def draw(self, examples):
        self.asked.append([one.id for one in examples])
        return [group(one, has_signal=self.signals[int(one.id[1:]) % len(self.signals)]) for one in examples]


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.booleans()), min_size=1, max_size=8),
    st.lists(st.booleans(), min_size=1, max_size=7),
    st.integers(1, 4),
)
def test_places_tasks_and_learned_groups_stay(first, signals, max_rounds):
    groups = [group(example(number, task), has_signal=learned) for number, (task, learned) in enumerate(first)]
    source = Source("ab", signals, len(first) + 1)
    done = refill(groups, max_rounds=max_rounds, next_examples=source.next_examples, draw=source.draw, is_learned=is_learned)
    assert [one.example.task for one in done.groups] == [task for task, _ in first]
    for before, after in zip(groups, done.groups, strict=True):
        assert is_learned(after) or after is before
        if is_learned(before):
            assert after is before
    assert [one.example.id for one in done.further] == [name for names in source.asked for name in names]
    assert len({one.example.id for one in done.further}) == len(done.further)
    missing = Counter(one.example.task for one in done.groups if not is_learned(one))
    # Every further group with a signal has a place: none is drawn for nothing.
    assert sum(map(is_learned, done.further)) == sum(not is_learned(one) for one in groups) - missing.total()
    assert done.metrics["missing_groups"].value == missing.total()
    assert done.metrics["refill_rounds"].value <= max_rounds
    if missing:
        assert done.metrics["refill_rounds"].value == max_rounds
    if all(signals):
        assert not missing or max_rounds < 3


def test_a_round_draws_as_many_as_are_missing_and_keeps_the_rest_for_the_next():
    groups = [group(example(number), has_signal=number < 1) for number in range(3)]
    source = Source("t", [True, False, False, False], 3)  # 100, 104, ... have a signal
    done = refill(groups, max_rounds=5, next_examples=source.next_examples, draw=source.draw, is_learned=is_learned)
    assert source.asked == [["e100", "e101"], ["e102"], ["e103"], ["e104"]]
    assert source.taken == 6
    assert [one.example.id for one in done.groups] == ["e0", "e100", "e104"]
    assert (done.metrics["refill_rounds"].value, done.metrics["refill_groups"].value, done.metrics["missing_groups"].value) == (4, 5, 0)


def test_nothing_is_drawn_where_every_group_has_a_signal():
    groups = [group(example(0), has_signal=True)]
    source = Source("t", [True], 1)
    done = refill(groups, max_rounds=3, next_examples=source.next_examples, draw=source.draw, is_learned=is_learned)
    assert (done.groups, done.further, source.asked, source.taken) == (groups, [], [], 0)


def test_a_rank_that_misses_nothing_goes_through_the_rounds_of_the_others():
    groups = [group(example(0), has_signal=True)]
    source, totals = Source("t", [True], 1), []

    def over_ranks(number):
        totals.append(number)
        return number + 1.0  # another rank misses a group in every round

    done = refill(groups, max_rounds=2, next_examples=source.next_examples, draw=source.draw, is_learned=is_learned, over_ranks=over_ranks)
    assert (done.further, source.asked, source.taken) == ([], [], 2)
    assert (totals, done.metrics["refill_rounds"].value) == ([0, 0, 0, 0], 2)


def test_a_step_learns_from_the_further_groups(make_stage, examples):
    from dataclasses import replace

    script = {
        "e0": ["1", "1", "1"], "e1": ["0", "0.5", "1"], "e2": ["0", "0", "0"], "e3": ["1", "0", "0"],
        "e4": ["1", "0", "1"], "e5": ["0", "0", "0"], "e6": ["0", "1", "0"], "e7": ["1", "1", "0"],
    }  # fmt: skip
    further = [replace(one, id=f"e{number}") for number, one in enumerate(examples, 4)]
    stage = make_stage(script, dynamic_sampling={"max_rounds": 2}, num_mini_batches=2)
    result = stage.step(0, examples, lambda: None, lambda: further)
    assert [[group.example.id for group in result.scored_groups]] == [["e0", "e1", "e2", "e3", "e4", "e5", "e6"]]
    assert result.metrics["refill_groups"] == 3
    assert result.metrics["missing_groups"] == 0
    learned = [{sequence.place.split(",")[0] for sequence in batch.sequences} for _, batch, _ in stage.learner.losses]
    assert learned == [{"e4", "e1"}, {"e6", "e3"}]
    assert result.metrics["reward"] == pytest.approx((3 + 1.5 + 0 + 1 + 2 + 0 + 1) / 21)
    assert result.metrics["sampled_tokens"] == sum(
        rollout.num_sampled_tokens for group in result.scored_groups for rollout in group.rollouts
    )
