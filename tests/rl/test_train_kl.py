"""A KL term to a reference in a whole step, in the loss and in the reward, against the formula on full logits."""

import copy

import pytest
import torch
from vlpost.model.rollouts import train_sequence
from vlpost.rl.train import policy_families

GROUP_SIZE = 3
EQUAL_REWARDS = {name: ["1", "1", "1"] for name in ("e0", "e1", "e2", "e3")}


def no_interrupt():
    """Nobody pressed Ctrl-C."""


def perturbed(model, seed=1, size=0.02):
    """A copy of the model that says something else."""
    other, numbers = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=numbers), alpha=size)
    return other


@pytest.fixture(scope="module")
def plain_reference(plain_model):
    return perturbed(plain_model)


@pytest.fixture
def make_reference(make_model, plain_reference):
    """Returns a function: the weights of the plain reference in a model with packed attention."""

    def make():
        model = make_model()
        model.load_state_dict(plain_reference.state_dict())
        return model

    return make


def in_loss(estimator, coef=0.5):
    return {"in": "loss", "estimator": estimator, "coef": coef}


def assert_same(found, expected, tolerance=1e-5):
    """Each gradient differs by at most `tolerance` of the norm of all."""
    assert found.keys() == expected.keys()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert norm > 1e-3
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= tolerance * norm, name


def kl_by_hand(estimator, policy, reference, ids, ratio):
    """Returns the term [T] of full log-probs [T, V]; `ratio` is pi / pi_old, detached."""
    if estimator == "exact":
        allowed = policy.isfinite()
        return (policy.exp() * torch.where(allowed, policy - reference, 0.0)).nan_to_num().sum(dim=-1)
    d = (policy - reference).gather(-1, ids[:, None])[:, 0]
    return ratio * (d**2 / 2 if estimator == "k2" else torch.exp(-d) - 1 + d)


@pytest.mark.parametrize("estimator", ["exact", "k2", "k3"])
@pytest.mark.parametrize(("num_mini_batches", "token_budget"), [(1, 4096), (1, 64), (2, 4096)])
def test_every_update_has_the_gradient_of_the_formula(
    make_stage, make_reference, plain_model, plain_reference, all_logprobs, examples, estimator, num_mini_batches, token_budget
):
    cap, coef = 1.5, 0.5
    stage = make_stage(
        reference=make_reference(),
        token_budget=token_budget,
        num_mini_batches=num_mini_batches,
        importance_cap=cap,
        policy_loss={"name": "reinforce"},
        kl=in_loss(estimator, coef),
    )
    result = stage.step(0, examples, no_interrupt)
    assert len(stage.learner.updates) == num_mini_batches
    assert (len(stage.learner.losses) > num_mini_batches) == (token_budget == 64)
    size, start = 4 // num_mini_batches, stage.learner.updates[0][0]
    first, third = [], []
    for number, (weights, gradients) in enumerate(stage.learner.updates):
        plain_model.zero_grad()
        for group in result.scored_groups[number * size : (number + 1) * size]:
            for weighted in policy_families([group], stage.config)[0]:
                sequence = weighted.sequence
                ids = torch.tensor(sequence.token_ids)[torch.tensor(sequence.trained)]
                with torch.no_grad():
                    reference = all_logprobs(plain_reference, sequence)
                    plain_model.load_state_dict(start, strict=False)
                    old = all_logprobs(plain_model, sequence).gather(-1, ids[:, None])[:, 0]
                plain_model.load_state_dict(weights, strict=False)
                policy = all_logprobs(plain_model, sequence)
                chosen = policy.gather(-1, ids[:, None])[:, 0]
                correction = (old - torch.tensor(sequence.targets.sampler_logprobs)).exp().clamp(max=cap)
                term = kl_by_hand(estimator, policy, reference, ids, (chosen - old).detach().exp())
                # The exact term is of the position and not of the drawn token: nothing corrects it.
                kl = coef * term if estimator == "exact" else coef * term * correction
                per_token = -sequence.targets.advantage * chosen * correction + kl
                (per_token.mean() / (size * GROUP_SIZE)).backward()
                d = (chosen.detach() - reference.gather(-1, ids[:, None])[:, 0]).double()
                first.append(d)
                third.append(torch.exp(-d) - 1 + d)
        assert_same(gradients, {name: parameter.grad for name, parameter in plain_model.named_parameters()})
    assert result.metrics["reference_kl_k1"] == pytest.approx(torch.cat(first).mean().item(), rel=1e-4, abs=1e-6)
    assert result.metrics["reference_kl_k3"] == pytest.approx(torch.cat(third).mean().item(), rel=1e-4, abs=1e-6)
    assert result.metrics["reference_kl_k3"] > 1e-3


@pytest.mark.parametrize("estimator", ["exact", "k2", "k3"])
def test_with_the_policy_as_reference_the_first_update_is_the_one_without_a_term(make_stage, make_model, examples, estimator):
    with_term = make_stage(reference=make_model(), num_mini_batches=2, kl=in_loss(estimator, 10.0))
    without = make_stage(num_mini_batches=2)
    metrics = with_term.step(0, examples, no_interrupt).metrics
    without.step(0, examples, no_interrupt)
    (_, first), (_, second) = with_term.learner.updates
    (_, first_without), (_, second_without) = without.learner.updates
    assert_same(first, first_without)
    norm = torch.stack([gradient.norm() for gradient in second_without.values()]).norm()
    assert max((second[name] - second_without[name]).norm() for name in second) > 1e-3 * norm  # by then the policy has moved
    assert metrics["reference_kl_k3"] > 1e-8


def penalties_by_hand(policy, reference, alone, scored_groups, coef):
    """Returns, by group, coef * sum over the response's tokens of log policy - log reference."""
    found = []
    for group in scored_groups:
        sequences = [train_sequence("?", number, judged.rollout, None) for number, judged in enumerate(group.judged)]
        with torch.no_grad():
            found.append([coef * (alone(policy, sequence) - alone(reference, sequence)).double().sum().item() for sequence in sequences])
    return found


@pytest.mark.parametrize("token_budget", [4096, 64])
def test_the_reward_is_less_the_penalty_before_advantages(
    make_stage, make_model, make_reference, plain_model, plain_reference, alone, examples, token_budget
):
    coef = 0.3
    stage = make_stage(EQUAL_REWARDS, reference=make_reference(), token_budget=token_budget, kl={"in": "reward", "coef": coef})
    plain_model.load_state_dict(make_model().state_dict())
    result = stage.step(0, examples, no_interrupt)
    penalties = penalties_by_hand(plain_model, plain_reference, alone, result.scored_groups, coef)
    found = {s.place: s.targets.advantage for _, batch, _ in stage.learner.losses for s in batch.sequences}
    assert len(found) == 12
    for example, values in enumerate(penalties):
        rewards = 1.0 - torch.tensor(values, dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for number, advantage in enumerate(advantages.tolist()):
            assert found[f"e{example}, rollout {number}"] == pytest.approx(advantage, abs=1e-3)
    flat = torch.tensor(penalties).flatten()
    metrics = result.metrics
    assert metrics["kl_penalty"] == pytest.approx(flat.mean().item(), rel=1e-4, abs=1e-6)
    assert metrics["reference_kl_k1"] == pytest.approx(flat.sum().item() / coef / 36, rel=1e-4, abs=1e-6)
    # What is logged and handed on is what was judged.
    assert metrics["reward"] == metrics["reward/number"] == 1.0
    assert all(judged.score.reward == 1.0 for group in result.scored_groups for judged in group.judged)
    assert stage.learner.policy_version == 1
    assert metrics["skipped_updates"] == 0.0


def test_equal_rewards_without_a_penalty_have_no_signal(make_stage, make_model, examples):
    stage = make_stage(EQUAL_REWARDS, reference=make_model(), kl={"in": "reward", "coef": 0.3})
    metrics = stage.step(0, examples, no_interrupt).metrics
    assert metrics["kl_penalty"] == metrics["reference_kl_k1"] == 0.0
    assert (stage.learner.policy_version, metrics["skipped_updates"]) == (0, 1.0)


def test_unjudged_responses_pay_nothing_and_are_not_counted(make_stage, make_reference, examples):
    script = {"e0": ["x", "1", "1"], "e1": ["x", "x", "x"], "e2": ["1", "x", "1"], "e3": ["x", "x", "1"]}
    stage = make_stage(script, reference=make_reference(), kl={"in": "reward", "coef": 0.3})
    result = stage.step(0, examples, no_interrupt)
    places = {s.place for _, batch, _ in stage.learner.losses for s in batch.sequences}
    assert places == {"e0, rollout 0", "e0, rollout 1", "e2, rollout 0", "e2, rollout 1"}
    assert result.metrics["kl_penalty"] != 0.0


@pytest.mark.parametrize("kl", [in_loss("exact"), {"in": "reward", "coef": 0.3}], ids=["loss", "reward"])
def test_an_adapter_is_its_own_reference_switched_off(make_stage, examples, kl):
    stage = make_stage(learner={"lora": {"rank": 4, "publish": "merged"}, "freeze": ("vision", "merger")}, kl=kl)
    first = stage.step(0, examples, no_interrupt).metrics
    second = stage.step(1, examples, no_interrupt).metrics
    assert first["reference_kl_k3"] == pytest.approx(0.0, abs=1e-9)  # a fresh adapter changes nothing
    assert second["reference_kl_k3"] > 1e-7
    assert stage.learner.policy_version == 2
