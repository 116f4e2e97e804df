"""Services, routing by source, components side by side, and what the summary says of them."""

import threading
from collections.abc import Mapping
from contextlib import contextmanager

import pytest
from pydantic import Field
from vlpost.model.config import Settings
from vlpost.model.records import DataError, Example, Group, VlpostError
from vlpost.rewards import (
    RewardConfigError,
    RewardManager,
    RewardResult,
    RewardsConfig,
    RolloutScore,
    ScoreSummary,
    Unavailable,
    group_outcomes,
    jail_backends,
    registry,
    summarise,
)
from vlpost.rewards.built_in import BuiltInReward
from vlpost.rewards.cache import VerdictCache
from vlpost.rewards.execution import SandboxError
from vlpost.rewards.manager import CACHE_FILE
from vlpost.rewards.summary import GroupOutcomes, reason_kind


class ServiceOptions(Settings):
    scale: float = Field(default=1.0, gt=0)
    names: tuple[str, ...] = ()


class StopRunError(VlpostError):
    """The service's own word that the run has to stop."""


class Service:
    """Judges by the text; notes down what it was asked and whether it is open."""

    def __init__(self, options, config, folder):
        self.options, self.config, self.folder = options, config, folder
        self.asked: list[list[str]] = []
        self.is_open = True
        self.is_unsafe = False
        self.barrier: threading.Barrier | None = None

    def describe(self):
        return "a service of a test"

    def judge(self, rows):
        self.asked.append([rollout.text for _example, rollout in rows])
        if self.barrier is not None:
            self.barrier.wait(timeout=20)
        texts = self.asked[-1]
        if "raise" in texts:
            raise RuntimeError("the service broke")
        if "stop" in texts:
            raise StopRunError("the budget is spent")
        verdicts = [
            (Unavailable(reason="no reply") if text == "down" else RewardResult(value=self.options.scale * len(text)), 0.5)
            for text in texts
        ]
        return verdicts[1:] if "short" in texts else verdicts


@pytest.fixture
def services(monkeypatch) -> list[Service]:
    """Registers the service as two built-ins, `remote` and the cacheable `kept`, and a worker-like slow function."""
    opened: list[Service] = []

    @contextmanager
    def open_service(options, config, folder):
        service = Service(options, config, folder)
        opened.append(service)
        try:
            yield service
        finally:
            service.is_open = False

    def entry(**changes):
        return BuiltInReward(summary="counts", value_range=(0.0, 9.0), service=open_service, options=ServiceOptions, **changes)

    table: Mapping[str, BuiltInReward] = {**registry.BUILT_IN_REWARDS, "remote": entry(), "kept": entry(cacheable=True)}
    monkeypatch.setattr(registry, "BUILT_IN_REWARDS", table)
    return opened


def make_manager(components, *, folder=None, cache_folder=None, **settings) -> RewardManager:
    config = RewardsConfig.model_validate({"components": components, "max_unavailable_frac": 1.0, **settings})
    return RewardManager(config, recipe_folder=folder, allow_code=False, cache_folder=cache_folder)


def test_a_service_is_opened_with_its_options_and_closed(services, make_group, tmp_path):
    rewards = make_manager({"it": {"use": "remote", "options": {"scale": 2, "names": ["a"]}}}, folder=tmp_path)
    assert services == [], "nothing is opened before the `with` block"
    with rewards:
        (service,) = services
        assert service.options == ServiceOptions(scale=2.0, names=("a",))
        assert service.config is rewards.config
        assert service.folder == tmp_path
        (group,) = rewards.score([make_group("1", "ab", "down", "abc")])
    assert [outcome.score.reward for outcome in group.judged] == [4.0, 6.0]
    assert group.judged[0].score.judging_s == {"it": 0.5}
    assert group.unjudged[0].reasons == {"it": "no reply"}
    assert not service.is_open


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 0}, r"rewards\.components\.it\.options\.scale = 0: Input should be greater than 0"),
        (
            {"scael": 1},
            r"rewards\.components\.it\.options\.scael: remote has no such option \(did you mean 'scale'\?\); it has scale, names",
        ),
        ({"names": [1]}, r"rewards\.components\.it\.options\.names\.0 = 1: Input should be a valid string"),
        ({"scale": object()}, r"rewards\.components\.it: options of remote cannot be checked"),
    ],
)
def test_options_of_a_service_are_checked_at_once(options, words, services):
    with pytest.raises(RewardConfigError, match=words):
        make_manager({"it": {"use": "remote", "options": options}})


def test_a_service_that_breaks_makes_its_rows_unavailable_and_its_own_error_stops(services, make_group):
    with make_manager({"it": {"use": "remote"}}) as rewards:
        (broken,) = rewards.score([make_group("1", "a", "raise")])
        last_lines = [outcome.reasons["it"].splitlines()[-1] for outcome in broken.unjudged]
        assert last_lines == ["RuntimeError: the service broke"] * 2
        (short,) = rewards.score([make_group("1", "a", "short")])
        assert "1 verdicts for 2 rows" in short.unjudged[0].reasons["it"]
        with pytest.raises(StopRunError, match="the budget is spent"):
            rewards.score([make_group("1", "stop")])
        assert len(rewards.score([make_group("1", "a")])[0].judged) == 1


def test_components_work_side_by_side(services, make_group):
    """Each waits for the other: one after the other they would never end."""
    with make_manager({"a": {"use": "remote"}, "b": {"use": "remote", "weight": 0.5}, "c": {"use": "count"}}) as rewards:
        barrier = threading.Barrier(2)
        for service in services:
            service.barrier = barrier
        (group,) = rewards.score([make_group("1", "ab")])
    assert group.judged[0].score.reward == 3.0


def test_cached_rows_are_not_asked_again_and_other_settings_ask_again(services, make_group, tmp_path):
    def score(*texts, **settings):
        with make_manager({"it": {"use": "kept"}}, cache_folder=tmp_path, **settings) as rewards:
            (group,) = rewards.score([make_group("1", *texts)])
        return [outcome.score.reward for outcome in group.judged]

    assert score("a", "ab") == [1.0, 2.0]
    assert score("ab", "abc", "a") == [2.0, 3.0, 1.0]
    assert services[-1].asked == [["abc"]]
    assert score("ab") == [2.0]
    assert services[-1].asked == []
    score("ab", timeout_s=9.0)
    assert services[-1].asked == [["ab"]], "a service may read the other settings"
    with VerdictCache(tmp_path / CACHE_FILE) as cache:
        assert cache.get("nothing") is None


# ---------------------------------------------------------------- routing by source


def _from(group: Group, source: str) -> Group:
    example = group.example
    moved = Example(id=f"{source}-{example.id}", messages=example.messages, answer=example.answer, task=example.task, source=source)
    return Group(example=moved, rollouts=group.rollouts)


ROUTED = {
    "geo": {"use": "exact", "sources": ["geo"]},
    "add": {"use": "count", "tasks": ["add"], "sources": ["sums", "geo"], "weight": 2.0},
}


def test_a_row_is_judged_where_task_and_source_match(make_group):
    rewards = make_manager(ROUTED)
    groups = [_from(make_group("3", "3", task=task), source) for task, source in (("add", "geo"), ("add", "sums"), ("read", "geo"))]
    assert [list(group.judged[0].score.results) for group in rewards.score(groups)] == [["geo", "add"], ["add"], ["geo"]]
    assert rewards.check_examples([group.example for group in groups]) == 3
    assert rewards.describe()[1] == "add: 2 x count, tasks add, sources sums, geo, options default"


def test_a_row_that_no_source_matches_is_refused(make_group):
    rewards = make_manager(ROUTED)
    group = _from(make_group("3", "3", task="read"), "sums")
    words = r"no reward component judges its task 'read' of source 'sums'; judged are add, judged sources are geo, sums: add the task"
    for refuse in (lambda: rewards.check_examples([group.example]), lambda: rewards.score([group])):
        with pytest.raises(DataError, match=words):
            refuse()


# ---------------------------------------------------------------- summary


def _summary(values, seconds, reasons=(), **full) -> ScoreSummary:
    scores = tuple(
        RolloutScore(reward=value, results={"it": RewardResult(value=value)}, judging_s={} if took is None else {"it": took})
        for value, took in zip(values, seconds, strict=True)
    )
    return summarise([GroupOutcomes(scores=scores, unjudged_reasons=tuple({"it": reason} for reason in reasons))], **full)


def test_timing_counts_and_values_of_a_component():
    seconds = [float(number) for number in range(1, 101)]
    summary = _summary([1.0] * 25 + [0.0] * 75, seconds, ["no verdict in 5 s", "no verdict in 5 s", "the process died by SIGKILL"])
    part = summary.components["it"]
    assert (part.seconds, part.seconds_p50, part.seconds_p95, part.seconds_max) == (5050.0, 50.0, 95.0, 100.0)
    assert (part.num_judged, part.num_unavailable, part.num_cached, part.mean, part.full_frac) == (100, 3, 0, 0.25, 0.25)
    assert part.unavailable_kinds == {"died": 1, "timeout": 2}
    numbers = summary.metrics()
    assert numbers["reward/it/unavailable/timeout"] == 2.0
    assert numbers["reward/it/full_frac"] == 0.25
    assert numbers["time/reward/it_p95_s"] == 95.0
    assert numbers["time/reward/it_s"] == 5050.0


def test_what_was_looked_up_has_no_time_and_the_full_value_is_the_components_own():
    part = _summary([0.0, -1.0, 0.0], [None, 0.2, None], full_values={"it": 0.0}).components["it"]
    assert (part.num_cached, part.seconds_p50, part.seconds_max, part.full_frac) == (2, 0.2, 0.2, pytest.approx(2 / 3))
    nothing = _summary([1.0], [None]).components["it"]
    assert (nothing.num_cached, nothing.seconds, nothing.seconds_p50) == (1, 0.0, 0.0)


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("no verdict in 0.4 s", "timeout"),
        ("its memory grew to 300 MiB, at most 256 are allowed (max_memory_mib)", "memory"),
        ("the process died by SIGKILL", "died"),
        ("the worker process of 'math_answer' is gone (it ended)", "died"),
        ("its reply is garbage: Expecting value", "garbage"),
        ("the reward function returned a str; it must return float, RewardResult or Unavailable", "returned"),
        ("weight x value = 1 x 1e+300; at most 1e+100 can be summed", "returned"),
        ("Traceback (most recent call last):\n  x\nZeroDivisionError: division by zero", "raised"),
        ("judge is down", "other"),
    ],
)
def test_reasons_are_sorted_by_kind(reason, kind):
    assert reason_kind(reason) == kind


def test_full_values_come_from_the_stated_range(services, make_group):
    with make_manager({"it": {"use": "remote"}, "count": {"use": "count"}}) as rewards:
        assert rewards.full_values == {"it": 9.0, "count": 1.0}
        summary = summarise(group_outcomes(rewards.score([make_group("1", "nine char", "1")])), full_values=rewards.full_values)
    assert (summary.components["it"].full_frac, summary.components["count"].full_frac) == (0.5, 0.5)


def test_examples_are_checked_without_opening_a_service(services, make_example):
    rewards = make_manager({"it": {"use": "remote"}, "math": {"use": "math_answer"}})
    assert rewards.check_examples([make_example("\\frac{1}{2}")]) == 1
    assert services == []
    with pytest.raises(DataError, match=r"example 'add-0': component 'math' \(math_answer\) does not find its own answer"):
        rewards.check_examples([make_example("no mathematics at all {")])


def test_components_of_one_verifier_share_its_workers(make_group):
    components = {name: {"use": "math_answer", "tasks": [name]} for name in ("a", "b")} | {"c": {"use": "math_answer", "timeout_s": 2.0}}
    with make_manager(components) as rewards:
        assert len(rewards._pools._pools) == 2
        (group,) = rewards.score([make_group("0.5", "\\boxed{1/2}", task="a")])
    assert group.judged[0].score.reward == 2.0


def test_a_manager_says_what_its_services_are(services):
    with make_manager({"it": {"use": "remote"}, "count": {"use": "count"}}) as manager:
        assert manager.describe_services() == ["it: a service of a test"]
        assert not manager.is_unsafe
    assert manager.describe_services() == []


def test_a_run_without_a_jail_is_marked(monkeypatch):
    monkeypatch.setattr(jail_backends, "_bubblewrap", lambda *_: "not here")
    monkeypatch.setattr(jail_backends, "_landlock", lambda *_: "not here")
    with make_manager({"code": {"use": "code_execution"}}, sandbox={"unsafe": True, "num_workers": 1}) as manager:
        assert manager.is_unsafe
        (line,) = manager.describe_services()
        assert line.startswith("code: sandbox: unsafe, ")
    assert not manager.is_unsafe
    refused = make_manager({"code": {"use": "code_execution"}})
    with pytest.raises(SandboxError, match="no backend holds on this machine"):
        refused.__enter__()
