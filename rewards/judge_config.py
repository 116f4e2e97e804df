"""Settings of the judge model: which server answers, how patiently it is asked, and what a run may cost."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from ..model.config import Settings
from ..model.records import VlpostError

# Given by the other settings, or letting code from the model's folder or a second file of settings in. argparse takes any
# unambiguous beginning of a name, so beginnings are refused with them.
_RESERVED_ARGUMENTS = (
    *("host", "port", "uds", "api-key", "config", "model", "served-model-name", "revision", "trust-remote-code"),
    *("gpu-memory-utilization", "allowed-local-media-path", "root-path", "middleware", "log-config-file", "logits-processors"),
    *("tool-parser-plugin", "reasoning-parser-plugin", "io-processor-plugin", "worker-cls", "worker-extension-cls", "scheduler-cls"),
    *("kv-transfer-config", "ec-transfer-config", "structured-outputs-config"),
)
_OWN_BODY_KEYS = ("model", "messages", "temperature", "max_tokens", "seed", "response_format", "stream", "n")


class JudgeUrlError(VlpostError):
    """An address that cannot be used. Not a ValueError: pydantic would print the value, and with it a key that stands in it."""


Seconds = Annotated[float, Field(gt=0.0)]


class ServeConfig(Settings):
    """A judge server that the run starts for itself on loopback: `ServeConfig(model="Qwen/Qwen3-VL-8B-Instruct")`."""

    model: Annotated[str, Field(min_length=1)]
    """A folder, written with a leading `/`, `./` or `../` (relative to the recipe), or a hub id `org/name`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; absent: the newest."""
    port: int = Field(default=0, ge=0, le=65535)
    """0: any free one."""
    gpu_memory_utilization: float = Field(default=0.3, gt=0.0, le=1.0)
    """Share of a GPU that the server may take beside the trainer."""
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES of the server, such as "1"; absent: that of the run."""
    arguments: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Further arguments of vLLM's server by name, such as `max_model_len: 8192`; `true` gives the bare flag."""
    start_timeout_s: Seconds = 900.0
    """Longest wait until the server answers, seconds."""
    log_file: Path | None = None
    """What the server prints, relative to the recipe; absent: a temporary file, removed after a clean end."""

    @field_validator("model")
    @classmethod
    def _folder_or_hub_id(cls, model: str) -> str:
        if not model.startswith(("/", "./", "../")) and model.count("/") != 1:
            raise ValueError(f"{model!r} is neither a folder nor a hub id: write ./folder, /folder or org/name")
        return model

    @field_validator("arguments")
    @classmethod
    def _no_reserved_argument(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in arguments:
            flag = name.strip("-").replace("_", "-").split(".")[0]
            reserved = [other for other in _RESERVED_ARGUMENTS if other.startswith(flag)]
            if not flag or not flag.replace("-", "").isalnum() or reserved:
                raise ValueError(
                    f"argument {name!r} is not passed on to the server"
                    f"{f': it stands for --{reserved[0]}, which the run decides itself' if flag and reserved else ''}; take it out"
                )
        return arguments


class JudgeConfig(Settings):
    """A judge model behind an OpenAI-compatible server: `JudgeConfig(url="http://127.0.0.1:8000/v1", model="qwen3-vl-8b")`.

    Either `url` and `model` of a server that runs already, or `serve` to start one. Keys are never written here: `api_key_env` names
    the environment variable that holds one.
    """

    url: str | None = None
    """Base address up to `/v1`. https; http only to this machine unless `allow_plain_http`."""
    model: str | None = None
    """Name of the model as the server knows it."""
    revision: str = ""
    """Anything that tells one state of the served weights from another; part of the cache's key."""
    api_key_env: str | None = None
    """Environment variable that holds the key; absent: no key is sent."""
    allow_plain_http: bool = False
    """True: prompts, images and key may cross the network unencrypted."""
    serve: ServeConfig | None = None

    temperature: float = Field(default=0.0, ge=0.0)
    """Of the verdict."""
    max_tokens: int = Field(default=512, ge=8)
    """Longest verdict, tokens; one that is cut off is no verdict."""
    seed: int = Field(default=0, ge=0)
    """Of the verdict's sampling, and of the delimiters around the data."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further keys of each request, such as `chat_template_kwargs: {enable_thinking: false}`; part of the cache's key."""

    deadline_s: Seconds = 300.0
    """Longest work on one verdict, retries and their waits included, seconds; pauses of the whole step do not count."""
    request_timeout_s: Seconds = 120.0
    """Longest wait for one whole reply, however slowly it trickles in, seconds; then it is tried again within the deadline."""
    max_concurrent: int = Field(default=32, ge=1)
    """Requests in flight at once."""
    retries: int = Field(default=4, ge=0)
    """Further tries of one verdict after a reset, a timeout, a 5xx or a reply that is none."""
    backoff_s: Seconds = 0.5
    """The n-th retry waits a random time of up to backoff_s x 2^n, at most `max_backoff_s`."""
    max_backoff_s: Seconds = 30.0
    max_retry_after_s: Seconds = 120.0
    """A longer Retry-After of the server is cut to this, seconds."""
    breaker_failures: int = Field(default=8, ge=1)
    """Failures in a row, over all verdicts, that pause the step."""
    probe_s: Seconds = 2.0
    """First wait between two looks at a server that is down, seconds; doubles up to `max_backoff_s`."""
    max_outage_s: float = Field(default=1800.0, ge=0.0)
    """Longest pause for one verdict, seconds; after it the verdict is unavailable."""

    max_calls: int | None = Field(default=None, ge=1)
    """Requests of one process, retries, probes and canaries included; reached: the run stops. None: no limit."""
    max_run_tokens: int | None = Field(default=None, ge=1)
    """Prompt and verdict tokens of one process, as the server counts them; reached: the run stops. None: no limit. Requests in flight are
    not counted yet: the overshoot is at most that of `max_concurrent` requests."""

    canary_every: int = Field(default=500, ge=0)
    """Verdicts between two rounds of canaries (questions whose verdict is known); the first round precedes the first verdict. 0: none."""
    min_canary_accuracy: float = Field(default=0.8, ge=0.0, le=1.0)
    """Share of canaries judged as known; below it the run stops."""
    cache: Path | None = None
    """File that keeps verdicts by content, relative to the recipe; a row that it holds costs no request. None: nothing is kept."""

    @property
    def base_url(self) -> str:
        """The address without a slash at the end; only for a judge that is not served by the run."""
        assert self.url is not None, "a judge without `serve` has a url"
        return self.url.rstrip("/")

    @field_validator("url")
    @classmethod
    def _url_hides_nothing(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            host, _port = parts.hostname, parts.port
        except ValueError:
            raise JudgeUrlError("rewards.judge.url is no address; write https://host/v1") from None
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise JudgeUrlError(
                "rewards.judge.url holds a user name, a password, a query or a fragment (not shown here); give the key by api_key_env"
            )
        if parts.scheme not in ("http", "https") or not host:
            raise JudgeUrlError("rewards.judge.url must begin with https:// (or http:// for this machine) and name a host")
        if _is_every_interface(host):
            raise JudgeUrlError(f"rewards.judge.url names {host}, which is every interface and no address; write 127.0.0.1")
        return url

    @field_validator("extra_body")
    @classmethod
    def _extra_body_adds_only(cls, extra_body: dict[str, Any]) -> dict[str, Any]:
        taken = [key for key in extra_body if key in _OWN_BODY_KEYS]
        if taken:
            raise ValueError(f"rewards.judge.extra_body sets {taken[0]!r}, which the judge sets itself; take it out")
        return extra_body

    @model_validator(mode="after")
    def _one_server(self) -> JudgeConfig:
        if (self.url is None) == (self.serve is None):
            raise ValueError("rewards.judge needs either `url` and `model` of a running server, or `serve` to start one")
        if self.serve is not None:
            given = [name for name in ("model", "revision", "api_key_env", "allow_plain_http") if name in self.model_fields_set]
            if given:
                raise ValueError(f"rewards.judge.{given[0]} has no effect beside `serve`; take it out")
        elif not self.model:
            raise ValueError("rewards.judge.url without `model`: name the model as the server knows it")
        elif urlsplit(self.base_url).scheme == "http" and not is_loopback(self.base_url) and not self.allow_plain_http:
            raise ValueError(
                "rewards.judge.url is plain http to another machine: prompts and key would cross the network unencrypted; "
                "write https, or allow_plain_http: true for a network that you trust"
            )
        return self


def _is_every_interface(host: str) -> bool:
    with contextlib.suppress(OSError):
        # Also in the short forms that a socket takes, such as `0`.
        if socket.inet_aton(host) == bytes(4):
            return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_unspecified


def is_loopback(url: str) -> bool:
    """Returns true when the address is this machine and nothing else."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
