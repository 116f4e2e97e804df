"""`vlpost rewards list | try | lint | attack`: what rewards there are, and what they say before a run depends on them.

None of it imports torch. `attack` needs Linux and starts jails; the others start what the rewards themselves need.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from ..model.records import DataError, Group, Rollout, VlpostError
from .data_config import DataConfig
from .example_stream import open_stream, parse_row
from .load import load_recipe
from .schema import EvaluateRecipe, OffPolicyDistillRecipe, SftRecipe, StageRecipe

if TYPE_CHECKING:
    from ..model.config import Settings
    from ..rewards.built_in import BuiltInReward
    from ..rewards.config import RewardsConfig
    from ..rewards.lint import LintReport

BACKENDS = ("bubblewrap", "landlock")
"""Of the sandbox, for `attack`."""
NUM_BARS = 10
NUM_SLOWEST = 5
MAX_LINT_EXAMPLES = 512
"""Examples of an endless stream that a recipe is linted on."""
_RESPONSE_KEYS = ("response", "responses", "prompt", "prompt_suffix", "finish_reason", "source")


def add_commands(commands: Any) -> None:  # noqa: ANN401 argparse does not name its type
    """Adds `rewards` with its own commands to the command line's."""
    text = "list the rewards, or try, lint or attack them"
    parser = commands.add_parser("rewards", help=text, description=text)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, command, text in (
        ("list", _list, "list the built-in and installed rewards: what they measure, their range and options"),
        ("try", _try, "judge the responses of a file with one reward: distribution, slowest rows, what could not be judged"),
        ("lint", _lint, "try a recipe's rewards on right, empty, wrong, cut-off, copied and mixed responses"),
        ("attack", _attack, "run the public attack suite against the sandbox; exit status 1 when anything gets through"),
    ):
        sub = actions.add_parser(name, help=text, description=text)
        if name == "list":
            sub.add_argument("--markdown", action="store_true", help="the built-in ones as the table of docs/rewards.md")
        if name == "try":
            sub.add_argument("reward", help="a built-in name, an entry point, package.module:function or file.py:function")
            sub.add_argument("data", type=Path, help="JSON lines with messages or prompt, answer, and response or responses")
        if name == "lint":
            sub.add_argument("recipe", type=Path, help="path of the YAML recipe")
        if name == "attack":
            sub.add_argument("--backend", action="append", choices=BACKENDS, help="only this backend (may be repeated); all by default")
        if name in ("try", "lint"):
            sub.add_argument("--allow-code", action="store_true", help="allow reward plug-ins from files elsewhere")
            own = "options of the reward, and settings such as rewards.timeout_s=1 or rewards.judge.url=..."
            place = own if name == "try" else "values that replace the recipe's"
            sub.add_argument("overrides", nargs="*", metavar="key=value", help=place)
        else:
            sub.set_defaults(overrides=[])
        sub.set_defaults(command=command, name=f"rewards {name}")


# ------------------------------------------------------------------ list


def _refuse_words(parsed: argparse.Namespace) -> None:
    if parsed.overrides:
        raise VlpostError(f"{parsed.name}: {parsed.overrides[0]!r} cannot take effect, leave it out")


def _list(parsed: argparse.Namespace) -> int:
    _refuse_words(parsed)
    from importlib.metadata import entry_points

    from ..rewards.registry import BUILT_IN_REWARDS, ENTRY_POINTS

    if parsed.markdown:
        print("\n".join(_markdown_table(BUILT_IN_REWARDS)))
        return 0
    for name, built_in in sorted(BUILT_IN_REWARDS.items()):
        low, high = built_in.value_range
        print(f"{name}: {built_in.summary}; {low:g} to {high:g}")
        for line in reward_options(built_in):
            print(f"    {line}")
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        print(f"{entry.name}: installed, {entry.value}")
    return 0


def _markdown_table(rewards: Mapping[str, BuiltInReward]) -> list[str]:
    """Returns the table of docs/rewards.md."""
    lines = ["| name | measures | range | options |", "|---|---|---|---|"]
    for name, built_in in sorted(rewards.items()):
        low, high = built_in.value_range
        options = "<br>".join(f"`{option}`".replace("|", "\\|") for option in reward_options(built_in))
        lines.append(f"| `{name}` | {built_in.summary} | {low:g} to {high:g} | {options} |")
    return lines


def reward_options(built_in: BuiltInReward) -> list[str]:
    """Returns `name: type = default` for each option of a built-in reward."""
    if built_in.options is not None:
        return [_field_line(built_in.options, name) for name in built_in.options.model_fields]
    assert built_in.function is not None
    parameters = inspect.signature(built_in.function).parameters.values()
    hints = typing.get_type_hints(built_in.function)
    return [
        f"{parameter.name}: {_shown(hints[parameter.name])}" + ("" if parameter.default is parameter.empty else f" = {parameter.default!r}")
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY
    ]


def _field_line(settings: type[Settings], name: str) -> str:
    field = settings.model_fields[name]
    default = "" if field.is_required() else f" = {field.get_default(call_default_factory=True)!r}"
    return f"{name}: {_shown(field.annotation)}{default}"


def _shown(annotation: object) -> str:
    return inspect.formatannotation(annotation).replace("typing.", "").replace("pathlib.", "")


# ------------------------------------------------------------------ try


def _try(parsed: argparse.Namespace) -> int:
    from ..rewards.manager import RewardManager
    from ..rewards.result import JudgedRollout

    config = _settings(parsed.reward, parsed.overrides)
    groups = read_responses(parsed.data)
    # A file named on the command line is one that the user has chosen to run, like a script.
    with RewardManager(config, recipe_folder=Path.cwd(), allow_code=parsed.allow_code) as rewards:
        print(rewards.describe()[0])
        rewards.check_examples([group.example for group in groups])
        scored = rewards.score(groups)
    rows = [
        (group.example.id, number, outcome)
        for group, of_group in zip(groups, scored, strict=True)
        for number, outcome in _in_order(group, {id(outcome.rollout): outcome for outcome in (*of_group.judged, *of_group.unjudged)})
    ]
    judged = [(f"{row} response {number}", outcome.score) for row, number, outcome in rows if isinstance(outcome, JudgedRollout)]
    print(f"{len(groups)} rows, {len(rows)} responses: {len(judged)} judged, {len(rows) - len(judged)} unavailable")
    for line in _distribution([score.results["reward"].value for _place, score in judged]):
        print(line)
    slowest = sorted(((score.judging_s.get("reward", 0.0), place, score) for place, score in judged), key=lambda row: -row[0])
    for seconds, place, score in slowest[:NUM_SLOWEST]:
        result = score.results["reward"]
        print(f"slowest: {seconds * 1000:.1f} ms, {place}: {result.value:g}{f' ({result.note})' if result.note else ''}")
    for row, number, outcome in rows:
        if not isinstance(outcome, JudgedRollout):
            print(f"unavailable: {row} response {number}: {'; '.join(outcome.reasons.values())}")
    return 0


def _in_order(group: Group, outcomes: Mapping[int, Any]) -> Iterator[tuple[int, Any]]:
    return ((number, outcomes[id(rollout)]) for number, rollout in enumerate(group.rollouts, start=1))


def _settings(reward: str, words: Sequence[str]) -> RewardsConfig:
    """Returns settings with one component, from `key=value` words: options of the reward, or settings that begin with `rewards.`."""
    from ..rewards.config import RewardsConfig

    options: dict[str, Any] = {}
    settings: dict[str, Any] = {"components": {"reward": {"use": reward, "options": options}}, "max_unavailable_frac": 1.0}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise VlpostError(f"{word!r} is no option of the reward: write key=value")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise VlpostError(f"{word!r}: the value is no YAML ({str(error).splitlines()[0]})") from error
        place = settings if key.startswith("rewards.") else options
        *outer, last = key.removeprefix("rewards.").split(".") if place is settings else [key]
        for part in outer:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise VlpostError(f"{word!r}: {part} is a value, nothing stands below it")
        place[last] = value
    try:
        return RewardsConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise VlpostError(f"rewards.{'.'.join(map(str, first['loc']))} = {first['input']!r}: {first['msg']}") from error


def _distribution(values: Sequence[float]) -> list[str]:
    """Returns mean and spread, and a bar for each value or, when there are many, for each tenth of the range."""
    if not values:
        return ["nothing was judged: there is no distribution"]
    lines = [f"mean {fmean(values):.4g}, smallest {min(values):.4g}, largest {max(values):.4g}"]
    counts: Mapping[str, int] = Counter(f"{value:.4g}" for value in sorted(values))
    if len(counts) > NUM_BARS:
        low, width = min(values), (max(values) - min(values)) / NUM_BARS
        places = Counter(min(NUM_BARS - 1, int((value - low) / width)) for value in values)
        counts = {f"{low + place * width:.4g} to {low + (place + 1) * width:.4g}": places[place] for place in range(NUM_BARS)}
    most = max(counts.values())
    label_width = max(map(len, counts))
    return lines + [f"  {label.rjust(label_width)}  {count:6d}  {'#' * math.ceil(40 * count / most)}" for label, count in counts.items()]


def read_responses(path: Path) -> list[Group]:
    """Returns the rows of a file with the responses that stand in it.

    A row is one of a recipe's data files (`messages`, `answer`, `task`, `metadata`, `id`), with `response` (text) or `responses` (texts),
    and perhaps `prompt` (text) instead of `messages`, `prompt_suffix`, `finish_reason` and `source`.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the data file cannot be read ({error})") from error
    groups = [_read_group(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not groups:
        raise DataError(f"{path}: the data set is empty; give at least one row")
    return groups


def _read_group(line: str, path: Path, number: int) -> Group:
    place = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row is an object, this is {type(row).__name__}")
    given = {key: row.pop(key) for key in _RESPONSE_KEYS if key in row}
    responses = [given["response"]] if "response" in given else given.get("responses")
    if not isinstance(responses, list) or not responses or not all(isinstance(response, str) for response in responses):
        raise DataError(f"{place}: `response` is a text, `responses` a list of texts; one of the two is needed, and at least one text")
    if ("prompt" in given) == ("messages" in row):
        raise DataError(f"{place}: a row has either `messages` or `prompt`")
    if "prompt" in given:
        row["messages"] = [{"role": "user", "content": given["prompt"]}]
    for key, allowed in (("prompt_suffix", ("",)), ("finish_reason", ("stop", "length")), ("source", ("",))):
        if key in given and (not isinstance(given[key], str) or (key == "finish_reason" and given[key] not in allowed)):
            raise DataError(f"{place}: {key} = {given[key]!r}: must be {' or '.join(allowed) if key == 'finish_reason' else 'a text'}")
    example = parse_row(row, path, number, given.get("source", path.stem))
    return Group(
        example=example,
        rollouts=tuple(
            Rollout(
                token_ids=(0,),
                sampled=(True,),
                sampler_logprobs=(0.0,),
                media=example.media,
                text=response,
                prompt_suffix=given.get("prompt_suffix", ""),
                finish_reason=given.get("finish_reason", "stop"),
                policy_version=0,
            )
            for response in responses
        ),
    )


# ------------------------------------------------------------------ lint and attack


def _lint(parsed: argparse.Namespace) -> int:
    from ..rewards.lint import lint_rewards

    loaded = load_recipe(parsed.recipe, parsed.overrides)
    sources = [(name, stage, source) for name, stage in loaded.stages for source in _judged_data(stage)]
    if not sources:
        raise VlpostError(f"{parsed.recipe}: no stage judges responses: there is no reward to lint")
    faults = 0
    for name, stage, source in sources:
        stream = open_stream(source, seed=0, with_solution=False)
        examples = stream.examples(0, min(stream.num_rows or MAX_LINT_EXAMPLES, MAX_LINT_EXAMPLES))
        report = lint_rewards(stage.rewards, examples, recipe_folder=parsed.recipe.resolve().parent, allow_code=parsed.allow_code)
        for line in report.lines():
            print(f"{name}: {line}")
        faults += len(report.faults)
    print(f"{parsed.recipe}: {f'{faults} faults' if faults else 'fine'}")
    return 1 if faults else 0


def _judged_data(stage: StageRecipe) -> list[DataConfig]:
    """Returns the data whose responses the stage's rewards judge: not what SFT trains on, nor what teachers answer for the filters."""
    trained = [] if isinstance(stage, SftRecipe | OffPolicyDistillRecipe) else [stage.data]
    validation = None if isinstance(stage, EvaluateRecipe) else stage.validation
    return trained + ([validation.data] if validation else [])


def refuse_faults(report: LintReport, *, place: str) -> None:
    """Raises a `VlpostError` with the first faults of a report, if it has any; for `vlpost check`."""
    if report.faults:
        listed = "\n".join(f"  {fault}" for fault in report.faults[:10])
        raise VlpostError(f"{place}: the rewards do not say what they must ({len(report.faults)} faults):\n{listed}")


def _attack(parsed: argparse.Namespace) -> int:
    _refuse_words(parsed)
    from ..rewards.attack import main_attack

    table, all_stopped = main_attack(backends=parsed.backend or BACKENDS)
    print(table)
    return 0 if all_stopped else 1
