"""The learner: log-probs of packed batches, gradients of any per-token loss, optimizer steps, on one process or many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import LearnerConfig, Part
from .divergence import token_kl
from .experts import Routing, count_routed, has_experts, record_routing, router_balance_loss
from .layout import Ranks, build_accelerator, full_tensor, is_sharded, machine_dtype, reshard, shard, shard_like
from .loading import freeze, hub_weights, part_of
from .logprobs import support_logprobs, token_logprobs, top_ids
from .lora import add_adapter
from .metrics import Metric, maximum, total
from .packing import Batch, empty_batch
from .records import VlpostError
from .reference import AdapterOff, FrozenCopy, ReferenceStates, SparseStates
from .training_state import load_optimizer_tensors, optimizer_tensors
from .vision import VisionPass, vision_pass

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """What the model says of a batch's targets."""

    logprobs: Tensor
    """[N] nats, fp32"""
    entropy: Tensor
    """[N] nats, fp32, without gradient"""
    divergence: Tensor | None
    """[N] nats, fp32: over the whole vocabulary, from the reference or teacher that was handed in, `token_kl` unless told otherwise; or
    over the ids and the tail of a `SparseStates`"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """Which distribution a log-prob is about; engine and learner must use the same."""

    temperature: float
    allowed: Tensor | None
    """[V] bool, None for the whole vocabulary"""


FULL_DISTRIBUTION = Distribution(temperature=1.0, allowed=None)
"""The model's own distribution: what supervised losses are about."""

TokenDivergence = Callable[..., Tensor]
"""`token_kl`, `token_forward_kl` or `token_jsd` with its beta: takes hidden states and head of policy and reference, returns [N] nats.
For a `SparseStates` it takes log-probs [N, K] of policy and teacher and `known`."""

TokenLoss = Callable[[TokenLogprobs], Tensor]
"""Maps the outputs for a batch's N targets to the loss [N] of each."""


class Policy(nn.Module):
    """Whatever is computed with the model is one forward of this root, so that one wrapper (DDP, FSDP) covers vision, text and head."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[PreTrainedModel], Result]) -> Result:
        """Returns `compute(model)`."""
        return compute(self.model)


def batch_logprobs(
    model: PreTrainedModel,
    batch: Batch[Any],
    distribution: Distribution,
    *,
    vision: VisionPass,
    reference: ReferenceStates | SparseStates | None = None,
    divergence: TokenDivergence = token_kl,
) -> TokenLogprobs:
    """Returns what the model says of the batch's targets, in one forward over its unique tokens."""
    hidden = target_states(model, batch, vision=vision)
    head = head_of(model)
    if isinstance(reference, SparseStates):
        return _sparse_logprobs(hidden, head, batch, distribution, reference, divergence)
    logprobs, entropy = token_logprobs(
        hidden, head, token_ids=batch.target_ids, allowed=distribution.allowed, temperature=distribution.temperature
    )
    found = None
    if reference is not None:
        reference_head = head.detach() if reference.head is None else reference.head
        rows = min(len(head), len(reference_head))
        found = divergence(
            hidden,
            head[:rows],
            reference.hidden,
            reference_head[:rows],
            allowed=_first(distribution.allowed, rows=rows, of=max(len(head), len(reference_head))),
            temperature=distribution.temperature,
            weights=batch.token_weights,
        )
    return TokenLogprobs(logprobs=logprobs, entropy=entropy, divergence=found)


def _sparse_logprobs(
    hidden: Tensor, head: Tensor, batch: Batch[Any], distribution: Distribution, teacher: SparseStates, divergence: TokenDivergence
) -> TokenLogprobs:
    """Returns the outputs with the divergence over the teacher's support; one pass over the vocabulary for targets and support."""
    device = hidden.device
    logprobs, entropy = support_logprobs(
        hidden,
        head,
        token_ids=torch.cat([batch.target_ids[:, None], teacher.support_ids.to(device)], dim=-1),
        allowed=distribution.allowed,
        temperature=distribution.temperature,
    )
    found = divergence(logprobs[:, 1:], teacher.support_logprobs.to(device), known=teacher.known.to(device)).to(logprobs.dtype)
    return TokenLogprobs(logprobs=logprobs[:, 0], entropy=entropy, divergence=found)


def _first(allowed: Tensor | None, *, rows: int, of: int) -> Tensor | None:
    """Returns which of the ids that both heads have may be drawn; raises where one that may be drawn has a row in one head only."""
    if rows < of and (allowed is None or bool(allowed[rows:].any())):
        raise VlpostError(
            f"one model has {rows} rows in its head and the other {of}, and ids beyond the shorter may be drawn: "
            "their vocabularies differ by more than padding"
        )
    return allowed if allowed is None else allowed[:rows]


def target_states(model: PreTrainedModel, batch: Batch[Any], *, vision: VisionPass) -> Tensor:
    """Returns the last hidden states [N, H] that predict the batch's targets."""
    body: Any = model.model
    hidden = body(
        input_ids=batch.token_ids[None],
        position_ids=batch.positions[:, None],
        mm_encoder_outputs=vision.features,
        use_cache=False,
        attention_plan=batch.plan,
    ).last_hidden_state[0]
    if vision.zero is not None:
        hidden = hidden + vision.zero.to(hidden.dtype)
    # One state predicts the next token of all responses that continue there. Indexing would add their gradients in whatever order the
    # CPU's threads come; the backward of a lookup has one order.
    return nn.functional.embedding(batch.hidden_index, hidden)


def head_of(model: PreTrainedModel) -> Tensor:
    """Returns the output matrix [V, H]."""
    head: Any = model.get_output_embeddings()
    return head.weight


def frozen_states(
    model: PreTrainedModel, batch: Batch[Any], distribution: Distribution, *, vision: VisionPass, copy: FrozenCopy | None
) -> ReferenceStates:
    """Returns what a frozen model, a reference or a teacher, says of the batch's targets; `copy` None: the policy, its adapter off."""
    hidden = target_states(model, batch, vision=vision)
    head = full_tensor(head_of(model)) if copy is None or copy.head is None else copy.head
    if copy is not None:
        copy.head = head
    logprobs, _ = token_logprobs(
        hidden, head, token_ids=batch.target_ids, allowed=distribution.allowed, temperature=distribution.temperature
    )
    return ReferenceStates(logprobs=logprobs, hidden=hidden, head=None if copy is None else head)


class Learner:
    """Holds the policy and its optimizer; `policy_version` counts the updates in the weights.

    A step is `update`: `forward_backward` for every micro-batch, then `optim_step`. Token weights of all micro-batches of all ranks sum
    to one, so the gradient does not depend on how the step was cut. With several ranks every method here that computes is
    called by all of them, with equally many batches (`fill`).
    """

    def __init__(self, model: PreTrainedModel, *, config: LearnerConfig, num_steps: int, reference: PreTrainedModel | None = None) -> None:
        """`reference` is the start model once more, for `reference_states`; a policy with an adapter needs none."""
        self.config = config
        self.num_steps = num_steps
        self.policy_version = 0
        self.nonfinite_in_a_row = 0
        """Updates dropped since the last good one"""
        self.dtype = machine_dtype(config.dtype)
        self.accelerator = build_accelerator(config.layout, self.dtype)
        self.ranks = Ranks()
        if config.activation_offload and self.accelerator.device.type == "cpu":
            raise VlpostError("learner.activation_offload moves activations from a GPU to the host, and this is the CPU: leave it out")
        freeze(model, config.freeze)
        if config.lora is not None:
            add_adapter(model, config.lora)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # masters; autocast or FSDP computes in `dtype`
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        self._trains_vision = any(p.requires_grad for name, p in model.named_parameters() if "visual." in name)
        policy = Policy(model)
        if is_sharded(config.layout):
            shard(policy, self.accelerator, self.dtype)
            self.policy = policy
        else:
            self.policy = self.accelerator.prepare(policy)
        self.optimizer = torch.optim.AdamW(
            _groups_by_part(self.policy, config), betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, fused=True
        )
        self._reference: AdapterOff | FrozenCopy | None = None
        if reference is not None:
            self._reference = FrozenCopy(Policy(reference), config=config, accelerator=self.accelerator, dtype=self.dtype)
        elif config.lora is not None:
            self._reference = AdapterOff(self.model, self.policy)
        if config.router_loss_coef and not has_experts(model):
            raise VlpostError(f"learner.router_loss_coef = {config.router_loss_coef}: the model has no router; leave it out")
        # Kept: asking `model` for it frees gathered weights, and between forward and backward they are still needed.
        self._text_config: Any = model.config.get_text_config()
        self._routed: Tensor | None = None
        self._router_loss = 0.0
        self._faults: list[str] = []
        self._watched: list[tuple[Batch[Any], Tensor]] = []
        self._frozen_passes: dict[int, tuple[Batch[Any], VisionPass]] = {}

    @property
    def model(self) -> PreTrainedModel:
        """The unwrapped transformers model; with FSDP its weights are shards: compute with it through `run`."""
        reshard(self.policy)
        return self.accelerator.unwrap_model(self.policy).model

    def run(self, compute: Callable[[PreTrainedModel], Result]) -> Result:
        """Returns `compute(model)`, run inside the wrappers and in the learner's precision."""
        return self.policy(compute)

    def describe(self) -> str:
        """Returns where and how it computes, in words: what was chosen by default depends on the machine."""
        dtype = str(self.dtype).removeprefix("torch.")
        shared = f", {self.ranks.size} processes, {self.config.layout}" if self.ranks.size > 1 else ""
        return f"learner on {self.accelerator.device.type}, {dtype}{shared}"

    def fill(self, batches: Sequence[Batch[Any]]) -> list[Batch[Any]]:
        """Returns the batches, with empty ones behind them if another rank has more: ranks run equally many forwards."""
        count = max(self.ranks.gather(len(batches)))
        return [*batches, *(empty_batch() for _ in range(count - len(batches)))]

    def logprobs(self, batch: Batch[Any], distribution: Distribution) -> TokenLogprobs:
        """Returns log-probs and entropy without a gradient."""
        with torch.no_grad():
            return self.run(self._outputs_of(batch, distribution))

    def top_ids(self, batch: Batch[Any], distribution: Distribution, *, k: int) -> Tensor:
        """Returns the policy's k most likely ids at each of the batch's targets, [N, k], most likely first, without a gradient."""
        on_device = batch.to(self.accelerator.device)

        def compute(model: PreTrainedModel) -> Tensor:
            hidden = target_states(model, on_device, vision=self._vision(model.model, batch, on_device))
            return top_ids(hidden, head_of(model), k=k, allowed=distribution.allowed)

        with torch.no_grad():
            return self.run(compute)

    def reference_states(self, batch: Batch[Any], distribution: Distribution) -> ReferenceStates:
        """Returns what the reference says of the batch's targets; a frozen tower's features are shared with the policy."""
        assert self._reference is not None, "a learner without an adapter needs a reference model"
        on_device = batch.to(self.accelerator.device)
        shared: VisionPass | None = None
        if not self._trains_vision:
            with torch.no_grad():
                shared = self.run(lambda model: self._vision(model.model, batch, on_device))
        own = self._reference if isinstance(self._reference, FrozenCopy) else None

        def compute(model: PreTrainedModel) -> ReferenceStates:
            vision = shared or vision_pass(model.model, on_device.vision, must_run=is_sharded(self.config.layout))
            return frozen_states(model, on_device, distribution, vision=vision, copy=own)

        return self._reference.run(compute)

    def update(
        self,
        batches: Sequence[Batch[Any]],
        distribution: Distribution,
        losses: Sequence[TokenLoss],
        references: Sequence[ReferenceStates | SparseStates | None] | None = None,
        divergence: TokenDivergence = token_kl,
    ) -> dict[str, Metric]:
        """Does one optimizer update and returns `loss`, of which each rank has a part, and what `optim_step` returns.

        `references`, one a batch, give the losses the `divergence` from them. With `router_loss_coef` the balance loss of the whole step
        is added (`router_loss`, without the coefficient).
        """
        if self.config.router_loss_coef:
            self._routed = self._count_routed(batches, distribution)
        references = references or [None] * len(batches)
        loss = sum(
            self.forward_backward(batch, distribution, loss, reference=reference, divergence=divergence, is_last=index == len(batches) - 1)
            for index, (batch, loss, reference) in enumerate(zip(batches, losses, references, strict=True))
        )
        measured = {name: maximum(value) for name, value in self.optim_step().items()}
        # Every rank drops the same updates, and a step may have several.
        measured["nonfinite_updates"] = total(measured["nonfinite_updates"].value / self.ranks.size)
        if self._routed is not None:
            measured["router_loss"] = total(self._router_loss)
            self._routed, self._router_loss = None, 0.0
        return {"loss": total(loss), **measured}

    def forward_backward(
        self,
        batch: Batch[Any],
        distribution: Distribution,
        loss: TokenLoss,
        *,
        reference: ReferenceStates | SparseStates | None = None,
        divergence: TokenDivergence = token_kl,
        is_last: bool = True,
    ) -> float:
        """Adds the gradient of `(token_weights * loss(outputs)).sum()` and returns that sum.

        The sum is multiplied by the number of ranks, because DDP and FSDP average gradients over ranks and the weights of all ranks
        together sum to one. DDP's ranks exchange gradients when `is_last` is true, once a step.
        """
        is_apart = self.config.layout == "ddp" and not is_last
        with self.accelerator.no_sync(self.policy) if is_apart else nullcontext(), self._recorded_routing() as routing, self._kept():
            outputs = self.run(self._outputs_of(batch, distribution, reference, divergence))
            per_token = loss(outputs)
            self._watch(batch, outputs, per_token)
            weighted = (batch.token_weights.to(per_token.device) * per_token).sum()
            objective = weighted + self._balance_loss(batch, routing) if routing else weighted
            self.accelerator.backward(objective * self.ranks.size)
        return weighted.item()

    def optim_step(self) -> dict[str, float]:
        """Clips, updates, clears the gradient; returns grad_norm (before clipping, L2), learning_rate and nonfinite_updates.

        A loss or gradient that is not finite on any rank drops the update on all of them (nonfinite_updates is 1, the others are left out):
        weights and optimizer stay as they are, `nonfinite_in_a_row` counts up and `take_faults` names the examples.
        """
        clipped = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        assert clipped is not None, "only DeepSpeed clips on its own and returns nothing"
        norm = float(full_tensor(clipped))
        fault = self._find_fault(norm)
        self._watched.clear()
        self._frozen_passes.clear()
        if fault is not None:
            self.optimizer.zero_grad()
            self.nonfinite_in_a_row += 1
            self._faults.append(fault)
            return {"nonfinite_updates": 1.0}
        learning_rate = scheduled_learning_rate(self.config, self.policy_version, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["share"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.policy_version += 1
        self.nonfinite_in_a_row = 0
        return {"grad_norm": norm, "learning_rate": learning_rate, "nonfinite_updates": 0.0}

    def take_faults(self) -> list[str]:
        """Returns what was not finite in the updates dropped since the last call, one sentence an update, and forgets it."""
        faults, self._faults = self._faults, []
        return faults

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Returns trained weights (`model`) and the optimizer's state (`optimizer`), whole; a collective, empty but on the first rank.

        Frozen weights are not in it: they come from where the model was loaded.
        """
        groups = {
            "model": ((name, p.detach()) for name, p in self._trained()),
            "optimizer": optimizer_tensors(self.optimizer, self._trained()).items(),
        }
        return {stem: self._whole_on_first(named) for stem, named in groups.items()}

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Returns all weights as the hub lays them out, for an export, on the first rank's CPU (elsewhere nothing); a collective.

        None where nothing is sharded: the model writes itself.
        """
        return self._whole_on_first(hub_weights(self.model)) if is_sharded(self.config.layout) else None

    def load_state_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]], *, policy_version: int) -> None:
        """Puts weights and optimizer where `state_tensors` found them, in this run's layout, whatever layout saved them."""
        trained = self._trained()
        saved = tensors["model"]
        if set(saved) != {name for name, _ in trained}:
            odd = sorted(set(saved) ^ {name for name, _ in trained})
            raise VlpostError(
                f"the checkpoint and the model train different weights, e.g. {odd[0]} ({len(odd)} such): resume with the recipe it is of"
            )
        for name, parameter in trained:
            parameter.data.copy_(shard_like(saved[name], parameter))
        load_optimizer_tensors(self.optimizer, trained, tensors["optimizer"])
        self.policy_version = policy_version

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def _whole_on_first(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        for name, tensor in named:
            value = full_tensor(tensor)
            if self.ranks.is_first:
                whole[name] = value if self.ranks.size == 1 else value.cpu()
        return whole

    def _outputs_of(
        self,
        batch: Batch[Any],
        distribution: Distribution,
        reference: ReferenceStates | SparseStates | None = None,
        divergence: TokenDivergence = token_kl,
    ) -> Callable[[PreTrainedModel], TokenLogprobs]:
        on_device = batch.to(self.accelerator.device)

        def compute(model: PreTrainedModel) -> TokenLogprobs:
            vision = self._vision(model.model, batch, on_device)
            return batch_logprobs(model, on_device, distribution, vision=vision, reference=reference, divergence=divergence)

        return compute

    def _kept(self) -> AbstractContextManager[None]:
        """Returns the block whose activations go to the host's memory, where the settings say so."""
        return torch.autograd.graph.save_on_cpu(pin_memory=True) if self.config.activation_offload else nullcontext()

    def _recorded_routing(self) -> AbstractContextManager[list[Routing]]:
        return record_routing(self.model) if self._routed is not None else nullcontext([])

    def _count_routed(self, batches: Sequence[Batch[Any]], distribution: Distribution) -> Tensor:
        """Returns how often each expert is chosen in the whole step, [layers, experts]: the part of the balance loss without gradient."""
        experts = self._text_config.num_experts
        with record_routing(self.model) as recorded:
            for batch in batches:
                self.logprobs(batch, distribution)
        copies = [batch.token_copies.to(routing.expert_ids.device) for batch, routing in zip(batches, recorded, strict=True)]
        counts = [count_routed(routing.expert_ids, part, num_experts=experts) for part, routing in zip(copies, recorded, strict=True)]
        return torch.stack(self.ranks.gather(torch.stack(counts).sum(dim=0).cpu())).sum(dim=0)

    def _balance_loss(self, batch: Batch[Any], routing: Sequence[Routing]) -> Tensor:
        assert self._routed is not None, "routing is recorded for the balance loss only"
        (recorded,) = routing
        copies = batch.token_copies.to(recorded.logits.device)
        per_token = self._text_config.num_experts_per_tok
        share = router_balance_loss(recorded.logits, copies, routed=self._routed, experts_per_token=per_token)
        self._router_loss += share.item()
        return self.config.router_loss_coef * share

    def _vision(self, body: Any, batch: Batch[Any], on_device: Batch[Any]) -> VisionPass:  # noqa: ANN401
        """Returns the batch's vision pass; a frozen tower says the same in every forward of a step, so it is kept until the update.

        Without images the tower must run where its weights are sharded (ranks gather together) or trained (gradients are exchanged, and
        an update must not depend on whether the images stood in this micro-batch or in another).
        """
        if self._trains_vision:
            return vision_pass(body, on_device.vision, must_run=True)
        if id(batch) not in self._frozen_passes:
            done = vision_pass(body, on_device.vision, must_run=is_sharded(self.config.layout))
            self._frozen_passes[id(batch)] = (batch, done)
        return self._frozen_passes[id(batch)][1]

    def _watch(self, batch: Batch[Any], outputs: TokenLogprobs, per_token: Tensor) -> None:
        """Notes which targets have a loss, a log-prob or, later, a gradient of the log-prob that is not finite."""
        broken = ~(per_token.detach().isfinite() & outputs.logprobs.detach().isfinite())
        self._watched.append((batch, broken))
        if outputs.logprobs.requires_grad:

            def note(grad: Tensor) -> None:
                broken.logical_or_(~grad.isfinite())

            outputs.logprobs.register_hook(note)

    def _find_fault(self, norm: float) -> str | None:
        """Returns a sentence on what is not finite on any rank, the same on all of them; None when everything is finite."""
        places: list[str] = []
        for batch, broken in self._watched:
            indices = batch.sequence_ids[broken.cpu()].unique().tolist()
            places += [batch.sequences[index].place for index in indices]
        gathered = self.ranks.gather((norm, places))
        bad_norms = [norm for norm, _ in gathered if not math.isfinite(norm)]
        if not bad_norms and not any(found for _, found in gathered):
            return None
        named = [place for _, found in gathered for place in found]
        if named:
            what = f"the loss or its gradient is not finite in {_listed(named)}"
        else:
            step = self.ranks.gather([sequence.place for batch, _ in self._watched for sequence in batch.sequences])
            what = f"the gradient norm is {bad_norms[0]} though every loss is finite, on {_listed([p for part in step for p in part])}"
        return f"update {self.policy_version + 1} is dropped, weights are unchanged: {what}"


def _groups_by_part(policy: nn.Module, config: LearnerConfig) -> list[dict[str, Any]]:
    """Returns the optimizer's groups: the trained parameters of each part, with the part's share of `learning_rate`."""
    groups: dict[Part, list[nn.Parameter]] = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(part_of(name), []).append(parameter)
    base = config.learning_rate
    peaks = [config.part_learning_rates.get(part, base) for part in groups]
    return [{"params": params, "lr": peak, "share": peak / base} for params, peak in zip(groups.values(), peaks, strict=True)]


def _listed(places: Sequence[str]) -> str:
    """Returns the first eight distinct places, and how many more there are."""
    distinct = list(dict.fromkeys(places))
    return ", ".join(distinct[:8]) + (f" and {len(distinct) - 8} more" if len(distinct) > 8 else "")


def scheduled_learning_rate(config: LearnerConfig, step: int, num_steps: int) -> float:
    """Returns the learning rate of update `step` (from 0) of `num_steps`: linear warm-up, then constant, linear or cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    falling = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_learning_rate_frac + (1.0 - config.final_learning_rate_frac) * falling)
