"""The rewards `tool_calls` and `tool_used`: how many calls of a conversation came to something.

Qwen3-VL's third reward of thinking with images compares the number of calls with a target that was estimated offline (arXiv:2511.21631,
4.5): with the answer alone, models slid into one call whatever the task. The report gives no formula; ours falls in a straight line,

    value = max(0, 1 - |calls - target| / tolerance)        calls: those that a tool answered with a result

so that one call too many costs what one too few does. A call that got words instead of a result is no call: nobody is paid for asking
badly, and `error_cost` may charge for it. The target stands in the row's metadata (`curate`'s step `tool_target` estimates it).

`tool_used` is 1.0 where a tool was used at all. With `when: answer` it is the conditional bonus of DeepEyes (arXiv:2505.14362):
R = R_answer + R_format + 1[R_answer > 0] R_tool; its code has 0.8, 0.2 and 1.2 as the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from ..model.records import DataError, Example, Rollout
from .built_in import BuiltInReward
from .result import RewardResult, Unavailable

TARGET_KEY = "target_calls"
"""Where the target stands in the metadata of a row, as in rows of the handwriting track."""


def _target(example: Example) -> int | None:
    target = example.metadata.get(TARGET_KEY)
    return target if isinstance(target, int) and not isinstance(target, bool) and target >= 0 else None


def check_target(example: Example) -> None:
    """Raises a `DataError` for an example without a target."""
    if _target(example) is None:
        raise DataError(
            f"example {example.id!r}: metadata.{TARGET_KEY} = {example.metadata.get(TARGET_KEY)!r}: must be a whole number of calls, 0 or "
            "more; `vlpost curate` estimates it (step tool_target), or leave the row's task out of the component's `tasks`"
        )


def tool_calls(
    example: Example,
    rollout: Rollout,
    *,
    tolerance: Annotated[float, Field(gt=0.0, le=100.0)] = 2.0,
    error_cost: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0,
) -> RewardResult | Unavailable:
    """Returns max(0, 1 - |calls - target| / tolerance - error_cost * errors), from 1.0 (as many calls as the target) down to 0.0.

    `tolerance`: how far from the target nothing is left, calls; our choice. `error_cost`: what a call costs that got words instead of a
    result.
    """
    target = _target(example)
    if target is None:
        return Unavailable(reason=f"example {example.id!r} has no metadata.{TARGET_KEY}, the number of calls to compare with")
    calls, errors = rollout.num_tool_calls, rollout.num_tool_errors
    value = max(0.0, 1.0 - abs(calls - target) / tolerance - error_cost * errors)
    failed = f", {errors} came to nothing" if errors else ""
    return RewardResult(
        value=value,
        note=f"{calls} calls, {target} wanted{failed}" if value < 1.0 else "",
        metrics={"calls": float(calls), "target": float(target), "gap": float(abs(calls - target)), "errors": float(errors)},
    )


def tool_used(_example: Example, rollout: Rollout) -> RewardResult:
    """Returns 1.0 where a tool answered at least one call with a result, else 0.0."""
    calls = rollout.num_tool_calls
    return RewardResult(value=float(calls > 0), note="" if calls else "no tool was used", metrics={"calls": float(calls)})


REWARDS: Mapping[str, BuiltInReward] = {
    "tool_calls": BuiltInReward(
        summary="how close the number of tool calls is to the row's target, metadata.target_calls; for conversations with tools",
        value_range=(0.0, 1.0),
        check_answer=check_target,
        gold_response=None,
        function=tool_calls,
    ),
    "tool_used": BuiltInReward(
        summary="whether a tool was used; with `when` (only where the answer is right) DeepEyes' conditional bonus",
        value_range=(0.0, 1.0),
        gold_response=None,
        function=tool_used,
    ),
}
