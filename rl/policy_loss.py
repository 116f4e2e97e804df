"""Policy losses on the trained tokens of a packed batch: SAPO, and GRPO, GSPO and REINFORCE beside it for comparison.

Every array is flat, [N] over the N trained tokens of the batch: no padding and no masked-out token may be among them (drop them before,
their log-probs would pass through `exp`). `advantages` holds one value per response, repeated over its tokens. Every loss returns one
number per token, to be minimised; the caller reduces with `(token_weights * per_token_loss).sum()`. For SAPO the weight of a token is
1 / (planned responses x length of its response). Arithmetic is in fp32 whatever dtype comes in.

The streams are never mixed: `sampler_logprobs` are the engine's when the token was drawn, `old_logprobs` the learner's before the
rollout's first update, `logprobs` the learner's now; only the last carries a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..model.records import VlpostError

MAX_LOG_RATIO = 20.0
"""Log-ratios are held within +-20 nats before `exp`: a gate of tau near 1 is shut there, and beyond, backward would be 0 * inf = NaN."""


class NonFiniteLogprobsError(VlpostError, ValueError):
    """Log-probs of drawn tokens that are infinite or NaN; the message names the stream and the first such token."""


def sapo(logprobs: Tensor, old_logprobs: Tensor, *, advantages: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    """Returns the SAPO loss of each token, [N] fp32: -f(r) * A, with the soft gate f in place of a clip.

    r = exp(logprobs - old_logprobs);  f(r) = (4 / tau) * sigmoid(tau * (r - 1));  tau = tau_pos where A > 0, else tau_neg
    (arXiv:2511.20347 eq. 5 and 6; the paper's setting is tau_pos = 1.0, tau_neg = 1.05). The factor 4 / tau makes the slope of f at
    r = 1 one for every tau, so that on-policy tokens get the plain policy gradient: d loss / d logprobs = -w(r) * r * A with w of
    `gate_weights`. The value of f at r = 1 is 2 / tau, so loss values of different tau do not compare; log `ratio_statistics`.

    Deviation from the paper: log-ratios are held within +-20 (see `MAX_LOG_RATIO`), where for tau near 1 the gradient is below 1e-8 * |A|.
    Raises `ValueError` for unequal shapes and for temperatures that are not above 0.
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    advantages = advantages.float()
    tau = _gate_temperatures(advantages, tau_pos=tau_pos, tau_neg=tau_neg)
    ratio = clamped_log_ratio(logprobs, old_logprobs).exp()
    gate = 4.0 / tau * torch.sigmoid(tau * (ratio - 1.0))
    return -gate * advantages


def gate_weights(ratio: Tensor, *, advantages: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    """Returns the share of the plain policy gradient that SAPO's gate lets through for each token, [N] in (0, 1], for logs.

    w(r) = df/dr = 4 p (1 - p), p = sigmoid(tau * (r - 1)) (arXiv:2511.20347 eq. 8); tau as in `sapo`. It is 1 at r = 1.
    """
    check_shapes(ratio=ratio, advantages=advantages)
    logits = _gate_temperatures(advantages, tau_pos=tau_pos, tau_neg=tau_neg).to(ratio.dtype) * (ratio - 1.0)
    # sigmoid(-x) rather than 1 - sigmoid(x), which rounds to 0 while the weight is still 1e-7.
    return 4.0 * torch.sigmoid(logits) * torch.sigmoid(-logits)


def grpo(logprobs: Tensor, old_logprobs: Tensor, *, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """Returns the clipped loss of each token, [N] fp32: -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A).

    r is the token's ratio (PPO, arXiv:1707.06347 eq. 7; with group advantages GRPO, arXiv:2402.03300 eq. 3, without its KL term).
    Unequal bounds are DAPO's clip-higher (arXiv:2503.14476: 0.2 and 0.28). Log-ratios are held within +-20 as in `sapo`.
    Raises `ValueError` for unequal shapes and bounds outside [0, 1) and [0, inf).
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    return _clipped(clamped_log_ratio(logprobs, old_logprobs).exp(), advantages.float(), clip_low=clip_low, clip_high=clip_high)


def gspo(
    logprobs: Tensor, old_logprobs: Tensor, *, advantages: Tensor, sequence_ids: Tensor, clip_low: float = 3e-4, clip_high: float = 4e-4
) -> Tensor:
    """Returns the clipped loss of each token's whole response, [N] fp32: -min(s * A, clip(s, 1 - clip_low, 1 + clip_high) * A).

    s = exp(mean over the response's tokens of logprobs - old_logprobs), its geometric-mean ratio (arXiv:2507.18071 eq. 5 to 7, whose
    clip bounds are the defaults). Every token of a response has the same value; weights of 1 / length make it count once.

    `sequence_ids` [N] int64 numbers the responses 0..S-1, each with at least one token. A response must lie in one micro-batch whole:
    of a part, s would be another number. Raises `ValueError` for unequal shapes, ids that are not int64, and bounds as in `grpo`.
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, sequence_ids=sequence_ids)
    if sequence_ids.dtype != torch.int64:
        raise ValueError(f"sequence_ids of dtype {sequence_ids.dtype}: must be torch.int64, they index the responses")
    log_ratio = clamped_log_ratio(logprobs, old_logprobs)
    # N bounds the number of responses: sums of that length need no look at the ids on the host, which would stall the GPU.
    sums = torch.zeros_like(log_ratio).index_add(0, sequence_ids, log_ratio)
    lengths = torch.zeros_like(log_ratio).index_add(0, sequence_ids, torch.ones_like(log_ratio))
    sequence_ratio = (sums / lengths.clamp(min=1.0)).exp()[sequence_ids]
    return _clipped(sequence_ratio, advantages.float(), clip_low=clip_low, clip_high=clip_high)


def reinforce(logprobs: Tensor, *, advantages: Tensor) -> Tensor:
    """Returns the plain policy-gradient loss of each token, [N] fp32: -A * logprobs, whose gradient is -A * grad log pi.

    Unbiased only on policy; it is what every other loss here reduces to at r = 1.
    """
    check_shapes(logprobs=logprobs, advantages=advantages)
    return -advantages.float() * logprobs.float()


def truncated_importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, *, cap: float = 2.0) -> Tensor:
    """Returns the factor of each token that corrects for the engine drawing from slightly other probabilities, [N] fp32, detached.

    min(exp(old_logprobs - sampler_logprobs), cap), token by token (truncated importance sampling; Yao et al., "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training", 2025, cap 2). The caller multiplies per-token losses by it. A product over
    the response is not offered: over thousands of tokens it sends gradients to zero or masks everything. The log difference is
    held within +-20. Raises `ValueError` for unequal shapes and a cap that is not above 0.
    """
    check_shapes(old_logprobs=old_logprobs, sampler_logprobs=sampler_logprobs)
    if not cap > 0:
        raise ValueError(f"cap = {cap!r}: must be above 0, it is the largest weight of a token (2.0 is usual)")
    return clamped_log_ratio(old_logprobs.detach(), sampler_logprobs.detach()).exp().clamp(max=cap)


@torch.no_grad()
def ratio_statistics(logprobs: Tensor, old_logprobs: Tensor, *, advantages: Tensor, tau_pos: float, tau_neg: float) -> dict[str, float]:
    """Returns how far the policy has moved since `old_logprobs`, and what SAPO's gate makes of it, for logs.

    - `ratio_p01_pos`, `ratio_p50_pos`, `ratio_p99_pos`: quantiles of the ratio over tokens with A > 0, by nearest rank; `_neg` for
      A < 0. Taken before any clamp, in fp64: `inf` above a log-ratio of 709.
    - `gate_p01_pos`, `gate_p50_pos`, `gate_mean_pos` (and `_neg`): the same of `gate_weights`. Near 1 the gate does nothing.
    - `ratio_beyond_2_frac`: share of all tokens whose ratio is above 2 or below 1/2.
    - `old_kl_k3`: mean of r - 1 - log r, an estimate of KL(old || current) in nats per token that is never negative.

    Keys of a sign that no token has are left out. Quantiles do not average over micro-batches: hand in the tokens of a whole step.
    Raises `ValueError` for unequal shapes and no tokens, `NonFiniteLogprobsError` for log-probs that are not finite.
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    log_ratio = _finite_log_ratio(logprobs=logprobs, old_logprobs=old_logprobs)
    ratio = log_ratio.exp()
    gate = gate_weights(ratio, advantages=advantages, tau_pos=tau_pos, tau_neg=tau_neg)
    statistics = {"ratio_beyond_2_frac": _beyond_2_frac(log_ratio), "old_kl_k3": _k3(log_ratio)}
    for sign, chosen in (("pos", advantages > 0), ("neg", advantages < 0)):
        if not bool(chosen.any()):
            continue
        chosen_gate = gate[chosen]
        quantiles = {
            **_quantiles("ratio", ratio[chosen], {"p01": 0.01, "p50": 0.5, "p99": 0.99}),
            **_quantiles("gate", chosen_gate, {"p01": 0.01, "p50": 0.5}),
            "gate_mean": chosen_gate.mean().item(),
        }
        statistics |= {f"{name}_{sign}": value for name, value in quantiles.items()}
    return statistics


@torch.no_grad()
def engine_mismatch(old_logprobs: Tensor, sampler_logprobs: Tensor) -> dict[str, float]:
    """Returns how far the engine's log-probs are from the learner's for the same tokens and, as far as anyone knows, the same weights.

    With d = old_logprobs - sampler_logprobs, in nats: `engine_mean_abs_gap` and `engine_max_abs_gap` of d; `engine_kl_k3` = mean of
    exp(d) - 1 - d, an estimate of KL(engine || learner) per token; `engine_beyond_2_frac`, the share of tokens whose ratio exp(d) is
    above 2 or below 1/2 (more than a tenth is a danger sign for mixtures of experts: arXiv:2510.11370).
    Raises `ValueError` for unequal shapes and no tokens, `NonFiniteLogprobsError` for log-probs that are not finite.
    """
    check_shapes(old_logprobs=old_logprobs, sampler_logprobs=sampler_logprobs)
    gap = _finite_log_ratio(old_logprobs=old_logprobs, sampler_logprobs=sampler_logprobs)
    return {
        "engine_mean_abs_gap": gap.abs().mean().item(),
        "engine_max_abs_gap": gap.abs().max().item(),
        "engine_kl_k3": _k3(gap),
        "engine_beyond_2_frac": _beyond_2_frac(gap),
    }


def clamped_log_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Returns numerator - denominator in fp32 within +-20; no gradient flows into the denominator."""
    return (numerator.float() - denominator.detach().float()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _gate_temperatures(advantages: Tensor, *, tau_pos: float, tau_neg: float) -> Tensor:
    """Returns tau of each token, [N] fp32: tau_pos where the advantage is above 0, else tau_neg."""
    for name, tau in (("tau_pos", tau_pos), ("tau_neg", tau_neg)):
        if not 0 < tau < math.inf:
            raise ValueError(f"{name} = {tau!r}: must be finite and above 0 (the SAPO paper uses tau_pos 1.0, tau_neg 1.05)")
    return torch.full_like(advantages, tau_neg, dtype=torch.float32).masked_fill(advantages > 0, tau_pos)


def _clipped(ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """Returns the pessimistic clipped loss -min(r * A, clip(r) * A) of each token."""
    if not 0 <= clip_low < 1:
        raise ValueError(f"clip_low = {clip_low!r}: must be in [0, 1), ratios are clipped from below at 1 - clip_low")
    if not 0 <= clip_high < math.inf:
        raise ValueError(f"clip_high = {clip_high!r}: must be 0 or more and finite, ratios are clipped from above at 1 + clip_high")
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)


def _k3(log_ratio: Tensor) -> float:
    """Returns mean(r - 1 - log r): John Schulman's k3 estimate of a KL divergence (joschu.net/blog/kl-approx.html)."""
    # expm1 keeps the difference exact near 0, where exp(d) - 1 would round to the size of the result.
    return (torch.expm1(log_ratio) - log_ratio).mean().item()


def _beyond_2_frac(log_ratio: Tensor) -> float:
    """Returns the share of tokens whose ratio is above 2 or below 1/2."""
    return (log_ratio.abs() > math.log(2.0)).double().mean().item()


def _quantiles(name: str, values: Tensor, levels: Mapping[str, float]) -> dict[str, float]:
    """Returns the nearest-rank quantiles of `values`, by name."""
    # A sort, because torch.quantile refuses more than 2^24 elements, which a large rollout batch has.
    ordered = values.sort().values
    return {f"{name}_{label}": ordered[round(level * (len(ordered) - 1))].item() for label, level in levels.items()}


def _finite_log_ratio(**logprobs: Tensor) -> Tensor:
    """Returns the first stream minus the second, in fp64; refuses empty streams and values that are not finite, by name."""
    for name, values in logprobs.items():
        if values.numel() == 0:
            raise ValueError(f"{name} holds no tokens: statistics need at least one trained token")
        wrong = (~values.isfinite()).nonzero().flatten()
        if wrong.numel() > 0:
            first = int(wrong[0])
            raise NonFiniteLogprobsError(
                f"{name}: {wrong.numel()} of {values.numel()} log-probs are not finite, the first is {values[first].item()} at token "
                f"{first}; a drawn token has a finite log-prob unless engine and learner disagree on which ids may be sampled"
            )
    numerator, denominator = logprobs.values()
    return numerator.double() - denominator.double()


def check_shapes(**arrays: Tensor) -> None:
    """Raises `ValueError` unless all arrays are [N] with one N: [N] against [N, 1] would broadcast to [N, N] without a word."""
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != 1 for shape in shapes.values()):
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes {listed}: all must be [N], one value for each trained token; repeat a response's value over its tokens")
