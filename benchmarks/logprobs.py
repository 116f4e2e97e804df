"""Seconds of log-probs with their gradient on the CPU: ours, in blocks of tokens and vocabulary, against trl's chunked function.

Both give log-prob and entropy of N target ids from hidden states and the output matrix, forward and backward, fp32. The two are run in
turn within one process, so that what else the machine does meets both. The value is the median over the pairs of our seconds / trl's
seconds at the size of Qwen3-VL-2B's vocabulary; below 1 ours is faster. Run: python benchmarks/logprobs.py [--quick]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE  # what trl's own trainers use
from vlpost.model import logprobs as logprobs_module
from vlpost.model.logprobs import token_logprobs


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """One setting to measure."""

    name: str
    tokens: int
    hidden: int
    vocabulary: int
    pairs: int


NANO = Size(name="nano", tokens=2000, hidden=128, vocabulary=448, pairs=15)
FULL = Size(name="full", tokens=512, hidden=1024, vocabulary=151_936, pairs=5)
QUICK = Size(name="quick", tokens=128, hidden=256, vocabulary=32_768, pairs=3)


def ours(hidden: Tensor, head: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log-probs and entropy by vlpost."""
    return token_logprobs(hidden, head, token_ids=token_ids, allowed=None, temperature=1.0)


def of_trl(hidden: Tensor, head: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log-probs and entropy by trl; as here, the entropy gets no gradient."""
    return ChunkedLogProbFunction.apply(hidden, head, None, token_ids, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",))[:2]


def measure(size: Size) -> dict[str, float | str | int]:
    """Returns median seconds of both, the median of the paired ratios, and the largest difference of values and gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(size.tokens, size.hidden, generator=generator).requires_grad_()
    head = (torch.randn(size.vocabulary, size.hidden, generator=generator) * size.hidden**-0.5).requires_grad_()
    token_ids = torch.randint(size.vocabulary, (size.tokens,), generator=generator)

    def run(function) -> tuple[float, list[Tensor]]:
        hidden.grad = head.grad = None
        start = time.perf_counter()
        logprobs, entropy = function(hidden, head, token_ids)
        logprobs.mean().backward()
        seconds = time.perf_counter() - start
        assert hidden.grad is not None
        return seconds, [logprobs.detach(), entropy.detach(), hidden.grad * size.tokens]

    values = run(ours)[1], run(of_trl)[1]  # also the warm-up
    gap = max(float((mine - other).abs().max()) for mine, other in zip(*values, strict=True))
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    for pair in range(size.pairs):
        order = (("ours", ours), ("trl", of_trl)) if pair % 2 == 0 else (("trl", of_trl), ("ours", ours))
        for name, function in order:
            seconds[name].append(run(function)[0])
    ratios = [mine / other for mine, other in zip(seconds["ours"], seconds["trl"], strict=True)]
    return {
        "size": size.name,
        "tokens": size.tokens,
        "hidden": size.hidden,
        "vocabulary": size.vocabulary,
        "pairs": size.pairs,
        "ours_s": statistics.median(seconds["ours"]),
        "trl_s": statistics.median(seconds["trl"]),
        "ratio": statistics.median(ratios),
        "max_abs_gap": gap,
    }


def main() -> None:
    """Prints a line for each size and, last, one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small vocabulary instead of 151,936 ids: seconds instead of minutes")
    parser.add_argument("--vocabulary-block", type=int, default=logprobs_module.VOCABULARY_BLOCK, help="ids in one of our blocks")
    parser.add_argument("--token-block", type=int, default=logprobs_module.TOKEN_BLOCK, help="tokens in one of our blocks")
    arguments = parser.parse_args()
    logprobs_module.VOCABULARY_BLOCK, logprobs_module.TOKEN_BLOCK = arguments.vocabulary_block, arguments.token_block
    rows = []
    for size in (NANO, QUICK if arguments.quick else FULL):
        rows.append(measure(size))
        row = rows[-1]
        print(
            f"{row['size']:>6}: {row['tokens']} tokens x {row['hidden']}, {row['vocabulary']} ids: "
            f"ours {row['ours_s']:.3f} s, trl {row['trl_s']:.3f} s, ratio {row['ratio']:.2f}, largest difference {row['max_abs_gap']:.1e}",
            flush=True,
        )
    agree = all(float(row["max_abs_gap"]) < 1e-4 for row in rows)
    report = {
        "name": "logprobs",
        "value": round(float(rows[-1]["ratio"]), 4),
        "unit": "our seconds / trl's seconds, forward and backward, CPU",
        "bar": None,
        "ok": agree,
        "rows": rows,
        "command": " ".join(["python", "benchmarks/logprobs.py", *sys.argv[1:]]),
        "versions": {name: importlib.metadata.version(name) for name in ("vlpost", "torch", "trl")} | {"threads": torch.get_num_threads()},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
