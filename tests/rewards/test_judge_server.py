"""The served judge is private, says why it did not start, and leaves no process behind, also when the trainer is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import vlpost.rewards.judge_server as judge_server
from vlpost.rewards.judge_config import ServeConfig
from vlpost.rewards.judge_server import JudgeServer, JudgeServerError

# Stands in for vLLM: checks the token, starts a process in a session of its own, writes its environment down.
STAND_IN = r'''
import json, os, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
port, mode = int(sys.argv[1]), sys.argv[2]
if mode == "fails":
    sys.exit("no such model; key " + os.environ["VLLM_API_KEY"])
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
orphan = r"""
import os, time
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
os.closerange(0, 3)
time.sleep(600)
"""
subprocess.run([sys.executable, "-c", orphan], check=True)
print("environment", json.dumps(dict(os.environ)), flush=True)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        allowed = self.headers.get("Authorization") == "Bearer " + os.environ["VLLM_API_KEY"]
        name = "judge" if mode != "stranger" else "other"
        body = json.dumps({"data": [{"id": name}]}).encode()
        self.send_response(200 if allowed and mode != "silent" else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
'''
CONFIG = ServeConfig(model="org/name", start_timeout_s=60.0)


def stand_in(mode):
    return lambda _config, *, model, port: [sys.executable, "-c", STAND_IN, str(port), mode, model]


def processes_below(pid):
    """Returns the ids of living processes below one, the session leaders among them too."""
    parents = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if entry.name.isdigit() and state != "Z":
                parents.setdefault(int(parent), []).append(int(entry.name))
    found, unread = [], [pid]
    while unread:
        children = parents.get(unread.pop(), [])
        found += children
        unread += children
    return found


def is_alive(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids, seconds=20.0):
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if is_alive(pid)]


def test_the_server_answers_those_who_hold_the_token_and_ends_with_all_it_started(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = CONFIG.model_copy(update={"log_file": Path("logs/server.log"), "devices": "3"})
    with JudgeServer(config, command=stand_in("honest"), recipe_folder=tmp_path) as server:
        assert httpx.get(f"{server.url}/models", trust_env=False).status_code == 401
        authorised = httpx.get(f"{server.url}/models", headers={"Authorization": f"Bearer {server.token}"}, trust_env=False)
        assert authorised.json()["data"] == [{"id": "judge"}]
        started = [server.supervisor_pid, *processes_below(server.supervisor_pid)]
        assert len(started) == 4, "supervisor, server, its child and an orphaned grandchild"
        log = (tmp_path / "logs/server.log").read_text()
    assert wait_until_gone(started) == []
    assert '"CUDA_VISIBLE_DEVICES": "3"' in log
    assert not any(f'"{name}"' in log for name in ("RANK", "MASTER_ADDR", "LOCAL_WORLD_SIZE"))


def test_each_server_has_a_token_and_a_log_of_its_own():
    servers = [JudgeServer(CONFIG, command=stand_in("honest"), recipe_folder=None) for _ in range(2)]
    assert servers[0].token != servers[1].token
    assert servers[0].log_file != servers[1].log_file
    for server in servers:
        server.log_file.parent.rmdir()


def test_a_temporary_log_is_removed_after_a_clean_end():
    with JudgeServer(CONFIG, command=stand_in("honest"), recipe_folder=None) as server:
        assert server.log_file.is_file()
    assert not server.log_file.parent.exists()


def test_a_server_that_cannot_start_says_why_without_its_token(tmp_path):
    config = CONFIG.model_copy(update={"log_file": Path("server.log")})
    server = JudgeServer(config, command=stand_in("fails"), recipe_folder=tmp_path)
    with pytest.raises(JudgeServerError, match="ended while it started") as stop, server:
        pass
    assert "no such model; key ***" in str(stop.value)
    assert server.token not in str(stop.value)


@pytest.mark.parametrize("mode", ["silent", "stranger"])
def test_a_server_that_never_answers_is_given_up_and_ended(tmp_path, mode):
    config = CONFIG.model_copy(update={"log_file": Path("server.log"), "start_timeout_s": 1.5})
    before = set(processes_below(os.getpid()))
    with (
        pytest.raises(JudgeServerError, match=r"did not answer within 1.5 s \(rewards.judge.serve.start_timeout_s\)"),
        JudgeServer(config, command=stand_in(mode), recipe_folder=tmp_path),
    ):
        pass
    assert set(processes_below(os.getpid())) <= before


def test_a_server_that_will_not_end_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(judge_server, "STOP_S", 0.3)
    with JudgeServer(CONFIG, command=stand_in("stubborn"), recipe_folder=tmp_path) as server:
        started = [server.supervisor_pid, *processes_below(server.supervisor_pid)]
    assert wait_until_gone(started) == []


TRAINER = f"""
import sys, time
from pathlib import Path
from vlpost.rewards.judge_config import ServeConfig
from vlpost.rewards.judge_server import JudgeServer
import threading
command = lambda _config, *, model, port: [sys.executable, "-c", {STAND_IN!r}, str(port), "honest"]
server = JudgeServer(ServeConfig(model="org/name", log_file=Path("server.log")), command=command, recipe_folder=Path(sys.argv[1]))
# Started in a thread that ends: the server outlives it.
thread = threading.Thread(target=server.__enter__)
thread.start()
thread.join()
time.sleep(1.0)
print(server.supervisor_pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_is_gone_when_the_trainer_is_killed(tmp_path, end):
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    supervisor = int(trainer.stdout.readline())
    started = [supervisor, *processes_below(supervisor)]
    assert len(started) == 4
    assert all(map(is_alive, started))
    trainer.send_signal(end)
    trainer.wait()
    trainer.stdout.close()
    assert wait_until_gone(started) == []


def test_the_server_hears_of_a_killed_supervisor(tmp_path):
    with JudgeServer(CONFIG, command=stand_in("honest"), recipe_folder=tmp_path) as server:
        (its_server,) = [pid for pid in processes_below(server.supervisor_pid) if b"serve_forever" in cmdline(pid)]
        others = [pid for pid in processes_below(server.supervisor_pid) if pid != its_server]
        os.kill(server.supervisor_pid, signal.SIGKILL)
        assert wait_until_gone([its_server]) == []
        for pid in others:  # the stand-in's own children, which nobody is left to end
            os.kill(pid, signal.SIGKILL)


def cmdline(pid):
    return (Path("/proc") / str(pid) / "cmdline").read_bytes()
