"""Divergence on the few ids whose teacher log-probs are known, and one bucket for all others.

Engines return the log-probs of the most likely ids alone. Renormalised over those, student mass outside would cost nothing; here the
rest of each distribution is a bucket of its own, so nothing is renormalised. By the log-sum inequality the value is never above the
divergence over the whole vocabulary, and it is 0 where all buckets are equal.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MIN_TAIL = 1e-7
"""Least mass of a bucket: what is left of 1 after fp32 log-probs is known no better."""


def bucketed_divergence(
    logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    known: Tensor,
    divergence: Literal["forward", "reverse", "jsd"],
    beta: float | None = None,
) -> Tensor:
    """Returns the divergence at each position, [N] nats, over K ids and a bucket of all others.

    `logprobs` and `teacher_logprobs` [N, K] are over the whole vocabulary; `known` [N, K] bool leaves out entries that are padding,
    or that the teacher gave no number for (NaN; -inf and the -9999 that stands for it over HTTP are no mass: that id joins the
    others). An id may stand once at a position. forward: KL(teacher, student); reverse: KL(student, teacher); jsd with `beta` as in
    `token_jsd`.
    Arithmetic is in fp64; the gradient goes to `logprobs` alone. Raises `ValueError` for unequal shapes and a beta that does not fit.
    """
    if not logprobs.shape == teacher_logprobs.shape == known.shape or logprobs.dim() != 2:
        raise ValueError(
            f"logprobs {tuple(logprobs.shape)}, teacher_logprobs {tuple(teacher_logprobs.shape)} and known {tuple(known.shape)}: must be "
            "three times [N, K]"
        )
    if (beta is not None) != (divergence == "jsd") or (beta is not None and not 0.0 < beta < 1.0):
        raise ValueError(f"beta = {beta!r} with divergence {divergence!r}: jsd needs a beta strictly between 0 and 1, the others have none")
    known = known & (teacher_logprobs > NO_MASS) & (logprobs > NO_MASS)  # False for NaN too
    p = _buckets(logprobs, known)
    q = _buckets(teacher_logprobs.detach(), known)
    if divergence == "reverse":
        return _kl(p, q)
    if divergence == "forward":
        return _kl(q, p)
    assert beta is not None, "checked above"
    mixture = beta * q + (1.0 - beta) * p
    return beta * _kl(q, mixture) + (1.0 - beta) * _kl(p, mixture)


NO_MASS = -9998.0
"""Log-probs at or below stand for none."""


def _buckets(logprobs: Tensor, known: Tensor) -> Tensor:
    """Returns probabilities [N, K + 1], the last one of all ids that are not among the known; entries that are not known are 0."""
    masses = torch.where(known, logprobs.double(), -torch.inf).exp()
    return torch.cat([masses, (1.0 - masses.sum(dim=-1, keepdim=True)).clamp_min(MIN_TAIL)], dim=-1)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """Returns KL(first, second) of each row; buckets that are empty in both add nothing."""
    empty = (first == 0.0) & (second == 0.0)
    first, second = first.masked_fill(empty, 1.0), second.masked_fill(empty, 1.0)
    # With the difference of the masses every term is at least 0, also where a clamped tail makes a sum other than 1.
    return (first * (first.log() - second.log()) + (second - first)).sum(dim=-1)
