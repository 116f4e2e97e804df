"""Hidden states -> log-probs of given ids and entropy, in blocks of tokens and vocabulary.

No [tokens, vocabulary] tensor exists at any time: forward keeps one [block, block] tile, backward computes the tiles again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TOKEN_BLOCK = 2048
VOCABULARY_BLOCK = 32768


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        head: Tensor,
        token_ids: Tensor,
        allowed: Tensor | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        log_z = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(log_z)
        chosen = torch.empty(token_ids.shape, dtype=torch.float32, device=hidden.device)
        for rows in blocks_of(len(hidden), TOKEN_BLOCK):
            maximum = torch.full_like(log_z[rows], -torch.inf)
            normaliser = torch.zeros_like(maximum)  # sum of exp(logit - maximum)
            weighted = torch.zeros_like(maximum)  # sum of exp(logit - maximum) * (logit - maximum)
            for columns in blocks_of(len(head), VOCABULARY_BLOCK):
                logits = tile_logits(hidden[rows], head[columns], allowed, columns, temperature)
                new_maximum = torch.maximum(maximum, logits.amax(dim=-1))
                # A block may hold no allowed id: while the maximum is still -inf, nothing has been summed.
                finite = torch.where(new_maximum.isinf(), 0.0, new_maximum)
                shrink = torch.where(maximum.isinf(), 0.0, torch.exp(maximum - finite))
                shift = torch.where(maximum.isinf(), 0.0, maximum - finite)
                shifted = logits - finite[:, None]
                exponent = torch.exp(shifted)
                weighted = shrink * (weighted + shift * normaliser) + (exponent * torch.where(exponent > 0, shifted, 0.0)).sum(dim=-1)
                normaliser = shrink * normaliser + exponent.sum(dim=-1)
                maximum = new_maximum
                here = (token_ids[rows] >= columns.start) & (token_ids[rows] < columns.stop)
                picked = logits.gather(1, (token_ids[rows] - columns.start).clamp(0, logits.shape[1] - 1))
                chosen[rows] = torch.where(here, picked, chosen[rows])
            log_z[rows] = maximum + normaliser.log()
            entropy[rows] = normaliser.log() - weighted / normaliser
        ctx.save_for_backward(hidden, head, token_ids, log_z)
        ctx.allowed, ctx.temperature = allowed, temperature
        ctx.mark_non_differentiable(entropy)
        return chosen - log_z[:, None], entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # noqa: ANN401
        hidden, head, token_ids, log_z = ctx.saved_tensors
        grad = grad_outputs[0] / ctx.temperature
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        for rows in blocks_of(len(hidden), TOKEN_BLOCK):
            for columns in blocks_of(len(head), VOCABULARY_BLOCK):
                logits = tile_logits(hidden[rows], head[columns], ctx.allowed, columns, ctx.temperature)
                grad_logits = torch.exp(logits - log_z[rows, None]) * -grad[rows].sum(dim=-1, keepdim=True)
                # An id may be asked for twice at one position; a scatter adds in one order whatever the CPU's threads do.
                places = token_ids[rows] - columns.start
                is_here = (places >= 0) & (places < grad_logits.shape[1])
                grad_logits.scatter_add_(1, places.clamp(0, grad_logits.shape[1] - 1), torch.where(is_here, grad[rows], 0.0))
                grad_hidden[rows] += product(grad_logits.to(hidden.dtype), head[columns].to(hidden.dtype))
                grad_head[columns] += product(grad_logits.to(hidden.dtype).T, hidden[rows])
        return grad_hidden.to(hidden.dtype), grad_head.to(head.dtype), None, None, None


def token_logprobs(hidden: Tensor, head: Tensor, *, token_ids: Tensor, allowed: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns the log-prob [N] of each id and the entropy [N] of its distribution, both in nats and fp32.

    `hidden` [N, H] predicts `token_ids` [N]; `head` is the output matrix [V, H]. With logits l = hidden head^T / temperature,
    disallowed ids set to -inf, log-prob = l[id] - logsumexp(l) and entropy = logsumexp(l) - sum(p l). `allowed` is [V] bool or None
    for the whole vocabulary. An id that is not allowed has log-prob -inf. The entropy carries no gradient.
    """
    logprobs, entropy = support_logprobs(hidden, head, token_ids=token_ids[:, None], allowed=allowed, temperature=temperature)
    return logprobs[:, 0], entropy


def support_logprobs(
    hidden: Tensor, head: Tensor, *, token_ids: Tensor, allowed: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Returns the log-probs [N, K] of K ids at each position and the entropy [N], both in nats and fp32.

    `token_ids` is [N, K]; everything else is as in `token_logprobs`. The log-probs are over all allowed ids, not over the K.
    """
    hidden = in_autocast_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):  # backward runs outside of autocast and must compute the same products
        logprobs, entropy = _TokenLogprobs.apply(hidden, head, token_ids, allowed, temperature)  # pyright: ignore[reportGeneralTypeIssues]
    return logprobs, entropy


@torch.no_grad()
def top_ids(hidden: Tensor, head: Tensor, *, k: int, allowed: Tensor | None) -> Tensor:
    """Returns the k most likely ids at each position, [N, k], most likely first; `allowed` [V] bool leaves out the others.

    `hidden` [N, H] and `head` [V, H] are those of `token_logprobs`. Raises `ValueError` where fewer than k ids may be drawn.
    """
    num_allowed = len(head) if allowed is None else int(allowed[: len(head)].sum())
    if k > num_allowed:
        raise ValueError(f"k = {k}: only {num_allowed} ids may be drawn; give a smaller k")
    hidden = in_autocast_dtype(hidden)
    found = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    for rows in blocks_of(len(hidden), TOKEN_BLOCK):
        best = torch.empty(len(hidden[rows]), 0, dtype=torch.float32, device=hidden.device)
        ids = torch.empty(len(hidden[rows]), 0, dtype=torch.int64, device=hidden.device)
        for columns in blocks_of(len(head), VOCABULARY_BLOCK):
            logits = tile_logits(hidden[rows], head[columns], allowed, columns, 1.0)
            values, places = logits.topk(min(k, logits.shape[1]), dim=-1)
            best, kept = torch.cat([best, values], dim=-1).topk(min(k, best.shape[1] + values.shape[1]), dim=-1)
            ids = torch.cat([ids, places + columns.start], dim=-1).gather(1, kept)
        found[rows] = ids
    return found


def in_autocast_dtype(hidden: Tensor) -> Tensor:
    """Returns hidden states in the dtype that products are taken in here."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def product(left: Tensor, right: Tensor) -> Tensor:
    """Returns left @ right in fp32 (at least), also of bf16 factors: a logit rounded to bf16 would be off by up to 0.06 at 16."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def tile_logits(hidden: Tensor, head: Tensor, allowed: Tensor | None, columns: slice, temperature: float) -> Tensor:
    """Returns the logits [n, v] of one tile; `head` holds the rows `columns` of the output matrix, disallowed ids get -inf."""
    logits = product(hidden, head.to(hidden.dtype).T)
    if temperature != 1.0:
        logits /= temperature
    if allowed is not None:
        logits.masked_fill_(~allowed[columns], -torch.inf)
    return logits


def blocks_of(length: int, size: int) -> list[slice]:
    """Returns slices of at most `size` that cover range(length)."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
