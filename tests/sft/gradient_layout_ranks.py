"""One rank of supervised steps on several processes: `torchrun gradient_layout_ranks.py MODEL OUTPUT` writes gradients and a report.

Run by test_gradient_layouts.py, which computes the same steps in one process with the functions of this file.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from vlpost.model.chat import Chat
from vlpost.model.config import LearnerConfig
from vlpost.model.layout import full_tensor
from vlpost.model.learner import Learner
from vlpost.model.loading import load_model, load_processor
from vlpost.model.records import Example, ImagePart, Message, TextPart
from vlpost.sft.config import SftConfig
from vlpost.sft.train import SftStage

WEIGHTINGS = ("token", "sqrt", "sequence")
LAYOUTS = ("ddp", "fsdp2")
ORDERS = {"images on the first rank only": (0, 1, 2, 3, 4, 5, 6, 7), "images on both ranks": (0, 1, 3, 2, 4, 5, 7, 6)}
"""Of the rows; of two ranks, each takes every second one."""


def rows():
    """Eight rows of which the even ones hold images; the last two have several turns, with thinking that the template drops later."""
    draw = np.random.default_rng(0)
    found = []
    for index in range(8):
        words = (TextPart(text=f"the sum of {index} and {index * 7}?"),)
        if index % 2 == 0:
            pixels = draw.integers(0, 256, (64, 64 + 32 * (index % 3), 3), dtype=np.uint8)
            words = (ImagePart.from_image(Image.fromarray(pixels)), *words)
        answer = (TextPart(text="<think>\nadd them\n</think>\n\n" + f"it is {8 * index} " * (1 + index % 4)),)
        messages = [Message(role="user", parts=words), Message(role="assistant", parts=answer)]
        if index >= 6:
            messages += [Message(role="user", parts=(TextPart(text="and twice?"),)), Message(role="assistant", parts=answer)]
        found.append(Example(id=f"row {index}", messages=tuple(messages), answer="", task="sum", source="test"))
    return found


class RecordingLearner(Learner):
    """Keeps the gradient of the last update before it is clipped, and how many micro-batches made it."""

    num_micro_batches = 0

    def forward_backward(self, batch, distribution, loss, **options):
        self.num_micro_batches += 1
        return super().forward_backward(batch, distribution, loss, **options)

    def optim_step(self):
        self.found = {name: full_tensor(p.grad).clone() for name, p in self.model.named_parameters()}
        return super().optim_step()


def step(model, chat, examples, weighting, *, token_budget, layout="fsdp2"):
    """Does one update on this rank's examples; returns the learner, which keeps the gradient, and the metrics of all ranks."""
    settings = LearnerConfig(learning_rate=1e-3, token_budget=token_budget, layout=layout, dtype="float32")
    learner = RecordingLearner(load_model(model, dtype=torch.float32), config=settings, num_steps=2)
    stage = SftStage(SftConfig(num_steps=2, examples_per_step=8, weighting=weighting), learner=learner, chat=chat)
    return learner, stage.step(examples)


def main(model, output):
    torch.set_num_threads(1)
    chat = Chat(load_processor(model))
    report = {}
    for layout in LAYOUTS:
        for weighting in WEIGHTINGS:
            for number, order in enumerate(ORDERS.values()):
                row_of = rows()
                examples = [row_of[index] for index in order]
                rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
                mine = examples[rank::size]
                learner, metrics = step(model, chat, mine, weighting, token_budget=128, layout=layout)
                ranks = learner.ranks
                name = f"{layout}-{weighting}-{number}"
                report[name] = {
                    "loss": metrics["loss"],
                    "trained_tokens": metrics["trained_tokens"],
                    "images": ranks.gather(sum(len(example.media) for example in mine)),
                    "wrapper": type(learner.policy).__name__,
                    "num_micro_batches": ranks.gather(learner.num_micro_batches),
                }
                if ranks.is_first:
                    save_file(learner.found, Path(output) / f"{name}.safetensors")
    if ranks.is_first:
        (Path(output) / "report.json").write_text(json.dumps(report))
    ranks.wait()
    os._exit(0)  # torch 2.13 can deadlock when it takes the group down: see recipes/run.py


if __name__ == "__main__":
    main(*sys.argv[1:])
