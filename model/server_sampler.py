"""Drawing from vLLM servers beside the run: token ids and images in, token ids and the engine's log-probs out, weights through a folder.

Requests wait in one queue and go to whichever server is free. A server that dies or hangs is started again and gets the current weights;
what it has not answered goes back into the queue with the same seeds. Every response bears the label of the weights that drew it, put
there by the engine: one of other weights is never taken.
"""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import torch
from safetensors.torch import save_file
from torch import Tensor

from .chat import Chat
from .config import DType, SamplerConfig, SamplerServeConfig
from .engine_server import EngineServer, ServerPlan, argument_line, vllm_command
from .fingerprint import Fingerprint
from .layout import Ranks
from .records import DataError, ImagePart, Rollout
from .sampler import EngineError, SampleRequest, check_prompt_ids, check_requests_fit, drawn_rollout, engine_options
from .served_engine import LABEL_KEY, Guard, WeightTaker
from .token_client import (
    GENERATE_PATH,
    Endpoint,
    RequestFailedError,
    RequestRefusedError,
    ServerAwayError,
    ServerBusyError,
    ServerTimeoutError,
    answers,
    image_content,
    open_client,
    post,
    tell,
)

_SERVED_AS = "policy"
_STOP_S = 5.0
"""Of a server that is stopped, seconds: it holds nothing that has to be finished."""
_PAUSE_S = 0.5
_PROBE_TIMEOUT_S = 10.0
_SHARD_BYTES = 2 * 2**30
_NO_LOGPROB = -9999.0
"""What the end point writes for a log-prob that is not finite (vLLM 0.32, token_in_token_out/serving.py `_clamp_logprob`)."""


def serve_arguments(config: SamplerConfig, serve: SamplerServeConfig, *, model_folder: Path, dtype: DType) -> list[str]:
    """Returns the arguments of a server that draws; the engine's own are those of the engine in this process."""
    options = engine_options(config, dtype=dtype)
    if not torch.cuda.is_available() and "distributed_executor_backend" not in serve.arguments:
        options["distributed_executor_backend"] = "uni"  # a process less, and one import of torch less at every start
    return [
        *("--model", str(model_folder), "--served-model-name", _SERVED_AS, "--enable-scale-out", "--disable-uvicorn-access-log"),
        *("--limit-mm-per-prompt", json.dumps({"image": config.max_images_per_prompt, "video": 0})),
        *("--middleware", f"{Guard.__module__}.{Guard.__qualname__}"),
        *("--worker-extension-cls", f"{WeightTaker.__module__}.{WeightTaker.__qualname__}"),
        *argument_line(options),
        *argument_line(serve.arguments),
    ]


class StaleWeightsError(RequestFailedError):
    """A response was drawn by other weights than the current ones: its server has been started again and waits for them."""


class Draws:
    """Responses that are being drawn; `result` waits for them."""

    def __init__(self, sampler: ServerSampler, requests: Sequence[SampleRequest]) -> None:
        self.requests = requests
        self.policy_version = sampler.policy_version
        self._sampler = sampler
        self._waiting = deque(range(len(requests)))
        self._replies: dict[int, Mapping[str, Any]] = {}
        self._failures = [0] * len(requests)
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self.is_closed = False

    @property
    def is_done(self) -> bool:
        """True once `result` would not wait."""
        return self.is_closed or self._error is not None or self.is_whole

    @property
    def is_whole(self) -> bool:
        """True once all responses are there."""
        return len(self._replies) == len(self.requests)

    def result(self) -> list[tuple[Rollout, ...]]:
        """Returns the rollouts of each request, in order, once all are there; raises what kept one from being drawn."""
        with self._changed:
            # In parts: a wait without an end would not notice Ctrl-C on every system.
            while not self.is_done:
                self._changed.wait(_PAUSE_S)
            if self._error is not None:
                raise self._error
            assert not self.is_closed, "the servers were stopped before all responses were there"
        return [self._sampler.rollouts(request, self._replies[n], self.policy_version) for n, request in enumerate(self.requests)]

    def close(self) -> None:
        """Gives up on what is not there yet."""
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()

    def next(self) -> int | None:
        """Returns the number of a request to ask; waits while all are being asked, None once none is needed."""
        with self._changed:
            while not self._waiting and not self.is_done:
                self._changed.wait()
            return None if self.is_done else self._waiting.popleft()

    def put_back(self, number: int) -> None:
        """Has a request asked again."""
        with self._changed:
            self._waiting.appendleft(number)
            # All: the one that is woken may be `result`, or a thread of the server that was lost.
            self._changed.notify_all()

    def store(self, number: int, reply: Mapping[str, Any]) -> None:
        """Keeps a reply; each request has one."""
        with self._changed:
            assert number not in self._replies, f"two replies to request {number}"
            self._replies[number] = reply
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Ends the drawing; the first error is told."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def count_failure(self, number: int) -> int:
        """Returns how often a request has failed by now while its server was well."""
        with self._changed:
            self._failures[number] += 1
            return self._failures[number]


class _Held:
    """What one server holds."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.label = ""
        self.fingerprint = ""


class ServerSampler:
    """vLLM in servers of the run; a context manager that starts and ends them. The first rank does; all ranks ask."""

    def __init__(
        self,
        model_folder: Path,
        *,
        chat: Chat,
        config: SamplerConfig,
        allowed: Tensor,
        stop_token_ids: Sequence[int],
        dtype: DType,
        run_folder: Path,
        supervisor: str,
        heed: Callable[[str], None],
    ) -> None:
        """`supervisor` is the module that ends a server when the run is gone (`engine_server.ServerPlan`); `heed` is told of every death
        and every start of a server, on another thread. Logs go to `run_folder`, and weights where `serve.weights_folder` names nothing."""
        assert config.serve is not None, "without `serve` the engine runs in this process"
        self.chat = chat
        self.config = config
        self.serve = config.serve
        self.policy_version = 0
        self._model_folder = model_folder
        self._dtype: DType = dtype
        self._stop_token_ids = list(stop_token_ids)
        self._allowed_ids = allowed.nonzero()[:, 0].tolist()
        self._ranks = Ranks()
        self._weights = (self.serve.weights_folder or run_folder) / f"published-{secrets.token_hex(4)}"
        self._run_folder = run_folder
        self._supervisor = supervisor
        self._heed = heed
        self._servers: list[EngineServer] = []
        self._endpoints: list[Endpoint] = []
        self._held = [_Held() for _ in range(self.serve.servers)]
        self._label = ""
        self._last: tuple[str, str] | None = None
        self._draws: Draws | None = None
        self._open = ExitStack()

    def __enter__(self) -> ServerSampler:
        problem: str | None = None
        machines = sorted(set(self._ranks.gather(socket.gethostname())))
        if len(machines) > 1:
            raise EngineError(
                f"sampler.serve: the servers answer on one machine's loopback, and the run spans {len(machines)} machines "
                f"({', '.join(machines[:3])}): leave it out"
            )
        if self._ranks.is_first:
            try:
                self._start()
            except EngineError as error:
                self._open.close()
                problem = str(error)
        told = self._ranks.gather((problem, [server.endpoint for server in self._servers]))[0]
        if told[0] is not None:
            raise EngineError(told[0])
        self._endpoints = told[1]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._draws is not None:
            self._draws.close()
        self._open.close()

    def sample(self, requests: Sequence[SampleRequest]) -> list[tuple[Rollout, ...]]:
        """Returns the rollouts of each request, in order; every response with the engine's own log-probs."""
        return self.start(requests).result()

    def start(self, requests: Sequence[SampleRequest]) -> Draws:
        """Returns at once what is being drawn. One drawing at a time; the weights may be replaced once it is done."""
        if not self._label:
            raise EngineError(
                "no weights have been published: the servers would answer with those they started from; publish before sampling"
            )
        if self._is_drawing:
            raise EngineError("responses are being drawn: wait for them before you start another drawing")
        check_requests_fit(requests, self.config)
        for request in requests:
            if request.num_rollouts > self.config.max_num_seqs:
                raise EngineError(
                    f"{request.place}: {request.num_rollouts} responses are wanted and sampler.max_num_seqs = {self.config.max_num_seqs}: "
                    "a server draws the whole group at once; raise the latter"
                )
            if not all(isinstance(part, ImagePart) for part in request.prompt.media):
                raise DataError(
                    f"{request.place}: a server takes images only, this prompt has a video: drop the row, or leave sampler.serve out"
                )
        self._draws = draws = Draws(self, requests)
        lanes = min(self.serve.max_concurrent, -(-len(requests) // len(self._endpoints)))
        for number in range(len(self._endpoints)):
            for lane in range(lanes):
                threading.Thread(target=self._take_part, args=(number, draws), name=f"engine-{number}-{lane}", daemon=True).start()
        return draws

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Writes the weights once, has every server read them and forget what it computed with others, and checks that they did.

        A collective. The label of the weights comes back from the workers, out of the files that they read, and a fingerprint of what
        they hold: all servers must have the same, another one than before exactly when what was sent is another. Raises `EngineError` on
        all ranks otherwise.
        """
        if any(self._ranks.gather(self._is_drawing)):  # all ranks draw from the same servers
            raise EngineError("responses are being drawn: wait for them before you replace the weights")
        problem: str | None = None
        if self._ranks.is_first:
            problem = self._publish(weights, policy_version)
        else:
            for _ in weights:  # gathered by all ranks together
                pass
        problem, self._label = self._ranks.gather((problem, self._label))[0]
        if problem is not None:
            raise EngineError(problem)
        self.policy_version = policy_version

    def load_adapter(self, folder: Path, policy_version: int) -> None:
        """Raises `EngineError`: servers take whole weights."""
        raise EngineError(
            f"{folder}: servers take whole weights, not the adapter of update {policy_version}: write learner: {{lora: {{publish: "
            "merged}}}}, or leave sampler.serve out"
        )

    def release_memory(self) -> None:
        """Does nothing: the servers' memory is their own."""

    def rollouts(self, request: SampleRequest, reply: Mapping[str, Any], policy_version: int) -> tuple[Rollout, ...]:
        """Returns the rollouts of a checked reply."""
        return tuple(
            drawn_rollout(
                request,
                choice["token_ids"],
                [entry["logprob"] for entry in choice["logprobs"]["content"]],
                chat=self.chat,
                finish_reason=choice["finish_reason"],
                policy_version=policy_version,
            )
            for choice in sorted(reply["choices"], key=lambda choice: choice["index"])
        )

    @property
    def _is_drawing(self) -> bool:
        return self._draws is not None and not self._draws.is_done

    def _start(self) -> None:
        """Starts all servers at once; where one does not start, none is left."""
        self._weights.mkdir(parents=True)
        self._open.callback(shutil.rmtree, self._weights, ignore_errors=True)
        arguments = serve_arguments(self.config, self.serve, model_folder=self._model_folder, dtype=self._dtype)
        for number in range(self.serve.servers):
            environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": str(self.config.kv_cache_gib)}
            if not torch.cuda.is_available():
                # Or vllm 0.32 overrules `uni` on the CPU (platforms/cpu.py) to set OpenMP's environment, which the run has set.
                environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            if self.serve.devices:
                environment["CUDA_VISIBLE_DEVICES"] = self.serve.devices[number]
            plan = ServerPlan(
                owner=f"engine {number}",
                command=lambda port: vllm_command(arguments, port=port),
                served_as=_SERVED_AS,
                environment=environment,
                log_file=self._run_folder / f"engine-{number}.log",
                supervisor=self._supervisor,
                error=EngineError,
                port=0,
                start_timeout_s=self.serve.start_timeout_s,
                max_restarts=self.serve.max_restarts,
                stop_s=_STOP_S,
                probe_path="/weight_info",
                hung_after_s=self.serve.hung_after_s,
            )
            self._servers.append(
                EngineServer(
                    plan,
                    heed=lambda what, number=number: self._heed(f"engine {number}: {what}"),
                    make_ready=lambda number=number: self._give_weights(number),
                )
            )
        with ThreadPoolExecutor(len(self._servers)) as pool:
            started = [pool.submit(self._open.enter_context, server) for server in self._servers]
        for future in started:
            future.result()

    def _publish(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> str | None:
        """Returns what went wrong, None where all servers hold the weights."""
        label, old = f"update-{policy_version}-{secrets.token_hex(4)}", self._label
        problem, sent = _write_weights(weights, self._weights / label, label=label, dtype=self._dtype)
        if problem is not None:
            return problem
        self._label = label
        try:
            with ThreadPoolExecutor(len(self._servers)) as pool:
                for future in [pool.submit(self._bring, number) for number in range(len(self._servers))]:
                    future.result()
            held = {of.fingerprint for of in self._held}
            if len(held) > 1:
                return f"the servers hold {len(held)} different weights after the publish of update {policy_version}"
            (fingerprint,) = held
            if self._last is not None and (sent == self._last[0]) != (fingerprint == self._last[1]):
                return (
                    f"the weights of update {policy_version} did not arrive: what was sent is "
                    f"{'what' if sent == self._last[0] else 'not what'} was sent before, and what the servers hold is "
                    f"{'what' if fingerprint == self._last[1] else 'not what'} they held"
                )
            self._last = sent, fingerprint
        except EngineError as error:
            return str(error)
        if old:
            shutil.rmtree(self._weights / old, ignore_errors=True)
        return None

    def _bring(self, number: int) -> None:
        """Returns once a server holds the current weights, however often it has to be started for that."""
        server = self._servers[number]
        while True:
            if server.fault is not None:
                raise EngineError(f"engine {number}: {server.fault}")
            if server.is_up:
                try:
                    self._give_weights(number)
                except ServerTimeoutError:
                    server.condemn(f"has not taken its weights within {self.serve.publish_timeout_s:g} s")
                except ServerAwayError:
                    pass  # it is started again
            if self._held[number].label == self._label:
                return
            time.sleep(_PAUSE_S)

    def _give_weights(self, number: int) -> None:
        """Has a server take the current weights and forget what it computed with others."""
        held, label = self._held[number], self._label
        if not label:
            return
        endpoint = self._servers[number].endpoint
        with held.lock, self._servers[number].working(), open_client(endpoint, timeout_s=self.serve.publish_timeout_s) as http:
            held.label = ""
            try:
                folder = str((self._weights / label).resolve())
                taken = tell(http, "/collective_rpc", method="take_published_weights", args=[folder])["results"]
                is_reset = tell(http, "/reset_prefix_cache")["success"]
                for path in ("/reset_mm_cache", "/reset_encoder_cache"):
                    tell(http, path)
                tell(http, "/update_weight_version", new_version=label)
            except ServerAwayError:
                raise
            except (RequestFailedError, RequestRefusedError, ServerBusyError) as error:
                raise EngineError(f"engine {number}: did not take the weights labelled {label}: {error}; see its log") from error
            if {one["label"] for one in taken} != {label}:
                raise EngineError(f"engine {number}: its workers read weights labelled {[one['label'] for one in taken]}, not {label}")
            if not is_reset:
                raise EngineError(f"engine {number}: could not reset its prefix cache: it would answer from keys and values of old weights")
            held.fingerprint = ",".join(one["fingerprint"] for one in taken)
            held.label = label

    def _take_part(self, number: int, draws: Draws) -> None:
        """Asks a server while that is needed; whatever ends it early ends the drawing too, which would wait for ever."""
        try:
            self._ask_while_needed(number, draws)
        except Exception as error:
            fault = EngineError(f"engine {number}: asking it failed: {type(error).__name__}: {error}; see {self._run_folder}")
            fault.__cause__ = error
            draws.fail(fault)  # raised in the thread that waits

    def _ask_while_needed(self, number: int, draws: Draws) -> None:
        """Takes requests of a drawing to a server, one after another, until none is needed."""
        server = self._servers[number] if self._servers else None
        with open_client(self._endpoints[number], timeout_s=None) as http:
            while not draws.is_done:
                if server is not None and server.fault is not None:
                    draws.fail(EngineError(f"engine {number}: {server.fault}"))
                    return
                if server is not None and not server.is_up:
                    time.sleep(_PAUSE_S)
                    continue
                wanted = draws.next()
                if wanted is None:
                    return
                try:
                    reply = self._ask(http, draws.requests[wanted])
                except (RequestFailedError, ServerBusyError) as error:
                    is_well = answers(http, self._endpoints[number], timeout_s=_PROBE_TIMEOUT_S) is None
                    is_own = isinstance(error, RequestFailedError) and not isinstance(error, StaleWeightsError)
                    if is_well and is_own and draws.count_failure(wanted) >= self.serve.max_tries:
                        place = draws.requests[wanted].place
                        draws.fail(EngineError(f"engine {number}: {place} failed {self.serve.max_tries} times (serve.max_tries): {error}"))
                    draws.put_back(wanted)
                    time.sleep(_PAUSE_S)
                except (EngineError, RequestRefusedError) as error:
                    draws.fail(EngineError(f"engine {number}: {error}"))
                else:
                    draws.store(wanted, reply)

    def _ask(self, http: httpx.Client, request: SampleRequest) -> Mapping[str, Any]:
        """Returns the checked reply to a request."""
        body = {
            "model": _SERVED_AS,
            "token_ids": list(request.prompt.compact_ids),
            "content_parts": [image_content(part) for part in request.prompt.media if isinstance(part, ImagePart)],
            "sampling_params": {
                "n": request.num_rollouts,
                "temperature": request.temperature,
                "top_p": request.top_p,
                "top_k": request.top_k,
                "presence_penalty": request.presence_penalty,
                "seed": request.seed,
                "max_tokens": self.config.max_response_tokens,
                "logprobs": 0,
                "detokenize": False,
                "stop_token_ids": self._stop_token_ids,
                "allowed_token_ids": self._allowed_ids,
            },
            "return_token_ids": True,
        }
        label = self._label
        reply = post(http, GENERATE_PATH, json.dumps(body).encode())
        check_reply(request, reply, label)
        return reply


def check_reply(request: SampleRequest, reply: Mapping[str, Any], label: str) -> None:
    """Raises `RequestFailedError` for a reply of other weights or an unfinished one, `EngineError` for one that must not be trained on."""
    place = request.place
    check_prompt_ids(request, reply.get("prompt_token_ids") or ())
    choices = reply.get("choices") or []
    if sorted(choice["index"] for choice in choices) != list(range(request.num_rollouts)):
        raise EngineError(f"{place}: {len(choices)} responses, {request.num_rollouts} were asked for")
    for choice in choices:
        drawn_by = {span["version"] for span in choice["weight_versions"] or ()}
        if drawn_by != {label}:
            raise StaleWeightsError(f"{place}: drawn by weights {', '.join(sorted(drawn_by)) or 'without a label'}, not {label}")
        if choice["finish_reason"] not in ("stop", "length"):
            raise RequestFailedError(f"{place}: a response ended by {choice['finish_reason']!r}")
        content = (choice["logprobs"] or {}).get("content") or []
        if [entry["token_id"] for entry in content] != choice["token_ids"]:
            raise EngineError(f"{place}: {len(content)} log-probs for {len(choice['token_ids'])} sampled tokens, or of other tokens")
        if any(entry["logprob"] <= _NO_LOGPROB for entry in content):
            raise EngineError(f"{place}: the log-prob of a sampled token is not finite: look for a broken weight or an overflow")


def _write_weights(weights: Iterable[tuple[str, Tensor]], folder: Path, *, label: str, dtype: DType) -> tuple[str | None, str]:
    """Writes the weights, in the engine's dtype, as files that bear the label; returns what went wrong or None, and their fingerprint.

    All weights are taken from the iterator even then: other ranks gather them together with this one.
    """
    sent, problem = Fingerprint(), None
    shard: dict[str, Tensor] = {}
    number = size = 0

    def write() -> str | None:
        nonlocal shard, size, number
        try:
            folder.mkdir(exist_ok=True)
            save_file(shard, folder / f"weights-{number:05d}.safetensors", metadata={LABEL_KEY: label})
        except OSError as error:
            return f"{folder}: the weights of {label} cannot be written: {error}; free some space, or name a serve.weights_folder"
        shard, size, number = {}, 0, number + 1
        return None

    for name, tensor in weights:
        if problem is not None:
            continue
        kept = tensor.detach().to(device="cpu", dtype=getattr(torch, dtype) if tensor.is_floating_point() else None).contiguous()
        sent.add(name, kept)
        # Two names of one tensor are two tensors in the file.
        shard[name] = kept.clone() if kept.data_ptr() == tensor.data_ptr() else kept
        size += kept.numel() * kept.element_size()
        if size >= _SHARD_BYTES:
            problem = write()
    if shard and problem is None:
        problem = write()
    return problem, sent.hexdigest()
