import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, ProcessorMixin, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from vlpost.model.attention import PACKED_ATTENTION
from vlpost.model.loading import freeze, hub_weights, load_model, load_processor, part_of
from vlpost.model.records import DataError


@pytest.fixture
def folder(nano_folder, tmp_path):
    return shutil.copytree(nano_folder, tmp_path / "copy")


def test_a_folder_loads_with_packed_attention_in_the_language_part(nano_folder):
    model = load_model(nano_folder, dtype=torch.float32)
    assert model.config.text_config._attn_implementation == PACKED_ATTENTION
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    stored = load_file(nano_folder / "model.safetensors")
    assert torch.equal(model.state_dict()["model.language_model.norm.weight"], stored["model.language_model.norm.weight"])
    assert {parameter.dtype for parameter in load_model(nano_folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


KEY = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop(KEY), f"missing_keys.*{KEY}"),
        (lambda weights: weights.update({"model.language_model.extra.weight": torch.zeros(2)}), "unexpected_keys.*extra"),
        (lambda weights: weights.pop("model.visual.patch_embed.proj.bias"), r"missing_keys.*visual\.patch_embed\.proj\.bias"),
    ],
    ids=["missing", "unexpected", "missing in the tower"],
)
def test_weights_that_do_not_fit_are_refused(folder, change, words):
    rewrite(folder, change)
    with pytest.raises(DataError, match=rf"{folder}: the weights do not fit Qwen3VLForConditionalGeneration: .*{words}.*random weights"):
        load_model(folder, dtype=torch.float32)


def test_weights_of_another_shape_are_refused(folder):
    rewrite(folder, lambda weights: weights.update({KEY: torch.zeros(3, 3)}))
    with pytest.raises((DataError, RuntimeError), match="mismatch"):
        load_model(folder, dtype=torch.float32)


def test_another_model_type_is_refused(tmp_path, nano_folder):
    tokens = AutoConfig.from_pretrained(nano_folder)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1},
        image_token_id=tokens.image_token_id % 64,
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=f"{tmp_path}: model type 'qwen2_vl': must be one of qwen3_vl"):
        load_model(tmp_path, dtype=torch.float32)


def test_the_processor_loads(nano_folder):
    processor = load_processor(nano_folder)
    assert isinstance(processor, ProcessorMixin)
    assert processor.image_processor.merge_size == 2


@pytest.mark.parametrize("kept", ["nothing", "the tokenizer"])
def test_a_folder_without_a_processor_is_refused(folder, kept):
    for path in list(folder.iterdir()):
        if path.name not in ("config.json", "model.safetensors") and not (kept == "the tokenizer" and path.name.startswith("tokenizer")):
            path.unlink()
    with pytest.raises(DataError, match=rf"{folder}: .*processor\.save_pretrained\(folder\)"):
        load_processor(folder)


def test_every_parameter_belongs_to_one_of_three_parts(make_model):
    names = {"vision": [], "merger": [], "language": []}
    for name, _ in make_model().named_parameters():
        names[part_of(name)].append(name)
    assert all(names.values())
    assert all(name.startswith("model.visual.") and "merger" not in name for name in names["vision"])
    assert {name.split(".")[2] for name in names["merger"]} == {"merger", "deepstack_merger_list"}
    assert {".".join(name.split(".")[:2]) for name in names["language"]} == {"model.language_model"}
    assert part_of("lm_head.weight") == "language"


def test_freeze_marks_exactly_the_named_parts(make_model):
    model = make_model()
    freeze(model, ("vision", "language"))
    assert {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad} == {"merger"}
    assert {part_of(name) for name, parameter in model.named_parameters() if not parameter.requires_grad} == {"vision", "language"}
    freeze(model, ())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_hub_weights_hold_every_stored_name_and_the_tied_head(make_model, nano_folder):
    model = make_model()
    weights = dict(hub_weights(model))
    stored = load_file(nano_folder / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert weights.keys() == {*stored, "lm_head.weight"}
    assert all(torch.equal(weights[name], tensor) for name, tensor in stored.items())
    assert torch.equal(weights["lm_head.weight"], stored["model.language_model.embed_tokens.weight"])
    assert not any(tensor.requires_grad for tensor in weights.values())


def test_patches_are_embedded_as_by_the_convolution_also_in_a_copy(make_model, make_plain_model):
    ours, plain = make_model(), make_plain_model()
    pixels = torch.randn(8, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(0))
    found, expected = ours.model.visual.patch_embed(pixels), plain.model.visual.patch_embed(pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for one, other in ((found, ours), (expected, plain)):
        (one * direction).sum().backward()
        assert other.model.visual.patch_embed.proj.weight.grad is not None
    one, other = (model.model.visual.patch_embed.proj for model in (ours, plain))
    torch.testing.assert_close(one.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.bias.grad, other.bias.grad, rtol=1e-4, atol=1e-4)
    assert set(ours.state_dict()) == set(plain.state_dict())
