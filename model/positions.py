"""Qwen3-VL's 3-D positions (interleaved MRoPE), computed for one sequence before packing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor

Grid = tuple[int, int, int]
"""(t, h, w) in patches: temporal patches, rows, columns before the spatial merge."""


def mrope_positions(
    token_ids: Sequence[int],
    *,
    image_grids: Iterable[Grid],
    video_grids: Iterable[Grid],
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
) -> Tensor:
    """Returns the positions [3, T] (rows t, h, w; int64) of one sequence whose placeholders are expanded.

    Text: all rows count up together. An image starts at p, one past the largest position before it; its rows are p, p + row,
    p + column over the merged grid, and the next text starts at p + max(h, w). A video is one such block a temporal patch, since
    timestamps stand between its frames (transformers/models/qwen3_vl/modeling_qwen3_vl.py, `get_rope_index`, is the second
    implementation that the tests and the parity gate compare with). A number of grids that differs from the number of placeholder
    runs is an error.
    """
    images = iter(image_grids)
    frames = iter([(1, h, w) for t, h, w in video_grids for _ in range(t)])
    pieces: list[Tensor] = []
    start = 0
    position = 0
    for token_id, run in groupby(token_ids, lambda token: token if token in (image_token_id, video_token_id) else None):
        length = sum(1 for _ in run)
        if token_id is None:
            pieces.append((torch.arange(length) + position).expand(3, -1))
            position += length
            start += length
            continue
        source = images if token_id == image_token_id else frames
        consumed = 0
        while consumed < length:  # neighbouring images without a token between them form one run
            grid = next(source, None)
            if grid is None:
                raise ValueError(f"placeholder at token {start + consumed} has no image or video: more placeholders than media")
            t, h, w = grid[0], grid[1] // merge_size, grid[2] // merge_size
            block = torch.stack(torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")).reshape(3, -1)
            pieces.append(block + position)
            position += max(h, w)
            consumed += t * h * w
        if consumed != length:
            raise ValueError(f"placeholders from token {start}: {length} in the sequence, {consumed} by the image grids")
        start += length
    if next(images, None) is not None or next(frames, None) is not None:
        raise ValueError("more images or video frames than placeholders in the sequence")
    return torch.cat(pieces, dim=1)
