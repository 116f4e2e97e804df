"""What becomes of each reply of a token server."""

import httpx
import pytest
from vlpost.model.token_client import (
    RequestFailedError,
    RequestRefusedError,
    ServerAwayError,
    ServerBusyError,
    ServerTimeoutError,
    post,
    tell,
)


def client_of(reply):
    """Returns a client whose server answers with a reply, or fails as an exception says."""

    def answer(request):
        if isinstance(reply, type):
            raise reply("gone", request=request)
        return reply

    return httpx.Client(base_url="http://127.0.0.1:1", transport=httpx.MockTransport(answer))


def ask(http):
    return post(http, "/generate", b"{}")


def say(http):
    return tell(http, "/generate", version=3)


@pytest.mark.parametrize("send", [ask, say])
@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (httpx.Response(200, content=b"<html>"), RequestFailedError, "/generate: a reply that is no JSON"),
        (httpx.Response(200, content=b"[1]"), RequestFailedError, "/generate: a reply that is a list, not an object"),
        (httpx.Response(429), ServerBusyError, "status 429"),
        (httpx.Response(408), RequestFailedError, "status 408"),
        (httpx.Response(503, content=b"starting"), RequestFailedError, "status 503: starting"),
        (httpx.Response(404, content=b"no such model"), RequestRefusedError, "status 404: no such model"),
        (httpx.Response(302), RequestRefusedError, "status 302"),
        (httpx.ReadTimeout, ServerTimeoutError, "ReadTimeout: gone"),
        (httpx.ConnectError, ServerAwayError, "ConnectError: gone"),
    ],
)
def test_a_reply_that_is_none_is_an_error_of_its_kind(send, reply, error, words):
    with pytest.raises(error, match=words) as caught:
        send(client_of(reply))
    assert type(caught.value) is error


@pytest.mark.parametrize("send", [ask, say])
def test_an_object_is_returned_also_with_nan(send):
    found = send(client_of(httpx.Response(200, content=b'{"a": [1, NaN]}')))
    assert found.keys() == {"a"}
    assert found["a"][0] == 1
    assert found["a"][1] != found["a"][1]


def test_only_a_server_that_is_told_something_may_answer_with_nothing():
    assert say(client_of(httpx.Response(200))) == {}
    with pytest.raises(RequestFailedError, match="a reply that is no JSON"):
        ask(client_of(httpx.Response(200)))


def test_a_word_travels_as_a_json_object():
    seen = []

    def answer(request):
        seen.append((request.url.path, request.content))
        return httpx.Response(200)

    tell(httpx.Client(base_url="http://127.0.0.1:1", transport=httpx.MockTransport(answer)), "/update", version=3)
    assert seen == [("/update", b'{"version": 3}')]
