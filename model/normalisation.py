"""RMS normalisation that keeps one number a row for backward, where autograd keeps five tensors of the input's size.

y = w * x / sqrt(mean(x^2) + eps). The language model of Qwen3-VL does it four times a layer; written as single operations, as in
transformers, it takes a twentieth of an update's time on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ANN401
        scale = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        scale = scale.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        normal = (hidden * scale).to(hidden.dtype)
        return normal.mul_(weight) if weight.dtype == normal.dtype else normal * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # noqa: ANN401
        hidden, weight, scale = ctx.saved_tensors
        grad, factor = grad_outputs[0].float(), weight.float()
        normal = hidden * scale
        weighted = grad * normal
        # With n = x / rms: dx = (g w - n mean(g w n)) / rms, dw = sum of g n over rows.
        mean = (weighted @ factor)[..., None] / hidden.shape[-1]
        grad_hidden = (grad * factor).addcmul_(normal, mean, value=-1.0).mul_(scale).to(hidden.dtype)
        grad_weight = weighted.flatten(0, -2).sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_weight, None


def rms_norm(hidden: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Returns weight * hidden / rms [..., H]; the mean is taken in fp32, the quotient rounded to `hidden`'s dtype, as in transformers."""
    result = _RmsNorm.apply(hidden, weight, eps)
    assert isinstance(result, Tensor)
    return result


def normalise_in_one_step(model: nn.Module) -> None:
    """Makes the language model's normalisations use `rms_norm`, in place; weights and their names stay the same."""
    for module in model.modules():
        if type(module).__name__ in ("Qwen3VLTextRMSNorm", "Qwen3VLMoeTextRMSNorm"):
            module.__class__ = type("OneStepRmsNorm", (type(module),), {"forward": _forward})


def _forward(self: Any, hidden_states: Tensor) -> Tensor:  # noqa: ANN401
    return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)
