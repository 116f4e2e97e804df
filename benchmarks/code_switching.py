"""How well and how fast `code_switching` finds mixed traces: grid of planted sentences, clean fragments, speed, memory, network.

Grid: documents of 20 sentences in English or Chinese, of which k = 0, 1, 4, 8 are replaced by sentences in another language, 20 documents
a cell. Fragments: 300 clean ones with code, formulas, names, units, quotations and English terms. Both on the sentences that thresholds
were set on (`tuning`) and on sentences that were not looked at (`held_out`, which the bars are about). Bars: 19 of 20 found in every cell,
0 clean documents and at most 1 % of the fragments flagged, 100 traces of 2.5 kB a second on one core, no socket opened, at most 100 MiB of
memory, equal results in two processes. `value` is the smallest number found in a cell of the held-out grid.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from vlpost.model.records import Example, Message, Rollout, TextPart
from vlpost.rewards.code_switching import code_switching

SETS = {name: Path(__file__).resolve().parent.parent / "tests" / "rewards" / f"language_{name}.yaml" for name in ("tuning", "held_out")}
MIN_FOUND = 19
MAX_FRAGMENT_FRAC = 0.01
MIN_TRACES_PER_S = 100.0
MAX_RSS_MIB = 100.0
DOCUMENTS = 20
SENTENCES = 20
FRAGMENTS = 300
TRACE_BYTES = 2500
PROMPTS = {
    **{"en": "Look at the picture and answer the question below.", "zh": "请看图回答下面的问题，并说明理由。"},
    **{"de": "Bitte beantworte die folgende Frage zum Bild.", "es": "Mira la imagen y responde a la pregunta."},
    **{"fr": "Regarde l'image et réponds à la question.", "ja": "画像を見て次の質問に答えてください。"},
}  # fmt: skip
CHILD = "import sys; sys.path.insert(0, {folder!r}); import code_switching as benchmark; benchmark.child()"


def judge(language: str, text: str) -> float:
    """Returns the reward's value of an answer to a prompt in that language."""
    prompt = Message(role="user", parts=(TextPart(text=PROMPTS[language]),))
    example = Example(id="row", messages=(prompt,), answer="", task="look", source="benchmark")
    rollout = Rollout(
        **{"token_ids": (1, 2), "sampled": (False, True), "sampler_logprobs": (0.0, -0.5), "media": (), "text": text},
        **{"prompt_suffix": "", "finish_reason": "stop", "policy_version": 0},
    )
    return code_switching(example, rollout).value


def documents(corpus: dict[str, Any], carrier: str, planted: str, count: int) -> Iterator[str]:
    """Yields the documents of one cell, the same in every process."""
    draw = random.Random(f"{carrier} {planted} {count}")
    for _ in range(DOCUMENTS):
        chosen = draw.sample(corpus["carrier"][carrier], SENTENCES)
        for place in draw.sample(range(SENTENCES), count):
            chosen[place] = draw.choice(corpus["planted"][planted])
        yield ("" if carrier == "zh" else " ").join(chosen)


def fragments(corpus: dict[str, Any], limit: int) -> Iterator[tuple[str, str]]:
    """Yields (language, text) of the clean fragments: every template with every number of filler."""
    fillers = corpus["fillers"]
    made = [
        (language, template.format(**{kind: values[number % len(values)] for kind, values in fillers.items()}))
        for number in range(max(map(len, fillers.values())))
        for language, template in corpus["templates"]
    ]
    yield from made[:limit]


def grid(corpus: dict[str, Any], counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Returns one row a cell: how many of its 20 documents are flagged."""
    cells = [("en", planted) for planted in corpus["planted"] if planted != "en"] + [("zh", planted) for planted in ("en", "ru", "ja")]
    rows = [
        {"carrier": carrier, "planted": planted, "k": count, "flagged": flagged(carrier, documents(corpus, carrier, planted, count))}
        for carrier, planted in cells
        for count in counts
    ]
    clean = [{"carrier": name, "planted": "", "k": 0, "flagged": flagged(name, documents(corpus, name, "en", 0))} for name in ("en", "zh")]
    return clean + rows


def flagged(language: str, texts: Iterator[str]) -> int:
    """Returns how many of the texts are punished."""
    return sum(judge(language, text) < 0.0 for text in texts)


def resident_mib() -> float:
    """Returns the memory that this process holds now, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def child() -> None:
    """Judges the tuning grid's hardest cells in a process of its own and prints memory, sockets and a digest of the results."""
    opened: list[str] = []
    sys.addaudithook(lambda event, _arguments: opened.append(event) if event.startswith("socket.") else None)
    corpus = yaml.safe_load(SETS["tuning"].read_text(encoding="utf-8"))
    before = resident_mib()
    values = [judge("en", text) for planted in ("de", "zh") for text in documents(corpus, "en", planted, 1)]
    values += [judge(language, text) for language, text in fragments(corpus, FRAGMENTS)]
    digest = hashlib.sha256(repr(values).encode()).hexdigest()
    print(json.dumps({"rss_mib": resident_mib() - before, "sockets": opened, "digest": digest}))


def traces_per_s(corpus: dict[str, Any], seconds: float) -> float:
    """Returns how many clean and mixed traces of about 2.5 kB are judged a second; processor time of this process."""
    traces = [(text * 3)[:TRACE_BYTES] for planted in ("de", "zh") for text in documents(corpus, "en", planted, 4)]
    done, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        judge("en", traces[done % len(traces)])
        done += 1
    return done / (time.process_time() - start)


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    counts = (1,) if arguments.quick else (1, 4, 8)
    rows: list[dict[str, Any]] = []
    for name, path in SETS.items():
        corpus = yaml.safe_load(path.read_text(encoding="utf-8"))
        cells = grid(corpus, counts)
        texts = list(fragments(corpus, FRAGMENTS))
        wrong = [text for language, text in texts if judge(language, text) < 0.0]
        for cell in cells:
            print(f"{name}: {cell}", file=sys.stderr)
        print(f"{name}: {len(wrong)} of {len(texts)} clean fragments flagged: {wrong[:20]}", file=sys.stderr)
        rows.append(
            {
                **{"set": name, "fewest_found": min(cell["flagged"] for cell in cells if cell["k"])},
                **{"clean_flagged": max(cell["flagged"] for cell in cells if not cell["k"])},
                **{"fragments": len(texts), "fragments_flagged": len(wrong), "cells": cells},
            }
        )
    command = [sys.executable, "-c", CHILD.format(folder=str(Path(__file__).resolve().parent))]
    runs = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(2)]
    speed = traces_per_s(yaml.safe_load(SETS["held_out"].read_text(encoding="utf-8")), 0.5 if arguments.quick else 5.0)
    process = {
        **{"traces_per_s": speed, "rss_mib": max(run["rss_mib"] for run in runs)},
        **{"sockets": sum(len(run["sockets"]) for run in runs), "equal_in_two_processes": runs[0]["digest"] == runs[1]["digest"]},
    }
    print(process, file=sys.stderr)
    held_out = rows[-1]
    ok = (
        held_out["fewest_found"] >= MIN_FOUND
        and held_out["clean_flagged"] == 0
        and held_out["fragments_flagged"] <= MAX_FRAGMENT_FRAC * held_out["fragments"]
        and process["traces_per_s"] >= MIN_TRACES_PER_S
        and process["rss_mib"] <= MAX_RSS_MIB
        and process["sockets"] == 0
        and process["equal_in_two_processes"]
    )
    report = {
        "name": "code_switching",
        "value": float(held_out["fewest_found"]),
        "unit": "documents found of 20, in the worst cell of the held-out grid",
        "bar": MIN_FOUND,
        "ok": ok,
        "rows": [*rows, process],
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {name: version(name) for name in ("py3langid", "regex", "numpy")},
    }
    print(json.dumps(report, ensure_ascii=False))
    return 0 if report["ok"] or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
