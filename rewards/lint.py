"""Trying out the rewards of a recipe before anything is trained: on right, empty, wrong, cut-off, copied and mixed responses.

A verifier that does not pay the data's own answer in full, or pays an empty response, ruins a run without a word; here it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from ..model.records import DataError, Example, Group, Rollout
from .component import Component
from .config import RewardsConfig
from .manager import RewardManager
from .result import JudgedRollout

MAX_ROWS = 32
"""Rows that each component is tried on, spread over the data set."""
THINK_PREFIX = "<think>\n"
"""What the chat template of a Thinking model writes after the assistant header."""
_ASIDE = "接下来我们仔细想一想这个问题，然后给出最后的答案。\n"
_WRONG = "zzz-not-the-answer-7193"


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One way to respond: its text for an example, or None where the example's answer does not tell."""

    name: str
    respond: Callable[[Example, str], str | None]
    """From the example and its right response; empty where that is not known."""
    prompt_suffix: str = ""


PROBES: tuple[Probe, ...] = (
    Probe(name="gold", respond=lambda _example, gold: gold or None),
    Probe(
        name="thinking gold",
        respond=lambda _example, gold: f"Let me see.\n</think>\n\n{gold}" if gold else None,
        prompt_suffix=THINK_PREFIX,
    ),
    Probe(
        name="gold only in thoughts",
        respond=lambda _example, gold: f"It should be {gold}, I think." if gold else None,
        prompt_suffix=THINK_PREFIX,
    ),
    Probe(name="empty", respond=lambda _example, _gold: ""),
    Probe(name="empty after thoughts", respond=lambda _example, _gold: "Let me see.\n</think>\n\n", prompt_suffix=THINK_PREFIX),
    Probe(name="wrong", respond=lambda _example, _gold: _WRONG),
    Probe(name="truncated", respond=lambda _example, gold: gold[: len(gold) // 2] if len(gold) > 1 else None),
    Probe(name="prompt copied", respond=lambda example, _gold: "\n".join(message.text for message in example.messages)),
    Probe(name="mixed languages", respond=lambda _example, gold: f"{_ASIDE}{gold}" if gold else None),
)
_MUST_BE_FULL = ("gold", "thinking gold")
_MUST_NOT_PAY = ("empty", "empty after thoughts", "gold only in thoughts")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeOutcome:
    """What one component said to one probe, over the rows that it was tried on."""

    mean: float | None
    """Mean value; None when nothing was judged."""
    num_judged: int
    num_unavailable: int
    first_reason: str
    """Why the first unavailable one is; empty when none is."""
    faults: tuple[str, ...]
    """A sentence for each row on which the component must not say what it says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LintReport:
    """What each component says to each probe."""

    outcomes: Mapping[str, Mapping[str, ProbeOutcome]]
    """By component and probe."""
    skipped: Mapping[str, str]
    """Why a component was not tried, by name."""

    @property
    def faults(self) -> tuple[str, ...]:
        """All sentences for which the recipe is refused."""
        return tuple(fault for probes in self.outcomes.values() for outcome in probes.values() for fault in outcome.faults)

    def lines(self) -> list[str]:
        """Returns the table, then the faults."""
        rows = [["reward", *(probe.name for probe in PROBES)]]
        rows += [[name, *(_cell(probes.get(probe.name)) for probe in PROBES)] for name, probes in self.outcomes.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"{name}: not tried, {reason}" for name, reason in self.skipped.items()]
        reasons = {
            (name, outcome.first_reason): outcome.num_unavailable
            for name, probes in self.outcomes.items()
            for outcome in probes.values()
            if outcome.num_unavailable
        }
        lines += [f"{name}: unavailable on {count} rows: {reason.splitlines()[-1]}" for (name, reason), count in reasons.items()]
        return lines + [f"FAULT {fault}" for fault in self.faults]


def _cell(outcome: ProbeOutcome | None) -> str:
    if outcome is None or not outcome.num_judged:
        return "unavailable" if outcome and outcome.num_unavailable else "-"
    return f"{outcome.mean:.3g}"


def lint_rewards(config: RewardsConfig, examples: Sequence[Example], *, recipe_folder: Path | None, allow_code: bool) -> LintReport:
    """Returns what every component of the settings says to every probe; each is tried alone, on at most `MAX_ROWS` of its rows.

    Faults are: a right response (also one behind a Thinking model's opened think block) that does not get the value which the
    function itself promises for it, and an empty response or an answer that stands in the thoughts only that is paid. They are
    judged for built-in rewards; what a plug-in's right value is, only its author knows. A service that cannot say what a right
    response is (a judge of open questions) is not tried.
    """
    outcomes: dict[str, dict[str, ProbeOutcome]] = {}
    skipped: dict[str, str] = {}
    manager = RewardManager(config, recipe_folder=recipe_folder, allow_code=allow_code)
    for component in manager.components:
        rows = [example for example in examples if component.config.judges(example)]
        built_in = component.reward.built_in
        if built_in is not None and built_in.service is not None and built_in.gold_response is None:
            skipped[component.name] = "no right response is known without asking the judge"
        elif not rows:
            skipped[component.name] = "no row is judged by it"
        else:
            alone = config.model_copy(
                update={
                    "components": {component.name: component.config},
                    "max_unavailable_frac": 1.0,
                    "on_unavailable": "drop_rollout",
                    "cache": False,
                }
            )
            with RewardManager(alone, recipe_folder=recipe_folder, allow_code=allow_code) as rewards:
                outcomes[component.name] = _probed(component, rewards, _spread(rows))
    return LintReport(outcomes=outcomes, skipped=skipped)


def _spread(rows: Sequence[Example]) -> list[Example]:
    """Returns at most `MAX_ROWS` rows at equal distances, the first and the last among them."""
    if len(rows) <= MAX_ROWS:
        return list(rows)
    return [rows[number * (len(rows) - 1) // (MAX_ROWS - 1)] for number in range(MAX_ROWS)]


def _probed(component: Component, rewards: RewardManager, rows: Sequence[Example]) -> dict[str, ProbeOutcome]:
    golds = [(example, _gold(component, example)) for example in rows]
    outcomes: dict[str, ProbeOutcome] = {}
    for probe in PROBES:
        responses = [(example, response) for example, gold in golds if (response := probe.respond(example, gold)) is not None]
        groups = [Group(example=example, rollouts=(_rollout(response, example, probe),)) for example, response in responses]
        results = [
            outcome.score.results[component.name] if isinstance(outcome, JudgedRollout) else outcome.reasons[component.name]
            for scored in rewards.score(groups)
            for outcome in (*scored.judged, *scored.unjudged)
        ]
        values = [result.value for result in results if not isinstance(result, str)]
        reasons = [result for result in results if isinstance(result, str)]
        outcomes[probe.name] = ProbeOutcome(
            mean=fmean(values) if values else None,
            num_judged=len(values),
            num_unavailable=len(reasons),
            first_reason=reasons[0] if reasons else "",
            faults=tuple(
                f"{component.name} ({component.reward.use}): example {example.id!r}, {probe.name}: {fault}"
                for (example, _response), result in zip(responses, results, strict=True)
                if (fault := _fault(component, probe, result if isinstance(result, str) else result.value))
            )[:3],
        )
    return outcomes


def _gold(component: Component, example: Example) -> str:
    """Returns the right response, for a plug-in the example's answer; empty where it is not known."""
    built_in = component.reward.built_in
    if built_in is None:
        return example.answer
    if built_in.gold_response is None:
        return ""
    try:
        return built_in.gold_response(example)
    except DataError:
        return ""  # such as a programming problem without a solution: it can be judged all the same


def _fault(component: Component, probe: Probe, result: float | str) -> str:
    """Returns what is wrong with a value, or with a reason why there is none; empty when nothing is."""
    built_in = component.reward.built_in
    if built_in is None or built_in.gold_response is None:
        return ""
    if probe.name in _MUST_BE_FULL and result != built_in.gold_value:
        said = f"unavailable ({result.splitlines()[-1]})" if isinstance(result, str) else f"{result:g}"
        return f"the data's own answer gets {said}, not {built_in.gold_value:g}; mend the row, or judge it with another reward"
    # A penalty's best value is 0, which silence deserves as much as anything.
    pays = built_in.gold_value > 0.0 and not isinstance(result, str) and result > 0.0
    if probe.name in _MUST_NOT_PAY and pays:
        return f"a response without an answer gets {result:g}; it must not be paid"
    return ""


def _rollout(response: str, example: Example, probe: Probe) -> Rollout:
    return Rollout(
        token_ids=(0,),
        sampled=(True,),
        sampler_logprobs=(0.0,),
        media=example.media,
        text=response,
        prompt_suffix=probe.prompt_suffix,
        finish_reason="length" if probe.name == "truncated" else "stop",
        policy_version=0,
    )
