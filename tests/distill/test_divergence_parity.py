"""Every divergence that a student is trained on, against plain formulas in fp64, against trl's losses, and against its promises."""

import math
import os
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vlpost.distill.bucketed import bucketed_divergence
from vlpost.distill.step_loss import log_ratio_advantages
from vlpost.model.divergence import token_forward_kl, token_jsd, token_kl

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from trl.experimental.gold.gold_trainer import GOLDTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer.distillation_trainer import _chunked_divergence_loss

TOKENS, WIDTH, TEACHER_WIDTH, VOCABULARY = 9, 6, 4, 31
# trl's name for each: its beta 0 is the forward, its beta 1 the reverse KL.
KINDS = [("forward", 0.0), ("reverse", 1.0), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.85)]
kinds = pytest.mark.parametrize(("kind", "beta"), KINDS)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def exact(kind, beta):
    function = {"forward": token_forward_kl, "reverse": token_kl, "jsd": partial(token_jsd, beta=beta)}[kind]
    return partial(function, allowed=None)


def naive(student_logits, teacher_logits, kind, beta):
    """Returns the divergence [N] by sums of probabilities times differences of logarithms, fp64."""
    p, q = student_logits.double().softmax(dim=-1), teacher_logits.double().softmax(dim=-1)

    def kl(first, second):
        return (first * (first.log() - second.log())).sum(dim=-1)

    if kind == "forward":
        return kl(q, p)
    if kind == "reverse":
        return kl(p, q)
    mixture = beta * q + (1.0 - beta) * p
    return beta * kl(q, mixture) + (1.0 - beta) * kl(p, mixture)


def states(*, seed=0, dtype=torch.float32, scale=1.0):
    """Returns hidden states and head of the student, which are trained, and of the teacher."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (TOKENS, WIDTH), (VOCABULARY, WIDTH), (TOKENS, TEACHER_WIDTH), (VOCABULARY, TEACHER_WIDTH)
    parts = [torch.randn(shape, dtype=torch.float64, generator=generator).mul(scale).to(dtype) for shape in shapes]
    return [part.requires_grad_(number < 2) for number, part in enumerate(parts)]


def assert_same(found, expected, trained, tolerance):
    """Compares values and, for an uneven weighting of the tokens, gradients."""
    for part, other in ((found, expected), *gradients(found, expected, trained)):
        assert (part.double() - other.double()).norm() <= tolerance * other.double().norm()
    assert expected.abs().min() > 0.0


def gradients(found, expected, trained):
    weights = torch.linspace(-1.0, 2.0, len(found), dtype=torch.float64)
    return zip(*(torch.autograd.grad((part.double() * weights).sum(), trained) for part in (found, expected)), strict=True)


@kinds
@precisions
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_exact_against_the_naive_formula(kind, beta, dtype, temperature):
    hidden, head, teacher_hidden, teacher_head = inputs = states(dtype=dtype)
    found = exact(kind, beta)(*inputs, temperature=temperature)
    logits = [part.double() @ matrix.double().T / temperature for part, matrix in ((hidden, head), (teacher_hidden, teacher_head))]
    assert_same(found, naive(*logits, kind, beta), (hidden, head), TOLERANCE[dtype])


@kinds
@precisions
def test_bucketed_against_the_naive_formula_on_buckets(kind, beta, dtype):
    generator = torch.Generator().manual_seed(1)
    logits, teacher_logits = (torch.randn(TOKENS, VOCABULARY, dtype=dtype, generator=generator) * 2 for _ in range(2))
    logits.requires_grad_()
    ids = teacher_logits.topk(5, dim=-1).indices
    logprobs, teacher_logprobs = (part.log_softmax(dim=-1).gather(1, ids) for part in (logits, teacher_logits))
    known = torch.ones_like(ids, dtype=torch.bool)
    found = bucketed_divergence(logprobs, teacher_logprobs, known=known, divergence=kind, beta=beta if kind == "jsd" else None)

    def with_tail(part):
        p = part.double().softmax(dim=-1)
        tail = p.scatter(1, ids, 0.0).sum(dim=-1, keepdim=True)
        return torch.cat([p.gather(1, ids), tail], dim=-1).log()

    assert_same(found, naive(with_tail(logits), with_tail(teacher_logits), kind, beta), (logits,), TOLERANCE[dtype])


@kinds
def test_exact_against_the_divergence_function_of_trl(kind, beta):
    hidden, head, teacher_hidden, teacher_head = inputs = states(seed=2)
    found = exact(kind, beta)(*inputs, temperature=0.8)
    expected, _ = ChunkedDivergenceFunction.apply(hidden, head, None, teacher_hidden, teacher_head, None, beta, 0.8)
    assert_same(found, expected, (hidden, head), 1e-4)


@kinds
def test_the_mean_against_the_loss_of_trls_distillation_trainer(kind, beta):
    hidden, head, teacher_hidden, teacher_head = states(seed=3)
    mask = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 1]])
    batches = [part.reshape(3, 3, -1) for part in (hidden, teacher_hidden)]
    expected, _, count = _chunked_divergence_loss(*batches, head, teacher_head, mask, beta, temperature=1.3)
    kept = mask.reshape(-1) == 1
    found = exact(kind, beta)(hidden[kept], head, teacher_hidden[kept], teacher_head, temperature=1.3).mean()
    assert count == 6
    assert_same(found[None], expected[None], (hidden, head), 1e-4)


@kinds
@precisions
def test_the_mean_against_the_loss_of_trls_gold(kind, beta, dtype):
    hidden, head, teacher_hidden, teacher_head = states(seed=4, dtype=dtype)
    labels = torch.tensor([[5, -100, 5, 5, 5, 5, -100, 5, 5]])
    logits, teacher_logits = (hidden @ head.T)[None], (teacher_hidden @ teacher_head.T)[None]
    expected = GOLDTrainer.generalized_jsd_loss(logits, teacher_logits, labels=labels, beta=beta, temperature=0.9)
    kept = labels[0] != -100
    found = exact(kind, beta)(hidden[kept], head, teacher_hidden[kept], teacher_head, temperature=0.9).mean()
    assert_same(found[None], expected[None], (hidden, head), TOLERANCE[dtype])


@kinds
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.03, 1.0, 4.0]))
def test_exact_is_above_zero_unless_the_distributions_are_equal(kind, beta, seed, scale):
    hidden, head, teacher_hidden, teacher_head = states(seed=seed, dtype=torch.float64, scale=scale)
    divergence = partial(exact(kind, beta), temperature=1.0)
    assert divergence(hidden, head, teacher_hidden, teacher_head).min() > 0.0
    # A constant on all logits of a position changes no distribution: another head, the same distributions.
    shifted = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=-1), torch.cat([head, torch.full_like(head[:, :1], 3.0)], dim=-1)
    equal = divergence(hidden, head, *shifted)
    assert equal.abs().max() < 1e-13


@kinds
@given(seed=st.integers(0, 1000), count=st.integers(1, VOCABULARY - 1))
def test_bucketed_is_between_zero_and_exact_on_ids_of_either_model(kind, beta, seed, count):
    generator = torch.Generator().manual_seed(seed)
    hidden, head, teacher_hidden, teacher_head = states(seed=seed, dtype=torch.float64)
    whole = exact(kind, beta)(hidden, head, teacher_hidden, teacher_head, temperature=1.0)
    logprobs, teacher_logprobs = (hidden @ head.T).log_softmax(dim=-1), (teacher_hidden @ teacher_head.T).log_softmax(dim=-1)
    ids = torch.rand(TOKENS, VOCABULARY, generator=generator).topk(count, dim=-1).indices  # any ids, not the likely ones alone
    support = partial(bucketed_divergence, known=torch.ones_like(ids, dtype=torch.bool), divergence=kind)
    beta_of_jsd = beta if kind == "jsd" else None
    found = support(logprobs.gather(1, ids), teacher_logprobs.gather(1, ids), beta=beta_of_jsd)
    assert found.min() >= 0.0
    # Where nearly all mass is known the tail is held at its least, 1e-7: the sum may be off by as much, times its log-ratio.
    assert (found <= whole + 1e-5).all()
    assert support(logprobs.gather(1, ids), logprobs.gather(1, ids), beta=beta_of_jsd).abs().max() < 1e-15


@given(seed=st.integers(0, 1000))
def test_jsd_tends_to_forward_and_reverse_after_division(seed):
    inputs = [part.detach() for part in states(seed=seed, dtype=torch.float64, scale=0.7)]
    forward, reverse = (function(*inputs, allowed=None, temperature=1.0) for function in (token_forward_kl, token_kl))

    def gaps(small):
        to_forward = token_jsd(*inputs, beta=small, allowed=None, temperature=1.0) / small
        to_reverse = token_jsd(*inputs, beta=1.0 - small, allowed=None, temperature=1.0) / small
        return float((to_forward / forward - 1.0).abs().max()), float((to_reverse / reverse - 1.0).abs().max())

    near, far = gaps(1e-7), gaps(1e-3)
    assert max(near) < 1e-2
    assert near[0] < far[0]
    assert near[1] < far[1]


def test_the_gradient_of_jsd_tends_to_those_of_forward_and_reverse():
    inputs = states(seed=5, dtype=torch.float64)
    for limit, beta in ((token_forward_kl, 1e-7), (token_kl, 1.0 - 1e-7)):
        expected = limit(*inputs, allowed=None, temperature=1.0)
        assert_same(token_jsd(*inputs, beta=beta, allowed=None, temperature=1.0) / 1e-7, expected, inputs[:2], 1e-2)


def sampled_over_the_vocabulary(logits, teacher_logits):
    """Returns log-probs [N, V] of all draws of both, and the student's probability of each draw, which carries no gradient."""
    logprobs, teacher_logprobs = logits.log_softmax(dim=-1), teacher_logits.log_softmax(dim=-1)
    return logprobs, teacher_logprobs, logprobs.detach().exp()


@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 1.0, 3.0]))
def test_the_sampled_advantage_has_the_value_and_the_gradient_of_the_reverse_kl(seed, scale):
    hidden, head, teacher_hidden, teacher_head = inputs = states(seed=seed, dtype=torch.float64, scale=scale)
    reverse = token_kl(*inputs, allowed=None, temperature=1.0)
    logprobs, teacher_logprobs, chance = sampled_over_the_vocabulary(hidden @ head.T, teacher_hidden @ teacher_head.T)
    advantages = log_ratio_advantages(teacher_logprobs, logprobs)
    torch.testing.assert_close(-(chance * advantages).sum(dim=-1), reverse.detach(), rtol=1e-6, atol=1e-12)
    # The mean over the draws of the policy loss, -advantage * log p(drawn) on policy.
    expected_loss = -(chance * advantages * logprobs).sum(dim=-1)
    for mine, other in gradients(expected_loss, reverse, (hidden, head)):
        assert (mine - other).norm() <= 1e-6 * other.norm()


def test_the_sampled_log_ratio_as_a_loss_of_its_own_has_no_gradient_in_the_mean():
    """The trap: its value is the reverse KL, its gradient is the score, whose mean is zero whatever the teacher is."""
    hidden, head, teacher_hidden, teacher_head = inputs = states(seed=6, dtype=torch.float64)
    logprobs, teacher_logprobs, chance = sampled_over_the_vocabulary(hidden @ head.T, teacher_hidden @ teacher_head.T)
    direct = (chance * (logprobs - teacher_logprobs)).sum(dim=-1)
    reverse = token_kl(*inputs, allowed=None, temperature=1.0)
    torch.testing.assert_close(direct, reverse, rtol=1e-6, atol=0.0)
    for useless, wanted in gradients(direct, reverse, (hidden, head)):
        assert useless.norm() < 1e-12
        assert wanted.norm() > 0.1


def test_the_mean_over_real_draws_is_the_reverse_kl():
    hidden, head, teacher_hidden, teacher_head = inputs = states(seed=7, dtype=torch.float64)
    reverse = token_kl(*inputs, allowed=None, temperature=1.0)
    logprobs, teacher_logprobs, chance = sampled_over_the_vocabulary(hidden @ head.T, teacher_hidden @ teacher_head.T)
    count = 40_000
    drawn = torch.multinomial(chance, count, replacement=True, generator=torch.Generator().manual_seed(8))
    advantages = log_ratio_advantages(teacher_logprobs.gather(1, drawn), logprobs.gather(1, drawn))
    error = -advantages.mean(dim=-1) - reverse
    assert (error.abs() < 5.0 * advantages.std(dim=-1) / math.sqrt(count)).all()
