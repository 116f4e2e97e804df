"""The process of a server: started again when it ends, hangs or is given up; so often and no more; gone with its block."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import httpx
import pytest
from vlpost.model.engine_server import EngineServer, ServerPlan, argument_line, vllm_command
from vlpost.model.records import VlpostError

STAND_IN = """
import http.server, json, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments): pass
    def do_GET(self):
        is_ours = self.headers["Authorization"] == "Bearer " + os.environ["VLLM_API_KEY"]
        self.send_response(200 if is_ours else 401); self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "policy"}]}).encode())
print("up with", os.environ["OWN"], os.environ["VLLM_API_KEY"], os.environ.get("RANK"), flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class PlanError(VlpostError):
    """Of these tests."""


def plan(folder, program=STAND_IN, **changes):
    settings = {
        "owner": "engine 0",
        "command": lambda port: [sys.executable, "-c", program, str(port)],
        "served_as": "policy",
        "environment": {"OWN": "its own"},
        "log_file": folder / "logs" / "engine.log",
        "supervisor": "vlpost.rewards.judge_server_main",
        "error": PlanError,
        "port": 0,
        "start_timeout_s": 30.0,
        "max_restarts": 2,
        "stop_s": 0.5,
        "probe_path": "/weight_info",
        "hung_after_s": 1.5,
    }
    return ServerPlan(**(settings | changes))


def child_of(pid):
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    return int(entry.name)
    return None


def wait_until(claim):
    deadline = time.monotonic() + 30
    while not claim():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def is_gone(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_server_that_ends_hangs_or_is_given_up_is_made_ready_again(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    heard, ready = [], []
    with EngineServer(plan(tmp_path, max_restarts=3), heed=heard.append, make_ready=lambda: ready.append(server.is_up)) as server:
        endpoint, pids = server.endpoint, []
        assert server.is_up
        for number, (lose, words) in enumerate(
            (
                (lambda pid: os.kill(pid, signal.SIGKILL), "its server ended and is started again, time 1 of at most 3"),
                (
                    lambda pid: os.kill(pid, signal.SIGSTOP),
                    "its server has not answered for 1.5 s and is started again, time 2 of at most 3",
                ),
                (lambda pid: server.condemn("took no weights"), "its server took no weights and is started again, time 3 of at most 3"),
            )
        ):
            pids.append(child_of(server.supervisor_pid))
            lose(pids[-1])
            wait_until(lambda number=number: len(ready) > number and server.is_up)
            assert heard[number].startswith(words)
            assert is_gone(pids[-1])
        assert server.endpoint == endpoint
        assert httpx.get(f"{endpoint.url}/v1/models", headers=endpoint.headers, trust_env=False).status_code == 200
        pids.append(child_of(server.supervisor_pid))
    assert ready == [False] * 3, "requests would have come before its weights"
    assert len(heard) == 3
    assert all(is_gone(pid) for pid in pids)
    assert not server.is_up
    said = (tmp_path / "logs" / "engine.log").read_text()
    assert said.count("up with its own") == 4
    assert said.count("None") == 4, "the server would take itself for a rank"


def test_one_that_is_lost_too_often_stays_away_and_says_why(tmp_path):
    with EngineServer(plan(tmp_path, max_restarts=0), heed=print) as server:
        os.kill(child_of(server.supervisor_pid), signal.SIGKILL)
        wait_until(lambda: server.fault)
        assert not server.is_up
    assert server.fault.startswith("its server ended, time 1 (serve.max_restarts = 0); the end of ")
    assert "up with its own ***" in server.fault, "the key stands in the message"


def test_one_that_cannot_be_made_ready_is_started_once_more(tmp_path):
    heard, tries = [], []

    def make_ready():
        tries.append(1)
        if len(tries) == 1:
            raise PlanError("no weights")

    with EngineServer(plan(tmp_path), heed=heard.append, make_ready=make_ready) as server:
        os.kill(child_of(server.supervisor_pid), signal.SIGKILL)
        wait_until(lambda: len(tries) == 2 and server.is_up)
    assert heard[1] == "no weights"
    assert "time 2 of at most 2" in heard[2]


def test_a_watcher_that_fails_says_so_and_leaves_no_server_that_nobody_watches(tmp_path):
    def make_ready():
        raise KeyError("results")

    with EngineServer(plan(tmp_path), heed=print, make_ready=make_ready) as server:
        os.kill(child_of(server.supervisor_pid), signal.SIGKILL)
        wait_until(lambda: server.fault)
        assert not server.is_up
        assert server.fault.startswith("it cannot be watched any more: KeyError: 'results'; see ")


def test_while_it_works_only_its_front_is_asked(tmp_path):
    slow = STAND_IN.replace("is_ours =", "import time; time.sleep(60 if self.path == '/weight_info' else 0); is_ours =")
    heard = []
    with EngineServer(plan(tmp_path, slow, hung_after_s=0.5), heed=heard.append) as server:
        with server.working():
            time.sleep(4.0)
            assert heard == []
            assert server.is_up
        wait_until(lambda: heard)
    assert heard[0].startswith("its server has not answered for 0.5 s")


def test_one_that_does_not_start_says_why(tmp_path):
    with (
        pytest.raises(PlanError, match=r"engine 0: its server ended while it started.*\n.*no such model"),
        EngineServer(plan(tmp_path, "raise SystemExit('no such model')"), heed=print),
    ):
        pass
    with (
        pytest.raises(PlanError, match=r"engine 0: its server did not answer within 0.5 s \(serve.start_timeout_s\)"),
        EngineServer(plan(tmp_path, "import time; time.sleep(60)", start_timeout_s=0.5), heed=print),
    ):
        pass


def test_the_command_line_is_on_loopback_and_has_arguments_by_name():
    said = " ".join(
        vllm_command(["--model", "m", *argument_line({"tensor_parallel_size": 2, "enforce_eager": True, "foo": False})], port=7)
    )
    assert "-P -m vllm.entrypoints.openai.api_server --host 127.0.0.1 --port 7 --model m" in said
    assert said.endswith("--tensor-parallel-size=2 --enforce-eager --no-foo")
