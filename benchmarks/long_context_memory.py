"""Peak memory of one supervised update of the nano on one multimodal row of 2K, 4K, 8K, 16K and 32K tokens, on the CPU.

`python benchmarks/long_context_memory.py [--quick]`: about ten minutes on two quiet cores. Of a row's tokens a quarter are images of 256
tokens, a quarter are the question and half are the answer, which is trained. Each length runs in a process of its own: a first update on
a short row makes what every length needs (optimizer state, thread pools), then the kernel's peak (VmHWM) counts from there, encoding
and image preprocessing included. Three settings: plain, with gradient checkpointing, and plain with the C library's allocator as it comes.
The first two have it give back every freed block of 128 KiB or more at once (`MALLOC_MMAP_THRESHOLD_`), so that the peak is what is held
and not what lies between; it is no part of the library, and worth setting on a CPU.

Memory is linear in tokens when a token costs as much from 16K to 32K as from 4K to 8K; the value is the ratio of the two, the largest of
the three settings. Ends with one JSON line; `--quick`: 1K, 2K and 4K tokens, it shows that the script works.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image
from update import memory_mib
from vlpost.model.chat import Chat
from vlpost.model.config import LearnerConfig
from vlpost.model.learner import Learner
from vlpost.model.loading import load_model, load_processor
from vlpost.model.nano import build_nano
from vlpost.model.records import Example, ImagePart, Message, TextPart
from vlpost.sft.config import SftConfig
from vlpost.sft.train import SftStage, supervised_sequences

LENGTHS = (2048, 4096, 8192, 16384, 32768)
QUICK = (1024, 2048, 4096)
IMAGE_TOKENS, IMAGE_SIDE = 256, 512
BAR = 1.1
SETTINGS = {"plain": (False, True), "checkpointing": (True, True), "plain, default allocator": (False, False)}
"""Gradient checkpointing, and whether freed blocks go back at once."""


def row_of(num_tokens: int, chat: Chat) -> Example:
    """Returns a row of exactly `num_tokens` tokens; a digit is one token, so the answer fills what is left."""
    draw = np.random.default_rng(num_tokens)

    def digits(count: int) -> str:
        return "".join(map(str, draw.integers(0, 10, count)))

    shape = (IMAGE_SIDE, IMAGE_SIDE, 3)
    images = [ImagePart.from_image(Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8))) for _ in range(num_tokens // 1024)]
    question = Message(role="user", parts=(*images, TextPart(text=digits(num_tokens // 4))))

    def example(answer_tokens: int) -> Example:
        answer = Message(role="assistant", parts=(TextPart(text=digits(answer_tokens)),))
        return Example(id=f"{num_tokens} tokens", messages=(question, answer), answer="", task="read", source="drawn")

    (shortest,) = supervised_sequences(example(1), chat)
    row = example(1 + num_tokens - len(shortest.token_ids))
    (sequence,) = supervised_sequences(row, chat)
    assert len(sequence.token_ids) == num_tokens, f"{len(sequence.token_ids)} tokens instead of {num_tokens}"
    return row


def measure(folder: Path, num_tokens: int, *, checkpointing: bool) -> dict[str, Any]:
    """Returns peak memory above what is held before the update, in MiB, and seconds."""
    torch.set_num_threads(2)
    config = LearnerConfig(learning_rate=1e-4, token_budget=num_tokens, gradient_checkpointing=checkpointing, dtype="float32")
    learner = Learner(load_model(folder, dtype=torch.float32), config=config, num_steps=2)
    processor = load_processor(folder)
    settings = SftConfig(num_steps=2, examples_per_step=1)
    warm = Chat(processor)
    SftStage(settings, learner=learner, chat=warm).step([row_of(1024, warm)])
    row = row_of(num_tokens, Chat(processor))
    stage = SftStage(settings, learner=learner, chat=Chat(processor))  # a new one: no image is in its cache
    ctypes.CDLL(None).malloc_trim(0)  # what the short row left free would hide a part of the peak
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = memory_mib("VmRSS"), time.perf_counter()
    done = stage.step([row])
    return {
        "tokens": num_tokens,
        "computed_tokens": done["unique_tokens"],
        "trained_tokens": done["trained_tokens"],
        "images": len(row.media),
        "peak_mib": memory_mib("VmHWM") - before,
        "process_mib": memory_mib("VmHWM"),
        "seconds": time.perf_counter() - start,
        "loss": done["loss"],
        "updated": learner.policy_version == 2,
    }


def kib_a_token(rows: list[dict[str, Any]], index: int) -> float:
    """Returns what a token costs between one length and the next."""
    first, second = rows[index], rows[index + 1]
    return 1024 * (second["peak_mib"] - first["peak_mib"]) / (second["tokens"] - first["tokens"])


def growth(setting: str, rows: list[dict[str, Any]], *, early: int) -> dict[str, Any]:
    """Returns the cost of a token early and at the end, their ratio, and the straight line through all lengths."""
    first, last = kib_a_token(rows, early), kib_a_token(rows, len(rows) - 2)
    tokens, peaks = np.array([row["tokens"] for row in rows]), np.array([row["peak_mib"] for row in rows])
    slope, offset = np.polyfit(tokens, peaks, 1)
    return {
        "setting": setting,
        "kib_a_token_early": first,
        "kib_a_token_late": last,
        "ratio": last / first,
        "line_kib_a_token": 1024 * float(slope),
        "line_offset_mib": float(offset),
        "line_largest_miss": float(np.max(np.abs(slope * tokens + offset - peaks) / peaks)),
    }


def run_child(folder: Path, num_tokens: int, setting: str) -> dict[str, Any]:
    """Measures one length in a process of its own."""
    checkpointing, gives_back = SETTINGS[setting]
    command = [sys.executable, __file__, "--folder", str(folder), "--tokens", str(num_tokens)]
    environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)} if gives_back else {})}
    command += ["--checkpointing"] if checkpointing else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{setting}, {num_tokens} tokens: {done.stderr[-3000:]}")
    row = {"setting": setting, **json.loads(done.stdout.splitlines()[-1])}
    print(
        f"{setting}: {num_tokens:6} tokens, {row['images']:2} images, peak {row['peak_mib']:7.1f} MiB above the model (process "
        f"{row['process_mib']:7.1f}), {row['seconds']:6.1f} s, loss {row['loss']:.3f}",
        file=sys.stderr,
        flush=True,
    )
    return row


def main() -> int:
    """Runs the benchmark, or one length of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()
    if arguments.folder:
        print(json.dumps(measure(arguments.folder, arguments.tokens, checkpointing=arguments.checkpointing)))
        return 0
    lengths, early = (QUICK, 0) if arguments.quick else (LENGTHS, 1)
    tables: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = build_nano(Path(name) / "nano", size="s", corpus=["0 1 2 3"] * 9, seed=0, vocab_size=448, max_image_tokens=IMAGE_TOKENS)
        for setting in SETTINGS:
            tables[setting] = [run_child(folder, length, setting) for length in lengths]
    fits = [growth(setting, rows, early=early) for setting, rows in tables.items()]
    rows = [row for table in tables.values() for row in table]
    is_trained = all(row["updated"] and row["computed_tokens"] == row["tokens"] for row in rows)
    worst = max(fits, key=lambda fit: fit["ratio"])
    # Short rows are mostly what does not depend on the length: --quick shows that the script works.
    is_linear = arguments.quick or worst["ratio"] <= BAR
    report = {
        "name": "long_context_memory",
        "value": float(worst["ratio"]),
        "unit": f"bytes a token between the two longest rows over those between {lengths[early]} and {lengths[early + 1]} tokens",
        "bar": BAR,
        "ok": is_trained and is_linear,
        "rows": rows + fits,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    print(json.dumps(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
