"""One step ahead: servers draw the next step's responses while the learner updates on this one's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.chat import Chat
from ..model.records import Example, Group, Rollout
from ..model.rollouts import group_requests
from ..model.sampler import SampleRequest, drawn_rollout, request_seed
from ..model.server_sampler import Draws, ServerSampler


@dataclass(frozen=True, kw_only=True, slots=True)
class _DrawnGroup:
    """What was drawn for one request, as a checkpoint keeps it: without the prompt, which the example gives again."""

    policy_version: int
    sampled_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    stopped: tuple[bool, ...]


class AheadDrawing:
    """A `model.rollouts.Drawing` of one response to each prompt that can begin before it is asked.

    `start` begins the next step's drawing with the weights that the servers have; the step then updates; `wait` ends the drawing before
    new weights are published, so that no response is ever drawn by two versions; the next step's call finds the responses there. A
    checkpoint holds them: a resumed run goes on with the very responses of the uninterrupted one.
    """

    def __init__(self, sampler: ServerSampler, *, chat: Chat, max_lag: int) -> None:
        """`max_lag` is how many updates the learner may be ahead of the weights that drew: those of one step. Older responses, such as
        those from before a roll-back, are dropped and drawn again."""
        self._sampler = sampler
        self._chat = chat
        self._max_lag = max_lag
        self._coming: Draws | None = None
        self._known: dict[tuple[int, int], _DrawnGroup] = {}

    def __call__(
        self, examples: Sequence[Example], *, num_rollouts: int, temperature: float, seed_of: Callable[[Example], int]
    ) -> list[Group]:
        """Returns a group of `num_rollouts` responses to each example, in order: those that were drawn ahead, or fresh ones."""
        requests = group_requests(examples, chat=self._chat, num_rollouts=num_rollouts, temperature=temperature, seed_of=seed_of)
        self._take_what_came()
        known = [self._known.get(_key(request)) for request in requests]
        if not all(group is not None and self._sampler.policy_version - group.policy_version <= self._max_lag for group in known):
            self._known = _drawn_groups(requests, self._sampler.sample(requests))
        self._known = {_key(request): self._known[_key(request)] for request in requests}
        return [
            Group(example=example, rollouts=self._rollouts(request, self._known[_key(request)]))
            for example, request in zip(examples, requests, strict=True)
        ]

    def start(self, examples: Sequence[Example], *, num_rollouts: int, temperature: float, seed_of: Callable[[Example], int]) -> None:
        """Begins to draw; nothing for no examples."""
        assert self._coming is None, "one drawing ahead at a time"
        if examples:
            requests = group_requests(examples, chat=self._chat, num_rollouts=num_rollouts, temperature=temperature, seed_of=seed_of)
            self._coming = self._sampler.start(requests)

    def wait(self) -> None:
        """Returns once what was begun is drawn; the responses of the step before are forgotten."""
        self._known = {}
        self._take_what_came()

    def state(self) -> dict[str, Tensor]:
        """Returns the responses that are there and not learned from, as tensors."""
        known = dict(self._known)
        if self._coming is not None and self._coming.is_whole:
            known |= _drawn_groups(self._coming.requests, self._coming.result())
        groups = list(known.values())
        return {
            "seeds": torch.tensor([seed for seed, _ in known], dtype=torch.int64),
            "group_sizes": torch.tensor([size for _, size in known], dtype=torch.int64),
            "policy_versions": torch.tensor([group.policy_version for group in groups], dtype=torch.int64),
            "lengths": torch.tensor([len(ids) for group in groups for ids in group.sampled_ids], dtype=torch.int64),
            "stopped": torch.tensor([stopped for group in groups for stopped in group.stopped], dtype=torch.int8),
            "token_ids": torch.tensor([token for group in groups for ids in group.sampled_ids for token in ids], dtype=torch.int64),
            "logprobs": torch.tensor([value for group in groups for row in group.logprobs for value in row], dtype=torch.float64),
        }

    def load(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes what `state` gave on each rank; each finds there what it is asked for, however many ranks there are now."""
        self._coming, self._known = None, {}
        for state in states:
            lengths = state["lengths"].tolist()
            ids = iter(state["token_ids"].split(lengths) if lengths else ())
            logprobs = iter(state["logprobs"].split(lengths) if lengths else ())
            stopped = iter(state["stopped"].tolist())
            for seed, size, version in zip(*(state[name].tolist() for name in ("seeds", "group_sizes", "policy_versions")), strict=True):
                self._known[seed, size] = _DrawnGroup(
                    policy_version=version,
                    sampled_ids=tuple(tuple(next(ids).tolist()) for _ in range(size)),
                    logprobs=tuple(tuple(next(logprobs).tolist()) for _ in range(size)),
                    stopped=tuple(bool(next(stopped)) for _ in range(size)),
                )

    def _take_what_came(self) -> None:
        if self._coming is not None:
            self._known |= _drawn_groups(self._coming.requests, self._coming.result())
            self._coming = None

    def _rollouts(self, request: SampleRequest, group: _DrawnGroup) -> tuple[Rollout, ...]:
        return tuple(
            drawn_rollout(
                request,
                ids,
                logprobs,
                chat=self._chat,
                finish_reason="stop" if stopped else "length",
                policy_version=group.policy_version,
            )
            for ids, logprobs, stopped in zip(group.sampled_ids, group.logprobs, group.stopped, strict=True)
        )


def _key(request: SampleRequest) -> tuple[int, int]:
    """Returns what tells a request: a hash of its seed, which is that of step and example, and of its prompt, as two data sets may use one
    id; and its size."""
    prompt = request.prompt
    return request_seed(request.seed, *prompt.token_ids, *(part.digest for part in prompt.media)), request.num_rollouts


def _drawn_groups(requests: Sequence[SampleRequest], groups: Sequence[tuple[Rollout, ...]]) -> dict[tuple[int, int], _DrawnGroup]:
    return {
        _key(request): _DrawnGroup(
            policy_version=rollouts[0].policy_version,
            sampled_ids=tuple(rollout.token_ids[-rollout.num_sampled_tokens :] for rollout in rollouts),
            logprobs=tuple(rollout.drawn_logprobs for rollout in rollouts),
            stopped=tuple(rollout.finish_reason == "stop" for rollout in rollouts),
        )
        for request, rollouts in zip(requests, groups, strict=True)
    }
