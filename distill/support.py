"""The few ids at each position that stand for a teacher's whole distribution, and what of it they leave out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model.learner import Distribution
from ..model.logprobs import support_logprobs, top_ids
from ..model.metrics import Metric, maximum, mean, total
from ..model.packing import Batch
from ..model.reference import ReferenceStates, SparseStates
from .bucketed import NO_MASS
from .config import TopKConfig

LEAST_LOGPROB = -50.0
"""Nats: a drawn token to which a served teacher gives no mass at all (-inf, or the -9999 that stands for it over HTTP) counts as this
one, in advantages and metrics. Below what fp32 log-probs of real models reach, and finite. Our choice."""


def scored_states(
    support_ids: Tensor,
    support_logprobs: Tensor,
    *,
    given: Tensor,
    drawn_ids: Tensor,
    drawn_logprobs: Tensor,
    num_top: int,
    allowed: Tensor,
) -> SparseStates:
    """Returns what an engine's scores, which are over its whole vocabulary, say over the `allowed` ids.

    `support_ids`, `support_logprobs` and `given` [N, K] are the ids that it scored, each once where it is `given`, the first `num_top`
    of them its own most likely ones; `drawn_ids` and `drawn_logprobs` [N]; `allowed` [V] bool.

    Mass of ids that may not be drawn is taken out where it is known, as the student's is: log q' = log q - log(1 - mass). Where it is
    not known it stays in the tail; `teacher_banned_unknown_max` bounds it: at most the tail, and at most the number of such ids times the
    least probable of the teacher's own. NaN is no score: that id joins the tail and is counted. So does an id of no mass.
    """
    may_be_drawn = (support_ids < len(allowed)) & allowed[support_ids.clamp(0, len(allowed) - 1)]
    has_mass = given & (support_logprobs > NO_MASS)  # False for NaN
    masses = torch.where(has_mass, support_logprobs.double(), -torch.inf).exp()
    banned = (masses * ~may_be_drawn).sum(dim=-1)
    shift = torch.log1p(-banned.clamp(max=1.0 - 1e-6))
    known = has_mass & may_be_drawn
    tail = (1.0 - masses.sum(dim=-1)).clamp_min(0.0)
    top_masses = masses[:, :num_top].masked_fill(support_logprobs[:, :num_top].isnan(), 1.0)
    least = top_masses.amin(dim=-1) if num_top else torch.ones_like(tail)
    unknown = torch.minimum(tail, least * int((~allowed).sum()))
    without_mass = ~(drawn_logprobs > NO_MASS)
    count = len(drawn_ids)
    metrics: dict[str, Metric] = {
        "teacher_nan_scores": total((given & support_logprobs.isnan()).sum()),
        "teacher_tokens_without_mass": total(without_mass.sum()),
    }
    if count:
        metrics |= {
            "teacher_tail_mass": mean(tail.mean(), count),
            "teacher_banned_mass": mean(banned.mean(), count),
            "teacher_banned_unknown_max": maximum(unknown.max()),
        }
    return SparseStates(
        logprobs=torch.where(without_mass, LEAST_LOGPROB, (drawn_logprobs.double() - shift).clamp_min(LEAST_LOGPROB)).float(),
        # An entry that only fills the row is the drawn id: one that every head has.
        support_ids=torch.where(known, support_ids, drawn_ids[:, None]),
        support_logprobs=torch.where(known, support_logprobs.double() - shift[:, None], 0.0).float(),
        known=known,
        metrics=metrics,
    )


def states_of_support(
    states: ReferenceStates, batch: Batch[Any], config: TopKConfig, *, student_ids: Tensor | None, distribution: Distribution
) -> SparseStates:
    """Returns the same of a teacher in this process, whose log-probs of any id are there; nothing is banned and unknown."""
    assert states.head is not None, "a teacher has a head of its own"
    hidden, head, device = states.hidden, states.head, states.hidden.device
    allowed = distribution.allowed
    parts = [batch.target_ids.to(device)[:, None]]
    if config.ids != "student":
        parts.append(top_ids(hidden, head, k=config.k, allowed=allowed))
    if student_ids is not None:
        parts.append(student_ids.to(device))
    support_ids = torch.cat(parts, dim=-1)
    logprobs, _ = support_logprobs(hidden, head, token_ids=support_ids, allowed=allowed, temperature=distribution.temperature)
    known = first_of_each(support_ids)
    tail = 1.0 - torch.where(known, logprobs.double(), -torch.inf).exp().sum(dim=-1)
    metrics = {"teacher_tail_mass": mean(tail.clamp_min(0.0).mean(), len(tail))} if len(tail) else {}
    return SparseStates(logprobs=states.logprobs, support_ids=support_ids, support_logprobs=logprobs, known=known, metrics=metrics)


def first_of_each(ids: Tensor) -> Tensor:
    """Returns [N, K] bool: false where an id of [N, K] stands further left in its row."""
    in_order, places = ids.sort(dim=-1, stable=True)
    is_first = torch.ones_like(in_order, dtype=torch.bool)
    is_first[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
    return torch.empty_like(is_first).scatter_(1, places, is_first)
