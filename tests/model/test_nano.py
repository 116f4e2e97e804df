import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2Tokenizer,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.video_utils import VideoMetadata
from vlpost.model.chat_template import chat_template
from vlpost.model.nano import MARKUP_TOKENS, SPECIAL_TOKENS, build_nano

WORDS = ("count", "find", "read", "compare", "write", "zoom", "digit", "number", "video", "frame", "canvas", "corner", "largest", "program")
CORPUS = tuple(
    f"How many digits are there in the image? The sum of {number} and {number + 7} is {2 * number + 7}. 图中有 {number} 个数字,请回答。"
    f" {WORDS[number % 14]} the {WORDS[5 * number % 14]}, then {WORDS[11 * number % 14]}: def add(left, right): return left + right"
    for number in range(40)
)
MIXED_TEXT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How many? 图中有几个数字?12345 naïve café\n\n  x = 3.5\t🙂"
    '<|im_end|>\n<|im_start|>assistant\n<think>\n3+4\n</think>\n\n<tool_call>\n{"name": "zoom"}\n</tool_call>'
    "<tool_response>ok</tool_response><|endoftext|>"
)


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return build_nano(tmp_path_factory.mktemp("nano") / "s", size="s", corpus=CORPUS, seed=1)


@pytest.fixture(scope="module")
def processor(nano):
    return AutoProcessor.from_pretrained(nano)


@pytest.fixture(scope="module")
def model(nano):
    return AutoModelForImageTextToText.from_pretrained(nano)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    folder = build_nano(tmp_path_factory.mktemp("nano") / "moe", size="moe-s", corpus=CORPUS, seed=1)
    return AutoModelForImageTextToText.from_pretrained(folder)


def pixels(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize(("size", "least", "most"), [("s", 0.9e6, 1.5e6), ("m", 3.5e6, 4.5e6), ("moe-s", 1.9e6, 2.3e6)])
def test_parameter_counts(tmp_path, size, least, most):
    folder = build_nano(tmp_path / "nano", size=size, corpus=CORPUS, seed=0)
    assert folder == tmp_path / "nano"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert least < sum(parameter.numel() for parameter in model.parameters()) < most


def test_the_folder_holds_the_real_architecture(model):
    assert isinstance(model, Qwen3VLForConditionalGeneration)
    text, vision = model.config.text_config, model.config.vision_config
    assert model.dtype == torch.float32
    assert len(vision.deepstack_visual_indexes) == 3
    assert text.rope_parameters["mrope_interleaved"] is True
    assert text.head_dim == 32
    assert sum(text.rope_parameters["mrope_section"]) == text.head_dim // 2
    assert text.num_attention_heads > text.num_key_value_heads > 1
    assert text.max_position_embeddings == 4096
    assert (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size) == (16, 2, 2)


def test_embeddings_are_tied_and_stored_once(nano, model):
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert "lm_head.weight" not in load_file(nano / "model.safetensors")
    assert model.config.tie_word_embeddings is True
    assert model.config.text_config.tie_word_embeddings is True


@pytest.mark.parametrize(
    ("size", "tied", "expected"), [("s", False, False), ("m", None, True), ("moe-s", None, False), ("moe-s", True, True)]
)
def test_the_head_is_the_embedding_or_its_own(tmp_path, size, tied, expected):
    folder = build_nano(tmp_path / "nano", size=size, corpus=CORPUS, seed=1, tied=tied)
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()) is expected
    assert ("lm_head.weight" not in load_file(folder / "model.safetensors")) is expected
    assert model.config.tie_word_embeddings is model.config.text_config.tie_word_embeddings is expected


def test_a_mixture_routes_every_token_in_every_layer_as_the_published_ones_do(moe):
    text = moe.config.text_config
    assert isinstance(moe, Qwen3VLMoeForConditionalGeneration)
    assert (text.num_experts, text.num_experts_per_tok, text.decoder_sparse_step, text.mlp_only_layers) == (8, 2, 1, [])
    assert text.norm_topk_prob is True
    assert text.hidden_size not in (text.moe_intermediate_size, 2 * text.moe_intermediate_size)
    assert text.moe_intermediate_size % 32 == 0
    gates = [parameter for name, parameter in moe.named_parameters() if name.endswith("mlp.gate.weight")]
    assert len(gates) == text.num_hidden_layers
    assert all(len(gate.unique(dim=0)) == 8 for gate in gates)


def test_generation_ends_at_either_end_token(processor, model):
    end_of_turn, end_of_text = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == [end_of_turn, end_of_text]
    assert model.generation_config.pad_token_id == end_of_text


@pytest.mark.parametrize("kind", ["model", "moe"])
def test_every_parameter_gets_a_gradient_from_image_video_and_text_rows(processor, kind, request):
    model = request.getfixturevalue(kind)
    frames = np.stack([np.asarray(pixels(64, 32, seed)) for seed in range(4)])
    rows = [
        "<|vision_start|><|image_pad|><|vision_end|>How many?",
        "<|vision_start|><|video_pad|><|vision_end|>图中有",
        "The sum of 1 and 2 is",
    ]
    batch = processor(
        text=rows,
        images=[pixels(64, 96)],
        videos=[frames],
        video_metadata=[VideoMetadata(total_num_frames=4, fps=2.0, frames_indices=[0, 1, 2, 3])],
        padding=True,
        return_tensors="pt",
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    model.zero_grad()
    loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.abs().sum() > 0]
    assert without == []
    assert abs(loss.item() - np.log(model.config.text_config.vocab_size)) < 0.5  # random weights: about uniform


# ---------------------------------------------------------------- seeds


def test_equal_seeds_give_equal_files_and_others_other_weights(tmp_path, nano):
    again = build_nano(tmp_path / "again", size="s", corpus=iter(CORPUS), seed=1)
    other = build_nano(tmp_path / "other", size="s", corpus=CORPUS, seed=2)
    files = sorted(path.name for path in nano.iterdir())
    assert len(files) >= 6
    for name in files:
        assert (again / name).read_bytes() == (nano / name).read_bytes(), name
    assert (other / "model.safetensors").read_bytes() != (nano / "model.safetensors").read_bytes()
    assert (other / "tokenizer.json").read_bytes() == (nano / "tokenizer.json").read_bytes()


def test_another_process_with_another_hash_seed_builds_the_same_files(tmp_path, nano):
    script = f"""
from pathlib import Path
from vlpost.model.nano import build_nano
build_nano(Path({str(tmp_path / "there")!r}), size="s", corpus={CORPUS!r}, seed=1)
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONHASHSEED": "7", "PATH": ""}, capture_output=True)
    for name in ("tokenizer.json", "model.safetensors"):
        assert (tmp_path / "there" / name).read_bytes() == (nano / name).read_bytes(), name


def test_the_callers_random_state_dtype_and_device_do_not_matter_and_do_not_change(tmp_path, nano):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            built = build_nano(tmp_path / "nano", size="s", corpus=CORPUS, seed=1)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert (built / "model.safetensors").read_bytes() == (nano / "model.safetensors").read_bytes()


# ---------------------------------------------------------------- the tokenizer


def test_a_reloaded_tokenizer_gives_the_same_ids_again(tmp_path, processor):
    ids = processor.tokenizer(MIXED_TEXT)["input_ids"]
    assert isinstance(processor.tokenizer, Qwen2Tokenizer)
    assert processor.tokenizer.decode(ids) == MIXED_TEXT
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer(MIXED_TEXT)["input_ids"] == ids


def test_ids_of_the_saved_file_read_without_transformers_are_the_same(nano, processor):
    from tokenizers import Tokenizer

    assert Tokenizer.from_file(str(nano / "tokenizer.json")).encode(MIXED_TEXT).ids == processor.tokenizer(MIXED_TEXT)["input_ids"]


def test_special_and_markup_tokens_are_one_id_each_at_the_end_of_the_vocabulary(processor):
    tokenizer = processor.tokenizer
    marks = SPECIAL_TOKENS + MARKUP_TOKENS
    assert tokenizer.convert_tokens_to_ids(list(marks)) == list(range(len(tokenizer) - len(marks), len(tokenizer)))
    for mark in marks:
        assert tokenizer(mark)["input_ids"] == [tokenizer.convert_tokens_to_ids(mark)]
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)


def test_decoding_without_special_tokens_keeps_markup(processor):
    ids = processor.tokenizer("<|im_start|><think>7</think><|im_end|>")["input_ids"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == "<think>7</think>"


def test_digits_are_single_tokens_and_the_corpus_is_compressed(processor):
    assert processor.tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    assert len(processor.tokenizer(CORPUS[0])["input_ids"]) < 0.6 * len(CORPUS[0].encode())


@pytest.mark.parametrize("vocab_size", [384, 400])
def test_vocab_size_counts_all_ids_and_the_embedding_is_rounded_up(tmp_path, vocab_size):
    folder = build_nano(tmp_path / "nano", size="s", corpus=CORPUS, vocab_size=vocab_size, seed=0)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert len(AutoProcessor.from_pretrained(folder).tokenizer) == vocab_size
    assert model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == {384: 384, 400: 448}[vocab_size]


def test_a_tiny_corpus_gives_a_smaller_vocabulary(tmp_path):
    folder = build_nano(tmp_path / "nano", size="s", corpus=["ab"], seed=0)
    assert len(AutoProcessor.from_pretrained(folder).tokenizer) == 256 + 1 + len(SPECIAL_TOKENS) + len(MARKUP_TOKENS)


# ---------------------------------------------------------------- the processor


@pytest.mark.parametrize("thinking", [False, True])
def test_the_folder_carries_the_chat_template_asked_for(tmp_path, thinking):
    folder = build_nano(tmp_path / "nano", size="s", corpus=CORPUS, thinking=thinking, seed=0)
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, Qwen3VLProcessor)
    assert processor.chat_template == chat_template(thinking)


@pytest.mark.parametrize(
    ("width", "height", "tokens"), [(32, 32, 1), (8, 8, 1), (96, 64, 6), (256, 256, 64), (1024, 1024, 64), (512, 128, 64)]
)
def test_an_image_is_one_token_for_32_pixels_squared_up_to_the_most(processor, width, height, tokens):
    messages = [{"role": "user", "content": [{"type": "image", "image": pixels(width, height)}, {"type": "text", "text": "?"}]}]
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    image_pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (batch["input_ids"] == image_pad).sum() == tokens
    assert batch["pixel_values"].shape == (4 * tokens, 3 * 2 * 16 * 16)
    assert batch["image_grid_thw"].prod() == 4 * tokens
    assert batch["pixel_values"].abs().max() <= 1.0


def test_an_image_of_fitting_size_passes_unscaled(processor):
    grey = Image.new("RGB", (64, 32), (255, 0, 51))
    patches = processor.image_processor(images=[grey], return_tensors="pt")["pixel_values"]
    expected = torch.tensor([1.0, -1.0, -0.6]).repeat_interleave(2 * 16 * 16).expand(8, -1)
    torch.testing.assert_close(patches, expected)


def test_a_video_is_written_as_timestamps_and_frame_pairs(processor):
    frames = np.stack([np.asarray(pixels(64, 32, seed)) for seed in range(5)])
    batch = processor(
        text=["<|vision_start|><|video_pad|><|vision_end|>?"],
        videos=[frames],
        video_metadata=[VideoMetadata(total_num_frames=20, fps=4.0, frames_indices=[0, 4, 8, 12, 16])],
        return_tensors="pt",
    )
    written = processor.tokenizer.decode(batch["input_ids"][0])
    pads = "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
    # Frame times 0, 1 | 2, 3 | 4, 4 seconds (the odd last frame is doubled): the mean of each pair.
    triple = f"<0.5 seconds>{pads}<2.5 seconds>{pads}<4.0 seconds>{pads}"
    assert written == f"<|vision_start|>{triple}<|vision_end|>?"
    assert batch["video_grid_thw"].tolist() == [[3, 2, 4]]
    assert batch["pixel_values_videos"].shape == (3 * 2 * 4, 3 * 2 * 16 * 16)


def test_media_budgets_are_what_was_asked_for(tmp_path):
    folder = build_nano(tmp_path / "nano", size="s", corpus=CORPUS, max_image_tokens=4, max_video_tokens=6, seed=0)
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.image_processor(images=[pixels(256, 256)], return_tensors="pt")["image_grid_thw"].tolist() == [[1, 4, 4]]
    video = processor.video_processor(videos=[np.zeros((4, 256, 256, 3), dtype=np.uint8)], return_tensors="pt")
    assert video["video_grid_thw"][0].prod() // 4 <= 6
    assert video["video_grid_thw"][0].tolist() == [2, 2, 2]
    assert processor.video_processor.do_sample_frames is False
    assert processor.video_processor.cap_pixels_per_frame is False


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"size": "l"}, "nano size 'l': give one of s, m, moe-s"),
        ({"vocab_size": 383}, "vocab_size = 383: give a number from 384 to 1024"),
        ({"vocab_size": 1025}, "vocab_size = 1025: give a number from 384 to 1024"),
        ({"corpus": "one long text"}, "corpus is one string: give an iterable of texts"),
        ({"max_image_tokens": 0}, "max_image_tokens = 0"),
        ({"max_video_tokens": 0}, "max_video_tokens = 0: both must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_written(tmp_path, keys, words):
    with pytest.raises(ValueError, match=words):
        build_nano(tmp_path / "nano", **{"size": "s", "corpus": CORPUS, "seed": 0, **keys})
    assert not (tmp_path / "nano").exists()


def test_a_folder_with_a_model_is_not_overwritten(nano):
    weights = (nano / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="already holds a model"):
        build_nano(Path(nano), size="m", corpus=CORPUS, seed=5)
    assert (nano / "model.safetensors").read_bytes() == weights
