"""The wire to a vLLM server's token end point: where it answers, whether it is there, one request, an image as it travels. No torch.

`/inference/v1/generate` (vLLM's --enable-scale-out) takes compact token ids and images, expands them itself and says which ids it read.
Nothing is ever decoded and encoded again.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from typing import Any

import httpx
from pydantic_core import from_json

from .records import ImagePart, VlpostError

GENERATE_PATH = "/inference/v1/generate"
_BUSY = 429
_EXCERPT_CHARS = 300


class RequestFailedError(VlpostError):
    """A request got no usable reply; the same one may succeed later."""


class ServerAwayError(RequestFailedError):
    """The server does not answer."""


class ServerTimeoutError(ServerAwayError):
    """The server did not answer in time."""


class ServerBusyError(VlpostError):
    """The server asks for time."""


class RequestRefusedError(VlpostError):
    """The server will not answer this request, now or later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where a model answers: `Endpoint(url="http://127.0.0.1:8123", model="teacher", api_key="...")`."""

    url: str
    """Without /v1 and without a slash at its end."""
    model: str
    """The name that the server gives to its model."""
    api_key: str | None = field(repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """What every request says."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}


def open_client(endpoint: Endpoint, *, timeout_s: float | None) -> httpx.Client:
    """Returns a client of one server; `timeout_s` None waits for ever."""
    return httpx.Client(
        base_url=endpoint.url,
        headers={**endpoint.headers, "Content-Type": "application/json"},
        timeout=timeout_s,
        trust_env=False,
        follow_redirects=False,  # a redirect would take the key along
        limits=httpx.Limits(max_connections=None),
    )


def post(http: httpx.Client, path: str, body: bytes) -> dict[str, Any]:
    """Returns the JSON object that a server answers; raises one of the errors above."""
    return _object(path, _content(http, path, body))


def tell(http: httpx.Client, path: str, **words: object) -> dict[str, Any]:
    """Returns what a server answers to a word of the run, nothing where it only obeys; raises one of the errors above."""
    content = _content(http, path, json.dumps(words).encode())
    return _object(path, content) if content else {}


def _object(path: str, content: bytes) -> dict[str, Any]:
    try:
        # Several times as fast as `json`; takes NaN, which JSON has no word for and servers write all the same.
        found = from_json(content, cache_strings="keys")
    except ValueError as error:
        raise RequestFailedError(f"{path}: a reply that is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise RequestFailedError(f"{path}: a reply that is a {type(found).__name__}, not an object")
    return found


def _content(http: httpx.Client, path: str, body: bytes) -> bytes:
    try:
        reply = http.post(path, content=body)
    except httpx.TimeoutException as error:
        raise ServerTimeoutError(f"{type(error).__name__}: {error}") from error
    except httpx.TransportError as error:
        raise ServerAwayError(f"{type(error).__name__}: {error}") from error
    said = f"status {reply.status_code}: {reply.text[:_EXCERPT_CHARS]}" if reply.status_code != 200 else ""
    if reply.status_code == _BUSY:
        raise ServerBusyError(said)
    if reply.status_code >= 500 or reply.status_code == 408:
        raise RequestFailedError(said)
    if said:
        raise RequestRefusedError(said)
    return reply.content


def answers(client: httpx.Client, endpoint: Endpoint, *, timeout_s: float) -> str | None:
    """Returns None where the server is well and has the model, else what it says instead."""
    try:
        # /health asks the engine, which may be dead behind a server that still answers; it may need no key, so a stranger on the port
        # would pass: hence /v1/models.
        for path in ("/health", "/v1/models"):
            reply = client.get(f"{endpoint.url}{path}", headers=endpoint.headers, timeout=timeout_s)
            if reply.status_code != 200:
                return f"{path}: status {reply.status_code} {reply.reason_phrase}"
        names = [str(model["id"]) for model in reply.json()["data"]]
    except httpx.TransportError as error:
        return f"{type(error).__name__}: {error}"
    except (ValueError, KeyError, TypeError):
        return "/v1/models: no list of models"
    return None if endpoint.model in names else f"it has {', '.join(names)}, not {endpoint.model}"


def image_content(part: ImagePart) -> dict[str, str]:
    """Returns the image as an entry of a request's `content_parts`: PNG, which loses nothing; the digest beside it tells equal images."""
    encoded = io.BytesIO()
    part.image.save(encoded, format="PNG", compress_level=1)
    url = "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")
    return {"type": "image_url", "url": url, "uuid": part.digest}
