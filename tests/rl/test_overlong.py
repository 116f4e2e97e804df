"""Responses that are too long: masked by one rule in advantages and loss, or taken down in their reward."""

import pytest
from pydantic import ValidationError
from vlpost.model.records import Example, Message, Rollout, TextPart
from vlpost.rewards import JudgedRollout, RolloutScore, ScoredGroup, UnjudgedRollout
from vlpost.rl.config import RlConfig
from vlpost.rl.overlong import with_overlong_rule
from vlpost.rl.train import policy_families

STEP = {"num_steps": 1, "prompts_per_step": 1, "group_size": 4, "num_mini_batches": 1}
PENALTY = {"use": "penalty", "max_tokens": 10, "buffer_tokens": 4, "weight": 0.5}


def rollout(length, *, cut=False):
    return Rollout(
        token_ids=(1, *range(10, 10 + length)),
        sampled=(False, *[True] * length),
        sampler_logprobs=(0.0, *[-0.5] * length),
        media=(),
        text="",
        prompt_suffix="",
        finish_reason="length" if cut else "stop",
        policy_version=0,
    )


def group(*outcomes):
    """From (reward, length, cut off) triples; a reward of None could not be judged."""
    drawn = [(reward, rollout(length, cut=cut)) for reward, length, cut in outcomes]
    return ScoredGroup(
        example=Example(id="e", messages=(Message(role="user", parts=(TextPart(text="?"),)),), answer="", task="t", source="s"),
        judged=tuple(JudgedRollout(rollout=one, score=RolloutScore(reward=r, results={})) for r, one in drawn if r is not None),
        unjudged=tuple(UnjudgedRollout(rollout=one, reasons={"a": "?"}) for r, one in drawn if r is None),
    )


def config(overlong):
    return RlConfig.model_validate(STEP | {"overlong": overlong})


def rewards_of(groups):
    return [[one.score.reward for one in group.judged] for group in groups]


def test_without_a_rule_nothing_changes():
    groups = [group((1.0, 3, False), (0.0, 9, True))]
    assert with_overlong_rule(groups, config(None).overlong) == (groups, {})


def test_what_was_cut_off_is_in_neither_advantages_nor_loss():
    settings = config({"use": "mask"})
    groups = [group((1.0, 3, False), (0.0, 8, True), (0.0, 2, False), (None, 5, False))]
    masked, measured = with_overlong_rule(groups, settings.overlong)
    without = [group((1.0, 3, False), (0.0, 2, False), (None, 5, False))]
    assert rewards_of(masked) == [[1.0, 0.0]]
    assert [one.reasons for one in masked[0].unjudged] == [{"a": "?"}, {}]
    (family,), (expected,) = (policy_families(parts, settings) for parts in (masked, without))
    assert [(one.sequence.token_ids, one.sequence.targets, one.token_weight) for one in family] == [
        (one.sequence.token_ids, one.sequence.targets, one.token_weight) for one in expected
    ]
    assert (measured["overlong_masked_frac"].value, measured["overlong_masked_frac"].weight) == (pytest.approx(1 / 3), 3)


def test_a_group_that_masking_leaves_alone_or_alike_is_not_trained():
    settings = config({"use": "mask"})
    for outcomes in (((1.0, 3, False), (0.0, 8, True)), ((1.0, 3, False), (1.0, 2, False), (0.0, 8, True))):
        assert policy_families([group(*outcomes)], settings) != []
        masked, _ = with_overlong_rule([group(*outcomes)], settings.overlong)
        assert policy_families(masked, settings) == []


@pytest.mark.parametrize(("length", "penalty"), [(1, 0.0), (6, 0.0), (7, 0.125), (8, 0.25), (10, 0.5), (11, 0.5), (40, 0.5)])
def test_the_penalty_grows_over_the_buffer(length, penalty):
    groups, measured = with_overlong_rule([group((1.0, length, False), (0.0, 1, False))], config(PENALTY).overlong)
    assert rewards_of(groups) == [[1.0 - penalty, 0.0]]
    assert measured["overlong_penalty"].value == penalty / 2
    assert groups[0].judged[0].rollout == rollout(length)


def test_a_batch_in_which_nothing_was_judged_is_left_as_it_is():
    groups = [group((None, 3, True))]
    assert with_overlong_rule(groups, config(PENALTY).overlong) == (groups, {})


@pytest.mark.parametrize(
    ("overlong", "words"),
    [
        ({"use": "mask", "weight": 1.0}, "Extra inputs are not permitted"),
        ({"use": "penalty", "max_tokens": 10}, "Field required"),
        ({"use": "penalty", "max_tokens": 10, "buffer_tokens": 11}, "buffer_tokens = 11 is above max_tokens = 10"),
    ],
)
def test_wrong_settings_are_refused(overlong, words):
    with pytest.raises(ValidationError, match=words):
        config(overlong)


def test_the_step_learns_by_the_rule(make_stage, examples):
    stage = make_stage(overlong={"use": "mask"}, num_mini_batches=1)
    result = stage.step(0, examples, lambda: None)
    plain = make_stage(num_mini_batches=1)
    assert plain.step(0, examples, lambda: None).metrics["reward"] == result.metrics["reward"]
    assert result.metrics["overlong_masked_frac"] == pytest.approx(1 / 12)
    assert result.metrics["truncated_frac"] == pytest.approx(1 / 12)
    (batch,), (whole,) = ([batch for _, batch, _ in one.learner.losses] for one in (stage, plain))
    assert len(whole.sequences) - len(batch.sequences) == 1
