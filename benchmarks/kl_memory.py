"""Peak memory of the exact divergence with its gradient on the CPU: ours against trl's two losses, on the same hidden states.

`python benchmarks/kl_memory.py [--quick]`. Vocabulary 151,936, width 256, fp32, jsd with beta 0.5, gradients of the policy's hidden states
and output matrix. Arms: ours; `gold`, the loss of trl's experimental GOLDTrainer (`generalized_jsd_loss`), which takes whole logits, from
the two matrix products that make them; `stable`, `_chunked_divergence_loss` of trl's DistillationTrainer, which takes what ours takes.

Each measurement runs in a process of its own: inputs are made, a short loss of 8 tokens warms the thread pools, then the kernel's peak
(VmHWM) counts from the resident memory there. The peak therefore contains the gradients, of which that of the output matrix (148 MiB) is
the same in every arm. At 1,024 tokens arms run in pairs, alternating in order. Bars: ours at most 1/8 of `gold`'s peak at 1,024 tokens
(the value: our peak / `gold`'s); ours flat, at 16,384 tokens at most 1.25 times the peak at 1,024, the gradient of the hidden states
(1 KiB a token) and a few numbers a token included; against `stable` at most equal memory and at least 1.0 times its speed, the median of
rounds that alternate within one process. `gold` at 2,048 tokens is measured where 20 GiB are free. `--quick`: a small vocabulary, no bars.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor
from update import memory_mib
from vlpost.model.divergence import token_jsd

BETA = 0.5
MAX_SHARE, MAX_GROWTH, MIN_SPEED = 1 / 8, 1.25, 1.0
GOLD_2K_MIB = 20 * 1024


def inputs_of(tokens: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns hidden states and output matrix of the policy, which are trained, and of the teacher."""
    generator = torch.Generator().manual_seed(0)
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(shape, generator=generator) for shape in ((tokens, width), (vocabulary, width)) * 2
    )
    for matrix in (head, teacher_head):
        matrix *= 2.0 * width**-0.5
    return hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head


def ours(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Returns the mean over the tokens by vlpost."""
    weights = torch.full((len(hidden),), 1.0 / len(hidden))
    return token_jsd(hidden, head, teacher_hidden, teacher_head, beta=BETA, allowed=None, temperature=1.0, weights=weights).mean()


def gold(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Returns the same by trl's GOLD: both models' logits, labels for the mask."""
    from trl.experimental.gold.gold_trainer import GOLDTrainer

    with torch.no_grad():
        teacher_logits = (teacher_hidden @ teacher_head.T)[None]
    labels = torch.zeros(1, len(hidden), dtype=torch.int64)
    return GOLDTrainer.generalized_jsd_loss((hidden @ head.T)[None], teacher_logits, labels=labels, beta=BETA)


def stable(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Returns the same by the loss of trl's DistillationTrainer."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, len(hidden), dtype=torch.int64)
    return _chunked_divergence_loss(hidden[None], teacher_hidden[None], head, teacher_head, mask, BETA)[0]


ARMS = {"ours": ours, "gold": gold, "stable": stable}


def seconds_of(arm: str, inputs: tuple[Tensor, ...]) -> tuple[float, float, float]:
    """Returns seconds, CPU seconds and the loss, forward and backward."""
    for part in inputs:
        part.grad = None
    start, cpu_start = time.perf_counter(), time.process_time()
    loss = ARMS[arm](*inputs)
    loss.backward()
    return time.perf_counter() - start, time.process_time() - cpu_start, float(loss.detach())


def peak(arm: str, tokens: int, width: int, vocabulary: int) -> dict[str, Any]:
    """Returns the peak above what is held before the loss."""
    inputs = inputs_of(tokens, width, vocabulary)
    few = [part[:8].detach() for part in inputs]
    seconds_of(arm, (few[0].requires_grad_(), inputs[1].detach()[:64].requires_grad_(), few[2], inputs[3][:64]))
    ctypes.CDLL(None).malloc_trim(0)  # what is left free would hide a part of the peak
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory_mib("VmRSS")
    seconds, cpu_seconds, loss = seconds_of(arm, inputs)
    assert inputs[0].grad is not None
    return {
        "arm": arm,
        "tokens": tokens,
        "width": width,
        "vocabulary": vocabulary,
        "peak_mib": memory_mib("VmHWM") - before,
        "seconds": seconds,
        "cpu_s": cpu_seconds,
        "loss": loss,
        "grad_norm": float(inputs[0].grad.norm()),
    }


def compare_speed(tokens: int, width: int, vocabulary: int, rounds: int) -> dict[str, Any]:
    """Returns our speed as a multiple of `stable`'s."""
    inputs = inputs_of(tokens, width, vocabulary)
    names = ("ours", "stable")
    for name in names:
        seconds_of(name, inputs)
    done: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in (names, names[::-1])[turn % 2]:
            done[name].append(seconds_of(name, inputs))
    wall, cpu = (
        statistics.median(other[clock] / mine[clock] for mine, other in zip(done["ours"], done["stable"], strict=True)) for clock in (0, 1)
    )
    medians = {f"{name}_s": statistics.median(seconds for seconds, _, _ in done[name]) for name in names}
    return {"arm": "speed, ours / stable", "tokens": tokens, "speed": wall, "cpu_speed": cpu, "rounds": rounds, **medians}


def child(*words: str) -> dict[str, Any]:
    """Runs this file in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-3000:]}")
    row = {**json.loads(done.stdout.splitlines()[-1]), "load": os.getloadavg()[0]}
    print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}, file=sys.stderr, flush=True)
    return row


def free_mib() -> float:
    """Returns the memory that can be had without swapping, in MiB."""
    (line,) = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")]
    return int(line.split()[1]) / 1024


def main() -> int:
    """Runs the benchmark, or one measurement of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--arm", choices=[*ARMS, "speed"], help="one measurement, in this process")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.arm == "speed":
        print(json.dumps(compare_speed(arguments.tokens, 256, arguments.vocabulary, arguments.rounds)))
        return 0
    if arguments.arm:
        print(json.dumps(peak(arguments.arm, arguments.tokens, 256, arguments.vocabulary)))
        return 0
    few, many, vocabulary = (128, 512, 8192) if arguments.quick else (1024, 16384, 151_936)

    def measured(arm: str, tokens: int) -> dict[str, Any]:
        return child("--arm", arm, "--tokens", str(tokens), "--vocabulary", str(vocabulary))

    rows = [measured(arm, few) for arm in ("ours", "gold", "stable", "stable", "gold", "ours")]
    peaks = {arm: statistics.median(row["peak_mib"] for row in rows if row["arm"] == arm) for arm in ARMS}
    agree = all(abs(row[name] / rows[0][name] - 1) < 1e-4 for row in rows for name in ("loss", "grad_norm"))
    rows.append(measured("ours", many))
    growth = rows[-1]["peak_mib"] / peaks["ours"]
    if not arguments.quick and free_mib() > GOLD_2K_MIB:
        rows += [measured(arm, 2 * few) for arm in ("ours", "gold")]
    speed = child("--arm", "speed", "--tokens", str(few), "--vocabulary", str(vocabulary), "--rounds", str(arguments.rounds))
    value = peaks["ours"] / peaks["gold"]
    rows += [speed, {"arm": "bars", "of_gold": value, "growth": growth, "of_stable": peaks["ours"] / peaks["stable"], "agree": agree}]
    holds = value <= MAX_SHARE and growth <= MAX_GROWTH and peaks["ours"] <= peaks["stable"] and speed["speed"] >= MIN_SPEED
    report = {
        "name": "kl_memory",
        "value": float(value),
        "unit": f"our peak / GOLD's, forward and backward, {few} tokens, {vocabulary} ids, CPU",
        "bar": MAX_SHARE,
        "ok": agree and (arguments.quick or holds),
        "rows": rows,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {name: version(name) for name in ("torch", "trl", "transformers")} | {"threads": torch.get_num_threads()},
    }
    print(json.dumps(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
