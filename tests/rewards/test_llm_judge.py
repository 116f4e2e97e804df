"""`llm_judge` against a scripted server on loopback: whatever goes wrong there, no row gets a wrong value and none is lost without need."""

import base64
import io
import json
import logging
import socket
import struct
import threading
import time
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image
from vlpost.model.records import Example, ImagePart, Message, TextPart, VideoPart
from vlpost.rewards import RewardResult, RewardsConfig, Unavailable
from vlpost.rewards.config import RewardConfigError
from vlpost.rewards.judge_client import JudgeBudgetError
from vlpost.rewards.judge_prompt import parse_back
from vlpost.rewards.llm_judge import REWARDS, JudgeDriftError, LlmJudgeOptions, open_llm_judge, pair_outcome

# The clock of the tests, compressed: a minute of an outage is a second here.
FAST = {
    **{"deadline_s": 2.0, "backoff_s": 0.01, "max_backoff_s": 0.05, "probe_s": 0.02, "max_outage_s": 20.0, "max_retry_after_s": 0.5},
    **{"breaker_failures": 4, "retries": 3, "canary_every": 0, "max_concurrent": 8},
}
KEY = "sk-s3cret-0123456789"


class ScriptedServer:
    """An OpenAI-compatible server that judges right, except where its script says otherwise."""

    def __init__(self):
        self.requests = []
        self.script = lambda number, field: None
        """(number of the request, data field or None for a probe) -> name of a fault or a canned reply, or None"""
        self.judge = right_verdict
        self.port = 0
        self._server = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def judged(self):
        return [request for request in self.requests if request["field"] is not None]

    def start(self):
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                scripted.handle(self)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_):
                pass  # clients that go away are part of the script

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        field = parse_back(text) if "DATA" in text else None
        self.requests.append({"body": body, "field": field, "headers": dict(handler.headers), "path": handler.path})
        fault = self.script(len(self.requests), field)
        if fault is None:
            verdict = self.judge(field, body) if field is not None else "OK"
            self.reply(handler, completion(verdict if isinstance(verdict, str) else json.dumps(verdict)))
        elif isinstance(fault, str):
            FAULTS[fault](self, handler)
        else:
            self.reply(handler, **fault)

    def reply(self, handler, body=b"", *, status=200, headers=None):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)


def completion(content, *, usage=(30, 20), **choice):
    counted = {} if usage is None else {"usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}}
    return json.dumps(
        {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop", **choice}], **counted}
    ).encode()


def right_verdict(field, body):
    """Right is what ends in the reference; of two, the right one is better; else the longer one."""
    properties = body["response_format"]["json_schema"]["schema"]["properties"]

    def worth(text):
        return (text.rstrip(".。").endswith(field.get("reference", "\0")), len(text))

    if "winner" in properties:
        first, second = worth(field["first"]), worth(field["second"])
        return {"reason": "", "winner": "tie" if first == second else "first" if first > second else "second"}
    is_right = field["response"].rstrip(".。").endswith(field["reference"])
    return {"reason": ""} | {name: values["enum"][-1 if is_right else 0] for name, values in properties.items() if name != "reason"}


def reset(_server, handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def hang_up(_server, handler):
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def drip(_server, handler):
    """One byte at a time, each before a read timeout would strike, and never an end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(400):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)


def flood(_server, handler):
    handler.send_response(200)
    handler.end_headers()
    handler.close_connection = True
    for _ in range(64):
        handler.wfile.write(b"x" * 2**20)


def cut_body(server, handler):
    server.reply(handler, completion('{"reason": "", "correct": 1}')[:-30])


def short_body(server, handler):
    server.reply(handler, completion('{"reason": "", "correct": 1}'), headers={"Content-Length": "5000"})
    hang_up(server, handler)


FAULTS = {"reset": reset, "hang_up": hang_up, "drip": drip, "flood": flood, "cut_body": cut_body, "short_body": short_body}
SERVER_FAULTS = {
    **{f"status {status}": {"status": status, "body": b"{}"} for status in (408, 409, 425, 500, 502, 503, 504, 529)},
    "429 with seconds": {"status": 429, "headers": {"Retry-After": "0.1"}},
    "429 with a date": {"status": 429, "headers": {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)}},
    "429 alone": {"status": 429},
    "503 with seconds": {"status": 503, "headers": {"Retry-After": "0.1"}},
    **{name: name for name in FAULTS},
    "garbage": {"body": b"\x00\xff<html>502 Bad Gateway</html>"},
    "empty body": {"body": b""},
    "no choices": {"body": b'{"choices": []}'},
    "an error with status 200": {"body": b'{"error": {"message": "overloaded"}}'},
    "deep json": {"body": b"[" * 100_000},
    "compressed": {"body": b"\x1f\x8b\x08\x00", "headers": {"Content-Encoding": "gzip"}},
}
VERDICT_FAULTS = {
    "cut json": completion('{"reason": "", "corr'),
    "prose": completion("The response is correct: 1"),
    "two verdicts": completion('{"reason": "", "correct": 1}{"reason": "", "correct": 1}'),
    "outside the scale": completion('{"reason": "", "correct": 7}'),
    "null": completion(None),
    "a list": completion([{"type": "text", "text": '{"reason": "", "correct": 1}'}]),
}


@pytest.fixture
def server():
    scripted = ScriptedServer()
    scripted.start()
    yield scripted
    scripted.stop()


@pytest.fixture
def open_judge(server, tmp_path):
    @contextmanager
    def opened(options=None, **judge):
        described = {"components": {"judge": {"use": "llm_judge"}}, "judge": {"url": server.url, "model": "m", **FAST, **judge}}
        config = RewardsConfig.model_validate(described)
        with REWARDS["llm_judge"].service(LlmJudgeOptions.model_validate(options or {}), config, tmp_path) as judge:
            yield judge

    return opened


@pytest.fixture
def make_rows(make_example, make_rollout):
    """Returns rows whose answers are their numbers; every third response is wrong."""

    def make(num_rows):
        return [(make_example(f"n{number}", number=number), make_rollout(f"It is {right(number)}")) for number in range(num_rows)]

    def right(number):
        return f"n{number}" if number % 3 else "nothing"

    return make


def verdicts(judge, rows):
    return [verdict for verdict, _seconds in judge.judge(rows)]


def values(judge, rows):
    return [verdict.value if isinstance(verdict, RewardResult) else None for verdict in verdicts(judge, rows)]


def expected(num_rows):
    return [float(number % 3 > 0) for number in range(num_rows)]


def test_rows_are_judged_in_order(open_judge, make_rows, server):
    with open_judge() as judge:
        outcome = judge.judge(make_rows(30))
    assert [verdict.value for verdict, _seconds in outcome] == expected(30)
    assert all(0.0 < seconds < 5.0 for _verdict, seconds in outcome)
    assert outcome[1][0].metrics == {"tokens": 50.0, "correct": 1.0}
    assert len(server.requests) == 30
    body = server.requests[0]["body"]
    assert (body["model"], body["temperature"], body["max_tokens"], server.requests[0]["path"]) == ("m", 0.0, 512, "/v1/chat/completions")
    assert body["response_format"]["json_schema"]["schema"]["properties"]["correct"] == {"type": "integer", "enum": [0, 1]}


@pytest.mark.parametrize("fault", SERVER_FAULTS)
def test_a_server_fault_costs_no_row_its_value(open_judge, make_rows, server, fault):
    # The first request of every second row fails.
    seen = set()

    def script(_number, field):
        if field is None or field["reference"] in seen or int(field["reference"][1:]) % 2:
            return None
        seen.add(field["reference"])
        return SERVER_FAULTS[fault]

    server.script = script
    with open_judge(deadline_s=5.0, request_timeout_s=0.4) as judge:
        assert values(judge, make_rows(12)) == expected(12)
    assert len(seen) == 6
    assert len(server.judged) >= 18


@pytest.mark.parametrize("fault", VERDICT_FAULTS)
def test_a_broken_verdict_is_asked_for_once_more(open_judge, make_rows, server, fault):
    seen = []

    def script(_number, field):
        seen.append(field["reference"])
        return {"body": VERDICT_FAULTS[fault]} if seen.count(field["reference"]) == 1 else None

    server.script = script
    with open_judge() as judge:
        assert values(judge, make_rows(6)) == expected(6)
    assert len(server.requests) == 12
    # A retry is another prompt: at temperature 0 the same one would get the same reply.
    texts = [request["body"]["messages"][1]["content"] for request in server.requests]
    assert len(set(texts)) == 12


@pytest.mark.parametrize("fault", VERDICT_FAULTS)
def test_a_judge_that_gives_no_verdict_gives_no_value(open_judge, make_rows, server, fault):
    def script(_number, field):
        return {"body": VERDICT_FAULTS[fault]} if field["reference"] == "n1" else None

    server.script = script
    with open_judge() as judge:
        outcome = verdicts(judge, make_rows(6))
    assert isinstance(outcome[1], Unavailable)
    assert "no verdict in two tries" in outcome[1].reason
    assert [verdict.value for index, verdict in enumerate(outcome) if index != 1] == [0.0, 1.0, 0.0, 1.0, 1.0]
    assert len(server.requests) == 7


@pytest.mark.parametrize("fault", ["status 500", "reset", "garbage", "drip"])
def test_a_question_that_alone_breaks_the_server_is_unavailable_and_its_neighbours_are_judged(open_judge, make_rows, server, fault):
    server.script = lambda _number, field: SERVER_FAULTS[fault] if field is not None and field["reference"] == "n1" else None
    with open_judge(deadline_s=1.5) as judge:
        outcome = verdicts(judge, make_rows(12))
    assert isinstance(outcome[1], Unavailable)
    assert outcome[1].reason.startswith("judge: ")
    assert [verdict.value for index, verdict in enumerate(outcome) if index != 1] == expected(12)[:1] + expected(12)[2:]


def test_all_requests_wait_as_long_as_the_server_asked(open_judge, make_rows, server):
    arrivals = []

    def script(number, _field):
        arrivals.append(time.monotonic())
        return {"status": 429, "headers": {"Retry-After": "0.4"}} if number == 1 else None

    server.script = script
    with open_judge(max_concurrent=1) as judge:
        assert values(judge, make_rows(5)) == expected(5)
    assert len(server.requests) == 6
    assert arrivals[1] - arrivals[0] >= 0.39


def test_a_dead_server_pauses_the_step_and_every_row_is_judged_when_it_is_back(open_judge, make_rows, server):
    died = threading.Event()
    back = []

    def script(number, _field):
        if number == 10 and not died.is_set():
            died.set()
            threading.Thread(target=die, daemon=True).start()
        return "reset" if died.is_set() and not back else None

    def die():
        server.stop()
        time.sleep(2.5)
        back.append(len(server.requests))
        server.start()

    server.script = script
    with open_judge(deadline_s=1.5) as judge:
        # Longer than deadline and retries of any row together.
        assert values(judge, make_rows(40)) == expected(40)
        assert judge._client.usage.pauses >= 1
        assert judge._client.usage.paused_s > 1.5
    assert died.is_set()
    assert len(back) == 1


@pytest.mark.parametrize("fault", ["status 500", "garbage", "reset", "429 alone", "hang_up"])
def test_an_outage_behind_a_living_port_is_waited_for_too(open_judge, make_rows, server, fault):
    up_at = time.monotonic() + 2.0
    server.script = lambda _number, _field: None if time.monotonic() > up_at else SERVER_FAULTS[fault]
    with open_judge(deadline_s=1.5, max_concurrent=2) as judge:
        assert values(judge, make_rows(12)) == expected(12)


def test_one_row_alone_survives_an_outage_shorter_than_the_breakers_count(open_judge, make_rows, server):
    # retries are used up before breaker_failures is reached: the row waits all the same.
    up_at = time.monotonic() + 0.8
    server.script = lambda _number, _field: None if time.monotonic() > up_at else SERVER_FAULTS["status 500"]
    with open_judge(breaker_failures=100, retries=1) as judge:
        assert values(judge, make_rows(2)[1:]) == [1.0]


def test_a_server_that_dies_again_and_again_loses_nothing(open_judge, make_rows, server):
    begun = time.monotonic()
    server.script = lambda _number, _field: SERVER_FAULTS["status 503"] if int((time.monotonic() - begun) / 0.2) % 2 == 0 else None
    with open_judge(max_concurrent=1) as judge:
        rows = make_rows(20)
        for start in range(0, 20, 4):
            assert values(judge, rows[start : start + 4]) == expected(20)[start : start + 4]
            time.sleep(0.1)


def test_an_outage_without_end_is_no_reward(open_judge, make_rows, server):
    server.script = lambda number, _field: SERVER_FAULTS["status 500"] if number > 6 else None
    with open_judge(max_outage_s=0.5, max_concurrent=2) as judge:
        outcome = verdicts(judge, make_rows(12))
        judged = [index for index, verdict in enumerate(outcome) if isinstance(verdict, RewardResult)]
        assert len(judged) == 6
        assert [outcome[index].value for index in judged] == [expected(12)[index] for index in judged]
        reasons = {verdict.reason for verdict in outcome if isinstance(verdict, Unavailable)}
        assert reasons == {"judge: down for 0.5 s (max_outage_s): HTTP 500"}
        # The next step finds it back.
        server.script = lambda _number, _field: None
        assert values(judge, make_rows(12)) == expected(12)


def test_a_server_that_is_not_there_is_no_reward(open_judge, make_rows, server):
    server.stop()
    try:
        with open_judge(max_outage_s=0.3) as judge:
            outcome = verdicts(judge, make_rows(4))
    finally:
        server.start()
    assert all(isinstance(verdict, Unavailable) for verdict in outcome)
    assert "ConnectError" in outcome[0].reason


@pytest.mark.parametrize("status", [301, 307, 400, 401, 403, 404, 413, 422])
def test_a_refusal_is_not_tried_again_and_shows_no_key(open_judge, make_rows, server, status, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY_OF_TEST", KEY)
    refusal = json.dumps({"error": f"model m rejects key {KEY}"}).encode()
    server.script = lambda _number, _field: {"status": status, "body": refusal, "headers": {"Location": "http://127.0.0.1:1/"}}
    with open_judge(api_key_env="JUDGE_KEY_OF_TEST") as judge:
        (outcome,) = verdicts(judge, make_rows(1))
        shown = [repr(outcome), repr(vars(judge)), *judge._config.model_dump_json().split("\n"), str(judge._client), caplog.text]
    assert isinstance(outcome, Unavailable)
    assert f"HTTP {status}" in outcome.reason
    assert len(server.requests) == 1
    assert server.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    assert [text for text in shown if KEY in text] == []
    assert ("JUDGE_KEY_OF_TEST" in outcome.reason) == (status in (401, 403))


def test_a_cap_on_calls_is_honoured_exactly_and_keeps_what_was_paid_for(open_judge, make_rows, server):
    with (
        open_judge(max_calls=7, cache="verdicts.sqlite") as judge,
        pytest.raises(JudgeBudgetError, match=r"max_calls = 7 is reached \(7 calls"),
    ):
        judge.judge(make_rows(20))
    assert len(server.requests) == 7
    with open_judge(cache="verdicts.sqlite") as judge:
        assert values(judge, make_rows(20)) == expected(20)
    # What had been sent when the cap was reached was waited for, and kept.
    assert len(server.requests) == 20


def test_a_cap_on_tokens_stops_within_the_requests_in_flight(open_judge, make_rows, server):
    with open_judge(max_run_tokens=500, max_concurrent=2) as judge, pytest.raises(JudgeBudgetError, match="max_run_tokens = 500"):
        judge.judge(make_rows(40))
    assert 10 <= len(server.requests) <= 11


def test_tokens_that_the_server_does_not_count_are_bounded_by_bytes(open_judge, make_rows, server):
    server.script = lambda _number, _field: {"body": completion('{"reason": "", "correct": 1}', usage=None)}
    with open_judge() as judge:
        judge.judge(make_rows(1))
        assert judge._client.usage.tokens > len(json.dumps(server.requests[0]["body"]["messages"]))


def test_the_cap_also_ends_the_probing_of_a_dead_server(open_judge, make_rows, server):
    server.script = lambda _number, _field: SERVER_FAULTS["status 500"]
    with open_judge(max_calls=12) as judge, pytest.raises(JudgeBudgetError, match="max_calls = 12"):
        judge.judge(make_rows(8))
    assert len(server.requests) == 12


def test_a_second_run_with_the_cache_asks_nothing_and_gives_equal_rewards(open_judge, make_rows, server):
    with open_judge(cache="verdicts.sqlite", canary_every=100) as judge:
        first = values(judge, make_rows(30))
    num_asked = len(server.requests)
    assert num_asked == 40
    server.script = lambda _number, _field: SERVER_FAULTS["status 500"]
    with open_judge(cache="verdicts.sqlite", canary_every=100) as judge:
        assert values(judge, make_rows(30)) == first == expected(30)
        assert values(judge, make_rows(30)[::-1]) == first[::-1]
    assert len(server.requests) == num_asked


@pytest.mark.parametrize(
    ("options", "judge"),
    [
        ({}, {"model": "other"}),
        ({}, {"revision": "2"}),
        ({}, {"temperature": 0.5}),
        ({}, {"seed": 1}),
        ({}, {"extra_body": {"top_k": 3}}),
        ({"rubric": "general"}, {}),
        ({"max_response_chars": 200}, {}),
    ],
)
def test_whatever_a_verdict_depends_on_is_in_the_caches_key(open_judge, make_example, make_rollout, server, options, judge):
    rows = [(make_example("42"), make_rollout("x" * 300 + "42"))]
    for changed_options, changed in (({}, {}), ({}, {}), (options, judge)):
        with open_judge(changed_options, cache="verdicts.sqlite", **changed) as opened:
            assert values(opened, rows) == [1.0]
    assert len(server.requests) == 2


def test_equal_responses_are_asked_once(open_judge, make_example, make_rollout, server):
    with open_judge() as judge:
        assert values(judge, [(make_example("42"), make_rollout(text)) for text in ("42", "41", "42", "<think>hm</think>42")]) == [
            1.0,
            0.0,
            1.0,
            1.0,
        ]
    assert len(server.requests) == 2


def test_thinking_is_never_shown_and_silence_is_wrong_unasked(open_judge, make_example, make_rollout, server):
    suffix = "<think>\n"
    rollouts = [
        make_rollout("the answer must be 42</think>\nIt is 42", prompt_suffix=suffix),
        make_rollout("the answer must be 42", prompt_suffix=suffix),
        make_rollout("<think>42"),
        make_rollout(""),
        make_rollout("</think> \n"),
        make_rollout(":"),
        make_rollout("Thought process:"),
        make_rollout("**Solution**"),
        make_rollout("解"),
    ]
    with open_judge() as judge:
        outcome = verdicts(judge, [(make_example("42"), rollout) for rollout in rollouts])
    assert [verdict.value for verdict in outcome] == [1.0] + [0.0] * 8
    assert all(verdict.note for verdict in outcome[1:])
    (request,) = server.requests
    assert request["field"] == {"prompt": [{"role": "user", "text": "How much?"}], "reference": "42", "response": "It is 42"}


def test_an_answer_that_is_itself_an_opener_is_judged(open_judge, make_example, make_rollout):
    with open_judge() as judge:
        assert values(judge, [(make_example("解"), make_rollout("解")), (make_example("-"), make_rollout("-"))]) == [1.0, 1.0]


def test_a_row_without_the_answer_that_the_rubric_needs_is_unavailable(open_judge, make_example, make_rollout, server):
    with open_judge() as judge:
        (outcome,) = verdicts(judge, [(make_example(" "), make_rollout("42"))])
    assert "no answer" in outcome.reason
    assert server.requests == []


def test_several_axes_add_up_by_weights_that_options_may_change(open_judge, make_example, make_rollout, server):
    scores = {"reason": "fair", "accuracy": 3, "instruction_following": 5, "helpfulness": 2, "style": 1}
    server.judge = lambda _field, _body: scores
    rows = [(make_example("42"), make_rollout("42"))]
    with open_judge({"rubric": "general"}) as judge:
        (outcome,) = verdicts(judge, rows)
    assert outcome.value == pytest.approx(0.4 * 0.5 + 0.3 * 1.0 + 0.2 * 0.25)
    assert outcome.note == "fair"
    assert {name: outcome.metrics[name] for name in scores if name != "reason"} == {
        name: scores[name] for name in scores if name != "reason"
    }
    with open_judge({"rubric": "general", "weights": {"style": 0, "accuracy": 0, "helpfulness": 0}}) as judge:
        assert values(judge, rows) == [1.0]


@pytest.mark.parametrize(
    ("as_first", "as_second", "outcome"),
    [
        *(("first", "second", 1.0), ("second", "first", 0.0), ("first", "first", 0.5), ("second", "second", 0.5)),
        *(("tie", "tie", 0.5), ("tie", "second", 0.5), ("first", "tie", 0.5)),
    ],
)
def test_a_pair_is_won_only_in_both_orders(as_first, as_second, outcome):
    assert pair_outcome(as_first, as_second) == outcome


def test_a_judge_that_prefers_a_place_pays_nobody(open_judge, make_example, make_rollout, server):
    server.judge = lambda _field, _body: {"reason": "", "winner": "first"}
    with open_judge({"rubric": "pairwise"}) as judge:
        (outcome,) = verdicts(judge, [(make_example("42"), make_rollout("41"))])
    assert outcome.value == 0.5
    assert outcome.metrics["order_bias"] == 1.0
    assert len(server.requests) == 2


def test_pairwise_against_the_answer(open_judge, make_example, make_rollout, server):
    with open_judge({"rubric": "pairwise", "reference": False}) as judge:
        rows = [(make_example("a good answer"), make_rollout(text)) for text in ("short", "a much, much longer answer", "a good answer")]
        assert values(judge, rows) == [0.0, 1.0, 0.5]
    assert len(server.requests) == 4
    assert all("reference" not in request["field"] for request in server.requests)


def test_a_group_is_compared_within_itself_whatever_its_order(open_judge, make_example, make_rollout, server):
    example, other = make_example("42"), make_example("7", number=1)
    texts = ["42", "It is 42", "41", "It is 41", "<think>", "42"]
    rows = [(example, make_rollout(text)) for text in texts]
    with open_judge({"rubric": "pairwise", "opponents": "group", "max_opponents": 4}) as judge:
        by_text = dict(zip(texts, values(judge, rows), strict=True))
        assert by_text == {"42": 2 / 3, "It is 42": 1.0, "41": 0.0, "It is 41": 1 / 3, "<think>": 0.0}
        # Six pairs of four distinct responses, in both orders.
        assert len(server.requests) == 12
        mixed = [
            *rows[::-1],
            (other, make_rollout("7")),
            (other, make_rollout("<think>")),
            (make_example("7", number=2), make_rollout("7")),
        ]
        assert values(judge, mixed) == [by_text[text] for text in texts[::-1]] + [1.0, 0.0, 0.5]


def test_a_large_group_asks_a_bounded_number_of_times(open_judge, make_example, make_rollout, server):
    rows = [(make_example("42"), make_rollout(f"response {number} says 42")) for number in range(16)]
    with open_judge({"rubric": "pairwise", "opponents": "group", "max_opponents": 2}) as judge:
        outcome = values(judge, rows)
    assert len(server.requests) == 16 * 2 * 2
    assert all(0.0 <= value <= 1.0 for value in outcome)


def test_a_response_that_breaks_the_judge_costs_its_rivals_nothing(open_judge, make_example, make_rollout, server):
    def script(_number, field):
        return {"body": VERDICT_FAULTS["prose"]} if field and "hostile" in field["first"] + field["second"] else None

    server.script = script
    rows = [(make_example("42"), make_rollout(text)) for text in ("42", "41", "hostile", "It is 42")]
    with open_judge({"rubric": "pairwise", "opponents": "group", "max_opponents": 4}) as judge:
        outcome = verdicts(judge, rows)
    assert [verdict.value for index, verdict in enumerate(outcome) if index != 2] == [0.5, 0.0, 1.0]
    assert isinstance(outcome[2], Unavailable)


def test_images_and_frames_are_sent_only_when_asked_for(open_judge, make_rollout, server):
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (9, 9, 9)]
    frames = [Image.new("RGB", (8, 8), colour) for colour in colours]
    parts = (
        ImagePart.from_image(Image.new("RGB", (6, 4), (1, 2, 3))),
        TextPart(text="and"),
        VideoPart.from_frames(frames, fps=2.0, frame_indices=[0, 1, 2, 3]),
    )
    example = Example(id="v", messages=(Message(role="user", parts=parts),), answer="42", task="t", source="s")
    with open_judge() as judge:
        judge.judge([(example, make_rollout("42"))])
    assert isinstance(server.requests[0]["body"]["messages"][1]["content"], str)
    with open_judge({"images": True, "max_frames": 2}) as judge:
        assert values(judge, [(example, make_rollout("42"))]) == [1.0]
    *pictures, text = server.requests[1]["body"]["messages"][1]["content"]
    assert text["type"] == "text"
    decoded = []
    for picture in pictures:
        head, _, encoded = picture["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        decoded.append(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
    assert [(picture.size, picture.getpixel((0, 0))) for picture in decoded] == [
        ((6, 4), (1, 2, 3)),
        ((8, 8), colours[0]),
        ((8, 8), colours[3]),
    ]


def test_canaries_come_first_and_then_every_so_many_verdicts(open_judge, make_rows, server):
    with open_judge(canary_every=8) as judge:
        outcome = verdicts(judge, make_rows(20))
        assert [verdict.value for verdict in outcome] == expected(20)
        assert outcome[0].metrics["canary_accuracy"] == 1.0
        num_canaries = 10
        assert len(server.requests) == 20 + 3 * num_canaries
        # Four of the next rows belong to the third eight.
        judge.judge(make_rows(24)[20:])
        assert len(server.requests) == 24 + 3 * num_canaries
    first = [request["field"]["response"] for request in server.requests[:num_canaries]]
    assert {":", "Thought process:", "解"} <= set(first)


def test_a_judge_that_drifts_stops_the_run_and_its_verdicts_are_void(open_judge, make_rows, server):
    def gullible(field, _body):
        return {"reason": "looks fine", "correct": 1}

    with open_judge(canary_every=8, cache="verdicts.sqlite") as judge:
        judge.judge(make_rows(4))
        # It drifts while the first eight are under way: four more verdicts pass for good until the canaries tell.
        server.judge = gullible
        with pytest.raises(JudgeDriftError) as stop:
            judge.judge(make_rows(16)[4:])
    message = str(stop.value)
    assert "got 3 of 10 canaries right, below rewards.judge.min_canary_accuracy = 0.8" in message
    assert "thought-process: 'Thought process:' is bad, judged 1" in message
    server.judge = right_verdict
    num_asked = len(server.requests)
    with open_judge(cache="verdicts.sqlite") as judge:
        assert values(judge, make_rows(16)) == expected(16)
    # None of the verdicts since the last good round is believed.
    assert len(server.requests) - num_asked == 16


def test_pairwise_canaries_are_asked_in_both_orders(open_judge, make_example, make_rollout, server):
    server.judge = lambda _field, _body: {"reason": "", "winner": "second"}
    with open_judge({"rubric": "pairwise"}, canary_every=8) as judge, pytest.raises(JudgeDriftError, match="got 0 of 5"):
        judge.judge([(make_example("42"), make_rollout("41"))])
    assert len(server.requests) == 10


def test_canaries_without_a_verdict_are_not_counted_as_wrong(open_judge, make_rows, server):
    def script(_number, field):
        return {"body": VERDICT_FAULTS["prose"]} if field and field["response"] in (":", "解", "Thought process:") else None

    server.script = script
    with open_judge(canary_every=8) as judge:
        assert verdicts(judge, make_rows(2))[1].metrics["canary_accuracy"] == 1.0


def test_a_round_of_canaries_without_verdicts_is_repeated(open_judge, make_rows, server):
    canned = {"body": VERDICT_FAULTS["prose"]}
    server.script = lambda _number, field: canned if field and "It is n" not in field["response"] + field["reference"] else None
    with open_judge(canary_every=8) as judge:
        rows = make_rows(3)[1:]
        assert "canary_accuracy" not in verdicts(judge, rows)[0].metrics
        num_asked = len(server.requests)
        server.script = lambda _number, _field: None
        assert verdicts(judge, make_rows(5)[4:])[0].metrics["canary_accuracy"] == 1.0
    assert len(server.requests) == num_asked + 10 + 1


def test_the_judges_words_are_fit_for_a_log(open_judge, make_rows, server):
    server.judge = lambda _field, _body: '{"reason": "a\\ud800b\\u001b[2Jc", "correct": 1}'
    with open_judge() as judge:
        (outcome,) = verdicts(judge, make_rows(2)[1:])
    assert outcome.note == "a b [2Jc"


def test_what_rows_share_is_charged_once(open_judge, make_example, make_rollout, server):
    rows = [(make_example("42"), make_rollout(text)) for text in ("42", "42", "41", "It is 42")]
    for options in ({}, {"rubric": "pairwise", "opponents": "group", "max_opponents": 4}):
        num_before = len(server.requests)
        with open_judge(options) as judge:
            assert sum(verdict.metrics["tokens"] for verdict in verdicts(judge, rows)) == pytest.approx(
                50 * (len(server.requests) - num_before)
            )


def test_components_with_equal_settings_share_one_client(open_judge, make_rows, server):
    with ExitStack() as opened:
        first, second, other = (
            opened.enter_context(open_judge(options, **judge))
            for options, judge in (({}, {}), ({"rubric": "general"}, {}), ({}, {"seed": 5}))
        )
        assert first._client is second._client
        assert other._client is not first._client
        assert values(second, make_rows(3)) == expected(3)
        threads = {thread.name for thread in threading.enumerate()}
        assert "judge" in threads
    with open_judge() as judge:
        assert judge._client is not first._client
    assert "judge" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rubric": "best"}, "rubric 'best' is unknown"),
        ({"weights": {"tone": 1.0}}, "axes of rubric 'correctness' are correct"),
        ({"weights": {"correct": 0.0}}, "one above 0"),
        ({"weights": {"correct": -1.0}}, "none below 0"),
        ({"opponents": "group"}, "compared by a pairwise rubric"),
        ({"rubric": "pairwise", "max_opponents": 3}, "opponents: group"),
        ({"reference": False}, "says itself whether the answer is shown"),
        ({"max_frames": 3}, "without images: true"),
    ],
)
def test_options_that_cannot_take_effect_are_refused(open_judge, options, words):
    with pytest.raises(RewardConfigError, match=words), open_judge(options):
        pass


def test_one_server_a_rank_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = RewardsConfig.model_validate({"components": {"judge": {"use": "llm_judge"}}, "judge": {"serve": {"model": "org/name"}}})
    with (
        pytest.raises(RewardConfigError, match="with 2 ranks would start a server on each"),
        open_llm_judge(LlmJudgeOptions(), config, None),
    ):
        pass


def test_a_judge_component_needs_a_judge():
    config = RewardsConfig.model_validate({"components": {"judge": {"use": "llm_judge"}}})
    with pytest.raises(RewardConfigError, match=r"give rewards\.judge a `url`"), open_llm_judge(LlmJudgeOptions(), config, None):
        pass
