"""Exact KL in blocks: values and gradients against the whole vocabulary in fp64, properties, and what is never held in memory."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vlpost.model import divergence as divergence_module
from vlpost.model.divergence import token_forward_kl, token_jsd, token_kl

TOKENS, WIDTH, REFERENCE_WIDTH, VOCABULARY = 7, 5, 3, 23
# With vocabulary blocks of 4 at 0, 4, ..., 20 the blocks 1 and 3 hold no allowed id, neither does the last (short) one.
ALLOWED = torch.tensor([token % 3 != 1 and token // 4 not in (1, 3, 5) for token in range(VOCABULARY)])
BETA = 0.3
DIRECTIONS = {"policy to reference": token_kl, "reference to policy": token_forward_kl, "both to a mixture": partial(token_jsd, beta=BETA)}


@pytest.fixture(params=[(2048, 16384), (3, 4), (1, 1), (7, 23), (4, 22), (100, 5)], ids=str)
def blocks(request, monkeypatch):
    set_blocks(monkeypatch, *request.param)


@pytest.fixture(params=DIRECTIONS.values(), ids=DIRECTIONS.keys())
def divergence(request):
    return request.param


def set_blocks(patch, tokens, vocabulary):
    """Sets tiles of tokens x vocabulary; the rows that forward holds whole have twice as many elements."""
    elements = tokens * vocabulary
    patch.setattr(divergence_module, "_block_sizes", lambda device, num_ids: (max(1, 2 * elements // num_ids), tokens, elements))


def random_inputs(*, seed=0, scale=1.0, num_tokens=TOKENS, vocabulary=VOCABULARY, reference_width=REFERENCE_WIDTH):
    """Returns hidden states and head of the policy, then of the reference."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, WIDTH, generator=generator) * scale
    head = torch.randn(vocabulary, WIDTH, generator=generator)
    reference_hidden = torch.randn(num_tokens, reference_width, generator=generator) * scale
    reference_head = torch.randn(vocabulary, reference_width, generator=generator)
    return hidden.requires_grad_(), head.requires_grad_(), reference_hidden, reference_head


def over_whole_vocabulary(hidden, head, reference_hidden, reference_head, *, allowed, temperature, divergence):
    """Returns the divergence by torch.nn.functional.kl_div on the log-softmax of the allowed columns, fp64."""

    def kl(first, second):
        return torch.nn.functional.kl_div(second, first, reduction="none", log_target=True).sum(dim=-1)

    columns = slice(None) if allowed is None else allowed
    logprobs = (hidden.double() @ head.double()[columns].T / temperature).log_softmax(dim=-1)
    reference = (reference_hidden.double() @ reference_head.double()[columns].T / temperature).log_softmax(dim=-1)
    if divergence is token_kl:
        return kl(logprobs, reference)
    if divergence is token_forward_kl:
        return kl(reference, logprobs)
    mixture = torch.logaddexp(math.log(BETA) + reference, math.log1p(-BETA) + logprobs)
    return BETA * kl(reference, mixture) + (1.0 - BETA) * kl(logprobs, mixture)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("allowed", [None, ALLOWED], ids=["whole vocabulary", "allowed ids"])
def test_values_and_gradients_against_torch_in_fp64(divergence, temperature, allowed):
    inputs = random_inputs()
    found = divergence(*inputs, allowed=allowed, temperature=temperature)
    expected = over_whole_vocabulary(*inputs, allowed=allowed, temperature=temperature, divergence=divergence)
    assert found.dtype == torch.float32
    assert expected.min() > 0.04
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)

    direction = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -0.1, 1.0])
    grads = torch.autograd.grad((found * direction).sum(), inputs[:2])
    expected_grads = torch.autograd.grad((expected * direction.double()).sum(), inputs[:2])
    for mine, other in zip(grads, expected_grads, strict=True):
        assert (mine - other).norm() <= 5e-6 * other.norm()


@pytest.mark.usefixtures("blocks")
def test_gradient_equals_finite_differences(divergence):
    hidden, head, *reference = random_inputs(seed=2)

    def loss(hidden, head):
        # Smooth but not linear, so that the incoming gradient differs from token to token.
        return divergence(hidden, head, *reference, allowed=ALLOWED, temperature=0.8).square().mean()

    grads = torch.autograd.grad(loss(hidden, head), (hidden, head))
    generator = torch.Generator().manual_seed(3)
    step = 1e-2
    for _ in range(3):
        ahead = [torch.randn(part.shape, generator=generator) for part in (hidden, head)]
        ahead = [part / part.norm() for part in ahead]
        with torch.no_grad():
            up, down = (loss(hidden + sign * step * ahead[0], head + sign * step * ahead[1]) for sign in (1, -1))
        slope = sum((grad * part).sum() for grad, part in zip(grads, ahead, strict=True))
        assert float((up - down) / (2 * step)) == pytest.approx(float(slope), rel=5e-3, abs=5e-3)


@pytest.mark.parametrize("allowed", [None, ALLOWED], ids=["whole vocabulary", "allowed ids"])
def test_gradcheck_in_fp64(divergence, allowed, monkeypatch):
    set_blocks(monkeypatch, 3, 4)
    hidden, head, *reference = (part.detach().double() for part in random_inputs(seed=4))

    def compute(hidden, head):
        return divergence(hidden, head, *reference, allowed=allowed, temperature=0.8)

    assert compute(hidden, head).dtype == torch.float64
    assert torch.autograd.gradcheck(compute, (hidden.requires_grad_(), head.requires_grad_()))


def test_autocast_is_followed_in_forward_and_backward(divergence):
    inputs = random_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = divergence(*inputs, allowed=ALLOWED, temperature=1.0)
    grads = torch.autograd.grad(found.sum(), inputs[:2])
    rounded = [part.detach().bfloat16() for part in inputs]
    policy = [part.requires_grad_() for part in rounded[:2]]
    expected = divergence(*rounded, allowed=ALLOWED, temperature=1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for mine, other in zip(grads, torch.autograd.grad(expected.sum(), policy), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - other).norm() <= 0.01 * other.norm()


@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    token_block=st.integers(1, 9),
    vocabulary_block=st.integers(1, 25),
    divergence=st.sampled_from(list(DIRECTIONS.values())),
)
@settings(max_examples=60)
def test_any_blocks_and_any_size_of_logits(seed, scale, token_block, vocabulary_block, divergence):
    inputs = random_inputs(seed=seed, scale=scale)
    allowed = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(seed)) < 0.3
    allowed[seed % VOCABULARY] = True
    with pytest.MonkeyPatch.context() as patch:
        set_blocks(patch, token_block, vocabulary_block)
        found = divergence(*inputs, allowed=allowed, temperature=0.9)
        grads = torch.autograd.grad(found.sum(), inputs[:2])
    expected = over_whole_vocabulary(*inputs, allowed=allowed, temperature=0.9, divergence=divergence)
    # fp32 logits are exact to about 1e-7 of their size, and the divergence's slope in them is of their size at most.
    size = 1.0 + max(float((inputs[part].detach() @ inputs[part + 1].detach().T).abs().max()) for part in (0, 2))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6 * size + 1e-7 * size**2)
    assert (found >= -1e-6).all()
    assert all(grad.isfinite().all() for grad in grads)


@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 1.0, 30.0]), divergence=st.sampled_from(list(DIRECTIONS.values())))
@settings(max_examples=25)
def test_equal_distributions_have_no_divergence_and_no_gradient(seed, scale, divergence):
    hidden, head, *_ = random_inputs(seed=seed, scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        set_blocks(patch, 3, 4)
        found = divergence(hidden, head, hidden.clone(), head.clone(), allowed=ALLOWED, temperature=1.3)
    assert found.tolist() == [0.0] * TOKENS
    for grad in torch.autograd.grad(found.sum(), (hidden, head)):
        assert grad.abs().max() == 0.0


@given(seed=st.integers(0, 1000), divergence=st.sampled_from(list(DIRECTIONS.values())))
@settings(max_examples=25)
def test_the_order_of_the_ids_does_not_matter(seed, divergence):
    hidden, head, reference_hidden, reference_head = random_inputs(seed=seed)
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        set_blocks(patch, 3, 4)
        given_order = divergence(hidden, head, reference_hidden, reference_head, allowed=ALLOWED, temperature=1.0)
        other_order = divergence(hidden, head[order], reference_hidden, reference_head[order], allowed=ALLOWED[order], temperature=1.0)
    torch.testing.assert_close(other_order, given_order, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("nats", "tolerance"), [(1e-2, 1e-4), (1e-4, 1e-3), (1e-6, 2e-1)])
def test_a_small_divergence_is_a_number_and_not_noise(divergence, nats, tolerance):
    """After the first updates a policy is this near its reference, on logits of the size and number that real models have."""
    generator = torch.Generator().manual_seed(5)
    hidden, head = torch.randn(16, 64, generator=generator), torch.randn(4096, 64, generator=generator) * 0.5
    nudge = torch.randn(16, 64, generator=generator)
    policy = (hidden + nudge * nats**0.5 * 0.35).requires_grad_()
    found = divergence(policy, head, hidden, head, allowed=None, temperature=1.0)
    expected = over_whole_vocabulary(policy, head, hidden, head, allowed=None, temperature=1.0, divergence=divergence)
    assert nats / 8 < expected.mean() < 4 * nats
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=1e-12)
    (grad,) = torch.autograd.grad(found.sum(), policy)
    (expected_grad,) = torch.autograd.grad(expected.sum(), policy)
    assert (grad - expected_grad).norm() <= tolerance * expected_grad.norm()


def test_known_distributions(divergence):
    # Policy: uniform over 4 ids, then over 2 of them; reference: probabilities 1/2, 1/4, 1/8, 1/8.
    hidden, reference_hidden = torch.ones(1, 1), torch.ones(1, 1)
    head, reference_head = torch.zeros(4, 1), torch.tensor([[0.5], [0.25], [0.125], [0.125]]).log()
    log_2 = torch.tensor(2.0).log().item()
    everything = divergence(hidden, head, reference_hidden, reference_head, allowed=None, temperature=1.0)
    first_two = divergence(
        hidden, head, reference_hidden, reference_head, allowed=torch.tensor([True, True, False, False]), temperature=1.0
    )
    ln = torch.tensor([3.0, 2.0]).log().tolist()
    if divergence is token_kl:
        assert everything.item() == pytest.approx(0.25 * log_2, abs=1e-6)  # 1/4 (-1 + 0 + 1 + 1) bit
        assert first_two.item() == pytest.approx(ln[0] - 1.5 * ln[1], abs=1e-6)  # log 3 - log 2 - (log 2) / 2
    elif divergence is not token_forward_kl:
        # m = 0.3 q + 0.7 p: (0.325, 0.25, 0.2125, 0.2125), and (0.55, 0.45) of the first two.
        to_mixture = 0.5 * math.log(0.5 / 0.325) + 2 * 0.125 * math.log(0.125 / 0.2125)
        uniform_to_mixture = 0.25 * (math.log(0.25 / 0.325) + 2 * math.log(0.25 / 0.2125))
        assert everything.item() == pytest.approx(0.3 * to_mixture + 0.7 * uniform_to_mixture, abs=1e-6)
        to_mixture = 2 / 3 * math.log(2 / 3 / 0.55) + 1 / 3 * math.log(1 / 3 / 0.45)
        uniform_to_mixture = 0.5 * (math.log(0.5 / 0.55) + math.log(0.5 / 0.45))
        assert first_two.item() == pytest.approx(0.3 * to_mixture + 0.7 * uniform_to_mixture, abs=1e-6)
    else:
        assert everything.item() == pytest.approx(0.25 * log_2, abs=1e-6)  # 2 bits less 1.75 bits of entropy
        assert first_two.item() == pytest.approx(ln[1] - (ln[0] - ln[1] * 2 / 3), abs=1e-6)  # log 2 less the entropy of (2/3, 1/3)


def test_the_directions_differ():
    inputs = random_inputs()
    forward, reverse = (function(*inputs, allowed=None, temperature=1.0) for function in (token_forward_kl, token_kl))
    assert (forward - reverse).abs().min() > 1e-3
    hidden, head, reference_hidden, reference_head = inputs
    swapped = token_kl(reference_hidden, reference_head, hidden, head, allowed=None, temperature=1.0)
    torch.testing.assert_close(forward, swapped)


def test_the_reference_gets_no_gradient(divergence):
    hidden, head, reference_hidden, reference_head = (part.detach().requires_grad_() for part in random_inputs())
    divergence(hidden, head, reference_hidden, reference_head, allowed=ALLOWED, temperature=1.0).sum().backward()
    assert hidden.grad.abs().max() > 0
    assert head.grad.abs().max() > 0
    assert reference_hidden.grad is None
    assert reference_head.grad is None
    fixed = divergence(hidden.detach(), head.detach(), reference_hidden, reference_head, allowed=None, temperature=1.0)
    assert not fixed.requires_grad


@pytest.mark.parametrize("trained", ["hidden", "head"])
def test_only_what_is_trained_gets_a_gradient(divergence, trained):
    inputs = random_inputs()
    both = torch.autograd.grad(divergence(*inputs, allowed=None, temperature=1.0).sum(), inputs[:2])
    hidden, head, *reference = (part.detach() for part in inputs)
    part = {"hidden": hidden, "head": head}[trained].requires_grad_()
    divergence(hidden, head, *reference, allowed=None, temperature=1.0).sum().backward()
    torch.testing.assert_close(part.grad, both[["hidden", "head"].index(trained)], rtol=0, atol=0)


def test_a_second_derivative_is_refused(divergence):
    hidden, head, *reference = random_inputs()
    found = divergence(hidden, head, *reference, allowed=None, temperature=1.0)
    (grad,) = torch.autograd.grad(found.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_nan_is_not_hidden(divergence):
    hidden, head, reference_hidden, reference_head = (part.detach() for part in random_inputs())
    hidden[2, 0], reference_hidden[4, 1] = torch.nan, torch.nan
    found = divergence(hidden, head, reference_hidden, reference_head, allowed=ALLOWED, temperature=1.0)
    assert found.isnan().tolist() == [row in (2, 4) for row in range(TOKENS)]


def test_what_is_not_allowed_may_be_anything(divergence):
    hidden, head, reference_hidden, reference_head = (part.detach() for part in random_inputs())
    expected = divergence(hidden, head, reference_hidden, reference_head, allowed=ALLOWED, temperature=1.0)
    head[~ALLOWED], reference_head[~ALLOWED] = 1e30, -1e30
    found = divergence(hidden.requires_grad_(), head.requires_grad_(), reference_hidden, reference_head, allowed=ALLOWED, temperature=1.0)
    torch.testing.assert_close(found, expected)
    _, grad = torch.autograd.grad(found.sum(), (hidden, head))
    assert grad[~ALLOWED].abs().max() == 0.0


def test_no_positions_give_no_values_and_a_zero_gradient(divergence):
    hidden, head, *reference = random_inputs(num_tokens=0)
    found = divergence(hidden, head, *reference, allowed=None, temperature=1.0)
    assert found.shape == (0,)
    found.sum().backward()
    assert torch.equal(head.grad, torch.zeros_like(head))
    assert hidden.grad.shape == hidden.shape


def test_bfloat16_inputs_give_fp32_values_and_bfloat16_gradients(divergence):
    inputs = [part.detach().bfloat16() for part in random_inputs()]
    hidden, head = (part.requires_grad_() for part in inputs[:2])
    found = divergence(*inputs, allowed=ALLOWED, temperature=1.0)
    assert found.dtype == torch.float32
    expected = over_whole_vocabulary(*inputs, allowed=ALLOWED, temperature=1.0, divergence=divergence)
    # The products of bfloat16 numbers are summed in fp32: nothing but the inputs is rounded on the way to the value.
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    expected_grads = torch.autograd.grad(expected.sum(), (hidden, head))
    found.sum().backward()
    for part, other in zip((hidden, head), expected_grads, strict=True):
        assert part.grad.dtype == torch.bfloat16
        assert (part.grad.double() - other.double()).norm() <= 0.02 * other.double().norm()


@pytest.mark.parametrize(
    ("tokens", "ids", "words"),
    [
        (6, VOCABULARY, "hidden states of 7 positions and 6 of the reference: they must be of the same positions"),
        (TOKENS, 24, "head of 23 ids and reference head of 24: row by row they must stand for the same ids"),
    ],
)
def test_what_does_not_pair_up_is_refused(divergence, tokens, ids, words):
    hidden, head, *_ = random_inputs()
    with pytest.raises(ValueError, match=words):
        divergence(hidden, head, torch.zeros(tokens, REFERENCE_WIDTH), torch.zeros(ids, REFERENCE_WIDTH), allowed=None, temperature=1.0)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)), 0)
        return out


def test_no_tensor_of_tokens_times_vocabulary_is_made(divergence, monkeypatch):
    set_blocks(monkeypatch, 16, 16)
    inputs = random_inputs(num_tokens=64, vocabulary=128)
    options = {"allowed": torch.arange(128) > -1, "temperature": 0.5}

    def largest(compute):
        with LargestTensor() as seen:
            compute().sum().backward()
        return seen.elements

    whole = largest(lambda: over_whole_vocabulary(*inputs, **options, divergence=divergence))
    blockwise = largest(lambda: divergence(*inputs, **options))
    assert whole == 64 * 128
    # The largest things left are the head's gradient and transpose.
    assert blockwise == max(2 * 16 * 16, 128 * WIDTH)


@pytest.mark.parametrize(("trained", "num_tokens", "expected"), [("hidden", 64, 2 * 16 * 16), ("head", 256, 128 * WIDTH)])
def test_no_gradient_is_computed_for_what_is_frozen(divergence, monkeypatch, trained, num_tokens, expected):
    set_blocks(monkeypatch, 16, 16)
    hidden, head, *reference = (part.detach() for part in random_inputs(num_tokens=num_tokens, vocabulary=128, reference_width=2))
    {"hidden": hidden, "head": head}[trained].requires_grad_()
    with LargestTensor() as seen:
        divergence(hidden, head, *reference, allowed=None, temperature=1.0).sum().backward()
    # The gradient of the frozen part, the larger one here, is not among what was made.
    assert expected < {"hidden": head, "head": hidden}[trained].numel()
    assert seen.elements == expected


def test_backward_keeps_the_inputs_and_three_numbers_a_position(divergence):
    inputs = random_inputs(num_tokens=64, vocabulary=128)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        divergence(*inputs, allowed=None, temperature=1.0)
    assert [tuple(tensor.shape) for tensor in kept] == [*(tuple(part.shape) for part in inputs), (64,), (64,), (64,)]


@given(seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_divided_by_their_weight_the_ends_of_the_jsd_are_the_two_kls(seed):
    inputs = [part.detach().double() for part in random_inputs(seed=seed, scale=0.5)]
    options = {"allowed": ALLOWED, "temperature": 1.0}
    for beta, end in ((1e-9, token_forward_kl), (1.0 - 1e-9, token_kl)):
        torch.testing.assert_close(token_jsd(*inputs, beta=beta, **options) / 1e-9, end(*inputs, **options), rtol=1e-3, atol=1e-6)


@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 1.0, 30.0]), beta=st.floats(0.01, 0.99))
@settings(max_examples=60)
def test_the_jsd_lies_between_zero_and_the_entropy_of_its_weights_and_is_symmetric(seed, scale, beta):
    policy_hidden, policy_head, *reference = (part.detach().double() for part in random_inputs(seed=seed, scale=scale))
    found = token_jsd(policy_hidden, policy_head, *reference, beta=beta, allowed=ALLOWED, temperature=1.0)
    swapped = token_jsd(*reference, policy_hidden, policy_head, beta=1.0 - beta, allowed=ALLOWED, temperature=1.0)
    entropy = -(beta * math.log(beta) + (1.0 - beta) * math.log1p(-beta))
    assert found.min() >= -1e-12
    assert found.max() <= entropy + 1e-9
    torch.testing.assert_close(found, swapped, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_jsd_that_is_zero_whatever_the_policy_is_is_refused(beta):
    with pytest.raises(ValueError, match="must be strictly between 0 and 1"):
        token_jsd(*random_inputs(), beta=beta, allowed=None, temperature=1.0)


def gradients_of(divergence, inputs, weights, *, of_loss, allowed=ALLOWED, temperature=0.7):
    """Returns values and both gradients of the weighted sum; `weights` are what the divergence is told of it."""
    hidden, head = inputs[0].detach().clone().requires_grad_(), inputs[1].detach().clone().requires_grad_()
    values = divergence(hidden, head, *inputs[2:], allowed=allowed, temperature=temperature, weights=weights)
    (of_loss * values).sum().backward()
    return values.detach(), hidden.grad, head.grad


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_are_told_beforehand_change_nothing(divergence, factor, dtype):
    inputs = [part.to(dtype) for part in random_inputs(seed=4)]
    weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1), dtype=dtype)
    weights[2] = 0.0
    for told in (weights, weights * 3.0):
        found = gradients_of(divergence, inputs, told, of_loss=factor * weights)
        expected = gradients_of(divergence, inputs, None, of_loss=factor * weights)
        for mine, plain in zip(found, expected, strict=True):
            assert (mine - plain).norm() <= 20 * torch.finfo(dtype).eps * plain.norm()


@pytest.mark.parametrize("is_told", [True, False])
def test_no_positions_have_no_values_and_zero_gradients(divergence, is_told):
    """A rank whose batch is empty still takes part in the backward pass."""
    hidden, head, reference_hidden, reference_head = random_inputs()
    nothing, weights = (hidden[:0], head, reference_hidden[:0], reference_head), hidden.new_zeros(0)
    values, *gradients = gradients_of(divergence, nothing, weights if is_told else None, of_loss=weights)
    assert len(values) == 0
    assert [float(gradient.abs().sum()) for gradient in gradients] == [0.0, 0.0]


def test_backward_takes_no_product_where_the_weights_were_told(divergence, monkeypatch):
    inputs, weights = random_inputs(), torch.rand(TOKENS, generator=torch.Generator().manual_seed(1))
    values = divergence(*inputs, allowed=None, temperature=1.0, weights=weights)

    def refuse(*_):
        raise AssertionError("the gradient was made already")

    monkeypatch.setattr(divergence_module, "product", refuse)
    monkeypatch.setattr(divergence_module, "tile_logits", refuse)
    (values * weights * 0.5).sum().backward(retain_graph=True)
    assert inputs[0].grad.norm() > 0
    with pytest.raises(AssertionError, match="made already"):
        (values * weights.flip(0)).sum().backward()


def test_a_loss_with_other_weights_than_were_told_has_its_own_gradient(divergence):
    inputs = random_inputs(seed=5)
    told, real = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(2))
    found = gradients_of(divergence, inputs, told, of_loss=real)
    for mine, plain in zip(found, gradients_of(divergence, inputs, None, of_loss=real), strict=True):
        assert torch.equal(mine, plain)
    one_off = told.clone()
    one_off[3] *= 1.001
    found, plain = (gradients_of(divergence, inputs, weights, of_loss=one_off)[2] for weights in (told, None))
    assert (found - plain).norm() <= 1e-6 * plain.norm()


def test_without_a_gradient_none_is_made(divergence, monkeypatch):
    set_blocks(monkeypatch, 16, 16)
    inputs, weights = random_inputs(num_tokens=64, vocabulary=128), torch.ones(64)
    with torch.no_grad(), LargestTensor() as seen:
        divergence(*inputs, allowed=None, temperature=1.0, weights=weights)
    assert seen.elements == 2 * 16 * 16
    with LargestTensor() as seen:
        divergence(*inputs, allowed=None, temperature=1.0, weights=weights)
    assert seen.elements == 128 * WIDTH


def test_weights_of_other_positions_are_refused(divergence):
    with pytest.raises(ValueError, match=r"weights of shape \(3,\) for 7 positions: give one for each"):
        divergence(*random_inputs(), allowed=None, temperature=1.0, weights=torch.ones(3))
