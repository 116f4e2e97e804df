"""Mixtures of experts: layouts on disk and in memory, recorded and replayed routing, the load-balancing loss of a whole step."""

import dataclasses
import itertools
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func
from vlpost.model import nano
from vlpost.model.checkpoint import export_model
from vlpost.model.experts import (
    Routing,
    check_expert_layout,
    count_routed,
    has_experts,
    record_routing,
    replay_routing,
    router_balance_loss,
    to_hub_layout,
)
from vlpost.model.loading import hub_weights, load_model
from vlpost.model.packing import pack, weigh
from vlpost.model.records import DataError, Message, TextPart, TrainSequence

LAYERS, EXPERTS, CHOSEN = 4, 8, 2
CORPUS = tuple(f"What is {number} + {number + 3}? The sum of the digits is {2 * number + 3}. 图中有几个数字" for number in range(30))


def places(batch):
    """Returns, for each sequence of a batch, where its tokens stand in it, found by following the tokens down the segments."""

    def follow(sequence, start, parent):
        if start == len(sequence.token_ids):
            return []
        for index, segment in enumerate(batch.segments):
            rest = sequence.token_ids[start : start + segment.end - segment.start]
            if segment.parent == parent and tuple(batch.token_ids[segment.start : segment.end].tolist()) == rest:
                below = follow(sequence, start + len(rest), index)
                if below is not None:
                    return [*range(segment.start, segment.end), *below]
        return None

    return [follow(sequence, 0, -1) for sequence in batch.sequences]


def copies(batch):
    return torch.bincount(torch.tensor([index for place in places(batch) for index in place]), minlength=len(batch.token_ids))


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def largest_difference(ones, others):
    """Returns the largest |one - other| as a share of the largest gradient of all."""
    assert ones.keys() == others.keys()
    scale = max(float(gradient.abs().max()) for gradient in others.values())
    return max(float((ones[name] - others[name]).abs().max()) for name in ones) / scale


def packed_logprobs(model, batch):
    """Returns the log-probs [N] of a packed batch, with gradient."""
    assert batch.vision is None or batch.vision.image_order == (0,)  # one image, in one place
    hidden = model.model(
        input_ids=batch.token_ids[None],
        position_ids=batch.positions[:, None],
        pixel_values=batch.vision and batch.vision.pixel_values,
        image_grid_thw=batch.vision and batch.vision.grid_thw,
        use_cache=False,
        attention_plan=batch.plan,
    ).last_hidden_state[0]
    return model.lm_head(hidden[batch.hidden_index]).log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]


def alone_logprobs(model, chat, sequence):
    """Returns the log-probs [trained] of one row by transformers' own forward and attention, with gradient."""
    ids = torch.tensor(sequence.token_ids)[None]
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == chat.image_token_id).long()}
    if sequence.media:
        inputs["pixel_values"] = torch.cat([chat.processed(part).pixel_values for part in sequence.media])
        inputs["image_grid_thw"] = torch.tensor([chat.processed(part).grid for part in sequence.media])
    logits = model(**inputs, use_cache=False).logits[0].log_softmax(-1)
    trained = torch.tensor(sequence.trained)
    return logits[:-1][trained[1:]].gather(1, ids[0, trained][:, None])[:, 0]


# ---------------------------------------------------------------- layouts


def test_a_nano_folder_holds_experts_as_the_hub_does(moe_folder):
    saved = load_file(moe_folder / "model.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(moe_folder, dtype=torch.float32)
    in_memory = dict(model.named_parameters())
    names = [name for name in saved if ".experts." in name]
    assert len(names) == 2 * LAYERS
    for name in names:
        assert torch.equal(saved[name], in_memory[name].transpose(1, 2)), name
    assert {tuple(saved[name].shape) for name in names} == {(EXPERTS, 128, 2 * 96), (EXPERTS, 96, 128)}


def test_hub_weights_are_the_file_bit_for_bit(moe_folder):
    saved = load_file(moe_folder / "model.safetensors")
    model = load_model(moe_folder, dtype=torch.float32)
    sent = dict(hub_weights(model))
    assert sent.keys() == saved.keys()
    assert all(torch.equal(sent[name], saved[name]) for name in saved)
    # Views: a list of them, as the engine takes them, is not a second copy of 30 billion weights.
    assert {tensor.data_ptr() for tensor in sent.values()} <= {parameter.data_ptr() for parameter in model.parameters()}


def test_to_hub_layout_twice_is_back_and_touches_experts_only():
    weights = {
        "model.language_model.layers.0.mlp.experts.gate_up_proj": torch.randn(2, 6, 5),
        "model.language_model.layers.0.mlp.experts.down_proj": torch.randn(2, 5, 3),
        "model.language_model.layers.0.mlp.gate.weight": torch.randn(2, 5),
        "model.language_model.layers.1.mlp.down_proj.weight": torch.randn(5, 7),
    }
    once = dict(to_hub_layout(weights.items()))
    assert [tuple(tensor.shape) for tensor in once.values()] == [(2, 5, 6), (2, 3, 5), (2, 5), (5, 7)]
    twice = dict(to_hub_layout(once.items()))
    assert all(torch.equal(twice[name], weights[name]) for name in weights)


def test_an_export_is_in_hub_layout_and_reloads_to_the_same_logits(tmp_path, make_moe, moe_chat, moe_families):
    model = make_moe()
    exported = export_model(tmp_path / "export", model=model, processor=moe_chat.processor)
    saved = load_file(exported / "model.safetensors")
    assert saved["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (EXPERTS, 128, 192)
    again = load_model(exported, dtype=torch.float32)
    batch = pack(moe_families, media=moe_chat, token_budget=4096)[0]
    with torch.no_grad():
        ours, theirs = (packed_logprobs(one, batch) for one in (model, again))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("inner", [64, 128])
def test_shapes_that_hide_a_transpose_are_refused(tmp_path, monkeypatch, inner):
    monkeypatch.setitem(nano._SHAPES, "moe-s", dataclasses.replace(nano._SHAPES["moe-s"], expert_hidden=inner))
    folder = nano.build_nano(tmp_path / "moe", size="moe-s", corpus=CORPUS, seed=3)
    with pytest.raises(
        DataError, match=f"hidden_size = 128 and moe_intermediate_size = {inner}: transformers cannot tell an expert's weight"
    ):
        load_model(folder, dtype=torch.float32)


def test_transformers_alone_loads_such_a_shape_untransposed(tmp_path, monkeypatch):
    # Why the refusal is there. When this fails, transformers transposes by format and the refusal can go.
    monkeypatch.setitem(nano._SHAPES, "moe-s", dataclasses.replace(nano._SHAPES["moe-s"], expert_hidden=64))
    folder = nano.build_nano(tmp_path / "moe", size="moe-s", corpus=CORPUS, seed=3)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    in_memory = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).get_parameter(name)
    assert torch.equal(in_memory, load_file(folder / "model.safetensors")[name])


@pytest.mark.parametrize("value", [False, None])
def test_a_router_that_does_not_renormalise_is_refused(tmp_path, moe_folder, value):
    folder = shutil.copytree(moe_folder, tmp_path / "moe")
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"].pop("norm_topk_prob") is True
    if value is not None:
        config["text_config"]["norm_topk_prob"] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=f"norm_topk_prob is {value}, must be true: transformers renormalises"):
        load_model(folder, dtype=torch.float32)


def test_dense_models_have_no_experts(make_model, make_moe):
    assert has_experts(make_moe())
    assert not has_experts(make_model())
    check_expert_layout("here", make_model())
    with (
        pytest.raises(ValueError, match="Qwen3VLForConditionalGeneration has no router: only a mixture of experts"),
        record_routing(make_model()),
    ):
        pass


# ---------------------------------------------------------------- recording


def test_recorded_routing_is_what_transformers_reports(make_moe, moe_chat, moe_families):
    model, sequence = make_moe(), moe_families[0][0].sequence
    model.set_attn_implementation({"text_config": "sdpa"})
    ids = torch.tensor(sequence.token_ids)[None]
    media = moe_chat.processed(sequence.media[0])
    inputs = {"pixel_values": media.pixel_values, "image_grid_thw": torch.tensor([media.grid])}
    with record_routing(model) as recorded:
        theirs = model(
            input_ids=ids, mm_token_type_ids=(ids == moe_chat.image_token_id).long(), **inputs, use_cache=False, output_router_logits=True
        ).router_logits
    assert len(recorded) == 1
    assert recorded[0].logits.shape == (LAYERS, len(sequence.token_ids), EXPERTS)
    assert torch.equal(recorded[0].logits, torch.stack(theirs))
    assert torch.equal(recorded[0].expert_ids, torch.stack(theirs).topk(CHOSEN, dim=-1).indices)


def test_margins_are_the_gap_between_the_last_chosen_and_the_best_left_out():
    logits = torch.tensor([[[1.0, 4.0, 3.5, -2.0], [0.0, 1.0, 2.0, 3.0]]])
    routing = Routing(logits=logits, expert_ids=logits.topk(2, dim=-1).indices)
    assert torch.equal(routing.margins, torch.tensor([[2.5, 1.0]]))
    assert Routing(logits=logits, expert_ids=torch.tensor([[[0, 1], [3, 2]]])).margins.tolist() == [[-2.5, 1.0]]


def balance_gradients(model, batch, *, inside):
    """Returns the balance loss of one batch alone and its gradients; `inside` runs the backward pass inside the recording."""
    with record_routing(model) as recorded:
        packed_logprobs(model, batch)
        routed = count_routed(recorded[0].expert_ids, copies(batch), num_experts=EXPERTS)
        loss = router_balance_loss(recorded[0].logits, copies(batch), routed=routed, experts_per_token=CHOSEN)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return len(recorded), loss.item(), gradients(model)


@pytest.mark.parametrize("inside", [False, True])
def test_checkpointed_layers_are_recorded_once_and_carry_the_gradient(make_moe, moe_chat, moe_families, inside):
    batch = pack(moe_families, media=moe_chat, token_budget=4096)[0]
    plain, checkpointed = make_moe().train(), make_moe().train()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    count, loss, expected = balance_gradients(plain, batch, inside=inside)
    found_count, found_loss, found = balance_gradients(checkpointed, batch, inside=inside)
    assert (count, found_count) == (1, 1)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert loss > 1.01
    assert all(float(expected[f"model.language_model.layers.{layer}.mlp.gate.weight"].abs().max()) > 0 for layer in range(LAYERS))
    assert largest_difference(found, expected) < 1e-6


def test_each_forward_is_recorded_on_its_own_and_none_after_the_context(make_moe, moe_chat, moe_families):
    model = make_moe()
    batches = [pack([family], media=moe_chat, token_budget=4096)[0] for family in moe_families]
    with record_routing(model) as recorded, torch.no_grad():
        for batch in batches:
            packed_logprobs(model, batch)
    with torch.no_grad():
        packed_logprobs(model, batches[0])
    assert [routing.logits.shape[1] for routing in recorded] == [len(batch.token_ids) for batch in batches]


# ---------------------------------------------------------------- the load-balancing loss


def test_counts_by_hand():
    ids = torch.tensor([[[0, 1], [1, 3], [0, 3]], [[2, 3], [2, 0], [2, 1]]])
    counted = count_routed(ids, torch.tensor([1, 5, 2]), num_experts=4)
    assert counted.tolist() == [[3, 6, 0, 7], [5, 2, 8, 1]]
    assert counted.dtype == torch.int64


def test_even_routing_costs_one_and_one_expert_for_all_costs_their_number():
    even = torch.zeros(2, 4, 4)
    assert router_balance_loss(even, torch.ones(4), routed=torch.full((2, 4), 2), experts_per_token=2).item() == pytest.approx(1.0)
    one = torch.tensor([[[100.0, 0.0, 0.0, 0.0]] * 3])
    assert router_balance_loss(one, torch.ones(3), routed=torch.tensor([[3, 0, 0, 0]]), experts_per_token=1).item() == pytest.approx(4.0)


def test_one_layer_equals_the_loss_of_transformers_divided_by_the_experts_of_a_token():
    logits = torch.randn(1, 50, EXPERTS, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(50, dtype=torch.int64)
    routed = count_routed(logits.topk(CHOSEN, dim=-1).indices, ones, num_experts=EXPERTS)
    ours = router_balance_loss(logits, ones, routed=routed, experts_per_token=CHOSEN)
    theirs = load_balancing_loss_func((logits[0],), EXPERTS, CHOSEN)
    torch.testing.assert_close(ours * CHOSEN, theirs)


@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 24), max_size=3))
@settings(max_examples=30)
def test_parts_sum_to_the_whole_and_copies_are_repetitions(seed, cuts):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 24, 5, generator=generator, dtype=torch.float64)
    shared = torch.randint(1, 4, (24,), generator=generator)
    routed = count_routed(logits.topk(2, dim=-1).indices, shared, num_experts=5)

    whole = logits.repeat_interleave(shared, dim=1).requires_grad_()
    expected = router_balance_loss(whole, torch.ones(int(shared.sum())), routed=routed, experts_per_token=2)
    expected.backward()

    leaf = logits.clone().requires_grad_()
    edges = [0, *sorted(cuts), 24]
    parts = [
        router_balance_loss(leaf[:, start:end], shared[start:end], routed=routed, experts_per_token=2)
        for start, end in itertools.pairwise(edges)
    ]
    sum(parts).backward()
    assert sum(parts).item() == pytest.approx(expected.item(), rel=1e-5)
    owner = torch.repeat_interleave(torch.arange(24), shared)
    folded = torch.zeros_like(logits).index_add_(1, owner, whole.grad)
    torch.testing.assert_close(leaf.grad, folded, rtol=1e-5, atol=1e-7)


def step_gradients(model, batches):
    """Returns the balance loss and gradients of one step cut into `batches`: a counting pass, then each micro-batch's share."""
    with record_routing(model) as counted, torch.no_grad():
        for batch in batches:
            packed_logprobs(model, batch)
    parts = [count_routed(routing.expert_ids, copies(batch), num_experts=EXPERTS) for routing, batch in zip(counted, batches, strict=True)]
    total = 0.0
    for batch in batches:
        with record_routing(model) as recorded:
            packed_logprobs(model, batch)
        loss = router_balance_loss(recorded[0].logits, copies(batch), routed=sum(parts), experts_per_token=CHOSEN)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def test_one_micro_batch_three_and_single_rows_give_one_loss_and_one_gradient(make_moe, moe_chat, moe_families):
    model = make_moe().train()
    single_rows = [[[weighted]] for family in moe_families for weighted in family]
    cuts = [[moe_families], [[family] for family in moe_families], single_rows]
    found = [step_gradients(model, [pack(part, media=moe_chat, token_budget=4096)[0] for part in parts]) for parts in cuts]
    assert [len(parts) for parts in cuts] == [1, 3, 8]
    (loss, expected), *others = found
    for other_loss, other in others:
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert largest_difference(other, expected) < 1e-5
    # The mean of each micro-batch's own loss is what most trainers take; here it is something else.
    own = [step_gradients(model, [pack([family], media=moe_chat, token_budget=4096)[0]])[0] for family in moe_families]
    assert abs(sum(own) / 3 - loss) > 1e-3


# ---------------------------------------------------------------- replay


def test_packed_rows_equal_single_rows_when_the_routing_is_held(make_moe, moe_chat, moe_families):
    model = make_moe().train()
    batch = pack(moe_families, media=moe_chat, token_budget=4096)[0]
    with record_routing(model) as recorded:
        packed = packed_logprobs(model, batch)
    (batch.token_weights * -packed).sum().backward()
    expected = gradients(model)

    model.set_attn_implementation({"text_config": "sdpa"})
    weights = batch.token_weights.split([sequence.num_trained_tokens for sequence in batch.sequences])
    alone = []
    for sequence, place, weight in zip(batch.sequences, places(batch), weights, strict=True):
        with replay_routing(model, recorded[0].expert_ids[:, place]):
            alone.append(alone_logprobs(model, moe_chat, sequence))
            (weight * -alone[-1]).sum().backward()
    assert len(alone) == 8
    torch.testing.assert_close(torch.cat(alone), packed, rtol=0, atol=1e-5)
    assert largest_difference(gradients(model), expected) < 1e-5


def flipped(model, chat, batch):
    """Returns [pairs] bool, whether a (layer, token) of a single row goes to other experts than packed; the margins [pairs]; the gap."""
    with record_routing(model) as recorded, torch.no_grad():
        packed = packed_logprobs(model, batch)
    model.set_attn_implementation({"text_config": "sdpa"})
    differ, margins, alone, held = [], [], [], []
    for sequence, place in zip(batch.sequences, places(batch), strict=True):
        with record_routing(model) as single, torch.no_grad():
            alone.append(alone_logprobs(model, chat, sequence))
        with replay_routing(model, recorded[0].expert_ids[:, place]), torch.no_grad():
            held.append(alone_logprobs(model, chat, sequence))
        sets = (ids.sort(dim=-1).values for ids in (single[0].expert_ids, recorded[0].expert_ids[:, place]))
        differ.append(torch.ne(*sets).any(dim=-1))
        margins.append(single[0].margins)
    model.set_attn_implementation({"text_config": "vlpost_packed"})
    gap, held_gap = (float((torch.cat(found) - packed).abs().max()) for found in (alone, held))
    return torch.cat(differ, dim=1), torch.cat(margins, dim=1), gap, held_gap


def long_rows(chat, count, length):
    generator = torch.Generator().manual_seed(5)
    prompt = chat.encode_prompt([Message(role="user", parts=(TextPart(text="3 + 4?"),))]).token_ids
    rows = []
    for _ in range(count):
        ids = (*prompt, *torch.randint(0, 250, (length,), generator=generator).tolist())
        trained = (False,) * len(prompt) + (True,) * length
        rows.append(TrainSequence(place="row", token_ids=ids, trained=trained, media=(), targets=None))
    return weigh([rows], "token")


def test_without_replay_nearly_all_tokens_agree(make_moe, moe_chat):
    batch = pack(long_rows(moe_chat, 8, 200), media=moe_chat, token_budget=4096)[0]
    differ, margins, _, held_gap = flipped(make_moe(), moe_chat, batch)
    assert differ.numel() > 6000
    assert differ.float().mean() <= 1e-3
    assert (margins[differ] < 1e-4).all()
    assert held_gap < 1e-5


def test_tokens_that_change_experts_are_near_ties_and_replay_holds_them(make_moe, moe_chat):
    # Two experts with one router row in every layer: which of them comes first is decided by rounding.
    model = make_moe()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter[1] = parameter[0] + 1e-8 * torch.randn(128, generator=torch.Generator().manual_seed(2))
    batch = pack(long_rows(moe_chat, 8, 200), media=moe_chat, token_budget=4096)[0]
    differ, margins, gap, held_gap = flipped(model, moe_chat, batch)
    assert differ[0].sum() > 0
    assert gap > 1e-3
    assert held_gap < 1e-5
    # A flip moves the token's own later layers and what sees it: the first layer's flips alone are ties to rounding.
    assert (margins[0][differ[0]] < 1e-4).all()


def test_replay_takes_weights_from_the_current_router_and_renormalises(make_moe):
    model = make_moe()
    block = model.model.language_model.layers[0].mlp
    hidden = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 7], [3, 1], [5, 2]]).expand(LAYERS, 3, 2)
    with replay_routing(model, ids):
        logits, weights, chosen = block.gate(hidden)
    probabilities = (hidden @ block.gate.weight.T).softmax(-1)
    expected = torch.stack([probabilities[token, ids[0, token]] / probabilities[token, ids[0, token]].sum() for token in range(3)])
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(logits, hidden @ block.gate.weight.T)
    assert torch.equal(chosen, ids[0])
    assert not torch.equal(block.gate(hidden)[2], ids[0])  # the router is its own again


def test_replay_refuses_another_batch_and_another_model(make_moe):
    model = make_moe()
    with (
        pytest.raises(ValueError, match="expert_ids has 3 layers, the model has 4 with experts"),
        replay_routing(model, torch.zeros(3, 5, 2).long()),
    ):
        pass
    with (
        replay_routing(model, torch.zeros(4, 5, 2).long()),
        pytest.raises(ValueError, match="expert_ids are of 5 tokens, the forward has 6: replay a batch with its own routing"),
    ):
        model.model.language_model.layers[0].mlp.gate(torch.zeros(6, 128))
