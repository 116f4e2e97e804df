"""Verdicts on disk: kept, found again, never wrong, and never a reason for a run to stop."""

import logging
import sqlite3
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vlpost.model.records import Example, ImagePart, Message, Rollout, TextPart
from vlpost.rewards import RewardManager, RewardsConfig, VerdictCache, group_outcomes, summarise
from vlpost.rewards.cache import verdict_key
from vlpost.rewards.manager import CACHE_FILE


def test_what_was_put_is_found_by_another_process_too(tmp_path):
    with VerdictCache(tmp_path / "new folder" / "cache") as cache:
        assert cache.get("a") is None
        cache.put("a", {"value": 1.5, "note": "½ \ud83d", "metrics": {}})
        cache.put("a", {"value": 2.5})
        cache.put("b", {"value": 3})
        program = (
            "from pathlib import Path\nfrom vlpost.rewards import VerdictCache\n"
            f"cache = VerdictCache(Path({str(tmp_path)!r}) / 'new folder' / 'cache')\nprint(cache.get('a'))\ncache.put('c', {{}})\n"
        )
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert run.stdout == "{'value': 2.5}\n"
        assert [cache.get("a"), cache.get("b"), cache.get("c")] == [{"value": 2.5}, {"value": 3}, {}]


SCALARS = st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(value=st.dictionaries(st.text(max_size=5), SCALARS, max_size=4))
def test_values_come_back_as_they_were(value, tmp_path_factory):
    with VerdictCache(tmp_path_factory.getbasetemp() / "values") as cache:
        cache.put("k", value)
        assert cache.get("k") == value


@pytest.mark.parametrize("value", [{"value": float("nan")}, {"value": float("inf")}])
def test_what_is_no_json_is_refused(value, tmp_path):
    with VerdictCache(tmp_path / "cache") as cache, pytest.raises(ValueError, match="not JSON compliant"):
        cache.put("k", value)


@pytest.mark.parametrize("content", [b"no database at all, " * 100, b"SQLite format 3\x00" + b"\xff" * 5000])
def test_a_corrupt_file_is_moved_aside(content, tmp_path, caplog):
    (tmp_path / "cache").write_bytes(content)
    with VerdictCache(tmp_path / "cache") as cache:
        assert cache.get("a") is None
        cache.put("a", {"value": 1.0})
        assert cache.get("a") == {"value": 1.0}
    (aside,) = tmp_path.glob("cache.corrupt-*")
    assert aside.read_bytes() == content
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "is corrupt" in record.getMessage()


def test_a_file_that_breaks_while_it_is_used_is_moved_aside(tmp_path, caplog):
    with VerdictCache(tmp_path / "cache") as cache:
        for number in range(500):
            cache.put(str(number), {"note": "x" * 1000})
        cache.close()
        content = bytearray((tmp_path / "cache").read_bytes())
        content[4096 : len(content)] = b"\xaa" * (len(content) - 4096)
        (tmp_path / "cache").write_bytes(content)
        assert [cache.get(str(number)) for number in range(500)] == [None] * 500
        cache.put("a", {"value": 1.0})
        assert cache.get("a") == {"value": 1.0}
    assert "corrupt" in caplog.text


def test_a_place_that_cannot_be_written_ends_the_caching_with_one_line(tmp_path, caplog):
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "file" / "cache", tmp_path / "folder"):
        caplog.clear()
        with VerdictCache(place) as cache:
            cache.put("a", {"value": 1.0})
            assert cache.get("a") is None
        (record,) = caplog.records
        assert "cannot be used" in record.getMessage()


@pytest.mark.parametrize("text", ["[1]", "{", "null", "\x00", "[" * 100_000])
def test_a_value_that_somebody_else_wrote_is_no_value(text, tmp_path):
    with VerdictCache(tmp_path / "cache") as cache:
        cache.put("a", {})
        with sqlite3.connect(tmp_path / "cache") as other:
            other.execute("UPDATE verdicts SET value = ?", (text,))
        other.close()
        assert cache.get("a") is None


def test_threads_and_connections_share_one_file(tmp_path):
    caches = [VerdictCache(tmp_path / "cache") for _ in range(2)]

    def work(cache, start):
        for number in range(start, start + 50):
            cache.put(str(number), {"value": number})
            assert cache.get(str(number)) == {"value": number}

    threads = [threading.Thread(target=work, args=(caches[number % 2], 40 * number)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [caches[0].get(str(number)) for number in range(170)] == [{"value": number} for number in range(170)]
    for cache in caches:
        cache.close()


# ---------------------------------------------------------------- keys

BASE = {"text": "1", "prompt_suffix": "", "finish_reason": "stop"}


def key(*, judge=None, color="red", answer="1", metadata=None, prompt="?", task="t", source="s", **rollout):
    part = ImagePart.from_image(Image.new("RGB", (2, 2), color))
    messages = (Message(role="user", parts=(part, TextPart(text=prompt))),)
    example = Example(id="a", messages=messages, answer=answer, task=task, source=source, metadata=metadata or {})
    ids = rollout.pop("token_ids", (1,))
    made = Rollout(
        token_ids=ids,
        sampled=(True,) * len(ids),
        sampler_logprobs=(0.0,) * len(ids),
        media=(part,),
        policy_version=rollout.pop("policy_version", 0),
        **{**BASE, **rollout},
    )
    return verdict_key(example, made, judge=judge or {"use": "x", "version": 1, "options": {}})


def test_a_key_depends_on_all_that_a_verdict_may_depend_on():
    changes = [
        {},
        {"judge": {"use": "y", "version": 1, "options": {}}},
        {"judge": {"use": "x", "version": 2, "options": {}}},
        {"judge": {"use": "x", "version": 1, "options": {"a": 1}}},
        {"color": "blue"},
        {"answer": "2"},
        {"metadata": {"a": 1}},
        {"prompt": "!"},
        {"task": "u"},
        {"source": "r"},
        {"text": "2"},
        {"text": "\ud800"},
        {"prompt_suffix": "<think>"},
        {"finish_reason": "length"},
    ]
    keys = [key(**change) for change in changes]
    assert len(set(keys)) == len(changes)
    assert keys[0] == key(token_ids=(5, 6), policy_version=9)
    assert len(keys[0]) == 64


# ---------------------------------------------------------------- through the manager

PLUG_IN = """
import os
from pathlib import Path
from vlpost.rewards import RewardResult, Unavailable, reward

def count(example):
    with open(example.metadata["tally"], "a") as tally:
        tally.write("x")

@reward(cacheable=True)
def kept(example, rollout, *, scale: float = 1.0):
    count(example)
    if rollout.text == "down":
        return Unavailable(reason="down")
    return RewardResult(value=scale * len(rollout.text), note="n", metrics={"m": 1.0})

def asked(example, rollout):
    count(example)
    return 1.0

@reward(cacheable=True)
def grouped(example, rollouts):
    return [0.0] * len(rollouts)
"""


@pytest.fixture
def score(tmp_path, make_group):
    (tmp_path / "mine.py").write_text(PLUG_IN, encoding="utf-8")
    tally = tmp_path / "tally"

    def run(*texts, use="mine.py:kept", cache=True, cache_folder=tmp_path / "out", **component):
        tally.write_text("", encoding="utf-8")
        config = RewardsConfig.model_validate(
            {"components": {"it": {"use": use, **component}}, "max_unavailable_frac": 1.0, "cache": cache}
        )
        group = make_group("1", *texts)
        group.example.metadata["tally"] = str(tally)
        with RewardManager(config, recipe_folder=tmp_path, allow_code=False, cache_folder=cache_folder) as rewards:
            (scored,) = rewards.score([group])
        return scored, len(tally.read_text(encoding="utf-8"))

    return run


def test_a_second_run_judges_nothing_and_says_the_same(score):
    first, calls = score("a", "abc", "a")
    second, calls_again = score("abc", "a", "abcd")
    assert (calls, calls_again) == (3, 1)
    assert second.judged[0].score == first.judged[1].score
    assert second.judged[1].score == first.judged[0].score
    summary = summarise(group_outcomes([second]))
    assert (summary.components["it"].num_judged, summary.components["it"].num_cached) == (3, 2)
    assert summary.metrics()["time/reward/it_cached"] == 2.0


def test_unavailable_is_never_kept(score):
    assert score("down")[1] == 1
    scored, calls = score("down")
    assert calls == 1
    assert scored.unjudged[0].reasons == {"it": "down"}


def test_other_options_or_another_source_are_another_verdict(score, tmp_path):
    score("abc")
    scored, calls = score("abc", options={"scale": 2.0})
    assert (scored.judged[0].score.reward, calls) == (6.0, 1)
    (tmp_path / "mine.py").write_text(PLUG_IN + "\n# changed\n", encoding="utf-8")
    assert score("abc")[1] == 1


@pytest.mark.parametrize("off", [{"cache": False}, {"cache_folder": None}, {"use": "mine.py:asked"}])
def test_without_a_promise_a_folder_or_leave_nothing_is_kept(off, score, tmp_path):
    assert score("abc", **off)[1] == 1
    assert score("abc", **off)[1] == 1
    assert not (tmp_path / "out" / CACHE_FILE).exists()


def test_a_group_function_cannot_be_cacheable(score):
    with pytest.raises(ValueError, match="what depends on other rollouts cannot be looked up"):
        score("abc", use="mine.py:grouped")


def test_a_verdict_that_somebody_bent_is_judged_again(score, tmp_path):
    score("abc")
    with sqlite3.connect(tmp_path / "out" / CACHE_FILE) as other:
        other.execute("""UPDATE verdicts SET value = '{"value": "1", "note": "", "metrics": {}}'""")
    other.close()
    scored, calls = score("abc")
    assert (scored.judged[0].score.reward, calls) == (3.0, 1)
