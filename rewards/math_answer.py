"""Verifier of mathematical answers, by math-verify in a killable worker process.

In the trainer's process only text is handled: the final answer is found, its length bounded, its dollars taken off. Parsing and
comparing happen in `verdict`, which `worker_main` calls; math-verify's own timeouts are off there, because they use
`signal.alarm`: it fails outside the main thread, cancels a caller's alarm, and reports a timeout as a wrong answer.

Known limits of math-verify 0.9, taken as they are: numbers that are not exact are compared after rounding to 6 decimals, so
that two tiny numbers are equal; `10\\%` equals `10`; units are dropped, so that `5 cm` equals `5 m`; a set equals an interval with
the same ends.
"""

from __future__ import annotations

from typing import Any

from ..model.records import DataError, Example, Rollout
from .answers import final_answer, normalise_spaces
from .result import RewardResult
from .worker import WorkerRequest

MAX_PREDICTION_CHARS = 3000
"""Longest final answer, characters; a longer one is malformed."""
MAX_ANSWER_CHARS = 1000
"""Longest answer of an example, characters."""

_DELIMITERS = ("$", "\\(", "\\)", "\\[", "\\]")


def expression(text: str) -> str:
    r"""Returns the text in the one form that both sides are compared in.

    Half width, one line, without `$`, `\(`, `\)`, `\[`, `\]`, bold marks and a final full stop; `**` between numbers is a power.
    How the data set dresses its answers therefore changes nothing.
    """
    stripped = normalise_spaces(text).replace("\\$", " ")
    for delimiter in _DELIMITERS:
        stripped = stripped.replace(delimiter, " ")
    stripped = stripped.strip()
    if len(stripped) > 4 and stripped.startswith("**") and stripped.endswith("**"):
        stripped = stripped[2:-2]
    return stripped.replace("**", "^").strip().removesuffix("。").removesuffix(".").strip()


def check_math_answer(example: Example) -> None:
    """Raises a `DataError` if the example's answer is empty or too long; whether it parses, only the worker can tell."""
    answer = expression(example.answer)
    if not answer or len(answer) > MAX_ANSWER_CHARS:
        raise DataError(
            f"example {example.id!r}: an answer of {len(answer)} characters ({example.answer[:40]!r}); "
            f"`math_answer` compares with an expression of 1 to {MAX_ANSWER_CHARS} characters"
        )


def math_answer(example: Example, rollout: Rollout) -> RewardResult | WorkerRequest:
    """Returns 1.0 when the final answer is equal to the example's as mathematics, else 0.0.

    The final answer alone counts: prose around an unboxed answer makes it wrong. A chain of equalities (`1 = 2 = 3`) is not paid
    when the example's answer is none, since math-verify accepts one whose last member is right.

    A response that no verifier can grade is the response's fault: when it has hung or broken two fresh workers, and the worker
    then compares the example's answer with 0 in time, the value is 0.0 with the note "ungradable". When that control fails
    too, or a worker cannot be started or is lost, the judgement is unavailable.
    """
    prediction = final_answer(rollout.text, prompt_suffix=rollout.prompt_suffix)
    if prediction is None:
        return RewardResult(value=0.0, note="no final answer, or several that differ")
    if len(prediction) > MAX_PREDICTION_CHARS:
        return RewardResult(value=0.0, note=f"a final answer of {len(prediction)} characters; at most {MAX_PREDICTION_CHARS} are read")
    answer, prediction = expression(example.answer), expression(prediction)
    if not prediction:
        return RewardResult(value=0.0, note="the final answer is empty")
    if prediction.count("=") > max(1, answer.count("=")):
        return RewardResult(value=0.0, note="the final answer is a chain of equalities")
    return request(answer, prediction)


def request(answer: str, prediction: str) -> WorkerRequest:
    """Returns what a worker is asked; the control compares the answer with a number, since equal texts would never be computed."""
    return WorkerRequest(
        function="math_answer",
        arguments={"answer": answer, "prediction": prediction},
        control={"answer": answer, "prediction": "0"},
    )


def self_check(example: Example) -> WorkerRequest:
    """Returns the request that gives 1.0 exactly when the example's own answer is found right."""
    answer = expression(example.answer)
    return request(answer, answer)


def verdict(answer: str, prediction: str) -> tuple[float, str]:
    """Returns value and note; runs in a worker process only, because it may not end.

    An answer of the example that cannot be parsed is a `ValueError`: no response could be right.
    """
    from math_verify import verify

    parsed_answer = _parse(answer)
    if not parsed_answer:
        raise ValueError(f"the example's answer {answer[:80]!r} cannot be read as mathematics; write it in LaTeX or use `exact`")
    parsed_prediction = _parse(prediction)
    if not parsed_prediction:
        return 0.0, "the final answer cannot be read as mathematics"
    return float(verify(parsed_answer, parsed_prediction, timeout_seconds=None)), ""


def _parse(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    latex_only = [LatexExtractionConfig(boxed_match_priority=-1)]
    return parse(f"${text}$", latex_only, fallback_mode="no_fallback", parsing_timeout=None)  # pyright: ignore[reportArgumentType] None is documented
