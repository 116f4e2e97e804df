"""Low-rank adapters (LoRA, arXiv:2106.09685): y = W x + alpha / rank * B A x with W frozen, A [rank, in] and B [out, rank] trained.

The model stays the transformers class: peft puts its layers where the linear layers were, so packed attention and the policy do not notice.
No dropout: the ratio of a policy update compares two forwards of one policy, which must be the same function.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import Linear as AdaptedLinear
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .checkpoint import Saveable
from .config import LoraConfig, Part
from .experts import has_experts, to_hub_layout
from .layout import full_tensor, reshard, shard_like
from .records import VlpostError

_ADAPTER = "default"
_TARGETS: dict[Part, str] = {
    "language": r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    "merger": r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]",
    "vision": r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])",
}
"""Attention and MLP of each part, by module name; embeddings, head, norms, routers and fused experts match none."""
_BASE = re.compile(r"(.*)\.base_layer\.(weight|bias)")
_ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM 0.32 makes room for (config/lora.py `MaxLoRARanks`); an adapter of a rank between takes the next."""


class AdapterError(VlpostError, ValueError):
    """An adapter that a model or an engine cannot carry; the message says what to do."""


def add_adapter(model: PreTrainedModel, config: LoraConfig) -> None:
    """Freezes every weight and puts a trained fp32 adapter on the linear layers of `config.parts`; the model computes the same as before.

    A is uniform within 1 / sqrt(in), B zero (peft's start, the reference code's Kaiming with a = sqrt(5)). A is drawn from the seed and
    the layer's name: every rank and every resume begins with the same, and the global generators stay where they are.
    """
    if is_adapted(model):
        raise AdapterError(f"{type(model).__name__} already has an adapter: load the model again, or train the one it has")
    model.requires_grad_(False)
    for part in config.parts:
        if not _matching(model, (part,)):
            raise AdapterError(f"learner.lora.parts: {type(model).__name__} has no linear layer in its part {part!r}; leave it out")
    peft_config = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] -- peft divides it, a float is as good
        target_modules="|".join(_TARGETS[part] for part in config.parts),
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):  # peft draws initial values of its own
        inject_adapter_in_model(peft_config, model, adapter_name=_ADAPTER)
    for name, layer in adapted_layers(model):
        a, b = _factors(layer)
        a.data, b.data = a.data.float(), torch.zeros_like(b, dtype=torch.float32)
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{config.seed} {name}".encode()).digest()[:7], "big"))
        bound = 1.0 / math.sqrt(a.shape[1])
        a.data.copy_(torch.rand(a.shape, generator=generator) * (2 * bound) - bound)


def is_adapted(model: nn.Module) -> bool:
    """Returns whether the model has an adapter."""
    return any(isinstance(module, AdaptedLinear) for module in model.modules())


def adapted_layers(model: nn.Module) -> list[tuple[str, AdaptedLinear]]:
    """Returns (module name, layer) of every linear layer with an adapter, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Makes the model compute with its base weights alone until the context ends: the reference policy of a KL term, without a copy."""
    with ExitStack() as stack:
        for _, layer in adapted_layers(model):
            trained = [parameter.requires_grad for parameter in _factors(layer)]
            stack.callback(_restore, layer, layer.disable_adapters, trained)
            # peft also marks the adapter as not trained; FSDP2 would take that for settled if this is its first forward.
            _restore(layer, True, trained)
        yield


def _restore(layer: AdaptedLinear, disabled: bool, trained: Iterable[bool]) -> None:
    layer.enable_adapters(not disabled)
    for parameter, requires_grad in zip(_factors(layer), trained, strict=True):
        parameter.requires_grad_(requires_grad)


@contextmanager
def perturbed_adapter(model: nn.Module, *, seed: int, size: float = 0.1) -> Iterator[None]:
    """Gives every adapter noise in place of its B until the context ends, so that |alpha / rank * B A| = size * |W| (Frobenius).

    A fresh adapter changes nothing: an engine that lost it, or half of it, would pass a parity check. Publish and check inside this
    context, then publish again outside. The values are put back bit for bit, after an exception too. Of sharded weights give the wrapped
    module (`learner.policy`): after a forward the shards of its root must be in place before they can be changed.
    """
    reshard(model)
    saved = [(layer, _factors(layer)[1].detach().clone()) for _, layer in adapted_layers(model)]
    generator = torch.Generator().manual_seed(seed)
    try:
        for layer, b in saved:
            factor = _factors(layer)[1]
            factor.data.copy_(shard_like(torch.randn(b.shape, generator=generator), factor))
            weight: Any = layer.get_base_layer().weight
            factor.data.mul_(size * full_tensor(weight.detach()).float().norm() / _delta(layer).norm())
        yield
    finally:
        reshard(model)
        for layer, b in saved:
            _factors(layer)[1].data.copy_(b)


def base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of all weights as the model has them without its adapter, under the names it has without one."""
    for name, tensor in model.state_dict().items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        match = _BASE.fullmatch(name)
        yield (f"{match[1]}.{match[2]}" if match else name), tensor.detach()


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields what `base_weights` yields with the adapter added: W + alpha / rank * B A, in fp32, rounded once to W's dtype.

    Each sum is computed when it is asked for, into a new tensor: the model's own base weights are only read. Without an adapter these
    are the model's weights.
    """
    layers = {f"{name}.weight": layer for name, layer in adapted_layers(model)}
    for name, tensor in base_weights(model):
        layer = layers.get(name)
        yield name, tensor if layer is None else (full_tensor(tensor).float() + _delta(layer)).to(tensor.dtype)


def save_adapter(model: PreTrainedModel, folder: Path, *, base: str) -> None:
    """Writes adapter_model.safetensors and adapter_config.json as peft and vLLM read them; `base` is the folder or hub name it is for."""
    folder.mkdir(parents=True, exist_ok=True)
    peft_config: Any = model.peft_config[_ADAPTER]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    tensors = {}
    for name, layer in adapted_layers(model):
        for kind, parameter in zip("AB", _factors(layer), strict=True):
            tensors[f"base_model.model.{name}.lora_{kind}.weight"] = full_tensor(parameter.detach()).cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    written = PeftConfig(
        r=peft_config.r,
        lora_alpha=peft_config.lora_alpha,
        target_modules=peft_config.target_modules,
        lora_dropout=0.0,
        bias="none",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    written.save_pretrained(str(folder))


def save_merged(model: PreTrainedModel, folder: Path) -> None:
    """Writes configuration and merged weights as a Hugging Face folder, experts as the hub lays them out; the model is only read."""
    # Names and layout are the hub's already: transformers must not convert them once more.
    model.save_pretrained(folder, state_dict=dict(to_hub_layout(merged_weights(model))), save_original_format=False)


def exportable(model: Saveable, *, adapter_of: str | None) -> Saveable:
    """Returns what writes the model merged, or its adapter alone for the base `adapter_of`; a model without an adapter, as it is."""
    if isinstance(model, PreTrainedModel) and is_adapted(model):
        return _Export(model=model, adapter_of=adapter_of)
    if adapter_of is not None:
        raise AdapterError("the model has no adapter to export: export it whole, or train with learner.lora")
    return model


@dataclass(frozen=True, kw_only=True, slots=True)
class _Export:
    """Writes an adapted model, which its own `save_pretrained` would write under peft's names."""

    model: PreTrainedModel
    adapter_of: str | None

    def save_pretrained(self, save_directory: str) -> None:
        if self.adapter_of is None:
            save_merged(self.model, Path(save_directory))
        else:
            save_adapter(self.model, Path(save_directory), base=self.adapter_of)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineAdapter:
    """What an engine must make room for at its start.

    Example: rank 12 on the first layer's attention output gives `max_rank=16`,
    `target_modules=("language_model.model.layers.0.self_attn.o_proj",)`, `adapts_vision=False`.
    """

    max_rank: int
    target_modules: tuple[str, ...]
    """Full names in vLLM's model; exactly these get adapters."""
    adapts_vision: bool
    """Whether tower or mergers are among them: vision features then depend on the adapter."""


def engine_adapter(model: PreTrainedModel, config: LoraConfig | None, *, on_cpu: bool) -> EngineAdapter | None:
    """Returns what an engine needs for adapters of this kind, or None where weights are published whole; `model` may lack the adapter yet.

    Raises `AdapterError` for what vLLM 0.32 does not carry exactly: the tower of a mixture of experts (its class does not declare the
    packed `qkv`, the layer would be left out), and a mixture of experts on the CPU (with adapters it always takes a Triton kernel).
    """
    if config is None or config.publish == "merged":
        return None
    if has_experts(model) and (on_cpu or "vision" in config.parts):
        what = "a mixture of experts with adapters on the CPU" if on_cpu else "adapters on the vision tower of a mixture of experts"
        raise AdapterError(
            f"learner.lora.publish = adapter, parts = {list(config.parts)}: vLLM 0.32 does not compute {what}; "
            "write learner.lora.publish: merged, which sends base plus adapter as whole weights"
        )
    return EngineAdapter(
        max_rank=next(rank for rank in _ENGINE_RANKS if rank >= config.rank),
        target_modules=tuple(dict.fromkeys(_engine_name(name) for name in _matching(model, config.parts))),
        adapts_vision=bool({"merger", "vision"} & set(config.parts)),
    )


def _matching(model: nn.Module, parts: Iterable[Part]) -> list[str]:
    pattern = re.compile("|".join(_TARGETS[part] for part in parts))
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | AdaptedLinear) and pattern.fullmatch(name)]


def _engine_name(name: str) -> str:
    """Returns where vLLM has a layer: it fuses q, k and v, and gate and up, of the language model."""
    name = re.sub(r"\.self_attn\.[qkv]_proj$", ".self_attn.qkv_proj", name)
    name = re.sub(r"\.mlp\.(gate|up)_proj$", ".mlp.gate_up_proj", name)
    return name.replace("model.language_model.", "language_model.model.").replace("model.visual.", "visual.")


def _factors(layer: AdaptedLinear) -> tuple[nn.Parameter, nn.Parameter]:
    """Returns A [rank, in] and B [out, rank]."""
    a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    assert isinstance(a, nn.Parameter)
    assert isinstance(b, nn.Parameter)
    return a, b


def _delta(layer: AdaptedLinear) -> Tensor:
    a, b = _factors(layer)
    return layer.scaling[_ADAPTER] * (full_tensor(b.detach()).float() @ full_tensor(a.detach()).float())
