"""A mixture of experts in the real engine: the exported folder, ten publishes, and the publish that the parity gate has to catch."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from vlpost.model import sampler as sampler_module
from vlpost.model.chat import Chat, allowed_token_mask
from vlpost.model.checkpoint import export_model
from vlpost.model.config import LearnerConfig, ParityConfig, SamplerConfig
from vlpost.model.learner import Distribution, Learner
from vlpost.model.loading import load_model, load_processor
from vlpost.model.nano import build_nano
from vlpost.model.parity import ParityError, ParityReport, check_parity
from vlpost.model.records import ImagePart, Message, TextPart, VideoPart
from vlpost.model.sampler import VllmSampler
from vlpost.model.weight_sync import publish

CORPUS = tuple(f"What is {number} + {number + 3}? The sum is {2 * number + 3}. 图中有 {number} 个数字" for number in range(30))


def disturb(model: torch.nn.Module, seed: int, scale: float = 0.02) -> None:
    """Moves every weight, as an optimizer update would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


class Bench:
    """An engine that has loaded an export of a mixture with moved weights, and the learner that holds these weights."""

    def __init__(self, root: Path) -> None:
        built = build_nano(root / "nano", size="moe-s", corpus=CORPUS, seed=3, vocab_size=448)
        self.chat = Chat(load_processor(built))
        model = load_model(built, dtype=torch.float32)
        disturb(model, seed=0)
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.folder = export_model(root / "export", model=model, processor=self.chat.processor)
        self.allowed = allowed_token_mask(self.chat, model.config.text_config.vocab_size)
        self.sampler = VllmSampler(
            self.folder,
            chat=self.chat,
            config=SamplerConfig(max_response_tokens=12, max_model_len=256),
            allowed=self.allowed,
            stop_token_ids=tuple(model.generation_config.eos_token_id),
            dtype="float32",
        )
        self.learner = Learner(model, config=LearnerConfig(learning_rate=1e-3), num_steps=10)
        self.before_any_publish = self.gate()

    def gate(self) -> ParityReport:
        prompts = [(name, self.chat.encode_prompt(messages)) for name, messages in conversations().items()]
        return check_parity(
            prompts,
            sampler=self.sampler,
            learner=self.learner,
            chat=self.chat,
            distribution=Distribution(temperature=1.0, allowed=self.allowed),
            config=ParityConfig(),
            seed=3,
        )

    def update(self, seed: int) -> None:
        disturb(self.learner.model, seed, scale=0.01)
        self.learner.policy_version += 1


def noise(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def conversations() -> dict[str, tuple[Message, ...]]:
    film = VideoPart.from_frames([noise(seed) for seed in range(4)], fps=2.0, frame_indices=list(range(4)))
    parts = {
        "text": (TextPart(text="what is 1 2?"),),
        "image": (ImagePart.from_image(noise(7, 96, 64)), TextPart(text="sum")),
        "two images": (ImagePart.from_image(noise(8)), TextPart(text="and"), ImagePart.from_image(noise(9)), TextPart(text="多少?")),
        "video": (film, TextPart(text="what?")),
    }
    return {name: (Message(role="user", parts=content),) for name, content in parts.items()}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("bench"))
    with made.sampler:
        yield made


@pytest.fixture(autouse=True)
def _reset(bench: Bench) -> None:
    bench.learner.model.load_state_dict(bench.weights)
    bench.learner.policy_version = 0
    publish(bench.learner, bench.sampler)


def test_the_engine_loads_an_export_and_says_what_the_learner_says(bench):
    assert bench.before_any_publish.num_sequences == 8
    assert bench.before_any_publish.num_tokens >= 50
    assert bench.before_any_publish.engine_gap < 1e-5
    assert bench.before_any_publish.packing_gap < 1e-5


def test_ten_publishes_stay_exact_and_keep_no_weights(bench):
    held = []
    for number in range(10):
        bench.update(seed=number + 1)
        publish(bench.learner, bench.sampler)
        assert bench.gate().engine_gap < 1e-4
        held.append(psutil.Process().memory_info().rss)
    weights = sum(tensor.nbytes for tensor in bench.weights.values())
    assert weights > 8e6
    assert held[-1] - held[1] < 2 * weights  # eight publishes that each kept a copy: 8 x weights


def test_the_gate_catches_a_plain_publish_in_place(bench, monkeypatch):
    monkeypatch.setattr(sampler_module, "forget_expert_kernels", lambda model: None)
    bench.update(seed=1)
    publish(bench.learner, bench.sampler)
    with pytest.raises(ParityError, match=r"text: response token 0 .* in the engine; the limit is 0.0001; the row has no image"):
        bench.gate()


def test_a_publish_after_a_plain_one_is_exact_again(bench, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(sampler_module, "forget_expert_kernels", lambda model: None)
        publish(bench.learner, bench.sampler)
    publish(bench.learner, bench.sampler)
    assert bench.gate().engine_gap < 1e-5


def test_routers_arrive_alone(bench):
    # A publish whose only change is a router: the smallest weights there are, and the ones that decide which experts run.
    gates = [name for name, _ in bench.learner.model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert len(gates) == 4
    before = load_file(bench.folder / "model.safetensors")[gates[0]]
    with torch.no_grad():
        for name in gates:
            bench.learner.model.get_parameter(name).mul_(-5)
    assert not torch.equal(bench.learner.model.get_parameter(gates[0]), before)
    bench.learner.policy_version = 1
    bench.sampler.policy_version = 1
    with pytest.raises(ParityError, match="in the engine"):
        bench.gate()
    publish(bench.learner, bench.sampler)
    assert bench.gate().engine_gap < 1e-5
