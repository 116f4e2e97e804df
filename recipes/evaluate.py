"""Measuring a model on held-out examples: accuracy of sampled and greedy responses, pass@k, each with its interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

from torch import Tensor

from ..model.chat import Chat
from ..model.layout import Ranks
from ..model.records import Example, Rollout
from ..model.rollouts import Drawing, conversation_metrics, draw_groups
from ..model.sampler import Sampler, SampleRequest, request_seed
from ..rewards.manager import RewardManager
from ..rewards.result import JudgedRollout, ScoredGroup, UnjudgedRollout
from .confidence import Estimate
from .evaluation_record import JudgedResponse, Outcome, figures_of
from .schema import EvaluateConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What came out of measuring a model."""

    metrics: dict[str, float]
    """The figures' means, the shares of what was truncated and what was unavailable, and what conversations with tools had."""
    figures: dict[str, Estimate]
    outcomes: tuple[Outcome, ...]
    """Of all ranks, one way of sampling after the other, in the order of the examples."""


class NarrowedSampler:
    """A sampler that draws with top-p, top-k and presence penalty of an evaluation; greedy responses stay as they are."""

    def __init__(self, sampler: Sampler, config: EvaluateConfig) -> None:
        self._sampler = sampler
        self._narrowed = {"top_p": config.top_p, "top_k": config.top_k, "presence_penalty": config.presence_penalty}
        self.policy_version = sampler.policy_version

    def sample(self, requests: Sequence[SampleRequest]) -> list[tuple[Rollout, ...]]:
        """Returns the rollouts of each request, in order."""
        return self._sampler.sample([replace(request, **self._narrowed) if request.temperature > 0 else request for request in requests])

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Hands the weights on."""
        self._sampler.load_weights(weights, policy_version)
        self.policy_version = policy_version

    def load_adapter(self, folder: Path, policy_version: int) -> None:
        """Hands the adapter on."""
        self._sampler.load_adapter(folder, policy_version)
        self.policy_version = policy_version

    def release_memory(self) -> None:
        """Has the engine give its memory back."""
        self._sampler.release_memory()


def evaluate(
    examples: Sequence[Example],
    config: EvaluateConfig,
    *,
    sampler: Sampler,
    rewards: RewardManager,
    chat: Chat,
    ranks: Ranks,
    seed: int,
    draw: Drawing | None = None,
) -> Measurement:
    """Returns, for n = `num_samples` and each temperature t: `avg@n/t` (mean reward), `pass@n/t` (share of examples with a response
    that earned a reward above 0), and pass@k for each k of `pass_at`; `greedy` (mean reward at temperature 0); `truncated_frac` and
    `unavailable_frac` over all of them.

    Seeds depend on `seed`, the temperature and the example alone, so that two models are asked alike. A response that could not be
    judged counts in `unavailable_frac` and `truncated_frac` and in nothing else. Where examples are of several tasks, the figures of each
    stand below `task/<task>/` and their mean, each task counted once, below `macro/`; where the reward has several components, the mean
    value of each, over the responses that it judges, below `reward/<component>/`. Each rank asks its share of the examples. `draw` draws
    conversations with tools, whose turns and calls are measured too; absent: one response to each prompt.
    """
    figures: dict[str, Estimate] = {}
    outcomes: list[Outcome] = []
    here = ranks.share(examples)
    draw = draw or partial(draw_groups, sampler=sampler, chat=chat)
    rollouts: list[Rollout] = []
    plans = [(f"/{temperature:g}", temperature, config.num_samples) for temperature in config.temperatures]
    if config.greedy:
        plans.append(("greedy", 0.0, 1))
    for name, temperature, num_samples in plans:
        seed_of = partial(_seed, seed, name)
        groups = draw(here, num_rollouts=num_samples, temperature=temperature, seed_of=seed_of)
        rollouts += [rollout for group in groups for rollout in group.rollouts]
        way = "greedy" if temperature == 0.0 else f"@{num_samples}{name}"
        parts = ranks.gather([_outcome(group, way) for group in rewards.score(groups)])
        found = [outcome for outcome in chain.from_iterable(zip_longest(*parts)) if outcome is not None]
        figures |= figures_of(found, pass_ks=sorted({*config.pass_at, config.num_samples}))
        outcomes += found
    responses = [response for outcome in outcomes for response in outcome.responses]
    metrics = {name: figure.mean for name, figure in figures.items()}
    metrics["truncated_frac"] = sum(response.is_truncated for response in responses) / len(responses)
    metrics["unavailable_frac"] = sum(response.reward is None for response in responses) / len(responses)
    metrics |= ranks.merge([conversation_metrics(rollouts)])
    return Measurement(metrics=metrics, figures=figures, outcomes=tuple(outcomes))


def _outcome(group: ScoredGroup, way: str) -> Outcome:
    """Returns what is kept of a group: the judged responses first."""
    responses = [_judged(one) for one in group.judged] + [_unjudged(one) for one in group.unjudged]
    return Outcome(id=group.example.id, task=group.example.task, way=way, responses=tuple(responses))


def _judged(one: JudgedRollout) -> JudgedResponse:
    components = {name: result.value for name, result in one.score.results.items()}
    return _response(one.rollout, reward=one.score.reward, components=components, unavailable={})


def _unjudged(one: UnjudgedRollout) -> JudgedResponse:
    return _response(one.rollout, reward=None, components={}, unavailable=one.reasons)


def _response(rollout: Rollout, *, reward: float | None, components: Mapping[str, float], unavailable: Mapping[str, str]) -> JudgedResponse:
    return JudgedResponse(
        text=rollout.text,
        reward=reward,
        components=components,
        tokens=rollout.num_sampled_tokens,
        is_truncated=rollout.finish_reason == "length",
        unavailable=dict(unavailable),
    )


def _seed(seed: int, name: str, example: Example) -> int:
    return request_seed(seed, "evaluate", name, example.id)


def sampling_line(config: EvaluateConfig) -> str:
    """Returns how responses are drawn, for the log: temperatures, top-p, top-k, presence penalty, and the preset that says so."""
    source = f" ({config.preset})" if config.preset is not None else ""
    temperatures = ", ".join(f"{temperature:g}" for temperature in config.temperatures)
    return (
        f"draws at temperature {temperatures} with top_p {config.top_p:g}, top_k {config.top_k}, "
        f"presence_penalty {config.presence_penalty:g}{source}"
    )
