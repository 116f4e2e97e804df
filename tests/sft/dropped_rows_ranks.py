"""One rank of supervised steps that drop rows: `torchrun dropped_rows_ranks.py MODEL OUTPUT` writes the metrics of the first rank.

Run by test_dropped_rows_ranks.py, which takes the same steps in one process with the functions of this file.
"""

import json
import os
import sys
from pathlib import Path

import torch
from vlpost.model.chat import Chat
from vlpost.model.config import LearnerConfig
from vlpost.model.learner import Learner
from vlpost.model.loading import load_model, load_processor
from vlpost.model.records import Example, Message, TextPart
from vlpost.sft.config import SftConfig
from vlpost.sft.train import SftStage


def row(name, answer):
    """One question and its answer."""
    messages = (Message(role="user", parts=(TextPart(text="?"),)), Message(role="assistant", parts=(TextPart(text=answer),)))
    return Example(id=name, messages=messages, answer="", task="t", source="s")


SHORT, LONG = "12", "x y z " * 20
STEPS = {
    "nothing dropped": [row("a", SHORT), row("b", "7"), row("c", "3 + 4"), row("d", SHORT)],
    "all of the second rank dropped": [row("a", SHORT), row("b", LONG), row("c", "3 + 4"), row("d", LONG)],
    "all dropped": [row("a", LONG), row("b", LONG), row("c", LONG), row("d", LONG)],
    "after an empty step": [row("e", "5"), row("f", SHORT), row("g", LONG), row("h", "8")],
}


def steps(model, rank=0, size=1):
    """Returns the metrics of each step, without times."""
    settings = LearnerConfig(learning_rate=1e-3, token_budget=512, dtype="float32")
    learner = Learner(load_model(model, dtype=torch.float32), config=settings, num_steps=4)
    config = SftConfig(num_steps=4, examples_per_step=4, max_length=64, too_long="drop")
    stage = SftStage(config, learner=learner, chat=Chat(load_processor(model)))
    measured = {name: stage.step(examples[rank::size]) for name, examples in STEPS.items()}
    return {step: {name: value for name, value in values.items() if "time/" not in name} for step, values in measured.items()}


def main(model, output):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    measured = steps(model, rank, int(os.environ["WORLD_SIZE"]))
    if rank == 0:
        Path(output).write_text(json.dumps(measured))
    torch.distributed.barrier()
    os._exit(0)  # torch 2.13 can deadlock when it takes the group down: see recipes/run.py


if __name__ == "__main__":
    main(*sys.argv[1:])
