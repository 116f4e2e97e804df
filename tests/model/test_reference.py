"""The reference of a KL term: a frozen copy, or the policy with its adapter off, through the learner."""

import copy

import pytest
import torch
from vlpost.model.config import LearnerConfig, LoraConfig
from vlpost.model.learner import Distribution, Learner, batch_logprobs
from vlpost.model.packing import pack, weigh
from vlpost.model.records import Message, TextPart, TrainSequence
from vlpost.model.vision import vision_pass

DISTRIBUTION = Distribution(temperature=0.7, allowed=None)


@pytest.fixture(scope="module")
def batch(chat, make_image):
    """A group about an image, and a text row."""

    def sequence(parts, response):
        prompt = chat.encode_prompt([Message(role="user", parts=parts)])
        trained = (False,) * len(prompt.token_ids) + (True,) * len(response)
        return TrainSequence(place="row", token_ids=prompt.token_ids + response, trained=trained, media=prompt.media, targets=None)

    seen, text = (make_image(), TextPart(text="the sum?")), (TextPart(text="3 + 4?"),)
    families = weigh([[sequence(seen, (5, 6, 7)), sequence(seen, (5, 8))], [sequence(text, (9, 10, 11, 12))]], "token")
    (packed,) = pack(families, media=chat, token_budget=4096)
    return packed


@pytest.fixture(scope="module")
def start(make_model):
    """A model that is not the policy's start."""
    model, numbers = make_model(), torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=numbers), alpha=0.02)
    return model


def make_learner(model, reference=None, **changes):
    return Learner(model, config=LearnerConfig(learning_rate=1e-2, **changes), num_steps=10, reference=reference)


def logprobs_of(model, batch):
    with torch.no_grad():
        vision = vision_pass(model.model, batch.vision, must_run=False)
        return batch_logprobs(model, batch, DISTRIBUTION, vision=vision).logprobs


def update(learner, batch):
    """Does an update with an exact KL term and returns the term's values and the reference's states."""
    seen = []

    def loss(outputs):
        seen.append(outputs.divergence.detach())
        return -outputs.logprobs + outputs.divergence

    states = learner.reference_states(batch, DISTRIBUTION)
    learner.update([batch], DISTRIBUTION, [loss], [states])
    return seen[0], states


def test_a_frozen_copy_stays_as_it_is_while_the_policy_moves(batch, make_model, start):
    reference = copy.deepcopy(start)
    before = {name: parameter.clone() for name, parameter in reference.named_parameters()}
    learner = make_learner(make_model(), reference, weight_decay=0.1)
    policy_before = logprobs_of(learner.model, batch)
    found = [update(learner, batch)[1].logprobs for _ in range(3)]
    assert (logprobs_of(learner.model, batch) - policy_before).abs().max() > 1e-2
    assert all(torch.equal(before[name], parameter) and parameter.grad is None for name, parameter in reference.named_parameters())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], logprobs_of(start, batch), rtol=0, atol=1e-5)
    assert not any(parameter is other for parameter in learner.model.parameters() for other in reference.parameters())


def test_the_states_of_a_copy_hold_its_own_head_and_those_of_an_adapter_do_not(batch, make_model, start):
    own = make_learner(make_model(), copy.deepcopy(start)).reference_states(batch, DISTRIBUTION)
    shared = make_learner(make_model(), lora=LoraConfig(rank=4)).reference_states(batch, DISTRIBUTION)
    assert torch.equal(own.head, start.get_output_embeddings().weight)
    assert shared.head is None
    assert own.hidden.shape == shared.hidden.shape == (len(batch.target_ids), 128)
    assert not any(tensor.requires_grad for tensor in (own.hidden, own.logprobs, own.head, shared.hidden, shared.logprobs))


def count_passes(model):
    passes = []
    model.model.visual.register_forward_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize(
    ("freeze", "of_policy", "of_reference"),
    [(("vision", "merger"), 1, 0), ((), 1, 1), (("vision",), 1, 1)],
    ids=["frozen", "trained", "merger trained"],
)
def test_a_frozen_tower_runs_once_a_step_for_both(batch, make_model, freeze, of_policy, of_reference):
    policy, reference = make_model(), make_model()
    learner = make_learner(policy, reference, freeze=freeze)
    passes, reference_passes = count_passes(policy), count_passes(reference)
    kl, _ = update(learner, batch)
    assert (len(passes), len(reference_passes)) == (of_policy, of_reference)
    assert kl.abs().max() < 1e-6
    update(learner, batch)
    assert (len(passes), len(reference_passes)) == (2 * of_policy, 2 * of_reference)


@pytest.mark.parametrize("parts", [("language",), ("vision", "merger", "language")], ids=["language", "everywhere"])
def test_without_its_adapter_the_policy_is_the_base_exactly_after_updates_too(batch, make_model, parts):
    learner = make_learner(make_model(), lora=LoraConfig(rank=4, parts=parts))
    base = make_learner(make_model()).logprobs(batch, DISTRIBUTION).logprobs
    divergences = []
    for _ in range(3):
        kl, states = update(learner, batch)
        assert torch.equal(states.logprobs, base)
        divergences.append(float(kl.max()))
    assert divergences[0] < 1e-6
    assert divergences[2] > 1e-3
    assert (learner.logprobs(batch, DISTRIBUTION).logprobs - base).abs().max() > 1e-2
    assert all(parameter.requires_grad == (".lora_" in name) for name, parameter in learner.model.named_parameters())


def test_the_adapter_counts_as_trained_while_it_is_off(batch, make_model):
    """FSDP2 settles at a module's first forward what of it is trained; the reference's pass may be that first one."""
    learner = make_learner(make_model(), lora=LoraConfig(rank=4))
    seen = []
    learner.model.model.language_model.register_forward_hook(
        lambda module, *_: seen.append([p.requires_grad for name, p in module.named_parameters() if ".lora_" in name])
    )
    learner.reference_states(batch, DISTRIBUTION)
    assert seen
    assert all(map(all, seen))


def test_a_learner_without_adapter_and_reference_says_what_is_missing(batch, make_model):
    with pytest.raises(AssertionError, match="a learner without an adapter needs a reference model"):
        make_learner(make_model()).reference_states(batch, DISTRIBUTION)
