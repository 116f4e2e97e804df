"""Attention over packed segments that share prefixes: a token sees its own past and all of its segment's ancestors.

The partial results of a query, over its own segment and over each ancestor, are merged by their log-sum-exp: no key is copied for its
many readers. Backward calls the kernels' own backward with the merged output and log-sum-exp, which gives each part's exact gradient.

Registered with transformers' attention interface; the model code stays transformers'. Kernels: flash attention (on CUDA its variable-
length form), and plain matrix products where flash has none (fp32 on CUDA).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from .attention_plan import AttentionPlan, Call, VarlenPass

PACKED_ATTENTION = "vlpost_packed"
"""The name under which transformers finds it."""

# The kernels under torch.nn.attention.varlen, whose public function does not let another log-sum-exp into its backward.
flash_varlen = torch.ops.aten._flash_attention_forward
flash_varlen_backward = torch.ops.aten._flash_attention_backward


class _PackedAttention(torch.autograd.Function):
    """Runs the plan's calls; keeps queries, keys, values, the output and one log-sum-exp a query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float) -> Tensor:  # noqa: ANN401
        kernel = _kernel(query, plan, scale)
        out, log_sum_exp = kernel.forward(query, key, value)
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        ctx.kernel = kernel
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # noqa: ANN401
        return (*ctx.kernel.backward(grad_outputs[0], *ctx.saved_tensors), None, None)


Gradients = tuple[Tensor, Tensor, Tensor]


def _kernel(query: Tensor, plan: AttentionPlan, scale: float) -> MatmulKernel | VarlenKernel:
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return VarlenKernel(plan, scale)
    if not query.is_cuda and query.dtype in (torch.float32, torch.bfloat16):
        return CpuKernel(plan, scale)
    return MatmulKernel(plan, scale)


class MatmulKernel:
    """One call after another, by plain matrix products."""

    def __init__(self, plan: AttentionPlan, scale: float) -> None:
        self.plan = plan
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output [1, heads, T, D] and the log-sum-exp [1, heads, T] of the scaled scores."""
        key, value = _for_every_head(query, key), _for_every_head(query, value)
        # Laid out as [1, T, heads, D]: the output projection reads it without a copy, and backward keeps that one tensor.
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        log_sum_exp = torch.empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
        for call in self.plan.own:
            rows = slice(call.start, call.end)
            out[:, :, rows], log_sum_exp[:, :, rows] = self.attend(query[:, :, rows], key[:, :, rows], value[:, :, rows], call)
        for call in self.plan.ancestors:
            rows, keys = slice(call.start, call.end), slice(call.key_start, call.key_end)
            part, part_lse = self.attend(query[:, :, rows], key[:, :, keys], value[:, :, keys], call)
            _merge(out[:, :, rows], log_sum_exp[:, :, rows], part, part_lse)
        return out, log_sum_exp

    def backward(self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum_exp: Tensor) -> Gradients:
        """Returns the gradients of queries, keys and values."""
        full_key, full_value = _for_every_head(query, key), _for_every_head(query, value)
        grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(full_key), torch.zeros_like(full_value)
        for call in (*self.plan.own, *self.plan.ancestors):
            rows, keys = slice(call.start, call.end), slice(call.key_start, call.key_end)
            parts = self.attend_backward(
                grad[:, :, rows],
                query[:, :, rows],
                full_key[:, :, keys],
                full_value[:, :, keys],
                out[:, :, rows],
                log_sum_exp[:, :, rows],
                call,
            )
            grad_query[:, :, rows] += parts[0]
            grad_key[:, :, keys] += parts[1]
            grad_value[:, :, keys] += parts[2]
        return grad_query, _sum_groups(grad_key, key), _sum_groups(grad_value, value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Returns output and log-sum-exp of one call."""
        scores = self._scores(query, key, call)
        log_sum_exp = scores.logsumexp(dim=-1)
        return (scores - log_sum_exp[..., None]).exp().to(value.dtype) @ value, log_sum_exp

    def attend_backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum_exp: Tensor, call: Call
    ) -> Gradients:
        """Returns the gradients of one call; P = exp(scores - log_sum_exp), dS = P * (dO V^T - rowsum(dO * O))."""
        weights = (self._scores(query, key, call) - log_sum_exp[..., None]).exp()
        delta = (grad * out).sum(dim=-1, keepdim=True)
        grad_scores = (weights * ((grad @ value.transpose(-1, -2)) - delta) * self.scale).to(query.dtype)
        return grad_scores @ key, grad_scores.transpose(-1, -2) @ query, weights.to(grad.dtype).transpose(-1, -2) @ grad

    def _scores(self, query: Tensor, key: Tensor, call: Call) -> Tensor:
        scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * self.scale
        mask = call.mask
        if call.is_causal:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        return scores if mask is None else scores.masked_fill(~mask.to(query.device), -torch.inf)


class CpuKernel(MatmulKernel):
    """The same by torch's flash kernel for the CPU."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Returns output and log-sum-exp of one call."""
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, call.is_causal, attn_mask=self._bias(query, call), scale=self.scale
        )

    def attend_backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum_exp: Tensor, call: Call
    ) -> Gradients:
        """Returns the gradients of one call."""
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, log_sum_exp, 0.0, call.is_causal, attn_mask=self._bias(query, call), scale=self.scale
        )

    def _bias(self, query: Tensor, call: Call) -> Tensor | None:
        if call.mask is None:
            return None
        return torch.zeros(call.mask.shape, dtype=query.dtype).masked_fill(~call.mask, -torch.inf)


class VarlenKernel:
    """The plan's passes by CUDA's variable-length flash kernel; key heads are shared by query heads inside it."""

    def __init__(self, plan: AttentionPlan, scale: float) -> None:
        self.passes = plan.passes
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output [1, heads, T, D] and the log-sum-exp [1, heads, T]."""
        q, k, v = _tokens_first(query), _tokens_first(key), _tokens_first(value)
        out, log_sum_exp = self._attend(q, k, v, self.passes[0])
        for one in self.passes[1:]:
            part, part_lse = self._attend(q[one.query_index], k[one.key_index], v[one.key_index], one)
            merged, merged_lse = out[one.query_index].transpose(0, 1), log_sum_exp[:, one.query_index]
            _merge(merged, merged_lse, part.transpose(0, 1), part_lse)
            out[one.query_index], log_sum_exp[:, one.query_index] = merged.transpose(0, 1), merged_lse
        return out.transpose(0, 1)[None], log_sum_exp[None]

    def backward(self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum_exp: Tensor) -> Gradients:
        """Returns the gradients of queries, keys and values."""
        g, q, k, v, o = (_tokens_first(tensor) for tensor in (grad, query, key, value, out))
        lse = log_sum_exp[0]
        grads = self._attend_backward(g, q, k, v, o, lse, self.passes[0])
        for one in self.passes[1:]:
            rows, keys = one.query_index, one.key_index
            assert rows is not None, "only the first pass takes all tokens in order"
            assert keys is not None, "only the first pass takes all tokens in order"
            parts = self._attend_backward(g[rows], q[rows], k[keys], v[keys], o[rows], lse[:, rows].contiguous(), one)
            for total, part, index in zip(grads, parts, (rows, keys, keys), strict=True):
                total.index_add_(0, index, part)
        return grads[0].transpose(0, 1)[None], grads[1].transpose(0, 1)[None], grads[2].transpose(0, 1)[None]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, one: VarlenPass) -> tuple[Tensor, Tensor]:
        """Returns output [queries, heads, D] and log-sum-exp [heads, queries] of one pass."""
        out, log_sum_exp, *_ = flash_varlen(
            query, key, value, one.query_ends, one.key_ends, one.max_queries, one.max_keys, 0.0, one.is_causal, False, scale=self.scale
        )
        return out, log_sum_exp

    def _attend_backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum_exp: Tensor, one: VarlenPass
    ) -> Gradients:
        unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the random state of dropout, of which there is none
        return flash_varlen_backward(
            grad.contiguous(),
            query,
            key,
            value,
            out,
            log_sum_exp,
            one.query_ends,
            one.key_ends,
            one.max_queries,
            one.max_keys,
            0.0,
            one.is_causal,
            unused,
            torch.empty(0, device=query.device),
            scale=self.scale,
        )


def _tokens_first(tensor: Tensor) -> Tensor:
    """Returns [T, heads, D] of [1, heads, T, D]."""
    return tensor[0].transpose(0, 1).contiguous()


def _merge(out: Tensor, log_sum_exp: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds keys to an attention already taken over others, in place: out [..., D] and log_sum_exp [...]."""
    merged = torch.logaddexp(log_sum_exp, part_lse)
    out.mul_((log_sum_exp - merged).exp()[..., None].to(out.dtype)).add_(part * (part_lse - merged).exp()[..., None].to(out.dtype))
    log_sum_exp.copy_(merged)


def _for_every_head(query: Tensor, key: Tensor) -> Tensor:
    """Returns keys (or values) repeated for each query head that reads them."""
    groups = query.shape[1] // key.shape[1]
    return key if groups == 1 else key.repeat_interleave(groups, dim=1)


def _sum_groups(grad: Tensor, key: Tensor) -> Tensor:
    return grad if grad.shape == key.shape else grad.unflatten(1, (key.shape[1], -1)).sum(dim=2)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attention_plan: AttentionPlan,
    **_: object,
) -> tuple[Tensor, None]:
    """Attends by the plan; the signature is transformers' (query [1, heads, T, D]; returns [1, T, heads, D] and no weights)."""
    assert attention_mask is None, "a packed batch carries its masks in the plan"
    # Under autocast the rotary embedding leaves queries and keys in fp32 and values in bf16; backward runs outside of autocast.
    out = _PackedAttention.apply(query.to(value.dtype), key.to(value.dtype), value, attention_plan, scaling)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(**_: object) -> None:
    """The plan masks; transformers must not build a [T, T] mask."""


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
