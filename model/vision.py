"""The vision pass of a batch: one tower pass over its distinct images and videos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from .packing import VisionInputs

VisionFeatures = Mapping[str, BaseModelOutputWithDeepstackFeatures]
"""By kind, `image` or `video`: the features of every placeholder run, in token order, as transformers' model takes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionPass:
    """What one pass of the tower gives a batch."""

    features: VisionFeatures | None
    """None for a batch without images and videos"""
    zero: Tensor | None
    """To be added to the hidden states: ties a pass that gave no features to the loss. None where it is not needed."""


def vision_pass(body: Any, vision: VisionInputs | None, *, must_run: bool) -> VisionPass:  # noqa: ANN401
    """Returns the batch's features; without images it runs the tower on nothing if it `must_run`."""
    if vision is not None:
        return VisionPass(features=_features(body, vision), zero=None)
    return VisionPass(features=None, zero=unused_vision(body) if must_run else None)


def _features(body: Any, vision: VisionInputs) -> VisionFeatures:  # noqa: ANN401
    features = body.get_image_features(vision.pixel_values, vision.grid_thw, return_dict=True)
    return {
        kind: BaseModelOutputWithDeepstackFeatures(
            pooler_output=tuple(features.pooler_output[entry] for entry in order),  # pyright: ignore[reportArgumentType]
            deepstack_features=[tuple(level[entry] for entry in order) for level in features.deepstack_features],  # pyright: ignore[reportArgumentType]
        )
        for kind, order in (("image", vision.image_order), ("video", vision.video_order))
        if order
    }


def unused_vision(body: Any) -> Tensor:  # noqa: ANN401
    """Returns a zero whose gradient reaches every parameter of tower and mergers, from a pass over the smallest possible image.

    For a batch without images: otherwise ranks with and without images would wait for each other for ever, and an optimizer would treat
    a step without images differently from one with images that had no influence.
    """
    config = body.visual.config
    side = config.spatial_merge_size
    device = body.visual.patch_embed.proj.weight.device
    pixels = torch.zeros(side * side, config.in_channels * config.temporal_patch_size * config.patch_size**2, device=device)
    features = body.get_image_features(pixels, torch.tensor([[1, side, side]], device=device), return_dict=True)
    levels = [*features.pooler_output, *(part for level in features.deepstack_features for part in level)]
    return 0.0 * torch.stack([level.sum() for level in levels]).sum()


def embed_patches_by_product(body: Any) -> None:  # noqa: ANN401
    """Makes the tower embed its patches by a matrix product, in place; weights, their names and the result stay the same.

    transformers runs a 3-D convolution whose kernel covers exactly one patch. It is the same product, many times slower (backward on the
    CPU: 50 ms instead of 5 for an image of 640 x 640 pixels and a width of 256).
    """
    module = body.visual.patch_embed
    # A class and not an attribute: a bound method would keep the weights of the original in a copy of the model.
    module.__class__ = type("ProductPatchEmbed", (type(module),), {"forward": _embed_patches})


def _embed_patches(self: Any, hidden_states: Tensor) -> Tensor:  # noqa: ANN401
    """Returns [patches, width] of [patches, channels x frames x height x width]."""
    projection: nn.Conv3d = self.proj
    return F.linear(hidden_states.to(projection.weight.dtype), projection.weight.flatten(1), projection.bias)
