"""KL to the reference: what each estimator's value and gradient are in the mean, by enumeration of a small vocabulary."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.divergence import token_kl
from vlpost.rl.kl import k1, k2, k3, kl_in_reward
from vlpost.rl.policy_loss import reinforce

VOCABULARY = 5
log_ratios = st.lists(st.floats(-15.0, 15.0, width=32), min_size=1, max_size=12)


@pytest.fixture
def logits():
    """The policy's logits over the vocabulary, fp64."""
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


@pytest.fixture
def reference():
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2), dtype=torch.float64).log_softmax(0)


@pytest.fixture
def old():
    """Log-probs that the tokens were drawn from, neither the policy's nor the reference's."""
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3), dtype=torch.float64).log_softmax(0)


def kl(first, second):
    """KL(first, second) of two vectors of log-probs, exactly."""
    return (first.exp() * (first - second)).sum()


def gradient(value, logits):
    (result,) = torch.autograd.grad(value, logits, retain_graph=True)
    return result


def mean_gradient(per_token, logits, drawn_from):
    """The gradient of the loss of each id of the vocabulary, averaged by the probability of drawing it."""
    return gradient((drawn_from.detach().exp() * per_token).sum(), logits)


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_values_by_hand():
    logprobs, reference_logprobs = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.0, -1.5, -2.5])
    old_logprobs = torch.tensor([-1.0, -2.0, -0.5 + math.log(2.0)])  # the last token was drawn at twice the probability

    assert k1(logprobs, reference_logprobs).tolist() == [0.0, -0.5, 2.0]
    assert k2(logprobs, reference_logprobs, old_logprobs=old_logprobs).tolist() == pytest.approx([0.0, 0.125, 1.0])
    expected = [0.0, math.exp(0.5) - 1 - 0.5, (math.exp(-2.0) - 1 + 2.0) / 2]
    assert k3(logprobs, reference_logprobs, old_logprobs=old_logprobs).tolist() == pytest.approx(expected, rel=1e-6)


def test_on_policy_k1_and_k3_are_the_divergence_in_the_mean_and_k2_is_not(logits, reference):
    logprobs = logits.log_softmax(0).detach()
    exact = kl(logprobs, reference)

    close((logprobs.exp() * k1(logprobs, reference)).sum(), exact)
    close((logprobs.exp() * k3(logprobs, reference, old_logprobs=logprobs)).sum(), exact)
    assert abs((logprobs.exp() * k2(logprobs, reference, old_logprobs=logprobs)).sum() - exact) > 0.05


def test_near_the_reference_k2_is_the_divergence_too(logits, reference):
    logprobs = (reference + 1e-3 * logits.detach()).log_softmax(0)

    estimate = (logprobs.exp() * k2(logprobs, reference, old_logprobs=logprobs)).sum()

    assert estimate.item() == pytest.approx(kl(logprobs, reference).item(), rel=1e-2)


def test_k1_would_do_nothing_as_a_loss(logits, reference):
    logprobs = logits.log_softmax(0)

    per_token = logprobs - reference  # k1, with the gradient that it is not given

    close(mean_gradient(per_token, logits, logprobs), torch.zeros(VOCABULARY, dtype=torch.float64))
    assert not k1(logprobs, reference).requires_grad


def test_on_policy_k2_has_the_gradient_of_the_divergence_from_the_reference(logits, reference):
    logprobs = logits.log_softmax(0)

    found = mean_gradient(k2(logprobs, reference, old_logprobs=logprobs), logits, logprobs)

    close(found, gradient(kl(logprobs, reference), logits))


def test_on_policy_k3_has_the_gradient_of_the_other_direction(logits, reference):
    logprobs = logits.log_softmax(0)

    found = mean_gradient(k3(logprobs, reference, old_logprobs=logprobs), logits, logprobs)

    close(found, gradient(kl(reference, logprobs), logits))
    close(found, (logprobs.exp() - reference.exp()).detach())
    assert (found - gradient(kl(logprobs, reference), logits)).abs().max() > 0.05


def test_off_policy_the_ratio_restores_mean_value_and_gradient(logits, reference, old):
    logprobs = logits.log_softmax(0)
    quadratic, third = (estimator(logprobs, reference, old_logprobs=old) for estimator in (k2, k3))

    close((old.exp() * third).sum(), kl(logprobs, reference))
    close((old.exp() * quadratic).sum(), (logprobs.exp() * (logprobs - reference).square() / 2).sum())
    close(mean_gradient(quadratic, logits, old), gradient(kl(logprobs, reference), logits))
    close(mean_gradient(third, logits, old), gradient(kl(reference, logprobs), logits))


@pytest.mark.parametrize("estimator", [k2, k3])
def test_off_policy_the_gradient_is_another_without_the_ratio(estimator, logits, reference, old):
    logprobs = logits.log_softmax(0)

    corrected = mean_gradient(estimator(logprobs, reference, old_logprobs=old), logits, old)
    uncorrected = mean_gradient(estimator(logprobs, reference, old_logprobs=logprobs), logits, old)

    assert (corrected - uncorrected).abs().max() > 0.05


def test_k3_times_a_differentiated_ratio_has_the_gradient_of_k2(logits, reference, old):
    logprobs = logits.log_softmax(0)
    unbiased = (logprobs - old).exp() * (torch.expm1(reference - logprobs) - (reference - logprobs))  # arXiv:2512.02556 eq. 7

    quadratic = k2(logprobs, reference, old_logprobs=old)

    for token in range(VOCABULARY):
        close(gradient(quadratic[token], logits), gradient(unbiased[token], logits))


def test_in_the_reward_only_k1_pushes_along_the_divergence(logits, reference):
    """Why `rl.kl` with `in: reward` takes no other: mean of estimate * grad log pi, the policy gradient of a reward."""
    logprobs = logits.log_softmax(0)
    on_policy = logprobs.detach()
    estimates = {
        "k1": k1(on_policy, reference),
        "k2": k2(on_policy, reference, old_logprobs=on_policy),
        "k3": k3(on_policy, reference, old_logprobs=on_policy),
        "exact": kl(on_policy, reference).expand(VOCABULARY),
    }
    pushes = {name: mean_gradient(reinforce(logprobs, advantages=-estimate), logits, logprobs) for name, estimate in estimates.items()}
    wanted, other = gradient(kl(logprobs, reference), logits), gradient(kl(reference, logprobs), logits)

    close(pushes["k1"], wanted)
    close(pushes["k3"], wanted - other)
    close(pushes["exact"], torch.zeros(VOCABULARY, dtype=torch.float64))
    assert (pushes["k2"] - wanted).abs().max() > 0.05


def test_near_the_reference_k3_in_the_reward_hardly_pushes(logits, reference):
    moved = (reference + 0.01 * logits.detach()).requires_grad_()
    logprobs = moved.log_softmax(0)
    penalty = k3(logprobs.detach(), reference, old_logprobs=logprobs.detach())

    push = mean_gradient(reinforce(logprobs, advantages=-penalty), moved, logprobs)

    assert push.abs().max() < 0.02 * gradient(kl(logprobs, reference), moved).abs().max()


@pytest.fixture
def two_tokens():
    """A policy that writes two tokens of a vocabulary of 3, the second dependent on the first, and a reference: logits, fp64."""
    generator = torch.Generator().manual_seed(4)
    policy = tuple(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((3,), (3, 3)))
    return policy, tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3,), (3, 3)))


def responses(first, second):
    """Log-probs [9, 2] of the tokens of all responses."""
    first, second = first.log_softmax(0), second.log_softmax(1)
    return torch.stack([torch.stack([first[a], second[a, b]]) for a, b in itertools.product(range(3), range(3))])


def mean_push(per_response, probabilities, policy):
    return torch.autograd.grad((probabilities * per_response).sum(), policy, retain_graph=True)


def test_the_penalty_is_the_divergence_of_whole_responses_with_its_whole_gradient(two_tokens):
    policy, reference = two_tokens
    logprobs, reference_logprobs = responses(*policy), responses(*reference)
    probabilities = logprobs.sum(1).exp()
    whole = (probabilities * (logprobs - reference_logprobs).sum(1)).sum()

    ids = torch.arange(9).repeat_interleave(2)
    penalty = kl_in_reward(logprobs.flatten(), reference_logprobs.flatten(), sequence_ids=ids, num_responses=9, coef=0.3)
    close((probabilities.detach() * penalty).sum(), 0.3 * whole.detach())

    advantages = -penalty - 0.7  # less a baseline
    per_token = reinforce(logprobs.flatten(), advantages=advantages.repeat_interleave(2)).view(9, 2)
    found = mean_push(per_token.sum(1), probabilities.detach(), policy)
    for mine, exact in zip(found, torch.autograd.grad(0.3 * whole, policy), strict=True):
        close(mine, exact)


def test_a_loss_term_leaves_out_what_the_first_token_does_to_the_second(two_tokens):
    policy, reference = two_tokens
    logprobs, reference_logprobs = responses(*policy), responses(*reference)
    probabilities = logprobs.sum(1).exp()
    whole = torch.autograd.grad((probabilities * (logprobs - reference_logprobs).sum(1)).sum(), policy, retain_graph=True)

    per_token = k2(logprobs.flatten(), reference_logprobs.flatten(), old_logprobs=logprobs.flatten()).view(9, 2)
    found = mean_push(per_token.sum(1), probabilities.detach(), policy)

    close(found[1], whole[1])  # the last token has none after it
    assert (found[0] - whole[0]).abs().max() > 0.02
    close(found[0], torch.autograd.grad(kl(policy[0].log_softmax(0), reference[0].log_softmax(0)), policy[0])[0])


def test_penalties_are_summed_by_response():
    old_logprobs, reference_logprobs = torch.tensor([-1.0, -2.0, -0.5, -3.0]), torch.tensor([-1.5, -1.0, -0.25, -3.0])

    penalty = kl_in_reward(old_logprobs, reference_logprobs, sequence_ids=torch.tensor([2, 0, 2, 0]), num_responses=4, coef=0.5)

    assert penalty.dtype == torch.float64
    assert penalty.tolist() == [-0.5, 0.0, 0.125, 0.0]


def test_a_penalty_is_a_number_without_a_gradient():
    logprobs = torch.tensor([-1.0], requires_grad=True)

    penalty = kl_in_reward(logprobs, logprobs * 2, sequence_ids=torch.tensor([0]), num_responses=1, coef=1.0)

    assert penalty.item() == 1.0
    assert not penalty.requires_grad


@pytest.mark.parametrize("coef", [0.0, -0.1, math.inf, math.nan])
def test_a_coefficient_is_above_zero(coef):
    with pytest.raises(ValueError, match=r"coef = .*: must be finite and above 0; leave the KL term out"):
        kl_in_reward(torch.zeros(1), torch.zeros(1), sequence_ids=torch.tensor([0]), num_responses=1, coef=coef)


def test_ids_index_responses():
    with pytest.raises(ValueError, match=r"sequence_ids of dtype torch\.float32: must be torch\.int64"):
        kl_in_reward(torch.zeros(1), torch.zeros(1), sequence_ids=torch.zeros(1), num_responses=1, coef=1.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: k1(torch.zeros(3), torch.zeros(3, 1)),
        lambda: k2(torch.zeros(3), torch.zeros(3), old_logprobs=torch.zeros(3, 1)),
        lambda: k3(torch.zeros(3), torch.zeros(1), old_logprobs=torch.zeros(3)),
        lambda: kl_in_reward(torch.zeros(3), torch.zeros(3), sequence_ids=torch.tensor([0]), num_responses=1, coef=1.0),
    ],
    ids=["k1", "k2", "k3", "in reward"],
)
def test_shapes_that_would_broadcast_are_refused(call):
    with pytest.raises(ValueError, match="all must be \\[N\\], one value for each trained token"):
        call()


@pytest.mark.parametrize("estimator", [k2, k3])
def test_only_the_policy_gets_a_gradient(estimator):
    logprobs, reference_logprobs, old_logprobs = (torch.tensor([value], requires_grad=True) for value in (-1.0, -2.0, -1.5))

    estimator(logprobs, reference_logprobs, old_logprobs=old_logprobs).sum().backward()

    # ratio * d for k2, ratio * (1 - exp(-d)) for k3: the ratio is a weight and not part of what is differentiated.
    expected = math.exp(0.5) * (1.0 if estimator is k2 else 1 - math.exp(-1.0))
    assert logprobs.grad.item() == pytest.approx(expected, rel=1e-6)
    assert reference_logprobs.grad is None
    assert old_logprobs.grad is None


@given(values=log_ratios)
def test_k2_and_k3_are_never_negative_and_zero_at_the_reference(values):
    log_ratio, zeros = torch.tensor(values), torch.zeros(len(values))
    for estimator in (k2, k3):
        found = estimator(log_ratio, zeros, old_logprobs=log_ratio)
        assert (found >= 0).all()
        assert estimator(log_ratio, log_ratio, old_logprobs=zeros).tolist() == [0.0] * len(values)


@given(values=log_ratios)
def test_the_push_back_of_k3_is_never_weaker_below_the_reference_and_never_stronger_above(values):
    logprobs, zeros = torch.tensor(values).requires_grad_(), torch.zeros(len(values))
    pushes = {}
    for estimator in (k2, k3):
        (pushes[estimator],) = torch.autograd.grad(estimator(logprobs, zeros, old_logprobs=logprobs.detach()).sum(), logprobs)
    torch.testing.assert_close(pushes[k2], logprobs.detach())
    torch.testing.assert_close(pushes[k3], -torch.expm1(-logprobs.detach()))
    assert (pushes[k3] <= pushes[k2] + 1e-6).all()


@pytest.mark.parametrize("estimator", [k2, k3])
@pytest.mark.parametrize("log_ratio", [1e4, -1e4, 100.0, -100.0, 20.0, -20.0])
def test_extreme_ratios_keep_loss_and_gradient_finite(estimator, log_ratio):
    logprobs = torch.tensor([log_ratio, 0.0], requires_grad=True)

    value = estimator(logprobs, torch.zeros(2), old_logprobs=torch.tensor([log_ratio, -log_ratio]))
    (slope,) = torch.autograd.grad(value.sum(), logprobs)

    assert value.isfinite().all()
    assert slope.isfinite().all()


def test_small_log_ratios_are_not_rounded_away():
    log_ratio = torch.tensor([1e-4, -1e-4])

    found = k3(log_ratio, torch.zeros(2), old_logprobs=log_ratio)

    assert found.tolist() == pytest.approx([0.5e-8, 0.5e-8], rel=1e-3)


def test_nan_is_not_hidden():
    nan, zero = torch.tensor([math.nan]), torch.zeros(1)

    assert k1(nan, zero).isnan().all()
    for estimator in (k2, k3):
        assert estimator(nan, zero, old_logprobs=zero).isnan().all()
        assert estimator(zero, nan, old_logprobs=zero).isnan().all()
        assert estimator(zero, zero + 1, old_logprobs=nan).isnan().all()
    assert kl_in_reward(zero, nan, sequence_ids=torch.tensor([0]), num_responses=1, coef=1.0).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_is_in_fp32_whatever_comes_in(dtype):
    streams = [torch.tensor(values, dtype=dtype) for values in ([-0.5, -2.0], [-0.625, -1.5], [-0.75, -2.5])]

    def estimates(logprobs, reference_logprobs, old_logprobs):
        return [
            k1(logprobs, reference_logprobs),
            k2(logprobs, reference_logprobs, old_logprobs=old_logprobs),
            k3(logprobs, reference_logprobs, old_logprobs=old_logprobs),
        ]

    for found, expected in zip(estimates(*streams), estimates(*(stream.float() for stream in streams)), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


class SoftmaxPolicy:
    """A head over fixed hidden states: 16 positions, 6 ids, and a reference that is another such head."""

    def __init__(self):
        generator = torch.Generator().manual_seed(6)
        self.hidden = torch.randn(16, 4, generator=generator)
        self.head = torch.randn(6, 4, generator=generator).requires_grad_()
        self.reference_head = torch.randn(6, 4, generator=generator)
        self.generator = generator

    def exact(self):
        return token_kl(self.hidden, self.head, self.hidden, self.reference_head, allowed=None, temperature=1.0)

    def draw(self, group_size):
        """Returns positions and ids of `group_size` draws at every position."""
        ids = torch.multinomial((self.hidden @ self.head.T).softmax(1).detach(), group_size, replacement=True, generator=self.generator)
        return torch.arange(16).repeat_interleave(group_size), ids.flatten()

    def logprobs(self, positions, ids, *, of_reference=False):
        head = self.reference_head if of_reference else self.head
        return (self.hidden @ head.T).log_softmax(1)[positions, ids]


def exact_loss(policy, *_):
    return policy.exact().mean()


def k1_loss(policy, positions, ids, old_logprobs, reference_logprobs):
    return (policy.logprobs(positions, ids) - reference_logprobs).mean()


def k2_loss(policy, positions, ids, old_logprobs, reference_logprobs):
    return k2(policy.logprobs(positions, ids), reference_logprobs, old_logprobs=old_logprobs).mean()


def k3_loss(policy, positions, ids, old_logprobs, reference_logprobs):
    return k3(policy.logprobs(positions, ids), reference_logprobs, old_logprobs=old_logprobs).mean()


def reward_loss(policy, positions, ids, old_logprobs, reference_logprobs):
    """The policy gradient of responses of one token whose whole reward is the penalty; advantages within the group of a position."""
    penalty = kl_in_reward(old_logprobs, reference_logprobs, sequence_ids=torch.arange(len(ids)), num_responses=len(ids), coef=1.0)
    by_group = -penalty.view(16, -1)
    advantages = (by_group - by_group.mean(1, keepdim=True)).flatten()
    ratio = (policy.logprobs(positions, ids).detach() - old_logprobs).exp()
    return (ratio * reinforce(policy.logprobs(positions, ids), advantages=advantages)).mean()


def divergence_after_training(loss):
    """Returns the KL to the reference before and after 100 updates, two for each draw of 16 x 32 tokens."""
    policy = SoftmaxPolicy()
    optimizer = torch.optim.SGD([policy.head], lr=0.2)
    before = policy.exact().mean().item()
    for _ in range(50):
        drawn = policy.draw(32)
        old_logprobs, reference_logprobs = policy.logprobs(*drawn).detach(), policy.logprobs(*drawn, of_reference=True)
        for _ in range(2):
            optimizer.zero_grad()
            loss(policy, *drawn, old_logprobs, reference_logprobs).backward()
            optimizer.step()
    return before, policy.exact().mean().item()


@pytest.mark.parametrize("loss", [exact_loss, k2_loss, k3_loss, reward_loss])
def test_every_form_on_offer_draws_the_policy_to_the_reference(loss):
    before, after = divergence_after_training(loss)

    assert before > 1.0
    assert after < 0.2 * before


def test_k1_as_a_loss_does_not():
    before, after = divergence_after_training(k1_loss)

    assert after > 0.7 * before
