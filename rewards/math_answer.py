r"""Verifier of mathematical answers: own extraction and exact checks, with math-verify behind them in a killable worker process.

In the trainer's process only text is handled: the answers that a response gives are found (`math_extract`), written in one form
(`math_normalise`), bounded (`math_bounds`), and judged there when equal text or whole numbers decide it (`math_compare.known_equal`).
Everything else is judged by `verdict` in a worker, where math-verify's own timeouts are off: they use `signal.alarm`, which fails
outside the main thread, cancels a caller's alarm, and reports a timeout as a wrong answer.

The rules, beyond equality:

* A unit that only one side has is taken as meant by the other; units of one dimension are converted; `5 m` is not `5 cm`.
* `10\%` is `0.1`. The response `10` is right when the answer is `10\%`; the response `10\%` is wrong when the answer is `10`.
* A list is right when every part is, in any order; `\{1,2\}` is a set and not the tuple `(1,2)`; brackets of an interval count.
* A decimal is an exact number rounded or cut to at least `decimal_places` places.
* Every answer that a response gives must be right, so hedging can only lose. Several boxes are the parts of one answer when the
  example's answer is a list of as many parts.
* A number in another base than ten equals only the same digits in that base. In a chain of
  equations every member must be right: `x=6/2=3` is 3, `x=3=4` is nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..model.records import DataError, Example, Rollout
from .built_in import BuiltInReward
from .math_bounds import beyond_bounds
from .math_compare import UnreadableAnswerError, can_be_read, equal, known_equal
from .math_extract import MAX_CANDIDATES, AnswerPlace, as_one_list, candidate_answers, example_answer
from .math_normalise import expression
from .result import RewardResult
from .worker import WorkerRequest

MAX_RESPONSE_CHARS = 200_000
"""Longest response that is searched for an answer, characters; a longer one is malformed."""
MAX_PREDICTION_CHARS = 3000
"""Longest final answer (all of them together where there are several), characters; a longer one is malformed."""
MAX_ANSWER_CHARS = 1000
"""Longest answer of an example, characters."""
DEFAULT_DECIMAL_PLACES = 6

__all__ = ["REWARDS", "check_math_answer", "expression", "math_answer", "request", "self_check", "verdict"]


def check_math_answer(example: Example) -> None:
    """Raises a `DataError` if the example's answer is empty or too long; whether it parses, only the worker can tell."""
    if len(example.answer) > MAX_RESPONSE_CHARS or not 1 <= len(answer := example_answer(example.answer)) <= MAX_ANSWER_CHARS:
        raise DataError(
            f"example {example.id!r}: an answer of {len(answer)} characters ({example.answer[:40]!r}); "
            f"`math_answer` compares with an expression of 1 to {MAX_ANSWER_CHARS} characters"
        )


def math_answer(
    example: Example, rollout: Rollout, *, decimal_places: int = DEFAULT_DECIMAL_PLACES, answer_in: AnswerPlace = "final"
) -> RewardResult | WorkerRequest:
    """Returns 1.0 when every final answer that the response gives is equal to the example's as mathematics, else 0.0.

    `decimal_places`: how many places a decimal needs to stand for an exact number (0.333333 for 1/3). `answer_in`: with `final`, prose
    around an answer that is neither boxed nor announced ("the answer is ...") makes it wrong; with `prose` the last formula or number
    of such a response is its answer. That is for measuring models that were never taught to box: it pays "$4$ is not the answer",
    so never train on it.

    A response that no verifier can grade is the response's fault: a text beyond `math_bounds`, or one that computed until the worker's
    limit, is 0.0 with the note "ungradable" if the worker can then still compare the example's answer with 0. A fault of the
    infrastructure (`worker.WorkerPool.judge` tells them apart) is unavailable.
    """
    if len(rollout.text) > MAX_RESPONSE_CHARS:
        return RewardResult(value=0.0, note=f"a response of {len(rollout.text)} characters; at most {MAX_RESPONSE_CHARS} are read")
    candidates = candidate_answers(rollout.text, prompt_suffix=rollout.prompt_suffix, answer_in=answer_in)
    if not candidates:
        return RewardResult(value=0.0, note="no final answer, or an empty one")
    if (length := sum(map(len, candidates))) > MAX_PREDICTION_CHARS:
        return RewardResult(value=0.0, note=f"a final answer of {length} characters; at most {MAX_PREDICTION_CHARS} are read")
    answer = example_answer(example.answer)
    candidates = as_one_list(answer, candidates)
    if len(candidates) > MAX_CANDIDATES:
        return RewardResult(value=0.0, note=f"{len(candidates)} different final answers")
    known = [known_equal(answer, candidate, decimal_places=decimal_places) for candidate in candidates]
    if False in known:
        return RewardResult(value=0.0, note="a different answer" if len(known) == 1 else "several final answers, not all right")
    if all(known):
        return RewardResult(value=1.0)
    reason = next(filter(None, map(beyond_bounds, candidates)), "")
    if reason and not beyond_bounds(answer):
        return RewardResult(value=0.0, note=f"ungradable answer: {reason}")
    return request(answer, *candidates, decimal_places=decimal_places)


def request(answer: str, *predictions: str, decimal_places: int = DEFAULT_DECIMAL_PLACES) -> WorkerRequest:
    """Returns what a worker is asked; the control compares the answer with a number, since equal texts would never be computed."""
    places = str(decimal_places)
    return WorkerRequest(
        function="math_answer",
        arguments={"answer": answer, "predictions": "\n".join(predictions), "decimal_places": places},
        control={"answer": answer, "predictions": "0", "decimal_places": places},
    )


def self_check(example: Example) -> WorkerRequest:
    """Returns the request that gives 1.0 exactly when the example's own answer can be read and is found right."""
    answer = example_answer(example.answer)
    return request(answer, answer)


def verdict(answer: str, predictions: str, decimal_places: str) -> tuple[float, str]:
    """Returns value and note; runs in a worker process only, because it may not end. One prediction a line; all must be right.

    An answer of the example that cannot be read is an `UnreadableAnswerError`: no response could be right.
    """
    if not can_be_read(answer):
        raise UnreadableAnswerError(f"the example's answer {answer[:80]!r} cannot be read as mathematics; write it in LaTeX or use `exact`")
    lines = predictions.split("\n")
    right = all(equal(answer, prediction, decimal_places=int(decimal_places)) for prediction in lines)
    return float(right), "" if right else "a different answer" if len(lines) == 1 else "several final answers, not all right"


REWARDS: Mapping[str, BuiltInReward] = {
    "math_answer": BuiltInReward(
        summary="the final answer is equal to the example's as mathematics",
        value_range=(0.0, 1.0),
        check_answer=check_math_answer,
        cacheable=True,
        version=2,
        function=math_answer,
        self_check=self_check,
    ),
}
