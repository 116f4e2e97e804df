"""The reward manager: sums, routing, and every way in which a reward function can misbehave."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from vlpost.model.records import DataError
from vlpost.rewards import (
    RewardConfigError,
    RewardManager,
    RewardResult,
    RewardsConfig,
    RewardUnavailableError,
    RolloutScore,
    Unavailable,
    UnjudgedRollout,
    group_outcomes,
    summarise,
)

PLUG_IN = """
import asyncio, sys
from vlpost.rewards import RewardResult, Unavailable

def length(example, rollout, *, scale: float = 1.0):
    return RewardResult(value=scale * len(rollout.text), note=rollout.text, metrics={"chars": len(rollout.text)})

def misbehave(example, rollout):
    return {
        "raise": lambda: 1 / 0, "leave": lambda: sys.exit(3), "none": lambda: None, "text": lambda: "1.0", "nan": lambda: float("nan"),
        "inf": lambda: float("inf"), "true": lambda: True, "list": lambda: [1.0], "huge": lambda: 1e300, "big": lambda: 10**400,
        "result": lambda: RewardResult(value=float("nan")), "down": lambda: Unavailable(reason="judge is down"),
    }.get(rollout.text, lambda: 1.0)()

async def slowly(example, rollout):
    if rollout.text == "hang":
        await asyncio.Event().wait()
    if rollout.text == "cancel":
        raise asyncio.CancelledError
    if rollout.text == "own timeout":
        raise TimeoutError("the server is slow")
    await asyncio.sleep(0.001)
    return float(len(rollout.text))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "mine.py").write_text(PLUG_IN)
    return folder


@pytest.fixture(scope="module")
def make_manager(folder):
    def make(components, **settings) -> RewardManager:
        config = RewardsConfig.model_validate({"components": components, **settings})
        return RewardManager(config, recipe_folder=folder, allow_code=False)

    return make


@pytest.fixture(scope="module")
def length_rewards(make_manager):
    components = {
        "length": {"use": "mine.py:length", "weight": 0.25, "options": {"scale": 2.0}},
        "slowly": {"use": "mine.py:slowly", "weight": -1.0, "tasks": ["slow", "both"]},
        "count": {"use": "count", "tasks": ["count", "both"]},
        "faulty": {"use": "mine.py:misbehave", "tasks": ["faulty", "both"]},
    }
    with make_manager(components, max_unavailable_frac=1.0, timeout_s=0.5) as rewards:
        yield rewards


def test_reward_is_the_weighted_sum_over_the_components_of_the_task(length_rewards, make_group):
    add, slow, both = length_rewards.score(
        [make_group("1", "abcd"), make_group("1", "abcd", task="slow"), make_group("4", "4", "four!", task="both")]
    )
    assert add.judged[0].score == RolloutScore(reward=2.0, results={"length": RewardResult(value=8.0, note="abcd", metrics={"chars": 4})})
    assert slow.judged[0].score.reward == 0.25 * 8.0 - 4.0
    assert [judged.score.reward for judged in both.judged] == [0.5 - 1.0 + 1.0 + 1.0, 2.5 - 5.0 + 0.0 + 1.0]
    assert list(both.judged[0].score.results) == ["length", "slowly", "count", "faulty"]
    assert set(both.judged[0].score.judging_s) == {"length", "slowly", "count", "faulty"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise", "ZeroDivisionError: division by zero"),
        ("leave", "SystemExit: 3"),
        ("none", "the reward function returned a NoneType; it must return float, RewardResult or Unavailable"),
        ("text", "returned a str;"),
        ("true", "returned a bool;"),
        ("list", "returned a list;"),
        ("nan", "must be a finite number"),
        ("inf", "must be a finite number"),
        ("result", "RewardResult value = nan: must be a finite number; return Unavailable"),
        ("big", "OverflowError"),
        ("huge", "weight x value = 1 x 1e+300; at most 1e+100"),
        ("down", "judge is down"),
    ],
)
def test_a_function_that_misbehaves_makes_its_rollout_unavailable_and_no_other(text, words, length_rewards, make_group):
    (group,) = length_rewards.score([make_group("1", "fine", text, "fine", task="faulty")])
    assert [judged.rollout.text for judged in group.judged] == ["fine", "fine"]
    (unjudged,) = group.unjudged
    assert unjudged.rollout.text == text
    assert list(unjudged.reasons) == ["faulty"]
    assert words in unjudged.reasons["faulty"]


def test_the_reason_of_an_exception_shows_where_it_was_raised(length_rewards, make_group):
    (group,) = length_rewards.score([make_group("1", "raise", task="faulty")])
    assert "mine.py" in group.unjudged[0].reasons["faulty"]
    assert "in misbehave" in group.unjudged[0].reasons["faulty"]


def test_async_functions_have_a_deadline_and_run_together(length_rewards, make_group):
    texts = ["x" * (1 + number % 7) for number in range(200)]
    (group,) = length_rewards.score([make_group("1", "hang", *texts, "cancel", "own timeout", task="slow")])
    assert [judged.score.results["slowly"].value for judged in group.judged] == [float(len(text)) for text in texts]
    hang, cancel, own = (unjudged.reasons["slowly"] for unjudged in group.unjudged)
    assert hang == "no verdict in 0.5 s"
    assert "CancelledError" in cancel
    assert own.endswith("TimeoutError: the server is slow")


def test_score_works_inside_a_running_event_loop(length_rewards, make_group):
    import asyncio

    async def notebook_cell():
        return length_rewards.score([make_group("1", "abc", task="slow")])

    assert asyncio.run(notebook_cell())[0].judged[0].score.reward == 0.25 * 6 - 3.0


@given(
    cases=st.lists(
        st.tuples(
            st.sampled_from(["add", "slow", "count", "both", "faulty"]),
            st.lists(st.sampled_from(["3", "three", "raise", "nan", "", "<think>3", "\\boxed{3}"]), min_size=1, max_size=4),
        ),
        max_size=5,
    ),
    seed=st.randoms(use_true_random=False),
)
def test_results_do_not_depend_on_order_or_neighbours(cases, seed, length_rewards, make_group):
    groups = [make_group("3", *texts, task=task, number=number) for number, (task, texts) in enumerate(cases)]
    order = list(range(len(groups)))
    seed.shuffle(order)
    together = length_rewards.score(groups)
    shuffled = length_rewards.score([groups[index] for index in order])
    alone = [length_rewards.score([group])[0] for group in groups]
    assert together == alone
    assert shuffled == [together[index] for index in order]
    for group, scored in zip(groups, together, strict=True):
        assert scored.example is group.example
        is_faulty = group.example.task in ("faulty", "both")
        lost = [rollout for rollout in group.rollouts if is_faulty and rollout.text in ("raise", "nan")]
        kept = [rollout for rollout in group.rollouts if rollout not in lost]
        assert [unjudged.rollout for unjudged in scored.unjudged] == lost
        assert [judged.rollout for judged in scored.judged] == kept


FAULTY = {"judge": {"use": "mine.py:misbehave", "tasks": ["add", "faulty"]}}


def test_drop_rollout_keeps_the_rest_and_drop_group_does_not(make_manager, make_group):
    groups = [make_group("1", "fine", "down"), make_group("1", "fine", "fine", number=1)]
    with make_manager(FAULTY, max_unavailable_frac=0.25) as rewards:
        first, second = rewards.score(groups)
        assert (len(first.judged), len(first.unjudged), len(second.judged)) == (1, 1, 2)
    with make_manager(FAULTY, max_unavailable_frac=0.25, on_unavailable="drop_group") as rewards:
        first, second = rewards.score(groups)
    assert first.judged == ()
    assert first.unjudged == (
        UnjudgedRollout(rollout=groups[0].rollouts[0], reasons={}),
        UnjudgedRollout(rollout=groups[0].rollouts[1], reasons={"judge": "judge is down"}),
    )
    assert len(second.judged) == 2
    summary = summarise(group_outcomes([first, second]))
    assert (summary.num_rollouts, summary.num_unavailable, summary.num_dropped, summary.reward_mean) == (4, 1, 1, 1.0)


def test_too_many_unavailable_stop_the_run_and_say_why(make_manager, make_group):
    groups = [make_group("1", "fine", "down", "fine"), make_group("1", "down", "none", number=1)]
    with make_manager(FAULTY, max_unavailable_frac=0.5) as rewards, pytest.raises(RewardUnavailableError) as caught:
        rewards.score(groups)
    assert str(caught.value) == (
        "3 of 5 rollouts could not be judged (rewards.max_unavailable_frac: 0.5); mend the component, then resume:\n"
        "  judge: 2 x judge is down\n"
        "  judge: 1 x the reward function returned a NoneType; it must return float, RewardResult or Unavailable"
    )
    with make_manager(FAULTY, max_unavailable_frac=0.6) as rewards:
        assert sum(len(group.unjudged) for group in rewards.score(groups)) == 3


def test_stop_stops_at_the_first(make_manager, make_group):
    with make_manager(FAULTY, on_unavailable="stop") as rewards:
        assert len(rewards.score([make_group("1", *["fine"] * 9)])[0].judged) == 9
        with pytest.raises(RewardUnavailableError, match=r"1 of 10 rollouts could not be judged \(rewards.on_unavailable: stop\)"):
            rewards.score([make_group("1", *["fine"] * 9, "down")])


def test_an_example_that_no_component_judges_is_an_error(make_manager, make_example, make_group):
    words = r"example 'fualty-0': no reward component judges its task 'fualty' \(did you mean 'faulty'\?\); judged are add, faulty"
    with make_manager(FAULTY) as rewards:
        with pytest.raises(DataError, match=words):
            rewards.check_examples([make_example(task="fualty")])
        with pytest.raises(DataError, match=words):
            rewards.score([make_group("1", "fine", task="fualty")])


def test_answers_are_checked_by_the_components_of_their_task_only(make_manager, make_example):
    with make_manager({"count": {"use": "count", "tasks": ["count"]}, "exact": {"use": "exact", "tasks": ["read"]}}) as rewards:
        assert rewards.check_examples([make_example("3", task="count"), make_example("red", task="read")]) == 2
        with pytest.raises(DataError, match="example 'count-5': answer 'red' is no whole number"):
            rewards.check_examples([make_example("red", task="count", number=5)])


def test_describe_names_source_and_hash(length_rewards, folder):
    length, slowly, count, _faulty = length_rewards.describe()
    assert length.startswith(f"length: 0.25 x mine.py:length ({folder.resolve() / 'mine.py'}, sha256 ")
    assert length.endswith("), all tasks, options {'scale': 2.0}")
    assert slowly.endswith("tasks slow, both, options default")
    assert count == "count: 1 x count, tasks count, both, options default"


def test_a_component_that_cannot_be_resolved_is_named(make_manager):
    with pytest.raises(RewardConfigError, match=r"rewards.components.mine: unknown reward 'cuont' \(did you mean 'count'\?\)"):
        make_manager({"mine": {"use": "cuont"}})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"components": {}}, "at least 1 item"),
        ({"components": {"a": {"use": "count", "wieght": 2}}}, "wieght"),
        ({"components": {"a": {"use": "count", "tasks": []}}}, "at least 1 item"),
        ({"components": {"a": {"use": "count", "weight": float("nan")}}}, "finite"),
        ({"components": {"a": {"use": "count"}}, "max_unavailable_frac": 1.5}, "less than or equal to 1"),
        ({"components": {"a": {"use": "count"}}, "num_workers": 0}, "greater than or equal to 1"),
        ({"components": {"a": {"use": "count"}}, "timeout_s": 0}, "greater than 0"),
        ({"components": {"a": {"use": "count"}}, "on_unavailable": "zero"}, "drop_rollout"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(ValidationError, match=words):
        RewardsConfig.model_validate(settings)


def test_summary_by_component(length_rewards, make_group):
    summary = summarise(group_outcomes(length_rewards.score([make_group("4", "4", "four", "raise", task="both"), make_group("4", "abc")])))
    assert (summary.num_rollouts, summary.num_unavailable, summary.num_dropped) == (4, 1, 0)
    assert summary.reward_mean == pytest.approx(((0.5 - 1 + 1 + 1) + (2.0 - 4 + 1 + 1) + 1.5) / 3)
    assert {name: (part.num_judged, part.num_unavailable, part.mean) for name, part in summary.components.items()} == {
        "length": (3, 0, pytest.approx(16 / 3)),
        "slowly": (2, 0, 2.5),
        "count": (2, 0, 1.0),
        "faulty": (2, 1, 1.0),
    }
    numbers = summary.metrics()
    assert numbers["unavailable_frac"] == 0.25
    assert numbers["reward/length/metrics/chars"] == pytest.approx(8 / 3)
    assert numbers["reward/faulty/unavailable"] == 1.0
    assert numbers["time/reward/slowly_s"] > 0.0


def test_summary_of_nothing_has_no_means():
    assert summarise([]).metrics() == {"unavailable_frac": 0.0, "dropped_frac": 0.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True])
def test_a_result_is_a_finite_number(value):
    with pytest.raises(ValueError, match="must be a finite number"):
        RewardResult(value=value)
    with pytest.raises(ValueError, match="RewardResult tokens"):
        RewardResult(value=1.0, metrics={"tokens": value})


def test_unavailable_is_no_number():
    with pytest.raises(TypeError):
        float(Unavailable(reason="down"))  # pyright: ignore[reportArgumentType]


def test_import_is_light():
    heavy = ("torch", "transformers", "vllm", "math_verify", "sympy", "numpy", "yaml", "vlpost.rewards.registry")
    program = f"import sys, vlpost.rewards; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=os.sep)
    assert run.stdout.strip() == "[]"
