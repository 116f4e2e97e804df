import pytest
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm
from vlpost.model.normalisation import normalise_in_one_step, rms_norm

EPS = 1e-6


@pytest.fixture(params=[(3, 5, 8), (1, 7, 4, 16), (2, 64)], ids=str)
def shape(request):
    return request.param


def values(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in (shape, shape[-1:], shape)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_equal_transformers(shape, dtype):
    hidden, weight, grad = values(shape, dtype)
    theirs = Qwen3VLTextRMSNorm(shape[-1], eps=EPS).to(dtype)
    theirs.weight.data.copy_(weight)
    ours_in, theirs_in = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    ours_weight = weight.clone().requires_grad_()
    ours, expected = rms_norm(ours_in, ours_weight, eps=EPS), theirs(theirs_in)
    assert ours.dtype == expected.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    ours.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=tolerance, atol=5 * tolerance)
    torch.testing.assert_close(ours_weight.grad, theirs.weight.grad, rtol=tolerance, atol=10 * tolerance)


def test_bf16_states_under_an_fp32_weight_give_fp32_as_in_transformers(shape):
    hidden, _, _ = values(shape, torch.bfloat16)
    weight = torch.full(shape[-1:], 1.5)
    theirs = Qwen3VLTextRMSNorm(shape[-1], eps=EPS)
    theirs.weight.data.copy_(weight)
    ours, expected = rms_norm(hidden, weight, eps=EPS), theirs(hidden)
    assert ours.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)


def test_numbers_written_out():
    hidden = torch.tensor([[3.0, 4.0]], requires_grad=True)
    result = rms_norm(hidden, torch.tensor([1.0, 10.0]), eps=0.0)
    rms = (12.5) ** 0.5
    assert result.tolist()[0] == pytest.approx([3 / rms, 40 / rms])
    result.sum().backward()
    # d/dx of (x + 10 y) / rms at (3, 4): (1, 10) / rms - (x, y) (x + 10 y) / (2 rms^3)
    assert hidden.grad.tolist()[0] == pytest.approx([1 / rms - 3 * 43 / (2 * rms**3), 10 / rms - 4 * 43 / (2 * rms**3)])


def test_a_frozen_weight_gets_no_gradient():
    hidden, weight = torch.ones(2, 4, requires_grad=True), torch.ones(4)
    rms_norm(hidden, weight, eps=EPS).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_a_model_s_norms_are_exchanged_and_keep_their_weights(make_model):
    model = make_model()
    names = [name for name, module in model.named_modules() if type(module).__name__ == "OneStepRmsNorm"]
    layers = model.config.get_text_config().num_hidden_layers
    assert len(names) == 4 * layers + 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    normalise_in_one_step(model)
    assert [name for name, module in model.named_modules() if type(module).__name__ == "OneStepRmsNorm"] == names
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
