"""Exact divergence of the policy's distribution from a reference's, over the whole vocabulary, in blocks of tokens and vocabulary.

The reference is a frozen copy of the policy (reinforcement learning) or a teacher (distillation); its hidden states may have another
width. No [tokens, vocabulary] tensor exists at any time: forward holds the logits of a few positions, as whole rows, for the normalisers
and then for the divergence; backward computes tiles of them once more. Six matrix products in all, where keeping all logits takes four.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .logprobs import TOKEN_BLOCK, blocks_of, in_autocast_dtype, product, tile_logits

# Stands for -inf as the log-prob of an id that may not be drawn: exp of it is 0, and the difference of two of them is 0 and not nan.
_NO_MASS = -1e4


# D = sum over the ids of f(p, q), with f >= 0. Takes tiles of p, q and log(p / q), returns those of f and of its slope p * df/dp; with it
# dD / d logit = slope - p * (sum of all slopes).
_Divergence = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


# The terms of both KLs carry a difference q - p or p - q that sums to zero. It makes every term non-negative and the sum insensitive to
# rounding in the log-normalisers (to first order), so that a divergence of 1e-6 nats is still a number and not noise.
def _reverse_kl(p: Tensor, q: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    slopes = p * log_ratio
    return slopes + (q - p), slopes


def _forward_kl(p: Tensor, q: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    slopes = p - q
    return slopes - q * log_ratio, slopes


def _jsd(p: Tensor, q: Tensor, log_ratio: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Is beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; in each term of the sum the first order cancels."""
    size = log_ratio.abs()
    p_is_larger = log_ratio > 0
    # log(larger / m) and log(smaller / m), exactly 0 where p = q; `expm1` of what is not above 0 does not overflow.
    small = torch.expm1(-size)
    log_larger = torch.where(p_is_larger, beta * small, (1.0 - beta) * small).log1p_().neg_()
    log_smaller = log_larger - size
    slopes = torch.where(p_is_larger, log_larger, log_smaller).mul_(p).mul_(1.0 - beta)
    return torch.where(p_is_larger, log_smaller, log_larger).mul_(q).mul_(beta).add_(slopes), slopes


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        head: Tensor,
        reference_hidden: Tensor,
        reference_head: Tensor,
        allowed: Tensor | None,
        temperature: float,
        divergence: _Divergence,
    ) -> Tensor:
        result = torch.zeros(len(hidden), dtype=_arithmetic(hidden), device=hidden.device)
        sum_of_slopes = torch.zeros_like(result)
        log_z, reference_log_z = torch.full_like(result, -torch.inf), torch.full_like(result, -torch.inf)
        policy, reference = (hidden, head, log_z), (reference_hidden, reference_head, reference_log_z)
        row_block, _, tile = _block_sizes(hidden.device, len(head))
        buffers = [torch.empty(min(row_block, len(hidden)), len(head), dtype=result.dtype, device=result.device) for _ in range(2)]
        for rows in blocks_of(len(hidden), row_block):
            num_rows = len(hidden[rows])
            # Whole rows of the vocabulary, so that the logits that the normalisers took are still there for the divergence.
            whole = [buffer[:num_rows] for buffer in buffers]
            all_columns = blocks_of(len(head), max(1, tile // num_rows))
            for (part, matrix, running), row in zip((policy, reference), whole, strict=True):
                for columns in all_columns:
                    row[:, columns] = logits = tile_logits(part[rows], matrix[columns], allowed, columns, temperature)
                    running[rows] = torch.logaddexp(running[rows], logits.logsumexp(dim=-1))
            for columns in all_columns:
                logits, reference_logits = (row[:, columns] for row in whole)
                tiles = _distributions(logits, reference_logits, log_z[rows], reference_log_z[rows], _at(allowed, columns))
                terms, slopes = divergence(*tiles)
                result[rows] += terms.sum(dim=-1)
                sum_of_slopes[rows] += slopes.sum(dim=-1)
        ctx.save_for_backward(hidden, head, reference_hidden, reference_head, log_z, reference_log_z, sum_of_slopes)
        ctx.allowed, ctx.temperature, ctx.divergence = allowed, temperature, divergence
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # noqa: ANN401
        hidden, head, reference_hidden, reference_head, log_z, reference_log_z, sum_of_slopes = ctx.saved_tensors
        hidden_is_trained, head_is_trained, *_ = ctx.needs_input_grad
        grad = grad_output / ctx.temperature
        grad_hidden = torch.zeros(hidden.shape, dtype=_arithmetic(hidden), device=hidden.device) if hidden_is_trained else None
        grad_head = torch.zeros(head.shape, dtype=_arithmetic(hidden), device=head.device) if head_is_trained else None
        _, token_block, tile = _block_sizes(hidden.device, len(head))
        for rows in blocks_of(len(hidden), token_block):
            weighted_hidden = (hidden[rows] * grad[rows, None]).to(hidden.dtype)
            for columns in blocks_of(len(head), max(1, tile // len(hidden[rows]))):
                logits = tile_logits(hidden[rows], head[columns], None, columns, ctx.temperature)
                reference_logits = tile_logits(reference_hidden[rows], reference_head[columns], None, columns, ctx.temperature)
                p, q, log_ratio = _distributions(logits, reference_logits, log_z[rows], reference_log_z[rows], _at(ctx.allowed, columns))
                _, slopes = ctx.divergence(p, q, log_ratio)
                # Not yet weighted: the incoming number a position is cheaper to multiply into the hidden states than into tiles.
                grad_logits = slopes.addcmul_(p, sum_of_slopes[rows, None], value=-1.0).to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] += product(grad_logits, head[columns].to(hidden.dtype))
                if grad_head is not None:
                    grad_head[columns] += product(grad_logits.T, weighted_hidden)
            if grad_hidden is not None:
                grad_hidden[rows] *= grad[rows, None]
        grads = [None if part is None else part.to(like.dtype) for part, like in ((grad_hidden, hidden), (grad_head, head))]
        return *grads, None, None, None, None, None


def token_kl(
    hidden: Tensor, head: Tensor, reference_hidden: Tensor, reference_head: Tensor, *, allowed: Tensor | None, temperature: float
) -> Tensor:
    """Returns KL(policy || reference) of the next-token distribution at each position, [N] nats: the reverse KL.

    KL = sum over ids of p (log p - log q), with p = softmax(hidden head^T / temperature) over the `allowed` ids and q the same of the
    reference. `hidden` [N, H] and `reference_hidden` [N, H'] belong to the same positions, `head` [V, H] and `reference_head` [V, H'] to
    the same ids; `allowed` is [V] bool or None for the whole vocabulary. Arithmetic is in fp32 (fp64 for fp64 inputs); values are 0 or
    more, but for rounding of about 1e-7.

    Only `hidden` and `head` get a gradient: d KL / d logit = p (log p - log q - KL) / temperature. There is no second derivative.
    Raises `ValueError` where positions or ids do not pair up.
    """
    return _token_divergence(hidden, head, reference_hidden, reference_head, allowed, temperature, _reverse_kl)


def token_forward_kl(
    hidden: Tensor, head: Tensor, reference_hidden: Tensor, reference_head: Tensor, *, allowed: Tensor | None, temperature: float
) -> Tensor:
    """Returns KL(reference || policy) of the next-token distribution at each position, [N] nats: the forward KL.

    KL = sum over ids of q (log q - log p), for the q and p of `token_kl`, whose arguments and errors these are; the gradient with
    respect to the policy's logits is (p - q) / temperature. Distilling a teacher, it covers the teacher's modes, where the reverse KL
    seeks one of them (GKD, arXiv:2306.13649).
    """
    return _token_divergence(hidden, head, reference_hidden, reference_head, allowed, temperature, _forward_kl)


def token_jsd(
    hidden: Tensor,
    head: Tensor,
    reference_hidden: Tensor,
    reference_head: Tensor,
    *,
    beta: float,
    allowed: Tensor | None,
    temperature: float,
) -> Tensor:
    """Returns the generalised Jensen-Shannon divergence of the next-token distributions at each position, [N] nats.

    JSD = beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, for the p (policy) and q (reference) of `token_kl`, whose
    arguments and errors these are (GKD, arXiv:2306.13649, section 2). It tends to 0 with beta and with 1 - beta; divided by them, to
    the forward and to the reverse KL. It is at most the entropy of (beta, 1 - beta), log 2 at 0.5. d JSD / d logit =
    (1 - beta) p (log(p / m) - KL(p || m)) / temperature. Raises `ValueError` unless 0 < beta < 1.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(
            f"beta = {beta!r}: must be strictly between 0 and 1, at both ends the divergence is 0 whatever the policy is; for its limits "
            "take token_forward_kl (beta to 0) or token_kl (beta to 1)"
        )
    return _token_divergence(hidden, head, reference_hidden, reference_head, allowed, temperature, partial(_jsd, beta=beta))


def _token_divergence(
    hidden: Tensor,
    head: Tensor,
    reference_hidden: Tensor,
    reference_head: Tensor,
    allowed: Tensor | None,
    temperature: float,
    divergence: _Divergence,
) -> Tensor:
    if len(hidden) != len(reference_hidden):
        raise ValueError(
            f"hidden states of {len(hidden)} positions and {len(reference_hidden)} of the reference: they must be of the same positions"
        )
    if len(head) != len(reference_head):
        raise ValueError(
            f"head of {len(head)} ids and reference head of {len(reference_head)}: row by row they must stand for the same ids; where one "
            "is only padded further, cut it to the other's rows and allow no id beyond the tokenizer's"
        )
    # Detached here, else a trained reference would make the result require a gradient that backward does not give.
    hidden, fixed = in_autocast_dtype(hidden), (in_autocast_dtype(reference_hidden.detach()), reference_head.detach())
    with torch.autocast(hidden.device.type, enabled=False):  # backward runs outside of autocast and must compute the same products
        return _TokenDivergence.apply(hidden, head, *fixed, allowed, temperature, divergence)  # pyright: ignore[reportReturnType]


def _arithmetic(hidden: Tensor) -> torch.dtype:
    """Returns the dtype of sums over the ids: fp32, or fp64 where the hidden states are."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _block_sizes(device: torch.device, num_ids: int) -> tuple[int, int, int]:
    """Returns the positions whose whole rows of logits forward holds, the positions of a tile in backward, and the elements of a tile.

    Forward's rows take 128 MiB a model on a CPU and 256 MiB elsewhere. On a CPU a tile of 1 MiB stays in the cache; elsewhere it is large
    enough to make launches cheap. Measured by `benchmarks/kl_speed.py`, on a CPU alone.
    """
    row_elements, token_block, tile = (2**25, 512, 2**18) if device.type == "cpu" else (2**26, TOKEN_BLOCK, 2**25)
    return max(1, row_elements // num_ids), token_block, tile


def _at(allowed: Tensor | None, columns: slice) -> Tensor | None:
    """Returns the part of [V] bool for some ids; None, which is the whole vocabulary, stays None."""
    return None if allowed is None else allowed[columns]


def _distributions(
    logits: Tensor, reference_logits: Tensor, log_z: Tensor, reference_log_z: Tensor, allowed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns p, q and log(p / q) of a tile [n, v] of some positions and ids; `allowed` is [v]."""
    logprobs, reference_logprobs = logits - log_z[:, None], reference_logits - reference_log_z[:, None]
    if allowed is not None:
        for part in (logprobs, reference_logprobs):
            part.masked_fill_(~allowed, _NO_MASS)
    log_ratio = logprobs - reference_logprobs
    return logprobs.exp_(), reference_logprobs.exp_(), log_ratio
