"""Drawing responses: the Sampler protocol, and vLLM in this process.

Token ids in, token ids out. Every request has its own seed, hashed from what it is for; no two are neighbours, because child i of a
vLLM request draws with seed + i.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from .chat import Chat, EncodedPrompt, check_fits, video_metadata
from .config import ENGINE_ENVIRONMENT, DType, SamplerConfig
from .records import ImagePart, Rollout, VideoPart, VlpostError
from .training_state import isolated_rng


class EngineError(VlpostError):
    """The engine cannot start, or it did something that would train on wrong data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """Draw `num_rollouts` responses to a prompt."""

    place: str
    """Whose prompt it is, for messages: an example id."""
    prompt: EncodedPrompt
    num_rollouts: int
    seed: int
    temperature: float
    """0.0 is greedy."""


class Sampler(Protocol):
    """What the stages need from an engine."""

    policy_version: int

    def sample(self, requests: Sequence[SampleRequest]) -> list[tuple[Rollout, ...]]:
        """Returns the rollouts of each request, in order."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Replaces the engine's weights (hub names and layout) and forgets everything computed with the old ones."""
        ...


def request_seed(run_seed: int, *parts: str | int) -> int:
    """Returns a seed in [0, 2^62) hashed from the run's seed and what the request is for, e.g. (step, example id)."""
    digest = hashlib.sha256("\x1f".join(map(str, (run_seed, *parts))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


class VllmSampler:
    """vLLM inside this process; a context manager that ends the engine."""

    def __init__(
        self, model_folder: Path, *, chat: Chat, config: SamplerConfig, allowed: Tensor, stop_token_ids: Sequence[int], dtype: DType
    ) -> None:
        wrong = {name: os.environ.get(name) for name, value in ENGINE_ENVIRONMENT.items() if os.environ.get(name) != value}
        if wrong:
            raise EngineError(f"the engine's environment is {wrong}, must be {ENGINE_ENVIRONMENT}: set it before torch or vllm is imported")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(config.kv_cache_gib))
        self.chat = chat
        self.config = config
        self.policy_version = 0
        self._stop_token_ids = list(stop_token_ids)
        self._allowed_ids = allowed.nonzero()[:, 0].tolist()
        num_threads = torch.get_num_threads()
        with isolated_rng(), warnings.catch_warnings():
            # vllm 0.32 walks over every attribute of its modules at import and so touches torch's deprecated ones.
            warnings.simplefilter("ignore", FutureWarning)
            from vllm import LLM

            self._llm = LLM(
                model=str(model_folder),
                dtype=dtype,
                load_format="safetensors",
                use_tqdm_on_load=False,
                max_model_len=config.max_model_len,
                max_num_seqs=config.max_num_seqs,
                gpu_memory_utilization=config.gpu_memory_utilization,
                enforce_eager=not torch.cuda.is_available(),
                # A prompt prefilled in chunks rewinds its request's generator, which a CPU generator cannot do (vllm 0.32,
                # gpu_model_runner.py `_bookkeeping_sync`): every seeded request would fail.
                enable_chunked_prefill=torch.cuda.is_available(),
                limit_mm_per_prompt={"image": config.max_images_per_prompt, "video": config.max_videos_per_prompt},
                mm_processor_cache_gb=0,
                # After temperature and the allowed ids: what the learner computes as well.
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                disable_log_stats=True,
            )
        torch.set_num_threads(num_threads)

    def __enter__(self) -> VllmSampler:
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def sample(self, requests: Sequence[SampleRequest]) -> list[tuple[Rollout, ...]]:
        """Returns the rollouts of each request, in order; every response with the engine's own log-probs."""
        for request in requests:
            length = len(request.prompt.token_ids) + self.config.max_response_tokens
            check_fits(length, limit=self.config.max_model_len, place=f"{request.place}, prompt plus sampler.max_response_tokens")
        with isolated_rng():
            outputs = self._llm.generate(
                [self._engine_prompt(request.prompt) for request in requests],
                [self._sampling_params(request) for request in requests],
                use_tqdm=False,
            )
        return [self._rollouts(request, output) for request, output in zip(requests, outputs, strict=True)]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Replaces the weights in place, then resets the prefix, processor and encoder caches (all three hold old results)."""
        with isolated_rng():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(list(weights))})
        self.reset_caches()
        self.policy_version = policy_version

    def reset_caches(self) -> None:
        """Forgets keys and values, processed inputs and vision features."""
        if not self._llm.reset_prefix_cache():
            raise EngineError("the engine could not reset its prefix cache: it would answer from keys and values of old weights")
        self._llm.llm_engine.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()

    def _engine_prompt(self, prompt: EncodedPrompt) -> Any:  # noqa: ANN401
        media: dict[str, list[object]] = {}
        for part in prompt.media:
            if isinstance(part, ImagePart):
                media.setdefault("image", []).append(part.image)
            else:
                media.setdefault("video", []).append(_engine_video(part))
        engine_prompt: dict[str, object] = {"prompt_token_ids": list(prompt.compact_ids)}
        if media:
            engine_prompt["multi_modal_data"] = media
        if "video" in media:
            engine_prompt["mm_processor_kwargs"] = {"do_sample_frames": False}
        return engine_prompt

    def _sampling_params(self, request: SampleRequest) -> Any:  # noqa: ANN401
        from vllm import SamplingParams

        return SamplingParams(
            n=request.num_rollouts,
            temperature=request.temperature,
            seed=request.seed,
            max_tokens=self.config.max_response_tokens,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            stop_token_ids=self._stop_token_ids,
            allowed_token_ids=self._allowed_ids,
        )

    def _rollouts(self, request: SampleRequest, output: Any) -> tuple[Rollout, ...]:  # noqa: ANN401
        prompt = request.prompt
        if tuple(output.prompt_token_ids) != prompt.token_ids:
            raise EngineError(f"{request.place}: {first_difference(tuple(output.prompt_token_ids), prompt.token_ids)}")
        rollouts = []
        for completion in output.outputs:
            sampled_ids = tuple(completion.token_ids)
            logprobs = [float(value) for value in completion.logprobs.logprobs]
            if len(logprobs) != len(sampled_ids):
                raise EngineError(f"{request.place}: {len(logprobs)} log-probs for {len(sampled_ids)} sampled tokens")
            rollouts.append(
                Rollout(
                    token_ids=prompt.token_ids + sampled_ids,
                    sampled=(False,) * len(prompt.token_ids) + (True,) * len(sampled_ids),
                    sampler_logprobs=(0.0,) * len(prompt.token_ids) + tuple(logprobs),
                    media=prompt.media,
                    text=self.chat.decode(sampled_ids),
                    prompt_suffix=prompt.suffix,
                    finish_reason="stop" if completion.finish_reason == "stop" else "length",
                    policy_version=self.policy_version,
                )
            )
        return tuple(rollouts)


def _engine_video(part: VideoPart) -> tuple[object, dict[str, object]]:
    import numpy as np

    meta = video_metadata(part)
    frames = np.stack([np.asarray(frame) for frame in part.frames])
    return frames, {
        "fps": meta.fps, "frames_indices": meta.frames_indices, "total_num_frames": meta.total_num_frames,
        "duration": len(part.frames) / part.fps, "video_backend": "frames", "do_sample_frames": False,
    }  # fmt: skip


def first_difference(engine_ids: Sequence[int], learner_ids: Sequence[int]) -> str:
    """Returns words for the first place where the engine's prompt ids and ours differ."""
    for index, (engine, learner) in enumerate(zip(engine_ids, learner_ids, strict=False)):
        if engine != learner:
            lengths = f"({len(engine_ids)} and {len(learner_ids)} tokens)"
            return f"prompt token {index} is {engine} in the engine and {learner} in the learner {lengths}"
    return f"the engine's prompt has {len(engine_ids)} tokens, the learner's {len(learner_ids)}: an image was dropped or expanded otherwise"
