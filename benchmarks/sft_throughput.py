"""Supervised fine-tuning on packed multimodal rows beside trl's `SFTTrainer`, on the same weights and rows.

`python benchmarks/sft_throughput.py [--quick] [--rounds N] [--only SIZE] [--mix MIX]`: about an hour on two quiet cores, ten minutes of it
for the nano. A case is a size and a mix of lengths; it runs in a process of its own, in which the arms take turns, round after round. An
arm's time is that of one epoch, from messages and decoded images to the last optimizer update: chat template, tokenizer and image processor
are in it, loading the model is not. The arms of trl are its micro-batches of 1, 2, 4 and 8 rows, drawn at random and grouped by
length, accumulated to as many rows an update as ours; packing and padding-free batches it refuses for rows with images, and what it says
is in the output. The figure is trained tokens a second; CPU seconds stand beside it, for a machine that does something else as well. All
arms must have the same loss on the same number of trained tokens, and ours must compute no token that is not of a row.

Ends with one JSON line; `--quick`: one small case, it shows that the script works.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", CI="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image
from update import build  # the two models: nano, and 41 million parameters (37 without the embedding)
from vlpost.model.chat import Chat
from vlpost.model.config import LearnerConfig
from vlpost.model.learner import Learner
from vlpost.model.loading import load_model, load_processor
from vlpost.model.records import Example, ImagePart, Message, TextPart
from vlpost.sft.config import SftConfig
from vlpost.sft.train import SftStage, supervised_sequences

ROWS_PER_UPDATE = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of row; responses are log-normal, images square with log-uniform sides."""

    share: float
    """Of the rows of its mix"""
    median_response: int
    """Characters, which are nearly as many tokens"""
    spread: float
    """Standard deviation of the logarithm of the length"""
    text_only: float = 0.0
    """Share of rows without an image"""
    two_images: float = 0.0
    sides: tuple[int, int] = (64, 448)
    """Pixels; a token covers 32 x 32 of them: from 4 to 196 tokens an image"""


LONGEST_RESPONSE = 2048
SHORT = Kind(share=0.5, median_response=8, spread=0.6)
DESCRIPTION = Kind(share=0.3, median_response=100, spread=0.6, two_images=0.3)
THINKING = Kind(share=0.2, median_response=500, spread=0.6, text_only=0.5)
MIXES = {
    "answers and thinking in one pool": (SHORT, DESCRIPTION, THINKING),
    "short answers": (replace(SHORT, share=1.0),),
    "thinking": (replace(THINKING, share=1.0),),
}
"""The first is what a supervised stage is fed with and has the bars; the other two are its ends, where lengths differ least."""
QUICK_MIX = (Kind(share=1.0, median_response=8, spread=0.8, text_only=0.25, two_images=0.25, sides=(64, 96)),)
PEERS = {
    "1": (1, False),
    "2": (2, False),
    "4": (4, False),
    "8": (8, False),
    "2 by length": (2, True),
    "4 by length": (4, True),
    "8 by length": (8, True),
}
"""Rows of a micro-batch of trl, and whether it groups them by length; a single row has no other to be grouped with."""
SIDE_PEERS = ("1", "8", "4 by length", "8 by length")
"""Of the other two mixes"""
QUICK_PEERS = ("1", "8")
BAR_BATCH_8, BAR_BEST = 2.5, 1.2
MAX_LOSS_GAP = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A question with its images, and the answer to train on."""

    question: str
    images: list[Image.Image]
    answer: str


def draw_rows(mix: tuple[Kind, ...], count: int) -> list[Row]:
    """Returns seeded rows, as many of each kind as its share says; every image is another."""
    draw = np.random.default_rng(0)

    def words(length: int) -> str:
        return "".join(draw.choice(list("abcdefghijklmnopqrstuvwxyz     "), length)).strip() + "."

    shares = np.cumsum([kind.share for kind in mix])
    rows = []
    for index in range(count):
        kind = mix[int(np.searchsorted(shares, (index + 0.5) / count))]
        media = draw.random()
        num_images = 0 if media < kind.text_only else 2 if media < kind.text_only + kind.two_images else 1
        sides = [int(math.exp(draw.uniform(*map(math.log, kind.sides)))) for _ in range(num_images)]
        images = [Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)) for side in sides]
        length = min(LONGEST_RESPONSE, max(2, round(kind.median_response * math.exp(kind.spread * draw.normal()))))
        rows.append(Row(question=words(int(draw.integers(16, 64))), images=images, answer=words(length)))
    return [rows[index] for index in draw.permutation(count)]


@dataclass(kw_only=True)
class Epoch:
    """What one pass over the rows did."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of all threads: what other processes take from this one is not in it"""
    trained: int = 0
    loss: float = 0.0
    """Cross entropy, mean over trained tokens, nats"""
    positions: int = 0
    """Tokens that the language model computed"""
    real: int = 0
    """Of them, those of the rows"""


Arm = Callable[[], Epoch]


def count_positions(model: Any, epochs: list[Epoch]) -> None:
    """Counts what goes through the language model into the last of `epochs`."""

    def count(_: Any, __: Any, keywords: dict[str, Any]) -> None:
        epochs[-1].positions += keywords["inputs_embeds"].shape[:2].numel()

    model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)


def our_arm(folder: Path, rows: list[Row], token_budget: int) -> Arm:
    """Returns an epoch of ours."""
    config = LearnerConfig(learning_rate=1e-30, token_budget=token_budget, dtype="float32")  # weights stay: losses can be compared
    learner = Learner(load_model(folder, dtype=torch.float32), config=config, num_steps=10**6)
    settings = SftConfig(num_steps=10**6, examples_per_step=ROWS_PER_UPDATE, weighting="token")
    processor = load_processor(folder)
    epochs: list[Epoch] = []
    count_positions(learner.model, epochs)

    def run() -> Epoch:
        epochs.append(Epoch())
        chat = Chat(processor)  # a new one: no image is in its cache
        stage = SftStage(settings, learner=learner, chat=chat)
        start, cpu_start = time.perf_counter(), time.process_time()
        examples = [our_example(index, row) for index, row in enumerate(rows)]
        for first in range(0, len(rows), ROWS_PER_UPDATE):
            done = stage.step(examples[first : first + ROWS_PER_UPDATE])
            epochs[-1].trained += int(done["trained_tokens"])
            epochs[-1].loss += done["loss"] * done["trained_tokens"]
        epochs[-1].seconds, epochs[-1].cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        epochs[-1].loss /= epochs[-1].trained
        epochs[-1].real = sum(len(s.token_ids) for example in examples for s in supervised_sequences(example, chat))
        return epochs[-1]

    return run


def our_example(index: int, row: Row) -> Example:
    """Returns the row as ours takes it; hashing its images is part of it."""
    question = (*(ImagePart.from_image(image) for image in row.images), TextPart(text=row.question))
    messages = (Message(role="user", parts=question), Message(role="assistant", parts=(TextPart(text=row.answer),)))
    return Example(id=f"row {index}", messages=messages, answer="", task="chat", source="drawn")


@dataclass(kw_only=True)
class TrlRows:
    """The rows as trl takes them, with decoded images as ours has them."""

    rows: list[Row]
    dataset: Any = field(init=False)

    def __post_init__(self) -> None:
        from datasets import Dataset

        self.dataset = Dataset.from_dict({"index": range(len(self.rows))}).with_transform(self._messages)

    def _messages(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows = [self.rows[index] for index in batch["index"]]
        asked = [[{"role": "user", "content": row.question}, {"role": "assistant", "content": row.answer}] for row in rows]
        return {"messages": asked, "images": [row.images for row in rows]}


def trl_settings(rows_per_batch: int, **more: Any) -> Any:
    """Returns trl's configuration: nothing is logged, saved or checkpointed, arithmetic in float32 as ours."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=rows_per_batch,
        gradient_accumulation_steps=ROWS_PER_UPDATE // rows_per_batch,
        num_train_epochs=1,
        learning_rate=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        assistant_only_loss=True,
        remove_unused_columns=False,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **more,
    )


def trl_processor(folder: Path) -> Any:
    """Returns the processor with trl's template for training, whose mask leaves out the newline behind the end of a turn, as ours does."""
    import trl
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder)
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3_vl_training.jinja").read_text(encoding="utf-8")
    inside = "            {{- '<|im_end|>\\n' }}\n        {%- endgeneration -%}"
    outside = "            {{- '<|im_end|>' }}\n        {%- endgeneration -%}\n        {{- '\\n' }}"
    assert template.count(inside) == 1, "trl's template is another than in 1.16"
    processor.chat_template = template.replace(inside, outside)
    return processor


def trl_arm(folder: Path, rows: list[Row], rows_per_batch: int, lengths: list[int] | None) -> Arm:
    """Returns an epoch of trl; with `lengths`, tokens a row, its batches are grouped by them."""
    from transformers import AutoModelForImageTextToText, TrainerCallback
    from trl import SFTTrainer

    epochs: list[Epoch] = []
    by_length = sorted(range(len(rows)), key=lambda index: -lengths[index]) if lengths else []

    class Clock(TrainerCallback):
        """Runs from the first fetch of a row to the last update."""

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            epochs[-1].seconds, epochs[-1].cpu_seconds = -time.perf_counter(), -time.process_time()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            epochs[-1].seconds += time.perf_counter()
            epochs[-1].cpu_seconds += time.process_time()

    class Trainer(SFTTrainer):
        """Notes each micro-batch's loss, of which it does not keep the number of tokens."""

        def compute_loss(self, model: Any, inputs: dict[str, Any], *more: Any, **options: Any) -> Any:
            trained, real = int((inputs["labels"][:, 1:] != -100).sum()), int(inputs["attention_mask"].sum())
            loss = super().compute_loss(model, inputs, *more, **options)
            epochs[-1].trained += trained
            epochs[-1].real += real
            epochs[-1].loss += loss.item() * trained
            return loss

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            # All rows by length: what `train_sampling_strategy="group_by_length"` comes to in a long data set, of which it sorts 50
            # updates together. Of an epoch as short as this one it would sort fewer, and pad more.
            return super()._get_train_sampler(train_dataset) if lengths is None else by_length

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    count_positions(model, epochs)
    trainer = Trainer(
        model=model,
        args=trl_settings(rows_per_batch),
        train_dataset=TrlRows(rows=rows).dataset,
        processing_class=trl_processor(folder),
        callbacks=[Clock()],
    )

    def run() -> Epoch:
        epochs.append(Epoch())
        trainer.train()
        epochs[-1].loss /= epochs[-1].trained
        return epochs[-1]

    return run


def refusals(folder: Path, rows: list[Row]) -> dict[str, str]:
    """Returns what trl says to its two ways to train without padding."""
    from transformers import AutoModelForImageTextToText
    from trl import SFTTrainer

    said = {}
    for option in ("padding_free", "packing"):
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        settings = trl_settings(8, **{option: True})
        try:
            SFTTrainer(model=model, args=settings, train_dataset=TrlRows(rows=rows).dataset, processing_class=trl_processor(folder))
        except ValueError as error:
            said[option] = str(error)
        else:
            raise SystemExit(f"trl now trains images with {option}: it belongs among the peers")
    return said


def run_case(folder: Path, mix: tuple[Kind, ...], *, num_rows: int, rounds: int, token_budget: int, peers: list[str]) -> dict[str, Any]:
    """Returns the figures of one size and mix."""
    torch.set_num_threads(2)
    rows = draw_rows(mix, num_rows)
    chat = Chat(load_processor(folder))
    sequences = [s for index, row in enumerate(rows) for s in supervised_sequences(our_example(index, row), chat)]
    lengths = [len(s.token_ids) for s in sequences]
    refused = refusals(folder, rows)
    arms = {"ours": our_arm(folder, rows, token_budget or max(1280, *lengths))}
    for peer in peers:
        rows_per_batch, is_grouped = PEERS[peer]
        arms[peer] = trl_arm(folder, rows, rows_per_batch, lengths if is_grouped else None)
    epochs: dict[str, list[Epoch]] = {name: [] for name in arms}
    for number in range(rounds):
        order = list(arms) if number % 2 == 0 else list(reversed(arms))
        for name in order:
            epochs[name].append(arms[name]())
    return figures(epochs, lengths, [s.num_trained_tokens for s in sequences]) | {"refused_by_trl": refused}


def figures(epochs: dict[str, list[Epoch]], lengths: list[int], trained: list[int]) -> dict[str, Any]:
    """Returns speeds, paired ratios, padding and the largest difference between losses."""
    ours = epochs["ours"]
    speeds = {name: [epoch.trained / epoch.seconds for epoch in found] for name, found in epochs.items()}
    assert all(epoch.trained == sum(trained) for found in epochs.values() for epoch in found), "the arms train other tokens"
    ratios = {name: [mine / other for mine, other in zip(speeds["ours"], speeds[name], strict=True)] for name in epochs if name != "ours"}
    best = min(ratios, key=lambda name: statistics.median(ratios[name]))
    cpu = {name: statistics.median(epoch.cpu_seconds for epoch in found) for name, found in epochs.items()}
    gap = max(abs(epoch.loss / ours[0].loss - 1.0) for found in epochs.values() for epoch in found)
    return {
        "rows": len(lengths),
        "tokens": sum(lengths),
        "trained_tokens": sum(trained),
        "row_tokens": {"shortest": min(lengths), "median": statistics.median(lengths), "longest": max(lengths)},
        "seconds": {name: statistics.median(epoch.seconds for epoch in found) for name, found in epochs.items()},
        "cpu_seconds": cpu,
        "times_batch_8_by_cpu": cpu["8"] / cpu["ours"],
        "times_best_by_cpu": min(seconds for name, seconds in cpu.items() if name != "ours") / cpu["ours"],
        "trained_tokens_per_s": {name: statistics.median(found) for name, found in speeds.items()},
        "padding": {name: found[0].positions - found[0].real for name, found in epochs.items()},
        "times_batch_8": statistics.median(ratios["8"]),
        "times_best": statistics.median(ratios[best]),
        "best_of_trl": best,
        "ratios_by_round": {name: [round(ratio, 3) for ratio in found] for name, found in ratios.items()},
        "largest_loss_difference": gap,
    }


def run_child(arguments: argparse.Namespace, folder: Path, size: str, mix: str) -> dict[str, Any]:
    """Runs one case in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(folder), "--mix", mix, *(["--quick"] if arguments.quick else [])]
    command += ["--rounds", str(arguments.rounds), "--rows", str(arguments.rows), "--token-budget", str(arguments.token_budget)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{size}, {mix}: {done.stderr[-3000:]}")
    row = {"size": size, "mix": mix, **json.loads(done.stdout.splitlines()[-1])}
    is_judged = mix == next(iter(MIXES)) and not arguments.quick
    row["bars"] = {"batch 8": BAR_BATCH_8, "best": BAR_BEST} if is_judged else None
    row["ok"] = row["largest_loss_difference"] < MAX_LOSS_GAP and row["padding"]["ours"] == 0
    if is_judged:
        row["ok"] = row["ok"] and row["times_batch_8"] >= BAR_BATCH_8 and row["times_best"] >= BAR_BEST
    speeds = ", ".join(f"{name}: {speed:.0f}" for name, speed in row["trained_tokens_per_s"].items())
    print(
        f"{size}, {mix}: {row['times_batch_8']:.2f} times batch 8, {row['times_best']:.2f} times the best of trl ({row['best_of_trl']}); "
        f"by CPU seconds {row['times_batch_8_by_cpu']:.2f} and {row['times_best_by_cpu']:.2f}; "
        f"padding {row['padding']['ours']} tokens, trl with 8 rows {row['padding']['8']}, of {row['tokens']}; "
        f"losses differ by {row['largest_loss_difference']:.1e}; trained tokens a second {speeds}",
        file=sys.stderr,
        flush=True,
    )
    return row


def main() -> int:
    """Runs the benchmark, or one case of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64, help="of one epoch")
    parser.add_argument("--token-budget", type=int, default=0, help="of one of our micro-batches; 0: the longest row, at least 1280")
    parser.add_argument("--only", choices=["nano", "41 M"], help="one of the two sizes")
    parser.add_argument("--mix", choices=[*MIXES, "quick"])
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.rows = 1, ROWS_PER_UPDATE
    if arguments.folder:
        mix = QUICK_MIX if arguments.mix == "quick" else MIXES[arguments.mix]
        peers = list(QUICK_PEERS if arguments.quick else PEERS if arguments.mix == next(iter(MIXES)) else SIDE_PEERS)
        settings = {"num_rows": arguments.rows, "rounds": arguments.rounds, "token_budget": arguments.token_budget}
        print(json.dumps(run_case(arguments.folder, mix, peers=peers, **settings)))
        return 0
    sizes = ["nano"] if arguments.quick else [arguments.only] if arguments.only else ["nano", "41 M"]
    with tempfile.TemporaryDirectory() as name:
        rows = []
        for size in sizes:
            build(Path(name) / size, quick=size == "nano")
            mixes = ["quick"] if arguments.quick else [arguments.mix] if arguments.mix else list(MIXES)
            rows += [run_child(arguments, Path(name) / size / "model", size, mix) for mix in mixes]
    judged = [row for row in rows if row["bars"]] or rows
    worst = min(judged, key=lambda row: min(row["times_batch_8"] / BAR_BATCH_8, row["times_best"] / BAR_BEST))
    is_best_nearer = worst["times_best"] / BAR_BEST < worst["times_batch_8"] / BAR_BATCH_8
    against = f"its best ({worst['best_of_trl']})" if is_best_nearer else "batch 8"
    report = {
        "name": "sft_throughput",
        "value": worst["times_best"] if is_best_nearer else worst["times_batch_8"],
        "unit": f"times trl's trained tokens a second, {worst['size']}, {worst['mix']}, against {against}: the figure nearest to its bar",
        "bar": BAR_BEST if is_best_nearer else BAR_BATCH_8,
        "ok": all(row["ok"] for row in rows),
        "rows": rows,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }
    print(json.dumps(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
