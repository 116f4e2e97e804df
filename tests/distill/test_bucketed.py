"""The divergence on a few ids and a bucket of the others, against the formula, its exact neighbour and its promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vlpost.distill.bucketed import bucketed_divergence
from vlpost.model.logprobs import support_logprobs

VOCABULARY = 11
KINDS = [("forward", None), ("reverse", None), ("jsd", 0.3)]


def distributions(seed, *, positions=5, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(positions, VOCABULARY, dtype=torch.float64, generator=generator) * scale).log_softmax(dim=-1) for _ in range(2)]


def by_hand(p, q, kind, beta):
    """Returns the divergence of lists of bucket masses."""

    def kl(first, second):
        return sum(a * math.log(a / b) for a, b in zip(first, second, strict=True) if a > 0)

    if kind == "forward":
        return kl(q, p)
    if kind == "reverse":
        return kl(p, q)
    mixture = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]
    return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)


def exact(p, q, kind, beta):
    return torch.tensor([by_hand(a.tolist(), b.tolist(), kind, beta) for a, b in zip(p.exp(), q.exp(), strict=True)], dtype=torch.float64)


def top(teacher, count):
    return teacher.topk(count, dim=-1).indices


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@given(seed=st.integers(0, 500), count=st.integers(1, VOCABULARY - 1))
def test_values_and_gradient_against_the_buckets_written_out(kind, beta, seed, count):
    student, teacher = distributions(seed)
    student.requires_grad_()
    ids = top(teacher, count)
    found = bucketed_divergence(
        student.gather(1, ids), teacher.gather(1, ids), known=torch.ones_like(ids, dtype=torch.bool), divergence=kind, beta=beta
    )
    for row in range(len(ids)):
        p, q = ([*part[row, ids[row]].exp().tolist()] for part in (student, teacher))
        expected = by_hand([*p, max(1 - sum(p), 1e-7)], [*q, max(1 - sum(q), 1e-7)], kind, beta)
        assert found[row].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert torch.autograd.gradcheck(
        lambda values: bucketed_divergence(
            values, teacher.gather(1, ids), known=torch.ones_like(ids, dtype=torch.bool), divergence=kind, beta=beta
        ),
        (student.detach().gather(1, ids).clamp(min=-8.0).requires_grad_(),),
        atol=1e-4,
    )


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@given(seed=st.integers(0, 500), count=st.integers(1, VOCABULARY - 1))
def test_it_is_never_negative_nor_above_the_exact_divergence_and_grows_with_the_ids(kind, beta, seed, count):
    student, teacher = distributions(seed)
    values = []
    for number in (count, VOCABULARY - 1):
        ids = top(teacher, number)
        known = torch.ones_like(ids, dtype=torch.bool)
        values.append(bucketed_divergence(student.gather(1, ids), teacher.gather(1, ids), known=known, divergence=kind, beta=beta))
    whole = exact(student, teacher, kind, beta)
    assert values[0].min() >= 0.0
    assert (values[0] <= values[1] + 1e-6).all()
    assert (values[1] <= whole + 1e-5).all()
    torch.testing.assert_close(values[1], whole, rtol=1e-4, atol=1e-5)  # all ids but one: the last is the bucket


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_equal_buckets_give_zero_also_where_the_rest_differs(kind, beta):
    teacher = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    student = torch.tensor([[0.5, 0.2, 0.05, 0.25]]).log().requires_grad_()
    ids = torch.tensor([[0, 1]])
    known = torch.ones_like(ids, dtype=torch.bool)
    found = bucketed_divergence(student.gather(1, ids), teacher.gather(1, ids), known=known, divergence=kind, beta=beta)
    assert found.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("nothing", [float("nan"), float("-inf"), -9999.0])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_an_id_without_a_number_joins_the_others(kind, beta, nothing):
    student = torch.tensor([[0.4, 0.3, 0.1]]).log().requires_grad_()
    teacher = torch.tensor([[0.5, 0.3, 0.1]]).log()
    teacher[0, 2] = nothing
    known = torch.ones(1, 3, dtype=torch.bool)
    found = bucketed_divergence(student, teacher, known=known, divergence=kind, beta=beta)
    without = bucketed_divergence(student[:, :2], teacher[:, :2], known=known[:, :2], divergence=kind, beta=beta)
    assert found.item() == pytest.approx(without.item(), rel=1e-12)
    (grad,) = torch.autograd.grad(found.sum(), student)
    assert grad.isfinite().all()
    assert grad[0, 2] == 0.0
    padded = bucketed_divergence(student, teacher.nan_to_num(-1.0), known=torch.tensor([[True, True, False]]), divergence=kind, beta=beta)
    assert padded.item() == pytest.approx(without.item(), rel=1e-12)


def test_student_mass_outside_the_teachers_ids_is_not_free():
    teacher = torch.tensor([[0.6, 0.3]]).log()
    outside = torch.tensor([[0.06, 0.03]]).log()  # the same shape, nine tenths elsewhere: renormalised they would be equal
    known = torch.ones(1, 2, dtype=torch.bool)
    assert bucketed_divergence(outside, teacher, known=known, divergence="forward").item() > 1.0


@pytest.mark.parametrize(("kind", "beta"), [("jsd", None), ("forward", 0.5), ("jsd", 1.0), ("jsd", 0.0)])
def test_a_beta_that_does_not_fit_is_refused(kind, beta):
    known = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="jsd needs a beta strictly between 0 and 1"):
        bucketed_divergence(torch.zeros(1, 2), torch.zeros(1, 2), known=known, divergence=kind, beta=beta)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"must be three times \[N, K\]"):
        bucketed_divergence(torch.zeros(1, 2), torch.zeros(1, 3), known=torch.ones(1, 2, dtype=torch.bool), divergence="forward")


@pytest.mark.parametrize("allowed", [None, torch.tensor([number != 3 for number in range(VOCABULARY)])], ids=["all", "some"])
def test_logprobs_of_several_ids_are_those_of_the_whole_vocabulary(allowed):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 4, generator=generator).requires_grad_()
    head = torch.randn(VOCABULARY, 4, generator=generator).requires_grad_()
    ids = torch.tensor([[0, 1, 1], [2, 10, 4], [5, 6, 7], [8, 9, 0], [1, 2, 4], [10, 0, 5]])  # 1 twice in the first row
    found, _ = support_logprobs(hidden, head, token_ids=ids, allowed=allowed, temperature=0.7)
    logits = hidden @ head.T / 0.7
    logits = logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)
    expected = logits.log_softmax(dim=-1).gather(1, ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn(6, 3, generator=generator)
    grads = torch.autograd.grad((found * direction).sum(), (hidden, head))
    expected_grads = torch.autograd.grad((expected * direction).sum(), (hidden, head))
    for mine, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
