"""SAPO, GRPO and GSPO against trl's GRPOTrainer: same padded micro-batches of a nano Qwen3-VL, same loss, same parameter gradients."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration
from trl import GRPOConfig, GRPOTrainer
from vlpost.model.nano import build_nano
from vlpost.rl.advantages import group_advantages
from vlpost.rl.policy_loss import grpo, gspo, sapo

QUESTION = "How many digits are there?"
RESPONSE_LENGTHS = ((3, 7, 5, 1), (6, 2, 7, 4))
REWARDS = ((1.0, 0.0, 0.0, 0.5), (0.0, 1.0, 1.0, 1.0))
GROUP_SIZE = 4
NUM_RESPONSES = 8
"""Two groups, one in each micro-batch: trl's mean of equal micro-batches is then the mean over all responses."""


@dataclass(frozen=True, kw_only=True)
class Case:
    trl_options: dict
    spread: float
    """Standard deviation of old log-probs around the current ones: wide enough that gates close and bounds clip."""


CASES = {
    "sapo": Case(trl_options={"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}, spread=0.8),
    "sapo with other temperatures": Case(
        trl_options={"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 5.0}, spread=0.8
    ),
    "grpo": Case(trl_options={"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.27}, spread=0.4),
    "gspo": Case(
        trl_options={"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}, spread=3e-3
    ),
}


def our_loss(name, logprobs, old_logprobs, *, advantages, sequence_ids):
    if name == "sapo":
        return sapo(logprobs, old_logprobs, advantages=advantages, tau_pos=1.0, tau_neg=1.05)
    if name == "sapo with other temperatures":
        return sapo(logprobs, old_logprobs, advantages=advantages, tau_pos=2.0, tau_neg=5.0)
    if name == "grpo":
        return grpo(logprobs, old_logprobs, advantages=advantages, clip_low=0.2, clip_high=0.27)
    return gspo(logprobs, old_logprobs, advantages=advantages, sequence_ids=sequence_ids)


@pytest.fixture(scope="module")
def nano_folder(tmp_path_factory):
    return build_nano(tmp_path_factory.mktemp("nano"), size="s", corpus=[QUESTION, "0 1 2 3 4 5 6 7 8 9"], seed=0)


@pytest.fixture(scope="module")
def processor(nano_folder):
    return AutoProcessor.from_pretrained(nano_folder, padding_side="left")


@pytest.fixture(scope="module")
def micro_batches(processor):
    """Two groups of one image prompt each, without old log-probs; responses of unequal length, padded on the right."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    text = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    prompt = processor(text=[text], images=[image], return_tensors="pt")
    generator = torch.Generator().manual_seed(1)
    batches = []
    for lengths, rewards in zip(RESPONSE_LENGTHS, REWARDS, strict=True):
        width = max(lengths)
        completion_ids = torch.randint(0, 250, (GROUP_SIZE, width), generator=generator)
        batches.append(
            {
                "prompt_ids": prompt["input_ids"].repeat(GROUP_SIZE, 1),
                "prompt_mask": prompt["attention_mask"].repeat(GROUP_SIZE, 1),
                "completion_ids": completion_ids,
                "completion_mask": (torch.arange(width) < torch.tensor(lengths)[:, None]).long(),
                "advantages": torch.tensor(group_advantages(rewards)),
                "pixel_values": prompt["pixel_values"].repeat(GROUP_SIZE, 1),
                "image_grid_thw": prompt["image_grid_thw"].repeat(GROUP_SIZE, 1),
                "num_images": [1] * GROUP_SIZE,
                "mm_token_type_ids": torch.cat(
                    [prompt["mm_token_type_ids"].repeat(GROUP_SIZE, 1), torch.zeros_like(completion_ids)], dim=1
                ),
                "num_items_in_batch": torch.tensor(sum(map(sum, RESPONSE_LENGTHS))),
            }
        )
    return batches


def padded_logprobs(model, batch):
    """Log-probs of the completion tokens, [G, width], by a plain forward pass of transformers."""
    width = batch["completion_ids"].shape[1]
    logits = model(
        input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        pixel_values=batch["pixel_values"],
        image_grid_thw=batch["image_grid_thw"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        use_cache=False,
    ).logits
    return logits[:, -width - 1 : -1].log_softmax(-1).gather(2, batch["completion_ids"][:, :, None]).squeeze(2)


def flat_arrays(batch):
    """The packed view of a padded batch: advantages, sequence ids and SAPO's token weights, each [N]."""
    real = batch["completion_mask"].bool()
    lengths = real.sum(1)
    rows = torch.arange(GROUP_SIZE)
    token_weights = (1 / (NUM_RESPONSES * lengths)).repeat_interleave(lengths)
    return real, batch["advantages"].repeat_interleave(lengths), rows.repeat_interleave(lengths), token_weights


def build_trainer(model, processor, options, output_dir):
    arguments = GRPOConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=GROUP_SIZE,
        gradient_accumulation_steps=2,
        num_generations=GROUP_SIZE,
        max_completion_length=8,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        **options,
    )
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": QUESTION}]}] * NUM_RESPONSES)
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=prompts,
        processing_class=processor,
    )


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def norm(tensors):
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def gate_mean(batches, model):
    """The mean gate weight of SAPO at temperature 1 over all tokens of the batches."""
    with torch.no_grad():
        padded = [padded_logprobs(model, batch) - batch["old_per_token_logps"] for batch in batches]
    log_ratio = torch.cat([rows[batch["completion_mask"].bool()] for rows, batch in zip(padded, batches, strict=True)])
    return (1 / torch.cosh((log_ratio.exp() - 1) / 2) ** 2).mean().item()


@pytest.mark.parametrize("name", CASES)
def test_loss_and_parameter_gradients_equal_trl(name, nano_folder, processor, micro_batches, tmp_path):
    case = CASES[name]
    model = Qwen3VLForConditionalGeneration.from_pretrained(nano_folder, dtype=torch.float32)
    trainer = build_trainer(model, processor, case.trl_options, tmp_path)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        batches = [
            {
                **batch,
                "old_per_token_logps": (current := padded_logprobs(model, batch))
                + case.spread * torch.randn(current.shape, generator=generator),
            }
            for batch in micro_batches
        ]

    model.zero_grad()
    trl_losses = [trainer._compute_loss(trainer.model, batch) for batch in batches]
    for loss in trl_losses:
        loss.backward()
    trl_gradients = gradients(model)

    model.zero_grad()
    our_losses = []
    for batch in batches:
        real, advantages, sequence_ids, token_weights = flat_arrays(batch)
        per_token_loss = our_loss(
            name, padded_logprobs(model, batch)[real], batch["old_per_token_logps"][real], advantages=advantages, sequence_ids=sequence_ids
        )
        our_losses.append((token_weights * per_token_loss).sum())
        our_losses[-1].backward()
    our_gradients = gradients(model)

    assert sum(our_losses).item() == pytest.approx(sum(trl_losses).item(), rel=1e-5, abs=1e-6)
    assert our_gradients.keys() == trl_gradients.keys()
    assert any("visual" in parameter for parameter in trl_gradients)
    difference = norm(our_gradients[parameter] - gradient for parameter, gradient in trl_gradients.items())
    assert difference <= 1e-5 * norm(trl_gradients.values())
    # A comparison where nothing was clipped or gated would also pass for a loss that never does so.
    if name in ("grpo", "gspo"):
        assert 0.05 < sum(trainer._metrics["train"]["clip_ratio/region_mean"]) / 2 < 0.95
    else:
        assert gate_mean(batches, model) < 0.9
