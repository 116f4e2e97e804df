"""One rank of a step on several processes: `torchrun ranks_worker.py MODEL MOE OUTPUT LAYOUT` writes gradients, weights and a report.

Run by test_layouts.py, which computes the same step in one process with the functions of this file.
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
from vlpost.model.config import LearnerConfig, LoraConfig
from vlpost.model.layout import full_tensor, shard_like
from vlpost.model.learner import FULL_DISTRIBUTION, Distribution, Learner
from vlpost.model.loading import load_model, load_processor
from vlpost.model.packing import Weighted, pack, weigh
from vlpost.model.records import ImagePart, Message, TextPart, TrainSequence
from vlpost.rl.policy_loss import sapo

DISTRIBUTION = Distribution(temperature=0.8, allowed=None)


def config(**changes):
    return LearnerConfig(learning_rate=1e-3, token_budget=160, gradient_checkpointing=True, weight_decay=0.1, **changes)


def rows(chat):
    """Eight families, images in the even ones only: with two ranks that take every second, one rank has them all."""
    numbers = np.random.default_rng(0)
    families = []
    for index in range(8):
        parts = (TextPart(text=f"the sum of {index} and {index * 7}?"),)
        if index % 2 == 0:
            pixels = numbers.integers(0, 256, (64, 64 + 32 * (index % 3), 3), dtype=np.uint8)
            parts = (ImagePart.from_image(Image.fromarray(pixels)), *parts)
        prompt = chat.encode_prompt([Message(role="user", parts=parts)])
        family = []
        for member in range(3 if index % 2 == 0 else 1):
            response = tuple(int(token) for token in numbers.integers(0, 250, 3 + 2 * member + index))
            family.append(
                TrainSequence(
                    place=f"row {index}, rollout {member}",
                    token_ids=prompt.token_ids + response,
                    trained=(False,) * len(prompt.token_ids) + (True,) * len(response),
                    media=prompt.media,
                    targets=float(numbers.normal()),
                )
            )
        families.append(family)
    return families


def sft_batches(families, learner, chat):
    weighted = weigh(families, "sqrt", over_ranks=learner.ranks.total)
    return learner.fill(pack(weighted, media=chat, token_budget=learner.config.token_budget))


def rl_batches(families, learner, chat):
    planned = learner.ranks.total(sum(len(family) for family in families))
    weighted = [[Weighted(sequence=s, token_weight=1 / (planned * s.num_trained_tokens)) for s in family] for family in families]
    return learner.fill(pack(weighted, media=chat, token_budget=learner.config.token_budget))


def sapo_losses(batches, learner):
    """SAPO against log-probs that the policy is a little off, the same for every token whatever the layout."""

    def make(batch):
        advantages = batch.per_token(lambda s: (s.targets,) * s.num_trained_tokens)
        return lambda outputs: sapo(
            outputs.logprobs, outputs.logprobs.detach() - 0.1 * advantages, advantages=advantages, tau_pos=1.0, tau_neg=1.05
        )

    return [make(batch) for batch in batches]


def gradients(learner):
    return {name: full_tensor(p.grad).clone() for name, p in learner.model.named_parameters() if p.requires_grad}


def accumulate(step, families, learner, chat):
    """Adds the gradient of the step and returns its loss over all ranks."""
    if step == "sft":
        batches = sft_batches(families, learner, chat)
        losses, distribution = [lambda outputs: -outputs.logprobs] * len(batches), FULL_DISTRIBUTION
    else:
        batches = rl_batches(families, learner, chat)
        for batch in batches:
            learner.logprobs(batch, DISTRIBUTION)  # as the later mini-batches of a step do for their old log-probs
        losses, distribution = sapo_losses(batches, learner), DISTRIBUTION
    parts = [
        learner.forward_backward(batch, distribution, loss, is_last=index == len(batches) - 1)
        for index, (batch, loss) in enumerate(zip(batches, losses, strict=True))
    ]
    return learner.ranks.total(sum(parts)), len(batches)


def save(named, path):
    save_file({name: value.contiguous() for name, value in named.items()}, path)


def train(step, model, chat, layout, output):
    """Does one update; writes its gradients and the weights after it, and returns what to report."""
    learner = Learner(load_model(model, dtype=torch.float32), config=config(layout=layout), num_steps=10)
    ranks = learner.ranks
    families = rows(chat)[ranks.rank :: ranks.size]
    loss, num_batches = accumulate(step, families, learner, chat)
    found = gradients(learner)
    local = len(pack(weigh(families, "token"), media=chat, token_budget=learner.config.token_budget))
    report = {"loss": loss, "num_batches": num_batches, "local_counts": ranks.gather(local), "wrapper": type(learner.policy).__name__}
    report["step"] = learner.optim_step()
    state = learner.state_tensors()
    learner.load_state_tensors(ranks.gather(state)[0], policy_version=learner.policy_version)
    again = learner.state_tensors()
    if ranks.is_first:
        assert all(torch.equal(state[stem][name], again[stem][name]) for stem in state for name in state[stem])
        save(found, output / f"gradients-{step}.safetensors")
        save(state["model"], output / f"weights-{step}.safetensors")
    return learner, report


LANGUAGE_ADAPTER = {"lora": LoraConfig(rank=4), "freeze": ("vision", "merger")}
EVERY_ADAPTER = {"lora": LoraConfig(rank=4, parts=("vision", "merger", "language"))}
KL_STEPS = {
    "lora": LANGUAGE_ADAPTER,
    "lora-everywhere": EVERY_ADAPTER,
    "frozen-tower": {"freeze": ("vision", "merger")},
    "copy": {},
    "experts": {"router_loss_coef": 1.0},
    "lora-everywhere-bfloat16": {**EVERY_ADAPTER, "dtype": "bfloat16"},
    "frozen-tower-bfloat16": {"freeze": ("vision", "merger"), "dtype": "bfloat16"},
    "copy-bfloat16": {"dtype": "bfloat16"},
}
"""Steps with an exact KL term to a reference, by what is trained; `experts` on the mixture of experts, with a router loss too."""


class RecordingLearner(Learner):
    """Keeps the gradient of the last update."""

    def optim_step(self):
        self.found = gradients(self)
        return super().optim_step()


def load_policy(model, dtype, *, routers_scaled):
    """Returns the model in the dtype a run has it in; an even router has hardly a gradient, so routers may be made ten times steeper."""
    loaded = load_model(model, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    for name, parameter in loaded.named_parameters():
        if routers_scaled and name.endswith("mlp.gate.weight"):
            parameter.data.mul_(10)
    return loaded


def kl_step(step, models, chat, **changes):
    """Does one update of SAPO plus an exact KL to a reference; returns learner, gradients and metrics over all ranks."""
    settings = config(**KL_STEPS[step]).model_copy(update=changes)
    numbers = torch.Generator().manual_seed(1)
    model = models["moe" if step == "experts" else "dense"]
    reference = None
    if settings.lora is None:
        reference = load_policy(model, settings.dtype, routers_scaled=step == "experts")
        for parameter in reference.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=numbers), alpha=0.02)
    policy = load_policy(model, settings.dtype, routers_scaled=step == "experts")
    learner = RecordingLearner(policy, config=settings, num_steps=10, reference=reference)
    for name, parameter in learner.model.named_parameters():
        if ".lora_B." in name:  # a fresh adapter is its own reference
            parameter.data.copy_(shard_like(0.05 * torch.randn(parameter.shape, generator=numbers), parameter))
    ranks = learner.ranks
    batches = rl_batches(rows(chat)[ranks.rank :: ranks.size], learner, chat)
    references = [learner.reference_states(batch, DISTRIBUTION) for batch in batches]

    def with_kl(loss):
        return lambda outputs: loss(outputs) + 2.0 * outputs.divergence

    update = learner.update(batches, DISTRIBUTION, [with_kl(loss) for loss in sapo_losses(batches, learner)], references)
    return learner, learner.found, ranks.merge([update])


def break_on_last_rank(learner, chat):
    """Drops two updates, one for a loss that is not finite on the last rank only, one for such a gradient, and returns what was said."""
    ranks = learner.ranks
    factor = float("nan") if ranks.rank == ranks.size - 1 else 1.0
    before = learner.state_tensors()
    batches = sft_batches(rows(chat)[ranks.rank :: ranks.size], learner, chat)
    report = {}
    update = learner.update(batches, FULL_DISTRIBUTION, [lambda outputs: outputs.logprobs * factor] * len(batches))
    report["loss"] = {"step": ranks.merge([update]), "faults": learner.take_faults()}
    accumulate("sft", rows(chat)[ranks.rank :: ranks.size], learner, chat)
    next(parameter for parameter in learner.model.parameters() if parameter.requires_grad).grad.mul_(factor)
    report["gradient"] = {"step": learner.optim_step(), "faults": learner.take_faults()}
    after = learner.state_tensors()
    report["unchanged"] = all(torch.equal(before[stem][name], after[stem][name]) for stem in before for name in before[stem])
    return report


def main(dense, moe, output, layout):
    torch.set_num_threads(1)
    chat = Chat(load_processor(dense))
    report = {}
    for step in ("sft", "rl"):
        learner, report[step] = train(step, dense, chat, layout, Path(output))
    report["broken"] = break_on_last_rank(learner, chat)
    for step in KL_STEPS:
        learner, found, report[step] = kl_step(step, {"dense": dense, "moe": moe}, chat, layout=layout)
        if learner.ranks.is_first:
            save(found, Path(output) / f"gradients-{step}.safetensors")
    if learner.ranks.is_first:
        (Path(output) / "report.json").write_text(json.dumps(report))
    learner.ranks.wait()
    os._exit(0)  # torch 2.13 can deadlock when it takes the group down: see recipes/run.py


if __name__ == "__main__":
    main(*sys.argv[1:])
