"""Weights and processor from a Hugging Face folder or hub name, and what of the model is frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from .attention import PACKED_ATTENTION
from .config import Part
from .experts import check_expert_layout, to_hub_layout
from .layout import full_tensor
from .lora import is_adapted, merged_weights
from .normalisation import normalise_in_one_step
from .records import DataError
from .vision import embed_patches_by_product

SUPPORTED_MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe")


def load_model(source: str | Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the model with packed attention in its language part; weights that do not match the class are an error."""
    # transformers' own model calls a wrong class "some weights were not used" and trains random weights (QwenLM/Qwen3-VL issue 1690).
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            # Otherwise, a folder of an unknown type that brings code gets it run as soon as standard input says "y".
            trust_remote_code=False,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{source}: no model can be loaded ({error}); give a folder or hub name of a Qwen3-VL with safetensors") from error
    model, report = loaded
    wrong = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[kind]}
    if wrong:
        raise DataError(f"{source}: the weights do not fit {type(model).__name__}: {wrong}; the run would train random weights")
    if model.config.model_type not in SUPPORTED_MODEL_TYPES:
        raise DataError(f"{source}: model type {model.config.model_type!r}: must be one of {', '.join(SUPPORTED_MODEL_TYPES)}")
    if is_adapted(model):
        raise DataError(
            f"{source}: holds an adapter, not a model: merge it into its base first (export: merged), or name the base it was trained on"
        )
    check_expert_layout(str(source), model)
    embed_patches_by_product(model.model)
    normalise_in_one_step(model)
    model.set_attn_implementation({"text_config": PACKED_ATTENTION, "vision_config": "sdpa"})
    return model


def load_processor(source: str | Path) -> ProcessorMixin:
    """Returns the processor; a folder without one is a DataError that says which file to add."""
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{source}: no processor can be loaded ({error}); save it beside the weights: processor.save_pretrained(folder)"
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise DataError(
            f"{source}: holds only a tokenizer, no image processor; save the whole processor: processor.save_pretrained(folder)"
        )
    return processor


def part_of(name: str) -> Part:
    """Returns which part a parameter belongs to, by its name."""
    if "visual.merger." in name or "visual.deepstack_merger_list." in name:
        return "merger"
    return "vision" if "visual." in name else "language"


def freeze(model: nn.Module, parts: Sequence[Part]) -> None:
    """Marks the parameters of `parts` as not trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in parts)


def hub_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) of all weights as the hub's checkpoints name and lay them out, experts transposed, an adapter added.

    Sharded weights are gathered one at a time, by all ranks together.

    A tied head is sent under its own name too: vLLM 0.32's reload unties it and would keep the old one (parity gap 0.6 when left out).
    """
    return to_hub_layout((name, full_tensor(tensor)) for name, tensor in merged_weights(model))
