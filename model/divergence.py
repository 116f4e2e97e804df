"""Exact divergence of the policy's distribution from a reference's, over the whole vocabulary, in blocks of tokens and vocabulary.

The reference is a frozen copy of the policy (reinforcement learning) or a teacher (distillation); its hidden states may have another
width. No [tokens, vocabulary] tensor exists at any time. Forward computes each pair of tiles twice: once for both log-normalisers, once
for the divergence; backward computes them once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .logprobs import TOKEN_BLOCK, VOCABULARY_BLOCK, blocks_of, in_autocast_dtype, product, tile_logits

# Stands for -inf as the log-prob of an id that may not be drawn: exp of it is 0, and the difference of two of them is 0 and not nan.
_NO_MASS = -1e4


@dataclass(frozen=True, kw_only=True, slots=True)
class _Divergence:
    """D = sum over the ids of f(p, q), with f >= 0; both functions take tiles of p, q and log(p / q)."""

    terms: Callable[[Tensor, Tensor, Tensor], Tensor]
    """f(p, q)"""
    slopes: Callable[[Tensor, Tensor, Tensor], Tensor]
    """p * df/dp; with it dD/d logit = slope - p * (sum of all slopes)"""


# The terms of both carry a difference q - p or p - q that sums to zero. It makes every term non-negative and the sum insensitive to
# rounding in the log-normalisers (to first order), so that a divergence of 1e-6 nats is still a number and not noise.
_REVERSE_KL = _Divergence(
    terms=lambda p, q, log_ratio: p * log_ratio + (q - p),
    slopes=lambda p, q, log_ratio: p * log_ratio,
)
_FORWARD_KL = _Divergence(
    terms=lambda p, q, log_ratio: (p - q) - q * log_ratio,
    slopes=lambda p, q, log_ratio: p - q,
)


def _jsd(beta: float) -> _Divergence:
    """Returns beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; in each term of the sum the first order cancels."""

    def over_mixture(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log(p / m) and log(q / m), exactly 0 where p = q; `expm1` of what is not above 0 does not overflow."""
        p_is_larger = log_ratio > 0
        small = torch.expm1(-log_ratio.abs())
        log_larger = -torch.where(p_is_larger, torch.log1p(beta * small), torch.log1p((1.0 - beta) * small))
        log_smaller = log_larger - log_ratio.abs()
        return torch.where(p_is_larger, log_larger, log_smaller), torch.where(p_is_larger, log_smaller, log_larger)

    def terms(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        log_p_m, log_q_m = over_mixture(log_ratio)
        return beta * q * log_q_m + (1.0 - beta) * p * log_p_m

    def slopes(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        return (1.0 - beta) * p * over_mixture(log_ratio)[0]

    return _Divergence(terms=terms, slopes=slopes)


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
        for rows in blocks_of(len(hidden), TOKEN_BLOCK):
            for columns in blocks_of(len(head), VOCABULARY_BLOCK):
                for part, matrix, running in (policy, reference):
                    logits = tile_logits(part[rows], matrix[columns], allowed, columns, temperature)
                    running[rows] = torch.logaddexp(running[rows], logits.logsumexp(dim=-1))
            for columns in blocks_of(len(head), VOCABULARY_BLOCK):
                tiles = _tiles(policy, reference, rows, columns, allowed, temperature)
                result[rows] += divergence.terms(*tiles).sum(dim=-1)
                sum_of_slopes[rows] += divergence.slopes(*tiles).sum(dim=-1)
        ctx.save_for_backward(hidden, head, reference_hidden, reference_head, log_z, reference_log_z, sum_of_slopes)
        ctx.allowed, ctx.temperature, ctx.divergence = allowed, temperature, divergence
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # noqa: ANN401
        hidden, head, reference_hidden, reference_head, log_z, reference_log_z, sum_of_slopes = ctx.saved_tensors
        hidden_is_trained, head_is_trained, *_ = ctx.needs_input_grad
        policy, reference = (hidden, head, log_z), (reference_hidden, reference_head, reference_log_z)
        grad = grad_output / ctx.temperature
        grad_hidden = torch.zeros(hidden.shape, dtype=_arithmetic(hidden), device=hidden.device) if hidden_is_trained else None
        grad_head = torch.zeros(head.shape, dtype=_arithmetic(hidden), device=head.device) if head_is_trained else None
        for rows in blocks_of(len(hidden), TOKEN_BLOCK):
            for columns in blocks_of(len(head), VOCABULARY_BLOCK):
                p, q, log_ratio = _tiles(policy, reference, rows, columns, ctx.allowed, ctx.temperature)
                grad_logits = ctx.divergence.slopes(p, q, log_ratio).sub_(p.mul_(sum_of_slopes[rows, None]))
                grad_logits = grad_logits.mul_(grad[rows, None]).to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] += product(grad_logits, head[columns].to(hidden.dtype))
                if grad_head is not None:
                    grad_head[columns] += product(grad_logits.T, hidden[rows])
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
    return _token_divergence(hidden, head, reference_hidden, reference_head, allowed, temperature, _REVERSE_KL)


def token_forward_kl(
    hidden: Tensor, head: Tensor, reference_hidden: Tensor, reference_head: Tensor, *, allowed: Tensor | None, temperature: float
) -> Tensor:
    """Returns KL(reference || policy) of the next-token distribution at each position, [N] nats: the forward KL.

    KL = sum over ids of q (log q - log p), for the q and p of `token_kl`, whose arguments and errors these are; the gradient with
    respect to the policy's logits is (p - q) / temperature. Distilling a teacher, it covers the teacher's modes, where the reverse KL
    seeks one of them (GKD, arXiv:2306.13649).
    """
    return _token_divergence(hidden, head, reference_hidden, reference_head, allowed, temperature, _FORWARD_KL)


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
    return _token_divergence(hidden, head, reference_hidden, reference_head, allowed, temperature, _jsd(beta))


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


def _tiles(
    policy: tuple[Tensor, Tensor, Tensor],
    reference: tuple[Tensor, Tensor, Tensor],
    rows: slice,
    columns: slice,
    allowed: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns p, q and log(p / q) of some positions and ids; `policy` and `reference` are hidden states, head and log-normalisers."""
    logprobs = []
    for hidden, head, log_z in (policy, reference):
        logits = tile_logits(hidden[rows], head[columns], None, columns, temperature)
        logprobs.append(logits.sub_(log_z[rows, None]))
        if allowed is not None:
            logits.masked_fill_(~allowed[columns], _NO_MASS)
    log_ratio = logprobs[0] - logprobs[1]
    return logprobs[0].exp_(), logprobs[1].exp_(), log_ratio
