"""Builds a nano Qwen3-VL: the real architecture, tokenizer and processor of the family, one or a few million random weights.

What is real: DeepStack from three vision layers into the first three text layers, interleaved 3-D rotary positions, grouped-query
attention, tied embeddings (as in the 2B and 4B) or a head of its own (as from 8B on), patches of 16 pixels merged 2 by 2, two frames a
video patch, timestamps in the text, byte-level BPE with Qwen's special tokens and single digits; as a mixture of experts (30B-A3B,
235B-A22B), the softmax router with renormalised weights in every layer. What is smaller: widths, depths, the vocabulary, the 4,096
positions, the number of experts.

transformers and vLLM load the folder like any other checkpoint; experts lie in it as they do on the hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    GenerationConfig,
    PreTrainedModel,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from .chat_template import chat_template
from .experts import save_model

NanoSize = Literal["s", "m", "moe-s"]

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""One id each, left out of decoded text."""
MARKUP_TOKENS: tuple[str, ...] = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""One id each, kept in decoded text because a parser has to see them."""
MIN_VOCAB_SIZE = 384
MAX_VOCAB_SIZE = 1024
MAX_POSITIONS = 4096
EXPERTS_PER_TOKEN = 2

_PATCH_SIZE = 16
_MERGE_SIZE = 2
_FRAMES_PER_PATCH = 2
_TOKEN_PIXELS = (_PATCH_SIZE * _MERGE_SIZE) ** 2
_HEAD_DIM = 32  # vLLM's CPU attention refuses smaller heads


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shape:
    """Widths and depths of one size."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    num_experts: int = 0
    """0 is dense."""
    expert_hidden: int = 0
    """Inner width of one expert. Neither `hidden` nor half of it: a weight and its transpose would have the same shape. A multiple of
    32: vLLM's CPU kernel pads others."""


_SHAPES: dict[NanoSize, _Shape] = {
    "s": _Shape(hidden=128, layers=4, heads=4, key_value_heads=2, vision_hidden=64, vision_layers=4, vision_heads=4),
    "m": _Shape(hidden=256, layers=4, heads=8, key_value_heads=4, vision_hidden=96, vision_layers=4, vision_heads=6),
    "moe-s": _Shape(
        hidden=128,
        layers=4,
        heads=4,
        key_value_heads=2,
        vision_hidden=64,
        vision_layers=4,
        vision_heads=4,
        num_experts=8,
        expert_hidden=96,
    ),
}


def build_nano(
    folder: Path,
    *,
    size: NanoSize,
    corpus: Iterable[str],
    seed: int,
    tied: bool | None = None,
    vocab_size: int = 512,
    thinking: bool = False,
    max_image_tokens: int = 64,
    max_video_tokens: int = 256,
) -> Path:
    """Builds a random Qwen3-VL with its processor, saves it as a Hugging Face folder in float32 and returns the folder.

    Size `s` has about 1.3 million parameters, `m` about 4 million; `moe-s` is `s` with eight experts in every layer, of which a token uses
    two, about 2 million. `tied` says whether the head is the embedding; None follows the published models: tied when dense and small, a
    head of its own for a mixture of experts.

    The tokenizer is trained on `corpus`; `vocab_size` is the most ids it may have, special tokens included (a small corpus gives fewer),
    and the model's embedding is rounded up to a multiple of 64: the ids above are no token, and whoever samples should ban them.
    `thinking` picks the chat template. `max_image_tokens` and `max_video_tokens` bound one image and one whole video: a token covers
    32 x 32 pixels (of two frames, in a video), and larger media are scaled down. `seed` decides the weights; torch's global generators
    stay as they were.

    Raises `ValueError` for values out of range and `FileExistsError` if the folder already holds a model.
    """
    if size not in _SHAPES:
        raise ValueError(f"nano size {size!r}: give one of {', '.join(_SHAPES)}")
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} already holds a model: give another folder or delete this one")
    if min(max_image_tokens, max_video_tokens) < 1:
        raise ValueError(f"max_image_tokens = {max_image_tokens}, max_video_tokens = {max_video_tokens}: both must be at least 1")
    tokenizer = _train_tokenizer(corpus, vocab_size)
    processor = _build_processor(
        tokenizer, template=chat_template(thinking), max_image_tokens=max_image_tokens, max_video_tokens=max_video_tokens
    )
    model = _build_model(_build_config(_SHAPES[size], tokenizer=tokenizer, tied=tied), tokenizer=tokenizer, seed=seed)
    save_model(model, folder)
    processor.save_pretrained(folder)
    return folder


def _train_tokenizer(corpus: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Returns a byte-level BPE tokenizer of Qwen's kind whose ids are bytes, merges, special tokens, markup tokens, in this order."""
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size = {vocab_size}: give a number from {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}, special tokens included")
    if isinstance(corpus, str):
        raise ValueError("corpus is one string: give an iterable of texts, for example a list of prompts and answers")
    # Splitting and normalising are read off transformers' class, not written again: a reload builds them from there.
    qwen = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = qwen.normalizer
    bpe.pre_tokenizer = qwen.pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(MARKUP_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    learned = json.loads(bpe.to_str())["model"]
    vocab = dict(learned["vocab"])
    # In the vocabulary from the start, so that the constructor, which adds some tokens on its own, cannot change the order of ids.
    for token in SPECIAL_TOKENS + MARKUP_TOKENS:
        vocab[token] = len(vocab)
    # Narrower annotations there than what is accepted: merges have to be pairs, and Qwen's own tokenizers have no unknown token.
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(merge) for merge in learned["merges"]],  # pyright: ignore[reportArgumentType]
        unk_token=None,  # pyright: ignore[reportArgumentType]
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")],
        model_max_length=MAX_POSITIONS,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS], special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return tokenizer


def _build_processor(tokenizer: Qwen2Tokenizer, *, template: str, max_image_tokens: int, max_video_tokens: int) -> Qwen3VLProcessor:
    """Returns the processor; sizes are in pixels of one image, or of all frames of a video together."""
    image_processor = Qwen2VLImageProcessor(
        size={"shortest_edge": _TOKEN_PIXELS, "longest_edge": _TOKEN_PIXELS * max_image_tokens},
        patch_size=_PATCH_SIZE,
        merge_size=_MERGE_SIZE,
        temporal_patch_size=_FRAMES_PER_PATCH,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    video_token_pixels = _TOKEN_PIXELS * _FRAMES_PER_PATCH
    video_processor = Qwen3VLVideoProcessor(
        size={"shortest_edge": video_token_pixels, "longest_edge": video_token_pixels * max_video_tokens},
        patch_size=_PATCH_SIZE,
        merge_size=_MERGE_SIZE,
        temporal_patch_size=_FRAMES_PER_PATCH,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        # Frames arrive sampled, with their times; the cap is set because transformers changes its default in 5.22.
        do_sample_frames=False,
        cap_pixels_per_frame=False,
    )
    return Qwen3VLProcessor(image_processor=image_processor, tokenizer=tokenizer, video_processor=video_processor, chat_template=template)


def _build_model(config: Qwen3VLConfig | Qwen3VLMoeConfig, *, tokenizer: Qwen2Tokenizer, seed: int) -> PreTrainedModel:
    """Returns the model with weights drawn from `seed`, whatever torch's default device, dtype and generator are."""
    token_ids = tokenizer.get_vocab()
    is_dense = isinstance(config, Qwen3VLConfig)
    # The generator itself is seeded, not `torch.manual_seed`, which would also reseed the GPUs.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = (Qwen3VLForConditionalGeneration if is_dense else Qwen3VLMoeForConditionalGeneration)._from_config(
            config, dtype=torch.float32
        )
    model.generation_config = GenerationConfig(
        eos_token_id=[token_ids["<|im_end|>"], token_ids["<|endoftext|>"]], pad_token_id=token_ids["<|endoftext|>"], do_sample=True
    )
    return model


def _build_config(shape: _Shape, *, tokenizer: Qwen2Tokenizer, tied: bool | None) -> Qwen3VLConfig | Qwen3VLMoeConfig:
    """Returns the configuration of a size for a tokenizer."""
    token_ids = tokenizer.get_vocab()
    tied = shape.num_experts == 0 if tied is None else tied
    text_config: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": shape.hidden,
        "intermediate_size": 2 * shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": _HEAD_DIM,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
        "tie_word_embeddings": tied,
        "eos_token_id": token_ids["<|im_end|>"],
        "pad_token_id": token_ids["<|endoftext|>"],
    }
    if shape.num_experts:
        text_config |= {
            "num_experts": shape.num_experts,
            "num_experts_per_tok": EXPERTS_PER_TOKEN,
            "moe_intermediate_size": shape.expert_hidden,
            # Unknown to transformers 5.19, which always renormalises; vLLM does not start without it.
            "norm_topk_prob": True,
        }
    vision_config = {
        "depth": shape.vision_layers,
        "hidden_size": shape.vision_hidden,
        "intermediate_size": 2 * shape.vision_hidden,
        "num_heads": shape.vision_heads,
        "patch_size": _PATCH_SIZE,
        "spatial_merge_size": _MERGE_SIZE,
        "temporal_patch_size": _FRAMES_PER_PATCH,
        "out_hidden_size": shape.hidden,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    return (Qwen3VLMoeConfig if shape.num_experts else Qwen3VLConfig)(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=tied,
        dtype="float32",
    )
