"""Adapters in the real engine: every version arrives whole, text, image and video; what arrives in part, late or not at all is caught."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from vlpost.model.chat import Chat, allowed_token_mask
from vlpost.model.config import LearnerConfig, LoraConfig, ParityConfig, SamplerConfig
from vlpost.model.learner import Distribution, Learner
from vlpost.model.loading import load_model, load_processor
from vlpost.model.lora import adapted_layers, base_weights, engine_adapter, perturbed_adapter, save_adapter
from vlpost.model.parity import ParityError, check_parity
from vlpost.model.records import ImagePart, Message, TextPart, VideoPart
from vlpost.model.sampler import EngineError, SampleRequest, VllmSampler
from vlpost.model.weight_sync import publish

LORA = LoraConfig(rank=4, alpha=8, parts=("language", "merger", "vision"))


def picture(seed: int, width: int = 64) -> ImagePart:
    return ImagePart.from_image(Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, width, 3), dtype=np.uint8)))


def film(seed: int, num_frames: int) -> VideoPart:
    return VideoPart.from_frames([picture(seed + i).image for i in range(num_frames)], fps=2.0, frame_indices=list(range(num_frames)))


def conversations() -> dict[str, tuple[object, ...]]:
    return {
        "text": ("what is 1 2?",),
        "image": (picture(0), "sum"),
        "two images": (picture(0), "and", picture(1, 96), "多少?"),
        "video": (film(5, 5), "what?"),
        "video and image": (film(5, 4), "then", picture(2), "?"),
    }


class Bench:
    """One engine with room for adapters, and its learner."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chat = Chat(load_processor(folder))
        model = load_model(folder, dtype=torch.float32)
        allowed = allowed_token_mask(self.chat, model.config.text_config.vocab_size)
        self.distribution = Distribution(temperature=1.0, allowed=allowed)
        self.sampler = VllmSampler(
            folder,
            chat=self.chat,
            config=SamplerConfig(max_response_tokens=12, max_model_len=256),
            allowed=allowed,
            stop_token_ids=tuple(model.generation_config.eos_token_id),
            dtype="float32",
            adapter=engine_adapter(model, LORA, on_cpu=True),
        )
        self.learner = Learner(model, config=LearnerConfig(learning_rate=1e-3, lora=LORA), num_steps=10)

    def prompts(self) -> list[tuple[str, object]]:
        made = {
            name: Message(role="user", parts=tuple(TextPart(text=part) if isinstance(part, str) else part for part in parts))
            for name, parts in conversations().items()
        }
        return [(name, self.chat.encode_prompt((message,))) for name, message in made.items()]

    def gate(self) -> float:
        report = check_parity(
            self.prompts(),
            sampler=self.sampler,
            learner=self.learner,
            chat=self.chat,
            distribution=self.distribution,
            config=ParityConfig(),
            seed=3,
        )
        assert report.num_sequences == 10
        return report.engine_gap

    def new_version(self, seed: int) -> None:
        """Changes every adapter, A and B, far enough that any other version would answer visibly otherwise."""
        generator = torch.Generator().manual_seed(seed)
        for _, layer in adapted_layers(self.learner.model):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.data.copy_(torch.randn(a.shape, generator=generator) / a.shape[1] ** 0.5)
            b.data.copy_(torch.randn(b.shape, generator=generator) * 0.05)
        self.learner.policy_version += 1

    def engine_digests(self) -> dict[str, str]:
        """SHA-256 of every base weight in the engine."""

        def digests(model: torch.nn.Module) -> dict[str, str]:
            named = {name: p.detach().contiguous() for name, p in model.named_parameters() if "lora" not in name}
            return {name: hashlib.sha256(p.view(torch.uint8).numpy().tobytes()).hexdigest() for name, p in named.items()}

        return self.sampler._llm.apply_model(digests)[0]

    def load_changed(self, folder: Path, change) -> None:
        """Loads the learner's adapter with `change` applied to its tensors, as the learner's version."""
        save_adapter(self.learner.model, folder, base="nano")
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(change(tensors), folder / "adapter_model.safetensors")
        self.sampler.load_adapter(folder, self.learner.policy_version)


@pytest.fixture(scope="module")
def bench(nano_folder: Path) -> Iterator[Bench]:
    made = Bench(nano_folder)
    with made.sampler:
        yield made


@pytest.fixture(autouse=True)
def _reset(bench: Bench) -> None:
    bench.learner.policy_version = 0
    bench.new_version(seed=99)
    publish(bench.learner, bench.sampler)


def zeroed(tensors, *, where):
    """The tensors with the adapters whose names hold `where` switched off; at least one must."""
    assert any(where(name) for name in tensors)
    return {name: torch.zeros_like(value) if where(name) else value for name, value in tensors.items()}


def test_every_version_arrives_and_no_base_weight_ever_changes(bench):
    learner_base = {name: value.clone() for name, value in base_weights(bench.learner.model)}
    engine_base = bench.engine_digests()
    assert len(engine_base) > 100
    for version in range(2, 6):
        bench.new_version(seed=version)
        publish(bench.learner, bench.sampler)
        assert bench.gate() < 1e-4
        assert bench.sampler._llm.llm_engine.list_loras() == {version + 1}  # the one before is gone
        assert bench.sampler.policy_version == version
    assert bench.engine_digests() == engine_base
    assert all(torch.equal(value, learner_base[name]) for name, value in base_weights(bench.learner.model))


def test_one_version_published_twice_arrives_twice(bench):
    # As the probe before step 1 does: vLLM knows an adapter by its name and number, and would keep the first.
    with perturbed_adapter(bench.learner.model, seed=1):
        publish(bench.learner, bench.sampler)
        assert bench.gate() < 1e-4
    with pytest.raises(ParityError):
        bench.gate()
    publish(bench.learner, bench.sampler)
    assert bench.gate() < 1e-4


def test_published_folders_are_gone_and_not_needed(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bench.new_version(seed=7)
    publish(bench.learner, bench.sampler)
    assert list(tmp_path.iterdir()) == []
    assert bench.gate() < 1e-4


def test_gate_catches_an_adapter_that_did_not_arrive(bench, monkeypatch):
    monkeypatch.setattr(bench.sampler, "_adapter_request", None)
    monkeypatch.setattr(bench.sampler, "_adapter", None)
    with pytest.raises(ParityError, match=r"text: response token 0 .* in the engine; the limit is 0\.0001; the row has no image"):
        bench.gate()


def test_gate_catches_an_adapter_of_which_only_the_language_part_arrived(bench, tmp_path):
    bench.load_changed(tmp_path, lambda tensors: zeroed(tensors, where=lambda name: ".visual." in name))
    with pytest.raises(ParityError, match=r"rows with .* differ and no text-only row does"):
        bench.gate()


@pytest.mark.parametrize("part", [".visual.blocks.", ".visual.merger.", ".deepstack_merger_list.", ".self_attn.k_proj.", ".up_proj."])
def test_gate_catches_each_part_that_is_left_out(bench, tmp_path, part):
    bench.load_changed(tmp_path, lambda tensors: zeroed(tensors, where=lambda name: part in name))
    with pytest.raises(ParityError, match=r"the limit is 0\.0001"):
        bench.gate()


def test_gate_catches_an_adapter_on_half_of_the_layers(bench, tmp_path):
    bench.load_changed(tmp_path, lambda tensors: zeroed(tensors, where=lambda name: "language_model.layers.0." in name))
    with pytest.raises(ParityError, match="text: response token"):
        bench.gate()


def test_gate_catches_an_old_adapter_under_a_new_version(bench, tmp_path):
    save_adapter(bench.learner.model, tmp_path, base="nano")
    bench.new_version(seed=8)
    bench.sampler.load_adapter(tmp_path, bench.learner.policy_version)
    with pytest.raises(ParityError, match="text: response token"):
        bench.gate()


@pytest.mark.parametrize(
    ("lacking", "named"), [(".visual.", "visual.blocks.0.attn.proj"), ("layers.0.mlp.down_proj", "layers.0.mlp.down_proj")]
)
def test_engine_refuses_a_folder_without_some_layers_and_then_answers_nothing(bench, tmp_path, lacking, named):
    with pytest.raises(EngineError, match=rf"layers got no adapter in the engine \(.*{named}"):
        bench.load_changed(tmp_path, lambda tensors: {name: value for name, value in tensors.items() if lacking not in name})
    (name, prompt), *_ = bench.prompts()
    with pytest.raises(EngineError, match="no adapter has been published: the engine would answer with its base weights"):
        bench.sampler.sample([SampleRequest(place=name, prompt=prompt, num_rollouts=1, seed=1, temperature=1.0)])


def test_merged_weights_say_the_same_and_leave_the_learner_alone(bench, tmp_path, monkeypatch):
    before = {name: value.clone() for name, value in bench.learner.model.state_dict().items()}
    merged = bench.learner.config.model_copy(update={"lora": LORA.model_copy(update={"publish": "merged"})})
    try:
        with monkeypatch.context() as patch:
            patch.setattr(bench.learner, "config", merged)
            publish(bench.learner, bench.sampler)
        assert bench.sampler._llm.llm_engine.list_loras() == set()
        # This engine answers only with an adapter: one of zeros.
        bench.load_changed(tmp_path, lambda tensors: zeroed(tensors, where=lambda name: ".lora_B." in name))
        assert bench.gate() < 1e-4
        assert all(torch.equal(value, before[name]) for name, value in bench.learner.model.state_dict().items())
    finally:
        bench.sampler.load_weights(base_weights(bench.learner.model), 0)
