import dataclasses
import math

import pytest
import torch
from vlpost.model.config import LearnerConfig
from vlpost.model.learner import FULL_DISTRIBUTION, Distribution, Learner, batch_logprobs, scheduled_learning_rate
from vlpost.model.loading import part_of
from vlpost.model.packing import empty_batch, pack, weigh
from vlpost.model.records import Message, TextPart, TrainSequence, VlpostError
from vlpost.model.vision import vision_pass


@pytest.fixture(scope="module")
def batches(chat, make_image):
    """Two micro-batches of one step: a group about an image, and a text row."""

    def sequence(place, parts, response):
        prompt = chat.encode_prompt([Message(role="user", parts=parts)])
        ids = prompt.token_ids + response
        return TrainSequence(
            place=place, token_ids=ids, trained=(False,) * len(prompt.token_ids) + (True,) * len(response), media=prompt.media, targets=None
        )

    seen = (make_image(), TextPart(text="the sum?"))
    families = [
        [sequence("image 0", seen, (5, 6, 7)), sequence("image 1", seen, (5, 8))],
        [sequence("text", (TextPart(text="3 + 4?"),), (9, 10, 11, 12))],
    ]
    return [batch for family in weigh(families, "token") for batch in pack([family], media=chat, token_budget=512)]


def negative_logprobs(outputs):
    return -outputs.logprobs


def config(**changes):
    return LearnerConfig(**{"learning_rate": 1e-2, **changes})


def alone(model, batch):
    return batch_logprobs(model, batch, FULL_DISTRIBUTION, vision=vision_pass(model.model, batch.vision, must_run=True))


def weights(learner):
    return {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("max_grad_norm", [1e-2, 1e6], ids=["clipped", "not clipped"])
def test_steps_equal_adamw_written_by_hand(batches, make_model, max_grad_norm):
    settings = config(weight_decay=0.1, beta1=0.8, beta2=0.9, warmup_steps=4, max_grad_norm=max_grad_norm)
    learner = Learner(make_model(), config=settings, num_steps=10)
    model = make_model().train()
    parameters = [parameter.detach().clone() for parameter in model.parameters()]
    first = [torch.zeros_like(parameter) for parameter in parameters]
    second = [torch.zeros_like(parameter) for parameter in parameters]

    for step in (1, 2):
        # One loss over both batches, so that the learner's accumulation is compared too.
        for parameter, value in zip(model.parameters(), parameters, strict=True):
            parameter.data.copy_(value)
        model.zero_grad()
        loss = sum((batch.token_weights * -alone(model, batch).logprobs).sum() for batch in batches)
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        rate = 1e-2 * step / 4
        for index, gradient in enumerate(gradients):
            clipped = gradient * min(1.0, max_grad_norm / (norm + 1e-6))
            first[index] = 0.8 * first[index] + 0.2 * clipped
            second[index] = 0.9 * second[index] + 0.1 * clipped.square()
            change = first[index] / (1 - 0.8**step) / ((second[index] / (1 - 0.9**step)).sqrt() + 1e-8)
            parameters[index] = parameters[index] * (1 - rate * 0.1) - rate * change

        losses = [learner.forward_backward(batch, FULL_DISTRIBUTION, negative_logprobs) for batch in batches]
        metrics = learner.optim_step()

        assert sum(losses) == pytest.approx(loss.item(), rel=1e-5)
        assert metrics == {"grad_norm": pytest.approx(norm, rel=1e-4), "learning_rate": pytest.approx(rate), "nonfinite_updates": 0.0}
        assert (norm > max_grad_norm) == (max_grad_norm == 1e-2)
        # Adam divides by the gradient's size: where a gradient is about its rounding error, so is the direction of the step.
        for found, expected, gradient in zip(learner.model.parameters(), parameters, gradients, strict=True):
            clear = gradient.abs() > 1e-4 * gradient.abs().max()
            torch.testing.assert_close(found.detach()[clear], expected[clear], rtol=0, atol=rate * 1e-2)
        parameters = [parameter.detach().clone() for parameter in learner.model.parameters()]
    assert learner.policy_version == 2


def test_a_step_on_the_loss_lowers_it(batches, make_model):
    learner = Learner(make_model(), config=config(learning_rate=1e-3), num_steps=3)
    losses = []
    for _ in range(3):
        losses.append(sum(learner.forward_backward(batch, FULL_DISTRIBUTION, negative_logprobs) for batch in batches))
        learner.optim_step()
    assert losses[0] > losses[1] > losses[2]


def test_a_gradient_has_one_value_whatever_threads_do(chat, make_model):
    """Above 32,768 numbers torch adds indexed gradients from several threads at once, in the order in which they come."""
    prompt = chat.encode_prompt([Message(role="user", parts=(TextPart(text="3 + 4?"),))]).token_ids
    family = [
        TrainSequence(
            place=f"response {number}", token_ids=(*prompt, *response), trained=(False,) * len(prompt) + (True,) * len(response),
            media=(), targets=None,
        )
        for number in range(200)
        for response in [tuple(5 + (number >> bit) % 2 for bit in range(8))]
    ]  # fmt: skip
    (batch,) = pack(weigh([family], "token"), media=chat, token_budget=4096)
    assert len(batch.hidden_index.unique()) < len(batch.hidden_index) / 2
    assert len(batch.hidden_index) * make_model().config.text_config.hidden_size > 2 * 32768

    def gradients():
        learner = Learner(make_model(), config=config(), num_steps=1)
        learner.forward_backward(batch, FULL_DISTRIBUTION, negative_logprobs)
        return [parameter.grad for parameter in learner.model.parameters() if parameter.grad is not None]

    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradients()
        for _ in range(5):
            assert all(map(torch.equal, gradients(), first))
    finally:
        torch.set_num_threads(num_threads)


def test_the_gradient_is_cleared_after_a_step(batches, make_model):
    learner = Learner(make_model(), config=config(), num_steps=3)
    learner.forward_backward(batches[0], FULL_DISTRIBUTION, negative_logprobs)
    learner.optim_step()
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_policy_version_counts_updates_and_not_batches(batches, make_model):
    learner = Learner(make_model(), config=config(), num_steps=3)
    assert learner.policy_version == 0
    for batch in batches:
        learner.forward_backward(batch, FULL_DISTRIBUTION, negative_logprobs)
    assert learner.policy_version == 0
    learner.optim_step()
    assert learner.policy_version == 1


def test_logprobs_carry_no_gradient_and_equal_those_of_the_step(batches, make_model):
    learner = Learner(make_model(), config=config(), num_steps=3)
    allowed = torch.arange(learner.model.config.text_config.vocab_size) < 300
    distribution = Distribution(temperature=0.7, allowed=allowed)
    outputs = learner.logprobs(batches[0], distribution)
    assert not outputs.logprobs.requires_grad
    seen = []

    def loss(outputs):
        seen.append(outputs)
        return -outputs.logprobs

    value = learner.forward_backward(batches[0], distribution, loss)
    assert torch.equal(seen[0].logprobs.detach(), outputs.logprobs)
    assert torch.equal(seen[0].entropy, outputs.entropy)
    assert value == pytest.approx(float((batches[0].token_weights * -outputs.logprobs).sum()))
    plain = learner.logprobs(batches[0], FULL_DISTRIBUTION)
    assert not torch.allclose(plain.logprobs, outputs.logprobs, atol=1e-3)
    assert (plain.entropy > outputs.entropy).all()


# ---------------------------------------------------------------- frozen parts


@pytest.mark.parametrize("frozen", [("vision",), ("merger",), ("language",), ("vision", "merger"), ()])
def test_frozen_parts_do_not_move_and_the_others_do(frozen, batches, make_model):
    learner = Learner(make_model(), config=config(freeze=frozen, weight_decay=0.1), num_steps=3)
    before = weights(learner)
    learner.forward_backward(batches[0], FULL_DISTRIBUTION, negative_logprobs)
    learner.optim_step()
    after = weights(learner)
    moved = {
        part: [not torch.equal(before[name], after[name]) for name in before if part_of(name) == part]
        for part in ("vision", "merger", "language")
    }
    for part, changes in moved.items():
        assert any(changes) == all(changes) == (part not in frozen), part


def test_settings_with_every_part_frozen_are_refused():
    with pytest.raises(ValueError, match=r"learner\.freeze names every part of the model: nothing is left to train"):
        config(freeze=("vision", "merger", "language"))


# ---------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_drops_the_update_and_names_the_example(value, batches, make_model):
    learner = Learner(make_model(), config=config(), num_steps=3)
    before = weights(learner)
    learner.forward_backward(batches[0], FULL_DISTRIBUTION, negative_logprobs)
    learner.forward_backward(batches[1], FULL_DISTRIBUTION, lambda outputs: outputs.logprobs * value)
    assert learner.optim_step() == {"nonfinite_updates": 1.0}
    assert learner.take_faults() == ["update 1 is dropped, weights are unchanged: the loss or its gradient is not finite in text"]
    assert learner.take_faults() == []
    assert (learner.policy_version, learner.nonfinite_in_a_row) == (0, 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(learner).items())
    # The gradient of the batch before is dropped with the update.
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_a_gradient_that_is_not_finite_drops_the_update_and_names_the_examples(batches, make_model):
    learner = Learner(make_model(), config=config(), num_steps=3)
    before = weights(learner)

    def root_of_zero(outputs):  # the value is 0, the slope of the root at 0 is infinite
        difference = outputs.logprobs - outputs.logprobs.detach()
        return torch.cat([difference[:3], difference[3:].sqrt()])

    learner.forward_backward(batches[0], FULL_DISTRIBUTION, root_of_zero)
    assert learner.optim_step() == {"nonfinite_updates": 1.0}
    assert learner.take_faults() == ["update 1 is dropped, weights are unchanged: the loss or its gradient is not finite in image 1"]
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(learner).items())
    learner.forward_backward(batches[0], FULL_DISTRIBUTION, root_of_zero)
    assert learner.optim_step() == {"nonfinite_updates": 1.0}
    assert learner.nonfinite_in_a_row == 2
    learner.forward_backward(batches[0], FULL_DISTRIBUTION, negative_logprobs)
    assert math.isfinite(learner.optim_step()["grad_norm"])
    assert (learner.policy_version, learner.nonfinite_in_a_row) == (1, 0)


def test_a_gradient_that_breaks_inside_the_model_names_the_step(batches, make_model):
    learner = Learner(make_model(), config=config(), num_steps=3)
    learner.model.model.language_model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * math.nan)
    learner.forward_backward(batches[0], FULL_DISTRIBUTION, negative_logprobs)
    assert learner.optim_step() == {"nonfinite_updates": 1.0}
    assert learner.take_faults() == [
        "update 1 is dropped, weights are unchanged: the gradient norm is nan though every loss is finite, on image 0, image 1"
    ]


def test_an_image_that_is_not_finite_is_named(batches, make_model):
    learner = Learner(make_model(), config=config(), num_steps=3)
    vision = dataclasses.replace(batches[0].vision, pixel_values=batches[0].vision.pixel_values * math.nan)
    learner.forward_backward(dataclasses.replace(batches[0], vision=vision), FULL_DISTRIBUTION, negative_logprobs)
    assert learner.optim_step() == {"nonfinite_updates": 1.0}
    assert learner.take_faults()[0].endswith("not finite in image 0, image 1")


# ---------------------------------------------------------------- batches without images, and none at all


def test_an_update_does_not_depend_on_which_micro_batch_holds_the_images(batches, make_model):
    """A micro-batch of text alone moves the tower as the same rows do beside images: gradients of zero, not none."""
    learner = Learner(make_model(), config=config(weight_decay=0.1), num_steps=3)
    before = weights(learner)
    learner.forward_backward(batches[1], FULL_DISTRIBUTION, negative_logprobs)
    assert all(parameter.grad is not None for parameter in learner.model.parameters())
    assert all(not p.grad.any() for name, p in learner.model.named_parameters() if "visual." in name)
    learner.optim_step()
    assert all(not torch.equal(before[name], value) for name, value in weights(learner).items() if value.any() and value.ndim > 1)


def test_an_empty_batch_adds_nothing(batches, make_model):
    learner = Learner(make_model(), config=config(), num_steps=3)
    learner.forward_backward(batches[0], FULL_DISTRIBUTION, negative_logprobs)
    before = [parameter.grad.clone() for parameter in learner.model.parameters()]
    assert learner.forward_backward(empty_batch(), FULL_DISTRIBUTION, negative_logprobs) == 0.0
    assert all(torch.equal(one, parameter.grad) for one, parameter in zip(before, learner.model.parameters(), strict=True))
    assert learner.fill(batches) == batches


def test_a_frozen_tower_runs_once_for_all_forwards_of_a_step(batches, make_model):
    learner = Learner(make_model(), config=config(freeze=("vision", "merger")), num_steps=3)
    passes = []
    learner.model.model.visual.register_forward_hook(lambda *_: passes.append(1))
    first = learner.logprobs(batches[0], FULL_DISTRIBUTION)
    learner.logprobs(batches[1], FULL_DISTRIBUTION)
    seen = []
    learner.forward_backward(batches[0], FULL_DISTRIBUTION, lambda outputs: seen.append(outputs.logprobs) or -outputs.logprobs)
    assert len(passes) == 1
    assert torch.equal(seen[0], first.logprobs)
    learner.optim_step()
    learner.logprobs(batches[0], FULL_DISTRIBUTION)
    assert len(passes) == 2


# ---------------------------------------------------------------- precision


def test_bf16_computes_in_bf16_and_keeps_fp32_weights_gradients_and_logprobs(batches, make_model):
    exact = Learner(make_model(), config=config(), num_steps=3)
    half = Learner(make_model(), config=config(dtype="bfloat16", freeze=("vision",)), num_steps=3)
    products = []
    half.model.model.language_model.layers[0].mlp.up_proj.register_forward_hook(lambda *call: products.append(call[-1].dtype))
    expected, found = (learner.logprobs(batches[0], FULL_DISTRIBUTION) for learner in (exact, half))
    assert products == [torch.bfloat16]
    assert found.logprobs.dtype == found.entropy.dtype == torch.float32
    gap = (expected.logprobs - found.logprobs).abs().max().item()
    assert 1e-6 < gap < 0.1
    exact.forward_backward(batches[0], FULL_DISTRIBUTION, negative_logprobs)
    half.forward_backward(batches[0], FULL_DISTRIBUTION, negative_logprobs)
    for (name, one), other in zip(exact.model.named_parameters(), half.model.parameters(), strict=True):
        assert other.dtype == torch.float32
        if part_of(name) == "vision":
            continue
        assert other.grad.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0)
        assert cosine > 0.98, name


# ---------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1.0, 1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2]),
    ],
)
def test_learning_rates(schedule, expected):
    # Two updates of warm-up, then four that fall from the peak of 2 to a fifth of it.
    settings = LearnerConfig(learning_rate=2.0, warmup_steps=2, schedule=schedule, final_learning_rate_frac=0.2)
    assert [scheduled_learning_rate(settings, step, 6) for step in range(7)] == pytest.approx([2.0 * share for share in expected])


def test_the_learning_rate_stays_at_its_end_and_bears_a_warm_up_as_long_as_the_run():
    settings = LearnerConfig(learning_rate=1.0, warmup_steps=3, schedule="linear", final_learning_rate_frac=0.1)
    assert scheduled_learning_rate(settings, 100, 6) == pytest.approx(0.1)
    assert [scheduled_learning_rate(settings, step, 3) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_a_part_learns_at_its_own_rate(batches, make_model):
    settings = config(part_learning_rates={"vision": 1e-4, "merger": 3e-3}, warmup_steps=2)
    learner = Learner(make_model(), config=settings, num_steps=4)
    before = weights(learner)
    for _ in range(2):
        for batch in batches:
            learner.forward_backward(batch, FULL_DISTRIBUTION, negative_logprobs)
        metrics = learner.optim_step()
        moved = {"vision": 0.0, "merger": 0.0, "language": 0.0}
        for name, value in weights(learner).items():
            moved[part_of(name)] = max(moved[part_of(name)], (value - before[name]).abs().max().item())
        before = weights(learner)
        # Adam's first updates move a weight whose gradient does not change its sign by the rate itself.
        factor = metrics["learning_rate"] / 1e-2
        assert moved == pytest.approx({"vision": 1e-4 * factor, "merger": 3e-3 * factor, "language": 1e-2 * factor}, rel=0.05)


def test_a_rate_for_a_part_that_is_not_trained_is_refused():
    with pytest.raises(ValueError, match=r"part_learning_rates names vision, which is not trained: take it out"):
        config(freeze=("vision",), part_learning_rates={"vision": 1e-4})
    with pytest.raises(ValueError, match=r"part_learning_rates names merger, which is not trained"):
        config(lora={"rank": 2}, part_learning_rates={"merger": 1e-4})


def test_offloading_is_refused_where_there_is_nothing_to_offload_from(make_model):
    with pytest.raises(VlpostError, match=r"learner\.activation_offload moves activations from a GPU to the host, and this is the CPU"):
        Learner(make_model(), config=config(activation_offload=True), num_steps=1)
    with pytest.raises(ValueError, match=r"activation_offload and learner\.gradient_checkpointing are both on"):
        config(activation_offload=True, gradient_checkpointing=True)


def test_activations_that_were_elsewhere_give_the_same_gradient(batches, make_model, monkeypatch):
    kept = Learner(make_model(), config=config(), num_steps=1)
    moved = Learner(make_model(), config=config(), num_steps=1)
    copied = []

    def copy(tensor):
        copied.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(moved, "_kept", lambda: torch.autograd.graph.saved_tensors_hooks(copy, torch.clone))
    for learner in (kept, moved):
        for batch in batches:
            learner.forward_backward(batch, FULL_DISTRIBUTION, negative_logprobs)
    assert len(copied) > 100
    for ours, theirs in zip(kept.model.parameters(), moved.model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
