"""Adapters on the learner's side: which layers, what they compute, their gradients, the base that never changes, publishing and export."""

import copy
import json
import math

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from vlpost.model.checkpoint import export_model, find_damage
from vlpost.model.config import LearnerConfig, LoraConfig
from vlpost.model.learner import FULL_DISTRIBUTION, Distribution, Learner
from vlpost.model.loading import hub_weights, load_model, load_processor, part_of
from vlpost.model.lora import (
    AdapterError,
    adapted_layers,
    adapter_off,
    add_adapter,
    base_weights,
    engine_adapter,
    is_adapted,
    merged_weights,
    perturbed_adapter,
    save_adapter,
)
from vlpost.model.nano import build_nano
from vlpost.model.packing import pack, weigh
from vlpost.model.parity import one_by_one_logprobs
from vlpost.model.records import DataError, ImagePart, Message, TextPart, TrainSequence
from vlpost.model.weight_sync import publish

EVERYWHERE = ("language", "merger", "vision")
LORA = LoraConfig(rank=4, alpha=8, parts=EVERYWHERE)


@pytest.fixture(scope="module")
def families(chat, make_image):
    """A group of two responses about an image, and a text row: (name, prompt, responses)."""

    def sequence(place, parts, response):
        prompt = chat.encode_prompt([Message(role="user", parts=parts)])
        trained = (False,) * len(prompt.token_ids) + (True,) * len(response)
        return TrainSequence(place=place, token_ids=prompt.token_ids + response, trained=trained, media=prompt.media, targets=None)

    seen = (make_image(), TextPart(text="the sum?"))
    return [
        [sequence("image 0", seen, (5, 6, 7)), sequence("image 1", seen, (5, 8))],
        [sequence("text", (TextPart(text="3 + 4?"),), (9, 10, 11, 12))],
    ]


@pytest.fixture(scope="module")
def batches(chat, families):
    return [batch for family in weigh(families, "token") for batch in pack([family], media=chat, token_budget=512)]


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory):
    return build_nano(tmp_path_factory.mktemp("nano") / "moe", size="moe-s", corpus=("1 + 2 = 3",), seed=3, vocab_size=448)


def negative_logprobs(outputs):
    return -outputs.logprobs


def make_learner(model, **changes):
    return Learner(model, config=LearnerConfig(**{"learning_rate": 1e-2, "dtype": "float32", "lora": LORA, **changes}), num_steps=10)


def scatter(model, seed=5):
    """Gives every A and B values as training would, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapted_layers(model):
        for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.1)
    return model


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def logprobs(learner, batches):
    return torch.cat([learner.logprobs(batch, FULL_DISTRIBUTION).logprobs for batch in batches])


# ---------------------------------------------------------------- which layers


LANGUAGE = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
VISION = ["attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"]


def expected_layers(model, part):
    config = model.config
    if part == "language":
        return {f"model.language_model.layers.{i}.{name}" for i in range(config.text_config.num_hidden_layers) for name in LANGUAGE}
    if part == "vision":
        return {f"model.visual.blocks.{i}.{name}" for i in range(config.vision_config.depth) for name in VISION}
    lists = [f"deepstack_merger_list.{i}" for i in range(len(config.vision_config.deepstack_visual_indexes))]
    assert lists
    return {f"model.visual.{merger}.{name}" for merger in ["merger", *lists] for name in ("linear_fc1", "linear_fc2")}


@pytest.mark.parametrize("parts", [("language",), ("merger",), ("vision",), EVERYWHERE])
def test_exactly_the_linear_layers_of_the_parts_get_adapters_and_nothing_else_is_trained(make_model, parts):
    model = make_model()
    stored = snapshot(model)
    kind = type(model)
    add_adapter(model, LoraConfig(rank=4, parts=parts))
    assert type(model) is kind
    assert {name for name, _ in adapted_layers(model)} == set().union(*(expected_layers(model, part) for part in parts))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(adapted_layers(model))
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {part_of(name) for name in trained} == set(parts)
    base = dict(base_weights(model))
    assert list(base) == list(stored)
    assert all(torch.equal(base[name], stored[name]) for name in stored)


def test_router_and_fused_experts_get_none(moe_folder):
    model = load_model(moe_folder, dtype=torch.float32)
    add_adapter(model, LORA)
    language = [name for name, _ in adapted_layers(model) if "language_model" in name]
    assert len(language) == 4 * model.config.text_config.num_hidden_layers
    assert all(".self_attn." in name for name in language)


def test_a_fresh_adapter_changes_nothing(make_model, batches):
    expected = logprobs(make_learner(make_model(), lora=None), batches)
    assert torch.equal(logprobs(make_learner(make_model()), batches), expected)


def test_initial_values_are_uniform_and_depend_on_seed_and_name_alone(make_model):
    torch.manual_seed(1)
    one = make_model()
    before = torch.random.get_rng_state()
    add_adapter(one, LORA)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    # Other parts beside them, another state of the generators: the same values.
    two, other = make_model(), make_model()
    add_adapter(two, LORA.model_copy(update={"parts": ("language",)}))
    add_adapter(other, LORA.model_copy(update={"seed": 1}))
    values = {name: layer.lora_A["default"].weight for name, layer in adapted_layers(one)}
    assert len({value.flatten()[0].item() for value in values.values()}) == len(values)
    for name, layer in adapted_layers(two):
        assert torch.equal(layer.lora_A["default"].weight, values[name])
    for name, layer in adapted_layers(other):
        assert not torch.equal(layer.lora_A["default"].weight, values[name])
    for value in values.values():
        bound = 1 / math.sqrt(value.shape[1])
        assert 0.9 * bound < value.abs().max() <= bound
        assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_adapters_of_a_bfloat16_model_are_float32(nano_folder):
    model = load_model(nano_folder, dtype=torch.bfloat16)
    add_adapter(model, LORA)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert {value.dtype for _, value in merged_weights(model)} == {torch.bfloat16}


# ---------------------------------------------------------------- what it computes


def test_an_adapted_layer_is_the_formula(make_model):
    model = make_model()
    add_adapter(model, LoraConfig(rank=4, alpha=6, parts=("vision",)))
    scatter(model)
    name, layer = adapted_layers(model)[0]
    rows = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base = layer.get_base_layer()
    expected = rows @ base.weight.T + base.bias + 6 / 4 * (rows @ a.T) @ b.T
    torch.testing.assert_close(layer(rows), expected, rtol=1e-5, atol=1e-6)
    merged = dict(merged_weights(model))[f"{name}.weight"]
    torch.testing.assert_close(merged, base.weight + 1.5 * b @ a, rtol=1e-6, atol=1e-7)


def test_adapter_off_is_the_base_exactly_and_ends_with_its_context(make_model, batches):
    base = logprobs(make_learner(make_model(), lora=None), batches)
    learner = make_learner(make_model())
    scatter(learner.model)
    trained = [parameter.requires_grad for parameter in learner.model.parameters()]
    adapted = logprobs(learner, batches)
    assert (adapted - base).abs().max() > 0.01
    with adapter_off(learner.model):
        assert torch.equal(logprobs(learner, batches), base)
        with adapter_off(learner.model):
            pass
        assert torch.equal(logprobs(learner, batches), base)  # the inner context must not switch it on
    assert torch.equal(logprobs(learner, batches), adapted)
    with pytest.raises(RuntimeError, match="inside"), adapter_off(learner.model):
        raise RuntimeError("inside")
    assert torch.equal(logprobs(learner, batches), adapted)
    assert [parameter.requires_grad for parameter in learner.model.parameters()] == trained
    for batch in batches:
        learner.forward_backward(batch, FULL_DISTRIBUTION, negative_logprobs)
    assert all(p.grad is not None for p in learner.model.parameters() if p.requires_grad)


def test_perturbed_adapter_moves_every_layer_by_its_share_and_puts_it_back(make_model, batches):
    learner = make_learner(make_model())
    scatter(learner.model)
    stored, before = snapshot(learner.model), logprobs(learner, batches)
    base = dict(base_weights(learner.model))
    with perturbed_adapter(learner.model, seed=1, size=0.2):
        changed = dict(merged_weights(learner.model))
        for name, _ in adapted_layers(learner.model):
            weight = base[f"{name}.weight"]
            assert float((changed[f"{name}.weight"] - weight).norm() / weight.norm()) == pytest.approx(0.2, rel=1e-3)
        assert (logprobs(learner, batches) - before).abs().max() > 0.01
    with pytest.raises(RuntimeError, match="inside"), perturbed_adapter(learner.model, seed=2):
        raise RuntimeError("inside")
    assert all(torch.equal(value, stored[name]) for name, value in learner.model.state_dict().items())


# ---------------------------------------------------------------- training


def gradients(learner):
    return {name: parameter.grad.clone() for name, parameter in learner.model.named_parameters() if parameter.requires_grad}


def packed_gradients(model, batches, **changes):
    learner = make_learner(model, **changes)
    scatter(learner.model)
    for batch in batches:
        learner.forward_backward(batch, FULL_DISTRIBUTION, negative_logprobs)
    return gradients(learner)


def relative_gap(found, expected):
    assert found.keys() == expected.keys()
    assert all(value.norm() > 0 for value in expected.values())
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())


def plain_inputs(sequence, chat):
    """What transformers' own forward takes for one row."""
    ids = torch.tensor(sequence.token_ids)[None]
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == chat.image_token_id).long()}
    if sequence.media:
        inputs["pixel_values"] = torch.cat([chat.processed(part).pixel_values for part in sequence.media])
        inputs["image_grid_thw"] = torch.tensor([chat.processed(part).grid for part in sequence.media])
    return inputs


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_gradients_equal_transformers_one_by_one(make_model, batches, families, chat, checkpointing):
    packed = packed_gradients(make_model(), batches, gradient_checkpointing=checkpointing)

    model = make_model().train()
    add_adapter(model, LORA)
    scatter(model)
    model.set_attn_implementation({"text_config": "sdpa"})
    for sequence in (row for family in families for row in family):
        assert all(isinstance(part, ImagePart) for part in sequence.media)
        trained = torch.tensor(sequence.trained)
        logits = model(**plain_inputs(sequence, chat), use_cache=False).logits[0, :-1][trained[1:]]
        targets = torch.tensor(sequence.token_ids)[trained]
        loss = -logits.log_softmax(-1).gather(1, targets[:, None]).sum()
        (loss / 9).backward()  # "token": every one of the nine trained tokens weighs the same
    alone = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert relative_gap(packed, alone) < 1e-5


@pytest.mark.parametrize("part", EVERYWHERE)
def test_gradient_checkpointing_reaches_every_part_alone(make_model, batches, part):
    # Embeddings and everything before the first adapter are frozen: no input of a checkpointed layer asks for a gradient.
    lora = LORA.model_copy(update={"parts": (part,)})
    plain = packed_gradients(make_model(), batches, lora=lora)
    assert relative_gap(packed_gradients(make_model(), batches, lora=lora, gradient_checkpointing=True), plain) < 1e-5


def test_updates_move_every_adapter_and_no_base_weight(make_model, batches):
    learner = make_learner(make_model(), weight_decay=0.1)
    before = snapshot(learner.model)
    for _ in range(2):  # B moves in the first update, A, whose gradient is B's, in the second
        for batch in batches:
            learner.forward_backward(batch, FULL_DISTRIBUTION, negative_logprobs)
        learner.optim_step()
    after = learner.model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in after if "lora_" in name}
    assert learner.policy_version == 2


def test_a_checkpoint_holds_the_adapter_alone_and_brings_it_back(make_model, batches):
    learner = make_learner(make_model())
    scatter(learner.model)
    learner.forward_backward(batches[0], FULL_DISTRIBUTION, negative_logprobs)
    learner.optim_step()
    saved = {stem: {name: value.clone() for name, value in named.items()} for stem, named in learner.state_tensors().items()}
    assert len(saved["model"]) == 2 * len(adapted_layers(learner.model))
    assert all("lora_" in name for name in saved["model"])
    resumed = make_learner(make_model())
    resumed.load_state_tensors(saved, policy_version=1)
    assert all(torch.equal(value, learner.model.state_dict()[name]) for name, value in resumed.model.state_dict().items())


# ---------------------------------------------------------------- publishing


class RecordingSampler:
    """Notes what is published; reads an adapter's folder at once, as an engine does."""

    def __init__(self):
        self.policy_version = -1
        self.weights = self.adapter = self.folder = None

    def sample(self, requests):
        raise AssertionError("not asked for here")

    def load_weights(self, weights, policy_version):
        self.weights, self.policy_version = dict(weights), policy_version

    def load_adapter(self, folder, policy_version):
        self.folder, self.policy_version = folder, policy_version
        self.adapter = load_file(folder / "adapter_model.safetensors")
        self.config = json.loads((folder / "adapter_config.json").read_text())


def test_publish_sends_the_adapter_alone_in_a_folder_of_its_version(make_model):
    learner = make_learner(make_model())
    scatter(learner.model)
    learner.policy_version = 7
    sampler = RecordingSampler()
    publish(learner, sampler)
    assert sampler.weights is None
    assert sampler.policy_version == 7
    assert sampler.folder.name == "policy-7"
    assert not sampler.folder.exists()
    assert (sampler.config["r"], sampler.config["lora_alpha"], sampler.config["lora_dropout"]) == (4, 8, 0)
    assert len(sampler.adapter) == 2 * len(adapted_layers(learner.model))
    for name, layer in adapted_layers(learner.model):
        assert torch.equal(sampler.adapter[f"base_model.model.{name}.lora_A.weight"], layer.lora_A["default"].weight)
        assert torch.equal(sampler.adapter[f"base_model.model.{name}.lora_B.weight"], layer.lora_B["default"].weight)


def test_publish_merged_sends_whole_weights_and_only_reads_the_learners(make_model):
    learner = make_learner(make_model(), lora=LORA.model_copy(update={"publish": "merged"}))
    scatter(learner.model)
    before = snapshot(learner.model)
    plain = make_model().state_dict()
    sampler = RecordingSampler()
    publish(learner, sampler)
    assert sampler.adapter is None
    assert list(sampler.weights) == list(plain)
    changed = {name for name in plain if not torch.equal(sampler.weights[name], plain[name])}
    assert changed == {f"{name}.weight" for name, _ in adapted_layers(learner.model)}
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())


def test_merged_bfloat16_weights_are_rounded_once(nano_folder):
    model = load_model(nano_folder, dtype=torch.bfloat16)
    add_adapter(model, LORA)
    scatter(model)
    merged = dict(merged_weights(model))
    for name, layer in adapted_layers(model):
        a, b = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
        exact = layer.get_base_layer().weight.double() + 2 * b @ a
        # Not all: an fp32 sum may lie on the other side of a tie. A delta rounded before the sum would differ in a third of them.
        assert (merged[f"{name}.weight"] == exact.bfloat16()).double().mean() > 0.999


def test_hub_weights_without_an_adapter_are_the_stored_tensors(make_model):
    model = make_model()
    for name, value in hub_weights(model):
        assert value.data_ptr() == model.state_dict()[name].data_ptr()


# ---------------------------------------------------------------- engines


def test_engine_makes_room_for_exactly_the_adapted_layers_under_its_own_names(make_model):
    model = make_model()
    found = engine_adapter(model, LoraConfig(rank=9, parts=("language",)), on_cpu=True)
    layers = range(model.config.text_config.num_hidden_layers)
    fused = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert set(found.target_modules) == {f"language_model.model.layers.{i}.{name}" for i in layers for name in fused}
    assert len(set(found.target_modules)) == len(found.target_modules)
    assert (found.max_rank, found.adapts_vision) == (16, False)
    vision = engine_adapter(model, LoraConfig(rank=1, parts=("merger",)), on_cpu=True)
    assert set(vision.target_modules) == {name.removeprefix("model.") for name in expected_layers(model, "merger")}
    assert (vision.max_rank, vision.adapts_vision) == (1, True)
    add_adapter(model, LoraConfig(rank=9, parts=("language",)))
    assert engine_adapter(model, LoraConfig(rank=9, parts=("language",)), on_cpu=True) == found  # before or after, the same


def test_whole_weights_need_no_room(make_model):
    assert engine_adapter(make_model(), None, on_cpu=True) is None
    assert engine_adapter(make_model(), LORA.model_copy(update={"publish": "merged"}), on_cpu=True) is None


def test_what_the_engine_cannot_carry_is_refused_with_what_works(moe_folder):
    model = load_model(moe_folder, dtype=torch.float32)
    with pytest.raises(AdapterError, match=r"a mixture of experts with adapters on the CPU; write learner\.lora\.publish: merged"):
        engine_adapter(model, LoraConfig(), on_cpu=True)
    with pytest.raises(AdapterError, match="adapters on the vision tower of a mixture of experts"):
        engine_adapter(model, LORA, on_cpu=False)
    carried = engine_adapter(model, LoraConfig(parts=("language", "merger")), on_cpu=False)
    assert not any("expert" in name or "blocks" in name or "gate" in name for name in carried.target_modules)
    assert engine_adapter(model, LORA.model_copy(update={"publish": "merged"}), on_cpu=True) is None


# ---------------------------------------------------------------- export


def reloaded_logprobs(model, families, chat):
    """The log-probs of all trained tokens by transformers alone."""
    rows = []
    for sequence in (row for family in families for row in family):
        trained = torch.tensor(sequence.trained)
        with torch.no_grad():
            logits = model(**plain_inputs(sequence, chat), use_cache=False).logits[0, :-1][trained[1:]]
        rows.append(logits.log_softmax(-1).gather(1, torch.tensor(sequence.token_ids)[trained][:, None])[:, 0])
    return torch.cat(rows)


@pytest.fixture
def trained(make_model, families, chat):
    """A learner with a far-off adapter, and what it says of every row."""
    learner = make_learner(make_model())
    scatter(learner.model)
    rows = [row for family in families for row in family]
    said = torch.cat([one_by_one_logprobs(row, learner, chat, Distribution(temperature=1.0, allowed=None)) for row in rows])
    return learner, said


def test_a_merged_export_says_what_the_learner_says(trained, families, chat, hf_processor, tmp_path):
    learner, said = trained
    before = snapshot(learner.model)
    folder = export_model(tmp_path / "export", model=learner.model, processor=hf_processor)
    assert find_damage(folder) is None
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())
    reloaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert not is_adapted(reloaded)
    assert (reloaded_logprobs(reloaded, families, chat) - said).abs().max() < 1e-5
    assert not is_adapted(load_model(folder, dtype=torch.float32))  # and a next stage may start from it


def test_an_adapter_export_loads_in_peft_and_says_what_the_learner_says(
    trained, families, chat, hf_processor, make_plain_model, nano_folder, tmp_path
):
    learner, said = trained
    base = reloaded_logprobs(make_plain_model(), families, chat)
    assert (base - said).abs().max() > 0.01
    folder = export_model(tmp_path / "export", model=learner.model, processor=hf_processor, adapter_of=str(nano_folder))
    assert find_damage(folder) is None
    assert not (folder / "config.json").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(nano_folder)
    assert load_processor(folder).image_processor.to_dict() == hf_processor.image_processor.to_dict()
    reloaded = PeftModel.from_pretrained(make_plain_model(), folder).eval()
    assert (reloaded_logprobs(reloaded, families, chat) - said).abs().max() < 1e-5


def test_a_merged_mixture_of_experts_comes_back(moe_folder, hf_processor, tmp_path):
    model = load_model(moe_folder, dtype=torch.float32)
    add_adapter(model, LORA)
    scatter(model)
    expected = dict(merged_weights(model))
    folder = export_model(tmp_path / "export", model=model, processor=hf_processor)
    reloaded = load_model(folder, dtype=torch.float32).state_dict()
    assert reloaded.keys() == expected.keys()
    assert all(torch.equal(reloaded[name], value) for name, value in expected.items())
    stored = load_file(folder / "model.safetensors")
    hub = load_file(moe_folder / "model.safetensors")
    experts = [name for name in hub if ".experts." in name]
    assert experts
    assert all(torch.equal(stored[name], hub[name]) for name in experts)


def test_an_adapter_is_refused_where_a_model_is_asked_for(trained, nano_folder, tmp_path):
    learner, _ = trained
    save_adapter(learner.model, tmp_path / "adapter", base=str(nano_folder))
    with pytest.raises(DataError, match=r"adapter: holds an adapter, not a model: merge it into its base first \(export: merged\)"):
        load_model(tmp_path / "adapter", dtype=torch.float32)


def test_a_model_without_an_adapter_has_none_to_export(make_model, hf_processor, tmp_path):
    with pytest.raises(AdapterError, match=r"no adapter to export: export it whole, or train with learner\.lora"):
        export_model(tmp_path / "export", model=make_model(), processor=hf_processor, adapter_of="base")
    assert list(tmp_path.iterdir()) == []


def test_a_second_adapter_is_refused(make_model):
    model = make_model()
    add_adapter(model, LORA)
    with pytest.raises(AdapterError, match="already has an adapter"):
        add_adapter(model, LORA)


def test_a_part_without_linear_layers_is_refused(make_model):
    model = copy.deepcopy(make_model())
    model.model.visual.blocks = torch.nn.ModuleList()
    with pytest.raises(AdapterError, match=r"learner\.lora\.parts: .* has no linear layer in its part 'vision'"):
        add_adapter(model, LORA)
    assert not is_adapted(model)


# ---------------------------------------------------------------- settings


def test_defaults_are_the_documented_ones():
    lora = LearnerConfig(learning_rate=1e-4, lora={}).lora
    assert (lora.rank, lora.alpha, lora.parts, lora.publish) == (16, 32, ("language",), "adapter")
    assert LearnerConfig(learning_rate=1e-4).lora is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"lora": {"parts": ["vision", "language"]}, "freeze": ["vision"]},
            r"freeze and learner\.lora\.parts both name vision: a part cannot",
        ),
        ({"lora": {"parts": ["vision", "vision"]}}, r"names a part twice; name each once"),
        ({"lora": {"parts": []}}, r"at least 1 item"),
        ({"lora": {"parts": ["head"]}}, r"'vision', 'merger' or 'language'"),
        ({"lora": {"rank": 0}}, r"greater than or equal to 1"),
        ({"lora": {"rank": 513}}, r"less than or equal to 512"),
        ({"lora": {"alpha": 0}}, r"greater than 0"),
        ({"lora": {"dropout": 0.1}}, r"Extra inputs are not permitted"),
    ],
)
def test_contradicting_settings_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        LearnerConfig(learning_rate=1e-4, **settings)


def test_a_frozen_part_beside_an_adapted_one_is_no_contradiction(make_model):
    learner = make_learner(make_model(), lora=LORA.model_copy(update={"parts": ("merger",)}), freeze=("language", "vision"))
    assert {part_of(name) for name, p in learner.model.named_parameters() if p.requires_grad} == {"merger"}
