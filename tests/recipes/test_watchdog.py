"""No silent hang: eight ways to hang, each ends the process with the stacks of all threads."""

import faulthandler
import json
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from vlpost.recipes import watchdog as watchdog_module
from vlpost.recipes.schema import WatchdogConfig
from vlpost.recipes.watchdog import EXIT_HUNG, GRACE_S, Watchdog

PROGRAM = """
import queue, re, select, socket, subprocess, sys, threading, time
from pathlib import Path
from vlpost.recipes import watchdog
from vlpost.recipes.watchdog import Watchdog

watchdog.GRACE_S = 1.0

def asleep():
    time.sleep(600)

def waiting_for_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def waiting_for_a_queue():
    queue.Queue().get()

def waiting_for_a_connection():
    server = socket.create_server(("127.0.0.1", 0))
    server.accept()

def waiting_for_a_process():
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    process.wait()

def waiting_for_a_thread():
    thread = threading.Thread(target=asleep, daemon=True)
    thread.start()
    thread.join()

def in_a_loop():
    while True:
        pass

def in_c_code_that_keeps_the_lock():
    re.match("(a+)+$", "a" * 64 + "b")

with Watchdog(Path(sys.argv[1]), rank=3, gauges=lambda: {"rollouts waiting": 7}) as dog:
    with dog.phase("update", place="sft, after step 4", limit_s=60.0), dog.phase("save", place="sft, after step 5", limit_s=0.3):
        print("hanging", flush=True)
        globals()[sys.argv[2]]()
"""
PLACES = (
    "asleep",
    "waiting_for_a_lock",
    "waiting_for_a_queue",
    "waiting_for_a_connection",
    "waiting_for_a_process",
    "waiting_for_a_thread",
    "in_a_loop",
)


def hang(folder, place):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), place], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def hung(tmp_path_factory):
    """All hangs at a time: {place: (folder, exit status, standard error)}."""
    folders = {place: tmp_path_factory.mktemp(place) for place in (*PLACES, "in_c_code_that_keeps_the_lock")}
    processes = {place: hang(folder, place) for place, folder in folders.items()}
    try:
        ends = {place: process.communicate(timeout=60) for place, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    for place, (said, _) in ends.items():
        assert said == "hanging\n", ends[place]
    return {place: (folders[place], processes[place].returncode, ends[place][1]) for place in folders}


@pytest.mark.parametrize("place", PLACES)
def test_a_hang_ends_with_the_stacks_of_all_threads(hung, place):
    folder, status, said = hung[place]
    assert status == EXIT_HUNG
    stacks = (folder / "stacks-rank3.txt").read_text()
    for text in (said, stacks):
        assert "sft, after step 5: hung: save has taken longer than its 0.3 s" in text
        assert "rank 3; the process ends with status 124; go on with --resume" in text
        assert f"in {place}\n" in text, "the place where it hangs is not named"
        assert "in _watch" in text, "the other threads are missing"
        assert "rollouts waiting: 7" in text
    assert (folder / "phase-rank3.txt").read_text() == "save (sft, after step 5)\nupdate (sft, after step 4)\n"


def test_c_code_that_keeps_the_interpreter_s_lock_ends_by_the_timer_that_needs_none(hung, tmp_path):
    folder, status, _ = hung["in_c_code_that_keeps_the_lock"]
    assert status == 1
    written = (folder / "phase-rank3.txt").read_text()
    assert written.startswith("save (sft, after step 5)\nupdate (sft, after step 4)\n")
    assert "in in_c_code_that_keeps_the_lock\n" in written
    with Watchdog(folder, rank=3):
        assert (folder / "stacks-rank3.txt").read_text() == written, "the next run must not lose the stacks"


def test_eight_places_are_tried(hung):
    assert len(hung) == 8


# ---------------------------------------------------------------- inside this process


@pytest.fixture
def timers(monkeypatch):
    """Records faulthandler's timers in place of setting them, and the ends in place of ending this process."""
    set_timers = []
    recorder = SimpleNamespace(
        dump_traceback_later=lambda seconds, exit, file: set_timers.append(seconds),
        cancel_dump_traceback_later=lambda: set_timers.append(None),
        dump_traceback=faulthandler.dump_traceback,
    )
    monkeypatch.setattr(watchdog_module, "faulthandler", recorder)
    return set_timers


def test_phases_in_time_leave_nothing_behind(tmp_path, timers):
    with Watchdog(tmp_path) as dog:
        with dog.phase("rollout", place="rl, after step 0", limit_s=100.0):
            assert (tmp_path / "phase-rank0.txt").read_text() == "rollout (rl, after step 0)\n"
            with dog.phase("publish", place="rl, after step 0", limit_s=20.0):
                assert (tmp_path / "phase-rank0.txt").read_text().splitlines()[0] == "publish (rl, after step 0)"
        with dog.phase("reward", place="rl, after step 0", limit_s=None):
            assert timers[-1] is None
        assert (tmp_path / "phase-rank0.txt").read_text() == ""
    assert list(tmp_path.iterdir()) == []
    assert [None if seconds is None else round((seconds - GRACE_S) / 10) * 10 for seconds in timers] == [
        100,
        20,
        100,
        None,
        None,
        None,
        None,
    ]
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_a_phase_that_fails_is_over(tmp_path, timers):
    with pytest.raises(OSError, match="gone"), Watchdog(tmp_path) as dog, dog.phase("save", place="sft", limit_s=60.0):
        raise OSError("gone")
    assert timers[-2:] == [None, None]


def test_an_outer_deadline_ends_an_inner_phase_without_one(tmp_path, timers, monkeypatch):
    ended = threading.Event()
    over = []

    def end(status):
        over.append(status)
        ended.set()

    monkeypatch.setattr(watchdog_module.os, "_exit", end)
    with Watchdog(tmp_path) as dog, dog.phase("start", place="sft", limit_s=0.05), dog.phase("publish", place="sft", limit_s=None):
        assert ended.wait(60)
    assert over == [EXIT_HUNG]
    assert "sft: hung: start has taken longer than its 0.05 s" in (tmp_path / "stacks-rank0.txt").read_text()


def test_a_full_disk_does_not_end_the_run_here(tmp_path, timers, monkeypatch):
    real = watchdog_module.os.write

    def full(descriptor, content):
        if content:
            raise OSError(28, "No space left on device")
        return real(descriptor, content)

    monkeypatch.setattr(watchdog_module.os, "write", full)
    with Watchdog(tmp_path) as dog, dog.phase("update", place="sft", limit_s=60.0):
        assert (tmp_path / "phase-rank0.txt").read_text() == ""


def test_every_key_is_the_limit_of_its_phase():
    from vlpost.recipes.training import limit_s

    keys = list(WatchdogConfig.model_fields)
    config = WatchdogConfig.model_validate({key: 10.0**number for number, key in enumerate(keys)})
    assert [limit_s(config, key.removesuffix("_s")) for key in keys] == [getattr(config, key) for key in keys]
    assert limit_s(config, "step") == config.rollout_s + config.reward_s + config.update_s + config.publish_s
    assert limit_s(config.model_copy(update={"reward_s": None}), "step") is None
    assert json.loads(WatchdogConfig().model_dump_json()) == {
        "start_s": 3600.0,
        "rollout_s": 7200.0,
        "reward_s": 3600.0,
        "update_s": 7200.0,
        "publish_s": 1800.0,
        "save_s": 3600.0,
        "validation_s": 7200.0,
    }
    with pytest.raises(KeyError):
        limit_s(config, "lunch")


def test_time_without_a_phase_is_not_watched(tmp_path, timers):
    with Watchdog(tmp_path) as dog:
        with dog.phase("save", place="sft", limit_s=0.2):
            pass
        time.sleep(0.5)  # longer than the phase was allowed
