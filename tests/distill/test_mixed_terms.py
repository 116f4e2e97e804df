"""Task rewards beside the teacher, and conversations that nobody drew among the student's own responses, against formulas by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from vlpost.distill.config import OnPolicyDistillConfig
from vlpost.distill.step_loss import DrawnTargets
from vlpost.distill.train import Row
from vlpost.model.records import DataError, Message, TextPart, TrainSequence
from vlpost.model.rollouts import train_sequence
from vlpost.recipes.schema import OnPolicyDistillRecipe

CAP = 1.5
TASK_REWARDS = {"weight": 0.7, "policy_loss": {"name": "reinforce"}, "importance_cap": CAP}


def no_interrupt():
    """Nobody pressed Ctrl-C."""


def assert_same(found, expected, tolerance=2e-5):
    """Each gradient differs by at most `tolerance` of the norm of all."""
    assert found.keys() == expected.keys()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert norm > 1e-3
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= tolerance * norm, name


def reverse_kl(student, teacher):
    """Returns KL(student, teacher) [T] of full log-probs [T, V], banned ids left out."""
    allowed = student[0].isfinite()
    return (student[:, allowed].exp() * (student[:, allowed] - teacher[:, allowed])).sum(dim=-1)


@pytest.fixture
def conversations(chat, examples):
    """Returns two rows with an answer that the student did not write."""
    rows = []
    for number, answer in ((0, "seven"), (1, "it is 12")):
        messages = (*examples[number].messages, Message(role="assistant", parts=(TextPart(text=answer),)))
        example = dataclasses.replace(examples[number], id=f"c{number}", messages=messages)
        (branch,) = chat.encode_conversation(messages)
        targets = DrawnTargets(sampler_logprobs=(math.nan,) * sum(branch.trained))
        sequence = TrainSequence(place=example.id, token_ids=branch.token_ids, trained=branch.trained, media=branch.media, targets=targets)
        rows.append(Row(example=example, family=[sequence]))
    return rows


def test_task_rewards_add_their_policy_gradient_to_the_divergence(make_stage, plain_model, plain_teacher, all_logprobs, examples):
    stage = make_stage(task_rewards=TASK_REWARDS)
    result = stage.step(0, examples, no_interrupt)
    ((weights, gradients),) = stage.learner.updates
    plain_model.zero_grad()
    plain_model.load_state_dict(weights, strict=False)
    groups = result.scored_groups
    num_tokens = sum(judged.rollout.num_sampled_tokens for group in groups for judged in group.judged)
    for group in groups:
        rewards = np.array([judged.score.reward for judged in group.judged])
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        for number, (judged, advantage) in enumerate(zip(group.judged, advantages, strict=True)):
            row = train_sequence(group.example.id, number, judged.rollout, None)
            ids = torch.tensor(row.token_ids)[torch.tensor(row.trained)]
            student = all_logprobs(plain_model, row)
            with torch.no_grad():
                teacher = all_logprobs(plain_teacher, row)
            chosen = student.gather(-1, ids[:, None])[:, 0]
            weight = (chosen.detach() - torch.tensor(judged.rollout.drawn_logprobs)).exp().clamp(max=CAP)
            ((reverse_kl(student, teacher) - 0.7 * advantage * chosen * weight).sum() / num_tokens).backward()
    assert_same(gradients, {name: parameter.grad for name, parameter in plain_model.named_parameters()})
    assert result.metrics["reward"] == pytest.approx(np.mean([j.score.reward for group in groups for j in group.judged]))


def test_a_response_that_cannot_be_judged_still_follows_its_teacher(make_stage, plain_model, plain_teacher, all_logprobs, examples):
    script = {"e0": ["1", "?", "?"], "e1": ["0", "0", "0"], "e2": ["1", "1", "1"], "e3": ["?", "?", "?"]}
    stage = make_stage(script=script, task_rewards=TASK_REWARDS)
    result = stage.step(0, examples, no_interrupt)
    assert sum(len(group.unjudged) for group in result.scored_groups) == 5
    without = make_stage(script=script)
    without.step(0, examples, no_interrupt)
    # Fewer than two judged responses, or equal rewards: no group has an advantage, and the teacher alone decides on every token.
    assert_same(stage.learner.updates[0][1], without.learner.updates[0][1])
    assert result.metrics["trained_tokens"] == sum(
        scored.rollout.num_sampled_tokens for group in result.scored_groups for scored in (*group.judged, *group.unjudged)
    )


@pytest.mark.parametrize("num_mini_batches", [1, 2])
def test_conversations_are_taught_among_the_drawn_responses(
    make_stage, plain_model, plain_teacher, all_logprobs, examples, conversations, num_mini_batches
):
    stage = make_stage(num_mini_batches=num_mini_batches, off_policy_rows=2)
    result = stage.step(0, examples, no_interrupt, conversations)
    groups, size = result.scored_groups, 4 // num_mini_batches
    assert len(stage.learner.updates) == num_mini_batches
    for update, (weights, gradients) in enumerate(stage.learner.updates):
        plain_model.zero_grad()
        plain_model.load_state_dict(weights, strict=False)
        rows = [
            train_sequence(group.example.id, number, unjudged.rollout, None)
            for group in groups[update * size : (update + 1) * size]
            for number, unjudged in enumerate(group.unjudged)
        ]
        own = conversations if num_mini_batches == 1 else conversations[update : update + 1]
        rows += [sequence for row in own for sequence in row.family]
        num_tokens = sum(row.num_trained_tokens for row in rows)
        for row in rows:
            with torch.no_grad():
                teacher = all_logprobs(plain_teacher, row)
            (reverse_kl(all_logprobs(plain_model, row), teacher).sum() / num_tokens).backward()
        assert_same(gradients, {name: parameter.grad for name, parameter in plain_model.named_parameters()})


def test_metrics_of_drawn_tokens_do_not_count_conversations(make_stage, examples, conversations):
    drawn = make_stage().step(0, examples, no_interrupt).metrics
    mixed = make_stage(off_policy_rows=2).step(0, examples, no_interrupt, conversations).metrics
    for name in ("teacher_kl_k1", "engine_kl_k3", "response_tokens"):
        assert math.isfinite(mixed[name])
        assert mixed[name] == pytest.approx(drawn[name], rel=1e-4)
    assert mixed["trained_tokens"] == drawn["trained_tokens"] + sum(s.num_trained_tokens for row in conversations for s in row.family)


def test_a_conversation_with_an_image_is_refused_where_the_prompts_are_text(make_stage, examples, conversations):
    text_only = [example for example in examples if not example.media]
    with pytest.raises(DataError, match=r"has an image or a video, and distill.prompts is text"):
        make_stage(prompts="text", off_policy_rows=2).step(
            0, text_only, no_interrupt, [row for row in conversations if row.example.media] or conversations
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task_rewards": {"weight": 1.0}, "group_size": 1}, "group_size is 1: give at least 2"),
        ({"off_policy_rows": 2, "support": {"name": "sampled_token"}}, "right for tokens that the student drew alone"),
        ({"off_policy_rows": 3, "num_mini_batches": 2}, "off_policy_rows = 3 cannot be split into distill.num_mini_batches = 2"),
    ],
    ids=str,
)
def test_terms_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ValidationError) as caught:
        OnPolicyDistillConfig.model_validate({"num_steps": 1, "prompts_per_step": 4, "group_size": 2} | settings)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "data", "words"),
    [
        (4, None, "distill.off_policy_rows needs off_policy_data"),
        (0, {"use": "jsonl", "path": "rows.jsonl"}, "off_policy_data needs distill.off_policy_rows"),
    ],
)
def test_conversations_and_their_number_come_together(rows, data, words):
    recipe = {
        "method": "on_policy_distill",
        "output": "out",
        "model": {"nano": {}},
        "data": {"use": "handwriting", "tasks": {"add": 1}},
        "teachers": {"large": {"model": {"path": "./large"}}},
        "rewards": {"components": {"answer": {"use": "count"}}},
        "sampler": {"max_response_tokens": 16, "max_model_len": 128},
        "learner": {"learning_rate": 1e-4},
        "distill": {"num_steps": 1, "prompts_per_step": 4, "prompts": "multimodal", "off_policy_rows": rows},
        "off_policy_data": data,
    }
    with pytest.raises(ValidationError, match=words):
        OnPolicyDistillRecipe.model_validate(recipe)
