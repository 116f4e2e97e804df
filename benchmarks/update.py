"""One policy update (forward, SAPO loss, backward) beside trl's own, on the same weights and token ids.

`python benchmarks/update.py [--quick] [--rounds N]`: about 20 minutes on two quiet cores. Ours is `pack` and `Learner.forward_backward`;
the peer is `GRPOTrainer(loss_type="sapo")._compute_loss` and `backward` of trl. No optimizer, no old log-probs, image preprocessing
outside. Each arm runs in child processes of its own, alternating; a case's time is the median over rounds of the median over repeats.
Peak memory is counted from the loaded weights on, gradients included. Fails if the two arms do not compute the same loss and gradient.
Ends with one JSON line; `floor` is what matrix products alone would save. `--quick`: one small case, it shows that the script works.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", CI="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image
from vlpost.model.config import LearnerConfig
from vlpost.model.loading import load_model, load_processor
from vlpost.model.nano import build_nano
from vlpost.model.records import ImagePart, Message, TextPart, TrainSequence

CASES: dict[str, dict[str, Any]] = {
    "one image, G=8, 64 tokens": {"images": 1, "side": 640, "group": 8, "tokens": 64, "time": 7.0, "memory": 1 / 4},
    "one image, G=16, 32 tokens": {"images": 1, "side": 640, "group": 16, "tokens": 32, "time": 14.0, "memory": 1 / 8},
    "two images, ragged, G=8, 8 to 64 tokens": {"images": 2, "side": 640, "group": 8, "tokens": 64, "shortest": 8, "time": 6.0},
    "no image, 64 prompt tokens, G=8, 1024 tokens": {"images": 0, "prompt": 64, "group": 8, "tokens": 1024, "time": 1.0},
}
"""`time`: ours must be at least that many times as fast; `memory`: our peak as a share of trl's, at most."""
QUICK = {"one small image, G=4, 8 tokens": {"images": 1, "side": 128, "group": 4, "tokens": 8, "time": 0.0}}
MAX_GRADIENT_GAP = 1e-4


def build(folder: Path, *, quick: bool) -> None:
    """Writes a random Qwen3-VL of 41 million parameters (8 layers of width 512, vision 6 x 256, 8,192 ids) with its processor."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    nano = build_nano(folder / "nano", size="s", corpus=["how many digits are there? 1 2 3"] * 9, seed=0, vocab_size=448)
    processor: Any = load_processor(nano)
    processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 640 * 640}
    config: Any = Qwen3VLConfig.from_pretrained(nano)
    if not quick:
        text, vision = config.text_config, config.vision_config
        text.vocab_size, text.hidden_size, text.intermediate_size, text.num_hidden_layers = 8192, 512, 1536, 8
        text.num_attention_heads, text.num_key_value_heads, text.head_dim = 8, 4, 64
        text.rope_parameters["mrope_section"] = [12, 10, 10]
        vision.out_hidden_size, vision.hidden_size, vision.intermediate_size, vision.depth = 512, 256, 1024, 6
        vision.num_heads, vision.num_position_embeddings = 4, 2304
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).float().save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


def inputs_of(case: dict[str, Any]) -> tuple[list[Image.Image], list[int], list[list[int]], list[float]]:
    """Returns images, prompt ids (empty where the prompt is a question about images), responses and advantages, seeded."""
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (case["side"], case["side"], 3), dtype=np.uint8)) for _ in range(case["images"])]
    prompt = [int(token) for token in draw.integers(0, 250, case.get("prompt", 0))]
    lengths = [int(draw.integers(case.get("shortest", case["tokens"]), case["tokens"] + 1)) for _ in range(case["group"])]
    lengths[0] = case["tokens"]
    responses = [[int(token) for token in draw.integers(0, 250, length)] for length in lengths]
    return images, prompt, responses, [float(value) for value in draw.normal(size=case["group"])]


def our_arm(folder: Path, case: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Times our update."""
    from vlpost.model.chat import Chat
    from vlpost.model.learner import FULL_DISTRIBUTION, Learner
    from vlpost.model.packing import Weighted, pack
    from vlpost.rl.policy_loss import sapo

    chat = Chat(load_processor(folder / "model"))
    images, ids, responses, advantages = inputs_of(case)
    question = (*(ImagePart.from_image(image) for image in images), TextPart(text="how many digits?"))
    prompt = chat.encode_prompt([Message(role="user", parts=question)])
    prompt_ids = tuple(ids) or prompt.token_ids
    family = [
        Weighted(
            sequence=TrainSequence(
                place=f"response {index}",
                token_ids=prompt_ids + tuple(response),
                trained=(False,) * len(prompt_ids) + (True,) * len(response),
                media=prompt.media,
                targets=advantage,
            ),
            token_weight=1.0 / (len(responses) * len(response)),
        )
        for index, (response, advantage) in enumerate(zip(responses, advantages, strict=True))
    ]
    model = load_model(folder / "model", dtype=torch.float32)
    learner = Learner(model, config=LearnerConfig(learning_rate=1e-6, token_budget=65536, dtype="float32"), num_steps=1)
    start = time.perf_counter()
    (batch,) = pack([family], media=chat, token_budget=65536)
    pack_s = time.perf_counter() - start
    row_advantages = batch.per_token(lambda sequence: (sequence.targets,) * sequence.num_trained_tokens)

    def update() -> float:
        learner.optimizer.zero_grad()
        return learner.forward_backward(
            batch,
            FULL_DISTRIBUTION,
            lambda outputs: sapo(outputs.logprobs, outputs.logprobs.detach(), advantages=row_advantages, tau_pos=1.0, tau_neg=1.05),
        )

    return {**measure(update, learner.model, repeats), "pack_s": pack_s, "ids": fingerprint(prompt_ids), "tokens": len(batch.token_ids)}


def trl_arm(folder: Path, case: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Times trl's update on padded rows."""
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import GRPOConfig, GRPOTrainer

    images, ids, responses, advantages = inputs_of(case)
    size, longest = len(responses), max(map(len, responses))
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    processor: Any = AutoProcessor.from_pretrained(folder / "model", padding_side="left")
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type="sapo",
        per_device_train_batch_size=size,
        num_generations=size,
        max_completion_length=longest,
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        beta=0.0,
    )
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "how many?"}]}] * size)
    trainer: Any = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),  # pyright: ignore[reportUnknownLambdaType]
        args=arguments,
        train_dataset=rows,
        processing_class=processor,
    )
    pad = processor.tokenizer.pad_token_id
    completion = torch.tensor([response + [pad] * (longest - len(response)) for response in responses])
    mask = torch.tensor([[1] * len(response) + [0] * (longest - len(response)) for response in responses])
    batch = {
        "completion_ids": completion,
        "completion_mask": mask,
        "advantages": torch.tensor(advantages),
        "num_items_in_batch": mask.sum(),
    }
    if images:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": "how many digits?"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        encoded = processor(text=[text], images=images, return_tensors="pt")
        prompt_ids = encoded["input_ids"]
        kinds = encoded["mm_token_type_ids"].repeat(size, 1)
        batch["pixel_values"] = encoded["pixel_values"].repeat(size, 1)
        batch["image_grid_thw"] = encoded["image_grid_thw"].repeat(size, 1)
        batch["num_images"] = [len(images)] * size  # pyright: ignore[reportArgumentType]
        batch["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(completion, dtype=kinds.dtype)], dim=1)
    else:
        prompt_ids = torch.tensor([ids])
    batch["prompt_ids"] = prompt_ids.repeat(size, 1)
    batch["prompt_mask"] = torch.ones_like(batch["prompt_ids"])
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1

    def update() -> float:
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        return loss.item()

    measured = measure(update, trainer.model, repeats)
    return {**measured, "ids": fingerprint(prompt_ids[0].tolist()), "tokens": size * (prompt_ids.shape[1] + longest)}


def measure(update: Any, model: Any, repeats: int) -> dict[str, Any]:
    """Returns seconds (median), peak memory above what is held now (first call), and the gradient's norms."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory_mib("VmRSS")
    loss = update()
    peak = memory_mib("VmHWM") - before
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        update()
        seconds.append(time.perf_counter() - start)
    norms = {name: float(p.grad.double().norm()) for name, p in model.named_parameters() if p.grad is not None}
    return {"seconds": statistics.median(seconds), "peak_mib": peak, "norms": norms, "loss": loss}


def memory_mib(name: str) -> float:
    """Returns a line of /proc/self/status in MiB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1024


def fingerprint(ids: Any) -> str:
    """Returns a hash of token ids."""
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:16]


def product_flops(config: Any, *, text_tokens: int, patches: int, head_tokens: int) -> float:
    """Returns multiply-adds of the matrix products of one forward."""
    text, vision = config.text_config, config.vision_config
    heads = (2 * text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim * text.hidden_size
    layer = heads + 3 * text.hidden_size * text.intermediate_size
    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    wide = vision.hidden_size * vision.spatial_merge_size**2
    mergers = (1 + len(vision.deepstack_visual_indexes)) * wide * (wide + text.hidden_size) / vision.spatial_merge_size**2
    return (
        text_tokens * layer * text.num_hidden_layers
        + patches * (block * vision.depth + mergers + vision.hidden_size * vision.patch_size**2 * 3 * vision.temporal_patch_size)
        + head_tokens * text.hidden_size * text.vocab_size
    )


def floor_of(folder: Path, case: dict[str, Any], ours: dict[str, Any], trl: dict[str, Any]) -> float:
    """Returns trl's matrix-product FLOPs over ours."""
    from transformers import Qwen3VLConfig

    config = Qwen3VLConfig.from_pretrained(folder / "model")
    _, _, responses, _ = inputs_of(case)
    patches = case["images"] * (case.get("side", 0) // 16) ** 2
    trained, padded = sum(map(len, responses)), case["group"] * max(map(len, responses))
    unique = product_flops(config, text_tokens=ours["tokens"], patches=patches, head_tokens=trained)
    rows = product_flops(config, text_tokens=trl["tokens"], patches=case["group"] * patches, head_tokens=padded)
    return rows / unique


def run_child(arm: str, folder: Path, name: str, repeats: int, quick: bool) -> dict[str, Any]:
    """Runs one arm in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--case", name, "--folder", str(folder), "--repeats", str(repeats)]
    done = subprocess.run([*command, "--quick"] if quick else command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm}, {name}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path, name: str, case: dict[str, Any], rounds: int, repeats: int, quick: bool) -> dict[str, Any]:
    """Returns both arms' figures of one case."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for _ in range(rounds):
        for arm in runs:
            runs[arm].append(run_child(arm, folder, name, repeats, quick))
    ours, trl = runs["ours"][0], runs["trl"][0]
    assert ours["ids"] == trl["ids"], "the arms were given other prompts"
    assert ours["norms"].keys() == trl["norms"].keys() or case["images"] == 0, "the arms train other parameters"
    shared = [parameter for parameter in trl["norms"] if trl["norms"][parameter] > 0]
    gap = max(abs(ours["norms"][parameter] / trl["norms"][parameter] - 1.0) for parameter in shared)
    gap = max(gap, abs(ours["loss"] / trl["loss"] - 1.0))  # at a ratio of 1 the gradient does not depend on tau, the loss does
    seconds = {arm: statistics.median(run["seconds"] for run in found) for arm, found in runs.items()}
    peaks = {arm: statistics.median(run["peak_mib"] for run in found) for arm, found in runs.items()}
    row = {
        "case": name,
        "ours_s": seconds["ours"],
        "trl_s": seconds["trl"],
        "times_as_fast": seconds["trl"] / seconds["ours"],
        "by_round": [round(b["seconds"] / a["seconds"], 2) for a, b in zip(runs["ours"], runs["trl"], strict=True)],
        "bar": case["time"],
        "floor": floor_of(folder, case, ours, trl),
        "ours_mib": peaks["ours"],
        "trl_mib": peaks["trl"],
        "memory_share": peaks["ours"] / peaks["trl"],
        "memory_bar": case.get("memory"),
        "largest_difference": gap,
        "pack_s": ours["pack_s"],
    }
    row["ok"] = gap < MAX_GRADIENT_GAP and row["times_as_fast"] >= case["time"] and row["memory_share"] <= case.get("memory", 1e9)
    print(
        f"{name}: ours {row['ours_s']:.2f} s, trl {row['trl_s']:.2f} s, {row['times_as_fast']:.1f} times as fast (bar {case['time']:g}, "
        f"products {row['floor']:.1f}), memory {row['ours_mib']:.0f} of {row['trl_mib']:.0f} MiB, loss and gradients differ by {gap:.1e}",
        file=sys.stderr,
    )
    return row


def main() -> int:
    """Runs the benchmark, or one arm of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arm", choices=["ours", "trl"])
    parser.add_argument("--case")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    cases = QUICK if arguments.quick else CASES
    if arguments.arm:
        run = our_arm if arguments.arm == "ours" else trl_arm
        print(json.dumps(run(arguments.folder, cases[arguments.case], arguments.repeats)))
        return 0
    rounds, repeats = (1, 1) if arguments.quick else (arguments.rounds, arguments.repeats)
    with tempfile.TemporaryDirectory() as name:
        build(Path(name), quick=arguments.quick)
        rows = [compare(Path(name), case, settings, rounds, repeats, arguments.quick) for case, settings in cases.items()]
    worst = min(rows, key=lambda row: row["times_as_fast"] / max(row["bar"], 1e-9))
    report = {
        "name": "update",
        "value": worst["times_as_fast"],
        "unit": f"times as fast as trl: {worst['case']}, the case nearest to its bar",
        "bar": worst["bar"],
        "ok": all(row["ok"] for row in rows),
        "rows": rows,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }
    print(json.dumps(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
