"""The gate before training: engine and learner, and the learner's packing and plain transformers, must say the same.

Same sequences, three computations: the engine when it drew them, the learner on packed batches, transformers one row at a time.
The first difference stops the run and is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import PACKED_ATTENTION
from .chat import Chat, EncodedPrompt
from .config import MeanParityConfig, ParityConfig
from .experts import has_experts
from .layout import Ranks
from .learner import Distribution, Learner
from .packing import Batch, Weighted, pack, split_by_sequence
from .records import ImagePart, MediaPart, Rollout, TrainSequence, VideoPart, VlpostError
from .sampler import Sampler, SampleRequest, request_seed


class ParityError(VlpostError):
    """Engine and learner disagree; training would be silently wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """How close the computations are."""

    num_sequences: int
    num_tokens: int
    engine_gap: float
    """Largest |engine - learner| log-prob, nats"""
    packing_gap: float
    """Largest |packed learner - transformers one by one| log-prob, nats"""

    def __str__(self) -> str:
        return (
            f"{self.num_tokens} tokens of {self.num_sequences} responses: engine against learner {self.engine_gap:.1e}, "
            f"packed against one by one {self.packing_gap:.1e}"
        )


def check_parity(
    prompts: Sequence[tuple[str, EncodedPrompt]],
    *,
    sampler: Sampler,
    learner: Learner,
    chat: Chat,
    distribution: Distribution,
    config: ParityConfig,
    seed: int,
    drawn: Sequence[tuple[Rollout, ...]] | None = None,
) -> ParityReport:
    """Draws two responses to each (name, prompt) and compares; returns the gaps or raises `ParityError`, on every rank when on one.

    `drawn` are conversations with tools that were drawn from the prompts and are compared instead.

    Exact: prompt ids after expansion, 3-D positions against transformers' `get_rope_index`, image and video counts. Log-probs of the
    sampled tokens: in float32 each within `config.max_abs_gap` nats, in bfloat16 all of them together within `config.bfloat16`.
    """
    ranks = learner.ranks
    if sampler.policy_version != learner.policy_version:
        raise ParityError(
            f"the engine holds weights of update {sampler.policy_version}, the learner of {learner.policy_version}: publish before sampling"
        )
    requests = [
        SampleRequest(
            place=place, prompt=prompt, num_rollouts=2, seed=request_seed(seed, "parity", place), temperature=distribution.temperature
        )
        for place, prompt in prompts
    ]
    groups = sampler.sample(requests) if drawn is None else list(drawn)
    families = [[_weighted(place, rollout) for rollout in rollouts] for (place, _), rollouts in zip(prompts, groups, strict=True)]
    wrong = _wrong_media(prompts, groups, chat) or _wrong_positions(
        # Responses to one prompt have the prompt's positions; a conversation has images of its own.
        [one.sequence for family in families for one in (family if drawn is not None else family[:1])],
        learner,
        chat,
    )
    _raise_together(ranks, wrong)
    comparisons = [
        comparison
        for batch in learner.fill(pack(families, media=chat, token_budget=learner.config.token_budget))
        for comparison in _compare_batch(batch, learner, chat, distribution)
    ]
    by_whose = [[c for c in comparisons if c.whose == whose] for whose in ("transformers", "the engine")]
    if learner.dtype == torch.float32:
        wrong = _wrong_token(comparisons, config)
    else:
        limits = config.bfloat16_experts if has_experts(learner.model) else config.bfloat16
        wrong = next(filter(None, (_wrong_mean(some, limits) for some in by_whose)), None)
    _raise_together(ranks, wrong)
    return ParityReport(
        num_sequences=sum(map(len, families)),
        num_tokens=sum(len(c.ours) for c in by_whose[1]),
        engine_gap=max(c.gap for c in by_whose[1]),
        packing_gap=max(c.gap for c in by_whose[0]),
    )


def _raise_together(ranks: Ranks, wrong: str | None) -> None:
    """Raises what is wrong on the first rank where something is, on all of them: none goes on to wait for the others."""
    found = [message for message in ranks.gather(wrong) if message is not None]
    if found:
        raise ParityError(found[0])


def _weighted(place: str, rollout: Rollout) -> Weighted[Rollout]:
    sequence = TrainSequence(place=place, token_ids=rollout.token_ids, trained=rollout.sampled, media=rollout.media, targets=rollout)
    return Weighted(sequence=sequence, token_weight=0.0)


def _wrong_media(prompts: Sequence[tuple[str, EncodedPrompt]], groups: Sequence[tuple[Rollout, ...]], chat: Chat) -> str | None:
    for (place, prompt), rollouts in zip(prompts, groups, strict=True):
        for rollout in rollouts:
            if rollout.token_ids[: len(prompt.token_ids)] != prompt.token_ids:
                return f"{place}: the engine answered another prompt than the learner trains on"
            num_shown = len(prompt.media) + sum(answer.num_images for turn in rollout.turns for answer in turn.answers)
            if rollout.media[: len(prompt.media)] != prompt.media or len(rollout.media) != num_shown:
                return f"{place}: {len(rollout.media)} images and videos in the rollout, {num_shown} in the prompt and from tools"
            written = [token for token, sampled in zip(rollout.token_ids, rollout.sampled, strict=True) if sampled]
            stray = [token for token in written if token in chat.vision_token_ids]
            if stray:
                return f"{place}: the engine sampled vision token {stray[0]}: the allowed ids did not reach it"
    return None


def _wrong_positions(sequences: Sequence[TrainSequence[Rollout]], learner: Learner, chat: Chat) -> str | None:
    body: Any = learner.model.model
    for sequence in sequences:
        inputs = _transformers_inputs(sequence, chat, learner)
        expected, _ = body.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
        )
        ours = chat.positions(sequence.token_ids, sequence.media).to(expected.device)
        if not torch.equal(expected[:, 0], ours):
            index = int((expected[:, 0] != ours).any(dim=0).nonzero()[0])
            return (
                f"{sequence.place}: token {index} has position {ours[:, index].tolist()} in the learner and "
                f"{expected[:, 0, index].tolist()} in transformers (rows t, h, w)"
            )
    return None


def _transformers_inputs(sequence: TrainSequence[Any], chat: Chat, learner: Learner) -> dict[str, Tensor]:
    ids = torch.tensor(sequence.token_ids)[None]
    kinds = torch.zeros_like(ids)
    kinds[ids == chat.image_token_id] = 1
    kinds[ids == chat.video_token_id] = 2
    inputs = {"input_ids": ids, "mm_token_type_ids": kinds}
    for kind, names in ((ImagePart, ("pixel_values", "image_grid_thw")), (VideoPart, ("pixel_values_videos", "video_grid_thw"))):
        parts: list[MediaPart] = [part for part in sequence.media if isinstance(part, kind)]
        if parts:
            inputs[names[0]] = torch.cat([chat.processed(part).pixel_values for part in parts])
            inputs[names[1]] = torch.tensor([chat.processed(part).grid for part in parts])
    return {name: value.to(learner.accelerator.device) for name, value in inputs.items()}


def one_by_one_logprobs(sequence: TrainSequence[Any], learner: Learner, chat: Chat, distribution: Distribution) -> Tensor:
    """Returns the log-probs [trained tokens] by transformers' own forward of this row alone: the second implementation."""
    inputs = _transformers_inputs(sequence, chat, learner)
    trained = torch.tensor(sequence.trained)
    learner.model.set_attn_implementation({"text_config": "sdpa"})
    try:
        with torch.no_grad():
            logits = learner.run(lambda model: model(**inputs, use_cache=False).logits)[0].float().cpu()
    finally:
        learner.model.set_attn_implementation({"text_config": PACKED_ATTENTION})
    logits = logits[:-1][trained[1:]] / distribution.temperature
    if distribution.allowed is not None:
        logits = logits.masked_fill(~distribution.allowed.cpu(), -torch.inf)
    targets = torch.tensor(sequence.token_ids)[trained]
    return logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]


def _engine_logprobs(sequence: TrainSequence[Rollout]) -> Tensor:
    rollout = sequence.targets
    return torch.tensor([value for value, sampled in zip(rollout.sampler_logprobs, rollout.sampled, strict=True) if sampled])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Comparison:
    """The log-probs [trained tokens] of one response, twice."""

    sequence: TrainSequence[Rollout]
    ours: Tensor
    theirs: Tensor
    whose: str

    @property
    def gap(self) -> float:
        """Largest difference in nats; NaN counts as infinite."""
        return float((self.ours - self.theirs).abs().nan_to_num(nan=torch.inf).max())


def _compare_batch(batch: Batch[Rollout], learner: Learner, chat: Chat, distribution: Distribution) -> list[_Comparison]:
    packed = learner.logprobs(batch, distribution).logprobs.cpu()
    comparisons = []
    for sequence, ours in zip(batch.sequences, split_by_sequence(batch, packed), strict=True):
        alone = one_by_one_logprobs(sequence, learner, chat, distribution)
        comparisons.append(_Comparison(sequence=sequence, ours=ours, theirs=alone, whose="transformers"))
        comparisons.append(_Comparison(sequence=sequence, ours=ours, theirs=_engine_logprobs(sequence), whose="the engine"))
    return comparisons


def _wrong_token(comparisons: Sequence[_Comparison], config: ParityConfig) -> str | None:
    """Returns words for the first token beyond the limit, text-only rows first: what is wrong there is wrong everywhere."""
    beyond = [comparison for comparison in comparisons if not comparison.gap <= config.max_abs_gap]
    if not beyond:
        return None
    worst = min(beyond, key=lambda comparison: (bool(comparison.sequence.media), comparison.whose != "transformers"))
    ours, theirs, sequence = worst.ours, worst.theirs, worst.sequence
    index = int((~((ours - theirs).abs() <= config.max_abs_gap)).nonzero()[0])
    token_id = sequence.token_ids[index - len(ours)]
    return (
        f"{sequence.place}: response token {index} (id {token_id}) has log-prob {ours[index]:.6f} in the learner and "
        f"{theirs[index]:.6f} in {worst.whose}; the limit is {config.max_abs_gap:g}; {_hint(worst, config)}"
    )


def _wrong_mean(comparisons: Sequence[_Comparison], limits: MeanParityConfig) -> str | None:
    """Returns words if the log-probs differ more, over all tokens, than the rounding of bfloat16 explains."""
    difference = torch.cat([c.ours - c.theirs for c in comparisons]).nan_to_num(nan=torch.inf)
    measured = {
        "mean_gap": (difference.abs().mean().item(), limits.max_mean_gap),
        "kl": ((torch.expm1(difference) - difference).mean().nan_to_num(nan=torch.inf).item(), limits.max_kl),
        "beyond_2_frac": ((difference.abs() > math.log(2.0)).float().mean().item(), limits.max_beyond_2_frac),
    }
    if all(value <= limit for value, limit in measured.values()):
        return None
    worst = max(comparisons, key=lambda comparison: comparison.gap)
    said = ", ".join(f"{name} {value:.2g} (limit {limit:g})" for name, (value, limit) in measured.items())
    return (
        f"{len(difference)} tokens of the learner and of {comparisons[0].whose} differ by more than rounding: {said}; "
        f"most in {worst.sequence.place}, by {worst.gap:.2g} nats"
    )


def _hint(comparison: _Comparison, config: ParityConfig) -> str:
    ours, theirs = comparison.ours, comparison.theirs
    for one, other in ((ours[1:], theirs[:-1]), (ours[:-1], theirs[1:])):
        if len(one) > 1 and bool(((one - other).abs() <= config.max_abs_gap).all()):
            return "the two are shifted by one token"
    kinds = sorted({"images" if isinstance(part, ImagePart) else "video" for part in comparison.sequence.media})
    if kinds:
        return f"rows with {' and '.join(kinds)} differ and no text-only row does: look at vision features, caches and 3-D positions"
    return "the row has no image: look at weights, temperature and allowed ids"
