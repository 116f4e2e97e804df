"""The steps of `vlpost curate` that a judge model decides: `query_filter` and `response_judge`.

Verdicts come by `llm_judge` and its client: schema-constrained scores on the axes of a rubric, canaries, a cache if the recipe names
one. A verdict that could not be had, an outage say, is an error that names the row and ends the shard; a resumed run asks again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from .. import rewards as rewards_package
from ..model.records import DataError, Example, Rollout
from ..rewards.cache import VerdictCache
from ..rewards.config import ComponentConfig, RewardConfigError, RewardsConfig
from ..rewards.judge_client import shared_client
from ..rewards.judge_prompt import load_rubric
from ..rewards.judge_server import model_state
from ..rewards.llm_judge import LlmJudge, LlmJudgeOptions, open_llm_judge
from ..rewards.result import RewardResult, Unavailable
from .curate_engine_config import QueryFilterConfig, ResponseJudgeConfig
from .curate_query import as_query, given_answer, query_text, unavailable, with_query_text
from .curate_rewrite import NO_ANSWER, Rewriter, rewrite_problem
from .curate_step import Candidate, CuratedRow, StepContext, StepResult

BUILT_IN_RUBRICS = ("query", "response")
QUERY_AXES: Mapping[str, tuple[int, int]] = {
    "verifiable": (0, 1), "clear": (0, 1), "substance": (1, 5), "relevance": (1, 5), "complexity": (1, 5),
}  # fmt: skip
RESPONSE_AXES: Mapping[str, tuple[int, int]] = dict.fromkeys(
    ("correctness", "completeness", "clarity", "helpfulness", "visual_evidence"), (1, 5)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AxesVerdict:
    """What a judge found about one query or response; `scores` is empty where no judge had to be asked, `reason` then says why."""

    scores: Mapping[str, int]
    """By axis"""
    value: float
    """Weighted mean of the axes, each scaled to 0 to 1."""
    reason: str


class AxesJudge:
    """A judge by one rubric that has the wanted axes; every row gets a verdict or an error that names it."""

    def __init__(self, judge: LlmJudge, *, axes: Sequence[str], place: str) -> None:
        self._judge = judge
        self._axes = tuple(axes)
        self._place = place

    def judge(self, asked: Sequence[tuple[Example, str, str]]) -> list[AxesVerdict]:
        """Returns a verdict for each (example, response, prompt suffix), in order.

        Raises `RewardUnavailableError` when there is none for some, and what `LlmJudge.judge` raises.
        """
        timed = self._judge.judge([(example, written(text, prompt_suffix=suffix)) for example, text, suffix in asked])
        missing = [
            (example.id, verdict.reason)
            for (example, _, _), (verdict, _) in zip(asked, timed, strict=True)
            if isinstance(verdict, Unavailable)
        ]
        if missing:
            raise unavailable(self._place, missing, num_asked=len(asked))
        return [self._read(verdict) for verdict, _ in timed]

    def _read(self, verdict: RewardResult | Unavailable) -> AxesVerdict:
        assert isinstance(verdict, RewardResult), "rows without a verdict were refused above"
        is_asked = all(axis in verdict.metrics for axis in self._axes)
        scores = {axis: int(verdict.metrics[axis]) for axis in self._axes} if is_asked else {}
        return AxesVerdict(scores=scores, value=verdict.value, reason=verdict.note)


def written(text: str, *, prompt_suffix: str) -> Rollout:
    """Returns a response whose tokens nobody needs as the record that rewards read."""
    return Rollout(
        token_ids=(), sampled=(), sampler_logprobs=(), media=(), text=text,
        prompt_suffix=prompt_suffix, finish_reason="stop", policy_version=0,
    )  # fmt: skip


@contextmanager
def open_axes_judge(
    config: QueryFilterConfig | ResponseJudgeConfig, *, axes: Mapping[str, tuple[int, int]], recipe_folder: Path | None
) -> Iterator[AxesJudge]:
    """Yields a judge by the step's rubric; `RewardConfigError` when the rubric's axes are not the wanted ones."""
    with ExitStack() as opened:
        rubric = config.rubric
        if rubric in BUILT_IN_RUBRICS:
            packaged = resources.files(rewards_package).joinpath(f"rubric_{rubric}.yaml")
            rubric = str(opened.enter_context(resources.as_file(packaged)).resolve())
        elif not rubric.endswith((".yaml", ".yml")):
            raise RewardConfigError(
                f"{config.use}: rubric {rubric!r} is unknown; built-in are {', '.join(BUILT_IN_RUBRICS)}, a file of yours ends in .yaml"
            )
        found = {name: (axis.lowest, axis.highest) for name, axis in load_rubric(rubric, recipe_folder=recipe_folder).axes.items()}
        if found != dict(axes):
            wanted = ", ".join(f"{name} {lowest} to {highest}" for name, (lowest, highest) in axes.items())
            raise RewardConfigError(f"{config.use}: rubric {config.rubric!r} has the axes {found}; it must have {wanted}")
        options: dict[str, Any] = {"rubric": rubric, "images": config.images}
        if config.images:
            options["max_frames"] = config.max_frames
        settings = RewardsConfig(components={"judge": ComponentConfig(use="llm_judge", options=options)}, judge=config.judge)
        judge = opened.enter_context(open_llm_judge(LlmJudgeOptions.model_validate(options), settings, recipe_folder))
        yield AxesJudge(judge, axes=tuple(axes), place=config.use)


# ---------------------------------------------------------------- queries


class QueryFilterStep:
    """Opens `query_filter`."""

    def __init__(self, config: QueryFilterConfig) -> None:
        self._config = config

    @contextmanager
    def open(self, context: StepContext) -> Iterator[OpenQueryFilter]:
        """Yields the step with its judge; a judge's server is started here if the recipe says so."""
        config, folder = self._config, context.recipe_folder
        with ExitStack() as opened:
            judge = opened.enter_context(open_axes_judge(config, axes=QUERY_AXES, recipe_folder=folder))
            rewriter = None
            if config.ambiguous == "rewrite":
                client = opened.enter_context(shared_client(config.judge, recipe_folder=folder))
                cache = None
                if config.judge.cache is not None:
                    cache = opened.enter_context(VerdictCache((folder or Path()) / config.judge.cache))
                state = model_state(config.judge, recipe_folder=folder)
                rewriter = Rewriter(config, client=client, model_state=state, cache=cache)
            yield OpenQueryFilter(config, judge=judge, rewriter=rewriter)


class OpenQueryFilter:
    """Judges queries; rewrites those that can be read in two ways, and judges them again."""

    def __init__(self, config: QueryFilterConfig, *, judge: AxesJudge, rewriter: Rewriter | None) -> None:
        self._config = config
        self._judge = judge
        self._rewriter = rewriter

    def run(self, rows: Sequence[CuratedRow], *, shard: int) -> StepResult:
        """Returns the rows whose query is fit to train on, its scores and a rewritten query's original among the row's notes.

        A `DataError` for rows with candidates where queries may be rewritten: the candidates would answer another query than the row's.
        """
        answered = [row.example.id for row in rows if row.candidates]
        if self._rewriter is not None and answered:
            raise DataError(
                f"query_filter: row {answered[0]} has candidates already, which would answer another query than the rewritten one; put "
                "query_filter before generate, or write ambiguous: drop"
            )
        verdicts = self._verdicts([row.example for row in rows])
        kept: dict[int, CuratedRow] = {}
        dropped: dict[int, str] = {}
        unclear: list[int] = []
        for index, (row, verdict) in enumerate(zip(rows, verdicts, strict=True)):
            is_ambiguous = bool(verdict.scores) and not verdict.scores["clear"]
            if is_ambiguous and self._rewriter is not None and not self._worthless(row.example, verdict):
                unclear.append(index)
                continue
            reason = self._reason(row.example, verdict)
            if reason is None:
                kept[index] = _noted(row, verdict)
            else:
                dropped[index] = reason
        changed = self._rewrite({index: rows[index] for index in unclear}, {i: verdicts[i] for i in unclear}, kept=kept, dropped=dropped)
        return StepResult(
            rows=tuple(kept[index] for index in sorted(kept)),
            dropped=tuple((rows[index].example.id, dropped[index]) for index in sorted(dropped)),
            changed=changed,
            metrics={"ambiguous": len(unclear), "rewritten": len(changed)},
        )

    def _verdicts(self, examples: Sequence[Example]) -> list[AxesVerdict]:
        return self._judge.judge([(as_query(example), given_answer(example).strip() or NO_ANSWER, "") for example in examples])

    def _rewrite(
        self,
        rows: Mapping[int, CuratedRow],
        verdicts: Mapping[int, AxesVerdict],
        *,
        kept: dict[int, CuratedRow],
        dropped: dict[int, str],
    ) -> tuple[tuple[str, str], ...]:
        """Sorts rows with an ambiguous query into `kept` and `dropped`; returns what was changed."""
        if self._rewriter is None or not rows:
            return ()
        texts = self._rewriter.rewrite([(row.example, verdicts[index].reason) for index, row in rows.items()])
        rewritten: dict[int, Example] = {}
        for (index, row), text in zip(rows.items(), texts, strict=True):
            problem = rewrite_problem(row.example, text, max_change=self._config.max_change)
            if problem is None:
                rewritten[index] = with_query_text(row.example, text)
            else:
                dropped[index] = f"ambiguous query, no usable rewrite: {problem}"
        changed = []
        for (index, example), verdict in zip(rewritten.items(), self._verdicts(list(rewritten.values())), strict=True):
            reason = self._reason(example, verdict)
            if reason is not None:
                dropped[index] = f"ambiguous query, its rewrite is no better: {reason}"
                continue
            original = query_text(rows[index].example)
            noted = _noted(replace(rows[index], example=example), verdict)
            kept[index] = replace(noted, notes={**noted.notes, "original_query": original, "ambiguity": verdicts[index].reason})
            changed.append((example.id, f"query rewritten: {original!r} is now {query_text(example)!r}"))
        return tuple(changed)

    def _worthless(self, example: Example, verdict: AxesVerdict) -> str | None:
        """Returns why no rewrite could make the query worth keeping, or None."""
        scores, config = verdict.scores, self._config
        if scores["substance"] < config.min_substance:
            return _below("query without substance", "substance", scores, config.min_substance, verdict)
        if as_query(example).media and scores["relevance"] < config.min_relevance:
            return _below("query does not fit its image", "relevance", scores, config.min_relevance, verdict)
        return None

    def _reason(self, example: Example, verdict: AxesVerdict) -> str | None:
        """Returns why the query is dropped, or None."""
        config, scores = self._config, verdict.scores
        if not scores:
            return f"query cannot be judged: {verdict.reason}"
        worthless = self._worthless(example, verdict)
        if worthless is not None:
            return worthless
        if not scores["clear"] and config.ambiguous != "keep":
            return f"ambiguous query: {verdict.reason}"
        if not scores["verifiable"] and not config.keep_unverifiable:
            return f"query cannot be verified: {verdict.reason}"
        if scores["complexity"] < config.min_complexity:
            return _below("query too simple", "complexity", scores, config.min_complexity, verdict)
        return None


def _below(head: str, axis: str, scores: Mapping[str, int], limit: int, verdict: AxesVerdict) -> str:
    return f"{head}: {axis} {scores[axis]}, at least {limit} is asked; {verdict.reason}"


def _noted(row: CuratedRow, verdict: AxesVerdict) -> CuratedRow:
    return replace(row, notes={**row.notes, **verdict.scores, "query_reason": verdict.reason})


# ---------------------------------------------------------------- responses


class ResponseJudgeStep:
    """Opens `response_judge`."""

    def __init__(self, config: ResponseJudgeConfig) -> None:
        self._config = config

    @contextmanager
    def open(self, context: StepContext) -> Iterator[OpenResponseJudge]:
        """Yields the step with its judge; a judge's server is started here if the recipe says so."""
        with open_axes_judge(self._config, axes=RESPONSE_AXES, recipe_folder=context.recipe_folder) as judge:
            yield OpenResponseJudge(self._config, judge=judge)


class OpenResponseJudge:
    """Judges candidates, or the last assistant turn of a conversation that has none."""

    def __init__(self, config: ResponseJudgeConfig, *, judge: AxesJudge) -> None:
        self._config = config
        self._judge = judge

    def run(self, rows: Sequence[CuratedRow], *, shard: int) -> StepResult:
        """Returns the rows with the candidates that pass; each bears its scores in `notes["judge"]`, a conversation in the row's notes."""
        asked: list[tuple[Example, str, str]] = []
        for row in rows:
            if row.candidates:
                asked += [(as_query(row.example), candidate.text, candidate.prompt_suffix) for candidate in row.candidates]
            elif row.example.messages[-1].role == "assistant":
                asked.append((as_query(row.example), row.example.messages[-1].text, ""))
        verdicts = iter(self._judge.judge(asked))
        kept, dropped, changed = [], [], []
        metrics: Counter[str] = Counter(responses_judged=len(asked))
        for row in rows:
            if not row.candidates and row.example.messages[-1].role != "assistant":
                dropped.append((row.example.id, "no response to judge: the row has neither candidates nor an assistant turn at its end"))
                continue
            of_row = [next(verdicts) for _ in row.candidates or (None,)]
            problems = [self._problem(row.example, verdict) for verdict in of_row]
            metrics.update(f"failed/{head}" for problem in problems if problem is not None for head in [problem.partition(":")[0]])
            if not row.candidates:
                if problems[0] is None:
                    kept.append(replace(row, notes={**row.notes, "judge": _judged(of_row[0])}))
                else:
                    dropped.append((row.example.id, f"response fails the judge: {problems[0]}"))
                continue
            passing = tuple(
                replace(candidate, notes={**candidate.notes, "judge": _judged(verdict)})
                for candidate, verdict, problem in zip(row.candidates, of_row, problems, strict=True)
                if problem is None
            )
            if not passing:
                dropped.append((row.example.id, f"no candidate passes the judge: {_listed(row.candidates, problems)}"))
                continue
            if len(passing) < len(row.candidates):
                changed.append((row.example.id, f"candidates removed by the judge: {_listed(row.candidates, problems)}"))
            kept.append(replace(row, candidates=passing))
        return StepResult(rows=tuple(kept), dropped=tuple(dropped), changed=tuple(changed), metrics=dict(metrics))

    def _problem(self, example: Example, verdict: AxesVerdict) -> str | None:
        """Returns why a response is not good enough, its head (before the colon) naming the axis, or None."""
        config, scores = self._config, verdict.scores
        if not scores:
            return f"no answer to judge: {verdict.reason}"
        for axis, limit in config.min_scores.items():
            if axis == "visual_evidence" and not as_query(example).media:
                continue
            if scores[axis] < limit:
                return f"{axis}: {scores[axis]}, at least {limit} is asked; {verdict.reason}"
        if verdict.value < config.min_value:
            return f"value: {verdict.value:.3f}, at least {config.min_value:g} is asked; {verdict.reason}"
        return None


def _judged(verdict: AxesVerdict) -> dict[str, Any]:
    return {**verdict.scores, "value": verdict.value, "reason": verdict.reason}


def _listed(candidates: Sequence[Candidate], problems: Sequence[str | None]) -> str:
    """Returns which candidates fail and why, one after another."""
    failed = [
        f"candidate {number} of {len(candidates)} ({candidate.model}) {problem}"
        for number, (candidate, problem) in enumerate(zip(candidates, problems, strict=True), start=1)
        if problem is not None
    ]
    return "; ".join(failed)
