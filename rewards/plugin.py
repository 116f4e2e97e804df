"""Reward functions that a user brings: their kinds, the decorator that names them, and how each kind is called.

Four kinds, told apart by the names of the arguments or by the decorator:

    def by_row(example, rollout, *, option: int = 3) -> float | RewardResult | Unavailable
    def by_group(example, rollouts, *, option: int = 3) -> list of the same, one a rollout
    def by_batch(groups, *, option: int = 3) -> list of lists, one a group
    def by_trl(completions, prompts=None, **columns) -> list of numbers or None     (the signature of trl's GRPOTrainer)

Each may be `async`. What comes back is checked here: anything but a finite number in the stated range is unavailable.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from statistics import fmean
from typing import Any, Literal, TypeAlias, TypeVar

from ..model.records import Example, Group, ImagePart, Message, Rollout, TextPart
from .config import CompletionForm, RewardConfigError
from .result import RewardResult, Unavailable

MAX_REASON_CHARS = 1000

Kind: TypeAlias = Literal["row", "group", "batch", "trl"]
Verdict: TypeAlias = RewardResult | Unavailable
Answered: TypeAlias = Verdict | None
"""None: a function with trl's signature said that it does not judge this row."""

_MARK = "__vlpost_reward__"
_SIGNATURES = (
    "(example, rollout, *, option: type = default), (example, rollouts, *, ...), (groups, *, ...), or trl's (completions, **columns): "
    "options stand after the star, so that they can be checked"
)
_GIVEN_BY_TRL = ("prompts", "completions", "completion_ids", "log_extra", "log_metric")
_ONLY_IN_TRL = ("trainer_state", "environments")
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginTraits:
    """What a function says about itself by the decorator `reward`; a function without it has these defaults."""

    name: str = ""
    """Of the reward in lists and messages; empty: the function's own."""
    value_range: tuple[float, float] | None = None
    """Smallest and largest value; a value outside it is unavailable. None: any finite number."""
    cacheable: bool = False
    """True promises that the verdict depends on nothing but the row, the options, the source file and `version`."""
    version: int = 1
    """Part of the cache's key, beside the hash of the source file: for what the function reads elsewhere."""
    kind: Kind | None = None
    """None: by the names of the arguments."""


def reward(
    *,
    name: str = "",
    value_range: tuple[float, float] | None = None,
    cacheable: bool = False,
    version: int = 1,
    kind: Kind | None = None,
) -> Callable[[AnyFunction], AnyFunction]:
    """Returns a decorator that notes down what a reward function promises and leaves the function as it is.

    Example: `@reward(value_range=(0.0, 1.0), cacheable=True)` above `def brevity(example, rollout): ...`. See `PluginTraits`.
    """
    if value_range is not None and not value_range[0] < value_range[1]:
        raise RewardConfigError(f"@reward(value_range={value_range}): the first number must be below the second")
    if cacheable and kind in ("group", "batch"):
        raise RewardConfigError(f"@reward(kind={kind!r}, cacheable=True): what depends on other rollouts cannot be looked up row by row")
    traits = PluginTraits(name=name, value_range=value_range, cacheable=cacheable, version=version, kind=kind)

    def mark(function: AnyFunction) -> AnyFunction:
        setattr(function, _MARK, traits)
        return function

    return mark


def traits_of(function: Callable[..., Any]) -> PluginTraits:
    """Returns what the decorator noted down, or the defaults."""
    traits = getattr(function, _MARK, None)
    return traits if isinstance(traits, PluginTraits) else PluginTraits()


def kind_of(use: str, function: Callable[..., Any]) -> Kind:
    """Returns the kind of a plug-in, by its decorator or its arguments; a `RewardConfigError` says what signatures there are."""
    declared = traits_of(function).kind
    parameters = list(inspect.signature(function).parameters.values())
    positional = [
        parameter.name for parameter in parameters if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    num_options = sum(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)
    if declared == "trl" or (declared is None and any(parameter.name == "completions" for parameter in parameters)):
        _check_trl_parameters(use, parameters)
        return "trl"
    if len(positional) + num_options == len(parameters):
        if len(positional) == 1 and declared in (None, "batch") and (declared or positional == ["groups"]):
            return "batch"
        if len(positional) == 2 and declared in ("row", "group"):
            return declared
        if len(positional) == 2 and declared is None and positional[1] in ("rollout", "rollouts"):
            return "group" if positional[1] == "rollouts" else "row"
    wanted = f"as @reward(kind={declared!r}) says, " if declared else ""
    raise RewardConfigError(f"reward {use!r}: its signature is {inspect.signature(function)}; {wanted}it must be one of {_SIGNATURES}")


def _check_trl_parameters(use: str, parameters: Sequence[inspect.Parameter]) -> None:
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise RewardConfigError(f"reward {use!r}: argument {parameter.name!r} cannot be given by name, as trl gives all arguments")
        if parameter.name in _ONLY_IN_TRL and parameter.default is parameter.empty:
            raise RewardConfigError(f"reward {use!r}: argument {parameter.name!r} exists only inside trl's trainer; give it a default")


def required_columns(function: Callable[..., Any]) -> list[str]:
    """Returns the data columns without which a function with trl's signature cannot be called."""
    parameters = inspect.signature(function).parameters.values()
    named = [parameter for parameter in parameters if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)]
    return [parameter.name for parameter in named if parameter.default is parameter.empty and parameter.name not in _GIVEN_BY_TRL]


def trl_columns(example: Example) -> dict[str, Any]:
    """Returns what an example gives to a function with trl's signature, by column name, one value each.

    All of `metadata`; `answer`, `task`, `source`, `id`; `solution` and `ground_truth` are the answer where metadata has none; `images`
    where there are any.
    """
    images = [part.image for part in example.media if isinstance(part, ImagePart)]
    return {
        **({"images": images} if images else {}),
        "solution": example.answer,
        "ground_truth": example.answer,
        **example.metadata,
        "answer": example.answer,
        "task": example.task,
        "source": example.source,
        "id": example.id,
    }


@dataclass(slots=True)
class _TrlLogs:
    """What a function logs through the two callables that trl gives it."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        self.columns[str(column)] = list(values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plugin:
    """A plug-in that is ready to be called on whole groups."""

    function: Callable[..., Any]
    kind: Kind
    options: Mapping[str, Any]
    completions: CompletionForm = "conversational"
    """Form of trl's prompts and completions; unused by the other kinds."""
    value_range: tuple[float, float] | None = None

    @property
    def is_async(self) -> bool:
        """True when a call has to be awaited."""
        return inspect.iscoroutinefunction(self.function)

    def call(self, groups: Sequence[Group]) -> tuple[Any, Callable[[Any], list[Answered]]]:
        """Returns what the function returned (an awaitable if it is async), and what turns that into one verdict a rollout.

        `row` takes one group of one rollout, `group` and `trl` one group, `batch` any number. Raises what the function raises.
        """
        sizes = [len(group.rollouts) for group in groups]
        if self.kind == "batch":
            return self.function(tuple(groups), **self.options), lambda returned: self._of_groups(returned, sizes)
        (group,) = groups
        if self.kind == "group":
            returned = self.function(group.example, group.rollouts, **self.options)
            return returned, lambda returned: self._of_rows(returned, sizes[0])
        if self.kind == "row":
            (rollout,) = group.rollouts
            return self.function(group.example, rollout, **self.options), lambda returned: [self._verdict(returned)]
        logs = _TrlLogs()
        returned = self.function(**self._trl_arguments(group, logs))
        return returned, lambda returned: self._of_trl(returned, sizes[0], logs)

    def _trl_arguments(self, group: Group, logs: _TrlLogs) -> dict[str, Any]:
        count = len(group.rollouts)
        prompt = trl_prompt(group.example.messages, form=self.completions)
        arguments: dict[str, Any] = {name: [value] * count for name, value in trl_columns(group.example).items()}
        arguments |= {
            "prompts": [prompt] * count,
            "completions": [trl_completion(rollout, form=self.completions) for rollout in group.rollouts],
            "completion_ids": [_sampled_ids(rollout) for rollout in group.rollouts],
            "log_metric": logs.log_metric,
            "log_extra": logs.log_extra,
            **self.options,
        }
        parameters = inspect.signature(self.function).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return arguments
        return {name: value for name, value in arguments.items() if name in parameters}

    def _of_groups(self, returned: Any, sizes: Sequence[int]) -> list[Answered]:  # noqa: ANN401 whatever the user's function returns
        per_group = _listed(returned, len(sizes), what="group")
        return [verdict for of_group, size in zip(per_group, sizes, strict=True) for verdict in self._of_rows(of_group, size)]

    def _of_rows(self, returned: Any, size: int) -> list[Answered]:  # noqa: ANN401
        return [self._verdict(one) for one in _listed(returned, size, what="rollout")]

    def _of_trl(self, returned: Any, size: int, logs: _TrlLogs) -> list[Answered]:  # noqa: ANN401
        verdicts: list[Answered] = []
        metrics = {name: fmean(values) for name, values in logs.metrics.items()}
        for row, one in enumerate(_listed(returned, size, what="rollout")):
            if one is None:
                verdicts.append(None)
                continue
            # What trl turns into a tensor: booleans and tensors or arrays of one number too.
            number = one.item() if not isinstance(one, Real) and hasattr(one, "item") else one
            verdict = self._verdict(float(number) if isinstance(number, bool) else number)
            if isinstance(verdict, RewardResult):
                notes = [f"{column}: {values[row]}" for column, values in logs.columns.items() if len(values) == size]
                verdict = replace(verdict, note="; ".join([*filter(None, [verdict.note]), *notes])[:MAX_REASON_CHARS])
                verdict = replace(verdict, metrics={**metrics, **verdict.metrics})
            verdicts.append(verdict)
        return verdicts

    def _verdict(self, returned: object) -> Verdict:
        verdict = as_verdict(returned)
        if self.value_range is None or isinstance(verdict, Unavailable) or self.value_range[0] <= verdict.value <= self.value_range[1]:
            return verdict
        low, high = self.value_range
        return Unavailable(reason=f"the reward function returned {verdict.value:g}, outside its own range of {low:g} to {high:g}")


def as_verdict(returned: object) -> Verdict:
    """Returns what a reward function returned as a verdict; anything but a finite number is unavailable."""
    if isinstance(returned, RewardResult | Unavailable):
        return returned
    if isinstance(returned, bool) or not isinstance(returned, Real):
        kind = type(returned).__name__
        return Unavailable(reason=f"the reward function returned a {kind}; it must return float, RewardResult or Unavailable")
    try:
        return RewardResult(value=float(returned))
    except (ValueError, OverflowError) as error:
        return Unavailable(reason=f"the reward function returned no finite number: {type(error).__name__}: {error}")


def as_reason(error: BaseException) -> str:
    """Returns the end of a traceback, as the reason of an `Unavailable`."""
    return "".join(traceback.format_exception(error, limit=-3))[-MAX_REASON_CHARS:].strip()


def _listed(returned: Any, size: int, *, what: str) -> list[Any]:  # noqa: ANN401
    """Returns the items; a `ValueError` if the function did not return one for each rollout or group."""
    if isinstance(returned, str | bytes | Mapping) or not hasattr(returned, "__len__") or not hasattr(returned, "__iter__"):
        raise ValueError(f"the reward function returned a {type(returned).__name__}; it must return a list with one value a {what}")
    if len(returned) != size:
        raise ValueError(f"the reward function returned {len(returned)} values for {size} {what}s; it must return one value a {what}")
    return list(returned)


def _sampled_ids(rollout: Rollout) -> list[int]:
    return [token for token, is_sampled in zip(rollout.token_ids, rollout.sampled, strict=True) if is_sampled]


def trl_prompt(messages: Sequence[Message], *, form: CompletionForm) -> Any:  # noqa: ANN401 trl's own forms
    """Returns a prompt as trl hands it over: a list of messages, or their text; images stand in the content of their message."""
    if form == "text":
        return "\n".join(message.text for message in messages)
    return [{"role": message.role, "content": _trl_content(message)} for message in messages]


def _trl_content(message: Message) -> Any:  # noqa: ANN401
    if not message.media:
        return message.text
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": "image", "image": part.image}
        if isinstance(part, ImagePart)
        else {"type": "video", "video": list(part.frames)}
        for part in message.parts
    ]


def trl_completion(rollout: Rollout, *, form: CompletionForm) -> Any:  # noqa: ANN401
    """Returns a response as trl hands it over: one assistant message in a list, or its text."""
    return rollout.text if form == "text" else [{"role": "assistant", "content": rollout.text}]
