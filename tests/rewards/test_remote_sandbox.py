"""The remote sandbox against a real HTTP server of this machine that behaves as told, well or badly."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from vlpost.model.records import Example
from vlpost.rewards.code_execution import CodeExecutionOptions, CodeJudge
from vlpost.rewards.config import RewardConfigError
from vlpost.rewards.remote_sandbox import RemoteSandbox
from vlpost.rewards.result import RewardResult, Unavailable
from vlpost.rewards.sandbox import Limits, Sandbox
from vlpost.rewards.sandbox_config import SandboxConfig

LIMITS = Limits(wall_s=0.3, memory_bytes=64 * 2**20, output_bytes=10_000)


def finished(stdout="3\n", **changes):
    run = {"status": "Finished", "execution_time": 0.02, "return_code": 0, "stdout": stdout, "stderr": "", **changes}
    return {
        "status": "Success" if run["return_code"] == 0 else "Failed",
        "message": "",
        "compile_result": None,
        "run_result": run,
        "files": {},
    }


class Stub:
    """A service whose next replies are scripted: a document, or a function that writes to the connection itself."""

    def __init__(self):
        self.replies = []
        self.requests = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                stub.requests.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                reply = stub.replies.pop(0)
                if callable(reply):
                    reply(self)
                else:
                    answer(self, json.dumps(reply).encode())

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def answer(handler, body, *, status=200, length=None):
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def late(handler):
    time.sleep(1.0)
    handler.close_connection = True


def drip(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    try:
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.02)
    except OSError:
        pass


def reset(handler):
    handler.connection.close()
    handler.close_connection = True


def cut(handler):
    body = json.dumps(finished()).encode()
    answer(handler, body[:40], length=len(body))
    handler.close_connection = True


@pytest.fixture
def stub():
    stub = Stub()
    yield stub
    stub.server.shutdown()
    stub.server.server_close()


@pytest.fixture
def remote(stub):
    with RemoteSandbox(stub.url + "/", grace_s=0.3) as remote:
        yield remote


def test_a_program_travels_with_its_input_and_limits_and_no_more(stub, remote):
    stub.replies = [finished("3\n")]
    execution = remote.run("print(3)", stdin="äbc\n".encode(), limits=LIMITS)
    assert (execution.status, execution.stdout, execution.exit_code, execution.seconds) == ("finished", b"3\n", 0, 0.02)
    fields = {"code": "print(3)", "language": "python", "stdin": "äbc\n", "run_timeout": 0.3, "memory_limit_MB": 64}
    assert stub.requests == [("/run_code", {**fields, "files": {}, "fetch_files": []})]


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (finished(return_code=1, stderr="ValueError: no"), "runtime_error"),
        (finished(return_code=1, stderr="Traceback\nMemoryError\n"), "memory_limit"),
        (finished(return_code=-9), "runtime_error"),
        (finished(status="TimeLimitExceeded", return_code=None), "time_limit"),
        (finished("x" * 10_001), "output_limit"),
        (finished("x" * 200_000), "output_limit"),
        (finished(stdout=None, stderr=None), "finished"),
    ],
)
def test_what_the_service_says_of_a_program_is_believed(stub, remote, reply, status):
    stub.replies = [reply]
    assert remote.run("p", stdin=b"", limits=LIMITS).status == status


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"status": "SandboxError", "message": "no container", "run_result": None}, "no container"),
        ({"status": "Success", "message": "", "run_result": None}, "service failed"),
        ({"status": "Success"}, "not a SandboxFusion document"),
        ([1, 2], "not a SandboxFusion document"),
        (finished(status="Error"), "Error"),
        (finished(stdout=3), "other types"),
        (finished(return_code=True), "other types"),
        (finished(return_code=None), "could not run"),
        (lambda handler: answer(handler, b"<html>proxy</html>"), "not a SandboxFusion document"),
        (lambda handler: answer(handler, b"[" * 60_000), "not a SandboxFusion document"),
        (lambda handler: answer(handler, b"{}", status=500), "status 500"),
        (lambda handler: answer(handler, b"{}", status=429), "status 429"),
        (lambda handler: answer(handler, b"", status=302), "status 302"),
        (cut, "RemoteProtocolError"),
        (reset, ""),
        (late, "ReadTimeout"),
        (drip, "did not end in time"),
    ],
)
def test_trouble_on_the_way_is_an_internal_error_and_never_a_wrong_program(stub, remote, reply, words):
    stub.replies = [reply]
    execution = remote.run("p", stdin=b"", limits=LIMITS)
    assert execution.status == "internal_error"
    assert execution.reason.startswith("remote sandbox: ")
    assert words in execution.reason


def test_a_service_that_is_not_there_is_an_internal_error(stub):
    stub.server.shutdown()
    stub.server.server_close()
    with RemoteSandbox(stub.url, grace_s=0.3) as remote:
        assert remote.run("p", stdin=b"", limits=LIMITS).status == "internal_error"


def test_input_that_is_no_text_cannot_be_sent(stub, remote):
    assert "UTF-8" in remote.run("p", stdin=b"\xff", limits=LIMITS).reason
    assert stub.requests == []


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://sandbox.example:8080", "plain http"),
        ("http://10.0.0.1:8080", "plain http"),
        ("http://127.0.0.1.example", "plain http"),
        ("ftp://127.0.0.1", "must be http"),
        ("127.0.0.1:8080", "must be http"),
        ("https://host/?a=b", "without query"),
        ("https://user:secret@host", "password"),
    ],
)
def test_an_address_that_would_expose_programs_is_refused(url, words):
    with pytest.raises(RewardConfigError, match=words) as caught:
        RemoteSandbox(url)
    assert "secret@" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://localhost:1", "http://[::1]:1", "https://sandbox.example"])
def test_addresses_of_this_machine_and_https_are_taken(url):
    assert RemoteSandbox(url).describe().startswith(f"remote service {url}")


def test_plain_http_is_taken_where_the_recipe_says_so():
    assert "10.0.0.1" in RemoteSandbox("http://10.0.0.1:1", allow_plain_http=True).describe()


def test_rows_are_judged_through_the_service_and_outages_are_unavailable(stub, remote, make_rollout):
    judge = CodeJudge(remote, CodeExecutionOptions(time_limit_s=0.3))
    row = {"cases": [{"stdin": "1 2\n", "stdout": "3"}]}
    example = Example(id="s", messages=(), answer="", task="code", source="test", metadata={"code": row})
    stub.replies = [finished("3\n"), finished("4\n"), lambda handler: answer(handler, b"", status=503)]
    verdicts = [judge.judge_row(example, make_rollout("```python\nprint(3)\n```"))[0] for _ in range(3)]
    assert [verdict.value for verdict in verdicts[:2] if isinstance(verdict, RewardResult)] == [1.0, 0.0]
    assert isinstance(verdicts[2], Unavailable)
    assert "status 503" in verdicts[2].reason
    assert "3" not in {request["stdin"] for _, request in stub.requests}


@pytest.mark.parametrize("problem", [{"asserts": "assert f() == 1"}, {"calls": {"function": "f", "cases": [{"expected": 1}]}}])
def test_problems_that_need_a_channel_are_unavailable_with_words(remote, make_rollout, problem):
    example = Example(id="s", messages=(), answer="", task="code", source="test", metadata={"code": problem})
    verdict, _ = CodeJudge(remote, CodeExecutionOptions()).judge_row(example, make_rollout("```python\nf = 1\n```"))
    assert isinstance(verdict, Unavailable)
    assert "channel" in verdict.reason


def test_the_sandbox_hands_programs_to_its_remote_backend(stub):
    stub.replies = [finished("3\n")]
    with Sandbox(SandboxConfig(backend="remote", remote_url=stub.url)) as sandbox:
        assert sandbox.run("print(3)", stdin=b"", limits=LIMITS).stdout == b"3\n"
        with pytest.raises(RewardConfigError, match="channel"):
            sandbox.open_session("print(3)", limits=LIMITS)
