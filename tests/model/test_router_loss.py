"""The router balance loss through the learner: of the whole step, however it is cut."""

import pytest
import torch
from vlpost.model.config import LearnerConfig
from vlpost.model.experts import count_routed, record_routing, router_balance_loss
from vlpost.model.learner import FULL_DISTRIBUTION, Learner
from vlpost.model.packing import pack
from vlpost.model.records import VlpostError

CORPUS = tuple(f"What is {number} + {number + 3}? The sum is {2 * number + 3}. 图中有 {number} 个数字" for number in range(30))


class RecordingLearner(Learner):
    """Keeps the gradient of the last update and counts forwards without one."""

    passes = 0

    def optim_step(self):
        self.found = {name: parameter.grad.clone() for name, parameter in self.model.named_parameters() if parameter.grad is not None}
        return super().optim_step()

    def logprobs(self, batch, distribution):
        self.passes += 1
        return super().logprobs(batch, distribution)


def update(make_moe, batches, coef, *, token_loss=lambda outputs: -outputs.logprobs, **changes):
    settings = LearnerConfig(learning_rate=1e-3, router_loss_coef=coef, **changes)
    learner = RecordingLearner(make_moe(), config=settings, num_steps=10)
    measured = learner.update(batches, FULL_DISTRIBUTION, [token_loss] * len(batches))
    return learner, {name: metric.value for name, metric in measured.items()}


def cuts(moe_families, chat):
    return [
        [pack(part, media=chat, token_budget=4096)[0] for part in parts]
        for parts in ([moe_families], [[family] for family in moe_families])
    ]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert norm > 1e-3
    for name in found:
        assert (found[name] - expected[name]).norm() <= 1e-5 * norm, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_micro_batch_and_three_give_one_gradient_and_the_loss_of_the_step(make_moe, moe_chat, moe_families, checkpointing):
    one, three = cuts(moe_families, moe_chat)
    assert (len(one), len(three)) == (1, 3)
    whole, measured = update(make_moe, one, 0.5, gradient_checkpointing=checkpointing)
    cut, measured_cut = update(make_moe, three, 0.5, gradient_checkpointing=checkpointing)
    assert_same(cut.found, whole.found)
    assert measured_cut["router_loss"] == pytest.approx(measured["router_loss"], rel=1e-5)
    assert (whole.passes, cut.passes) == (1, 3)


def test_the_gradient_and_the_metric_are_those_of_the_formula(make_moe, moe_chat, moe_families):
    (batch,), three = cuts(moe_families, moe_chat)
    learner, measured = update(make_moe, three, 0.5, token_loss=lambda outputs: 0.0 * outputs.logprobs)
    model = make_moe().train()
    reader = Learner(model, config=LearnerConfig(learning_rate=1.0), num_steps=1)
    with record_routing(model) as recorded:
        reader.run(reader._outputs_of(batch, FULL_DISTRIBUTION))
    routed = count_routed(recorded[0].expert_ids, batch.token_copies, num_experts=8)
    loss = router_balance_loss(recorded[0].logits, batch.token_copies, routed=routed, experts_per_token=2)
    (0.5 * loss).backward()
    assert loss.item() > 1.05
    assert measured["router_loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {
        name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters() if name in learner.found
    }
    assert_same(learner.found, expected)


def test_the_loss_metric_is_without_the_router_loss(make_moe, moe_chat, moe_families):
    one, _ = cuts(moe_families, moe_chat)
    with_loss, without = update(make_moe, one, 0.5), update(make_moe, one, 0.0)
    assert with_loss[1]["loss"] == pytest.approx(without[1]["loss"], rel=1e-6)
    name = "model.language_model.layers.0.mlp.gate.weight"
    assert (with_loss[0].found[name] - without[0].found[name]).norm() > 1e-3 * without[0].found[name].norm()


def test_off_there_is_no_counting_pass_and_no_metric(make_moe, moe_chat, moe_families):
    _, three = cuts(moe_families, moe_chat)
    learner, measured = update(make_moe, three, 0.0)
    assert learner.passes == 0
    assert "router_loss" not in measured


def test_a_dense_model_is_refused(make_model):
    with pytest.raises(VlpostError, match=r"learner\.router_loss_coef = 0\.5: the model has no router; leave it out"):
        Learner(make_model(), config=LearnerConfig(learning_rate=1e-3, router_loss_coef=0.5), num_steps=1)
