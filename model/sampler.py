"""Drawing responses: the Sampler protocol, and vLLM in this process.

Token ids in, token ids out. Every request has its own seed, hashed from what it is for; no two are neighbours, because child i of a
vLLM request draws with seed + i.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .chat import Chat, EncodedPrompt, check_fits, video_metadata
from .config import ENGINE_ENVIRONMENT, DType, SamplerConfig
from .lora import EngineAdapter
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
    top_p: float = 1.0
    """Below 1, like the two that follow: only for responses that nothing is trained on, the learner knows no such distribution."""
    top_k: int = 0
    """0: all tokens."""
    presence_penalty: float = 0.0


class Sampler(Protocol):
    """What the stages need from an engine."""

    policy_version: int

    def sample(self, requests: Sequence[SampleRequest]) -> list[tuple[Rollout, ...]]:
        """Returns the rollouts of each request, in order."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Replaces the engine's weights (hub names and layout) and forgets everything computed with the old ones."""
        ...

    def load_adapter(self, folder: Path, policy_version: int) -> None:
        """Takes the adapter of a folder in place of the one before; the folder may go when this returns."""
        ...

    def release_memory(self) -> None:
        """Gives back, until the next publish, the memory that an update may use."""
        ...


def request_seed(run_seed: int, *parts: str | int) -> int:
    """Returns a seed in [0, 2^62) hashed from the run's seed and what the request is for, e.g. (step, example id)."""
    digest = hashlib.sha256("\x1f".join(map(str, (run_seed, *parts))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def engine_options(config: SamplerConfig, *, dtype: DType) -> dict[str, Any]:
    """Returns vLLM's options of every engine that draws, in this process or in a server."""
    on_gpu = torch.cuda.is_available()
    return {
        "dtype": dtype,
        "load_format": "safetensors",
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": not on_gpu,
        # A prompt prefilled in chunks rewinds its request's generator, which a CPU generator cannot do (vllm 0.32,
        # gpu_model_runner.py `_bookkeeping_sync`): every seeded request would fail.
        "enable_chunked_prefill": on_gpu,
        "mm_processor_cache_gb": 0,
        # After temperature and the allowed ids: what the learner computes as well.
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "disable_log_stats": True,
    }


def check_requests_fit(requests: Sequence[SampleRequest], config: SamplerConfig) -> None:
    """Raises where a prompt leaves no room for the longest response."""
    for request in requests:
        length = len(request.prompt.token_ids) + config.max_response_tokens
        check_fits(length, limit=config.max_model_len, place=f"{request.place}, prompt plus sampler.max_response_tokens")


def check_prompt_ids(request: SampleRequest, engine_ids: Sequence[int]) -> None:
    """Raises `EngineError` where the engine read other prompt ids than ours."""
    if tuple(engine_ids) != request.prompt.token_ids:
        raise EngineError(f"{request.place}: {first_difference(engine_ids, request.prompt.token_ids)}")


def drawn_rollout(
    request: SampleRequest,
    sampled_ids: Sequence[int],
    logprobs: Sequence[float],
    *,
    chat: Chat,
    finish_reason: str | None,
    policy_version: int,
) -> Rollout:
    """Returns one response to a request as a rollout; an `EngineError` where tokens and log-probs are not equally many."""
    prompt, sampled_ids = request.prompt, tuple(sampled_ids)
    if len(logprobs) != len(sampled_ids):
        raise EngineError(f"{request.place}: {len(logprobs)} log-probs for {len(sampled_ids)} sampled tokens")
    return Rollout(
        token_ids=prompt.token_ids + sampled_ids,
        sampled=(False,) * len(prompt.token_ids) + (True,) * len(sampled_ids),
        sampler_logprobs=(0.0,) * len(prompt.token_ids) + tuple(logprobs),
        media=prompt.media,
        text=chat.decode(sampled_ids),
        prompt_suffix=prompt.suffix,
        finish_reason="stop" if finish_reason == "stop" else "length",
        policy_version=policy_version,
    )


class VllmSampler:
    """vLLM inside this process; a context manager that ends the engine."""

    def __init__(
        self,
        model_folder: Path,
        *,
        chat: Chat,
        config: SamplerConfig,
        allowed: Tensor,
        stop_token_ids: Sequence[int],
        dtype: DType,
        adapter: EngineAdapter | None = None,
    ) -> None:
        wrong = {name: os.environ.get(name) for name, value in ENGINE_ENVIRONMENT.items() if os.environ.get(name) != value}
        if wrong:
            raise EngineError(f"the engine's environment is {wrong}, must be {ENGINE_ENVIRONMENT}: set it before torch or vllm is imported")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(config.kv_cache_gib))
        self.chat = chat
        self.config = config
        self.policy_version = 0
        self._adapter = adapter
        self._adapter_request: Any = None
        self._is_asleep = False
        self._stop_token_ids = list(stop_token_ids)
        self._allowed_ids = allowed.nonzero()[:, 0].tolist()
        num_threads = torch.get_num_threads()
        with isolated_rng(), warnings.catch_warnings():
            # vllm 0.32 walks over every attribute of its modules at import and so touches torch's deprecated ones.
            warnings.simplefilter("ignore", FutureWarning)
            from vllm import LLM

            self._llm = LLM(
                model=str(model_folder),
                use_tqdm_on_load=False,
                limit_mm_per_prompt={"image": config.max_images_per_prompt, "video": config.max_videos_per_prompt},
                **engine_options(config, dtype=dtype),
                enable_sleep_mode=torch.cuda.is_available(),
                **_adapter_options(adapter),
            )
        torch.set_num_threads(num_threads)
        if adapter is not None and adapter.adapts_vision and not torch.cuda.is_available():
            self._llm.apply_model(fit_adapter_to_media_batches)

    def __enter__(self) -> VllmSampler:
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with learner_group_kept():
            self._llm.llm_engine.engine_core.shutdown()

    def sample(self, requests: Sequence[SampleRequest]) -> list[tuple[Rollout, ...]]:
        """Returns the rollouts of each request, in order; every response with the engine's own log-probs."""
        if self._adapter is not None and self._adapter_request is None:
            raise EngineError("no adapter has been published: the engine would answer with its base weights; publish before sampling")
        if self._is_asleep:
            raise EngineError("the engine has given its memory back: publish before sampling")
        check_requests_fit(requests, self.config)
        with isolated_rng():
            outputs = self._llm.generate(
                [self._engine_prompt(request.prompt) for request in requests],
                [self._sampling_params(request) for request in requests],
                use_tqdm=False,
                lora_request=self._adapter_request,
            )
        return [self._rollouts(request, output) for request, output in zip(requests, outputs, strict=True)]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Replaces the weights in place, then resets the prefix, processor and encoder caches (all three hold old results)."""
        with isolated_rng(), self._awakening():
            if not torch.cuda.is_available():
                self._llm.apply_model(forget_expert_kernels)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self._adapter_request = None  # vLLM drops its adapters with the base they were for
        self.reset_caches()
        self.policy_version = policy_version

    def load_adapter(self, folder: Path, policy_version: int) -> None:
        """Reads the adapter of a folder, drops the one before, then resets the caches (vision features depend on an adapter too).

        The folder may go afterwards. A layer that the engine made room for and the folder has nothing for, or the other way round, is an
        `EngineError` that names it; until the next whole adapter the engine then refuses to answer.
        """
        if self._adapter is None:
            raise EngineError("the engine was started without room for adapters: give VllmSampler the `engine_adapter` of model and recipe")
        from vllm.lora.request import LoRARequest

        request = LoRARequest(lora_name=f"policy-{policy_version}", lora_int_id=policy_version + 1, lora_path=str(folder.resolve()))
        with self._awakening():
            self._replace_adapter(request, folder, policy_version)
        self.reset_caches()
        self._adapter_request = request
        self.policy_version = policy_version

    def _replace_adapter(self, request: Any, folder: Path, policy_version: int) -> None:  # noqa: ANN401
        engine, self._adapter_request = self._llm.llm_engine, None
        for old in engine.list_loras():
            engine.remove_lora(old)
        with isolated_rng():
            arrived = engine.add_lora(request) and engine.list_loras() == {request.lora_int_id}
        if not arrived:
            raise EngineError(f"{folder}: the engine did not take the adapter of update {policy_version}; it holds {engine.list_loras()}")
        for wanted, held in self._llm.apply_model(_adapter_layers):
            if wanted != held:
                missing, extra = sorted(wanted - held), sorted(held - wanted)
                raise EngineError(
                    f"{folder}: {len(missing)} of {len(wanted)} layers got no adapter in the engine ({', '.join(missing[:3])}) and "
                    f"{len(extra)} adapters no layer ({', '.join(extra[:3])}): the folder is damaged or of another recipe"
                )

    def release_memory(self) -> None:
        """Gives a GPU's memory back until the next publish; on the CPU the engine keeps its own."""
        if torch.cuda.is_available() and not self._is_asleep:
            # Level 2 forgets the weights, which the next publish replaces; under an adapter the base has to come back.
            self._llm.sleep(level=2 if self._adapter is None else 1)
            self._is_asleep = True

    @contextmanager
    def _awakening(self) -> Iterator[None]:
        """Room for the weights before the block and for the cache only after it, when what the weights were sent from may be gone."""
        if self._is_asleep:
            self._llm.wake_up(tags=["weights"])
        yield
        if self._is_asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._is_asleep = False

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
            top_p=request.top_p,
            top_k=request.top_k,
            presence_penalty=request.presence_penalty,
            seed=request.seed,
            max_tokens=self.config.max_response_tokens,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            stop_token_ids=self._stop_token_ids,
            allowed_token_ids=self._allowed_ids,
        )

    def _rollouts(self, request: SampleRequest, output: Any) -> tuple[Rollout, ...]:  # noqa: ANN401
        check_prompt_ids(request, output.prompt_token_ids)
        return tuple(
            drawn_rollout(
                request,
                completion.token_ids,
                [float(value) for value in completion.logprobs.logprobs],
                chat=self.chat,
                finish_reason=completion.finish_reason,
                policy_version=self.policy_version,
            )
            for completion in output.outputs
        )


def _engine_video(part: VideoPart) -> tuple[object, dict[str, object]]:
    import numpy as np

    meta = video_metadata(part)
    frames = np.stack([np.asarray(frame) for frame in part.frames])
    return frames, {
        "fps": meta.fps, "frames_indices": meta.frames_indices, "total_num_frames": meta.total_num_frames,
        "duration": len(part.frames) / part.fps, "video_backend": "frames", "do_sample_frames": False,
    }  # fmt: skip


@contextmanager
def learner_group_kept() -> Iterator[None]:
    """Keeps the process group of several ranks: vllm 0.32 takes the default group down with an engine, whoever made it."""
    destroy = torch.distributed.destroy_process_group

    def destroy_own(group: Any = None) -> None:  # noqa: ANN401
        if group is not None:
            destroy(group)

    is_shared = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    torch.distributed.destroy_process_group = destroy_own if is_shared else destroy
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


def _adapter_options(adapter: EngineAdapter | None) -> dict[str, Any]:
    """Returns the engine's options: room for one adapter, on exactly the layers that the recipe adapts."""
    if adapter is None:
        return {}
    return {
        "enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": adapter.max_rank,
        "lora_target_modules": list(adapter.target_modules), "enable_tower_connector_lora": adapter.adapts_vision,
    }  # fmt: skip


def _adapter_layers(model: nn.Module) -> tuple[set[str], set[str]]:
    """Returns the names of vLLM's layers with room for adapters, and of those that the adapters it holds are for."""
    manager: Any = model.lora_manager
    return set(manager.modules), {name for adapter_id in manager.list_adapters() for name in manager.get_adapter(adapter_id).loras}


def fit_adapter_to_media_batches(model: nn.Module) -> None:
    """Makes vLLM's CPU kernels apply the adapter to every batch of the vision tower, however many batches a step has.

    vllm 0.32 counts the rows of all images and videos of a step, then encodes images and videos in batches of their own
    (gpu_model_runner.py `_execute_mm_encoder`): the CPU kernels take the count for that of one batch and fail. All rows of a step have
    the one adapter we load, so the count to use is the batch's. No upstream issue was found for it; can go once a prompt with an image and
    a video passes without.
    """
    manager: Any = model.lora_manager
    for prefix, wrapper in manager.punica_wrapper_mapping.items():
        if prefix.startswith("visual"):
            wrapper._apply_shrink = _sized_by_batch(wrapper)


def _sized_by_batch(wrapper: Any) -> Callable[[Tensor, Tensor, Tensor, float], None]:  # noqa: ANN401
    shrink = wrapper._apply_shrink

    def sized(output: Tensor, rows: Tensor, factors: Tensor, scale: float) -> None:
        if not wrapper.no_lora:
            assert wrapper.batch_size == 1, f"{wrapper.batch_size} runs of adapters in one step, the engine has room for one adapter"
            wrapper._seq_lengths[0] = len(rows)
        shrink(output, rows, factors, scale)

    return sized


def forget_expert_kernels(model: nn.Module) -> None:
    """Makes vLLM's next reload bring expert weights into the layout of its CPU kernel again; a model without experts is left as it is.

    vllm 0.32 packs (and pads) them only while a layer has no kernel (`UnquantizedFusedMoEMethod._setup_kernel`): a reload of an engine that
    has answered copies them unpacked over packed ones, log-probs are then off by 0.1 nats and more, or the sizes differ when padded. Can
    go once vLLM packs on every reload (vllm-project/vllm issue 48312 collects such cases). Not for CUDA graphs, which hold on to a kernel.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    for module in model.modules():
        if isinstance(module, RoutedExperts):
            module.quant_method.moe_kernel = None


def first_difference(engine_ids: Sequence[int], learner_ids: Sequence[int]) -> str:
    """Returns words for the first place where the engine's prompt ids and ours differ."""
    for index, (engine, learner) in enumerate(zip(engine_ids, learner_ids, strict=False)):
        if engine != learner:
            lengths = f"({len(engine_ids)} and {len(learner_ids)} tokens)"
            return f"prompt token {index} is {engine} in the engine and {learner} in the learner {lengths}"
    return f"the engine's prompt has {len(engine_ids)} tokens, the learner's {len(learner_ids)}: an image was dropped or expanded otherwise"
