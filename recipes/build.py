"""The only place that builds anything: model, engine, rewards, stages."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model.chat import Chat, allowed_token_mask
from ..model.config import DType, LoraConfig, NanoConfig, SamplerConfig
from ..model.layout import Ranks, machine_dtype
from ..model.learner import Distribution
from ..model.loading import load_model, load_processor
from ..model.lora import engine_adapter
from ..model.nano import build_nano
from ..model.records import DataError
from ..model.sampler import Sampler, VllmSampler
from ..model.server_sampler import ServerSampler
from ..rewards import judge_server_main as supervisor
from .schema import ModelConfig

_log = logging.getLogger(__name__)

_NANO_SETTINGS = "nano_settings.json"
"""Beside a nano's weights: what it was built from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model in memory and what goes with it."""

    folder: str
    """Folder or hub name it came from"""
    model: PreTrainedModel
    chat: Chat
    allowed: Tensor
    """[V] bool: ids that may be sampled; engine and learner both read it"""

    def distribution(self, temperature: float) -> Distribution:
        """Returns the distribution that responses are drawn from."""
        return Distribution(temperature=temperature, allowed=self.allowed)

    def stop_token_ids(self) -> tuple[int, ...]:
        """Returns the ids that end a response: those of generation_config.json."""
        generation = self.model.generation_config
        ids = generation.eos_token_id if generation is not None else None
        if ids is None:
            raise DataError(f"{self.folder}: generation_config.json names no eos_token_id, so no response would ever end; add it")
        return tuple(ids) if isinstance(ids, list) else (ids,)


class Workshop:
    """What the stages of one run share: built models and one engine, kept while the next stage can use it."""

    def __init__(self, folder: Path, *, exports: Mapping[str, Path], ranks: Ranks, heed: Callable[[str], None] = _log.warning) -> None:
        """`heed` is told of every death and every start of a server that draws, on a thread of its own."""
        self.folder = folder
        self._heed = heed
        self.ranks = ranks
        self.exports = exports
        self._engine: Sampler | None = None
        self._engine_key: tuple[object, ...] = ()
        self._open = ExitStack()

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def load(self, config: ModelConfig, *, dtype: DType, seed: int) -> LoadedModel:
        """Returns the model that a recipe names; a nano is built on first use."""
        source = self._source(config, seed)
        chat = Chat(load_processor(source))
        model = load_model(source, dtype=machine_dtype(dtype))
        return LoadedModel(folder=str(source), model=model, chat=chat, allowed=allowed_token_mask(chat, vocabulary_size(model)))

    def load_chat(self, config: ModelConfig, *, seed: int) -> Chat:
        """Returns the processor's view of messages for the model that a recipe names, without its weights."""
        return Chat(load_processor(self._source(config, seed)))

    def source(self, config: ModelConfig, *, seed: int) -> str:
        """Returns the folder or hub name of the model that a recipe names; a nano is built on first use."""
        return str(self._source(config, seed))

    def load_again(self, loaded: LoadedModel, *, dtype: DType) -> PreTrainedModel:
        """Returns the same weights a second time: the reference that a policy is held to."""
        return load_model(loaded.folder, dtype=machine_dtype(dtype))

    def _source(self, config: ModelConfig, seed: int) -> Path | str:
        if config.stage is not None:
            return self.exports[config.stage]
        if config.path is not None:
            path = Path(config.path)
            return path.resolve() if path.exists() else config.path
        assert config.nano is not None
        return self._nano(config.nano, seed)

    def _nano(self, config: NanoConfig, seed: int) -> Path:
        from .handwriting import tokenizer_corpus

        # Stages with different nanos have different folders; the first has the plain name.
        settings = {"nano": config.model_dump(mode="json"), "seed": seed}
        folder, partial = self.folder / "nano", self.folder / ".partial-nano"
        if folder.exists() and (folder / _NANO_SETTINGS).exists() and json.loads((folder / _NANO_SETTINGS).read_text()) != settings:
            folder = self.folder / f"nano-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"
        if self.ranks.is_first and not folder.exists():
            if partial.exists():  # a kill in the middle of the building
                shutil.rmtree(partial)
            build_nano(
                partial,
                size=config.size,
                tied=config.tied,
                corpus=tokenizer_corpus(),
                vocab_size=config.vocab_size,
                thinking=config.thinking,
                max_image_tokens=config.max_image_tokens,
                seed=seed,
            )
            (partial / _NANO_SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
            partial.rename(folder)
        self.ranks.wait()
        return folder

    def close_engine(self) -> None:
        """Ends the engine that stages share, for others that need its memory."""
        self._open.close()
        self._engine = None

    def engine(self, loaded: LoadedModel, config: SamplerConfig, *, dtype: DType, lora: LoraConfig | None = None) -> Sampler:
        """Returns an engine for models of this architecture; its weights are whatever was published last: publish before use.

        An engine for adapters starts from the model's own folder, since only the adapter is published to it.
        """
        adapter = engine_adapter(loaded.model, lora, on_cpu=not torch.cuda.is_available())
        architecture = loaded.model.config.to_diff_dict()
        base = loaded.folder if adapter is not None else None
        dtype_name: DType = "bfloat16" if machine_dtype(dtype) == torch.bfloat16 else "float32"
        key = (repr(sorted(architecture.items(), key=str)), config.model_copy(update={"temperature": 1.0}), dtype_name, adapter, base)
        if self._engine is None or key != self._engine_key:
            self._open.close()
            shared: dict[str, Any] = {
                "chat": loaded.chat,
                "config": config,
                "allowed": loaded.allowed,
                "stop_token_ids": loaded.stop_token_ids(),
                "dtype": dtype_name,
            }
            if config.serve is None:
                self._engine = self._open.enter_context(VllmSampler(Path(loaded.folder), adapter=adapter, **shared))
            else:
                self._engine = self._open.enter_context(
                    ServerSampler(Path(loaded.folder), run_folder=self.folder, supervisor=supervisor.__name__, heed=self._heed, **shared)
                )
            self._engine_key = key
        return self._engine


def vocabulary_size(model: PreTrainedModel) -> int:
    """Returns the number of rows of the output head, which may exceed what the tokenizer knows."""
    return model.get_output_embeddings().weight.shape[0]  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
