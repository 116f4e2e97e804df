import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AttentionInterface
from vlpost.model import attention
from vlpost.model.attention import PACKED_ATTENTION, packed_attention
from vlpost.model.attention_plan import AttentionPlan, Segment, plan_attention, plan_passes


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


SIZES = st.tuples(st.integers(1, 12), st.integers(1, 8))


@given(forests(), SIZES, st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]))
@settings(max_examples=40)
def test_plan_equals_a_dense_mask_forward_and_backward(segments, sizes, heads):
    inputs = random_inputs(segments[-1].end, heads=heads[0], key_value_heads=heads[1])
    expected = dense_attention(*inputs, dense_mask(segments), 0.7)
    found = attend(*inputs, plan_attention(segments, group_tokens=sizes[0], piece_tokens=sizes[1]))
    assert found.shape == (1, segments[-1].end, heads[0], 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mine, other in zip(torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-11)


@given(forests(), SIZES)
@settings(max_examples=20)
def test_the_flash_kernel_equals_the_dense_mask_in_fp32(segments, sizes):
    inputs = [part.detach().float().requires_grad_() for part in random_inputs(segments[-1].end, heads=4, key_value_heads=2, width=32)]
    expected = dense_attention(*inputs, dense_mask(segments), 0.2)
    found = attend(*inputs, plan_attention(segments, group_tokens=sizes[0], piece_tokens=sizes[1]), scaling=0.2)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for mine, other in zip(torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@given(forests(), SIZES)
@settings(max_examples=60)
def test_calls_compute_every_visible_pair_once_and_no_other(segments, sizes):
    plan = plan_attention(segments, group_tokens=sizes[0], piece_tokens=sizes[1])
    counts = torch.zeros(segments[-1].end, segments[-1].end, dtype=torch.int64)
    for call in (*plan.own, *plan.ancestors):
        seen = torch.ones(call.end - call.start, call.key_end - call.key_start, dtype=torch.bool)
        if call.is_causal:
            assert (call.start, call.end) == (call.key_start, call.key_end), (
                "a causal call over other keys depends on the kernel's alignment"
            )
            seen = seen.tril()
        if call.mask is not None:
            assert call.end - call.start <= sizes[0]
            seen = call.mask
        counts[call.start : call.end, call.key_start : call.key_end] += seen.int()
    assert torch.equal(counts, dense_mask(segments).long())
    assert [call.start for call in plan.own] == [0, *(call.end for call in plan.own[:-1])]


def test_a_group_is_one_call_over_the_prompt_and_one_for_each_response():
    segments = [Segment(start=0, end=8, parent=-1), *(Segment(start=8 + 5 * i, end=13 + 5 * i, parent=0) for i in range(3))]
    plan = plan_attention(segments, group_tokens=4, piece_tokens=100)
    assert [(call.start, call.end, call.is_causal) for call in plan.own] == [(0, 8, True), (8, 13, True), (13, 18, True), (18, 23, True)]
    assert [(call.start, call.end, call.key_start, call.key_end) for call in plan.ancestors] == [(8, 23, 0, 8)]


def test_short_segments_share_a_masked_call_across_trees_and_long_ones_are_cut():
    segments = [
        Segment(start=0, end=2, parent=-1),
        Segment(start=2, end=3, parent=0),
        Segment(start=3, end=5, parent=-1),
        Segment(start=5, end=12, parent=2),
    ]
    plan = plan_attention(segments, group_tokens=5, piece_tokens=4)
    assert [(call.start, call.end, call.is_causal) for call in plan.own] == [(0, 5, False), (5, 9, True), (9, 12, True)]
    assert plan.own[0].mask is not None
    assert plan.own[0].mask.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert [(call.start, call.end, call.key_start, call.key_end) for call in plan.ancestors] == [(5, 12, 3, 5), (9, 12, 5, 9)]


def test_gradcheck():
    segments = (
        Segment(start=0, end=2, parent=-1),
        Segment(start=2, end=3, parent=0),
        Segment(start=3, end=5, parent=0),
        Segment(start=5, end=6, parent=-1),
    )
    plan = plan_attention(segments, group_tokens=2, piece_tokens=1)
    assert torch.autograd.gradcheck(lambda *inputs: attend(*inputs, plan), random_inputs(6, heads=2, key_value_heads=1, width=1))


def varlen_by_loops(query, key, value, query_ends, key_ends, max_queries, max_keys, dropout, is_causal, debug, *, scale):
    """The kernel's contract in plain products: [T, heads, D], key heads shared by groups of query heads."""
    assert (dropout, debug) == (0.0, False)
    assert (max_queries, max_keys) == (int(query_ends.diff().max()), int(key_ends.diff().max()))
    out, log_sum_exp = torch.empty_like(query), query.new_empty(query.shape[1], len(query))
    for rows, keys in zip(itertools.pairwise(query_ends), itertools.pairwise(key_ends), strict=True):
        scores = _scores(query[slice(*rows)], key[slice(*keys)], is_causal, scale)
        log_sum_exp[:, slice(*rows)] = scores.logsumexp(-1)
        out[slice(*rows)] = (scores.softmax(-1) @ _heads_first(value[slice(*keys)], query)).transpose(0, 1)
    return out, log_sum_exp, None, None, None


def varlen_backward_by_loops(
    grad, query, key, value, out, log_sum_exp, query_ends, key_ends, max_queries, max_keys, dropout, is_causal, state, unused, *, scale
):
    grads = [torch.zeros_like(part) for part in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    for rows, keys in zip(itertools.pairwise(query_ends), itertools.pairwise(key_ends), strict=True):
        q, k, v = query[slice(*rows)], key[slice(*keys)], value[slice(*keys)]
        weights = (_scores(q, k, is_causal, scale) - log_sum_exp[:, slice(*rows), None]).exp()
        g, o = grad[slice(*rows)].transpose(0, 1), out[slice(*rows)].transpose(0, 1)
        grad_scores = weights * (g @ _heads_first(v, query).transpose(1, 2) - (g * o).sum(-1, keepdim=True)) * scale
        grads[0][slice(*rows)] += (grad_scores @ _heads_first(k, query)).transpose(0, 1)
        for index, product in ((1, grad_scores.transpose(1, 2) @ q.transpose(0, 1)), (2, weights.transpose(1, 2) @ g)):
            grads[index][slice(*keys)] += product.unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
    return tuple(grads)


def _heads_first(key, query):
    return key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(0, 1)


def _scores(query, key, is_causal, scale):
    scores = query.transpose(0, 1) @ _heads_first(key, query).transpose(1, 2) * scale
    return scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf) if is_causal else scores


@given(forests())
@settings(max_examples=30)
def test_the_passes_for_cuda_compute_the_same_with_a_kernel_of_the_same_contract(segments):
    inputs = random_inputs(segments[-1].end, heads=4, key_value_heads=2)
    plan = plan_attention(segments)
    cuda = AttentionPlan(segments=plan.segments, own=plan.own, ancestors=plan.ancestors, passes=plan_passes(segments, torch.device("cpu")))
    expected = attend(*inputs, plan)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_kernel", lambda query, plan, scale: attention.VarlenKernel(plan, scale))
        patch.setattr(attention, "flash_varlen", varlen_by_loops)
        patch.setattr(attention, "flash_varlen_backward", varlen_backward_by_loops)
        found = attend(*inputs, cuda)
        mine = torch.autograd.grad(found, inputs, direction)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for one, other in zip(mine, torch.autograd.grad(expected, inputs, direction), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_the_future_and_the_siblings_have_no_influence():
    segments = (Segment(start=0, end=3, parent=-1), Segment(start=3, end=6, parent=0), Segment(start=6, end=9, parent=0))
    plan = plan_attention(segments, group_tokens=4, piece_tokens=2)
    query, key, value = (part.detach() for part in random_inputs(9))
    before = attend(query, key, value, plan)
    value[:, :, 4:6] += 100.0
    after = attend(query, key, value, plan)
    changed = [bool(row) for row in (before != after).any(dim=-1).any(dim=-1)[0]]
    assert changed == [False] * 4 + [True] * 2 + [False] * 3


def test_transformers_finds_it_and_a_second_mask_is_refused():
    assert AttentionInterface()[PACKED_ATTENTION] is packed_attention
    query, key, value = random_inputs(2)
    plan = plan_attention((Segment(start=0, end=2, parent=-1),))
    with pytest.raises(AssertionError, match="a packed batch carries its masks in the plan"):
        packed_attention(nn.Identity(), query, key, value, torch.zeros(1), scaling=1.0, attention_plan=plan)


def test_backward_keeps_the_inputs_the_output_and_one_number_a_query_and_head():
    segments = (Segment(start=0, end=6, parent=-1), *(Segment(start=6 + i, end=7 + i, parent=0) for i in range(6)))
    plan = plan_attention(segments, group_tokens=1)
    saved = SimpleNamespace(elements=0)

    def count(tensor):
        saved.elements += tensor.numel()
        return tensor

    query, key, value = random_inputs(12)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = attend(query, key, value, plan)
    assert saved.elements == query.numel() + key.numel() + value.numel() + out.numel() + query.shape[1] * query.shape[2]


def test_the_output_is_laid_out_for_the_projection_behind_it():
    query, key, value = random_inputs(5)
    out = attend(query, key, value, plan_attention((Segment(start=0, end=5, parent=-1),)))
    assert out.is_contiguous()
    assert out.untyped_storage().nbytes() == out.numel() * 8
