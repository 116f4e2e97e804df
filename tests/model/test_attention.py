from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AttentionInterface
from vlpost.model.attention import PACKED_ATTENTION, Segment, packed_attention, plan_attention


@st.composite
def forests(draw):
    """Trees of segments, depth first, parents before children, one tree after another."""
    segments, start = [], 0
    for _ in range(draw(st.integers(1, 3))):
        path: list[int] = []
        for number in range(draw(st.integers(1, 5))):
            # A child hangs on any segment of the path to the one before it: that is what "depth first" leaves possible.
            depth = draw(st.integers(1, len(path))) if number else 0
            path = path[:depth]
            end = start + draw(st.integers(1, 6))
            segments.append(Segment(start=start, end=end, parent=path[-1] if path else -1))
            path.append(len(segments) - 1)
            start = end
    return tuple(segments)


def dense_mask(segments):
    """[T, T] bool, written from the definition: a token sees its own past in its segment and all of its segment's ancestors."""
    owner = [number for number, segment in enumerate(segments) for _ in range(segment.start, segment.end)]
    mask = torch.zeros(len(owner), len(owner), dtype=torch.bool)
    for query, number in enumerate(owner):
        ancestors, above = set(), segments[number].parent
        while above >= 0:
            ancestors.add(above)
            above = segments[above].parent
        for key, other in enumerate(owner):
            mask[query, key] = other in ancestors or (other == number and key <= query)
    return mask


def dense_attention(query, key, value, mask, scaling):
    groups = query.shape[1] // key.shape[1]
    key, value = (torch.stack([part[:, head // groups] for head in range(query.shape[1])], dim=1) for part in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, -torch.inf)
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2)


def random_inputs(num_tokens, *, heads=2, key_value_heads=1, width=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(num_heads):
        return torch.randn(1, num_heads, num_tokens, width, generator=generator, dtype=torch.float64, requires_grad=True)

    return draw(heads), draw(key_value_heads), draw(key_value_heads)


def attend(query, key, value, plan, scaling=0.7):
    return packed_attention(nn.Identity(), query, key, value, None, scaling=scaling, attention_plan=plan)[0]


@given(forests(), st.integers(1, 12), st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]))
@settings(max_examples=40, deadline=None)
def test_plan_equals_a_dense_mask_forward_and_backward(segments, block_tokens, heads):
    inputs = random_inputs(segments[-1].end, heads=heads[0], key_value_heads=heads[1])
    expected = dense_attention(*inputs, dense_mask(segments), 0.7)
    found = attend(*inputs, plan_attention(segments, block_tokens=block_tokens))
    assert found.shape == (1, segments[-1].end, heads[0], 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mine, other in zip(torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-11)


@given(forests(), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_blocks_cover_every_query_once_and_hold_only_keys_that_are_seen(segments, block_tokens):
    dense = dense_mask(segments)
    queries = []
    for block in plan_attention(segments, block_tokens=block_tokens).blocks:
        queries += range(block.start, block.end)
        keys = [key for start, end in block.key_ranges for key in range(start, end)]
        assert block.end - block.start <= block_tokens
        assert block.mask.shape == (block.end - block.start, len(keys))
        assert torch.equal(block.mask, dense[block.start : block.end, keys])
        # No key outside the ranges is seen, and each gathered key is seen by some query of the block.
        assert block.mask.sum() == dense[block.start : block.end].sum()
        assert block.mask.any(dim=0).all()
        assert keys == sorted(set(keys))
        assert block.key_ranges[-1][1] == block.end
    assert queries == list(range(segments[-1].end))


def test_a_group_of_short_responses_is_one_block_with_the_prompt_gathered_once():
    segments = [Segment(start=0, end=8, parent=-1), *(Segment(start=8 + 2 * i, end=10 + 2 * i, parent=0) for i in range(4))]
    plan = plan_attention(segments, block_tokens=8)
    assert [(block.start, block.end, block.key_ranges) for block in plan.blocks] == [(0, 8, ((0, 8),)), (8, 16, ((0, 16),))]
    assert plan.blocks[1].mask[0].tolist() == [True] * 9 + [False] * 7
    assert plan.blocks[1].mask[7].tolist() == [True] * 8 + [False] * 6 + [True] * 2


def test_a_long_response_does_not_gather_its_siblings():
    segments = [Segment(start=0, end=2, parent=-1), Segment(start=2, end=6, parent=0), Segment(start=6, end=10, parent=0)]
    blocks = plan_attention(segments, block_tokens=2).blocks
    assert [block.key_ranges for block in blocks[3:]] == [((0, 2), (6, 8)), ((0, 2), (6, 10))]


def test_gradcheck():
    segments = (
        Segment(start=0, end=2, parent=-1),
        Segment(start=2, end=3, parent=0),
        Segment(start=3, end=5, parent=0),
        Segment(start=5, end=6, parent=-1),
    )
    plan = plan_attention(segments, block_tokens=2)
    assert torch.autograd.gradcheck(lambda *inputs: attend(*inputs, plan), random_inputs(6, heads=2, key_value_heads=1, width=1))


def test_the_future_and_the_siblings_have_no_influence():
    segments = (Segment(start=0, end=3, parent=-1), Segment(start=3, end=6, parent=0), Segment(start=6, end=9, parent=0))
    plan = plan_attention(segments, block_tokens=4)
    query, key, value = (part.detach() for part in random_inputs(9))
    before = attend(query, key, value, plan)
    value[:, :, 4:6] += 100.0
    after = attend(query, key, value, plan)
    changed = [bool(row) for row in (before != after).any(dim=-1).any(dim=-1)[0]]
    assert changed == [False] * 4 + [True] * 2 + [False] * 3


def test_transformers_finds_it_and_a_second_mask_is_refused():
    assert AttentionInterface()[PACKED_ATTENTION] is packed_attention
    query, key, value = random_inputs(2)
    plan = plan_attention((Segment(start=0, end=2, parent=-1),), block_tokens=4)
    with pytest.raises(AssertionError, match="a packed batch carries its mask in the plan"):
        packed_attention(nn.Identity(), query, key, value, torch.zeros(1), scaling=1.0, attention_plan=plan)


def test_backward_keeps_the_inputs_and_not_the_gathered_keys():
    segments = (Segment(start=0, end=6, parent=-1), *(Segment(start=6 + i, end=7 + i, parent=0) for i in range(6)))
    plan = plan_attention(segments, block_tokens=1)
    saved = SimpleNamespace(elements=0)

    def count(tensor):
        saved.elements += tensor.numel()
        return tensor

    query, key, value = random_inputs(12)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        attend(query, key, value, plan)
    assert saved.elements == query.numel() + key.numel() + value.numel()
