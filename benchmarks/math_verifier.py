"""What `math_answer` costs and decides: hostile verdict times, hostile among good, ordinary speed, verdicts beside math-verify's.

`python benchmarks/math_verifier.py [--quick] [--published CASES.json]`: about eight minutes on two cores, most of them 512 answers that
hang until they are killed. CASES.json is a list of {"gold", "pred", "expected"} (math-verify's published tests, which are not ours to
copy); they are judged with `answer_in: prose`, and by math-verify with its default settings. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import multiprocessing
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from vlpost.model.records import Example, Message, Rollout, TextPart
from vlpost.rewards.math_answer import expression, math_answer, request
from vlpost.rewards.result import RewardResult, Unavailable
from vlpost.rewards.worker import WorkerPool, WorkerRequest

CASES = Path(__file__).resolve().parent.parent / "tests" / "rewards" / "math_cases.yaml"
NO_CASES = ("hostile", "hostile_repeated", "payloads")
ORDINARY = ("numbers", "numerals", "units", "per_cent", "degrees", "intervals", "lists", "matrices", "expressions")
MAX_VERDICT_S = 1.5
TIMEOUT_S = 5.0
"""A recipe's default; the worker's own limit for mathematics is shorter."""

Verdict = RewardResult | Unavailable


def rollout(text: str) -> Rollout:
    """Returns a rollout with this response."""
    return Rollout(
        token_ids=(1, 2), sampled=(False, True), sampler_logprobs=(0.0, 0.0), media=(), text=text, prompt_suffix="", finish_reason="stop",
        policy_version=0,
    )  # fmt: skip


def example(answer: str) -> Example:
    """Returns an example with this answer."""
    return Example(id="bench", messages=(Message(role="user", parts=(TextPart(text="?"),)),), answer=answer, task="math", source="bench")


def judge(pool: WorkerPool, rows: Sequence[tuple[str, str]], **options: Any) -> list[tuple[Verdict, float]]:
    """Returns verdict and seconds for rows of answer and response, as the reward manager gets them."""
    verdicts: list[tuple[Verdict, float]] = []
    waiting: dict[int, WorkerRequest] = {}
    for index, (answer, response) in enumerate(rows):
        start = time.perf_counter()
        returned = math_answer(example(answer), rollout(response), **options)
        if isinstance(returned, WorkerRequest):
            waiting[index] = returned
        verdicts.append((returned if isinstance(returned, RewardResult) else Unavailable(reason="waiting"), time.perf_counter() - start))
    for index, (verdict, seconds) in zip(waiting, pool.judge(list(waiting.values())), strict=True):
        verdicts[index] = (verdict, verdicts[index][1] + seconds)
    return verdicts


def hostile_times(answers: Sequence[str]) -> tuple[float, int, int]:
    """Returns the longest verdict in seconds, how many were not 0.0, and how many reached the worker; one worker, one after the other."""
    longest, wrong, num_asked = 0.0, 0, 0
    with WorkerPool("math_answer", num_workers=1, timeout_s=TIMEOUT_S) as pool:
        for answer in answers:
            row = ("\\frac37", f"\\boxed{{{answer}}}")
            num_asked += isinstance(math_answer(example(row[0]), rollout(row[1])), WorkerRequest)
            # As the manager asks; then past the bounds that refuse a text for what it says, so that the worker has to stand alone.
            for ask in (lambda row=row: judge(pool, [row]), lambda answer=answer: pool.judge([request("\\frac37", expression(answer))])):
                start = time.perf_counter()
                ((verdict, _seconds),) = ask()
                longest = max(longest, time.perf_counter() - start)
                wrong += verdict != RewardResult(value=0.0, note=getattr(verdict, "note", ""))
    return longest, wrong, num_asked


def from_four_places(answers: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row for each place that verdicts are asked from: main thread, thread, asyncio, process pool."""

    def in_thread() -> tuple[float, int, int]:
        found: list[tuple[float, int, int]] = []
        thread = threading.Thread(target=lambda: found.append(hostile_times(answers)))
        thread.start()
        thread.join()
        return found[0]

    def in_process() -> tuple[float, int, int]:
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as processes:
            return processes.submit(hostile_times, answers).result()

    async def in_loop() -> tuple[float, int, int]:
        return hostile_times(answers)

    places: dict[str, Callable[[], tuple[float, int, int]]] = {
        "main thread": lambda: hostile_times(answers),
        "thread": in_thread,
        "asyncio": lambda: asyncio.run(in_loop()),
        "process pool": in_process,
    }
    rows = []
    for place, ask in places.items():
        longest, wrong, num_asked = ask()
        rows.append(
            {"what": f"hostile from {place}", "answers": len(answers), "asked_worker": num_asked, "longest_s": round(longest, 3),
             "not_zero": wrong, "bar_s": MAX_VERDICT_S, "ok": longest <= MAX_VERDICT_S and wrong == 0}
        )  # fmt: skip
    return rows


def among_good(pairs: int) -> dict[str, Any]:
    """Returns how many of the good answers among as many that hang were found right, and the time beside limit x hostile / workers."""
    hanging = ("9^{{9^{{9}}}}+{}", "(10^9)!+{}", "\\lfloor\\pi^{{10^6}}\\rfloor+{}", "(1+\\sqrt{{2}})^{{10^7}}+{}")
    requests = []
    for number in range(pairs):
        requests.append(request("\\frac37", hanging[number % len(hanging)].format(number)))
        requests.append(request(f"{number}\\sqrt{{2}}+1", f"1+\\sqrt{{{2 * number * number}}}"))
    with WorkerPool("math_answer", num_workers=2, timeout_s=TIMEOUT_S) as pool:
        limit_s = pool._workers[0]._timeout_s
        start = time.perf_counter()
        verdicts = [verdict for verdict, _seconds in pool.judge(requests)]
        seconds = time.perf_counter() - start
    good = sum(verdict == RewardResult(value=1.0) for verdict in verdicts[1::2])
    zero = sum(isinstance(verdict, RewardResult) and verdict.value == 0.0 for verdict in verdicts[::2])
    at_most = limit_s * pairs / 2 * 1.25
    return {
        "what": f"{pairs} hanging among {pairs} good",
        "good_right": good,
        "hostile_zero": zero,
        "seconds": round(seconds, 1),
        "limit_x_hostile_over_workers_s": limit_s * pairs / 2,
        "bar_s": at_most,
        "ok": good == pairs and seconds <= at_most,
    }


def figures(what: str, seconds: list[float], *, has_bar: bool) -> dict[str, Any]:
    """Returns a row with median and 95th percentile."""
    median, p95 = statistics.median(seconds) * 1e3, statistics.quantiles(seconds, n=20)[-1] * 1e3
    row = {"what": what, "questions": len(seconds), "median_ms": round(median, 2), "p95_ms": round(p95, 2)}
    return row | ({"bar_median_ms": 3.0, "bar_p95_ms": 10.0, "ok": median <= 3.0 and p95 <= 10.0} if has_bar else {"ok": True})


def ordinary(what: str, cases: Sequence[tuple[str, str, bool]], *, has_bar: bool) -> list[dict[str, Any]]:
    """Returns rows for questions asked one by one, each for the first time: those that need the worker, and all as they come."""
    isolated, mixed = [], []
    with WorkerPool("math_answer", num_workers=1, timeout_s=TIMEOUT_S) as pool:
        for answer, response, _right in cases:
            start = time.perf_counter()
            asked = math_answer(example(answer), rollout(response))
            if isinstance(asked, WorkerRequest):
                pool.judge([asked])
                isolated.append(time.perf_counter() - start)
            mixed.append(time.perf_counter() - start)
    return [
        figures(f"{what}, those that need the worker", isolated, has_bar=has_bar),
        figures(f"{what}, as they come", mixed, has_bar=has_bar),
    ]


def throughput(cases: Sequence[tuple[str, str, bool]]) -> list[dict[str, Any]]:
    """Returns answers a second in one batch: first all new, then the same batch ten times more."""
    rows = [(answer, response) for answer, response, _right in cases]
    with WorkerPool("math_answer", num_workers=2, timeout_s=TIMEOUT_S) as pool:
        start = time.perf_counter()
        judge(pool, rows)
        fresh = len(rows) / (time.perf_counter() - start)
        start = time.perf_counter()
        num_judged = sum(len(judge(pool, rows)) for _ in range(10))
        cached = num_judged / (time.perf_counter() - start)
    return [
        {"what": "answers a second in one batch, nothing known", "per_s": round(fresh, 1), "ok": True},
        {
            "what": "answers a second when the batch is repeated (memory)",
            "per_s": round(cached, 1),
            "bar_per_s": 1000,
            "ok": cached >= 1000,
        },
    ]


def by_math_verify(answer: str, response: str) -> bool:
    """Returns math-verify's own verdict with its defaults; without timeouts, which need the main thread."""
    from math_verify import parse, verify

    parsed = [parse(side, parsing_timeout=None) for side in (answer, response)]
    return verify(*parsed, timeout_seconds=None)


def compare(name: str, cases: Sequence[tuple[str, str, bool]], pool: WorkerPool, **options: Any) -> dict[str, Any]:
    """Returns right verdicts, false accepts and false rejects of both on the same cases."""
    ours = [
        verdict == RewardResult(value=1.0) for verdict, _ in judge(pool, [(answer, response) for answer, response, _ in cases], **options)
    ]
    # Ours are bare LaTeX, which math-verify wants in dollars; its own are as it has them.
    theirs = [by_math_verify(answer if options else f"${answer}$", response) for answer, response, _ in cases]
    counts = {
        who: {"right": sum(found == wanted for found, (*_, wanted) in zip(verdicts, cases, strict=True)),
              "false_accepts": sum(found and not wanted for found, (*_, wanted) in zip(verdicts, cases, strict=True)),
              "false_rejects": sum(wanted and not found for found, (*_, wanted) in zip(verdicts, cases, strict=True))}
        for who, verdicts in (("ours", ours), ("math_verify", theirs))
    }  # fmt: skip
    return {"what": f"verdicts: {name}", "cases": len(cases), **counts}


def published(path: Path) -> list[tuple[str, str, bool]]:
    """Returns the cases of a file of math-verify's tests."""
    return [
        (row["gold"], row["pred"], bool(row.get("expected", row.get("result")))) for row in json.loads(path.read_text(encoding="utf-8"))
    ]


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--published", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    groups = yaml.safe_load(CASES.read_text(encoding="utf-8"))
    hostile = groups["hostile"] + [
        opening * times + middle + closing * times for opening, times, middle, closing in groups["hostile_repeated"]
    ]
    cases = {name: [tuple(case) for case in rows] for name, rows in groups.items() if name not in NO_CASES}
    everything = list(itertools.chain.from_iterable(cases.values()))
    rows: list[dict[str, Any]] = from_four_places(hostile[:4] if arguments.quick else hostile)
    plain = [case for name in ORDINARY for case in cases[name]]
    rows += ordinary("ordinary answers", plain[::4] if arguments.quick else plain, has_bar=True)
    if not arguments.quick:
        hard = [case for name, of_kind in cases.items() if name not in ORDINARY for case in of_kind]
        rows += ordinary("cases of issues and hedging", hard, has_bar=False)
    rows += throughput(plain[::4] if arguments.quick else everything)
    with WorkerPool("math_answer", num_workers=2, timeout_s=TIMEOUT_S) as pool:
        table = [compare(name, of_kind, pool) for name, of_kind in itertools.islice(cases.items(), 3 if arguments.quick else None)]
        table.append(compare("all of ours", everything[:40] if arguments.quick else everything, pool))
        bars = {
            "verdicts: issues": ("right", 22),
            "verdicts: false_accepts": ("false_accepts", 2),
            "verdicts: false_rejects": ("false_rejects", 6),
        }
        for row in table:
            kind, bar = bars.get(row["what"], ("", 0))
            row["ok"] = not kind or (row["ours"][kind] >= bar if kind == "right" else row["ours"][kind] <= bar)
        if arguments.published:
            theirs = compare("math-verify's published tests", published(arguments.published), pool, answer_in="prose")
            strict = compare("math-verify's published tests, final answers only", published(arguments.published), pool, answer_in="final")
            theirs["ok"] = theirs["ours"]["right"] >= theirs["math_verify"]["right"]
            table += [theirs, strict | {"ok": True}]
    rows += table
    rows.append(among_good(4 if arguments.quick else 512))
    for row in rows:
        print(json.dumps(row), file=sys.stderr)
    slowest = max(row["longest_s"] for row in rows if "longest_s" in row)
    report = {
        "name": "math_verifier",
        "value": float(slowest),
        "unit": "s, longest verdict on a hostile answer",
        "bar": MAX_VERDICT_S,
        "ok": all(row["ok"] for row in rows),
        "rows": rows,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {name: version(name) for name in ("math-verify", "sympy")},
    }
    print(json.dumps(report))
    return 0 if report["ok"] or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
