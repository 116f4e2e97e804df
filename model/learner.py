"""The learner: log-probs of packed batches, gradients of any per-token loss, optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from .config import LearnerConfig
from .loading import freeze
from .logprobs import token_logprobs
from .packing import Batch, VisionInputs
from .records import VlpostError


class NonFiniteError(VlpostError):
    """A loss or gradient that is not finite; no weight has been changed by it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """What the model says of a batch's targets."""

    logprobs: Tensor
    """[N] nats, fp32"""
    entropy: Tensor
    """[N] nats, fp32, without gradient"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """Which distribution a log-prob is about; engine and learner must use the same."""

    temperature: float
    allowed: Tensor | None
    """[V] bool, None for the whole vocabulary"""


FULL_DISTRIBUTION = Distribution(temperature=1.0, allowed=None)
"""The model's own distribution: what supervised losses are about."""


class Policy(nn.Module):
    """Vision, text and head under one root forward, so that one wrapper (DDP, FSDP) covers all of them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch[Any], distribution: Distribution) -> TokenLogprobs:
        """Returns log-probs and entropy of the batch's targets."""
        body: Any = self.model.model
        hidden = body(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[:, None],
            mm_encoder_outputs=_vision_features(body, batch.vision) if batch.vision else None,
            use_cache=False,
            attention_plan=batch.plan,
        ).last_hidden_state[0]
        head: Any = self.model.get_output_embeddings()
        logprobs, entropy = token_logprobs(
            hidden[batch.hidden_index],
            head.weight,
            token_ids=batch.target_ids,
            allowed=distribution.allowed,
            temperature=distribution.temperature,
        )
        return TokenLogprobs(logprobs=logprobs, entropy=entropy)


def _vision_features(body: Any, vision: VisionInputs) -> dict[str, BaseModelOutputWithDeepstackFeatures]:  # noqa: ANN401
    """Returns the features of every placeholder run, from one tower pass over the distinct images and videos."""
    features = body.get_image_features(vision.pixel_values, vision.grid_thw, return_dict=True)
    return {
        kind: BaseModelOutputWithDeepstackFeatures(
            pooler_output=tuple(features.pooler_output[entry] for entry in order),  # pyright: ignore[reportArgumentType]
            deepstack_features=[tuple(level[entry] for entry in order) for level in features.deepstack_features],  # pyright: ignore[reportArgumentType]
        )
        for kind, order in (("image", vision.image_order), ("video", vision.video_order))
        if order
    }


class Learner:
    """Holds the policy and its optimizer; `policy_version` counts the updates in the weights.

    A step is: `forward_backward` for every micro-batch, then `optim_step`. Token weights of all micro-batches sum to one, so the
    gradient does not depend on how the step was cut.
    """

    def __init__(self, model: PreTrainedModel, *, config: LearnerConfig, num_steps: int) -> None:
        self.config = config
        self.num_steps = num_steps
        self.policy_version = 0
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
        freeze(model, config.freeze)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=config.learning_rate, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, fused=True
        )
        self.policy, self.optimizer = self.accelerator.prepare(Policy(model), optimizer)

    @property
    def model(self) -> PreTrainedModel:
        """The unwrapped transformers model."""
        return self.accelerator.unwrap_model(self.policy).model

    def logprobs(self, batch: Batch[Any], distribution: Distribution) -> TokenLogprobs:
        """Returns log-probs and entropy without a gradient."""
        with torch.no_grad():
            return self.policy(batch.to(self.accelerator.device), distribution)

    def forward_backward(self, batch: Batch[Any], distribution: Distribution, loss: Callable[[TokenLogprobs], Tensor]) -> float:
        """Adds the gradient of `(token_weights * loss(outputs)).sum()` and returns that sum.

        `loss` maps the outputs to per-token losses [N]. The sum is multiplied by the number of ranks, because DDP and FSDP average
        gradients over ranks and the weights of all ranks together sum to one.
        """
        batch = batch.to(self.accelerator.device)
        outputs: TokenLogprobs = self.policy(batch, distribution)
        weighted = (batch.token_weights * loss(outputs)).sum()
        if not torch.isfinite(weighted):
            self.optimizer.zero_grad()
            raise NonFiniteError(
                f"the loss of update {self.policy_version + 1} is {weighted.item()}: the step is dropped, weights are unchanged"
            )
        self.accelerator.backward(weighted * self.accelerator.num_processes)
        return weighted.item()

    def optim_step(self) -> dict[str, float]:
        """Clips, updates, clears the gradient; returns grad_norm (before clipping, L2) and learning_rate."""
        learning_rate = scheduled_learning_rate(self.config, self.policy_version, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        clipped = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        assert clipped is not None, "only DeepSpeed clips on its own and returns nothing"
        norm = float(clipped)
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise NonFiniteError(
                f"the gradient norm of update {self.policy_version + 1} is {norm}: the step is dropped, weights are unchanged"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.policy_version += 1
        return {"grad_norm": norm, "learning_rate": learning_rate}


def scheduled_learning_rate(config: LearnerConfig, step: int, num_steps: int) -> float:
    """Returns the learning rate of update `step` (from 0) of `num_steps`: linear warm-up, then constant, linear or cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    falling = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_learning_rate_frac + (1.0 - config.final_learning_rate_frac) * falling)
