"""Speed and memory of training on a GPU with random weights: packed SFT and a SAPO update at the published sizes, in bfloat16.

For each size tokens/s, MFU (useful floating-point operations by `memory.forward_flops`, times three for forward and backward, over the
bf16 matrix-product ceiling measured on the same device in the same run) and the peak against `memory.estimate_memory`. Before it two
checks: how the variable-length kernel aligns a causal mask with fewer queries than keys, and packed attention in bf16 against the same in
fp32 by matrix products. The value is the MFU of the last SFT row. Run on a machine with a GPU: python benchmarks/gpu.py

Without a GPU only `--quick` runs, a tiny shape on the CPU: it exercises the script and measures nothing of interest; the kernel on trial is
then the CPU's. No run on a GPU has been recorded yet.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import varlen
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from vlpost.model.attention import PACKED_ATTENTION, packed_attention
from vlpost.model.attention_plan import Segment, plan_attention
from vlpost.model.chat import ProcessedMedia
from vlpost.model.config import LearnerConfig, LoraConfig
from vlpost.model.learner import FULL_DISTRIBUTION, Learner, TokenLogprobs, TokenLoss
from vlpost.model.memory import SHAPES, DeviceKind, ModelShape, estimate_memory, forward_flops, transformers_config
from vlpost.model.packing import Batch, Weighted, pack
from vlpost.model.positions import mrope_positions
from vlpost.model.records import ImagePart, MediaPart, TrainSequence
from vlpost.rl.policy_loss import sapo

IMAGE_TOKEN = 1
GROUP_SIZE = 8
TINY = ModelShape(
    hidden=128,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ffn=256,
    vocab=512,
    tied=True,
    vision_depth=3,
    vision_hidden=64,
    vision_ffn=128,
    vision_heads=4,
    vision_positions=256,
)
TINY_MOE = replace(TINY, ffn=0, tied=False, experts=8, experts_per_token=2, expert_ffn=96)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One thing to measure."""

    name: str
    shape: ModelShape
    is_sapo: bool
    tokens: int
    image_side: int
    """Patches along one side of the square image; SAPO only."""
    lora: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomMedia:
    """A media source with one image of random pixels; no tokenizer, no processor."""

    processed_image: ProcessedMedia
    image_token_id: int = IMAGE_TOKEN
    video_token_id: int = -1

    def processed(self, part: MediaPart) -> ProcessedMedia:
        """Returns the image, whatever the part."""
        assert isinstance(part, ImagePart)
        return self.processed_image

    def positions(self, token_ids: Sequence[int], media: Sequence[MediaPart]) -> Tensor:
        """Returns the 3-D positions."""
        grids = [self.processed_image.grid for _ in media]
        return mrope_positions(
            token_ids, image_grids=grids, video_grids=(), image_token_id=IMAGE_TOKEN, video_token_id=self.video_token_id, merge_size=2
        )


def settings(quick: bool) -> list[Setting]:
    """Returns what is measured."""
    if quick:
        sizes = [("tiny", TINY, False), ("tiny-moe-lora", TINY_MOE, True)]
        lengths, sapo_tokens, side = (128, 256), 256, 8
    else:
        sizes = [(size, SHAPES[size], False) for size in ("2B", "4B", "8B")] + [("30B-A3B-lora", SHAPES["30B-A3B"], True)]
        lengths, sapo_tokens, side = (8192, 32768), 8192, 64
    rows = []
    for name, shape, lora in sizes:
        for tokens in lengths:
            rows.append(Setting(name=f"{name} sft {tokens}", shape=shape, is_sapo=False, tokens=tokens, image_side=side, lora=lora))
        rows.append(Setting(name=f"{name} sapo {sapo_tokens}", shape=shape, is_sapo=True, tokens=sapo_tokens, image_side=side, lora=lora))
    return rows


def build_model(shape: ModelShape, device: torch.device) -> torch.nn.Module:
    """Returns a model of that shape with random weights in bf16, on the device."""
    numbers = transformers_config(shape)
    if shape.head_dim != 128:
        section = [shape.head_dim // 2 - 2 * (shape.head_dim // 6), shape.head_dim // 6, shape.head_dim // 6]
        numbers["text_config"]["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": section,
            "mrope_interleaved": True,
        }
    numbers |= {"image_token_id": IMAGE_TOKEN, "video_token_id": 2}
    with device:
        if shape.experts:
            model = Qwen3VLMoeForConditionalGeneration._from_config(Qwen3VLMoeConfig(**numbers), dtype=torch.bfloat16)
        else:
            model = Qwen3VLForConditionalGeneration._from_config(Qwen3VLConfig(**numbers), dtype=torch.bfloat16)
    model.set_attn_implementation({"text_config": PACKED_ATTENTION, "vision_config": "sdpa"})
    return model


def build_batch(setting: Setting) -> tuple[Batch[float], int]:
    """Returns one packed batch and its number of image tokens: rows of a quarter of the budget (SFT), or a group over one image (SAPO)."""
    generator = torch.Generator().manual_seed(0)
    side = setting.image_side
    pixels = torch.rand(side * side, setting.shape.patch_values, generator=generator)
    image_tokens = side * side // setting.shape.merge if setting.is_sapo else 0
    media = RandomMedia(
        processed_image=ProcessedMedia(pixel_values=pixels, grid=(1, side, side), placeholder_ids=(IMAGE_TOKEN,) * image_tokens)
    )

    def words(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, setting.shape.vocab, (count,), generator=generator).tolist())

    if setting.is_sapo:
        prompt = (3, *(IMAGE_TOKEN,) * image_tokens, *words(16))
        length, parts = (setting.tokens - len(prompt)) // GROUP_SIZE, (ImagePart.from_image(Image.new("RGB", (32, 32))),)
        rows = [(prompt, words(length)) for _ in range(GROUP_SIZE)]
        families_of = [rows]
    else:
        length, parts = setting.tokens // 4 - 1, ()
        families_of = [[((3,), words(length))] for _ in range(4)]
    families = [
        [
            Weighted(
                sequence=TrainSequence(
                    place=f"row {number}",
                    token_ids=prompt + response,
                    trained=(False,) * len(prompt) + (True,) * len(response),
                    media=parts,
                    targets=(-1.0) ** number,
                ),
                token_weight=1.0 / (len(response) * sum(map(len, families_of))),
            )
            for number, (prompt, response) in enumerate(rows)
        ]
        for rows in families_of
    ]
    (batch,) = pack(families, media=media, token_budget=setting.tokens)
    return batch, image_tokens


def step_flops(setting: Setting, batch: Batch[float], image_tokens: int) -> float:
    """Returns the useful operations of forward and backward; with an adapter frozen matrices need no gradient: 2 instead of 3 forwards."""
    pairs = 0
    depth: list[int] = []
    for segment in batch.segments:
        length = segment.end - segment.start
        before = depth[segment.parent] if segment.parent >= 0 else 0
        depth.append(before + length)
        pairs += length * (length + 1) // 2 + length * before
    patches = image_tokens * setting.shape.merge
    forward = forward_flops(
        setting.shape,
        tokens=len(batch.token_ids),
        image_tokens=image_tokens,
        query_key_pairs=pairs,
        patch_pairs=patches * patches,
        targets=len(batch.target_ids),
    )
    return forward * (2.0 if setting.lora else 3.0)


def losses_of(setting: Setting, batch: Batch[float], device: torch.device) -> TokenLoss:
    """Returns the per-token loss of the method."""
    if not setting.is_sapo:
        return lambda outputs: -outputs.logprobs
    advantages = batch.per_token(lambda sequence: (sequence.targets,) * sequence.num_trained_tokens).to(device)

    def loss(outputs: TokenLogprobs) -> Tensor:
        return sapo(outputs.logprobs, outputs.logprobs.detach(), advantages=advantages, tau_pos=1.0, tau_neg=1.05)

    return loss


def peak_bytes(device: torch.device) -> int:
    """Returns the peak of the device's allocator; of the process on the CPU, interpreter and libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def seconds_of(call, device: torch.device, repeats: int) -> float:
    """Returns the shortest of `repeats` runs, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    getattr(torch, device.type).synchronize()


def ceiling_flops(device: torch.device, width: int) -> float:
    """Returns the operations per second of a square bf16 matrix product."""
    left = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    right = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    return 2.0 * width**3 / seconds_of(lambda: left @ right, device, 5)


def measure(setting: Setting, device: torch.device, ceiling: float, repeats: int) -> dict[str, float | str | int]:
    """Returns one row: speed, MFU and memory of an update with its optimizer step."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    config = LearnerConfig(
        learning_rate=1e-5,
        token_budget=setting.tokens,
        gradient_checkpointing=True,
        dtype="bfloat16",
        lora=LoraConfig(rank=16, parts=("language",)) if setting.lora else None,
    )
    learner = Learner(build_model(setting.shape, device), config=config, num_steps=100)
    batch, image_tokens = build_batch(setting)
    loss = losses_of(setting, batch, device)
    seconds = seconds_of(lambda: learner.update([batch], FULL_DISTRIBUTION, [loss]), device, repeats)
    kind: DeviceKind = "cuda" if device.type == "cuda" else "cpu"
    estimate = estimate_memory(setting.shape, config, sampler=None, world_size=1, device=kind, device_bytes=0, image_tokens=image_tokens)
    return {
        "setting": setting.name,
        "tokens": len(batch.token_ids),
        "image_tokens": image_tokens,
        "targets": len(batch.target_ids),
        "seconds": seconds,
        "tokens_per_s": len(batch.token_ids) / seconds,
        "mfu": step_flops(setting, batch, image_tokens) / seconds / ceiling,
        "peak_gib": peak_bytes(device) / 2**30,
        "estimated_gib": estimate.total / 2**30,
    }


def attention_gap(device: torch.device, dtype: torch.dtype, heads: int, tokens: int) -> float:
    """Returns the largest relative difference of packed attention in `dtype` from fp32 with an explicit mask, over outputs and gradients.

    A trunk with two leaves. Relative to the largest value of the fp32 result.
    """
    third = tokens // 3
    segments = (Segment(start=0, end=third, parent=-1), Segment(start=third, end=2 * third, parent=0))
    segments = (*segments, Segment(start=2 * third, end=3 * third, parent=0))
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(1, heads, 3 * third, 64, generator=generator).to(device).requires_grad_() for _ in range(3)]
    weights = torch.randn(1, 3 * third, heads, 64, generator=generator).to(device)
    sees = torch.ones(3 * third, 3 * third, dtype=torch.bool).tril()
    sees[2 * third :, third : 2 * third] = False
    wanted = torch.nn.functional.scaled_dot_product_attention(*exact, attn_mask=sees.to(device)).transpose(1, 2)
    (wanted * weights).sum().backward()
    rounded = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
    plan = plan_attention(segments).to(device)
    got, _ = packed_attention(torch.nn.Module(), *rounded, None, scaling=64**-0.5, attention_plan=plan)
    (got.float() * weights).sum().backward()
    pairs = [(got.detach(), wanted.detach()), *((mine.grad, other.grad) for mine, other in zip(rounded, exact, strict=True))]
    return max(float((mine.float() - other).abs().max() / other.abs().max()) for mine, other in pairs)


def bottom_right_gap(device: torch.device, queries: int, keys: int) -> float:
    """Returns the largest difference of a causal call with fewer queries than keys from one whose mask is aligned at the bottom right.

    On CUDA of `varlen_attn` in bf16; elsewhere, where it has no kernel, of torch's attention with a bottom-right bias.
    """
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(queries, 2, 64, generator=generator).to(device, torch.bfloat16)
    key, value = (torch.randn(keys, 2, 64, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    sees = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    by_head = [tensor.float().transpose(0, 1)[None] for tensor in (query, key, value)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*by_head, attn_mask=sees)[0].transpose(0, 1)
    ends = [torch.tensor([0, count], dtype=torch.int32, device=device) for count in (queries, keys)]
    calls = {
        "cuda": lambda: varlen.varlen_attn(query, key, value, *ends, queries, keys, window_size=(-1, 0)),
        "cpu": lambda: torch.nn.functional.scaled_dot_product_attention(
            *(tensor.transpose(0, 1)[None] for tensor in (query, key, value)), attn_mask=sees
        )[0].transpose(0, 1),
    }
    got = calls[device.type]()
    assert isinstance(got, Tensor)
    return float((got.float() - wanted).abs().max())


def main() -> None:
    """Prints a line for each row and, last, one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, on the CPU too: exercises the script, measures nothing")
    parser.add_argument("--only", default="", help="settings whose name begins so, e.g. 8B")
    arguments = parser.parse_args()
    if not arguments.quick and not torch.cuda.is_available():
        parser.error("there is no GPU here: only --quick runs without one, and it measures nothing of interest")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bottom_right = bottom_right_gap(device, 37, 101)
    packed = attention_gap(device, torch.bfloat16, heads=2, tokens=96 if arguments.quick else 3072)
    ceiling = ceiling_flops(device, 256 if arguments.quick else 8192)
    print(
        f"{device.type}: bottom-right gap {bottom_right:.1e}, packed bf16 gap {packed:.1e}, ceiling {ceiling / 1e12:.3g} TFLOP/s",
        flush=True,
    )
    rows: list[dict[str, float | str | int]] = [
        {"setting": "checks", "bottom_right_gap": bottom_right, "packed_gap": packed, "ceiling_tflops": ceiling / 1e12}
    ]
    chosen = [setting for setting in settings(arguments.quick) if setting.name.startswith(arguments.only)]
    if not chosen:
        parser.error(f"--only {arguments.only}: no setting begins so; settings: {', '.join(s.name for s in settings(arguments.quick))}")
    for setting in chosen:
        try:
            row = measure(setting, device, ceiling, 1 if arguments.quick else 3)
        except torch.OutOfMemoryError as error:
            row = {"setting": setting.name, "error": str(error).partition(".")[0]}
            print(f"{setting.name}: {row['error']}", flush=True)
        else:
            print(
                f"{setting.name}: {row['tokens_per_s']:.0f} tokens/s, MFU {row['mfu']:.3f}, "
                f"peak {row['peak_gib']:.2f} GiB, estimated {row['estimated_gib']:.2f}",
                flush=True,
            )
        rows.append(row)
    measured = [float(row["mfu"]) for row in rows if "sft" in str(row["setting"]) and "mfu" in row]
    report = {
        "name": "gpu",
        "value": measured[-1] if measured else float("nan"),
        "unit": f"MFU of the last SFT row, of the bf16 matrix-product ceiling of this {device.type}",
        "bar": None,
        "ok": bottom_right < 0.05 and packed < 0.05,
        "rows": rows,
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "accelerate")}
        | {
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        },
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
