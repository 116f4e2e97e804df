"""Exact divergence of the policy's distribution from a reference's, over the whole vocabulary, in blocks of tokens and vocabulary.

The reference is a frozen copy of the policy (reinforcement learning) or a teacher (distillation); its hidden states may have another
width. No [tokens, vocabulary] tensor exists at any time: forward holds the logits of a few positions, as whole rows, for the normalisers
and then for the divergence. Where the caller says beforehand what weights the positions will have in the loss, forward makes the gradient
as well while the rows are there: four matrix products in all, as many as where all logits are kept. Otherwise backward computes tiles of
the logits once more, six products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .logprobs import TOKEN_BLOCK, VOCABULARY_BLOCK, blocks_of, in_autocast_dtype, product, tile_logits

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
        weights: Tensor | None,
    ) -> Tensor:
        result = torch.zeros(len(hidden), dtype=_arithmetic(hidden), device=hidden.device)
        sum_of_slopes = torch.zeros_like(result)
        log_z, reference_log_z = torch.full_like(result, -torch.inf), torch.full_like(result, -torch.inf)
        policy, reference = (hidden, head, log_z), (reference_hidden, reference_head, reference_log_z)
        gradient = None if weights is None else _Gradient(hidden, head, trained=ctx.needs_input_grad)
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
                p, q, log_ratio = _distributions(logits, reference_logits, log_z[rows], reference_log_z[rows], _at(allowed, columns))
                terms, slopes = divergence(p, q, log_ratio)
                result[rows] += terms.sum(dim=-1)
                sum_of_slopes[rows] += slopes.sum(dim=-1)
                if gradient is not None:  # the logits are done with: what their gradient is made of takes their place
                    logits.copy_(slopes)
                    reference_logits.copy_(p)
            if gradient is not None:
                assert weights is not None
                grad_logits = whole[0].addcmul_(whole[1], sum_of_slopes[rows, None], value=-1.0)
                gradient.add(grad_logits, rows, slice(0, len(head)), weights[rows])
        made = () if gradient is None else (gradient.hidden, gradient.head)
        ctx.save_for_backward(hidden, head, reference_hidden, reference_head, log_z, reference_log_z, sum_of_slopes, weights, *made)
        ctx.allowed, ctx.temperature, ctx.divergence = allowed, temperature, divergence
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # noqa: ANN401
        hidden, head, reference_hidden, reference_head, log_z, reference_log_z, sum_of_slopes, weights, *made = ctx.saved_tensors
        factor = None if weights is None else _common_factor(grad_output, weights)
        if factor is None:
            weights, factor = grad_output, 1.0
            gradient = _Gradient(hidden, head, trained=ctx.needs_input_grad)
            _, token_block, tile = _block_sizes(hidden.device, len(head))
            for rows in blocks_of(len(hidden), token_block):
                for columns in blocks_of(len(head), max(1, tile // len(hidden[rows]))):
                    logits = tile_logits(hidden[rows], head[columns], None, columns, ctx.temperature)
                    reference_logits = tile_logits(reference_hidden[rows], reference_head[columns], None, columns, ctx.temperature)
                    tiles = _distributions(logits, reference_logits, log_z[rows], reference_log_z[rows], _at(ctx.allowed, columns))
                    _, slopes = ctx.divergence(*tiles)
                    gradient.add(slopes.addcmul_(tiles[0], sum_of_slopes[rows, None], value=-1.0), rows, columns, weights[rows])
            made = gradient.hidden, gradient.head
        grad_hidden, grad_head = made
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * (grad_output / ctx.temperature)[:, None]).to(hidden.dtype)
        if grad_head is not None:
            grad_head = (grad_head * (factor / ctx.temperature)).to(head.dtype)
        return grad_hidden, grad_head, None, None, None, None, None, None


class _Gradient:
    """The gradient of hidden states and head, summed up over tiles; not yet divided by the temperature."""

    def __init__(self, hidden: Tensor, head: Tensor, *, trained: Sequence[bool]) -> None:
        self.policy = hidden, head
        self.hidden = torch.zeros(hidden.shape, dtype=_arithmetic(hidden), device=hidden.device) if trained[0] else None
        """[N, H], of a sum in which every position has the weight 1: what it really has is multiplied in at the end."""
        self.head = torch.zeros(head.shape, dtype=_arithmetic(hidden), device=head.device) if trained[1] else None
        """[V, H]"""

    def add(self, grad_logits: Tensor, rows: slice, columns: slice, weights: Tensor) -> None:
        """Adds what comes from the logits [n, v] of some positions and ids; `weights` [n] are those of the positions in the sum."""
        hidden, head = self.policy
        grad_logits = grad_logits.to(hidden.dtype)
        if self.hidden is not None:
            self.hidden[rows] += product(grad_logits, head[columns].to(hidden.dtype))
        if self.head is not None:
            # Weights are cheaper to multiply into hidden states than into the tile.
            weighted = (hidden[rows] * weights[:, None]).to(hidden.dtype)
            for ids in blocks_of(len(head[columns]), VOCABULARY_BLOCK):
                self.head[columns][ids] += product(grad_logits[:, ids].T, weighted)


def _common_factor(grad_output: Tensor, weights: Tensor) -> float | None:
    """Returns c where grad_output = c * weights to within rounding, else None; of no positions, as of a rank without a row, 0."""
    if not len(weights):
        return 0.0
    squares = float(weights.double().square().sum())
    factor = float((grad_output.double() * weights).sum()) / squares if squares else 0.0
    largest = float((grad_output.double() - factor * weights).abs().max())
    return factor if largest <= 4 * torch.finfo(grad_output.dtype).eps * abs(factor) * float(weights.abs().max()) else None


def token_kl(
    hidden: Tensor,
    head: Tensor,
    reference_hidden: Tensor,
    reference_head: Tensor,
    *,
    allowed: Tensor | None,
    temperature: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Returns KL(policy || reference) of the next-token distribution at each position, [N] nats: the reverse KL.

    KL = sum over ids of p (log p - log q), with p = softmax(hidden head^T / temperature) over the `allowed` ids and q the same of the
    reference. `hidden` [N, H] and `reference_hidden` [N, H'] belong to the same positions, `head` [V, H] and `reference_head` [V, H'] to
    the same ids; `allowed` is [V] bool or None for the whole vocabulary. Arithmetic is in fp32 (fp64 for fp64 inputs); values are 0 or
    more, but for rounding of about 1e-7.

    `weights` [N] says what the loss will multiply each position with, up to one factor for all: backward is then nearly free. It changes
    no value and no gradient; a loss that does otherwise gets its gradient at the price of having left them out.

    Only `hidden` and `head` get a gradient: d KL / d logit = p (log p - log q - KL) / temperature. There is no second derivative.
    Raises `ValueError` where positions or ids do not pair up.
    """
    return _token_divergence(hidden, head, reference_hidden, reference_head, allowed, temperature, _reverse_kl, weights)


def token_forward_kl(
    hidden: Tensor,
    head: Tensor,
    reference_hidden: Tensor,
    reference_head: Tensor,
    *,
    allowed: Tensor | None,
    temperature: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Returns KL(reference || policy) of the next-token distribution at each position, [N] nats: the forward KL.

    KL = sum over ids of q (log q - log p), for the q and p of `token_kl`, whose arguments and errors these are; the gradient with
    respect to the policy's logits is (p - q) / temperature. Distilling a teacher, it covers the teacher's modes, where the reverse KL
    seeks one of them (GKD, arXiv:2306.13649).
    """
    return _token_divergence(hidden, head, reference_hidden, reference_head, allowed, temperature, _forward_kl, weights)


def token_jsd(
    hidden: Tensor,
    head: Tensor,
    reference_hidden: Tensor,
    reference_head: Tensor,
    *,
    beta: float,
    allowed: Tensor | None,
    temperature: float,
    weights: Tensor | None = None,
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
    return _token_divergence(hidden, head, reference_hidden, reference_head, allowed, temperature, partial(_jsd, beta=beta), weights)


def _token_divergence(
    hidden: Tensor,
    head: Tensor,
    reference_hidden: Tensor,
    reference_head: Tensor,
    allowed: Tensor | None,
    temperature: float,
    divergence: _Divergence,
    weights: Tensor | None,
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
    if weights is not None and weights.shape != hidden.shape[:1]:
        raise ValueError(f"weights of shape {tuple(weights.shape)} for {len(hidden)} positions: give one for each")
    if weights is not None:
        is_trained = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
        weights = weights.detach().to(hidden.device, _arithmetic(hidden)) if is_trained else None
    # Detached here, else a trained reference would make the result require a gradient that backward does not give.
    hidden, fixed = in_autocast_dtype(hidden), (in_autocast_dtype(reference_hidden.detach()), reference_head.detach())
    with torch.autocast(hidden.device.type, enabled=False):  # backward runs outside of autocast and must compute the same products
        return _TokenDivergence.apply(hidden, head, *fixed, allowed, temperature, divergence, weights)  # pyright: ignore[reportReturnType]


def _arithmetic(hidden: Tensor) -> torch.dtype:
    """Returns the dtype of sums over the ids: fp32, or fp64 where the hidden states are."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _block_sizes(device: torch.device, num_ids: int) -> tuple[int, int, int]:
    """Returns the positions whose whole rows of logits forward holds, the positions of a tile in backward, and the elements of a tile.

    Forward's rows take 128 MiB a model on a CPU and 256 MiB elsewhere. On a CPU a tile of 2 MiB stays in the cache; elsewhere it is large
    enough to make launches cheap. Measured by `benchmarks/kl_speed.py`, on a CPU alone.
    """
    row_elements, token_block, tile = (2**25, 512, 2**19) if device.type == "cpu" else (2**26, TOKEN_BLOCK, 2**25)
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
