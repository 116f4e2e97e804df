"""KL divergence of the policy from a frozen reference, estimated from the log-probs of the drawn tokens.

With d = log pi - log ref of a drawn token: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (John Schulman, joschu.net/blog/kl-approx.html).
What an estimator is worth as a number and what its gradient does are two questions (arXiv:2506.09477, arXiv:2510.01555). For a token
drawn from the policy, at a given prefix:

| estimator | mean of the value | mean of its gradient | mean of value * grad log pi (in the reward) |
|---|---|---|---|
| k1 | KL(pi, ref) | 0 | grad KL(pi, ref) |
| k2 | not a KL, near it for a small d | grad KL(pi, ref) | nothing of use |
| k3 | KL(pi, ref) | grad KL(ref, pi) | grad KL(pi, ref) - grad KL(ref, pi), which is about 0 near the reference |

Hence k2 and k3 serve as a loss, k1 in the reward, and nothing else is offered. The exact divergence over the whole vocabulary is
`model.divergence.token_kl`. A loss term sees each position by itself; only the penalty in the reward also counts what a token does to
the divergence of the tokens after it.

Every array is flat, [N] over drawn tokens; arithmetic is in fp32 whatever dtype comes in. `reference_logprobs` are the reference's,
under the same temperature and over the same allowed ids as the policy's, and get no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .policy_loss import check_shapes, clamped_log_ratio


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Returns log pi - log ref of each token, [N] fp32, detached: an unbiased estimate of KL(pi, ref) that may be negative.

    It carries no gradient, because as a loss it does nothing: the mean of grad log pi over the policy's own tokens is zero.
    Raises `ValueError` for unequal shapes.
    """
    check_shapes(logprobs=logprobs, reference_logprobs=reference_logprobs)
    return logprobs.detach().float() - reference_logprobs.detach().float()


def k2(logprobs: Tensor, reference_logprobs: Tensor, *, old_logprobs: Tensor) -> Tensor:
    """Returns ratio * (log pi - log ref)^2 / 2 of each token, [N] fp32, to be minimised: its mean gradient is that of KL(pi, ref).

    `old_logprobs` are of the distribution that the tokens were drawn from. The ratio exp(logprobs - old_logprobs) is detached: it
    weighs tokens as if the policy had drawn them, and is 1 on policy. The gradient of a token is ratio * d * grad log pi, the same as
    that of k3 times a ratio that is differentiated too (DeepSeek-V3.2, arXiv:2512.02556 eq. 7).
    The ratio's logarithm is held within +-20. Raises `ValueError` for unequal shapes.
    """
    check_shapes(logprobs=logprobs, reference_logprobs=reference_logprobs, old_logprobs=old_logprobs)
    log_ratio = logprobs.float() - reference_logprobs.detach().float()
    return _importance_ratio(logprobs, old_logprobs) * log_ratio.square() / 2.0


def k3(logprobs: Tensor, reference_logprobs: Tensor, *, old_logprobs: Tensor) -> Tensor:
    """Returns ratio * (ref / pi - 1 - log(ref / pi)) of each token, [N] fp32, to be minimised.

    Its mean value is KL(pi, ref) and it is never negative, but its mean gradient is that of the forward KL(ref, pi): sum over ids of
    (pi - ref) * grad log pi. Both vanish at the reference and agree near it. A token that the policy has nearly given up and the
    reference has not gets the gradient 1 - ref / pi, which has no bound: k2's grows with the logarithm. It is GRPO's term
    (arXiv:2402.03300 eq. 4), whose tokens here get the same detached ratio as in `k2`. Log-ratios are held within +-20; beyond, the
    gradient is 0. Raises `ValueError` for unequal shapes.
    """
    check_shapes(logprobs=logprobs, reference_logprobs=reference_logprobs, old_logprobs=old_logprobs)
    log_ratio = -clamped_log_ratio(logprobs, reference_logprobs)
    # expm1 keeps the difference exact near 0, where exp(x) - 1 would round to the size of the result.
    return _importance_ratio(logprobs, old_logprobs) * (torch.expm1(log_ratio) - log_ratio)


def kl_in_reward(old_logprobs: Tensor, reference_logprobs: Tensor, *, sequence_ids: Tensor, num_responses: int, coef: float) -> Tensor:
    """Returns what is subtracted from the reward of each response, [num_responses] fp64, before advantages are taken.

    penalty = coef * sum over the response's drawn tokens of (log pi_old - log ref), so that reward - penalty is InstructGPT's
    (arXiv:2203.02155 eq. 2). A single penalty may be negative. In the mean over responses it is coef * KL(pi_old, ref) of whole
    responses: a sum, not a mean over tokens, so long responses pay more and coefficients of a loss term do not carry over.

    `sequence_ids` [N] int64 numbers the responses 0 .. num_responses - 1; a response without tokens has penalty 0.
    Raises `ValueError` for unequal shapes, ids that are not int64, and a coefficient that is not finite and above 0.
    """
    check_shapes(old_logprobs=old_logprobs, reference_logprobs=reference_logprobs, sequence_ids=sequence_ids)
    if sequence_ids.dtype != torch.int64:
        raise ValueError(f"sequence_ids of dtype {sequence_ids.dtype}: must be torch.int64, they index the responses")
    if not 0 < coef < math.inf:
        raise ValueError(f"coef = {coef!r}: must be finite and above 0; leave the KL term out where there is to be none")
    # In fp64 the order in which a GPU adds thousands of tokens does not show in the reward.
    log_ratio = old_logprobs.detach().double() - reference_logprobs.detach().double()
    return coef * torch.zeros(num_responses, dtype=torch.float64, device=log_ratio.device).index_add(0, sequence_ids, log_ratio)


def _importance_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Returns exp(logprobs - old_logprobs) in fp32, detached."""
    return clamped_log_ratio(logprobs.detach(), old_logprobs).exp()
