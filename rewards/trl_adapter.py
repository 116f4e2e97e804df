"""Our rewards inside trl: `GRPOTrainer(reward_funcs=as_trl(rewards))`. trl itself is not imported.

trl hands over prompts, completions and the columns of its data set; they become an `Example` and a `Rollout` here. A rollout that could
not be judged is None, which trl masks: it is no 0. The other direction, trl's functions in our recipes, is in `plugin`.
"""

from __future__ import annotations

import atexit
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from PIL import Image as PILImage

from ..model.records import DataError, Example, Group, ImagePart, Message, Part, Rollout, TextPart
from .config import RewardsConfig
from .manager import RewardManager
from .result import JudgedRollout, ScoredGroup
from .summary import group_outcomes, summarise

TrlReward: TypeAlias = Callable[..., list[float | None]]
"""A reward function as trl calls it: all arguments by name."""

_ANSWER_COLUMNS = ("answer", "solution", "ground_truth")
_OWN_COLUMNS = ("task", "source", "id", "metadata", "image", "images", "trainer_state", "environments")


def as_trl(rewards: RewardManager | RewardsConfig, *, prompt_suffix: str = "") -> TrlReward:
    """Returns one function for trl's `reward_funcs`, whose value is our reward: the weighted sum, or None where it is unavailable.

    Columns of the data set that are read: `answer` (or `solution`, or `ground_truth`), `task`, `source`, `id`, `metadata`, `image` and
    `images`; every other column is metadata. `prompt_suffix` is what the chat template writes after the assistant header, such as an
    opening think tag, which trl's completions do not hold. Settings without plug-ins may be given instead of a manager; what
    runs for them then ends with the program. Example: `with RewardManager(...) as rewards: GRPOTrainer(reward_funcs=as_trl(rewards), ...)`.
    """
    judge = _Judge(rewards, prompt_suffix=prompt_suffix)

    def reward(*, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:  # noqa: ANN401
        return [outcome.score.reward if outcome else None for outcome in judge(prompts, completions, columns)]

    return reward


def as_trl_components(rewards: RewardManager | RewardsConfig, *, prompt_suffix: str = "") -> list[TrlReward]:
    """Returns a function a component, `reward_<component>`, for trl to log one by one; each gives weight x value.

    Leave trl's `reward_weights` away: the weights are in the values already. A component that does not judge a row gives None
    there. Where one is unavailable, all give None: trl would otherwise add up the rest, as if the missing one were 0.
    """
    judge = _Judge(rewards, prompt_suffix=prompt_suffix)

    def of_component(name: str, weight: float) -> TrlReward:
        def reward(*, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:  # noqa: ANN401
            outcomes = judge(prompts, completions, columns)
            return [
                weight * outcome.score.results[name].value if outcome and name in outcome.score.results else None for outcome in outcomes
            ]

        reward.__name__ = f"reward_{name}"
        return reward

    return [of_component(component.name, component.config.weight) for component in judge.manager.components]


class _Judge:
    """The manager behind the functions; a batch is judged once, whichever function is called first."""

    def __init__(self, rewards: RewardManager | RewardsConfig, *, prompt_suffix: str) -> None:
        if isinstance(rewards, RewardsConfig):
            self.manager = RewardManager(rewards, recipe_folder=None, allow_code=False)
            self.manager.__enter__()
            atexit.register(self.manager.__exit__, None, None, None)
        else:
            self.manager = rewards
        self._prompt_suffix = prompt_suffix
        self._last: tuple[Sequence[Any], list[JudgedRollout | None]] | None = None

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]) -> list[JudgedRollout | None]:
        # trl gives the same list to all functions of a step; holding it keeps another list from getting its place.
        if self._last is None or self._last[0] is not completions:
            self._last = (completions, self._judged(prompts, completions, columns))
        return self._last[1]

    def _judged(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]) -> list[JudgedRollout | None]:
        ids = columns.get("completion_ids") or [[0]] * len(prompts)
        groups: list[Group] = []
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            example = _example(prompt, {name: values[row] for name, values in columns.items() if _is_column(values, len(prompts))})
            rollout = _rollout(completion, ids[row], example, prompt_suffix=self._prompt_suffix)
            # trl repeats a prompt as often as it drew a completion for it.
            if groups and groups[-1].example == example:
                groups[-1] = Group(example=groups[-1].example, rollouts=(*groups[-1].rollouts, rollout))
            else:
                groups.append(Group(example=example, rollouts=(rollout,)))
        scored = self.manager.score(groups)
        log_metric = columns.get("log_metric")
        if callable(log_metric):
            for name, value in summarise(group_outcomes(scored), full_values=self.manager.full_values).metrics().items():
                log_metric(name, value)
        return [outcome for group, of_group in zip(groups, scored, strict=True) for outcome in _in_order(group, of_group)]


def _in_order(group: Group, scored: ScoredGroup) -> list[JudgedRollout | None]:
    judged = {id(outcome.rollout): outcome for outcome in scored.judged}
    return [judged.get(id(rollout)) for rollout in group.rollouts]


def _is_column(values: object, count: int) -> bool:
    return isinstance(values, list | tuple) and len(values) == count


def _example(prompt: Any, columns: Mapping[str, Any]) -> Example:  # noqa: ANN401 trl's own forms
    images = columns.get("images") or ([columns["image"]] if columns.get("image") is not None else [])
    messages = _messages(prompt, [_image(image) for image in images])
    answer = next((columns[name] for name in _ANSWER_COLUMNS if columns.get(name) is not None), "")
    metadata = {name: value for name, value in columns.items() if name not in (*_OWN_COLUMNS, "answer", "completion_ids")}
    given = columns.get("metadata")
    if isinstance(given, Mapping):
        # Arrow gives every row the keys of all rows; what the row did not have is None.
        metadata |= {str(name): value for name, value in given.items() if value is not None}
    described = [[message.role, message.text, [part.digest for part in message.media]] for message in messages]
    digest = hashlib.sha256(json.dumps([described, str(answer)]).encode()).hexdigest()
    return Example(
        id=str(columns["id"]) if columns.get("id") is not None else f"trl-{digest[:16]}",
        messages=messages,
        answer=str(answer),
        task=str(columns.get("task") or ""),
        source=str(columns.get("source") or ""),
        metadata=metadata,
    )


def _messages(prompt: Any, images: Sequence[ImagePart]) -> tuple[Message, ...]:  # noqa: ANN401
    """Returns a prompt's messages; images of a column take the places kept for them, else the front of the first user message."""
    turns: Sequence[Mapping[str, Any]] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    waiting = list(images)
    messages: list[Message] = []
    for turn in turns:
        parts: list[Part] = []
        content = turn.get("content") or ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part.get("type") == "image":
                if part.get("image") is not None:
                    parts.append(_image(part["image"]))
                elif waiting:
                    parts.append(waiting.pop(0))
            else:
                parts.append(TextPart(text=str(part.get("text") or "")))
        messages.append(Message(role=turn["role"], parts=tuple(parts)))
    place = next((number for number, message in enumerate(messages) if message.role == "user"), None)
    if waiting and place is not None:
        messages[place] = Message(role="user", parts=(*waiting, *messages[place].parts))
    return tuple(messages)


def _image(image: object) -> ImagePart:
    if not isinstance(image, PILImage.Image):
        raise DataError(f"an image of type {type(image).__name__} in trl's data set: give a column of decoded images (datasets.Image())")
    return ImagePart.from_image(image)


def _rollout(completion: Any, token_ids: Sequence[int], example: Example, *, prompt_suffix: str) -> Rollout:  # noqa: ANN401
    """Returns the response as a rollout; trl does not say why it ended, so the finish reason is always `stop`."""
    ids = tuple(int(token) for token in token_ids)
    return Rollout(
        token_ids=ids,
        sampled=(True,) * len(ids),
        sampler_logprobs=(0.0,) * len(ids),
        media=example.media,
        text=_response_text(completion),
        prompt_suffix=prompt_suffix,
        finish_reason="stop",
        policy_version=0,
    )


def _response_text(completion: Any) -> str:  # noqa: ANN401
    """Returns the text of a plain completion, or that of the last assistant message of a conversational one."""
    if isinstance(completion, str):
        return completion
    content = next((turn.get("content") for turn in reversed(completion) if turn.get("role") == "assistant"), None) or ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text") or "") for part in content if part.get("type") == "text")
