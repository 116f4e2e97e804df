"""Plug-ins: kinds and signatures, processes that can be killed, and every way in which a user's function can misbehave."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vlpost.model.records import Example, Group, ImagePart, Message, Rollout, TextPart, VideoPart
from vlpost.rewards import RewardConfigError, RewardManager, RewardResult, RewardsConfig, WorkerError, reward
from vlpost.rewards.plugin_worker import decode_groups, encode_groups

HOSTILE = """
import ctypes, os, random, signal, sys, time
from vlpost.rewards import RewardResult, Unavailable, reward

HELD = []

def hostile(example, rollout, *, marker: str = ""):
    text = rollout.text
    if text == "hang":
        time.sleep(60)
    if text == "spin":
        while True:
            pass
    if text == "kill itself":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "crash":
        ctypes.string_at(0)
    if text == "leave":
        os._exit(0)
    if text == "garbage":
        for descriptor in range(3, 20):
            try:
                os.write(descriptor, b"\\x00\\x00\\x00\\x05hello, I am no JSON")
            except OSError:
                pass
        time.sleep(60)
    if text == "long garbage":
        for descriptor in range(3, 20):
            try:
                os.write(descriptor, b"\\xff" * 100)
            except OSError:
                pass
        time.sleep(60)
    if text == "close":
        os.closerange(3, 20)
        time.sleep(60)
    if text == "eat":
        while True:
            HELD.append(b"x" * 2**22)
            time.sleep(0.001)
    if text == "leak":
        HELD.append(b"x" * (300 * 2**20))
    if text == "print":
        print("garbage" * 1000, flush=True)
        os.write(1, b"\\x00\\x00\\x00\\x02{}")
        os.write(2, b"noise")
    if text == "forge":
        sys.stdout.write('{"value": 1}')
    if text == "start a child":
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    return {
        "raise": lambda: 1 / 0, "exit": lambda: sys.exit(3), "interrupt": lambda: exec("raise KeyboardInterrupt"),
        "none": lambda: None, "text": lambda: "1.0", "nan": lambda: float("nan"), "inf": lambda: float("inf"),
        "list": lambda: [1.0], "huge": lambda: 10**400, "recursion": lambda: (lambda f: f(f))(lambda f: f(f)),
        "stderr": lambda: sys.stderr.write("x") * 0.0, "pid": lambda: float(os.getpid()), "draw": lambda: random.random(),
        "down": lambda: Unavailable(reason="judge is down"),
        "metrics": lambda: RewardResult(value=2.0, note="n", metrics={"a": 1}),
    }.get(text, lambda: float(len(text)))()

def by_group(example, rollouts, *, short: bool = False):
    longest = max(len(rollout.text) for rollout in rollouts)
    if any(rollout.text == "raise" for rollout in rollouts):
        raise RuntimeError("no group")
    found = [len(rollout.text) / longest for rollout in rollouts]
    return found[1:] if short else [float("nan") if rollout.text == "nan" else one for rollout, one in zip(rollouts, found)]

def by_batch(groups):
    return [[float(len(groups))] * len(group.rollouts) for group in groups]

async def async_group(example, rollouts):
    return [float(len(rollouts)) for _ in rollouts]

async def blocking(example, rollout):
    if rollout.text == "block":
        time.sleep(1.5)
    return 1.0

def environment(example, rollout):
    return float(os.environ.get("VLPOST_TEST_NUMBER", "-1"))

def hashing(example, rollout):
    return float(hash("text") % 1000)

@reward(value_range=(0.0, 1.0))
def ranged(example, rollout):
    return 1.0 if rollout.text == "in" else 1.5

@reward(kind="group")
def named_otherwise(case, answers):
    return [0.5] * len(answers)

def trl_like(completions, **kwargs):
    if any(completion[0]["content"] == "raise" for completion in completions):
        raise RuntimeError("bad row")
    return [float(len(completion[0]["content"])) for completion in completions]

def pixels(example, rollout):
    image, video = rollout.media
    assert example.media == rollout.media
    assert image.image.getpixel((1, 0)) == (1, 2, 3), image.image.getpixel((1, 0))
    return float(video.frame_indices[-1] + len(video.frames) + video.fps)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "mine.py").write_text(HOSTILE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def make_manager(folder) -> Callable[..., RewardManager]:
    def make(function: str, *, timeout_s: float = 0.4, num_workers: int = 1, **component) -> RewardManager:
        config = {
            "components": {"it": {"use": f"mine.py:{function}", **component}},
            "max_unavailable_frac": 1.0,
            "timeout_s": timeout_s,
            "num_workers": num_workers,
        }
        return RewardManager(RewardsConfig.model_validate(config), recipe_folder=folder, allow_code=False)

    return make


@pytest.fixture(scope="module")
def hostile_rewards(make_manager):
    with make_manager("hostile", max_memory_mib=256) as rewards:
        yield rewards


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hang", "no verdict in 0.4 s"),
        ("spin", "no verdict in 0.4 s"),
        ("kill itself", "the process died by SIGKILL"),
        ("crash", "the process died by SIGSEGV"),
        ("leave", "the process died with exit status 0"),
        ("garbage", "its reply is garbage"),
        ("long garbage", "its reply is garbage: a frame of 4294967295 bytes"),
        ("close", "the process died or closed its pipe"),
        ("raise", "ZeroDivisionError: division by zero"),
        ("exit", "SystemExit: 3"),
        ("interrupt", "KeyboardInterrupt"),
        ("recursion", "RecursionError"),
        ("none", "the reward function returned a NoneType; it must return float, RewardResult or Unavailable"),
        ("text", "returned a str;"),
        ("nan", "must be a finite number"),
        ("inf", "must be a finite number"),
        ("list", "returned a list;"),
        ("huge", "OverflowError"),
        ("down", "judge is down"),
    ],
)
def test_a_hostile_call_costs_its_own_row_only(text, words, hostile_rewards, make_group):
    (group,) = hostile_rewards.score([make_group("1", "fine", text, "good")])
    assert [outcome.score.reward for outcome in group.judged] == [4.0, 4.0]
    (unjudged,) = group.unjudged
    assert unjudged.rollout.text == text
    assert words in unjudged.reasons["it"]


def test_a_call_that_eats_memory_is_ended_at_the_limit(make_manager, make_group):
    with make_manager("hostile", timeout_s=60.0, max_memory_mib=256) as rewards:
        (group,) = rewards.score([make_group("1", "fine", "eat", "good")])
    assert [outcome.score.reward for outcome in group.judged] == [4.0, 4.0]
    assert "its memory grew to" in group.unjudged[0].reasons["it"]


@pytest.mark.parametrize(("text", "value"), [("print", 5.0), ("forge", 5.0), ("stderr", 0.0), ("metrics", 2.0)])
def test_what_a_function_prints_goes_nowhere(text, value, hostile_rewards, make_group, capfd):
    (group,) = hostile_rewards.score([make_group("1", text, "fine")])
    assert [outcome.score.reward for outcome in group.judged] == [value, 4.0]
    assert capfd.readouterr() == ("", "")


def test_metrics_and_notes_come_back(hostile_rewards, make_group):
    (group,) = hostile_rewards.score([make_group("1", "metrics")])
    assert group.judged[0].score.results["it"] == RewardResult(value=2.0, note="n", metrics={"a": 1.0})


def test_a_process_that_has_grown_is_replaced_and_its_verdict_stands(make_manager, make_group, monkeypatch):
    monkeypatch.setattr("vlpost.rewards.plugin_worker.MEMORY_LOOK_S", 30.0)  # else a slow machine is caught in the act
    groups = [make_group("1", text, number=number) for number, text in enumerate(("pid", "leak", "pid"))]
    with make_manager("hostile", timeout_s=30.0, max_memory_mib=256) as rewards:
        before, grown, after = rewards.score(groups)
    assert grown.judged[0].score.reward == 4.0
    assert before.judged[0].score.reward != after.judged[0].score.reward


GOOD = st.sampled_from(["", "a", "fine", "draw", "metrics", "print"])
BAD = st.sampled_from(["raise", "nan", "text", "none", "exit", "kill itself"])


# A process that dies is started anew: a quarter of a second.
@settings(max_examples=8)
@given(groups=st.lists(st.lists(GOOD | BAD, min_size=1, max_size=4), min_size=1, max_size=3), seed=st.randoms(use_true_random=False))
def test_verdicts_do_not_depend_on_hostile_neighbours_or_order(groups, seed, hostile_rewards, make_group):
    made = [make_group("1", *texts, number=number) for number, texts in enumerate(groups)]
    alone = [hostile_rewards.score([group])[0] for group in made]
    order = list(range(len(made)))
    seed.shuffle(order)
    shuffled = hostile_rewards.score([made[index] for index in order])
    for index, scored in zip(order, shuffled, strict=True):
        assert scored.judged == alone[index].judged
        assert [unjudged.rollout for unjudged in scored.unjudged] == [unjudged.rollout for unjudged in alone[index].unjudged]


def test_a_function_that_draws_gives_the_same_in_every_process(make_manager, make_group):
    groups = [make_group("1", "draw", number=number) for number in range(4)]
    drawn = []
    for num_workers in (1, 2):
        with make_manager("hostile", num_workers=num_workers) as rewards:
            drawn.append([group.judged[0].score.reward for group in rewards.score(groups)])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 4


def test_string_hashes_do_not_depend_on_the_process(make_manager, make_group):
    found = set()
    for _ in range(2):
        with make_manager("hashing") as rewards:
            found.add(rewards.score([make_group("1", "a")])[0].judged[0].score.reward)
    assert len(found) == 1


def test_no_process_is_left(make_manager, make_group):
    with make_manager("hostile", num_workers=2) as rewards:
        (group,) = rewards.score([make_group("1", "pid", "start a child", "hang", "spin", "pid")])
        pids = {int(outcome.score.reward) for outcome in group.judged if outcome.rollout.text == "pid"}
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.killpg(pid, 0)


def test_processes_end_with_a_trainer_that_is_killed(folder):
    program = f"""
import os, sys
from pathlib import Path
from vlpost.model.records import Example, Group, Message, Rollout, TextPart
from vlpost.rewards import RewardManager, RewardsConfig
config = RewardsConfig.model_validate({{"components": {{"it": {{"use": "mine.py:hostile"}}}}, "timeout_s": 60}})
with RewardManager(config, recipe_folder=Path({str(folder)!r}), allow_code=False) as rewards:
    example = Example(id="a", messages=(Message(role="user", parts=(TextPart(text="?"),)),), answer="1", task="t", source="s")
    def score(text):
        ids = dict(token_ids=(1,), sampled=(True,), sampler_logprobs=(0.0,), media=(), policy_version=0)
        rollout = Rollout(text=text, prompt_suffix="", finish_reason="stop", **ids)
        return rewards.score([Group(example=example, rollouts=(rollout,))])[0].judged[0].score.reward
    print(int(score("pid")), flush=True)
    score("hang")
"""
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pid = int(trainer.stdout.readline())
    time.sleep(0.2)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        # In a container nobody may reap it: a zombie has ended too.
        if " Z " in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8"):
            return
        time.sleep(0.1)
    pytest.fail("the process of a killed trainer runs on")


def test_groups_are_judged_as_one(make_manager, make_group):
    with make_manager("by_group") as rewards:
        first, second = rewards.score([make_group("1", "a", "abcd"), make_group("1", "ab", number=1)])
        assert [outcome.score.reward for outcome in (*first.judged, *second.judged)] == [0.25, 1.0, 1.0]
        lost, partly = rewards.score([make_group("1", "a", "raise"), make_group("1", "nan", "abc", number=1)])
        assert [len(lost.judged), len(lost.unjudged)] == [0, 2]
        assert "RuntimeError: no group" in lost.unjudged[0].reasons["it"]
        assert [outcome.rollout.text for outcome in partly.judged] == ["abc"]


def test_a_list_of_the_wrong_length_is_unavailable(make_manager, make_group):
    with make_manager("by_group", options={"short": True}) as rewards:
        (group,) = rewards.score([make_group("1", "a", "b")])
    assert "the reward function returned 1 values for 2 rollouts" in group.unjudged[0].reasons["it"]


def test_batches_and_async_groups(make_manager, make_group):
    groups = [make_group("1", "a", "b"), make_group("1", "c", number=1)]
    with make_manager("by_batch") as rewards:
        assert [outcome.score.reward for group in rewards.score(groups) for outcome in group.judged] == [2.0, 2.0, 2.0]
        assert rewards.score([]) == []
    with make_manager("async_group") as rewards:
        assert [outcome.score.reward for group in rewards.score(groups) for outcome in group.judged] == [2.0, 2.0, 1.0]


def test_an_async_function_that_blocks_the_loop_costs_its_own_row_only(make_manager, make_group, monkeypatch):
    monkeypatch.setattr("vlpost.rewards.component.BLOCKED_GRACE_S", 0.1)
    with make_manager("blocking", timeout_s=0.3) as rewards:
        (group,) = rewards.score([make_group("1", "a", "block", "b")])
        assert [outcome.rollout.text for outcome in group.judged] == ["a", "b"]
        assert "waits without `await`, which blocks all others" in group.unjudged[0].reasons["it"]
        assert len(rewards.score([make_group("1", "a")])[0].judged) == 1


def test_a_bad_row_of_a_trl_function_costs_no_neighbour(make_manager, make_group):
    with make_manager("trl_like") as rewards:
        (group,) = rewards.score([make_group("1", "a", "raise", "abc")])
        assert [outcome.score.reward for outcome in group.judged] == [1.0, 3.0]
        note = group.judged[0].score.results["it"].note
        assert note == "judged alone, since the call on the whole group failed: RuntimeError: bad row"
        assert "RuntimeError: bad row" in group.unjudged[0].reasons["it"]


def test_a_value_outside_the_stated_range_is_unavailable(make_manager, make_group):
    with make_manager("ranged") as rewards:
        (group,) = rewards.score([make_group("1", "in", "out")])
        assert rewards.full_values == {"it": 1.0}
    assert group.judged[0].score.reward == 1.0
    assert group.unjudged[0].reasons["it"] == "the reward function returned 1.5, outside its own range of 0 to 1"


def test_the_decorator_says_the_kind_where_names_do_not(make_manager, make_group):
    with make_manager("named_otherwise") as rewards:
        assert rewards.score([make_group("1", "a", "b")])[0].judged[1].score.reward == 0.5


def test_the_environment_goes_along(make_manager, make_group, monkeypatch):
    monkeypatch.setenv("VLPOST_TEST_NUMBER", "17")
    with make_manager("environment") as rewards:
        assert rewards.score([make_group("1", "a")])[0].judged[0].score.reward == 17.0


@pytest.fixture
def seen_group() -> Group:
    image = Image.new("RGB", (4, 3))
    image.putpixel((1, 0), (1, 2, 3))
    video = VideoPart.from_frames([image, Image.new("RGB", (4, 3), "blue")], fps=2.5, frame_indices=(0, 30))
    part = ImagePart.from_image(image)
    messages = (Message(role="user", parts=(part, video, TextPart(text="half a pair \ud800"))), Message(role="assistant", parts=()))
    example = Example(id="a", messages=messages, answer="1", task="t", source="s", metadata={"key": [1, None, {"deep": 0.5}]})
    rollout = Rollout(
        token_ids=(1, 2),
        sampled=(False, True),
        sampler_logprobs=(0.0, float("-inf")),
        media=(part, video),
        text="x",
        prompt_suffix="<think>",
        finish_reason="length",
        policy_version=3,
    )
    return Group(example=example, rollouts=(rollout, rollout))


def test_rows_arrive_as_they_were_sent(seen_group):
    encoded, media, blobs = encode_groups([seen_group, seen_group])
    assert len(media) == len(blobs) == 2, "each image crosses once"
    first, second = decode_groups(encoded, media, blobs)
    assert first == second == seen_group
    image, video = first.rollouts[0].media
    assert isinstance(image, ImagePart)
    assert isinstance(video, VideoPart)
    assert ImagePart.from_image(image.image) == image
    assert VideoPart.from_frames(video.frames, fps=video.fps, frame_indices=video.frame_indices) == video


def test_a_function_sees_images_and_videos(make_manager, seen_group):
    with make_manager("pixels") as rewards:
        assert rewards.score([seen_group])[0].judged[0].score.reward == 30 + 2 + 2.5


def test_metadata_that_is_no_json_is_said(make_manager, make_group):
    group = make_group("1", "a")
    odd = Example(id="a", messages=group.example.messages, answer="1", task="t", source="s", metadata={"key": object()})
    with make_manager("hostile") as rewards:
        (scored,) = rewards.score([Group(example=odd, rollouts=group.rollouts)])
    assert "cannot be sent to the reward's process" in scored.unjudged[0].reasons["it"]


def test_without_isolation_it_runs_here_and_says_so(make_manager, make_group):
    with make_manager("hostile", isolate=False) as rewards:
        (group,) = rewards.score([make_group("1", "pid", "exit", "fine")])
        (line,) = rewards.describe()
    assert [outcome.score.reward for outcome in group.judged] == [float(os.getpid()), 4.0]
    assert "SystemExit: 3" in group.unjudged[0].reasons["it"]
    assert line.endswith(", in the trainer's process without a deadline")


def test_a_deadline_of_ones_own(make_manager, make_group):
    with make_manager(
        "hostile",
        timeout_s=30.0,
    ) as rewards:
        assert len(rewards.score([make_group("1", "fine")])[0].judged) == 1
    config = {"components": {"it": {"use": "mine.py:hostile", "timeout_s": 0.2}}, "max_unavailable_frac": 1.0, "timeout_s": 30.0}
    with RewardManager(RewardsConfig.model_validate(config), recipe_folder=_folder_of(make_manager), allow_code=False) as rewards:
        assert rewards.score([make_group("1", "hang")])[0].unjudged[0].reasons["it"] == "no verdict in 0.2 s"


def _folder_of(make_manager) -> Path:
    return next(cell.cell_contents for cell in make_manager.__closure__ if isinstance(cell.cell_contents, Path))


@pytest.mark.parametrize(
    ("component", "words"),
    [
        ({"use": "count", "isolate": False}, "isolate = False is for plug-ins that are no async"),
        ({"use": "mine.py:blocking", "isolate": True}, "isolate = True is for plug-ins that are no async"),
        ({"use": "count", "timeout_s": 1.0}, "timeout_s = 1.0 is for what may take long; this built-in always ends soon"),
        ({"use": "mine.py:hostile", "isolate": False, "timeout_s": 1.0}, "timeout_s = 1.0 cannot end a function in the trainer's process"),
        ({"use": "mine.py:hostile", "isolate": False, "max_memory_mib": 100}, "max_memory_mib = 100 is for plug-ins in a process of their"),
        ({"use": "mine.py:hostile", "completions": "text"}, "completions = 'text' is for functions with trl's signature"),
    ],
)
def test_a_setting_that_cannot_take_effect_is_refused(component, words, folder):
    config = RewardsConfig.model_validate({"components": {"it": component}})
    with pytest.raises(RewardConfigError, match=rf"rewards\.components\.it: {words}"):
        RewardManager(config, recipe_folder=folder, allow_code=False)


def test_the_very_source_that_was_checked_is_what_runs(folder, make_group, tmp_path):
    (tmp_path / "changing.py").write_text("def f(example, rollout):\n    return 1.0\n", encoding="utf-8")
    config = RewardsConfig.model_validate({"components": {"it": {"use": "changing.py:f"}}})
    rewards = RewardManager(config, recipe_folder=tmp_path, allow_code=False)
    (tmp_path / "changing.py").write_text("def f(example, rollout):\n    return 2.0\n", encoding="utf-8")
    with rewards:
        assert rewards.score([make_group("1", "a")])[0].judged[0].score.reward == 1.0


def test_an_installed_module_that_changed_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "installed_reward.py").write_text("def f(example, rollout):\n    return 1.0\n", encoding="utf-8")
    config = RewardsConfig.model_validate({"components": {"it": {"use": "installed_reward:f"}}})
    rewards = RewardManager(config, recipe_folder=None, allow_code=False)
    (tmp_path / "installed_reward.py").write_text("def f(example, rollout):\n    return 2.0\n", encoding="utf-8")
    with pytest.raises(WorkerError, match="is not the file that was checked when the run started"), rewards:
        pass
    del sys.modules["installed_reward"]


def test_a_module_that_fails_in_its_process_says_what_it_wrote(tmp_path):
    fault = "import os, sys\nif 'pytest' not in sys.modules:\n    print('no licence', flush=True)\n    os._exit(7)\n"
    source = f"{fault}def f(example, rollout):\n    return 1.0\n"
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    config = RewardsConfig.model_validate({"components": {"it": {"use": "mine.py:f"}}})
    rewards = RewardManager(config, recipe_folder=tmp_path, allow_code=False)
    with pytest.raises(WorkerError, match=r"did not start \(the process died with exit status 7\); it wrote:\nno licence"), rewards:
        pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"value_range": (1.0, 0.0)}, "the first number must be below the second"),
        ({"kind": "group", "cacheable": True}, "what depends on other rollouts cannot be looked up"),
    ],
)
def test_promises_that_cannot_be_kept_are_refused(options, words):
    with pytest.raises(RewardConfigError, match=words):
        reward(**options)
