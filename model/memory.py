"""How much memory a training stage needs on one device, by arithmetic alone: no torch, so that `vlpost check` answers at once.

Activations are counted from what autograd keeps in the packed forward: the saved tensors of transformers' Qwen3-VL layers under
`attention.packed_attention` and `logprobs.token_logprobs`, one by one. A test compares the sums with the tensors that autograd really
saves, and the whole estimate with measured peaks.

Bytes everywhere; a token is a packed, unique token with images expanded, a patch is a quarter of an image token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .config import LearnerConfig, NanoConfig, Part, SamplerConfig
from .records import DataError

GIB = 2**30
MASTER_BYTES = 4
"""Trained weights, their gradients and each of AdamW's two moments are float32."""

DeviceKind = Literal["cpu", "cuda"]
RUNTIME_BYTES: dict[DeviceKind, int] = {"cpu": 2**30, "cuda": 3 * 2**29}
"""What a process takes beside the tensors counted here. cpu: interpreter, libraries and the buffers of their threads, measured. cuda:
context, kernels, workspaces and the allocator's rounding, an assumption of 1.5 GiB that no GPU has confirmed."""

# Of logprobs.py, which imports torch; a test holds them equal.
TOKEN_BLOCK = 2048
VOCABULARY_BLOCK = 32768


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Widths and depths of a Qwen3-VL; source: the Qwen3-VL technical report and the published configs.

    Example: the 2B has `hidden=2048, layers=28, heads=16, kv_heads=8, head_dim=128, ffn=6144, vocab=151_936, tied=True`.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Inner width of a dense layer's MLP; 0 for a mixture of experts."""
    vocab: int
    tied: bool
    vision_depth: int
    vision_hidden: int
    vision_ffn: int
    vision_heads: int
    deepstack: int = 3
    """Vision layers whose features are added to the first language layers, each with a merger of its own."""
    experts: int = 0
    """Experts of every layer; 0 is dense."""
    experts_per_token: int = 0
    expert_ffn: int = 0
    patch_values: int = 3 * 2 * 16 * 16
    """Numbers in one patch: channels * frames * height * width."""
    merge: int = 4
    """Patches that become one image token."""
    vision_positions: int = 2304

    @property
    def query_width(self) -> int:
        """Width of all query heads together, which need not be `hidden`."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim

    @property
    def merged_width(self) -> int:
        """Width of the patches of one image token side by side."""
        return self.merge * self.vision_hidden


_LARGE_VISION = {"vision_depth": 24, "vision_hidden": 1024, "vision_ffn": 4096, "vision_heads": 16}
_SO_VISION = {"vision_depth": 27, "vision_hidden": 1152, "vision_ffn": 4304, "vision_heads": 16}
_EXPERTS = {"ffn": 0, "experts": 128, "experts_per_token": 8}


def _published(*, hidden: int, layers: int, heads: int, kv_heads: int, tied: bool, **rest: int) -> ModelShape:
    return ModelShape(hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=128, vocab=151_936, tied=tied, **rest)


SHAPES: dict[str, ModelShape] = {
    "2B": _published(hidden=2048, layers=28, heads=16, kv_heads=8, ffn=6144, tied=True, **_LARGE_VISION),
    "4B": _published(hidden=2560, layers=36, heads=32, kv_heads=8, ffn=9728, tied=True, **_LARGE_VISION),
    "8B": _published(hidden=4096, layers=36, heads=32, kv_heads=8, ffn=12288, tied=False, **_SO_VISION),
    "32B": _published(hidden=5120, layers=64, heads=64, kv_heads=8, ffn=25600, tied=False, **_SO_VISION),
    "30B-A3B": _published(hidden=2048, layers=48, heads=32, kv_heads=4, tied=False, expert_ffn=768, **_EXPERTS, **_SO_VISION),
    "235B-A22B": _published(hidden=4096, layers=94, heads=64, kv_heads=4, tied=False, expert_ffn=1536, **_EXPERTS, **_SO_VISION),
}
"""By size; source: the Qwen3-VL technical report and the published configs."""


def hub_shape(name: str) -> ModelShape | None:
    """Returns the shape of a published model (`Qwen/Qwen3-VL-8B-Instruct`, `-Thinking`), None for a name that is not one of them."""
    for size, shape in SHAPES.items():
        if name in (f"Qwen/Qwen3-VL-{size}-Instruct", f"Qwen/Qwen3-VL-{size}-Thinking"):
            return shape
    return None


def folder_shape(folder: Path) -> ModelShape:
    """Returns the shape that a model folder's config.json states; a missing file or key is a `DataError` that names it."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        text, vision = config["text_config"], config["vision_config"]
        experts = int(text.get("num_experts") or text.get("num_local_experts") or 0)
        return ModelShape(
            hidden=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            ffn=0 if experts else text["intermediate_size"],
            vocab=text["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            experts=experts,
            experts_per_token=text["num_experts_per_tok"] if experts else 0,
            expert_ffn=text["moe_intermediate_size"] if experts else 0,
            vision_depth=vision["depth"],
            vision_hidden=vision["hidden_size"],
            vision_ffn=vision["intermediate_size"],
            vision_heads=vision["num_heads"],
            deepstack=len(vision["deepstack_visual_indexes"]),
            patch_values=vision.get("in_channels", 3) * vision.get("temporal_patch_size", 2) * vision.get("patch_size", 16) ** 2,
            merge=vision.get("spatial_merge_size", 2) ** 2,
            vision_positions=vision.get("num_position_embeddings", 2304),
        )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a folder with a model in Hugging Face format") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: is not the configuration of a Qwen3-VL ({type(error).__name__}: {error})") from error


def nano_shape(config: NanoConfig) -> ModelShape:
    """Returns the shape of a nano model; its vocabulary is rounded up to a multiple of 64, as the builder's is."""
    wide = config.size == "m"
    mixture = config.size == "moe-s"
    hidden = 256 if wide else 128
    vision_hidden = 96 if wide else 64
    return ModelShape(
        hidden=hidden,
        layers=4,
        heads=8 if wide else 4,
        kv_heads=4 if wide else 2,
        head_dim=32,
        ffn=0 if mixture else 2 * hidden,
        vocab=-(-config.vocab_size // 64) * 64,
        tied=not mixture if config.tied is None else config.tied,
        vision_depth=4,
        vision_hidden=vision_hidden,
        vision_ffn=2 * vision_hidden,
        vision_heads=6 if wide else 4,
        experts=8 if mixture else 0,
        experts_per_token=2 if mixture else 0,
        expert_ffn=96 if mixture else 0,
        vision_positions=256,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Numbers of parameters by part; `language` leaves out embeddings, head and experts."""

    vision: int
    merger: int
    language: int
    embeddings: int
    """Embedding, and the head where it is a weight of its own."""
    experts: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.vision + self.merger + self.language + self.embeddings + self.experts

    def of(self, part: Part) -> int:
        """Returns the parameters of a part as `learner.freeze` means it: `language` has embeddings, head and experts with it."""
        return {"vision": self.vision, "merger": self.merger, "language": self.language + self.embeddings + self.experts}[part]


def count_parameters(shape: ModelShape) -> ParameterCount:
    """Returns the exact parameter counts."""
    vision = shape.vision_hidden * (shape.patch_values + 1 + shape.vision_positions)
    return ParameterCount(
        vision=vision + shape.vision_depth * _vision_block_parameters(shape),
        merger=_linears(_merger_linears(shape)) + 2 * shape.vision_hidden + shape.deepstack * 2 * shape.merged_width,
        language=shape.layers * (_layer_parameters(shape) - _expert_parameters(shape)) + shape.hidden,
        embeddings=shape.vocab * shape.hidden * (1 if shape.tied else 2),
        experts=shape.layers * _expert_parameters(shape),
    )


Linear = tuple[int, int, bool]
"""Width in, width out, whether it has a bias."""


def _language_linears(shape: ModelShape) -> list[Linear]:
    """Returns the linear layers of one language layer; experts and router are none."""
    attention = [(shape.hidden, width, False) for width in (shape.query_width, shape.kv_width, shape.kv_width)]
    attention.append((shape.query_width, shape.hidden, False))
    if shape.experts:
        return attention
    return [*attention, (shape.hidden, shape.ffn, False), (shape.hidden, shape.ffn, False), (shape.ffn, shape.hidden, False)]


def _vision_linears(shape: ModelShape) -> list[Linear]:
    width = shape.vision_hidden
    return [(width, 3 * width, True), (width, width, True), (width, shape.vision_ffn, True), (shape.vision_ffn, width, True)]


def _merger_linears(shape: ModelShape) -> list[Linear]:
    """Returns the linear layers of the merger and DeepStack's."""
    return [(shape.merged_width, shape.merged_width, True), (shape.merged_width, shape.hidden, True)] * (1 + shape.deepstack)


def _linears(linears: list[Linear]) -> int:
    return sum(width_in * width_out + (width_out if bias else 0) for width_in, width_out, bias in linears)


def _expert_parameters(shape: ModelShape) -> int:
    return 3 * shape.experts * shape.hidden * shape.expert_ffn


def _layer_parameters(shape: ModelShape) -> int:
    norms = 2 * shape.hidden + 2 * shape.head_dim
    return _linears(_language_linears(shape)) + norms + shape.experts * shape.hidden + _expert_parameters(shape)


def _vision_block_parameters(shape: ModelShape) -> int:
    return _linears(_vision_linears(shape)) + 4 * shape.vision_hidden


def count_adapter_parameters(shape: ModelShape, parts: tuple[Part, ...], *, rank: int) -> int:
    """Returns the parameters of a low-rank adapter on the linear layers of `parts`: rank * (in + out) each."""
    linears = {
        "language": _language_linears(shape) * shape.layers,
        "vision": _vision_linears(shape) * shape.vision_depth,
        "merger": _merger_linears(shape),
    }
    return sum(rank * (width_in + width_out) for part in parts for width_in, width_out, _ in linears[part])


Training = Literal["whole", "adapter", "passed", "none"]
"""How a part is trained: all its weights, an adapter, not at all but with a gradient through it, or outside of the graph."""


def part_training(config: LearnerConfig) -> dict[Part, Training]:
    """Returns how each part is trained. A gradient passes through a part that is not trained where one before it is."""
    adapted = config.lora.parts if config.lora is not None else ()
    order: tuple[Part, ...] = ("vision", "merger", "language")
    result: dict[Part, Training] = {}
    needs_gradient = False
    for part in order:
        is_whole = config.lora is None and part not in config.freeze
        needs_gradient = needs_gradient or is_whole or part in adapted
        if is_whole:
            result[part] = "whole"
        elif part in adapted:
            result[part] = "adapter"
        else:
            result[part] = "passed" if needs_gradient else "none"
    return result


def layer_activations(shape: ModelShape, training: Training, *, compute_bytes: int, rank: int = 0) -> int:
    """Returns the bytes per token that autograd keeps of one language layer.

    Norms keep their input (fp32 where the embedding is, which is trained) and one number a row; a linear layer its input where it or its
    adapter is trained (one copy for all readers in fp32, one each under autocast); attention q, k, v, the output and the log-sum-exp; the
    MLP gate, up and silu(gate).
    """
    if training == "none":
        return 0
    c, is_whole = compute_bytes, training == "whole"
    saves_inputs = training != "passed"
    copies = (3, 2) if c < MASTER_BYTES else (1, 1)
    norms = 2 * ((MASTER_BYTES if is_whole else c) * shape.hidden + 4)
    heads, kv_heads = shape.query_width, shape.kv_width
    head_norms = c * (heads + kv_heads) + 4 * (shape.heads + shape.kv_heads)
    attention = c * (2 * heads + 2 * kv_heads) + 4 * shape.heads
    inputs = c * shape.hidden * copies[0] if saves_inputs else 0
    low_rank = c * rank * len(_language_linears(shape)) if training == "adapter" else 0
    if shape.experts:
        mlp = _expert_activations(shape, c)
    else:
        mlp = 3 * c * shape.ffn + (c * (shape.hidden * copies[1] + shape.ffn) if saves_inputs else 0)
    return norms + head_norms + attention + inputs + low_rank + mlp


def _expert_activations(shape: ModelShape, compute_bytes: int) -> int:
    """Returns the bytes per token of a sparse layer: the router, then each token's copies for its experts and back."""
    router = compute_bytes * shape.hidden + 4 * shape.experts + 4 + 12 * shape.experts_per_token
    per_copy = compute_bytes * (2 * shape.hidden + 4 * shape.expert_ffn) + 4 + 24
    return router + shape.experts_per_token * per_copy


def vision_block_activations(shape: ModelShape, training: Training, *, compute_bytes: int, rank: int = 0) -> int:
    """Returns the bytes per patch that autograd keeps of one block of the tower; the value keeps the whole fused qkv alive."""
    if training == "none":
        return 0
    c, width = compute_bytes, shape.vision_hidden
    saves_inputs = training != "passed"
    norms = 2 * (c * width + 8)
    attention = c * (2 + 3 + 1) * width + 4 * shape.vision_heads
    inputs = c * (3 * width + shape.vision_ffn) if saves_inputs else 0
    low_rank = c * rank * 4 if training == "adapter" else 0
    return norms + attention + inputs + c * shape.vision_ffn + low_rank


def merger_activations(shape: ModelShape, training: Training, *, compute_bytes: int, tower_is_kept: bool, rank: int = 0) -> int:
    """Returns the bytes per image token that autograd keeps of the merger and DeepStack's mergers together.

    DeepStack's mergers read what the next block of the tower reads: that is counted once, with the tower if its blocks are kept.
    """
    if training == "none":
        return 0
    c, width = compute_bytes, shape.merged_width
    inputs = 2 * c * width if training != "passed" else 0
    low_rank = 2 * c * rank if training == "adapter" else 0
    each = 2 * c * width + inputs + low_rank
    shared = shape.deepstack * c * width if tower_is_kept else 0
    return (1 + shape.deepstack) * each + 8 * shape.merge + 8 * shape.deepstack - shared


def saved_activations(shape: ModelShape, config: LearnerConfig, *, tokens: int, image_tokens: int, compute_bytes: int) -> dict[str, int]:
    """Returns what autograd holds when a forward of `tokens` tokens, all of them targets, is done: `language`, `vision`, in bytes.

    With gradient checkpointing a layer or block keeps its input alone.
    """
    training = part_training(config)
    rank = config.lora.rank if config.lora is not None else 0
    c = compute_bytes
    layer = layer_activations(shape, training["language"], compute_bytes=c, rank=rank)
    block = vision_block_activations(shape, training["vision"], compute_bytes=c, rank=rank)
    if config.gradient_checkpointing:
        # A mixed-precision residual stream is fp32 where the embedding is, which is trained.
        layer = min(layer, shape.hidden * (MASTER_BYTES if training["language"] == "whole" else c))
        block = min(block, shape.vision_hidden * c)
    rotary = 2 * shape.head_dim * MASTER_BYTES
    last_norm = (MASTER_BYTES if training["language"] == "whole" else c) * shape.hidden + 4
    head = c * shape.hidden + 20
    patches = image_tokens * shape.merge
    vision = patches * shape.vision_depth * block
    vision += image_tokens * merger_activations(
        shape, training["merger"], compute_bytes=c, tower_is_kept=training["vision"] != "none", rank=rank
    )
    if training["vision"] == "whole":
        vision += patches * (c * shape.patch_values + 48)  # the patches themselves, and where the position table is read
    return {"language": tokens * (shape.layers * layer + rotary + last_norm + head), "vision": vision}


def logprobs_transient(shape: ModelShape, *, tokens: int, compute_bytes: int, trains_head: bool) -> int:
    """Returns what the log-probs' backward holds at its height: fp32 gradients of hidden states and head, and a few tiles of logits."""
    tile = min(tokens, TOKEN_BLOCK) * min(shape.vocab, VOCABULARY_BLOCK) * MASTER_BYTES
    gradients = MASTER_BYTES * tokens * shape.hidden
    if trains_head:
        gradients += MASTER_BYTES * shape.vocab * shape.hidden
    block = min(shape.vocab, VOCABULARY_BLOCK) * shape.hidden * MASTER_BYTES
    return gradients + 3 * tile + block + tokens * shape.hidden * compute_bytes


def layer_transient(shape: ModelShape, config: LearnerConfig, *, tokens: int, image_tokens: int, compute_bytes: int) -> int:
    """Returns what the backward of one layer or block holds at its height beside what autograd kept for it.

    Gradients of the MLP's inner values and of the residual stream; with checkpointing the layer's activations, computed again.
    """
    training = part_training(config)
    rank = config.lora.rank if config.lora is not None else 0
    # Where three gradients of the inner width exist at once, the saved input of the last product is free already.
    inner = shape.experts_per_token * (2 * shape.expert_ffn + shape.hidden) if shape.experts else 2 * shape.ffn
    language = tokens * (compute_bytes * inner + 2 * MASTER_BYTES * shape.hidden)
    patches = image_tokens * shape.merge
    vision = patches * compute_bytes * (2 * shape.vision_ffn + 3 * shape.vision_hidden)
    if config.gradient_checkpointing:
        language += tokens * layer_activations(shape, training["language"], compute_bytes=compute_bytes, rank=rank)
        vision += patches * vision_block_activations(shape, training["vision"], compute_bytes=compute_bytes, rank=rank)
    return max(language, vision if training["vision"] != "none" else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """The peak of one device by term, in bytes.

    Example: terms {"weights": 8 GiB, "gradients": 8 GiB, "optimizer": 16 GiB, "language activations": 5 GiB, ...}, total 40 GiB.
    """

    terms: Mapping[str, int]
    """What is held at the same time at the peak."""

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.terms.values())

    def largest(self, count: int = 3) -> list[tuple[str, int]]:
        """Returns the largest terms, largest first."""
        return sorted(self.terms.items(), key=lambda term: -term[1])[:count]


def compute_bytes_of(config: LearnerConfig, device: DeviceKind) -> int:
    """Returns the bytes of one number in the dtype of the learner's arithmetic; `auto` is bfloat16 on a GPU, float32 on the CPU."""
    is_half = config.dtype == "bfloat16" or (config.dtype == "auto" and device == "cuda")
    return 2 if is_half else 4


def estimate_memory(
    shape: ModelShape,
    learner: LearnerConfig,
    *,
    sampler: SamplerConfig | None,
    world_size: int,
    device: DeviceKind,
    device_bytes: int,
    image_tokens: int,
    has_reference: bool = False,
    teachers: Sequence[ModelShape] = (),
) -> MemoryEstimate:
    """Returns the peak of one of `world_size` devices in a step of several full micro-batches after the first update.

    `image_tokens` of the token budget are images; `sampler` is the engine in the same process, None without one, and `device_bytes` the
    memory of the device, of which it takes its share. A reference model is a frozen copy, which an adapter makes unnecessary. Of
    teachers, sharded as the student is, the weights count: their forward keeps nothing.
    """
    counts = count_parameters(shape)
    training = part_training(learner)
    c = compute_bytes_of(learner, device)
    whole = sum(counts.of(part) for part, how in training.items() if how == "whole")
    frozen = counts.total - whole
    adapter = count_adapter_parameters(shape, learner.lora.parts, rank=learner.lora.rank) if learner.lora is not None else 0
    trained = whole + adapter
    shards = world_size if learner.layout == "fsdp2" else 1
    tokens = learner.token_budget
    saved = saved_activations(shape, learner, tokens=tokens, image_tokens=image_tokens, compute_bytes=c)
    if learner.activation_offload:  # they are on the host; what a layer has in hand is part of `backward`
        saved = dict.fromkeys(saved, 0)
    trains_head = training["language"] == "whole"
    head = logprobs_transient(shape, tokens=tokens, compute_bytes=c, trains_head=trains_head)
    layer = layer_transient(shape, learner, tokens=tokens, image_tokens=image_tokens, compute_bytes=c)
    casts = autocast_copies(shape, learner, world_size=world_size, compute_bytes=c)
    transient = max(head, layer)
    if learner.gradient_checkpointing:  # autocast forgets its copies when the forward ends, and autograd has kept none
        transient, casts = max(transient, casts), 0
    terms = {
        "weights": (MASTER_BYTES * trained + c * frozen) // shards,
        "gradients": MASTER_BYTES * trained // shards,
        "optimizer": 2 * MASTER_BYTES * trained // shards,
        "language activations": saved["language"],
        "vision activations": saved["vision"],
        "casts of weights": casts,
        "backward": transient,
        **_copies(shape, learner, counts, training, world_size=world_size, compute_bytes=c),
    }
    if has_reference and learner.lora is None:
        terms["reference"] = c * counts.total // shards
    terms["teachers"] = c * sum(count_parameters(teacher).total for teacher in teachers) // shards
    if sampler is not None:
        if device == "cuda":
            terms["engine"] = int(sampler.gpu_memory_utilization * device_bytes)
        else:
            terms |= {"engine weights": c * counts.total, "engine cache": sampler.kv_cache_gib * GIB}
    terms["runtime"] = RUNTIME_BYTES[device]
    return MemoryEstimate(terms={name: count for name, count in terms.items() if count})


def _copies(
    shape: ModelShape,
    learner: LearnerConfig,
    counts: ParameterCount,
    training: Mapping[Part, Training],
    *,
    world_size: int,
    compute_bytes: int,
) -> dict[str, int]:
    """Returns second copies of weights and gradients: gathered units (fsdp2), exchange buckets (ddp)."""
    whole = sum(counts.of(part) for part, how in training.items() if how == "whole")
    if world_size > 1 and learner.layout == "fsdp2":
        blocks = shape.vision_depth * _vision_block_parameters(shape)
        root = counts.total - shape.layers * _layer_parameters(shape) - blocks
        # The root stays gathered from forward to backward; of the layers the one at work and the next are.
        gathered = compute_bytes * (root + 2 * max(_layer_parameters(shape), _vision_block_parameters(shape)))
        gradients = compute_bytes * (root + _layer_parameters(shape)) if training["language"] == "whole" else 0
        return {"gathered units": gathered, "whole gradients": gradients}
    return {"exchange buckets": MASTER_BYTES * whole if world_size > 1 else 0}


def autocast_copies(shape: ModelShape, learner: LearnerConfig, *, world_size: int, compute_bytes: int) -> int:
    """Returns the copies of trained weights in the compute dtype that autocast keeps for a forward, and autograd for its backward.

    FSDP casts what it gathers instead; the embedding is read, not cast.
    """
    if compute_bytes == MASTER_BYTES or (world_size > 1 and learner.layout == "fsdp2"):
        return 0
    counts = count_parameters(shape)
    cast = sum(counts.of(part) for part, how in part_training(learner).items() if how == "whole")
    # The log-probs cast the head, whole or in blocks: it is counted, and a tied embedding is the head.
    read = shape.vocab * shape.hidden if part_training(learner)["language"] == "whole" and not shape.tied else 0
    return compute_bytes * (cast - read)


def forward_flops(shape: ModelShape, *, tokens: int, image_tokens: int, query_key_pairs: int, patch_pairs: int, targets: int) -> int:
    """Returns the floating-point operations of one forward, a multiplication and its addition counted as two.

    2 * parameters of matrix products for each token (of experts only those that a token uses), 4 * width for each pair of a query and a
    key that it sees, in the language layers (`query_key_pairs`) and in the tower (`patch_pairs`), and the head for each target. Norms,
    rotary embedding and softmax are left out. A backward is twice as much; recomputation is no useful work and never counted.
    """
    active = 3 * shape.experts_per_token * shape.hidden * shape.expert_ffn + shape.experts * shape.hidden
    language = 2 * tokens * shape.layers * (_matrix_weights(_language_linears(shape)) + active)
    attention = 4 * query_key_pairs * shape.query_width * shape.layers
    patches = image_tokens * shape.merge
    tower = 2 * patches * (shape.patch_values * shape.vision_hidden + shape.vision_depth * _matrix_weights(_vision_linears(shape)))
    tower += 4 * patch_pairs * shape.vision_hidden * shape.vision_depth + 2 * image_tokens * _matrix_weights(_merger_linears(shape))
    return language + attention + tower + 2 * targets * shape.hidden * shape.vocab


def _matrix_weights(linears: list[Linear]) -> int:
    return sum(width_in * width_out for width_in, width_out, _ in linears)


def transformers_config(shape: ModelShape) -> dict[str, Any]:
    """Returns `text_config`, `vision_config` and `tie_word_embeddings` of a transformers configuration with these numbers."""
    text: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn or shape.expert_ffn,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
    }
    if shape.experts:
        text |= {
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.experts_per_token,
            "moe_intermediate_size": shape.expert_ffn,
            "norm_topk_prob": True,
        }
    vision = {
        "depth": shape.vision_depth,
        "hidden_size": shape.vision_hidden,
        "intermediate_size": shape.vision_ffn,
        "num_heads": shape.vision_heads,
        "out_hidden_size": shape.hidden,
        "num_position_embeddings": shape.vision_positions,
        "deepstack_visual_indexes": _deepstack_layers(shape),
    }
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": shape.tied}


def _deepstack_layers(shape: ModelShape) -> list[int]:
    """Returns the published choice (5, 11, 17 of 24 layers; 8, 16, 24 of 27), and the first layers of any other tower."""
    published = {24: [5, 11, 17], 27: [8, 16, 24]}
    return published.get(shape.vision_depth, list(range(shape.deepstack)))[: shape.deepstack]
