"""The step `response_filter` of `vlpost curate`: rules for responses that need no model (Qwen3-VL's report, 4.2.1 and 4.2.2).

A rule reads the thinking and the answer apart. Each names what it found, so that a person can look it up in the row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction

from ..model.records import Example, Rollout
from ..rewards.answers import THINK_CLOSE, THINK_OPEN, bare, boxed, final_answer, half_width, strip_thinking, tagged
from ..rewards.code_switching import code_switching, response_parts
from ..rewards.repetition import repeated_frac
from ..rewards.text_units import num_words
from .curate_config import ResponseFilterConfig
from .curate_difficulty import response_rollouts
from .curate_query import as_query
from .curate_step import CuratedRow, StepContext, StepResult

GUESS_CHARS = 400
"""Characters at the end of the thinking, and of the answer, in which a guess is looked for: an early guess that is then checked is none."""
_GUESS = re.compile(
    r"\b(?:i(?:'ll| will| would|'d| can only| have to| must)?(?: just| simply)? guess|(?:just|wild|random|educated|best|pure) guess|"
    r"guess(?:ing)? (?:at )?random|my (?:final )?guess|let(?:'s| me| us)(?: just)? guess|pick(?:ing)? (?:one )?at random)\b"
    r"|随便[猜选]|只能猜|瞎猜|猜一个|猜测答案|我猜|蒙一个",
    re.IGNORECASE,
)
_STATED = re.compile(
    r"(?:\banswer(?: is| =|:| must be| should be)[ \t]*|答案(?:应该|就)?[是为:：][ \t]*)(?P<answer>(?:[^\n.;,，。；]|[.,](?=\d)){1,60})",
    re.IGNORECASE,
)
_NO_ANSWER = re.compile(
    r"(?:not|never|wrong|incorrect|right|correct|between|about|around|less|more|at (?:most|least)|greater|smaller|close|likely|probably)\b"
    r"|[≈~不错对]",
    re.IGNORECASE,
)
"""How a text goes on after `the answer is` when it then names none."""
_NUMBER = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|[+-]?\d{1,30}(?:\.\d{1,30})?(?:/\d{1,30})?")


class ResponseFilterStep:
    """Opens `response_filter`, which needs nothing."""

    def __init__(self, config: ResponseFilterConfig) -> None:
        self._config = config

    def open(self, context: StepContext) -> nullcontext[OpenResponseFilter]:
        """Returns the step."""
        return nullcontext(OpenResponseFilter(self._config))


class OpenResponseFilter:
    """Takes out what breaks a rule."""

    def __init__(self, config: ResponseFilterConfig) -> None:
        self._config = config

    def run(self, rows: Sequence[CuratedRow], *, shard: int) -> StepResult:
        """Returns the rows with the candidates that break no rule; metrics count broken rules by name."""
        kept, dropped, changed = [], [], []
        metrics: Counter[str] = Counter()
        for row in rows:
            query = as_query(row.example)
            if not row.candidates and row.example.messages[-1].role != "assistant":
                dropped.append((row.example.id, "no response to filter: the row has neither candidates nor an assistant turn at its end"))
                continue
            rollouts = response_rollouts(row)
            problems = [broken_rule(query, rollout, config=self._config) for rollout in rollouts]
            metrics["responses"] += len(rollouts)
            metrics.update(f"broken/{problem[0]}" for problem in problems if problem is not None)
            if all(problems):
                first = next(problem for problem in problems if problem is not None)
                many = f"no candidate passes the rules: the first of {len(problems)} has {first[0]}, {first[1]}"
                dropped.append((row.example.id, many if row.candidates else f"{first[0]}: {first[1]}"))
                continue
            if any(problems):
                found = Counter(problem[0] for problem in problems if problem is not None)
                listed = ", ".join(f"{count} with {name}" for name, count in found.items())
                changed.append((row.example.id, f"candidates taken out: {listed}, of {len(problems)}"))
            passing = tuple(one for one, problem in zip(row.candidates, problems, strict=True) if problem is None) if row.candidates else ()
            kept.append(replace(row, candidates=passing))
        return StepResult(rows=tuple(kept), dropped=tuple(dropped), changed=tuple(changed), metrics=dict(metrics))


def broken_rule(query: Example, rollout: Rollout, *, config: ResponseFilterConfig) -> tuple[str, str] | None:
    """Returns name and finding of the first rule that a response breaks, or None; the cheap rules first."""
    if config.truncated == "drop" and rollout.finish_reason == "length":
        return "truncation", "the token budget cut it off"
    problem = format_problem(rollout, config=config)
    if problem is not None:
        return "wrong format", problem
    parts = response_parts(rollout)
    problem = reasoning_problem(parts, rollout, config=config)
    if problem is not None:
        return problem
    if config.max_repeated_frac is not None:
        for name, part in parts.items():
            share = repeated_frac(part)
            if share > config.max_repeated_frac:
                return "repetition", f"{share:.0%} of its {name} stood there before, at most {config.max_repeated_frac:.0%} may"
    if config.max_foreign_frac is not None:
        mixing = code_switching(query, rollout, max_foreign_frac=config.max_foreign_frac)
        if mixing.value < 0:
            return "language mixing", mixing.note
    return None


def format_problem(rollout: Rollout, *, config: ResponseFilterConfig) -> str | None:
    """Returns what is wrong with the form of a response, or None."""
    text = rollout.text
    opened = rollout.prompt_suffix.rfind(THINK_OPEN) > rollout.prompt_suffix.rfind(THINK_CLOSE)
    num_open, num_close = text.count(THINK_OPEN) + opened, text.count(THINK_CLOSE)
    if num_open != num_close or num_open > 1:
        return f"{num_open} opening and {num_close} closing think tags, one of each or none must be there"
    if num_open and config.thinking == "forbidden":
        return "it has a thinking part (thinking: forbidden)"
    if not num_open and config.thinking == "required":
        return "it has no thinking part (thinking: required)"
    visible = strip_thinking(text, prompt_suffix=rollout.prompt_suffix)
    if visible is None or (num_open and not opened and not text.lstrip().startswith(THINK_OPEN)):
        return "its thinking part does not stand at its start"
    if not visible:
        return "nothing is left outside of its thinking part" if num_open else "it is empty"
    if config.thinking == "required" and not response_parts(rollout).get("thinking", "").replace(THINK_OPEN, "").strip():
        return "its thinking part is empty (thinking: required)"
    found = {"any": (visible,), "tagged": tagged(visible), "boxed": boxed(visible)}[config.answer_form]
    if not any(found):
        return f"no answer is {config.answer_form} in it (answer_form: {config.answer_form})"
    if config.answer_form != "any" and final_answer(text, prompt_suffix=rollout.prompt_suffix) is None:
        return "it marks several answers that differ"
    return None


def reasoning_problem(parts: dict[str, str], rollout: Rollout, *, config: ResponseFilterConfig) -> tuple[str, str] | None:
    """Returns what is wrong with how a well-formed response comes to its answer, or None."""
    thinking, visible = parts.get("thinking", "").replace(THINK_OPEN, ""), parts.get("answer", "")
    answer = final_answer(rollout.text, prompt_suffix=rollout.prompt_suffix)
    if config.min_reasoning_words:
        marked = [content for content in (*tagged(visible), *boxed(visible)) if content]
        # Of an answer that marks nothing, the last line is the answer and what stands before it is how it came to be.
        before = visible.rpartition(marked[-1])[0] if marked else visible.rstrip().rpartition("\n")[0]
        words = num_words(thinking) + num_words(before)
        if words < config.min_reasoning_words:
            return "guessing", f"{words} words before the answer, at least {config.min_reasoning_words} are asked"
    if config.guesses == "drop":
        for part in (thinking, visible):
            guess = _GUESS.search(half_width(part)[-GUESS_CHARS:])
            if guess is not None:
                return "guessing", f"it says `{guess.group()}`"
    if config.disagreeing == "drop" and thinking and answer is not None:
        stated = last_stated(thinking)
        if stated is not None and not agree(stated, answer):
            return "disagreement", f"its thinking ends with `{stated[:40]}`, its answer is `{answer[:40]}`"
    return None


def last_stated(thinking: str) -> str | None:
    r"""Returns the answer that a thinking part names last: in `\boxed{...}`, `<answer>` tags, or after `the answer is`; or None."""
    places = [(thinking.rfind(content), content) for content in (*boxed(thinking), *tagged(thinking)) if content]
    places += [(match.start(), match["answer"]) for match in _STATED.finditer(thinking) if not _NO_ANSWER.match(match["answer"])]
    return max(places, default=(0, ""))[1].strip() or None


def agree(stated: str, answer: str) -> bool:
    """Returns whether two answers may mean the same; lenient, because what does not agree is dropped.

    They differ when the one number of the first is none of the second's, or when both are one letter and not the same. Answers in
    words are compared with nothing, and `12 apples` agrees with `12`.
    """
    first, second = bare(stated).casefold(), bare(answer).casefold()
    first_numbers, second_numbers = _numbers(first), _numbers(second)
    if len(first_numbers) == 1 and second_numbers:
        return first_numbers <= second_numbers
    are_choices = len(first) == 1 and len(second) == 1 and first.isalpha() and second.isalpha()
    return first == second or not are_choices


def _numbers(text: str) -> set[Fraction]:
    found = set()
    for match in _NUMBER.findall(half_width(text)):
        above, _, below = match.replace(",", "").partition("/")
        if not below or int(below):
            found.add(Fraction(above) / (Fraction(below) if below else 1))
    return found
