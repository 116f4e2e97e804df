"""A teacher's vLLM server that the run starts itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..model.engine_server import EngineServer, ServerPlan, argument_line, vllm_command
from ..rewards import judge_server_main as supervisor
from ..rewards.judge_server import STOP_S
from .config import ServerConfig
from .teacher import TeacherError

SERVED_NAME = "teacher"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """What a server is started with beside its settings."""

    source: str
    """Folder or hub name."""
    dtype: str
    """float32 or bfloat16."""
    max_model_len: int
    max_images_per_prompt: int
    max_logprobs: int
    """Most ids that a request asks for at a position."""


def serve_command(config: ServerConfig, model: ServedModel, *, port: int) -> list[str]:
    """Returns the command line of vLLM's server."""
    limits = json.dumps({"image": model.max_images_per_prompt, "video": 0})
    arguments = ["--model", model.source, "--served-model-name", SERVED_NAME, "--dtype", model.dtype]
    arguments += ["--max-model-len", str(model.max_model_len), "--limit-mm-per-prompt", limits]
    arguments += ["--max-logprobs", str(model.max_logprobs), "--logprobs-mode", "raw_logprobs", "--generation-config", "vllm"]
    # The end point that takes token ids with images. Requests for prompt log-probs do not read the prefix cache.
    arguments += ["--enable-scale-out", "--no-enable-prefix-caching", "--load-format", "safetensors"]
    arguments += ["--gpu-memory-utilization", str(config.gpu_memory_utilization)]
    return vllm_command([*arguments, *argument_line(config.arguments)], port=port)


def teacher_server(config: ServerConfig, model: ServedModel, *, name: str, log_file: Path, heed: Callable[[str], None]) -> EngineServer:
    """Returns the server, not yet started; `name` is what messages call the teacher, and `heed` is told of every death and every start.

    Only the end of its process counts as its loss: a teacher that takes long over a request answers nothing else meanwhile.
    """
    environment = {"VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib)}
    if config.devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = config.devices
    plan = ServerPlan(
        owner=f"teacher {name}",
        command=lambda port: serve_command(config, model, port=port),
        served_as=SERVED_NAME,
        environment=environment,
        log_file=log_file,
        supervisor=supervisor.__name__,
        error=TeacherError,
        port=config.port,
        start_timeout_s=config.start_timeout_s,
        max_restarts=config.max_restarts,
        stop_s=STOP_S,
    )
    return EngineServer(plan, heed=heed)
