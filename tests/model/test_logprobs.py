import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vlpost.model import logprobs as logprobs_module
from vlpost.model.logprobs import token_logprobs

TOKENS, WIDTH, VOCABULARY = 7, 5, 23
# The vocabulary blocks of 4 then begin at 0, 4, ..., 20; blocks 1 and 3 hold no allowed id, neither does the last (short) one.
ALLOWED = torch.tensor([token % 3 != 1 and token // 4 not in (1, 3, 5) for token in range(VOCABULARY)])


@pytest.fixture(params=[(2048, 16384), (3, 4), (1, 1), (7, 23), (4, 22), (100, 5)], ids=str)
def blocks(request, monkeypatch):
    monkeypatch.setattr(logprobs_module, "TOKEN_BLOCK", request.param[0])
    monkeypatch.setattr(logprobs_module, "VOCABULARY_BLOCK", request.param[1])


def random_inputs(*, seed=0, scale=1.0, num_tokens=TOKENS, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, WIDTH, generator=generator) * scale
    head = torch.randn(vocabulary, WIDTH, generator=generator)
    return hidden.requires_grad_(), head.requires_grad_()


def reference(hidden, head, token_ids, allowed, temperature):
    """Returns log-probs and entropy by log_softmax over the whole vocabulary, fp64."""
    logits = hidden.double() @ head.double().T / temperature
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    logprobs = logits.log_softmax(dim=-1)
    entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs.isinf(), 0.0)).sum(dim=-1)
    return logprobs.gather(1, token_ids[:, None])[:, 0], entropy


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("allowed", [None, ALLOWED], ids=["whole vocabulary", "allowed ids"])
def test_values_and_gradients_against_log_softmax_in_fp64(temperature, allowed):
    hidden, head = random_inputs()
    # First and last id of the vocabulary, or of what is allowed of it, are among the targets.
    choices = torch.arange(VOCABULARY) if allowed is None else allowed.nonzero()[:, 0]
    token_ids = choices[torch.tensor([0, -1, 1, -2, 0, 3, -1])]
    found, entropy = token_logprobs(hidden, head, token_ids=token_ids, allowed=allowed, temperature=temperature)
    expected, expected_entropy = reference(hidden, head, token_ids, allowed, temperature)
    assert (found.dtype, entropy.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy.detach(), rtol=0, atol=2e-6)

    direction = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -0.1, 1.0])
    grads = torch.autograd.grad((found * direction).sum(), (hidden, head))
    expected_grads = torch.autograd.grad((expected * direction.double()).sum(), (hidden, head))
    for mine, other in zip(grads, expected_grads, strict=True):
        assert (mine - other).norm() <= 1e-6 * other.norm()


@pytest.mark.usefixtures("blocks")
def test_gradient_equals_finite_differences():
    hidden, head = random_inputs(seed=2)
    token_ids = torch.tensor([0, 22, 5, 9, 0, 16, 8])

    def loss(hidden, head):
        # Smooth but not linear, so that the incoming gradient differs from token to token.
        return token_logprobs(hidden, head, token_ids=token_ids, allowed=None, temperature=0.8)[0].square().mean()

    value = loss(hidden, head)
    grads = torch.autograd.grad(value, (hidden, head))
    generator = torch.Generator().manual_seed(3)
    step = 1e-2
    for _ in range(3):
        ahead = [torch.randn(part.shape, generator=generator) for part in (hidden, head)]
        ahead = [part / part.norm() for part in ahead]
        with torch.no_grad():
            up, down = (loss(hidden + sign * step * ahead[0], head + sign * step * ahead[1]) for sign in (1, -1))
        slope = sum((grad * part).sum() for grad, part in zip(grads, ahead, strict=True))
        assert float((up - down) / (2 * step)) == pytest.approx(float(slope), rel=2e-3, abs=2e-3)


@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    token_block=st.integers(1, 9),
    vocabulary_block=st.integers(1, 25),
)
@settings(max_examples=60)
def test_any_blocks_and_any_size_of_logits(seed, scale, token_block, vocabulary_block):
    hidden, head = random_inputs(seed=seed, scale=scale)
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(VOCABULARY, generator=generator) < 0.3
    allowed[seed % VOCABULARY] = True
    choices = allowed.nonzero()[:, 0]
    token_ids = choices[torch.randint(len(choices), (TOKENS,), generator=generator)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs_module, "TOKEN_BLOCK", token_block)
        patch.setattr(logprobs_module, "VOCABULARY_BLOCK", vocabulary_block)
        found, entropy = token_logprobs(hidden, head, token_ids=token_ids, allowed=allowed, temperature=0.9)
        grads = torch.autograd.grad(found.sum(), (hidden, head))
    expected, expected_entropy = reference(hidden, head, token_ids, allowed, 0.9)
    size = 1.0 + float((hidden.detach() @ head.detach().T).abs().max())  # fp32 logits are exact to about 1e-7 of their size
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6 * size)
    torch.testing.assert_close(entropy.double(), expected_entropy.detach(), rtol=0, atol=1e-5 * size)
    assert all(grad.isfinite().all() for grad in grads)
    assert (entropy >= -1e-6 * size).all()
    assert (found <= 1e-6 * size).all()


@pytest.mark.usefixtures("blocks")
def test_entropy_of_known_distributions():
    head = torch.cat([torch.eye(4), torch.zeros(4, 4)])
    hidden = torch.zeros(2, 4)
    hidden[1, 2] = 200.0  # all mass on id 2
    logprobs, entropy = token_logprobs(hidden, head, token_ids=torch.tensor([5, 2]), allowed=None, temperature=1.0)
    assert logprobs.tolist() == pytest.approx([-torch.log(torch.tensor(8.0)).item(), 0.0], abs=1e-6)
    assert entropy.tolist() == pytest.approx([torch.log(torch.tensor(8.0)).item(), 0.0], abs=1e-6)
    allowed = torch.tensor([False, False, True, False, False, False, False, True])
    _, entropy = token_logprobs(hidden[:1], head, token_ids=torch.tensor([2]), allowed=allowed, temperature=1.0)
    assert entropy.item() == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)


def test_the_entropy_carries_no_gradient():
    hidden, head = random_inputs()
    logprobs, entropy = token_logprobs(hidden, head, token_ids=torch.zeros(TOKENS, dtype=torch.int64), allowed=None, temperature=1.0)
    assert logprobs.requires_grad
    assert not entropy.requires_grad


@pytest.mark.usefixtures("blocks")
def test_a_disallowed_target_has_no_probability():
    hidden, head = random_inputs()
    allowed = torch.ones(VOCABULARY, dtype=torch.bool)
    allowed[[3, 22]] = False
    token_ids = torch.tensor([3, 0, 22, 1, 2, 3, 4])
    logprobs, entropy = token_logprobs(hidden, head, token_ids=token_ids, allowed=allowed, temperature=1.0)
    assert logprobs.isneginf().tolist() == [True, False, True, False, False, True, False]
    torch.testing.assert_close(entropy.double(), reference(hidden, head, token_ids, allowed, 1.0)[1].detach(), rtol=0, atol=2e-6)


def test_a_ban_renormalises():
    hidden, head = random_inputs()
    allowed = ALLOWED.nonzero()[:, 0]
    logprobs = [
        token_logprobs(hidden, head, token_ids=token.expand(TOKENS), allowed=ALLOWED, temperature=1.0)[0].detach() for token in allowed
    ]
    torch.testing.assert_close(torch.stack(logprobs).exp().sum(dim=0), torch.ones(TOKENS))


def test_no_targets_give_no_values_and_a_zero_gradient():
    hidden, head = random_inputs(num_tokens=0)
    logprobs, entropy = token_logprobs(hidden, head, token_ids=torch.zeros(0, dtype=torch.int64), allowed=None, temperature=1.0)
    assert (logprobs.shape, entropy.shape) == ((0,), (0,))
    logprobs.sum().backward()
    assert torch.equal(head.grad, torch.zeros_like(head))


def test_bfloat16_inputs_give_fp32_values_and_bfloat16_gradients():
    hidden, head = (part.detach().bfloat16().requires_grad_() for part in random_inputs())
    token_ids = torch.arange(TOKENS)
    logprobs, _ = token_logprobs(hidden, head, token_ids=token_ids, allowed=None, temperature=1.0)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), reference(hidden, head, token_ids, None, 1.0)[0], rtol=0, atol=0.05)
    logprobs.sum().backward()
    assert (hidden.grad.dtype, head.grad.dtype) == (torch.bfloat16, torch.bfloat16)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)), 0)
        return out


def test_no_tensor_of_tokens_times_vocabulary_is_made(monkeypatch):
    monkeypatch.setattr(logprobs_module, "TOKEN_BLOCK", 16)
    monkeypatch.setattr(logprobs_module, "VOCABULARY_BLOCK", 32)
    hidden, head = random_inputs(num_tokens=64, vocabulary=128)
    token_ids = torch.arange(64)

    def largest(compute):
        with LargestTensor() as seen:
            compute().sum().backward()
        return seen.elements

    whole = largest(lambda: (hidden @ head.T).log_softmax(dim=-1).gather(1, token_ids[:, None]))
    blockwise = largest(lambda: token_logprobs(hidden, head, token_ids=token_ids, allowed=torch.arange(128) > -1, temperature=0.5)[0])
    assert whole == 64 * 128
    # The largest things left are the head's gradient and transpose.
    assert blockwise == max(16 * 32, 128 * WIDTH)
