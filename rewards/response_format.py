"""Verifier of instructions about the form of a response: the constraints of IFEval (arXiv:2311.07911), in English and Chinese.

What is wanted stands in the example's `metadata["constraints"]`, as in `[{"kind": "words", "at_most": 50}, {"kind": "no_commas"}]`;
`format_constraints` has the kinds and their options, `text_units` says how things are counted. Only the visible response is read. The
form alone is judged: any text of the right form is paid, so weigh `format` together with a reward that reads the content.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Literal

from ..model.records import DataError, Example, Rollout
from .answers import strip_thinking
from .built_in import BuiltInReward
from .format_constraints import Constraint, constraints_of
from .result import RewardResult, Unavailable

MAX_RESPONSE_CHARS = 200_000
"""Longest visible response, characters; a longer one meets nothing."""


def check_format_answer(example: Example) -> None:
    """Raises a `DataError` unless the example's metadata hold constraints that can be read."""
    constraints_of(example)


def response_format(
    example: Example, rollout: Rollout, *, credit: Literal["share", "all"] = "share", loose: bool = False
) -> RewardResult | Unavailable:
    """Returns the share of the example's constraints that the visible response meets; 0.0 for an empty one.

    `credit`: with `all` the value is 1.0 when every constraint is met, else 0.0. `loose`: a constraint is also met if it holds after
    dropping the first line, the last line or both, or all `*`, or both of these, as in IFEval's loose accuracy (section 2.2); that pays
    chatter around the wanted form, so it is for measuring. Metrics: the share met by kind.
    """
    try:
        constraints = constraints_of(example)
    except DataError as error:
        return Unavailable(reason=str(error))
    visible = strip_thinking(rollout.text, prompt_suffix=rollout.prompt_suffix)
    if not visible:
        return RewardResult(value=0.0, note="no visible response")
    if len(visible) > MAX_RESPONSE_CHARS:
        return RewardResult(value=0.0, note=f"a response of {len(visible)} characters; at most {MAX_RESPONSE_CHARS} are read")
    prompt = next((message.text for message in reversed(example.messages) if message.role == "user"), "")
    texts = _loose_forms(visible) if loose else (visible,)
    met = [any(constraint.check(text, prompt) for text in texts) for constraint in constraints]
    unmet = [_named(number, constraint) for number, constraint in enumerate(constraints) if not met[number]]
    return RewardResult(
        value=fmean(met) if credit == "share" else float(all(met)),
        note=f"not met: {', '.join(unmet)}" if unmet else "",
        metrics=_share_by_kind(constraints, met),
    )


def _loose_forms(text: str) -> tuple[str, ...]:
    lines = text.split("\n")
    forms = [part.strip() for part in (text, "\n".join(lines[1:]), "\n".join(lines[:-1]), "\n".join(lines[1:-1]))]
    return tuple(dict.fromkeys(form for part in forms for form in (part, part.replace("*", "").strip()) if form))


def _named(number: int, constraint: Constraint) -> str:
    return f"[{number}] {constraint.kind}"


def _share_by_kind(constraints: tuple[Constraint, ...], met: list[bool]) -> Mapping[str, float]:
    by_kind: dict[str, list[bool]] = {}
    for constraint, is_met in zip(constraints, met, strict=True):
        by_kind.setdefault(constraint.kind, []).append(is_met)
    return {kind: fmean(values) for kind, values in by_kind.items()}


REWARDS: Mapping[str, BuiltInReward] = {
    "format": BuiltInReward(
        summary="share of the example's constraints on form that are met (IFEval: lengths, keywords, lists, case, ...); no gold response",
        value_range=(0.0, 1.0),
        check_answer=check_format_answer,
        gold_response=None,
        function=response_format,
    ),
}
