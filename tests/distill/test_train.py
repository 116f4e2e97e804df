"""On-policy distillation in a whole step, against the formulas on full logits, and what it refuses."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from vlpost.distill.step_loss import log_ratio_advantages
from vlpost.distill.teacher import TeacherError, check_same_images, check_same_language, check_sight
from vlpost.distill.train import teacher_of
from vlpost.model.records import DataError, Example, Group, ImagePart, Message, TextPart
from vlpost.model.rollouts import train_sequence


def no_interrupt():
    """Nobody pressed Ctrl-C."""


def assert_same(found, expected, tolerance=2e-5):
    """Each gradient differs by at most `tolerance` of the norm of all."""
    assert found.keys() == expected.keys()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert norm > 1e-3
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= tolerance * norm, name


def divergence_by_hand(name, student, teacher, beta=None):
    """Returns the divergence [T] of full log-probs [T, V], banned ids left out."""
    allowed = student[0].isfinite()
    student, teacher = student[:, allowed], teacher[:, allowed]

    def kl(first, second):
        return (first.exp() * (first - second)).sum(dim=-1)

    if name == "reverse":
        return kl(student, teacher)
    if name == "forward":
        return kl(teacher, student)
    mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def drawn_groups(result):
    """Returns the groups of a step, judged or not, in the order in which they were drawn."""
    return [
        Group(example=group.example, rollouts=tuple(scored.rollout for scored in (*group.judged, *group.unjudged)))
        for group in result.scored_groups
    ]


def sequences(groups):
    return [[train_sequence(group.example.id, number, rollout, None) for number, rollout in enumerate(group.rollouts)] for group in groups]


@pytest.mark.parametrize("exact", [{"divergence": "reverse"}, {"divergence": "forward"}, {"divergence": "jsd", "beta": 0.3}], ids=str)
@pytest.mark.parametrize("weighting", ["token", "sequence"])
@pytest.mark.parametrize("token_budget", [4096, 64])
def test_the_exact_update_has_the_gradient_of_the_formula(
    make_stage, plain_model, plain_teacher, all_logprobs, examples, exact, weighting, token_budget
):
    stage = make_stage(support={"name": "exact", **exact}, weighting=weighting, token_budget=token_budget)
    result = stage.step(0, examples, no_interrupt)
    (weights, gradients) = stage.learner.updates[0]
    assert (len(stage.learner.losses) > 1) == (token_budget == 64)
    plain_model.zero_grad()
    plain_model.load_state_dict(weights, strict=False)
    rows = [row for family in sequences(drawn_groups(result)) for row in family]
    num_tokens = sum(row.num_trained_tokens for row in rows)
    values = []
    for row in rows:
        with torch.no_grad():
            teacher = all_logprobs(plain_teacher, row)
        found = divergence_by_hand(exact["divergence"], all_logprobs(plain_model, row), teacher, exact.get("beta"))
        values += found.tolist()
        (found.sum() / num_tokens if weighting == "token" else found.mean() / len(rows)).backward()
    assert_same(gradients, {name: parameter.grad for name, parameter in plain_model.named_parameters()})
    assert result.metrics["teacher_divergence"] == pytest.approx(np.mean(values), rel=1e-4)
    assert result.metrics["teacher_divergence_max"] == pytest.approx(np.max(values), rel=1e-4)
    assert result.metrics["trained_tokens"] == num_tokens


@pytest.mark.parametrize("num_mini_batches", [1, 2])
def test_the_sampled_token_update_is_the_policy_gradient_of_the_log_ratio(
    make_stage, plain_model, plain_teacher, all_logprobs, examples, num_mini_batches
):
    support = {"name": "sampled_token", "policy_loss": {"name": "reinforce"}, "importance_cap": 1.5}
    stage = make_stage(support=support, num_mini_batches=num_mini_batches)
    result = stage.step(0, examples, no_interrupt)
    size, start = 4 // num_mini_batches, stage.learner.updates[0][0]
    ratios = []
    for number, (weights, gradients) in enumerate(stage.learner.updates):
        rows = [row for family in sequences(drawn_groups(result)[number * size : (number + 1) * size]) for row in family]
        drawn = [rollout for group in drawn_groups(result)[number * size : (number + 1) * size] for rollout in group.rollouts]
        num_tokens = sum(row.num_trained_tokens for row in rows)
        plain_model.zero_grad()
        for row, rollout in zip(rows, drawn, strict=True):
            ids = torch.tensor(row.token_ids)[torch.tensor(row.trained)]
            sampler = torch.tensor([p for p, s in zip(rollout.sampler_logprobs, rollout.sampled, strict=True) if s])

            def chosen(model, row=row, ids=ids):
                return all_logprobs(model, row).gather(-1, ids[:, None])[:, 0]

            with torch.no_grad():
                teacher = chosen(plain_teacher)
                plain_model.load_state_dict(start, strict=False)
                old = chosen(plain_model)
            plain_model.load_state_dict(weights, strict=False)
            advantage = teacher - old
            ratios += advantage.tolist()
            (-(advantage * chosen(plain_model) * (old - sampler).exp().clamp(max=1.5)).sum() / num_tokens).backward()
        assert_same(gradients, {name: parameter.grad for name, parameter in plain_model.named_parameters()})
    assert result.metrics["teacher_kl_k1"] == pytest.approx(-np.mean(ratios), rel=1e-4)


def test_the_mean_of_the_sampled_advantage_over_the_students_draws_is_minus_the_kl():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(7, dtype=torch.float64, generator=generator).log_softmax(dim=-1) for _ in range(2))
    student.requires_grad_()
    advantages = log_ratio_advantages(teacher, student)
    assert not advantages.requires_grad
    kl = (student.exp() * (student - teacher)).sum()
    assert (student.exp() * advantages).sum().item() == pytest.approx(-kl.item(), rel=1e-12)
    # As a loss of its own the ratio has the mean gradient of sum p log p's score: zero on the simplex.
    logits = torch.randn(7, dtype=torch.float64, generator=generator).requires_grad_()
    logprobs = logits.log_softmax(dim=-1)
    (grad,) = torch.autograd.grad((logprobs.exp().detach() * (logprobs - teacher)).sum(), logits)
    assert grad.abs().max() < 1e-12


def test_a_teacher_that_is_the_student_gives_zero_and_moves_nothing(make_stage, make_teacher, plain_model, make_model, examples):
    plain_model.load_state_dict(make_model().state_dict())
    stage = make_stage(teachers=[make_teacher(plain_model)])
    metrics = stage.step(0, examples, no_interrupt).metrics
    assert metrics["teacher_divergence_max"] == 0.0
    assert metrics["teacher_kl_k1"] == 0.0
    assert metrics["grad_norm"] == 0.0


def test_a_teacher_shifted_by_one_token_is_far_away(make_stage, make_teacher, plain_model, make_model, examples, monkeypatch):
    plain_model.load_state_dict(make_model().state_dict())
    teacher = make_teacher(plain_model)
    states = teacher.states

    def shifted(batch, distribution):
        right = states(batch, distribution)
        return dataclasses.replace(right, hidden=right.hidden.roll(1, dims=0), logprobs=right.logprobs.roll(1, dims=0))

    monkeypatch.setattr(teacher, "states", shifted)
    assert make_stage(teachers=[teacher]).step(0, examples, no_interrupt).metrics["teacher_divergence"] > 1e-3


def test_the_drawn_responses_depend_on_the_step_and_not_on_the_teacher(make_stage, make_teacher, examples):
    first, second = make_stage(), make_stage(teachers=[make_teacher(name="other")])
    first.step(3, examples, no_interrupt)
    second.step(3, examples, no_interrupt)
    seeds = [request.seed for request in first.sampler.requests]
    assert seeds == [request.seed for request in second.sampler.requests]
    assert len(set(seeds)) == 4
    assert first.sampler.policy_version == 1


def test_each_task_has_its_teacher(make_stage, make_teacher, plain_model, plain_teacher, examples):
    mixed = [dataclasses.replace(example, task="ours" if number % 2 else "t") for number, example in enumerate(examples)]
    both = make_stage(teachers=[make_teacher(plain_model, name="a", tasks=("ours",)), make_teacher(plain_teacher, name="b")])
    alone = make_stage(teachers=[make_teacher(plain_teacher, name="b")])
    both.step(0, mixed, no_interrupt)
    alone.step(0, mixed, no_interrupt)
    assert teacher_of(mixed[1], both.teachers).name == "a"
    assert teacher_of(mixed[0], both.teachers).name == "b"
    assert [batch.sequences[0].place for _, batch, _ in both.learner.losses] == ["e1, rollout 0", "e0, rollout 0"]
    assert len(alone.learner.losses) == 1
    weights = sum(batch.token_weights.sum().item() for _, batch, _ in both.learner.losses)
    assert weights == pytest.approx(1.0)


def test_a_task_without_a_teacher_is_refused(make_stage, make_teacher, examples):
    stage = make_stage(teachers=[make_teacher(tasks=("other", "more"))])
    with pytest.raises(DataError, match="example e0: no teacher teaches task 't'; those of the recipe teach more, other"):
        stage.step(0, examples, no_interrupt)


def test_images_are_refused_where_the_prompts_are_text(make_stage, examples):
    with pytest.raises(DataError, match=r"example e0 has an image or a video, and distill\.prompts is text"):
        make_stage(prompts="text").step(0, examples, no_interrupt)


def noise_row(chat, seed):
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    parts = (ImagePart.from_image(noise), TextPart(text="What is it?"))
    example = Example(id="seen", messages=(Message(role="user", parts=parts),), answer="", task="t", source="s")
    prompt = chat.encode_prompt(example.messages)
    ids = (30, 31, 32)
    row = train_sequence("?", 0, _rollout(prompt, ids), None)
    return dataclasses.replace(row, place="seen")


def _rollout(prompt, ids):
    from vlpost.model.records import Rollout

    return Rollout(
        token_ids=prompt.token_ids + ids,
        sampled=(False,) * len(prompt.token_ids) + (True,) * len(ids),
        sampler_logprobs=(0.0,) * (len(prompt.token_ids) + len(ids)),
        media=prompt.media,
        text="",
        prompt_suffix="",
        finish_reason="stop",
        policy_version=0,
    )


def test_a_teacher_that_does_not_see_images_is_refused(make_teacher, chat, distribution, monkeypatch):
    teacher, row, other = make_teacher(), noise_row(chat, 1), noise_row(chat, 2)
    assert check_sight(teacher, row, other, chat=chat, distribution=distribution) > 1e-6
    states = teacher.states
    grey = noise_row(chat, 3)

    def blind(batch, distribution):
        from vlpost.model.packing import pack, weigh

        (seen,) = pack(weigh([[dataclasses.replace(batch.sequences[0], media=grey.media)]], "token"), media=chat, token_budget=4096)
        return states(seen, distribution)

    monkeypatch.setattr(teacher, "states", blind)
    with pytest.raises(TeacherError, match=r"teacher teacher: its log-probs in seen stay the same .* it does not see images"):
        check_sight(teacher, row, other, chat=chat, distribution=distribution)


class _Tokenizer:
    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def get_vocab(self):
        return self.vocabulary


class _Chat:
    def __init__(self, vocabulary):
        self.processor = type("Processor", (), {"tokenizer": _Tokenizer(vocabulary)})()


def test_another_vocabulary_is_refused_by_its_first_token():
    check_same_language(_Chat({"a": 0, "b": 1}), _Chat({"b": 1, "a": 0}), name="x")
    with pytest.raises(TeacherError, match=r"teacher x: its tokenizer .* differ in 2 tokens, the first 'b' \(student 1, teacher None\)"):
        check_same_language(_Chat({"a": 0, "b": 1}), _Chat({"a": 0, "c": 1}), name="x")


def test_another_way_to_cut_images_is_refused(make_model):
    student, teacher = make_model(), make_model()
    check_same_images(student, teacher, name="x")
    teacher.config.vision_config.patch_size += 2
    with pytest.raises(TeacherError, match=r"teacher x: vision_config.patch_size = 18 and the student's is 16"):
        check_same_images(student, teacher, name="x")
