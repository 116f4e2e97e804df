"""Groups of rollouts for a step's examples, rollouts as sequences to train, and the seconds of a step's phases."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from .chat import Chat
from .metrics import Metric, maximum, mean, total
from .packing import Targets
from .records import Example, Group, Rollout, TrainSequence
from .sampler import Sampler, SampleRequest


class Drawing(Protocol):
    """How a stage draws: with engine and prompts bound, `draw_groups`, or conversations with tools (`rl.agent.draw_conversations`)."""

    def __call__(
        self, examples: Sequence[Example], *, num_rollouts: int, temperature: float, seed_of: Callable[[Example], int]
    ) -> list[Group]:
        """Returns a group of `num_rollouts` responses to each example, in order; its seed decides all that is drawn for an example."""
        ...


def draw_groups(
    examples: Sequence[Example],
    *,
    sampler: Sampler,
    chat: Chat,
    num_rollouts: int,
    temperature: float,
    seed_of: Callable[[Example], int],
) -> list[Group]:
    """Returns a group of `num_rollouts` responses to each example, in order, drawn with its own seed."""
    requests = group_requests(examples, chat=chat, num_rollouts=num_rollouts, temperature=temperature, seed_of=seed_of)
    return [Group(example=example, rollouts=rollouts) for example, rollouts in zip(examples, sampler.sample(requests), strict=True)]


def group_requests(
    examples: Sequence[Example], *, chat: Chat, num_rollouts: int, temperature: float, seed_of: Callable[[Example], int]
) -> list[SampleRequest]:
    """Returns what to ask an engine for a group of each example."""
    return [
        SampleRequest(
            place=example.id,
            prompt=chat.encode_prompt(example.messages),
            num_rollouts=num_rollouts,
            seed=seed_of(example),
            temperature=temperature,
        )
        for example in examples
    ]


def train_sequence(example_id: str, number: int, rollout: Rollout, targets: Targets) -> TrainSequence[Targets]:
    """Returns rollout `number` of an example as a sequence whose sampled tokens are trained."""
    return TrainSequence(
        place=f"{example_id}, rollout {number}",
        token_ids=rollout.token_ids,
        trained=rollout.sampled,
        media=rollout.media,
        targets=targets,
    )


def length_metrics(rollouts: Sequence[Rollout]) -> dict[str, Metric]:
    """Returns mean and largest length of responses, in sampled tokens, and the share that was cut off; nothing without responses."""
    count = len(rollouts)
    if not count:
        return {}
    lengths = [rollout.num_sampled_tokens for rollout in rollouts]
    return {
        "truncated_frac": mean(sum(rollout.finish_reason == "length" for rollout in rollouts) / count, count),
        "response_tokens": mean(sum(lengths) / count, count),
        "response_tokens_max": maximum(max(lengths)),
    }


def conversation_metrics(rollouts: Sequence[Rollout]) -> dict[str, Metric]:
    """Returns turns, calls with a result and calls with words instead, each a mean over conversations with tools, and the shares of those
    that were cut off for their turns or their context, or that a broken tool ended; nothing where none was drawn."""
    conversations = [rollout for rollout in rollouts if rollout.turns]
    count = len(conversations)
    if not count:
        return {}
    endings = Counter(rollout.ending for rollout in conversations)
    return {
        "turns": mean(sum(len(rollout.turns) for rollout in conversations) / count, count),
        "tool_calls": mean(sum(rollout.num_tool_calls for rollout in conversations) / count, count),
        "tool_errors": mean(sum(rollout.num_tool_errors for rollout in conversations) / count, count),
        **{f"ended_{ending}_frac": mean(endings[ending] / count, count) for ending in ("turns", "context", "unavailable")},
    }


class StepClock:
    """Seconds by phase of one step."""

    def __init__(self, watched: Callable[[str], AbstractContextManager[Any]]) -> None:
        self.watched = watched
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the block's seconds, inside the watchdog's phase of that name."""
        start = time.perf_counter()
        with self.watched(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self, rollouts: Sequence[Rollout]) -> dict[str, Metric]:
        """Returns the slowest rank's seconds and, for `speeds`, how many tokens were drawn and computed in them."""
        measured = {f"time/{name}_s": maximum(seconds) for name, seconds in self.seconds.items()}
        measured["sampled_tokens"] = total(sum(rollout.num_sampled_tokens for rollout in rollouts))
        return measured


def speeds(measured: Mapping[str, float]) -> dict[str, float]:
    """Returns tokens a second of rollout and update, from the merged metrics of a step."""
    return {
        "time/sampled_tokens_per_s": measured["sampled_tokens"] / measured["time/rollout_s"],
        "time/updated_tokens_per_s": measured.get("unique_tokens", 0.0) / measured["time/update_s"],
    }
