"""A nano Qwen3-VL for the tests of the policy: its folder, processor, chat, fresh copies of its weights, small images and videos."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from vlpost.model.chat import Chat
from vlpost.model.loading import load_model, load_processor
from vlpost.model.nano import build_nano
from vlpost.model.packing import weigh
from vlpost.model.records import ImagePart, Message, TextPart, TrainSequence, VideoPart

CORPUS = tuple(
    f"What is {number} + {number + 3}? The sum of the digits is {2 * number + 3}. How many digits are in the image? 图中有 {number} 个数字"
    for number in range(30)
)


@pytest.fixture(scope="session")
def nano_folder(tmp_path_factory):
    return build_nano(tmp_path_factory.mktemp("nano") / "instruct", size="s", corpus=CORPUS, seed=3, vocab_size=448)


@pytest.fixture(scope="session")
def thinking_folder(tmp_path_factory):
    return build_nano(tmp_path_factory.mktemp("nano") / "thinking", size="s", corpus=CORPUS, seed=3, vocab_size=448, thinking=True)


@pytest.fixture(scope="session")
def hf_processor(nano_folder):
    return load_processor(nano_folder)


@pytest.fixture(scope="session")
def chat(hf_processor):
    return Chat(hf_processor)


@pytest.fixture(scope="session")
def thinking_chat(thinking_folder):
    return Chat(load_processor(thinking_folder))


@pytest.fixture(scope="session")
def make_model(nano_folder):
    """Returns a function that makes a fresh copy of the nano, float32, with packed attention."""
    loaded = load_model(nano_folder, dtype=torch.float32)
    return lambda: copy.deepcopy(loaded)


@pytest.fixture(scope="session")
def make_plain_model(nano_folder):
    """Returns a function that makes a fresh copy of the same weights as transformers alone runs them."""
    loaded = AutoModelForImageTextToText.from_pretrained(nano_folder, dtype=torch.float32, attn_implementation="sdpa")
    return lambda: copy.deepcopy(loaded)


def _noise(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def make_image():
    return lambda width=64, height=64, seed=0: ImagePart.from_image(_noise(width, height, seed))


@pytest.fixture(scope="session")
def make_video():
    def make(num_frames=4, width=64, height=64, seed=0, fps=2.0):
        frames = [_noise(width, height, 1000 * (seed + 1) + number) for number in range(num_frames)]
        return VideoPart.from_frames(frames, fps=fps, frame_indices=list(range(num_frames)))

    return make


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory):
    return build_nano(tmp_path_factory.mktemp("nano") / "moe", size="moe-s", corpus=CORPUS, seed=3, vocab_size=448)


@pytest.fixture(scope="session")
def moe_chat(moe_folder):
    return Chat(load_processor(moe_folder))


@pytest.fixture(scope="session")
def make_moe(moe_folder):
    """Returns a function that makes a fresh copy of the nano mixture, float32, with packed attention and sharper routers."""
    loaded = load_model(moe_folder, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.mul_(10)  # random routers are nearly even: their balance loss has hardly a gradient
    return lambda: copy.deepcopy(loaded)


@pytest.fixture(scope="session")
def moe_families(moe_chat, make_image):
    """Three families of one step: a group about an image, of whose responses two begin alike; one text row; a group of short texts."""

    def sequence(parts, response):
        prompt = moe_chat.encode_prompt([Message(role="user", parts=parts)])
        trained = (False,) * len(prompt.token_ids) + (True,) * len(response)
        return TrainSequence(place="row", token_ids=prompt.token_ids + response, trained=trained, media=prompt.media, targets=None)

    seen, text = (make_image(96, 64), TextPart(text="the sum?")), (TextPart(text="3 + 4?"),)
    return weigh(
        [
            [sequence(seen, (5, 6, 7)), sequence(seen, (5, 6, 9, 2)), sequence(seen, (8,))],
            [sequence(text, tuple(range(20, 60)))],
            [sequence((TextPart(text="how many?"),), (number, number + 1)) for number in range(70, 74)],
        ],
        "token",
    )
