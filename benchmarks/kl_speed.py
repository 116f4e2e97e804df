"""Seconds of the exact divergence with its gradient on the CPU: ours, in blocks, against a naive loss that holds all logits.

Both take hidden states and output matrices of policy and reference and give one divergence a token, forward and backward, with gradients
of the policy's hidden states and matrix, fp32; nothing but the loss is in the time. The naive one is two matrix products, two
`log_softmax` and `kl_div` (for jsd two of them, to the logarithm of the mixture). Ours is told beforehand, as the learner tells it, what
weights the positions have in the mean, and makes the gradient together with the values: both compute four products of tokens x width x
ids. The two are run in turn within one process, the order alternating; the value is the median over the rounds of the naive seconds /
ours, the lowest of forward, reverse and jsd (beta 0.5) at width 256. CPU seconds, which know less of what else the machine does, stand
beside it in the rows. Rows without a bar: a wider head, where products are nearly everything; and ours without the weights, so that
backward computes the logits again, six products. Run: python benchmarks/kl_speed.py [--quick]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from vlpost.model.divergence import token_forward_kl, token_jsd, token_kl

BAR = 0.9
BETA = 0.5
OURS: dict[str, Callable[..., Tensor]] = {"forward": token_forward_kl, "reverse": token_kl, "jsd": partial(token_jsd, beta=BETA)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """One setting to measure."""

    tokens: int
    width: int
    vocabulary: int
    rounds: int
    kinds: tuple[str, ...]
    has_bar: bool
    knows_weights: bool = True


FULL = (
    Size(tokens=512, width=256, vocabulary=151_936, rounds=5, kinds=("forward", "reverse", "jsd"), has_bar=True),
    Size(tokens=256, width=1024, vocabulary=151_936, rounds=3, kinds=("reverse",), has_bar=False),
    Size(tokens=512, width=256, vocabulary=151_936, rounds=3, kinds=("reverse",), has_bar=False, knows_weights=False),
)
QUICK = (Size(tokens=64, width=64, vocabulary=16_384, rounds=3, kinds=("forward", "reverse", "jsd"), has_bar=True),)


def naive(hidden: Tensor, head: Tensor, reference_hidden: Tensor, reference_head: Tensor, *, kind: str) -> Tensor:
    """Returns the divergence [N] from whole logits."""
    logprobs = log_softmax(hidden @ head.T, dim=-1)
    reference = log_softmax(reference_hidden @ reference_head.T, dim=-1)

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return kl_div(second, first, reduction="none", log_target=True).sum(dim=-1)

    if kind == "forward":
        return kl(reference, logprobs)
    if kind == "reverse":
        return kl(logprobs, reference)
    mixture = torch.logaddexp(reference + math.log(BETA), logprobs + math.log1p(-BETA))
    return BETA * kl(reference, mixture) + (1.0 - BETA) * kl(logprobs, mixture)


def measure(size: Size, kind: str) -> dict[str, Any]:
    """Returns medians of both, of their paired ratios, and the largest relative difference of values and gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = (size.tokens, size.width), (size.vocabulary, size.width)
    hidden, head, reference_hidden, reference_head = (torch.randn(shape, generator=generator) for shape in shapes * 2)
    head *= 2.0 * size.width**-0.5
    reference_head *= 2.0 * size.width**-0.5
    inputs = hidden.requires_grad_(), head.requires_grad_(), reference_hidden, reference_head

    def run(function: Callable[..., Tensor]) -> tuple[float, float, list[Tensor]]:
        hidden.grad = head.grad = None
        start, cpu_start = time.perf_counter(), time.process_time()
        found = function(*inputs)
        found.mean().backward()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        assert hidden.grad is not None
        assert head.grad is not None
        return seconds, cpu_seconds, [found.detach(), hidden.grad, head.grad]

    weights = torch.full((size.tokens,), 1.0 / size.tokens) if size.knows_weights else None
    arms = {"ours": partial(OURS[kind], allowed=None, temperature=1.0, weights=weights), "naive": partial(naive, kind=kind)}
    values = [run(function)[2] for function in arms.values()]  # also the warm-up
    gap = max(float((mine - other).norm() / other.norm()) for mine, other in zip(*values, strict=True))
    del values
    wall: dict[str, list[float]] = {name: [] for name in arms}
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(size.rounds):
        for name in (tuple(arms), tuple(reversed(arms)))[turn % 2]:
            seconds, cpu_seconds, _ = run(arms[name])
            wall[name].append(seconds)
            cpu[name].append(cpu_seconds)

    def speed(clock: dict[str, list[float]]) -> float:
        return statistics.median(other / mine for mine, other in zip(clock["ours"], clock["naive"], strict=True))

    row = {
        "kind": kind,
        **{name: value for name, value in asdict(size).items() if name != "kinds"},
        "speed": speed(wall),
        "cpu_speed": speed(cpu),
        **{f"{name}_s": statistics.median(wall[name]) for name in arms},
        **{f"{name}_cpu_s": statistics.median(cpu[name]) for name in arms},
        "relative_gap": gap,
        "load": os.getloadavg()[0],
    }
    print(
        f"{kind:>7}, {size.tokens} tokens x {size.width}, {size.vocabulary} ids: ours {row['ours_s']:.2f} s "
        f"({row['ours_cpu_s']:.2f} CPU s), naive {row['naive_s']:.2f} s ({row['naive_cpu_s']:.2f}), {row['speed']:.2f} times its speed "
        f"({row['cpu_speed']:.2f} by CPU s), largest difference {gap:.1e}",
        flush=True,
    )
    return row


def main() -> int:
    """Prints a line for each setting and, last, one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small vocabulary: seconds, and the bar is not looked at")
    arguments = parser.parse_args()
    rows = [measure(size, kind) for size in (QUICK if arguments.quick else FULL) for kind in size.kinds]
    value = min(row["speed"] for row in rows if row["has_bar"])
    agree = all(row["relative_gap"] < 1e-4 for row in rows)
    report = {
        "name": "kl_speed",
        "value": value,
        "unit": "naive seconds / ours, forward and backward, the lowest of forward, reverse and jsd at width 256, CPU",
        "bar": BAR,
        "ok": agree and (arguments.quick or value >= BAR),
        "rows": rows,
        "command": " ".join(["python", "benchmarks/kl_speed.py", *sys.argv[1:]]),
        "versions": {name: importlib.metadata.version(name) for name in ("vlpost", "torch")} | {"threads": torch.get_num_threads()},
    }
    print(json.dumps(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
